"""The tables of docs/recipes.md, from the models that check a recipe: `python recipe_tables.py`."""

from __future__ import annotations

from gossamer import recipe
from gossamer.report import render

MODELS = {
    "The file": recipe.Recipe,
    "How a stage trains": recipe.Training,
    "prune": recipe.Prune,
    "distil": recipe.Distil,
    "quantize": recipe.Quantize,
    "quantize.calibration": recipe.Calibration,
    "pack": recipe.Pack,
}


def table(model):
    """A row for each key that is the model's own."""
    base = model.__mro__[1]
    inherited = getattr(base, "model_fields", {})
    rows = []
    for name, field in model.model_fields.items():
        if name in inherited:
            continue
        default = "required" if field.is_required() else f"`{field.default}`"
        default = {"`None`": "", "`[]`": ""}.get(default, default)
        meaning = field.description or f"the stage, see [{name}](#{name})"
        rows.append([f"`{name}`", default, meaning])
    return render(["key", "default", "meaning"], rows)


if __name__ == "__main__":
    for title, model in MODELS.items():
        print(f"## {title}\n\n{table(model)}\n")

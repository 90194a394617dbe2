"""Every stem on every Isa under the sanitizers, with guard pages: builds and runs tests/native."""

from __future__ import annotations

from pathlib import Path

from builds import ROOT, build, output

import gossamer as gs


def test_no_kernel_touches_what_is_not_its_own(tmp_path: Path) -> None:
    folder = build(ROOT / "tests" / "native", tmp_path, targets=("native",))
    ran = output(folder / "native").split(" on ")[1].split()
    assert set(ran) == set(gs._C.isas())

"""A whole net in ONNX Runtime and OpenVINO, fp32 and int8: what bench/resnet.py compares with."""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import peers

FP32 = ("onnxruntime fp32", "openvino fp32")
INT8 = ("onnxruntime int8", "openvino int8")
NEEDS = ("onnx", "onnxruntime", "openvino")


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def exported(model: nn.Module, x: Tensor) -> bytes:
    """The model in ONNX, for batches of any size; BatchNorm is folded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter without onnxscript is the older one
        torch.onnx.export(
            model,
            (x,),
            file,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    return file.getvalue()


def quantized(model: bytes, batches: Iterable[Tensor]) -> bytes:
    """Static int8: activations u8 by the ranges of these batches, weights s8 a scale an output.

    Quantizing and dequantizing nodes around each operation, which both engines fuse into it.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    before = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder:
        float_path, int8_path = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        float_path.write_bytes(model)
        try:
            logging.disable(logging.WARNING)  # "consider pre-processing": folding is done
            quantize_static(
                *(float_path, int8_path, Reader()),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(before)
        return int8_path.read_bytes()


def calls(fp32: bytes, int8: bytes, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each engine on x, in fp32 and int8, on as many threads as torch uses now.

    Raises:
        AssertionError: OpenVINO computes a convolution of the int8 model in floats.
    """
    import openvino

    found: dict[str, Callable[[], Tensor]] = {}
    for kind, model in (("fp32", fp32), ("int8", int8)):
        read = openvino.Core().read_model(io.BytesIO(model))
        read.reshape({"x": list(x.shape)})
        compiled = peers.compile_openvino(read)
        types = convolutions(compiled)
        assert kind == "fp32" or set(types) <= {"u8", "i8"}, f"OpenVINO runs {types}"
        found[f"onnxruntime {kind}"] = peers.run_onnx(model, x)
        found[f"openvino {kind}"] = peers.run_openvino(compiled, x)
    return found


def convolutions(compiled: Any) -> list[str]:
    """The type of numbers that OpenVINO runs each convolution in, such as "f32" or "u8"."""
    graph = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return [
        info["runtimePrecision"].astype(str)
        for info in graph
        if info["layerType"].astype(str) == "Convolution"
    ]

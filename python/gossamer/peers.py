"""The libraries that Gossamer is measured against: each builds the same layer, on the same input.

A peer is one function and one entry in `PEERS`. It is imported when it is asked for, so that none
has to be installed, and it computes on as many threads as torch does at that moment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """Another way to compute y = x @ w^T + bias.

    Args:
        build: (layer, x) -> a call that returns y; it does once what a user would do once.
        weight_bytes: of one weight as it is stored.
        error: the most that norm(y - exact) / norm(exact) may be.
        integer: whether it multiplies integers.
        pruned: whether it gets the weight that the sparse formats get, and stores its non-zeros.
        needs: packages, as pip calls them and as they are imported.
    """

    build: Callable[[nn.Linear, Tensor], Call]
    weight_bytes: int
    error: float
    integer: bool = False
    pruned: bool = False
    needs: tuple[str, ...] = ()


def build(name: str, layer: nn.Linear, x: Tensor) -> Call:
    """A call that computes layer(x) in the named peer, whose result was compared with torch's.

    Raises:
        ValueError: no peer has this name.
        ImportError: it is not installed; says what to install.
        RuntimeError: it cannot build the layer on this machine.
        AssertionError: its result is wrong.

    Example:
        >>> layer, x = nn.Linear(8, 4), torch.ones(2, 8)
        >>> build("torch.sparse", layer, x)().shape
        torch.Size([2, 4])
    """
    check(name)
    peer = PEERS[name]
    for package in peer.needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"{name} needs {package}, which is not installed: "
                f"pip install {' '.join(peer.needs)}"
            ) from error
    with torch.inference_mode():
        call = peer.build(layer, x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        off = float((call() - exact).norm() / exact.norm())
    if not off <= peer.error:
        raise AssertionError(f"{name} is off by {off:.2g} of the norm (limit {peer.error})")
    return call


def check(name: str) -> None:
    """ValueError unless a peer has this name."""
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}: use {', '.join(PEERS)}, all or none")


def versions() -> dict[str, str]:
    """The version of each package that some peer needs and that is installed."""
    found = {}
    for package in sorted({package for peer in PEERS.values() for package in peer.needs}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def quantize_dynamic(model: nn.Module, engine: str = "fbgemm") -> nn.Module:
    """A copy of the model with torch's own int8 layers, on the kernels of `engine`.

    Raises:
        ImportError: this torch has none.
    """
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no quantize_dynamic") from error
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():  # deprecated since torch 2.10, and still fast
            warnings.simplefilter("ignore")
            return quantize_dynamic(model, {nn.Linear})
    finally:
        torch.backends.quantized.engine = before


def _quantized(engine: str) -> Callable[[nn.Linear, Tensor], Call]:
    def build(layer: nn.Linear, x: Tensor) -> Call:
        model = quantize_dynamic(nn.Sequential(layer), engine)
        return lambda: model(x)

    return build


def _torch_sparse(layer: nn.Linear, x: Tensor) -> Call:
    """W in CSR times x^T (MKL): six times as fast as F.linear with the same weight."""
    with warnings.catch_warnings():  # "is in beta state"
        warnings.simplefilter("ignore")
        csr = layer.weight.detach().to_sparse_csr()
        # MKL reads int32; torch would convert its int64 at each call.
        index = csr.crow_indices().int(), csr.col_indices().int()
        weight = torch.sparse_csr_tensor(*index, csr.values(), csr.shape, check_invariants=False)
    bias = layer.bias.detach()[:, None].expand(-1, len(x))
    return lambda: torch.addmm(bias, weight, x.t()).t()


def _onnx_model(layer: nn.Linear, x: Tensor) -> Any:
    """One MatMul and one Add: what exporters make of a Linear, and what gets quantized."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, columns: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x), columns])

    weight = layer.weight.detach().t().contiguous().numpy()
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        "linear",
        [value("x", layer.in_features)],
        [value("y", layer.out_features)],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(layer.bias.detach().numpy(), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run_onnx(model: bytes, x: Tensor) -> Call:
    """A call that runs an ONNX model, whose input is named "x", in ONNX Runtime.

    It uses as many threads as torch does now.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors alone: it warns of each constant that it folds
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _onnxruntime(layer: nn.Linear, x: Tensor) -> Call:
    return run_onnx(_onnx_model(layer, x).SerializeToString(), x)


def _onnxruntime_int8(layer: nn.Linear, x: Tensor) -> Call:
    """onnxruntime.quantization.quantize_dynamic, a scale for each output."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _no_warnings():
        path = Path(folder, "int8.onnx")
        model = _onnx_model(layer, x)
        quantize_dynamic(model, path, weight_type=QuantType.QInt8, per_channel=True)
        return run_onnx(path.read_bytes(), x)


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # "consider to run pre-processing": one MatMul needs none
        yield
    finally:
        logging.disable(before)


def _openvino(layer: nn.Linear, x: Tensor) -> Call:
    from openvino import opset13 as ops

    return _matmul(ops.constant(layer.weight.detach().numpy()), layer, x, {})


def _openvino_int8(layer: nn.Linear, x: Tensor) -> Call:
    """int8 weights with a scale for each output; x is quantized a row at run time."""
    import openvino
    from openvino import opset13 as ops

    weight = layer.weight.detach()
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    quantized = ops.constant((weight / scale).round().to(torch.int8).numpy())
    restored = ops.multiply(ops.convert(quantized, openvino.Type.f32), ops.constant(scale.numpy()))
    group = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": layer.in_features}
    return _matmul(restored, layer, x, group)


def _matmul(weight: Any, layer: nn.Linear, x: Tensor, options: dict[str, Any]) -> Call:
    import openvino
    from openvino import opset13 as ops

    rows = ops.parameter(list(x.shape), openvino.Type.f32)
    product = ops.matmul(rows, weight, False, True)
    y = ops.add(product, ops.constant(layer.bias.detach().numpy()))
    model = openvino.Model([y], [rows], "linear")
    return run_openvino(compile_openvino(model, options), x)


def compile_openvino(model: Any, options: Mapping[str, Any] | None = None) -> Any:
    """An OpenVINO model compiled for the CPU, on as many threads as torch uses now."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the CPU has it
        "ENABLE_CPU_PINNING": False,
    }
    return openvino.Core().compile_model(model, "CPU", {**settings, **(options or {})})


def run_openvino(compiled: Any, x: Tensor) -> Call:
    """A call that runs a compiled OpenVINO model of one input and one output."""
    request = compiled.create_infer_request()

    def call() -> Tensor:
        outputs = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return call


_ONNX = ("onnx", "onnxruntime")
_OPENVINO = ("openvino",)

PEERS: dict[str, Peer] = {
    "fbgemm": Peer(_quantized("fbgemm"), 1, 0.1, integer=True),
    "onednn": Peer(_quantized("onednn"), 1, 0.1, integer=True),
    "torch.sparse": Peer(_torch_sparse, 8, 1e-5, pruned=True),
    "ort": Peer(_onnxruntime, 4, 1e-5, needs=_ONNX),
    "ort-int8": Peer(_onnxruntime_int8, 1, 0.1, integer=True, needs=_ONNX),
    "openvino": Peer(_openvino, 4, 1e-5, needs=_OPENVINO),
    "openvino-int8": Peer(_openvino_int8, 1, 0.1, integer=True, needs=_OPENVINO),
}

"""Other engines for whole models on a CPU: ONNX Runtime and OpenVINO, from the same ONNX file.

Both get the stock model as PyTorch exports it, with as many threads as PyTorch has, one call at a
time and the settings that their documentation gives for that. What they do to layouts, constants
and BN is their own business, and done before anything is timed.
"""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
T = TypeVar("T")

_PRECISIONS = {
    torch.float32: ("f32", "FP32"),
    torch.bfloat16: ("bf16", "BF16"),
    torch.float16: ("f16", "FP16"),
}
"""OpenVINO's names of a dtype: as a precision to compute in, and as a capability of a device."""


class UnavailableError(RuntimeError):
    """The engine is not installed, or does not do what is asked for."""


def onnx_file(model: nn.Module, images: Tensor) -> bytes:
    """``model`` in evaluation mode as an ONNX file, for images of just this shape.

    Args:
        model: a stock model with float32 parameters; left in evaluation mode.
        images: (N, C, H, W) float32.

    Raises:
        UnavailableError: the package onnx is not installed.
    """
    package("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings():
        # It is deprecated, and warns of every shape that becomes a constant; the other exporter
        # needs one more package and writes the same convolutions.
        warnings.simplefilter("ignore")
        export: Any = torch.onnx.export  # annotated as if it took paths only
        export(model.eval(), (images,), file, dynamo=False)
    return file.getvalue()


def onnxruntime_forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Forward:
    """ONNX Runtime's CPU provider with all its graph optimisations; see ``ENGINES``.

    Raises:
        UnavailableError: it is not installed, or ``dtype`` is not float32: the provider would
            convert 16-bit tensors and run the convolutions in float32 all the same.
    """
    ort = package("onnxruntime")
    if dtype != torch.float32:
        raise UnavailableError(f"it has no convolution in {dtype} on CPUs")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors
    # Its threads spin inside a call, but not on into the next contender's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        onnx_file(model, images), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def forward(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])

    return forward


def openvino_forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Forward:
    """OpenVINO's CPU plugin, one stream, set for latency, computing in ``dtype``; see ``ENGINES``.

    Raises:
        UnavailableError: it is not installed, does not compute in ``dtype`` on this CPU, or takes
            another number of threads than PyTorch.
    """
    openvino = package("openvino")
    precision, capability = _PRECISIONS[dtype]
    threads = torch.get_num_threads()
    core = openvino.Core()
    if capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError(f"it does not compute in {precision} on this CPU")
    compiled = core.compile_model(
        core.read_model(io.BytesIO(onnx_file(model, images))),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            # For latency it would leave out the second thread of a core, which PyTorch counts.
            "ENABLE_HYPER_THREADING": "YES",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    # Hints are not promises: what the plugin cannot do it replaces without a word.
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != precision:
        raise UnavailableError(f"it computes in {taken} where {precision} is asked for")
    running = compiled.get_property("INFERENCE_NUM_THREADS")
    if running != threads:
        raise UnavailableError(f"it runs {running} threads where {threads} are asked for")
    request = compiled.create_infer_request()

    def forward(batch: Tensor) -> Tensor:
        request.infer([batch.numpy()], share_inputs=True)
        # The request owns the result, and the next call overwrites it.
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return forward


ENGINES: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Forward]] = {
    "onnxruntime": onnxruntime_forward,
    "openvino": openvino_forward,
}
"""By the contender's name: what makes a forward from a stock model with float32 parameters, images
(N, C, H, W) float32 of the shape that it will be called with, and the dtype to compute in: float32,
float16 or bfloat16. The forward takes contiguous float32 images and returns float32 logits.
"""


def lazy_forward(name: str, model: nn.Module, dtype: torch.dtype) -> Forward:
    """``ENGINES[name]``'s forward, made in the first call and for that call's shape of images.

    Args:
        name: of ``ENGINES``.
        model: a stock model on the CPU, which stays as it is. Its parameters are given to the
            engine in float32, and are those of ``dtype`` if they are so here.
        dtype: to compute in: float32, float16 or bfloat16.

    Raises:
        UnavailableError: in the first call, where the engine cannot.
    """
    template = copy.deepcopy(model).float()
    return lazily(lambda batch: ENGINES[name](template, batch, dtype))


def lazily(make: Callable[[Tensor], Callable[..., T]]) -> Callable[..., T]:
    """The function that ``make`` makes of its first call's first argument, then."""
    made: list[Callable[..., T]] = []

    def call(*arguments: Tensor) -> T:
        if not made:
            made.append(make(arguments[0]))
        return made[0](*arguments)

    return call


def package(name: str) -> Any:
    """The module ``name``.

    Raises:
        UnavailableError: it does not import.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"{name} does not import ({error}); pip install 'effnet_kernels[peers]' brings it"
        ) from None

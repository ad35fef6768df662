"""Other engines for whole models on a CPU: ONNX Runtime and OpenVINO, from one ONNX file.

Both get the model as PyTorch exports it, NCHW and with float32 weights, as many threads as PyTorch
has, one call at a time, and settings that their documentation gives for that; what they do to
layouts, constants and BN is their own business, and done before anything is timed.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


class UnavailableError(RuntimeError):
    """The engine is not installed, or does not have what is asked for."""


def onnx_file(model: nn.Module, images: Tensor) -> bytes:
    """``model`` in evaluation mode as an ONNX file for inputs of just this shape.

    Args:
        model: a stock model with float32 parameters.
        images: (N, C, H, W) float32.

    Raises:
        UnavailableError: the package onnx is not installed.
    """
    _package("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings():  # the exporter through TorchScript needs no further package
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (images,), file, dynamo=False)  # type: ignore[arg-type]
    return file.getvalue()


def onnxruntime_forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Forward:
    """ONNX Runtime's CPU provider, all graph optimisations on.

    Raises:
        UnavailableError: it is not installed, or ``dtype`` is not float32, for which alone its CPU
            provider has convolutions.
    """
    ort = _package("onnxruntime")
    if dtype != torch.float32:
        raise UnavailableError(f"its CPU provider has no convolution in {dtype}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        onnx_file(model, images), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def forward(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])

    return forward


def openvino_forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Forward:
    """OpenVINO's CPU plugin, one stream set for latency, computing in ``dtype``.

    Raises:
        UnavailableError: it is not installed, or does not compute in ``dtype`` on this CPU.
    """
    ov = _package("openvino")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    hint = hints[dtype]
    core = ov.Core()
    if dtype != torch.float32:
        offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if hint.upper().replace("F16", "FP16").replace("BFP16", "BF16") not in offered:
            raise UnavailableError(f"it does not compute in {hint} on this CPU")
    compiled = core.compile_model(
        core.read_model(io.BytesIO(onnx_file(model, images))),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "INFERENCE_PRECISION_HINT": hint,
        },
    )
    request = compiled.create_infer_request()

    def forward(batch: Tensor) -> Tensor:
        request.infer([batch.numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return forward


ENGINES: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Forward]] = {
    "onnxruntime": onnxruntime_forward,
    "openvino": openvino_forward,
}
"""By the contender's name: what makes a forward from a stock float32 model, images of the shape
that it will be called with, and the dtype to compute in. The images that the forward takes are
float32, NCHW.
"""


def lazy_forward(name: str, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Forward:
    """``ENGINES[name]``'s forward, which is made in the first call."""
    # In float32 however the contenders compute: the engines round the weights themselves.
    template = copy.deepcopy(model).float()
    made: list[Forward] = []

    def forward(batch: Tensor) -> Tensor:
        if not made:
            made.append(ENGINES[name](template, images.float().contiguous(), dtype))
        return made[0](batch)

    return forward


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UnavailableError(
            f"the package {name} is not installed: pip install 'effnet_kernels[peers]'"
        ) from None

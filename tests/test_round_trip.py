"""What people do with a timm model, done with a converted one."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path

import distributed_worker
import pytest
import timm
import torch
import torch.multiprocessing as mp
from accuracy import relative_errors
from fused_calls import Calls
from stock_models import calibrate
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from effnet_kernels import convert, report, use_backend

SHAPE = (4, 3, 64, 64)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["mobilenetv3_small_050", "test_efficientnet"])
def name(request: pytest.FixtureRequest) -> str:
    """Small models: one with squeeze-and-excitation, blocks with and without expansion and a
    ConvBnAct at the end; one that begins with Fused-MBConv, with and without expansion.
    """
    result: str = request.param
    return result


def make_models(name: str, **settings: object) -> tuple[nn.Module, nn.Module]:
    """A stock model and a converted copy of it, in evaluation mode."""
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=10, **settings)
    calibrate(stock, SHAPE)
    return stock.eval(), convert(copy.deepcopy(stock), strict=True).eval()


def images(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator).contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Of a loss of the logits, with respect to all parameters, as one vector."""
    logits = model(x)
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().float() for g in grads])


def assert_close(ours: Tensor, theirs: Tensor, rtol: float = 1e-3) -> None:
    """Within ``rtol`` in norm."""
    assert relative_errors(ours, theirs.double())[1] <= rtol


def test_state_dict_both_ways(name: str) -> None:
    """Weights trained in one load into the other."""
    stock, fused = make_models(name)
    other_stock, other_fused = timm.create_model(name, num_classes=10).eval(), make_models(name)[1]
    nn.init.normal_(other_fused.conv_stem.weight)
    other_stock.load_state_dict(fused.state_dict(), strict=True)
    other_fused.load_state_dict(stock.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other_stock(images()), stock(images()))
        assert torch.equal(other_fused(images()), fused(images()))


def test_train_and_eval_switch(name: str) -> None:
    """A training step moves every buffer as stock does, and evaluation then uses them."""
    stock, fused = make_models(name, drop_path_rate=0.3)
    for model in (stock, fused):
        for step in range(2):
            torch.manual_seed(step)
            gradients(model.train(), images(step))
    for (buffer, ours), theirs in zip(fused.named_buffers(), stock.buffers(), strict=True):
        if ours.is_floating_point():
            assert_close(ours, theirs)
        else:
            assert torch.equal(ours, theirs), buffer
    with torch.no_grad():
        assert_close(fused.eval()(images()), stock.eval()(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_autocast(name: str, dtype: torch.dtype, training: bool) -> None:
    """Under autocast the model is at least as exact as the stock one."""
    stock, fused = make_models(name)
    for model in (stock, fused):
        model.train(training)
    exact = copy.deepcopy(stock).double()(images().double())
    with torch.autocast("cpu", dtype), Calls() as calls:
        ours = fused(images())
    with torch.autocast("cpu", dtype):
        theirs = stock(images())
    assert calls.whole and calls.normalised
    assert ours.dtype == theirs.dtype
    assert relative_errors(ours, exact)[1] <= 2 * relative_errors(theirs, exact)[1]


def test_compile_without_recompiling(name: str) -> None:
    """One graph for all training steps, one for evaluation, with our ops in it."""
    _, fused = make_models(name)
    eager = copy.deepcopy(fused)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for step in range(3):
        assert_close(
            gradients(compiled.train(), images(step)), gradients(eager.train(), images(step))
        )
    assert counter.frame_count == 1
    assert any("mbconv_train" in str(node.target) for node in counter.graphs[0].graph.nodes)
    with torch.no_grad():
        assert_close(compiled.eval()(images()), eager.eval()(images()))
        compiled(images(2))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_export(name: str) -> None:
    """``torch.export`` records our ops, and what it records gives the same."""
    _, fused = make_models(name)
    with torch.no_grad():
        exported = torch.export.export(fused, (images(),), strict=False)
        targets = {str(node.target) for node in exported.graph.nodes}
        assert any("effnet_kernels.mbconv" in target for target in targets)
        assert torch.equal(exported.module()(images()), fused(images()))


def test_onnx(name: str) -> None:
    """An ONNX file of a converted model is the stock model's, byte for byte."""
    pytest.importorskip("onnx")
    files = []
    for model in make_models(name):
        file = io.BytesIO()
        torch.onnx.export(model, (images(),), file, dynamo=False)
        files.append(file.getvalue())
    assert files[0] == files[1]


def test_checkpointing(name: str) -> None:
    """``set_grad_checkpointing`` gives the same gradients."""
    _, fused = make_models(name)
    fused.train()
    expected = gradients(copy.deepcopy(fused), images())
    fused.set_grad_checkpointing(True)
    assert torch.equal(gradients(fused, images()), expected)


def test_ema(name: str) -> None:
    """``ModelEmaV3`` copies a converted model, and its average runs on our ops."""
    _, fused = make_models(name)
    ema = ModelEmaV3(fused, decay=0.5)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.01)
        ema.update(fused)
        with Calls() as calls:
            output = ema.module(images())
    blocks = ("FusedDepthwiseSeparableConv", "FusedInvertedResidual")
    assert calls.whole == sum(r.class_name in blocks for r in report(fused))
    assert torch.isfinite(output).all()


def test_features(name: str) -> None:
    """``features_only``, ``forward_intermediates`` and ``reset_classifier``."""
    stock = timm.create_model(name, features_only=True)
    calibrate(stock, SHAPE)
    fused = convert(copy.deepcopy(stock)).eval()
    with torch.no_grad(), Calls() as calls:
        ours = fused(images())
    assert calls.whole + calls.fused_mbconv > 2
    with torch.no_grad():
        for mine, theirs in zip(ours, stock.eval()(images()), strict=True):
            assert_close(mine, theirs)
    stock, fused = make_models(name)
    with torch.no_grad():
        final, intermediates = fused.forward_intermediates(images())
        expected, expected_intermediates = stock.forward_intermediates(images())
        assert_close(final, expected)
        for mine, theirs in zip(intermediates, expected_intermediates, strict=True):
            assert_close(mine, theirs)
        fused.reset_classifier(3)
        assert fused(images()).shape == (4, 3)


def test_pickle_and_copy(name: str) -> None:
    """A pickled model is the model."""
    _, fused = make_models(name)
    with torch.no_grad():
        for copied in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
            assert torch.equal(copied(images()), fused(images()))
            assert [type(m) for m in copied.modules()] == [type(m) for m in fused.modules()]


def test_deterministic(name: str) -> None:
    """Deterministic mode has nothing to object to, and the bits are the same again."""
    _, fused = make_models(name)
    torch.use_deterministic_algorithms(True)
    first, second = (gradients(copy.deepcopy(fused).train(), images()) for _ in range(2))
    assert torch.equal(first, second)


def test_double_backward_is_an_error(name: str) -> None:
    """A second derivative through the model is refused in words."""
    _, fused = make_models(name)
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(fused.train()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("model", "size", "share"), [("efficientnet_b0", 96, 0.4), ("efficientnetv2_s", 96, 0.5)]
)
def test_saved_bytes(model: str, size: int, share: float) -> None:
    """What a training step keeps for backward, in parts of what stock keeps."""
    stock = timm.create_model(model).train()
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)

    def saved(model: nn.Module) -> int:
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(x)  # alive until the sizes are summed: a freed address would be reused
        assert logits.requires_grad
        return sum(sizes.values())

    ours, theirs = saved(convert(copy.deepcopy(stock))), saved(stock)
    print(f"{ours / theirs:.3f}")
    assert ours <= share * theirs


def test_distributed(name: str, tmp_path: Path) -> None:
    """Two processes of DistributedDataParallel: gradients equal each other's and stock's."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    path = str(tmp_path / "gradients")
    mp.spawn(distributed_worker.run, (name, f"file://{tmp_path / 'rendezvous'}", path), nprocs=2)
    (stock, ours), (_, others) = (torch.load(f"{path}.{rank}") for rank in range(2))
    assert torch.equal(ours, others)
    assert_close(ours, stock)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cuda_graph(name: str, backend: str) -> None:
    """Inference is captured in a CUDA graph and replayed on other images."""
    _, fused = make_models(name)
    fused = fused.cuda().to(torch.bfloat16)
    static = images().cuda().to(torch.bfloat16)
    with use_backend(backend), torch.no_grad():
        for _ in range(3):
            fused(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = fused(static)
        static.copy_(images(5))
        graph.replay()
        assert torch.equal(output, fused(static))

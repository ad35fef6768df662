"""timm's blocks on the fused op: what is taken, what is not, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from accuracy import FORWARD, GRADIENT
from fused_calls import Calls
from layers.block_runs import assert_exact_enough, run
from stock_models import assert_norm_error_rule, calibrate
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from timm.layers import activations as timm_act
from timm.layers import activations_me as timm_act_me
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

import effnet_kernels
from effnet_kernels import convert, report
from effnet_kernels.layers.timm import squeeze_excite_refusal, whole_refusal

pytestmark = pytest.mark.usefixtures("one_thread")

C = 16
Block = InvertedResidual | DepthwiseSeparableConv


def make_blocks(cls: type = InvertedResidual, **settings: Any) -> tuple[Block, Block]:
    """A stock block with statistics and affine maps of some kind, and a converted copy of it."""
    torch.manual_seed(0)
    if cls is InvertedResidual:
        settings = {"exp_ratio": 2.0, **settings}
    block = cls(C, settings.pop("out_chs", C), **{"act_layer": nn.SiLU, **settings})
    calibrate(block, (4, C, 8, 8))
    return block, convert(copy.deepcopy(block))


def images(*, batch: int = 4, size: tuple[int, int] = (9, 12)) -> torch.Tensor:
    x = torch.randn(batch, C, *size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def assert_same(stock: Block, fused: Block, x: torch.Tensor, *, fused_calls: int = 1) -> None:
    """The error rule for everything ``run`` gives, and the fused op is what ran."""
    exact = copy.deepcopy(stock).double()
    for training in (False, True):
        eager = run(stock, x, training)
        with Calls() as calls:
            ours = run(fused, x, training)
        assert calls.whole == (2 * fused_calls if whole_refusal(fused) is None else 0)
        assert calls.fused == 2 * fused_calls
        gated = hasattr(stock, "se") and type(stock.se) is SqueezeExcite
        assert calls.gated == (2 * fused_calls - calls.whole if gated else 0)
        exactly = run(exact, x.double(), training)
        largest = max(t.norm().item() for name, t in exactly.items() if name.startswith("grad"))
        for name, truth in list(exactly.items()):
            if name.startswith("grad") and truth.norm() <= 1e-12 * largest:
                # A BN takes away what the one before adds: nothing is left but rounding.
                assert ours[name].norm() <= 1e-5 * largest, name
                del exactly[name]
        assert_exact_enough(ours, eager, exactly)


@pytest.mark.parametrize("cls", [InvertedResidual, DepthwiseSeparableConv])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "dw_kernel_size": 5, "se_layer": SqueezeExcite},
        {"stride": 2, "pad_type": "same"},
        {"stride": 2, "pad_type": "same", "dw_kernel_size": 7, "act_layer": nn.Hardswish},
        {"pad_type": "same", "dw_kernel_size": 5},
        {"pad_type": "valid", "out_chs": 24},
        {"noskip": True, "act_layer": nn.ReLU6},
        {"out_chs": 24, "act_layer": nn.ReLU},
        {"drop_path_rate": 0.5, "se_layer": timm.layers.EcaModule},
        {"stride": 2, "aa_layer": timm.layers.BlurPool2d, "out_chs": 2 * C},
    ],
    ids=str,
)
def test_blocks(cls: type, settings: dict[str, Any]) -> None:
    """Every setting a block can have, in both modes, with gradients and without."""
    if cls is DepthwiseSeparableConv and "aa_layer" in settings:
        settings = settings | {"out_chs": C}  # timm builds the blur for out_chs
    stock, fused = make_blocks(cls, **settings)
    assert type(fused) is not type(stock)
    assert_same(stock, fused, images())


def test_space_to_depth() -> None:
    """``s2d`` halves the kernel: a 5 becomes a 3 and is taken, a 3 a 2 and is not."""
    stock, fused = make_blocks(s2d=1, dw_kernel_size=5, noskip=True)
    assert_same(stock, fused, images(size=(8, 12)))
    block = InvertedResidual(C, C, s2d=1, dw_kernel_size=3)
    assert "kernel size (2, 2)" in report(block)[0].reason


@pytest.mark.parametrize(
    "act",
    [
        nn.Identity(), nn.ReLU(True), nn.ReLU6(), nn.SiLU(), nn.SiLU(inplace=True), nn.Hardswish(),
        nn.Sigmoid(), nn.Hardsigmoid(), timm_act.Swish(True), timm_act_me.SwishMe(),
        timm_act.HardSwish(), timm_act_me.HardSwishMe(), timm_act.Sigmoid(), timm_act.HardSigmoid(),
        timm_act_me.HardSigmoidMe(),
    ],
    ids=lambda act: f"{type(act).__module__.rpartition('.')[2]}.{act}",
)  # fmt: skip
def test_activations(act: nn.Module) -> None:
    """Each activation of timm's that a kernel knows, after the convolution and in the prologue."""
    stock, fused = make_blocks()
    for block in (stock, fused):
        block.bn1.act = block.bn2.act = act
    assert_same(stock, fused, images())


def _replace(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[Block], None]:
    """A change that puts ``make(child)`` in the place of the child at ``path``."""

    def change(block: Block) -> None:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def _set(path: str, **attributes: Any) -> Callable[[Block], None]:
    def change(block: Block) -> None:
        for name, value in attributes.items():
            setattr(block.get_submodule(path), name, value)

    return change


def _patch_forward(block: Block) -> None:
    block.conv_dw.forward = nn.Conv2d.forward.__get__(block.conv_dw)


def _widen_padding(block: Block) -> None:
    block.conv_dw.padding = (3, 3)
    block.has_skip = False  # the output is larger than the input


class Subclass(nn.Conv2d):
    """A convolution that someone else made."""


class Wrapper(torch.Tensor):
    """The look of a tensor that keeps its values elsewhere."""

    def __tensor_flatten__(self) -> Any:
        """Only looked for."""


def _wrap_weight(block: Block) -> None:
    weight = block.conv_dw.weight
    block.conv_dw.weight = nn.Parameter(weight.detach().as_subclass(Wrapper))


INELIGIBLE: dict[str, tuple[Callable[[Block], Any], str]] = {
    "forward hook on the convolution": (
        lambda b: b.conv_dw.register_forward_hook(lambda *_: None), "conv_dw has forward hooks"),
    "pre-hook on BN": (
        lambda b: b.bn2.register_forward_pre_hook(lambda *_: None), "bn2 has forward hooks"),
    "hook on the activation": (
        lambda b: b.bn2.act.register_forward_hook(lambda *_: None), r"bn2\.act has forward hooks"),
    "hook on the drop layer": (
        lambda b: b.bn2.drop.register_forward_hook(lambda *_: None), r"bn2\.drop has forward"),
    "backward hook": (
        lambda b: b.conv_dw.register_full_backward_hook(lambda *_: None), "has backward hooks"),
    "backward pre-hook": (
        lambda b: b.bn2.register_full_backward_pre_hook(lambda *_: None), "has backward hooks"),
    "weight norm": (
        lambda b: nn.utils.parametrizations.weight_norm(b.conv_dw), "is a ParametrizedConv2d"),
    "pruning": (lambda b: prune.identity(b.conv_dw, "weight"), "has forward hooks"),
    "forward patched": (_patch_forward, "conv_dw has a forward of its own"),
    "subclass": (_set("conv_dw", __class__=Subclass), "conv_dw is a Subclass"),
    "wrapper weight": (_wrap_weight, r"conv_dw\.weight is a Wrapper"),
    "bias": (_set("conv_dw", bias=nn.Parameter(torch.ones(2 * C))), "has a bias"),
    "reflection": (_set("conv_dw", padding_mode="reflect"), "pads with 'reflect'"),
    "dilation": (_set("conv_dw", dilation=(2, 2), padding=(2, 2)), r"dilation \(2, 2\)"),
    "wide padding": (_widen_padding, r"conv_dw has padding \(3, 3\)"),
    "unknown activation": (_replace("bn2.act", lambda _: nn.GELU()), r"bn2\.act is a GELU"),
    "drop layer": (_replace("bn2.drop", lambda _: nn.Dropout(0.0)), r"bn2\.drop is a Dropout"),
    "group norm": (_replace("bn2", lambda _: GroupNormAct(2 * C, 4)), "bn2 is a GroupNormAct"),
    "frozen BN": (
        _replace("bn2", lambda _: FrozenBatchNormAct2d(2 * C)), "bn2 is a FrozenBatchNormAct2d"),
    "synchronised BN": (_replace("bn2", convert_sync_batchnorm), "bn2 is a SyncBatchNormAct"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INELIGIBLE)
def test_ineligible_after_conversion(kind: str) -> None:
    """A converted block that became ineligible runs its stock forward, to the bit, and says why."""
    change, reason = INELIGIBLE[kind]
    stock, fused = make_blocks()
    for block in (stock, fused):
        change(block)
    x = images()
    for training in (False, True):
        if kind == "synchronised BN" and training:
            continue  # needs a GPU
        with Calls() as calls:
            ours = run(fused, x, training)
        assert calls.fused == 0
        for name, tensor in run(stock, x, training).items():
            assert torch.equal(ours[name], tensor), name
    (entry,) = report(fused)
    assert not entry.taken
    with pytest.raises(ValueError, match=reason):
        convert(stock, strict=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dw_kernel_size": [3, 5]}, "conv_dw is a MixedConv2d"),
        ({"group_size": 8}, r"conv_dw is not depthwise \(32 to 32 channels in 4 groups\)"),
        ({"dilation": 2}, "dilation"),
        ({"stride": 3}, "stride"),
        ({"dw_kernel_size": (3, 5)}, "kernel size"),
        ({"dw_kernel_size": 9}, "kernel size"),
        ({"norm_layer": "groupnorm1"}, "bn2 is a GroupNorm1Act"),
        ({"act_layer": nn.GELU}, r"bn2\.act is a GELU"),
    ],
)
def test_ineligible_from_the_start(settings: dict[str, Any], reason: str) -> None:
    """Blocks that are built otherwise stay stock, with the reason in the report."""
    block = InvertedResidual(C, C, **{"exp_ratio": 2.0, **settings})
    assert re.search(reason, report(block)[0].reason)
    with pytest.warns(UserWarning, match=reason):
        convert(block)
    assert type(block) is InvertedResidual


def test_hooks_elsewhere_run() -> None:
    """Hooks on the block and its other children run, on the fused road."""
    _, fused = make_blocks(se_layer=SqueezeExcite)
    seen: list[str] = []
    for name in ("", "conv_pw", "se", "conv_pwl", "bn3", "drop_path"):
        module = fused.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with Calls() as calls:
        fused.train()(images())
    assert calls.fused == 1
    assert seen == ["conv_pw", "se", "conv_pwl", "bn3", "drop_path", ""]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: block.se.conv_reduce.register_forward_hook(lambda *_: None), "has forward"),
        (lambda block: block.se.gate.register_forward_hook(lambda *_: None), "se.gate has forward"),
        (lambda block: setattr(block.se, "gate", nn.Tanh()), "se.gate is a Tanh"),
        (lambda block: setattr(block.se, "act1", nn.GELU()), "se.act1 is a GELU"),
        (
            lambda block: setattr(block.se, "conv_expand", nn.Conv2d(C // 2, 2 * C, 1, groups=2)),
            "2 groups",
        ),
    ],
)
def test_squeeze_excite_left_alone(change: Callable[[Any], Any], reason: str) -> None:
    """An ``se`` that the op cannot stand in for is called, after the fused depthwise op."""
    stock, fused = make_blocks(se_layer=SqueezeExcite)
    for block in (stock, fused):
        torch.manual_seed(0)
        change(block)
    fused.se.load_state_dict(stock.se.state_dict())
    assert reason in squeeze_excite_refusal(fused.se)
    with Calls() as calls, torch.no_grad():
        ours = fused.eval()(images())
    assert (calls.fused, calls.gated) == (1, 0)
    with torch.no_grad():
        torch.testing.assert_close(ours, stock.eval()(images()), rtol=1e-4, atol=1e-4)


def test_whole_block() -> None:
    """A block is one op where nothing listens and its BNs agree."""
    stock, fused = make_blocks(se_layer=SqueezeExcite)
    fused.eval()
    stock.eval()

    def ops(grad: bool) -> tuple[int, int, int]:
        with torch.set_grad_enabled(grad):
            expected = stock(images())
            with Calls() as calls:
                torch.testing.assert_close(fused(images()), expected, rtol=1e-4, atol=1e-4)
        batch_norms = ("aten::batch_norm", "aten::native_batch_norm", "aten::_batch_norm_no_update")
        return calls.whole, calls.fused, sum(calls.count[name] for name in batch_norms)

    assert ops(False) == (1, 1, 0)
    assert ops(True) == (1, 1, 0)
    fused.bn1.train()
    stock.bn1.train()
    assert ops(False) == (0, 1, 2)
    fused.bn1.eval()
    stock.bn1.eval()
    for child in ("conv_pw", "bn1", "bn3", "conv_pwl", "drop_path", "aa"):
        seen: list[int] = []
        handle = fused.get_submodule(child).register_forward_hook(lambda *_, s=seen: s.append(1))
        # Where bn1 is listened to it is no prologue.
        assert ops(False) == (0, 1, 2 if child == "bn1" else 1)
        assert seen
        handle.remove()
    assert ops(False) == (1, 1, 0)
    fused.bn1.act = nn.GELU()
    stock.bn1.act = nn.GELU()
    assert ops(False) == (0, 1, 2)


def test_plain_and_16_bit_bn() -> None:
    """BN without an affine map or in 16 bits, in a whole block."""
    stock, _ = make_blocks()
    for block_norm in (stock.bn1, stock.bn2):
        block_norm.weight = block_norm.bias = None
    fused = convert(copy.deepcopy(stock))
    with torch.no_grad():
        torch.testing.assert_close(
            fused.eval()(images()), stock.eval()(images()), rtol=1e-4, atol=1e-4
        )
    exact = copy.deepcopy(make_blocks()[0]).double().eval()
    stock, fused = (block.bfloat16().eval() for block in make_blocks())
    x = images().bfloat16()
    with torch.no_grad(), Calls() as calls:
        ours = fused(x)
        eager = stock(x)
    assert calls.fused == 1
    assert_norm_error_rule("bfloat16", ours, eager, exact(x.double()), FORWARD)


def test_weights_changed_through_data_are_seen() -> None:
    """The prologue is never stale."""
    stock, fused = make_blocks()
    for block in (stock.eval(), fused.eval()):
        with torch.no_grad():
            block(images())
            block.bn1.weight.data.mul_(2)
            block.bn1.running_mean.data.add_(1)
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), stock(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    """Under autocast the block is at least as exact as the stock one."""
    stock, fused = make_blocks(se_layer=SqueezeExcite)
    exact = copy.deepcopy(stock).double()
    outputs = []
    for block in (fused, stock):
        with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
            outputs.append(run(block, images(), training))
        assert calls.fused == calls.gated + calls.whole == (2 if block is fused else 0)
    truth = run(exact, images().double(), training)
    for name in ("output", "output without grad", "grad input", "grad conv_dw.weight"):
        ours, eager = (o[name] for o in outputs)
        assert ours.dtype == eager.dtype
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_norm_error_rule(name, ours, eager, truth[name], factor)


def test_copies_and_pickles() -> None:
    """A converted block copies, pickles and saves as what it is."""
    _, fused = make_blocks()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    expected = fused.eval()(images())
    for copied in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is type(fused)
        with Calls() as calls:
            assert torch.equal(copied.eval()(images()), expected)
        assert calls.fused == 1


@pytest.mark.parametrize("cls", [InvertedResidual, DepthwiseSeparableConv])
def test_compile_fullgraph(cls: type) -> None:
    """A converted block is one graph with the fused op in it, and one for all training steps."""
    stock, fused = make_blocks(cls, se_layer=SqueezeExcite, pad_type="same", stride=2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for step in range(3):
        x = images() + step
        y, expected = compiled(x), stock.train()(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
    assert counter.frame_count == 1
    graph = counter.graphs[0]
    assert any("effnet_kernels" in str(node.target) for node in graph.graph.nodes)
    for tensor, expected in zip(fused.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        fused.eval()
        torch.testing.assert_close(compiled(images()), stock.eval()(images()), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def _ops(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes}


def test_export_keeps_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.export`` has the fused op; for ONNX it has PyTorch's own."""
    stock, fused = make_blocks()
    fused.eval()
    with torch.no_grad():
        exported = torch.export.export(fused, (images(),), strict=False)
        assert any("effnet_kernels" in op for op in _ops(exported.graph))
        torch.testing.assert_close(exported.module()(images()), fused(images()))
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        exported = torch.export.export(fused, (images(),), strict=False)
        assert not any("effnet_kernels" in op for op in _ops(exported.graph))
        assert torch.equal(exported.module()(images()), stock.eval()(images()))


def test_tracing_sees_the_stock_block() -> None:
    """``torch.jit.trace`` and ``torch.fx`` record PyTorch's own ops."""
    stock, fused = make_blocks()
    with torch.no_grad():
        expected = stock.eval()(images())
        traced = torch.jit.trace(fused.eval(), images())
        assert "effnet_kernels::" not in str(traced.inlined_graph)
        assert torch.equal(traced(images()), expected)
        symbolic = torch.fx.symbolic_trace(fused)
        assert not any("effnet_kernels" in op for op in _ops(symbolic.graph))
        assert torch.equal(symbolic(images()), expected)


def test_global_hooks_see_every_module() -> None:
    """A hook on all modules (a profiler's) is called for each child, on the stock road."""
    _, fused = make_blocks()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with Calls() as calls:
            fused(images())
    finally:
        handle.remove()
    assert calls.fused == 0
    assert fused.conv_dw in seen


def test_device_without_kernels() -> None:
    """Where no backend takes the tensors, the stock block runs and a warning says why."""
    block = convert(InvertedResidual(C, C, device="meta"))
    effnet_kernels.backends._warn_eager.cache_clear()
    with pytest.warns(UserWarning, match=r"on meta torch.float32 runs PyTorch's own ops"):
        assert block(torch.empty(2, C, 8, 8, device="meta")).shape == (2, C, 8, 8)
    assert "takes cpu tensors, not meta" in report(block)[0].reason
    for wrong in (torch.randn(C, 8, 8), images().int()):
        errors = []
        for module in (block, InvertedResidual(C, C)):
            with pytest.raises((RuntimeError, AssertionError, TypeError)) as caught:
                module.to_empty(device="cpu")(wrong)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_exact_batch_norm_class() -> None:
    """The adapters know ``BatchNormAct2d`` itself, so its subclasses stay stock."""

    class Mine(BatchNormAct2d):
        pass

    block = InvertedResidual(C, C, exp_ratio=2.0)
    block.bn2 = Mine(2 * C)
    assert "bn2 is a Mine, not a BatchNormAct2d" in report(block)[0].reason

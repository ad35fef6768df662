"""``prepare`` on whole models: the numbers, and every way back to the weights themselves."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from accuracy import FORWARD, relative_errors
from fused_calls import Calls
from stock_models import calibrate
from torch import Tensor, nn

import effnet_kernels
from effnet_kernels import convert, extension, prepare, restore
from effnet_kernels.layers.prepared import is_prepared, prepared_network

pytestmark = [
    pytest.mark.skipif(extension.CPU_MISSING is not None, reason=str(extension.CPU_MISSING)),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("prepare"),
]

WHOLE = (
    "efficientnet_b0", "tf_efficientnetv2_b0", "efficientnet_es", "tf_efficientnet_lite0",
    "mobilenetv2_100", "mobilenetv3_small_100", "tf_mobilenetv3_large_minimal_100", "mnasnet_small",
    "torchvision:efficientnet_b0", "torchvision:efficientnet_v2_s",
)  # fmt: skip
"""Models that are one call from image to logits."""
SHAPE = (3, 3, 64, 64)
SMALL = "mobilenetv3_small_050"


def make_model(name: str = SMALL) -> nn.Module:
    torch.manual_seed(0)
    library, _, model = name.rpartition(":")
    if library:
        made: nn.Module = torchvision.models.get_model(model, num_classes=10)
    else:
        made = timm.create_model(model, num_classes=10)
    calibrate(made, SHAPE)
    return made.eval()


def images(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape or SHAPE)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


def assert_prepared(model: nn.Module, x: Tensor) -> None:
    """``model`` runs as one call on ``x``."""
    with torch.no_grad(), Calls() as calls:
        model(x)
    ours = {name: n for name, n in calls.count.items() if name.startswith("effnet_kernels")}
    assert ours == {"effnet_kernels_cpp::prepared_network": 1}


def assert_follows(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """``model`` gives what ``stock`` gives, and runs on packed weights."""
    assert relative_errors(run(model, x), run(stock, x))[1] < 1e-4
    assert_prepared(model, x)


@pytest.mark.parametrize("name", WHOLE)
def test_error_rule(name: str) -> None:
    """Logits as near to float64 as eager's, one call, in both layouts, and features by the way."""
    stock = make_model(name)
    model = prepare(copy.deepcopy(stock))
    for shape in (SHAPE, (1, 3, 75, 51)):
        x = images(*shape)
        result, eager = run(model, x), run(stock, x)
        exact = run(copy.deepcopy(stock).double(), x.double())
        allowed = max(FORWARD * relative_errors(eager, exact)[1], 1e-6)
        assert relative_errors(result, exact)[1] <= allowed
        assert torch.equal(result, run(model, x.to(memory_format=torch.channels_last)))
        assert_prepared(model, x)
    if hasattr(stock, "forward_features"):
        with torch.no_grad():
            ours, theirs = model.forward_features(x), stock.forward_features(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """The packed weights are of the model's dtype."""
    stock = make_model().to(dtype)
    model = prepare(copy.deepcopy(stock))
    x = images().to(dtype)
    exact = run(copy.deepcopy(stock).double(), x.double())
    theirs = relative_errors(run(stock, x), exact)[1]
    # In float64 eager is the yardstick itself.
    least = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert relative_errors(run(model, x), exact)[1] <= max(FORWARD * theirs, least)
    assert_prepared(model, x)


def test_results_do_not_depend_on_batch_or_threads() -> None:
    """An image's logits are the same bits in any batch and with any number of threads."""
    model = prepare(make_model("efficientnet_b0"))
    x = images(5, 3, 64, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([run(model, image[None]) for image in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(run(model, x), alone)
                assert torch.equal(run(model, x[:1]), alone[:1])
    finally:
        torch.set_num_threads(before)
    assert run(model, x[:0]).shape == (0, 10)


def test_threads_may_call_at_once() -> None:
    """Calls from several Python threads do not disturb each other."""
    model = prepare(make_model())
    inputs = [torch.randn(SHAPE) for _ in range(4)]
    expected = [run(model, x) for x in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    start = threading.Barrier(len(inputs))

    def work(i: int) -> bool:
        start.wait()
        return all(torch.equal(run(model, inputs[i]), expected[i]) for _ in range(20))

    try:
        with ThreadPoolExecutor(len(inputs)) as pool:
            assert all(pool.map(work, range(len(inputs))))
    finally:
        torch.set_num_threads(before)


def _in_child(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    os._exit(0 if torch.equal(run(model, x), expected) else 1)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_after_fork() -> None:
    """A forked process, which has none of its parent's threads, gets the same."""
    model = prepare(make_model())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = run(model, images())
        child = multiprocessing.get_context("fork").Process(
            target=_in_child, args=(model, images(), expected)
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()})


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad()


def _statistics(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.add_(0.1)


def _replace(model: nn.Module) -> None:
    model.conv_stem.weight = nn.Parameter(model.conv_stem.weight.detach() * 2)


def _set_data(model: nn.Module) -> None:
    with torch.no_grad():
        model.classifier.weight.data = model.classifier.weight.data * 2


def _classify(model: nn.Module) -> None:
    torch.manual_seed(2)
    model.reset_classifier(7)


def _identity(model: nn.Module) -> None:
    model.classifier = nn.Identity().eval()


CHANGES = (_load, _step, _statistics, _replace, _set_data, _classify, _identity)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.parametrize("name", [SMALL, "efficientnet_b0"])
def test_changed_weights_are_packed_again(name: str, change: Callable[[nn.Module], None]) -> None:
    """The next call sees new weights and statistics."""
    stock = make_model(name)
    model = prepare(copy.deepcopy(stock))
    before = run(model, images())
    for each in (stock, model):
        change(each)
    assert_follows(model, stock, images())
    assert before.shape != run(model, images()).shape or not torch.equal(
        before, run(model, images())
    )


def test_training() -> None:
    """In training mode and with gradients a prepared model is a converted one, and then it is
    prepared again.
    """
    stock = make_model()
    model, converted = prepare(copy.deepcopy(stock)), convert(copy.deepcopy(stock))
    results = []
    for each in (model, converted):
        each.train()
        loss = each(images()).square().sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, list(each.parameters()))))
        each.eval()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_follows(model, converted, images())
    assert model(images()).requires_grad


def test_hooks_run() -> None:
    """A hook on a child sees its call; the rest stays on packed weights, and without the hook all
    of it is again.
    """
    stock = make_model()
    model = prepare(copy.deepcopy(stock))
    seen: list[tuple[int, ...]] = []
    handle = model.blocks[1].register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    with torch.no_grad(), Calls() as calls:
        result = model(images())
    assert len(seen) == 1
    assert calls.count["effnet_kernels_cpp::prepared_network"] > 5
    torch.testing.assert_close(result, run(stock, images()), rtol=1e-3, atol=1e-3)
    handle.remove()
    assert_prepared(model, images())


def test_interrupted_packing_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops the packing of changed weights leaves no old ones behind."""
    stock = make_model()
    model = prepare(copy.deepcopy(stock))
    _step(model)
    _step(stock)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("effnet_kernels.layers.timm.prepare_linear", interrupt)
        run(model, images())
    assert_follows(model, stock, images())


def test_patched_forward_runs() -> None:
    """A child with a forward of its own is called, patched before or after, as is a new child."""
    stock = make_model()

    def patched(module: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = module.forward
        return lambda x: forward(x) * 0.5

    for path in ("blocks.1", "blocks.1.0", "classifier", "global_pool"):
        before, after = copy.deepcopy(stock), prepare(copy.deepcopy(stock))
        for model in (before, after):
            module = model.get_submodule(path)
            module.forward = patched(module)
        expected = run(before, images())
        assert relative_errors(run(after, images()), expected)[1] < 1e-4
        assert relative_errors(run(prepare(before), images()), expected)[1] < 1e-4
    model = prepare(stock)
    seen: list[nn.Module] = []
    model.classifier = nn.Linear(model.classifier.in_features, 3).eval()
    handle = model.classifier.register_forward_hook(lambda m, i, o: seen.append(m))
    run(model, images())
    assert seen == [model.classifier]
    handle.remove()
    run(model, images())  # which packs the new child
    assert_prepared(model, images())


def test_other_devices_and_inference_tensors() -> None:
    """They go the way of a converted model, and back on the CPU the model is prepared again."""
    stock = make_model()
    model = prepare(copy.deepcopy(stock)).to("meta")
    assert run(model, images().to("meta")).is_meta
    assert not is_prepared(model)
    model = prepare(copy.deepcopy(stock))
    with torch.inference_mode():
        model.to(torch.bfloat16)
        assert model(images().bfloat16()).dtype == torch.bfloat16
    assert not is_prepared(model)
    model = prepare(copy.deepcopy(stock))
    model.classifier = torch.jit.script(model.classifier)
    assert run(model, images()).shape == (3, 10)
    assert not is_prepared(model)


@pytest.mark.parametrize("classifier", [nn.Identity(), nn.Linear(1280, 5)], ids=["none", "linear"])
def test_torchvision_with_another_classifier(classifier: nn.Module) -> None:
    """The usual ways to use a model for something else; its parts run on packed weights."""
    stock = make_model("torchvision:efficientnet_b0")
    model = prepare(copy.deepcopy(stock))
    for each in (stock, model):
        each.classifier = copy.deepcopy(classifier).eval()
    for prepared in (model, prepare(copy.deepcopy(stock))):
        assert relative_errors(run(prepared, images()), run(stock, images()))[1] < 1e-4


def test_hooks_on_all_modules_and_traces() -> None:
    """Both see the stock modules."""
    stock = make_model()
    model = prepare(copy.deepcopy(stock))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(type(m).__name__)
    )
    try:
        run(model, images())
    finally:
        handle.remove()
    assert seen.count("Conv2d") > 20
    with torch.no_grad():
        traced = torch.jit.trace(model, images(), check_trace=False)
    assert "prepared_network" not in str(traced.inlined_graph)
    assert relative_errors(traced(images()), run(stock, images()))[1] < 1e-4
    assert_prepared(model, images())


def test_other_calls_go_other_ways() -> None:
    """Autocast, another backend and another dtype are not for packed weights."""
    stock = make_model()
    model = prepare(copy.deepcopy(stock))
    x = images()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert prepared_network(model, x) is None
            assert model(x).dtype == torch.bfloat16
        with effnet_kernels.use_backend("eager"):
            assert prepared_network(model, x) is None
            torch.testing.assert_close(model(x), stock(x))
        assert prepared_network(model, x.double()) is None
        assert prepared_network(model, x) is not None


def test_copies_and_restore() -> None:
    """Copies and pickles are converted models; ``restore`` gives the stock one."""
    stock = make_model("torchvision:efficientnet_b0")
    model = prepare(copy.deepcopy(stock))
    x = images()
    exact = run(copy.deepcopy(stock).double(), x.double())
    allowed = max(FORWARD * relative_errors(run(stock, x), exact)[1], 1e-6)
    assert relative_errors(run(model, x), exact)[1] <= allowed
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_prepared(other)
        assert relative_errors(run(other, x), exact)[1] <= allowed
        assert is_prepared(prepare(other))
    restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert not any(is_prepared(module) for module in model.modules())
    assert torch.equal(run(model, images()), run(stock, images()))


def test_models_without_a_known_whole() -> None:
    """Blocks in a model of the user's own run on packed weights one by one."""
    blocks = make_model().blocks
    model = prepare(nn.Sequential(*[block for group in blocks for block in group]).eval())
    x = images(2, 16, 32, 32)
    with torch.no_grad(), Calls() as calls:
        result = model(x)
    assert calls.count["effnet_kernels_cpp::prepared_network"] == len(model)
    torch.testing.assert_close(result, run(make_model().blocks, x), rtol=1e-3, atol=1e-3)


def test_unusual_heads() -> None:
    """What comes after the features is left to the model where it is not the usual."""
    torch.manual_seed(0)
    for settings in (
        {"global_pool": "max"},
        {"global_pool": "", "num_classes": 0},
        {"num_classes": 0},
    ):
        stock = timm.create_model("mobilenetv2_050", **settings).eval()
        model = prepare(copy.deepcopy(stock))
        assert relative_errors(run(model, images()), run(stock, images()))[1] < 1e-4


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("b0", TypeError, "model: got str, expected a torch.nn.Module"),
        (make_model().train(), ValueError, "model: got one in training mode"),
        (make_model().to("meta"), ValueError, "conv_stem.weight on meta, expected the CPU"),
        (nn.Conv2d(3, 3, 3).eval(), ValueError, "without a block that could run on packed weights"),
    ],
    ids=["type", "training", "device", "no block"],
)
@pytest.mark.filterwarnings("ignore:nothing in this Conv2d can be converted")
def test_errors(model: nn.Module, error: type[Exception], message: str) -> None:
    """The message names the argument, what it got and what it needs."""
    with pytest.raises(error, match=message):
        prepare(model)


def test_inference_tensors_are_an_error() -> None:
    """Their changes cannot be seen."""
    with torch.inference_mode():
        model = timm.create_model(SMALL).eval()
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        prepare(model)

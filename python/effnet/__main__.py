"""The command line: ``effnet models | train | finetune | predict | cam | export | search``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import effnet
from effnet import search
from effnet.augment import Strength
from effnet.checkpoints import classes_of, load_features, load_weights, read_weights
from effnet.data import TORCHVISION
from effnet.data import load as load_data
from effnet.training import OPTIMIZERS, Phase, Recipe, Step, Trainer, progressive

_EXAMPLES = """\
examples:
  effnet models                                        the family, with what its members cost
  effnet models efficientnet_b0 --measure              and how fast they are on this device
  effnet train --data digits --resolution 32 --out runs/digits      offline, in a few minutes
  effnet predict cat.jpg --model efficientnet_b0 --weights b0.safetensors
  effnet cam cat.jpg --model efficientnet_b0 --weights b0.safetensors --out cat.png
  effnet export --model efficientnet_b0 --weights b0.safetensors --out b0.onnx
  effnet search --model efficientnetv2_s --most-parameters 20   MBConv or Fused-MBConv, by stage
"""
_TRAIN_EXAMPLES = """\
examples:
  effnet train --data digits --resolution 32 --width 0.25 --stem-stride 1 --out runs/digits
  effnet train --data folder --root flowers --model efficientnetv2_s --resolution 300 \\
      --progressive 128 --mixup 0.2 --amp bfloat16 --ema 0.999 --out runs/flowers
  effnet train ... --resume                            after an interruption, with the same options
  torchrun --nproc-per-node 4 -m effnet train ...      on four GPUs
"""
_FINETUNE_EXAMPLES = """\
example:
  effnet finetune --data Flowers102 --download --model efficientnet_b0 --weights b0.safetensors \\
      --epochs 20 --lr 1e-3 --amp bfloat16 --out runs/flowers
"""
_TENSORFLOW: dict[str, Any] = {"padding": "same", "eps": 1e-3}
_WEIGHTS = "a .safetensors file, or what torch.save wrote: of this package, timm or torchvision"


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="effnet", description="The EfficientNet family on fused kernels.", epilog=_EXAMPLES,
        formatter_class=formatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    models = commands.add_parser(
        "models", help="the family, with parameters, multiply-adds and resolution",
        epilog="example: effnet models efficientnetv2_s --measure --batch 8",
    )  # fmt: skip
    models.add_argument("names", nargs="*", metavar="NAME", help="of models (default: all)")
    models.add_argument("--measure", action="store_true", help="images a second on this device")
    models.add_argument("--batch", type=_positive, default=1, metavar="N", help="default: 1")
    models.set_defaults(run=_models)

    _add_train(commands)
    _add_finetune(commands)

    predict = commands.add_parser(
        "predict", help="the likeliest classes of an image",
        epilog="example: effnet predict cat.jpg --model efficientnet_b0 --weights b0.safetensors",
    )  # fmt: skip
    predict.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or the like")
    _add_model(predict)
    predict.add_argument("--classes", type=Path, metavar="FILE", help="their names, a line each")
    predict.add_argument("--top", type=_positive, default=5, metavar="N", help="default: 5")
    predict.set_defaults(run=_predict)

    cam = commands.add_parser(
        "cam", help="where models look: an image with a map of heat over it",
        epilog="example, two models side by side: effnet cam cat.jpg --model efficientnet_b0 "
        "efficientnet_b1 --weights b0.pt b1.pt --out cat.png",
    )  # fmt: skip
    cam.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or the like")
    _add_model(cam, several=True)
    cam.add_argument("--class", dest="target", type=int, metavar="N", help="default: the likeliest")
    cam.add_argument("--method", choices=("grad", "class"), default="grad", help="default: grad")
    cam.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as cam.png")
    cam.set_defaults(run=_cam)

    export = commands.add_parser(
        "export", help="a file for other runtimes: .onnx, or .pt2 of torch.export",
        epilog="example: effnet export --model efficientnet_b0 --weights b0.pt --out b0.onnx",
    )  # fmt: skip
    _add_model(export)
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx or .pt2")
    export.set_defaults(run=_export)

    search = commands.add_parser(
        "search", help="MBConv or Fused-MBConv for each stage, as measured on this device",
        epilog="example: effnet search --model efficientnetv2_s --batch 8 --plot stages.png",
    )  # fmt: skip
    search.add_argument("--model", default="efficientnetv2_s", metavar="NAME",
                        help="whose table is varied (default: efficientnetv2_s)")  # fmt: skip
    search.add_argument(
        "--resolution", type=_positive, metavar="PIXELS", help="default: the model's own"
    )
    search.add_argument("--batch", type=_positive, default=1, metavar="N", help="default: 1")
    search.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="default: float32")  # fmt: skip
    search.add_argument("--most-parameters", type=float, metavar="MILLIONS",
                        help="of all stages: the fastest table that has no more")  # fmt: skip
    search.add_argument("--most-milliseconds", type=float, metavar="MS",
                        help="of an image in all stages: the smallest table so fast")  # fmt: skip
    search.add_argument("--seconds", type=float, default=1.0, metavar="S",
                        help="of sampling for each stage (default: 1)")  # fmt: skip
    search.add_argument("--plot", type=Path, metavar="FILE", help="such as stages.png")
    search.set_defaults(run=_search)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="trains a model, or goes on with one that was interrupted",
        epilog=_TRAIN_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_training(train)
    train.set_defaults(run=_train, weights=None, layer_decay=1.0, frozen_norms=False)


def _add_finetune(commands: Any) -> None:
    finetune = commands.add_parser(
        "finetune", help="trains a model that was pretrained, for other classes",
        epilog=_FINETUNE_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_training(finetune)
    option = finetune.add_argument
    option("--weights", required=True, metavar="FILE", help=_WEIGHTS)
    option("--tensorflow", action="store_true",
           help="weights of TensorFlow: same padding, eps 1e-3")  # fmt: skip
    option("--layer-decay", type=float, default=0.8, metavar="X",
           help="learning rate of a block over the next one's (default: 0.8)")  # fmt: skip
    option("--train-norms", dest="frozen_norms", action="store_false",
           help="let BN learn new statistics (default: it keeps the pretrained ones)")  # fmt: skip
    finetune.set_defaults(run=_train)


def _add_training(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "--data",
        required=True,
        metavar="NAME",
        help=f"digits (offline), folder, {', '.join(TORCHVISION)}",
    )
    option("--root", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    option("--download", action="store_true", help="fetch torchvision's where it is not there")
    option(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of checkpoint.pt, log.csv and weights.pt",
    )
    option("--resume", action="store_true", help="go on from the checkpoint in --out")
    option("--model", default="efficientnet_b0", metavar="NAME", help="default: efficientnet_b0")
    option("--depth", type=float, default=1.0, metavar="X", help="times the model's (default: 1)")
    option("--width", type=float, default=1.0, metavar="X", help="times the model's (default: 1)")
    option("--stem-stride", type=int, choices=(1, 2), default=2, help="1 suits small images")
    option("--resolution", type=_positive, metavar="PIXELS", help="default: the model's own")
    option(
        "--progressive",
        type=_positive,
        metavar="PIXELS",
        help="begin with images of this size and weak regularisation, in --phases",
    )
    option(
        "--phases",
        type=_positive,
        default=4,
        metavar="N",
        help="of progressive learning (default: 4)",
    )
    option("--epochs", type=_positive, default=10, metavar="N", help="default: 10")
    option(
        "--batch",
        type=_positive,
        default=64,
        metavar="N",
        help="images a step and process (default: 64)",
    )
    option("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    option("--lr", type=float, default=2e-3, help="the highest (default: 0.002)")
    option("--weight-decay", type=float, default=0.02, help="default: 0.02")
    option("--label-smoothing", type=float, default=0.1, help="default: 0.1")
    option("--ema", type=float, default=0.0, help="decay of averaged weights (default: 0, none)")
    option("--amp", choices=("bfloat16", "float16"), help="autocast (default: none)")
    option("--drop-rate", type=float, default=0.2, help="default: 0.2")
    option("--drop-path-rate", type=float, default=0.2, help="default: 0.2")
    option("--magnitude", type=float, default=0.3, help="of augmentation, 0 to 1 (default: 0.3)")
    option("--mixup", type=float, default=0.0, help="default: 0, none")
    option("--cutmix", type=float, default=0.0, help="default: 0, none")
    option("--checkpointing", action="store_true", help="less memory, more time")
    option("--workers", type=int, default=0, metavar="N", help="that load images (default: 0)")
    option("--seed", type=int, default=0, help="default: 0")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def _add_model(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument("--model", required=True, metavar="NAME", help="see effnet models", **many)
    parser.add_argument("--weights", required=True, metavar="FILE", help=_WEIGHTS, **many)
    parser.add_argument(
        "--resolution", type=_positive, metavar="PIXELS", help="default: the model's own"
    )
    parser.add_argument(
        "--tensorflow", action="store_true", help="weights of TensorFlow: same padding, eps 1e-3"
    )


def _load(name: str, path: str, arguments: argparse.Namespace) -> tuple[effnet.EfficientNet, int]:
    """The model in evaluation mode with its weights, and its resolution."""
    resolution = arguments.resolution or effnet.variant(name).resolution
    weights = read_weights(path)
    settings = _TENSORFLOW if arguments.tensorflow else {}
    model = effnet.create_model(name, classes_of(weights), **settings)
    load_weights(model, weights)
    return model.eval(), resolution


def _models(arguments: argparse.Namespace) -> int:
    names = arguments.names or list(effnet.VARIANTS)
    variants = [effnet.variant(name) for name in names]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = f"  {'images/s':>9}" if arguments.measure else ""
    print(f"{'model':20}{'parameters':>12}{'multiply-adds':>15}{'resolution':>12}{measured}")
    for name, variant in zip(names, variants, strict=True):
        with torch.device("meta"):
            model = effnet.create_model(name)
        cost = effnet.complexity(model, variant.resolution)
        line = (
            f"{name:20}{cost.parameters / 1e6:>10.1f} M{cost.multiply_adds / 1e9:>13.2f} G"
            f"{variant.resolution:>12}"
        )
        if arguments.measure:
            rate = _images_per_second(name, variant.resolution, arguments.batch, device)
            line += f"  {rate:>9.3g}"
        print(line, flush=True)
    if arguments.measure:
        print(f"batch {arguments.batch}, float32, fresh weights, on {device.type}")
    return 0


def _images_per_second(name: str, resolution: int, batch: int, device: torch.device) -> float:
    """From the median of seven calls."""
    model = effnet.create_model(name).eval().to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    times = []
    with torch.no_grad():
        for _ in range(9):
            began = time.perf_counter()
            model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return batch / sorted(times[2:])[3]


def _train(arguments: argparse.Namespace) -> int:
    distributed = "RANK" in os.environ
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if distributed:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
    variant = effnet.variant(arguments.model)
    resolution = arguments.resolution or variant.train_resolution or variant.resolution
    data = load_data(
        arguments.data, arguments.root, size=round(resolution * 1.15), download=arguments.download
    )
    scaled = effnet.dimensions(variant, arguments.width, arguments.depth)
    torch.manual_seed(arguments.seed)
    model = effnet.EfficientNet(
        scaled.stages,
        data.classes,
        data.in_chans,
        stem_channels=scaled.stem_channels,
        head_channels=scaled.head_channels,
        stem_stride=arguments.stem_stride,
        drop_path_rate=arguments.drop_path_rate,
        **(_TENSORFLOW if arguments.weights and arguments.tensorflow else {}),
    ).to(device)
    if arguments.weights is not None:
        load_features(model, read_weights(arguments.weights))
    strength = Strength(arguments.magnitude, arguments.mixup, arguments.cutmix)
    phases: tuple[Phase, ...] = (Phase(resolution, arguments.drop_rate, strength),)
    if arguments.progressive is not None:
        first = Phase(arguments.progressive, arguments.drop_rate / 2, Strength())
        phases = progressive(first, phases[0], arguments.phases)
    recipe = Recipe(
        phases, epochs=arguments.epochs, batch=arguments.batch, optimizer=arguments.optimizer,
        lr=arguments.lr, weight_decay=arguments.weight_decay,
        label_smoothing=arguments.label_smoothing, ema=arguments.ema, amp=arguments.amp,
        layer_decay=arguments.layer_decay, frozen_norms=arguments.frozen_norms,
        checkpointing=arguments.checkpointing, seed=arguments.seed,
    )  # fmt: skip
    trainer = Trainer(model, data, recipe, arguments.out, workers=arguments.workers)
    if arguments.resume and not trainer.resume():
        raise ValueError(f"out: there is no checkpoint in {str(arguments.out)!r} to resume from")
    if not arguments.resume and (arguments.out / "checkpoint.pt").exists():
        raise ValueError(
            f"out: there is a checkpoint in {str(arguments.out)!r}; --resume goes on with it, "
            "another folder begins anew"
        )
    began = time.perf_counter()

    def progress(step: Step) -> None:
        if trainer.rank != 0:
            return
        last = trainer.step % trainer.steps_per_epoch == 0
        if sys.stdout.isatty() or last:
            line = (
                f"epoch {step.epoch + 1}/{recipe.epochs}  step {trainer.step}/{trainer.steps}  "
                f"{step.resolution} px  lr {step.lr:.2e}  loss {step.loss:.3f}  "
                f"{time.perf_counter() - began:.0f} s"
            )
            print(f"\r{line}", end="\n" if last else "", flush=True)

    trainer.fit(progress=progress)
    if trainer.rank == 0:
        print(f"test accuracy {trainer.evaluate():.2%}")
        best = model if trainer.averaged is None else trainer.averaged.module
        torch.save(best.state_dict(), arguments.out / "weights.pt")
        print(f"wrote {arguments.out / 'weights.pt'}")
    if distributed:
        torch.distributed.destroy_process_group()
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from effnet.images import normalise, read_image

    model, resolution = _load(arguments.model, arguments.weights, arguments)
    image = normalise(read_image(arguments.image, resolution))
    with torch.no_grad():
        likely = model(image[None]).softmax(1)[0]
    names = [f"class {i}" for i in range(len(likely))]
    if arguments.classes is not None:
        try:
            names = arguments.classes.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"classes: {str(arguments.classes)!r} cannot be read") from error
        if len(names) != len(likely):
            raise ValueError(
                f"classes: got {len(names)} lines, expected one for each of the "
                f"{len(likely)} classes"
            )
    for share, index in zip(*likely.topk(min(arguments.top, len(likely))), strict=True):
        print(f"{share:7.2%}  {names[int(index)]}")
    return 0


def _cam(arguments: argparse.Namespace) -> int:
    from effnet.cam import activation_map
    from effnet.images import normalise, overlay, read_image, write_image

    if len(arguments.model) != len(arguments.weights):
        raise ValueError(
            f"weights: got {len(arguments.weights)} files for {len(arguments.model)} models, "
            "expected one for each"
        )
    panels: list[torch.Tensor] = []
    captions: list[str] = []
    for name, path in zip(arguments.model, arguments.weights, strict=True):
        model, resolution = _load(name, path, arguments)
        classes = int(model.classifier.weight.shape[0])  # type: ignore[index]
        if arguments.target is not None and not 0 <= arguments.target < classes:
            raise ValueError(f"class: got {arguments.target}, expected 0 to {classes - 1}")
        image = read_image(arguments.image, resolution)
        images = normalise(image)[None]
        with torch.no_grad():
            likeliest = int(model(images).argmax())
        target = likeliest if arguments.target is None else arguments.target
        heat = activation_map(model, images, torch.tensor([target]), method=arguments.method)[0]
        panel = overlay(image, heat)
        # Side by side they are as large as the first.
        side = panels[0].shape[1] if panels else resolution
        panel = torch.nn.functional.interpolate(panel[None], (side, side), mode="bilinear")[0]
        panels.append(panel)
        captions.append(f"{name}, class {target}")
    write_image(arguments.out, torch.cat(panels, 2), captions)
    print(f"wrote {arguments.out}: {'; '.join(captions)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from effnet.export import export, export_onnx

    if arguments.out.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"out: got {str(arguments.out)!r}, expected a name ending in .onnx or .pt2"
        )
    model, resolution = _load(arguments.model, arguments.weights, arguments)
    if arguments.out.suffix == ".onnx":
        export_onnx(model, arguments.out, resolution)
    else:
        torch.export.save(export(model, resolution), arguments.out)
    print(f"wrote {arguments.out}, for images of {resolution} x {resolution}, any batch")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    variant = effnet.variant(arguments.model)
    resolution = arguments.resolution or variant.resolution
    scaled = effnet.dimensions(variant)
    measured = search.measure(
        scaled.stages,
        resolution,
        stem_channels=scaled.stem_channels,
        batch=arguments.batch,
        dtype=getattr(torch, arguments.dtype),
        seconds=arguments.seconds,
    )
    millions, milliseconds = arguments.most_parameters, arguments.most_milliseconds
    chosen = search.choose(
        measured,
        most_seconds=None if milliseconds is None else milliseconds / 1e3,
        most_parameters=None if millions is None else round(millions * 1e6),
    )
    print(f"{'stage':28}{'MBConv':>22}{'Fused-MBConv':>22}{'faster':>8}  chosen")
    for costs, stage in zip(measured, chosen, strict=True):
        cells = (
            f"{cost.seconds * 1e3:8.3f} ms {cost.parameters / 1e6:7.2f} M"
            for cost in (costs.mbconv, costs.fused)
        )
        ratio = costs.mbconv.seconds / costs.fused.seconds
        shape = f"{stage.layers} x {stage.channels} at {costs.resolution}, expand {stage.expand}"
        first, second = cells
        way = "fused" if stage.fused else "mbconv"
        print(f"{shape:28}{first:>22}{second:>22}{ratio:>7.2f}x  {way}")
    if arguments.plot is not None:
        _plot_search(measured, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


def _plot_search(measured: Sequence[search.StageCosts], path: Path) -> None:
    """Bars of both ways, a group a stage."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for offset, label in ((-0.2, "mbconv"), (0.2, "fused")):
        times = [getattr(costs, label).seconds * 1e3 for costs in measured]
        axes.bar([i + offset for i in range(len(measured))], times, 0.4, label=label)
    labels = [f"{costs.stage.channels}\nat {costs.resolution}" for costs in measured]
    axes.set_xticks(range(len(measured)), labels)
    axes.set_xlabel("channels of the stage, side of its output")
    axes.set_ylabel("ms an image")
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=100)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"plot: {str(path)!r} cannot be written; expected a name such as stages.png in a "
            "folder that exists"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ValueError as error:
        print(f"effnet: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"effnet: {error}; pip install 'effnet_kernels[effnet]' brings it", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone, as in `| head`; nothing is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

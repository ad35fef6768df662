"""The ``effnet`` command, and what it is made of: images, weights in files, maps, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import effnet
import numpy as np
import pytest
import torch
from effnet.__main__ import main
from effnet.augment import resize
from effnet.cam import activation_map
from effnet.data import digits
from effnet.description import Description, read_description, write_description
from effnet.export import export
from effnet.images import normalise, overlay, read_image, write_image
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from stock_models import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "efficientnet_b0"
COMMANDS = ("models", "train", "finetune", "predict", "cam", "export", "search", "evolve")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a real picture."""
    path = tmp_path_factory.mktemp("images") / "flower.png"
    Image.fromarray(load_sample_image("flower.jpg")).save(path)
    return path


@pytest.fixture(scope="module")
def model() -> effnet.EfficientNet:
    """Ten classes, with plausible statistics."""
    torch.manual_seed(0)
    model = effnet.create_model(MODEL, 10, drop_rate=0.0, drop_path_rate=0.0)
    calibrate(model, (4, 3, 64, 64))
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def weights(model: effnet.EfficientNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights in a file."""
    path = tmp_path_factory.mktemp("weights") / "b0.safetensors"
    save_file(model.state_dict(), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The command's exit status, output and errors."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_read_image(photograph: Path) -> None:
    """The centre, in [0, 1], as Pillow itself resizes it."""
    image = read_image(photograph, 64)
    assert image.shape == (3, 64, 64)
    whole = Image.open(photograph)
    side = round(min(whole.size) * 0.875)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    cropped = whole.crop((left, top, left + side, top + side)).resize((64, 64), 3)
    expected = torch.tensor(np.asarray(cropped)).permute(2, 0, 1) / 255
    assert (image - expected).abs().mean() < 0.01
    assert normalise(torch.full((3, 1, 1), 0.485))[0].item() == pytest.approx(0, abs=1e-6)


def test_overlay(tmp_path: Path) -> None:
    """Cold places keep the image, hot ones turn red; captions add a line."""
    image = torch.full((3, 4, 8), 0.5)
    heat = torch.zeros(4, 8)
    heat[:, 4:] = 1
    result = overlay(image, heat)
    torch.testing.assert_close(result[:, :, :4], image[:, :, :4])
    assert (result[0, :, 4:] > result[2, :, 4:] + 0.2).all()
    write_image(tmp_path / "out.png", result, ["a", "b"])
    assert Image.open(tmp_path / "out.png").size == (8, 4 + 16)


@pytest.mark.parametrize("names", ["ours", "timm", "torchvision"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_predict(
    names: str, kind: str, model: effnet.EfficientNet, photograph: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The likeliest classes, from weights under any library's names."""
    convert: Any = {"timm": effnet.to_timm, "torchvision": effnet.to_torchvision}.get(
        names, effnet.EfficientNet.state_dict
    )
    path = tmp_path / f"weights.{kind}"
    tensors = {name: tensor.contiguous() for name, tensor in convert(model).items()}
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"thing {i}" for i in range(10)))
    status, out, _ = run(
        capsys, "predict", photograph, "--model", MODEL, "--weights", path,
        "--resolution", 64, "--classes", labels, "--top", 3,
    )  # fmt: skip
    assert status == 0
    with torch.no_grad():
        likely = model(normalise(read_image(photograph, 64))[None]).softmax(1)[0]
    values, indices = likely.topk(3)
    expected = [
        f"{v:7.2%}  thing {i}" for v, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]
    assert out.splitlines() == expected


def test_maps(model: effnet.EfficientNet) -> None:
    """Both methods agree here, have the class's own weights in them, and end at 1."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 96, 64)
    grad = activation_map(model, images)
    assert grad.shape == (2, 96, 64)
    assert grad.min() >= 0
    assert grad.amax((1, 2)).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(
        activation_map(model, images, method="class"), grad, rtol=1e-3, atol=1e-4
    )
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
    first = activation_map(model, images, torch.tensor([3, 3]))
    assert not torch.allclose(first, grad)
    heat = torch.einsum("nchw,c->nhw", features, model.classifier.weight[3]).relu()
    largest = heat.flatten(1).argmax(1)
    rows, columns = largest // heat.shape[2], largest % heat.shape[2]
    for n in range(2):
        peak = first[n, int(rows[n]) * 32 : int(rows[n]) * 32 + 32]
        assert peak[:, int(columns[n]) * 32 : int(columns[n]) * 32 + 32].max() == 1
    assert logits.shape == (2, 10)
    with pytest.raises(ValueError, match="method: got 'score'"):
        activation_map(model, images, method="score")
    with pytest.raises(ValueError, match="without a classifier"):
        activation_map(effnet.create_model(MODEL, 0), images)


def test_cam_side_by_side(
    weights: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture a model, with captions."""
    out = tmp_path / "cam.png"
    status, text, _ = run(
        capsys, "cam", photograph, "--model", MODEL, MODEL, "--weights", weights, weights,
        "--resolution", 64, "--class", 2, "--out", out,
    )  # fmt: skip
    assert status == 0
    assert f"{MODEL}, class 2; {MODEL}, class 2" in text
    picture = Image.open(out)
    assert picture.size == (128, 64 + 16)
    left, right = picture.crop((0, 0, 64, 64)), picture.crop((64, 0, 128, 64))
    assert left.tobytes() == right.tobytes()


def test_export(
    model: effnet.EfficientNet, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime and torch.export give the same logits for other batches, on stock ops."""
    ort = pytest.importorskip("onnxruntime")
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    program = export(model, 64)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("effnet" in target for target in targets)
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-3, atol=1e-4)
    out = tmp_path / "b0.onnx"
    status, text, _ = run(
        capsys, "export", "--model", MODEL, "--weights", weights, "--resolution", 64,
        "--out", out,
    )  # fmt: skip
    assert status == 0
    assert "any batch" in text
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-3, atol=1e-4)


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, measured on demand."""
    status, out, _ = run(capsys, "models")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(effnet.VARIANTS)
    assert lines[1].split()[1:] == ["5.3", "M", "0.39", "G", "224"]
    status, out, _ = run(capsys, "models", MODEL, "--measure")
    assert status == 0
    assert float(out.splitlines()[1].split()[-1]) > 0


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has an example."""
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert "example" in capsys.readouterr().out


def test_errors_are_one_line(
    weights: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, and what is right instead."""
    text = tmp_path / "notes.txt"
    text.write_text("no image, no weights")
    common = ("--model", MODEL, "--weights", weights, "--resolution", 64)
    digits_on = ("--data", "digits", "--width", 0.25, "--resolution", 8, "--out")
    cases = [
        (("predict", tmp_path / "gone.png", *common), "image: there is no file"),
        (("predict", text, *common), "expected a PNG, JPEG or the like"),
        (
            ("predict", photograph, "--model", "efficientnet_b9", "--weights", weights),
            "the nearest are efficientnet_b8",
        ),
        (
            ("predict", photograph, "--model", "efficientnet_b1", "--weights", weights),
            "is it another variant's?",
        ),
        (
            ("predict", photograph, "--model", MODEL, "--weights", text),
            "expected a .safetensors file or what torch.save wrote",
        ),
        (
            ("predict", photograph, "--model", MODEL, "--weights", tmp_path / "gone.pt"),
            "weights: there is no file",
        ),
        (("predict", photograph, *common, "--classes", text), "expected one for each of the 10"),
        (
            ("cam", photograph, *common, "--class", 10, "--out", tmp_path / "o.png"),
            "class: got 10, expected 0 to 9",
        ),
        (("cam", photograph, *common, "--out", tmp_path / "o.what"), "such as out.png"),
        (("export", *common, "--out", tmp_path / "o.pb"), "ending in .onnx or .pt2"),
        (("export", *common, "--out", tmp_path / "gone" / "o.onnx"), "out: there is no folder"),
        (("models", "resnet50"), "there is no model 'resnet50'"),
        (("train", *digits_on, text), "notes.txt"),
        (("train", *digits_on, tmp_path / "a", "--randaugment", 31), "randaugment: got 31.0"),
        (("train", *digits_on, tmp_path / "a", "--label-smoothing", 2), "label_smoothing: got 2.0"),
        (("train", *digits_on, tmp_path / "a", "--magnitude", 9), "magnitude: got 9.0"),
        (("train", *digits_on, tmp_path / "a", "--weight-decay", -1), "weight_decay: got -1.0"),
        (("train", *digits_on, tmp_path / "a", "--drop-rate", 2), "drop_rate: got 2.0"),
        (("train", *digits_on, tmp_path / "a", "--ema", 1), "ema: got 1.0, expected 0 less than 1"),
        (("evolve", *digits_on, text), "notes.txt"),
    ]
    for words, message in cases:
        status, _, err = run(capsys, *words)
        assert status == 2, words
        assert err.startswith("effnet: "), words
        assert err.count("\n") == 1, err
        assert message in err, err


@pytest.mark.parametrize("option", ["--width=0", "--width=inf", "--depth=-1", "--batch=0"])
def test_numbers_out_of_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse names the option."""
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--data", "digits", "--out", "runs", option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Offline, with progressive learning; its weights and log; what goes on and what does not."""
    out = tmp_path / "run"
    words = [
        "train", "--data", "digits", "--resolution", 16, "--progressive", 8, "--phases", 2,
        "--width", 0.25, "--depth", 0.3, "--stem-stride", 1, "--epochs", 1, "--batch", 128,
        "--mixup", 0.2, "--ema", 0.9, "--out", out,
    ]  # fmt: skip
    status, text, _ = run(capsys, *words)
    assert status == 0
    assert "epoch 1/1  step 11/11  16 px" in text
    assert "test accuracy" in text
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,resolution,lr,loss,accuracy"
    assert [line.split(",")[2] for line in lines[1:]] == ["8"] * 6 + ["16"] * 5
    accuracies = [line.split(",")[5] for line in lines[1:]]
    assert accuracies[:-1] == [""] * 10
    assert f"test accuracy {float(accuracies[-1]):.2%}" in text
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert weights["classifier.weight"].shape[0] == 10
    status, _, err = run(capsys, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "--resume goes on with it" in err
    for other, message in (
        (("--stem-stride", 2), "is of another model"),
        (("--drop-path-rate", 0.5), "is of another model"),
        (("--epochs", 2), "is of another recipe"),
    ):
        status, _, err = run(capsys, *words, *other, "--resume")
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
    status, text, _ = run(capsys, *words, "--resume")
    assert status == 0
    assert "test accuracy" in text
    status, _, err = run(capsys, *words[:-1], tmp_path / "other", "--resume")
    assert status == 2
    assert "no checkpoint in" in err
    words[0], words[-1] = "finetune", tmp_path / "tuned"
    status, text, _ = run(capsys, *words, "--weights", out / "weights.pt")
    assert status == 0
    assert "test accuracy" in text
    words[-1] = tmp_path / "wrong"
    status, _, err = run(
        capsys, *words, "--model", "efficientnetv2_b0", "--weights", out / "weights.pt"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "is it another variant's" in err
    status, _, err = run(capsys, "train", "--data", "mnist", "--out", out)
    assert "expected digits, folder, CIFAR10" in err


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the digits, with RandAugment and TensorBoard's events."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    words = (
        f"train --data digits --resolution 16 --width 0.25 --depth 0.3 --stem-stride 1 --epochs 4 "
        f"--lr 1e-2 --randaugment 4 --test-every 2 --tensorboard --out {out}"
    )
    assert main(words.split()) == 0
    return out


def test_trained_model_is_used(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """predict, cam and export take what train wrote, with nothing else to say: an image is given to
    the network as in training; a picture; a file with one channel.
    """
    common = ("--model", digits_run / "model.json", "--weights", digits_run / "weights.pt")
    described = read_description(digits_run / "model.json")
    assert described.class_names == tuple("0123456789")
    model = described.build().eval()
    model.load_state_dict(torch.load(digits_run / "weights.pt", weights_only=True))
    test = digits().test
    for place in range(5):
        small = resize(test[place][0][None], 16)
        # predict looks at the middle 7/8 of a picture: 16 of 18 pixels.
        framed = torch.nn.functional.pad(small[0, 0], (1, 1, 1, 1))
        Image.fromarray((framed * 255).round().byte().numpy()).save(tmp_path / "digit.png")
        status, text, _ = run(capsys, "predict", tmp_path / "digit.png", *common, "--top", 1)
        assert status == 0
        with torch.no_grad():
            share, digit = model(normalise(small, (0.5,), (0.5,))).softmax(1).max(1)
        assert text.split()[1] == str(digit.item())
        assert float(text.split()[0].rstrip("%")) == pytest.approx(100 * share.item(), abs=1)
    out = tmp_path / "cam.png"
    status, text, _ = run(capsys, "cam", tmp_path / "digit.png", *common, "--out", out)
    assert status == 0
    assert Image.open(out).size == (16, 16 + 16)
    status, text, _ = run(capsys, "export", *common, "--out", tmp_path / "digits.onnx")
    assert status == 0
    assert "images of 1 x 16 x 16" in text
    status, text, _ = run(capsys, "models", digits_run / "model.json", "--measure")
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e6:.1f} M" in text.splitlines()[1]
    assert text.splitlines()[1].split()[5] == "16"
    # By the name alone it is another network.
    status, _, err = run(capsys, "predict", tmp_path / "digit.png", "--model", MODEL, *common[2:])
    assert (status, err.count("\n")) == (2, 1)
    assert "is it another variant's" in err


def test_events(digits_run: Path) -> None:
    """TensorBoard has what the log has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(digits_run / "tensorboard"))
    events.Reload()
    rows = [line.split(",") for line in (digits_run / "log.csv").read_text().splitlines()[1:]]
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [int(row[0]) for row in rows]
    assert [event.value for event in losses] == pytest.approx([float(row[4]) for row in rows])
    tests = [(int(row[0]), float(row[5])) for row in rows if row[5]]
    assert [step for step, _ in tests] == [43, 87]
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [
        (step, pytest.approx(accuracy)) for step, accuracy in tests
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "model: there is no file"),
        ("{", "describes no network"),
        ('{"variant": {"stages": [{"expand": 1}]}}', "describes no network"),
        ("[]", "describes no network"),
        ({"num_classes": 9}, "describes no network"),
        ({"in_chans": 4}, "describes no network"),
        ({"mean": [0.5]}, "describes no network"),
        ({"variant": {"resolution": "16"}}, "describes no network"),
        ({"variant": {"width": "1"}}, "describes no network"),
        ({"variant": {"stages": []}}, "describes no network"),
    ],
)
def test_bad_descriptions_are_an_error(
    text: str | dict[str, Any] | None, message: str, weights: Path, photograph: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line."""
    path = tmp_path / "model.json"
    if isinstance(text, dict):
        table = effnet.VARIANTS[MODEL]
        write_description(path, Description(table, 10, class_names=tuple("0123456789")))
        document = json.loads(path.read_text())
        text = json.dumps(
            {**document, **text, "variant": {**document["variant"], **text.get("variant", {})}}
        )
    if text is not None:
        path.write_text(text)
    status, _, err = run(capsys, "predict", photograph, "--model", path, "--weights", weights)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_descriptions_are_kept(tmp_path: Path) -> None:
    """Written and read, they are the same."""
    table = effnet.VARIANTS["efficientnetv2_s"]._replace(width=0.5, stem_stride=1, head=640)
    for names in (None, ("a", "b")):
        written = Description(table, 2, 1, "same", 1e-3, (0.5,), (0.25,), names)
        write_description(tmp_path / "model.json", written)
        assert read_description(tmp_path / "model.json") == written
    with pytest.raises(ValueError, match="in a folder that exists"):
        write_description(tmp_path / "gone" / "model.json", written)

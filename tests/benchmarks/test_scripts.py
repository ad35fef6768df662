"""The scripts of benchmarks/, as far as a machine without a GPU goes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import exercise
import pytest
import torch

from effnet_kernels import use_backend
from effnet_kernels.bench import command, models
from effnet_kernels.bench.command import SUITES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The scripts' python3 is this one.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    return subprocess.run(
        [str(word) for word in command], env={**env, **environment}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_gpu_script_says_what_it_cannot(tmp_path: Path) -> None:
    """Without a GPU every part is reported as not run, and the status says so."""
    result = run(BENCHMARKS / "gpu.sh", "build", "ncu", OUT=str(tmp_path))
    assert result.returncode == 1
    assert "PyTorch sees no GPU" in result.stdout
    summary = result.stdout.splitlines()[-2:]
    assert [line.split()[0] for line in summary] == ["build", "ncu"]
    assert all("not run: no GPU" in line for line in summary)


def test_gpu_script_knows_its_parts(tmp_path: Path) -> None:
    """A part that does not exist is one line; --help lists those that do."""
    result = run(BENCHMARKS / "gpu.sh", "bake", OUT=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no part 'bake', only: build tests" in result.stderr
    result = run(BENCHMARKS / "gpu.sh", "--help")
    assert result.returncode == 0
    assert "build tests sanitize tune kernels models search ncu" in result.stdout


def test_gpu_script_asks_for_what_there_is(tmp_path: Path) -> None:
    """On a machine of stand-ins every part runs, and the options of each op's and the models'
    benchmark are ones that it takes, with problems and contenders that a GPU has.
    """
    log = tmp_path / "log"
    programs = {
        # The questions come with -c, the filter of ncu's log with -.
        "python3": f"""if [ "$1" = -c ]; then
                         case "$2" in *get_device_name*) echo a-gpu ;;
                           *capability*) echo 9.0a ;; esac
                       elif [ "$1" = - ]; then cat >/dev/null
                       else echo "$*" >>{log}; fi""",
        "compute-sanitizer": 'while [ "$1" != python3 ]; do shift; done; "$@"',
        "ncu": 'while [ "$1" != python3 ]; do shift; done; "$@"',
        "nvcc": "exit 0",
    }
    for name, body in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    every = ["build", "tests", "sanitize", "tune", "kernels", "models", "search", "ncu"]
    every += ["peers", "sizes", "modes"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = run(BENCHMARKS / "gpu.sh", *every, PATH=path, OUT=str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[-1] for line in result.stdout.splitlines()[-len(every) :]] == (
        ["ok"] * len(every)
    )
    suites = {suite.__name__.rpartition(".")[2]: suite for suite in SUITES.values()}
    suites["efficientnet"] = models
    calls = [line.split() for line in log.read_text().splitlines()]
    measured, names = set(), []
    for script, *options in calls:
        if not script.startswith(("benchmarks/kernels/", "benchmarks/models/")):
            continue
        suite = suites[Path(script).stem]
        parser = argparse.ArgumentParser()
        command.add_arguments(parser, suite)
        arguments = parser.parse_args(options)
        arguments.dtypes = [command.DTYPES[name] for name in arguments.dtypes]
        command.check_only(arguments.only, suite, torch.device("cuda"))
        assert list(suite.problems(arguments)), options
        measured.add(suite)
        names.append((suite, arguments.name))
    assert measured == set(SUITES.values())
    assert len(set(names)) == len(names), "one run would replace another's results"
    others = {"setup.py", "-m", "benchmarks/exercise.py", "benchmarks/stages.py"}
    assert others <= {call[0] for call in calls}


def test_exercise_needs_a_gpu() -> None:
    """One line where there is none."""
    if torch.cuda.is_available():
        pytest.skip("would run everything")
    result = run(sys.executable, BENCHMARKS / "exercise.py", "small")
    assert result.returncode == 2
    assert result.stderr == "exercise.py: PyTorch sees no GPU\n"


@pytest.mark.usefixtures("one_thread")
def test_exercise_calls_are_right() -> None:
    """What compute-sanitizer watches is accepted by the ops, forward and backward."""
    with use_backend("eager"):
        exercise.small("cpu")


def test_published_measurement(tmp_path: Path) -> None:
    """An op's script: the suite with its own defaults, options over them."""
    result = run(
        sys.executable, BENCHMARKS / "kernels" / "squeeze_excite.py", "--modes", "inference",
        "--batch", "1", "--dtypes", "float32", "--only", "cpu", "--caches", "warm",
        "--seconds", "0.01", "--device", "cpu", "--models", "efficientnet_b0",
        "--out", str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "kernels-squeeze_excite.json").read_text())
    assert document["benchmark"] == "kernels-squeeze_excite"
    assert {row["model"] for row in document["rows"]} == {"efficientnet_b0"}
    assert {row["contender"] for row in document["rows"]} == {"eager", "cpu"}
    assert len(document["rows"]) == 2 * 10
    assert (tmp_path / "kernels-squeeze_excite.png").exists()


def test_roofline() -> None:
    """The table of a model, with the ceilings given; a wrong name is one line."""
    script = BENCHMARKS / "roofline.py"
    result = run(
        sys.executable, script, "efficientnet_b0", "--bandwidth", "4300", "--matmul", "790"
    )
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
    assert lines["conv_fused"][2] == "41.59"
    assert lines["mbconv"][2] == "13.95"
    # This project's own: the same but for the pooled sums' bookkeeping.
    result = run(
        sys.executable, script, "effnet:efficientnet_b0", "--bandwidth", "1", "--matmul", "1"
    )
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
    assert float(lines["mbconv"][2]) == pytest.approx(13.95, rel=0.02), result.stderr
    result = run(sys.executable, script, "efficentnet_b0")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "did you mean efficientnet_b0" in result.stderr


@pytest.mark.parametrize("kind", ["missing", "corrupt", "mismatched", "corrupt.safetensors"])
def test_demo_refuses_a_bad_checkpoint(kind: str, tmp_path: Path) -> None:
    """One line that says what is wrong with the file."""
    path = tmp_path / (f"{kind}.pth" if "." not in kind else kind)
    words = "not a readable checkpoint"
    if kind == "missing":
        words = "no such file"
    elif kind == "mismatched":
        torch.save({"state_dict": {"fc.weight": torch.ones(2, 2)}}, path)
        words = "not of efficientnet_b0: it lacks"
    else:
        path.write_bytes(b"this is no checkpoint")
    result = run(sys.executable, BENCHMARKS / "demo.py", "--checkpoint", path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr


def test_scaling_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot's figures: a factor of about two a step, in whichever way."""
    import scaling

    monkeypatch.setattr(scaling, "STEPS", (0, 2))
    for way, factors in scaling.growth("mobilenet_v2").items():
        assert factors == pytest.approx([1, 4], rel=0.35), way


def test_networks() -> None:
    """Stock and ours of each network, and the table that is drawn of them."""
    import family
    import networks

    small = (
        networks.Network("resnet18", 32, 69.8),
        networks.Network("efficientnet_b0", 32, 77.1, True),
    )
    rows = networks.measure(small, 1, torch.device("cpu"), 0.01)
    assert [sorted(row["images_per_second"]) for row in rows] == [["stock"], ["ours", "stock"]]
    assert rows[1]["parameters"] == 5_288_548
    rows[0]["name"] = "resnet50"
    rows[0]["images_per_second"]["stock"] = 10.0
    rows[1]["images_per_second"] = {"stock": 15.0, "ours": 40.0}
    lines = family.networks_table({"rows": rows}).splitlines()
    assert lines[2].startswith("| resnet50 at 32 | 69.8 % | 11.7 M |")
    assert lines[2].endswith("| 10 | - | 1.00x |")
    assert lines[3].endswith("| 15 | 40 | 4.00x |")


def test_progressive(tmp_path: Path) -> None:
    """Both ways train, and the table has them."""
    out = tmp_path / "progressive.json"
    result = run(
        sys.executable, BENCHMARKS / "progressive.py", "--resolution", "8", "--first", "8",
        "--phases", "2", "--hold", "1", "--epochs", "1", "--seeds", "1", "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert sorted(report["runs"]) == ["one size", "progressive"]
    assert "| progressive | 8, 8 | 1 |" in result.stdout


def test_stages(tmp_path: Path) -> None:
    """Every stage in both ways with both kinds of kernels, and the table of it."""
    out = tmp_path / "stages.json"
    result = run(
        sys.executable, BENCHMARKS / "stages.py", "--model", "efficientnetv2_b0",
        "--resolution", "32", "--seconds", "0.02", "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert {name: len(stages) for name, stages in report["stages"].items()} == {
        "effnet_kernels": 6, "PyTorch": 6,
    }  # fmt: skip
    assert out.with_suffix(".png").exists()
    assert "| 2 x 32 at 8, expand 4 |" in result.stdout


def test_stages_table() -> None:
    """The faster way of each, and by how much."""
    import family

    stage = {"layers": 2, "channels": 32, "expand": 4}
    row = {"stage": stage, "resolution": 8, "mbconv": {"seconds": 2e-3}}
    report = {
        "stages": {
            "ours": [{**row, "fused": {"seconds": 3e-3}}],
            "theirs": [{**row, "fused": {"seconds": 5e-4}}],
        }
    }
    line = family.stages_table(report).splitlines()[2]
    assert line == "| 2 x 32 at 8, expand 4 | 2 | 3 | MBConv 1.50x | 2 | 0.5 | Fused 4.00x |"


def test_evolution(tmp_path: Path) -> None:
    """Both searches train as many tables, from the same one."""
    out = tmp_path / "evolution.json"
    result = run(
        sys.executable, BENCHMARKS / "evolution.py", "--rounds", "2", "--epochs", "1", "--out", out
    )
    assert result.returncode == 0, result.stderr
    histories = json.loads(out.read_text())["histories"]
    assert [len(history) for history in histories.values()] == [2, 2]
    assert histories["evolution"][0] == histories["no selection"][0]
    assert out.with_suffix(".png").exists()
    assert "| evolution | 2 |" in result.stdout


def test_scaled_networks_of_the_maps() -> None:
    """Each about four times as large as the small one."""
    import cams

    costs = {name: cams.multiply_adds(baseline) for name, baseline in cams.ways().items()}
    small = costs.pop("the small one")
    assert len(costs) == 4
    for name, cost in costs.items():
        assert cost / small == pytest.approx(4, rel=0.2), name


def test_clutter() -> None:
    """A digit is in its picture, whole; the same seed makes the same picture."""
    import cams
    from effnet.augment import resize

    digits = torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8)
    pictures = cams.cluttered(digits, 1)
    assert pictures.shape == (3, 3, cams.SIDE, cams.SIDE)
    assert torch.equal(pictures, cams.cluttered(digits, 1))
    large = (resize(digits, 12) * 255).round().to(torch.uint8)
    windows = pictures[:, :1].unfold(2, 12, 1).unfold(3, 12, 1)
    for window, digit in zip(windows, large, strict=True):
        assert (window == digit[0]).flatten(-2).all(-1).any()

"""A small drawn data set that the tests share, and ways to run the scripts as a user does."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

with contextlib.suppress(ValueError):  # outside the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs in their background
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests share the cores,
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and threads of torch that wait would keep them busy

import pandas as pd
import pytest
import torch
import torchvision
from filelock import FileLock  # which torch brings

import cross_validate
import make_sample_data
import predict
import train_model
from biomass import features, plant, reading, writing

pd.set_option("io.excel.xlsx.reader", "calamine")  # what the scripts read with; silences pandas' change of default
ROOT = Path(__file__).resolve().parent.parent
SHEET, TARGET = "digital_biomass_labels.xlsx", "fresh_weight_total"
TINY = "--model_name shufflenet_v2_x0_5 --image_size 64 --epochs 2 --device cpu --precision fp32".split()
TINY += "--target_transform standardize --weights".split()  # of the file that write_tiny_weights appends
WITH_TRAITS = "--augmentation symmetries --features last stages traits --standardize_features --epochs 5".split()
WITH_TRAITS += "--target_transform sqrt --group_by filename".split()
START = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import conftest, importlib, train_model
train_model.SAVE_EVERY = 0
with conftest.quick():
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""  # a process that runs the script named by its first argument quickly and keeps its state after every epoch


def write_tiny_weights(path):
    """Random weights for TINY whose features differ between photos, which those of a random BatchNorm hardly do."""
    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5().train()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    torch.nn.init.constant_(norms[-1].weight, 0.2)
    with torch.no_grad():
        for _ in range(4):
            net(torch.nn.functional.interpolate(torch.randn(16, 3, 8, 8), size=64, mode="bilinear"))
    torch.save(net.state_dict(), path)
    TINY.append(str(path))


def flags_of(data, out, *flags):
    """The command line of a tiny model with all outputs in `out` and the cache beside it; later flags win."""
    places = ["--data_dir", data, "--results_dir", out, "--log_path", out / "training.log"]
    places += ["--model_out", out / "model.pt", "--cache_dir", out.parent / "cache"]
    return [str(flag) for flag in (*TINY, *places, *flags)]


@contextlib.contextmanager
def quick(pictures=False):
    """Leave out what takes seconds: the compilation for OpenVINO, which two tests look at, most pictures."""
    with contextlib.ExitStack() as patched:
        for script in (cross_validate, predict):
            patched.enter_context(mock.patch.object(script, "SHOWN", 2))
        patched.enter_context(mock.patch.object(features, "has_openvino", lambda: False))
        for name in ("plot_curves", "plot_predictions", "plot_worst") if not pictures else ():
            patched.enter_context(mock.patch.object(writing, name, lambda *arguments: None))
        yield


@pytest.fixture
def heat_maps(monkeypatch):
    """The heat maps that a run draws, and what the photos weigh in them as they are."""
    real, found = plant.heat_maps, []

    def note(photos, weigh):
        whole = []

        def noting(hidden, numbers):
            weights = weigh(hidden, numbers)
            whole.extend(weights[64::65])
            return weights

        found[:] = real(photos, noting), whole
        return found[0]

    monkeypatch.setattr(plant, "heat_maps", note)
    return found


def train(data, out, *flags, script=train_model, pictures=False):
    """Run train_model.py or cross_validate.py on a tiny model; returns metrics.txt."""
    flags = flags_of(data, out, *flags)
    if script is cross_validate:  # whose log lies beside its other outputs
        del flags[(place := flags.index("--log_path")) : place + 2]
    with quick(pictures):
        assert script.main(flags) == 0
    assert f"commit: {train_model.git('rev-parse', 'HEAD')}" in (out / "training.log").read_text(encoding="utf-8")
    return json.loads((out / "metrics.txt").read_text(encoding="utf-8"))


def prepared(data, out, *flags):
    """The arguments, and what a run has before it trains: labels, dataset, backbone, batches and accelerator."""
    argv = flags_of(data, out, *flags)
    args = train_model.build_parser().parse_args(argv)
    with contextlib.ExitStack() as started:
        return args, train_model.prepare("train_model.py", argv, args, started)


def labels_of(sheet, *flags):
    """The rows that train_model.py takes from a sheet."""
    return reading.load_labels(train_model.build_parser().parse_args(["--labels_path", *map(str, [sheet, *flags])]))


def tensors_of(out):
    """The state dict that a run has saved in `out`."""
    return torch.load(out / "model.pt", weights_only=True)["model_state"]


def outcome(out):
    """All bytes that must not depend on how a run came to its end, and its metrics without the time it took."""
    metrics = json.loads((out / "metrics.txt").read_text(encoding="utf-8"))
    metrics.pop("run")
    content = io.BytesIO()
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    torch.save(checkpoint, content)
    tables = {name: (out / name).read_bytes() for name in ("history.csv", "predictions.csv")}
    return {"metrics": metrics, "model": content.getvalue()} | tables


@pytest.fixture(scope="session", autouse=True)
def tiny_weights(tmp_path_factory):
    write_tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that make(folder) has filled once for all processes of a test run; it is only read."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make):
        with FileLock(base / f"{name}.lock"):
            if not (base / name).exists():
                make(base / f"{name}.partial")
                (base / f"{name}.partial").rename(base / name)
        return base / name

    return once


def draw(*flags):
    def make(folder):
        assert make_sample_data.main(["--num_images", "60", *flags, "--out", str(folder)]) == 0

    return make


@pytest.fixture(scope="session")
def drawn(once):
    """Folder of 60 drawn photos with their sheet."""
    return once("drawn", draw())


@pytest.fixture(scope="session")
def faulty(once):
    """The same set with the faults of real folders drawn in."""
    return once("faulty", draw("--with_faults"))


@pytest.fixture(scope="session")
def with_traits(once, drawn):
    """Outputs of train_model.py with all that the recommended recipe has, but for its network and size."""
    return once("with_traits", lambda folder: train(drawn, folder / "out", *WITH_TRAITS)) / "out"


@pytest.fixture
def copied(drawn, tmp_path):
    """The drawn set to be changed."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture
def run_script():
    """Run a script by its command line: run_script("eda.py", "--seed", 1, cwd=folder) -> CompletedProcess."""

    def run(script, *arguments, cwd):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})

    return run

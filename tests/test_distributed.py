"""Several processes of torchrun give the answer of one, and a process that dies ends the run in one line."""

import copy
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill import flags_of, outcome
from processes import ROOT, kill_in_mid_run, launch, run, stored

import devices
import loaders
import predict
import train_model
from model import BiomassModel

FROZEN = "--precision fp32 --epochs 2 --image_size 64 --standardize_features"
LEARNING = "--precision fp32 --epochs 8 --image_size 64 --unfreeze_from layer4 --learning_rate 1e-5 --batch_size 16"


def torchrun(processes, *command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def test_two_processes_share_the_extraction_and_the_photos_that_are_weighed(drawn, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_model.main([*flags_of(drawn, one), *FROZEN.split()]) == 0
    assert "distributed" not in sys.modules  # one process imports nothing for several
    _, found, metrics = run(2, drawn, two, FROZEN)
    assert stored(one).tobytes() == stored(two).tobytes()
    assert len(list((two / "cache").glob("*/*.npy"))) == 2  # each has added its share
    assert found["metrics"]["val_rmse"] == pytest.approx(outcome(one)["metrics"]["val_rmse"], abs=1e-6)
    assert metrics["run"]["processes"] == 2
    log = (two / "training.log").read_text(encoding="utf-8")
    assert log.count("epoch 2/2") == log.count("wrote ") / 7 == 1  # by one process alone

    weigh = [drawn / "images_med_res", "--model", two / "model.pt", "--out"]
    assert predict.main(list(map(str, [*weigh, one / "weights.csv"]))) == 0
    done = torchrun(3, ROOT / "predict.py", *weigh, two / "weights.csv")
    assert done.returncode == 0 and done.stdout.count("photos weighed") == 1, done.stderr
    assert (one / "weights.csv").read_text() == (two / "weights.csv").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_process_that_dies_is_named_and_the_rest_goes_on_with_another_number(drawn, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_model.main([*flags_of(drawn, whole), *LEARNING.split()]) == 0
    launcher = launch(2, drawn, killed, f"{LEARNING} --resume")
    while not (killed / "model.pt.progress").is_file() and launcher.poll() is None:
        time.sleep(0.05)
    (line,) = kill_in_mid_run(launcher, 1, seconds=0)
    assert "error: rank 1 of 2 (pid " in line and line.endswith("died; start the same command again with --resume")
    assert launcher.returncode
    assert train_model.main([*flags_of(drawn, killed), *LEARNING.split(), "--resume"]) == 0
    assert "resumed after epoch" in (killed / "training.log").read_text(encoding="utf-8")
    wanted, found = (json.loads((out / "metrics.txt").read_text())["val_rmse"] for out in (whole, killed))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_mistake_is_told_once(tmp_path):
    done = torchrun(2, ROOT / "train_model.py", "--data_dir", tmp_path / "none")
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_model.py")]
    assert len(lines) == 1 and "no data folder at" in lines[0] and done.returncode, done.stderr


# ---------------------------------------------------------------- within the processes


def step(model, call, images, targets, group):
    """Gradients, buffers and outputs of one training step on a batch that is dealt to the group."""
    torch.manual_seed(5)
    model.train()
    own = slice(group.rank, None, group.size)
    batches = [(images[own], torch.zeros(len(targets[own]), 0), targets[own])]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train_model.train_one_epoch(
        model, batches, optimizer, torch.nn.functional.mse_loss, torch.device("cpu"), group, call
    )
    gradients = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    return gradients, dict(model.named_buffers())


def check_steps(group):
    """A step on a dealt batch against the same step on the whole batch in one process; some parts may be empty."""
    for name, size, layer, count in (
        ("resnet18", 64, "", 8),
        ("resnet18", 64, "", 2),  # nothing for the third process
        ("efficientnet_b0", 96, "features.6", 8),  # whole paths are dropped
        ("vgg11_bn", 64, "features.25", 5),  # dropout before the last layer
    ):
        torch.manual_seed(0)
        model = BiomassModel(name, layer, "fp32", size)
        whole = copy.deepcopy(model)
        parts = [each.split() if layer else None for each in (model, whole)]
        coarse = 255 * torch.rand(count, 3, 4, 4)  # noise alone looks alike to deep layers, which BatchNorm blows up
        images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)
        targets = torch.rand(count)
        if layer:  # what the frozen part says
            with torch.inference_mode():
                images = parts[0](model.eval().normalize(images))
            images = images.clone()
        wanted, buffers = step(whole, None, images, targets, devices.ALONE)
        found, synced = step(model, group.parallel(model), images, targets, group)
        total = torch.cat([value.flatten() for value in wanted.values()]).norm()
        for key, value in wanted.items():
            off = (found[key] - value).norm() / (value.norm() + 1e-3 * total)
            assert off < 1e-3, f"{name} {key}: {off}"
        for key, value in buffers.items():
            torch.testing.assert_close(synced[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
    return 0


def check_dealing(group):
    for count, batch in ((12, 4), (10, 4), (7, 3), (2, 5), (0, 3)):
        parts = [torch.tensor(part) for part in group.deal(np.arange(count), batch)]
        assert group.interleave([*parts, torch.zeros(0, dtype=torch.int64)]).tolist() == list(range(count))
        shares = group.gather(list(range(count))[group.share(count, batch)])
        assert list(itertools.chain(*shares)) == list(range(count))
        assert all(share[0] % batch == 0 for share in shares if share)
    assert group.total(group.rank) == sum(range(group.size))
    assert group.first(lambda: group.rank) == 0
    return 0


def test_a_dealt_batch_teaches_what_the_whole_one_does():
    done = torchrun(3, Path(__file__))
    assert done.returncode == 0, done.stdout + done.stderr


def test_features_that_do_not_fit_memory_are_read_from_their_files(drawn, tmp_path, monkeypatch):
    flags = [*FROZEN.split(), "--folds", "3"]
    assert train_model.main([*flags_of(drawn, tmp_path / "held"), *flags]) == 0
    monkeypatch.setattr(loaders, "MOST_HELD", 0)
    assert train_model.main([*flags_of(drawn, tmp_path / "mapped"), *flags]) == 0
    assert outcome(tmp_path / "held") == outcome(tmp_path / "mapped")


if __name__ == "__main__":
    sys.exit(devices.together(lambda group: check_dealing(group) or check_steps(group)))

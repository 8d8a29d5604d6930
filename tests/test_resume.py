"""Runs that are killed, or stopped by Ctrl-C, leave whole files and go on to the end that they would have had."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from unittest import mock

import pandas as pd
import pytest
import torch
from conftest import SHEET, START, TARGET, flags_of, outcome, quick, train

import train_model as tm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills are tried on Linux and macOS")

RUNS = {  # script, flags, signal, and what stands in the line of the log after which it is sent
    "frozen": ("train_model", "--epochs 40 --lr_schedule cosine --augment_views 2 --metadata_columns age_days",
               signal.SIGKILL, "epoch "),
    "cross-validated": ("cross_validate", "--folds 2 --epochs 15 --patience 9 --target_transform log",
                        signal.SIGKILL, "epoch "),
    "all layers": ("train_model", "--epochs 4 --unfreeze_backbone --head_epochs 2 --batch_size 16",
                   signal.SIGKILL, "epoch "),
    "in the second fold": ("cross_validate", "--folds 2 --epochs 60", signal.SIGINT, "fold 2/2  epoch 2/"),
}  # fmt: skip


def start(script, data, out, *flags):
    """A process that keeps its state after every epoch."""
    command = [sys.executable, "-c", START, script, *flags_of(data, out, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(name, data, out):
    script, flags, *_ = RUNS[name]
    with quick():
        assert importlib.import_module(script).main(flags_of(data, out, *flags.split(), "--resume")) == 0


def stop_and_resume(name, data, out, chance):
    """Stop a run in its training, a kill at a random moment, see that its files are whole, and let another end it."""
    script, flags, sent, begun = RUNS[name]
    process = start(script, data, out, *flags.split(), "--resume")
    for line in process.stdout:
        if begun in line:
            break
    time.sleep(chance.uniform(0, 0.2) if sent == signal.SIGKILL else 0)
    process.send_signal(sent)
    message = process.communicate(timeout=60)[1]
    if sent == signal.SIGINT:
        assert process.returncode == 130, message
        assert message.count("\n") == 1 and "interrupted" in message and "--resume" in message
        assert len(torch.load(out / "model.pt.progress", weights_only=True)["results"]) == 1
    else:
        assert process.returncode == -sent, "the run was over before it was killed"
    for path in (*out.glob("*.pt"), *out.glob("*.progress")):
        torch.load(path, weights_only=True)
    for path in out.glob("metrics.txt"):
        json.loads(path.read_text(encoding="utf-8"))
    run(name, data, out)


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_is_resumed_to_the_same_bits(name, drawn, tmp_path, capsys):
    run(name, drawn, tmp_path / "undisturbed")
    stop_and_resume(name, drawn, tmp_path / "stopped", random.Random(name))
    printed = capsys.readouterr().out
    assert "resumed after epoch" in printed
    assert ("fold 1/2  was done before" in printed) == (name == "in the second fold")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")
    assert not list(tmp_path.rglob("*.progress"))


def test_it_resumes_the_same_run_only_and_says_what_differs(drawn, tmp_path, capsys):
    out, real, epochs = tmp_path / "out", tm.train_one_epoch, []

    def killed(*arguments):
        epochs.append(1)
        if len(epochs) == 3:
            raise SystemExit("killed")
        return real(*arguments)

    train(drawn, out, "--epochs", 3, "--resume")
    assert f"nothing to resume, there is no {out / 'model.pt.progress'}" in capsys.readouterr().out
    before = outcome(out)
    with mock.patch.multiple(tm, SAVE_EVERY=0, train_one_epoch=killed), pytest.raises(SystemExit, match="killed"):
        train(drawn, out, "--epochs", 3, "--seed", 7)
    sheet = pd.read_excel(drawn / SHEET)
    sheet.drop(sheet[TARGET].first_valid_index()).to_csv(tmp_path / "labels.csv", index=False)
    for flags, told in (
        (["--epochs", 4, "--seed", 7], "--epochs 3, now it is 4"),
        (["--epochs", 3], "--seed 7, now it is 42"),
        (["--epochs", 3, "--seed", 7, "--labels_path", tmp_path / "labels.csv"], "data (rows and photos)"),
        (["--epochs", 3, "--seed", 7, "--weights", "none"], "--weights"),
    ):
        with quick():
            assert tm.main(flags_of(drawn, out, *flags, "--resume")) == 2
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1
    with mock.patch.object(tm, "HEAD_WIDTH", 128), quick():
        assert tm.main(flags_of(drawn, out, "--epochs", 3, "--seed", 7, "--resume")) == 2
    assert "is of a run with other code of the recipe" in capsys.readouterr().err
    (out / "model.pt.progress").write_bytes(b"no progress")
    with quick():
        assert tm.main(flags_of(drawn, out, "--epochs", 3, "--seed", 7, "--resume")) == 2
    assert "is damaged" in capsys.readouterr().err
    assert outcome(out) == before


def test_ctrl_c_keeps_the_best_epoch_and_ends_with_status_130(drawn, tmp_path):
    out = tmp_path / "out"
    process = start("train_model", drawn, out, "--epochs", 100000)
    for line in process.stdout:
        if line.startswith("epoch 20/"):
            break
    process.send_signal(signal.SIGINT)
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted after epoch" in printed
    assert message == "train_model.py: interrupted; what the log says was written is whole, --resume goes on\n"
    metrics, history = json.loads((out / "metrics.txt").read_text()), pd.read_csv(out / "history.csv")
    assert metrics["interrupted_after_epoch"] == len(history) >= 20
    assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-5)
    assert metrics["epoch"] == history["val_loss"].idxmin() + 1
    assert torch.load(out / "model.pt", weights_only=True)["epoch"] == metrics["epoch"]
    assert (out / "model.pt.progress").exists() and not list(out.rglob("*.partial"))

"""Runs that are stopped, by Ctrl-C, a kill, a full disk or a mistake, keep what was there and can go on undisturbed."""

import json
import signal
import subprocess
import sys
import time

import kill
import pandas as pd
import pytest
import torch
from kill import SHEET, flags_of, outcome

import outputs
import progress
import train_model

resource = pytest.importorskip("resource", reason="kills and full disks are tried on Linux and macOS")

RUNS = {
    "folds that choose their epoch, metadata": "--folds 3 --patience 2 --epochs 6 --metadata_columns age_days "
    "--standardize_features --target_transform log",
    "last layers": "--epochs 3 --unfreeze_from layer4 --lr_schedule cosine --image_size 64",
    "all layers": "--epochs 3 --unfreeze_backbone --image_size 64 --weight_decay 0.1",
}


class Killed(BaseException):
    """Ends a run between two steps, as a kill would, but in the process of the test."""


def run(data, out, *flags):
    return train_model.main([*flags_of(data, out), *map(str, flags)])


def stop_after(monkeypatch, calls):
    """Have the run killed within its training number `calls` + 1 of an epoch."""
    train_one_epoch, done = train_model.train_one_epoch, []

    def killed(*arguments):
        if len(done) == calls:
            raise Killed
        done.append(1)
        return train_one_epoch(*arguments)

    monkeypatch.setattr(train_model, "train_one_epoch", killed)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(name, drawn, tmp_path, monkeypatch, capsys):
    flags = RUNS[name].split()
    assert run(drawn, tmp_path / "undisturbed", *flags) == 0
    monkeypatch.setattr(progress, "WRITE_EVERY", 0)
    stops = (1,) if "layers" in name else (5, 3)
    for calls in stops:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            stop_after(patched, calls)
            run(drawn, tmp_path / "stopped", *flags, "--resume")
    capsys.readouterr()
    assert run(drawn, tmp_path / "stopped", *flags, "--resume") == 0
    printed = capsys.readouterr().out
    assert "resumed after epoch" in printed or "fold 1/3  was done before" in printed
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")
    assert (tmp_path / "stopped" / "training.log").read_text().count("command: ") == len(stops) + 1
    assert not kill.strays(tmp_path)


def test_it_resumes_the_same_run_only_and_says_what_differs(drawn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(drawn, out, "--epochs", 3, "--resume") == 0
    assert f"nothing to resume, there is no {out / 'model.pt.progress'}" in capsys.readouterr().out
    before = outcome(out)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(patched, 2)
        run(drawn, out, "--epochs", 3, "--seed", 7)
    sheet = pd.read_excel(drawn / SHEET)
    weighed = sheet.index[sheet["fresh_weight_total"].notna()]
    sheet.drop(weighed[0]).to_csv(tmp_path / "labels.csv", index=False)
    for flags, told in (
        (["--epochs", 4, "--seed", 7], "--epochs 3, now it is 4"),
        (["--epochs", 3], "--seed 7, now it is 42"),
        (["--epochs", 3, "--seed", 7, "--labels_path", tmp_path / "labels.csv"], "data (rows of the sheet and photos)"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run(drawn, out, *flags, "--resume")
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1
    (out / "model.pt.progress").write_bytes(b"no progress")
    with pytest.raises(SystemExit, match="2"):
        run(drawn, out, "--epochs", 3, "--seed", 7, "--resume")
    assert "is damaged" in capsys.readouterr().err
    assert outcome(out)["predictions.csv"] == before["predictions.csv"]


def test_ctrl_c_ends_with_the_epochs_done_and_status_130(drawn, tmp_path):
    out = tmp_path / "out"
    flags = [*flags_of(drawn, out), "--epochs", "100000"]
    command = [sys.executable, kill.ROOT / "train_model.py", *flags]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 20/"):
            break
    process.send_signal(signal.SIGINT)
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message == "train_model.py: interrupted; what the log says was written is whole, --resume goes on\n"
    metrics, history = json.loads((out / "metrics.txt").read_text()), pd.read_csv(out / "history.csv")
    assert metrics["interrupted_after_epoch"] == len(history) >= 20
    assert metrics["val_mse"] == pytest.approx(history["val_loss"].min())
    assert torch.load(out / "model.pt", weights_only=True)["epoch"] == metrics["epoch"]
    assert "interrupted after epoch" in printed
    kill.check_outputs(out)


def test_ctrl_c_while_the_libraries_load_is_one_line(drawn, tmp_path):
    for script in ("train_model.py", "predict.py"):
        process = subprocess.Popen(
            [sys.executable, kill.ROOT / script], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == f"{script}: interrupted\n"
        assert process.returncode == 130


def test_a_loss_that_is_not_finite_is_named_and_the_best_epoch_stays(drawn, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(drawn, tmp_path / "large", "--epochs", 2, "--batch_size", 8, "--learning_rate", 1e30)
    assert "epoch 1: the loss is not finite at batch 2; lower --learning_rate" in capsys.readouterr().err
    train_one_epoch, epochs = train_model.train_one_epoch, []

    def diverging(model, batches, *rest):
        epochs.append(1)
        if len(epochs) == 3:
            model.head.last.bias.data.fill_(float("nan"))
        return train_one_epoch(model, batches, *rest)

    monkeypatch.setattr(train_model, "train_one_epoch", diverging)
    with pytest.raises(SystemExit, match="2"):
        run(drawn, tmp_path / "out", "--epochs", 5)
    assert "epoch 3: the loss is not finite at batch 1" in capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert checkpoint["epoch"] <= 2
    assert all(tensor.isfinite().all() for tensor in checkpoint["model_state"].values())


def test_a_full_disk_ends_the_run_in_one_line_and_earlier_files_stay_whole(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(drawn, out, "--epochs", 1) == 0
    before = outcome(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (2**22, 2**19, 2**10):  # too small for the checkpoint, for the progress, for the log
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(SystemExit, match="2"):
                run(drawn, out, "--epochs", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        message = capsys.readouterr().err
        assert message.startswith("train_model.py: error: cannot read or write") and message.count("\n") == 1, message
        assert "File too large" in message and str(out) in message
        after = outcome(out)
        assert after == before
        assert not list(out.rglob("*.partial"))


def test_the_second_of_two_runs_is_told_that_the_outputs_are_in_use(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with outputs.alone([out / "model.pt"]), pytest.raises(SystemExit, match="2"):
        run(drawn, out, "--epochs", 1)
    assert f"{out / 'model.pt'} is in use by another run" in capsys.readouterr().err
    assert run(drawn, out, "--epochs", 1) == 0


def test_a_killed_run_is_resumed_to_the_same_end(tmp_path, drawn):
    flags = ["--data_dir", drawn, "--kills", 1, "--runs", "frozen", "--folder", tmp_path / "kill"]
    assert kill.main(list(map(str, flags))) == 0

"""Several processes of torchrun: what they share, what one process would have said, and a process that dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT, SHEET, TARGET, flags_of, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")

FROZEN = "--epochs 4 --batch_size 8 --learning_rate 1e-2 --metadata_columns age_days".split()
ALL_LAYERS = "--epochs 3 --batch_size 10 --unfreeze_backbone".split()
START = "import sys, train_model; train_model.SAVE_EVERY = 0; sys.exit(train_model.main(sys.argv[1:]))"


def torchrun(folder, *flags, restarts=0):
    """torchrun of two processes of train_model.py that keep their state after every epoch."""
    (folder / "start.py").write_text(START)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "--max-restarts", str(restarts), str(folder / "start.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    return printed


def ranks_of(launcher):
    with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_a_frozen_run_gives_the_metrics_of_a_single_process(drawn, tmp_path):
    wanted = train(drawn, tmp_path / "one", *FROZEN, "--cache_dir", tmp_path / "one" / "cache")
    printed = finish(torchrun(tmp_path, *flags_of(drawn, tmp_path / "two", *FROZEN)))
    found = json.loads((tmp_path / "two" / "metrics.txt").read_text())
    for name, value in wanted.items():
        if name != "run":
            assert found[name] == pytest.approx(value, abs=2e-4 if isinstance(value, float | list) else 0), name
    cached = flags_of(drawn, tmp_path / "cached", *FROZEN)  # with the very same features: OpenVINO's
    assert subprocess.run([sys.executable, ROOT / "train_model.py", *cached], capture_output=True).returncode == 0
    again = json.loads((tmp_path / "cached" / "metrics.txt").read_text())
    assert found["val_rmse"] == pytest.approx(again["val_rmse"], abs=1e-6)
    assert found["last_epoch_val_rmse"] == pytest.approx(again["last_epoch_val_rmse"], abs=1e-6)
    assert found["run"]["processes"] == 2 and printed.count("epoch 4/4") == printed.count("wrote ") / 7 == 1
    assert "0 to compute" in (tmp_path / "cached" / "training.log").read_text()


def test_all_layers_count_each_row_once_and_a_dead_rank_ends_the_run_that_resume_goes_on_with(drawn, tmp_path):
    out = tmp_path / "out"
    launcher = torchrun(tmp_path, *flags_of(drawn, out, *ALL_LAYERS, "--epochs", 30, "--resume"))
    for line in launcher.stdout:
        if "epoch 2/" in line:
            break
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    launcher.communicate(timeout=100)
    assert launcher.returncode and not (out / "metrics.txt").exists()
    kept = torch.load(out / "model.pt.progress", weights_only=True)["state"][""]["done"]["history"]
    assert len(kept) >= 2
    printed = finish(torchrun(tmp_path, *flags_of(drawn, out, *ALL_LAYERS, "--epochs", 30, "--resume")))
    assert f"resumed after epoch {len(kept)}" in printed and printed.count("epoch 30/30") == 1
    table, sheet = pd.read_csv(out / "predictions.csv").set_index("filename"), pd.read_excel(drawn / SHEET)
    one = train(drawn, tmp_path / "one", *ALL_LAYERS, "--epochs", 1)
    wanted = pd.read_csv(tmp_path / "one" / "predictions.csv").set_index("filename")
    metrics = json.loads((out / "metrics.txt").read_text())
    assert metrics["val_rows"] == one["val_rows"] and sorted(table.index) == sorted(wanted.index)
    measured = sheet.set_index("filename").loc[table.index, TARGET]
    assert table["measured_g"].tolist() == pytest.approx(measured.tolist())
    assert metrics["val_mse"] == pytest.approx((table["predicted_g"] - measured).pow(2).mean(), rel=1e-4)
    history = pd.read_csv(out / "history.csv")
    assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-4)
    steps = -(-one["train_rows"] // 10)  # batches of 10 for both processes together: the optimizer counts them
    state = torch.load(tmp_path / "steps.pt", weights_only=True) if (tmp_path / "steps.pt").exists() else None
    assert state is None or state == steps


def test_a_mistake_is_told_once_and_a_restart_by_torchrun_ends(drawn, tmp_path):
    process = torchrun(tmp_path, "--data_dir", str(tmp_path / "none"))
    printed = process.communicate(timeout=100)[0]
    assert printed.count("no data folder at") == 1 and process.returncode, printed
    launcher = torchrun(tmp_path, *flags_of(drawn, tmp_path / "out", *FROZEN, "--epochs", 3000, "--resume"), restarts=1)
    for line in launcher.stdout:
        if "epoch 9/" in line:
            break
    os.kill(ranks_of(launcher)[0], signal.SIGKILL)
    time.sleep(1)
    assert "resumed after epoch" in finish(launcher)

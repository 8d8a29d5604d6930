"""Two processes of torchrun: what they share, what one process would have said, and a process that dies."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, SHEET, START, TARGET, flags_of, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")


def torchrun(folder, *flags, start=START, script="train_model"):
    """torchrun of two processes of a script that keep their state after every epoch."""
    (folder / "start.py").write_text(start)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(folder / "start.py"), script, *map(str, flags)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    printed = process.communicate(timeout=150)[0]
    assert process.returncode == 0, printed
    return printed


def test_a_frozen_run_gives_the_metrics_of_a_single_process(drawn, tmp_path):
    flags = ["--epochs", 4, "--batch_size", 8, "--learning_rate", 1e-2, "--metadata_columns", "age_days"]
    wanted = train(drawn, tmp_path / "one", *flags, "--cache_dir", "none")
    printed = finish(torchrun(tmp_path, *flags_of(drawn, tmp_path / "two", *flags)))
    found = json.loads((tmp_path / "two" / "metrics.txt").read_text())
    assert found["run"]["processes"] == 2 and printed.count("epoch 4/4") == 1 and printed.count("elapsed") == 1
    for name in wanted.keys() - {"run"}:
        assert found[name] == pytest.approx(wanted[name], abs=1e-6), name
    flags = ["--model", tmp_path / "two" / "model.pt", "--cache_dir", tmp_path / "cache"]
    flags += ["--labels_path", drawn / SHEET, "--image_dir", drawn / "images_med_res"]
    flags += ["--out", tmp_path / "p.csv", "--explain", tmp_path / "heat.png"]
    finish(torchrun(tmp_path, *flags, script="predict"))
    weighed = pd.read_csv(tmp_path / "p.csv").set_index("filename")["predicted_g"]
    one = pd.read_csv(tmp_path / "one" / "predictions.csv")
    assert weighed[one["filename"]].tolist() == pytest.approx(one["predicted_g"].tolist(), abs=1e-6)
    assert (tmp_path / "heat.png").is_file()


def test_all_layers_count_each_row_once_and_resume_goes_on_where_a_rank_died(drawn, tmp_path):
    """On two machines, each with a folder of its own: the second has no file to resume from."""
    places = [tmp_path / name for name in ("machine_0", "machine_1")]
    for place in places:
        place.mkdir()
    apart = f"import os\nos.chdir({[*map(str, places)]!r}[int(os.environ['RANK'])])\n" + START
    out, flags = tmp_path / "out", ["--epochs", 6, "--batch_size", 10, "--unfreeze_backbone", "--resume"]
    one = train(drawn, tmp_path / "one", *flags, "--epochs", 1)
    flags = flags_of(drawn, out, *flags, "--model_out", "model.pt")
    launcher = torchrun(tmp_path, *flags, start=apart)
    for line in launcher.stdout:
        if "epoch 2/" in line:
            break
    with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as children:
        os.kill(int(children.read().split()[1]), signal.SIGKILL)
    launcher.communicate(timeout=100)
    assert launcher.returncode and not (out / "metrics.txt").exists()
    assert not (places[1] / "model.pt.progress").exists()
    state = torch.load(places[0] / "model.pt.progress", weights_only=True)["states"][""]
    kept, steps = state["done"]["history"], -(-one["train_rows"] // 10)  # batches of 10 for both processes together
    assert len(kept) >= 2 and state["optimizer"]["state"][0]["step"] == len(kept) * steps
    printed = finish(torchrun(tmp_path, *flags, start=apart))
    assert f"resumed after epoch {len(kept)}" in printed and printed.count("epoch 6/6") == 1
    assert f"epoch {len(kept) + 1}/6" in printed and f"epoch {len(kept)}/6" not in printed
    table, sheet = pd.read_csv(out / "predictions.csv").set_index("filename"), pd.read_excel(drawn / SHEET)
    wanted = pd.read_csv(tmp_path / "one" / "predictions.csv")["filename"]
    metrics, history = json.loads((out / "metrics.txt").read_text()), pd.read_csv(out / "history.csv")
    assert metrics["val_rows"] == one["val_rows"] and sorted(table.index) == sorted(wanted)
    measured = sheet.set_index("filename").loc[table.index, TARGET]
    assert table["measured_g"].tolist() == pytest.approx(measured.tolist())
    assert metrics["val_mse"] == pytest.approx((table["predicted_g"] - measured).pow(2).mean(), rel=1e-4)
    assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-4)


def test_a_mistake_is_told_once(tmp_path):
    plain = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom train_model import main\nsys.exit(main(sys.argv[2:]))"
    process = torchrun(tmp_path, "--data_dir", str(tmp_path / "none"), start=plain)
    printed = process.communicate(timeout=100)[0]
    assert printed.count("train_model.py: error: no data folder at") == 1 and process.returncode, printed

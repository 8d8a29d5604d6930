"""Kill runs of train_model.py at random moments, resume each to its end, and compare with a run that was left alone.

    python tests/kill.py --data_dir sample_data               # 50 kills; some ten minutes on two cores

After each kill all outputs must be whole and the feature store usable; at the end the checkpoint, the tables and the
numbers must equal those of the undisturbed run to the last bit, and no stray file may lie about.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from feature_store import digest  # noqa: E402

SHEET = "digital_biomass_labels.xlsx"
FROZEN = "--epochs 12 --batch_size 8"
RUNS = {
    "frozen": FROZEN,
    "folds": "--folds 3 --epochs 8 --batch_size 8 --target_transform sqrt --standardize_features",
    "all layers": "--unfreeze_backbone --epochs 4 --batch_size 8 --image_size 64",
}


def flags_of(data, out):
    """Flags by which train_model.py reads `data`, with random weights, and writes to `out` alone."""
    places = {"results_dir": out, "log_path": out / "training.log", "model_out": out / "model.pt"}
    flags = {"data_dir": data, "weights": "none", "device": "cpu", "cache_dir": out / "cache", **places}
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def outcome(out):
    """All that a run has found out, without when, where and how it ran."""
    metrics = json.loads((out / "metrics.txt").read_text(encoding="utf-8"))
    state = torch.load(out / "model.pt", weights_only=True)["model_state"]
    weights = digest(*(tensor.numpy().tobytes() for tensor in state.values()))
    tables = {name: (out / name).read_bytes() for name in ("predictions.csv", "history.csv")}
    return tables | {"weights": weights, "metrics": {name: metrics[name] for name in metrics if name != "run"}}


def check_outputs(out):
    """Open every output that is there; raises if one is not whole."""
    for path in out.glob("*.png"):
        np.asarray(Image.open(path))
    for path in out.glob("*.csv"):
        pd.read_csv(path)
    for path in (*out.glob("*.pt"), *out.glob("*.progress")):
        torch.load(path, weights_only=True)
    for path in out.glob("metrics.txt"):
        json.loads(path.read_text(encoding="utf-8"))


def strays(out):
    """Files that should not be there; what is half written in the store is removed by later runs, after minutes."""
    found = [path for path in out.rglob("*.partial") if path.suffixes[-3:-2] != [".npy"]]
    return [*found, *out.rglob("*.progress"), *out.rglob("*.lock")]


def start(data, out, flags):
    command = [sys.executable, ROOT / "train_model.py", *flags_of(data, out), *flags.split(), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # gradients of several threads may add up in another order
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def ended_well(process):
    message = process.communicate()[1]
    if process.returncode not in (0, -9) or (message and process.returncode == 0):
        raise SystemExit(f"the run ended with status {process.returncode}: {message}")
    return process.returncode == 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("sample_data"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to work in (default: a temporary one)")
    args = parser.parse_args(argv)
    chance, kills, ends, damaged = random.Random(args.seed), 0, 0, 0
    with (
        tempfile.TemporaryDirectory(prefix="kill_")
        if not args.folder
        else contextlib.nullcontext(args.folder) as folder
    ):
        wanted, seconds = {}, {}
        for name in args.runs:
            started = time.monotonic()
            assert ended_well(start(args.data_dir, Path(folder, f"undisturbed {name}"), RUNS[name]))
            seconds[name] = time.monotonic() - started
            wanted[name] = outcome(Path(folder, f"undisturbed {name}"))
        while kills < args.kills:
            name = args.runs[ends % len(args.runs)]
            out = Path(folder, "killed")
            shutil.rmtree(out, ignore_errors=True)
            for attempt in range(1000):
                started = time.monotonic()
                process = start(args.data_dir, out, RUNS[name])
                if kills < args.kills and attempt < 8:
                    time.sleep(chance.uniform(0, seconds[name]))
                    process.kill()
                if ended_well(process):
                    if not attempt:  # faster than the first was
                        seconds[name] = min(seconds[name], time.monotonic() - started)
                    break
                kills += 1
                check_outputs(out)
            assert outcome(out) == wanted[name], f"{name}: another result after {attempt} kills"
            assert not strays(out), strays(out)
            log = (out / "training.log").read_text(encoding="utf-8")
            damaged += log.count("damaged")
            ends += 1
            print(f"{name}: killed {attempt} times, resumed to the same end ({kills} kills so far)", flush=True)
    assert not damaged, "a kill has left a damaged file in the store"
    print(f"{kills} kills, {ends} runs resumed to their end, all bit-identical to the undisturbed runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

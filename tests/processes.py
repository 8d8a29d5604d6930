"""Run train_model.py by one, two and three processes, compare what comes out, and kill processes in mid-run.

    python tests/processes.py --data_dir sample_data     # some ten minutes on two cores; writes results/processes.json

All run in full precision on the CPU. Frozen: the stored features must be the same bits and the validation RMSE equal
to 1e-6. All layers: the RMSE after an epoch must be equal to 1e-4, at a learning rate that does not blow up rounding
errors; how far they grow at the default one is measured too, beside a single process that adds up in another order.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kill import flags_of, outcome, strays  # noqa: E402

import report  # noqa: E402
from devices import ALONE, together  # noqa: E402
from model import BiomassModel  # noqa: E402
from train_model import train_one_epoch  # noqa: E402

FROZEN = "--precision fp32 --epochs 20"
LEARNING = "--precision fp32 --epochs 1 --unfreeze_backbone --image_size 96"
SHORT = "--precision fp32 --epochs 6 --unfreeze_backbone --image_size 64 --learning_rate 1e-5"


RUNS = {
    "frozen": FROZEN,
    "all layers, rate 1e-5": f"{LEARNING} --learning_rate 1e-5",
    "all layers, rate 1e-3": LEARNING,
}
MOST = {"frozen": 1e-6, "all layers, rate 1e-5": 1e-4, "all layers, rate 1e-3": math.inf}  # g between RMSEs
WAYS = [(1, 1), (2, 1), (3, 1), (1, 2)]  # processes, threads of each


def launch(processes, data, out, flags, threads=1):
    """train_model.py as a user starts it, by torchrun if there are several processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    command = [sys.executable, *several, ROOT / "train_model.py", *flags_of(data, out), *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment, **pipes)


def run(processes, data, out, flags, threads=1):
    """Seconds of a whole run, its outcome and its metrics."""
    started = time.perf_counter()
    process = launch(processes, data, out, flags, threads)
    text, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{processes} processes, {flags}: status {process.returncode}\n{text}\n{errors}")
    return time.perf_counter() - started, outcome(out), json.loads((out / "metrics.txt").read_text(encoding="utf-8"))


def stored(out):
    """All rows of a run's feature store, sorted by their keys."""
    rows = np.concatenate([np.load(path) for path in (out / "cache").glob("*/*.npy")])
    return rows[np.argsort(rows["key"])]


def process_of(launcher, rank):
    """Process number of a rank that torchrun has started, 0 if it is not there (yet)."""
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for child in children:
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    except OSError:
        pass
    return 0


def kill_in_mid_run(launcher, rank, seconds):
    """Kill one process so many seconds after it was there; returns the run's lines on stderr that are its own."""
    while not process_of(launcher, rank) and launcher.poll() is None:
        time.sleep(0.05)
    time.sleep(seconds)
    alive = process_of(launcher, rank)
    if alive:
        os.kill(alive, 9)
    return [line for line in launcher.communicate()[1].splitlines() if line.startswith("train_model.py:")]


def compare(data, folder, repeats):
    result = {}
    for name, flags in RUNS.items():
        lines, features, rmse = [], None, None
        times = {way: [] for way in WAYS}
        for repeat in range(repeats):
            for processes, threads in WAYS:
                out = Path(folder, f"{name} {processes} {threads} {repeat}")
                seconds, _, metrics = run(processes, data, out, flags, threads)
                times[processes, threads].append(seconds)
                rmse = rmse or metrics["val_rmse"]
                line = {"processes": processes, "threads": threads, "val_rmse": metrics["val_rmse"]}
                line["difference"] = abs(metrics["val_rmse"] - rmse)
                if name == "frozen":
                    rows = stored(out)
                    features = rows if features is None else features
                    line["features"], line["same_bits"] = len(rows), rows.tobytes() == features.tobytes()
                    assert line["same_bits"], line
                assert threads > 1 or line["difference"] < MOST[name], line
                if not repeat:
                    lines.append(line)
        for line in lines:
            line["seconds"] = float(np.median(times[line["processes"], line["threads"]]))
            print(name, line, flush=True)
        result[name] = lines
    return result


def kill(data, folder, seed, kills):
    """Kill processes at random moments and resume, with as many processes or with other numbers of them."""
    chance, result = random.Random(seed), []
    for name, flags in {"frozen": FROZEN, "all layers": SHORT}.items():
        usual, wanted, _ = run(2, data, Path(folder, f"undisturbed {name}"), flags)
        for number in range(kills):
            out, rank = Path(folder, f"killed {name} {number}"), number % 2
            lines = []
            while not lines:  # it may have ended before
                shutil.rmtree(out, ignore_errors=True)
                launcher = launch(2, data, out, f"{flags} --resume")
                lines = kill_in_mid_run(launcher, rank, chance.uniform(3, 0.7 * usual))
            again = 2 if name == "all layers" else (2, 1, 3)[number % 3]
            _, found, _ = run(again, data, out, f"{flags} --resume")
            log = (out / "training.log").read_text(encoding="utf-8")
            line = {"run": name, "killed_rank": rank, "status": launcher.returncode, "message": lines}
            line |= {"resumed_by": again, "resumed_in_training": "resumed after epoch" in log}
            line["same_bits"] = found == wanted
            print(line, flush=True)
            assert line["same_bits"] and not [path for path in strays(out) if path.suffix != ".lock"], strays(out)
            result.append(line)
    return result


def head_speed(group):
    """Rows a second that the study's head learns from on stored features: by one process, and by all of the group."""
    torch.manual_seed(0)
    features, targets, nothing = torch.rand(8192, 512), torch.rand(8192), torch.zeros(8192, 0)
    for batch_size in (32, 1024):
        line = {"batch_size": batch_size}
        for name, sharing in (("one process", ALONE), (f"{group.size} processes", group)):
            model = BiomassModel("resnet18")
            call, optimizer = sharing.parallel(model), torch.optim.AdamW(model.head.parameters(), fused=True)
            rows = sharing.deal(np.arange(len(features)), batch_size)
            batches = [(features[part], nothing[part], targets[part]) for part in rows]
            group.wait()
            rates = []
            for _ in range(3 if sharing is group or not group.rank else 0):
                started = time.perf_counter()
                train_one_epoch(model, batches, optimizer, nn.functional.mse_loss, torch.device("cpu"), sharing, call)
                rates.append(len(features) / (time.perf_counter() - started))
            line[name] = float(np.median(rates or [0]))
        if not group.rank:
            print(json.dumps(line), flush=True)
    return 0


def measure_head():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(done.stdout, flush=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("sample_data"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=6, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "processes.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="processes_") as folder:
        result = {
            "machine": {"processor": f"{platform.machine()}, {os.cpu_count()} cores", **report.git_state()},
            "head": measure_head(),
            "compared": compare(args.data_dir, folder, args.repeats),
            "killed": kill(args.data_dir, folder, args.seed, args.kills),
        }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(together(head_speed) if "WORLD_SIZE" in os.environ else main())

"""How fast train_model.py is against the plain loop that the study would write, and whether its answer is the same.

    python tests/benchmark.py runs --data_dir full_sample      # against the plain loop; half an hour on two cores
    python tests/benchmark.py scaling --data_dir sample_data full_sample larger_sample
    python tests/benchmark.py answers --data_dir sample_data   # precision and augmented views over three seeds
    python tests/benchmark.py reading --data_dir sample_data   # a sheet of 200,000 rows and a folder of 50,000 photos
    python tests/benchmark.py rows --data_dir sample_data      # whole runs of up to 300,000 small photos

Each part writes its section of results/benchmark.json and prints its table. A run of train_model.py is a whole process,
from the command to the report. The plain loop is timed on `--plain_batches` batches of training and as many of
validation, beside the run that it is compared with, and scaled up to that run's rows and epochs.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import devices  # noqa: E402
import loaders  # noqa: E402
import report  # noqa: E402
import train_model  # noqa: E402

TARGET = "fresh_weight_total"
RUNS = {  # name: flags, whether it starts with an empty store
    "2 epochs, batch 16, cold": (["--epochs", "2", "--batch_size", "16", "--learning_rate", "5e-4"], True),
    "20 epochs, cold": ([], True),
    "20 epochs again, warm": ([], False),
    "20 epochs, other learning rate": (["--learning_rate", "3e-4"], False),
    "1 epoch, all layers": (["--epochs", "1", "--unfreeze_backbone"], True),
}


class PlainDataset(Dataset):
    def __init__(self, labels, transform):
        self.labels, self.transform = labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        image = train_model.open_photo(self.labels["_path"].iloc[row])
        return self.transform(image), torch.tensor(self.labels[TARGET].iloc[row], dtype=torch.float32)


def plain_loop(labels, batch_size, batches, frozen, device):
    """Seconds a row of the plain loop's training and validation, over so many batches of each."""
    to_tensor = [
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    jitter = [transforms.RandomHorizontalFlip(), transforms.RandomRotation(10), transforms.ColorJitter(0.2, 0.2, 0.1)]
    resize = transforms.Resize((224, 224))
    model = torchvision.models.resnet18(weights=None)
    model.requires_grad_(not frozen)
    model.fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    criterion = nn.MSELoss()
    seconds = {}
    for phase, steps in (("train", [resize, *jitter, *to_tensor]), ("validate", [resize, *to_tensor])):
        dataset = PlainDataset(labels.head((batches + 2) * batch_size), transforms.Compose(steps))
        model.train(phase == "train")
        with torch.set_grad_enabled(phase == "train"):
            for number, (images, weights) in enumerate(DataLoader(dataset, batch_size, shuffle=phase == "train")):
                images, weights = images.to(device), weights.to(device)
                loss = criterion(model(images).squeeze(1), weights)
                if phase == "train":
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                loss.item()
                if number == 1:  # two batches to warm up
                    started, rows = time.perf_counter(), 0
                elif number > 1:
                    rows += len(weights)
        seconds[phase] = (time.perf_counter() - started) / rows
    return seconds


def run_ours(flags, data_dir, folder, device):
    """Seconds, peak memory in MiB and metrics of one whole process of train_model.py."""
    places = ["--results_dir", folder / "results", "--log_path", folder / "training.log"]
    places += ["--model_out", folder / "model.pt", "--cache_dir", folder / "cache", "--device", device]
    command = [sys.executable, ROOT / "train_model.py", "--data_dir", data_dir, "--weights", "none", *places, *flags]
    seconds, peak = run_process(command)
    return seconds, peak, json.loads((folder / "results" / "metrics.txt").read_text())


def run_process(command):
    """Seconds and peak memory in MiB of a whole process."""
    peak, started = 0, time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    watcher = threading.Event()

    def watch():
        nonlocal peak
        status = Path(f"/proc/{process.pid}/status")  # Linux tells the peak itself; elsewhere it stays 0
        while not watcher.wait(0.05):
            try:
                line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                peak = max(peak, int(line.split()[1]) / 1024)
            except (OSError, StopIteration):
                pass

    thread = threading.Thread(target=watch)
    thread.start()
    status = process.wait()
    seconds = time.perf_counter() - started
    watcher.set()
    thread.join()
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {status}")
    return seconds, peak


def where_time_goes(labels, device, precision, photos_measured=128):
    """Milliseconds a photo of each step of the extraction alone, and photos/s of the forward pass and of all steps."""
    labels = labels.head(photos_measured)
    photos = train_model.BiomassDataset(labels, TARGET, 42)
    model = train_model.build_model("resnet18", "none", None, precision, device)
    part = model.split()
    steps = {}

    def clock(name, function):
        started = time.perf_counter()
        result = function()
        steps[name] = (time.perf_counter() - started) / len(labels) * 1e3
        return result

    opened = clock("decode", lambda: [train_model.open_photo(path) for path in labels["_path"]])
    resize = train_model.transforms.resize
    resized = clock("resize", lambda: [resize(photo, [photos.image_size] * 2) for photo in opened])
    clock("augment", lambda: [photos.augment(photo, row, 0) for row, photo in enumerate(resized)])
    pairs = [(row, view) for row in range(len(labels)) for view in range(4)]
    images = loaders.PhotoBatches(photos, pairs, loaders.EXTRACTION_BATCH[device.type])[0][0]
    extractor, count, threads = model.extractor(part), len(pairs) // len(images), torch.get_num_threads()

    @torch.inference_mode()
    def once(_):
        return len(extractor(images.to(device)).cpu())

    def forward(each_core_a_batch):
        torch.set_num_threads(1 if each_core_a_batch else threads)
        done = sum(loaders.in_threads(once, count, threads if each_core_a_batch else 1))
        torch.set_num_threads(threads)
        return done

    ways = {
        "forward, a batch a core": lambda: forward(True),
        "forward, all cores on a batch": lambda: forward(False),
        "extraction": lambda: sum(map(len, loaders.extract_features(model, part, photos, pairs))),
    }
    rates = {name: [] for name in ways}
    for repeat in range(4):
        for name, way in ways.items():
            started = time.perf_counter()
            done = way()
            if repeat:  # the first is to warm up
                rates[name].append(done / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    share = medians["extraction"] / max(medians["forward, a batch a core"], medians["forward, all cores on a batch"])
    return {"ms_per_photo": steps, "photos_per_second": medians, "extraction_over_forward": share}


def compare(labels, args, device):
    """Alternate the plain loop and the runs of train_model.py; medians and ratios of each."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark_"))
    times = {name: [] for name in RUNS}
    plain = {name: [] for name in RUNS}
    peaks = dict.fromkeys(RUNS, 0)
    for repeat in range(args.repeats):
        for name, (flags, cold) in RUNS.items():
            if cold:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            parsed = train_model.build_parser().parse_args(flags)
            row_seconds = plain_loop(labels, parsed.batch_size, args.plain_batches, parsed.freeze_backbone, device)
            seconds, peak, metrics = run_ours(flags, args.data_dir[0], folder, str(device))
            epoch = row_seconds["train"] * metrics["train_rows"] + row_seconds["validate"] * metrics["val_rows"]
            times[name].append(seconds)
            plain[name].append(epoch * parsed.epochs)
            peaks[name] = max(peaks[name], peak)
            print(f"{repeat + 1}/{args.repeats} {name}: {seconds:.1f} s, plain {plain[name][-1]:.1f} s", flush=True)
    shutil.rmtree(folder)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "plain_seconds": statistics.median(plain[name]),
            "ratio": statistics.median(p / t for p, t in zip(plain[name], times[name], strict=True)),
            "peak_mib": round(peaks[name]),
            "all_seconds": times[name],
            "all_plain_seconds": plain[name],
        }
        for name in RUNS
    }


def runs(args, device, precision):
    labels = read_labels(args.data_dir[0])
    section = {
        "rows": len(labels),
        "repeats": args.repeats,
        "plain_batches": args.plain_batches,
        "where_time_goes": where_time_goes(labels, device, precision),
        "runs": compare(labels, args, device),
    }
    print("| run | plain loop (s) | train_model.py (s) | ratio | peak (MiB) |\n| --- | --- | --- | --- | --- |")
    for name, run in section["runs"].items():
        times = f"{run['plain_seconds']:.0f} | {run['seconds']:.1f} | {run['ratio']:.1f}"
        print(f"| {name} | {times} | {run['peak_mib']} |")
    return section


def scaling(args, device, precision):
    """Time and memory of the study's two epochs, cold, by rows."""
    section = []
    for data_dir in args.data_dir:
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            cold = run_ours(RUNS["2 epochs, batch 16, cold"][0], data_dir, Path(folder), str(device))
            warm = run_ours(RUNS["2 epochs, batch 16, cold"][0], data_dir, Path(folder), str(device))
        rows = cold[2]["train_rows"] + cold[2]["val_rows"]
        section.append({"labelled_rows": rows, "cold_seconds": cold[0], "warm_seconds": warm[0], "peak_mib": cold[1]})
        print(section[-1], flush=True)
    return section


def answers(args, device, precision):
    """Validation RMSE (g) after 20 epochs: half against full precision, four views against fresh ones, by seed."""
    ways = {
        "fp32, 4 views": ["--precision", "fp32"],
        "bf16, 4 views": ["--precision", "bf16"],
        "bf16, fresh views": ["--precision", "bf16", "--augment_views", "20"],  # as many views as epochs
    }
    rmse = {way: [] for way in ways}
    rows = 0
    for seed in range(1, 4):
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            for way, flags in ways.items():
                metrics = run_ours([*flags, "--seed", str(seed)], args.data_dir[0], Path(folder), str(device))[2]
                rmse[way].append({"best": metrics["val_rmse"], "last": metrics["last_epoch_val_rmse"]})
                rows = metrics["train_rows"] + metrics["val_rows"]
                print(seed, way, rmse[way][-1], flush=True)
    return {"labelled_rows": rows, "rmse": rmse}


READ_AND_SPLIT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_model
args = train_model.build_parser().parse_args(sys.argv[1:])
labels = train_model.load_labels(args)
labels = train_model.filter_missing_images(labels, args.image_dir, args.target)
train_model.make_splits(labels, args)
"""


def reading(args, device, precision):
    """Time and memory of reading, splitting and auditing a sheet of many rows, a quarter of them with a photo."""
    section = []
    for rows in (50_000, 200_000):
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            folder = Path(folder)
            draw_large(Path(args.data_dir[0]), folder, rows, rows // 4)
            for sheet in ("labels.xlsx", "labels.csv"):
                places = ["--labels_path", folder / sheet, "--image_dir", folder / "photos"]
                read = run_process([sys.executable, "-c", READ_AND_SPLIT, *places])
                results = ["--figures_dir", folder / "figures", "--summary_path", folder / "summary.json"]
                audit = run_process([sys.executable, ROOT / "eda.py", *places, *results])
                line = {"rows": rows, "photos": rows // 4, "sheet": sheet.rpartition(".")[2]}
                line |= {"read_and_split_seconds": read[0], "read_and_split_mib": read[1]}
                section.append(line | {"audit_seconds": audit[0], "audit_mib": audit[1]})
                print(section[-1], flush=True)
    return section


def draw_large(data_dir, folder, rows, photos):
    """A sheet of so many rows with all columns, and hard links to a few photos for the first of them."""
    sheet = pd.read_excel(data_dir / "digital_biomass_labels.xlsx", engine="calamine")
    sheet = pd.concat([sheet] * -(-rows // len(sheet)), ignore_index=True).head(rows)
    files = [data_dir / "images_med_res" / name for name in sheet["filename"].head(50)]
    sheet["filename"] = [f"{row}.png" for row in range(rows)]
    sheet["plant_number"] = sheet.index % len(files)  # so that no photo is on both sides of the split
    sheet.to_csv(folder / "labels.csv", index=False)
    sheet.to_excel(folder / "labels.xlsx", index=False)
    (folder / "photos").mkdir()
    for file in files:
        shutil.copy(file, folder / file.name)
    for row in range(photos):
        os.link(folder / files[row % len(files)].name, folder / "photos" / f"{row}.png")


def rows(args, device, precision):
    """Time and memory of a whole run by rows, with small photos and a small backbone, cold and warm.

    Each photo is a file of its own bytes, so that each has features of its own; Parquet, as Excel has too few rows.
    """
    section = []
    flags = ["--model_name", "shufflenet_v2_x0_5", "--image_size", "64", "--no_augmentation", "--epochs", "2"]
    for count in (75_000, 150_000, 300_000):
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            folder = Path(folder)
            draw_many(Path(args.data_dir[0]), folder, count)
            places = {"labels_path": folder / "labels.parquet", "image_dir": folder / "photos"}
            places |= {"results_dir": folder, "log_path": folder / "training.log", "model_out": folder / "model.pt"}
            places |= {"cache_dir": folder / "cache", "weights": "none", "device": str(device)}
            command = [ROOT / "train_model.py", *flags]
            command += [part for name, value in places.items() for part in (f"--{name}", value)]
            line = {"rows": count}
            for name in ("cold", "warm"):
                line[f"{name}_seconds"], line[f"{name}_mib"] = run_process([sys.executable, *command])
            features = sum(path.stat().st_size for path in (folder / "cache").glob("*/*.npy"))
            line |= {"store_mib": features / 2**20, "bytes_a_photo": features / count}
            section.append(line)
            print(line, flush=True)
    return section


def draw_many(data_dir, folder, count):
    """A Parquet sheet of so many rows, and for each a photo of 96 pixels with bytes of its own."""
    sheet = pd.read_excel(data_dir / "digital_biomass_labels.xlsx", engine="calamine").dropna(subset=TARGET)
    photos = []
    for name in sheet["filename"].head(100):
        content = io.BytesIO()
        report.Image.open(data_dir / "images_med_res" / name).convert("RGB").resize((96, 96)).save(content, "PNG")
        photos.append(content.getvalue())
    sheet = pd.concat([sheet] * -(-count // len(sheet)), ignore_index=True).head(count)
    sheet["filename"], sheet["plant_number"] = [f"{row}.png" for row in range(count)], sheet.index % 5000
    sheet.to_parquet(folder / "labels.parquet")
    (folder / "photos").mkdir()
    for row in range(count):
        (folder / "photos" / f"{row}.png").write_bytes(photos[row % len(photos)] + row.to_bytes(8, "big"))


def read_labels(data_dir):
    sheet = Path(data_dir) / "digital_biomass_labels.xlsx"
    labels = train_model.load_labels(train_model.build_parser().parse_args(["--labels_path", str(sheet)]))
    return train_model.filter_missing_images(labels, Path(data_dir) / "images_med_res", TARGET)


PARTS = {"runs": runs, "scaling": scaling, "answers": answers, "reading": reading, "rows": rows}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--data_dir", nargs="+", default=["sample_data"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain_batches", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmark.json")
    args = parser.parse_args(argv)
    device = devices.pick_device(args.device)
    precision = devices.pick_precision("auto", device)
    result = json.loads(args.out.read_text()) if args.out.is_file() else {}
    machine = {
        "device": str(device),
        "precision": precision,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **report.git_state(),
    }
    result[args.part] = {"machine": machine, "result": PARTS[args.part](args, device, precision)}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

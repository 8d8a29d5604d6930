"""How fast it is against the plain loop that the study would write, all in one run: results/benchmark.json.

    python tests/experiments/benchmark.py --data_dir full_sample --repeats 3          an hour on two cores
    python tests/experiments/benchmark.py --data_dir full_sample --only extraction eda

Runs of train_model.py are whole processes, from the command to the report, and take turns with the plain loop. That is
timed on some batches of training and validation and scaled up to the run's rows and epochs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torchvision
from recipes import RECOMMENDED, ROOT, STUDY, tm
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from biomass import features, reading

RANDOM = ["--weights", "none"]
ALL_LAYERS = ["--epochs", "1", "--unfreeze_backbone"]
RUNS = {  # name: flags, epochs, batch size, whether the backbone is frozen, whether the cache is empty
    "2 epochs, batch 16, cold": (["--epochs", "2", "--batch_size", "16", "--learning_rate", "5e-4"], 2, 16, True, True),
    "20 epochs, cold": ([], 20, 32, True, True),
    "20 epochs, warm": ([], 20, 32, True, False),
    "1 epoch, all layers": (ALL_LAYERS, 1, 32, False, True),
    "1 epoch, all layers of lite0": ([*ALL_LAYERS, *STUDY], 1, 32, False, True),
}


class PlainDataset(Dataset):
    def __init__(self, labels, transform):
        self.paths, self.targets = labels["_path"].tolist(), labels["fresh_weight_total"].tolist()
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return self.transform(reading.open_photo(self.paths[row])), torch.tensor(self.targets[row], dtype=torch.float32)


def plain_network(name):
    """The network, as its library makes it, with the study's head."""
    if name == "resnet18":
        model = torchvision.models.resnet18(weights=None)
        model.fc = nn.Identity()
    else:
        model = timm.create_model(name, num_classes=0)
    width = model(torch.zeros(2, 3, 224, 224)).shape[1]
    return model, nn.Sequential(nn.Dropout(0.3), nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 1))


def plain_loop(labels, name, batch_size, frozen, batches):
    """Seconds a row of the plain loop's training and validation."""
    resize = transforms.Resize((224, 224))
    augment = [transforms.RandomHorizontalFlip(), transforms.RandomRotation(10), transforms.ColorJitter(0.2, 0.2, 0.1)]
    finish = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    backbone, head = plain_network(name)
    model = nn.Sequential(backbone.requires_grad_(not frozen), head)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    seconds = {}
    for phase, steps in (("train", [resize, *augment, *finish]), ("val", [resize, *finish])):
        dataset = PlainDataset(labels.head((batches + 2) * batch_size), transforms.Compose(steps))
        model.train(phase == "train")
        rows = 0
        with torch.set_grad_enabled(phase == "train"):
            for number, (images, weights) in enumerate(DataLoader(dataset, batch_size, shuffle=phase == "train")):
                loss = nn.functional.mse_loss(model(images).squeeze(1), weights)
                if phase == "train":
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                loss.item()
                if number == 1:  # two batches to warm up
                    started = time.perf_counter()
                rows += len(weights) if number > 1 else 0
        seconds[phase] = (time.perf_counter() - started) / rows
    return seconds


def run_script(script, *flags):
    """Seconds and peak memory in MiB of a whole process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, used.ru_maxrss / 1024


def train_flags(data_dir, folder, *flags):
    places = ["--results_dir", folder / "results", "--log_path", folder / "log", "--model_out", folder / "model.pt"]
    return ["--data_dir", data_dir, *places, "--cache_dir", folder / "cache", "--device", "cpu", *flags]


def compare_runs(args, labels, folder):
    """Every run against the plain loop, in turns; medians, and ratios of what was timed one after the other."""
    lines = []
    for repeat in range(args.repeats):
        for name, (flags, epochs, batch_size, frozen, cold) in RUNS.items():
            place = folder / (f"{name} {repeat}" if cold else f"20 epochs, cold {repeat}")
            seconds, peak = run_script("train_model.py", *train_flags(args.data_dir, place, *RANDOM, *flags))
            rows = json.loads((place / "results" / "metrics.txt").read_text())
            network = tm.build_parser().parse_args(flags).model_name
            plain = plain_loop(labels, network, batch_size, frozen, args.plain_batches)
            plain = epochs * (rows["train_rows"] * plain["train"] + rows["val_rows"] * plain["val"])
            line = {"run": name, "seconds": seconds, "plain_seconds": plain, "times": plain / seconds, "peak_mib": peak}
            lines.append(line)
            print(line, flush=True)
    table = pd.DataFrame(lines).groupby("run", sort=False).median().round(2)
    return table.reset_index().to_dict("records")


def compare_extraction(args, labels, folder):
    """Photos a second of the extraction end to end, of its engine alone, and of PyTorch in channels_last."""
    lines = {}
    precision = "bf16" if tm.is_faster_in_bf16(True) and not args.fp32 else "fp32"
    for name, flags in (("resnet18", RANDOM), ("lite0", STUDY)):
        backbone = tm.Backbone(tm.build_parser().parse_args(flags).model_name).eval()
        backbone = backbone.to(memory_format=torch.channels_last)
        features.load_weights(backbone, "imagenet" if name == "lite0" else "none")
        engine = features.Engine(backbone, torch.device("cpu"), precision)
        pytorch = features.Engine(backbone, torch.device("cpu"), precision)
        pytorch.by_openvino = False
        speeds = {"end to end": [], "engine": [], "pytorch": []}
        for repeat in range(args.repeats):
            place = folder / f"{name} {repeat}"
            more = ["--epochs", "1", "--augmentation", "none", "--precision", precision]
            run_script("train_model.py", *train_flags(args.data_dir, place, *flags, *more))
            line = next(line for line in (place / "log").read_text().splitlines() if "a second" in line)
            speeds["end to end"].append(float(line.split(", ")[-1].split()[0]))
            speeds["engine"].append(speed(engine))
            speeds["pytorch"].append(speed(pytorch))
        line = {kind: round(statistics.median(speed), 1) for kind, speed in speeds.items()}
        line["of_the_engine"] = round(line["end to end"] / line["engine"], 3)
        line["times_pytorch"] = round(line["end to end"] / line["pytorch"], 2)
        lines[name] = line | {"engine_name": engine.name}
        print(name, lines[name], flush=True)
    return lines


def speed(pass_through, batches=40):
    """Photos a second of a forward pass, after four batches to warm up."""
    photos = [torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8) for _ in range(batches)]
    pass_through(photos[:4])
    started = time.perf_counter()
    pass_through(photos)
    return 16 * batches / (time.perf_counter() - started)


def time_eda(args, labels, folder):
    places = ["--figures_dir", folder / "figures", "--summary_path", folder / "summary.json"]
    runs = [run_script("eda.py", "--data_dir", args.data_dir, *places) for _ in range(args.repeats)]
    return {"seconds": round(statistics.median(seconds for seconds, _ in runs), 1)}


def time_predict(args, labels, folder):
    flags = train_flags(args.data_dir, folder, *RECOMMENDED, "--epochs", "2", "--augmentation", "none")
    run_script("train_model.py", *flags)
    photos, out = args.data_dir / "images_med_res", folder / "predictions.csv"
    flags = [photos, "--model", folder / "model.pt", "--out", out, "--device", "cpu", "--cache_dir"]
    new, held = [], []
    run_script("predict.py", *flags, folder / "cache")  # so that it holds all photos
    for _ in range(args.repeats):
        new.append(run_script("predict.py", *flags, "none")[0])
        held.append(run_script("predict.py", *flags, folder / "cache")[0])
    seconds, rows = statistics.median(new), len(pd.read_csv(out))
    line = {"photos": rows, "seconds": round(seconds, 1), "photos_per_second": round(rows / seconds, 1)}
    times = statistics.median(one / other for one, other in zip(new, held, strict=True))
    return line | {"seconds_held": round(statistics.median(held), 1), "times_held": round(times, 2)}


def time_rows(args, labels, folder):
    """Whole runs of train_model.py on sheets of up to 300,000 rows in Parquet, each row with bytes of its own."""
    source = [path.read_bytes() for path in sorted((args.data_dir / "images_med_res").iterdir())[:50]]
    small = []
    for content in source:
        path = folder / "small.png"
        reading.open_photo(content).resize((96, 96)).save(path)
        small.append(path.read_bytes())
    lines = []
    for rows in args.rows:
        data = folder / f"rows_{rows}"
        (data / "photos").mkdir(parents=True)
        for row in range(rows):  # PNG readers stop at the end of the picture: what follows makes another content
            (data / "photos" / f"{row}.png").write_bytes(small[row % 50] + str(row).encode())
        weights = np.random.default_rng(0).gamma(1, 0.26, rows) + 0.002
        sheet = {"filename": [f"{row}.png" for row in range(rows)], "plant_number": np.arange(rows) // 20}
        pd.DataFrame(sheet | {"fresh_weight_total": weights}).to_parquet(data / "labels.parquet")
        flags = [
            "--labels_path",
            data / "labels.parquet",
            "--image_dir",
            data / "photos",
            *RANDOM,
            "--image_size",
            "64",
        ]
        flags += [
            "--model_name",
            "shufflenet_v2_x0_5",
            "--epochs",
            "2",
            "--augmentation",
            "none",
            "--batch_size",
            "1024",
        ]
        for state in ("cold", "warm"):
            seconds, peak = run_script("train_model.py", *train_flags(data, data / "out", *flags))
            lines.append({"rows": rows, "cache": state, "seconds": round(seconds, 1), "peak_mib": round(peak)})
            print(lines[-1], flush=True)
    return lines


def processor_name():
    try:  # Linux knows it best
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


PARTS = {
    "runs": compare_runs,
    "extraction": compare_extraction,
    "eda": time_eda,
    "predict": time_predict,
    "rows": time_rows,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain_batches", type=int, default=12, help="of the plain loop that are timed")
    parser.add_argument("--rows", type=int, nargs="+", default=[75_000, 150_000, 300_000])
    parser.add_argument("--fp32", action="store_true", help="time the extraction in fp32 even where bf16 is faster")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=["runs", "extraction", "eda", "predict"])
    args = parser.parse_args()
    labels = reading.read_sheet(args.data_dir / "digital_biomass_labels.xlsx").dropna(subset="fresh_weight_total")
    labels = labels.assign(_path=reading.find_photos(labels["filename"], args.data_dir / "images_med_res")["_path"])
    path = ROOT / "results" / "benchmark.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    if result.get("machine", {}).get("commit") != tm.git("rev-parse", "HEAD"):
        result = {}  # all parts are of one commit
    result["machine"] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "bf16": tm.is_faster_in_bf16(True),
    }
    result["machine"] |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": tm.git("rev-parse", "HEAD"),
    }
    for part in args.only:
        with tempfile.TemporaryDirectory() as folder:
            result[part] = PARTS[part](args, labels, Path(folder))
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Does it stay within a computer? Many photos of different content through symmetries, training and folds.

    python tests/experiments/scale.py                      10,000, then 100,000 photos; 25 minutes on one core
    python tests/experiments/scale.py --rows 2000 20000

Runs cross_validate.py on them as a process of its own, with a small network of random weights at 96 pixels, and writes
results/scale.json: of each number of rows the seconds, the milliseconds a row, and the most memory that it took.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from recipes import ROOT, tm

from biomass import reading

SIDE = 96
FLAGS = "--model_name mobilenet_v3_small --weights none --image_size 96 --features last stages traits --folds 2".split()
FLAGS += "--standardize_features --target_transform sqrt --augmentation symmetries --epochs 4 --no_erasing".split()


def draw_photos(count, folder):
    """A green disc on noise of its own in each photo, ten photos a plant."""
    random, names = (
        np.random.default_rng(0),
        [f"{number // 1000:03d}_{number % 1000:03d}.png" for number in range(count)],
    )
    radii = random.uniform(8, 40, count)
    (folder / "photos").mkdir()
    for name, radius in zip(names, radii, strict=True):
        photo = Image.fromarray(random.integers(60, 120, (SIDE // 4, SIDE // 4, 3), np.uint8)).resize((SIDE, SIDE))
        middle = random.uniform(radius, SIDE - radius, 2)
        ImageDraw.Draw(photo).ellipse([*(middle - radius), *(middle + radius)], fill=(60, 160, 50))
        photo.save(folder / "photos" / name, compress_level=1)
    sheet = {"filename": names, "plant_number": np.arange(count) // 10, "fresh_weight_total": (radii / 40) ** 2.4}
    pd.DataFrame(sheet).to_parquet(folder / "labels.parquet", index=False)


def measure(count, folder):
    """Seconds and memory of a whole run; the peak is that of the largest process so far, so small sets come first."""
    draw_photos(count, folder)
    places = {"labels_path": "labels.parquet", "image_dir": "photos", "results_dir": "out", "log_path": "log"}
    places |= {"model_out": "model.pt", "cache_dir": "cache"}
    flags = [part for name, path in places.items() for part in (f"--{name}", str(folder / path))]
    begun = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "cross_validate.py", *flags, *FLAGS], check=True)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    store = (folder / "cache" / "features.sqlite").stat().st_size
    metrics = json.loads((folder / "out" / "metrics.txt").read_text())
    return {
        "rows": count,
        "seconds": round(seconds, 1),
        "ms_a_row": round(1000 * seconds / count, 3),
        "peak_gb": round(peak / 1e9, 2),
        "store_gb": round(store / 1e9, 2),
        "val_r2": metrics["val_r2"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    result = {"commit": tm.git("rev-parse", "HEAD"), "cores": reading.cores(), "runs": []}
    for count in sorted(parser.parse_args().rows):
        with tempfile.TemporaryDirectory() as folder:
            result["runs"].append(measure(count, Path(folder)))
        print(result["runs"][-1], flush=True)
    result["time_a_row_ratio"] = round(result["runs"][-1]["ms_a_row"] / result["runs"][0]["ms_a_row"], 3)
    (ROOT / "results" / "scale.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

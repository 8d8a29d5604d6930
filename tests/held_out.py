"""Do the promises of a trained model hold on plants that it never saw? Trains on four fifths of the plants by folds.

    python tests/held_out.py --data_dir full_sample     # with the recommended flags; other flags go to train_model.py

Keeps a fifth of the plants away from training and folds, weighs their photos by predict.py, and writes
results/held_out.json: the error that the folds promised and the one that came, how many weights lie in the 90 %
interval, over all and in four classes of weight, how wide it is against an interval of constant width, and which odd
photos are told from plants.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from sklearn.metrics import root_mean_squared_error

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation import HEAD, LARGE  # noqa: E402

import calibration  # noqa: E402
import predict  # noqa: E402
import train_model  # noqa: E402

TARGET, COVERAGE = "fresh_weight_total", 0.9


def draw_odd_photos(photo, folder):
    """Photos that are no plants from above, and one plant of another colour upside down."""
    folder.mkdir()
    random = np.random.default_rng(0)
    Image.new("RGB", (256, 256), "white").save(folder / "blank page.png")
    Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / "noise.png")
    red, green, blue = train_model.open_photo(photo).rotate(180).split()
    Image.merge("RGB", (red, blue, green)).save(folder / "blue and upside down.png")
    portrait = Image.new("RGB", (256, 256), (120, 150, 190))
    draw = ImageDraw.Draw(portrait)
    draw.ellipse((70, 40, 186, 200), fill=(224, 178, 150))
    draw.pieslice((64, 24, 192, 150), 180, 360, fill=(70, 45, 30))
    for x in (102, 142):
        draw.ellipse((x, 100, x + 14, 110), fill=(40, 40, 60))
    draw.arc((100, 130, 156, 175), 20, 160, fill=(150, 60, 60), width=5)
    draw.rectangle((40, 205, 216, 256), fill=(60, 70, 90))
    portrait.save(folder / "portrait.png")


def judge(table, odd):
    """What the predictions of held-out plants show; `table` has measured_g beside the columns of predict.py."""
    measured, predicted = table["measured_g"], table["predicted_g"]
    inside = measured.between(table["low_g"], table["high_g"])
    classes = pd.qcut(measured, 4)
    return {
        "photos": len(table),
        "rmse": root_mean_squared_error(measured, predicted),
        "coverage": inside.mean(),
        "coverage_by_weight": {
            f"{group.left:.3f} to {group.right:.3f} g": share
            for group, share in inside.groupby(classes, observed=True).mean().items()
        },
        "mean_width": (table["high_g"] - table["low_g"]).mean(),
        "flagged_of_good_photos": (table["note"] == predict.UNLIKE).mean(),
        "flagged_odd_photos": dict(zip(odd["filename"], (odd["note"] == predict.UNLIKE).tolist(), strict=True)),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("full_sample"))
    parser.add_argument("--cache_dir", default=".feature_cache")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "held_out.json")
    args, flags = parser.parse_known_args(argv)
    flags = flags or [*LARGE.split(), *HEAD.split()]
    sheet = train_model.read_sheet(args.data_dir / "digital_biomass_labels.xlsx", [TARGET]).dropna(subset=TARGET)
    labels = sheet.assign(_plant=sheet["plant_number"]).reset_index(drop=True)
    kept, away = train_model.split_by_plant(labels, 0.2, seed=1)
    images = args.data_dir / "images_med_res"
    with tempfile.TemporaryDirectory(prefix="held_out_") as folder:
        folder = Path(folder)
        for name, rows in (("kept.csv", kept), ("away.csv", away)):
            labels.iloc[rows].to_csv(folder / name, index=False)
        command = ["--labels_path", folder / "kept.csv", "--image_dir", images, "--weights", "none", "--folds", 5]
        command += ["--results_dir", folder, "--log_path", folder / "log", "--model_out", folder / "model.pt"]
        command = [str(part) for part in (*command, "--cache_dir", args.cache_dir, *flags)]
        weigh = ["--model", str(folder / "model.pt"), "--coverage", str(COVERAGE)]
        with contextlib.redirect_stdout(sys.stderr):
            train_model.main(command)
            metrics = json.loads((folder / "metrics.txt").read_text(encoding="utf-8"))
            started = time.perf_counter()
            places = ["--labels_path", folder / "away.csv", "--image_dir", images, "--out", folder / "away_out.csv"]
            predict.main([*weigh, *map(str, places)])
            seconds = time.perf_counter() - started
            draw_odd_photos(images / labels["filename"].iloc[away[0]], folder / "odd")
            predict.main([*weigh, str(folder / "odd"), "--out", str(folder / "odd.csv")])
        table = pd.read_csv(folder / "away_out.csv").assign(measured_g=labels[TARGET].iloc[away].to_numpy())
        result = judge(table, pd.read_csv(folder / "odd.csv"))
        oof = pd.read_csv(folder / "predictions.csv")
        even = calibration.calibrate(oof["predicted_g"], oof["error_g"], oof["plant_number"], growing=False)
        low, high = calibration.interval(even, table["predicted_g"], COVERAGE)
    result |= {
        "flags": " ".join(flags),
        "plants": len(set(labels["_plant"].iloc[away])),
        "promised_rmse": metrics["val_rmse"],
        "promised_rmse_ci95": metrics["val_rmse_ci95"],
        "mean_width_constant": float(np.mean(high - low)),
        "coverage_constant": float(np.mean((low <= table["measured_g"]) & (table["measured_g"] <= high))),
        "photos_per_second": result["photos"] / seconds,
        "commit": metrics["run"]["commit"],
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Do the promises hold? A fifth of the plants is kept away from everything, then weighed: results/held_out.json.

    python tests/experiments/held_out.py --data_dir full_sample

Measured are the promised and the seen RMSE, the share and width of the 90 % interval, by class of weight, the note
`unlike training photos` on held-out plants and on photos of other subjects, and for each experiment kept away in turn
how often the interval holds that was calibrated on plants, and the one that was calibrated on experiments.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from recipes import RECOMMENDED, ROOT, cross_validate, load, predict, tm, train, writing

from biomass import reading


def run(script, *flags):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)


def split_sheet(data_dir, folder):
    """Two sheets: four fifths of the plant numbers to learn from, and the labelled rows of the others."""
    sheet = reading.read_sheet(data_dir / "digital_biomass_labels.xlsx").dropna(subset="fresh_weight_total")
    plants = np.random.default_rng(7).permutation(sheet["plant_number"].unique())
    away = sheet["plant_number"].isin(plants[: len(plants) // 5])
    sheet[~away].to_csv(folder / "known.csv", index=False)
    sheet[away].to_csv(folder / "away.csv", index=False)
    return sheet[away]


def other_photos(folder):
    """Photos of other subjects, from the sample data of four libraries, and some that a camera makes by mistake."""
    import matplotlib.cbook
    import scipy.datasets
    import skimage.data
    import sklearn.datasets

    folder.mkdir()
    random, photos = np.random.default_rng(0), {}
    names = (
        "astronaut camera cat checkerboard clock coffee coins horse hubble_deep_field immunohistochemistry moon page "
    )
    names += "rocket text colorwheel grass gravel brick logo microaneurysms retina"
    for name in names.split():
        try:
            photos[f"skimage_{name}"] = np.asarray(getattr(skimage.data, name)())
        except Exception:  # those that would be downloaded
            continue
    for name, photo in zip(("china", "flower"), sklearn.datasets.load_sample_images().images, strict=True):
        photos[f"sklearn_{name}"] = photo
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photos["matplotlib_grace_hopper"] = np.asarray(Image.open(file))
    try:
        photos["scipy_face"] = scipy.datasets.face()
    except Exception:  # it would be downloaded
        pass
    photos |= {"black": np.zeros((256, 256), np.uint8), "white": np.full((256, 256), 255, np.uint8)}
    photos |= {f"noise_{n}": random.integers(0, 256, (256, 256, 3), np.uint8) for n in range(3)}
    for name, photo in photos.items():
        photo = 255 * photo if photo.dtype == bool else photo
        Image.fromarray(photo.astype(np.uint8)).convert("RGB").save(folder / f"{name}.png")
    return sorted(photos)


def coverage(table):
    within = table["measured"].between(table["low_g"], table["high_g"])
    return {
        "rows": len(table),
        "share": float(within.mean()),
        "width_g": float((table["high_g"] - table["low_g"]).mean()),
    }


def by_experiment(data_dir, folder):
    """Share of an experiment's rows in the interval that the eight others promise, in two ways of calibrating."""
    run, args = load([*RECOMMENDED, "--no_erasing", "--data_dir", data_dir], folder)
    sheet = reading.read_sheet(args.labels_path).drop_duplicates("filename").set_index("filename")
    experiment = run.labels["filename"].map(sheet["experiment_id"]).to_numpy(int)
    plants, rows = run.labels["_plant"].to_numpy(), np.arange(len(run.labels))

    @functools.cache
    def model_without(*left_out):
        return train(run, args, rows[~np.isin(experiment, left_out)])

    def weighed(model, learn, rest):
        return predict(run, args, model, (learn, rest))

    lines = []
    for away in np.unique(experiment):
        known, held_out = rows[experiment != away], rows[experiment == away]
        seen, line = weighed(model_without(away), known, held_out), {"experiment": int(away), "rows": len(held_out)}
        by_plants = cross_validate.folds_by_plant(run.labels.iloc[known], args).values()
        by_plants = [weighed(train(run, args, known[learn]), known[learn], known[rest]) for learn, rest in by_plants]
        by_experiments = [  # the model without two experiments serves both, whichever of them is away
            weighed(model_without(*sorted((away, other))), known[experiment[known] != other], rows[experiment == other])
            for other in np.unique(experiment[known])
        ]
        for how, tables, groups, wanted in (
            ("plants", by_plants, plants, 0.9),
            ("experiments", by_experiments, experiment, 7 / 9),
        ):
            table = pd.concat(tables)
            table["_plant"] = groups[table.index]
            calibration = cross_validate.calibrate(table, run.labels, args)
            low, high = writing.interval(calibration, seen["predicted"], wanted)
            line[f"by_{how}"] = float(seen["measured"].between(low, high).mean())
            line[f"width_by_{how}"] = float(np.mean(high - low))
        lines.append(line)
        print(line, flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--no_experiments", action="store_true", help="leave the slow part out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        away, photos = split_sheet(args.data_dir, folder), args.data_dir / "images_med_res"
        places = ["--results_dir", folder / "cv", "--model_out", folder / "model.pt", "--log_path", folder / "log"]
        run(
            "cross_validate.py",
            "--labels_path",
            folder / "known.csv",
            "--image_dir",
            photos,
            "--no_erasing",
            *places,
            *RECOMMENDED,
        )
        promised = json.loads((folder / "cv" / "metrics.txt").read_text())
        run("predict.py", "--model", folder / "model.pt", "--labels_path", folder / "away.csv", "--image_dir", photos,
            "--out", folder / "away_out.csv")  # fmt: skip
        table = pd.read_csv(folder / "away_out.csv").merge(away[["filename", "fresh_weight_total"]], on="filename")
        table = table.rename(columns={"fresh_weight_total": "measured"})
        rmse = float((table["predicted_g"] - table["measured"]).pow(2).mean() ** 0.5)
        result = {"commit": tm.git("rev-parse", "HEAD"), "plants_away": int(away["plant_number"].nunique())}
        result |= {"promised_rmse": promised["val_rmse"], "promised_ci95": promised["val_rmse_ci95"], "seen_rmse": rmse}
        result |= {"interval_90": coverage(table)}
        classes = pd.cut(table["measured"], [0, 0.05, 0.15, 0.4, 3])
        result["by_weight_g"] = {str(name): coverage(rows) for name, rows in table.groupby(classes, observed=True)}
        result["unlike_held_out"] = float(table["note"].fillna("").str.contains("unlike").mean())
        names = other_photos(folder / "others")
        run("predict.py", folder / "others", "--model", folder / "model.pt", "--out", folder / "others.csv")
        notes = pd.read_csv(folder / "others.csv").set_index("filename")["note"].fillna("")
        result["unlike_others"] = float(notes.str.contains("unlike").mean())
        result["others"] = names
        result["others_passed"] = notes.index[~notes.str.contains("unlike")].tolist()
        if not args.no_experiments:
            result["experiments_away"] = by_experiment(args.data_dir, folder / "experiments")
    (ROOT / "results" / "held_out.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

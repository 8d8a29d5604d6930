"""Do the promises hold? Plants are kept away from everything, then weighed: results/held_out.json.

    python tests/experiments/held_out.py --real FOLDER                    two hours on two cores; sets as in recipes.py
    python tests/experiments/held_out.py --sets "drawn 4294" --no_experiments

Of the full drawn set and the food a fifth of the plants is kept away, by the scripts themselves: the promised and the
seen RMSE, the share and width of the 90 % interval, by class of weight, the note `unlike training photos` on held-out
plants and on photos of other subjects. Of the small sets twenty random fifths, by the functions of the scripts. Of the
drawn set each experiment in turn: how often the interval holds that was calibrated on plants, and on experiments.
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
from recipes import RECOMMENDED, ROOT, add_set_flags, cross_validate, find_sets, load, predict, tm, train, writing

from biomass import reading

BY_SCRIPTS, FIFTHS, COVERAGE = ("drawn 4294", "food"), 20, 0.9


def run(script, *flags):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)


def fifth_away(groups, seed):
    """Which rows are of a random fifth of the groups."""
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    return np.isin(groups, names[: len(names) // 5])


def coverage(measured, low, high):
    within = (measured >= low) & (measured <= high)
    return {"rows": len(measured), "share": float(np.mean(within)), "width": float(np.mean(high - low))}


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


def away_by_scripts(name, data, folder):
    """What cross_validate.py promises of the plants that it knows, and predict.py keeps of the others."""
    args = tm.build_parser().parse_args([*map(str, data)])
    reading.complete_data_flags(args)
    labels = reading.load_labels(args)
    away = fifth_away(labels["_plant"], 7)
    columns = [column for column in labels if column[0] != "_"]
    labels.loc[~away, columns].to_csv(folder / "known.csv", index=False)
    labels.loc[away, columns].to_csv(folder / "away.csv", index=False)
    places = ["--image_dir", args.image_dir, "--cache_dir", args.cache_dir]
    outputs = ["--results_dir", folder / "cv", "--model_out", folder / "model.pt", "--log_path", folder / "log"]
    chosen = ["--target", args.target, "--group_by", *args.group_by, "--no_erasing"]
    run("cross_validate.py", "--labels_path", folder / "known.csv", *places, *outputs, *chosen, *RECOMMENDED)
    weigh = ["predict.py", "--model", folder / "model.pt"]
    run(*weigh, "--labels_path", folder / "away.csv", *places, "--out", folder / "away_out.csv")
    table = pd.read_csv(folder / "away_out.csv").set_index("filename").join(labels.set_index("filename")[args.target])
    unit = reading.unit_of(args.target)
    predicted, low, high = (table[f"{what}_{unit}"] for what in ("predicted", "low", "high"))
    measured, promised = table[args.target], json.loads((folder / "cv" / "metrics.txt").read_text())
    result = {"plants_away": int(labels.loc[away, "_plant"].nunique()), "promised_rmse": promised["val_rmse"]}
    result |= {"promised_ci95": promised["val_rmse_ci95"]}
    result |= {"seen_rmse": float((predicted - measured).pow(2).mean() ** 0.5)}
    result |= {"interval_90": coverage(measured, low, high)}
    classes = pd.qcut(measured, 4).groupby(pd.qcut(measured, 4), observed=True).groups
    result["by_weight"] = {
        str(weight): coverage(measured[rows], low[rows], high[rows]) for weight, rows in classes.items()
    }
    result["unlike_held_out"] = float(table["note"].fillna("").str.contains("unlike").mean())
    names = other_photos(folder / "others")
    run(*weigh, folder / "others", "--cache_dir", args.cache_dir, "--out", folder / "others.csv")
    notes = pd.read_csv(folder / "others.csv").set_index("filename")["note"].fillna("")
    result["unlike_others"] = float(notes.str.contains("unlike").mean())
    return result | {"others": names, "others_passed": notes.index[~notes.str.contains("unlike")].tolist()}


def errors_by_folds(this, args, known):
    """The table of the known rows, each predicted by a model that never saw its plant."""
    splits = cross_validate.folds_by_plant(this.labels.iloc[known], args).values()
    splits = [(known[learn], known[rest]) for learn, rest in splits]
    return pd.concat([predict(this, args, train(this, args, split[0]), split) for split in splits])


def random_fifths(name, data, folder):
    """How often the interval holds over FIFTHS random fifths of the plants, and what is promised there."""
    this, args = load([*RECOMMENDED, "--no_erasing", *data], folder)
    plants, rows, tables = this.labels["_plant"].to_numpy(), np.arange(len(this.labels)), []
    for seed in range(FIFTHS):
        away = fifth_away(plants, seed)
        calibration = cross_validate.calibrate(errors_by_folds(this, args, rows[~away]), this.labels, args)
        promised = min(COVERAGE, writing.most_coverage(calibration))
        seen = predict(this, args, train(this, args, rows[~away]), (rows[~away], rows[away]))
        low, high = writing.interval(calibration, seen["predicted"], promised)
        tables.append({"promised": promised} | coverage(seen["measured"], low, high))
        print(name, seed, tables[-1], flush=True)
    table = pd.DataFrame(tables)
    held = float((table["share"] * table["rows"]).sum() / table["rows"].sum())
    return {"fifths": FIFTHS, "promised": float(table["promised"].mean()), "share": held, "each": tables}


def by_experiment(data, folder):
    """Share of an experiment's rows in the interval that the eight others promise, in two ways of calibrating."""
    this, args = load([*RECOMMENDED, "--no_erasing", *data], folder)
    sheet = reading.read_sheet(args.labels_path).drop_duplicates("filename").set_index("filename")
    experiment = this.labels["filename"].map(sheet["experiment_id"]).to_numpy(int)
    plants, rows, lines = this.labels["_plant"].to_numpy(), np.arange(len(this.labels)), []

    @functools.cache
    def model_without(*left_out):
        return train(this, args, rows[~np.isin(experiment, left_out)])

    for away in np.unique(experiment):
        known, held_out = rows[experiment != away], rows[experiment == away]
        seen = predict(this, args, model_without(away), (known, held_out))
        line = {"experiment": int(away), "rows": len(held_out)}
        by_experiments = [  # the model without two experiments serves both, whichever of them is away
            predict(this, args, model_without(*sorted((away, other))), (known, rows[experiment == other]))
            for other in np.unique(experiment[known])
        ]
        for how, table, groups, wanted in (
            ("plants", errors_by_folds(this, args, known), plants, COVERAGE),
            ("experiments", pd.concat(by_experiments), experiment, 7 / 9),
        ):
            table["_plant"] = groups[table.index]
            calibration = cross_validate.calibrate(table, this.labels, args)
            held = coverage(seen["measured"], *writing.interval(calibration, seen["predicted"], wanted))
            line |= {f"by_{how}": held["share"], f"width_by_{how}": held["width"]}
        lines.append(line)
        print(line, flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_set_flags(parser)
    parser.add_argument("--no_experiments", action="store_true", help="leave the slowest part out")
    args = parser.parse_args()
    path = ROOT / "results" / "held_out.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    for name, data in find_sets(args).items():
        with tempfile.TemporaryDirectory() as folder:
            judge = away_by_scripts if name in BY_SCRIPTS else random_fifths
            result[name] = {"commit": tm.git("rev-parse", "HEAD")} | judge(name, data, Path(folder))
            if name == "drawn 4294" and not args.no_experiments:
                result[name]["experiments_away"] = by_experiment(data, Path(folder) / "experiments")
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result[name], indent=2), flush=True)


if __name__ == "__main__":
    main()

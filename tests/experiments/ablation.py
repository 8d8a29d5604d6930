"""What each part of the recommended recipe is worth, by folds: results/ablation.csv and ablation.png.

    python tests/experiments/ablation.py --data_dir full_sample --seeds 42 43 44      half an hour on two cores

Every row changes one thing of the recommended recipe, but for the study's and those of larger photos.
`by` is what the folds keep together.
"""

import argparse
import contextlib
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pandas as pd
from matplotlib.figure import Figure
from recipes import RECOMMENDED, ROOT, STUDY, by_folds, load, tm, writing

from biomass import reading

PLAIN = [*RECOMMENDED, "--augmentation", "none"]
UNSCALED = [flag for flag in RECOMMENDED if flag != "--standardize_features"]
RANDOM = ["--model_name", "resnet18", "--weights", "none"]
EXPERIMENT, SMALL = ["--group_by", "experiment_id", "--folds", "9"], 400
METADATA = ["--metadata_columns", "age_days", "temperature", "illuminancevisible"]


def by_own_deviation(model, features):
    """Every feature by its own deviation, which is next to nothing for sparse ones."""
    model.feature_mean.copy_(features.mean(0))
    model.feature_scale.copy_(features.std(0).clamp(min=1e-6))


def by_shrunk_deviation(model, features):
    """Every feature by its own deviation and the common one together, so that none is next to nothing."""
    own = features.var(0)
    model.feature_mean.copy_(features.mean(0))
    model.feature_scale.copy_((own / 2 + own.mean() / 2).sqrt())


SETTINGS = {  # name: flags, photos at the most, changes of train_model.py
    "recommended": (RECOMMENDED, None, {}),
    "study's head, lite0": (STUDY, None, {}),
    "study's head, random ResNet18": (RANDOM, None, {}),
    "recommended, random ResNet18": ([*RECOMMENDED, *RANDOM], None, {}),
    "no augmentation": (PLAIN, None, {}),
    "with age, temperature, light": ([*RECOMMENDED, *METADATA], None, {}),
    "recommended, by experiment": ([*RECOMMENDED, *EXPERIMENT], None, {}),
    "recommended, 400 photos": (RECOMMENDED, SMALL, {}),
    "study's head, 400 photos": (STUDY, SMALL, {}),
    "no augmentation, 320 pixels": ([*PLAIN, "--image_size", "320"], None, {}),
    "no augmentation, 448 pixels": ([*PLAIN, "--image_size", "448"], None, {}),
    "one augmented version": ([*RECOMMENDED, "--augment_views", "1"], None, {}),
    "last features alone": ([*RECOMMENDED, "--features", "last"], None, {}),
    "features as they are": (UNSCALED, None, {}),
    "each by its own deviation": (RECOMMENDED, None, {"fit_features": by_own_deviation}),
    "by own and common deviation": (RECOMMENDED, None, {"fit_features": by_shrunk_deviation}),
    "target as it is": ([*RECOMMENDED, "--target_transform", "none"], None, {}),
    "target standardized": ([*RECOMMENDED, "--target_transform", "standardize"], None, {}),
    "target's log": ([*RECOMMENDED, "--target_transform", "log"], None, {}),
    "constant learning rate": ([*RECOMMENDED, "--lr_schedule", "constant"], None, {}),
    "weight decay 0.01": ([*RECOMMENDED, "--weight_decay", "0.01"], None, {}),
    "20 epochs": ([*RECOMMENDED, "--epochs", "20"], None, {}),
    "head of 64": (RECOMMENDED, None, {"HEAD_WIDTH": 64}),
    "no dropout": (RECOMMENDED, None, {"DROPOUT": 0.0}),
}


def measure(name, args):
    """One line of the table: errors over all held-out rows for each seed, and the worst R2 of any fold."""
    started, (flags, rows, changes) = time.perf_counter(), SETTINGS[name]
    with contextlib.ExitStack() as changed:
        for what, value in changes.items():
            owner = tm.BiomassModel if hasattr(tm.BiomassModel, what) else tm
            changed.enter_context(mock.patch.object(owner, what, value))
        run, recipe = load([*flags, "--no_erasing"], args.data_dir, ROOT / "models" / "ablation", rows)
        tables = [by_folds(run, recipe, seed) for seed in args.seeds]
    rmse = pd.Series([writing.scores(table)["val_rmse"] for table in tables])
    r2 = pd.Series([writing.scores(table)["val_r2"] for table in tables])
    worst = min(writing.scores(fold)["val_r2"] for table in tables for _, fold in table.groupby("fold"))
    floor = (tables[0]["measured"] - tables[0]["expected"]).pow(2).mean() ** 0.5
    mean = (tables[0]["measured"] - tables[0]["training_mean"]).pow(2).mean() ** 0.5
    line = {"setting": name, "by": reading.group_name(recipe.group_by), "rows": len(tables[0]), "seeds": len(rmse)}
    line |= {"rmse": rmse.mean(), "rmse_sd": rmse.std(), "r2": r2.mean(), "worst_fold_r2": worst}
    line |= {"noise_floor": floor, "training_mean": mean, "seconds": round(time.perf_counter() - started)}
    return line | {"commit": tm.git("rev-parse", "HEAD")}


def draw(table, path):
    figure = Figure(figsize=(9, 0.35 * len(table) + 1.2), layout="constrained")
    axis = figure.subplots()
    colors = table["by"].map(lambda by: "tab:green" if by == "plant" else "tab:orange")
    axis.barh(table["setting"], table["rmse"], xerr=table["rmse_sd"], color=colors, alpha=0.6)
    axis.axvline(table["noise_floor"].iloc[0], color="black", linestyle="--", label="noise floor of all rows")
    axis.invert_yaxis()
    axis.set(xlabel="RMSE (g), mean and sd of the seeds; green: folds by plant, orange: by experiment")
    axis.legend()
    figure.supxlabel("drawn data, not measured", x=0.99, ha="right", fontsize=7, color="dimgrey")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--only", nargs="+", help="parts of the names of the settings")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    names = [name for name in SETTINGS if not args.only or any(part in name for part in args.only)]
    lines, text = (
        [],
        "{setting:30s} {by:14s} RMSE {rmse:.4f} +- {rmse_sd:.4f}  R2 {r2:.3f}, worst fold {worst_fold_r2:.3f}",
    )
    with ProcessPoolExecutor(reading.cores()) as pool:  # heads train on one thread each
        for line in pool.map(measure, names, [args] * len(names)):
            lines.append(line)
            print(text.format(**line), f" {line['seconds']} s", flush=True)
    if not args.only:  # what is written is always whole
        pd.DataFrame(lines).to_csv(ROOT / "results" / "ablation.csv", index=False, float_format="%.5g")
        draw(pd.DataFrame(lines), ROOT / "results" / "ablation.png")


if __name__ == "__main__":
    main()

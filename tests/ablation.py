"""What each improvement gains: the study's setting, each flag alone and the recommended set, by folds and seeds.

    python tests/ablation.py --data_dir full_sample          # all settings; an hour or two on two cores
    python tests/ablation.py --data_dir full_sample --only "log target" "sqrt target"
    python tests/ablation.py --data_dir full_sample --only        # draw and print what there is

Each line of results/ablation.csv is one run of train_model.py with random weights (`--weights imagenet` for others). It
is written as the run ends, and a run whose line is there with the same flags, seed, data and weights is not repeated.
So it can be stopped and started again. Where training is long, a setting is judged on one split instead of folds: its
line says so, and its epoch was chosen on the plants that judge it.
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_model  # noqa: E402
from report import new_figure  # noqa: E402

FOLDS, SPLIT = "5 folds", "one split"
METADATA = "--metadata_columns age_days total_leaves big_leaves small_leaves experiment_id temperature humidity"
LARGE = "--model_name regnet_y_400mf --image_size 448 --no_augmentation"
HEAD = "--standardize_features --target_transform standardize --lr_schedule cosine --epochs 40"
ALL_LAYERS = "--unfreeze_backbone --image_size 160 --epochs 10 --batch_size 16 --target_transform standardize"
SETTINGS = {  # name: flags, how it is judged, seeds
    "study's setting": ("", FOLDS, 3),
    "target standardized": ("--target_transform standardize", FOLDS, 3),
    "sqrt target": ("--target_transform sqrt", FOLDS, 3),
    "log target": ("--target_transform log", FOLDS, 3),
    "Huber loss": ("--loss huber", FOLDS, 3),
    "cosine schedule": ("--lr_schedule cosine", FOLDS, 3),
    "patience 5": ("--patience 5", FOLDS, 3),
    "metadata too": (METADATA, FOLDS, 3),
    "metadata alone": (f"{METADATA} --metadata_only", FOLDS, 3),
    "no augmentation": ("--no_augmentation", FOLDS, 3),
    "features standardized": ("--standardize_features", FOLDS, 3),
    "RegNet, 448 pixels": (LARGE, FOLDS, 3),
    "recommended head, ResNet18": (HEAD, FOLDS, 3),
    "recommended": (f"{LARGE} {HEAD}", FOLDS, 3),
    "recommended, metadata too": (f"{LARGE} {HEAD} {METADATA}", FOLDS, 3),
    "all layers, 160 pixels": (f"{ALL_LAYERS} --lr_schedule cosine", SPLIT, 1),
}


def run(flags, judged, seed, args):
    """One run of train_model.py; its line of the table."""
    with tempfile.TemporaryDirectory(prefix="ablation_") as folder:
        command = ["--data_dir", args.data_dir, "--weights", args.weights, "--cache_dir", args.cache_dir]
        command += [
            "--results_dir",
            folder,
            "--log_path",
            f"{folder}/training.log",
            "--model_out",
            f"{folder}/model.pt",
        ]
        command += ["--seed", seed, *(["--folds", 5] if judged == FOLDS else []), *shlex.split(flags)]
        for _ in range(2):
            started, console = time.process_time(), io.StringIO()
            with contextlib.redirect_stdout(console):
                train_model.main([str(part) for part in command])
            if "to compute" not in console.getvalue() or ", 0 to compute" in console.getvalue():
                break  # else once more, because the seconds are to be those of a run that finds its features
        metrics = json.loads(Path(folder, "metrics.txt").read_text(encoding="utf-8"))
    return {
        "rows": metrics["val_rows"],
        "rmse": metrics["val_rmse"],
        "r2": metrics["val_r2"],
        "mean_rmse": metrics["baseline_mean_rmse"],
        "epoch": metrics["epoch"],
        "cpu_seconds": time.process_time() - started,
        "commit": metrics["run"]["commit"],
    }


def write_table(table, path):
    partial = path.with_suffix(".partial")
    table.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)


def read_table(path):
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame()


def references(args):
    """RMSE (g) that a model is held against: the green-area law by eda.py, the noise floor of drawn data."""
    lines = {}
    if args.summary_path.is_file():
        baselines = json.loads(args.summary_path.read_text(encoding="utf-8"))["baselines"]
        lines["green-area law"] = baselines["green_area_law"]["rmse"]
    told = Path(args.data_dir, "README.txt")
    floor = re.search(r"Noise floor: ([\d.]+) g", told.read_text(encoding="utf-8")) if told.is_file() else None
    return lines | ({"noise floor": float(floor[1])} if floor else {})


def summarize(table):
    """Mean, spread over the seeds and CPU seconds of each setting, in the order in which they stand above."""
    order = {name: number for number, name in enumerate(SETTINGS)}
    table = table[table["setting"].isin(order)]
    groups = table.groupby(["setting", "judged"], sort=False)
    summary = groups.agg(
        seeds=("seed", "size"),
        rmse=("rmse", "mean"),
        rmse_sd=("rmse", "std"),
        r2=("r2", "mean"),
        r2_sd=("r2", "std"),
        cpu_seconds=("cpu_seconds", "median"),
    ).reset_index()
    return summary.sort_values("setting", key=lambda names: names.map(order)).reset_index(drop=True)


def print_table(summary, table, lines):
    print("| setting | judged on | RMSE (g) | R2 | CPU seconds |\n| --- | --- | --- | --- | --- |")
    mean = table.loc[table["judged"] == FOLDS, "mean_rmse"].mean()
    print(f"| reference: training mean | 5 folds | {mean:.4f} | - | - |")
    for name, rmse in lines.items():
        print(f"| reference: {name} | - | {rmse:.4f} | - | - |")
    for row in summary.itertuples():
        rmse, r2 = (f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}" for mean, sd in
                    ((row.rmse, row.rmse_sd), (row.r2, row.r2_sd)))  # fmt: skip
        print(f"| {row.setting} | {row.judged} | {rmse} | {r2} | {row.cpu_seconds:.0f} |")


def plot(summary, table, lines, path):
    """A dot for each run and a bar for their mean, against the reference lines."""
    figure, axis = new_figure(1, 1, (10, 1.6 + 0.36 * len(summary)))
    for place, row in enumerate(summary.itertuples()):
        folds = row.judged == FOLDS
        axis.barh(place, row.rmse, color="tab:blue" if folds else "tab:orange", alpha=0.45)
        runs = table[(table["setting"] == row.setting) & (table["judged"] == row.judged)]
        axis.plot(runs["rmse"], [place] * len(runs), "o", color="black", markersize=4)
    lines = {"training mean": table.loc[table["judged"] == FOLDS, "mean_rmse"].mean(), **lines}
    for (name, rmse), style in zip(lines.items(), (":", "--", "-"), strict=False):
        axis.axvline(rmse, color="tab:red", linestyle=style, label=f"{name}, {rmse:.3f} g")
    axis.barh(0, 0, color="tab:blue", alpha=0.45, label="out of 5 folds; a dot is a seed")
    if (summary["judged"] == SPLIT).any():
        axis.barh(0, 0, color="tab:orange", alpha=0.45, label="one split, epoch chosen on it")
    axis.set_yticks(range(len(summary)), summary["setting"])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(summary["rmse"].max(), *lines.values()))
    axis.set(xlabel="RMSE of the fresh weight (g)", title="What each improvement gains")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="full_sample")
    parser.add_argument("--weights", default="none", help="of the backbone, as in train_model.py")
    parser.add_argument("--cache_dir", default=".feature_cache")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="run these settings alone")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ablation.csv")
    parser.add_argument("--summary_path", type=Path, default=ROOT / "results" / "eda_summary.json")
    args = parser.parse_args(argv)
    table = read_table(args.out)
    sheet = Path(args.data_dir, "digital_biomass_labels.xlsx")
    data = train_model.digest(sheet.read_bytes())
    for setting, (flags, judged, seeds) in SETTINGS.items():
        for seed in range(42, 42 + seeds):
            wanted = {"setting": setting, "flags": flags, "judged": judged, "seed": seed}
            wanted |= {"weights": args.weights, "data": data}
            done = len(table) and (table[list(wanted)] == pd.Series(wanted)).all(axis=1).any()
            if done or (args.only is not None and setting not in args.only):
                continue
            line = pd.DataFrame([wanted | run(flags, judged, seed, args)])
            if len(table):
                keys = ["setting", "seed", "weights", "data"]
                same = (table[keys] == pd.Series({key: wanted[key] for key in keys})).all(axis=1)  # of other flags
                table = table[~same]
            table = pd.concat([table, line], ignore_index=True)
            write_table(table, args.out)
            print(f"{setting}, seed {seed}: {line['rmse'][0]:.4f} g in {line['cpu_seconds'][0]:.0f} s", flush=True)
    if table.empty:
        parser.error(f"no run in {args.out} yet: leave --only out")
    table = table[(table["weights"] == args.weights) & (table["data"] == data)]
    summary, lines = summarize(table), references(args)
    print_table(summary, table, lines)
    plot(summary, table, lines, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a training run says of itself: the log, metrics.txt, the tables and the pictures, all in the target's unit."""

import importlib.metadata
import io
import json
import logging
import os
import platform
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version

from calibration import rmse_interval
from feature_store import digest
from outputs import harmless, whole_file

RESULT_FILES = ["history.csv", "predictions.csv", "predictions.png", "worst_predictions.png"]

logger = logging.getLogger("train_model")


# ---------------------------------------------------------------- log


def log_run(run, args):
    logger.info(f"command: {run['command']}")
    logger.info("arguments: " + " ".join(f"{name}={value}" for name, value in run["arguments"].items()))
    tree = {True: "clean", False: "with changes not committed", None: "unknown"}[run["clean_tree"]]
    logger.info(f"commit {run['commit']}, tree {tree}")
    logger.info(", ".join(f"{name} {version}" for name, version in run["versions"].items()))
    processes = f", {run['processes']} processes" if run["processes"] > 1 else ""
    logger.info(f"device {run['device']} ({run['processor']}), precision {run['precision']}{processes}")


def log_result(metrics, args):
    unit, low_high = unit_of(args.target), metrics["val_rmse_ci95"]
    interval = f" (95 % interval {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
    how = f"best epoch {metrics['epoch']} of {args.epochs}"
    if args.folds:
        how = f"{args.folds} folds, " + ("epochs chosen aside" if args.patience else f"epoch {args.epochs}")
    logger.info(
        f"validation RMSE {metrics['val_rmse']:.4f} {unit}{interval}, {how}; "
        f"predicting the training mean gives {metrics['baseline_mean_rmse']:.4f} {unit}".rstrip()
    )


# ---------------------------------------------------------------- numbers


def unit_of(target):
    """Unit of the target: weights are in grams unless their name ends otherwise; of other columns it is not known."""
    target = target.lower()
    return "g" if "weight" in target and not target.endswith(("_mg", "_kg")) else ""


def scores(table):
    """Errors of the predictions in `table`, in the unit of the target (squared for mse)."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score, root_mean_squared_error

    measured, predicted = table["measured"], table["predicted"]
    return {
        "val_mse": mean_squared_error(measured, predicted),
        "val_rmse": root_mean_squared_error(measured, predicted),
        "val_mae": mean_absolute_error(measured, predicted),
        "val_r2": r2_score(measured, predicted) if len(table) > 1 else None,
        "val_bias": table["error"].mean(),
    }


def summarize(predictions, chosen, splits, labels, args):
    """All that metrics.txt says of the predictions, the study's three numbers first."""
    score = scores(predictions)
    metrics = {"val_mse": score["val_mse"], "val_rmse": score["val_rmse"], "epoch": chosen["epoch"], **score}
    metrics["val_rmse_ci95"] = rmse_interval(predictions["error"].to_numpy(), predictions["_plant"], args.seed)
    metrics.update(chosen)
    at_mean = predictions.assign(predicted=predictions["training_mean"])
    metrics["baseline_mean_rmse"] = scores(at_mean)["val_rmse"]
    sides = [
        {
            f"{side}_{what}": count
            for side, rows in zip(("train", "val"), split, strict=True)
            for what, count in (("rows", len(rows)), ("plants", labels["_plant"].iloc[rows].nunique()))
        }
        for split in splits
    ]
    if not args.folds:
        return metrics | sides[0]
    each = [{"fold": fold, **scores(table)} for fold, table in predictions.groupby("fold")]
    rmse = [row["val_rmse"] for row in each]
    metrics |= {"val_rows": len(predictions), "val_plants": int(predictions["_plant"].nunique())}
    metrics["folds"] = {
        "val_rmse_mean": float(np.mean(rmse)),
        "val_rmse_sd": float(np.std(rmse, ddof=1)),
        "each": [row | side for row, side in zip(each, sides, strict=True)],
    }
    return metrics


def describe_run(argv, args, device, precision, labels, processes=1):
    """How the numbers were made: command, commit, versions, device and a fingerprint of the data."""
    rows = labels[["filename", "_content", args.target, *args.group_by, *args.metadata_columns]].to_csv(index=False)
    return {
        "command": f"{'torchrun ...' if processes > 1 else 'python'} train_model.py {shlex.join(argv)}".rstrip(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        **git_state(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: str(module.__version__) for module in (torch, torchvision, np, pd)},
            "scikit-learn": importlib.metadata.version("scikit-learn"),
            "pillow": pillow_version,
        },
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "precision": precision,
        "processes": processes,
        "data_fingerprint": digest(rows),
    }


def git_state():
    """Commit of this script, and whether all but the committed outputs is as in it; None where git cannot tell."""

    def git(*command):
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        changed = git("status", "--porcelain", "--", ".", ":!results", ":!figures", ":!training.log")
        return {"commit": git("rev-parse", "HEAD"), "clean_tree": None if changed is None else not changed}
    except OSError:
        return {"commit": None, "clean_tree": None}


def save_figure(figure, path):
    with whole_file(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:], dpi=150)


def save_photos(figure, path):
    """Save a figure of photos as a PNG with a palette, because photos make large PNGs."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)  # the photos have no more to show
    with whole_file(path) as partial:
        Image.open(drawn).convert("RGB").quantize(256).save(partial, format="PNG")


def write_report(history, predictions, metrics, args, open_photo):
    """Write metrics.txt, history.csv, predictions.csv and the three pictures."""
    suffix = f"_{unit_of(args.target)}" if unit_of(args.target) else ""
    renamed = {name: name + suffix for name in ("measured", "predicted", "error")}
    with whole_file(args.metrics_path) as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(["filename", *args.group_by, "fold", *renamed.values()]))
    with whole_file(args.results_dir / "history.csv") as partial:
        fold = ["fold"] if args.folds else []
        history[[*fold, *history.columns.drop("fold")]].to_csv(partial, index=False)
    with whole_file(args.results_dir / "predictions.csv") as partial:
        harmless(predictions.rename(columns=renamed)[columns]).to_csv(partial, index=False, float_format="%.12g")
    plot_curves(history, metrics, args)
    plot_predictions(predictions, metrics, args)
    plot_worst(predictions, args, open_photo)


def plain(text):
    """Text of the user's for a figure, where a pair of dollar signs would be taken for a formula."""
    return str(text).replace("$", r"\$")


def new_figure(rows, columns, size, layout="constrained"):
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing kept between figures

    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(rows, columns)


def plot_curves(history, metrics, args):
    """Train and validation loss by epoch; with folds one thin line a fold and their mean."""
    figure, axis = new_figure(1, 1, (8, 5))
    history = history[history["fold"] > 0]
    watched = "kept aside" if args.folds and args.patience else "validation"
    for name, text, color in (("train_loss", "training", "tab:blue"), ("val_loss", watched, "tab:orange")):
        if args.folds:
            for _, fold in history.groupby("fold"):
                axis.plot(fold["epoch"], fold[name], color=color, linewidth=0.7, alpha=0.5)
            text += f", mean of {args.folds} folds"
        epochs = history.groupby("epoch")[name]
        mean = epochs.mean()[epochs.size() == history["fold"].nunique()]  # while all folds run
        axis.plot(mean.index, mean, color=color, marker="o", markersize=4, label=text)
    if not args.folds:
        axis.axvline(metrics["epoch"], color="grey", linestyle="--", linewidth=1)
        axis.plot(
            metrics["epoch"],
            metrics["val_mse"],
            "*",
            color="black",
            markersize=14,
            zorder=3,
            label=f"best epoch {metrics['epoch']}, RMSE {metrics['val_rmse']:.4f} {unit_of(args.target)}",
        )
    unit = f" ({unit_of(args.target)}$^2$)" if unit_of(args.target) else ""
    axis.set(xlabel="epoch", ylabel=f"mean squared error of {plain(args.target)}{unit}", title="Loss by epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, args.curves_path)


def plot_predictions(predictions, metrics, args):
    """Predicted against measured, and the error against the prediction."""
    unit = f" ({unit_of(args.target)})" if unit_of(args.target) else ""
    figure, (left, right) = new_figure(1, 2, (12, 5.5))
    dots = {"s": 10, "alpha": 0.35, "linewidths": 0}
    left.scatter(predictions["measured"], predictions["predicted"], **dots)
    ends = [predictions[["measured", "predicted"]].min().min(), predictions[["measured", "predicted"]].max().max()]
    left.plot(ends, ends, color="black", linewidth=1, label="equality")
    left.set(xlabel=f"measured {plain(args.target)}{unit}", ylabel=f"predicted {plain(args.target)}{unit}")
    left.legend()
    right.scatter(predictions["predicted"], predictions["error"], **dots)
    right.axhline(0, color="black", linewidth=1)
    right.axhline(
        metrics["val_bias"], color="tab:red", linestyle="--", linewidth=1, label=f"mean {metrics['val_bias']:.4f}"
    )
    right.set(xlabel=f"predicted {plain(args.target)}{unit}", ylabel=f"predicted - measured{unit}")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    how = f"out of {args.folds} folds" if args.folds else f"validation, epoch {metrics['epoch']}"
    r2 = "" if metrics["val_r2"] is None else f", R$^2$ {metrics['val_r2']:.3f}"
    figure.suptitle(
        f"n = {len(predictions):,} photos of {metrics['val_plants']:,} plants ({how}): "
        f"RMSE {metrics['val_rmse']:.4f} {unit_of(args.target)}{r2}"
    )
    save_figure(figure, args.results_dir / "predictions.png")


def plot_worst(predictions, args, open_photo):
    """The nine photos with the largest errors."""
    worst = predictions.iloc[np.argsort(-predictions["error"].abs().to_numpy(), kind="stable")[:9]]
    figure, axes = new_figure(3, 3, (9, 10.5), layout=None)  # fitting pictures of photos takes a second
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.01, top=0.9, wspace=0.05, hspace=0.3)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (_, row) in zip(axes.flat, worst.iterrows(), strict=False):
        axis.imshow(open_photo(row["_path"]))
        unit = unit_of(args.target)
        axis.set_title(
            f"{plain(row['filename'])}\nmeasured {row['measured']:.3f} {unit}\npredicted {row['predicted']:.3f} {unit}",
            fontsize=10,
        )
    figure.suptitle(f"The {len(worst)} largest errors of {len(predictions):,} photos")
    save_photos(figure, args.results_dir / "worst_predictions.png")

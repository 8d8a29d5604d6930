"""Predictions become scores, intervals, tables and pictures; files are written whole; the log tells what happened."""

import argparse
import contextlib
import functools
import io
import json
import logging
import logging.handlers
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from biomass import reading
from biomass.reading import UserError

INTERVALS = "jackknife over {groups}s, Student's t"  # how metrics.txt names group_interval

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- scores and their intervals


def scores(table):
    """Errors of the predictions in `table`, in the unit of the target (squared for mse) or percent of its value."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    both = table["measured"], table["predicted"]
    numbers = {"val_mse": mean_squared_error(*both), "val_rmse": math.sqrt(mean_squared_error(*both))}
    numbers |= {"val_mae": mean_absolute_error(*both), "val_r2": r2_score(*both) if len(table) > 1 else None}
    shares = (100 * table["error"] / table["measured"]).abs().where(table["measured"] != 0)
    return numbers | {"val_bias": float(table["error"].mean()), "val_median_error_percent": float(shares.median())}


def group_interval(statistic, sums, back):
    """95 % interval of back(statistic(sums)), for sums of rows by group (groups, k); None for fewer than two groups.

    The jackknife leaves out one group at a time, as the errors of its photos are alike; the statistic is on a scale on
    which it varies evenly, so that Student's t fits (Efron and Tibshirani 1993, An Introduction to the Bootstrap,
    chapter 11). For few groups it holds where bootstraps are too narrow: tests/experiments/intervals.py.
    """
    from scipy.special import stdtrit

    count = len(sums)
    if count < 2:
        return None
    left = statistic(sums.sum(0) - sums)
    error = np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum())
    reach = stdtrit(count - 1, 0.975) * error
    middle = statistic(sums.sum(0))
    return [float(back(middle - reach)), float(back(middle + reach))]


def rmse_interval(squares, groups):
    """95 % interval of the RMSE of rows from their squared errors and the groups that they belong to."""
    sums = pd.DataFrame({"square": squares, "rows": 1.0}).groupby(np.asarray(groups)).sum().to_numpy()
    tiny = np.finfo(float).tiny
    return group_interval(lambda s: np.log(np.maximum(s[..., 0], tiny) / s[..., 1]) / 2, sums, np.exp)


def prediction_table(labels, split, predictions, args, fold=1):
    """The validated rows with what was measured and predicted, the training mean, and for drawn data what can be."""
    train_rows, val_rows = split
    table = labels.iloc[val_rows].assign(fold=fold, predicted=np.asarray(predictions), expected=np.nan)
    table = table.assign(measured=table[args.target], training_mean=labels[args.target].iloc[train_rows].mean())
    if reading.is_drawn(args.labels_path) and args.target == "fresh_weight_total":
        expected = pd.read_csv(args.labels_path.parent / reading.DRAWN_MARK, comment="#").drop_duplicates("filename")
        table["expected"] = table["filename"].map(expected.set_index("filename")["expected_weight_g"])
    return table.assign(error=table["predicted"] - table["measured"])


def metrics_of(table, epoch, chosen_on, history, args):
    """What metrics.txt says of predictions, the study's three numbers first."""
    score, measured = scores(table), table["measured"]
    metrics = {"val_mse": score["val_mse"], "val_rmse": score["val_rmse"], "epoch": epoch} | score
    metrics["val_rmse_ci95"] = rmse_interval(table["error"] ** 2, table["_plant"])
    metrics["intervals_by"] = INTERVALS.format(groups=reading.group_name(args.group_by))
    metrics |= {"last_epoch_val_rmse": history[-1]["val_rmse"]} if history else {}
    metrics["epoch_chosen_on"] = chosen_on
    metrics["baseline_mean_rmse"] = math.sqrt((measured - table["training_mean"]).pow(2).mean())
    metrics |= {"drawn_data": True} if reading.is_drawn(args.labels_path) else {}
    if table["expected"].notna().all():
        metrics["noise_floor_rmse"] = math.sqrt((measured - table["expected"]).pow(2).mean())
    return metrics


# ---------------------------------------------------------------- what a checkpoint of cross_validate.py knows


def interval(calibration, predicted, coverage):
    """Lower and upper ends, like `predicted`, between which a share `coverage` of the photos of new plants lies.

    Split-conformal prediction with errors scaled by their expected size (Lei et al. 2018, Journal of the American
    Statistical Association 113, 1094-1111), with out-of-fold errors and a quantile for each side. A new photo
    counts as one more independent error, an infinite one: few plants give wide intervals, in the end infinite ones.
    """
    predicted = np.asarray(predicted, float)
    size = error_size(calibration["growth"], predicted)
    ratios, weights = np.array(calibration["scores"]), np.array(calibration["weights"])  # of measured - predicted

    def quantile(ratios, weights):
        place = np.searchsorted(np.cumsum(weights), (1 + coverage) / 2 - 1e-9)
        return ratios[place] if place < len(ratios) else np.inf

    low = predicted - size * quantile(-ratios[::-1], weights[::-1])
    high = predicted + size * quantile(ratios, weights)
    return np.maximum(low, calibration["floor"]), np.maximum(high, calibration["floor"])


def most_coverage(calibration):
    """Share that its errors can promise: beyond it the quantiles lie outside all that were seen."""
    return (calibration["independent"] - 1) / (calibration["independent"] + 1)


def error_size(growth, predicted):
    """The expected size of an error: it grows with the prediction as offset + slope * |predicted|."""
    offset, slope, least = growth
    return np.maximum(offset + slope * np.abs(predicted), max(least, 1e-12))


def unlikeness(familiar, features):
    """How far features (n, width) are from the training photos': the squared distance under a probabilistic PCA.

    Tipping and Bishop 1999, Journal of the Royal Statistical Society B 61, 611-622.
    """
    centred = (np.asarray(features, np.float64) - familiar["mean"]) / familiar["scale"]
    along = centred @ familiar["components"].T
    outside = (centred**2).sum(1) - (along**2).sum(1)
    return (along**2 / familiar["variance"]).sum(1) + outside / familiar["rest"]


# ---------------------------------------------------------------- tables and pictures


def write_report(table, history, metrics, args, third_panel=None):
    """Write metrics.txt, history.csv, predictions.csv and the three pictures."""
    unit, history = reading.unit_of(args.target), pd.DataFrame(history)
    numbers = [name for name in ("measured", "predicted", "error", "low", "high") if name in table]
    in_unit = {name: f"{name}_{unit}".rstrip("_") for name in numbers}
    times = filter(None, [vars(args).get("time_column")])  # of cross_validate.py
    columns = dict.fromkeys(["filename", *args.group_by, *times, "fold", *in_unit.values()])
    write_json(metrics, args.metrics_path)
    with whole_file(args.results_dir / "history.csv") as partial:
        history.to_csv(partial, index=False)
    of_folds = "low" in table  # which growth.py reads
    drawn = {"drawn_data": True} if of_folds and reading.is_drawn(args.labels_path) else {}
    with whole_file(args.results_dir / "predictions.csv") as partial:
        written = whole_numbers(table.rename(columns=in_unit)[list(columns)].assign(**drawn))
        written.to_csv(partial, index=False, float_format="%.9g")
    plot_curves(history, metrics, args)
    plot_predictions(table, metrics, args, third_panel)
    plot_worst(table, args)


def whole_numbers(table):
    """`table` with floats that are whole, as ids and seconds beside an empty cell, as integers: no digit is lost."""
    floats = table.select_dtypes("float")
    whole = [name for name in floats if floats[name].notna().any() and (floats[name].dropna() % 1 == 0).all()]
    return table.astype(dict.fromkeys(whole, "Int64"))


def write_json(content, path):
    """Write plain values, and numbers of NumPy, as JSON; numbers that are not finite as null."""
    content = json.loads(json.dumps(content, default=np.generic.item), parse_constant=lambda nan: None)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def log_result(metrics, args):
    unit, ends = reading.unit_of(args.target), metrics["val_rmse_ci95"]
    text = f"validation RMSE {metrics['val_rmse']:.4f} {unit}".rstrip()
    model = "final model of epoch" if "folds" in metrics else "epoch"
    text += f" (95 % interval {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
    text += f", R2 {metrics['val_r2']:.3f}" if metrics["val_r2"] is not None else ""
    text += f", median error {metrics['val_median_error_percent']:.0f} % of the weight"
    text += f", {model} {metrics['epoch']}; the training mean gives {metrics['baseline_mean_rmse']:.4f} {unit}".rstrip()
    if "noise_floor_rmse" in metrics:
        text += f"; no model of these drawn photos can be below {metrics['noise_floor_rmse']:.4f} {unit}"
    logger.info(text)


def in_brackets(unit):
    """The unit as it stands behind what it measures; nothing where there is none."""
    return f" ({unit})" if unit else ""


def new_figure(labels_path, size, drawn=False):
    """An empty figure (inches); it says in small print if the data, those of the sheet or any, are drawn."""
    from matplotlib.figure import Figure  # not pyplot, which would keep it

    figure = Figure(figsize=size, layout="constrained")
    if drawn or reading.is_drawn(labels_path):
        figure.supxlabel("drawn data, not measured", x=0.99, ha="right", fontsize=7, color="dimgrey")
    return figure


def save_figure(figure, path, dpi=120, colours=None):
    """Write a figure; of photos with a palette of so many colours, because photos make large PNGs."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:], dpi=dpi)
    with whole_file(path) as partial:
        partial.write_bytes(drawn.getvalue())
        if colours:
            few = Image.open(drawn).convert("RGB").quantize(colours, Image.Quantize.FASTOCTREE)
            few.save(partial, format="PNG", optimize=True, dpi=(dpi, dpi))


def plain(text):
    """Text of the user's for a figure, where a pair of dollar signs would be taken for a formula."""
    return str(text).replace("$", r"\$")


def plot_curves(history, metrics, args):
    """Training and validation loss by epoch; of folds a thin line each and their mean."""
    figure = new_figure(args.labels_path, (5.5, 3.8))
    axis, unit = figure.subplots(), reading.unit_of(args.target)
    history = history[history["fold"] > 0] if "fold" in history else history.assign(fold=1)
    folds, by_epoch = history["fold"].nunique(), history.groupby("epoch")
    for name, text, color in (("train_loss", "training", "tab:blue"), ("val_loss", "validation", "tab:orange")):
        for _, fold in history.groupby("fold"):
            axis.plot(fold["epoch"], fold[name], color=color, linewidth=0.7, alpha=0.5)
        mean = by_epoch[name].mean()[by_epoch.size() == folds]  # while all folds run
        text += f", mean of {folds} folds" if folds > 1 else ""
        axis.plot(mean.index, mean, color=color, marker="o", markersize=4, label=text)
    if folds == 1:
        text = f"best epoch {metrics['epoch']}, RMSE {metrics['val_rmse']:.4f} {unit}".rstrip()
        axis.plot(metrics["epoch"], metrics["val_mse"], "*", color="black", markersize=14, zorder=3, label=text)
    label = f"mean squared error of {plain(args.target)} ({unit}$^2$)".removesuffix(" ($^2$)")
    axis.set(xlabel="epoch", ylabel=label, title="Loss by epoch" + "; thin: each fold" * (folds > 1), ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, args.curves_path, dpi=180)


def plot_predictions(table, metrics, args, third_panel=None):
    """Predicted against measured, and the error against the prediction; third_panel(axis) draws one more."""
    figure = new_figure(args.labels_path, (6.5, 6.2 if third_panel else 3.4))  # for print, 10 cm wide or a page
    axes = figure.subplot_mosaic([[0, 1], [2, 2]] if third_panel else [[0, 1]])
    dots, unit, bias = {"s": 10, "alpha": 0.35, "linewidths": 0}, reading.unit_of(args.target), metrics["val_bias"]
    axes[0].scatter(table["measured"], table["predicted"], **dots)
    axes[0].axline((table["measured"].mean(),) * 2, slope=1, color="black", linewidth=1, label="equality")
    axes[1].scatter(table["predicted"], table["error"], **dots)
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].axhline(bias, color="tab:red", linestyle="--", linewidth=1, label=f"mean {bias:.4f} {unit}")
    target, in_unit = plain(args.target), in_brackets(unit)
    axes[0].set(xlabel=f"measured {target}{in_unit}", ylabel=f"predicted{in_unit}")
    axes[1].set(xlabel=f"predicted {target}{in_unit}", ylabel=f"predicted - measured{in_unit}")
    for axis in (axes[0], axes[1]):
        axis.grid(alpha=0.3)
        axis.legend()
    if third_panel:
        third_panel(axes[2])
    r2 = "" if metrics["val_r2"] is None else f", R$^2$ {metrics['val_r2']:.3f}"
    groups = (
        f"{table['_plant'].nunique():,} {plain(reading.group_name(args.group_by))}s that the model was not trained on"
    )
    figure.suptitle(f"{len(table):,} photos of {groups}:\nRMSE {metrics['val_rmse']:.4f} {unit}{r2}", fontsize=10)
    save_figure(figure, args.results_dir / "predictions.png", dpi=180)


def plot_worst(table, args):
    """The nine photos with the largest errors."""
    worst = table.iloc[np.argsort(-table["error"].abs().to_numpy(), kind="stable")[:9]]
    figure = new_figure(args.labels_path, (8, 9.3))
    axes = figure.subplots(3, 3)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (_, row) in zip(axes.flat, worst.iterrows(), strict=False):
        axis.imshow(reading.open_photo(row["_path"]))
        both = f"measured {row['measured']:.3f}, predicted {row['predicted']:.3f} {reading.unit_of(args.target)}"
        axis.set_title(f"{plain(row['filename'])[-40:]}\n{both}", fontsize=9)
    figure.suptitle(f"The {len(worst)} largest errors of {len(table):,} photos")
    save_figure(figure, args.results_dir / "worst_predictions.png", dpi=90, colours=256)


def draw_heat(items, path, unit, labels_path=None):
    """Photos above their heat maps, on one common scale; items are (photo, heat, title)."""
    columns = min(len(items), 6)
    rows = -(-len(items) // columns)
    figure = new_figure(labels_path, (10 * (max(columns, 2) + 1) / 7, 3.8 * rows))
    axes = figure.subplots(rows * 2, columns, squeeze=False)
    most = max(float(np.abs(heat).max()) for _, heat, _ in items) or 1.0
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (photo, heat, title) in enumerate(items):
        above, below = axes[number // columns * 2 : number // columns * 2 + 2, number % columns]
        above.imshow(photo)
        above.set_title(title, fontsize=8)
        below.imshow(photo.convert("L"), cmap="gray")
        extent = (0, photo.width, photo.height, 0)
        drawn = below.imshow(heat, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.6, extent=extent)
    label = f"prediction lost (red) or gained\n(blue) by hiding the patch{in_brackets(unit)}"
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.7)
    figure.suptitle("Where it looks: each patch hidden in turn\nby what the photo shows without its plant")
    save_figure(figure, path, dpi=90, colours=256)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path, told=True):
    """Path to write to beside `path`; what is written there is moved over it once it is complete."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free the disk or choose another place") from error
    finally:
        partial.unlink(missing_ok=True)
    if told:
        logger.info(f"wrote {path}")


def check_writable(outputs, inputs, photo_folder):
    """Make the folders of files to come. Raises UserError for what cannot be written, is an input or among photos."""
    inputs, photo_folder = {os.path.realpath(path) for path in inputs if path}, os.path.realpath(photo_folder or "-")
    for path in map(Path, outputs):
        fault = "it is a folder" if path.is_dir() else "it is an input" if os.path.realpath(path) in inputs else ""
        if path.suffix.lower() in reading.PHOTO_SUFFIXES and os.path.realpath(path.parent) == photo_folder:
            fault = fault or "it would lie among the photos"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            fault = fault or error.strerror
        if fault:
            raise UserError(f"cannot write {path} ({fault}): choose another place for it")


# ---------------------------------------------------------------- command line and log


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        told = action.default in (None, []) or isinstance(action.default, bool)
        return action.help if told else super()._get_help_string(action)


def new_parser(prog, about):
    """A parser whose mistakes are told in one line, without the usage of forty flags."""
    parser = argparse.ArgumentParser(prog, description=about, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{prog}: error: {message}\n")
    return parser


def number(kind, low, high=math.inf, ends=True):
    """argparse type: an int or a float from `low` to `high`, without the ends if not `ends`."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high if ends else low < value < high):
            allowed = f"from {low} to {high}" if ends else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    parse.__name__ = "number"
    return parse


def run_script(prog, job, argv, resumable=False):
    """job(argv, an ExitStack), with a line in place of a traceback for what users can mend; returns the exit status."""
    start_log()
    status, message = 2, ""
    try:
        with contextlib.ExitStack() as started:
            return job([str(argument) for argument in (sys.argv[1:] if argv is None else argv)], started)
    except UserError as error:  # from a process that decodes photos it comes with a traceback before it
        message = f"error: {reading.one_line(error).rpartition('UserError: ')[2]}"
    except OSError as error:
        message = f"error: cannot read or write {error.filename} ({error.strerror or reading.one_line(error)})"
    except (MemoryError, RuntimeError) as error:
        full = ("out of memory", "can't allocate memory", "not enough memory", "exited unexpectedly")
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in full):
            raise
        smaller = "pass a smaller --batch_size or --image_size, or " if resumable else ""
        message = f"error: the memory is full; {smaller}close other programs"
    except KeyboardInterrupt:
        goes_on = ", --resume goes on" if resumable else ""
        status, message = 130, f"interrupted; what the log says was written is whole{goes_on}"
    finally:
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                handler.close()
    rank = os.environ.get("RANK", "0")
    print(f"{prog}: {message}" if rank == "0" else f"{prog}, process {rank}: {message}", file=sys.stderr)
    if rank != "0":
        time.sleep(5)  # as torchrun ends the main process, perhaps before it speaks, where another one ends
    return status


def start_log():
    """Log to the console; lines for the log file wait until the input has proved sound."""
    waiting = logging.handlers.MemoryHandler(10**6, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    logging.raiseExceptions = False  # a console that was closed, as by `| head`, is no reason for tracebacks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files, on a console of few letters
    logger.handlers, logger.propagate = [logging.StreamHandler(sys.stdout), waiting], False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def open_log(path, append=False):
    """Write the lines that waited, and all to come, to the log file too."""
    if os.environ.get("RANK", "0") == "0":
        file = logging.FileHandler(path, "a" if append else "w", encoding="utf-8", errors="backslashreplace")
        file.handleError = functools.partial(stop_at_full_log, path)  # else logging prints a traceback and goes on
        file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        waiting = logger.handlers.pop()
        waiting.setTarget(file)
        waiting.flush()
        logger.addHandler(file)


def stop_at_full_log(path, record):
    error = sys.exc_info()[1]
    reason = getattr(error, "strerror", None) or reading.one_line(error)
    raise UserError(f"cannot write {path} ({reason}): free the disk or choose another place") from error

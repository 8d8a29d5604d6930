"""Look at plant photos and their label sheet before a model does: plots, an audit, and what green area alone tells.

    python eda.py                                    # the FarmBot data in infos/mlops_biomass_data
    python eda.py --data_dir sample_data             # data drawn by `python make_sample_data.py`
    python eda.py --labels_path leaves.csv --image_dir photos --target leaf_weight --group_by tray pot

Writes figures/target_distribution.png, sample_images.png, correlation_heatmap.png, age_vs_biomass.png,
               image_pixel_analysis.png, green_area_vs_biomass.png
       results/eda_summary.json: counts and statistics; `audit`: faults by row and file, and facts of the structure;
               `baselines`: the error in grams that a model has to beat
"""

import os
import signal
import sys

if __name__ == "__main__":  # while the libraries load; main() takes over
    signal.signal(signal.SIGINT, lambda *_: (sys.stderr.write("eda.py: interrupted\n"), os._exit(130)))

import argparse
import hashlib
import io
import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageStat
from tqdm import tqdm

from calibration import rmse_interval
from inputs import (
    PHOTO_SUFFIXES,
    PhotoFolder,
    UserError,
    as_if_in_mg,
    decoding,
    fault_of,
    one_line,
    open_image,
    open_photo,
    read_photo_file,
    read_sheet,
    to_numbers,
)
from metadata import HARVEST_COLUMNS
from outputs import Parser, alone, check_writable, logging_to_console, whole_file

CHANNELS = ["red", "green", "blue"]
DEFAULT_GROUP_BY = ["plant_number"]  # as the study did
PLANT_COLUMNS = ["experiment_id", "plant_number"]  # plant numbers restart in every experiment
ID_COLUMNS = ["filename", "lab_book_page", *PLANT_COLUMNS]
# Soil has an excess green near 0. Orange light lacks blue and lifts the pale grains to 0.1 or 0.2; leaves keep 0.3 to
# 0.5 under it as under white light: one threshold between the two serves all experiments.
EXCESS_GREEN = 0.25
DARK = 60  # sum of the 8-bit channels below which the colour of a pixel is noise
FOLDS = 5
SHOWN = 5  # rows or files that one line of text names; the audit in the summary names all
MOST_COLUMNS, MOST_AGES, MOST_PIXELS_WIDE = 40, 40, 600  # that a figure shows: columns, boxes, pixels of a sample photo
FAULTS = {
    "text_weights": "weights written as text",
    "cells_not_numbers": "cells that are no number in a column of numbers",
    "negative_weights": "negative weights",
    "zero_weights": "weights of zero",
    "weights_as_if_in_mg": "weights some 1000 times the others, as if in mg",
    "wrong_totals": "total weights that are not shoot + root",
    "rows_twice": "rows that repeat an earlier row",
    "photos_with_several_weights": "photos with several weights",
    "missing_photos": "rows without their photo",
    "unreadable_photos": "unreadable photos",
    "unused_photos": "photos that no row names",
    "photos_not_rgb": "photos that are not 8-bit RGB",
    "photos_under_several_names": "photos under several names",
    "decreasing_ages": "ages that decrease with time within a plant",
}

logger = logging.getLogger("train_model")


# Data


def load_labels(path, target, group_by):
    """Return the sheet, and the same rows as they were typed, where a weight of text still shows.

    A column becomes one of numbers if more than half of its filled cells are numbers, times become Unix seconds, and
    an id is the same typed as a number or as text.
    """
    if target == "filename":
        raise UserError("--target filename: the file names are no weights; name the column of the weights")
    typed = read_sheet(path, [target] if group_by == DEFAULT_GROUP_BY else [target, *group_by])
    sheet = typed.copy()
    sheet[target] = to_numbers(typed[target])
    for column in sheet.columns.drop(["filename", target]):
        cells = typed[column]
        numbers = to_seconds(cells) if column == "timestamp" else to_numbers(cells)
        if column not in ID_COLUMNS and column not in group_by:
            if numbers.count() > cells.count() / 2:
                sheet[column] = numbers
        elif not pd.api.types.is_numeric_dtype(cells):
            sheet[column] = numbers if numbers.count() == cells.count() else cells.astype("string").str.strip()
    if sheet[target].count() == 0:
        raise UserError(f"no row of {path} has a number in '{target}'")
    return sheet.copy(), typed  # in one piece again, as columns were replaced one by one


def to_seconds(cells):
    """Times as Unix seconds, from numbers, dates, and dates written as text: the day before the month if both fit."""
    seconds = to_numbers(cells)
    text = cells[seconds.isna()].dropna().astype("string")
    ways = ({"format": "ISO8601"}, {"dayfirst": True}, {})
    dates = max((pd.to_datetime(text, errors="coerce", utc=True, **way) for way in ways), key=pd.Series.count)
    return seconds.fillna(to_numbers(dates.dt.tz_localize(None)))


def has_numbers(sheet, *columns):
    return all(column in sheet and pd.api.types.is_numeric_dtype(sheet[column]) for column in columns)


def find_photos(folder, sheet):
    """Spell each `filename` of the sheet as the folder does; return the sheet, and the fault of each name not found."""
    names = sheet["filename"].dropna().drop_duplicates()
    found = folder.find_all(names).set_axis(names)
    faults = found["_fault"][found["_fault"] != ""].to_dict()
    good = found["_path"][found["_fault"] == ""]
    spelt = {name: Path(path).relative_to(folder.folder).as_posix() for name, path in good.items()}
    other = [f"'{name}' is {found}" for name, found in spelt.items() if name != found]
    if other:
        logger.info(line("file names of the sheet that the folder spells otherwise", other))
        names = sheet["filename"].map(lambda name: spelt.get(name, name), na_action="ignore")
        sheet = sheet.assign(filename=names.astype("string"))
    return sheet, faults


def list_photos(folder):
    """Names of the folder's own photos: no hidden file, pipe or folder, and no link that leads out."""
    for name in folder.names():
        if name.lower().endswith(PHOTO_SUFFIXES) and not name.startswith("."):
            path = folder.folder / name
            if path.is_file() and not (path.is_symlink() and folder.look_for(name)[1]):
                yield name


def scan_photos(folder, found):
    """Open once each photo of the folder and each that was `found` for the sheet.

    Returns what they tell, a row a file name.
    """
    names = sorted({*found, *list_photos(folder)})
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))  # threads do: the libraries release the interpreter
    try:
        looks = pool.map(look_at, [folder.folder / name for name in names])
        looks = list(tqdm(looks, total=len(names), desc="photos", unit="photo", disable=None))
    finally:  # at Ctrl-C without the photos that wait
        pool.shutdown(cancel_futures=True)
    columns = ["problem", "mode", "size", "digest", "green_area", *CHANNELS]
    return pd.DataFrame(looks, index=pd.Index(names, dtype=object), columns=columns)


def look_at(path):
    """What one photo tells: mode, size, digest of its pixels, mean channels (0..1) and green area, or its problem."""
    try:
        content = read_photo_file(path)
        with open_image(content) as file, decoding(file):
            return {"mode": file.mode} | describe_photo(open_photo(content))
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return {"problem": fault_of(error)}


def describe_photo(photo):
    size = f"{photo.width}x{photo.height}"
    look = {"size": size, "digest": hashlib.sha256(size.encode() + photo.tobytes()).hexdigest()}
    means = dict(zip(CHANNELS, np.array(ImageStat.Stat(photo).mean) / 255, strict=True))
    return look | means | {"green_area": green_area(photo)}


def green_area(photo):
    """Projected plant area as a share of the frame (0..1), by excess green 2g - r - b on chromatic coordinates,
    r + g + b = 1, where it equals 3g - 1 (Woebbecke et al. 1995, Trans. ASAE 38(1):259-269).
    """
    coarse = photo.reduce(2)  # means of 2 x 2 pixels, for single grains of soil are coloured at random
    red, green, blue = (np.asarray(channel, dtype=np.float32) for channel in coarse.split())
    total = red + green + blue
    return float(np.mean((3 * green - total > EXCESS_GREEN * total) & (total > DARK)))


def summarize(sheet, photos, target):
    """Counts and statistics of the sheet; shares are fractions, what the sheet does not tell is None."""
    weights = sheet[target]
    photos_per_number = sheet["plant_number"].value_counts() if "plant_number" in sheet else None
    seconds = sheet["timestamp"] if has_numbers(sheet, "timestamp") else None
    return {
        "num_records": len(sheet),
        "num_images_on_disk": len(photos),
        "num_labeled": weights.count(),
        "pct_labeled": weights.notna().mean(),
        "fresh_weight_stats": weights.describe().to_dict() | {"count": weights.count()},
        "age_missing_pct": sheet["age_days"].isna().mean() if "age_days" in sheet else None,
        "target_missing_pct": weights.isna().mean(),
        "plants_with_multiple_samples": None if photos_per_number is None else (photos_per_number > 1).sum(),
        "max_images_per_plant": None if photos_per_number is None else photos_per_number.max(),
        "timestamp_span_days": None if seconds is None else (seconds.max() - seconds.min()) / 86400,
    }


# Audit: a fault wants mending, a fact wants knowing


def audit_data(sheet, typed, photos, not_found, target):
    """Return {"faults": {name: {count, found}}, "facts"}; rows are named by their number in Excel.

    A check that lacks a column of the sheet has found None.
    """
    filenames = sheet["filename"].fillna("no file name")
    names = [f"row {row + 2} ({short(name)})" for row, name in filenames.items()]
    names = pd.Series(names, sheet.index, dtype=object)
    found = weight_faults(sheet, typed, target, names) | row_faults(sheet, target, names)
    found |= photo_faults(sheet, photos, not_found, names)
    found |= {"wrong_totals": wrong_totals(sheet, names), "decreasing_ages": decreasing_ages(sheet, names)}
    facts = {
        "missing_share": sheet.isna().mean().to_dict(),
        "photo_sizes": photos["size"].value_counts().to_dict(),
        "photo_modes": photos["mode"].value_counts().to_dict(),
        "weight_outliers_at_age": weight_outliers(sheet, target, names),
        "plants": count_plants(sheet),
        "columns_that_tell_the_answer": telling_columns(sheet, target),
    }
    counts = {name: None if items is None else len(items) for name, items in found.items()}
    return {"faults": {name: {"count": counts[name], "found": found[name]} for name in FAULTS}, "facts": facts}


def short(text, most=100):
    return text if len(text) <= most else f"{text[:most]}..."


def tell(template, *columns):
    """The template filled in for each row of the columns, which are of one length."""
    return [template.format(*cells) for cells in zip(*columns, strict=True)]


def weight_faults(sheet, typed, target, names):
    weights, cells = sheet[target], typed[target]
    text = cells[cells.map(lambda cell: isinstance(cell, str)) & weights.notna()]
    if len(text) > weights.count() / 2:  # a CSV file, where all is text: the rarer decimal mark is the odd one
        commas, points = text.str.contains(",", regex=False), text.str.contains(".", regex=False)
        text = text[commas if commas.sum() < points.sum() else points]
    lost = []
    for column in sheet.columns.drop("filename"):
        gone = sheet[column].isna() & typed[column].notna()
        quoted = typed.loc[gone, column].map(lambda cell: short(str(cell)))
        lost += [f"{name}: {column} '{cell}'" for name, cell in zip(names[gone], quoted, strict=True)]
    negative, in_mg = weights < 0, as_if_in_mg(weights)
    return {
        "text_weights": tell("{}: '{}' read as {:g}", names[text.index], text.map(short), weights[text.index]),
        "cells_not_numbers": lost,
        "negative_weights": tell("{}: {:g}", names[negative], weights[negative]),
        "zero_weights": [*names[weights == 0]],
        "weights_as_if_in_mg": tell("{}: {:g}", names[in_mg], weights[in_mg]),
    }


def wrong_totals(sheet, names):
    """Rows off by more than 1 mg and 1 %, which is more than rounding three weights explains."""
    if not has_numbers(sheet, "fresh_weight_total", "fresh_weight_shoot", "fresh_weight_root"):
        return None
    total, parts = sheet["fresh_weight_total"], sheet["fresh_weight_shoot"] + sheet["fresh_weight_root"]
    off = (total - parts).abs() > 0.001 + 0.01 * parts.abs()
    return tell("{}: {:g}, not {:g}", names[off], total[off], parts[off])


def row_faults(sheet, target, names):
    rows = sheet[["filename", target]].dropna(subset="filename")
    rows = rows[rows["filename"].duplicated(keep=False)]
    first = rows.index.to_series().groupby([rows["filename"], rows[target]], dropna=False).transform("min")
    again = first[first != first.index]
    rows = rows.dropna(subset=target)
    rows = rows[rows.groupby("filename")[target].transform("nunique") > 1]
    several = {}
    for row, filename, weight in zip(rows.index, rows["filename"], rows[target], strict=True):
        several.setdefault(filename, []).append(f"{weight:g} in row {row + 2}")
    return {
        "rows_twice": tell("{} repeats row {}", names[again.index], again + 2),
        "photos_with_several_weights": [f"{name}: {', '.join(weights)}" for name, weights in sorted(several.items())],
    }


def photo_faults(sheet, photos, not_found, names):
    listed = sheet["filename"].isin(photos.index)
    missing = sheet.loc[~listed, "filename"].fillna("")
    reasons = [f": {not_found[name]}" if name in not_found else "" for name in missing]
    problems, odd = photos["problem"].dropna(), photos["mode"].dropna().loc[lambda mode: mode != "RGB"]
    return {
        "missing_photos": tell("{}{}", names[~listed], reasons),
        "unreadable_photos": tell("{}: {}", problems.index, problems),
        "unused_photos": [*photos.index.difference(sheet["filename"].dropna())],
        "photos_not_rgb": tell("{}: mode {}", odd.index, odd),
        "photos_under_several_names": same_photos(sheet, photos),
    }


def same_photos(sheet, photos):
    digests = photos["digest"].dropna()
    digests = digests[digests.duplicated(keep=False)]
    rows = sheet.assign(digest=sheet["filename"].map(digests)).dropna(subset="digest")
    plants = rows.drop_duplicates(["digest", *(column for column in PLANT_COLUMNS if column in sheet)])
    plants = plants["digest"].value_counts()
    same = {}
    for name, digest in digests.items():
        same.setdefault(digest, []).append(name)
    return sorted(f"{' = '.join(same[digest])} (plants: {plants.get(digest, 0)})" for digest in same)


def decreasing_ages(sheet, names):
    if not (has_numbers(sheet, "timestamp", "age_days") and {*PLANT_COLUMNS} <= {*sheet}):
        return None
    rows = sheet.sort_values("timestamp", kind="stable").dropna(subset=["timestamp", "age_days"])
    ages, step = rows["age_days"], rows.groupby(PLANT_COLUMNS)["age_days"].diff()
    back = step < 0
    return tell("{}: {:g} days after {:g}", names[rows.index[back]], ages[back], (ages - step)[back])


def weight_outliers(sheet, target, names):
    """Weights whose log lies beyond 1.5 interquartile ranges of the quartiles at their age; None without ages."""
    if not has_numbers(sheet, "age_days"):
        return None
    rows = sheet[sheet[target] > 0].dropna(subset="age_days")
    logs, ages = np.log(rows[target]), rows["age_days"]
    low, high = (logs.groupby(ages).transform("quantile", q) for q in (0.25, 0.75))
    beyond = rows.index[(logs < low - 1.5 * (high - low)) | (logs > high + 1.5 * (high - low))]
    return tell("{}: {:g} at {:g} days", names[beyond], rows.loc[beyond, target], ages[beyond])


def count_plants(sheet):
    if not {*PLANT_COLUMNS} <= {*sheet}:
        return None
    experiments, photos = sheet.groupby("plant_number")["experiment_id"].nunique(), sheet.groupby(PLANT_COLUMNS).size()
    return {
        "plant_numbers": len(experiments),
        "plant_numbers_in_several_experiments": (experiments > 1).sum(),
        "plants": len(photos),
        "max_images_per_plant": photos.max(),
    }


def correlations(sheet, target, least):
    """Pearson's r of the target with each other column of numbers; NaN where fewer than `least` rows have both."""
    columns = [*sheet.select_dtypes("number", exclude="timedelta")]
    r = {}
    for column in columns:
        if column != target:
            pair = sorted([column, target], key=columns.index)
            r[column] = sheet[pair].corr(min_periods=least).iloc[0, 1]
    return pd.Series(r, dtype=float)


def telling_columns(sheet, target):
    """Columns measured at harvest, or with |r| above 0.95 over ten rows or more, and their r."""
    r = correlations(sheet, target, 10)
    return {column: value for column, value in r.items() if column in HARVEST_COLUMNS or abs(value) > 0.95}


def line(text, found, shown=SHOWN):
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return f"{text} ({len(found)}): {'; '.join(short(item, 300) for item in found[:shown])}{more}"


def describe_audit(audit, num_records):
    """The audit as texts that carry its numbers."""
    facts, plants = audit["facts"], audit["facts"]["plants"]
    texts = [line(FAULTS[name], fault["found"]) for name, fault in audit["faults"].items() if fault["count"]]
    gaps = [
        f"{name} {share * num_records:.0f} ({share:.2%})" for name, share in facts["missing_share"].items() if share
    ]
    if gaps:
        texts.append(line(f"columns with empty cells in {num_records} rows", gaps, MOST_COLUMNS))
    if facts["weight_outliers_at_age"]:
        texts.append(line("weights beyond 1.5 IQR of the log weight at their age", facts["weight_outliers_at_age"]))
    if plants and plants["plant_numbers_in_several_experiments"]:
        texts.append(
            f"{plants['plant_numbers_in_several_experiments']} of {plants['plant_numbers']} plant numbers recur in "
            f"several experiments: experiment_id and plant_number together make {plants['plants']} plants"
        )
    if len(facts["photo_sizes"]) > 1:
        texts.append(line("photo sizes", [f"{size}: {n} photos" for size, n in facts["photo_sizes"].items()]))
    telling = [f"{name} r = {r:.2f}" for name, r in facts["columns_that_tell_the_answer"].items()]
    if telling:
        texts.append(line("columns that tell the answer, no model input", telling, MOST_COLUMNS))
    not_checked = [FAULTS[name] for name, fault in audit["faults"].items() if fault["count"] is None]
    return texts + [f"not checked, for want of a column of numbers: {text}" for text in not_checked]


# Baselines


def weighed_areas(sheet, photos, target):
    """Rows with a readable photo and a weight above zero: their indices, green areas and weights."""
    areas = sheet["filename"].map(photos["green_area"]).astype(float)
    usable = areas.notna() & (sheet[target] > 0)
    return sheet.index[usable], areas[usable].to_numpy(), sheet.loc[usable, target].to_numpy()


def fit_law(areas, grams):
    """Fit W = a * A^b on logarithms; return a, b, the smearing factor and the mean weight as a function of area.

    The exponential of a mean logarithm falls short of the mean weight; Duan (1983, JASA 78:605-610) multiplies by the
    mean exponential of the residuals. A photo without green has no logarithm: it is left out of the fit and weighs as
    much as the smallest area in it. Raises ValueError for fewer than two areas.
    """
    seen = areas > 0
    if np.unique(areas[seen]).size < 2:
        raise ValueError("fewer than two weighed photos differ in green area")
    log_area, log_grams = np.log(areas[seen]), np.log(grams[seen])
    b, log_a = np.polyfit(log_area, log_grams, 1)
    a, smearing = np.exp(log_a), np.exp(log_grams - log_a - b * log_area).mean()
    return a, b, smearing, lambda area: smearing * a * np.maximum(area, areas[seen].min()) ** b


def measure_baselines(sheet, photos, target, group_by, seed):
    """Errors in grams of the training mean and of the law of green area on held-out groups; None for too few."""
    from sklearn.metrics import r2_score, root_mean_squared_error  # here, as it takes a second that --help can spare
    from sklearn.model_selection import GroupKFold

    if not {*group_by} <= {*sheet}:
        return None
    rows, areas, grams = weighed_areas(sheet, photos, target)
    groups = sheet.loc[rows].groupby(group_by, dropna=False).ngroup().to_numpy()
    guesses = {"training_mean": np.empty_like(grams), "green_area_law": np.empty_like(grams)}
    try:  # GroupKFold and fit_law raise ValueError for too few groups and areas
        for train, held_out in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(areas, groups=groups):
            guesses["training_mean"][held_out] = grams[train].mean()
            guesses["green_area_law"][held_out] = fit_law(areas[train], grams[train])[-1](areas[held_out])
        a, b, smearing, _ = fit_law(areas, grams)
    except ValueError:
        return None
    if not all(np.isfinite(guess).all() for guess in guesses.values()):  # too steep a law
        return None
    scores = {
        name: {
            "rmse": root_mean_squared_error(grams, guess),
            "rmse_ci95": rmse_interval(guess - grams, groups, seed),
            "r2": r2_score(grams, guess),
        }
        for name, guess in guesses.items()
    }
    law = {"law": "smearing_factor * a * A^b", "a": a, "b": b, "smearing_factor": smearing}
    mask = f"excess green above {EXCESS_GREEN} (Woebbecke et al. 1995)"
    law |= {"area_unit": "share of the frame, 0..1", "mask": mask, "rows_without_green": (areas == 0).sum()}
    scores["green_area_law"] |= law
    how = f"{FOLDS}-fold cross-validation by {', '.join(group_by)}, scored over all held-out rows"
    return {"how": how, "rows": len(rows), "groups": len(set(groups)), **scores}


# Plots: each is named as its file and returns a figure; ValueError says why there is none


def readable(column):
    return column.replace("_", " ").capitalize() + (" (g)" if "weight" in column else "")


def plain_log(axis, low, high):
    """Make an axis logarithmic, labelled in plain numbers: at 1, 2, 5 unless it spans four decades."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def target_distribution(sheet, photos, args):
    weights = sheet[args.target].dropna()
    positive = weights[weights > 0]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    linear.hist(weights, bins=40, color="seagreen")
    linear.axvline(weights.mean(), color="black", label=f"mean {weights.mean():.4g}")
    linear.axvline(weights.median(), color="black", linestyle="--", label=f"median {weights.median():.4g}")
    linear.legend()
    linear.set_title(f"All weights, n = {len(weights)}")
    if len(positive):
        low, high = positive.min() / 1.1, positive.max() * 1.1
        logarithmic.hist(positive, bins=np.geomspace(low, high, 41), color="seagreen")
        plain_log(logarithmic.xaxis, low, high)
    logarithmic.set_title(f"Weights above zero on a log axis, n = {len(positive)}")
    for axes in (linear, logarithmic):
        axes.set(xlabel=readable(args.target), ylabel="rows")
    return figure


def sample_images(sheet, photos, args):
    rows = sheet[sheet["filename"].isin(photos.index[photos["problem"].isna()])].dropna(subset=args.target)
    if rows.empty:
        raise ValueError("no row has both a weight and a readable photo")
    rng = np.random.default_rng(args.seed)
    by_weight = rows.index[np.argsort(rows[args.target], kind="stable")]
    chosen = [rng.choice(part) for part in np.array_split(by_weight, min(12, len(rows)))]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    grid = figure.subplots(2, 6).ravel()
    for axes, row in zip(grid, chosen, strict=False):
        photo = open_again(args.image_dir / rows["filename"][row])
        photo.thumbnail((MOST_PIXELS_WIDE, MOST_PIXELS_WIDE))
        axes.imshow(photo)
        age = f", {rows['age_days'][row]:g} days" if has_numbers(rows, "age_days") else ""
        axes.set_title(f"row {row + 2}: {rows[args.target][row]:.4g} g{age.replace('nan days', 'no age')}", size=9)
    for axes in grid:
        axes.set_axis_off()
    figure.suptitle(f"{readable(args.target)}: {len(chosen)} photos over its range, drawn from n = {len(rows)}")
    return figure


def open_again(path):
    try:
        return open_photo(path)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"the photo {path} was replaced during the run ({fault_of(error)}): start it again") from error


def correlation_heatmap(sheet, photos, args):
    import seaborn  # here, as it takes a second that --help can spare

    numbers = sheet.select_dtypes("number", exclude="timedelta").loc[:, lambda columns: columns.nunique() > 1]
    if args.target not in numbers or numbers.shape[1] < 2:
        raise ValueError(f"it needs {args.target} and another column of numbers that vary")
    r = correlations(numbers, args.target, 1).sort_values(ascending=False, kind="stable")
    strongest = r.abs().nlargest(MOST_COLUMNS, keep="first").index if len(r) > MOST_COLUMNS else r.index
    order = r[r.index.isin(strongest)].index
    filled = numbers[[args.target, *order]].notna().astype(int)
    r, n = numbers[filled.columns].corr(min_periods=3).loc[order], (filled.T @ filled).loc[order]
    above = np.triu(np.ones(r.shape, dtype=bool), k=1)
    figure = Figure(figsize=(3 + 0.55 * len(order), 2 + 0.47 * len(order)), layout="constrained")
    axes = figure.subplots()
    style = {"cmap": "vlag", "vmin": -1, "vmax": 1, "linewidths": 0.5, "annot_kws": {"size": 7}, "fmt": ""}
    marked = [name + " *" * (name in HARVEST_COLUMNS) for name in r.columns]
    labels = {
        "xticklabels": marked[:-1],
        "yticklabels": marked[1:],
        "cbar_kws": {"label": "Pearson's r", "shrink": 0.6},
    }
    texts = (r.map("{:.2f}\n".format) + n.astype(str)).iloc[:, :-1]
    seaborn.heatmap(r.iloc[:, :-1], mask=above[:, :-1], annot=texts, ax=axes, **style, **labels)
    of_all = f", the strongest {len(order)} of {numbers.shape[1] - 1}" if len(order) < numbers.shape[1] - 1 else ""
    axes.set_title(
        f"Correlation, sorted by r with {args.target}{of_all}\nbelow each r its rows n; * measured at harvest"
    )
    return figure


def age_vs_biomass(sheet, photos, args):
    if not has_numbers(sheet, "age_days"):
        raise ValueError("the sheet has no column age_days with numbers")
    rows = sheet.dropna(subset="age_days")[lambda rows: rows[args.target] > 0]
    if rows.empty:
        raise ValueError("no row has both an age and a weight above zero")
    ages = rows["age_days"]
    if ages.nunique() > MOST_AGES:
        width = (ages.max() - ages.min()) / (MOST_AGES - 1)
        ages = (ages / width).round() * width
    by_age = dict(list(rows.groupby(ages)[args.target]))
    step = np.diff([*by_age]).min() if len(by_age) > 1 else 1
    jittered = rows["age_days"] + step * np.random.default_rng(args.seed).uniform(-0.25, 0.25, len(rows))
    figure = Figure(figsize=(11, 5), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    for axes in (linear, logarithmic):
        axes.scatter(jittered, rows[args.target], s=6, alpha=0.4, color="seagreen", linewidths=0)
        axes.boxplot([*by_age.values()], positions=[*by_age], widths=0.6 * step, showfliers=False)
        medians = [weights.median() for weights in by_age.values()]
        axes.plot([*by_age], medians, color="darkorange", marker="o", label="trend of the median")
        axes.set_xticks([*by_age], [f"{age:.4g}\nn = {len(weights)}" for age, weights in by_age.items()])
        axes.set(xlabel="age (days)", ylabel=readable(args.target))
        axes.legend(loc="upper left")
    plain_log(logarithmic.yaxis, rows[args.target].min(), rows[args.target].max())
    figure.suptitle(f"{readable(args.target)} by age, on a linear and a log axis, n = {len(rows)}")
    return figure


def image_pixel_analysis(sheet, photos, args):
    means = photos[CHANNELS].dropna()
    if means.empty:
        raise ValueError("no photo is readable")
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for channel in CHANNELS:
        label = f"{channel}, median {means[channel].median():.3f}"
        axes.hist(means[channel], bins=np.linspace(0, 1, 101), color=channel, alpha=0.4, label=label)
    axes.set(xlabel="mean intensity of the channel in a photo (0..1)", ylabel="photos", xlim=(0, 1))
    axes.set_title(f"Mean channel intensity per photo, n = {len(means)}")
    axes.legend()
    return figure


def green_area_vs_biomass(sheet, photos, args):
    _, areas, grams = weighed_areas(sheet, photos, args.target)
    a, b, smearing, law = fit_law(areas, grams)
    seen = areas > 0
    line = np.geomspace(areas[seen].min(), areas[seen].max(), 50)
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(areas[seen], grams[seen], s=8, alpha=0.4, color="seagreen", linewidths=0)
    axes.plot(line, law(line), color="black", label=f"W = {a:.4g} * A^{b:.3f}, times {smearing:.3f} (smearing)")
    plain_log(axes.xaxis, line[0], line[-1])
    plain_log(axes.yaxis, grams[seen].min(), grams[seen].max())
    axes.set(xlabel="green area A (share of the frame, 0..1)", ylabel=readable(args.target))
    axes.set_title(f"{readable(args.target)} by green area, n = {seen.sum()}; without green, not shown: {sum(~seen)}")
    axes.legend()
    return figure


FIGURES = (
    target_distribution,
    sample_images,
    correlation_heatmap,
    age_vs_biomass,
    image_pixel_analysis,
    green_area_vs_biomass,
)


# Output


def write_whole(path, content):
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free it and start again") from error


def write_figures(sheet, photos, args):
    """Draw and write each figure; say why one is left out."""
    for plot in FIGURES:
        path = figure_path(plot, args)
        try:
            content = draw(plot, sheet, photos, args)
        except ValueError as error:  # Matplotlib raises it too, for numbers that it cannot place on an axis
            logger.info(f"{path.name} left out: {one_line(error)}")
        else:
            write_whole(path, content)


def draw(plot, sheet, photos, args):
    """The figure as a PNG file, bytes."""
    content = io.BytesIO()
    plot(sheet, photos, args).savefig(content, format="png", dpi=120)
    if plot is sample_images:  # photos compress badly: a palette makes them a third of the size
        drawn, content = Image.open(content).convert("RGB"), io.BytesIO()
        drawn.quantize(256).save(content, "PNG", optimize=True)
    return content.getvalue()


def figure_path(plot, args):
    return args.figures_dir / f"{plot.__name__}.png"


def log_summary(summary, target):
    stats = {name: value for name, value in summary["fresh_weight_stats"].items() if value == value}
    logger.info(f"{summary['num_records']} rows, {summary['num_images_on_disk']} photos on disk")
    logger.info(f"{readable(target)}: " + ", ".join(f"{name} {value:.4g}" for name, value in stats.items()))
    logger.info("Audit")
    for issue in summary["data_quality_issues"]:
        logger.info(f"- {issue}")
    baselines = summary["baselines"]
    if baselines is None:
        needed = f"{FOLDS} plants (--group_by) with weighed photos of different green area"
        logger.info(f"Baselines: none; they need {needed}")
        return
    logger.info(f"Baselines: {baselines['how']}: {baselines['rows']} rows in {baselines['groups']} groups")
    for name in ("training_mean", "green_area_law"):
        score = baselines[name]
        logger.info(f"- {name.replace('_', ' ')}: RMSE {score['rmse']:.4f} g, R2 {score['r2']:.3f}")
    law = baselines["green_area_law"]
    formula = f"weight = {law['a']:.4g} * A^{law['b']:.3f}, times {law['smearing_factor']:.3f} (Duan's smearing)"
    logger.info(f"- the law: {formula}; A the green area, {law['area_unit']}")


# Command line


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shown = parser.add_argument, "default: %(default)s"
    add("--data_dir", type=Path, default=Path("infos/mlops_biomass_data"), help=shown)
    add("--labels_path", type=Path, help=".xlsx, .ods, .csv or .parquet; default: DATA_DIR/digital_biomass_labels.xlsx")
    add("--image_dir", type=Path, help="folder of PNG, JPEG, TIFF or WebP photos; default: DATA_DIR/images_med_res")
    add("--figures_dir", type=Path, default=Path("figures"), help=shown)
    add("--summary_path", type=Path, default=Path("results/eda_summary.json"), help=shown)
    add("--target", default="fresh_weight_total", help=f"column of the weight in grams; {shown}")
    groups = "columns whose values make the groups of the folds; default: plant_number"
    add("--group_by", nargs="+", default=DEFAULT_GROUP_BY, metavar="COLUMN", help=groups)
    add("--seed", type=int, default=42, help=f"of the sample photos, the jitter and the folds; {shown}")
    return parser


def check_arguments(args):
    """Fill in the paths that follow from --data_dir; raise UserError for what cannot be."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        draw = "draw sample data: `python make_sample_data.py`, then `--data_dir sample_data`"
        raise UserError(f"no data folder at {args.data_dir}; pass --data_dir, or {draw}")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"
    if not 0 <= args.seed < 2**32:
        raise UserError("--seed must be a whole number from 0 to 4294967295")


def check_outputs(args, names):
    """The files to write. Raises UserError for one that cannot be written, or would lie among the photos `names`."""
    outputs = [args.summary_path, *(figure_path(plot, args) for plot in FIGURES)]
    photos = {os.path.realpath(args.image_dir / name) for name in names if Path(name).name in {p.name for p in outputs}}
    for path in outputs:
        in_folder = path.suffix.lower() in PHOTO_SUFFIXES and path.parent.resolve() == args.image_dir.resolve()
        if in_folder or os.path.realpath(path) in photos:
            raise UserError(f"cannot write {path}: it would be one of the photos; choose another place for it")
    check_writable(outputs, [args.labels_path])
    return outputs


def explore(args):
    """The whole run, from the sheet to the summary."""
    check_arguments(args)
    folder = PhotoFolder(args.image_dir)
    folder.names()  # lists it once, for the names of the sheet and for the photos that no row names
    sheet, typed = load_labels(args.labels_path, args.target, args.group_by)
    sheet, not_found = find_photos(folder, sheet)
    found = {*sheet["filename"].dropna()} - {*not_found}
    with alone(check_outputs(args, found)):
        photos = scan_photos(folder, found)
        summary = summarize(sheet, photos, args.target)
        audit = audit_data(sheet, typed, photos, not_found, args.target)
        summary["data_quality_issues"] = describe_audit(audit, len(sheet))
        summary["audit"] = audit
        summary["baselines"] = measure_baselines(sheet, photos, args.target, args.group_by, args.seed)
        log_summary(summary, args.target)
        write_figures(sheet, photos, args)
        text = json.dumps(summary, default=np.generic.item)
        summary = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity are no JSON
        write_whole(args.summary_path, (json.dumps(summary, indent=2) + "\n").encode())


def main(argv=None):
    matplotlib.use("Agg")  # draws into files, with or without a screen
    matplotlib.rcParams["text.parse_math"] = False  # names of columns may hold dollar signs
    parser = build_parser()
    args = parser.parse_args(argv)
    until_now = signal.getsignal(signal.SIGINT)
    with logging_to_console(), warnings.catch_warnings():
        for noise in (RuntimeWarning, UserWarning):  # of the libraries on odd data, which the audit names
            warnings.simplefilter("ignore", noise)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            explore(args)
        except UserError as error:
            parser.error(str(error))
        except MemoryError:
            parser.error("the memory is full: close other programs, or look at fewer rows and photos")
        except OSError as error:
            parser.error(one_line(error))
        except KeyboardInterrupt:
            parser.exit(130, "eda.py: interrupted\n")
        finally:
            signal.signal(signal.SIGINT, until_now)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

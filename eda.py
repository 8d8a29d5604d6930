"""Look at plant photos and their label sheet before a model does: plots, an audit, and what green area alone tells.

    python eda.py                                    # the FarmBot data in infos/mlops_biomass_data
    python eda.py --data_dir sample_data             # data drawn by `python make_sample_data.py`
    python eda.py --labels_path leaves.csv --image_dir photos --target leaf_weight --group_by tray pot

Writes figures/target_distribution.png, sample_images.png, correlation_heatmap.png, age_vs_biomass.png,
               image_pixel_analysis.png, green_area_vs_biomass.png
       results/eda_summary.json: counts and statistics; `audit`: faults by row and file, and facts of the structure;
               `baselines`: the error in grams that a model has to beat
"""

import argparse
import difflib
import hashlib
import io
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from tqdm import tqdm

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg")
CHANNELS = ["red", "green", "blue"]
DEFAULT_GROUP_BY = ["plant_number"]  # as the study did
PLANT_COLUMNS = ["experiment_id", "plant_number"]  # plant numbers restart in every experiment
ID_COLUMNS = ["filename", "lab_book_page", *PLANT_COLUMNS]
# Measured at the harvest that gives the target, so no photo of a living plant comes with them
HARVEST_COLUMNS = ("fresh_weight_shoot", "fresh_weight_root", "dry_weight_shoot", "shoot_root_ratio_fresh")
# Soil has an excess green near 0. Orange light lacks blue and lifts the pale grains to 0.1 or 0.2; leaves keep 0.3 to
# 0.5 under it as under white light: one threshold between the two serves all experiments.
EXCESS_GREEN = 0.25
DARK = 60  # sum of the 8-bit channels below which the colour of a pixel is noise
FOLDS = 5
BOOTSTRAP_DRAWS = 2000
SHOWN = 5  # rows or files that one line of text names; the audit in the summary names all
FAULTS = {
    "text_weights": "weights written as text",
    "cells_not_numbers": "cells that are no number in a column of numbers",
    "negative_weights": "negative weights",
    "zero_weights": "weights of zero",
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


# Data


class UserError(Exception):
    """A mistake in the input that its one-line message tells how to mend."""


def read_sheet(path, target):
    """Read the label sheet: the first sheet of an .xlsx, or a .csv with commas or semicolons.

    Returns all rows that hold a value, `filename` as text without outer spaces, the other cells as they were typed.
    Raises UserError for a sheet that cannot be read and for a column that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no label sheet at {path}: pass --labels_path")
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig") as file:
                header = file.readline()
            sheet = pd.read_csv(path, sep=";" if header.count(";") > header.count(",") else ",", encoding="utf-8-sig")
        else:
            sheet = pd.read_excel(path, engine="calamine")
    except Exception as error:  # pandas, calamine and zipfile each raise their own
        raise UserError(f"cannot read {path} as a label sheet: {' '.join(str(error).split())}") from error
    sheet.columns = [str(name).strip() for name in sheet.columns]
    require_columns(sheet, ["filename", target], path)
    sheet = sheet.dropna(how="all")  # with its index, by which messages name the rows as a spreadsheet does
    sheet["filename"] = sheet["filename"].astype("string").str.strip()
    return sheet


def require_columns(sheet, columns, path):
    for column in columns:
        if column not in sheet.columns:
            nearest = difflib.get_close_matches(column, sheet.columns, n=1, cutoff=0.0)
            found = f"nearest: '{nearest[0]}'; found: {', '.join(sheet.columns)}" if nearest else "it is empty"
            raise UserError(f"{path} has no column '{column}'; {found}")


def to_numbers(cells):
    """Cells as floats: the text "0,25" is read as 0.25, what is no finite number becomes NaN."""
    if not pd.api.types.is_numeric_dtype(cells):
        text = cells.astype("string").str.strip().str.replace(",", ".", regex=False)
        cells = pd.to_numeric(text, errors="coerce")
    return cells.astype(float).replace([np.inf, -np.inf], np.nan)


def open_photo(path):
    """Open a photo as 8-bit RGB, turned upright by its EXIF tag, transparency laid over white."""
    with Image.open(path) as file:
        photo = ImageOps.exif_transpose(file)
    if photo.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
        photo = Image.fromarray((np.asarray(photo) / 257).astype(np.uint8))
    if photo.mode in ("LA", "PA", "RGBA") or "transparency" in photo.info:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def load_labels(path, target, group_by):
    """Return the sheet, and the same rows as they were typed, where a weight of text still shows.

    A column becomes one of numbers if more than half of its filled cells are numbers; ids stay as they are.
    """
    typed = read_sheet(path, target)
    sheet = typed.copy()
    sheet[target] = to_numbers(typed[target])
    if group_by != DEFAULT_GROUP_BY:
        require_columns(sheet, group_by, path)
    for column in sheet.columns.difference([*ID_COLUMNS, *group_by]):
        numbers = to_numbers(sheet[column])
        if numbers.count() > sheet[column].count() / 2:
            sheet[column] = numbers
    if sheet[target].count() == 0:
        raise UserError(f"no row of {path} has a number in '{target}'")
    return sheet, typed


def has_numbers(sheet, *columns):
    return all(column in sheet and pd.api.types.is_numeric_dtype(sheet[column]) for column in columns)


def scan_photos(folder, filenames):
    """Open once each photo of the folder and each that the sheet names; return what they tell, a row a file name."""
    names = {file.name for file in folder.iterdir() if file.suffix.lower() in PHOTO_SUFFIXES and file.name[0] != "."}
    names = sorted(names | {name for name in filenames.dropna() if (folder / name).is_file()})
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads do: Pillow, NumPy and hashlib release the interpreter
        looks = pool.map(look_at, [folder / name for name in names])
        looks = list(tqdm(looks, total=len(names), desc="photos", unit="photo", disable=None))
    return pd.DataFrame(looks, index=names, columns=["problem", "mode", "size", "digest", "green_area", *CHANNELS])


def look_at(path):
    """What one photo tells: mode, size, digest of its pixels, mean channels (0..1) and green area, or its problem."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            mode = file.mode
        photo = open_photo(io.BytesIO(content))
    except UnidentifiedImageError:  # its text holds a memory address
        return {"problem": "not an image" if content else "empty file"}
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return {"problem": str(error) or type(error).__name__}
    size = f"{photo.width}x{photo.height}"
    look = {"mode": mode, "size": size, "digest": hashlib.sha256(size.encode() + photo.tobytes()).hexdigest()}
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


def audit_data(sheet, typed, photos, target):
    """Return {"faults": {name: {count, found}}, "facts"}; rows are named by their number in Excel.

    A check that lacks a column of the sheet has found None.
    """
    filenames = sheet["filename"].fillna("no file name")
    names = pd.Series([f"row {row + 2} ({name})" for row, name in filenames.items()], sheet.index, dtype=object)
    found = weight_faults(sheet, typed, target, names) | row_faults(sheet, target, names)
    found |= photo_faults(sheet, photos, names)
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


def weight_faults(sheet, typed, target, names):
    weights, cells = sheet[target], typed[target]
    text = cells[cells.map(lambda cell: isinstance(cell, str)) & weights.notna()]
    if len(text) > weights.count() / 2:  # a CSV file, where all is text: the rarer decimal mark is the odd one
        commas, points = text.str.contains(",", regex=False), text.str.contains(".", regex=False)
        text = text[commas if commas.sum() < points.sum() else points]
    lost = [
        f"{names[row]}: {column} '{typed[column][row]}'"
        for column in sheet.columns.drop("filename")
        for row in sheet.index[sheet[column].isna() & typed[column].notna()]
    ]
    return {
        "text_weights": [f"{names[row]}: '{cell}' read as {weights[row]:g}" for row, cell in text.items()],
        "cells_not_numbers": lost,
        "negative_weights": [f"{names[row]}: {weight:g}" for row, weight in weights[weights < 0].items()],
        "zero_weights": [*names[weights == 0]],
    }


def wrong_totals(sheet, names):
    """Rows off by more than 1 mg and 1 %, which is more than rounding three weights explains."""
    if not has_numbers(sheet, "fresh_weight_total", "fresh_weight_shoot", "fresh_weight_root"):
        return None
    total, parts = sheet["fresh_weight_total"], sheet["fresh_weight_shoot"] + sheet["fresh_weight_root"]
    off = (total - parts).abs() > 0.001 + 0.01 * parts.abs()
    return [f"{names[row]}: {total[row]:g}, not {parts[row]:g}" for row in sheet.index[off]]


def row_faults(sheet, target, names):
    repeated, several = [], []
    for filename, rows in sheet[sheet["filename"].duplicated(keep=False)].groupby("filename"):
        for _, same in rows.groupby(target, dropna=False):
            repeated += [f"{names[row]} repeats row {same.index[0] + 2}" for row in same.index[1:]]
        weights = rows[target].dropna()
        if weights.nunique() > 1:
            several.append(f"{filename}: " + ", ".join(f"{weights[row]:g} in row {row + 2}" for row in weights.index))
    return {"rows_twice": repeated, "photos_with_several_weights": several}


def photo_faults(sheet, photos, names):
    listed, same = sheet["filename"].isin(photos.index), []
    for _, photo in photos[photos["digest"].duplicated(keep=False)].dropna(subset="digest").groupby("digest"):
        rows = sheet[sheet["filename"].isin(photo.index)]
        plants = len(rows[[column for column in PLANT_COLUMNS if column in sheet]].drop_duplicates())
        same.append(f"{' = '.join(photo.index)} (plants: {plants})")
    odd = photos["mode"].dropna().loc[lambda mode: mode != "RGB"]
    return {
        "missing_photos": [*names[~listed]],
        "unreadable_photos": [f"{name}: {problem}" for name, problem in photos["problem"].dropna().items()],
        "unused_photos": [*photos.index.difference(sheet["filename"].dropna())],
        "photos_not_rgb": [f"{name}: mode {mode}" for name, mode in odd.items()],
        "photos_under_several_names": sorted(same),
    }


def decreasing_ages(sheet, names):
    if not (has_numbers(sheet, "timestamp", "age_days") and {*PLANT_COLUMNS} <= {*sheet}):
        return None
    rows = sheet.sort_values("timestamp", kind="stable").dropna(subset=["timestamp", "age_days"])
    ages, step = rows["age_days"], rows.groupby(PLANT_COLUMNS)["age_days"].diff()
    return [f"{names[row]}: {ages[row]:g} days after {ages[row] - step[row]:g}" for row in rows.index[step < 0]]


def weight_outliers(sheet, target, names):
    """Weights whose log lies beyond 1.5 interquartile ranges of the quartiles at their age; None without ages."""
    if not has_numbers(sheet, "age_days"):
        return None
    rows = sheet[sheet[target] > 0].dropna(subset="age_days")
    logs, ages = np.log(rows[target]), rows["age_days"]
    low, high = (logs.groupby(ages).transform("quantile", q) for q in (0.25, 0.75))
    beyond = rows.index[(logs < low - 1.5 * (high - low)) | (logs > high + 1.5 * (high - low))]
    return [f"{names[row]}: {rows[target][row]:g} at {ages[row]:g} days" for row in beyond]


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


def telling_columns(sheet, target):
    """Columns measured at harvest, or with |r| above 0.95 over ten rows or more, and their r."""
    r = sheet.corr(numeric_only=True, min_periods=10)[target].drop(target)
    return {column: value for column, value in r.items() if column in HARVEST_COLUMNS or abs(value) > 0.95}


def describe_audit(audit, num_records):
    """The audit as texts that carry its numbers."""

    def line(text, found, shown=SHOWN):
        more = f" and {len(found) - shown} more" if len(found) > shown else ""
        return f"{text} ({len(found)}): {'; '.join(found[:shown])}{more}"

    facts, plants = audit["facts"], audit["facts"]["plants"]
    texts = [line(FAULTS[name], fault["found"]) for name, fault in audit["faults"].items() if fault["count"]]
    gaps = [
        f"{name} {share * num_records:.0f} ({share:.2%})" for name, share in facts["missing_share"].items() if share
    ]
    if gaps:
        texts.append(line(f"columns with empty cells in {num_records} rows", gaps, len(gaps)))
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
        texts.append(line("columns that tell the answer, no model input", telling, len(telling)))
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


def rmse_interval(errors, groups, seed):
    """95 % interval of the RMSE by a percentile bootstrap over groups, for photos of one plant err alike."""
    squares = pd.Series(np.square(errors)).groupby(groups).agg(["sum", "size"]).to_numpy()
    shares = np.full(len(squares), 1 / len(squares))
    total, rows = (np.random.default_rng(seed).multinomial(len(squares), shares, BOOTSTRAP_DRAWS) @ squares).T
    return np.percentile(np.sqrt(total / rows), [2.5, 97.5]).tolist()


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


# Plots: each is named as its file and returns a figure, or a text that says why there is none


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
        return "no row has both a weight and a readable photo"
    rng = np.random.default_rng(args.seed)
    by_weight = rows.index[np.argsort(rows[args.target], kind="stable")]
    chosen = [rng.choice(part) for part in np.array_split(by_weight, min(12, len(rows)))]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    grid = figure.subplots(2, 6).ravel()
    for axes, row in zip(grid, chosen, strict=False):
        axes.imshow(open_photo(args.image_dir / rows["filename"][row]))
        age = f", {rows['age_days'][row]:g} days" if has_numbers(rows, "age_days") else ""
        axes.set_title(f"row {row + 2}: {rows[args.target][row]:.4g} g{age.replace('nan days', 'no age')}", size=9)
    for axes in grid:
        axes.set_axis_off()
    figure.suptitle(f"{readable(args.target)}: {len(chosen)} photos over its range, drawn from n = {len(rows)}")
    return figure


def correlation_heatmap(sheet, photos, args):
    import seaborn  # here, as it takes a second that --help can spare

    numbers = sheet.select_dtypes("number").loc[:, lambda columns: columns.nunique() > 1]
    if args.target not in numbers or numbers.shape[1] < 2:
        return f"it needs {args.target} and another column of numbers that vary"
    order = numbers.corr()[args.target].drop(args.target).sort_values(ascending=False, kind="stable").index
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
    axes.set_title(f"Correlation, sorted by r with {args.target}\nbelow each r its rows n; * measured at harvest")
    return figure


def age_vs_biomass(sheet, photos, args):
    if not has_numbers(sheet, "age_days"):
        return "the sheet has no column age_days with numbers"
    rows = sheet.dropna(subset="age_days")[lambda rows: rows[args.target] > 0]
    if rows.empty:
        return "no row has both an age and a weight above zero"
    by_age = dict(list(rows.groupby("age_days")[args.target]))
    step = np.diff([*by_age]).min() if len(by_age) > 1 else 1
    jittered = rows["age_days"] + step * np.random.default_rng(args.seed).uniform(-0.25, 0.25, len(rows))
    figure = Figure(figsize=(11, 5), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    for axes in (linear, logarithmic):
        axes.scatter(jittered, rows[args.target], s=6, alpha=0.4, color="seagreen", linewidths=0)
        axes.boxplot([*by_age.values()], positions=[*by_age], widths=0.6 * step, showfliers=False)
        medians = [weights.median() for weights in by_age.values()]
        axes.plot([*by_age], medians, color="darkorange", marker="o", label="trend of the median")
        axes.set_xticks([*by_age], [f"{age:g}\nn = {len(weights)}" for age, weights in by_age.items()])
        axes.set(xlabel="age (days)", ylabel=readable(args.target))
        axes.legend(loc="upper left")
    plain_log(logarithmic.yaxis, rows[args.target].min(), rows[args.target].max())
    figure.suptitle(f"{readable(args.target)} by age, on a linear and a log axis, n = {len(rows)}")
    return figure


def image_pixel_analysis(sheet, photos, args):
    means = photos[CHANNELS].dropna()
    if means.empty:
        return "no photo is readable"
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
    try:
        a, b, smearing, law = fit_law(areas, grams)
    except ValueError as error:
        return str(error)
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


def check_writable(path):
    """Raise UserError if no file can come to lie at `path`, without leaving anything there."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {nearest}: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def write_whole(path, content):
    """Write beside the place and move over it, so that no half-written file ever lies there."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_figures(sheet, photos, args):
    """Draw and write each figure; print why one is left out. Returns the paths written."""
    written = []
    for plot in FIGURES:
        path = args.figures_dir / f"{plot.__name__}.png"
        figure = plot(sheet, photos, args)
        if isinstance(figure, str):
            print(f"{path.name} left out: {figure}")
            continue
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120)
        if plot is sample_images:  # photos compress badly: a palette makes them a third of the size
            drawn, content = Image.open(content).convert("RGB"), io.BytesIO()
            drawn.quantize(256).save(content, "PNG", optimize=True)
        write_whole(path, content.getvalue())
        written.append(path)
    return written


def print_summary(summary, target):
    stats = {name: value for name, value in summary["fresh_weight_stats"].items() if value is not None}
    print(f"{summary['num_records']} rows, {summary['num_images_on_disk']} photos on disk")
    print(f"{readable(target)}: " + ", ".join(f"{name} {value:.4g}" for name, value in stats.items()))
    print("Audit", *summary["data_quality_issues"], sep="\n- ")
    baselines = summary["baselines"]
    if baselines is None:
        print(f"Baselines: none; they need {FOLDS} plants (--group_by) with weighed photos of different green area")
        return
    print(f"Baselines: {baselines['how']}: {baselines['rows']} rows in {baselines['groups']} groups")
    for name in ("training_mean", "green_area_law"):
        print(f"- {name.replace('_', ' ')}: RMSE {baselines[name]['rmse']:.4f} g, R2 {baselines[name]['r2']:.3f}")
    law = baselines["green_area_law"]
    print(
        f"- the law: weight = {law['a']:.4g} * A^{law['b']:.3f}, times {law['smearing_factor']:.3f} (Duan's smearing)",
        end="",
    )
    print(f"; A the green area, {law['area_unit']}")


# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shown = parser.add_argument, "default: %(default)s"
    add("--data_dir", type=Path, default=Path("infos/mlops_biomass_data"), help=shown)
    add("--labels_path", type=Path, help=".xlsx or .csv; default: DATA_DIR/digital_biomass_labels.xlsx")
    add("--image_dir", type=Path, help="folder of PNG or JPEG photos; default: DATA_DIR/images_med_res")
    add("--figures_dir", type=Path, default=Path("figures"), help=shown)
    add("--summary_path", type=Path, default=Path("results/eda_summary.json"), help=shown)
    add("--target", default="fresh_weight_total", help=f"column of the weight in grams; {shown}")
    groups = "columns whose values make the groups of the folds; default: plant_number"
    add("--group_by", nargs="+", default=DEFAULT_GROUP_BY, metavar="COLUMN", help=groups)
    add("--seed", type=int, default=42, help=f"of the sample photos, the jitter and the folds; {shown}")
    return parser


def check_arguments(args):
    """Fill in the paths that follow from --data_dir; raise UserError for what cannot be read or written."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        draw = "draw sample data: `python make_sample_data.py`, then `--data_dir sample_data`"
        raise UserError(f"no data folder at {args.data_dir}; pass --data_dir, or {draw}")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"
    if not args.image_dir.is_dir():
        raise UserError(f"no image folder at {args.image_dir}; pass --image_dir")
    if not 0 <= args.seed < 2**32:
        raise UserError("--seed must be a whole number from 0 to 4294967295")
    for path in (args.summary_path, *(args.figures_dir / f"{plot.__name__}.png" for plot in FIGURES)):
        check_writable(path)


def main(argv=None):
    matplotlib.use("Agg")  # draws into files, with or without a screen
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        sheet, typed = load_labels(args.labels_path, args.target, args.group_by)
        photos = scan_photos(args.image_dir, sheet["filename"])
        summary = summarize(sheet, photos, args.target)
        audit = audit_data(sheet, typed, photos, args.target)
        summary["data_quality_issues"] = describe_audit(audit, len(sheet))
        summary["audit"] = audit
        summary["baselines"] = measure_baselines(sheet, photos, args.target, args.group_by, args.seed)
        text = json.dumps(summary, indent=2, default=np.generic.item)
        summary = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity are no JSON
        print_summary(summary, args.target)
        written = write_figures(sheet, photos, args)
        write_whole(args.summary_path, (json.dumps(summary, indent=2) + "\n").encode())
    except UserError as error:
        parser.error(str(error))
    print("Wrote", *written, args.summary_path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

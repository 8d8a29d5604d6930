"""Look at plant photos and their label sheet before a model does: plots, an audit, and what green area alone tells.

    python eda.py                                    # the FarmBot data in infos/mlops_biomass_data
    python eda.py --data_dir sample_data             # data drawn by `python make_sample_data.py`
    python eda.py --labels_path leaves.csv --image_dir photos --target leaf_weight --group_by tray pot

Writes figures/target_distribution.png, sample_images.png, correlation_heatmap.png, age_vs_biomass.png,
               image_pixel_analysis.png, green_area_vs_biomass.png
       results/eda_summary.json: statistics; `audit`, faults by row and file and facts of the structure; `baselines`,
               the errors that a model has to beat
"""

import os
import re
import signal
import sys

if __name__ == "__main__":  # before the libraries, which take seconds to load
    signal.signal(signal.SIGINT, lambda *_: (sys.stderr.write("eda.py: interrupted\n"), os._exit(130)))

import argparse
import difflib
import hashlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import seaborn
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError
from sklearn.model_selection import GroupKFold
from tqdm.contrib.concurrent import thread_map

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
PHOTO_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")  # not all of Pillow's: one of them starts Ghostscript
MOST_PIXELS = 89_000_000  # of a photo, what Pillow takes without a warning
MOST_BYTES = 2**28  # of a photo's file
HEADER_WITHIN = 20  # rows of a sheet in which the column names are looked for
DRAWN_MARK = "drawn_expected_weights.csv"  # make_sample_data.py leaves it beside its sheet: the data are drawn
CHANNELS = ["red", "green", "blue"]
PLANT = ["experiment_id", "plant_number"]  # plant numbers restart in every experiment
NUMBERS = ["timestamp", "age_days", "fresh_weight_total", "fresh_weight_shoot", "fresh_weight_root"]  # if absent, empty
# Soil has an excess green near 0. Orange light lacks blue and lifts the pale grains to 0.1 or 0.2; leaves keep 0.3 to
# 0.5 under it as under white light: one threshold between the two serves all experiments.
EXCESS_GREEN = 0.25
DARK = 60  # sum of the 8-bit channels below which the colour of a pixel is noise

logger = logging.getLogger("eda")


class UserError(Exception):
    """A mistake that its one-line message tells how to mend."""


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# From here to fault_of alike in train_model.py, on purpose: each script stands alone
def read_sheet(path, columns=()):
    """The rows of an .xlsx, .csv or .parquet sheet that hold anything; row + 2 is their number in a spreadsheet.

    The column names are in the row of `filename`, among the first twenty. `filename` is text without outer spaces,
    other cells are as typed. Raises UserError for an unreadable sheet and a column that is not there once.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no label sheet at {path}: pass --labels_path with a file")
    try:
        cells = read_cells(path)
    except Exception as error:  # pandas, calamine and pyarrow raise their own
        raise UserError(f"cannot read {path} as .xlsx, .csv or .parquet ({one_line(error)}): save it anew") from error
    top = cells.head(HEADER_WITHIN).astype("string").apply(lambda column: column.str.strip())
    header = next((row for row in top.index if top.loc[row].eq("filename").any()), 0)
    names = top.loc[header].fillna("").tolist() if len(top) else []
    for name in ("filename", *columns):
        if names.count(name) != 1:
            nearest = "".join(f"; nearest: '{near}'" for near in difflib.get_close_matches(name, names, 1, 0))
            fault = f"has several columns '{name}'" if name in names else f"has no column '{name}'{nearest}"
            raise UserError(f"{path} {fault}; rename one of its columns: {', '.join(filter(None, names[:30]))}")
    first = [bool(name) and name not in names[:place] for place, name in enumerate(names)]
    sheet = cells.loc[header + 1 :].set_axis(names, axis=1).loc[:, first].dropna(how="all")
    sheet = sheet.set_axis(sheet.index - 1).infer_objects()
    return sheet.assign(filename=sheet["filename"].astype("string").str.strip().replace("", pd.NA))


def read_cells(path):
    """All cells of a sheet, its column names among them, as a table of numbered rows and columns."""
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        table = pd.read_parquet(io.BytesIO(content))
        return pd.concat([pd.DataFrame([list(table)], columns=table.columns), table], ignore_index=True)
    if content.startswith((b"PK", b"\xd0\xcf\x11\xe0")):  # Excel's formats, the old ones as refused by calamine
        return pd.read_excel(io.BytesIO(content), header=None, engine="calamine")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise ValueError("it is neither a spreadsheet nor text")
    lines = text.splitlines()
    title = next((line for line in lines[:HEADER_WITHIN] if "filename" in line), "")
    mark = max(",;\t", key=title.count)
    width = max((line.count(mark) for line in lines), default=0) + 1
    cells = pd.read_csv(io.StringIO(text), sep=mark, header=None, names=range(width), dtype=str, skip_blank_lines=False)
    beyond = cells.iloc[:, title.count(mark) + 1 :].notna().any(axis=1)  # say an unquoted 0,25 between commas
    if title and beyond.any():
        raise ValueError(f"row {beyond.idxmax() + 1} has more cells than there are columns, put '{mark}' in quotes")
    return cells


def to_numbers(cells):
    """Cells as floats: "0,25" is 0.25, a date its Unix seconds; what is no number, or beyond float32, is NaN."""
    if pd.api.types.is_datetime64_any_dtype(cells):
        cells = (pd.to_datetime(cells, utc=True) - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    elif not pd.api.types.is_numeric_dtype(cells):
        cells = pd.to_numeric(cells.astype("string").str.strip().str.replace(",", ".", regex=False), errors="coerce")
    numbers = cells.astype(float)
    return numbers.where(numbers.abs() <= np.finfo(np.float32).max)


def to_ids(cells):
    """Cells as ids: 12, "12 ", "012" and 12.0 are the same id, whatever else the column holds."""
    text = cells.astype("string").str.strip().replace("", pd.NA)
    return text.str.replace(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", regex=True)


def find_photos(names, folder):
    """Path and fault ("" if none) of each photo that a sheet names; letter case may differ, no path leaves `folder`."""
    if not Path(folder).is_dir():
        raise UserError(f"no image folder at {folder}: pass --image_dir with the folder of the photos")
    root, spelled = os.path.realpath(folder), {}
    for parent, _, files in os.walk(root):
        for file in files:
            name = os.path.relpath(os.path.join(parent, file), root).replace(os.sep, "/")
            spelled.setdefault(name.casefold(), []).append(name)
    found = []
    for name in names:
        wanted = os.path.normpath(str(name).replace("\\", "/")).replace(os.sep, "/")
        same = spelled.get(wanted.casefold(), [])
        same = [wanted] if wanted in same else same
        path = os.path.join(root, same[0] if len(same) == 1 else os.path.basename(wanted))
        inside = os.path.realpath(path).startswith(os.path.join(root, ""))
        fault = "" if len(same) == 1 else "several files of this name" if same else "no such file"
        outside = not inside or wanted.startswith(("/", "..")) or wanted[1:2] == ":"
        found.append((path, "leads out of the image folder" if outside else fault))
    return found


def read_photo(path):
    """Bytes of a photo's file. Raises OSError where it cannot be read, ValueError where it is no file for a photo."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError("it is no ordinary file")  # a pipe would be waited for
    if not 0 < os.path.getsize(path) <= MOST_BYTES:
        raise ValueError(f"its file is empty or larger than {MOST_BYTES // 2**20} MiB")
    return Path(path).read_bytes()


def open_photo(content):
    """A photo from its path or bytes as 8-bit RGB, turned upright by its EXIF tag, transparency laid over white."""
    content = content if isinstance(content, bytes) else read_photo(content)
    with Image.open(io.BytesIO(content), formats=PHOTO_FORMATS) as file:
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS / 1e6:.0f} million pixels; make it smaller")
        photo = ImageOps.exif_transpose(file)
        if photo.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
            photo = Image.fromarray((np.asarray(photo) / 257).clip(0, 255).astype(np.uint8))
        if photo.mode in ("LA", "PA", "RGBA") or "transparency" in photo.info:
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
        return photo.convert("RGB")


def fault_of(error):
    """What is wrong with a photo, in a few words without its path."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text holds a memory address
        return "unreadable photo (it is no photo)"
    return f"unreadable photo ({getattr(error, 'strerror', None) or one_line(error)})"


def load_labels(path, folder, target, group_by):
    """The sheet with numbers and ids in its cells and names as in the folder, the same as typed, each photo's fault."""
    typed = read_sheet(path, sorted({target, *group_by} - {"plant_number"}))
    typed = typed.reindex(columns=[*dict.fromkeys([*typed, *PLANT, *NUMBERS])])
    sheet, found = typed.copy(), find_photos(typed["filename"], folder)
    sheet["filename"] = [None if fault else os.path.relpath(path, os.path.realpath(folder)) for path, fault in found]
    for column in typed.columns.drop("filename"):
        is_id = column in [*PLANT, *group_by]
        cells = to_ids(typed[column]) if is_id else typed[column]
        numbers = to_numbers(cells)
        fits = numbers.nunique() == cells.nunique() if is_id else numbers.count() > cells.count() / 2
        sheet[column] = numbers if fits or column in [target, *NUMBERS] else cells
    if target == "filename" or not sheet[target].count():
        raise UserError(f"no row of {path} has a number in '{target}': name the column of the weights by --target")
    return sheet, typed, pd.Series([fault for _, fault in found], typed.index)


def scan_photos(named, folder):
    """Open once each photo that is named or in the folder, by threads, as Pillow releases the interpreter."""
    own = [name for name in os.listdir(folder) if name.lower().endswith(PHOTO_SUFFIXES) and name[0] != "."]
    names = sorted({*named.dropna(), *(name for name in own if (folder / name).is_file())})
    looks = thread_map(look_at, [folder / name for name in names], desc="photos", unit="photo", disable=None)
    columns = ["problem", "mode", "size", "digest", "green_area", *CHANNELS]
    return pd.DataFrame(looks, index=pd.Index(names, dtype=object), columns=columns)


def look_at(path):
    """What one photo tells: mode, size, digest of its pixels, green area and mean channels (0..1), or its problem."""
    try:
        content = read_photo(path)
        photo, mode = open_photo(content), Image.open(io.BytesIO(content)).mode
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return {"problem": fault_of(error)}
    size = f"{photo.width}x{photo.height}"
    digest = hashlib.sha256(size.encode() + photo.tobytes()).hexdigest()
    means = dict(zip(CHANNELS, np.array(ImageStat.Stat(photo).mean) / 255, strict=True))
    return {"mode": mode, "size": size, "digest": digest, "green_area": green_area(photo)} | means


def green_area(photo):
    """Projected plant area as a share of the frame (0..1), by excess green 2g - r - b on chromatic coordinates,
    r + g + b = 1, where it equals 3g - 1 (Woebbecke et al. 1995, Trans. ASAE 38(1):259-269).
    """
    coarse = photo.reduce(2)  # means of 2 x 2 pixels, for single grains of soil are coloured at random
    red, green, blue = (np.asarray(channel, dtype=np.float32) for channel in coarse.split())
    total = red + green + blue
    return float(np.mean((3 * green - total > EXCESS_GREEN * total) & (total > DARK)))


def name_rows(typed, rows, *columns):
    """Name rows by their number in a spreadsheet, their photo, and what was typed into the columns."""
    found = typed.loc[rows, ["filename", *columns]].astype(object).itertuples(name=None)
    return [f"row {row + 2} ({name}): {', '.join(map(str, cells))}" for row, name, *cells in found]


def find_faults(sheet, typed, missing, photos, target):
    weights, names = sheet[target], sheet["filename"]
    text = typed[target].map(lambda cell: isinstance(cell, str)) & weights.notna()
    lost = ((column, sheet[column].isna() & typed[column].notna()) for column in typed.columns.drop("filename"))
    total, shoot, root = (sheet[column] for column in NUMBERS[2:])
    off = (total - shoot - root).abs() > 0.001 + 0.01 * total.abs()  # more than rounding three weights explains
    modes, twins = photos["mode"].dropna(), photos["digest"].dropna()[lambda digests: digests.duplicated(keep=False)]
    return {
        "text_weights": name_rows(typed, text & (text.mean() < 0.5), target),  # in a CSV file all cells are text
        "cells_not_numbers": [f"{name} in {column}" for column, at in lost for name in name_rows(typed, at, column)],
        "negative_weights": name_rows(typed, weights < 0, target),
        "wrong_totals": name_rows(typed, off, *NUMBERS[2:]),
        "rows_twice": name_rows(typed, names.notna() & sheet.duplicated(["filename", target]), target),
        "photos_with_several_weights": name_rows(typed, weights.groupby(names).transform("nunique") > 1, target),
        "missing_photos": name_rows(typed.assign(fault=missing), missing != "", "fault"),
        "unreadable_photos": [f"{name}: {problem}" for name, problem in photos["problem"].dropna().items()],
        "unused_photos": [*photos.index.difference(names.dropna())],
        "photos_not_rgb": [f"{name}: mode {mode}" for name, mode in modes[modes != "RGB"].items()],
        "photos_under_several_names": [" = ".join(same) for same in twins.index.groupby(twins).values()],
    }


def summarize(sheet, typed, missing, photos, target):
    """Statistics and audit, in which a fault wants mending and a fact wants knowing; shares are fractions."""
    weights, times, photos_per_number = sheet[target], sheet["timestamp"], sheet["plant_number"].value_counts()
    experiments = sheet.groupby("plant_number")["experiment_id"].nunique()
    plants = {"numbers": len(experiments), "in_several_experiments": (experiments > 1).sum()}
    r, empty = sheet.select_dtypes("number").corr(min_periods=10)[target].drop(target), sheet.isna().mean()
    facts = {
        "missing_share": empty[empty > 0].to_dict(),
        "photo_sizes": photos["size"].value_counts().to_dict(),
        "plants": plants | {"by_experiment_and_number": sheet.groupby(PLANT).ngroups},
        "columns_that_tell_the_answer": r[r.index.str.contains("weight|shoot|root") | (r.abs() > 0.95)].to_dict(),
    }
    faults = find_faults(sheet, typed, missing, photos, target)
    counted = {name: {"count": len(found), "found": found} for name, found in faults.items()}
    return {
        "num_records": len(sheet),
        "num_images_on_disk": len(photos),
        "num_labeled": weights.count(),
        "pct_labeled": weights.notna().mean(),
        "fresh_weight_stats": weights.describe().to_dict() | {"count": weights.count()},
        "age_missing_pct": sheet["age_days"].isna().mean(),
        "target_missing_pct": weights.isna().mean(),
        "plants_with_multiple_samples": (photos_per_number > 1).sum(),
        "max_images_per_plant": photos_per_number.max(),
        "timestamp_span_days": (times.max() - times.min()) / 86400,
        "data_quality_issues": [*describe(faults), *describe(facts)],
        "audit": {"faults": counted, "facts": facts},
    }


def describe(audit):
    """A line of text for each fault or fact."""
    for name, found in audit.items():
        shown = [f"{key} {value:.4g}" for key, value in found.items()] if isinstance(found, dict) else found[:5]
        more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        if found:
            yield f"{name.replace('_', ' ')} ({len(found)}): {'; '.join(shown)}{more}"


def fit_law(areas, grams):
    """Fit W = a * A^b on logarithms; return its numbers, and the mean weight as a function of area.

    The exponential of a mean logarithm falls short of the mean weight; Duan (1983, JASA 78:605-610) multiplies by the
    mean exponential of the residuals. A photo without green is left out and weighs as much as the smallest area.
    """
    seen = areas > 0
    log_area, log_grams = np.log(areas[seen]), np.log(grams[seen])
    b, log_a = np.polyfit(log_area, log_grams, 1)
    a, smearing = np.exp(log_a), np.exp(log_grams - log_a - b * log_area).mean()
    law = {"law": "smearing_factor * a * A^b", "a": a, "b": b, "smearing_factor": smearing}
    return law, lambda area: smearing * a * np.maximum(area, areas[seen].min()) ** b


def measure_baselines(sheet, target, group_by, seed):
    """Errors of the training mean and of the law of green area on held-out groups; None for too few."""
    rows = sheet[sheet[target] > 0].dropna(subset="photo_green_area")
    areas, grams = rows["photo_green_area"].to_numpy(), rows[target].to_numpy()
    groups = rows.groupby(group_by, dropna=False).ngroup()
    guesses = {"training_mean": np.empty_like(grams), "green_area_law": np.empty_like(grams)}
    try:
        for train, held_out in GroupKFold(5, shuffle=True, random_state=seed).split(areas, groups=groups):
            guesses["training_mean"][held_out] = grams[train].mean()
            guesses["green_area_law"][held_out] = fit_law(areas[train], grams[train])[1](areas[held_out])
    except (TypeError, ValueError):  # of GroupKFold for too few groups, of polyfit for too few areas
        return None
    how, count = f"5-fold cross-validation by {', '.join(group_by)}, scored over all held-out rows", groups.nunique()
    baselines = {"how": how, "rows": len(rows), "groups": count}
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), 2000)
    for name, guess in guesses.items():  # the bootstrap draws groups, as the rows of a group err alike
        squares = ((guess - rows[target]) ** 2).groupby(groups).agg(["sum", "size"]).to_numpy()
        sums, sizes = (drawn @ squares).T
        mse, interval = squares[:, 0].sum() / len(rows), np.percentile(np.sqrt(sums / sizes), [2.5, 97.5])
        rmse = f"RMSE {mse**0.5:.4f} {unit_of(target)}".rstrip()
        logger.info(f"{name.replace('_', ' ')}: {rmse}, R2 {1 - mse / grams.var():.3f}")
        baselines[name] = {"rmse": mse**0.5, "rmse_ci95": interval.tolist(), "r2": 1 - mse / grams.var()}
    baselines["green_area_law"] |= fit_law(areas, grams)[0] | {"rows_without_green": (areas == 0).sum()}
    return baselines


def unit_of(target):
    """Unit of the target: weights are in grams unless their name ends otherwise; of other columns it is not known."""
    other = re.search(r"(\b|_)([mku]g|ratio|percent)\W*$", target.lower())
    return "g" if "weight" in target.lower() and not other else ""


def target_distribution(figure, sheet, photos, args):
    weights = sheet[args.target].dropna().rename(args.label)
    linear, logarithmic = figure.subplots(1, 2)
    seaborn.histplot(weights, bins=40, color="seagreen", ax=linear)
    middle = f"mean {weights.mean():.4g}, median {weights.median():.4g} {unit_of(args.target)}".rstrip()
    linear.set(title=f"n = {len(weights)}, {middle}", ylabel="rows")
    seaborn.histplot(weights[weights > 0], bins=40, color="seagreen", log_scale=True, ax=logarithmic)
    logarithmic.set(title=f"n = {(weights > 0).sum()} above zero, on a log axis", ylabel="rows")


def sample_images(figure, sheet, photos, args):
    rows = sheet[sheet["filename"].isin(photos.index[photos["problem"].isna()])].dropna(subset=args.target)
    parts = np.array_split(rows.sort_values(args.target, kind="stable").index, 12)
    rng = np.random.default_rng(args.seed)
    figure.suptitle(f"{args.label}: photos over its range, chosen from n = {len(rows)}")
    for axes, part in zip(figure.subplots(3, 4).flat, parts, strict=True):
        axes.set_axis_off()
        for row in rng.choice(part, min(1, len(part))):
            axes.imshow(ImageOps.contain(open_photo(args.image_dir / rows["filename"][row]), (256, 256)))
            age = f"{rows['age_days'][row]:g} days".replace("nan days", "no age")
            axes.set_title(f"row {row + 2}: {rows[args.target][row]:.4g} {unit_of(args.target)}, {age}", size=8)


def correlation_heatmap(figure, sheet, photos, args):
    figure.set_figheight(6)
    r = sheet.select_dtypes("number").corr(min_periods=3)
    strongest = r[args.target].abs().nlargest(21).index  # the target itself and twenty others
    order = r.loc[strongest, args.target].sort_values(ascending=False).index
    r, counts, axes = r.loc[order[1:], order[:-1]], sheet[order].count(), figure.subplots()
    style = {"cmap": "vlag", "vmin": -1, "vmax": 1, "cbar": False, "annot_kws": {"size": 6}, "linewidths": 0.5}
    seaborn.heatmap(r, mask=np.triu(np.ones(r.shape), 1) > 0, annot=True, fmt=".2f", ax=axes, **style)
    axes.set_title(f"Pearson's r, sorted by r with {args.target}, n = {counts.min()} to {counts.max()} a column")


def age_vs_biomass(figure, sheet, photos, args):
    rows = sheet.dropna(subset="age_days")[lambda rows: rows[args.target] > 0]
    rows["week"] = (rows["age_days"] / 7).round() * 7
    jittered = rows["age_days"] + np.random.default_rng(args.seed).uniform(-1.5, 1.5, len(rows))
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        axes.scatter(jittered, rows[args.target], s=4, alpha=0.4, color="seagreen", linewidths=0)
        seaborn.boxplot(rows, x="week", y=args.target, ax=axes, native_scale=True, fill=False, fliersize=0, color="k")
        axes.plot(rows.groupby("week")[args.target].median(), color="darkorange", marker="o", label="median")
        sizes = rows["week"].value_counts()
        axes.set_xticks(sizes.index, [f"{week:g}\nn = {n}" for week, n in sizes.items()])
        axes.set(xlabel="age, to the week (days)", ylabel=args.label, yscale=scale)
        axes.legend(loc="upper left")
    figure.suptitle(f"{args.label} by age on a linear and a log axis, n = {len(rows)} with both; boxes: quartiles")


def image_pixel_analysis(figure, sheet, photos, args):
    figure.suptitle(f"Mean channel intensity per photo, n = {photos['red'].count()}")
    for axes, channel in zip(figure.subplots(3, 1, sharex=True, sharey=True), CHANNELS, strict=True):
        seaborn.histplot(photos[channel].dropna(), binwidth=0.01, binrange=(0, 1), color=channel, ax=axes)
        axes.set(title=f"{channel}, median {photos[channel].median():.3f}", xlim=(0, 1), ylabel="photos")
    axes.set_xlabel("mean intensity of the channel in a photo (0..1)")


def green_area_vs_biomass(figure, sheet, photos, args):
    rows, axes = sheet[(sheet[args.target] > 0) & (sheet["photo_green_area"] > 0)], figure.subplots()
    areas, grams = rows["photo_green_area"].sort_values(), rows[args.target]
    law, weight_of = fit_law(areas, grams[areas.index])
    axes.scatter(areas, grams[areas.index], s=6, alpha=0.4, color="seagreen", linewidths=0)
    axes.plot(areas, weight_of(areas), color="black")
    axes.set(xscale="log", yscale="log", xlabel="green area A (share of the frame, 0..1)", ylabel=args.label)
    formula = f"{law['smearing_factor'] * law['a']:.4g} * A^{law['b']:.3f}"
    axes.set_title(f"{args.label} by green area, n = {len(rows)} with any green; line: {formula}")


FIGURES = [target_distribution, sample_images, correlation_heatmap]
FIGURES += [age_vs_biomass, image_pixel_analysis, green_area_vs_biomass]


def write_whole(path, content):
    """Write bytes beside `path`, then move them over it: a full disk or Ctrl-C leaves no half of a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    logger.info(f"wrote {path}")


def write_figure(plot, sheet, photos, drawn, args):
    figure, content = matplotlib.figure.Figure(figsize=(6.5, 4.4), layout="constrained"), io.BytesIO()
    try:
        plot(figure, sheet, photos, args)
        figure.supxlabel(drawn, size=6, color="gray", x=0.99, ha="right")
        figure.savefig(content, dpi=130)
    except (KeyError, TypeError, ValueError) as error:  # for want of rows or columns, or by numbers beyond any axis
        logger.info(f"{plot.__name__}.png left out, the data do not suffice: {one_line(error)}")
        return
    picture = Image.open(content).convert("RGB").quantize(128)  # a palette makes photos a third of the size
    picture.save(content := io.BytesIO(), "PNG", optimize=True, dpi=(130, 130))
    write_whole(args.figures_dir / f"{plot.__name__}.png", content.getvalue())


def parse_arguments(argv):
    parser = argparse.ArgumentParser("eda.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = stop  # in one line, without the usage before it
    add, shown = parser.add_argument, "default: %(default)s"
    add("--data_dir", type=Path, default=Path("infos/mlops_biomass_data"), help=shown)
    add("--labels_path", type=Path, help=".xlsx, .csv or .parquet; default: DATA_DIR/digital_biomass_labels.xlsx")
    add("--image_dir", type=Path, help="folder of the photos; default: DATA_DIR/images_med_res")
    add("--figures_dir", type=Path, default=Path("figures"), help=shown)
    add("--summary_path", type=Path, default=Path("results/eda_summary.json"), help=shown)
    add("--target", default="fresh_weight_total", help=f"column of the weight; {shown}")
    add("--group_by", nargs="+", default=["plant_number"], help="columns that make the groups of the folds; " + shown)
    add("--seed", type=int, default=42, help=f"of the sample photos, the jitter and the folds; {shown}")
    args = parser.parse_args(argv)
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"
    args.label = f"{args.target.replace('_', ' ')} ({unit_of(args.target)})".removesuffix(" ()")
    if not 0 <= args.seed < 2**32:
        stop("--seed must be a whole number from 0 to 4294967295")
    return args


def check_outputs(args):
    taken = args.labels_path.resolve(), args.image_dir.resolve()
    for path in [args.summary_path, *(args.figures_dir / f"{plot.__name__}.png" for plot in FIGURES)]:
        if path.is_dir() or path.resolve() in taken or path.resolve().parent in taken:
            raise UserError(f"cannot write {path}: it is a folder, the label sheet, or among the photos")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # fails now, not after the photos


def stop(message):
    sys.stderr.write(f"eda.py: error: {one_line(message)}\n")
    raise SystemExit(2)


def main(argv=None):
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout, force=True)
    logging.raiseExceptions = False  # a console that was closed, as by `| head`, is no reason for tracebacks
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 9, "figure.titlesize": 10})
    warnings.simplefilter("ignore")  # of the libraries on odd data, which the audit names
    try:
        sheet, typed, missing = load_labels(args.labels_path, args.image_dir, args.target, args.group_by)
        check_outputs(args)
        photos = scan_photos(sheet["filename"], args.image_dir)
        drawn = "drawn data, not measured" if (args.labels_path.parent / DRAWN_MARK).is_file() else ""
        summary = summarize(sheet, typed, missing, photos, args.target)
        logger.info("\n- ".join([f"{len(sheet)} rows, {len(photos)} photos {drawn}", *summary["data_quality_issues"]]))
        sheet["photo_green_area"] = sheet["filename"].map(photos["green_area"]).astype(float)
        baselines = measure_baselines(sheet, args.target, args.group_by, args.seed)
        summary |= {"baselines": baselines, "drawn_data": bool(drawn)}
        for plot in FIGURES:
            write_figure(plot, sheet, photos, drawn, args)
        summary = json.loads(json.dumps(summary, default=np.generic.item), parse_constant=lambda nan: None)
        write_whole(args.summary_path, (json.dumps(summary, indent=2) + "\n").encode())
    except (UserError, OSError) as error:
        stop(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

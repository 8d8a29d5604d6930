"""Train a model that predicts a plant's fresh weight in grams from its photo, and judge it on plants it never saw.

    python train_model.py                                             the study's defaults: 20 epochs, frozen ResNet18
    python train_model.py --epochs 2 --batch_size 16 --learning_rate 5e-4 \\
        --model_out models/resnet18_biomass.pt --freeze_backbone      the study's documented run
    python train_model.py --folds 5                                   every photo predicted once, by cross-validation
    python train_model.py --data_dir sample_data --weights none       on drawn data, without ImageNet weights

Reads  DATA_DIR/digital_biomass_labels.xlsx and the photos in DATA_DIR/images_med_res.
Writes models/biomass_resnet.pt (the model), training.log (what happened), and in results/: metrics.txt (JSON),
       history.csv, predictions.csv, training_curves.png, predictions.png, worst_predictions.png.

The way of the data: sheet -> load_labels -> filter_missing_images -> split_by_plant -> BiomassDataset -> backbone
-> head -> grams -> report. A frozen backbone sees each photo once: its features are kept in .feature_cache.
"""

import argparse
import collections
import contextlib
import copy
import difflib
import io
import itertools
import logging
import math
import os
import sys
import tempfile
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from feature_store import FeatureStore, digest
from report import (
    RESULT_FILES,
    describe_run,
    log_result,
    log_run,
    logging_to_console,
    open_log,
    summarize,
    unit_of,
    whole_file,
    write_report,
)

BACKBONES = ["resnet18", "resnet34", "resnet50"]
IMAGE_SIZE = 224  # pixels a side, what the ImageNet weights were trained on
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of torchvision's ImageNet weights, per channel, of intensities 0..1
IMAGENET_STD = [0.229, 0.224, 0.225]
FLIP, DEGREES, BRIGHTNESS, CONTRAST, SATURATION = 0.5, 10, 0.2, 0.2, 0.1  # the study's augmentation
RESERVED = {"fold", "measured", "predicted", "error", "training_mean"}  # names of columns that are added
SAVE_EVERY = 30  # seconds between two checkpoints of a running training
PREPROCESSING = 1  # raise it when open_photo, augment or normalize change: features kept before are then not found
EXTRACTION_BATCH = {"cpu": 16, "mps": 64, "cuda": 256}  # photos a forward pass; larger gains nothing, costs memory

logger = logging.getLogger("train_model")


# ---------------------------------------------------------------- data


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


def load_labels(labels_path, target, group_by):
    """The rows to learn from: file name, target and the columns that make a plant, with `_plant` numbering the plants.

    Rows without a target, weights that are not positive and rows entered twice are dropped; so are all rows of a photo
    with two different targets, because nothing tells which one holds. The log says how many and which.
    """
    for name in {target, *group_by} & RESERVED:
        raise UserError(f"the column '{name}' has the name of an output column: rename it in the sheet")
    sheet = read_sheet(labels_path, target)
    require_columns(sheet, group_by, labels_path)
    labels = sheet[list(dict.fromkeys(["filename", target, *group_by]))].copy()
    labels[target] = to_numbers(sheet[target])
    labels["_plant"] = number_plants(labels[group_by])
    labels = drop_rows(labels, labels["filename"].isna(), "without a file name")
    typed = sheet.loc[labels.index, target]
    labels = drop_rows(labels, typed.notna() & labels[target].isna(), f"whose {target} is no number")
    labels = drop_rows(labels, labels[target].isna(), f"without {target}", name_them=False)
    if unit_of(target) == "g":
        labels = drop_rows(labels, labels[target] <= 0, f"with {target} not above 0 g")
    labels = drop_rows(labels, labels.duplicated(["filename", target]), "that repeat an earlier row")
    labels = drop_rows(labels, labels.duplicated("filename", keep=False), f"of a photo with several {target}")
    if labels.empty:
        raise UserError(f"no row of {labels_path} has a file name and a number in '{target}': nothing to train on")
    unknown = int(labels[group_by].isna().any(axis=1).sum())
    if unknown:
        logger.info(f"{unknown:,} rows without {' + '.join(group_by)}: kept together as one plant")
    return labels


def drop_rows(labels, bad, what, name_them=True, reasons=None):
    """`labels` without the `bad` rows, which the log counts and names as a spreadsheet numbers them."""
    if bad.any():
        names = [f"row {row + 2} ({name})" for row, name in labels.loc[bad, "filename"].items()]
        if reasons is not None:
            names = [f"{name} {reason}" for name, reason in zip(names, reasons[bad], strict=True)]
        logger.info(f"dropped {bad.sum():,} rows {what}{': ' + shorten(names) if name_them else ''}")
    return labels[~bad]


def shorten(names, most=10):
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def number_plants(columns):
    """One number for each plant, in the order of the columns' values; rows that lack a value share the last number."""
    keys = pd.DataFrame(index=columns.index)
    for name, cells in columns.items():
        numbers = to_numbers(cells)  # so that 12, "12" and "12 " are the same plant
        keys[name] = numbers if numbers.notna().equals(cells.notna()) else cells.astype("string").str.strip()
    unknown = keys.isna().any(axis=1)
    plants = keys.groupby(list(keys), sort=True, dropna=False).ngroup()
    return plants.mask(unknown, plants.max() + 1)


def filter_missing_images(labels, image_dir):
    """The rows whose photo is there and whole, with its `_path` and the `_content` digest of its file."""
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise UserError(f"no image folder at {image_dir}: pass --image_dir, or --data_dir with a folder that holds it")
    labels = labels.assign(_path=[str(image_dir / name) for name in labels["filename"]])
    with ThreadPoolExecutor() as pool:
        checked = pool.map(check_photo, labels["_path"])
        import sklearn.model_selection  # noqa: F401  takes as long as the photos, so both at once

        checked = list(checked)
    labels["_content"] = [content for content, _ in checked]
    faults = pd.Series([fault for _, fault in checked], index=labels.index)
    labels = drop_rows(labels, faults != "", "whose photo is missing or unreadable", reasons=faults)
    if labels.empty:
        raise UserError(f"no photo of the sheet can be read in {image_dir}: pass --image_dir with the photos' folder")
    return labels.reset_index(drop=True)


def check_photo(path):
    """Digest of a photo file's bytes and what is wrong with it ("" if nothing)."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return "", "no such file" if isinstance(error, FileNotFoundError) else error.strerror
    try:
        with Image.open(io.BytesIO(content)) as photo:
            # A PNG tells by its checksums whether it is whole, ten times faster than by being decoded.
            photo.verify() if photo.format == "PNG" else photo.load()
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return "", f"unreadable photo ({error})"
    return digest(content), ""


def split_by_plant(labels, val_split, seed):
    """Row numbers for training and for validation: GroupShuffleSplit, so all photos of a plant are on one side."""
    from sklearn.model_selection import GroupShuffleSplit

    splitter = GroupShuffleSplit(n_splits=1, test_size=val_split, random_state=seed)
    try:
        return next(splitter.split(labels, groups=labels["_plant"]))
    except ValueError as error:
        plants = labels["_plant"].nunique()
        raise UserError(
            f"--val_split {val_split} of {plants} plant(s) leaves a side of the split empty: "
            "change --val_split, or name other columns in --group_by"
        ) from error


def folds_by_plant(labels, folds, seed):
    """Pairs of row numbers for training and validation: shuffled GroupKFold, so each plant is validated once."""
    from sklearn.model_selection import GroupKFold

    plants = labels["_plant"].nunique()
    if plants < folds:
        raise UserError(f"--folds {folds} needs as many plants, the data have {plants}: lower --folds")
    return list(GroupKFold(n_splits=folds, shuffle=True, random_state=seed).split(labels, groups=labels["_plant"]))


def make_splits(labels, args):
    """(training rows, validation rows) of each fold, or of the one split, checked for what is on both sides."""
    if args.folds:
        splits = folds_by_plant(labels, args.folds, args.seed)
    else:
        splits = [split_by_plant(labels, args.val_split, args.seed)]
    splits = [(drop_shared_photos(labels, *split), split[1]) for split in splits]
    for fold, sides in enumerate(splits, start=1):
        for side, rows in zip(("train", "validation"), sides, strict=True):
            chosen = labels.iloc[rows]
            logger.info(
                f"{f'fold {fold} ' if args.folds else ''}{side}: {len(rows):,} rows of {chosen['_plant'].nunique():,} "
                f"plants, mean {args.target} {chosen[args.target].mean():.4f} {unit_of(args.target)}".rstrip()
            )
    return splits


def drop_shared_photos(labels, train_rows, val_rows):
    """Training rows without those whose very photo is also validated, under another name or plant."""
    if set(labels["_plant"].iloc[train_rows]) & set(labels["_plant"].iloc[val_rows]):
        raise RuntimeError("a plant is on both sides of the split")
    shared = labels["_content"].iloc[train_rows].isin(labels["_content"].iloc[val_rows]).to_numpy()
    if shared.any():
        names = labels["filename"].iloc[train_rows[shared]].tolist()
        logger.info(f"left {len(names)} training rows out, their photo is in validation too: {shorten(names)}")
    if shared.all():
        raise UserError("every training photo is a copy of a validation photo: nothing is left to train on")
    return train_rows[~shared]


class BiomassDataset(Dataset):
    """Photos and their targets, each photo opened when it is asked for.

    `dataset[row]` is the photo as validation sees it, `dataset[row, view]` its augmented version number `view`: uint8
    (3, 224, 224), and the target as float. A version depends on the seed, the photo's content and its number alone.
    """

    augmentation = f"flip {FLIP} degrees {DEGREES} jitter {BRIGHTNESS} {CONTRAST} {SATURATION}"

    def __init__(self, labels, target, seed):
        self.paths = labels["_path"].tolist()
        self.contents = labels["_content"].tolist()
        self.targets = labels[target].to_numpy(np.float32)
        self.seed = seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        row, view = item if isinstance(item, tuple) else (item, None)
        return torch.from_numpy(self.views(row, [view])[0]).permute(2, 0, 1), self.targets[row]

    def views(self, row, views):
        """Versions of one photo, None for the plain one: uint8 (len(views), 224, 224, 3). Decodes the photo once."""
        try:
            content = Path(self.paths[row]).read_bytes()
            photo = open_photo(io.BytesIO(content))
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
            raise UserError(f"cannot read photo {self.paths[row]} ({error}): replace it or remove its row") from None
        if digest(content) != self.contents[row]:
            raise UserError(f"the photo {self.paths[row]} was replaced during the run: start it again")
        photo = transforms.resize(photo, [IMAGE_SIZE, IMAGE_SIZE])
        return np.stack([np.asarray(photo if view is None else self.augment(photo, row, view)) for view in views])

    def augment(self, photo, row, view):
        # Not torchvision's random transforms: they draw from one global generator, in the order in which workers run.
        random = np.random.default_rng([self.seed, view, int(self.contents[row][:16], 16)])
        if random.random() < FLIP:
            photo = transforms.hflip(photo)
        photo = transforms.rotate(photo, random.uniform(-DEGREES, DEGREES))
        jitter = [
            (transforms.adjust_brightness, BRIGHTNESS),
            (transforms.adjust_contrast, CONTRAST),
            (transforms.adjust_saturation, SATURATION),
        ]
        for step in random.permutation(len(jitter)):
            adjust, strength = jitter[step]
            photo = adjust(photo, random.uniform(1 - strength, 1 + strength))
        return photo

    def key(self, row, view):
        """Name of one version of a photo in the feature store."""
        version = "plain" if view is None else f"view {view} seed {self.seed} {self.augmentation}"
        return digest(self.contents[row], version)


class PhotoBatches(Dataset):
    """Photos a batch at a time: item b holds images uint8 (n, 3, 224, 224) and targets (n,) of batches[b].

    A batch is a list of (row, view) pairs; pairs of the same row that follow one another cost one decoding.
    """

    def __init__(self, photos, pairs, batch_size):
        self.photos = photos
        self.batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        batch = self.batches[number]
        images = [
            self.photos.views(row, [view for _, view in pairs])
            for row, pairs in itertools.groupby(batch, key=lambda pair: pair[0])
        ]
        targets = self.photos.targets[[row for row, _ in batch]]
        # Bytes of a photo lie pixel by pixel, so this is channels_last without moving them.
        return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), torch.from_numpy(targets)


def in_threads(function, count, threads):
    """Yield function(0), function(1), ... in order, a few of them computed ahead in threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        try:
            for number in range(count):
                waiting.append(pool.submit(function, number))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for result in waiting:
                result.cancel()


def read_ahead(batches, num_workers):
    """Iterate over PhotoBatches while the next ones are decoded: in threads, or in worker processes where asked."""
    if num_workers:
        return DataLoader(batches, batch_size=None, num_workers=num_workers)
    return in_threads(batches.__getitem__, len(batches), min(os.cpu_count() or 1, 16))


# ---------------------------------------------------------------- model


class BiomassModel(nn.Module):
    """A torchvision backbone without its classifier, and the study's head; photos in, one number a photo out.

    Images come as uint8 (n, 3, 224, 224). With `frozen`, the backbone neither learns nor moves: requires_grad is off,
    and it stays in eval mode, because BatchNorm in train mode would follow the training photos without any gradient.
    """

    def __init__(self, model_name, frozen=True, precision="fp32"):
        super().__init__()
        self.model_name, self.frozen, self.precision = model_name, frozen, precision
        self.backbone = torchvision.models.get_model(model_name, weights=None)
        self.width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(self.width, 256), nn.ReLU(), nn.Linear(256, 1))
        self.backbone.requires_grad_(not frozen)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images):
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.backbone(normalize(images))
        return self.head(features.float())

    def extractor(self):
        """The backbone as fast as it goes when nothing has to be learned: images uint8 -> features float (n, width).

        BatchNorm is folded into the convolutions before it. torch.compile gains a tenth more, and its start-up eats
        that at fewer than some 25,000 photos.
        """
        from torch.fx.experimental.optimization import fuse

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        backbone = fuse(copy.deepcopy(self.backbone).eval()).to(dtype=dtype, memory_format=torch.channels_last)
        return lambda images: backbone(normalize(images).to(dtype)).float()


def normalize(images):
    """uint8 images (n, 3, ...) as the ImageNet weights expect them, in one step over the whole batch."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


def build_model(model_name, weights, frozen, precision, device):
    """A BiomassModel with the backbone weights that `--weights` names; the rest is drawn from torch's seed."""
    model = BiomassModel(model_name, frozen, precision)
    state = load_weights(model_name, weights)
    if state is not None:
        wanted = model.backbone.state_dict()
        fits = [name for name in wanted if name in state and state[name].shape == wanted[name].shape]
        if len(fits) < len(wanted):
            missing = next(name for name in wanted if name not in fits)
            raise UserError(
                f"--weights {weights} is not of a {model_name}: {len(wanted) - len(fits)} tensors are missing or of "
                f"another shape, '{missing}' first; pass the --model_name that fits"
            )
        model.backbone.load_state_dict({name: state[name] for name in wanted})
    return model.to(device, memory_format=torch.channels_last)


def load_weights(model_name, weights):
    """State dict for `--weights`: None for "none", torchvision's ImageNet weights, or those in a file."""
    if weights == "none":
        return None
    if weights == "imagenet":
        source = torchvision.models.get_model_weights(model_name).DEFAULT
        path = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
        try:
            return source.get_state_dict(progress=False, weights_only=True)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"cannot download the ImageNet weights ({error}): fetch {source.url} elsewhere and put it at {path}, "
                "or train without them by --weights none"
            ) from error
        except Exception as error:  # whatever a damaged file makes the unpickler stumble over
            raise UserError(f"{path} is not a weight file, remove it ({type(error).__name__})") from error
    if not Path(weights).is_file():
        raise UserError(f"no weight file at {weights}: --weights takes imagenet, none or a file")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:
        raise UserError(
            f"--weights {weights} is not a file of plain PyTorch weights ({type(error).__name__})"
        ) from error


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): try --device cpu"
        ) from error
    return torch.device(name)


def pick_precision(name, device):
    """bf16 where the processor computes in it natively, else fp32, unless `name` says which."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = {"avx512_bf16", "amx_bf16", "bf16"}
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases have the private check alone
    native = any(capabilities.get(name) for name in native) or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if device.type == "cpu" and native else "fp32"


# ---------------------------------------------------------------- batches for the loop


class ImageLoader:
    """Batches of images, for a model whose backbone learns: fresh augmentation in every epoch."""

    def __init__(self, model, photos, args):
        self.network, self.photos, self.args = model, photos, args

    def train(self, rows, epoch):
        pairs = [(row, epoch - 1) for row in shuffled(rows, self.args.seed, epoch)]
        return self.batches(pairs)

    def validation(self, rows):
        return self.batches([(row, None) for row in rows])

    def batches(self, pairs):
        batches = PhotoBatches(self.photos, pairs, self.args.batch_size)
        return tqdm(read_ahead(batches, self.args.num_workers), total=len(batches), disable=None, leave=False)


def extract_features(model, photos, pairs, num_workers=0):
    """Yield the backbone's features of (row, view) pairs, float32 (n, width) a batch."""
    extractor, device = model.extractor(), next(model.parameters()).device
    batches = PhotoBatches(photos, pairs, EXTRACTION_BATCH[device.type])

    @torch.inference_mode()
    def features(images):
        return extractor(images.to(device)).cpu().numpy()

    threads = torch.get_num_threads()
    if device.type == "cpu" and not num_workers:
        # A whole batch for each core, from file to features: cores that share a batch wait for one another whenever
        # one of them is called away to decode, which costs a sixth of the speed.
        torch.set_num_threads(1)
        computed = in_threads(lambda number: features(batches[number][0]), len(batches), threads)
    else:
        computed = (features(images) for images, _ in read_ahead(batches, num_workers))
    try:
        with tqdm(total=len(pairs), unit="photo", desc="features", disable=None) as bar:
            for batch in computed:
                yield batch
                bar.update(len(batch))
    finally:
        torch.set_num_threads(threads)


class FeatureLoader:
    """Batches of features, for a frozen backbone: what it says of each photo, computed once and kept.

    Epoch e trains on version (e - 1) mod `--augment_views` of each photo; with `--augment_views 0` each epoch has a
    version of its own, which is not kept.
    """

    def __init__(self, model, photos, splits, args):
        self.model, self.network, self.photos, self.args = model, model.head, photos, args
        self.views = range(min(args.augment_views, args.epochs))
        trained, validated = (set().union(*side) for side in zip(*splits, strict=True))
        trained |= set(range(len(photos))) if args.folds else set()  # for the model that learns from all rows
        wanted = [(None, validated), *((view, trained) for view in self.views)]
        pairs = [(row, view) for row in range(len(photos)) for view, rows in wanted if row in rows]
        features = self.features(pairs, None if args.no_cache else args.cache_dir)
        self.table = {view: torch.zeros(len(photos), model.width) for view, _ in wanted}
        for view, table in self.table.items():
            chosen = [number for number, pair in enumerate(pairs) if pair[1] == view]
            table[[pairs[number][0] for number in chosen]] = features[chosen]

    def features(self, pairs, cache_dir):
        """Features float32 (len(pairs), width) of (row, view) pairs, from the store where it has them."""
        model, state = self.model, self.model.backbone.state_dict()
        recipe = {
            "backbone": model.model_name,
            "weights": digest(*(tensor.cpu().numpy().tobytes() for tensor in state.values())),
            "preprocessing": f"{PREPROCESSING}: resize {IMAGE_SIZE} mean {IMAGENET_MEAN} std {IMAGENET_STD}",
            "precision": f"{model.precision} on {next(model.parameters()).device.type}",
            "versions": f"torchvision {torchvision.__version__} pillow {pillow_version} numpy {np.__version__}",
        }
        # float16 holds what bf16 computes; features of fp32 stay as they are, so that they equal the whole model's
        dtype = np.float16 if model.precision == "bf16" else np.float32
        keys = [self.photos.key(row, view) for row, view in pairs]
        try:
            store = FeatureStore(cache_dir, recipe, model.width, dtype)
            return torch.from_numpy(store.features(keys, lambda missing: self.extract([pairs[n] for n in missing])))
        except OverflowError as error:
            raise UserError("the backbone's features do not fit float16: pass --precision fp32") from error
        except OSError as error:
            raise UserError(f"cannot keep features in {cache_dir} ({error}): pass another --cache_dir") from error

    def extract(self, pairs):
        return extract_features(self.model, self.photos, pairs, self.args.num_workers)

    def train(self, rows, epoch):
        rows = shuffled(rows, self.args.seed, epoch)
        if self.views:
            return self.batches(self.table[(epoch - 1) % len(self.views)][rows], rows)
        return self.batches(self.features([(row, epoch - 1) for row in rows], None), rows)

    def validation(self, rows):
        return self.batches(self.table[None][rows], rows)

    def batches(self, features, rows):
        targets = torch.from_numpy(self.photos.targets[rows])
        return zip(features.split(self.args.batch_size), targets.split(self.args.batch_size), strict=True)


def shuffled(rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(rows)


# ---------------------------------------------------------------- loop


def train_one_epoch(network, batches, optimizer, device):
    """One pass over `batches` with a step of `optimizer` each; returns the mean squared error over the rows."""
    network.train()
    squares, rows = 0.0, 0
    for number, (inputs, targets) in enumerate(batches, start=1):
        targets = targets.to(device)
        loss = nn.functional.mse_loss(network(inputs.to(device)).squeeze(1), targets)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is not finite at batch {number} of an epoch: lower --learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        squares += loss.item() * len(targets)
        rows += len(targets)
    return squares / rows


@torch.inference_mode()
def evaluate(network, batches, device):
    """Mean squared error over the rows of `batches`, and the predictions (n,) in their order."""
    network.eval()
    outputs, targets = [], []
    for inputs, measured in batches:
        outputs.append(network(inputs.to(device)).squeeze(1).cpu())
        targets.append(measured)
    predictions, targets = torch.cat(outputs).double(), torch.cat(targets).double()
    return nn.functional.mse_loss(predictions, targets).item(), predictions.numpy()


@contextlib.contextmanager
def keeping_best(network, save):
    """Give a function keep(epoch) that marks the weights of `network` as the best so far.

    They are saved as training ends, however it ends, and before that at most every SAVE_EVERY seconds: an epoch on
    stored features takes less time than writing a checkpoint.
    """
    best, saved = {}, time.monotonic()

    def keep(epoch):
        nonlocal saved
        best.update(epoch=epoch, state=copy.deepcopy(network.state_dict()))
        if time.monotonic() - saved > SAVE_EVERY:
            save(epoch)
            best.clear()
            saved = time.monotonic()

    try:
        yield keep
    finally:
        if best:
            network.load_state_dict(best["state"])
            save(best["epoch"])


def fit(loader, train_rows, val_rows, args, device, label="", keep=None):
    """Train for all epochs; returns a row of history an epoch, and the predictions of the best and the last epoch.

    `keep(epoch)` is called after each epoch that lowers the validation loss, or without `val_rows` after the last.
    """
    network = loader.network
    torch.manual_seed(args.seed)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, fused=True)
    history, best, predictions = [], None, None
    for epoch in range(1, args.epochs + 1):
        loss = train_one_epoch(network, loader.train(train_rows, epoch), optimizer, device)
        row, text = {"epoch": epoch, "train_loss": loss}, f"{label}epoch {epoch}/{args.epochs}  train_loss {loss:.5f}"
        if len(val_rows):
            row["val_loss"], predictions = evaluate(network, loader.validation(val_rows), device)
            if not math.isfinite(row["val_loss"]):
                raise UserError(f"the validation loss of epoch {epoch} is not finite: lower --learning_rate")
            row["val_rmse"] = math.sqrt(row["val_loss"])
            text += f"  val_loss {row['val_loss']:.5f}  val_rmse {row['val_rmse']:.4f} {unit_of(args.target)}".rstrip()
            improved = best is None or row["val_loss"] < best["val_loss"]
            best = {**row, "predictions": predictions} if improved else best
        else:
            improved = epoch == args.epochs
        logger.info(text)
        history.append(row)
        if improved and keep:
            keep(epoch)
    return history, best, predictions


def judge(loader, labels, splits, args, device, save):
    """Train on each split from the same start and predict the rows that it holds out.

    One split: the epoch with the lowest validation loss counts. Folds: the last epoch counts, so that no epoch is
    chosen on the rows it is judged by, and the model that is saved learns from all rows in the same way.
    Returns the history, the predictions, and the epoch with how it was chosen.
    """
    start = copy.deepcopy(loader.network.state_dict())
    histories, tables = [], []
    for fold, (train_rows, val_rows) in enumerate(splits, start=1):
        loader.network.load_state_dict(start)
        with contextlib.nullcontext() if args.folds else keeping_best(loader.network, save) as keep:
            label = f"fold {fold}/{len(splits)}  " if args.folds else ""
            history, best, last = fit(loader, train_rows, val_rows, args, device, label, keep)
        histories.append(pd.DataFrame(history).assign(fold=fold))
        table = labels.iloc[val_rows].assign(fold=fold, measured=lambda rows: rows[args.target])
        table["predicted"] = last if args.folds else best["predictions"]
        tables.append(table.assign(training_mean=labels[args.target].iloc[train_rows].mean()))
    if args.folds:
        loader.network.load_state_dict(start)
        with keeping_best(loader.network, save) as keep:
            history, _, _ = fit(loader, np.arange(len(labels)), [], args, device, "all rows  ", keep)
        histories.append(pd.DataFrame(history).assign(fold=0))
        chosen = {"epoch": args.epochs, "epoch_chosen_on": "none"}
    else:
        chosen = {"epoch": best["epoch"], "epoch_chosen_on": "validation"}
        chosen["last_epoch_val_rmse"] = history[-1]["val_rmse"]
    predictions = pd.concat(tables)
    return pd.concat(histories), predictions.assign(error=predictions["predicted"] - predictions["measured"]), chosen


def save_checkpoint(model, args, epoch):
    """All that is needed to weigh a photo, as tensors and plain values: it loads with weights_only=True."""
    checkpoint = {
        "model_state": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "model_name": model.model_name,
        "image_size": IMAGE_SIZE,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "precision": model.precision,
        "frozen": model.frozen,
        "target": args.target,
        "unit": unit_of(args.target),
        "group_by": args.group_by,
        "epoch": epoch,
        "seed": args.seed,
    }
    with whole_file(args.model_out) as partial:
        torch.save(checkpoint, partial)


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage of thirty flags before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(low, high=math.inf):
    """argparse type: a whole number from `low` to `high`."""

    def parse(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be at least {low}{f' and at most {high}' * (high < math.inf)}, not {text}"
            )
        return value

    parse.__name__ = "whole number"
    return parse


def between(low, high):
    """argparse type: a number above `low` and below `high`."""

    def parse(text):
        value = float(text)
        if not low < value < high:
            raise argparse.ArgumentTypeError(
                f"must be above {low}{f' and below {high}' * (high < math.inf)}, not {text}"
            )
        return value

    parse.__name__ = "number"
    return parse


VIEWS_HELP = """augmented versions kept of each training photo when the backbone is frozen: epoch e trains on version
    (e - 1) mod this; 0: a new version in every epoch, not kept"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        told = action.default is None or isinstance(action.default, bool)
        return action.help if told else super()._get_help_string(action)


def build_parser():
    parser = Parser(prog="train_model.py", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", type=Path, default="infos/mlops_biomass_data", help="folder of the sheet and the photos")
    add("--labels_path", type=Path, help=".xlsx or .csv (default: DATA_DIR/digital_biomass_labels.xlsx)")
    add("--image_dir", type=Path, help="folder of the photos (default: DATA_DIR/images_med_res)")
    add("--target", default="fresh_weight_total", help="column to predict: in grams if named a weight, else unitless")
    add("--group_by", nargs="+", default=["plant_number"], help="columns that together make a plant, never split")
    add("--val_split", type=between(0, 1), default=0.2, help="share of the plants to validate on")
    add("--folds", type=whole(0), default=0, help="cross-validate by plant in so many folds; 0: one split")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model_name", choices=BACKBONES, default="resnet18", help="backbone")
    add("--weights", default="imagenet", help="of the backbone: imagenet (downloaded once), none (random) or a file")
    add = model.add_mutually_exclusive_group().add_argument
    add("--freeze_backbone", action="store_true", default=True, help="train the head alone (default)")
    add("--unfreeze_backbone", dest="freeze_backbone", action="store_false", help="train all layers")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole(1), default=20, help="passes over the training photos")
    add("--batch_size", type=whole(1), default=32, help="photos a training step")
    add("--learning_rate", type=between(0, math.inf), default=1e-3, help="of AdamW")
    add("--seed", type=whole(0, 2**32 - 1), default=42, help="of split, augmentation, random weights and order")
    add("--augment_views", type=whole(0), default=4, help=VIEWS_HELP)
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the processor has it")
    add("--num_workers", type=whole(0), default=0, help="processes that decode photos; 0: threads of this one")
    add("--cache_dir", type=Path, default=".feature_cache", help="where features of photos are kept between runs")
    add("--no_cache", action="store_true", help="neither look for kept features nor keep any")
    add = parser.add_argument_group("output").add_argument
    add("--results_dir", type=Path, default="results", help="folder of the metrics, tables and pictures")
    add("--metrics_path", type=Path, help="JSON (default: RESULTS_DIR/metrics.txt)")
    add("--curves_path", type=Path, help="picture (default: RESULTS_DIR/training_curves.png)")
    add("--model_out", type=Path, default="models/biomass_resnet.pt", help="checkpoint")
    add("--log_path", type=Path, default="training.log", help="log of the latest run")
    return parser


def complete_arguments(args):
    """Fill in the paths that hang on others, and find out before the work what would stop the run after it."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        raise UserError(
            f"no data folder at {args.data_dir}: pass --data_dir with yours, or draw one by "
            "`python make_sample_data.py` and pass --data_dir sample_data"
        )
    if args.folds == 1:
        raise UserError("--folds 1 leaves nothing to train on: pass 2 or more, or 0 for one split")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"
    args.metrics_path = args.metrics_path or args.results_dir / "metrics.txt"
    args.curves_path = args.curves_path or args.results_dir / "training_curves.png"
    if args.curves_path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--curves_path {args.curves_path} must end in .png, .pdf or .svg")
    outputs = [args.metrics_path, args.curves_path, args.model_out, args.log_path]
    outputs += [args.results_dir / name for name in RESULT_FILES]
    for path in outputs if args.no_cache else [*outputs, args.cache_dir / "features"]:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another place for it") from error


def train(argv, args, lines):
    """The whole run, from the sheet to the report."""
    started = time.perf_counter()
    complete_arguments(args)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    labels = load_labels(args.labels_path, args.target, args.group_by)
    labels = filter_missing_images(labels, args.image_dir)
    splits = make_splits(labels, args)
    torch.manual_seed(args.seed)
    model = build_model(args.model_name, args.weights, args.freeze_backbone, precision, device)
    photos = BiomassDataset(labels, args.target, args.seed)
    run = describe_run(argv, args, device, precision, labels)
    open_log(lines, args.log_path)
    log_run(run, args)
    loader = FeatureLoader(model, photos, splits, args) if args.freeze_backbone else ImageLoader(model, photos, args)
    history, predictions, chosen = judge(
        loader, labels, splits, args, device, lambda epoch: save_checkpoint(model, args, epoch)
    )
    metrics = summarize(predictions, chosen, splits, labels, args)
    metrics["run"] = run | {"seconds": round(time.perf_counter() - started, 1)}
    write_report(history, predictions, metrics, args, open_photo)
    log_result(metrics, args)
    logger.info(f"elapsed {time.perf_counter() - started:.1f} s")


def main(argv=None):
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    with logging_to_console() as lines:
        try:
            train(argv, args, lines)
        except UserError as error:  # from a worker process it comes with a traceback before its last line
            parser.error(str(error).strip().splitlines()[-1].removeprefix("train_model.UserError: "))
        except OSError as error:
            parser.error(f"cannot write {error.filename} ({error.strerror}): close or free it and start again")
        except KeyboardInterrupt:
            parser.exit(130, "train_model.py: interrupted; what the log says was written is whole\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

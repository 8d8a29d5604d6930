"""Train a model that predicts a plant's fresh weight in grams from its photo, and judge it on plants it never saw.

    python train_model.py                                             the study's defaults: 20 epochs, frozen ResNet18
    python train_model.py --epochs 2 --batch_size 16 --learning_rate 5e-4 \\
        --model_out models/resnet18_biomass.pt --freeze_backbone      the study's documented run
    python train_model.py --folds 5                                   every photo predicted once, by cross-validation
    python train_model.py --data_dir sample_data --weights none       on drawn data, without ImageNet weights
    python train_model.py --resume                                    go on with the run that was stopped
    torchrun --standalone --nproc_per_node 4 train_model.py           by four processes, each with a GPU of its own

Reads  DATA_DIR/digital_biomass_labels.xlsx and the photos in DATA_DIR/images_med_res.
Writes models/biomass_resnet.pt (the model), training.log (what happened), and in results/: metrics.txt (JSON),
       history.csv, predictions.csv, training_curves.png, predictions.png, worst_predictions.png.

The way of the data: sheet -> load_labels -> filter_missing_images -> split_by_plant -> BiomassDataset -> backbone
-> head -> grams -> report. A frozen backbone sees each photo once: its features are kept in .feature_cache.
"""

import os
import signal
import sys

if __name__ == "__main__":  # while the libraries load; main() takes over
    told = "train_model.py: interrupted\n" * (os.environ.get("RANK", "0") == "0")
    signal.signal(signal.SIGINT, lambda *_: (sys.stderr.write(told), os._exit(130)))

import argparse
import contextlib
import functools
import importlib
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

from calibration import calibrate, describe_features, distances, limit_of
from devices import ALONE, check_seen, cores, pick_device, pick_precision, together
from feature_store import KEY_LENGTH, digest
from inputs import (
    PhotoFolder,
    UserError,
    as_if_in_mg,
    check_photo,
    fault_of,
    one_line,
    open_photo,
    read_photo_file,
    read_sheet,
    to_numbers,
)
from loaders import PLAIN, bar, in_threads, make_loader, shuffled
from metadata import MOST_CATEGORIES, MetadataEncoder, as_text, is_numeric, leaks
from model import BACKBONES, LARGEST, TRANSFORMS, build_model, save_plain
from outputs import Parser, alone, check_writable, logging_to_console, open_log
from progress import Progress
from report import RESULT_FILES, describe_run, log_result, log_run, summarize, unit_of, write_report

FLIP, DEGREES, BRIGHTNESS, CONTRAST, SATURATION = 0.5, 10, 0.2, 0.2, 0.1  # the study's augmentation
RESERVED = {"fold", "measured", "predicted", "error", "training_mean"}  # names of columns that are added
PLACES = {"data_dir", "labels_path", "image_dir", "results_dir", "metrics_path", "curves_path", "model_out", "log_path"}
PLACES |= {"cache_dir", "no_cache", "num_workers", "resume", "device", "precision"}  # none changes the result
SAVE_EVERY = 30  # seconds between two checkpoints of a running training
LOOKS_AT_ONCE = 64  # photos that a thread takes on

logger = logging.getLogger("train_model")


# ---------------------------------------------------------------- data


def load_labels(args):
    """The rows to learn from: file name, target, metadata, what makes a plant, and `_plant` numbering the plants.

    Rows without a target, weights that are not positive and rows entered twice are dropped; so are all rows of a photo
    with two different targets, because nothing tells which one holds. The log says how many and which.
    """
    path, target, group_by = args.labels_path, args.target, args.group_by
    columns = list(dict.fromkeys([target, *group_by, *args.metadata_columns]))
    for name in {*columns} & RESERVED:
        raise UserError(f"the column '{name}' has the name of an output column: rename it in the sheet")
    if target in group_by:
        raise UserError(f"--group_by {target}: it is the target, so every plant would have one weight; leave it out")
    sheet = read_sheet(path, columns)
    labels = sheet[list(dict.fromkeys(["filename", *columns]))].copy()
    labels[target] = to_numbers(sheet[target])
    labels["_plant"] = number_plants(labels[group_by])
    labels = drop_rows(labels, labels["filename"].isna(), "without a file name")
    typed = sheet.loc[labels.index, target]
    labels = drop_rows(labels, typed.notna() & labels[target].isna(), f"whose {target} is no number")
    labels = drop_rows(labels, labels[target].isna(), f"without {target}", name_them=False)
    if unit_of(target) == "g":
        labels = drop_rows(labels, labels[target] <= 0, f"with {target} not above 0 g")
    labels = drop_repeated(labels, "filename", target)
    if labels.empty:
        raise UserError(f"no row of {path} has a file name and a number in '{target}': nothing to train on")
    if args.target_transform in ("log", "sqrt") and (labels[target] <= 0).any():
        raise UserError(
            f"--target_transform log and sqrt need {target} above 0, the lowest is {labels[target].min():g}"
        )
    large = as_if_in_mg(labels[target]) if unit_of(target) == "g" else pd.Series(False, labels.index)
    if large.any():
        names = [f"row {row + 2} ({labels['filename'][row]}): {labels[target][row]:g}" for row in labels.index[large]]
        logger.info(f"warning: {large.sum():,} {target} some 1000 times the others, as if in mg: {shorten(names)}")
    check_metadata(labels, target, args.metadata_columns, args.allow_leaky_columns)
    unknown = int(labels[group_by].isna().any(axis=1).sum())
    if unknown:
        logger.info(f"{unknown:,} rows without {' + '.join(group_by)}: kept together as one plant")
    return labels


def drop_repeated(labels, key, target):
    """`labels` without rows that repeat an earlier one, and without all rows of a photo with several targets."""
    labels = drop_rows(labels, labels.duplicated([key, target]), "that repeat an earlier row")
    return drop_rows(labels, labels.duplicated(key, keep=False), f"of a photo with several {target}")


def check_metadata(labels, target, columns, allow_leaky_columns):
    """Refuse columns that give the target away, and say of the others what is missing."""
    for name in columns:
        reason = leaks(name, labels[name], target, labels[target])
        if reason and not allow_leaky_columns:
            raise UserError(
                f"--metadata_columns {name}: {reason}, so a model that knows it predicts nothing; leave it out, or "
                "pass --allow_leaky_columns"
            )
        cells, numeric = labels[name], is_numeric(labels[name])
        if not numeric and as_text(cells).nunique() > MOST_CATEGORIES:
            raise UserError(
                f"--metadata_columns {name}: {as_text(cells).nunique():,} different texts, more than "
                f"{MOST_CATEGORIES}; leave it out"
            )
        missing = int(to_numbers(cells).isna().sum() if numeric else cells.isna().sum())
        logger.info(f"metadata {name}: {'numbers' if numeric else 'text'}, missing or unreadable in {missing:,} rows")


def drop_rows(labels, bad, what, name_them=True, reasons=None):
    """`labels` without the `bad` rows, which the log counts and names as a spreadsheet numbers them."""
    if bad.any():
        names = labels.loc[bad, "filename"].astype("string").fillna("no file name").str.slice(0, 200)
        names = [f"row {row + 2} ({name})" for row, name in names.items()]
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


def filter_missing_images(labels, image_dir, target, group=ALONE):
    """The rows whose photo is there and whole, with its `_path` and the `_content` digest of its file."""
    share = functools.partial(in_shares, group=group)
    found = PhotoFolder(image_dir).find_all(labels["filename"], share, group.first)

    def look_at(photo):
        content, fault = (b"", photo[1]) if photo[1] else check_photo(photo[0])
        if fault == "no such file" != photo[1]:
            check_seen(photo[0], group)
        return digest(content), fault

    photos = list(zip(found["_path"], found["_fault"], strict=True))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(importlib.import_module, "sklearn.model_selection")  # takes as long as the photos, so both at once
        looks = pd.DataFrame(share(look_at, photos, title="looking at photos"), found.index, ["_content", "_fault"])
    labels = labels.assign(_path=found["_path"], _content=looks["_content"])
    labels = drop_rows(labels, looks["_fault"] != "", "whose photo is missing or unreadable", reasons=looks["_fault"])
    labels = drop_repeated(labels, "_path", target)  # one photo by several spellings of its name
    if labels.empty:
        raise UserError(f"no photo of the sheet can be read in {image_dir}: pass --image_dir with the photos' folder")
    return labels.reset_index(drop=True)


def in_shares(look, items, group, title=None):
    """[look(item) for item in items], in threads, and each process of the group does a share."""
    items = list(items)[group.share(len(items))]
    pieces = [items[start : start + LOOKS_AT_ONCE] for start in range(0, len(items), LOOKS_AT_ONCE)]
    looks = []
    with bar(group, len(items), unit="photo", desc=title or "looking for photos") as shown:
        for piece in in_threads(lambda number: list(map(look, pieces[number])), len(pieces), min(cores() + 4, 32)):
            looks += piece
            shown.update(len(piece))
    return [look for looks in group.gather(looks) for look in looks]


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
    (3, image_size, image_size), and the target as float. Version PLAIN is not augmented. A version depends on the seed,
    the photo's content and its number alone. `metadata` (len, m) are numbers that go with the photos, by default none.
    """

    augmentation = f"flip {FLIP} degrees {DEGREES} jitter {BRIGHTNESS} {CONTRAST} {SATURATION}"

    def __init__(self, labels, target, seed, image_size=224):
        self.paths = labels["_path"].array
        self.contents = labels["_content"].to_numpy(f"S{KEY_LENGTH}")
        self.targets = torch.tensor(labels[target].to_numpy(np.float32))
        self.metadata = torch.zeros(len(labels), 0)
        self.seed, self.image_size = seed, image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        row, view = item if isinstance(item, tuple) else (item, PLAIN)
        return torch.from_numpy(self.views(row, [view])[0]).permute(2, 0, 1), self.targets[row]

    def views(self, row, views):
        """Versions of one photo: uint8 (len(views), size, size, 3). Decodes the photo once."""
        try:
            content = read_photo_file(self.paths[row])
            photo = open_photo(content)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
            raise UserError(f"{self.paths[row]}: {fault_of(error)}; replace it or remove its row") from None
        if digest(content).encode() != self.contents[row]:
            raise UserError(f"the photo {self.paths[row]} was replaced during the run: start it again")
        photo = transforms.resize(photo, [self.image_size, self.image_size])
        return np.stack([np.asarray(photo if view == PLAIN else self.augment(photo, row, view)) for view in views])

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
        version = "plain" if view == PLAIN else f"view {view} seed {self.seed} {self.augmentation}"
        return digest(self.contents[row], version)


# ---------------------------------------------------------------- loop


LOSSES = {
    "mse": nn.functional.mse_loss,
    "mae": nn.functional.l1_loss,
    "huber": nn.functional.huber_loss,  # with the threshold that loss_function gives it
}


def loss_function(args, target, targets):
    """The loss of outputs and targets in the unit of `target`.

    Huber's is squared up to one standard deviation of the training targets and linear beyond, whatever their unit.
    """
    if args.loss != "huber":
        return LOSSES[args.loss]
    threshold = float(target.apply_to(targets).std(correction=0)) or 1.0
    return functools.partial(nn.functional.huber_loss, delta=threshold)


def train_one_epoch(model, batches, optimizer, loss_of, device, group=ALONE, parallel=None):
    """One pass over `batches` with a step of `optimizer` each; returns the mean squared error over the rows.

    The loss is that of the transformed target; the returned error is in the unit of the target itself. Each process
    of `group` has a part of each batch, and calls `parallel` in place of `model`.
    """
    model.train()
    parallel = parallel or model
    squares, rows = 0.0, 0
    for number, (inputs, metadata, targets) in enumerate(batches, start=1):
        targets, rows_of_all = targets.to(device), group.start_batch(len(targets))
        outputs = parallel(inputs.to(device), metadata.to(device))
        loss = loss_of(outputs, model.target.apply_to(targets)) if len(targets) else outputs.sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is not finite at batch {number}")
        # Gradients are averaged over the processes: this makes them those of the mean over all rows of the batch.
        (loss * (len(targets) * group.size / rows_of_all)).backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that no gradients take memory beside the activations of the next batch
        squares += (model.target.undo(outputs.detach()) - targets).square().sum().item()
        rows += len(targets)
        if not math.isfinite(squares):
            raise FloatingPointError(f"the squared error is not finite at batch {number}")
    return group.total(squares) / group.total(rows)


@torch.inference_mode()
def evaluate(model, batches, device, group=ALONE):
    """Mean squared error over the rows of `batches`, and the predictions (n,) in their order; in the target's unit."""
    model.eval()
    outputs, targets = [], []
    for inputs, metadata, measured in batches:
        outputs.append(model.target.undo(model(inputs.to(device), metadata.to(device))).cpu())
        targets.append(measured)
    predictions, targets = group.interleave(outputs).double(), group.interleave(targets).double()
    return nn.functional.mse_loss(predictions, targets).item(), predictions.numpy()


class BestEpoch:
    """What a model had learned in the epoch that was marked last; as a context it leaves the model with that.

    With a function save(epoch) it is saved as training ends, however it ends, and before that at most every SAVE_EVERY
    seconds: an epoch on stored features takes less time than writing a checkpoint. All processes of `group` save
    together, as describing the features takes all; after an error nobody knows whether the others would come.
    """

    def __init__(self, loader, save=None):
        self.model, self.group, self.save = loader.model, loader.group, save
        self.epoch, self.state, self.unsaved, self.saved = 0, None, False, time.monotonic()

    def mark(self, epoch):
        self.epoch, self.state, self.unsaved = epoch, self.model.learned_state(), True
        if self.save and self.group.first(lambda: time.monotonic() - self.saved > SAVE_EVERY):
            self.save(epoch)
            self.unsaved, self.saved = False, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.state:
            self.model.load_state_dict(self.state, strict=False)
            if self.save and self.unsaved and not (error and self.group.size > 1):
                self.save(self.epoch)


def make_optimizer(model, args):
    """AdamW over all that learns, the backbone with a rate of its own, and the schedule of the rates."""
    groups = [{"params": [p for p in model.head.parameters() if p.requires_grad]}]
    if model.learning:
        rate = args.backbone_learning_rate or args.learning_rate
        groups.append({"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": rate})
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    if args.lr_schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)


class Training:
    """A training from its start to its last epoch; its state can be kept after an epoch and gone on from.

    `label` begins its lines in the log and names it in `progress`, which holds a state if an earlier run got that far.
    Afterwards `history` has a row an epoch, `best` is the row of the lowest validation loss with the predictions of
    that epoch, and `predictions` are those of the last one. `keep` marks the best epoch, or without validation rows
    the last one.
    """

    def __init__(self, loader, train_rows, val_rows, args, device, progress, label="", keep=None):
        self.loader, self.model, self.args, self.device = loader, loader.model, args, device
        self.train_rows, self.val_rows = train_rows, val_rows
        self.progress, self.label, self.keep = progress, label, keep
        torch.manual_seed(args.seed)
        self.optimizer, self.schedule = make_optimizer(self.model, args)
        self.parallel = loader.group.parallel(self.model)
        self.loss_of = loss_function(args, self.model.target, loader.photos.targets[train_rows].to(device))
        self.history, self.best, self.predictions = [], None, None
        if label in progress.states:
            try:
                self.restore(progress.states[label])
            except Exception as error:  # whatever a foreign state makes it stumble over
                raise progress.damaged(error) from error
            logger.info(f"{label}resumed after epoch {len(self.history)}")

    def fit(self):
        """Train for all epochs that are left, or until --patience is spent."""
        args = self.args
        for epoch in range(len(self.history) + 1, args.epochs + 1):
            if args.patience and self.best and epoch - 1 - self.best["epoch"] >= args.patience:
                logger.info(f"{self.label}stopped: no lower val_loss for {args.patience} epochs")
                break
            try:
                self.fit_epoch(epoch)
            except FloatingPointError as error:
                raise UserError(f"{self.label}epoch {epoch}: {error}; lower --learning_rate") from error
            self.progress.reached(self.label, self.state)
        return self

    def fit_epoch(self, epoch):
        args, model, device, unit = self.args, self.model, self.device, unit_of(self.args.target)
        group, batches = self.loader.group, self.loader.train(self.train_rows, epoch)
        loss = train_one_epoch(model, batches, self.optimizer, self.loss_of, device, group, self.parallel)
        self.schedule.step()
        if model.target.curved:
            _, predictions = evaluate(model, self.loader.train(self.train_rows, epoch), device, group)
            measured = self.loader.photos.targets[shuffled(self.train_rows, args.seed, epoch)]
            model.target.balance(predictions, measured.numpy())
        row, improved = {"epoch": epoch, "train_loss": loss}, epoch == args.epochs
        text = f"{self.label}epoch {epoch}/{args.epochs}  train_loss {loss:.5f}"
        if len(self.val_rows):
            row["val_loss"], predictions = evaluate(model, self.loader.validation(self.val_rows), device, group)
            if not math.isfinite(row["val_loss"]):
                raise FloatingPointError("the validation loss is not finite")
            row["val_rmse"] = math.sqrt(row["val_loss"])
            text += f"  val_loss {row['val_loss']:.5f}  val_rmse {row['val_rmse']:.4f} {unit}".rstrip()
            improved = self.best is None or row["val_loss"] < self.best["val_loss"]
        with interrupts_held_back():  # so that history, best epoch and marked model belong together
            self.history.append(row)
            if len(self.val_rows):
                self.best = {**row, "predictions": predictions} if improved else self.best
                self.predictions = predictions
            logger.info(text)
            if improved and self.keep:
                self.keep.mark(epoch)

    def state(self):
        """All that restore() needs, in tensors and plain values."""
        return {
            "model": self.model.learned_state(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random_state(self.device),
            "history": self.history,
            "best": self.best and self.best | {"predictions": torch.from_numpy(self.best["predictions"])},
            "predictions": None if self.predictions is None else torch.from_numpy(self.predictions),
            "kept": self.keep and {"epoch": self.keep.epoch, "state": self.keep.state},
        }

    def restore(self, state):
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        random_state(self.device, state["random"])
        self.history, self.best, self.predictions = state["history"], state["best"], state["predictions"]
        if self.best:
            self.best = self.best | {"predictions": self.best["predictions"].numpy()}
            self.predictions = self.predictions.numpy()
        if self.keep and state["kept"]["state"]:
            self.keep.epoch, self.keep.state, self.keep.unsaved = state["kept"]["epoch"], state["kept"]["state"], True


@contextlib.contextmanager
def interrupts_held_back():
    """Let Ctrl-C take effect after the block, not within it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the first of several processes takes it
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def random_state(device, state=None):
    """State of torch's random numbers that training on `device` draws; is set to `state` if one is given."""
    places = {"cpu": torch, **({"gpu": getattr(torch, device.type)} if device.type != "cpu" else {})}
    for name, place in places.items() if state else ():
        place.set_rng_state(state[name])
    return {name: place.get_rng_state() for name, place in places.items()}


def start_over(loader, labels, train_rows, args, device, backbone_state):
    """Bring the model to where training starts, with all statistics taken from the training rows alone."""
    model, photos = loader.model, loader.photos
    model.load_state_dict(backbone_state, strict=False)
    model.encoder = MetadataEncoder.fit(labels.iloc[train_rows], args.metadata_columns)
    photos.metadata = torch.from_numpy(model.encoder.encode(labels))
    model.new_head(
        metadata_width=model.encoder.width,
        standardize=args.standardize_features,
        target_transform=args.target_transform,
    )
    model.target.fit(photos.targets[train_rows])
    if model.head.standardize:
        model.eval()
        with torch.inference_mode():
            features = [model.features(inputs.to(device)).cpu() for inputs, *_ in loader.train(train_rows, 1)]
            model.head.standardize.fit(loader.group.interleave(features))


def keep_aside(labels, rows, args):
    """Two parts of `rows`, by plant: to learn from, and to choose the epoch on."""
    learn, watch = split_by_plant(labels.iloc[rows], args.val_split, args.seed)
    return rows[learn], rows[watch]


def judge(loader, labels, splits, args, device, progress, save):
    """Train on each split from the same start and predict the rows that it holds out.

    One split: the epoch with the lowest validation loss counts. Folds: the last epoch counts, so that no epoch is
    chosen on the rows it is judged by, and the model that is saved learns from all rows in the same way. Folds with
    `--patience`: each keeps a share of its training plants aside and chooses the epoch on these.
    Returns the history, the predictions, and the epoch with how it was chosen.
    """
    start = {name: state for name, state in loader.model.learned_state().items() if name.startswith("backbone.")}
    start_anew = functools.partial(start_over, loader, labels, args=args, device=device, backbone_state=start)
    if not args.folds:
        training, interrupted = judge_split(loader, splits[0], args, device, progress, start_anew, save)
        best, history = training.best, pd.DataFrame(training.history).assign(fold=1)
        chosen = {"epoch": best["epoch"], "epoch_chosen_on": "validation"}
        chosen["last_epoch_val_rmse"] = training.history[-1]["val_rmse"]
        if interrupted:
            chosen["interrupted_after_epoch"] = len(training.history)
        return history, predicted_rows(labels, splits[0], best["predictions"], 1, args), chosen
    for fold, split in enumerate(splits, start=1):
        label = f"fold {fold}/{len(splits)}  "
        if label in progress.results:
            logger.info(f"{label}was done before")
        else:
            progress.finished(label, judge_fold(loader, labels, split, args, device, progress, label, start_anew))
    results = [progress.results[f"fold {fold}/{len(splits)}  "] for fold in range(1, len(splits) + 1)]
    predictions = pd.concat(
        predicted_rows(labels, split, result["predictions"].numpy(), fold, args)
        for fold, (split, result) in enumerate(zip(splits, results, strict=True), start=1)
    )
    training = fit_all(loader, labels, predictions, results, args, device, progress, start_anew, save)
    histories = [pd.DataFrame(result["history"]).assign(fold=fold) for fold, result in enumerate(results, start=1)]
    histories.append(pd.DataFrame(training.history).assign(fold=0))
    best = training.best or {"epoch": args.epochs}
    how = "training plants kept aside" if args.patience else "none"
    return pd.concat(histories), predictions, {"epoch": best["epoch"], "epoch_chosen_on": how}


def judge_split(loader, split, args, device, progress, start_anew, save):
    """Train on the one split; returns the Training and whether it was interrupted, after one epoch or more."""
    start_anew(split[0])
    with BestEpoch(loader, save) as keep:
        training = Training(loader, *split, args, device, progress, keep=keep)
        try:
            return training.fit(), False
        except KeyboardInterrupt:
            if not training.best or loader.group.size > 1:
                raise
            logger.info(f"interrupted after epoch {len(training.history)}: what follows is of the best one so far")
            return training, True


def judge_fold(loader, labels, split, args, device, progress, label, start_anew):
    """History of one fold, predictions of the rows that it holds out, and how unlike the others their photos are."""
    train_rows, val_rows = split
    learn, watch = keep_aside(labels, train_rows, args) if args.patience else split
    start_anew(learn)
    keeping = BestEpoch(loader) if args.patience else contextlib.nullcontext()
    with keeping as keep:
        training = Training(loader, learn, watch, args, device, progress, label, keep).fit()
    predictions = training.predictions
    if args.patience:
        _, predictions = evaluate(loader.model, loader.validation(val_rows), device, loader.group)
    result = {"history": training.history, "predictions": torch.from_numpy(predictions), "distances": None}
    if loader.model.backbone:
        familiar = familiar_features(loader, learn, device)
        result["distances"] = torch.from_numpy(distances(familiar, features_of(loader, val_rows, device)))
    return result


def fit_all(loader, labels, predictions, results, args, device, progress, start_anew, save):
    """Train the model that is saved on all rows, and give it what the folds taught of its errors."""
    floor = 0 if (labels[args.target] >= 0).all() else -math.inf
    calibration = calibrate(predictions["predicted"], predictions["error"], predictions["_plant"], floor=floor)
    rows = np.arange(len(labels))
    learn, watch = keep_aside(labels, rows, args) if args.patience else (rows, [])
    start_anew(learn)

    def save_all(epoch):
        familiar = None
        if loader.model.backbone:
            held_out = [result["distances"].numpy() for result in results]
            familiar = familiar_features(loader, learn, device) | limit_of(held_out)
        save(epoch, calibration, familiar)

    with BestEpoch(loader, save_all) as keep:
        return Training(loader, learn, watch, args, device, progress, "final model  ", keep).fit()


def predicted_rows(labels, split, predicted, fold, args):
    """The rows that a split holds out, with what was measured and predicted."""
    train_rows, val_rows = split
    table = labels.iloc[val_rows].assign(fold=fold, measured=lambda rows: rows[args.target], predicted=predicted)
    mean = labels[args.target].iloc[train_rows].mean()
    return table.assign(training_mean=mean, error=table["predicted"] - table["measured"])


@torch.inference_mode()
def features_of(loader, rows, device):
    """Features float64 (len(rows), width) of the plain photos, by the model as it is now."""
    loader.model.eval()
    features = [loader.model.features(inputs.to(device)).cpu() for inputs, *_ in loader.validation(rows)]
    return loader.group.interleave(features).double().numpy()


def familiar_features(loader, rows, device):
    return describe_features(features_of(loader, rows, device))


def save_checkpoint(model, args, epoch, calibration=None, familiar=None):
    """All that is needed to weigh a photo, as tensors and plain values: it loads with weights_only=True.

    `calibration` and `familiar` are what held-out photos taught, see calibration.py; None without folds.
    """
    checkpoint = {
        "model_state": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "settings": model.settings(),
        "metadata": model.encoder.plan,
        "calibration": calibration,
        "familiar": familiar and {name: torch.as_tensor(value) for name, value in familiar.items()},
        "target": args.target,
        "unit": unit_of(args.target),
        "group_by": args.group_by,
        "epoch": epoch,
        "seed": args.seed,
    }
    save_plain(checkpoint, args.model_out)


# ---------------------------------------------------------------- command line


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


def from_zero(text):
    """argparse type: a number of 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


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
    add("--labels_path", type=Path, help=".xlsx, .csv or .parquet (default: DATA_DIR/digital_biomass_labels.xlsx)")
    add("--image_dir", type=Path, help="folder of the photos (default: DATA_DIR/images_med_res)")
    add("--target", default="fresh_weight_total", help="column to predict: in grams if named a weight, else unitless")
    add("--group_by", nargs="+", default=["plant_number"], help="columns that together make a plant, never split")
    add("--val_split", type=between(0, 1), default=0.2, help="share of the plants to validate on")
    add("--folds", type=whole(0), default=0, help="cross-validate by plant in so many folds; 0: one split")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add(
        "--model_name",
        choices=BACKBONES,
        metavar="NAME",
        default="resnet18",
        help="backbone, of torchvision's registry",
    )
    add(
        "--image_size",
        type=whole(64, LARGEST),
        help="pixels a side (default: what the backbone's weights were trained on)",
    )
    add("--weights", default="imagenet", help="of the backbone: imagenet (downloaded once), none (random) or a file")
    add = model.add_mutually_exclusive_group().add_argument
    add("--freeze_backbone", action="store_true", default=True, help="train the head alone (default)")
    add("--unfreeze_backbone", dest="freeze_backbone", action="store_false", help="train all layers")
    add("--unfreeze_from", metavar="LAYER", help="train from this part of the backbone on, say layer4")
    add = model.add_argument
    add("--standardize_features", action="store_true", help="features with mean 0 and deviation 1 over training rows")
    add("--metadata_columns", nargs="+", metavar="COLUMN", default=[], help="of the sheet, as input beside the photo")
    add("--metadata_only", action="store_true", help="leave the photo out: what would the metadata alone give?")
    add("--allow_leaky_columns", action="store_true", help="also columns measured at the harvest or near the target")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole(1), default=20, help="passes over the training photos")
    add("--batch_size", type=whole(1), default=32, help="photos a training step")
    add("--learning_rate", type=between(0, math.inf), default=1e-3, help="of AdamW")
    add("--backbone_learning_rate", type=between(0, math.inf), help="of the backbone (default: --learning_rate)")
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 over all epochs")
    add("--weight_decay", type=from_zero, default=0.01, help="of AdamW")
    add("--patience", type=whole(0), default=0, help="stop after so many epochs without a lower val_loss; 0: never")
    add("--loss", choices=list(LOSSES), default="mse", help="of the transformed target")
    add("--target_transform", choices=TRANSFORMS, default="none", help="undone before every number that is shown")
    add("--seed", type=whole(0, 2**32 - 1), default=42, help="of split, augmentation, random weights and order")
    add("--augment_views", type=whole(0), default=4, help=VIEWS_HELP)
    add("--no_augmentation", action="store_true", help="train on the photos as they are")
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where the processor has it")
    add("--num_workers", type=whole(0, 256), default=0, help="processes that decode photos; 0: threads of this one")
    add("--cache_dir", type=Path, default=".feature_cache", help="where features of photos are kept between runs")
    add("--no_cache", action="store_true", help="neither look for kept features nor keep any")
    add("--resume", action="store_true", help="go on after the last epoch of the same run, if it was stopped")
    add = parser.add_argument_group("output").add_argument
    add("--results_dir", type=Path, default="results", help="folder of the metrics, tables and pictures")
    add("--metrics_path", type=Path, help="JSON (default: RESULTS_DIR/metrics.txt)")
    add("--curves_path", type=Path, help="picture (default: RESULTS_DIR/training_curves.png)")
    add("--model_out", type=Path, default="models/biomass_resnet.pt", help="checkpoint")
    add("--log_path", type=Path, default="training.log", help="log of the latest run")
    return parser


def complete_arguments(args):
    """`args` with the paths that hang on others; finds out before the work what would stop the run after it."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        raise UserError(
            f"no data folder at {args.data_dir}: pass --data_dir with yours, or draw one by "
            "`python make_sample_data.py` and pass --data_dir sample_data"
        )
    if args.folds == 1:
        raise UserError("--folds 1 leaves nothing to train on: pass 2 or more, or 0 for one split")
    learning = args.unfreeze_from or not args.freeze_backbone
    if args.metadata_only and not args.metadata_columns:
        raise UserError("--metadata_only needs --metadata_columns with what to learn from")
    if args.metadata_only and (learning or args.standardize_features or args.image_size):
        raise UserError("--metadata_only leaves the photo out: pass no flags of the backbone or its features with it")
    if args.backbone_learning_rate and not learning:
        raise UserError("--backbone_learning_rate needs --unfreeze_backbone or --unfreeze_from: the backbone is frozen")
    if args.allow_leaky_columns and not args.metadata_columns:
        raise UserError("--allow_leaky_columns needs --metadata_columns")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"
    args.metrics_path = args.metrics_path or args.results_dir / "metrics.txt"
    args.curves_path = args.curves_path or args.results_dir / "training_curves.png"
    if args.curves_path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--curves_path {args.curves_path} must end in .png, .pdf or .svg")
    outputs = [args.metrics_path, args.curves_path, args.model_out, args.log_path, progress_path(args)]
    outputs += [args.results_dir / name for name in RESULT_FILES]
    inputs = [args.labels_path, *([args.weights] if args.weights not in ("imagenet", "none") else [])]
    check_writable(outputs if args.no_cache else [*outputs, args.cache_dir / "features"], inputs, [args.image_dir])
    return args


def progress_path(args):
    return Path(f"{args.model_out}.progress")


def settings_of(args, run, model):
    """All that the result of a run depends on, by the names under which a user knows it."""
    settings = {f"--{name}": value for name, value in run["arguments"].items() if name not in PLACES}
    weights = digest(*(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))
    return settings | {name: run[name] for name in ("device", "precision")} | run["versions"] | {
        "the backbone's weights": weights,
        "data (rows of the sheet and photos)": run["data_fingerprint"],
    }  # fmt: skip


def memory_is_full(error):
    """Whether an error tells of it; torch's own are RuntimeErrors, as is that of a worker process that was ended."""
    told = ("can't allocate memory", "out of memory", "exited unexpectedly")
    return isinstance(error, MemoryError) or any(text in str(error) for text in told)


def train(argv, lines, parser, group):
    """The whole run, from the flags to the report; returns whether it was interrupted."""
    started = time.perf_counter()
    args = group.first(lambda: complete_arguments(parser.parse_args(argv)))
    places = [args.metrics_path, args.curves_path, args.model_out, args.log_path]
    with alone([] if group.rank else [args.results_dir / "predictions.csv", *places]):
        device = pick_device(args.device, group)
        precision = group.first(pick_precision, args.precision, device)
        labels = group.first(load_labels, args)
        labels = filter_missing_images(labels, args.image_dir, args.target, group)
        splits = group.first(make_splits, labels, args)
        torch.manual_seed(args.seed)
        learn_from = args.unfreeze_from if args.freeze_backbone else ""
        name = None if args.metadata_only else args.model_name
        model = build_model(name, args.weights, learn_from, precision, device, args.image_size, group)
        photos = BiomassDataset(labels, args.target, args.seed, model.image_size)
        run = group.first(describe_run, argv, args, device, precision, labels, group.size)
        progress = group.first(lambda: Progress(progress_path(args), settings_of(args, run, model), args.resume))
        progress.kept = not group.rank
        if not group.rank:
            open_log(lines, args.log_path, append=progress.found)
            log_run(run, args)
        loader = make_loader(model, photos, splits, args, group)
        if group.rank and loader.complete:
            return False
        save = (lambda *_: None) if group.rank else functools.partial(save_checkpoint, model, args)
        history, predictions, chosen = judge(loader, labels, splits, args, device, progress, save)
        if group.rank:
            return False
        metrics = summarize(predictions, chosen, splits, labels, args)
        metrics["run"] = run | {"seconds": round(time.perf_counter() - started, 1)}
        write_report(history, predictions, metrics, args, open_photo)
        log_result(metrics, args)
        logger.info(f"elapsed {time.perf_counter() - started:.1f} s")
        if "interrupted_after_epoch" in chosen:
            return True
        progress.remove()
        return False


def run(argv, group):
    """The script as one process of `group`; returns the exit status."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    until_now = signal.getsignal(signal.SIGINT)
    with logging_to_console() as lines:
        try:
            if not group.rank:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            interrupted = train(argv, lines, parser, group)
        except UserError as error:  # from a worker process it comes with a traceback before its last line
            if group.rank:
                group.make_way()
            parser.error(str(error).rpartition("\ninputs.UserError: ")[2].strip())
        except (MemoryError, RuntimeError) as error:
            group.make_way()
            if not memory_is_full(error):
                raise
            parser.error("the memory is full: pass a smaller --batch_size or --image_size, or close other programs")
        except OSError as error:
            place, reason = error.filename or "a file", error.strerror or one_line(error)
            parser.error(f"cannot read or write {place} ({reason}): close or free it and start again")
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGINT, until_now)
    if interrupted:
        parser.exit(130, "train_model.py: interrupted; what the log says was written is whole, --resume goes on\n")
    return 0


def main(argv=None):
    return together(functools.partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())

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
head -> grams -> report. First comes the recipe, what one would change: the loss, the augmentation, the head, the split.
In biomass/: reading.py (sheet and photos), plant.py (where the plant is), features.py (networks, weights, the store of
features, as a frozen backbone sees each photo once, and batches), writing.py (scores, tables, pictures, the log).
"""

import copy
import functools
import importlib.util
import io
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

try:
    from biomass import features, plant, reading, writing
    from biomass.reading import UserError
except ModuleNotFoundError as error:
    ours = (error.name or "").startswith("biomass")
    mend = "needs the folder biomass/ beside it: copy it there too" if ours else "pip install -r requirements.txt"
    sys.exit(f"error: {Path(__file__).name} {mend} ({error})")

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.data import Dataset

SAVE_EVERY = 30  # seconds between two states of a running training
LARGE_TARGET = 10  # mean of a target from which on a head that starts at 0 takes many epochs to come near
PLACES = "data_dir labels_path image_dir results_dir metrics_path curves_path model_out log_path cache_dir".split()
PLACES += ["num_workers", "resume", "device", "track", *vars(reading.PLAIN)]  # none of them changes the result

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- the recipe: each thing of it stands here alone

LOSSES = {  # of the transformed target, given its standard deviation
    "mse": lambda deviation: nn.MSELoss(),
    "mae": lambda deviation: nn.L1Loss(),
    "huber": lambda deviation: nn.HuberLoss(delta=deviation),
}
BENDS = {"log": (torch.log, torch.exp), "sqrt": (torch.sqrt, lambda root: root.clamp(min=0).square())}  # and back


class Augmentation:
    """None: a photo has one version, number 0, the photo as it is. Others add versions with other numbers."""

    predicted = (0,)  # the versions whose mean is the prediction

    def __init__(self, seed, views, mixed=False):
        self.seed, self.views, self.mixed = seed, views, mixed  # mixed: a pass need not be of one version

    def trained(self, number, rows):
        """The version of each row (n,) on which a pass over them trains; passes count from 0 over all epochs."""
        return np.zeros_like(rows)

    def kept(self, passes):
        """The versions on which so many passes train, as far as they come again."""
        return {int(self.trained(number, np.zeros(1, int))[0]) for number in range(passes)}

    def make(self, photo, version, content):
        """A version other than 0 of a Pillow photo of the backbone's size; `content` is the digest of its file."""
        raise NotImplementedError

    def of_tensor(self, images):
        """The predicted versions (n, versions, 3, size, size) of photos (n, 3, size, size)."""
        return images[:, None]

    def describe(self, version):
        """What a version hangs on, besides the code above."""
        return str(version)


class StudyAugmentation(Augmentation):
    """The study's flip, rotation and jitter: as many versions as --augment_views says, or a new one in every epoch."""

    FLIP, DEGREES, BRIGHTNESS, CONTRAST, SATURATION = 0.5, 10, 0.2, 0.2, 0.1

    def trained(self, number, rows):
        return np.full_like(rows, 1 + (number % self.views if self.views else number))

    def kept(self, passes):
        return super().kept(passes) if self.views else set()

    def make(self, photo, version, content):
        # not torchvision's, which draw from the global generator and so hang on the order of threads
        random = np.random.default_rng([self.seed, version - 1, int(content[:16], 16)])
        if random.random() < self.FLIP:
            photo = ImageOps.mirror(photo)
        photo = photo.rotate(random.uniform(-self.DEGREES, self.DEGREES))
        jitter = [(ImageEnhance.Brightness, self.BRIGHTNESS), (ImageEnhance.Contrast, self.CONTRAST)]
        jitter += [(ImageEnhance.Color, self.SATURATION)]
        for number in random.permutation(len(jitter)):
            enhance, strength = jitter[number]
            photo = enhance(photo).enhance(random.uniform(1 - strength, 1 + strength))
        return photo

    def describe(self, version):
        return f"{version} of seed {self.seed}"


class Symmetries(Augmentation):
    """The photo, its three quarter turns, and the mirror images of the four: to a camera above, eight of one plant.

    They are exact, without resampling or corners. Passes train on one after the other, or on all by chance where
    layers of the backbone learn, which would follow the version. A prediction is the mean of all.
    """

    predicted = tuple(range(8))

    def trained(self, number, rows):
        if self.mixed:
            return np.random.default_rng([self.seed, number]).integers(8, size=len(rows))
        return np.full_like(rows, number % 8)

    def kept(self, passes):
        return set(self.predicted) if self.mixed else super().kept(passes)

    def make(self, photo, version, content):
        return photo.transpose(Image.Transpose(version - 1))  # which numbers the seven others from 0

    def of_tensor(self, images):
        halves = [half for side in (images, images.transpose(2, 3)) for half in (side, side.flip(2))]
        return torch.stack([part for half in halves for part in (half, half.flip(3))], 1)


RECIPES = {  # flags; one that is given beside --recipe wins
    "study": "",
    "recommended": """--model_name tf_efficientnet_lite0 --image_size 288 --features last stages traits
        --standardize_features --target_transform sqrt --augmentation symmetries --dropout 0
        --epochs 40 --least_steps 75 --lr_schedule cosine --weight_decay 3""",
    "all_layers": """--model_name tf_efficientnet_lite0 --image_size 128 --features last stages traits
        --standardize_features --target_transform sqrt --augmentation symmetries --dropout 0
        --unfreeze_backbone --drop_path 0.2 --head_epochs 40 --epochs 12 --backbone_learning_rate 5e-4
        --least_steps 75 --lr_schedule cosine --weight_decay 3""",
}
AUGMENTATIONS = {"study": StudyAugmentation, "symmetries": Symmetries, "none": Augmentation}
BACKBONE_DECAY = 0.01  # the weight decay of a backbone that learns: what it knows is not to fade
HEAD_WIDTH, METADATA_WIDTH = 256, 32  # the study's head, and the one of the metadata beside it
TRAITS_WEIGHT, MOST_DEVIATIONS = 12, 4  # deviation of a trait where that of a feature is 1; beyond which traits are cut


class Head(nn.Module):
    """The study's head, features (n, width) and metadata (n, m) to outputs (n,): Dropout, Linear, ReLU, Linear.

    Metadata go through a smaller one beside it, and both meet in the last layer.
    """

    def __init__(self, width, metadata_width, dropout):
        super().__init__()
        self.features = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, HEAD_WIDTH), nn.ReLU())
        beside = METADATA_WIDTH if metadata_width else 0
        self.metadata = nn.Sequential(nn.Linear(metadata_width, beside), nn.ReLU()) if metadata_width else None
        self.last = nn.Linear(HEAD_WIDTH + beside, 1)

    def forward(self, features, metadata):
        sides = [self.features(features)] + ([self.metadata(metadata)] if self.metadata else [])
        return self.last(torch.cat(sides, 1)).squeeze(1)


def split_by_plant(labels, args):
    """Row numbers for training and validation: GroupShuffleSplit, so all photos of a plant are on one side."""
    from sklearn.model_selection import GroupShuffleSplit

    splitter = GroupShuffleSplit(n_splits=1, test_size=args.val_split, random_state=args.seed)
    try:
        return next(splitter.split(labels, groups=labels["_plant"]))
    except ValueError as error:
        named = reading.group_name(args.group_by)
        text = f"--val_split {args.val_split} of {labels['_plant'].nunique()} {named}(s) leaves a side"
        raise UserError(f"{text} of the split empty: change it, or name other columns in --group_by") from error


def check_split(labels, split, args, name=""):
    """The split without the training rows whose very photo is validated too; the log counts both sides."""
    (train_rows, val_rows), plants, contents = split, labels["_plant"].to_numpy(), labels["_content"].to_numpy()
    if set(plants[train_rows]) & set(plants[val_rows]):
        raise RuntimeError("a plant is on both sides of the split")
    shared = np.isin(contents[train_rows], contents[val_rows])
    if shared.any():
        rows = reading.name_rows(labels.iloc[train_rows[shared]])
        logger.info(f"{name}left {shared.sum()} training rows out, their photo is in validation too: {rows}")
    if shared.all():
        raise UserError("every training photo is a copy of a validation photo: nothing is left to train on")
    if labels[args.target].iloc[train_rows[~shared]].nunique() < 2:
        raise UserError(f"all training rows have the same {args.target}: nothing can be learned from one value")
    for side, rows in (("train", train_rows[~shared]), ("validation", val_rows)):
        plural = f"{len(set(plants[rows])):,} {reading.group_name(args.group_by)}s"
        mean = f"{labels[args.target].iloc[rows].mean():.4f} {reading.unit_of(args.target)}".rstrip()
        logger.info(f"{name}{side}: {len(rows):,} rows of {plural}, mean {args.target} {mean}")
    return train_rows[~shared], val_rows


# ---------------------------------------------------------------- photos


class BiomassDataset(Dataset):
    """Photos in their versions, with metadata and target; a photo is opened when it is asked for.

    `dataset[row, versions, edit]` is uint8 (len(versions), 3, size, size), float32 traits (t,), metadata (m,) and the
    target (); `dataset[row]` holds the photo as it is. A version depends on the photo's content, its number and the
    augmentation; an edit is None or a function from Pillow image to Pillow image that is applied before. `traits` are
    those of the photos by edit, (n, t), NaN where they were not measured, and t is 0 where the model has none.
    """

    def __init__(self, labels, args, backbone, augmentation):
        self.paths, self.contents = labels["_path"].to_numpy(object), labels["_content"].to_numpy(object)
        self.targets = torch.tensor(labels[args.target].to_numpy(np.float32))
        self.metadata, self.traits = torch.zeros(len(labels), 0), {None: torch.zeros(len(labels), 0)}
        self.size, self.interpolation, self.num_workers = backbone.size, backbone.interpolation, args.num_workers
        self.labels, self.augmentation = labels, augmentation

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        return self.__getitems__([item])[0]

    def __getitems__(self, items):
        """What PyTorch asks for a whole batch: photos are decoded on all cores, each once for all its versions."""
        items = [item if isinstance(item, tuple) else (item, (0,), None) for item in items]
        with ThreadPoolExecutor(reading.cores()) as pool:
            photos = list(pool.map(lambda item: self.look(*item), items))
        return [(photo, *self.beside(row, edit)) for photo, (row, _, edit) in zip(photos, items, strict=True)]

    def beside(self, rows, edit=None):
        """What goes into the model beside the photo, and the targets."""
        return self.traits[edit][rows], self.metadata[rows], self.targets[rows]

    def look(self, row, versions, edit):
        return self.pixels(self.open(row), versions, edit, self.contents[row])

    def open(self, row):
        """The photo of a row, RGB; raises UserError if it cannot be read any more, or is another one."""
        try:
            content = reading.read_file(self.paths[row])
            photo = reading.open_photo(content)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(f"{self.paths[row]}: {reading.fault_of(error)}; replace it or remove its row") from None
        if reading.digest(content) != self.contents[row]:
            raise UserError(f"the photo {self.paths[row]} was replaced during the run: start it again")
        return photo

    def of_photos(self, photos, metadata):
        """A dataset of n Pillow photos that lie in no file, with metadata (n, m), to be judged: it knows no targets."""
        other, empty = copy.copy(self), torch.zeros(len(photos), 0)
        other.contents = np.array([reading.digest(repr(photo.size), photo.tobytes()) for photo in photos], object)
        other.open, other.paths, other.metadata = photos.__getitem__, other.contents, metadata
        other.traits, other.targets = {None: empty}, torch.full((len(photos),), torch.nan)
        other.num_workers = 0  # as there is nothing to decode
        return other

    def pixels(self, photo, versions=(0,), edit=None, content=""):
        """Versions of a Pillow photo as the backbone takes them: uint8 (len(versions), 3, size, size)."""
        photo = self.resize(edit(photo) if edit else photo)
        made = [self.augmentation.make(photo, version, content) if version else photo for version in versions]
        return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()

    def resize(self, photo):
        return photo.resize((self.size, self.size), self.interpolation)


# ---------------------------------------------------------------- model


class Backbone(nn.Module):
    """A network without its classifier: photos uint8 (n, 3, size, size) to features float32 (n, width).

    `stages` joins to the last features the averages of the maps before them, the last one of each shape that the
    network's children and grandchildren give: they see area and texture, which the last features have thrown away.
    For `drop_path` see the flag. Raises UserError where there is no such network, or none for this size or drop path.
    """

    def __init__(self, name, size=None, stages=False, drop_path=None):
        super().__init__()
        self.name, self.stages, self.averages = name, [], []
        try:
            self.net, self.size, mean, std, self.interpolation = features.build_network(name, size, drop_path)
            self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
            self.width = self.find_stages(stages)
        except (RuntimeError, ValueError, AssertionError) as error:
            flag = f"--image_size {size} does not suit {name}" if size else f"--model_name {name}"
            raise UserError(f"{flag}: {reading.one_line(error)}") from error

    @torch.inference_mode()
    def find_stages(self, stages):
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
        found = self.net((images.float() - self.mean) / self.std).flatten(1)
        return torch.cat([found, *self.averages], 1).float()


class BiomassModel(nn.Module):
    """A Backbone and a Head: photos (n, versions, 3, size, size), or features (n, versions, width), to (n, versions).

    Traits go into the head as further features: what has a size also as its logarithm, all standardised and cut.
    `learn_from` names the part of the network from which on it learns: None freezes it whole, "" lets all of it learn.
    What does not learn stays in eval mode, as BatchNorm would follow the photos without any gradient.
    """

    def __init__(self, backbone, learn_from=None, traits=0, metadata=0, target_transform="none", dropout=0.3):
        super().__init__()
        self.backbone, self.target_transform, self.learns = backbone, target_transform, learn_from is not None
        paths = [path for path, _ in backbone.net.named_modules()]  # in the order in which the network lists them
        if learn_from and not (learn_from in paths and [*backbone.net.get_submodule(learn_from).parameters()]):
            some = ", ".join(path for path, _ in backbone.net.named_children())
            raise UserError(f"--unfreeze_from {learn_from}: {backbone.name} has nothing to train there; try {some}")
        self.still_norms = False  # whether BatchNorm keeps its statistics where its layer learns
        self.frozen = {*(paths[: paths.index(learn_from)] if self.learns else paths)}
        for path in self.frozen:
            for parameter in backbone.net.get_submodule(path).parameters(recurse=False):
                parameter.requires_grad_(False)
        inputs = traits + len(plant.SIZES) if traits else 0
        self.head = Head(backbone.width + inputs, metadata, dropout)
        for name, width in {"feature": backbone.width, "trait": inputs}.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))
        for name, value in {"target_mean": 0.0, "target_scale": 1.0, "ratio": 1.0, "lowest": -math.inf}.items():
            self.register_buffer(name, torch.tensor(value))

    def train(self, mode=True):
        super().train(mode)
        for path, module in self.backbone.net.named_modules():
            if path in self.frozen or (self.still_norms and isinstance(module, nn.BatchNorm2d)):
                module.training = False
        return self

    def forward(self, inputs, traits, metadata):
        """Outputs in the unit of the loss; the head computes in fp32 whatever the backbone does."""
        count, versions = inputs.shape[:2]
        inputs = inputs.flatten(0, 1)
        found = self.backbone(inputs) if inputs.dim() == 4 else inputs
        with torch.autocast(found.device.type, enabled=False):
            found = (found.float() - self.feature_mean) / self.feature_scale
            if len(self.trait_mean):
                traits = (trait_inputs(traits) - self.trait_mean) / self.trait_scale
                traits = traits.nan_to_num(0).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS) * TRAITS_WEIGHT
                found = torch.cat([found, traits.repeat_interleave(versions, 0)], 1)
            outputs = self.head(found, metadata.repeat_interleave(versions, 0))
        return outputs.view(count, versions)

    def predict(self, inputs, traits, metadata):
        """Predictions (n,) in the unit of the target: the mean over the versions, in grams."""
        return self.to_grams(self(inputs, traits, metadata)).mean(1)

    def fit_features(self, found):
        """Centre the features and divide all by one common deviation, as one by its own may be next to nothing."""
        self.feature_mean.copy_(found.mean(0))
        self.feature_scale.fill_(float((found - found.mean(0)).pow(2).mean().sqrt()) or 1.0)

    def fit_traits(self, traits):
        """Learn mean and deviation of each trait from training photos, of colours from those that show a plant."""
        if traits.shape[1]:
            inputs = trait_inputs(traits).double().numpy()
            self.trait_mean.copy_(torch.from_numpy(np.nanmean(inputs, 0)))
            deviation = np.nanstd(inputs, 0)
            self.trait_scale.copy_(torch.from_numpy(np.where(deviation > 0, deviation, 1)))

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
        state = self.state_dict()  # which is kept, as some networks ask for the version in it
        for name, tensor in list(state.items()):
            if name.rpartition(".")[0] in frozen:
                del state[name]
            else:
                state[name] = tensor.clone()
        return state


def trait_inputs(traits):
    """Traits (n, len(plant.TRAITS)) with the logarithms of the sizes, as growth and allometry are power laws."""
    return torch.cat([traits, torch.log1p(traits[:, : len(plant.SIZES)])], 1)


# ---------------------------------------------------------------- loop


def new_model(batches, backbone, train_rows):
    """A model where training starts: always the same random weights, and all scales from the training rows alone."""
    dataset, args = batches.dataset, batches.args
    torch.manual_seed(args.seed)
    plan = reading.plan_metadata(dataset.labels.iloc[train_rows], args.metadata_columns)
    dataset.metadata = torch.from_numpy(reading.encode_metadata(dataset.labels, plan))
    if features.learns(args):
        backbone = copy.deepcopy(backbone)
        if batches.accelerator.device.type == "cpu" and args.precision == "bf16":
            features.keep_depthwise_in_fp32(backbone.net)
    learn_from = args.unfreeze_from or (None if args.freeze_backbone else "")
    widths = dataset.traits[None].shape[1], dataset.metadata.shape[1]
    model = BiomassModel(backbone, learn_from, *widths, args.target_transform, args.dropout)
    model.still_norms = args.head_epochs > 0  # as the head learns first from features of these statistics
    model.plan, model.trained_on = plan, {"rows": len(train_rows), "plants": plants_of(dataset.labels, train_rows)}
    model.fit_targets(dataset.targets[train_rows])
    model.fit_traits(dataset.traits[None][train_rows])
    if args.standardize_features:
        model.fit_features(batches.features(model, train_rows))
    return model.to(batches.accelerator.device)


def make_optimizer(model, args):
    """AdamW over all that learns, and the schedule of the rates; a head that has learned before goes on at one rate."""
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    backbone = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    rate = args.backbone_learning_rate or args.learning_rate
    groups = [
        {"params": head, "lr": rate if args.head_epochs else args.learning_rate, "weight_decay": args.weight_decay}
    ]
    groups += [{"params": backbone, "lr": rate, "weight_decay": BACKBONE_DECAY}] if backbone else []
    optimizer = torch.optim.AdamW(groups, fused=True)
    if args.lr_schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)


def train_head(model, batches, rows, loss_function):
    """Let the head learn alone for --head_epochs, on the features of a backbone that still stands still.

    The gradients of a random head would spoil features that are good (Kumar et al. 2022, ICLR, arXiv 2202.10054).
    """
    frozen = {"freeze_backbone": True, "unfreeze_from": None, "epochs": batches.args.head_epochs, "head_epochs": 0}
    args = SimpleNamespace(**(vars(batches.args) | frozen))
    alone = features.Batches(batches.dataset, batches.engine, batches.store, args, batches.accelerator)
    alone.collect(rows, rows[:0])
    optimizer, schedule = make_optimizer(model, args)
    torch.manual_seed(args.seed)
    for epoch in range(1, args.epochs + 1):
        loss = train_one_epoch(model, alone.train(rows, epoch), optimizer, loss_function, alone)
        schedule.step()
    logger.info(f"the head has learned alone for {args.epochs} epochs  train_loss {loss:.5f}")


def train_one_epoch(learner, loader, optimizer, loss_function, batches):
    """One pass over a loader; returns the mean squared error over the rows, in the target's unit."""
    learner.train()
    model, device, squares = batches.accelerator.unwrap_model(learner), batches.accelerator.device, []
    for inputs, *beside, targets in loader:
        outputs = learner(inputs.to(device), *(part.to(device) for part in beside))
        targets = targets.to(device)
        batches.accelerator.backward(loss_function(outputs, model.to_loss_unit(targets)[:, None].expand_as(outputs)))
        optimizer.step()
        optimizer.zero_grad()
        errors = model.to_grams(outputs.detach()).mean(1) - targets
        squares.append(batches.gather(errors.square()))
    return float(torch.cat(squares).double().mean())


@torch.inference_mode()
def evaluate(model, loader, batches, engine=None):
    """Predictions float64 (n,) and targets float32 (n,) of the rows of a loader, in the target's unit.

    `engine` runs a backbone that learns, as it is now; without one it is made.
    """
    model.eval()
    device, predictions, measured = batches.accelerator.device, [], []
    engine = engine or batches.engine_of(model)
    with features.threads(reading.cores()):  # of eight versions a row there is work for all of them
        for inputs, *beside, targets in loader:
            predicted = model.predict(batches.see(inputs, engine), *(part.to(device) for part in beside))
            predictions.append(batches.gather(predicted))
            measured.append(batches.gather(targets.to(device)))
    return torch.cat(predictions).double(), torch.cat(measured)


def weigh(model, batches, photos, metadata):
    """Predictions float64 (n,) of n Pillow photos with metadata (n, m), just as of rows; the store keeps features."""
    own = batches.of_photos(photos, metadata)
    predicted = evaluate(model, own.judge(np.arange(len(photos))), own)[0].numpy()
    if model.learns:
        batches.accelerator.free_memory()  # which else keeps the photos
    return predicted


def fit(model, batches, split, progress, name="", epochs=None):
    """Train on rows; the model keeps what it had learned in the chosen epoch.

    `split` are rows to learn from and to validate on. The chosen epoch is that of the lowest squared error on the
    latter, whatever the loss, of --epochs or until --patience is spent; with `epochs`, or no rows to validate on, it is
    the last one. Returns {history, epoch, predictions} of the validation rows, and `interrupted` after Ctrl-C if an
    epoch could be chosen. Goes on where `progress` stands.
    """
    (learn, watch), args, accelerator = split, batches.args, batches.accelerator
    choose_best = epochs is None and len(watch) > 0
    optimizer, schedule = make_optimizer(model, args)
    deviation = float(model.to_loss_unit(batches.dataset.targets[learn].to(accelerator.device)).std())
    loss_function = LOSSES[args.loss](deviation if deviation > 0 else 1.0)  # of a single row it is not a number
    if model.learns and args.head_epochs and name not in progress.states:
        train_head(model, batches, learn, loss_function)
    torch.manual_seed(args.seed + accelerator.process_index * model.learns)  # no two processes drop out the same
    done = progress.restore(name, model, optimizer, schedule)
    learner, optimizer = accelerator.prepare(model, optimizer) if model.learns else (model, optimizer)
    state = take_state(model, optimizer, schedule, done)
    try:
        for epoch in range(len(done["history"]) + 1, (epochs or args.epochs) + 1):
            if choose_best and args.patience and epoch - 1 - done["epoch"] >= args.patience:
                logger.info(f"{name}stopped: no lower val_loss for {args.patience} epochs")
                break
            loss = train_one_epoch(learner, batches.train(learn, epoch), optimizer, loss_function, batches)
            row = {"epoch": epoch, "train_loss": loss}
            predictions = validate(model, batches, split, row)
            schedule.step()
            done = add_epoch(done, row, predictions, model, choose_best, name)
            state = take_state(model, optimizer, schedule, done)
            progress.keep(name, state)
            log_epoch(row, name, progress, batches)
    except KeyboardInterrupt:  # perhaps within an epoch, so what counts is the state after the last whole one
        done = state["done"]
        progress.keep(name, state, at_once=True)
        if not (choose_best and done["history"]):
            raise
        logger.info(f"{name}interrupted after epoch {len(done['history'])}: what follows is of the best one so far")
        done = done | {"interrupted": True}
    if model.learns:
        accelerator.free_memory()  # which else keeps each fold's model
    model.load_state_dict(done["best_state"], strict=False)
    return {what: value for what, value in done.items() if what != "best_state"}


def validate(model, batches, split, row):
    """Balance the model, and note its errors on the rows to validate on in the epoch's `row`; returns predictions."""
    (learn, watch), engine = split, batches.engine_of(model)  # one for both, as its first use takes seconds
    if model.target_transform in BENDS:
        model.balance(*evaluate(model, batches.train(learn, row["epoch"], passes=1), batches, engine))
    if not len(watch):
        return None
    predictions, measured = evaluate(model, batches.judge(watch), batches, engine)
    row["val_loss"] = float(nn.functional.mse_loss(predictions, measured.double()))
    row["val_rmse"] = math.sqrt(row["val_loss"])
    return predictions


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


def log_epoch(row, name, progress, batches):
    args = batches.args
    losses = "  ".join(f"{what} {value:.5f}" for what, value in row.items() if what.endswith("loss"))
    rmse = f"  val_rmse {row['val_rmse']:.4f} {reading.unit_of(args.target)}".rstrip() if "val_rmse" in row else ""
    logger.info(f"{name}epoch {row['epoch']}/{args.epochs}  {losses}{rmse}")
    if args.track:
        before = sum(len(result["history"]) for result in progress.results.values())  # trackers want growing steps
        part = re.sub(r"\W+", "_", re.sub(r"/\d+", "", name).strip()) + "/" if name else ""  # "fold 1/5" as fold_1
        batches.accelerator.log({f"{part}{what}": value for what, value in row.items()}, step=before + row["epoch"])


# ---------------------------------------------------------------- progress, from which --resume goes on; checkpoint


class Progress:
    """What a run has done so far, kept beside its checkpoint: results of whole parts (folds), states of begun ones.

    The main process reads and writes the file; all get what it has read. Raises UserError for a file of another run.
    """

    def __init__(self, args, description, backbone, code):
        self.path, self.results, self.states = Path(f"{args.model_out}.progress"), {}, {}
        self.written = time.monotonic()
        self.main = PartialState().is_main_process
        self.settings = {f"--{key}": value for key, value in description["arguments"].items() if key not in PLACES}
        self.settings |= description["versions"] | {"device": description["device"]}
        self.settings |= {"data (rows and photos)": description["data_fingerprint"], "code": reading.digest(code)}
        self.settings["the backbone's weights"] = features.weights_digest(backbone)
        if args.resume:
            [(fault, self.results, self.states)] = broadcast_object_list([self.read() if self.main else None])
            if fault:
                raise UserError(f"--resume: {self.path} {fault}")

    def read(self):
        """What is wrong with the file, "" if nothing; results and states."""
        if not self.path.is_file():
            logger.info(f"nothing to resume, there is no {self.path}: the run starts from the beginning")
            return "", {}, {}
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            different = [key for key in self.settings if kept["settings"].get(key) != self.settings[key]]
            for key in different[:1]:
                both = f"{key} {kept['settings'].get(key)}, now it is {self.settings[key]}"
                both = "other code of the recipe" if key == "code" else both
                return f"is of a run with {both}; start with what was, or anew without --resume", {}, {}
            return "", kept["results"], kept["states"]
        except Exception as error:  # whatever a foreign file makes the unpickler stumble over
            return f"is damaged ({type(error).__name__}); start anew without --resume", {}, {}

    def restore(self, name, model, optimizer, schedule):
        """Bring all to where the part `name` stands; returns what has been done, without a state nothing."""
        state = self.states.get(name)
        if not state:
            return {"history": [], "epoch": 0, "predictions": None, "best_state": model.learned_state()}
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if self.main:  # the others would drop out the same
            torch.set_rng_state(state["random"])
            if state["random_gpu"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["random_gpu"])
        logger.info(f"resumed after epoch {len(state['done']['history'])}")
        return state["done"]

    def keep(self, name, state, at_once=False):
        """Note where a part stands, in the file at most every SAVE_EVERY seconds."""
        if at_once or time.monotonic() - self.written >= SAVE_EVERY:
            self.states = {name: state}
            self.write()

    def finish(self, name, result):
        self.results[name], self.states = result, {}
        self.write()

    def write(self):
        self.written = time.monotonic()
        if self.main:
            kept = {"settings": self.settings, "results": self.results, "states": self.states}
            save_plain(kept, self.path, told=False)

    def remove(self):
        if self.main:
            self.path.unlink(missing_ok=True)


def take_state(model, optimizer, schedule, done):
    """Copy of all that a training needs to go on after an epoch."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {"model": model.learned_state(), "optimizer": copy.deepcopy(optimizer.state_dict()), "done": done}
    return state | {"schedule": schedule.state_dict(), "random": torch.get_rng_state(), "random_gpu": on_gpu}


def save_plain(content, path, told=True):
    """Write tensors and plain values whole or not at all."""
    packed = io.BytesIO()  # as torch does not tell that a disk is full
    torch.save(content, packed)
    with writing.whole_file(path, told) as partial:
        partial.write_bytes(packed.getbuffer())


def save_checkpoint(model, args, epoch, calibration=None, familiar=None):
    """All that predict.py needs, in tensors and plain values: it loads with weights_only=True.

    `calibration` and `familiar` are what held-out photos taught, see cross_validate.py.
    """
    backbone, state = model.backbone, model.state_dict()
    state.update({name: value.cpu() for name, value in state.items()})
    settings = {"name": backbone.name, "size": backbone.size, "stages": bool(backbone.stages)}
    settings |= {"target_transform": model.target_transform, "precision": args.precision}
    settings |= {"traits": len(model.trait_mean) > 0, "augmentation": args.augmentation, "dropout": args.dropout}
    content = {"model_state": state, "settings": settings, "metadata": model.plan, "trained_on": model.trained_on}
    content |= {"calibration": calibration, "familiar": familiar, "target": args.target}
    content |= {"unit": reading.unit_of(args.target), "group_by": args.group_by, "epoch": epoch, "seed": args.seed}
    save_plain(content, args.model_out)


# ---------------------------------------------------------------- how a run was made


def describe_run(script, argv, args, labels, engine):
    """How the numbers were made: command, commit, versions, device and a fingerprint of the data."""
    columns = list(dict.fromkeys(["filename", "_content", args.target, *args.group_by, *args.metadata_columns]))
    packages = "torch torchvision timm accelerate openvino numpy scipy pandas scikit-learn scikit-image pillow".split()
    several, device = PartialState().num_processes, engine.device
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    changed = git("status", "--porcelain", "--", "*.py", "requirements.txt")
    return {
        "command": f"{'python' if several == 1 else 'torchrun ...'} {script} {shlex.join(argv)}".rstrip(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "commit": git("rev-parse", "HEAD"),
        "clean_tree": None if changed is None else not changed,
        "versions": {"python": platform.python_version()} | {name: features.package_version(name) for name in packages},
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cores": reading.cores(),
        "processes": several,
        "engine": engine.name,
        "data_fingerprint": reading.digest(labels[columns].to_csv(index=False)),
    }


def git(*command):
    """What git says where this script is; None where it cannot tell."""
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def log_run(description):
    arguments = " ".join(f"{name}={value}" for name, value in description["arguments"].items())
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    for name, value in (description | {"arguments": arguments, "versions": versions}).items():
        logger.info(f"{name}: {value}")


def start_accelerator(args, started):
    """Accelerate's view of devices and processes; fixes --precision where it is auto."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (args.device == "cuda" and not cuda) or (args.device == "mps" and not mps):
        raise UserError(f"--device {args.device}: PyTorch finds none here; pass --device cpu")
    on_cpu = args.device == "cpu" or not (cuda or mps)
    if cuda and not on_cpu and int(os.environ.get("LOCAL_WORLD_SIZE") or 1) > torch.cuda.device_count():
        raise UserError(f"more processes than {torch.cuda.device_count()} GPUs: pass --device cpu, or start fewer")
    if args.precision == "auto":
        args.precision = "bf16" if is_faster_in_bf16(on_cpu) else "fp32"
    AcceleratorState._reset_state()  # it is shared by all of a process, and this may be its second run
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if args.precision == "bf16" and features.learns(args) else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=args.track,
        project_dir=args.results_dir,
    )
    if features.learns(args) and (args.batch_size % accelerator.num_processes or args.batch_size < 2):
        text = f"--batch_size {args.batch_size} must be at least 2 and a multiple of {accelerator.num_processes}"
        raise UserError(f"{text}, the number of processes, where layers of the backbone learn")
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


def is_faster_in_bf16(on_cpu):
    """Whether that saves time: Intel's processors need AMX for it, by AVX512 alone fp32 is faster."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    by_avx512_alone = "Intel" in able.get("cpu_name", "") and not able.get("amx_bf16")
    return has_bf16(on_cpu) and not (on_cpu and by_avx512_alone)


# ---------------------------------------------------------------- command line

FEATURES = """what the head sees: the backbone's last features, always; stages: also the averages of its earlier maps;
    traits: also what a person would measure on the plant, if 19 of 20 photos show one"""
AUGMENTATION = """study: flip, rotation, jitter; symmetries: quarter turns and mirror images, in predictions too, for
    cameras that look straight down, whose photos have no up; none: the photos as they are"""
VIEWS = """versions of each training photo that the study's augmentation keeps where the backbone is frozen: pass p over
    the photos trains on version (p - 1) mod this; 0: a new one in every pass"""
RATE = "of the backbone, and after --head_epochs of the head too (default: --learning_rate)"
DROP_PATH = """where layers of the backbone learn: share of a step's photos that skip a block at its end, fewer skip
    earlier ones (stochastic depth, Huang et al. 2016; default: as the library has it)"""
HEAD = "where layers of the backbone learn: passes before, in which the head learns alone, on features of the store"
STEPS = "steps that an epoch takes at least: where photos are few it passes over them several times"
PATIENCE = """stop after so many epochs without a lower squared error on validation, which also chooses the best epoch,
    whatever the loss; 0: never"""


def build_parser(prog="train_model.py", about=__doc__, results="results", model="models/biomass_resnet.pt"):
    parser, number = writing.new_parser(prog, about), writing.number
    add = reading.add_data_flags(parser).add_argument
    add("--val_split", type=number(float, 0, 1, ends=False), default=0.2, help="share of the plants to validate on")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of split, augmentation, random weights and order")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--recipe", choices=list(RECIPES), default="study", help="sets the flags of a whole recipe, but for those given"
    )
    add("--model_name", default="resnet18", help="backbone: any of torchvision's classifiers, else any of timm's")
    text = "of the backbone: imagenet, none (random), a .pth or .safetensors FILE"
    add("--weights", type=os.path.expanduser, default="imagenet", help=text)
    add("--image_size", type=number(int, 32, 2048), help="pixels a side (default: as the weights were trained)")
    add("--features", nargs="+", choices=["last", "stages", "traits"], default=["last"], help=FEATURES)
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
    add("--head_epochs", type=number(int, 0), default=0, help=HEAD)
    add("--least_steps", type=number(int, 0), default=0, help=STEPS)
    add("--learning_rate", type=positive, default=1e-3, help="of AdamW")
    add("--backbone_learning_rate", type=positive, help=RATE)
    add("--weight_decay", type=number(float, 0), default=0.01, help="of AdamW, on the head; the backbone's is 0.01")
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help="cosine: towards 0 at the end")
    add("--patience", type=number(int, 0), default=0, help=PATIENCE)
    add("--dropout", type=number(float, 0, 1), default=0.3, help="share of the features that a step leaves out")
    add("--drop_path", type=number(float, 0, 1), help=DROP_PATH)
    add("--loss", choices=list(LOSSES), default="mse", help="of the transformed target")
    transformed = ["none", "log", "sqrt", "standardize"]
    add("--target_transform", choices=transformed, default="none", help="undone before every number that is shown")
    add("--augmentation", choices=list(AUGMENTATIONS), default="study", help=AUGMENTATION)
    add("--augment_views", type=number(int, 0), default=4, help=VIEWS)
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is faster")
    add("--num_workers", type=number(int, 0), default=0, help="processes that decode photos; 0: threads of this one")
    features.add_cache_flag(add)
    add("--resume", action="store_true", help="go on with the same run, if it was stopped")
    add = parser.add_argument_group("output").add_argument
    add("--results_dir", type=reading.a_path, default=results, help="folder of the metrics, tables and pictures")
    add("--metrics_path", type=reading.a_path, help="JSON (default: RESULTS_DIR/metrics.txt)")
    add("--curves_path", type=reading.a_path, help="picture (default: RESULTS_DIR/training_curves.png)")
    add("--model_out", type=reading.a_path, default=model, help="checkpoint")
    log = "training.log" if results == "results" else None
    text = "log of the latest run" + ("" if log else " (default: RESULTS_DIR/training.log)")
    add("--log_path", type=reading.a_path, default=log, help=text)
    add("--track", choices=["tensorboard", "mlflow", "wandb"], help="also log each epoch there, if it is installed")
    return parser


def parse_arguments(parser, argv):
    """The flags as given, else as --recipe sets them, else their defaults; the log tells those of the recipe."""
    recipe = RECIPES[parser.parse_args(argv).recipe].split()
    args = parser.parse_args(argv, parser.parse_args(recipe))
    if recipe:
        logger.info(f"recipe {args.recipe}, but for flags that were given: {' '.join(recipe)}")
    return args


def complete_arguments(args):
    """Fill in what hangs on other flags; find out before the work what would stop the run after it."""
    reading.complete_data_flags(args)
    args.metrics_path = args.metrics_path or args.results_dir / "metrics.txt"
    args.curves_path = args.curves_path or args.results_dir / "training_curves.png"
    args.log_path = args.log_path or args.results_dir / "training.log"
    recipe = build_parser().parse_args(RECIPES[args.recipe].split())
    for flag in () if features.learns(args) else ("backbone_learning_rate", "drop_path"):
        if getattr(args, flag) and getattr(args, flag) != getattr(recipe, flag):
            raise UserError(f"--{flag} needs --unfreeze_backbone or --unfreeze_from: the backbone is frozen")
        setattr(args, flag, None)  # if it was the recipe's, it stands beside --freeze_backbone
    if args.curves_path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--curves_path {args.curves_path} must end in .png, .pdf or .svg")
    found = args.track and importlib.util.find_spec(args.track)
    if args.track and not (found and found.origin):  # a mere folder of that name has no origin
        raise UserError(f"--track {args.track} needs its package: pip install {args.track}")
    outputs = [args.metrics_path, args.curves_path, args.model_out, args.log_path]
    outputs += [args.results_dir / name for name in ("history.csv", "predictions.csv", "predictions.png")]
    writing.check_writable(outputs, [args.labels_path, args.weights], args.image_dir)


def open_store(args, started):
    """The store of features in --cache_dir, or for `none` in a folder that is there for this run alone."""
    if str(args.cache_dir) == "none":
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError("--cache_dir none: several processes share the cache; pass a folder that all of them see")
        args.cache_dir = Path(started.enter_context(tempfile.TemporaryDirectory()))
    writing.check_writable([args.cache_dir / "features.sqlite"], [], None)
    return features.Store(args.cache_dir)


def prepare(script, argv, args, started, recipe=()):
    """What a run needs before its first training, as a namespace; `recipe` is code that its result hangs on too."""
    begun = time.perf_counter()
    complete_arguments(args)
    store, accelerator = open_store(args, started), start_accelerator(args, started)
    # a head's batches are so small that threads would only wait for each other
    torch.set_num_threads(reading.cores() if features.learns(args) else 1)
    labels, known = reading.load_labels(args), store.known_photos()
    lowest = labels[args.target].min()
    if (args.target_transform == "log" and lowest <= 0) or (args.target_transform == "sqrt" and lowest < 0):
        text = f"--target_transform {args.target_transform} cannot take {lowest:g}, the least {args.target}"
        raise UserError(f"{text}; pass --target_transform standardize")
    if args.target_transform == "none" and labels[args.target].abs().mean() > LARGE_TARGET:
        logger.info(f"warning: {args.target} is {labels[args.target].mean():,.4g} in the mean, far from where the head "
                    "starts: pass --target_transform standardize")  # fmt: skip
    with accelerator.main_process_first():  # the others then find each photo's digest
        labels = reading.filter_missing_images(labels, args, known)
        store.remember_photos(known)
    torch.manual_seed(args.seed)
    backbone = Backbone(args.model_name, args.image_size, "stages" in args.features, args.drop_path)
    with accelerator.main_process_first():  # one download serves all
        features.load_weights(backbone, args.weights)
    if args.unfreeze_from:  # a layer that is not there is told before the log is opened
        BiomassModel(copy.deepcopy(backbone), args.unfreeze_from)
    backbone = backbone.to(accelerator.device, memory_format=torch.channels_last)
    learns = features.learns(args)
    augmentation = AUGMENTATIONS[args.augmentation](args.seed, 0 if learns else args.augment_views, mixed=learns)
    dataset = BiomassDataset(labels, args, backbone, augmentation)
    engine = features.Engine(backbone, accelerator.device, args.precision)
    batches = features.Batches(dataset, engine, store, args, accelerator)
    if "traits" in args.features:
        batches.add_traits()
    description = describe_run(script, argv, args, labels, engine)
    code = features.code_of(fit, new_model, BiomassModel, BiomassDataset, type(augmentation), *recipe)
    return SimpleNamespace(
        begun=begun,
        labels=labels,
        backbone=backbone,
        dataset=dataset,
        accelerator=accelerator,
        description=description,
        batches=batches,
        progress=Progress(args, description, backbone, code),
    )


def train(argv, started):
    """The whole run, from the flags to the report; returns the exit status."""
    if any(argument.partition("=")[0] == "--folds" for argument in argv):
        raise UserError("--folds: cross_validate.py does this; it takes the same flags")
    args = parse_arguments(build_parser(), argv)
    run = prepare("train_model.py", argv, args, started)
    split = check_split(run.labels, split_by_plant(run.labels, args), args)
    writing.open_log(args.log_path, append=bool(run.progress.states))
    log_run(run.description)
    run.batches.collect(*split)
    model = new_model(run.batches, run.backbone, split[0])
    outcome = fit(model, run.batches, split, run.progress)
    if run.accelerator.is_main_process:
        save_checkpoint(model, args, outcome["epoch"])
        table = writing.prediction_table(run.labels, split, outcome["predictions"], args)
        metrics = writing.metrics_of(table, outcome["epoch"], "validation", outcome["history"], args)
        metrics |= count_sides(run.labels, split)
        if "interrupted" in outcome:
            metrics["interrupted_after_epoch"] = len(outcome["history"])
        finish(table, outcome["history"], metrics, run, args)
    if "interrupted" in outcome:
        raise KeyboardInterrupt
    run.progress.remove()
    return 0


def count_sides(labels, split):
    counts = [
        {f"{side}_rows": len(rows), f"{side}_plants": plants_of(labels, rows)}
        for side, rows in zip(("train", "val"), split, strict=True)
    ]
    return counts[0] | counts[1]


def plants_of(labels, rows):
    return int(labels["_plant"].iloc[rows].nunique())


def finish(table, history, metrics, run, args, third_panel=None):
    seconds = round(time.perf_counter() - run.begun, 1)
    writing.write_report(table, history, metrics | {"run": run.description | {"seconds": seconds}}, args, third_panel)
    writing.log_result(metrics, args)
    logger.info(f"elapsed {time.perf_counter() - run.begun:.1f} s")


def main(argv=None):
    return writing.run_script("train_model.py", train, argv, resumable=True)


if __name__ == "__main__":
    sys.exit(main())

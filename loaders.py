"""Batches for training: photos, or what the frozen part of the backbone says of them, computed once and kept."""

import collections
import itertools
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torchvision
from PIL import __version__ as pillow_version
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from devices import ALONE, cores
from feature_store import KEY_LENGTH, FeatureStore, digest
from inputs import UserError

PLAIN = -1  # number of the version of a photo that is not augmented
PREPROCESSING = 1  # raise it when open_photo, augment or normalize change: features kept before are then not found
MOST_MAPS = 4 * 2**30  # bytes of whole maps that are kept; they are a hundred times the features of the last layer
MOST_HELD = 2 * 2**30  # bytes of features held in memory; more are read from their files batch by batch
EXTRACTION_BATCH = {"cpu": 16, "mps": 64, "cuda": 256}  # photos a forward pass; larger gains nothing, costs memory

logger = logging.getLogger("train_model")


# ---------------------------------------------------------------- photos


class PhotoBatches(Dataset):
    """Photos a batch at a time: item b holds images uint8 (n, 3, size, size), metadata and targets of batches[b].

    `pairs` are rows and versions (len, 2); each process of `group` has its part of each batch, which can be empty.
    Pairs of the same row that follow one another cost one decoding.
    """

    def __init__(self, photos, pairs, batch_size, group=ALONE):
        self.photos = photos
        self.batches = group.deal(np.reshape(pairs, (-1, 2)), batch_size)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        batch = self.batches[number].tolist()
        images = [
            self.photos.views(row, [view for _, view in pairs])
            for row, pairs in itertools.groupby(batch, key=lambda pair: pair[0])
        ]
        images = np.concatenate(images) if images else np.zeros((0, *[self.photos.image_size] * 2, 3), np.uint8)
        # Bytes of a photo lie pixel by pixel, so this is channels_last without moving them.
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        rows = [row for row, _ in batch]
        return images, self.photos.metadata[rows], self.photos.targets[rows]


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
        own = torch.Generator()  # else workers' seeds are drawn from the generator that dropout draws from
        return DataLoader(batches, batch_size=None, num_workers=num_workers, generator=own)
    return in_threads(batches.__getitem__, len(batches), min(cores(), 16))


def bar(group, total, **texts):
    """A progress bar on the terminal, by the first process alone."""
    return tqdm(total=total, disable=True if group.rank else None, **texts)


def shuffled(rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(rows)


def pairs_of(rows, view):
    """(row, view) pairs (len(rows), 2)."""
    return np.column_stack([rows, np.full(len(rows), view)]).astype(np.int64)


class ImageLoader:
    """Batches of images, for a backbone that learns: fresh augmentation in every epoch."""

    complete = False  # whether nothing is left to do but to train a head, which one process does alone

    def __init__(self, model, photos, args, group=ALONE):
        self.model, self.photos, self.args, self.group = model, photos, args, group

    def train(self, rows, epoch):
        view = PLAIN if self.args.no_augmentation else epoch - 1
        return self.batches(pairs_of(shuffled(rows, self.args.seed, epoch), view))

    def validation(self, rows):
        return self.batches(pairs_of(rows, PLAIN))

    def batches(self, pairs):
        batches = PhotoBatches(self.photos, pairs, self.args.batch_size, self.group)
        with bar(self.group, len(batches), leave=False) as shown:
            for batch in read_ahead(batches, self.args.num_workers):
                yield batch
                shown.update()


# ---------------------------------------------------------------- features


def extract_features(model, part, photos, pairs, num_workers=0, group=ALONE):
    """Yield what a frozen part of the backbone says of (row, view) pairs, float32 (n, ...) a batch."""
    extractor, device = model.extractor(part), next(model.parameters()).device
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
        computed = (features(images) for images, *_ in read_ahead(batches, num_workers))
    try:
        with bar(group, len(pairs), unit="photo", desc="features") as shown:
            for batch in computed:
                yield batch
                shown.update(len(batch))
    finally:
        torch.set_num_threads(threads)


class FeatureLoader:
    """Batches of features: what the frozen `part` of the backbone says of each photo, computed once and kept.

    Epoch e trains on version (e - 1) mod `--augment_views` of each photo; with `--augment_views 0` each epoch has a
    version of its own, which is not kept; with `--no_augmentation` all train on the plain photos. `part` None stands
    for no photos at all: batches of metadata alone. The processes of `group` share the extraction. If nothing learns
    before the head, the first process then has all batches, and the others none.
    """

    def __init__(self, model, part, photos, splits, args, group=ALONE):
        self.model, self.part, self.photos, self.args = model, part, photos, args
        self.views = list(range(min(args.augment_views, args.epochs)))
        if not part or args.no_augmentation:
            self.views = [PLAIN]
        self.complete = bool(self.views) and not model.learning
        self.group = ALONE if self.complete else group
        if part:
            self.recipe = self.describe()
            self.stored, self.place = self.look_up(self.versions(splits), args.cache_dir, group)
        else:
            self.stored, self.place = np.zeros((len(photos), 0), np.float32), {PLAIN: np.arange(len(photos))}

    def describe(self):
        """All that features depend on beside the photo and its version."""
        model, state = self.model, self.part.state_dict()
        return {
            "backbone": f"{model.model_name} before {model.learn_from}" if model.learn_from else model.model_name,
            "weights": digest(*(tensor.cpu().numpy().tobytes() for tensor in state.values())),
            "preprocessing": f"{PREPROCESSING}: resize {model.image_size} mean {model.mean} std {model.std}",
            "precision": f"{model.precision} on {next(model.parameters()).device.type}",
            "versions": f"torchvision {torchvision.__version__} pillow {pillow_version} numpy {np.__version__}",
        }

    def versions(self, splits):
        """The (row, view) pairs that training and validation will ask for, photo by photo."""
        trained, validated = np.zeros((2, len(self.photos)), bool)
        for train_rows, val_rows in splits:
            trained[train_rows] = validated[val_rows] = True
        trained |= bool(self.args.folds)  # the model that is saved learns from all rows
        views = np.array(list(dict.fromkeys([PLAIN, *self.views])))
        wanted = np.column_stack([trained] * len(views))
        wanted[:, 0] = validated | trained if PLAIN in self.views else validated
        rows, columns = np.nonzero(wanted)
        return np.column_stack([rows, views[columns]])

    def look_up(self, pairs, cache_dir, group):
        """Features of (row, view) pairs, from the store where it has them, and for each view the rows' places there."""
        # float16 holds what bf16 computes; features of fp32 stay as they are, so that they equal the whole model's
        dtype = np.float16 if self.model.precision == "bf16" else np.float32
        keys = (self.photos.key(row, view).encode() for row, view in pairs)
        keys = np.fromiter(keys, f"S{KEY_LENGTH}", len(pairs))
        batch = EXTRACTION_BATCH[next(self.model.parameters()).device.type]
        try:
            cache_dir = None if self.args.no_cache else cache_dir
            store = FeatureStore(cache_dir, self.recipe, stored_shape(self.model, self.part), dtype)
            by_all = not self.complete
            store.complete(keys, lambda missing: self.extract(pairs[missing], group), group, batch, by_all)
            if group.rank and not by_all:
                return None, {}
            for seconds in (0, *([5, 10, 20, 30, 30] if group.size > 1 else [])):  # shared folders may show files late
                time.sleep(seconds)
                places = store.places(keys)
                if (places >= 0).all():
                    break
        except OverflowError as error:
            raise UserError("the backbone's features do not fit float16: pass --precision fp32") from error
        except OSError as error:
            raise UserError(f"cannot keep features in {cache_dir} ({error}): pass another --cache_dir") from error
        if (places < 0).any():
            raise UserError(f"--cache_dir {cache_dir} must be one folder that all processes see: pass a shared one")
        if len(keys) * store.row.itemsize <= MOST_HELD / self.group.size:
            store, places = store[places], np.arange(len(keys))
        place = {view: np.full(len(self.photos), -1) for view in np.unique(pairs[:, 1]).tolist()}
        for view, of_rows in place.items():
            here = pairs[:, 1] == view
            of_rows[pairs[here, 0]] = places[here]
        return store, place

    def extract(self, pairs, group):
        return extract_features(self.model, self.part, self.photos, pairs, self.args.num_workers, group)

    def train(self, rows, epoch):
        dealt = self.group.deal(shuffled(rows, self.args.seed, epoch), self.args.batch_size)
        if self.views:
            return self.batches(dealt, self.stored, self.place[self.views[(epoch - 1) % len(self.views)]])
        fresh, place = self.look_up(pairs_of(np.concatenate(dealt), epoch - 1), None, ALONE)
        return self.batches(dealt, fresh, place.get(epoch - 1, self.place[PLAIN]))  # which serves if no row was dealt

    def validation(self, rows):
        return self.batches(self.group.deal(rows, self.args.batch_size), self.stored, self.place[PLAIN])

    def batches(self, dealt, stored, place):
        """Yield (features, metadata, targets) of the dealt rows; `place` is where each row has its features."""
        for rows in dealt:
            yield torch.from_numpy(stored[place[rows]]), self.photos.metadata[rows], self.photos.targets[rows]


@torch.inference_mode()
def stored_shape(model, part):
    """Shape of what a frozen part of the backbone says of one photo."""
    image = torch.zeros(1, 3, model.image_size, model.image_size, device=next(model.parameters()).device)
    return tuple(part.eval()(image).shape[1:])


def make_loader(model, photos, splits, args, group=ALONE):
    """Features where a part of the backbone is frozen that all the rest follows, else images."""
    if args.metadata_only:
        return FeatureLoader(model, None, photos, splits, args, group)
    part = model.split()
    if part is None:
        return ImageLoader(model, photos, args, group)
    versions = len(photos) * (1 if args.no_augmentation else 1 + min(args.augment_views, args.epochs))
    size = versions * math.prod(stored_shape(model, part)) * (2 if model.precision == "bf16" else 4)
    if size > MOST_MAPS and (model.learning or args.no_cache):
        before = f"before {model.learn_from}" if model.learn_from else "of all photos"
        logger.info(f"what is said {before} would take {size / 2**30:.1f} GiB: it is not kept")
        return ImageLoader(model, photos, args, group)
    return FeatureLoader(model, part, photos, splits, args, group)

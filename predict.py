"""Weigh plants in new photos with a model that train_model.py or cross_validate.py has trained.

    python predict.py photos/ --out predictions.csv                 a folder; with --recursive also what lies below it
    python predict.py a.png b.jpg --sheet contact_sheet.png         photos, and a picture of them with their weights
    python predict.py --labels_path new.xlsx --image_dir photos     the rows of a sheet, with metadata and known weights
    python predict.py --export biomass.onnx                         the model for other programs
    torchrun --standalone --nproc_per_node 4 predict.py photos/     by four processes, each with a GPU of its own

Reads  models/biomass_resnet.pt, or what --model names: all that is needed beside the photos is in it.
Writes a CSV with filename, predicted_g, low_g, high_g and note. low and high are the ends of an interval that holds
       90 % of the weights of plants never seen (--coverage); it, and the note `unlike training photos`, need a model
       of cross_validate.py. A photo that cannot be read has the reason in its note, and the exit status is 1.

The way of the data: photos_of (a table of photos) -> weigh_photos -> add_interval -> write_table, draw_sheet.
"""

import argparse
import io
import itertools
import logging
import math
import os
import sys
import textwrap
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

import train_model as tm

UNLIKE = "unlike training photos"
CHUNK = 4096  # photos whose features are held at once, whole batches of tm.BATCH
THUMBNAILS, THUMBNAILS_A_ROW = 48, 8
SHEET_BYTES = 400_000

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- model


def read_model(path):
    """What a checkpoint holds, and its `model`, as a namespace. Raises UserError for any other file."""
    if not path.is_file():
        raise tm.UserError(f"no model at {path}: train one by train_model.py, or pass --model")
    try:
        scale = argparse.Namespace(**torch.load(path, map_location="cpu", weights_only=True))
        backbone = tm.Backbone(*(scale.settings[name] for name in ("name", "size", "stages")))
        unknown = pd.DataFrame({step["column"]: [None] for step in scale.metadata}, index=[0])
        width = tm.encode_metadata(unknown, scale.metadata).shape[1]
        scale.model = tm.BiomassModel(backbone, None, width, scale.settings["target_transform"]).eval()
        scale.model.load_state_dict(scale.model_state)
        no_rows = pd.DataFrame(columns=["_path", "_content", scale.target])
        scale.resize = tm.BiomassDataset(no_rows, scale, (backbone.size, backbone.interpolation)).transform
        scale.suffix = f"_{scale.unit}" if scale.unit else ""
        scale.trained_in = {"fp32": "fp32", "bf16": "bf16"}[scale.settings["precision"]]
        if scale.familiar:
            scale.familiar = {name: value.numpy() for name, value in scale.familiar.items()}
        how_unlike(scale, np.zeros((1, backbone.width)))  # with add_interval: damage shows now, not after hours
        add_interval(pd.DataFrame({"predicted": [1.0]}), scale, 0.1)
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign file makes the unpickler, or the code above, stumble over
        why = "" if isinstance(error, KeyError | AttributeError) else f" ({tm.one_line(error)[:200]})"
        raise tm.UserError(f"{path} is not a checkpoint of this train_model.py{why}") from error
    return scale


def how_unlike(scale, features):
    """Which photos are unlike the training photos, a mask (n,), by their features (n, width)."""
    if not scale.familiar:
        return np.zeros(len(features), bool)
    return tm.unlikeness(scale.familiar, features) > scale.familiar["limit"]


# ---------------------------------------------------------------- photos


def photos_of(args, scale):
    """A row for each photo: filename, _path, fault ("" if none so far), measured (NaN if unknown), and metadata."""
    columns = [step["column"] for step in scale.metadata]
    if args.labels_path:
        return rows_of_sheet(args, scale.target, columns)
    if columns:
        raise tm.UserError(f"{args.model} has learned from {', '.join(columns)} too: pass them by --labels_path")
    found = []
    for path in map(Path, args.photos):
        if not path.exists():
            raise tm.UserError(f"no photo and no folder at {path}")
        found += photos_in(path, args.recursive) if path.is_dir() else [(path.name, str(path))]
    table = pd.DataFrame(found, columns=["filename", "_path"], dtype=object)
    if table["filename"].duplicated().any():  # of several folders
        table["filename"] = table["_path"]
    table["filename"] = table["filename"].str.replace(os.sep, "/", regex=False)
    return table.assign(measured=np.nan, fault="")


def photos_in(folder, recursive):
    """Name below the folder and path of each photo in it, sorted."""

    def fail(error):
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        paths = [os.path.join(parent, name) for name in names if name.lower().endswith(tm.PHOTO_SUFFIXES)]
        found += [(os.path.relpath(path, folder), path) for path in paths if os.path.isfile(path)]
        if not recursive:
            folders.clear()
    if not found:
        hint = "" if recursive else "; --recursive looks into its folders too"
        raise tm.UserError(f"no photo in {folder} ({', '.join(tm.PHOTO_SUFFIXES)}){hint}")
    return sorted(found, key=lambda photo: photo[0].split(os.sep))


def rows_of_sheet(args, target, columns):
    sheet = tm.read_sheet(args.labels_path, columns)
    unnamed = sheet["filename"].isna()
    if unnamed.any():
        logger.info(f"left {unnamed.sum():,} rows without a file name out")
    sheet = sheet[~unnamed].reset_index(drop=True)
    if sheet.empty:
        raise tm.UserError(f"no row of {args.labels_path} has a file name")
    paths, faults = zip(*tm.find_photos(sheet["filename"], args.image_dir), strict=True)
    measured = tm.to_numbers(sheet[target]) if target in sheet else np.nan
    return sheet[["filename", *columns]].assign(_path=paths, fault=faults, measured=measured)


def read_photo(path, fault, scale):
    """Pixels uint8 (3, size, size) as in training, black where there is a fault; and the fault, "" if there is none."""
    if not fault:
        try:
            photo = scale.resize(tm.open_photo(path), tm.PLAIN, "")
            return torch.from_numpy(np.array(photo)).permute(2, 0, 1), ""
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
            fault = tm.fault_of(error)
    return torch.zeros(3, scale.model.backbone.size, scale.model.backbone.size, dtype=torch.uint8), fault


def read_ahead(table, scale, ahead):
    """What read_photo gives for each row, by threads that are at most `ahead` photos in front: memory is bounded."""
    waiting = deque()
    with ThreadPoolExecutor(tm.cores()) as pool:
        for path, fault in zip(table["_path"], table["fault"], strict=True):
            waiting.append(pool.submit(read_photo, path, fault, scale))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batches_of(photos, faults, size):
    """Whole batches uint8 (size, 3, side, side), filled up with black; `faults` gets the fault of each photo."""
    while batch := list(itertools.islice(photos, size)):
        images = [image for image, _ in batch]
        faults += [fault for _, fault in batch]
        yield torch.stack(images + [torch.zeros_like(images[0])] * (size - len(images)))


# ---------------------------------------------------------------- weighing


def weigh_photos(scale, table, accelerator):
    """`table` with predicted, unlike and the final fault; each process weighs its share of the photos."""
    with accelerator.split_between_processes(list(range(len(table)))) as own:
        weighed = pd.concat(gather_object([weigh_share(scale, table.iloc[own], accelerator)]))
    return table.assign(**weighed[~weighed.index.duplicated()])  # who has no share is given the last photo again


@torch.inference_mode()
def weigh_share(scale, table, accelerator):
    size, device, faults, parts = tm.BATCH[accelerator.device.type], accelerator.device, [], []
    metadata = tm.encode_metadata(table, scale.metadata)
    shown = None if accelerator.is_main_process else True
    photos = tqdm(read_ahead(table, scale, 2 * size), "photos", len(table), unit="photo", disable=shown)
    batches = batches_of(iter(photos), faults, size)
    for start in range(0, len(table), CHUNK):
        rows = metadata[start : start + CHUNK]
        features = torch.from_numpy(scale.engine(itertools.islice(batches, math.ceil(len(rows) / size)))[: len(rows)])
        predicted = scale.model.to_grams(scale.model(features.to(device), rows.to(device))).cpu().double().numpy()
        parts.append(pd.DataFrame({"predicted": predicted, "unlike": how_unlike(scale, features.numpy())}))
    photos.close()
    weighed = pd.concat(parts).set_axis(table.index).assign(fault=faults)
    strange = (weighed["fault"] == "") & ~np.isfinite(weighed["predicted"])
    weighed["fault"] = weighed["fault"].mask(strange, "the prediction is not finite, pass --precision fp32")
    bad = weighed["fault"] != ""
    return weighed.assign(predicted=weighed["predicted"].mask(bad), unlike=weighed["unlike"] & ~bad)


def promised(calibration, coverage):
    """The coverage that the interval can promise, at most what is asked for; the log says for which plants."""
    if not calibration:
        logger.info("no interval: the model is not of cross_validate.py, so its errors on unseen plants are unknown")
        return coverage
    count, group = calibration["groups"], calibration["grouped_by"]
    most = (count - 1) / (count + 1)  # with more, each side's quantile lies beyond the largest error
    if coverage > most:
        logger.info(f"{count:,} {group}s can promise an interval of {most:.3%} at most: taken for {coverage:.1%}")
        coverage = most
    logger.info(f"interval: holds {coverage:.1%} of the weights of plants of a {group} never seen, if it is like the "
                f"{count:,} {group}s whose errors were measured")  # fmt: skip
    return coverage


def add_interval(table, scale, coverage):
    """`table` with low, high and whether what was measured lies outside."""
    if not scale.calibration:
        return table.assign(low=np.nan, high=np.nan, outside=False)
    low, high = tm.interval(scale.calibration, table["predicted"], coverage)
    measured = table.get("measured", table["predicted"])
    return table.assign(low=low, high=high, outside=(measured < low) | (measured > high))


# ---------------------------------------------------------------- report


def write_table(table, scale, path):
    lacking = pd.Series("", table.index)
    for step in scale.metadata:
        cells, known = table[step["column"]], step.get("categories")
        missing = tm.to_numbers(cells).isna() if known is None else ~tm.to_ids(cells).isin(known)
        lacking += np.where(missing, f"; without {step['column']}", "")
    unlike = np.where(table["unlike"], f"; {UNLIKE}", "")
    note = ("; " + table["fault"]).where(table["fault"] != "", "") + unlike + lacking
    written = table[["filename", "predicted", "low", "high"]].assign(note=note.str.removeprefix("; "))
    written = written.rename(columns={name: name + scale.suffix for name in ("predicted", "low", "high")})
    with tm.whole_file(path) as partial:
        written.to_csv(partial, index=False, float_format="%.9g", errors="backslashreplace")


def log_summary(table, scale, coverage, seconds):
    good, unit = table[table["fault"] == ""], scale.suffix.replace("_", " ")
    text = f"{len(good):,} photos weighed in {seconds:.1f} s ({len(table) / seconds:.0f} photos/s)"
    if len(good):
        total = f", total {good['predicted'].sum():.4f}{unit}" if unit else ""
        text += f": mean {good['predicted'].mean():.4f}{unit}{total}, {good['unlike'].sum():,} {UNLIKE}"
    logger.info(f"{text}, {len(table) - len(good):,} unreadable")
    known = good.dropna(subset="measured")
    if len(known):
        errors = known["predicted"] - known["measured"]
        inside = f", {1 - known['outside'].mean():.1%} in the {coverage:.1%} interval" if scale.calibration else ""
        logger.info(f"against {len(known):,} measured: RMSE {np.sqrt((errors**2).mean()):.4f}{unit}, bias "
                    f"{errors.mean():.4f}{unit}{inside}")  # fmt: skip


def draw_sheet(table, scale, args):
    """Thumbnails with their weights: first the marked ones, in red with the reason, then others from light to heavy."""
    good = table[table["fault"] == ""]
    marked = good["unlike"] | good["outside"]
    rest = good[~marked].sort_values("predicted", kind="stable")
    room = min(max(THUMBNAILS - int(marked.sum()), 0), len(rest))
    rest = rest.iloc[np.linspace(0, len(rest) - 1, room).round().astype(int)]
    shown = pd.concat([good[marked][:THUMBNAILS], rest])
    rows = max(math.ceil(len(shown) / THUMBNAILS_A_ROW), 1)
    figure, axes = tm.new_figure(args, rows, THUMBNAILS_A_ROW, (6.5, 1.4 * rows + 0.5))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (_, row) in zip(axes.flat, shown.iterrows(), strict=False):
        axis.imshow(tm.open_photo(row["_path"]).resize((160, 160)))
        text, colour = caption(row, scale), "tab:red" if row["unlike"] or row["outside"] else "black"
        axis.set_title(tm.plain(text), fontsize=5.5, color=colour, pad=2, linespacing=1.05)
    figure.suptitle(f"{len(shown):,} of {len(good):,} photos with their predicted {tm.plain(scale.target)}", fontsize=8)
    save_sheet(figure, args.sheet)


def caption(row, scale):
    """File name, what is predicted, its interval, what was measured, and why the photo is marked."""
    unit = scale.suffix.replace("_", " ")
    lines = [*textwrap.wrap(row["filename"][-32:], 16), f"predicted {row['predicted']:.3f}{unit}"]
    if scale.calibration:
        lines.append(f"{row['low']:.3f} to {row['high']:.3f}")
    if np.isfinite(row["measured"]):
        lines.append(f"measured {row['measured']:.3f}{unit}")
    lines += ["outside interval"] * bool(row["outside"]) + ["unlike training"] * bool(row["unlike"])
    return "\n".join(lines)


def save_sheet(figure, path):
    """Write a PNG with as many colours as keep it small, because photos make large ones."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    for colours in (128, 64, 32, 16):
        small.seek(small.truncate(0))
        Image.open(drawn).convert("RGB").quantize(colours).save(small, format="PNG", optimize=True)
        if small.tell() < SHEET_BYTES:
            break
    with tm.whole_file(path) as partial:
        partial.write_bytes(small.getvalue())


# ---------------------------------------------------------------- other programs


class Grams(torch.nn.Module):
    """Photos uint8 (n, 3, height, width), and metadata as encoded, to predictions (n,): one graph for export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, photos, metadata=None):
        net = self.model.backbone
        mode = net.interpolation.value
        images = torch.nn.functional.interpolate(photos.float(), [net.size] * 2, mode=mode, antialias=True)
        return self.model.to_grams(self.model(images.round().clamp(0, 255), metadata))


def export(scale, path):
    """Write the model as ONNX, once onnxruntime gives the same grams as PyTorch.

    Inputs: `photos` uint8 (n, 3, height, width), RGB and upright, of any one size; with a model of metadata also
    `metadata` float32 (n, m), as tm.encode_metadata gives them. Output: `predicted` (n,), in the unit of the target.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError as error:
        raise tm.UserError("--export needs three more packages: pip install onnx onnxscript onnxruntime") from error
    grams = Grams(scale.model.cpu().to(memory_format=torch.contiguous_format)).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = ["photos", "metadata"] if scale.metadata else ["photos"]
    n, side = torch.export.Dim("n"), torch.export.Dim
    dynamic = {"photos": {0: n, 2: side("height"), 3: side("width")}, "metadata": {0: n}}
    with tm.whole_file(path) as partial:
        torch.onnx.export(
            grams, example(scale, names, 2, 256, 256), str(partial), input_names=names, output_names=["predicted"],
            dynamic_shapes={name: dynamic[name] for name in names}, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        for shape in ((3, 256, 256), (1, 300, 200)):
            inputs = example(scale, names, *shape)
            with torch.inference_mode():
                wanted = grams(*inputs).numpy()
            answer = session.run(None, {name: part.numpy() for name, part in zip(names, inputs, strict=True)})[0]
            if not np.allclose(answer, wanted, rtol=1e-3, atol=1e-4):
                raise tm.UserError(f"not written: ONNX gives {answer[0]:.6g} where PyTorch gives {wanted[0]:.6g}")

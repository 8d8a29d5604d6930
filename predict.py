"""Weigh plants in new photos with a model that train_model.py or cross_validate.py has trained.

    python predict.py photos/ --out predictions.csv                 a folder; with --recursive also what lies below it
    python predict.py a.png b.jpg --sheet contact_sheet.png         photos, and a picture of them with their weights
    python predict.py --labels_path new.xlsx --image_dir photos     the rows of a sheet, with metadata and known weights
    python predict.py --export biomass.onnx                         the model for other programs
    torchrun --standalone --nproc_per_node 4 predict.py photos/     by four processes, each with a GPU of its own

Reads models/biomass_resnet.pt, or what --model names. Writes a CSV with filename, predicted_g, low_g, high_g and note:
from low to high lie 90 % (--coverage) of the weights of plants never seen; this, and the note `unlike training photos`,
need a model of cross_validate.py. A photo that cannot be read has the reason in its note; the exit status is then 1.
"""

import argparse
import itertools
import logging
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

import train_model as tm
from cross_validate import SHOWN, draw_heat, heat_map, interval, make_weigh, unlikeness

UNLIKE = "unlike training photos"
CHUNK = 4096  # photos whose features are held at once: whole batches of tm.BATCH
THUMBNAILS, THUMBNAILS_A_ROW = 48, 8
MARKS = {"outside": "outside interval", "unlike": "unlike training"}  # what a red thumbnail says

logger = logging.getLogger("biomass")


def read_model(path):
    """What a checkpoint holds, and its `model`, as a namespace. Raises UserError for any other file."""
    if not path.is_file():
        raise tm.UserError(f"no model at {path}: train one by train_model.py, or pass --model")
    try:
        scale = argparse.Namespace(**torch.load(path, map_location="cpu", weights_only=True))
        backbone = tm.Backbone(*(scale.settings[name] for name in ("name", "size", "stages")))
        columns = ["_path", "_content", scale.target, *(step["column"] for step in scale.metadata)]
        row = pd.DataFrame(np.nan, [0], list(dict.fromkeys(columns)))
        scale.width = tm.encode_metadata(row, scale.metadata).shape[1]
        scale.model = tm.BiomassModel(backbone, None, scale.width, scale.settings["target_transform"]).eval()
        scale.model.load_state_dict(scale.model_state)
        scale.resize = tm.BiomassDataset(row, scale, backbone.size, backbone.interpolation).transform
        scale.familiar = {name: value.numpy() for name, value in (scale.familiar or {}).items()}
        if scale.calibration:
            interval(
                scale.calibration, [1.0], min(0.5, scale.calibration["groups"], len(scale.calibration["grouped_by"]))
            )
        scale.suffix, scale.space_unit = (f"_{scale.unit}", f" {scale.unit}") if scale.unit else ("", "")
    except (tm.UserError, OSError):
        raise
    except Exception as error:  # whatever a foreign file makes the unpickler, or the code above, stumble over
        raise tm.UserError(f"{path} is not a checkpoint of this train_model.py ({type(error).__name__})") from error
    return scale


def photos_of(args, scale):
    """A row for each photo: filename, _path, fault ("" if none so far), measured (NaN if unknown), and metadata."""
    columns = [step["column"] for step in scale.metadata]
    if args.labels_path:
        return rows_of_sheet(args, scale.target, columns)
    if columns:
        raise tm.UserError(f"{args.model} has learned from {', '.join(columns)} too: pass them by --labels_path")
    found = {}
    for path in map(Path, args.photos):
        inside = sorted(path.rglob("*") if args.recursive else path.iterdir()) if path.is_dir() else [path]
        photos = [one for one in inside if one.is_file() and (one == path or is_photo(one.name))]
        if not photos:
            raise tm.UserError(f"no photo at {path} ({', '.join(tm.PHOTO_SUFFIXES)}); --recursive looks deeper")
        found |= {photo: photo.relative_to(path if path.is_dir() else path.parent) for photo in photos}
    names = found.values() if len(set(found.values())) == len(found) else found  # alike in several folders
    return pd.DataFrame({"filename": [*map(Path.as_posix, names)], "_path": [*found], "fault": "", "measured": np.nan})


def is_photo(name):
    return name.lower().endswith(tm.PHOTO_SUFFIXES) and name[0] != "."  # as macOS's own beside each photo


def rows_of_sheet(args, target, columns):
    sheet = tm.read_sheet(args.labels_path, columns)
    named = sheet.dropna(subset="filename").reset_index(drop=True)
    logger.info(f"{args.labels_path}: {len(named):,} photos, {len(sheet) - len(named):,} rows without a file name")
    if named.empty:
        raise tm.UserError(f"no row of {args.labels_path} has a file name")
    paths, faults = zip(*tm.find_photos(named["filename"], args.image_dir), strict=True)
    measured = tm.to_numbers(named[target]) if target in named else np.nan
    return named[["filename", *columns]].assign(_path=paths, fault=faults, measured=measured)


def read_photo(scale, path, fault):
    """Pixels uint8 (3, size, size) as in training, black if there is a fault; and the fault, "" if there is none."""
    try:
        if not fault:
            return torch.from_numpy(np.array(scale.resize(tm.open_photo(path), tm.PLAIN, ""))).permute(2, 0, 1), ""
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        fault = tm.fault_of(error)
    return torch.zeros(3, scale.model.backbone.size, scale.model.backbone.size, dtype=torch.uint8), fault


def photo_batches(scale, table, faults, bar):
    """Batches (scale.batch, 3, size, size), the last one filled up; `faults` gets the fault of each photo."""
    parts = (table[start : start + scale.batch] for start in range(0, len(table), scale.batch))
    with ThreadPoolExecutor(tm.cores()) as pool:
        batches = (pool.map(read_photo, itertools.repeat(scale), part["_path"], part["fault"]) for part in parts)
        for batch, _ in itertools.pairwise(itertools.chain(batches, [None])):  # threads read the next one meanwhile
            images, found = zip(*batch, strict=True)
            faults += found
            bar.update(len(found))
            yield torch.stack(images + images[-1:] * (scale.batch - len(images)))


# ---------------------------------------------------------------- weights and report


@torch.inference_mode()
def weigh_photos(scale, table, accelerator):
    """`table` with predicted, unlike and the final fault; each process weighs its share of the photos."""
    with accelerator.split_between_processes(list(range(len(table)))) as numbers:
        share, faults, parts = table.iloc[numbers or [-1]], [], []  # with nothing to do the last photo once more
    with tqdm(None, "photos", len(share), unit="photo", disable=None if accelerator.is_main_process else True) as bar:
        batches = photo_batches(scale, share, faults, bar)
        for metadata in tm.encode_metadata(share, scale.metadata).to(accelerator.device).split(CHUNK):
            features = scale.engine(itertools.islice(batches, math.ceil(len(metadata) / scale.batch)))[: len(metadata)]
            outputs = scale.model(torch.from_numpy(features).to(accelerator.device), metadata)
            grams = scale.model.to_grams(outputs).cpu().double().numpy()
            unlike = unlikeness(scale.familiar, features) > scale.familiar["limit"] if scale.familiar else False
            parts.append(pd.DataFrame({"predicted": grams, "unlike": unlike}))
    weighed = pd.concat(parts).set_axis(share.index).assign(fault=faults)
    weighed.loc[weighed["fault"] != "", ["predicted", "unlike"]] = np.nan, False
    weighed = pd.concat(gather_object([weighed]))
    return table.assign(**weighed[~weighed.index.duplicated()])


def add_interval(table, scale, coverage):
    """`table` with low, high and outside (what was measured is), and the coverage, lowered to what can be promised."""
    if not scale.calibration:
        logger.info("no interval: the model is not of cross_validate.py, its errors on unseen plants are not known")
        return table.assign(low=np.nan, high=np.nan, outside=False), coverage
    count, name = scale.calibration["groups"], scale.calibration["grouped_by"]
    most = (count - 1) / (count + 1)  # beyond it the quantiles lie outside all errors that were seen
    if coverage > most:
        logger.info(f"{count:,} {name}s can promise {most:.1%} at most: taken in place of --coverage {coverage}")
        coverage = most
    logger.info(f"interval: holds {coverage:.1%} of the weights in a {name} never seen, if it is like the {count:,} "
                "from whose errors it comes")  # fmt: skip
    low, high = interval(scale.calibration, table["predicted"], coverage)
    return table.assign(low=low, high=high, outside=(table["measured"] < low) | (table["measured"] > high)), coverage


def write_table(table, scale, path):
    note = table["fault"].mask(table["unlike"], UNLIKE)
    for step in scale.metadata:
        cells, known = table[step["column"]], step.get("categories")
        lacks = tm.to_numbers(cells).isna() if known is None else ~tm.to_ids(cells).isin(known)
        note = note.mask(lacks, (note + f"; without {step['column']}").str.removeprefix("; "))
    numbers = table[["predicted", "low", "high"]].add_suffix(scale.suffix)
    with tm.whole_file(path) as partial:
        written = pd.concat([table["filename"], numbers, note.rename("note")], axis=1)
        written.to_csv(partial, index=False, float_format="%.9g", errors="backslashreplace")


def log_summary(table, scale, coverage):
    good, unit = table[table["fault"] == ""], scale.space_unit
    mean, total = good["predicted"].agg(["mean", "sum"])
    unlike = f"{good['unlike'].sum():,} {UNLIKE}, " if scale.familiar else ""
    logger.info(f"{len(good):,} photos weighed: mean {mean:.4f}{unit}, total {total:.4f}{unit}, "
                f"{unlike}{len(table) - len(good):,} unreadable")  # fmt: skip
    known = good.dropna(subset="measured")
    if len(known):
        errors = known["predicted"] - known["measured"]
        inside = f", {1 - known['outside'].mean():.1%} in the {coverage:.1%} interval" if scale.calibration else ""
        logger.info(f"against {len(known):,} measured: RMSE {math.sqrt(errors.pow(2).mean()):.4f}{unit}, "
                    f"bias {errors.mean():.4f}{unit}{inside}")  # fmt: skip


def spread(table, most):
    """At most so many rows of the table, from its first to its last."""
    return table.iloc[np.linspace(0, len(table) - 1, min(most, len(table))).round().astype(int)]


def draw_sheet(table, scale, args):
    """Thumbnails with their weights: first the marked ones, in red with the reason, then others from light to heavy."""
    good = table[table["fault"] == ""].sort_values("predicted", kind="stable")
    marked = good[good[list(MARKS)].any(axis=1)]
    others, found = good.drop(marked.index), len(marked)
    room = min(max(THUMBNAILS - len(marked), THUMBNAILS // 2), len(others))
    marked, others = spread(marked, THUMBNAILS - room), spread(others, room)
    shown = pd.concat([marked, others])
    rows, unit = max(math.ceil(len(shown) / THUMBNAILS_A_ROW), 1), scale.space_unit
    figure, axes = tm.new_figure(args, rows, THUMBNAILS_A_ROW, (10.4, 2 * rows + 0.4))  # for a page: 6.5 wide
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (_, row) in zip(axes.flat, shown.iterrows(), strict=False):
        axis.imshow(tm.open_photo(row["_path"]).resize((108, 108)))
        reasons, name = [text for column, text in MARKS.items() if row[column]], row["filename"][-28:]
        lines = [name[:14], name[14:], f"predicted {row['predicted']:.3f}{unit}"]
        lines.append(f"from {row['low']:.3f} to {row['high']:.3f}" if scale.calibration else "")
        lines.append(f"measured {row['measured']:.3f}{unit}" if np.isfinite(row["measured"]) else "")
        text, colour = "\n".join(filter(None, lines + reasons)), "tab:red" if reasons else "black"
        axis.set_title(tm.plain(text), fontsize=9, color=colour, pad=3)
    first = f"{len(marked):,} of {found:,} marked photos first, in red, then " if found else ""
    title = f"{tm.plain(scale.target)}: {first}{len(others):,} of {len(good) - found:,} others"
    figure.suptitle(title, fontsize=12)
    tm.save_figure(figure, args.sheet, photos=True)


class Grams(torch.nn.Sequential):
    """Photos uint8 (n, 3, height, width), and metadata as encoded, to predictions (n,): one graph for export."""

    def forward(self, photos, metadata=None):
        model, size, mode = self[0], [self[0].backbone.size] * 2, self[0].backbone.interpolation.value
        images = torch.nn.functional.interpolate(photos.float(), size, mode=mode, antialias=True)
        return model.to_grams(model(images.round().clamp(0, 255), metadata))


def export(scale, path):
    """Write the model as ONNX, once onnxruntime gives the same predictions as PyTorch; its inputs are those of Grams.

    The photos are RGB, upright and of any one size, the metadata as tm.encode_metadata gives them.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError as error:
        raise tm.UserError("--export needs three more packages: pip install onnx onnxscript onnxruntime") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    grams = Grams(scale.model.cpu().to(memory_format=torch.contiguous_format)).eval()
    photos = torch.randint(256, (3, 3, 300, 200), dtype=torch.uint8, generator=torch.manual_seed(0))
    inputs, dims = {"photos": photos}, {"photos": {0: "n", 2: "height", 3: "width"}}
    if scale.metadata:
        inputs, dims = inputs | {"metadata": torch.zeros(3, scale.width)}, dims | {"metadata": {0: "n"}}
    names = {"input_names": list(inputs), "output_names": ["predicted"]}
    with tm.whole_file(path) as partial, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an export says of its own steps
        try:
            torch.onnx.export(grams, tuple(inputs.values()), str(partial), dynamic_shapes=dims, **names,
                              external_data=False, dynamo=True, verbose=False)  # fmt: skip
        except torch.onnx.OnnxExporterError as error:  # old releases cannot write how a photo is resized
            text = f"--export: {tm.one_line(error)[:80]}"
            raise tm.UserError(f"{text}; newer packages may: pip install -U torch torchvision onnxscript") from error
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        answer = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        if not np.allclose(answer, wanted := grams(*inputs.values()).numpy(), rtol=1e-3, atol=1e-4):
            raise tm.UserError(f"not written: ONNX gives {answer[0]:.6g} where PyTorch gives {wanted[0]:.6g}")


def explain(table, scale, args, accelerator):
    """Draw where the model looks, on a dozen photos over the range of predictions."""
    good = table[table["fault"] == ""].sort_values("predicted", kind="stable")
    if good.empty:
        return
    shown = spread(good, SHOWN)
    metadata, weigh, items = tm.encode_metadata(shown, scale.metadata), make_weigh(scale.model, args, accelerator), []

    def to_pixels(photo):
        return torch.from_numpy(np.array(scale.resize(photo, tm.PLAIN, ""))).permute(2, 0, 1)

    for number, (_, row) in enumerate(shown.iterrows()):
        photo = tm.open_photo(row["_path"])
        title = f"{tm.plain(row['filename'])[-22:]}\npredicted {row['predicted']:.3f}{scale.space_unit}"
        items.append((photo, heat_map(photo, metadata[number], weigh, to_pixels), title))
    draw_heat(items, args, args.explain, scale.unit)


# ---------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser("predict.py", description=__doc__, formatter_class=tm.HelpFormatter)
    parser.error = lambda message: parser.exit(2, f"predict.py: error: {message}\n")
    add = parser.add_argument_group("input").add_argument
    add("photos", nargs="*", metavar="PHOTO_OR_FOLDER", help="photos, or folders of photos")
    add("--recursive", action="store_true", help="also the folders in the folders")
    add("--labels_path", type=Path, help="a sheet, .xlsx, .csv or .parquet, whose rows are predicted")
    add("--image_dir", type=Path, help="folder of the sheet's photos (default: images_med_res beside the sheet)")
    add("--model", type=Path, default="models/biomass_resnet.pt", help="checkpoint")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: that of the training")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default="predictions.csv", help="table")
    add("--coverage", type=tm.number(float, 0, 1, ends=False), default=0.9, help="share of weights in the interval")
    add("--sheet", type=Path, metavar="PNG", help="picture of the photos with their predictions")
    add("--explain", type=Path, metavar="PNG", help="picture of where the model looks, on a dozen of the photos")
    add("--export", type=Path, metavar="FILE.onnx", help="write the model for other programs; photos are then optional")
    parser.set_defaults(freeze_backbone=True, unfreeze_from=None, track=None, results_dir=None)  # no training here
    return parser


def check_arguments(args):
    if bool(args.photos) == bool(args.labels_path) and not (args.export and not args.photos):
        raise tm.UserError("pass either photos and folders, or --labels_path with a sheet")
    for picture in filter(None, (args.sheet, args.explain)):
        if picture.suffix.lower() != ".png":
            raise tm.UserError(f"{picture}: a picture's name must end in .png")
    if args.image_dir and not args.labels_path:
        raise tm.UserError("--image_dir is the folder of a sheet's photos: pass --labels_path too, or the folder alone")
    args.image_dir = args.image_dir or (args.labels_path and args.labels_path.parent / "images_med_res")
    for folder in [*args.photos, args.image_dir]:
        outputs = filter(None, (args.out, args.sheet, args.explain, args.export))
        tm.check_writable(outputs, [args.model, args.labels_path, *args.photos], folder)


def predict(argv, started):
    """The whole run, from the flags to the table; returns the exit status."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    scale = read_model(args.model)
    args.precision = scale.settings["precision"] if args.precision == "auto" else args.precision
    accelerator = tm.start_accelerator(args, started)
    scale.model.to(accelerator.device, memory_format=torch.channels_last)
    scale.batch = tm.BATCH[accelerator.device.type]
    scale.engine, name = tm.make_engine(scale.model.backbone, accelerator.device, args.precision)
    logger.info(f"{args.model}: {scale.settings['name']} by {name} on {accelerator.device.type}, {args.precision}")
    unreadable = False
    if args.photos or args.labels_path:
        table = weigh_photos(scale, photos_of(args, scale), accelerator)
        table, coverage = add_interval(table, scale, args.coverage)
        log_summary(table, scale, coverage)
        unreadable = (table["fault"] != "").any()
        if accelerator.is_main_process:
            write_table(table, scale, args.out)
            if args.sheet:
                draw_sheet(table, scale, args)
            if args.explain:
                explain(table, scale, args, accelerator)
    if args.export and accelerator.is_main_process:
        export(scale, args.export)
    return int(unreadable and accelerator.is_main_process)  # else torchrun ends it while it still writes


def main(argv=None):
    return tm.run_script("predict.py", predict, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Weigh plants in new photos with a model that train_model.py or cross_validate.py has trained.

    python predict.py photos/ --out predictions.csv                 a folder; with --recursive also what lies below it
    python predict.py a.png b.jpg --sheet contact_sheet.png         photos, and a picture of them with their weights
    python predict.py --labels_path new.xlsx --image_dir photos     the rows of a sheet, with metadata and known weights
    python predict.py --export biomass.onnx                         the model for other programs
    torchrun --standalone --nproc_per_node 4 predict.py photos/     by four processes, each with a GPU of its own

Reads models/biomass_resnet.pt, or what --model names. Writes a CSV with filename, what the sheet tells of plant and
time (growth.py reads them), predicted_g, low_g, high_g, note and traits of the plant: from low to high lie 90 %
(--coverage) of the weights of plants never seen; this, and the note `unlike training photos: darker`, need a model of
cross_validate.py. A photo that cannot be read has the reason in its note; the exit status is then 1.
"""

import importlib.util
import logging
import math
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

import train_model as tm
from biomass import features, plant, reading, writing
from biomass.reading import UserError

UNLIKE = "unlike training photos"
SHOWN = 12  # photos with a heat map
THUMBNAILS, THUMBNAILS_A_ROW, MARKED = 48, 8, "#D55E00"
REASONS = {  # of what is measured of a scene, its name, its format, and what photos below and above the others are
    "share": ("plant in the frame", ".1%", "other scale, plant smaller", "other scale, plant larger"),
    "scene_lightness": ("lightness", ".0f", "darker", "lighter"),
    "scene_green_red": ("green to red", ".0f", "other colour, greener", "other colour, redder"),
    "scene_blue_yellow": ("blue to yellow", ".0f", "other colour, bluer", "other colour, yellower"),
    "fineness": ("fineness", ".2f", "other scale or blurred, coarser", "other scale, finer"),
}

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- model and photos


def read_checkpoint(path):
    """What train_model.py saved, and its `model`, as a namespace. Raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no model at {path}: train one by train_model.py, or pass --model")
    try:
        checkpoint = SimpleNamespace(**torch.load(path, map_location="cpu", weights_only=True))
        settings, state = checkpoint.settings, checkpoint.model_state
        backbone = tm.Backbone(settings["name"], settings["size"], settings["stages"])
        width = sum(len(step["categories"]) if "categories" in step else 2 for step in checkpoint.metadata)
        checkpoint.metadata_width = width
        traits = len(plant.TRAITS) if settings["traits"] else 0
        checkpoint.model = tm.BiomassModel(backbone, None, traits, width, settings["target_transform"]).eval()
        checkpoint.model.load_state_dict(state)
        checkpoint.familiar = {name: value.numpy() for name, value in (checkpoint.familiar or {}).items()}
        if checkpoint.familiar:
            why_unlike(checkpoint.familiar["scene"], [])
        if checkpoint.calibration:
            writing.interval(checkpoint.calibration, [1.0], min(0.5, checkpoint.calibration["independent"]))
        if not isinstance(checkpoint.unit + checkpoint.target, str):
            raise TypeError("its target is no text")
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever a foreign file makes the unpickler, or the code above, stumble over
        raise UserError(f"{path} is not a checkpoint of this train_model.py ({type(error).__name__})") from error
    return checkpoint


def find_rows(args, checkpoint):
    """A row for each photo: filename, _path, _fault ("" if none so far), the target (NaN if unknown), and metadata."""
    columns = [step["column"] for step in checkpoint.metadata]
    if args.labels_path:
        return rows_of_sheet(args, checkpoint, columns)
    if columns:
        raise UserError(f"{args.model} has learned from {', '.join(columns)} too: pass them by --labels_path")
    found = {}
    for path in args.photos:
        inside = sorted(map(Path, reading.list_files(path, args.recursive))) if path.is_dir() else []
        photos = [path / name for name in inside if reading.is_photo(name.name)] or [path]
        photos = [photo for photo in photos if photo.is_file()]
        if not photos:
            raise UserError(f"no photo at {path} ({', '.join(reading.PHOTO_SUFFIXES)}); --recursive looks deeper")
        found |= {photo: photo.relative_to(path if path.is_dir() else path.parent) for photo in photos}
    names = found.values() if len(set(found.values())) == len(found) else found  # alike in several folders
    rows = {"filename": [*map(Path.as_posix, names)], "_path": [*map(str, found)], "_fault": ""}
    rows = pd.DataFrame(rows, dtype=object)  # as str holds no bytes of old systems
    return rows.assign(**{checkpoint.target: np.nan})


def rows_of_sheet(args, checkpoint, columns):
    target, given = checkpoint.target, args.group_by or []
    wanted = dict.fromkeys(columns, "--metadata_columns") | dict.fromkeys(given, "--group_by")
    wanted |= {args.time_column: "--time_column"} if args.time_column else {}
    may_be_absent = dict.fromkeys([target, *checkpoint.group_by], "")
    sheet = reading.read_sheet(args.labels_path, may_be_absent | wanted, args, target)
    reading.tell_readings(sheet, args.labels_path)
    groups = given or [name for name in checkpoint.group_by if name in sheet]
    kept = [*groups, reading.time_column(args.time_column, sheet)]
    args.kept = [name for name in dict.fromkeys(kept) if name not in ("filename", None)]
    named = sheet.dropna(subset="filename").reset_index(drop=True)
    logger.info(f"{args.labels_path}: {len(named):,} photos, {len(sheet) - len(named):,} rows without a file name")
    if named.empty:
        raise UserError(f"no row of {args.labels_path} has a file name")
    measured = reading.to_numbers(named[target]) if target in named else np.nan
    found = reading.find_photos(named["filename"], args.image_dir)
    named = named[[*dict.fromkeys(["filename", *args.kept, *columns])]]
    return named.assign(**found, **{target: measured})


# ---------------------------------------------------------------- weights


def weigh_rows(rows, checkpoint, batches, measured):
    """`rows` with predicted (NaN where there is a fault) and in what photos unlike the training photos are so.

    `measured` is what plant.MEASURED names of the rows without a fault.
    """
    good, model = np.flatnonzero(rows["_fault"] == ""), checkpoint.model
    predicted, unlike = np.full(len(rows), np.nan), np.full(len(rows), "", object)
    if len(good):
        each, begun = np.arange(len(good)), time.perf_counter()
        batches.collect(each[:0], each)
        predicted[good] = tm.evaluate(model, batches.judge(each), batches)[0]
        if checkpoint.familiar:
            distances = writing.unlikeness(checkpoint.familiar, batches.features(model, each))
            reasons = why_unlike(checkpoint.familiar["scene"], measured)
            unlike[good] = np.where(distances > checkpoint.familiar["limit"], reasons, "")
        logger.info(f"a photo took {1000 * (time.perf_counter() - begun) / len(good):.0f} ms")
    return rows.assign(predicted=predicted, unlike=unlike, measured=rows[checkpoint.target])


def why_unlike(ranges, measured):
    """In what photos (n, len(plant.MEASURED)) lie beyond the ranges of the training photos (2, len(plant.SCENE))."""
    reasons, scenes = [], pd.DataFrame(measured, columns=plant.MEASURED)[plant.SCENE]
    for scene in scenes.to_numpy():
        found = []
        for name, value, low, high in zip(plant.SCENE, scene, *ranges, strict=True):
            what, form, *sides = REASONS[name]
            if not low <= value <= high:
                found.append(f"{sides[int(value > high)]} ({what} {value:{form}}, there {low:{form}} to {high:{form}})")
        reasons.append(", ".join(found) or "another scene")
    return reasons


def add_interval(table, checkpoint, coverage):
    """`table` with low, high and outside (what was measured is), and the coverage, lowered to what can be promised."""
    calibration = checkpoint.calibration
    if not calibration:
        logger.info("no interval: the model is not of cross_validate.py, its errors on unseen plants are not known")
        return table.assign(low=np.nan, high=np.nan, outside=False), coverage
    count, name, most = calibration["groups"], calibration["grouped_by"], writing.most_coverage(calibration)
    if coverage > most:
        logger.info(f"{count:,} {name}s can promise {most:.1%} at most: taken in place of --coverage {coverage}")
        coverage = most
    logger.info(f"interval: holds {coverage:.1%} of the weights in a {name} never seen, if it is like the {count:,} "
                "from whose errors it comes")  # fmt: skip
    low, high = writing.interval(calibration, table["predicted"], coverage)
    return table.assign(low=low, high=high, outside=(table["measured"] < low) | (table["measured"] > high)), coverage


# ---------------------------------------------------------------- report


def write_table(table, traits, checkpoint, args):
    note = table["_fault"].mask(table["unlike"] != "", f"{UNLIKE}: " + table["unlike"])
    for step in checkpoint.metadata:
        cells, known = table[step["column"]], step.get("categories")
        lacks = reading.to_numbers(cells).isna() if known is None else ~reading.to_ids(cells).isin(known)
        note = note.mask(lacks, (note + f"; without {step['column']}").str.removeprefix("; "))
    numbers = table[["predicted", "low", "high"]].add_suffix(f"_{checkpoint.unit}" if checkpoint.unit else "")
    with writing.whole_file(args.out) as partial:
        written = pd.concat([table[["filename", *args.kept]], numbers, note.rename("note"), traits], axis=1)
        written = written.assign(**{"drawn_data": True} if reading.is_drawn(args.labels_path) else {})
        written = writing.whole_numbers(written)
        written.to_csv(partial, index=False, float_format="%.9g", errors="backslashreplace")


def log_summary(table, checkpoint, coverage):
    good, unit = table[table["_fault"] == ""], f" {checkpoint.unit}".rstrip()
    mean, total = good["predicted"].agg(["mean", "sum"])
    unlike = f"{(good['unlike'] != '').sum():,} {UNLIKE}, " if checkpoint.familiar else ""
    counts = f"{unlike}{len(table) - len(good):,} unreadable"
    logger.info(f"{len(good):,} photos weighed: mean {mean:.4f}{unit}, total {total:.4f}{unit}, {counts}")
    known = good.dropna(subset="measured")
    if len(known):
        errors = known["predicted"] - known["measured"]
        inside = f", {1 - known['outside'].mean():.1%} in the {coverage:.1%} interval" if checkpoint.calibration else ""
        logger.info(f"against {len(known):,} measured: RMSE {math.sqrt(errors.pow(2).mean()):.4f}{unit}, "
                    f"bias {errors.mean():.4f}{unit}{inside}")  # fmt: skip


def spread(table, most):
    """At most so many rows of the table, from its first to its last."""
    return table.iloc[np.linspace(0, len(table) - 1, min(most, len(table))).round().astype(int)]


def draw_sheet(table, checkpoint, args):
    """Thumbnails with name, weight and interval: first the marked ones, then others from light to heavy."""
    good = table[table["_fault"] == ""].sort_values("predicted", kind="stable")
    marked = good[good["outside"] | (good["unlike"] != "")]
    others, found = good.drop(marked.index), len(marked)
    room = min(max(THUMBNAILS - len(marked), THUMBNAILS // 2), len(others))
    marked, others = spread(marked, THUMBNAILS - room), spread(others, room)
    shown = pd.concat([marked, others])
    rows, unit = max(math.ceil(len(shown) / THUMBNAILS_A_ROW), 1), f" {checkpoint.unit}".rstrip()
    figure = writing.new_figure(args.labels_path, (10.4, 1.85 * rows + 0.7))  # for a page: 6.5 wide
    axes = figure.subplots(rows, THUMBNAILS_A_ROW, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    most = shown[["predicted", "low", "high", "measured"]].replace(math.inf, np.nan).max(axis=None)
    for axis, (_, row) in zip(axes.flat, shown.iterrows(), strict=False):
        axis.imshow(reading.open_photo(row["_path"]).resize((108, 108)))
        mark = ", unlike" * bool(row["unlike"]) + ", outside" * row["outside"]
        text, colour = f"{row['predicted']:.3f}{unit}{mark}", MARKED if mark else "black"
        text = f"{Path(row['filename']).stem[-16:]}\n{text}"
        axis.set_title(writing.plain(text), fontsize=9, color=colour, pad=3)
        draw_bar(axis, row, most)
    first = f", first {len(marked):,} of {found:,} unlike training photos or outside their interval" if found else ""
    bar = f"dot: predicted, bar: its interval, cross: measured, from 0 to {most:.3g}{unit}"
    title = f"{writing.plain(checkpoint.target)}: {len(shown):,} of {len(good):,} photos{first}\n{bar}"
    figure.suptitle(title, fontsize=11)
    writing.save_figure(figure, args.sheet, dpi=90, colours=128)


def draw_bar(axis, row, most):
    """Below a thumbnail, as wide as the largest weight: what was predicted, its interval, and what was measured."""
    parts = [([0, most], "-", "lightgrey", 1), (row[["low", "high"]].clip(0, most), "-", "#56B4E9", 4)]
    parts += [([row["predicted"]], "o", "black", 1), ([row["measured"]], "x", MARKED, 1)]
    style = {"markersize": 4, "transform": axis.transAxes, "clip_on": False}
    for values, form, colour, width in parts:
        axis.plot(np.array(values, float) / most, [-0.07] * len(values), form, color=colour, linewidth=width, **style)


def explain(table, checkpoint, batches, args):
    """Draw where the model looks, on a dozen photos over the range of predictions."""
    good = table[table["_fault"] == ""].sort_values("predicted", kind="stable")
    shown = spread(good, SHOWN)
    if shown.empty:
        return
    metadata = torch.from_numpy(reading.encode_metadata(shown, checkpoint.metadata))
    photos = [reading.open_photo(path) for path in shown["_path"]]

    def weigh(hidden, numbers):
        return tm.weigh(checkpoint.model, batches, hidden, metadata[numbers])

    heats = plant.heat_maps(photos, weigh)
    titles = [
        f"{writing.plain(name)[-22:]}\npredicted {predicted:.3f} {checkpoint.unit}".rstrip()
        for name, predicted in zip(shown["filename"], shown["predicted"], strict=True)
    ]
    if batches.accelerator.is_main_process:
        items = list(zip(photos, heats, titles, strict=True))
        writing.draw_heat(items, args.explain, checkpoint.unit, args.labels_path)


# ---------------------------------------------------------------- export


class Grams(torch.nn.Module):
    """Photos uint8 (n, 3, height, width), traits and metadata as encoded to predictions (n,): one graph for export."""

    def __init__(self, model, augmentation):
        super().__init__()
        self.model, self.versions = model, augmentation.of_tensor

    def forward(self, photos, traits=None, metadata=None):
        size, mode = [self.model.backbone.size] * 2, self.model.backbone.interpolation.name.lower()
        images = torch.nn.functional.interpolate(photos.float(), size, mode=mode, antialias=True)
        beside = (torch.zeros(len(photos), 0) if part is None else part for part in (traits, metadata))
        return self.model.predict(self.versions(images.round().clamp(0, 255)), *beside)


def export(checkpoint, path):
    """Write the model as ONNX, once onnxruntime gives the same predictions as PyTorch; its inputs are those of Grams.

    The photos are RGB, upright and of any one size, the traits the first of plant.measure_traits, in the order of
    plant.TRAITS, the metadata as reading.encode_metadata gives them.
    """
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    augmentation = tm.AUGMENTATIONS[checkpoint.settings["augmentation"]](0, 0)
    grams = Grams(checkpoint.model.cpu().to(memory_format=torch.contiguous_format), augmentation).eval()
    photos = torch.randint(256, (3, 3, 300, 200), dtype=torch.uint8, generator=torch.manual_seed(0))
    inputs, dims = {"photos": photos}, {"photos": {0: "n", 2: "height", 3: "width"}}
    widths = {"traits": len(plant.TRAITS) * checkpoint.settings["traits"], "metadata": checkpoint.metadata_width}
    for name, width in widths.items():
        inputs |= {name: torch.zeros(3, width) if width else None}
        dims |= {name: {0: "n"} if width else None}
    given = {name: value for name, value in inputs.items() if value is not None}
    names = {"input_names": list(given), "output_names": ["predicted"]}
    with writing.whole_file(path) as partial, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an export says of its own steps
        try:
            torch.onnx.export(grams, tuple(inputs.values()), str(partial), dynamic_shapes=dims, **names,
                              external_data=False, dynamo=True, verbose=False)  # fmt: skip
        except torch.onnx.OnnxExporterError as error:  # old releases cannot write how a photo is resized
            newer = "newer packages may: pip install -U torch torchvision onnxscript"
            raise UserError(f"--export: {reading.one_line(error)[:80]}; {newer}") from error
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        answer = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
        if not np.allclose(answer, wanted := grams(*inputs.values()).numpy(), rtol=1e-3, atol=1e-4):
            raise UserError(f"not written: ONNX gives {answer[0]:.6g} where PyTorch gives {wanted[0]:.6g}")


# ---------------------------------------------------------------- command line


def build_parser():
    parser = writing.new_parser("predict.py", __doc__)
    add = parser.add_argument_group("input").add_argument
    add("photos", nargs="*", type=reading.a_path, metavar="PHOTO_OR_FOLDER", help="photos, or folders of photos")
    add("--recursive", action="store_true", help="also the folders in the folders")
    add("--labels_path", type=reading.a_path, help="a sheet, .xlsx, .csv or .parquet, whose rows are predicted")
    folder = "folder of the sheet's photos (default: images_med_res beside the sheet)"
    add("--image_dir", type=reading.a_path, help=folder)
    reading.add_sheet_flags(add)
    add("--group_by", nargs="+", metavar="COLUMN", help="of the sheet, kept in the table (default: the training's)")
    add("--time_column", metavar="COLUMN", help="of the sheet, kept too (default: timestamp, else age_days)")
    add("--model", type=reading.a_path, default="models/biomass_resnet.pt", help="checkpoint")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: that of the training")
    features.add_cache_flag(add)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=reading.a_path, default="predictions.csv", help="table")
    share, scale = writing.number(float, 0, 1, ends=False), writing.number(float, 0, ends=False)
    add("--coverage", type=share, default=0.9, help="share of the weights in the interval")
    add("--mm_per_pixel", type=scale, help="scale of the photos: traits in mm, else in pixels")
    add("--sheet", type=reading.a_path, metavar="PNG", help="picture of the photos with their predictions")
    add(
        "--explain",
        type=reading.a_path,
        metavar="PNG",
        help="picture of where the model looks, on a dozen of the photos",
    )
    add(
        "--export",
        type=reading.a_path,
        metavar="FILE.onnx",
        help="write the model for other programs; photos are then optional",
    )
    return parser


def check_arguments(args):
    if bool(args.photos) == bool(args.labels_path) and not (args.export and not args.photos):
        raise UserError("pass either photos and folders, or --labels_path with a sheet")
    for picture in filter(None, (args.sheet, args.explain)):
        if picture.suffix.lower() != ".png":
            raise UserError(f"{picture}: a picture's name must end in .png")
    if args.image_dir and not args.labels_path:
        raise UserError("--image_dir is the folder of a sheet's photos: pass --labels_path too, or the folder alone")
    if (args.group_by or args.time_column) and not args.labels_path:
        raise UserError("--group_by and --time_column name columns of a sheet: pass --labels_path with it")
    args.image_dir = args.image_dir or (args.labels_path and args.labels_path.parent / "images_med_res")
    for folder in [*args.photos, args.image_dir]:
        outputs = filter(None, (args.out, args.sheet, args.explain, args.export))
        writing.check_writable(outputs, [args.model, args.labels_path, *args.photos], folder)
    if args.export and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UserError("--export needs three more packages: pip install onnx onnxscript onnxruntime")


def predict(argv, started):
    """The whole run, from the flags to the table; returns the exit status."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    checkpoint = read_checkpoint(args.model)
    others = vars(tm.build_parser().parse_args([])) | {"epochs": 0, "batch_size": 256}  # which tm's functions ask for
    args = SimpleNamespace(**others | vars(args) | {"target": checkpoint.target, "kept": []})
    accelerator = start(args, checkpoint, started)
    engine = features.Engine(checkpoint.model.backbone, accelerator.device, args.precision)
    logger.info(f"{args.model}: {checkpoint.settings['name']} by {engine.name}")
    unreadable = False
    if args.photos or args.labels_path:
        rows, store = find_rows(args, checkpoint), tm.open_store(args, started)
        known = store.known_photos()
        with accelerator.main_process_first():  # the others then find each photo's digest
            rows = reading.look_at_files(rows, known, decode=True)
            store.remember_photos(known)
        good = rows[rows["_fault"] == ""]
        augmentation = tm.AUGMENTATIONS[checkpoint.settings["augmentation"]](0, 0)
        dataset = tm.BiomassDataset(good, args, checkpoint.model.backbone, augmentation)
        dataset.metadata = torch.from_numpy(reading.encode_metadata(good, checkpoint.metadata))
        batches = features.Batches(dataset, engine, store, args, accelerator)
        measured = batches.measured(np.arange(len(good)))
        if checkpoint.settings["traits"]:
            dataset.traits[None] = torch.from_numpy(measured[:, : len(plant.TRAITS)])
        table, coverage = add_interval(weigh_rows(rows, checkpoint, batches, measured), checkpoint, args.coverage)
        log_summary(table, checkpoint, coverage)
        traits = plant.trait_table(measured, args.mm_per_pixel).set_axis(good.index)
        unreadable = (table["_fault"] != "").any()
        if accelerator.is_main_process:
            write_table(table, traits, checkpoint, args)
            if args.sheet:
                draw_sheet(table, checkpoint, args)
        if args.explain:  # by all processes
            explain(table, checkpoint, batches, args)
    if args.export and accelerator.is_main_process:
        export(checkpoint, args.export)
    return int(unreadable and accelerator.is_main_process)  # else torchrun ends it while it still writes


def start(args, checkpoint, started):
    """Accelerate's view of devices, with the model there, in the precision of the training where that is possible."""
    auto = args.precision == "auto"
    args.precision = checkpoint.settings["precision"] if auto else args.precision
    accelerator = tm.start_accelerator(args, started)
    if auto and args.precision == "bf16" and not tm.has_bf16(accelerator.device.type == "cpu"):
        args.precision = "fp32"
        logger.info(f"{args.model} was trained in bf16, which this processor lacks: computed in fp32, by which single "
                    "predictions differ from those on the training machine, by a few percent at most")  # fmt: skip
    checkpoint.model.to(accelerator.device, memory_format=torch.channels_last)
    return accelerator


def main(argv=None):
    return writing.run_script("predict.py", predict, argv)


if __name__ == "__main__":
    sys.exit(main())

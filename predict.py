"""Weigh plants in new photos with a model that train_model.py has trained.

    python predict.py photos/ --out predictions.csv                 a folder; with --recursive also what lies below it
    python predict.py a.png b.jpg --sheet contact_sheet.png         photos, and a picture of them with their weights
    python predict.py --labels_path new.xlsx --image_dir photos     the rows of a sheet, with metadata and known weights
    python predict.py --export biomass.onnx                         the model for other programs
    torchrun --standalone --nproc_per_node 4 predict.py photos/     by four processes, each with a GPU of its own

Reads  models/biomass_resnet.pt, or what --model names: all that is needed beside the photos is in it.
Writes a CSV with filename, predicted_g, low_g, high_g and note. low and high are the ends of an interval that holds
       90 % of the weights of plants that were never seen (--coverage); it, and the note `unlike training photos`, need
       a model trained with --folds. A photo that cannot be read has the reason in its note, and the exit status is 1.
"""

import os
import signal
import sys

if __name__ == "__main__":  # while the libraries load; main() takes over
    told = "predict.py: interrupted\n" * (os.environ.get("RANK", "0") == "0")
    signal.signal(signal.SIGINT, lambda *_: (sys.stderr.write(told), os._exit(130)))

import argparse
import functools
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import calibration
from devices import check_seen, cores, pick_device, together
from inputs import PHOTO_SUFFIXES, PhotoFolder, UserError, fault_of, one_line, open_photo, read_sheet, to_numbers
from loaders import EXTRACTION_BATCH, bar, in_threads
from metadata import MetadataEncoder
from model import from_checkpoint, load_plain
from outputs import Parser, alone, check_writable, harmless, logging_to_console, whole_file
from report import new_figure, plain, save_photos, scores
from train_model import between, memory_is_full, transforms

UNLIKE = "unlike training photos"
THUMBNAILS, THUMBNAILS_A_ROW = 48, 8

logger = logging.getLogger("train_model")


# ---------------------------------------------------------------- model


class Scale:
    """A checkpoint, ready to weigh photos. Raises UserError for a file that is none."""

    def __init__(self, path, device, precision, group):
        checkpoint = group.first(load_checkpoint, path)
        try:
            if precision != "auto":
                checkpoint["settings"]["precision"] = precision
            self.take(checkpoint, device)
        except Exception as error:  # whatever a foreign checkpoint makes it stumble over
            raise UserError(f"{path} does not fit this train_model.py ({type(error).__name__})") from error

    def take(self, checkpoint, device):
        self.model = from_checkpoint(checkpoint, device)
        self.encoder = MetadataEncoder(checkpoint["metadata"])
        self.device, self.target, self.unit = device, str(checkpoint["target"]), str(checkpoint["unit"])
        self.calibration, familiar = checkpoint["calibration"], checkpoint["familiar"]
        self.familiar = familiar and {name: value.numpy() for name, value in familiar.items()}
        part = self.model.split() if self.model.backbone else None
        self.extract = self.model.extractor(part) if part else lambda images: images  # as in training, to the last bit
        size = self.image_size or 8
        self.weigh(torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.zeros(1, self.encoder.width))
        if self.calibration:
            calibration.interval(self.calibration, np.ones(1), 0.9)

    @property
    def image_size(self):
        return self.model.image_size

    @torch.inference_mode()
    def weigh(self, images, metadata):
        """Predictions (n,) and whether each photo is unlike the training photos (n,), of uint8 (n, 3, size, size)."""
        inputs = self.extract(images.to(self.device)) if self.model.backbone else torch.zeros(len(metadata), 0)
        features = self.model.features(inputs)
        predicted = self.model.target.undo(self.model.head(features, metadata.to(self.device))).cpu().double().numpy()
        if not self.familiar:
            return predicted, np.zeros(len(predicted), bool)
        distances = calibration.distances(self.familiar, features.cpu().double().numpy())
        return predicted, distances > self.familiar["limit"]


def load_checkpoint(path):
    if not Path(path).is_file():
        raise UserError(f"no model at {path}: train one by train_model.py, or pass --model")
    try:
        checkpoint = load_plain(path)
        missing = {"model_state", "settings", "metadata", "target", "unit", "calibration", "familiar"} - set(checkpoint)
    except Exception as error:  # whatever a foreign file makes the unpickler stumble over
        raise UserError(f"{path} is not a checkpoint of train_model.py ({type(error).__name__})") from error
    if missing:
        raise UserError(f"{path} is not a checkpoint of this train_model.py, it lacks {', '.join(sorted(missing))}")
    return checkpoint


# ---------------------------------------------------------------- photos


def find_photos(paths, recursive):
    """A table with `filename` and `_path` of the photos that are named, and of those in folders that are named."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            photos = sorted(photos_in(path, recursive), key=lambda photo: photo.split(os.sep))
            if not photos:
                raise UserError(
                    f"no photo in {path} ({', '.join(PHOTO_SUFFIXES)}){'' if recursive else ': --recursive?'}"
                )
            found += [(os.path.relpath(photo, path), photo) for photo in photos]
        elif path.exists():
            found.append((path.name, str(path)))
        else:
            raise UserError(f"no photo and no folder at {path}")
    table = pd.DataFrame(found, columns=["filename", "_path"], dtype=object)
    if table["filename"].duplicated().any():  # of several folders
        table["filename"] = table["_path"]
    table["filename"] = table["filename"].str.replace(os.sep, "/", regex=False)
    return table.assign(measured=np.nan, fault="")


def photos_in(folder, recursive):
    """Paths of the photos in a folder, with `recursive` also in the folders below it."""
    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in names:
            if os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES and os.path.isfile(os.path.join(parent, name)):
                yield os.path.join(parent, name)
        if not recursive:
            folders.clear()


def fail(error):
    raise error


def rows_of_sheet(labels_path, image_dir, scale):
    """The rows of a sheet with the `_path` of their photo, `measured` where the sheet has weights, and metadata."""
    sheet = read_sheet(labels_path, [step["column"] for step in scale.encoder.plan])
    folder = PhotoFolder(image_dir)
    unnamed = sheet["filename"].isna()
    if unnamed.any():
        logger.info(f"left {unnamed.sum():,} rows without a file name out")
    sheet = sheet[~unnamed].reset_index(drop=True)
    if sheet.empty:
        raise UserError(f"no row of {labels_path} has a file name")
    sheet["measured"] = to_numbers(sheet[scale.target]) if scale.target in sheet else np.nan
    found = folder.find_all(sheet["filename"]).rename(columns={"_fault": "fault"})
    return sheet.drop(columns="fault", errors="ignore").join(found)


def read_photo(path, fault, size):
    """Pixels uint8 (size, size, 3) and what is wrong with the photo ("" if nothing); black if it cannot be read."""
    if not fault:
        try:
            return np.asarray(transforms.resize(open_photo(path), [size, size])), ""
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
            fault = fault_of(error)
    return np.zeros((size, size, 3), np.uint8), fault


def weigh_photos(scale, table, group):
    """`table` with `predicted`, `unlike` and `fault`; each process weighs its share of the photos."""
    own = table.iloc[group.share(len(table), EXTRACTION_BATCH[scale.device.type])]
    weighed = pd.concat(group.gather(weigh_share(scale, own, group)))
    bad = weighed["fault"] != ""
    weighed = weighed.assign(predicted=weighed["predicted"].mask(bad), unlike=weighed["unlike"] & ~bad)
    return table.assign(**weighed)


def weigh_share(scale, table, group):
    """`predicted`, `unlike` and `fault` of each photo; photos are read while others are weighed."""
    metadata = torch.from_numpy(scale.encoder.encode(table))
    size, batch = scale.image_size or 8, EXTRACTION_BATCH[scale.device.type]
    starts = range(0, len(table), batch)
    photos_found = list(zip(table["_path"], table["fault"], strict=True))

    def read(number):
        photos = [read_photo(*found, size) for found in photos_found[starts[number] : starts[number] + batch]]
        images, faults = zip(*photos, strict=True)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), list(faults)

    def weigh(number, images):
        return scale.weigh(images, metadata[starts[number] : starts[number] + batch])

    def both(number):
        images, faults = read(number)
        return *weigh(number, images), faults

    threads = torch.get_num_threads()
    if scale.device.type == "cpu":  # a whole batch for each core, as in training
        torch.set_num_threads(1)
        done = in_threads(both, len(starts), threads)
    else:
        read_ahead = enumerate(in_threads(read, len(starts), min(cores(), 16)))
        done = ((*weigh(number, images), faults) for number, (images, faults) in read_ahead)
    try:
        with bar(group, len(table), unit="photo", desc="photos") as shown:
            parts = [(np.empty(0), np.empty(0, bool), [])]
            for part in done:
                parts.append(part)
                shown.update(len(part[0]))
    finally:
        torch.set_num_threads(threads)
    predicted, unlike, faults = (np.concatenate(column) for column in zip(*parts, strict=True))
    lost = table["_path"][(faults == "no such file") & (table["fault"] == "")]
    for path in lost[:1]:
        check_seen(path, group)
    return pd.DataFrame({"predicted": predicted, "unlike": unlike, "fault": faults.astype(object)}, index=table.index)


def add_interval(table, scale, coverage):
    table = table.assign(low=np.nan, high=np.nan)
    if scale.calibration:
        table["low"], table["high"] = calibration.interval(scale.calibration, table["predicted"], coverage)
        if np.isinf(table["high"]).any():
            logger.info(f"{scale.calibration['plants']} plants are too few for an interval of {coverage:.0%}")
    else:
        logger.info("no interval: the model was trained without --folds, which shows its errors on unseen plants")
    return table


# ---------------------------------------------------------------- report


def write_table(table, scale, path):
    suffix = f"_{scale.unit}" if scale.unit else ""
    lacking = scale.encoder.unknown(table)
    notes = zip(table["fault"], np.where(table["unlike"], UNLIKE, ""), lacking, strict=True)
    note = ["; ".join(filter(None, (*some, columns and f"without {columns}"))) for *some, columns in notes]
    written = table[["filename", "predicted", "low", "high"]].assign(note=note)
    with whole_file(path) as partial:
        renamed = {name: name + suffix for name in ("predicted", "low", "high")}
        written = harmless(written.rename(columns=renamed))
        written.to_csv(partial, index=False, float_format="%.9g", errors="backslashreplace")


def log_summary(table, scale, coverage):
    good, unit = table[table["fault"] == ""], scale.unit
    text = f"{len(good):,} photos weighed"
    if len(good):
        total = f", total {good['predicted'].sum():.4f} {unit}" if unit else ""
        text += f": mean {good['predicted'].mean():.4f} {unit}{total}, {good['unlike'].sum():,} {UNLIKE}"
    logger.info(text.rstrip() + f", {len(table) - len(good):,} unreadable")
    known = good.dropna(subset="measured")
    if len(known):
        score = scores(known.assign(error=known["predicted"] - known["measured"]))
        text = (
            f"against {len(known):,} measured: RMSE {score['val_rmse']:.4f} {unit}, bias {score['val_bias']:.4f} {unit}"
        )
        if scale.calibration:
            text += (
                f", {known['measured'].between(known['low'], known['high']).mean():.1%} in the {coverage:.0%} interval"
            )
        logger.info(text)


def draw_sheet(table, scale, path):
    """The photos with their predictions, those that fit the model worst first and in red."""
    good = table[table["fault"] == ""]
    worst = good["unlike"].copy()
    if scale.calibration:
        worst |= good["measured"].notna() & ~good["measured"].between(good["low"], good["high"])
    marked, rest = good[worst], good[~worst].sort_values("predicted", kind="stable")
    room = max(THUMBNAILS - len(marked), 0)
    spread = np.unique(np.linspace(0, len(rest) - 1, room).astype(int)) if len(rest) > room else np.arange(len(rest))
    shown = pd.concat([marked[:THUMBNAILS], rest.iloc[spread]])
    rows = max(-(-len(shown) // THUMBNAILS_A_ROW), 1)
    figure, axes = new_figure(rows, THUMBNAILS_A_ROW, (2 * THUMBNAILS_A_ROW, 2.7 * rows + 0.8))
    for axis in np.ravel(axes):
        axis.set_axis_off()
    for axis, (place, row) in zip(np.ravel(axes), shown.iterrows(), strict=False):
        axis.imshow(open_photo(row["_path"]).resize((160, 160)))
        text = f"{row['predicted']:.3f} {scale.unit}"
        if np.isfinite(row["high"]):
            text += f"\n{row['low']:.3f} to {row['high']:.3f}"
        name = row["filename"] if len(row["filename"]) < 25 else "..." + row["filename"][-22:]
        axis.set_title(f"{plain(name)}\n{text}", fontsize=7, color="tab:red" if worst[place] else "black")
    why = "red: unlike the training photos, or measured outside the interval"
    figure.suptitle(
        f"{len(shown)} of {len(good):,} photos with their predicted {plain(scale.target)}; {why}", fontsize=10
    )
    save_photos(figure, path)


# ---------------------------------------------------------------- other programs


class Grams(torch.nn.Module):
    """Photos uint8 (n, 3, height, width), and metadata as encoded, to predictions (n,): one graph for export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, photos, metadata=None):
        size = [self.model.image_size] * 2
        images = torch.nn.functional.interpolate(photos.float(), size, mode="bilinear", antialias=True)
        features = self.model.backbone(self.model.normalize(images.round().clamp(0, 255)))
        metadata = photos.new_zeros(photos.shape[0], 0) if metadata is None else metadata  # len() would fix n
        return self.model.target.undo(self.model.head(features.float(), metadata))


def export(scale, path):
    """Write the model as ONNX, once onnxruntime gives the same grams as PyTorch.

    Inputs: `photos` uint8 (n, 3, height, width), RGB and upright, of any one size; with a model of metadata also
    `metadata` float32 (n, m), as MetadataEncoder encodes them. Output: `predicted` (n,), in the unit of the target.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError as error:
        raise UserError("--export needs three more packages: pip install onnx onnxscript onnxruntime") from error
    if not scale.model.backbone:
        raise UserError("--export writes models of photos, this one has learned from metadata alone")
    scale.model.precision = "fp32"
    grams = Grams(scale.model.cpu().float().to(memory_format=torch.contiguous_format)).eval()
    random = np.random.default_rng(0)
    photos = torch.from_numpy(random.integers(0, 256, (2, 3, 256, 256), dtype=np.uint8))
    inputs = {"photos": photos, "metadata": torch.zeros(2, scale.encoder.width)}
    names = ["photos", "metadata"] if scale.encoder.width else ["photos"]
    n, dynamic = torch.export.Dim("n"), {}
    dynamic["photos"] = {0: n, 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    dynamic["metadata"] = {0: n}
    with whole_file(path) as partial:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            grams,
            tuple(inputs[name] for name in names),
            str(partial),
            input_names=names,
            output_names=["predicted"],
            dynamic_shapes={name: dynamic[name] for name in names},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        for height, width in ((256, 256), (300, 200)):
            photos = torch.from_numpy(random.integers(0, 256, (3, 3, height, width), dtype=np.uint8))
            inputs = {"photos": photos, "metadata": torch.zeros(3, scale.encoder.width)}
            with torch.inference_mode():
                wanted = grams(*(inputs[name] for name in names)).numpy()
            answer = session.run(None, {name: inputs[name].numpy() for name in names})[0]
            if not np.allclose(answer, wanted, rtol=1e-3, atol=1e-4):
                raise UserError(f"not written: ONNX gives {answer[0]:.6g} where PyTorch gives {wanted[0]:.6g}")


# ---------------------------------------------------------------- command line


def build_parser():
    parser = Parser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input").add_argument
    add("photos", nargs="*", metavar="PHOTO_OR_FOLDER", help="photos, or folders of photos")
    add("--recursive", action="store_true", help="also the folders in the folders")
    add("--labels_path", type=Path, help="a sheet, .xlsx, .csv or .parquet, whose rows are predicted")
    add("--image_dir", type=Path, help="folder of the sheet's photos (default: images_med_res beside the sheet)")
    add("--model", type=Path, default="models/biomass_resnet.pt", help="checkpoint (default: %(default)s)")
    add = parser.add_argument_group("speed").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: the first that is there")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: that of the training")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default="predictions.csv", help="table (default: %(default)s)")
    add("--coverage", type=between(0, 1), default=0.9, help="share of weights in the interval (default: %(default)s)")
    add("--sheet", type=Path, metavar="PNG", help="picture of the photos with their predictions")
    add("--export", type=Path, metavar="FILE.onnx", help="write the model for other programs; photos are then optional")
    return parser


def check_arguments(args):
    """`args`, once they have proved sound."""
    if bool(args.photos) == bool(args.labels_path) and not (args.export and not args.photos):
        raise UserError("pass either photos and folders, or --labels_path with a sheet")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet} must end in .png")
    if args.image_dir and not args.labels_path:
        raise UserError("--image_dir is the folder of a sheet's photos: pass --labels_path too, or the folder alone")
    inputs = [args.model, *args.photos, *([args.labels_path] if args.labels_path else [])]
    check_writable(outputs_of(args), inputs, [folder for folder in (*args.photos, image_dir_of(args)) if folder])
    return args


def outputs_of(args):
    return [path for path in (args.out, args.sheet, args.export) if path]


def image_dir_of(args):
    return args.image_dir or (args.labels_path and args.labels_path.parent / "images_med_res")


def photos_of(args, scale):
    """A table of the photos that are to be weighed."""
    if args.labels_path:
        return rows_of_sheet(args.labels_path, image_dir_of(args), scale)
    columns = [step["column"] for step in scale.encoder.plan]
    if columns:
        raise UserError(f"{args.model} has learned from {', '.join(columns)} too: pass them by --labels_path")
    return find_photos(args.photos, args.recursive)


def weigh_and_write(args, group):
    """Weigh all photos and write what was asked for; returns how many could not be read."""
    scale = Scale(args.model, pick_device(args.device, group), args.precision, group)
    unreadable = 0
    if args.photos or args.labels_path:
        table = weigh_photos(scale, group.first(photos_of, args, scale), group)
        if group.rank:
            return 0
        table = add_interval(table, scale, args.coverage)
        log_summary(table, scale, args.coverage)
        write_table(table, scale, args.out)
        if args.sheet:
            draw_sheet(table, scale, args.sheet)
        unreadable = int((table["fault"] != "").sum())
    if args.export and not group.rank:
        export(scale, args.export)
    return unreadable


def run(argv, group):
    """The script as one process of `group`; returns the exit status."""
    parser = build_parser()
    until_now = signal.getsignal(signal.SIGINT)
    with logging_to_console():
        try:
            if not group.rank:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            args = group.first(lambda: check_arguments(parser.parse_args(argv)))
            with alone([] if group.rank else outputs_of(args)):
                return 1 if weigh_and_write(args, group) else 0
        except UserError as error:
            if group.rank:
                group.make_way()
            parser.error(str(error))
        except (MemoryError, RuntimeError) as error:
            group.make_way()
            if not memory_is_full(error):
                raise
            parser.error("the memory is full: weigh fewer photos at once, or close other programs")
        except OSError as error:
            parser.error(f"cannot read or write {error.filename} ({error.strerror or one_line(error)})")
        except KeyboardInterrupt:
            parser.exit(130, "predict.py: interrupted\n")
        finally:
            signal.signal(signal.SIGINT, until_now)


def main(argv=None):
    return together(functools.partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())

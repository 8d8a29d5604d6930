"""Faults of sheets, photos, files and flags: a row is dropped by name, or the run stops in one line, never a traceback.

python tests/test_faults.py          # tries all of FAULTS and writes results/faults.csv
"""

import contextlib
import io
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import ROOT, SHEET, TARGET, flags_of, quick, write_tiny_weights  # noqa: E402
from PIL import Image  # noqa: E402

import cross_validate  # noqa: E402
import eda  # noqa: E402
import make_sample_data  # noqa: E402
import predict  # noqa: E402
import train_model as tm  # noqa: E402
from biomass import reading, writing  # noqa: E402

SCRIPTS = {"train_model.py": tm, "cross_validate.py": cross_validate, "predict.py": predict, "eda.py": eda}
SCRIPTS["make_sample_data.py"] = make_sample_data
ROW = 3  # the row that a fault is put into, row 5 in a spreadsheet
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 48, 48, 3), dtype=np.uint8)


class Data:
    """A folder of twelve photos in six plants, to put a fault in, and the flags that a script is called with."""

    def __init__(self, folder):
        self.folder, self.photos, self.out = folder / "data", folder / "data" / "images_med_res", folder / "out"
        self.outside, self.flags, self.write = (
            folder / "outside",
            [],
            lambda rows, path: rows.to_excel(path, index=False),
        )
        for path in (self.photos, self.outside, self.out):
            path.mkdir(parents=True)
        names = [f"photo_{number:02}.png" for number in range(12)]
        weights = [0.1 + 0.05 * number for number in range(12)]
        self.rows = pd.DataFrame({"filename": names, "plant_number": [n // 2 for n in range(12)], TARGET: weights})
        self.rows = self.rows.astype(object).assign(age_days=[20 + number % 5 for number in range(12)])
        for name, pixels in zip(names, PIXELS, strict=True):
            Image.fromarray(pixels).save(self.photos / name)
        self.photo, self.sheet, self.seen = self.photos / names[ROW], self.folder / SHEET, PIXELS[ROW]

    def save(self):
        self.write(self.rows, self.sheet)
        return self


class Fault(NamedTuple):
    script: str
    name: str
    put: object  # a function of the Data, or a list of flags in which {name} is one of its places
    outcome: str  # read, dropped (all the rest is as without the fault) or refused (one line, status 2)
    message: str = ""  # regular expression of what is said
    left_out: tuple = ()  # rows

    def happens(self, folder):
        """Put the fault into a new folder, see that what happens is as described; returns what is said."""
        data = Data(folder)
        if callable(self.put):
            self.put(data)
        else:
            data.flags = [flag.format(**vars(data)) for flag in self.put]
        if not data.sheet.exists():
            data.save()
        return refusal(self, data) if self.outcome == "refused" else kept_rows(self, data)


def called(main, arguments):
    """Status and all that a script says; a warning or a traceback is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quick():
        warnings.simplefilter("ignore")
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def refusal(fault, data):
    flags = flags_of(data.folder, data.out)
    if fault.script == "predict.py":
        flags = ["--model", model_of(data), "--device", "cpu", "--out", data.out / "out.csv"]
    elif fault.script == "eda.py":
        places = ["--figures_dir", data.out / "figures", "--summary_path", data.out / "summary.json"]
        flags = ["--data_dir", data.folder, *places]
    elif fault.script == "make_sample_data.py":
        flags = ["--num_images", "2", "--out", data.out / "drawn"]
    status, _, said = called(SCRIPTS[fault.script].main, [*flags, *data.flags])
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"{fault.script}: error: "), said
    assert re.search(fault.message, said), said
    late = fault.name in ("pixels that end early", DIVERGES)  # found when the log is open
    assert not [path for path in data.out.rglob("*.*") if path.suffix in (".txt", ".csv", ".json", ".log")[: 4 - late]]
    return said.partition("error: ")[2].strip()


def kept_rows(fault, data):
    """The rows that train_model.py would use are all but those left out, with their weights and pixels."""
    args = tm.build_parser().parse_args(flags_of(data.folder, data.out, *data.flags))

    def read(argv):
        writing.start_log()
        tm.complete_arguments(args)
        data.labels = reading.filter_missing_images(reading.load_labels(args), args, {})

    said = called(read, [])[1].splitlines()
    clean = Data(data.out).rows.drop(index=list(fault.left_out), errors="ignore")
    assert data.labels[TARGET].tolist() == pytest.approx(clean[TARGET].tolist(), rel=1e-6) or "as if in mg" in said[0]
    if ROW not in fault.left_out:
        row = data.labels.index[data.labels["_path"].map(os.path.basename).str.lower() == data.photo.name.lower()][0]
        photo = np.asarray(reading.open_photo(data.labels["_path"][row])).astype(int)
        assert photo.shape == data.seen.shape and np.abs(photo - data.seen).mean() < 16, fault.name
    assert bool(said) == bool(fault.message) and all(re.search(fault.message, line) for line in said), said
    return said[0] if said else ""


def model_of(data):
    """A checkpoint of a model that has not learned anything."""
    path = data.outside / "small.pt"
    args = tm.build_parser().parse_args(["--model_out", str(path), "--precision", "fp32"])
    model = tm.BiomassModel(tm.Backbone("shufflenet_v2_x0_5", 32))
    model.plan, model.trained_on = [], {}
    tm.save_checkpoint(model, args, epoch=1)
    return path


# ---------------------------------------------------------------- how faults are made


def cell(column, value):
    return lambda data: data.rows.__setitem__(column, data.rows[column].where(data.rows.index != ROW, value))


def moved(place, name, link=False):
    """The photo at another place, named `name` in the sheet, or still by its own name as a link to there."""

    def put(data):
        new = data.folder / place.format(outside=data.outside)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(data.photo, new)
        data.photo.symlink_to(new) if link else cell("filename", name.format(outside=data.outside))(data)
        data.photo = data.photo if link else new

    return put


def renamed(data, names):
    data.rows = data.rows.rename(columns=names)


def again(**changed):
    """The row once more, at the end."""

    def put(data):
        cells = {name: [change(data.rows[name][ROW])] for name, change in changed.items()}
        data.rows = pd.concat([data.rows, data.rows.loc[[ROW]].assign(**cells)], ignore_index=True)

    return put


def content(make, seen=None):
    """The photo's file holds make(image); people see seen(image)."""

    def put(data):
        image = Image.fromarray(data.seen)
        data.photo.write_bytes(make(image))
        data.seen = data.seen if seen is None else np.asarray(seen(image).convert("RGB"))

    return put


def encoded(image, kind="PNG", **options):
    image.save(written := io.BytesIO(), kind, **options)
    return written.getvalue()


def half_clear(image):
    image.putalpha(Image.fromarray(np.repeat([[0] * 24 + [255] * 24], 48, 0).astype(np.uint8)))
    return image


def half_white(image):
    image.paste("white", (0, 0, 24, 48))
    return image


def turned(image, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    return encoded(image.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)


def png_of(width, height, pixels=b""):
    """A PNG whose header tells another size than its pixels have, as all its checksums confirm."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def replaced(make):
    def put(data):
        data.photo.unlink()
        make(data.photo)

    return put


def sparse(path):
    with path.open("wb") as file:
        file.truncate(reading.MOST_BYTES + 1)


def sheet(write, name=SHEET):
    """The sheet is a file of this name, written by write(rows, path)."""

    def put(data):
        data.sheet, data.write = data.folder / name, write
        data.flags = ["--labels_path", str(data.sheet)]

    return put


def as_bytes(make):
    return lambda rows, path: path.write_bytes(make(rows))


def below(*lines):
    """The sheet as a CSV file below such lines."""
    return sheet(as_bytes(lambda rows: "\n".join([*lines, rows.to_csv(index=False)]).encode()), "labels.csv")


def csv(encoding="utf-8", **options):
    return sheet(lambda rows, path: rows.to_csv(path, index=False, encoding=encoding, **options), "labels.csv")


def excel(rows, **options):
    rows.to_excel(written := io.BytesIO(), index=False, **options)
    return written.getvalue()


def twice(rows, path):
    with pd.ExcelWriter(path) as book:
        for name in "AB":
            rows.to_excel(book, sheet_name=name, index=False)


def given(flag, make):
    """A file that holds make(data), given by `flag`."""

    def put(data):
        (data.outside / "given.pth").write_bytes(make(data))
        data.flags = [flag, str(data.outside / "given.pth"), *([str(data.photos)] if flag == "--model" else [])]

    return put


class Hostile:
    def __reduce__(self):
        return sys.exit, ("code in a file has run",)


def saved(content):
    torch.save(content, written := io.BytesIO())
    return written.getvalue()


def spoiled(**changed):
    return lambda data: saved(torch.load(model_of(data), weights_only=True) | changed)


# ---------------------------------------------------------------- the table


def read(name, put, message=""):
    return Fault("train_model.py", name, put, "read", message)


def dropped(name, put, message, left_out=(ROW,)):
    return Fault("train_model.py", name, put, "dropped", f"^dropped {len(left_out)} rows {message}", left_out)


def bad_photo(name, put, reason):
    return dropped(name, put, rf"whose photo is missing or unreadable: row 5 \(.*\) {reason}")


def refused(script, cases):
    return [Fault(f"{script}.py", name, put, "refused", message) for name, put, message in cases]


def flags(*cases):
    """Refused flags: each case is the flags in one text, and the message."""
    return [(text, text.split(), message) for text, message in cases]


DIVERGES = "--learning_rate 1e30 --batch_size 2"
NO_NUMBER, OUT, NONE = (
    rf"whose {TARGET} is no number: row 5 \(photo_03.png\)$",
    "leads out of the image folder$",
    "no such",
)
# fmt: off
FAULTS = [
    *(dropped(f"a weight that is {value!r}", cell(TARGET, value), NO_NUMBER)
      for value in ("ca. 0.3", "inf", "1e999")),
    dropped("a weight that Excel made a date", cell(TARGET, datetime(2024, 2, 1)), "whose .* is a date .*row 5"),
    dropped("a weight that is an error of Excel's", cell(TARGET, "#DIV/0!"), "(whose|without) "),
    *(dropped(f"a weight of {value}", cell(TARGET, value), "with .* not above 0 g: row 5") for value in (-0.1, 0)),
    dropped("no weight", cell(TARGET, None), f"without {TARGET}$"),
    dropped("a formula that was never computed", cell(TARGET, "=0.1+0.2"), f"without {TARGET}$"),
    read("a weight with a decimal comma", cell(TARGET, "0,25"), "read with decimal commas in"),
    read("a weight with a decimal comma and spaces", cell(TARGET, "  0,25 "), "read with decimal commas in"),
    read("a weight in mg", cell(TARGET, 250), r"^warning: 1 .* as if in mg: row 5 \(photo_03.png\)"),
    read("a plant number as text with spaces", cell("plant_number", "1 ")),
    dropped("no plant number", cell("plant_number", None), "without plant_number: row 5"),
    dropped("a weight in ounces", cell(TARGET, "5 oz"), "whose .* has another unit than g, mg or kg: row 5"),
    dropped("a weight of 1-May", cell(TARGET, "1-May"), "whose .* is a date or a time, no number: row 5"),
    dropped("a photo of two plants", again(plant_number=lambda plant: plant + 1), "of a photo of several", (3, 12)),
    read("weights in mg and g", lambda data: data.rows.__setitem__(TARGET, [
        f"{1000 * gram:g} mg" if gram > 0.3 else f"{gram:g}g" for gram in data.rows[TARGET]]), "mg brought to g"),
    read("weights in mg by the name of their column", lambda data: (data.rows.__setitem__(
        TARGET, 1000 * data.rows[TARGET]), renamed(data, {TARGET: "Fresh Weight Total (mg)"})), "mg brought to g"),
    read("names of columns in other letters", lambda data: renamed(data, {"filename": "File Name"}), "'File Name' as"),
    read("UTF-16", csv("utf-16", sep="\t"), "UTF-16"),
    read("a file name without suffix", cell("filename", "photo_03"), "without suffix"),
    read("a file name with another suffix", cell("filename", "photo_03.tif"), "without suffix"),
    read("a photo in a subfolder", moved("images_med_res/may/photo_03.png", "photo_03.png"), "in a subfolder"),
    bad_photo("a Git LFS pointer", content(lambda image: b"version https://git-lfs.github.com"), ".*Git LFS pointer"),
    bad_photo("a HEIC photo", content(lambda image: b"\0\0\0\x18ftypheic" + bytes(64)), ".*(HEIC|unreadable)"),
    dropped("no file name", cell("filename", None), "without a file name: row 5"),
    dropped("a file name of spaces", cell("filename", "   "), "without a file name: row 5"),
    bad_photo("a file name that is a dot", cell("filename", "."), OUT),
    bad_photo("an absolute path", moved("{outside}/photo.png", "{outside}/photo.png"), OUT),
    bad_photo("a path with ..", moved("{outside}/photo.png", "../../outside/photo.png"), OUT),
    bad_photo("a path with backslashes and ..", moved("{outside}/photo.png", "..\\..\\outside\\photo.png"), OUT),
    bad_photo("a path of another drive", cell("filename", "C:\\photos\\photo_03.png"), OUT),
    bad_photo("a path on a server", cell("filename", "\\\\server\\photos\\photo_03.png"), OUT),
    bad_photo("a link to a photo outside", moved("{outside}/photo.png", "", link=True), "is a link that leads out of"),
    bad_photo("a link to itself", replaced(lambda path: path.symlink_to(path)), "unreadable photo"),
    bad_photo("a file name of 300 letters", cell("filename", "x" * 300), NONE),
    bad_photo("a file name that two files fit", lambda data: (
        shutil.copy(data.photo, data.photos / "PHOTO_03.PNG"), cell("filename", "Photo_03.Png")(data)), "several"),
    read("a file name in other letter case", cell("filename", "Photo_03.PNG")),
    read("a file name between spaces", cell("filename", "  photo_03.png ")),
    read("a file name with backslashes", moved("images_med_res/may/photo_03.png", "may\\photo_03.png")),
    read("a link within the folder", moved("images_med_res/may/photo_03.png", "", link=True)),
    dropped("a row entered twice", again(), "that repeat an earlier row: row 14", (12,)),
    dropped("a photo by two spellings", again(filename=str.upper), "that repeat an earlier row: row 14", (12,)),
    dropped("a photo with two weights", again(**{TARGET: lambda grams: 2 * grams}), "of a photo with several", (3, 12)),
    dropped("a photo by two spellings with two weights", again(filename=str.upper, **{TARGET: lambda grams: 2 * grams}),
            "of a photo with several", (ROW, 12)),
    bad_photo("a photo that is not there", lambda data: data.photo.unlink(), NONE),
    bad_photo("an empty photo", content(lambda image: b""), "unreadable photo .its file is empty"),
    bad_photo("a PNG cut short", content(lambda image: encoded(image)[:3000]), "unreadable photo"),
    bad_photo("a JPEG cut short", content(lambda image: encoded(image, "JPEG")[:900]), "unreadable photo"),
    bad_photo("a flipped bit", content(lambda image: encoded(image)[:99] + b"!" + encoded(image)[100:]), "unreadable"),
    bad_photo("a photo that is text", content(lambda image: b"no photo"), r"unreadable photo \(it is no photo\)$"),
    bad_photo("a photo that is PostScript", content(lambda image: encoded(image, "EPS")), ".*it is no photo"),
    bad_photo("12,000 x 9,000 pixels", content(lambda image: encoded(Image.new("1", (12000, 9000)))), ".*more than 89"),
    bad_photo("a header of 60,000 x 60,000 pixels", content(lambda image: png_of(60000, 60000)), "unreadable photo"),
    bad_photo("a photo that is a folder", replaced(Path.mkdir), "unreadable photo|no such file"),
    bad_photo("a photo that is a pipe", replaced(lambda path: os.mkfifo(path)), ".*it is no ordinary file"),
    bad_photo("a photo of more than 256 MiB", replaced(sparse), ".*larger than 256 MiB"),
    read("a transparent photo", content(lambda image: encoded(half_clear(image)), half_white)),
    read("a palette", content(lambda image: encoded(image.quantize(16)), lambda image: image.quantize(16))),
    read("1 bit a pixel", content(lambda image: encoded(image.convert("1")), lambda image: image.convert("1"))),
    read("16 bit grey", content(lambda image: encoded(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)),
                                lambda image: image.convert("L"))),
    read("a CMYK JPEG named .png", content(lambda image: encoded(
        image.convert("CMYK"), "JPEG", quality=100, subsampling=0))),
    read("an animated GIF", content(lambda image: encoded(image.quantize(16), "GIF", save_all=True, append_images=[
        Image.new("P", image.size)]), lambda image: image.quantize(16))),
    read("a lossless WebP", content(lambda image: encoded(image, "WEBP", lossless=True))),
    read("a TIFF", content(lambda image: encoded(image, "TIFF", compression="tiff_lzw"))),
    read("a PNG turned by its EXIF tag", content(lambda image: turned(image, "PNG"))),
    read("a TIFF turned by its EXIF tag", content(lambda image: turned(image, "TIFF"))),
    read("an Excel file named .csv", sheet(as_bytes(excel), "labels.csv")),
    read("a CSV file named .xlsx", sheet(lambda rows, path: rows.to_csv(path, index=False), "labels.xlsx")),
    read("semicolons and decimal commas", csv(sep=";", decimal=","), "read with semicolons"),
    read("tabs", csv(sep="\t"), "read with tabs"),
    read("a byte-order mark", csv("utf-8-sig")),
    read("Latin-1", lambda data: (data.rows.insert(0, "gr\xf6\xdfe", 1), csv("latin-1")(data)), "with encoding cp1252"),
    read("a Parquet file", sheet(lambda rows, path: rows.assign(plant_number=rows["plant_number"].astype(str), **{
        TARGET: rows[TARGET].astype(float)}).to_parquet(path), "labels.parquet")),
    read("title rows above the names", below("Biomass 2024,,,", "", ",,,")),
    read("empty rows and columns", lambda data: (data.rows.insert(0, "", None), setattr(
        data, "rows", data.rows.reindex(range(20))))),
    read("spaces around the names of columns", lambda data: renamed(data, " {} ".format)),
    *refused("train_model", [
        ("pixels that end early", content(lambda image: png_of(48, 48, bytes(999))), "png: unreadable photo .*"),
        ("no photo that can be read", lambda data: [path.write_bytes(b"") for path in data.photos.iterdir()], "no ph"),
        ("no folder of photos", lambda data: data.photos.rename(data.outside / "moved"), "no image folder at"),
        ("no sheet", lambda data: setattr(data, "write", lambda rows, path: None), "no label sheet at .*--labels_path"),
        ("a sheet that is a folder", lambda data: data.sheet.mkdir(), "no label sheet at"),
        ("an empty sheet", sheet(as_bytes(lambda rows: b""), "labels.csv"), "cannot read|no column 'filename'"),
        ("an empty Excel sheet", sheet(as_bytes(lambda rows: excel(pd.DataFrame()))), "no column 'filename'"),
        ("names of columns alone", sheet(as_bytes(lambda rows: excel(rows[:0]))), "no row of .* has a file name and"),
        ("random bytes", sheet(as_bytes(lambda rows: np.random.default_rng(0).bytes(5000)), "a.csv"), "cannot read"),
        ("a sheet that is a photo", sheet(as_bytes(lambda rows: encoded(Image.new("L", (9, 9))))), "cannot read"),
        ("an Excel file cut short", sheet(as_bytes(lambda rows: excel(rows)[:3000])), "cannot read .*: save it anew"),
        ("an Excel file with a password", sheet(as_bytes(
            lambda rows: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(8000)), "labels.xls"), "cannot read .*: save"),
        ("a Parquet file cut short", sheet(as_bytes(lambda rows: b"PAR1" + bytes(99)), "a.parquet"), "cannot read"),
        ("decimal commas not in quotes", sheet(as_bytes(lambda rows: b"filename,plant_number,fresh_weight_total\n"
            b"a.png,1,0,25\n"), "labels.csv"), "row 2 has more cells than there are columns"),
        ("a lone quote", sheet(as_bytes(lambda rows: b"filename,plant_number,fresh_weight_total\n\"a.png,1,2\n"),
                               "labels.csv"), "a quote in row 2 is never closed"),
        ("commas that can be both", lambda data: (data.rows.__setitem__(TARGET, "1,234"), csv()(data)), "--decimal"),
        ("a web page", sheet(as_bytes(lambda rows: rows.to_html().encode()), "labels.xls"), "it is a web page"),
        ("no column of plants", lambda data: data.rows.pop("plant_number"), "--group_by filename where each"),
        ("two sheets", sheet(lambda rows, path: twice(rows, path)), "--sheet_name, one of A, B"),
        ("25 rows above the names", below(*["Biomass,,,"] * 25), "no column 'filename'"),
        ("no column of weights", lambda data: renamed(data, {TARGET: "wet_weight_total"}),
         f"no column '{TARGET}'; nearest: 'wet_weight_total'"),
        ("two columns of weights", lambda data: data.rows.insert(0, TARGET, 1.0, allow_duplicates=True), "several c"),
        ("one plant", lambda data: data.rows.__setitem__("plant_number", 1), r"1 plant\(s\) leaves .* empty"),
        ("no weight at all", lambda data: data.rows.__setitem__(TARGET, None), "no row of"),
        ("weights that are text", given("--weights", lambda data: b"text"), "--weights .* cannot be read"),
        ("weights of another network", given("--weights", lambda data: saved({"weight": torch.zeros(3)})), "is not of"),
        ("weights that run code", given("--weights", lambda data: pickle.dumps(Hostile())), "cannot be read"),
        ("weights of torch that run code", given("--weights", lambda data: saved(Hostile())), "cannot be read"),
        *flags(
            ("--data_dir nowhere", "no data folder at nowhere: .*--data_dir.*make_sample_data.py"),
            ("--target fresh_weight", "no column 'fresh_weight'; nearest: 'fresh_weight_total'"),
            (f"--group_by {TARGET}", "it is the target"), ("--group_by plants", "nearest: 'plant_number'"),
            ("--metadata_columns age", "no column 'age'; nearest: 'age_days'"), ("--epochs 0", "--epochs"),
            ("--epochs 1.5", "--epochs"), ("--batch_size 0", "--batch_size"), ("--batch_size many", "--batch_size"),
            ("--learning_rate nan", "--learning_rate"), ("--learning_rate 0", "--learning_rate"),
            (DIVERGES, "epoch 1: .* is not finite; lower --learning_rate"),
            ("--val_split 1", "--val_split"), ("--weight_decay -1", "--weight_d"),
            ("--image_size 31", "--image_size"), ("--seed -1", "--seed"), ("--patience -1", "--patience"),
            ("--num_workers -1", "--num_workers"), ("--augment_views x", "--augment_views"),
            ("--device tpu", "--device"),
            ("--loss mape", "--loss"), ("--seed", "expected one argument"), ("--epoch 3", "unrecognized arguments"),
            ("--freeze_backbone --unfreeze_backbone", "not allowed with"), ("--features all", "--features"),
            ("--unfreeze_from layer9", "--unfreeze_from layer9"), ("--unfreeze_from maxpool", "nothing to train there"),
            ("--backbone_learning_rate 1e-4", "the backbone is frozen"), ("--drop_path 0.1", "the backbone is frozen"),
            ("--drop_path 0.1 --unfreeze_backbone", "--drop_path 0.1: .* no stochastic depth; pass --drop_path 0"),
            ("--weights no.pth", "no weight file at no"),
            ("--model_name resnet19 --weights none", "resnet19: neither .*; nearest: .*resnet18"),
            ("--model_name vit_b_16 --weights none --image_size 100", "--image_size 100 does not suit vit_b_16"),
            ("--model_name inception_v3 --weights none", "cannot be taken off"), ("--folds 5", "cross_validate.py"),
            ("--curves_path {out}/curves.gif", "must end in .png, .pdf or .svg"), ("--image_dir {sheet}", "no image"),
            ("--log_path {outside}", "cannot write .*it is a folder"), ("--metrics_path {sheet}", "it is an input"),
            ("--results_dir {sheet}", "cannot write"), ("--cache_dir {sheet}", "cannot (write|use)"),
            ("--curves_path {photo}", "among the photos"),
        ),
    ]),
    *refused("cross_validate", flags(
        ("--folds 1", "--folds"), ("--folds 7", "--folds 7 needs as many plants, the data have 6"), ("--folds 2.5", ""),
        ("--log_path {outside}", "cannot write .*it is a folder"))),
    *refused("predict", [
        *((name, given("--model", make), "is not a checkpoint") for name, make in {
            "a model that is text": lambda data: b"text", "a model that is empty": lambda data: b"",
            "a model of other tensors": lambda data: saved({"weight": torch.zeros(3)}),
            "a model that is a list": lambda data: saved(["settings"]),
            "a model that runs code": lambda data: pickle.dumps(Hostile()),
            "a model of torch that runs code": lambda data: saved(Hostile()), "spoiled settings": spoiled(settings="x"),
            "spoiled metadata": spoiled(metadata=3), "spoiled calibration": spoiled(calibration={"growth": "x"}),
            "spoiled tensors": spoiled(model_state={"x": 1}), "spoiled familiar": spoiled(familiar="x")}.items()),
        *flags(
            ("{photos} --model no.pt", "no model at no.pt"), ("{outside}/none.png", "no photo at"),
            ("{out}", "no photo (in|at)"), ("{photos} --labels_path {sheet}", "either photos"),
            ("--image_dir {photos}", "--labels_path"), ("{photos} --coverage 1", "--coverage"),
            ("{photos} --coverage nan", "--coverage"), ("{photos} --out {outside}", "cannot write .*it is a folder"),
            ("{photo} --out {photo}", "cannot write"), ("{photos} --sheet {out}/a.jpg", "must end in .png")),
    ]),
    *refused("eda", [
        ("no sheet", lambda data: setattr(data, "write", lambda rows, path: None), "no label sheet at"),
        ("an Excel file cut short", sheet(as_bytes(lambda rows: excel(rows)[:3000])), "cannot read"),
        *flags(("--image_dir nowhere", "no image folder at nowhere"), ("--target age", "no column 'age'"),
               ("--target filename", "filename"), ("--seed -1", "--seed"), ("--summary_path {outside}", "cannot write"),
               ("--figures_dir {photos}", "cannot write"), ("--figure_dir x", "unrecognized arguments")),
    ]),
    *refused("make_sample_data", flags(
        ("--num_images 0", "--num_images must be at least 1"), ("--num_images 10 --with_faults", "at least 20"),
        ("--num_images many", "--num_images"), ("--seed -1", "--seed"), ("--num_workers 0", "--num_workers"),
        ("--out {folder}", "not drawn by this script"))),
]
# fmt: on


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.script[:-3]}: {fault.name}")
def test_fault(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fault.happens(tmp_path)


def test_there_are_eighty_faults_with_names_of_their_own():
    assert len({fault[:2] for fault in FAULTS}) == len(FAULTS) >= 80 and {fault.script for fault in FAULTS} == {
        *SCRIPTS
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no limit for files")
def test_a_full_disk_ends_the_run_in_one_line_and_earlier_files_stay_whole(tmp_path, monkeypatch):
    import resource

    data, limits, now = Data(tmp_path).save(), resource.getrlimit(resource.RLIMIT_FSIZE), time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)  # so that all photos count as unchanged for long
    flags = flags_of(data.folder, data.out)
    assert called(tm.main, flags)[0] == 0
    before = {path: path.read_bytes() for path in data.out.glob("*.*") if path.suffix != ".log"}
    for most, full in ((2**20, "model.pt"), (2**10, "training.log")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            status, _, said = called(tm.main, [*flags, "--learning_rate", "0.002"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 2 and said.count("\n") == 1 and f"{full} (File too large)" in said, said
        assert {path: path.read_bytes() for path in data.out.glob("*.*") if path.suffix != ".log"} == before


def main():
    table = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where "nowhere" is not
        write_tiny_weights(Path(folder) / "tiny.pth")
        for number, fault in enumerate(FAULTS):
            said = re.sub(r"(?<![\w.])(/[^/ ]+)+/", "", fault.happens(Path(folder, str(number))))
            table.append(
                {"script": fault.script, "fault": fault.name, "outcome": f"{fault.outcome}: {said}".rstrip(": ")}
            )
            print(" | ".join(table[-1].values()))
        os.chdir(ROOT)
    pd.DataFrame(table).to_csv(ROOT / "results" / "faults.csv", index=False)


if __name__ == "__main__":
    sys.exit(main())

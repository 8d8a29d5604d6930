"""What faulty and hostile input does: the rows it spoils are left out and named, or the run stops with one line.

    python tests/test_faults.py          # tries all of FAULTS, prints them as a table and writes results/faults.csv

Each fault is put into a small folder of drawn photos. Where it is survived, all the other rows are compared with those
of a sound folder: names, weights, plants, split and pixels.
"""

import contextlib
import csv
import functools
import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inputs  # noqa: E402
import make_sample_data  # noqa: E402
import predict  # noqa: E402
import train_model  # noqa: E402
from devices import ALONE  # noqa: E402
from feature_store import FeatureStore  # noqa: E402
from outputs import logging_to_console  # noqa: E402

SHEET, PHOTOS, TARGET = "digital_biomass_labels.xlsx", "images_med_res", "fresh_weight_total"
COLUMNS = ["filename", "experiment_id", "plant_number", "timestamp", "age_days", TARGET]
GREEN = "gr\xfcn.png"  # with the umlaut as one character
SURVIVED, REFUSED, NOT_TRIED = "survived", "refused", "not tried"
ROW, ADDED = 3, -1  # the row that a fault is put into, row 5 in a spreadsheet, and one that it adds at the end
TALL = Image.Transpose.ROTATE_90


# ---------------------------------------------------------------- a folder to put faults in


class Data:
    """A data folder of drawn photos, photo_00.png and so on, and the rows of their sheet, which save() writes."""

    def __init__(self, drawn, folder, count=12):
        self.drawn, self.folder, self.out = drawn, folder / "data", folder / "out"
        self.photos = self.folder / PHOTOS
        self.photos.mkdir(parents=True)
        self.outside = folder / "outside"
        self.outside.mkdir()
        sheet = drawn_sheet(drawn)
        chosen = [number % len(sheet) for number in range(count)]
        self.rows = sheet.iloc[chosen][COLUMNS].reset_index(drop=True)
        for number, name in enumerate(self.rows["filename"]):
            again = b"again" * (number // len(sheet))  # so that no two files are equal
            (self.photos / f"photo_{number:02}.png").write_bytes(small_photo(drawn, name) + again)
        self.rows["filename"] = [f"photo_{number:02}.png" for number in range(count)]
        self.rows = self.rows.astype(object)
        self.changes = []  # what is done to the cells before they are written
        self.written = self.in_csv = False  # by the fault itself; as a CSV file
        self.flags, self.tries = [], [[]]
        self.trap = folder / "code has run"

    def name(self, row):
        return self.rows["filename"][row]

    def photo(self, row):
        return self.photos / self.name(row)

    def image(self, row):
        with Image.open(self.photo(row)) as image:
            return image.convert("RGB")

    def save(self):
        if not self.written and self.in_csv:
            in_file(text)(self, ROW)
        elif not self.written:
            (self.folder / SHEET).write_bytes(excel(self.cells()))
        return self

    def cells(self):
        """The sheet as lists, the names of the columns first."""
        table = [list(self.rows), *self.rows.astype(object).where(self.rows.notna(), None).to_numpy().tolist()]
        for change in self.changes:
            table = change(table)
        return table

    def arguments(self, *flags):
        """Flags of train_model.py that read this folder and write into `out` beside it."""
        out = ["--results_dir", self.out, "--log_path", self.out / "training.log", "--model_out", self.out / "model.pt"]
        data = ["--data_dir", self.folder, "--weights", "none", "--device", "cpu", "--cache_dir", self.out / "cache"]
        return [str(flag) for flag in (*data, *out, *self.flags, *flags)]


@functools.cache
def drawn_sheet(drawn):
    return inputs.read_sheet(drawn / SHEET).dropna(subset=TARGET)


@functools.cache
def small_photo(drawn, name):
    """A drawn photo in 96 x 96 pixels as a PNG."""
    with Image.open(drawn / PHOTOS / name) as image:
        return png(image.resize((96, 96)))


def excel(table):
    book = openpyxl.Workbook()
    for row in table:
        book.active.append(row)
    return bytes_of(book)


def parquet(table):
    return pd.DataFrame(table[1:], columns=table[0]).to_parquet()


def odd_parquet(table):
    sheet = pd.DataFrame(table[1:], columns=table[0])
    sheet.index = [f"n{row}" for row in sheet.index]
    return sheet.assign(filename=sheet["filename"].astype("category")).to_parquet()


def many_rows(table):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"filename": pyarrow.nulls(40_000_000)}), content)
    return content.getvalue()


def long_texts(table):
    """A Parquet file of few bytes with a text of a megabyte in all of many rows."""
    return pd.DataFrame({"filename": ["long" * 2**18] * 10_000}).astype("category").to_parquet()


def bytes_of(book):
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def text(table, mark=",", encoding="utf-8"):
    content = io.StringIO()
    csv.writer(content, delimiter=mark).writerows(table)
    return content.getvalue().encode(encoding)


# ---------------------------------------------------------------- what is tried


def usable(data, *flags):
    """The rows that train_model.py would train on and their splits: all that it does before it builds a model."""
    args = train_model.build_parser().parse_args(data.arguments(*flags))
    train_model.complete_arguments(args)
    labels = train_model.load_labels(args)
    labels = train_model.filter_missing_images(labels, args.image_dir, args.target)
    return labels, train_model.make_splits(labels, args)


@contextlib.contextmanager
def watched():
    """What is written to the console meanwhile, as (stdout, stderr); no warning may be among it."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(record=True) as warned:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    warned = [str(one.message) for one in warned if "PIL" not in Path(one.filename).parts]  # inputs.py hides those
    assert warned == []
    for line in (out.getvalue() + err.getvalue()).split("\n"):
        assert all(c.isprintable() for c in line), line


@functools.cache
def sound(drawn, means, left_out):
    """What is usable of a folder without a fault and the rows that it costs."""
    with tempfile.TemporaryDirectory() as folder, watched(), logging_to_console():
        data = Data(drawn, Path(folder))
        if means:
            means(data, ROW)
        data.rows = data.rows.drop(index=[row for row in left_out if row < len(data.rows)])
        return everything(*usable(data.save()))


def everything(labels, splits):
    """Weights, plants, sides and pixels of all rows."""
    photos = train_model.BiomassDataset(labels, TARGET, seed=0, image_size=64)
    return {
        "weights": labels[TARGET].to_numpy(float),
        "plants": pd.factorize(labels["_plant"])[0],
        "sides": np.concatenate([np.concatenate([rows, [-1]]) for split in splits for rows in split]),
        "pixels": np.stack([photos[row][0].numpy() for row in range(len(photos))]).astype(int),
    }


def survived(fault, data, drawn):
    """Compare what is usable with what is without the fault; returns what is said."""
    left_out = tuple(row % len(data.rows) for row in fault.left_out)
    wanted = sound(drawn, fault.means, left_out)
    for flags in data.tries:
        with watched() as (out, err), logging_to_console():
            labels, splits = usable(data, *flags)
            found = everything(labels, splits)
        names = data.rows["filename"].drop(index=list(left_out)).astype(str).str.strip()
        assert labels["filename"].tolist() == names.tolist()
        for what in wanted if data.tries == [[]] else ("weights", "plants", "pixels"):
            if what == "pixels" and fault.within:
                others = np.delete(np.arange(len(labels)), ROW)
                assert np.array_equal(found[what][others], wanted[what][others])
                assert np.abs(found[what] - wanted[what])[ROW].mean() < fault.within
            else:
                assert np.array_equal(found[what], wanted[what]), what
        assert err.getvalue() == ""
        said = [line for line in out.getvalue().splitlines() if not re.match(r"(fold \d+ )?(train|validation): ", line)]
        if fault.message:
            assert said and all(re.search(fault.message, line) for line in said), said
        else:
            assert said == []
    return said[0] if said else ""


def stops(main, arguments):
    """The one line with which main() ends."""
    with watched() as (_, err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2, err.getvalue()
    (line,) = err.getvalue().splitlines()
    return line.partition("error: ")[2]


def refused(fault, data, drawn):
    lines = [stops(train_model.main, data.arguments("--epochs", 1, *flags)) for flags in data.tries]
    assert all(re.search(fault.message, line) for line in lines), lines
    assert not any((data.out / name).exists() for name in ("metrics.txt", "predictions.csv", "model.pt"))
    return lines[0]


def refused_by_predict(fault, data, drawn):
    model = small_model(drawn)
    lines = []
    for flags in data.tries:
        arguments = ["--model", model, "--device", "cpu", "--out", data.out / "out.csv", *data.flags, *flags]
        lines.append(stops(predict.main, arguments))
    assert all(re.search(fault.message, line) for line in lines), lines
    return lines[0]


def small_model(drawn):
    """A checkpoint of a model that has not learned anything; it is made once."""
    args = train_model.build_parser().parse_args(["--model_out", str(drawn.parent / "small.pt")])
    if not args.model_out.exists():
        model = train_model.build_model("shufflenet_v2_x0_5", "none", None, "fp32", torch.device("cpu"), 64)
        model.encoder = train_model.MetadataEncoder()
        with watched():
            train_model.save_checkpoint(model, args, epoch=1)
    return args.model_out


def computed_again(fault, data, drawn):
    """Features are computed anew where a file of the store cannot be used."""
    with watched() as (out, _), logging_to_console():
        store = FeatureStore(data.out / "cache", {}, (4,), np.float32)
        keys = np.array(["a", "b"], "S32")
        store.complete(keys, lambda missing: [np.full((len(missing), 4), 7, np.float32)], ALONE)
    assert (store[store.places(keys)] == 7).all()
    return next(line for line in out.getvalue().splitlines() if re.search(fault.message, line))


def stopped_later(fault, data, drawn):
    """A photo is replaced between the look at all photos and its use."""
    with watched(), logging_to_console():
        labels, _ = usable(data)
    photos = train_model.BiomassDataset(labels, TARGET, seed=0, image_size=64)
    data.replace()
    with pytest.raises(inputs.UserError, match=fault.message) as stop:
        photos[ROW]
    return str(stop.value)


@dataclass(frozen=True)
class Fault:
    """`put(data, row)` does it. `message` is a regular expression of all that is said, "" where nothing is to be said.

    `left_out` are the rows that it costs. `means(data, row)` does to a sound folder what the fault is to be taken for;
    `within` is how far the pixels of a lossy photo may be off on average. `of_row`: it spoils one row, and no other.
    """

    name: str
    put: Callable
    outcome: str
    message: str
    left_out: tuple = ()
    means: Callable | None = None
    within: float = 0
    of_row: bool = False
    tried: Callable | None = None

    def happens(self, drawn, folder):
        """Put the fault into a new folder, see that what happens is as described; returns what is said."""
        data = Data(drawn, folder)
        self.put(data, ROW)
        data.save()
        said = (self.tried or {SURVIVED: survived, REFUSED: refused}[self.outcome])(self, data, drawn)
        assert not data.trap.exists(), "code in a file has run"
        return said


# ---------------------------------------------------------------- faults of rows


def weight(value):
    def put(data, row):
        data.rows.at[row, TARGET] = value(data.rows[TARGET][row]) if callable(value) else value

    return put


def column(name, value):
    """Each cell of a column as value(cell)."""

    def put(data, row):
        data.rows[name] = [value(cell) for cell in data.rows[name]]

    return put


def typed(name):
    """The file name as name(its right spelling)."""

    def put(data, row):
        data.rows.at[row, "filename"] = name(data.name(row)) if callable(name) else name

    return put


def moved(place, name=None):
    """The photo at `place` in the image folder, named in the sheet by `name`."""

    def put(data, row):
        (data.photos / place).parent.mkdir(exist_ok=True)
        data.photo(row).rename(data.photos / place)
        data.rows.at[row, "filename"] = name or place

    return put


def missing_by(name):
    def put(data, row):
        data.rows.at[row, "filename"] = name
        data.in_csv = True

    return put


def linked(data, row):
    """The photo is a link to one outside the folder."""
    data.photo(row).rename(data.outside / "photo.png")
    data.photo(row).symlink_to(data.outside / "photo.png")


def folder_linked(data, row):
    data.photo(row).rename(data.outside / "photo.png")
    (data.photos / "plants").symlink_to(data.outside, target_is_directory=True)
    data.rows.at[row, "filename"] = "plants/photo.png"


def loop(place):
    """A file or folder that is a link to itself."""

    def put(data, row):
        place(data).rename(data.outside / "moved")
        place(data).symlink_to(place(data))

    return put


def linked_inside(data, row):
    (data.photos / "kept").mkdir()
    data.photo(row).rename(data.photos / "kept" / "photo.png")
    data.photo(row).symlink_to(data.photos / "kept" / "photo.png")


def folder_is_a_link(data, row):
    data.photos.rename(data.outside / "photos")
    data.photos.symlink_to(data.outside / "photos", target_is_directory=True)


def outside(name):
    """A name that leads to a sound photo outside the folder."""

    def put(data, row):
        shutil.copy(data.photo(row), data.outside / "photo.png")
        data.rows.at[row, "filename"] = name.format(outside=data.outside)

    return put


def two_alike(data, row):
    """Two files fit a name that is typed in a third way."""
    shutil.copy(data.photo(row), data.photos / data.name(row).upper())
    data.rows.at[row, "filename"] = data.name(row).title()


def again(**changed):
    """The row once more, at the end, with some cells changed."""

    def put(data, row):
        cells = {name: value(data.rows[name][row]) for name, value in changed.items()}
        data.rows.loc[len(data.rows)] = data.rows.loc[row].to_dict() | cells

    return put


def named(name):
    """A file name that no sheet of Excel's can hold, so the sheet is a CSV file."""

    def put(data, row):
        data.photo(row).rename(data.photos / name)
        data.rows.at[row, "filename"] = name
        data.in_csv = True

    return put


# ---------------------------------------------------------------- faults of photos


def stored(encode):
    """The photo's file holds encode(the photo)."""

    def put(data, row):
        content = encode(data.image(row))
        data.photo(row).unlink()
        data.photo(row).write_bytes(content)

    return put


def shown(change=lambda image: image):
    """The photo that people see, as a plain PNG."""
    return stored(lambda image: png(change(image)))


def png(image, **options):
    return encoded(image, "PNG", **options)


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def negative(image):
    return Image.eval(image, lambda value: 255 - value)


def half_clear(image):
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width // 2, image.height))
    image.putalpha(alpha)
    return image


def half_white(image):
    image.paste("white", (0, 0, image.width // 2, image.height))
    return image


def palette(image):
    return image.quantize(16)


def first_colour_white(image):
    image = palette(image)
    shown = np.array(image.convert("RGB"))
    shown[np.asarray(image) == 0] = 255
    return Image.fromarray(shown)


def grey(image):
    return image.convert("L")


def grey16(image):
    return Image.fromarray(np.asarray(grey(image), np.uint16) * 257)


def turned(image, kind, **options):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    return encoded(image.transpose(TALL), kind, exif=exif, **options)


def png_of(width, height, pixels=b""):
    """A PNG whose header tells another size than its pixels have, as all its checksums confirm."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_long_text(image):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "0" * 2**21, zip=True)
    return png(image, pnginfo=info)


def with_broken_exif(image):
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + b"\x00\x02" + b"\x01\x12\x00\x05\x00\x00\x00\x01\xff\xff\xff\xff" * 2
    return encoded(image, "JPEG", quality=95, exif=exif)


def a_folder(data, row):
    data.photo(row).unlink()
    data.photo(row).mkdir()


def a_pipe(data, row):
    data.photo(row).unlink()
    os.mkfifo(data.photo(row))


def not_readable(data, row):
    data.photo(row).chmod(0)


def too_large_a_file(data, row):
    with data.photo(row).open("r+b") as file:
        file.truncate(inputs.MOST_PHOTO_BYTES + 1)


def replaced(content):
    def put(data, row):
        content_now = content(data.image(row))
        data.replace = lambda: data.photo(row).write_bytes(content_now)

    return put


def all_photos(encode):
    def put(data, row):
        for number in range(len(data.rows)):
            stored(encode)(data, number)

    return put


# ---------------------------------------------------------------- faults of the sheet


def in_file(write, name="labels.csv"):
    """The sheet is a file of this name that holds write(cells)."""

    def put(data, row):
        data.written = True
        (data.folder / name).write_bytes(write(data.cells()))
        data.flags += ["--labels_path", data.folder / name]

    return put


def in_excel(change):
    """The usual file holds change(cells)."""

    def put(data, row):
        data.changes.append(change)

    return put


def both(*puts):
    def put(data, row):
        for one in puts:
            one(data, row)

    return put


def renamed(change):
    """Names of the columns changed in place."""
    return in_excel(lambda table: [[change(name) for name in table[0]], *table[1:]])


def more(name, value):
    """One more column, or several of that name."""
    return in_excel(lambda table: [[*table[0], *name], *([*row, *([value] * len(name))] for row in table[1:])])


def comma(value):
    return str(value).replace(".", ",")


def with_commas(table):
    return [table[0], *([comma(cell) if isinstance(cell, float) else cell for cell in row] for row in table[1:])]


def merged(table):
    """Weights of three rows in one cell, and a title over all columns."""
    book = openpyxl.Workbook()
    for row in [["Biomass"], *table]:
        book.active.append(row)
    book.active.merge_cells("A1:F1")
    book.active.merge_cells(f"F{ROW + 3}:F{ROW + 5}")
    return bytes_of(book)


def far_cell(place):
    def write(table):
        book = openpyxl.load_workbook(io.BytesIO(excel(table)))
        book.active[place] = "x"
        return bytes_of(book)

    return write


def dates(table):
    return [table[0], *([*row[:3], datetime.fromtimestamp(row[3]), *row[4:]] for row in table[1:])]


def dates_but_one(table):
    table = dates(table)
    table[-1][3] = None
    return table


def dates_as_text(table):
    return [table[0], *([*row[:3], str(datetime.fromtimestamp(row[3])), *row[4:]] for row in table[1:])]


def protected(table):
    """The outer shell of an Excel file with a password, MS-OFFCRYPTO 2.3.4.4."""
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(4000) + "EncryptedPackage".encode("utf-16-le") + bytes(4000)


def bomb(told):
    """An Excel file with a part that unpacks to 8 MiB and tells `told` bytes."""

    def write(table):
        content = io.BytesIO(excel(table))
        with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("xl/media/bomb", bytes(2**23))
        size = struct.pack("<I", 2**23)
        return content.getvalue().replace(size, struct.pack("<I", told))

    return write


def archive(parts):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in parts.items():
            file.writestr(name, part)
    return content.getvalue()


def open_document(table):
    """The sheet as LibreOffice writes it, all cells as text, with all the empty ones after it."""
    urn = "urn:oasis:names:tc:opendocument:xmlns"
    rows = ""
    for row in table:
        start, end = "<table:table-cell office:value-type='string'><text:p>", "</text:p></table:table-cell>"
        cells = (f"{start}{cell}{end}" for cell in row)
        rows += f"<table:table-row>{''.join(cells)}</table:table-row>"
    content = (
        f"<office:document-content xmlns:office='{urn}:office:1.0' xmlns:table='{urn}:table:1.0' "
        f"xmlns:text='{urn}:text:1.0'><office:body><office:spreadsheet><table:table table:name='labels'>{rows}"
        "<table:table-row table:number-rows-repeated='1048550'>"
        "<table:table-cell table:number-columns-repeated='16384'/></table:table-row>"
        "</table:table></office:spreadsheet></office:body></office:document-content>"
    )
    kind = "application/vnd.oasis.opendocument.spreadsheet"
    manifest = (
        f"<manifest:manifest xmlns:manifest='{urn}:manifest:1.0'>"
        f"<manifest:file-entry manifest:full-path='/' manifest:media-type='{kind}'/></manifest:manifest>"
    )
    return archive({"mimetype": kind, "META-INF/manifest.xml": manifest, "content.xml": content})


def sheet_is_a_folder(data, row):
    data.written = True
    (data.folder / SHEET).mkdir()


def no_sheet(data, row):
    data.written = True


# ---------------------------------------------------------------- faults of the command


def flags(*tries):
    """The command with each of these lists of flags; {name} stands for a place of the data folder."""

    def put(data, row):
        places = {"photos": data.photos, "sheet": data.folder / SHEET, "folder": data.outside, "out": data.out}
        places |= {"photo": data.photo(row), "model": data.drawn.parent / "small.pt"}
        places["plants"] = data.rows["plant_number"].nunique()
        places["too_many"] = places["plants"] + 1
        (data.outside / "a.png").mkdir()
        (data.outside / "file").write_bytes(b"text")
        data.tries = [[flag.format(**places) for flag in one] for one in tries]

    return put


def each(flag, *values, after=()):
    return flags(*([*after, f"--{flag}={value}"] for value in values))


def file_of(make, flag):
    """A file that holds make(data), given by `flag`."""

    def put(data, row):
        path = data.outside / "given"
        path.write_bytes(make(data))
        data.flags += [flag, path, *([data.photos] if flag == "--model" else [])]

    return put


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)


def code(data):
    return pickle.dumps({"model_state": Hostile(data.trap)})


def code_by_torch(data):
    content = io.BytesIO()
    torch.save({"model_state": Hostile(data.trap)}, content)
    return content.getvalue()


def foreign(data):
    content = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, content)
    return content.getvalue()


def packed(data):
    """A file of torch.save whose parts are deflated, which could unpack to any size."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(foreign(data))) as archive, zipfile.ZipFile(content, "w") as again:
        for part in archive.infolist():
            again.writestr(part.filename, archive.read(part), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def spoiled(**changed):
    """A checkpoint with other values under some of its names."""

    def make(data):
        checkpoint = torch.load(small_model(data.drawn), weights_only=True)
        content = io.BytesIO()
        torch.save(checkpoint | changed, content)
        return content.getvalue()

    return make


def listed(data):
    """Names of a checkpoint's parts, and no parts."""
    content = io.BytesIO()
    torch.save(["model_state", "settings", "metadata", "target", "unit", "calibration", "familiar"], content)
    return content.getvalue()


def in_store(make):
    """A file in the feature store that is named as it must be, by the checksum of its content."""

    def put(data, row):
        store = FeatureStore(data.out / "cache", {}, (4,), np.float32)
        store.make_folder()
        content = make(data)
        (store.folder / f"{hashlib.sha256(content).hexdigest()}.npy").write_bytes(content)

    return put


def array(rows, **options):
    def make(data):
        content = io.BytesIO()
        np.save(content, rows(data) if callable(rows) else rows, **options)
        return content.getvalue()

    return make


def archive_of_arrays(data):
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    return content.getvalue()


# ---------------------------------------------------------------- the table

MISSING = r"^dropped 1 rows whose photo is missing or unreadable: row 5 \(.*\) "


def of_row(name, put, message="", left_out=(), **more):
    return Fault(name, put, SURVIVED, message, left_out, of_row=True, **more)


def bad_row(name, put, message):
    return of_row(name, put, message, (ROW,))


def bad_photo(name, put, reason):
    return bad_row(name, put, MISSING + reason)


def good_photo(name, encode, seen=lambda image: image, **more):
    """A photo that is read like the plain PNG of what people see of it."""
    return of_row(name, stored(encode), means=shown(seen), **more)


def good_sheet(name, put, message=""):
    return Fault(name, put, SURVIVED, message)


def bad(name, put, message, **more):
    return Fault(name, put, REFUSED, message, **more)


def in_predict(name, put, message):
    return Fault(name, put, REFUSED, message, tried=refused_by_predict)


NO_NUMBER = rf"^dropped 1 rows whose {TARGET} is no number: row 5 \(photo_03.png\)$"
NO_CHECKPOINT = "is not a checkpoint|does not fit"
NUMBERS = {  # flag: values that are taken, values that are not
    "epochs": (["1", "1000000000"], ["0", "-1", "1.5", "1e3", "nan", "inf", "many", ""]),
    "batch_size": (["1", "1000000000"], ["0", "-1", "1.5", "nan", "inf", "many", ""]),
    "learning_rate": (["5e-324", "1e308"], ["0", "-1e-9", "1e-400", "1e400", "nan", "inf", "-inf", "fast", ""]),
    "weight_decay": (["0", "1e308"], ["-1e-9", "nan", "inf", "-inf", "much", ""]),
    "val_split": (["1e-9", "0.5"], ["0", "1", "0.999999", "-0.1", "1.1", "nan", "inf", "half", ""]),
    "folds": (["0", "2", "{plants}"], ["1", "-1", "{too_many}", "2.5", "nan", "inf", "five", ""]),
    "image_size": (["64", "2048"], ["63", "2049", "0", "-64", "64.5", "nan", "inf", "large", ""]),
    "patience": (["0", "1000000000"], ["-1", "1.5", "nan", "inf", "none", ""]),
    "seed": (["0", "4294967295"], ["-1", "4294967296", "1.5", "nan", "inf", "x", ""]),
    "augment_views": (["0", "1000000000"], ["-1", "1.5", "nan", "inf", "all", ""]),
    "num_workers": (["0", "256"], ["-1", "257", "1.5", "nan", "inf", "all", ""]),
}
TIME_KNOWN = flags(["--metadata_columns", "timestamp"])
NOT_ON_WINDOWS = ("a link", "a folder of photos that is a link", "a sheet that is a link", "a photo that is a pipe")
NOT_ON_WINDOWS += ("a file name that steers", "a file name that two files fit", "a photo without permission")
WRITTEN = ["metrics_path", "curves_path", "model_out", "log_path"]

FAULTS = [
    # rows: weights and ids
    bad_row("a weight that is text", weight("ca. 0.3"), NO_NUMBER),
    bad_row("a weight that is infinite", weight("inf"), NO_NUMBER),
    bad_row("a weight beyond all numbers", weight("1e999"), NO_NUMBER),
    bad_row("a weight that Excel turned into a date", weight(datetime(2024, 2, 1)), NO_NUMBER),
    bad_row("a weight with two commas", weight("1.234,5"), NO_NUMBER),
    bad_row("a weight that is an error of Excel's", weight("#DIV/0!"), "1 rows (whose|without) fresh_weight_total"),
    bad_row("a weight below 0", weight(-0.1), rf"^dropped 1 rows with {TARGET} not above 0 g: row 5 \(photo_03.png\)$"),
    bad_row("a weight of 0", weight(0), "not above 0 g: row 5"),
    bad_row("no weight", weight(None), f"^dropped 1 rows without {TARGET}$"),
    bad_row("a formula that was never computed", weight("=0.1+0.2"), f"^dropped 1 rows without {TARGET}$"),
    of_row("a weight with a decimal comma", weight(comma)),
    of_row("a weight with a decimal comma and spaces", weight(lambda grams: f"  {comma(grams)} ")),
    of_row("a weight in mg", weight(lambda grams: 1000 * grams), r"^warning: 1 .* as if in mg: row 5 \(photo_03.png\)",
           means=weight(lambda grams: 1000 * grams)),
    of_row("a plant number as text with spaces", lambda data, row: data.rows.update(
        pd.DataFrame({"plant_number": [f"{data.rows['plant_number'][row]} "]}, [row]))),
    # rows: file names
    bad_row("no file name", typed(None), r"^dropped 1 rows without a file name: row 5"),
    bad_row("a file name of spaces", typed("   "), r"^dropped 1 rows without a file name: row 5"),
    bad_photo("a file name that is a dot", typed("."), "no such file$"),
    bad_photo("an absolute path", outside("{outside}/photo.png"), "leads out of the image folder$"),
    bad_photo("a path with ..", outside("../../outside/photo.png"), "leads out of the image folder$"),
    bad_photo("a path with .. and backslashes", outside("..\\..\\outside\\photo.png"), "leads out of the image f"),
    bad_photo("a path of another drive", typed("C:\\photos\\photo_03.png"), "leads out of the image folder$"),
    bad_photo("a path on a server", typed("\\\\server\\photos\\photo_03.png"), "leads out of the image folder$"),
    bad_photo("a link to a photo outside the folder", linked, "leads out of the image folder$"),
    bad_photo("a link to a folder outside", folder_linked, "leads out of the image folder$"),
    bad_photo("a link to itself", lambda data, row: loop(lambda data: data.photo(row))(data, row), "unreadable photo"),
    bad_photo("a file name that two files fit", two_alike, "no such file, 2 with similar names$"),
    bad_photo("a file name of 300 letters", typed("x" * 300), "no such file$"),
    of_row("a file name in other letter case", typed(str.title)),
    of_row("a file name without its extension", typed(lambda name: name[:-4])),
    of_row("a file name between spaces", typed(lambda name: f"  {name} ")),
    of_row("a file name with backslashes", moved("may/photo.png", "may\\photo.png")),
    of_row("a file name composed otherwise (NFC, NFD)", moved(unicodedata.normalize("NFD", GREEN), GREEN)),
    of_row("a file name that is a number", moved("17.png", 17)),
    of_row("a link within the folder", linked_inside),
    of_row("a row entered twice", again(), r"^dropped 1 rows that repeat an earlier row: row 14 \(photo_03.png\)$",
           (ADDED,)),
    of_row("a photo with two weights", again(**{TARGET: lambda grams: 2 * grams}),
           r"^dropped 2 rows of a photo with several fresh_weight_total: row 5 .*, row 14 ", (ROW, ADDED)),
    of_row("a photo by two spellings", again(filename=str.upper),
           r"^dropped 1 rows that repeat an earlier row: row 14 \(PHOTO_03.PNG\)$", (ADDED,)),
    of_row("a photo by two spellings with two weights",
           again(filename=str.upper, **{TARGET: lambda grams: 2 * grams}),
           r"^dropped 2 rows of a photo with several fresh_weight_total: row 5 .*, row 14 ", (ROW, ADDED)),
    of_row("a file name with a formula", named("=1+1;.png")),
    of_row("a file name that steers the terminal", named("\x1b[31m\x07red\u202e.png")),
    bad_row("a missing photo whose name steers the terminal", missing_by("\x1b[31mgone.png"),
            MISSING.replace(".*", r"\\x1b\[31mgone.png") + "no such file$"),
    # photos that are left out
    bad_photo("a photo that is not there", lambda data, row: data.photo(row).unlink(), "no such file$"),
    bad_photo("an empty photo", stored(lambda image: b""), r"unreadable photo \(its file is empty\)$"),
    bad_photo("a PNG cut short", stored(lambda image: png(image)[:9000]), "unreadable photo"),
    bad_photo("a JPEG cut short", stored(lambda image: encoded(image, "JPEG")[:2000]), "unreadable photo"),
    bad_photo("a PNG with a flipped bit", stored(lambda image: png(image)[:5000] + b"!" + png(image)[5001:]), "unread"),
    bad_photo("a photo that is text", stored(lambda image: b"no photo"), r"unreadable photo \(it is no photo\)$"),
    bad_photo("a photo that is PostScript", stored(lambda image: encoded(image, "EPS")), r".*\(it is no photo\)$"),
    bad_photo("a photo of 12,000 x 9,000 pixels", stored(lambda image: png(Image.new("1", (12000, 9000)))),
              "unreadable photo .more than 89 million pixels; make it smaller.$"),
    bad_photo("a header that claims 60,000 x 60,000 pixels", stored(lambda image: png_of(60000, 60000)),
              "unreadable photo .more than 89 million pixels; make it smaller.$"),
    bad_photo("a PNG with a text of 2 MiB, packed", stored(with_long_text), "unreadable photo .Decompressed data too"),
    bad_photo("a photo that is a folder", a_folder, r"unreadable photo \(it is a folder\)$"),
    bad_photo("a photo that is a pipe", a_pipe, r"unreadable photo \(it is no ordinary file\)$"),
    bad_photo("a photo without permission to read", not_readable, r"unreadable photo \(Permission denied\)$"),
    bad_photo("a photo of more than 256 MiB", too_large_a_file, "unreadable photo .its file is larger than 256 MiB.$"),
    # photos that are read
    good_photo("a transparent photo", lambda image: png(half_clear(image)), half_white),
    good_photo("a palette with a transparent colour", lambda image: png(palette(image), transparency=0),
               first_colour_white),
    good_photo("a photo of 1 bit a pixel", lambda image: png(image.convert("1")), lambda image: image.convert("1")),
    good_photo("a grey photo of 16 bit", lambda image: png(grey16(image)), grey),
    good_photo("a CMYK JPEG", lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95), within=4),
    good_photo("a JPEG named .png", lambda image: encoded(image, "JPEG", quality=95), within=4),
    good_photo("an animated GIF named .png", lambda image: encoded(
        palette(image), "GIF", save_all=True, append_images=[palette(negative(image))]), palette),
    good_photo("an animated PNG", lambda image: png(image, save_all=True, append_images=[negative(image)])),
    good_photo("an animated WebP", lambda image: encoded(
        image, "WEBP", lossless=True, save_all=True, append_images=[negative(image)])),
    good_photo("a PNG turned by its EXIF tag", lambda image: turned(image, "PNG")),
    good_photo("a JPEG turned by its EXIF tag", lambda image: turned(image, "JPEG", quality=95), within=4),
    good_photo("a JPEG with a broken EXIF tag", with_broken_exif, within=4),
    good_photo("a TIFF named .png", lambda image: encoded(image, "TIFF", compression="tiff_lzw")),
    good_photo("a photo of 1 x 1 pixel", lambda image: png(image.crop((9, 9, 10, 10))),
               lambda image: image.crop((9, 9, 10, 10)).resize(image.size)),
    # photos that stop the run
    bad("a photo replaced during the run", replaced(lambda image: png(negative(image))), "was replaced during the run",
        tried=stopped_later),
    bad("a photo emptied during the run", replaced(lambda image: b""), "its file is empty.; replace it or remove",
        tried=stopped_later),
    good_sheet("a folder of photos that is a link", folder_is_a_link),
    bad("a folder of photos that is a link to itself", loop(lambda data: data.photos), "^no image folder at .*: pass "),
    bad("no folder of photos", lambda data, row: data.photos.rename(data.outside / "moved"), "^no image folder at"),
    bad("a folder of photos that is a file", flags(["--image_dir", "{folder}/file"]), "^no image folder at .*: pass -"),
    bad("pixels that end early, under right checksums", stored(lambda image: png_of(96, 96, bytes(999))),
        r"photo_03.png: unreadable photo .*; replace it or remove its row$"),
    bad("no photo that can be read", all_photos(lambda image: b""), "^no photo of the sheet can be read in .*: pass "),
    # the sheet: its kind
    good_sheet("an Excel file named .csv", in_file(excel)),
    good_sheet("a CSV file named .xlsx", in_file(text, "labels.xlsx")),
    good_sheet("an Excel file without extension", in_file(excel, "labels")),
    good_sheet("a CSV file with semicolons and decimal commas", in_file(lambda table: text(with_commas(table), ";"))),
    good_sheet("a CSV file with tabs", in_file(lambda table: text(table, "\t"))),
    good_sheet("a CSV file with a byte-order mark", in_file(lambda table: text(table, encoding="utf-8-sig"))),
    good_sheet("a CSV file in Latin-1", both(moved(GREEN), in_file(lambda table: text(table, encoding="latin-1")))),
    good_sheet("a CSV file in UTF-16", both(moved(GREEN), in_file(lambda table: text(table, encoding="utf-16")))),
    good_sheet("a CSV file with the line ends of old Macs", in_file(lambda table: text(table).replace(b"\r\n", b"\r"))),
    good_sheet("a CSV file with empty lines", in_file(lambda table: text([[], *table[:5], [], *table[5:], [], []])),
               "^the column names of .* are in row 2"),
    good_sheet("a CSV file with short rows", in_file(lambda table: text([[*table[0], "remark"], *table[1:]]))),
    bad("a CSV file with decimal commas not in quotes",
        in_file(lambda table: "\n".join(",".join(map(comma, row)) for row in table).encode()),
        "labels.csv as a label sheet: row 2 has more cells than there are columns; put cells with ',' in quotes"),
    bad("a CSV row with two cells too many", in_file(lambda table: text([*table, [*table[-1], "late", "me"]])),
        "row 14 has more cells"),
    bad("a CSV row with cells too many far below", in_file(
        lambda table: text([*table, *[table[-1]] * 20, [*table[-1], "late", "me"]])), "line 34"),
    bad("a CSV file with a quote that never ends", in_file(lambda table: text(table) + b'"'),
        "labels.csv as a label sheet"),
    bad("a CSV file without names of columns", in_file(lambda table: text([["Biomass 2024"], *table[1:]])),
        "labels.csv has no column 'filename'; nearest: 'Biomass 2024'"),
    bad("a CSV file in UTF-16 without its mark", in_file(lambda table: text(table, encoding="utf-16-le")),
        "neither an Excel nor a CSV file"),
    bad("a sheet that is empty", in_file(lambda table: b""), "labels.csv is empty"),
    bad("a sheet of spaces", in_file(lambda table: b" \n \n"), "labels.csv is empty"),
    bad("an Excel sheet that is empty", in_excel(lambda table: []), "is empty: pass another sheet"),
    bad("a sheet with names of columns alone", in_excel(lambda table: table[:1]), "no row of .* has a file name and"),
    bad("a sheet of random bytes", in_file(lambda table: np.random.default_rng(0).bytes(5000)), "labels.csv"),
    bad("a sheet that is a photo", in_file(lambda table: png(Image.new("L", (9, 9)))), "neither an Excel nor a CSV"),
    bad("a sheet that is a folder", sheet_is_a_folder, "no label sheet at .*: it is a folder, pass --labels_path"),
    bad("a sheet that is a link to itself", both(lambda data, row: data.save(), no_sheet,
        loop(lambda data: data.folder / SHEET)), "no label sheet at .*: pass --labels_path"),
    bad("no sheet", no_sheet, "no label sheet at .*: pass --labels_path"),
    bad("an Excel file with a password", in_file(protected, "labels.xlsx"), "protected by a password; save it without"),
    bad("an Excel file cut short", in_file(lambda table: excel(table)[:3000], "labels.xlsx"), "labels.xlsx .*damaged"),
    bad("an Excel file with flipped bits", in_file(
        lambda table: excel(table)[:60] + b"!!" + excel(table)[62:], "labels.xlsx"), "labels.xlsx .*damaged"),
    bad("an Excel file that tells to unpack to 2.5 GiB", in_file(bomb(5 * 2**29), "labels.xlsx"),
        "it unpacks to 2.5 GiB, more than 1"),
    bad("an Excel file that unpacks to more than it tells", in_file(bomb(1000), "labels.xlsx"),
        "damaged .*xl/media/bomb"),
    bad("an Excel file with a cell in the last row and column", in_file(far_cell("XFD1048576"), "labels.xlsx"),
        "it reaches to row 1,048,576 and column 16,384; delete all beyond the table$"),
    bad("an Excel file of before 2007", in_file(lambda table: b"\xd0\xcf\x11\xe0" + bytes(9000), "labels.xls"),
        "labels.xls as a label sheet: it is an .xls file; save it as .xlsx$"),
    bad("a binary Excel file", in_file(lambda table: archive({"xl/workbook.bin": b""}), "labels.xlsb"),
        "it is an .xlsb file; save it as .xlsx$"),
    good_sheet("a Parquet file", in_file(parquet, "labels.parquet")),
    good_sheet("a Parquet file named .xlsx, with categories and an index", in_file(odd_parquet, "labels.xlsx")),
    bad("a Parquet file cut short", in_file(lambda table: parquet(table)[:2000], "labels.parquet"),
        "labels.parquet as a label sheet"),
    bad("a Parquet file of 40 million empty rows", in_file(many_rows, "labels.parquet"),
        "it reaches to row 40,000,000 and column 1; delete"),
    good_sheet("an OpenDocument sheet", in_file(open_document, "labels.ods")),
    bad("a CSV file of 20,000 columns", in_file(lambda table: text([[*table[0], *["x"] * 20000], *table[1:]])),
        "it reaches to row 14 and column 20,00.; delete"),
    bad("a zip archive", in_file(lambda table: packed(None), "labels.xlsx"), "labels.xlsx as a label sheet"),
    # the sheet: its columns and cells
    good_sheet("title rows above the names", in_excel(lambda table: [["Biomass 2024"], [], *table]),
               "^the column names of .* are in row 3, the rows above it are left out$"),
    bad("25 rows above the names", in_excel(lambda table: [["Biomass 2024"]] * 25 + table), "no column 'filename'"),
    good_sheet("empty columns and rows before the table", in_excel(
        lambda table: [[], *([None, *row] for row in table)]), "^the column names of .* are in row 2"),
    good_sheet("empty rows at the end", in_excel(lambda table: [*table, *[[None] * 6] * 40])),
    good_sheet("rows of spaces at the end", in_excel(lambda table: [*table, *[["  "] * 6] * 2])),
    good_sheet("a cell far below", in_file(far_cell("E5000"), "labels.xlsx"),
               "^dropped 1 rows without a file name: row 5000"),
    good_sheet("a cell far to the right", in_file(far_cell("ZZ3"), "labels.xlsx")),
    good_sheet("spaces around names and cells", in_excel(
        lambda table: [[f" {cell} " if isinstance(cell, str) else cell for cell in row] for row in table])),
    good_sheet("other letter case of the names", renamed(str.upper)),
    good_sheet("columns without a name", more([None, "  "], "x")),
    good_sheet("other columns of one name", more(["remark", "remark", "remark"], "x")),
    good_sheet("names that are numbers and dates", more([2024, datetime(2024, 1, 1), 0.5, True], 1)),
    bad("two columns of weights", more([TARGET], 1.0), f"has 2 columns '{TARGET}': rename all but one"),
    bad("two columns of file names", more(["filename"], "x"), "has 2 columns 'filename': rename all but one"),
    bad("two columns whose case differs", both(renamed(str.upper), more([TARGET.title(), TARGET.upper()], 1.0)),
        f"has 2 columns '{TARGET}'|has 3 columns '{TARGET}'"),
    bad("no column of weights", renamed(lambda name: name.replace("fresh", "wet")),
        f"no column '{TARGET}'; nearest: 'wet_weight_total'; found: filename, "),
    bad("no column of file names", renamed(lambda name: name.replace("filename", "photo")), "no column 'filename'; n"),
    bad("names over several lines", renamed(lambda name: name.replace("_", "\n")), "no column 'fresh_weight_total'"),
    good_sheet("numbers as text", in_excel(lambda table: [[cell and str(cell) for cell in row] for row in table])),
    good_sheet("ids as text, as fractions and with spaces", in_excel(
        lambda table: [table[0], *([*row[:2], [row[2], f"{row[2]}", f"{row[2]} ", f"{row[2]}.0"][number % 4], *row[3:]]
                                   for number, row in enumerate(table[1:]))])),
    good_sheet("dates", in_excel(dates)),
    good_sheet("dates as metadata", both(in_excel(dates), TIME_KNOWN),
               "^metadata timestamp: numbers, missing or unreadable in 0 rows$"),
    good_sheet("dates as metadata, one missing", both(in_excel(dates_but_one), TIME_KNOWN),
               "^metadata timestamp: numbers, missing or unreadable in 1 rows$"),
    good_sheet("dates as text as metadata", both(in_excel(dates_as_text), TIME_KNOWN),
               "^metadata timestamp: text, missing or unreadable in 0 rows$"),
    good_sheet("Unix seconds as metadata", TIME_KNOWN,
               "^metadata timestamp: numbers, missing or unreadable in 0 rows$"),
    Fault("merged cells", in_file(merged, "labels.xlsx"), SURVIVED,
          f"^the column names of .* are in row 2|^dropped 2 rows without {TARGET}$", (ROW + 1, ROW + 2)),
    bad("weights that are all formulas never computed", column(TARGET, lambda grams: f"=1*{grams}"), "^no row of"),
    # the command: numbers
    *(good_sheet(f"--{flag} at its limits", each(flag, *good)) for flag, (good, _) in NUMBERS.items()),
    *(bad(f"--{flag} beyond its limits", each(flag, *values), "--" + flag) for flag, (_, values) in NUMBERS.items()),
    bad("--backbone_learning_rate beyond its limits", each(
        "backbone_learning_rate", "0", "-1", "1e-400", "nan", "inf", "slow", after=["--unfreeze_backbone"]), "--backb"),
    # the command: flags that contradict one another, places to write to
    bad("a frozen and an unfrozen backbone", flags(
        ["--freeze_backbone", "--unfreeze_backbone"], ["--unfreeze_from", "layer4", "--unfreeze_backbone"]), "allowed"),
    bad("a rate for a frozen backbone", flags(["--backbone_learning_rate", "1e-4"]), "the backbone is frozen"),
    bad("no photo and no metadata", flags(["--metadata_only"]), "--metadata_only needs --metadata_columns"),
    bad("no photo and flags of the backbone", flags(
        *(["--metadata_only", "--metadata_columns", "age_days", *more] for more in (
            ["--image_size", "64"], ["--unfreeze_backbone"], ["--standardize_features"]))), "leaves the photo out"),
    bad("leaky columns allowed, but none named", flags(["--allow_leaky_columns"]), "needs --metadata_columns"),
    bad("the target as a plant or a file name", flags(["--group_by", TARGET], ["--target", "filename"]),
        "it is the target|nothing to train on"),
    bad("a size that the backbone does not take", flags(["--model_name", "vit_b_16", "--image_size", "100"]), "vit_b"),
    bad("flags that do not exist", flags(["--epoch_s", "3"], ["epochs", "3"]), "unrecognized arguments"),
    bad("a flag without its value", flags(["--seed"], ["--group_by"]), "expected (one|at least one) argument"),
    bad("outputs that are folders", flags(
        *([f"--{name}", "{folder}/a.png"] for name in WRITTEN), *([f"--{name}", place] for name in WRITTEN[2:]
        for place in (".", "/", ""))), "cannot write .*it is a folder"),
    bad("folders that are files", flags(
        ["--results_dir", "{folder}/file"], ["--cache_dir", "{folder}/file"], ["--model_out", "{folder}/file/a"]),
        "cannot write .*choose another place"),
    bad("outputs that are inputs", flags(
        *([f"--{name}", "{sheet}"] for name in ("metrics_path", "model_out", "log_path")),
        ["--weights", "{folder}/file", "--model_out", "{folder}/file"]), "cannot write .*: it is an input"),
    bad("two outputs in one file", flags(
        ["--log_path", "{out}/a", "--metrics_path", "{out}/a"], ["--model_out", "{out}/a", "--log_path", "{out}/a"],
        ["--curves_path", "{out}/predictions.png"], ["--log_path", "{out}/model.pt.progress"]), "is another outp"),
    bad("outputs among the photos", flags(["--results_dir", "{photos}"], ["--log_path", "{photo}"]), "among the phot"),
    bad("curves of an unknown kind", flags(["--curves_path", "{out}/curves.gif"]), "must end in .png, .pdf or .svg"),
    # files that could hold code
    bad("--weights that are text", file_of(lambda data: b"text", "--weights"), "not a file of plain PyTorch weights"),
    bad("--weights of another network", file_of(foreign, "--weights"), "is not of a resnet18: .* tensors are missing"),
    bad("--weights that are packed", file_of(packed, "--weights"), "not a file of plain PyTorch weights"),
    bad("--weights that run code", file_of(code, "--weights"), "not a file of plain PyTorch weights"),
    bad("--weights of torch.save that run code", file_of(code_by_torch, "--weights"), "not a file of plain PyTorch w"),
    in_predict("--model that is text", file_of(lambda data: b"text", "--model"), "is not a checkpoint"),
    in_predict("--model that is empty", file_of(lambda data: b"", "--model"), "is not a checkpoint"),
    in_predict("--model that holds other tensors", file_of(foreign, "--model"), "is not a checkpoint .* it lacks"),
    in_predict("--model that is packed", file_of(packed, "--model"), "is not a checkpoint"),
    in_predict("--model that runs code", file_of(code, "--model"), "is not a checkpoint"),
    in_predict("--model of torch.save that runs code", file_of(code_by_torch, "--model"), "is not a checkpoint"),
    in_predict("--model that is a list", file_of(listed, "--model"), NO_CHECKPOINT),
    *(in_predict(f"--model whose {name} is {value!r}", file_of(spoiled(**{name: value}), "--model"), NO_CHECKPOINT)
      for name, value in [("settings", "x"), ("metadata", 3), ("familiar", "x"), ("calibration", "x"),
                          ("calibration", {"growth": "x"}), ("metadata", ["x"]), ("model_state", {"x": 1})]),
    *(Fault(f"a kept feature file {what}", in_store(make), SURVIVED, "^removed the damaged feature file .* computed ag",
            tried=computed_again) for what, make in {
        "that is text": lambda data: b"text",
        "that is empty": lambda data: b"",
        "of other numbers": array(np.zeros(5)),
        "that holds objects": array(lambda data: np.array([Hostile(data.trap)], object), allow_pickle=True),
        "that is code": code,
        "that is an archive": archive_of_arrays,
        "that is a broken archive": lambda data: b"PK\3\4" + bytes(99),
        "whose table is cut short": lambda data: array(np.zeros(999))(data)[:300],
    }.items()),
    # predict.py
    in_predict("predict.py --coverage beyond its limits", flags(
        *(["{photos}", f"--coverage={value}"] for value in ("0", "1", "-0.1", "1.1", "nan", "inf", "most", ""))),
        "--coverage"),
    in_predict("predict.py with photos and a sheet, or neither", flags(
        ["{photos}", "--labels_path", "{sheet}"], []), "pass either photos and folders, or --labels_path"),
    in_predict("predict.py with a photo that is not there", flags(["{folder}/none.png"]), "no photo and no folder at"),
    in_predict("predict.py with a folder without photos", flags(["{folder}"]), "no photo in"),
    in_predict("predict.py with a folder of photos but no sheet", flags(["--image_dir", "{photos}"]), "--labels_path"),
    in_predict("predict.py with a sheet that is none", flags(["--labels_path", "{folder}/file"]), "no column 'filenam"),
    in_predict("predict.py with outputs that are folders", flags(
        ["{photos}", "--out", "{folder}"], ["{photos}", "--sheet", "{folder}/a.png"], ["--export", "{folder}"]),
        "cannot write .*: it is a folder"),
    in_predict("predict.py with outputs that are inputs", flags(
        ["{photo}", "--out", "{photo}"], ["{photos}", "--out", "{model}"],
        ["--labels_path", "{sheet}", "--out", "{sheet}"], ["{photos}", "--sheet", "{photo}"],
        ["--labels_path", "{sheet}", "--sheet", "{photo}"]), "cannot write .*: it "),
    in_predict("predict.py with two outputs in one file", flags(
        ["{photos}", "--out", "{out}/a.png", "--sheet", "{out}/a.png"]), "is another output too"),
    in_predict("predict.py with a picture that is a JPEG", flags(["{photos}", "--sheet", "{out}/a.jpg"]), "in .png"),
]  # fmt: skip


# ---------------------------------------------------------------- tests


def cannot_be_put(fault):
    """Why a fault cannot be made on this computer ("" if it can)."""
    if fault.put is not_readable and os.name != "nt" and os.geteuid() == 0:
        return "nothing is closed to the administrator"
    names = {"win32": NOT_ON_WINDOWS, "darwin": ("a file name that two files fit",)}.get(sys.platform, ())
    return "no such files on this system" if fault.name.startswith(names) else ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, drawn, tmp_path):
    if why := cannot_be_put(fault):
        pytest.skip(why)
    fault.happens(drawn, tmp_path)


def test_faults_have_names_of_their_own_and_the_committed_table_has_them_all():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    with (ROOT / "results" / "faults.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["fault"] for row in table] == [fault.name for fault in FAULTS]
    assert all(row["outcome"] in (fault.outcome, NOT_TRIED) for row, fault in zip(table, FAULTS, strict=True))


def test_all_faults_of_rows_at_once_leave_the_other_rows_as_they_are(drawn, tmp_path):
    faults = [fault for fault in FAULTS if fault.of_row and not fault.within and not cannot_be_put(fault)]
    faults.sort(key=lambda fault: fault.means is None)
    faulty, clean = (Data(drawn, tmp_path / name, len(faults) + 24) for name in ("faulty", "clean"))
    left_out, reasons = [], {}
    for row, fault in enumerate(faults):
        added = len(faulty.rows)
        fault.put(faulty, row)
        if fault.means:
            fault.means(clean, row)
        left_out += [row if one == ROW else added for one in fault.left_out]
        if fault.message.startswith(MISSING[:40]):
            reasons[row] = fault.message.rpartition(r"\) ")[2]
    clean.rows = clean.rows.drop(index=[row for row in left_out if row in clean.rows.index])
    good = clean.rows.index

    # Augmentation hangs on the content of a file, which the other kinds of photos change.
    flags = ["--epochs", 1, "--image_size", 64, "--batch_size", 8, "--folds", 2, "--no_augmentation"]
    flags += ["--model_name", "shufflenet_v2_x0_5"]
    for data in (faulty, clean):
        data.in_csv = True
        with watched():
            assert train_model.main(data.save().arguments(*flags)) == 0
        log = (data.out / "training.log").read_text(encoding="utf-8")
        assert all(c.isprintable() for line in log.split("\n") for c in line)
    wanted = (clean.out / "predictions.csv").read_text(encoding="utf-8")
    for row in good:  # the file names as they are typed
        name = str(faulty.name(row)).strip()
        name = f"'{name}" if name.startswith("=") else name
        wanted = wanted.replace(f"\n{clean.name(row)},", f"\n{name},")
    found = (faulty.out / "predictions.csv").read_text(encoding="utf-8")
    assert len(found.splitlines()) == len(good) + 1 and "\n'=1+1;.png," in found
    assert found == wanted

    tables = []
    for data, status in ((faulty, 1), (clean, 0)):
        flags = ["--labels_path", data.folder / "labels.csv", "--model", faulty.out / "model.pt", "--device", "cpu"]
        with watched() as (_, err):
            assert predict.main([str(flag) for flag in (*flags, "--out", data.out / "out.csv")]) == status
        assert err.getvalue() == ""
        rows = [row for row, name in data.rows["filename"].items() if str(name or "").strip()]
        tables.append(pd.read_csv(data.out / "out.csv").set_axis(rows))
    found, wanted = (table.loc[good, ["predicted_g", "low_g", "high_g"]] for table in tables)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # in batches of other photos
    for row, reason in reasons.items():
        assert re.search(reason, tables[0]["note"][row]) and np.isnan(tables[0]["predicted_g"][row])
    assert tables[0]["predicted_g"].isna().sum() == len(reasons)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell the most memory that a program has used")
def test_no_hostile_file_takes_much_memory(drawn, tmp_path):
    photos = {"large.png": png(Image.new("1", (12000, 9000))), "header.png": png_of(60000, 60000)}
    photos["text.png"] = with_long_text(Image.new("L", (9, 9)))
    table = Data(drawn, tmp_path).cells()
    sheets = {"last.xlsx": far_cell("XFD1048576")(table), "told.xlsx": bomb(5 * 2**29)(table)}
    sheets["rows.parquet"], sheets["texts.parquet"] = many_rows(table), long_texts(table)
    sheets["wide.csv"] = text([[*table[0], *["x"] * 16000], *table[1:], *[["a"]] * 100_000])
    for name, content in (photos | sheets).items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(inputs.MOST_PHOTO_BYTES + 1)
    script = """if True:
        import resource, sys
        import inputs, pyarrow.parquet
        most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = most()
        for path in sys.argv[1:]:
            if path.endswith(".png"):
                assert inputs.check_photo(path)[1]
            else:
                try:
                    inputs.read_sheet(path, ["weight"])
                except inputs.UserError:
                    continue
                raise AssertionError(path)
        print((most() - before) / (2**20 if sys.platform == "darwin" else 2**10))
    """
    paths = [str(tmp_path / name) for name in (*photos, *sheets, "sparse.png")]
    done = subprocess.run([sys.executable, "-c", script, *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100  # MiB


# ---------------------------------------------------------------- the table for readers


def main():
    table = [["fault", "outcome", "message"]]
    print("| fault | what happens | message |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn"
        with contextlib.redirect_stdout(io.StringIO()):
            assert make_sample_data.main(["--num_images", "60", "--out", str(drawn)]) == 0
        for number, fault in enumerate(FAULTS):
            outcome, said = NOT_TRIED, cannot_be_put(fault)
            if not said:
                outcome, said = fault.outcome, fault.happens(drawn, Path(folder) / str(number))
            said = re.sub(r"(?<![\w.])(/[^/ ]+)+/", "", said)  # paths of this computer
            table.append([fault.name, outcome, said])
            print(f"| {fault.name} | {outcome} | {shortened(said)} |".replace("\\", "\\\\"))
    (ROOT / "results" / "faults.csv").write_bytes(text(table).replace(b"\r\n", b"\n"))
    return 0


def shortened(message, most=70):
    return message if len(message) <= most else f"{message[: most // 2]} ... {message[len(message) - most // 2 + 5 :]}"


if __name__ == "__main__":
    sys.exit(main())

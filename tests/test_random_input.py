"""Random sheets, photos, file names and flags: a run goes on, or one line says what is wrong.

RANDOM_INPUTS=5000 python -m pytest tests/test_random_input.py      # of each so many, in place of a few
"""

import csv
import datetime
import io
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_faults import COLUMNS, TARGET, Data, encoded, excel, half_clear, palette, png, stops, text, turned, usable
from test_faults import watched as watch

import inputs
import train_model
from feature_store import digest
from outputs import logging_to_console

randomly = settings(
    max_examples=int(os.environ.get("RANDOM_INPUTS", 40)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# ---------------------------------------------------------------- what is drawn

FLAGS = [
    [],
    ["--group_by", "experiment_id", "plant_number"],
    ["--group_by", "timestamp"],
    ["--metadata_columns", "age_days", "timestamp"],
    ["--target", "age_days"],
    ["--target_transform", "log"],
]
TYPED = [" 0,25 ", "1.000,5", "1e999", "nan", "NA", "=1+1", "#DIV/0!", "12 ", "TRUE", "../x.png", "photo_01.PNG"]
TYPED += ["photo_01", "C:\\x.png", "x" * 5000, "a\nb", "filename", TARGET, 2**63, 10**30, 1e308, 4e38, -1e-320]
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
DATES = st.datetimes(datetime.datetime(1900, 3, 1)) | st.dates(datetime.date(1900, 3, 1)) | st.times()
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TYPED) | st.text(LETTERS, max_size=9)
CELLS |= DATES | st.timedeltas(datetime.timedelta(0))
NAMES = st.sampled_from([*COLUMNS, *map(str.upper, COLUMNS), "", " "]) | st.text(LETTERS, max_size=9)
# (row, column, cell), row 0 being that of the names; (place as a share of the length, what happens there, new bytes)
TYPINGS = st.lists(st.tuples(st.integers(1, 15), st.integers(0, 7), CELLS), max_size=40)
NAMINGS = st.lists(st.tuples(st.just(0), st.integers(0, 7), NAMES), max_size=2)
DAMAGES = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["over", "in", "out", "end"]), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)
PIECES = [b"filename", b"plant_number", TARGET.encode(), b"photo_01.png", b"photo_02.png", b"0.5", b"0,5", b"1", b"2"]
PIECES += [b",", b";", b"\t", b"\n", b"\r", b'"', b" ", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe4", b"PK\3\4"]


def with_cells(table, typings):
    table = [list(row) for row in table]
    for row, column, cell in typings:
        table += [[] for _ in range(len(table), row + 1)]
        table[row] += [None] * (column + 1 - len(table[row]))
        table[row][column] = cell
    return table


def for_excel(cell):
    """What openpyxl takes: no control characters."""
    return "".join(c for c in cell if c.isprintable() or c == "\n") if isinstance(cell, str) else cell


def damaged(content, damages):
    content = bytearray(content)
    for share, kind, new in damages:
        place = int(share * len(content))
        if kind == "end":
            del content[place:]
        else:
            content[place : place + (0 if kind == "in" else len(new))] = b"" if kind == "out" else new
    return bytes(content)


# ---------------------------------------------------------------- sheets


@pytest.fixture(scope="module")
def data(drawn, tmp_path_factory):
    return Data(drawn, tmp_path_factory.mktemp("random")).save()


def goes_on_or_says_why(data, sheet, *flags):
    path = data.folder / "labels.csv"
    path.write_bytes(sheet)
    flags = ["--labels_path", path, *flags]
    with watch() as (_, err), logging_to_console():
        try:
            labels, _ = usable(data, *flags)
        except inputs.UserError as error:
            assert str(error).strip()
        else:
            assert labels["_path"].map(os.path.dirname).eq(str(data.photos)).all() and labels["_path"].is_unique
    assert err.getvalue() == ""
    stops(train_model.main, data.arguments(*flags, "--folds", 500))  # more than there are plants


@randomly
@given(TYPINGS, NAMINGS, st.sampled_from(FLAGS), st.sampled_from([*",;\t", "excel"]))
def test_sheets_of_random_cells(data, typings, namings, flags, kind):
    table = with_cells(data.cells(), [*typings, *namings])
    if kind == "excel":
        sheet = excel([[for_excel(cell) for cell in row] for row in table])
    else:
        sheet = text(table, kind)
    goes_on_or_says_why(data, sheet, *flags)


@randomly
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=80))
def test_sheets_of_random_bytes(data, pieces):
    goes_on_or_says_why(data, b"".join(pieces))


@randomly
@given(DAMAGES, st.sampled_from(["file", "xl/worksheets/sheet1.xml", "xl/workbook.xml", "xl/styles.xml"]))
def test_damaged_excel_files(data, damages, part):
    sheet = excel(data.cells())
    if part == "file":
        return goes_on_or_says_why(data, damaged(sheet, damages))
    content = io.BytesIO()  # a part is damaged, and the file around it is whole again
    with zipfile.ZipFile(io.BytesIO(sheet)) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, damaged(old.read(name), damages) if name == part else old.read(name))
    goes_on_or_says_why(data, content.getvalue())


@randomly
@given(
    st.lists(st.tuples(*[st.text(LETTERS, max_size=9)] * 2), min_size=1, max_size=30),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_csv_file_is_read_as_it_was_written(data, cells, mark, encoding):
    path = data.folder / "labels.csv"
    cells = [[cell.replace("\r", "\n") for cell in row] for row in cells]
    path.write_bytes(text([["filename", "remark"], *cells], mark, encoding))
    sheet = inputs.read_sheet(path)
    missing = {"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "<NA>", "n/a", "#N/A", "-nan", "-NaN"}
    kept = [row for row in cells if not missing.issuperset(row)]
    assert sheet["filename"].fillna("").tolist() == ["" if name in missing else name.strip() for name, _ in kept]


# ---------------------------------------------------------------- photos


def photos():
    image = Image.effect_mandelbrot((40, 30), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    grey16 = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    return [
        png(image),
        png(half_clear(image.copy())),
        png(palette(image), transparency=0),
        png(grey16),
        png(image, save_all=True, append_images=[image.rotate(9)]),
        turned(image, "PNG"),
        turned(image, "JPEG"),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(palette(image), "GIF", save_all=True, append_images=[palette(image.rotate(9))]),
        encoded(image, "WEBP", save_all=True, append_images=[image.rotate(9)]),
        turned(image, "WEBP", lossless=True),
        turned(image, "TIFF"),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image.convert("LAB"), "TIFF"),
        encoded(grey16, "TIFF"),
        encoded(image.convert("F"), "TIFF"),
        encoded(image.convert("I"), "TIFF"),
        encoded(image, "BMP"),
    ]


PHOTOS = photos()


def opened_or_named(path, content):
    """A fault is found as the photos are looked through, or else the photo can be read."""
    path.write_bytes(content)
    with watch() as (_, err):
        found, fault = inputs.check_photo(path)
        labels = pd.DataFrame({"_path": [str(path)], "_content": [digest(content)], TARGET: [1.0]})
        try:
            pixels, _ = train_model.BiomassDataset(labels, TARGET, seed=0, image_size=64)[0]
            assert pixels.shape == (3, 64, 64)
        except inputs.UserError as error:
            assert fault or content.startswith(b"\x89PNG"), error  # of a PNG the checksums alone are looked at
    assert err.getvalue() == "" and "\n" not in fault and found == (b"" if fault else content)


@randomly
@given(st.sampled_from(PHOTOS), DAMAGES)
def test_damaged_photos(tmp_path_factory, photo, damages):
    opened_or_named(tmp_path_factory.getbasetemp() / "photo.png", damaged(photo, damages))


@randomly
@given(st.binary(max_size=200), st.sampled_from([b"", *(photo[:8] for photo in PHOTOS)]))
def test_photos_of_random_bytes(tmp_path_factory, content, start):
    opened_or_named(tmp_path_factory.getbasetemp() / "photo.png", start + content)


# ---------------------------------------------------------------- names and flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder with a folder in it, and beside it what nobody may read."""
    top = tmp_path_factory.mktemp("names")
    for place in ("photos/may", "outside"):
        (top / place).mkdir(parents=True)
        (top / place / "photo_01.png").touch()
    (top / "photos" / "photo_01.png").touch()
    if os.name != "nt":
        (top / "photos" / "link.png").symlink_to(top / "outside" / "photo_01.png")
        (top / "photos" / "link").symlink_to(top / "outside")
    return top / "photos"


PARTS = ["..", ".", "/", "\\", "//", "photo_01", "PHOTO_01.png", ".png", "may", "link", "link.png", "outside", "C:"]
PARTS += ["~", "\0", "\ud800", "\n", " ", "ﬃ", "ß", "e\u0301", "\u202e", "x" * 300, "*", "$HOME", "%00"]


@randomly
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=8).map("".join))
def test_no_file_name_leads_out_of_the_folder(folder, name):
    ((path, fault),) = inputs.PhotoFolder(folder).find_all(pd.Series([name], dtype=object)).to_numpy()
    assert fault or os.path.realpath(path).startswith(os.path.realpath(folder))


@randomly
@given(st.lists(CELLS | st.text(max_size=5), max_size=20))
def test_numbers_of_any_cells_are_finite_or_missing(cells):
    with watch():
        for column in (pd.Series(cells, dtype=object), pd.Series(cells, dtype=object).infer_objects()):
            numbers = inputs.to_numbers(column)
            assert numbers.dtype == float and not np.isinf(numbers.to_numpy(np.float32)).any()
            inputs.as_if_in_mg(numbers)


VALUES = st.sampled_from(["", "0", "-1", "1e400", "nan", "inf", "1" * 5000, "none", "cpu", "\x1b[31m"])
NOT_PATHS = sorted(
    action.option_strings[0]
    for action in train_model.build_parser()._actions
    if not action.option_strings[0].endswith(("_dir", "_path", "_out", "-h"))
)


@randomly
@given(st.lists(st.tuples(st.sampled_from(NOT_PATHS), st.none() | VALUES | st.text(LETTERS)), max_size=6))
def test_random_flags(tmp_path_factory, flags):
    flags = [flag if value is None else f"{flag}={value}" for flag, value in flags]
    stops(train_model.main, [*flags, "--data_dir", tmp_path_factory.getbasetemp() / "nowhere"])


def test_what_csv_writes_is_what_python_reads():
    """The tests above write their sheets by `csv`, so that must be sound itself."""
    table = [["filename", "remark"], ['a"b;c\td,e', "x\ny"]]
    assert list(csv.reader(io.StringIO(text(table).decode(), newline=""))) == table

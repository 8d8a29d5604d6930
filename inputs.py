"""Read what users have, label sheets that many people edited and photos of any kind, and say what is wrong with it.

Nothing outside the named files and the photo folder is read, and a file's size is looked at before it is unpacked.
"""

import contextlib
import csv
import difflib
import functools
import io
import logging
import os
import re
import stat
import threading
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
PHOTO_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")  # not all of Pillow's: one of them starts Ghostscript
HEADER_WITHIN = 20  # rows of a sheet in which the column names are looked for
MOST_SHEET_BYTES = 2**30  # of a sheet, unpacked
MOST_CELLS = 2**25  # of a sheet, with the empty ones before the last; a million rows of thirty columns
MOST_COLUMNS = 2**14  # as in Excel
MOST_PHOTO_BYTES = 2**28  # of a photo's file
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # of a photo: 89 million, what Pillow takes without a warning
LARGE_PHOTO = 2**24  # pixels from which on photos are decoded one at a time, so that threads do not add up

decoding_large = threading.RLock()  # so that who holds it can open the photo
pd.set_option("mode.string_storage", "python")  # Arrow's texts refuse names of files whose bytes are no UTF-8
warnings.filterwarnings("ignore", module="PIL")  # of tags that are odd, and of photos that open_image refuses
logger = logging.getLogger("train_model")


class UserError(Exception):
    """A mistake in the input that its one-line message tells how to mend."""


def one_line(error):
    return " ".join(str(error).split())


# ---------------------------------------------------------------- sheet


def read_sheet(path, columns=()):
    """Read a label sheet: the first one of an Excel or OpenDocument file, or a CSV or Parquet file; its content tells.

    The column names are in the row of `filename`, among the first twenty. Returns all rows that hold a value, numbered
    so that row + 2 is their row in a spreadsheet; `filename` as text without outer spaces, the other cells as typed.
    Raises UserError for a sheet that cannot be read, and for one of `columns` that is not there or there twice.
    """
    path = Path(path)
    if not path.is_file():
        found = "it is a folder, " if path.is_dir() else ""
        raise UserError(f"no label sheet at {path}: {found}pass --labels_path")
    try:
        names, sheet, text = read_table(path)
    except UserError as error:
        raise UserError(f"cannot read {path} as a label sheet: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # pandas, calamine and zipfile each raise their own
        raise UserError(f"cannot read {path} as a label sheet: {one_line(error)}") from error
    if not names:
        raise UserError(f"{path} is empty: pass another sheet by --labels_path")
    sheet = sheet.set_axis(choose_names(names, ("filename", *columns), path), axis=1)
    sheet = sheet.drop(columns="", errors="ignore").dropna(how="all")
    filenames = sheet["filename"].astype("string").str.strip().replace("", pd.NA)
    sheet = sheet.apply(numbers_of_text) if text else sheet.infer_objects()
    return sheet.assign(filename=filenames)


def read_table(path):
    """Names of the columns, the rows under them, and whether their cells are all text."""
    if path.stat().st_size > MOST_SHEET_BYTES:
        raise UserError(f"it is larger than {MOST_SHEET_BYTES / 2**30:.0f} GiB")
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return read_parquet(path)
    content = path.read_bytes()
    if content[:4] == b"\xd0\xcf\x11\xe0":  # Excel's formats before 2007, and all those with a password
        if "EncryptedPackage".encode("utf-16-le") in content:
            raise UserError("it is protected by a password; save it without one")
        raise UserError("it is an .xls file; save it as .xlsx")
    text = not content.startswith(b"PK\3\4")
    if text:
        cells = read_csv(content)
    else:
        check_archive(content)
        cells = pd.read_excel(io.BytesIO(content), header=None, engine="calamine")
    if cells.empty:
        return [], cells, text
    header = header_row(cells.head(HEADER_WITHIN).to_numpy()) or 0
    if header:
        logger.info(f"the column names of {path} are in row {header + 1}, the rows above it are left out")
    rows = cells.iloc[header + 1 :]
    return (
        ["" if pd.isna(name) else str(name).strip() for name in cells.iloc[header]],
        rows.set_axis(rows.index - 1),
        text,
    )


def read_parquet(path):
    """The same of a Parquet file, whose cells have types."""
    from pyarrow import parquet  # takes a fifth of a second and serves few

    told = parquet.read_metadata(path)
    size = sum(told.row_group(group).total_byte_size for group in range(told.num_row_groups))
    if size > MOST_SHEET_BYTES:
        raise UserError(f"it unpacks to {size / 2**30:.1f} GiB, more than {MOST_SHEET_BYTES / 2**30:.0f}")
    check_extent(told.num_rows, told.num_columns)
    columns = [told.schema.column(number) for number in range(told.num_columns)]
    # Few bytes could unpack to any size else. A text that many rows share is kept once, as in the file.
    if any(column.max_repetition_level or column.length > 64 for column in columns):
        raise UserError("it has lists or long binaries in its cells; leave these columns out")
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    rows = parquet.ParquetFile(path, read_dictionary=texts).read().to_pandas(ignore_metadata=True)
    names = ["" if name.startswith("__index_level_") else name.strip() for name in rows]  # what pandas wrote beside
    coded = rows.dtypes.index[rows.dtypes == "category"]
    return names, rows.astype({name: rows[name].cat.categories.dtype for name in coded}), False


def numbers_of_text(cells):
    """A column of a CSV file as numbers, if all its cells are."""
    numbers = pd.to_numeric(cells, errors="coerce")
    return numbers if numbers.notna().equals(cells.notna()) else cells


def check_archive(content):
    """Refuse an Excel file that is damaged, or that takes too much memory: calamine ends the whole process then."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)
            if size > MOST_SHEET_BYTES:
                raise UserError(f"it unpacks to {size / 2**30:.1f} GiB, more than {MOST_SHEET_BYTES / 2**30:.0f}")
            if any(part.filename.endswith("workbook.bin") for part in parts):
                raise UserError("it is an .xlsb file; save it as .xlsx")
            for part in parts:
                check_extent(*last_cell(archive.read(part)))  # reading it compares its checksum
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"it is damaged or incomplete ({one_line(error)}); copy or save it again") from error


def last_cell(part):
    """Rows and columns up to the last cell that is named in a part of an Excel file."""
    rows, columns, letters = 0, 0, set()
    for place in re.finditer(rb"""\sr\s*=\s*["']([A-Za-z]*)(\d+)["']""", part):  # <row r="7">, <c r="B7">
        rows = max(rows, int(place[2][:20]))
        letters.add(place[1][:9].upper())
    for name in letters:
        column = 0
        for letter in name:
            column = 26 * column + letter - ord("A") + 1
        columns = max(columns, column)
    return rows, columns


def check_extent(rows, columns):
    if columns > MOST_COLUMNS or rows * columns > MOST_CELLS:
        raise UserError(f"it reaches to row {rows:,} and column {columns:,}; delete all beyond the table")


def read_csv(content):
    """Cells as text, of a CSV file with commas, semicolons or tabs, in UTF-8, UTF-16 with its mark, or Latin-1."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = content.decode("utf-16")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
    if "\0" in text:
        raise UserError("it is neither an Excel nor a CSV file")
    if not text.strip():
        return pd.DataFrame()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n", HEADER_WITHIN)[:HEADER_WITHIN]
    line = next((line for line in lines if "filename" in line.casefold()), lines[0])
    mark = max(",;\t", key=line.count)
    rows = list(csv.reader(lines, delimiter=mark))
    header = header_row(rows)
    widest = max(map(len, rows)) + 1  # one more, because pandas stops at a row of more cells without its number
    check_extent(text.count("\n") + 1, widest)
    cells = pd.read_csv(
        io.StringIO(text), sep=mark, header=None, names=range(widest), dtype=object, skip_blank_lines=False
    )
    if header is not None:
        beyond = cells.iloc[header + 1 :, len(rows[header]) :].notna().any(axis=1)
        if beyond.any():  # say an unquoted decimal comma, which moves all cells after it to the next column
            number = beyond.idxmax() + 1
            raise UserError(f"row {number} has more cells than there are columns; put cells with '{mark}' in quotes")
    return cells


def header_row(rows):
    """Number of the row with the column names, which is the first that has `filename`; None if there is none."""
    found = ([str(cell).strip().casefold() for cell in row] for row in rows)
    return next((number for number, row in enumerate(found) if "filename" in row), None)


def choose_names(names, wanted, path):
    """Names for the columns: those `wanted` also where their letter case differs, others made unique; "" is dropped."""
    for name in dict.fromkeys(wanted):
        same = [number for number, found in enumerate(names) if found == name]
        same = same or [number for number, found in enumerate(names) if found.casefold() == name.casefold()]
        if len(same) > 1:
            raise UserError(f"{path} has {len(same)} columns '{name}': rename all but one")
        if same:
            names[same[0]] = name
    for name in wanted:
        require_column(names, name, path)
    taken, unique = {}, []
    for name in names:
        new = name
        while new and new in taken:
            taken[name] += 1
            new = f"{name}.{taken[name]}"
        taken[new] = 0
        unique.append(new)
    return unique


def require_column(names, name, path):
    if name not in names:
        names = [one_line(found)[:60] for found in names if found]
        nearest = difflib.get_close_matches(name, names[:1000], n=1, cutoff=0.0)
        rest = f" and {len(names) - 30:,} more" if len(names) > 30 else ""
        found = f"nearest: '{nearest[0]}'; found: {', '.join(names[:30])}{rest}" if nearest else "it is empty"
        raise UserError(f"{path} has no column '{name}'; {found}")


def to_numbers(cells):
    """Cells as floats: "0,25" is read as 0.25, a date as Unix seconds; what is no number, or beyond float32, is NaN."""
    if pd.api.types.is_datetime64_any_dtype(cells):
        cells = pd.Series([np.nan if pd.isna(date) else date.timestamp() for date in cells], cells.index, float)
    elif not pd.api.types.is_numeric_dtype(cells):
        text = cells.astype("string").str.strip().str.replace(",", ".", regex=False)
        cells = pd.to_numeric(text, errors="coerce")
    numbers = cells.astype(float)
    return numbers.where(numbers.abs() <= np.finfo(np.float32).max)


def as_if_in_mg(weights):
    """Which weights are some 1000 times the others, as if written in mg: a mask like `weights`."""
    positive = weights[weights > 0]
    large = weights > 30 * positive.quantile(0.75)
    rest = positive[~large]
    return large & (weights / 1000).between(rest.min(), rest.max())


# ---------------------------------------------------------------- photos


class PhotoFolder:
    """Finds the photos that a sheet names, and never one outside the folder.

    A name that is not there as written is looked for in other letter case and Unicode form, and without its extension;
    it counts as found if one photo alone fits.
    """

    def __init__(self, folder):
        self.folder, self.listed = Path(folder), None
        if not self.folder.is_dir():
            raise UserError(f"no image folder at {folder}: pass --image_dir, or --data_dir with a folder that holds it")
        self.real = functools.cache(os.path.realpath)

    def names(self):
        """Names of the folder's own files, listed once: find_all then looks among them."""
        if self.listed is None:
            self.listed = os.listdir(self.folder)
        return self.listed

    def find_all(self, names, look=map, once=None):
        """`_path` and `_fault` of the photos that a column of names names, "" where nothing is wrong.

        A folder is listed once, if a name is not there as written, and no more of it kept than what fits such names.
        look(function, names) can look for them in its own way, and once(function, paths) list the folder.
        """
        found = pd.DataFrame(look(self.look_for, names), names.index, columns=["_path", "_fault"])
        unlike = found["_fault"].isna()
        if unlike.any():
            paths = found.loc[unlike, "_path"]
            chosen = once(self.choose_all, paths) if once else self.choose_all(paths)
            found[unlike] = pd.DataFrame(chosen, found.index[unlike], found.columns)
        return found

    def choose_all(self, paths):
        """Path and fault of each of the `paths`, which are not there as they are written."""
        fits = {}
        for folder, name in map(os.path.split, paths):
            fits.setdefault(folder, {})[fold(name)] = []
        for folder, fitting in fits.items():
            self.list_fitting(folder, fitting)
        return [self.choose(*os.path.split(path), fits) for path in paths]

    def look_for(self, name):
        """Path and fault of one name as it is written; None as the fault if the folder must be listed for it."""
        name = name.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name:
            return str(self.folder / "-"), "no such file"
        if name.startswith("/") or PureWindowsPath(name).drive or ".." in parts:
            return str(self.folder / parts[-1]), "leads out of the image folder"
        path = self.folder / name
        return self.check_place(path) if os.path.lexists(path) else (str(path), None)

    def choose(self, folder, name, fits):
        fits = sorted(fits[folder][fold(name)])
        if len(fits) == 1:
            return self.check_place(Path(folder, fits[0]))
        return os.path.join(folder, name), f"no such file, {len(fits)} with similar names" if fits else "no such file"

    def list_fitting(self, folder, fits):
        """Add a folder's photos to the lists in `fits`, which are by folded name, with or without extension."""
        try:
            known = self.listed if Path(folder) == self.folder else None
            for name in (entry.name for entry in os.scandir(folder or ".")) if known is None else known:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in PHOTO_SUFFIXES:
                    for folded in (fold(name), fold(stem)):
                        if folded in fits:
                            fits[folded].append(name)
        except (OSError, ValueError):  # ValueError: of a name that no file can have
            return

    def check_place(self, path):
        """Path and fault of a file that is there: it must not lie outside the folder."""
        top, real = self.real(self.folder), self.real(path.parent)
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(real, path.name)
        outside = not Path(real).is_relative_to(top)
        return str(path), "leads out of the image folder" if outside else ""


def fold(name):
    return unicodedata.normalize("NFC", name).casefold()


def read_photo_file(path):
    """Bytes of a photo's file. Raises OSError where it cannot be read, ValueError where it is no file for a photo."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise ValueError("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is no ordinary file")
    if found.st_size > MOST_PHOTO_BYTES:
        raise ValueError(f"its file is larger than {MOST_PHOTO_BYTES // 2**20} MiB")
    content = Path(path).read_bytes()
    if not content:
        raise ValueError("its file is empty")
    return content


def open_image(content):
    """Open a photo from its bytes with Pillow, not decoded yet. Raises ValueError beyond MOST_PIXELS."""
    too_large = ValueError(f"more than {MOST_PIXELS / 1e6:.0f} million pixels; make it smaller")
    try:
        image = Image.open(io.BytesIO(content), formats=PHOTO_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("it is no photo") from None  # Pillow's own text holds a memory address
    except Image.DecompressionBombError:
        raise too_large from None
    if image.width * image.height > MOST_PIXELS:
        raise too_large
    return image


def decoding(image):
    """What to hold while an image is decoded."""
    return decoding_large if image.width * image.height > LARGE_PHOTO else contextlib.nullcontext()


def open_photo(content):
    """A photo from its bytes or path as 8-bit RGB, turned upright by its EXIF tag, transparency laid over white."""
    content = content if isinstance(content, bytes) else read_photo_file(content)
    with open_image(content) as file, decoding(file):
        try:
            photo = ImageOps.exif_transpose(file)
        except SyntaxError:  # what Pillow makes of a damaged EXIF block
            photo = file
        if photo.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
            photo = Image.fromarray((np.asarray(photo) / 257).clip(0, 255).astype(np.uint8))
        if photo.mode in ("LA", "PA", "RGBA") or "transparency" in photo.info:
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
        return photo.convert("RGB")


def fault_of(error):
    """What is wrong with a photo, in a few words without its path, by the exception that reading it raised."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return f"unreadable photo ({error.strerror})"
    return f"unreadable photo ({one_line(error) or type(error).__name__})"


def check_photo(path):
    """Bytes of a photo's file, read to their end, and what is wrong with it ("" if nothing)."""
    try:
        content = read_photo_file(path)
        with open_image(content) as photo:
            # A PNG tells by its checksums whether it is whole, ten times faster than by being decoded.
            photo.verify() if photo.format == "PNG" else open_photo(content)
        return content, ""
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return b"", fault_of(error)

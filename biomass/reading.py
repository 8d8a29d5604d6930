"""A sheet and a folder of photos become rows and pixels. What cannot be read is named, never mended in silence.

The way of a row: read_sheet (cells) -> load_rows (every row, and what is wrong with it) -> load_labels (the usable
ones) -> filter_missing_images (those with a whole photo) -> open_photo (pixels).
"""

import collections
import difflib
import functools
import hashlib
import io
import logging
import os
import re
import time
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import charset_normalizer
import numpy as np
import pandas as pd
import python_calamine
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.contrib.concurrent import thread_map

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".heic", ".heif")
PHOTO_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")  # not all of Pillow's: one of them starts Ghostscript
MOST_PIXELS = 89_000_000  # of a photo, what Pillow takes without a warning
MOST_BYTES = 2**28  # of a photo's or a sheet's file
MOST_CELLS = 20_000_000  # of a sheet, empty ones among them, that are held at once
MOST_LINE = 2**20  # bytes of a line of a .csv
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # kinds of such files
SYSTEM = {"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
BACKGROUND = "white"  # behind transparent photos
HEADER_WITHIN = 20  # rows of a sheet in which the column names are looked for
DRAWN_MARK = "drawn_expected_weights.csv"  # make_sample_data.py leaves it beside its sheet: the data are drawn
TELLS_THE_ANSWER = 0.95  # correlation with the target from which on a column is taken for it
MOST_CATEGORIES = 50  # a text column with more is a name or a remark
PER_GRAM = {"mg": 1000, "g": 1, "kg": 0.001}
OTHER_UNITS = {"mg": ("ug", "g"), "g": ("mg", "kg"), "kg": ("g", "t")}  # a thousand times smaller and larger
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SIGNS, EITHER = {"point": ".", "comma": ","}, "either"  # of decimals; EITHER: a comma or point that can be both
CODEPAGES = ["cp1252", "cp1251", "gb18030", "cp932", "big5", "cp949"]  # that a text shows, if it is no UTF
PLAIN = SimpleNamespace(filename_column="filename", sheet_name=None, decimal=None)  # flags that are not given
TIME_COLUMNS = ("timestamp", "age_days")  # of the study's sheet, the first that is there

logger = logging.getLogger("biomass")


class UserError(Exception):
    """A mistake that its one-line message tells how to mend."""


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def digest(*parts):
    """32 hexadecimal digits for a sequence of bytes and texts."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little") + part)  # so that ("ab", "c") and ("a", "bc") differ
    return sha.hexdigest()[:32]


def cores():
    """Cores for this process, if each process that torchrun started here takes as many."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


# ---------------------------------------------------------------- flags of all scripts that read a sheet


def add_data_flags(parser):
    """Add the flags that say where sheet and photos are and what the columns mean; returns their group."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_dir", type=a_path, default="infos/mlops_biomass_data", help="folder of the sheet and the photos")
    add("--labels_path", type=a_path, help=".xlsx, .csv or .parquet (default: DATA_DIR/digital_biomass_labels.xlsx)")
    add("--image_dir", type=a_path, help="folder of the photos (default: DATA_DIR/images_med_res)")
    add("--target", default="fresh_weight_total", help="column to predict: in grams if named a weight, else unitless")
    add("--group_by", nargs="+", default=["plant_number"], metavar="COLUMN", help="together make a plant, never split")
    add_sheet_flags(add)
    parser.set_defaults(metadata_columns=[])
    return group


def add_sheet_flags(add):
    add("--filename_column", default="filename", metavar="COLUMN", help="names the photo of each row")
    add("--sheet_name", metavar="NAME", help="sheet of a workbook (default: the one that has the columns)")
    add("--decimal", choices=list(SIGNS), help="sign in numbers such as 1,234 (default: as the column shows)")


def a_path(text):
    """argparse type: a path, in which ~ is the home folder."""
    return Path(os.path.expanduser(text))


def complete_data_flags(args):
    """Fill in the places that hang on --data_dir. Raises UserError where there is neither this folder nor others."""
    if not args.data_dir.is_dir() and not (args.labels_path and args.image_dir):
        way_on = "pass yours by --data_dir, or draw one: `python make_sample_data.py`, then --data_dir sample_data"
        way_on = "pass --image_dir with the photos' folder too" if args.labels_path else way_on
        raise UserError(f"no data folder at {args.data_dir}: {way_on}")
    args.labels_path = args.labels_path or args.data_dir / "digital_biomass_labels.xlsx"
    args.image_dir = args.image_dir or args.data_dir / "images_med_res"


def unit_of(target):
    """Unit of a column: g, mg or kg where its name says so, g of other weights; else it is not known."""
    words = words_of(target or "")
    if {"ratio", "percent", "per", "ug", "\u03bcg", "%"} & {*words}:
        return ""
    return next((word for word in words if word in PER_GRAM), "g" if "weight" in "".join(words) else "")


def group_name(group_by):
    """What to call the things that are never split: plants, or whatever --group_by says."""
    return "plant" if "plant_number" in group_by else " and ".join(group_by)


def is_drawn(labels_path):
    return bool(labels_path) and (Path(labels_path).parent / DRAWN_MARK).is_file()


# ---------------------------------------------------------------- the sheet: which table of a file, and its columns


class Table(NamedTuple):
    """One way to read a file: a sheet of a workbook, or a text at one separator."""

    read: object  # function of the most rows: cells in numbered rows and columns, empty ones missing
    sheet: str = ""
    merged: tuple = ()  # first and last place, (row, column), of merged cells
    mark: str = ""  # between the cells of a text
    said: tuple = ()  # what is told where it is taken


def read_sheet(path, columns=None, flags=PLAIN, target=None):
    """The rows of a sheet that hold anything; row + 2 is their number in a spreadsheet.

    `columns` gives for each column that is asked for the flag that names it, "" where it may be absent. It comes under
    the name asked for, `target` in its unit, and `filename` as text without outer spaces; other cells are as typed.
    `.attrs["readings"]` tells what was not understood plainly. Raises UserError for an unreadable sheet, a column that
    is not there once, and numbers that can mean two things.
    """
    path, wanted = Path(path), {flags.filename_column: "--filename_column"}
    wanted |= {name: flag for name, flag in (columns or {}).items() if name not in ("filename", *wanted)}
    if not path.is_file():
        raise UserError(f"no label sheet at {path}: pass --labels_path with a file")
    try:
        table, header = choose_table(path, tables_of(path, flags.sheet_name), wanted)
        cells = table.read(None)
        names = cells.iloc[header].map(clean_name).tolist() if len(cells) else []
        named = name_columns(path, names, wanted)
        if table.mark:
            check_text(cells.loc[header + 1 :], names, table.mark)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): close it in Excel, or mend its permissions") from error
    except Exception as error:  # pandas, calamine, openpyxl and pyarrow raise their own
        raise UserError(f"cannot read {path} as .xlsx, .csv or .parquet ({one_line(error)}): save it anew") from error
    sheet = cells.loc[header + 1 :, list(named)].apply(without_blanks).dropna(how="all")
    readings = [*table.said, *fill_merged(sheet, table.merged, named)]
    readings += [f"column '{names[place]}' as {name}" for place, name in named.items() if name != names[place]]
    own_unit = next((unit_of(names[place]) for place, name in named.items() if name == target), "")
    sheet = sheet.set_axis(named.values(), axis=1).set_axis(sheet.index - 1).infer_objects()
    signs = SIGNS.get(flags.decimal, ""), "," if table.mark == ";" else ""
    readings += understand(sheet, path, wanted, signs, {target: own_unit})
    sheet["filename"] = sheet[flags.filename_column].astype("string").str.strip()
    sheet.attrs["readings"] = readings
    return sheet


def tell_readings(sheet, path):
    if sheet.attrs["readings"]:
        logger.info(f"{path} was read with {'; '.join(sheet.attrs['readings'])}")


def choose_table(path, tables, wanted):
    """The one of a file's tables whose columns are the wanted ones, and the number of the row that names them."""
    heads = [table.read(HEADER_WITHIN) for table in tables]
    tops = [find_header(head, wanted) for head in heads]
    best = max(range(len(tables)), key=lambda number: tops[number][:2])
    header, table = tops[best][2], tables[best]
    needed = [name for name, flag in wanted.items() if flag]  # others may be absent, and choose no sheet
    able = [
        other.sheet for other, head in zip(tables, heads, strict=True) if find_header(head, needed)[0] == len(needed)
    ]
    if len(able) > 1 and able[0]:
        raise UserError(f"{path} has several sheets with these columns: pass --sheet_name, one of {', '.join(able)}")
    said = (*table.said, f"sheet '{table.sheet}'") if best and table.sheet else table.said
    return table._replace(said=said), header


def find_header(cells, wanted):
    """Of the row that names most wanted columns: how many these are, how many cells it has, and its number."""
    rows = [[*filter(None, map(clean_name, row))] for row in cells.itertuples(index=False)]
    counts = [(sum(bool(find_column(name, row)) for name in wanted), len(row)) for row in rows]
    if not rows:
        return 0, 0, 0
    most = max(found for found, _ in counts)
    # the first that names most; where none names any, the longest
    row = [found for found, _ in counts].index(most) if most else int(np.argmax([cells for _, cells in counts]))
    return (*counts[row], row)


def time_column(named, sheet):
    """Name of the column that says when photos were taken: the one that was named, else the study's; None if none."""
    return named or next((name for name in TIME_COLUMNS if name in sheet), None)


def clean_name(cell):
    return "" if pd.isna(cell) else " ".join(str(cell).split())


def words_of(name):
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    return re.findall(r"[^\W_]+|%", name.casefold())


ALIKE = [  # how the name of a column is compared with the wanted one, from strict to lax
    lambda name: name,
    lambda name: "".join(words_of(name)),
    lambda name: "".join(word for word in words_of(name) if word not in PER_GRAM),
]


def find_column(wanted, names):
    """Places of the columns of this name, in the strictest way in which there are any."""
    places = ([at for at, name in enumerate(names) if name and alike(name) == alike(wanted)] for alike in ALIKE)
    return next(filter(None, places), [])


def name_columns(path, names, wanted):
    """The name of each column that has one, by its place: of wanted ones that by which they are wanted.

    Raises UserError for a wanted column that is not there once, unless it may be absent.
    """
    named = {place: name for place, name in enumerate(names) if name and name not in names[:place]}
    for name, flag in wanted.items():
        places, near = find_column(name, names), difflib.get_close_matches(name, names, 1, 0)
        if len(places) == 1:
            named = {place: other for place, other in named.items() if other != name} | {places[0]: name}
        elif flag:
            nearest = f"; nearest: '{near[0]}'" if near else ""
            fault = f"has several columns '{name}'" if places else f"has no column '{name}'{nearest}"
            own = ", ".join([*filter(None, names)][:30])
            remedy = f"name it by {flag}, one of {own}" if own else "its first rows are empty"
            if flag == "--group_by":
                remedy += ", or --group_by filename where each photo shows another plant"
            raise UserError(f"{path} {fault}; {remedy}")
    return dict(sorted(named.items()))


def fill_merged(sheet, merged, named):
    """Give each row of a merged cell the cell's value; returns what is to be told of it."""
    filled = {}
    for (first, column), (last, _) in merged:
        if first in sheet.index and column in sheet and last > first:
            sheet.loc[first:last, column] = sheet.at[first, column]
            filled[named[column]] = None
    return [f"the value of merged cells in each of their rows, in {', '.join(filled)}"] if filled else []


# ---------------------------------------------------------------- the sheet: the tables of each kind of file


def tables_of(path, sheet_name):
    """The tables that a file holds, in their order."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
    content = path.read_bytes()
    if content.startswith((b"PK", b"\xd0\xcf\x11\xe0")):
        return workbook_tables(path, content, sheet_name)
    if sheet_name:
        raise UserError(f"--sheet_name {sheet_name}: {path} is no workbook; leave it out")
    if content.startswith(b"PAR1"):
        rows = pd.read_parquet(io.BytesIO(content))
        cells = pd.concat([pd.DataFrame([list(rows)], columns=rows.columns), rows], ignore_index=True)
        return [Table(cells.set_axis(range(cells.shape[1]), axis=1).head)]
    return text_tables(content)


def workbook_tables(path, content, sheet_name):
    """A table for each sheet that is not hidden, or for the one of this name alone."""
    check_size(content)
    book, tables = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(content)), []
    kinds, shown = python_calamine.SheetTypeEnum, python_calamine.SheetVisibleEnum.Visible
    sheets = [sheet for sheet in book.sheets_metadata if sheet.typ == kinds.WorkSheet]
    for sheet in sheets:
        if sheet.name == sheet_name or (sheet.visible == shown and not sheet_name):
            page = book.get_sheet_by_name(sheet.name)
            read = functools.partial(workbook_cells, page)
            tables.append(Table(read, sheet.name, page.merged_cell_ranges or ()))
    if not tables:
        text = f"no sheet '{sheet_name}'" if sheet_name else "no sheet that is not hidden"
        raise UserError(f"{path} has {text}: pass --sheet_name, one of {', '.join(sheet.name for sheet in sheets)}")
    return tables


def check_size(content):
    """Raise ValueError where calamine, which holds all cells up to the last, would end the process out of memory."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        if sum(part.file_size for part in file.infolist()) > 4 * MOST_BYTES:
            raise ValueError(f"it unpacks to more than {4 * MOST_BYTES // 2**20} MiB, save it as .csv or .parquet")
        for name in file.namelist():
            if re.fullmatch(r"xl/worksheets/[^/]+\.xml", name):
                xml = file.read(name)
                row = re.match(rb'<row [^>]*?\br="(\d+)"', xml[max(xml.rfind(b"<row "), 0) :])
                letters = next((count for count in (3, 2) if re.search(rb' r="[A-Z]{%d}\d' % count, xml)), 1)
                if row and int(row[1]) * {1: 26, 2: 702, 3: 16384}[letters] > MOST_CELLS:
                    raise ValueError(f"a sheet reaches to row {int(row[1]):,}, delete what is beyond the table")


def workbook_cells(page, most):
    """Cells of a sheet, as far to the right as its first rows reach."""
    rows = page.to_python(skip_empty_area=False, nrows=most)
    width = max((at for row in rows[:HEADER_WITHIN] for at, cell in enumerate(row) if str(cell).strip()), default=0) + 1
    whole = [[int(cell) if type(cell) is float and cell.is_integer() else cell for cell in row[:width]] for row in rows]
    return pd.DataFrame(whole, dtype=object)


def text_tables(content):
    """A table for each separator."""
    if content.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise ValueError("it is a web page or XML whatever its name, open it in Excel and save it as .xlsx")
    lengths = [len(line) for line in re.split(rb"[\r\n]", content)]
    if max(lengths) > MOST_LINE:
        raise ValueError(f"line {np.argmax(lengths) + 1} has {max(lengths):,} bytes, that is no table")
    text, encoding = decode(content)
    told = (f"encoding {encoding} (if letters look wrong, save it as UTF-8)",) if encoding else ()
    tables = []
    for mark, name in SEPARATORS.items():
        said = told if mark == "," else (*told, f"{name} between columns")
        tables.append(Table(functools.partial(text_cells, text, mark), said=said, mark=mark))
    return tables


def decode(content):
    """A file's text and its encoding, "" for UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), "UTF-16"
    try:
        text, encoding = content.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        best = charset_normalizer.from_bytes(content, cp_isolation=CODEPAGES).best()
        encoding = best.encoding if best else "cp1252"  # what Excel writes in the west
        text = content.decode(encoding, errors="replace")
    if "\0" in text:
        raise ValueError("it is neither a spreadsheet nor text")
    return text, encoding


def text_cells(text, mark, most):
    lines = text.splitlines()
    width = max((line.count(mark) for line in lines), default=0) + 1
    if width * (most or len(lines)) > MOST_CELLS:
        raise ValueError(f"a row has {width:,} cells")
    how = {"header": None, "dtype": str, "skip_blank_lines": False, "keep_default_na": False, "na_values": [""]}
    try:
        return pd.read_csv(io.StringIO(text), sep=mark, names=range(width), nrows=most, **how)
    except pd.errors.ParserError as error:
        row = re.search(r"EOF inside string starting at row (\d+)", str(error))
        raise ValueError(f"a quote in row {int(row[1]) + 1} is never closed, remove it" if row else error) from error


def check_text(rows, names, mark):
    """Raise ValueError for a row with more cells than there are columns, or of which a lone quote swallowed others."""
    last = max(place for place, name in enumerate(names) if name)
    beyond = rows.loc[:, last + 1 :].notna().any(axis=1)
    if beyond.any():  # say an unquoted 0,25 between commas
        raise ValueError(f"row {beyond.idxmax() + 1} has more cells than there are columns, put '{mark}' in quotes")
    for place in rows:
        broken = rows[place][rows[place].str.contains("\n", na=False)]
        many = broken[broken.str.count(re.escape(mark)) >= max(last, 1)]
        if len(many):
            raise ValueError(f"row {many.index[0] + 1} holds several rows in one cell, remove its lone quote")


# ---------------------------------------------------------------- the sheet: what its cells mean

NUMBERS = [  # how numbers are written: pattern, sign between thousands, decimal sign; EITHER: it can be both
    (r"\d+", "", ""),
    (r"[1-9]\d{0,2},\d{3}", ",", EITHER),
    (r"[1-9]\d{0,2}\.\d{3}", "", EITHER),  # as it stands, unless the column has decimal commas
    (r"\d*\.\d+|\d+\.", "", "."),
    (r"\d*,\d+|\d+,", "", ","),
    (r"\d{1,3}(,\d{3})+(\.\d+)?", ",", "."),
    (r"\d{1,3}(\.\d{3})+(,\d+)?", ".", ","),
    (r"\d{1,3}([ '\u2019]\d{3})+(\.\d+)?", " '\u2019", "."),
    (r"\d{1,3}([ '\u2019]\d{3})+,\d+", " '\u2019", ","),
]
GAPS = {"", "-", "--", "na", "n/a", "#n/a", "#na", "<na>", "nan", "null", "none", "n.a."}  # no number, and no fault
TRUTH = {"true": 1, "false": 0, "wahr": 1, "falsch": 0, "vrai": 1, "faux": 0}
ISO_DATE = r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?)?"
WITH_UNIT = r"(?i)^(.*\d[.,]?)\s*(mg|g|kg)\.?$"
MONTH = r"(?:jan|feb|m[aä]r|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]*\.?"
DATE = rf"(?i)(\d+[-./: ](\d+|{MONTH})([-./: ]\d+.*)?|{MONTH}[-./ ]\d+.*)$"
NO_NUMBER = [  # what a cell of the target can hold that is no number: pattern, fault
    (r"[1-9]\d{0,2},\d{3}$", "with a comma in {} that can stand for thousands or decimals, --decimal tells"),
    (DATE, "whose {} is a date or a time, no number"),
    (r"[-+]?[\d.,]*\d\s*[^\W\d]+\.?$", "whose {} has another unit than g, mg or kg"),
    ("", "whose {} is no number"),
]


@functools.lru_cache(2**16)
def read_number(text):
    """The number that a text stands for, NaN if there is none or it can be two, and the decimal sign that it shows."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip()
    for pattern, thousands, decimal in NUMBERS:
        if re.fullmatch(rf"[-+]?({pattern})(e[-+]?\d+)?", text, re.IGNORECASE):
            if decimal == EITHER and thousands:
                return np.nan, EITHER
            plain = text.translate(dict.fromkeys(map(ord, thousands)))
            return float(plain.replace(",", ".")), decimal if {",", "."} & {*text} else ""
    return np.nan, ""


def understand(sheet, path, wanted, signs, own_units):
    """Put what is meant in place of truth values, dates, odd numbers and units; returns what is to be told of it.

    `signs` are the decimal ones of --decimal and of the separator, "" if unknown, `own_units` the unit in the target's
    own name. Ids are left as they are.
    """
    told = collections.defaultdict(list)
    for name in sheet.select_dtypes(exclude=["number", "datetime", "datetimetz"]).columns.union([*own_units]):
        if name not in sheet or wanted.get(name) in ("--filename_column", "--group_by"):
            continue
        typed, is_target = dict(sheet[name].dropna()), name in own_units
        bare, units = split_units(typed) if is_target else (typed, {})
        changes, text, doubtful = understand_cells(bare, *signs)
        if doubtful is not None and (is_target or wanted.get(name) == "--metadata_columns"):
            text = f"'{bare[doubtful]}' in {name}, row {doubtful + 2}, can be in thousands or have decimals"
            raise UserError(f"{path}: {text}; pass --decimal point or --decimal comma")
        told[text].append(name)
        if is_target:
            more, text = bring_to_unit(bare | changes, units, own_units[name], unit_of(name))
            changes |= more
            told[text].append(name)
        if changes:
            sheet[name] = pd.Series(typed | changes, sheet.index, object).infer_objects()
    return [f"{text} in {', '.join(names)}" for text, names in told.items() if text]


def understand_cells(typed, decimal, of_separator):
    """Of a column's cells by row: what those mean that are not plain, what is to be told, and a row that can be two."""
    texts = {row: str(cell).strip() for row, cell in typed.items()}
    if texts and all(text.casefold() in TRUTH for text in texts.values()):
        return {row: TRUTH[text.casefold()] for row, text in texts.items()}, "truth values as 1 and 0", None
    if all(re.fullmatch(ISO_DATE, text) for text in texts.values()):
        return {row: pd.Timestamp(text) for row, text in texts.items()}, "", None
    signs = {row: read_number(text)[1] for row, text in texts.items() if isinstance(typed[row], str)}
    either = {row: texts[row] for row, sign in signs.items() if sign == EITHER}
    commas = {row: text for row, text in either.items() if "," in text}
    seen = {",", "."} & set(signs.values())
    sign = decimal or (min(seen) if len(seen) == 1 else "" if seen else of_separator)
    if sign == of_separator != decimal and len(commas) < len(either) and not seen:
        return {}, "", next(row for row in either if row not in commas)  # 1.234 between semicolons, and nothing else
    if sign == ".":
        meant = {row: text.replace(",", "") for row, text in commas.items()}
        return meant, "commas between thousands" if meant else "", None
    if sign == ",":
        meant = {row: text.replace(".", "").replace(",", ".") for row, text in either.items()}
        return meant, "decimal commas" if meant or seen else "", None
    return {}, "decimal commas" if seen else "", next(iter(commas), None) if not seen else None


def split_units(typed):
    """Cells by row without the unit of a weight behind their number, and these units by row."""
    found = {row: re.match(WITH_UNIT, cell.strip()) for row, cell in typed.items() if isinstance(cell, str)}
    found = {row: match for row, match in found.items() if match}
    bare = typed | {row: match[1] for row, match in found.items()}
    return bare, {row: match[2].lower() for row, match in found.items()}


def bring_to_unit(cells, units, own, unit):
    """The target's cells as numbers in its unit, if they or the column's name have another, and what is to be told."""
    goal = unit or own or "g"
    own = own if unit and own else goal
    kinds = sorted({*units.values(), own} - {goal})
    if not units and not kinds:
        return {}, ""
    numbers = to_numbers(pd.Series(cells, dtype=object)).dropna()
    text = f"{' and '.join(kinds)} brought to {goal}" if kinds else f"{goal} behind numbers"
    return {row: number * PER_GRAM[goal] / PER_GRAM[units.get(row, own)] for row, number in numbers.items()}, text


def without_blanks(cells):
    """The cells of a column, of which those of blanks alone are missing."""
    if pd.api.types.is_numeric_dtype(cells):
        return cells
    return cells.where([not isinstance(cell, str) or bool(cell.strip()) for cell in cells])


def is_gap(cells):
    """Where there is nothing, or one of the words for it."""
    if pd.api.types.is_numeric_dtype(cells):
        return cells.isna()
    return cells.isna() | cells.astype("string").str.strip().str.casefold().isin(GAPS).fillna(False).astype(bool)


def to_numbers(cells):
    """Cells as floats: "0,25" is 0.25, a date its Unix seconds; what is no number, or beyond float32, is NaN."""
    if pd.api.types.is_datetime64_any_dtype(cells):
        cells = (pd.to_datetime(cells, utc=True) - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    elif not pd.api.types.is_numeric_dtype(cells):
        text = cells.astype("string").str.strip()
        plain = pd.to_numeric(text, errors="coerce").astype("Float64")
        cells = plain.fillna(text[plain.isna()].dropna().map(lambda number: read_number(number)[0]).astype("Float64"))
    numbers = cells.astype(float)
    return numbers.where(numbers.abs() <= np.finfo(np.float32).max)


def is_numeric(cells):
    """Whether most cells of a column that hold something hold a number."""
    return to_numbers(cells).count() >= (~is_gap(cells)).sum() / 2


def to_ids(cells):
    """Cells as ids: 12, "12 ", "012" and 12.0 are the same id, whatever else the column holds."""
    text = cells.astype("string").str.strip().replace("", pd.NA)
    return text.str.replace(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", regex=True)


def number_plants(columns):
    """A number for each plant, in the order of the columns' values; rows that lack one are left out later."""
    keys = columns.apply(to_ids)
    for name in keys:
        numbers = pd.to_numeric(keys[name], errors="coerce")
        keys[name] = numbers if numbers.notna().equals(keys[name].notna()) else keys[name]
    return keys.groupby(list(keys), sort=True, dropna=False).ngroup()


def read_table(path):
    """A table whose first row names its columns, from .csv, .xlsx or .parquet. Raises UserError where it cannot be."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no table at {path}")
    try:
        if path.suffix.lower() in (".xlsx", ".xls"):
            return pd.read_excel(path, engine="calamine")
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep=None, engine="python", encoding="utf-8-sig")  # which finds the separator
    except Exception as error:  # pandas, calamine and pyarrow raise their own
        raise UserError(f"cannot read {path} ({one_line(error)}): save it as .csv or .xlsx anew") from error


def to_days(cells, path):
    """Times as days, and whether they are dates: these and Unix seconds count from 1970, plain days as typed."""
    numbers, name = to_numbers(cells), cells.name
    if numbers.notna().equals(cells.notna()):
        if numbers.dropna().between(1e8, 1e10).all():  # seconds from 1973 to 2286
            return numbers / 86400, True
        if numbers.abs().max() < 1e6:
            return numbers, False
        raise UserError(f"{path}: {name} holds neither Unix seconds nor days; write dates as 2024-05-03")
    dates = pd.to_datetime(cells.astype("string").str.strip(), format="ISO8601", utc=True, errors="coerce")
    bad = dates.isna() & cells.notna()
    if bad.any():
        row = bad.idxmax()
        text = f"{path} row {row + 2}: {name} '{cells[row]}' can be read in no way, or in several"
        raise UserError(f"{text}; write dates as 2024-05-03")
    return (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1), True


# ---------------------------------------------------------------- rows, and what is wrong with them


def load_rows(sheet, args):
    """Every row of the sheet: filename, group columns, metadata, target as a number, `_plant`, a number, and `_fault`.

    `_fault` says why a model cannot learn from the row, "" where it can; behind ": " stand the details of one row.
    """
    target, columns = args.target, [*args.group_by, *args.metadata_columns]
    typed, numbers = sheet[target], to_numbers(sheet[target])
    if pd.api.types.is_datetime64_any_dtype(typed):
        numbers = numbers * np.nan  # for which a model would learn seconds
    rows = sheet[list(dict.fromkeys(["filename", target, *columns]))].assign(**{target: numbers})
    rows = rows.assign(_plant=number_plants(rows[args.group_by]), _fault="")
    rows = blame(rows, rows["filename"].isna(), "without a file name")
    odd = typed[numbers.isna() & ~is_gap(typed)].astype("string").str.strip()
    for pattern, fault in NO_NUMBER:
        rows = blame(rows, odd.str.match(pattern).reindex(rows.index, fill_value=False), fault.format(target))
    rows = blame(rows, rows[target].isna(), f"without {target}")
    if unit_of(target):
        rows = blame(rows, rows[target] <= 0, f"with {target} not above 0 {unit_of(target)}")
    rows = blame(rows, rows[args.group_by].isna().any(axis=1), f"without {' + '.join(args.group_by)}")
    return blame_repeated(rows, "filename", args)


def blame(rows, bad, fault):
    """`rows` with the fault noted of those that are bad and have none yet."""
    return rows.assign(_fault=rows["_fault"].mask(bad.astype(bool) & (rows["_fault"] == ""), fault))


def blame_repeated(rows, key, args):
    """Note repeated rows, and all rows of a photo with several targets or plants, as nothing tells which one holds."""
    good = rows[rows["_fault"] == ""]
    same = pd.factorize(good[key])[0]
    plants, twice = good.groupby(same)["_plant"].transform("nunique") > 1, good.duplicated([key, args.target])
    fault = f"of a photo of several {' + '.join(args.group_by)}"
    rows = blame(rows, plants.reindex(rows.index, fill_value=False), fault)
    rows = blame(rows, twice.reindex(rows.index, fill_value=False), "that repeat an earlier row")
    several = rows[rows["_fault"] == ""].duplicated(key, keep=False)
    return blame(rows, several.reindex(rows.index, fill_value=False), f"of a photo with several {args.target}")


def asked_columns(args):
    """The columns that the flags name, and by which flag."""
    named = dict.fromkeys(args.metadata_columns, "--metadata_columns") | dict.fromkeys(args.group_by, "--group_by")
    return named | {args.target: "--target"}


def load_labels(args):
    """The rows to learn from; the log counts and names those dropped, and warns of doubtful weights."""
    target = args.target
    if target in args.group_by:
        raise UserError(f"--group_by {target}: it is the target, so every plant would have one weight; leave it out")
    sheet = read_sheet(args.labels_path, asked_columns(args), args, target)
    tell_readings(sheet, args.labels_path)
    labels = drop_faulty(load_rows(sheet, args), unnamed=f"without {target}")
    if labels.empty:
        raise UserError(f"no row of {args.labels_path} has a file name and a number in '{target}', and a plant")
    other, how = other_unit(labels[target], unit_of(target))
    if len(other):
        logger.info(f"warning: {len(other):,} weights some {how}: {name_rows(labels.loc[other])}")
    for name in args.metadata_columns:
        check_metadata(name, labels[name], target, labels[target])
    return labels


def other_unit(weights, unit):
    """Index of the weights that seem to be in another unit than the others, and what they look like."""
    if not unit:
        return weights.index[:0], ""
    large = weights > 30 * weights.quantile(0.75)
    large &= (weights / 1000).between(weights[~large].min(), weights[~large].max())
    logs = np.log10(weights[weights > 0].sort_values())
    if large.any() or len(logs) < 4:
        return weights.index[large], f"1000 times the others, as if in {OTHER_UNITS[unit][0]}"
    first, all_rows = np.arange(1, len(logs)), len(logs)
    low = logs.cumsum().to_numpy()[:-1]
    between = (low / first - (logs.sum() - low) / (all_rows - first)) ** 2 * first * (all_rows - first)
    split = int(between.argmax()) + 1  # of the two most compact groups
    apart = logs.iloc[split:].median() - logs.iloc[:split].median()
    if not 2.5 < apart < 3.5:  # weights of one unit spread, but not into two groups that lie 1000 apart
        return weights.index[:0], ""
    if split >= all_rows / 2:
        return logs.index[split:].sort_values(), f"1000 times the others, as if in {OTHER_UNITS[unit][0]}"
    return logs.index[:split].sort_values(), f"1000 times below the others, as if in {OTHER_UNITS[unit][1]}"


def drop_faulty(rows, unnamed=""):
    """The rows without a fault; the log counts the others by fault, and names them but for the fault `unnamed`."""
    parts = rows["_fault"].astype(object).str.split(": ", n=1)
    kinds, details = parts.str[0], parts.str[1].astype(object).fillna("")
    for kind in kinds[kinds != ""].unique():
        bad = kinds == kind
        names = "" if kind == unnamed else f": {name_rows(rows[bad], details[bad])}"
        logger.info(f"dropped {bad.sum():,} rows {kind}{names}")
    return rows[kinds == ""]


def name_rows(rows, details=None, most=10):
    """The rows as a spreadsheet numbers them, with their photo and what is wrong with it."""
    shown = rows[["filename"]].astype(object).fillna("no file name").assign(details="" if details is None else details)
    if "_row" in rows:
        shown = shown.set_axis(rows["_row"])
    names = [f"row {row + 2} ({one_line(name)[:200]}) {text}".strip() for row, name, text in shown[:most].itertuples()]
    return ", ".join(names) + (f" and {len(rows) - most:,} more" if len(rows) > most else "")


def filter_missing_images(labels, args, known):
    """The rows whose photo is there and whole, with its `_path` and the `_content` digest of its file.

    `known` is that of look_at_files.
    """
    labels = look_at_files(labels.assign(**find_photos(labels["filename"], args.image_dir)), known)
    faults = "whose photo is missing or unreadable: " + labels["_fault"]
    labels = drop_faulty(labels.assign(_fault=labels["_fault"].mask(labels["_fault"] != "", faults)))
    labels = drop_faulty(blame_repeated(labels, "_path", args))  # one photo by several spellings of its name
    if labels.empty:
        raise UserError(f"no photo of the sheet can be read in {args.image_dir}: pass --image_dir")
    return labels.rename_axis("_row").reset_index()


# ---------------------------------------------------------------- metadata: columns of the sheet as input


def check_metadata(name, cells, target_name, target):
    """Refuse a column that gives the target away, and say of another what is missing."""
    numbers, numeric, reason = to_numbers(cells), is_numeric(cells), ""
    both = pd.DataFrame({"cells": numbers, "target": target}).dropna()
    r = max((both.corr(how).iloc[0, 1] for how in ("pearson", "spearman")), key=abs) if len(both) >= 10 else 0
    if name in (target_name, "shoot_root_ratio_fresh") or "weight" in name.lower():
        reason = f"it is measured at the harvest, like {target_name}"
    elif abs(r) > TELLS_THE_ANSWER:
        reason = f"its correlation with {target_name} is {r:.3f}"
    elif not numeric and cells.nunique() > MOST_CATEGORIES:
        reason = f"it has {cells.nunique():,} different texts, more than {MOST_CATEGORIES}"
    if reason:
        raise UserError(f"--metadata_columns {name}: {reason}; leave it out")
    missing = (numbers if numeric else cells).isna().sum()
    logger.info(f"metadata {name}: {'numbers' if numeric else 'text'}, missing or unreadable in {missing:,} rows")


def plan_metadata(rows, columns):
    """How each column becomes numbers, learned from training rows, in plain values that a checkpoint can hold."""
    from sklearn.preprocessing import StandardScaler  # here, as eda.py does without

    plan = []
    for name in columns:
        if is_numeric(rows[name]):
            numbers = to_numbers(rows[name])
            median = float(numbers.median()) if numbers.count() else 0.0
            scaler = StandardScaler().fit(numbers.fillna(median).to_numpy()[:, None])
            plan.append({"column": name, "median": median, "mean": scaler.mean_.item(), "sd": scaler.scale_.item()})
        else:
            plan.append({"column": name, "categories": sorted(to_ids(rows[name]).dropna().unique())})
    return plan


def encode_metadata(rows, plan):
    """float32 (len(rows), width): numbers scaled, and a 1 beside the median where missing; texts one-hot."""
    columns = [np.empty((len(rows), 0), np.float32)]
    for step in plan:
        if "categories" in step:
            columns += [to_ids(rows[step["column"]]).isin([known]) for known in step["categories"]]
        else:
            numbers = to_numbers(rows[step["column"]])
            columns += [(numbers.fillna(step["median"]) - step["mean"]) / step["sd"], numbers.isna()]
    return np.column_stack([np.asarray(column, np.float32) for column in columns])


# ---------------------------------------------------------------- photos


def is_photo(name):
    return name.lower().endswith(PHOTO_SUFFIXES)


def is_hidden(name):
    """Whether a system made it for itself: hidden files, previews, waste."""
    return name.startswith((".", "~$")) or name.casefold() in SYSTEM


def list_files(folder, recursive=True, told=True):
    """Files in a folder, their places in it with / between; the log counts what is left out."""
    files, left_out = [], collections.Counter()
    for parent, folders, names in os.walk(folder):
        inside = os.path.relpath(parent, folder)
        names, hidden = [name for name in names if not is_hidden(name)], sum(map(is_hidden, [*names, *folders]))
        links = [name for name in folders if os.path.islink(os.path.join(parent, name)) and not is_hidden(name)]
        files += [os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/") for name in names]
        left_out.update({"hidden or made by a system": hidden, "links to folders": len(links) if recursive else 0})
        folders[:] = sorted(name for name in folders if not is_hidden(name)) if recursive else []
    left_out["no photos"] = sum(not is_photo(file) for file in files)
    counts = [f"{count:,} {what}" for what, count in left_out.items() if count]
    if counts and told:
        logger.info(f"left out in {folder}: {', '.join(counts)}")
    return files


def same_name(name):
    """A file's name in the form in which names are compared: letter case and the form of accents do not count."""
    return unicodedata.normalize("NFC", name.casefold())


def stem(name):
    return re.sub(r"\.0$", "", name[: name.rfind(".")] if is_photo(name) else name)


FITS = [  # how a name in a sheet can fit a photo, from strict to lax: of the file and of the name what must be alike
    ("", lambda file: file, lambda name: name),
    ("in a subfolder", os.path.basename, lambda name: name),
    ("by the name without suffix", stem, stem),
    ("in a subfolder by the name without suffix", lambda file: stem(os.path.basename(file)), stem),
]


def find_photos(names, folder):
    """`_path` and `_fault` ("" if none) of each photo that a sheet names; none leads out of `folder`."""
    if not Path(folder).is_dir():
        raise UserError(f"no image folder at {folder}: pass --image_dir with the folder of the photos")
    root = os.path.realpath(folder)
    wanted = {str(name): os.path.normpath(str(name).replace("\\", "/")).replace(os.sep, "/") for name in names}
    files, fitting = list_files(root), {}
    for how, of_file, of_name in FITS:
        places, lacking = collections.defaultdict(list), [name for name in wanted if not fitting.get(name)]
        for file in files if lacking else ():
            if not how or is_photo(file):
                places[same_name(of_file(file))].append(file)
        fitting |= {name: places[same_name(of_name(wanted[name]))] for name in lacking}
        odd = [name for name in lacking if len(fitting[name]) == 1] if how else []
        if odd:
            logger.info(f"{len(odd):,} photos found {how}, say {one_line(odd[0])} as {fitting[odd[0]][0]}")
    found = [check_place(root, wanted[str(name)], fitting[str(name)]) for name in names]
    return pd.DataFrame(found, names.index, ["_path", "_fault"], dtype=object)  # as str holds no bytes of old systems


def check_place(root, wanted, files):
    """Path and fault of the photo that a sheet calls `wanted`, which fits these files below `root`."""
    files = [wanted] if wanted in files else files
    path = os.path.join(root, files[0] if len(files) == 1 else os.path.basename(wanted))
    if wanted.startswith(("/", "..")) or wanted[1:2] == ":" or wanted == ".":
        return path, "leads out of the image folder"
    if len(files) != 1:
        return path, "several files of this name" if files else "no such file"
    outside = os.path.islink(path) and not os.path.realpath(path).startswith(os.path.join(root, ""))
    return path, "is a link that leads out of the image folder" if outside else ""


def look_at_files(rows, known, decode=False):
    """`rows` with the `_content` digest of the photo's file at their `_path`, and `_fault`, what is wrong with it.

    Rows with a `_fault` already are left as they are. `known` holds what was told of photos in earlier runs by path,
    and gets what is told now; with `decode` those that are new are decoded whole.
    """
    bar = {"max_workers": cores(), "unit": "photo", "desc": "looking at photos", "disable": None}
    look = functools.partial(look_at, known, decode)
    contents, faults, states, notes = zip(*thread_map(look, rows["_path"], rows["_fault"], **bar), strict=True)
    known.update({path: state for path, state in zip(rows["_path"], states, strict=True) if state})
    for note in dict.fromkeys(filter(None, notes)):
        names = [one_line(name) for name, own in zip(rows["filename"], notes, strict=True) if own == note]
        logger.info(f"{len(names):,} photos {note}: {', '.join(names[:10])}{' and others' if names[10:] else ''}")
    return rows.assign(_content=contents, _fault=faults)


def look_at(known, decode, path, fault):
    """Digest of a photo's file, what is wrong with it, by what to know it again unread if that is new, and a note."""
    if fault:
        return "", fault, None, ""
    try:
        found = os.stat(path)
        state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if path in known and known[path][:3] == state:
            return known[path][3], "", None, ""
        content = read_file(path)
        with open_file(content) as photo:
            # A PNG tells by its checksums whether it is whole, ten times faster than by being decoded
            small = photo.mode in ("RGB", "RGBA", "L", "P", "1") and photo.width * photo.height <= MOST_PIXELS
            whole_png = not decode and photo.format == "PNG" and small and "exif" not in photo.info
            note = (photo.verify() if whole_png else open_photo(content).info.get("note")) or ""
        just_changed = time.time_ns() - max(state[1:]) < 2e9  # so may be changed again within one tick of the clock
        forget = just_changed or note or not path.isprintable()  # a note is told in each run
        return digest(content), "", None if forget else (*state, digest(content)), note
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        return "", fault_of(error), None, ""


def read_file(path):
    """Bytes of a photo's file. Raises OSError where it cannot be read, ValueError where it is no file for a photo."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError("it is no ordinary file")  # a pipe would be waited for
    if not 0 < os.path.getsize(path) <= MOST_BYTES:
        raise ValueError(f"its file is empty or larger than {MOST_BYTES // 2**20} MiB")
    return Path(path).read_bytes()


def open_file(content):
    """A photo's file as Pillow opens it, its pixels still to be decoded."""
    formats = PHOTO_FORMATS
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer; fetch the photo by `git lfs pull`")
    if content[4:8] == b"ftyp" and content[8:12] in HEIC:
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("it is a HEIC photo; pip install pillow-heif, or export it as JPEG") from None
        pillow_heif.register_heif_opener()
        formats += ("HEIF",)
    return Image.open(io.BytesIO(content), formats=formats)


def open_photo(content):
    """A photo from its path or bytes as 8-bit RGB, turned upright by its EXIF tag, transparency laid over white.

    Its `info["note"]` tells what was not understood plainly, if anything.
    """
    content, note = content if isinstance(content, bytes) else read_file(content), ""
    with open_file(content) as file:
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS / 1e6:.0f} million pixels; make it smaller")
        file.load()
        try:
            photo = ImageOps.exif_transpose(file)
        except Exception:  # whatever broken tags make Pillow stumble over
            photo, note = file, "taken as upright, as their EXIF tags are broken"
        if photo.mode[0] in "IF":
            photo, note = to_8_bits(photo)
        if photo.mode in ("LA", "PA", "RGBA") or "transparency" in photo.info:
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, BACKGROUND), photo)
        photo = photo.convert("RGB")
        photo.info |= {"note": note}
        return photo


def to_8_bits(photo):
    """A grey photo of numbers as one of 8 bits, by the smallest of the usual ranges that holds it, and a note of it."""
    grey = np.nan_to_num(np.asarray(photo).astype(float))
    tops = [2.0**bits - 1 for bits in (8, 10, 12, 16, 24, 32)]
    top = next(top for top in ([1.0] if photo.mode == "F" else []) + [*tops, np.inf] if grey.max() <= top)
    photo = Image.fromarray((grey / top * 255).round().clip(0, 255).astype(np.uint8))
    return photo, "" if top == 2**16 - 1 else f"whose grey values are read as from 0 to {top:.0f}"


def fault_of(error):
    """What is wrong with a photo, in a few words without its path."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text holds a memory address
        return "unreadable photo (it is no photo)"
    return f"unreadable photo ({getattr(error, 'strerror', None) or one_line(error)})"

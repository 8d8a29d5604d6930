"""reading.py: sheets and photos as people have them give the rows, plants and grams that were meant, or one line.

HYPOTHESIS_EXAMPLES=2000 python -m pytest -n0 tests/test_reading.py -k property      # tries more random sheets
"""

import codecs
import contextlib
import io
import logging
import os
import re
import shutil
import sys
import time
import unicodedata
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import openpyxl
import pandas as pd
import pytest
from conftest import TARGET, labels_of
from hypothesis import given, settings
from PIL import Image, PngImagePlugin

import eda
import predict
import train_model as tm
from biomass import reading
from biomass.reading import UserError

WEIGHTS = [0.1 + 0.05 * number for number in range(12)]
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)


def rows(**changed):
    """Twelve rows of six plants, as the others of these tests start from."""
    table = pd.DataFrame({"filename": [f"p{n:02}.png" for n in range(12)], "plant_number": [n // 2 for n in range(12)]})
    return table.assign(**{TARGET: WEIGHTS} | changed)


def weights(*texts):
    """Rows whose first weights are these texts."""
    return rows().astype({TARGET: object}).assign(**{TARGET: [*texts, *WEIGHTS[len(texts) :]]})


@contextlib.contextmanager
def listening():
    """The lines that are logged."""
    lines, handler, log = [], logging.Handler(), logging.getLogger("biomass")
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)


def csv(table, **how):
    return "labels.csv", lambda path: table.to_csv(path, index=False, **how)


def content(made, name="labels.csv"):
    return name, lambda path: path.write_bytes(made if isinstance(made, bytes) else made.encode())


def excel(table, change=lambda page, book: None):
    def write(path):
        table.to_excel(path, index=False)
        book = openpyxl.load_workbook(path)
        change(book.active, book)
        book.save(path)

    return "labels.xlsx", write


def merge(page, book):
    for row in range(2, 14, 2):
        page.merge_cells(start_row=row, end_row=row + 1, start_column=2, end_column=2)


def hide(page, book):
    for row in range(4, 9):
        page.row_dimensions[row].hidden = True


def notes(page, book):
    book.create_sheet("Notes", 0).append(["Harvest of May, balance 2"])


def twin(page, book):
    book.copy_worksheet(page).title = "Twin"


def far(place, value=" "):
    return lambda page, book: page.__setitem__(place, value)


def quoted(*remarks):
    """A sheet whose last column holds these remarks, written without any quoting."""
    lines = [
        f"{line},{remarks[n] if n < len(remarks) else ''}"
        for n, line in enumerate(rows().to_csv(index=False).split("\n")[1:13])
    ]
    return content("\n".join([f"filename,plant_number,{TARGET},remark", *lines]))


NAMES = {"filename": "File Name", "plant_number": "Plant-Number", TARGET: " FRESH WEIGHT TOTAL"}
OTHERS = {"filename": "photo", "plant_number": "pot", TARGET: "mass"}
MILLIGRAMS = [weight * 1000 for weight in WEIGHTS]
MIXED = [f"{weight:g} g" if n % 2 else f"{weight * 1000:g}mg" for n, weight in enumerate(WEIGHTS)]
SHEETS = {  # kind: the sheet, flags, what is told, weights and plants where others than those of rows()
    "merged cells": (excel(rows(), merge), "", "merged cells .* plant_number"),
    "rows hidden by a filter": (excel(rows(), hide), "", ""),
    "a sheet of notes in front": (excel(rows(), notes), "", "sheet 'Sheet1'"),
    "one of two sheets": (excel(rows(), twin), "--sheet_name Twin", ""),
    "16,384 columns": (excel(rows(), far("XFD3")), "", ""),
    "names in other letters": (excel(rows().rename(columns=NAMES)), "", "'File Name' as filename"),
    "other columns": (csv(rows().rename(columns=OTHERS)), "--filename_column photo --group_by pot --target mass", ""),
    "plants called NA": (csv(rows(plant_number=["NA", "nan", "None", "null", "K1", "K2"] * 2)), "", "", WEIGHTS,
                         ["NA", "nan", "None", "null", "K1", "K2"] * 2),
    "a plant a photo": (csv(rows().drop(columns="plant_number")), "--group_by filename", "", WEIGHTS, range(12)),
    "UTF-16": (csv(rows(), encoding="utf-16", sep="\t"), "", "UTF-16.*tabs"),
    "cp1252": (csv(rows(remark="verkr\xfcppelt"), encoding="cp1252", sep=";"), "", "cp1252.*semicolons"),
    "a name in cp1252": (csv(rows(filename=[f"p\xfc{n}.png" for n in range(12)]), encoding="cp1252"), "", "cp1252"),
    "thousands beside points": (csv(weights("1,234", "980.5")), "", "commas between thousands|in mg", [1234, 980.5]),
    "thousands and decimals": (csv(weights("1,234.5", "1.234,5", "1'234.5", "1\xa0234,5", "12,345,678")), "",
                               "decimal commas|in mg",
                               [1234.5] * 4 + [12345678]),
    "decimal commas": (csv(weights("1,234", "0,250", "2,5")[:3]), "", "decimal commas", [1.234, 0.25, 2.5]),
    "points between thousands": (csv(weights("1.234", "980,5")[:2]), "", "decimal commas", [1234, 980.5]),
    "semicolons settle commas": (csv(weights("1,234", "2,500")[:2], sep=";"), "", "decimal commas", [1.234, 2.5]),
    "--decimal comma": (csv(weights("1,234", "2,500")[:2]), "--decimal comma", "decimal commas", [1.234, 2.5]),
    "--decimal point": (csv(weights("1,234", "2,500")[:2]), "--decimal point", "between thousands", [1234, 2500]),
    "points alone": (csv(weights("1.234", "2.500")[:2]), "", "", [1.234, 2.5]),
    "units in cells": (csv(rows(**{TARGET: MIXED})), "", "mg brought to g"),
    "units and commas": (csv(rows(**{TARGET: [cell.replace(".", ",") for cell in MIXED]})), "", "mg brought to g"),
    "a unit in the name": (csv(rows(**{TARGET: MILLIGRAMS}).rename(columns={TARGET: "Fresh Weight Total (mg)"})), "",
                           "mg brought to g"),
    "a target in mg": (csv(rows(fresh_weight_mg_total=MILLIGRAMS)), "--target fresh_weight_mg_total", "", MILLIGRAMS),
    "a target below 0": (csv(rows(score=[weight - 0.3 for weight in WEIGHTS])), "--target score", "",
                         [weight - 0.3 for weight in WEIGHTS]),
    "a third in mg": (csv(weights(*MILLIGRAMS[:4])), "", "warning: 4 .* as if in mg: row 2 .*row 5", MILLIGRAMS[:4]),
    "a third in kg": (csv(weights(*[weight / 1000 for weight in WEIGHTS[:4]])), "", "warning: 4 .* as if in kg: row 2",
                      [weight / 1000 for weight in WEIGHTS[:4]]),
    "remarks of several lines": (csv(rows(remark="a\nb, c")), "", ""),
    "quotes within cells": (quoted('4" pot', '5" pot'), "", ""),
    "empty rows": (excel(rows(), lambda page, book: page.insert_rows(5, 3)), "", ""),
    "a byte-order mark": (content(codecs.BOM_UTF8 + rows().to_csv(index=False).encode()), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHEETS)
def test_a_sheet_is_read_as_it_was_meant(kind, tmp_path):
    (name, write), flags, told, *meant = SHEETS[kind]
    write(tmp_path / name)
    with listening() as said:
        labels = labels_of(tmp_path / name, *flags.split())
    target = flags.partition("--target ")[2].split()[:1] or [TARGET]
    wanted = list(meant[0]) if meant else WEIGHTS
    wanted += WEIGHTS[len(wanted) : len(labels)]
    assert labels[target[0]].tolist() == pytest.approx(wanted) and len(labels) == len(wanted)
    plants = list(meant[1]) if len(meant) > 1 else [n // 2 for n in range(len(labels))]
    assert pd.factorize(labels["_plant"])[0].tolist() == pd.factorize(np.array(plants))[0].tolist()
    assert bool(said) == bool(told) and all(re.search(told, line) for line in said), said


DROPPED = {  # kind: the sheet, what is told, rows that are left out
    "rows without a plant": (csv(rows(plant_number=[None, *range(11)])), r"1 rows without plant_number: row 2 \(p00"),
    "a date": (excel(weights(datetime(2025, 5, 1))), "whose .* is a date.*: row 2"),
    "a date as text": (csv(weights("1-May")), "whose .* is a date.*: row 2"),
    "a German date": (csv(weights("01.05.2025")), "whose .* is a date.*: row 2"),
    "a time": (csv(weights("12:30")), "whose .* is a date or a time.*: row 2"),
    "an unknown unit": (csv(weights("5 oz")), "has another unit than g, mg or kg: row 2"),
    "a remark": (csv(weights("ca. 0.3")), "is no number: row 2"),
    "a comma that can be both": (csv(weights("1,234", "0,25", "0.5")), "with a comma .* --decimal tells: row 2"),
    "a word for nothing": (csv(weights("n/a")), f"without {TARGET}$"),
    "a weight of 0 kg": (csv(weights(0)), "not above 0 g: row 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DROPPED)
def test_a_row_that_can_mean_two_things_is_dropped_and_named(kind, tmp_path):
    (name, write), told = DROPPED[kind]
    write(tmp_path / name)
    with listening() as said:
        labels = labels_of(tmp_path / name)
    assert labels["filename"].tolist() == rows()["filename"].tolist()[1:]
    assert re.search(f"^dropped 1 rows .*{told}|^dropped {told}", said[-1]) and len(said) < 3, said


def test_a_photo_of_two_plants_is_dropped(tmp_path):
    twice = pd.concat([rows(), rows()[3:4].assign(plant_number=5)])
    twice.to_csv(tmp_path / "labels.csv", index=False)
    with listening() as said:
        assert "p03.png" not in labels_of(tmp_path / "labels.csv")["filename"].tolist()
    assert said == ["dropped 2 rows of a photo of several plant_number: row 5 (p03.png), row 14 (p03.png)"]


def zipped(size):
    import zipfile

    with (
        zipfile.ZipFile(made := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file,
        file.open("xl/worksheets/a.xml", "w") as part,
    ):
        for _ in range(size >> 20):
            part.write(bytes(2**20))
    return made.getvalue()


REFUSED = {  # kind: the sheet, flags, the message
    "lone quotes": (quoted("", '"small', "", "", "", 'pot 4"'), "", "row 3 holds several rows in one cell"),
    "lone quotes of two rows": (quoted("", '"small', '4" pot'), "", "row 3 holds several rows in one cell"),
    "a lone quote": (quoted("", '"small'), "", "a quote in row 3 is never closed"),
    "commas that can be both": (csv(weights("1,234", "2,500")[:2]), "", "'1,234' in .*, row 2, .*--decimal point or"),
    "points that can be both": (csv(weights("1.234", "2.500")[:2], sep=";"), "", "'1.234' in .*, row 2, .*--decimal"),
    "metadata that can be both": (csv(rows(light="1,234")), "--metadata_columns light", "in light, row 2, .*--decimal"),
    "dates alone": (excel(rows(**{TARGET: datetime(2025, 5, 1)})), "", "no row of .* has a file name and a number"),
    "a web page": (content(rows().to_html(), "labels.xls"), "", "it is a web page .* save it as .xlsx"),
    "a cell far out": (excel(rows(), far("XFD1048576")), "", "reaches to row 1,048,576"),
    "a line without end": (content(rows().to_csv() + "x" * 2**21), "", "line 14 has 2,097,152 bytes"),
    "a zip bomb": (content(zipped(1100 * 2**20), "a.xlsx"), "", "unpacks to more than 1024 MiB"),
    "no plants": (csv(rows().drop(columns="plant_number")), "", "--group_by.*--group_by filename where each photo"),
    "no photos": (csv(rows().rename(columns=OTHERS)), "", "no column 'filename'; .*--filename_column, one of ph"),
    "no target": (csv(rows().rename(columns=OTHERS)), "--filename_column photo --group_by pot", "by --target, one of"),
    "two sheets": (excel(rows(), twin), "", "several sheets .*--sheet_name, one of Sheet1, Twin"),
    "no such sheet": (excel(rows(), notes), "--sheet_name May", "no sheet 'May': .*--sheet_name, one of Notes, Sheet1"),
    "a sheet of a text": (csv(rows()), "--sheet_name May", "--sheet_name May: .* no workbook"),
    "two columns of a name": (csv(rows(Filename="x").rename(columns={"filename": "File Name"})), "", "several columns"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_sheet_that_cannot_be_read_stops_in_one_line_within_seconds(kind, tmp_path):
    (name, write), flags, told = REFUSED[kind]
    write(tmp_path / name)
    began = time.monotonic()
    with pytest.raises(UserError, match=told) as stopped:
        labels_of(tmp_path / name, *flags.split())
    assert (
        "\n" not in str(stopped.value) and str(tmp_path / name) in str(stopped.value) and time.monotonic() - began < 5
    )


def test_truth_values_are_alike_from_all_kinds_of_files(tmp_path):
    table, seen = rows(lid=[n % 2 == 0 for n in range(12)]), []
    for name, write in (excel(table), csv(table), csv(table.replace({True: "WAHR", False: "FALSCH"}))):
        write(tmp_path / name)
        labels = labels_of(tmp_path / name, "--metadata_columns", "lid")
        plan = reading.plan_metadata(labels, ["lid"])
        seen.append((plan, reading.encode_metadata(labels, plan).tolist()))
    assert seen[0] == seen[1] == seen[2] and len(seen[0][1][0]) == 2


def test_the_unit_of_a_column_is_in_its_name():
    names = {"fresh_weight_total": "g", "fresh_weight_mg_total": "mg", "FreshWeightKg": "kg", "Fresh Weight (mg)": "mg"}
    names |= {"weight_g": "g", "mass_kg": "kg", "mass": "", "total_leaves": "", "weight_ratio": "", "mg_per_plant": ""}
    assert {name: reading.unit_of(name) for name in names} == names


# ---------------------------------------------------------------- random sheets

SPELLINGS = ["{}", " {} ", "title", "spaced", "upper"]


def spelled(name, how):
    other = {"title": name.title(), "spaced": name.replace("_", " "), "upper": name.replace("_", "-").upper()}
    return other.get(how, how.format(name))


def written(grams, style, units):
    """A weight as a person may write it, and the sign of its decimals, "" if it has none, None if it can be both."""
    unit, sign, thousands = units, style[0], style[1:]
    number = f"{grams * reading.PER_GRAM[unit or 'g']:,.7f}".rstrip("0").rstrip(".")
    text = number.translate({ord(","): thousands, ord("."): sign})
    alike = re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", text)
    shown = None if alike else sign if sign in text or (thousands in (",", ".") and thousands in text) else ""
    return text + (f" {unit}" if unit else ""), shown


@st.composite
def sheets(draw):
    """A sheet in a random form, the rows that are meant, and whether it may be refused."""
    some = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    kind = some("xlsx", "xlsx", ",", ";", "\t", "utf-16", "cp1252", "parquet")
    numbers = st.sampled_from([0.1, 0.25, 0.02, 1.5, 1.234, 2.5, 7.125, 12.75, 980.5, 1234.0, 1234.5, 2500.0, 30.0])
    count = draw(st.integers(2, 14))
    grams = draw(st.lists(numbers, min_size=count, max_size=count))
    plants = sorted(
        draw(st.lists(st.sampled_from(["1", "2", "3", "012", "NA", "x 7", "null", ""]), min_size=count, max_size=count))
    )
    style = some(".", ".,", ",", ",.", ", ")  # decimal sign, sign between thousands
    units = draw(st.sampled_from([[""], [""], ["g"], ["mg", "g"], ["kg", "g", ""]]))
    gaps = draw(st.sets(st.integers(0, count - 1), max_size=2))
    own_units = [draw(st.sampled_from(units)) for _ in grams]
    texts = [written(gram, style, unit) for gram, unit in zip(grams, own_units, strict=True)]
    semicolons = kind in (";", "cp1252")
    if (style == ",." or (style == ".," and semicolons)) and not any(sign for _, sign in texts):
        # 1.234 alone is what it says, and 1,234 between semicolons has decimals
        texts = [written(gram, style[0], unit) for gram, unit in zip(grams, own_units, strict=True)]
    plain = kind in ("xlsx", "parquet") and some(True, False)  # numbers in cells, not texts
    cells = [None if n in gaps else grams[n] if plain else texts[n][0] for n in range(count)]
    table = pd.DataFrame(
        {"filename": [f"p{n}.png" for n in range(count)], "plant_number": [plant or None for plant in plants]}
    )
    table = table.astype(object).assign(**{TARGET: cells}, remark=some("", "a, b; c", "verkr\xfcppelt", 'x "y" z', "5"))
    meant = {f"p{n}.png": (plants[n].lstrip("0"), grams[n]) for n in range(count) if n not in gaps and plants[n]}
    shown = [None if n in gaps else texts[n][1] for n in range(count)]
    open_cells = not plain and any(shown[n] is None for n in range(count) if n not in gaps)
    settled = {sign for sign in shown if sign}
    return (
        table,
        kind,
        meant,
        open_cells and not settled,
        draw(st.permutations(list(table))),
        some(*SPELLINGS),
        some(0, 1, 3),
        some(True, False),
    )


def write_random(folder, table, kind, order, how, above, extra):
    """Write the sheet with renamed columns in another order, below other rows, beside another sheet, with merges."""
    table = table[order].rename(columns=lambda name: spelled(name, how))
    if kind == "parquet":
        table.astype("string").to_parquet(path := folder / "labels.parquet")
        return path
    if kind != "xlsx":
        text = "Harvest\n" * above + table.to_csv(
            index=False, sep=kind if len(kind) == 1 else "\t" if kind == "utf-16" else ";"
        )
        (path := folder / "labels.csv").write_bytes(text.encode(kind if len(kind) > 1 else "utf-8"))
        return path
    with pd.ExcelWriter(path := folder / "labels.xlsx") as writer:
        if extra:
            pd.DataFrame({"Notes": ["a"]}).to_excel(writer, sheet_name="Notes", index=False)
        table.to_excel(writer, sheet_name="Data", index=False, startrow=above)
        page, plants = (
            writer.sheets["Data"],
            [plant or None for plant in table[spelled("plant_number", how)].fillna("")],
        )
        column = list(table).index(spelled("plant_number", how)) + 1
        for plant in {*plants} - {None} if extra else ():
            same = [number + 2 + above for number, other in enumerate(plants) if other == plant]
            page.merge_cells(start_row=same[0], end_row=same[-1], start_column=column, end_column=column)
    return path


@settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 100)), deadline=None, derandomize=True)
@given(sheets())
def test_property_random_sheets_give_what_was_meant_or_are_refused_by_name(tmp_path_factory, drawn):
    table, kind, meant, open_to_both, *how = drawn
    path = write_random(tmp_path_factory.mktemp("sheet"), table, kind, *how)
    args = SimpleNamespace(**vars(reading.PLAIN), labels_path=path, target=TARGET)
    args.group_by, args.metadata_columns = ["plant_number"], []
    with listening() as said:
        try:
            labels = reading.load_labels(args)
        except UserError as error:
            assert "\n" not in str(error) and (
                not meant or (open_to_both and "--decimal point or --decimal comma" in str(error))
            ), error
            return
    found = dict(zip(labels["filename"], labels[TARGET], strict=True))
    assert found == pytest.approx({name: grams for name, (_, grams) in meant.items()}), said
    plants = labels["filename"].map(lambda name: meant[name][0])
    assert pd.factorize(labels["_plant"])[0].tolist() == pd.factorize(plants)[0].tolist()
    left_out = sum(int(match[1]) for line in said if (match := re.match(r"dropped (\d+) rows", line)))
    assert left_out == len(table) - len(labels)


# ---------------------------------------------------------------- photos


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(folder / name, "PNG")


PLACES = {  # kind: photos, the name in the sheet, which of them it is (None: a fault), what is told
    "no suffix": (["a.png", "b.png"], "a", "a.png", "without suffix"),
    "another suffix": (["a.png"], "a.tif", "a.png", "without suffix"),
    "a number": (["101.png"], "101.0", "101.png", "without suffix"),
    "a point in the name": (["a.1.png", "a.png"], "a.1", "a.1.png", "without suffix"),
    "in a subfolder": (["tray/a.png", "b.png"], "a.png", "tray/a.png", "in a subfolder"),
    "in a subfolder without suffix": (["tray/a.png"], "A", "tray/a.png", "in a subfolder"),
    "a path": (["tray/a.png", "box/a.png"], "tray\\a.png", "tray/a.png", ""),
    "accents apart": ([unicodedata.normalize("NFD", "t\xe1lca.png")], "t\xe1lca.png", 0, ""),
    "accents together": (["t\xe1lca.png"], unicodedata.normalize("NFD", "T\xe1lca.png"), 0, ""),
    "the very name first": (["a.png", "tray/a.png"], "a.png", "a.png", ""),
    "two subfolders": (["tray/a.png", "box/a.png"], "a.png", None, "several files"),
    "two suffixes": (["a.png", "a.jpg"], "a", None, "several files"),
    "another folder": (["tray/a.png"], "box/a.png", None, "no such file"),
    "a hidden folder": ([".ipynb_checkpoints/a.png", "@eaDir/a.png", "b.png"], "a.png", None, "no such file"),
    "no photo": (["a.txt"], "a", None, "no such file"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_photo_is_found_where_one_fits_its_name(kind, tmp_path):
    photos, name, wanted, told = PLACES[kind]
    touch(tmp_path, *photos)
    wanted = photos[wanted] if wanted == 0 else wanted
    with listening() as said:
        ((path, fault),) = reading.find_photos(pd.Series([name]), tmp_path).to_numpy()
    assert bool(fault) == (wanted is None) and re.search(told, fault or " ".join(said))
    assert wanted is None or os.path.samefile(path, tmp_path / wanted)
    assert wanted is None or bool(told) == bool(said)


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_links_and_what_a_system_made_are_named(tmp_path):
    touch(tmp_path / "elsewhere", "a.png", "b.png")
    touch(tmp_path / "photos", "c.png", "__MACOSX/c.png", ".hidden.png", "d/e.png")
    (tmp_path / "photos" / "notes.txt").touch()
    (tmp_path / "photos" / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    with listening() as said:
        faults = reading.find_photos(pd.Series(["a.png", "b.png", "c.png"]), tmp_path / "photos")["_fault"]
    assert faults.tolist() == ["is a link that leads out of the image folder", "no such file", ""]
    assert len(said) == 1 and "2 hidden or made by a system, 1 links to folders, 1 no photos" in said[0]


def encoded(array, kind="TIFF", **how):
    Image.fromarray(array).save(made := io.BytesIO(), kind, **how)
    return made.getvalue()


def broken_exif():
    (info := PngImagePlugin.PngInfo()).add(b"eXIf", b"II*\x00\xff\xff\xff\x7f")
    return encoded(PIXELS, "PNG", pnginfo=info)


FULL = np.linspace(0, 255, PIXELS.size).round().astype(np.uint8).reshape(PIXELS.shape)  # holds 255
PHOTOS = {  # kind: the file, what its pixels look like, its note
    "float": (encoded(FULL / np.float32(255)), FULL, "from 0 to 1$"),
    "float up to 255": (encoded(FULL.astype(np.float32)), FULL, "from 0 to 255$"),
    "float with gaps": (encoded(np.where(FULL == 0, np.nan, FULL / np.float32(255)).astype(np.float32)), FULL, "to 1$"),
    "32 bits": (encoded(FULL.astype(np.int32) * 257), FULL, ""),
    "16 bits": (encoded(FULL.astype(np.uint16) * 257), FULL, ""),
    "12 bits": (encoded(FULL.astype(np.uint16) * 16), FULL * 0.9961, "from 0 to 4095$"),
    "10 bits, PNG": (encoded(FULL.astype(np.uint16) * 4, "PNG"), FULL * 0.997, "from 0 to 1023$"),
    "bad EXIF": (broken_exif(), PIXELS, "EXIF|^$"),
    "bmp": (encoded(PIXELS, "BMP"), PIXELS, ""),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_a_photo_looks_as_it_was_meant(kind, tmp_path):
    made, looks, note = PHOTOS[kind]
    photo = reading.open_photo(made)
    assert np.abs(np.asarray(photo, float) - looks[..., None]).max() <= 1
    assert re.search(note, photo.info["note"]) and bool(note) == bool(photo.info["note"] or kind == "bad EXIF")
    (tmp_path / "a.png").write_bytes(made)
    table = pd.DataFrame({"filename": ["a.png"], "_path": [str(tmp_path / "a.png")], "_fault": ""})
    with listening() as said:
        reading.look_at_files(table, {})
    assert len(said) == bool(photo.info["note"]) and all("a.png" in line for line in said)


@pytest.mark.parametrize("made, fault", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "it is a Git LFS pointer"),
    (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64), "HEIC|unreadable"),
    (encoded(np.zeros((15000, 20000), bool), "PNG"), "."),
])  # fmt: skip
def test_a_file_that_is_no_photo_says_what_it_is(made, fault, tmp_path):
    began = time.monotonic()
    with pytest.raises(Exception) as stopped:
        reading.open_photo(made)
    assert re.search(fault, reading.fault_of(stopped.value)) and time.monotonic() - began < 5
    assert "HEIC" not in fault or "pip install pillow-heif" in str(stopped.value)


# ---------------------------------------------------------------- through the scripts


def called(main, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def test_the_written_sheet_is_read_as_the_one_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.setattr(eda, "FIGURES", ())
    photos = [f"tray{n % 2}/p{n:02}.png" for n in range(12)]
    touch(tmp_path / "photos", *photos)
    texts = ["0,1", "150 mg", "0,2 g", "ca. 0.3", "1,234", "0.35", None, "0,45", "0,5", "5 oz", "1-May", "0,65"]
    table = rows(light=["1,234", "0,5", "n.d."] * 4, remark='a\n"b", c; d', lid=[True, False] * 6)
    table = table.assign(filename=[f"p{n:02}" for n in range(12)], **{TARGET: texts}, plant_number=["007", "NA"] * 6)
    table.rename(columns={"filename": "Photo"}).to_csv(tmp_path / "labels.csv", index=False, sep=";", encoding="cp1252")
    places = ["--image_dir", tmp_path / "photos", "--figures_dir", tmp_path, "--summary_path", tmp_path / "s.json"]
    flags = ["--metadata_columns", "light", "lid"]

    def read(path, *more):
        args = tm.build_parser().parse_args([*map(str, ["--labels_path", path, *places[:2], *flags, *more])])
        labels = reading.load_labels(args)
        paths = reading.find_photos(labels["filename"], args.image_dir)["_path"]
        return labels.assign(
            _path=paths, _seen=[*reading.encode_metadata(labels, reading.plan_metadata(labels, flags[1:]))]
        )

    first = read(tmp_path / "labels.csv", "--filename_column", "photo")
    clean = tmp_path / "clean.csv"
    sheet = ["--labels_path", tmp_path / "labels.csv", "--filename_column", "photo", "--write_labels", clean]
    assert called(eda.main, *sheet, *places)[0] == 0
    with listening() as said:
        second = read(clean)
    assert not [line for line in said if "was read with" in line] and len(first) == len(second) == 7
    for column in (TARGET, "_plant", "_path"):
        assert first[column].tolist() == second[column].tolist(), column
    assert np.array_equal([*first["_seen"]], [*second["_seen"]])
    written = pd.read_csv(clean)
    assert list(written)[:3] == ["filename", "plant_number", TARGET] and written["filename"].tolist() == photos
    assert written["left_out_because"].notna().sum() == 5 and "5 oz" in written["left_out_because"][9]


def test_eda_of_a_small_sheet_draws_what_it_can_and_says_what_not(tmp_path, run_script):
    touch(tmp_path / "photos", *rows()["filename"])
    rows().to_csv(tmp_path / "labels.csv", index=False)
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = run_script("eda.py", "--labels_path", "labels.csv", "--image_dir", "photos", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "12 rows, 12 photos" in done.stdout
    assert "nan" not in done.stdout.lower().replace(str(tmp_path).lower(), "")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    lines = [line for line in done.stdout.splitlines() if line.startswith("not drawn")]
    assert len(lines) == 1 and all(
        (f"{plot.__name__}.png" in lines[0]) != (f"{plot.__name__}.png" in drawn) for plot in eda.FIGURES
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_predict_takes_photos_of_odd_folders_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    folder = tmp_path / "photos" / os.fsdecode(b"verkr\xfcppelt")
    touch(folder, "a.bmp", "b.jfif", "sub/.ipynb_checkpoints/c.png", "@eaDir/d.png", "Thumbs.db")
    shutil.copy(folder / "a.bmp", folder / "sub" / "e.png")
    args = predict.build_parser().parse_args([str(tmp_path / "photos"), "--recursive"])
    checkpoint = type("Checkpoint", (), {"metadata": [], "target": TARGET})
    with listening() as said:
        found = predict.find_rows(args, checkpoint)
        found = reading.look_at_files(found, {}, decode=True)
    assert [Path(name).name for name in found["filename"]] == ["a.bmp", "b.jfif", "e.png"] and not any(found["_fault"])
    assert len(said) == 1 and "3 hidden or made by a system" in said[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert predict.build_parser().parse_args(["~/photos", "--out", "~/a.csv"]).out == tmp_path / "a.csv"

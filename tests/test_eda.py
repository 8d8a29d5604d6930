"""eda.py: its numbers against plain recomputations, every drawn fault by name, every mistake in one line."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image
from sklearn.model_selection import GroupKFold

import eda
from biomass import plant, reading, writing

FIGURES = ["target_distribution.png", "sample_images.png", "correlation_heatmap.png"]
FIGURES += ["age_vs_biomass.png", "image_pixel_analysis.png", "green_area_vs_biomass.png"]


def explore(out, *arguments):
    """Run main() with its files under `out`; return the summary."""
    places = ["--figures_dir", out / "figures", "--summary_path", out / "results" / "eda_summary.json"]
    assert eda.main([*map(str, [*arguments, *places])]) == 0
    text = (out / "results" / "eda_summary.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def status_of(arguments):
    try:
        return eda.main([*map(str, arguments)])
    except SystemExit as stop:  # of the parser
        return stop.code


def read_sheet(folder):
    return pd.read_excel(folder / "digital_biomass_labels.xlsx")


def write_data(folder, sheet, photos=3):
    (folder / "images_med_res").mkdir(parents=True)
    sheet.to_excel(folder / "digital_biomass_labels.xlsx", index=False)
    for number, name in enumerate(sheet["filename"].head(photos)):
        Image.new("RGB", (40, 40), (60, 50 + number, 40)).save(folder / "images_med_res" / name)
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(eda, "FIGURES", ())  # saves seconds where a test looks at the summary alone


@pytest.fixture(scope="session")
def explored(once, drawn):
    out = once("explored", lambda folder: explore(folder, "--data_dir", drawn))
    return out, json.loads((out / "results" / "eda_summary.json").read_text())


def test_summary_tells_what_the_sheet_holds_and_finds_no_fault_in_a_clean_one(drawn, explored):
    sheet, (_, summary) = read_sheet(drawn), explored
    weights = sheet["fresh_weight_total"].dropna()
    expected = {"count": len(weights), "mean": sum(weights) / len(weights), "std": np.std(weights, ddof=1)}
    expected |= {"min": min(weights), "max": max(weights)}
    expected |= {name: np.percentile(weights, float(name[:-1])) for name in ("25%", "50%", "75%")}
    assert summary["fresh_weight_stats"] == pytest.approx(expected)
    repeats = sheet.groupby("plant_number").size()
    expected = {
        "num_records": 60,
        "num_images_on_disk": 60,
        "num_labeled": len(weights),
        "pct_labeled": len(weights) / 60,
        "age_missing_pct": sum(age != age for age in sheet["age_days"]) / 60,
        "target_missing_pct": 1 - len(weights) / 60,
        "plants_with_multiple_samples": sum(repeats > 1),
        "max_images_per_plant": max(repeats),
        "timestamp_span_days": (max(sheet["timestamp"]) - min(sheet["timestamp"])) / 86400,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    after = ["data_quality_issues", "audit", "baselines", "drawn_data"]
    assert {*summary} == {*expected, "fresh_weight_stats", *after} and list(summary)[-4:] == after
    assert all(fault == {"count": 0, "found": []} for fault in summary["audit"]["faults"].values())
    facts, empty = summary["audit"]["facts"], sheet.isna().mean()
    assert facts["rows_that_training_drops"] == {"without fresh_weight_total": 60 - len(weights)}
    assert facts["missing_share"] == pytest.approx(empty[empty > 0].to_dict()) and facts["photo_sizes"] == {
        "256x256": 60
    }
    pots = sheet[["experiment_id", "plant_number"]].drop_duplicates()["plant_number"].value_counts()
    assert [*facts["plants"].values()] == [len(pots), sum(pots > 1), sum(pots)]
    assert {"fresh_weight_shoot", "dry_weight_shoot"} <= {*facts["columns_that_tell_the_answer"]}


def test_figures_are_whole_pictures(explored):
    out, _ = explored
    assert sorted(path.name for path in (out / "figures").iterdir()) == sorted(FIGURES)  # and no .partial
    for name in FIGURES:
        path = out / "figures" / name
        with Image.open(path) as file:
            assert file.width / file.info["dpi"][0] == pytest.approx(6.5, abs=0.01), "not of a page's width"
            pixels = np.asarray(file.convert("L"), dtype=float)
        assert pixels.std() > 10 and path.stat().st_size < 400_000, name
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.min() > 250, f"{name} is cut off"


def test_figures_show_the_numbers_of_the_data(drawn):
    images, target = drawn / "images_med_res", "fresh_weight_total"
    args = eda.build_parser().parse_args(["--data_dir", str(drawn)])
    reading.complete_data_flags(args)
    args.label = "weight (g)"
    sheet, *_ = eda.load_sheet(args)
    photos = eda.scan_photos(sheet["filename"], images)
    for name in sheet["filename"][:3]:
        pixels = np.asarray(Image.open(images / name), dtype=float)
        assert list(photos.loc[name, eda.CHANNELS]) == pytest.approx(list(pixels.mean(axis=(0, 1)) / 255))

    def draw(plot):
        figure = Figure()
        plot(figure, sheet, photos, args)
        return figure.axes

    titles = [axes.get_title() for axes in draw(eda.sample_images)]
    weights = [float(title.split(": ")[1].split(" g")[0]) for title in titles]
    rows = [int(title.split(":")[0].removeprefix("row ")) - 2 for title in titles]
    assert weights == pytest.approx([sheet[target][row] for row in rows], rel=1e-3)
    assert weights == sorted(weights) and len(weights) == 12
    (axes,) = draw(eda.correlation_heatmap)
    columns = [label.get_text() for label in axes.get_xticklabels()]
    lines = [label.get_text() for label in axes.get_yticklabels()]
    pairs = [(line, column) for i, line in enumerate(lines) for column in columns[: i + 1]]
    assert columns[0] == target and len(axes.texts) == len(pairs)
    for (line, column), text in zip(pairs, axes.texts, strict=True):
        both = sheet[[line, column]].dropna().to_numpy().T
        assert float(text.get_text()) == pytest.approx(np.corrcoef(*both)[0, 1], abs=0.0051)


def test_the_figure_of_ages_shows_each_weight_at_its_age_and_the_medians(drawn):
    args = eda.build_parser().parse_args(["--data_dir", str(drawn)])
    args.label, sheet, figure = "weight (g)", read_sheet(drawn), Figure()
    eda.age_vs_biomass(figure, sheet, None, args)
    both = sheet.dropna(subset=["age_days", "fresh_weight_total"])
    for axes in figure.axes:
        ages, weights = axes.collections[0].get_offsets().T
        assert weights.tolist() == both["fresh_weight_total"].tolist()
        assert np.abs(ages - both["age_days"].to_numpy()).max() <= 1.5  # the jitter
        (medians,) = (line for line in axes.lines if line.get_label() == "median")
        wanted = both["fresh_weight_total"].groupby((both["age_days"] / 7).round() * 7).median()
        assert dict(zip(*medians.get_data(), strict=True)) == pytest.approx(wanted.to_dict())


def test_drawn_data_are_called_so(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eda, "FIGURES", (eda.image_pixel_analysis,))
    data = write_data(tmp_path / "data", read_sheet(drawn))
    (data / reading.DRAWN_MARK).touch()
    assert explore(tmp_path, "--data_dir", data)["drawn_data"] is True
    assert "drawn data, not measured" in capsys.readouterr().out
    with Image.open(tmp_path / "figures" / "image_pixel_analysis.png") as file:
        assert np.asarray(file.convert("L"))[-12:, -160:].min() < 200, "no small print at the bottom"


def test_every_drawn_fault_is_found_and_named(faulty, tmp_path, capsys, no_figures):
    summary = explore(tmp_path, "--data_dir", faulty)
    sheet, photos = pd.read_excel(faulty / "digital_biomass_labels.xlsx", dtype=object), faulty / "images_med_res"
    on_disk, names = {path.name for path in photos.iterdir()}, sheet["filename"]
    faults = summary["audit"]["faults"]

    def only(name):
        assert faults[name]["count"] == len(faults[name]["found"]) == 1, name
        return faults[name]["found"][0]

    typed = sheet["fresh_weight_total"]
    row = next(i for i, cell in typed.items() if isinstance(cell, str))
    assert only("text_weights") == f"row {row + 2} ({names[row]}): {typed[row]}"
    row = next(i for i, cell in typed.items() if isinstance(cell, float) and cell < 0)
    assert only("negative_weights") == f"row {row + 2} ({names[row]}): {typed[row]}"
    assert only("wrong_totals").startswith(f"row {row + 2} ")  # a total below zero is no sum of its parts
    row = sheet.index[names.duplicated()][0]
    assert only("rows_twice").startswith(f"row {row + 2} ({names[row]})")
    (missing,) = set(names) - on_disk
    assert only("missing_photos").endswith(f"({missing}): no such file")
    assert faults["unused_photos"]["found"] == sorted(on_disk - set(names))
    modes, pixels = {}, {}
    for name in sorted(on_disk):
        with Image.open(photos / name) as file:
            modes[name] = file.mode
            try:
                pixels.setdefault(file.convert("RGB").tobytes(), []).append(name)
            except OSError as error:
                assert only("unreadable_photos") == f"{name}: unreadable photo ({error})"
                del modes[name]
    odd = [f"{name}: mode {mode}" for name, mode in modes.items() if mode != "RGB"]
    assert len(odd) == 3 and faults["photos_not_rgb"]["found"] == odd
    (twins,) = (names for names in pixels.values() if len(names) > 1)
    assert only("photos_under_several_names") == " = ".join(twins)
    console = capsys.readouterr().out
    assert all(found in console for fault in faults.values() for found in fault["found"])


def test_faults_that_are_not_drawn_are_found_too(drawn, tmp_path, no_figures):
    sheet = read_sheet(drawn).astype({"fresh_weight_total": object})
    bad, twice = sheet.index[sheet["fresh_weight_total"].notna()][:2]
    sheet.loc[bad, "fresh_weight_total"] = "ca. 0.3"
    sheet = pd.concat([sheet, sheet.loc[[twice]].assign(fresh_weight_total=9.5)], ignore_index=True)
    data = write_data(tmp_path / "data", sheet, photos=len(sheet) - 1)
    (data / "images_med_res" / sheet["filename"][bad]).write_bytes(b"no photo")
    faults, name = explore(tmp_path, "--data_dir", data)["audit"]["faults"], sheet["filename"][bad]
    assert faults["cells_not_numbers"]["found"] == [f"row {bad + 2} ({name}): ca. 0.3 in fresh_weight_total"]
    assert [text.split()[1] for text in faults["photos_with_several_weights"]["found"]] == [str(twice + 2), "62"]
    assert faults["unreadable_photos"]["found"] == [f"{name}: unreadable photo (it is no photo)"]


def test_green_area_counts_leaf_and_its_law_bears_photos_without():
    photo = Image.new("RGB", (100, 100), (120, 100, 90))
    photo.paste((90, 140, 50), (0, 0, 50, 50))
    assert plant.green_area(photo) == pytest.approx(0.25, abs=0.01)
    warm = Image.fromarray((np.asarray(photo) * [1.45, 1.12, 0.6]).clip(0, 255).astype(np.uint8))
    assert plant.green_area(warm) == pytest.approx(0.25, abs=0.01)
    areas = np.array([0.0, 0.01, 0.02, 0.05, 0.2])
    law, weight_of = plant.fit_law(areas, 8 * areas**1.2 + (areas == 0))
    assert (law["a"], law["b"], law["smearing_factor"]) == pytest.approx((8, 1.2, 1))
    assert weight_of(areas) == pytest.approx(8 * np.maximum(areas, 0.01) ** 1.2)


@pytest.mark.parametrize("group_by", [["plant_number"], ["experiment_id", "plant_number"]])
def test_baselines_equal_a_plain_recomputation(drawn, tmp_path, group_by, no_figures):
    baselines = explore(tmp_path, "--data_dir", drawn, "--group_by", *group_by, "--seed", 7)["baselines"]
    sheet = read_sheet(drawn).dropna(subset="fresh_weight_total")
    areas = np.array([plant.green_area(Image.open(drawn / "images_med_res" / name)) for name in sheet["filename"]])
    grams = sheet["fresh_weight_total"].to_numpy()
    labels = [tuple(row) for row in sheet[group_by].to_numpy()]
    groups = np.array([sorted(set(labels)).index(label) for label in labels])
    assert (areas > 0).all() and baselines["green_area_law"]["rows_without_green"] == 0
    assert (baselines["rows"], baselines["groups"]) == (len(grams), len(set(labels)))
    errors = {"training_mean": [], "green_area_law": []}
    for train, test in GroupKFold(5, shuffle=True, random_state=7).split(areas, groups=groups):
        errors["training_mean"] += list(grams[test] - sum(grams[train]) / len(train))
        x, y = np.log(areas[train]), np.log(grams[train])
        b = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        residuals = y - y.mean() - b * (x - x.mean())
        guess = np.exp(y.mean() + b * (np.log(np.maximum(areas[test], areas[train].min())) - x.mean()))
        errors["green_area_law"] += list(grams[test] - guess * np.exp(residuals).mean())
    for name, missed in errors.items():
        squares = sum(error**2 for error in missed)
        expected = {"rmse": (squares / len(grams)) ** 0.5, "r2": 1 - squares / ((grams - grams.mean()) ** 2).sum()}
        assert {key: baselines[name][key] for key in expected} == pytest.approx(expected), name
        low, high = baselines[name]["rmse_ci95"]
        assert low < baselines[name]["rmse"] < high


def test_command_line_makes_the_same_bytes(drawn, explored, run_script, tmp_path):
    out, _ = explored
    done = run_script("eda.py", "--data_dir", drawn, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""  # no bar in a log
    assert "RMSE" in done.stdout and "eda_summary.json" in done.stdout
    for name in [*(f"figures/{name}" for name in FIGURES), "results/eda_summary.json"]:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_other_sheets_tell_the_same(drawn, explored, tmp_path, no_figures):
    sheet, images = read_sheet(drawn), ["--image_dir", drawn / "images_med_res"]
    sheet.to_csv(tmp_path / "german.csv", sep=";", decimal=",", index=False)
    ids = sheet["plant_number"].astype(object).where(sheet.index % 2 == 0, sheet["plant_number"].astype(str) + ".0")
    dates = pd.to_datetime(sheet["timestamp"], unit="s", utc=True)
    sheet.assign(plant_number=ids.astype(str), timestamp=dates).to_parquet(tmp_path / "typed.parquet")
    for name in ("german.csv", "typed.parquet"):
        summary = explore(tmp_path, "--labels_path", tmp_path / name, *images)
        told = "; ".join(summary["audit"].pop("readings"))
        assert bool(told) == ("semicolons between columns; decimal commas in" in told) == (name == "german.csv")
        wanted = {**explored[1], "audit": {**explored[1]["audit"]}, "drawn_data": None}
        wanted["audit"].pop("readings")
        assert {**summary, "drawn_data": None} == wanted, name


def test_a_mistake_stops_in_one_line_and_writes_nothing(drawn, tmp_path, capsys, monkeypatch):
    cwd, sheet, torn = tmp_path / "cwd", read_sheet(drawn), tmp_path / "torn.xlsx"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(eda, "scan_photos", lambda *_: pytest.fail("passes over the photos before it looks"))
    labels, data = drawn / "digital_biomass_labels.xlsx", ["--data_dir", drawn]
    sheet.rename(columns={"fresh_weight_total": "fresh_weight_totl"}).to_excel(tmp_path / "typo.xlsx", index=False)
    torn.write_bytes(labels.read_bytes()[:4000])
    for arguments, words in (
        (["--data_dir", "nowhere"], ["nowhere", "--data_dir", "make_sample_data.py"]),
        ([*data, "--image_dir", "none"], ["none", "--image_dir"]),
        ([*data, "--labels_path", tmp_path / "typo.xlsx"], ["'fresh_weight_total'", "'fresh_weight_totl'"]),
        ([*data, "--group_by", "plant_no"], ["'plant_no'", "'plant_number'"]),
        ([*data, "--labels_path", torn], ["torn.xlsx", "cannot read"]),
        ([*data, "--figures_dir", torn], ["torn.xlsx"]),
        ([*data, "--summary_path", tmp_path], ["cannot write", "it is a folder"]),
        ([*data, "--seed", "-1"], ["--seed"]),
        ([*data, "--target", "filename"], ["no row", "--target"]),
        ([*data, "--summary_path", labels], ["cannot write", "it is an input"]),
        ([*data, "--figures_dir", drawn / "images_med_res"], ["among the photos"]),
    ):
        assert status_of(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("eda.py: error: "), error
        assert all(word in error for word in words), error
        assert not [path for path in cwd.rglob("*") if path.is_file()], arguments


def test_a_full_disk_leaves_each_file_whole(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eda, "FIGURES", (eda.image_pixel_analysis,))
    picture = tmp_path / "image_pixel_analysis.png"
    picture.write_bytes(b"old")

    def fill_up(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(writing.os, "replace", fill_up)
    assert status_of(["--data_dir", drawn, "--figures_dir", tmp_path, "--summary_path", tmp_path / "s.json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and str(picture) in error
    assert picture.read_bytes() == b"old" and [*tmp_path.iterdir()] == [picture]


@pytest.mark.skipif(os.name == "nt", reason="no signal of one's own")
def test_ctrl_c_stops_in_one_line(tmp_path, run_script, monkeypatch):
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_script("eda.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "eda.py: interrupted\n")


@pytest.mark.parametrize("case", ["one row, no photos", "constant weights", "enormous weights, ids of all kinds"])
def test_odd_data_is_borne(case, drawn, tmp_path, capsys):
    sheet, groups = read_sheet(drawn).astype({"plant_number": object}), ["fresh_weight_total", "filename"]
    if case == "constant weights":
        sheet["fresh_weight_total"] = -0.3
    elif case.startswith("one row"):
        sheet, groups = sheet[["filename", "fresh_weight_total"]].dropna().head(1), ["filename"]
    else:
        sheet["fresh_weight_total"] = 10.0 ** (sheet.index * 5)
        sheet.loc[:3, "plant_number"] = [pd.Timestamp("2021-03-12"), "12a", True, 0.5]
    data = write_data(tmp_path / "data", sheet, photos=0 if len(sheet) == 1 else 3)
    summary = explore(tmp_path, "--data_dir", data, "--group_by", *groups)
    assert summary["num_records"] == len(sheet) and summary["drawn_data"] is False
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="no pipes, and links need rights")
def test_photos_are_found_in_other_letter_case_and_never_outside_the_folder(tmp_path, no_figures):
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(["Leaf.PNG", "extra.png", "../secret.png"]):
        Image.new("RGB", (40, 40), (60, 50 + number, 40)).save(images / name)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(images / "pipe.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
    sheet = pd.DataFrame({"filename": ["leaf.png", "none.png", "pipe.png", *outside]})
    sheet.assign(leaf_weight=0.5, pot=1).to_excel(tmp_path / "sheet.xlsx", index=False)
    places = ["--labels_path", tmp_path / "sheet.xlsx", "--image_dir", images]
    faults = explore(tmp_path / "out", *places, "--target", "leaf_weight", "--group_by", "pot")["audit"]["faults"]
    assert faults["missing_photos"]["found"] == [
        "row 3 (none.png): no such file",
        *(f"row {5 + row} ({name}): leads out of the image folder" for row, name in enumerate(outside[:2])),
        "row 7 (link.png): is a link that leads out of the image folder",
    ]
    assert faults["unreadable_photos"]["found"] == ["pipe.png: unreadable photo (it is no ordinary file)"]
    assert "extra.png" in faults["unused_photos"]["found"] and "Leaf.PNG" not in faults["unused_photos"]["found"]


def test_what_needs_no_torch_imports_where_there_is_none_and_help_is_there_at_once(tmp_path):
    blocked = "torch torchvision timm accelerate openvino".split()
    code = f"""if True:
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {blocked}:
                    raise ImportError(name)
        sys.meta_path.insert(0, Blocked())
        import eda, biomass.reading, biomass.plant, biomass.writing
        heavy = [name for name in ("sklearn", "seaborn", "matplotlib", "scipy.stats", "skimage") if name in sys.modules]
        sys.exit(f"imported before they are needed: {{heavy}}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.copy(ROOT / "eda.py", tmp_path)
    done = subprocess.run([sys.executable, "eda.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "eda.py needs the folder biomass/ beside it" in done.stderr
    assert done.stderr.count("\n") == 1

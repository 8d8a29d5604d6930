"""eda.py: every number against a plain recomputation, every drawn fault by name, every mistake in one line."""

import argparse
import json
import os
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.model_selection import GroupKFold

import eda
import outputs

FIGURES = [
    "target_distribution.png",
    "sample_images.png",
    "correlation_heatmap.png",
    "age_vs_biomass.png",
    "image_pixel_analysis.png",
    "green_area_vs_biomass.png",
]


def explore(out, *arguments):
    """Run main() with its files under `out`; return the summary."""
    places = ["--figures_dir", str(out / "figures"), "--summary_path", str(out / "results" / "eda_summary.json")]
    assert eda.main([*map(str, arguments), *places]) == 0
    return read_strict_json(out / "results" / "eda_summary.json")


def read_strict_json(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def read_sheet(folder):
    return pd.read_excel(folder / "digital_biomass_labels.xlsx")


def copy_sheet(folder, sheet):
    """A data folder with this sheet and three photos."""
    photos = folder / "images_med_res"
    photos.mkdir(parents=True)
    sheet.to_excel(folder / "digital_biomass_labels.xlsx", index=False)
    for name in sheet["filename"].head(3):
        Image.new("RGB", (40, 40), (60, 50 + len(list(photos.iterdir())), 40)).save(photos / name)
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Saves seconds where a test looks at the summary alone."""
    monkeypatch.setattr(eda, "FIGURES", ())


@pytest.fixture(scope="module")
def explored(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("explored")
    return out, explore(out, "--data_dir", drawn)


def test_summary_tells_what_the_sheet_holds(drawn, explored):
    sheet, (_, summary) = read_sheet(drawn), explored
    weights = sorted(weight for weight in sheet["fresh_weight_total"] if weight == weight)
    mean = sum(weights) / len(weights)
    std = (sum((weight - mean) ** 2 for weight in weights) / (len(weights) - 1)) ** 0.5
    quartiles = dict(
        zip(["min", "25%", "50%", "75%", "max"], np.quantile(weights, [0, 0.25, 0.5, 0.75, 1]), strict=True)
    )
    assert summary["fresh_weight_stats"] == pytest.approx({"count": len(weights), "mean": mean, "std": std} | quartiles)
    repeats = [list(sheet["plant_number"]).count(number) for number in set(sheet["plant_number"])]
    expected = {
        "num_records": 60,
        "num_images_on_disk": 60,
        "num_labeled": len(weights),
        "pct_labeled": len(weights) / 60,
        "age_missing_pct": sum(age != age for age in sheet["age_days"]) / 60,
        "target_missing_pct": 1 - len(weights) / 60,
        "plants_with_multiple_samples": sum(count > 1 for count in repeats),
        "max_images_per_plant": max(repeats),
        "timestamp_span_days": (max(sheet["timestamp"]) - min(sheet["timestamp"])) / 86400,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    after = ["fresh_weight_stats", "data_quality_issues", "audit", "baselines"]
    assert sorted(summary) == sorted([*expected, *after])


def test_clean_set_has_facts_and_no_faults(drawn, explored):
    sheet, (_, summary) = read_sheet(drawn), explored
    assert set(summary["audit"]["faults"]) == set(eda.FAULTS)
    assert all(fault == {"count": 0, "found": []} for fault in summary["audit"]["faults"].values())
    facts = summary["audit"]["facts"]
    assert facts["missing_share"] == pytest.approx({name: sum(sheet[name].isna()) / 60 for name in sheet})
    assert facts["photo_sizes"] == {"256x256": 60} and facts["photo_modes"] == {"RGB": 60}
    pairs = set(zip(sheet["experiment_id"], sheet["plant_number"], strict=True))
    numbers = [number for _, number in pairs]
    several = {number for number in numbers if numbers.count(number) > 1}
    assert facts["plants"]["plants"] == len(pairs)
    assert facts["plants"]["plant_numbers_in_several_experiments"] == len(several)
    assert {*eda.HARVEST_COLUMNS} <= {*facts["columns_that_tell_the_answer"]}
    r = np.corrcoef(*sheet[["fresh_weight_total", "fresh_weight_shoot"]].dropna().to_numpy().T)[0, 1]
    assert facts["columns_that_tell_the_answer"]["fresh_weight_shoot"] == pytest.approx(r)
    outliers = []
    for age in (7, 14, 21, 28):
        logs = np.log(sheet.loc[sheet["age_days"] == age, "fresh_weight_total"].dropna())
        low, high = np.quantile(logs, [0.25, 0.75])
        reach = 1.5 * (high - low)
        outliers += [row for row, log in logs.items() if not low - reach <= log <= high + reach]
    named = [f"row {row + 2} ({sheet['filename'][row]})" for row in sorted(outliers)]
    assert [text.split(":")[0] for text in facts["weight_outliers_at_age"]] == named
    issues = " | ".join(summary["data_quality_issues"])
    assert f"{len(several)} of {len(set(numbers))} plant numbers" in issues and f"make {len(pairs)} plants" in issues


def test_figures_are_whole_pictures(explored):
    out, _ = explored
    assert sorted(path.name for path in (out / "figures").iterdir()) == sorted(FIGURES)  # and no .partial
    for name in FIGURES:
        path = out / "figures" / name
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("L"), dtype=float)
        assert 1000 <= pixels.shape[1] <= 2000 and 400 <= pixels.shape[0] <= 2000, name
        assert pixels.std() > 10 and path.stat().st_size < 700_000, name
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.min() > 250, f"{name} is cut off"


def test_figures_show_the_numbers_of_the_data(drawn):
    sheet, _ = eda.load_labels(drawn / "digital_biomass_labels.xlsx", "fresh_weight_total", ["plant_number"])
    photos = eda.scan_photos(eda.PhotoFolder(drawn / "images_med_res"), sheet["filename"])
    for name in sheet["filename"][:3]:
        pixels = np.asarray(Image.open(drawn / "images_med_res" / name), dtype=float)
        means = [pixels[:, :, channel].sum() / 256**2 / 255 for channel in range(3)]
        assert list(photos.loc[name, eda.CHANNELS]) == pytest.approx(means)
    args = argparse.Namespace(target="fresh_weight_total", seed=42, image_dir=drawn / "images_med_res")

    def sample_titles(seed):
        args.seed = seed
        return [axes.get_title() for axes in eda.sample_images(sheet, photos, args).axes]

    titles = sample_titles(42)
    weights = [float(title.split(": ")[1].split(" g")[0]) for title in titles]
    rows = [int(title.split(":")[0].removeprefix("row ")) - 2 for title in titles]
    labelled = sheet["fresh_weight_total"].dropna()
    assert weights == pytest.approx([sheet["fresh_weight_total"][row] for row in rows], rel=1e-3)
    assert weights == sorted(weights) and len(weights) == 12
    assert weights[0] <= labelled.quantile(0.1) and weights[-1] >= labelled.quantile(0.9)
    assert sample_titles(42) == titles != sample_titles(43)

    axes = eda.correlation_heatmap(sheet, photos, args).axes[0]
    columns = [label.get_text().removesuffix(" *") for label in axes.get_xticklabels()]
    lines = [label.get_text().removesuffix(" *") for label in axes.get_yticklabels()]
    shown = [text.get_text().split("\n") for text in axes.texts]
    pairs = [(line, column) for i, line in enumerate(lines) for column in columns[: i + 1]]
    assert columns[0] == "fresh_weight_total" and len(shown) == len(pairs)
    for (line, column), (r, n) in zip(pairs, shown, strict=True):
        both = sheet[[line, column]].dropna().to_numpy().T
        assert int(n) == both.shape[1] and float(r) == pytest.approx(np.corrcoef(*both)[0, 1], abs=0.0051)
    with_target = [float(r) for (_, column), (r, _) in zip(pairs, shown, strict=True) if column == columns[0]]
    assert with_target == sorted(with_target, reverse=True)

    ticks = [label.get_text() for label in eda.age_vs_biomass(sheet, photos, args).axes[0].get_xticklabels()]
    counts = sheet.dropna(subset="fresh_weight_total").groupby("age_days").size()
    assert ticks == [f"{age:g}\nn = {count}" for age, count in counts.items()]


def test_every_drawn_fault_is_found_and_named(faulty, tmp_path, capsys, no_figures):
    summary = explore(tmp_path, "--data_dir", faulty)
    sheet, photos = pd.read_excel(faulty / "digital_biomass_labels.xlsx", dtype=object), faulty / "images_med_res"
    on_disk = {path.name for path in photos.iterdir()}
    faults = summary["audit"]["faults"]

    def only(name):
        assert faults[name]["count"] == len(faults[name]["found"]) == 1, name
        return faults[name]["found"][0]

    typed = sheet["fresh_weight_total"]
    row = next(i for i, cell in typed.items() if isinstance(cell, str))
    read_as = float(typed[row].replace(",", "."))
    assert only("text_weights") == f"row {row + 2} ({sheet['filename'][row]}): '{typed[row]}' read as {read_as:g}"
    row = next(i for i, cell in typed.items() if isinstance(cell, float) and cell < 0)
    assert only("negative_weights") == f"row {row + 2} ({sheet['filename'][row]}): {typed[row]:g}"
    assert only("wrong_totals").startswith(f"row {row + 2} ")  # a total below zero is no sum of its parts
    row = sheet.index[sheet["filename"].duplicated()][0]
    first = list(sheet["filename"]).index(sheet["filename"][row])
    assert only("rows_twice") == f"row {row + 2} ({sheet['filename'][row]}) repeats row {first + 2}"
    (missing,) = set(sheet["filename"]) - on_disk
    assert only("missing_photos").endswith(f"({missing}): no such file")
    assert faults["unused_photos"]["found"] == sorted(on_disk - set(sheet["filename"]))
    modes, pixels = {}, {}
    for name in sorted(on_disk):
        with Image.open(photos / name) as file:
            modes[name] = file.mode
            try:
                pixels.setdefault(file.convert("RGB").tobytes(), []).append(name)
            except OSError as error:
                assert only("unreadable_photos") == f"{name}: unreadable photo ({error})"
    odd = [f"{name}: mode {mode}" for name, mode in modes.items() if mode != "RGB"]
    assert len(odd) == 3 and faults["photos_not_rgb"]["found"] == odd
    (twins,) = (names for names in pixels.values() if len(names) > 1)
    assert only("photos_under_several_names").startswith(" = ".join(twins))
    silent = ["cells_not_numbers", "zero_weights", "photos_with_several_weights", "decreasing_ages"]
    assert [faults[name]["count"] for name in [*silent, "weights_as_if_in_mg"]] == [0] * 5
    console = capsys.readouterr().out
    for name, fault in faults.items():
        assert all(found in console for found in fault["found"]), name


def test_faults_that_are_not_drawn_are_found_too(drawn, tmp_path, no_figures):
    sheet = read_sheet(drawn).astype({"fresh_weight_total": object, "age_days": object})
    labelled = sheet.index[sheet["fresh_weight_total"].notna()]
    zero, bad, twice, in_mg = labelled[:4]
    sheet.loc[zero, "fresh_weight_total"] = 0
    sheet.loc[bad, "fresh_weight_total"] = "ca. 0.3"
    sheet.loc[in_mg, "fresh_weight_total"] *= 1000
    again = sheet.loc[[twice]].assign(fresh_weight_total=9.5)
    sheet = pd.concat([sheet, again], ignore_index=True)
    plant = sheet.groupby(eda.PLANT_COLUMNS)["timestamp"].transform("size") > 1
    same = sheet[plant].sort_values([*eda.PLANT_COLUMNS, "timestamp"]).index[:2]
    sheet.loc[same, "age_days"] = [28, 7]
    faults = explore(tmp_path, "--data_dir", copy_sheet(tmp_path / "data", sheet))["audit"]["faults"]
    assert faults["zero_weights"]["found"] == [f"row {zero + 2} ({sheet['filename'][zero]})"]
    bad_cell = f"row {bad + 2} ({sheet['filename'][bad]}): fresh_weight_total 'ca. 0.3'"
    assert faults["cells_not_numbers"]["found"] == [bad_cell]
    assert "9.5 in row 62" in faults["photos_with_several_weights"]["found"][0] and faults["rows_twice"]["count"] == 0
    assert f"row {same[1] + 2} ({sheet['filename'][same[1]]}): 7 days after 28" in faults["decreasing_ages"]["found"]
    weight = sheet["fresh_weight_total"][in_mg]
    as_if_in_mg = [f"row {in_mg + 2} ({sheet['filename'][in_mg]}): {weight:g}"]
    assert faults["weights_as_if_in_mg"]["found"] == as_if_in_mg and weight > 20
    assert faults["missing_photos"]["count"] == len(sheet) - sheet["filename"].isin(sheet["filename"][:3]).sum()


def test_green_area_counts_leaf_and_not_soil():
    photo = Image.new("RGB", (100, 100), (120, 100, 90))
    photo.paste((90, 140, 50), (0, 0, 50, 50))
    assert eda.green_area(photo) == pytest.approx(0.25, abs=0.01)
    lamp = np.array([1.45, 1.12, 0.6])
    warm = Image.fromarray((np.asarray(photo) * lamp).clip(0, 255).astype(np.uint8))
    assert eda.green_area(warm) == pytest.approx(0.25, abs=0.01)
    assert eda.green_area(Image.new("RGB", (10, 10), (2, 20, 2))) == 0


def test_law_is_recovered_and_bears_photos_without_green():
    areas = np.array([0.0, 0.01, 0.02, 0.05, 0.2])
    a, b, smearing, law = eda.fit_law(areas, 8 * areas**1.2 + (areas == 0))
    assert (a, b, smearing) == pytest.approx((8, 1.2, 1))
    assert law(areas) == pytest.approx(8 * np.maximum(areas, 0.01) ** 1.2)
    with pytest.raises(ValueError, match="green area"):
        eda.fit_law(np.zeros(3), np.ones(3))


@pytest.mark.parametrize("group_by", [["plant_number"], ["experiment_id", "plant_number"]])
def test_baselines_equal_a_plain_recomputation(drawn, tmp_path, group_by, no_figures):
    baselines = explore(tmp_path, "--data_dir", drawn, "--group_by", *group_by, "--seed", 7)["baselines"]
    sheet = read_sheet(drawn).dropna(subset="fresh_weight_total")
    areas = np.array([eda.green_area(Image.open(drawn / "images_med_res" / name)) for name in sheet["filename"]])
    grams = sheet["fresh_weight_total"].to_numpy()
    labels = ["/".join(map(str, row)) for row in sheet[group_by].to_numpy()]
    codes = {
        label: code for code, label in enumerate(sorted(set(labels), key=lambda x: [int(n) for n in x.split("/")]))
    }
    groups = np.array([codes[label] for label in labels])
    assert (areas > 0).all() and baselines["green_area_law"]["rows_without_green"] == 0
    assert (baselines["rows"], baselines["groups"]) == (len(grams), len(codes))
    errors = {"training_mean": [], "green_area_law": []}
    for train, test in GroupKFold(5, shuffle=True, random_state=7).split(areas, groups=groups):
        assert not set(groups[train]) & set(groups[test])
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


def test_csv_with_semicolons_and_decimal_commas_tells_the_same(drawn, explored, tmp_path, no_figures):
    path = tmp_path / "labels.csv"
    read_sheet(drawn).to_csv(path, sep=";", decimal=",", index=False)
    images = drawn / "images_med_res"
    from_csv = explore(tmp_path, "--labels_path", path, "--image_dir", images)
    assert from_csv == explored[1]


def test_csv_with_points_names_the_one_comma_the_outlier_and_the_repeated_row(drawn, tmp_path, no_figures):
    sheet = read_sheet(drawn).assign(plant_number=np.arange(60) // 2)
    comma = sheet.index[sheet["fresh_weight_total"].notna()][0]
    light = sheet.index[(sheet["age_days"] == 28) & sheet["fresh_weight_total"].notna()][-1]
    unlabelled = sheet.index[sheet["fresh_weight_total"].isna()][0]
    assert light != comma
    sheet.loc[light, "fresh_weight_total"] = 0.0001
    sheet["fresh_weight_total"] = sheet["fresh_weight_total"].astype(object)
    sheet.loc[comma, "fresh_weight_total"] = "0,25"
    sheet = pd.concat([sheet.drop(columns="fresh_weight_shoot"), sheet.loc[[unlabelled]]], ignore_index=True)
    sheet.to_csv(tmp_path / "labels.csv", index=False)
    images = drawn / "images_med_res"
    summary = explore(tmp_path, "--labels_path", tmp_path / "labels.csv", "--image_dir", images)
    faults, names = summary["audit"]["faults"], sheet["filename"]
    assert faults["text_weights"]["found"] == [f"row {comma + 2} ({names[comma]}): '0,25' read as 0.25"]
    assert faults["rows_twice"]["found"] == [f"row 62 ({names[unlabelled]}) repeats row {unlabelled + 2}"]
    outlier = f"row {light + 2} ({names[light]}): 0.0001 at 28 days"
    assert outlier in summary["audit"]["facts"]["weight_outliers_at_age"]
    assert summary["plants_with_multiple_samples"] == 30 and summary["max_images_per_plant"] == 3


def test_sheet_of_few_columns_leaves_out_what_it_cannot_tell(drawn, tmp_path, capsys):
    sheet = read_sheet(drawn)[["filename", "plant_number", "fresh_weight_total"]].assign(plant_number=1)
    sheet.loc[1:, "fresh_weight_total"] = np.nan
    sheet.loc[0, "fresh_weight_total"] = 0.25
    summary = explore(tmp_path, "--data_dir", copy_sheet(tmp_path / "data", sheet))
    lines = capsys.readouterr().out.splitlines()
    left_out = ["correlation_heatmap.png", "age_vs_biomass.png", "green_area_vs_biomass.png"]
    assert [line.split()[0] for line in lines if "left out:" in line] == left_out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {*FIGURES} - {*left_out}
    assert summary["fresh_weight_stats"]["std"] is None and summary["fresh_weight_stats"]["count"] == 1
    assert summary["age_missing_pct"] is None and summary["timestamp_span_days"] is None
    assert summary["baselines"] is None and summary["audit"]["faults"]["decreasing_ages"]["count"] is None


def mistakes(drawn, folder):
    """Arguments of each mistake, and what its one line must say."""
    sheet = read_sheet(drawn)
    folder.mkdir()
    sheet.rename(columns={"fresh_weight_total": "fresh_weight_totl"}).to_excel(folder / "typo.xlsx", index=False)
    sheet.assign(fresh_weight_total=np.nan).to_excel(folder / "unlabelled.xlsx", index=False)
    (folder / "torn.xlsx").write_bytes((drawn / "digital_biomass_labels.xlsx").read_bytes()[:4000])
    data = ["--data_dir", drawn]
    return {
        "no data": (["--data_dir", "nowhere"], ["nowhere", "--data_dir", "make_sample_data.py", "sample_data"]),
        "no sheet": ([*data, "--labels_path", "none.xlsx"], ["none.xlsx", "--labels_path"]),
        "no photos": ([*data, "--image_dir", "none"], ["none", "--image_dir"]),
        "typo": (
            [*data, "--labels_path", folder / "typo.xlsx"],
            ["'fresh_weight_total'", "'fresh_weight_totl'", "found"],
        ),
        "group": ([*data, "--group_by", "plant_no"], ["'plant_no'", "'plant_number'"]),
        "unlabelled": ([*data, "--labels_path", folder / "unlabelled.xlsx"], ["no row", "fresh_weight_total"]),
        "torn": ([*data, "--labels_path", folder / "torn.xlsx"], ["torn.xlsx", "cannot read"]),
        "folder is a file": ([*data, "--figures_dir", folder / "torn.xlsx"], ["cannot write", "torn.xlsx"]),
        "file is a folder": ([*data, "--summary_path", folder], ["cannot write", "it is a folder"]),
        "seed": ([*data, "--seed", "-1"], ["--seed"]),
        "seed too large": ([*data, "--seed", 2**32], ["--seed"]),
        "file names for weights": ([*data, "--target", "filename"], ["--target"]),
        "sheet overwritten": ([*data, "--summary_path", drawn / "digital_biomass_labels.xlsx"], ["is an input"]),
        "among the photos": ([*data, "--figures_dir", drawn / "images_med_res"], ["one of the photos"]),
    }


def test_a_mistake_stops_in_one_line_and_writes_nothing(drawn, tmp_path, capsys, monkeypatch):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(eda, "scan_photos", lambda *_: pytest.fail("passes over the photos before it looks"))
    for name, (arguments, words) in mistakes(drawn, tmp_path / "inputs").items():
        with pytest.raises(SystemExit) as stop:
            eda.main([*map(str, arguments)])
        shown = capsys.readouterr()
        assert stop.value.code == 2 and shown.out == "", name
        assert shown.err.count("\n") == 1 and all(word in shown.err for word in words), shown.err
        assert not [path for path in cwd.rglob("*") if path.is_file()], name


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="no folder is closed")
def test_a_closed_folder_is_found_before_the_photos(drawn, tmp_path, run_script):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = run_script("eda.py", "--data_dir", drawn, "--figures_dir", closed / "figures", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr


def stopped(capsys, status, *arguments):
    """The one line with which main() stops."""
    with pytest.raises(SystemExit) as stop:
        eda.main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == status and error.count("\n") == 1, error
    return error


def test_a_full_disk_leaves_each_file_whole(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eda, "FIGURES", (eda.target_distribution, eda.image_pixel_analysis))
    first, second = tmp_path / "target_distribution.png", tmp_path / "image_pixel_analysis.png"
    second.write_bytes(b"old")
    replace = os.replace

    def fill_up(source, target):
        if target == second:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(outputs.os, "replace", fill_up)
    places = ["--figures_dir", tmp_path, "--summary_path", tmp_path / "summary.json"]
    error = stopped(capsys, 2, "--data_dir", drawn, *places)
    assert str(second) in error and "No space left" in error
    assert second.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [second, first]
    Image.open(first).verify()


def test_ctrl_c_and_a_second_run_stop_in_one_line(drawn, tmp_path, capsys, monkeypatch, no_figures):
    summary = tmp_path / "summary.json"
    with outputs.alone([summary]):
        assert "another run" in stopped(capsys, 2, "--data_dir", drawn, "--summary_path", summary)

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(eda, "look_at", interrupt)
    assert stopped(capsys, 130, "--data_dir", drawn, "--summary_path", summary) == "eda.py: interrupted\n"
    assert not any(tmp_path.iterdir())


def test_ctrl_c_while_libraries_load(tmp_path, run_script, monkeypatch):
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for script in ("eda.py", "make_sample_data.py"):
        done = run_script(script, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{script}: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="no pipes, and links need rights")
def test_photos_are_found_by_other_spellings_and_never_outside_the_folder(tmp_path, capsys, no_figures):
    images, names = tmp_path / "images", ["Leaf.PNG", "blätter.png", "tray/third.png", "extra.png"]
    (images / "tray").mkdir(parents=True)
    for number, name in enumerate([*names, "../secret.png"]):
        Image.new("RGB", (40, 40), (60, 50 + number, 40)).save(images / name)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "unnamed_link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(images / "pipe.png")
    os.mkfifo(images / "unnamed_pipe.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
    spelt = ["leaf.png", unicodedata.normalize("NFD", "Blätter.png"), "tray\\third", "none.png", "pipe.png"]
    sheet = pd.DataFrame({"filename": [*spelt, *outside], "leaf_weight": 0.5, "started": pd.Timestamp("2021-03-01")})
    sheet.to_excel(tmp_path / "sheet.xlsx", index=False)
    places = ["--labels_path", tmp_path / "sheet.xlsx", "--image_dir", images]
    faults = explore(tmp_path / "out", *places, "--target", "leaf_weight", "--group_by", "started")["audit"]["faults"]
    assert faults["missing_photos"]["found"] == [
        "row 5 (none.png): no such file",
        *(f"row {7 + row} ({name}): leads out of the image folder" for row, name in enumerate(outside)),
    ]
    assert faults["unreadable_photos"]["found"] == ["pipe.png: unreadable photo (it is no ordinary file)"]
    assert faults["unused_photos"]["found"] == ["extra.png"]
    assert "spells otherwise (3): 'leaf.png' is Leaf.PNG" in capsys.readouterr().out


@pytest.mark.parametrize("form", [None, "%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M:%S"])
def test_times_may_be_dates_or_text(form, drawn, explored, tmp_path, monkeypatch):
    monkeypatch.setattr(eda, "FIGURES", () if form else (eda.correlation_heatmap,))
    sheet = read_sheet(drawn).assign(started=pd.Timestamp("2021-03-01"))
    pots = sheet.groupby(eda.PLANT_COLUMNS)["timestamp"]
    later = sheet.index[(pots.transform("size") > 1) & (sheet["timestamp"] == pots.transform("max"))][0]
    sheet.loc[later, "age_days"] = 1
    dates = pd.to_datetime(sheet["timestamp"], unit="s")
    sheet["timestamp"] = dates.dt.strftime(form) if form else dates
    summary = explore(tmp_path, "--data_dir", copy_sheet(tmp_path / "data", sheet))
    assert summary["timestamp_span_days"] == explored[1]["timestamp_span_days"]
    assert f"row {later + 2} " in summary["audit"]["faults"]["decreasing_ages"]["found"][0]


@pytest.mark.parametrize("case", ["one row, no photos", "constant weights", "enormous weights, ids of all kinds"])
def test_odd_data_is_borne(case, drawn, tmp_path, capsys):
    sheet = read_sheet(drawn).rename(columns={"humidity": "$\\frac$"}).astype({"plant_number": object})
    data = copy_sheet(tmp_path / "data", sheet)
    if case == "constant weights":
        sheet["fresh_weight_total"] = -0.3
    elif case.startswith("one row"):
        sheet = sheet.dropna(subset="fresh_weight_total").head(1)
        shutil.rmtree(data / "images_med_res")
        (data / "images_med_res").mkdir()
    else:
        sheet["fresh_weight_total"] = 10.0 ** (sheet.index * 5)
        sheet.loc[:3, "plant_number"] = [pd.Timestamp("2021-03-12"), "12a", True, 0.5]
    sheet.to_excel(data / "digital_biomass_labels.xlsx", index=False)
    groups = ["--group_by", "plant_number", "fresh_weight_total", "filename"]
    summary = explore(tmp_path, "--data_dir", data, *groups)
    assert summary["num_records"] == len(sheet) and capsys.readouterr().err == ""

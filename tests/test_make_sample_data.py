"""Holds the drawn data to the known facts of the real set, and the script to its promises.

python tests/test_make_sample_data.py FOLDER    # prints a table, wanted against drawn, for a folder of 4,294 photos
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for use as a script

import make_sample_data as msd

COUNTS = {"rows": 4294, "labelled rows": 3684, "rows without age": 492, "plant numbers with several photos": 168}
COUNTS |= {"most photos of one plant number": 42, "days spanned": 186}
COUNTS |= {"training rows of the study's split": 2911, "validation rows of the study's split": 773}
WEIGHTS = {"mean": 0.2603, "std": 0.2896, "min": 0.0021, "25%": 0.058, "50%": 0.148, "75%": 0.365, "max": 2.113}  # g
CORRELATIONS = {"leaf_surface_area": 0.81, "plant_surface_area": 0.70, "big_leaves": 0.53, "total_leaves": 0.53}
CORRELATIONS |= {"age_days": 0.42, "illuminancefullspectrum": 0.17, "illuminancevisible": 0.17}
CORRELATIONS |= {"shoot_root_ratio_fresh": 0.07, "illuminancelux": 0.01, "illuminanceinfrared": 0.01}
CORRELATIONS |= {"temperature": 0.01, "humidity": 0.01, "small_leaves": -0.08, "experiment_id": -0.40}
HEAVIEST = {7: 0.1, 14: 0.9, 21: 1.1, 28: 2.2}  # g, by age


def compare(sheet):
    """The table of facts, wanted against drawn, for a sheet of full size."""
    labelled = sheet.dropna(subset="fresh_weight_total")
    photos = sheet["plant_number"].value_counts()
    split = GroupShuffleSplit(1, test_size=0.2, random_state=42)
    training, validation = next(split.split(labelled, groups=labelled["plant_number"]))
    counts = [len(sheet), len(labelled), sheet["age_days"].isna().sum(), (photos > 1).sum(), photos.max()]
    counts += [(sheet["timestamp"].max() - sheet["timestamp"].min()) // 86400, len(training), len(validation)]
    facts = [(fact, want, int(got), want == got) for (fact, want), got in zip(COUNTS.items(), counts, strict=True)]
    weight = labelled["fresh_weight_total"].describe()
    for name, want in WEIGHTS.items():
        tolerance = 0.10 if name in ("min", "max") else 0.05
        facts.append((f"weight, {name} (g)", want, weight[name], abs(weight[name] - want) <= tolerance * want))
    correlation = sheet.corr(numeric_only=True)
    for name, want in CORRELATIONS.items():
        got = correlation.at[name, "fresh_weight_total"]
        facts.append((f"r with {name}", want, got, abs(got - want) <= 0.05))
    together = ["temperature", "humidity", "illuminancelux", "illuminanceinfrared"]
    for group in (together, ["illuminancevisible", "illuminancefullspectrum"]):
        got = correlation.loc[group, group].to_numpy().min()
        facts.append((f"least r among {group[0]} ... {group[-1]}", 1, got, got > 0.97))
    heaviest = labelled.groupby("age_days")["fresh_weight_total"].max()
    for age, limit in HEAVIEST.items():
        facts.append((f"heaviest at {age} days (g), up to", limit, heaviest[age], 0.7 * limit < heaviest[age] < limit))
    return pd.DataFrame(facts, columns=["fact", "wanted", "drawn", "ok"])


@pytest.fixture(scope="module")
def full():  # plants and sheet, without photos
    return (plants := msd.grow(4294, 42)), msd.make_sheet(plants, 42)


def fingerprints(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / msd.IMAGES).iterdir()}


def read_sheet(folder):
    return pd.read_excel(folder / msd.SHEET, engine="calamine")


def refused(capsys, *arguments, status=2):
    """The one line with which the script stops."""
    with pytest.raises(SystemExit) as stop:
        msd.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == status and error.count("\n") == 1
    assert error.startswith("make_sample_data.py: " + "error: " * (status == 2))
    return error


def test_full_sheets_of_any_seed_meet_every_fact_but_not_by_the_same_numbers(full):
    other = msd.make_sheet(msd.grow(4294, 7), 7)
    for sheet in (full[1], other):
        facts = compare(sheet)
        assert len(facts) == 35 and facts["ok"].all(), facts[~facts["ok"]].to_string()
    assert not other["fresh_weight_total"].equals(full[1]["fresh_weight_total"])


def test_clean_sheet_has_no_fault(full):
    sheet = full[1]
    assert sheet["filename"].is_unique and not sheet.drop(columns="filename").duplicated().any()
    harvest = [column for column in sheet if column.startswith(("fresh_", "dry_", "shoot_"))]
    assert len(harvest) == 5 and sheet[harvest].isna().sum(axis=1).isin([0, 5]).all()
    total, shoot, root = (sheet[f"fresh_weight_{part}"] for part in ("total", "shoot", "root"))
    assert np.allclose((total - shoot - root).dropna(), 0, atol=1e-12) and min(shoot.min(), root.min()) > 0
    assert np.allclose((total - full[0]["weight"]).dropna(), 0, atol=1e-4)
    assert (sheet["dry_weight_shoot"] / shoot)[shoot > 0.01].between(0.079, 0.101).all()  # below, rounding moves it
    assert np.allclose((shoot / root - sheet["shoot_root_ratio_fresh"]).dropna(), 0, atol=0.001)
    counted = sheet.dropna(subset="total_leaves")
    assert (counted["small_leaves"] + counted["big_leaves"] == counted["total_leaves"]).all()
    in_time = sheet.sort_values("timestamp").dropna(subset="age_days")
    assert in_time.groupby(["experiment_id", "plant_number"])["age_days"].is_monotonic_increasing.all()
    assert (sheet.groupby("plant_number")["experiment_id"].nunique() > 1).all()  # numbers restart in every experiment


def test_noise_floor_is_that_of_the_conditional_mean(full):
    known = full[0][full[0]["labelled"]]
    miss = known["weight"] - known["expected"]
    assert 0.05 <= msd.noise_floor(full[0]) <= 0.08 and np.corrcoef(known["weight"], known["expected"])[0, 1] >= 0.95
    ratio = full[0]["weight"] / full[0]["expected"]
    assert abs(ratio.mean() - 1) < 3.5 * ratio.sem()
    assert np.allclose(0.055 * known["leaf_area"] ** 1.1 * np.exp(known["thickness"]), known["expected"])
    for shown in ("expected", "leaf_area", "thickness", "slender", "experiment_id", "age", "light"):
        means = miss.groupby(pd.qcut(known[shown], 8, duplicates="drop"), observed=True).agg(["mean", "sem"])
        assert (means["mean"].abs() < 3.5 * means["sem"]).all(), f"what {shown} shows would lower the floor"


def test_leaf_area_and_thickness_follow_the_law_of_the_expected_weight(full):
    plants, _ = full
    area, thickness = plants["leaf_area"], plants["thickness"]
    assert (0.055 * area**1.1 * np.exp(thickness)).to_numpy() == pytest.approx(plants["expected"].to_numpy())


def test_photos_of_one_plant_are_alike(full):
    plants = full[0]
    size = np.log(plants["expected"])
    known = pd.get_dummies(plants[["age", "experiment_id"]].astype(str), dtype=float).to_numpy()
    left = size - known @ np.linalg.lstsq(known, size, rcond=None)[0]
    plant = left.groupby([plants["experiment_id"], plants["plant_number"]])
    assert plant.transform("var").mean() < 0.5 * left.var()  # rows of one plant on both sides of a split would leak


def test_small_sheets():
    for count in (1, 2, 3, 7, 20, 150):
        sheet = msd.make_sheet(plants := msd.grow(count, 42), 42)
        assert len(sheet) == count and sheet["filename"].is_unique
        assert sheet["fresh_weight_total"].notna().sum() == count - round(count * 610 / 4294)
        assert (plants["weight"] < plants["age"].map(HEAVIEST)).all()


@pytest.mark.parametrize("name", ["drawn", "faulty"])
def test_expected_weights_give_the_noise_floor_that_the_readme_tells(name, drawn, request):
    folder, labels = request.getfixturevalue(name), read_sheet(drawn).set_index("filename")["fresh_weight_total"]
    comment = (folder / "drawn_expected_weights.csv").read_text().splitlines()[0]
    assert comment.startswith("# drawn by make_sample_data.py: ") and "Never a model input." in comment
    table = pd.read_csv(folder / "drawn_expected_weights.csv", comment="#", index_col="filename")
    expected = table["expected_weight_g"]
    assert (
        expected.index.equals(labels.index)
        and labels.isna().any()
        and np.allclose(expected, msd.grow(60, 42)["expected"], rtol=1e-8, atol=0)
    )
    floor = np.sqrt(np.mean((labels - expected) ** 2))  # of the labelled rows: the others are NaN
    told = (folder / msd.README).read_text().split("Noise floor: ")[1].split(" g.")[0]
    assert floor == pytest.approx(float(told), abs=1e-4) == msd.noise_floor(msd.grow(60, 42))


def test_photos_are_as_the_real_ones(drawn):
    sheet, prints, means = read_sheet(drawn), fingerprints(drawn), []
    assert set(prints) == set(sheet["filename"]) and len(set(prints.values())) == len(sheet) == 60
    for path in drawn / msd.IMAGES / sheet["filename"]:
        assert 80_000 < path.stat().st_size < 200_000
        with Image.open(path) as photo:
            assert (photo.format, photo.mode, photo.size) == ("PNG", "RGB", (256, 256))
            means.append(np.asarray(photo).mean((0, 1)) / 255)
    red, green, blue = np.array(means).T
    warm = sheet["experiment_id"].isin(msd.WARM).to_numpy()
    assert 0.49 < red[warm].mean() < 0.59 and 0.34 < red[~warm].mean() < 0.44
    assert 0.28 < green.mean() < 0.34 and green.std() < 0.04
    assert 0.12 < blue[warm].mean() < 0.20 and 0.25 < blue[~warm].mean() < 0.36


def test_a_heavier_plant_shows_more_green_and_a_thicker_one_darker_green():
    plant = msd.grow(30, 42).iloc[0].to_dict() | dict(experiment_id=4, age=21, thickness=0.0, off_x=0, off_y=0)

    def leaf_pixels(**changes):
        photo, bare = (np.asarray(msd.draw_photo(plant | changes, 42, 0, leaves), float) for leaves in (True, False))
        changed = np.abs(photo - bare).sum(axis=-1) > 90
        return changed.sum(), photo[changed].mean()

    areas = [leaf_pixels(leaf_area=area)[0] for area in (1, 4, 16)]
    assert areas[0] * 2 < areas[1] and areas[1] * 2 < areas[2]
    assert leaf_pixels(leaf_area=8, thickness=0.6)[1] < 0.85 * leaf_pixels(leaf_area=8, thickness=-0.6)[1]


def test_a_pot_without_its_plant_is_the_same_pot():
    for index, plant in enumerate(msd.grow(6, 42).to_dict("records")):
        photo, bare = (np.asarray(msd.draw_photo(plant, 42, index, leaves=leaves)) for leaves in (True, False))
        changed = np.argwhere((photo != bare).any(axis=-1))
        reach = msd.LOOKS[plant["experiment_id"] - 1][0] / 10 * msd.build_rosette(plant, 42, index)["length"].max()
        assert 5 < len(changed) < 0.5 * 256**2 and (np.ptp(changed, axis=0) < 2.2 * reach + 20).all()


def test_a_script_and_main_with_other_workers_draw_the_same_pixels_and_cells(run_script, tmp_path):
    done = run_script("make_sample_data.py", "--num_images", 20, "--num_workers", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "20 photos" in done.stdout
    assert f"noise floor: {msd.noise_floor(msd.grow(20, 42)):.4f} g" in done.stdout
    two, one, other = (tmp_path / name for name in ("sample_data", "one", "other"))
    for out, flags in ((one, "--num_workers 1"), (other, "--seed 6")):
        assert msd.main(["--num_images", "20", "--out", str(out), *flags.split()]) == 0
    assert fingerprints(one) == fingerprints(two) and len(read_sheet(two)) == 20
    pd.testing.assert_frame_equal(read_sheet(one), read_sheet(two))
    assert (one / msd.EXPECTED).read_bytes() == (two / msd.EXPECTED).read_bytes()
    assert "--num_images 20 --seed 6" in (other / msd.README).read_text()
    assert not set(fingerprints(one).values()) & set(fingerprints(other).values())


def test_faults_are_those_that_the_readme_lists_and_no_others(drawn, faulty):
    listed = [line[2:].split(": ", 1) for line in (faulty / msd.README).read_text().splitlines() if line[:2] == "- "]
    fault = dict(listed)
    twin, original = fault["duplicate photo"].split(" holds the bytes of ")
    assert len(listed) == len(fault) == 10
    clean, spoilt = fingerprints(drawn), fingerprints(faulty)
    assert spoilt[twin] == spoilt[original] == clean[original] and twin.split("_")[2] != original.split("_")[2]
    with pytest.raises(OSError):
        Image.open(faulty / msd.IMAGES / fault["truncated PNG"]).load()
    modes = {"RGBA photo": "RGBA", "palette photo": "P", "16-bit grey photo": "I;16"}
    opened = {kind: Image.open(faulty / msd.IMAGES / fault[kind]) for kind in modes}
    assert {kind: photo.mode for kind, photo in opened.items()} == modes
    broken = {fault["missing file"], fault["truncated PNG"], twin, *(fault[name] for name in modes)}
    assert set(clean) - set(spoilt) == {fault["missing file"]} and set(spoilt) - set(clean) == {fault["unused photo"]}
    assert {name for name in clean if spoilt.get(name) != clean[name]} == broken
    assert spoilt[fault["unused photo"]] not in clean.values()
    sheet, clean_sheet = read_sheet(faulty), read_sheet(drawn)
    correct = clean_sheet.set_index("filename")["fresh_weight_total"]
    assert sheet[sheet.duplicated()]["filename"].tolist() == [fault["duplicate row"]]
    comma, negative = fault["text weight with a decimal comma"], fault["negative weight"]
    whole = sheet.drop_duplicates(ignore_index=True)
    rest, cells = ~whole["filename"].isin([comma, negative]), whole.set_index("filename")["fresh_weight_total"]
    assert cells[comma] == f"{correct[comma]:.4f}".replace(".", ",") and cells[negative] == -correct[negative]
    pd.testing.assert_frame_equal(whole[rest], clean_sheet[rest], check_dtype=False)
    spoilt_rows = broken | {comma, negative, fault["duplicate row"]}
    assert len(spoilt_rows) == 9 and correct[list(spoilt_rows)].notna().all()


def test_bad_flags_are_refused_in_one_line(tmp_path, capsys):
    for number in ("0", "many", "1000000000", "5 --with_faults"):
        refused(capsys, "--num_images", *number.split(), "--out", tmp_path / "out")
    for flags in ("--seed -1", "--num_workers 0", "--no"):
        refused(capsys, *flags.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_it_did_not_draw_or_that_a_user_changed_is_left_alone(tmp_path, capsys):
    notes, out = tmp_path / "mine" / msd.README, tmp_path / "out"
    notes.parent.mkdir()
    notes.write_text("my own notes")
    for place in (notes.parent, notes, notes / "below_a_file"):
        refused(capsys, "--out", place)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", msd.README] and notes.read_text() == "my own notes"
    draw = ["--out", str(out), "--num_images", "2"]
    assert msd.main(draw) == 0
    (out / msd.IMAGES / "mine.png").write_bytes(b"a user's own photo")
    assert "was not drawn by this script" in refused(capsys, *draw)
    assert (out / msd.IMAGES / "mine.png").read_bytes() == b"a user's own photo"
    (out / msd.IMAGES / "mine.png").unlink()
    read_sheet(out).assign(fresh_weight_total=0.5).to_excel(out / msd.SHEET, index=False)
    assert refused(capsys, *draw) and (read_sheet(out)["fresh_weight_total"] == 0.5).all()


def test_redraws_its_own_folder_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    draw = ["--out", str(out), "--num_images"]
    assert msd.main([*draw, "3"]) == 0
    (out / "notes.txt").write_text("a user's own file")
    assert msd.main([*draw, "2"]) == 0
    assert set(before := fingerprints(out)) == set(read_sheet(out)["filename"]) and len(before) == 2
    assert {path.name for path in out.iterdir()} == {msd.SHEET, msd.IMAGES, msd.EXPECTED, msd.README, "notes.txt"}

    def fill_up(source, target, replace=os.replace):
        if source.name == msd.README and source.parent.name != "old" and target == out / msd.README:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(msd.os, "replace", fill_up)
        assert "No space left" in refused(capsys, *draw, "4")
    assert fingerprints(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]
    assert msd.main([*draw, "2"]) == 0  # it knows the folder as its own still

    monkeypatch.setattr(pd.DataFrame, "to_excel", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert refused(capsys, *draw, "4", status=130).endswith(f"interrupted; {out} is as it was\n")
    assert fingerprints(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]


if __name__ == "__main__":
    print(compare(read_sheet(Path(sys.argv[1]))).to_string(index=False, float_format="%.4g"))

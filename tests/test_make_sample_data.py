"""Holds the drawn data to the known facts of the real set, and the script to its promises.

python tests/test_make_sample_data.py FOLDER    # prints a table, wanted against drawn, for a folder of 4,294 photos
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for use as a script

import make_sample_data as msd

COUNTS = {
    "rows": 4294,
    "labelled rows": 3684,
    "rows without age": 492,
    "plant numbers with several photos": 168,
    "most photos of one plant number": 42,
    "days spanned": 186,
    "training rows of the study's split": 2911,
    "validation rows of the study's split": 773,
}
WEIGHTS = {"mean": 0.2603, "std": 0.2896, "min": 0.0021, "25%": 0.058, "50%": 0.148, "75%": 0.365, "max": 2.113}  # g
CORRELATIONS = {
    "leaf_surface_area": 0.81,
    "plant_surface_area": 0.70,
    "big_leaves": 0.53,
    "total_leaves": 0.53,
    "age_days": 0.42,
    "illuminancefullspectrum": 0.17,
    "illuminancevisible": 0.17,
    "shoot_root_ratio_fresh": 0.07,
    "illuminancelux": 0.01,
    "illuminanceinfrared": 0.01,
    "temperature": 0.01,
    "humidity": 0.01,
    "small_leaves": -0.08,
    "experiment_id": -0.40,
}
HEAVIEST = {7: 0.1, 14: 0.9, 21: 1.1, 28: 2.2}  # g, by age


def compare(sheet):
    """Rows (fact, wanted, drawn, ok) for a sheet of full size."""
    labelled = sheet.dropna(subset="fresh_weight_total")
    photos = sheet["plant_number"].value_counts()
    training, validation = next(
        GroupShuffleSplit(1, test_size=0.2, random_state=42).split(labelled, groups=labelled["plant_number"])
    )
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
    for group in (
        ["temperature", "humidity", "illuminancelux", "illuminanceinfrared"],
        ["illuminancevisible", "illuminancefullspectrum"],
    ):
        got = correlation.loc[group, group].to_numpy().min()
        facts.append((f"least r among {group[0]} ... {group[-1]}", 1, got, got > 0.97))
    heaviest = labelled.groupby("age_days")["fresh_weight_total"].max()
    for age, limit in HEAVIEST.items():
        got = heaviest[age]
        facts.append((f"heaviest at {age} days (g), up to", limit, got, 0.7 * limit < got < limit))
    return facts


def as_markdown(facts):
    """The table of facts."""
    lines = ["| fact | wanted | drawn | ok |", "| --- | --- | --- | --- |"]
    for fact, want, got, ok in facts:
        shown = [value if isinstance(value, int) else f"{value:.4f}".rstrip("0") for value in (want, got)]
        lines.append(f"| {fact} | {shown[0]} | {shown[1]} | {'yes' if ok else 'NO'} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def full():
    """Plants and sheet of full size, without photos."""
    plants = msd.grow(4294, 42)
    return plants, msd.make_sheet(plants, 42)


def fingerprints(folder):
    """Hash of each photo by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / msd.IMAGES).iterdir()}


def read_sheet(folder):
    return pd.read_excel(folder / msd.SHEET)


def refused(capsys, *arguments):
    """The one line with which the script refuses."""
    with pytest.raises(SystemExit) as stop:
        msd.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and "error:" in error and "Traceback" not in error
    return error


# --- the sheet ---


def test_full_sheet_meets_every_fact(full):
    facts = compare(full[1])
    assert all(ok for *_, ok in facts), "\n" + as_markdown(facts)


def test_facts_hold_for_another_seed_but_not_by_the_same_numbers(full):
    other = msd.make_sheet(msd.grow(4294, 7), 7)
    facts = compare(other)
    assert all(ok for *_, ok in facts), "\n" + as_markdown(facts)
    assert not other["fresh_weight_total"].equals(full[1]["fresh_weight_total"])


def test_clean_sheet_has_no_fault(full):
    _, sheet = full
    assert sheet["filename"].is_unique and not sheet.drop(columns="filename").duplicated().any()
    harvest = [column for column in sheet if column.startswith(("fresh_", "dry_", "shoot_"))]
    assert len(harvest) == 5
    assert (sheet[harvest].isna().sum(axis=1).isin([0, 5])).all()
    total, shoot, root = (sheet[f"fresh_weight_{part}"] for part in ("total", "shoot", "root"))
    assert np.allclose((total - shoot - root).dropna(), 0, atol=1e-12)
    assert min(shoot.min(), root.min()) > 0
    heavy = shoot > 0.01  # below, rounding moves the share
    assert (sheet["dry_weight_shoot"] / shoot)[heavy].between(0.079, 0.101).all()
    assert np.allclose((shoot / root - sheet["shoot_root_ratio_fresh"]).dropna(), 0, atol=0.001)
    counted = sheet.dropna(subset="total_leaves")
    assert (counted["small_leaves"] + counted["big_leaves"] == counted["total_leaves"]).all()
    in_time = sheet.sort_values("timestamp").dropna(subset="age_days")
    for _, ages in in_time.groupby(["experiment_id", "plant_number"])["age_days"]:
        assert ages.is_monotonic_increasing
    assert (sheet.groupby("plant_number")["experiment_id"].nunique() > 1).all()  # numbers restart in every experiment


def test_noise_floor_is_that_of_the_conditional_mean(full):
    plants, _ = full
    known = plants[plants["labelled"]]
    miss = known["weight"] - known["expected"]
    assert msd.noise_floor(plants) == pytest.approx(np.sqrt(np.mean(miss**2)))
    assert 0.05 <= msd.noise_floor(plants) <= 0.08
    assert np.corrcoef(known["weight"], known["expected"])[0, 1] >= 0.95
    law = msd.ALLOMETRY * known["leaf_area"] ** msd.EXPONENT * np.exp(known["thickness"])
    assert np.allclose(law, known["expected"])
    for shown in ("expected", "leaf_area", "thickness", "slender", "experiment_id", "age", "light"):
        means = miss.groupby(pd.qcut(known[shown], 8, duplicates="drop"), observed=True).agg(["mean", "sem"])
        assert (means["mean"].abs() < 3.5 * means["sem"]).all(), f"what {shown} shows would lower the floor"


def test_photos_of_one_plant_are_alike(full):
    plants, _ = full
    size = np.log(plants["expected"])
    known = pd.get_dummies(plants[["age", "experiment_id"]].astype(str), dtype=float).to_numpy()
    left = size - known @ np.linalg.lstsq(known, size, rcond=None)[0]
    plant = left.groupby([plants["experiment_id"], plants["plant_number"]])
    assert plant.transform("var").mean() < 0.5 * left.var()  # rows of one plant on both sides of a split would leak
    assert (plants.groupby(["experiment_id", "plant_number"])["hand"].nunique() == 1).all()


@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 20, 150])
def test_small_sheets(num_images):
    plants = msd.grow(num_images, 42)
    sheet = msd.make_sheet(plants, 42)
    assert len(sheet) == num_images and sheet["filename"].is_unique
    assert sheet["fresh_weight_total"].notna().sum() == num_images - round(num_images * 610 / 4294)
    assert (plants["weight"] < plants["age"].map(HEAVIEST)).all()


# --- the photos ---


def test_photos_are_as_the_real_ones(drawn):
    sheet = read_sheet(drawn)
    prints = fingerprints(drawn)
    assert set(prints) == set(sheet["filename"]) and len(set(prints.values())) == len(sheet) == 60
    means = []
    for name in sheet["filename"]:
        path = drawn / msd.IMAGES / name
        assert 80_000 < path.stat().st_size < 200_000
        with Image.open(path) as photo:
            assert (photo.format, photo.mode, photo.size) == ("PNG", "RGB", (256, 256))
            means.append(np.asarray(photo).mean((0, 1)) / 255)
    red, green, blue = np.array(means).T
    warm = sheet["experiment_id"].isin(msd.WARM).to_numpy()
    assert 0.49 < red[warm].mean() < 0.59 and 0.34 < red[~warm].mean() < 0.44
    assert 0.28 < green.mean() < 0.34 and green.std() < 0.04
    assert 0.12 < blue[warm].mean() < 0.20 and 0.25 < blue[~warm].mean() < 0.36


def test_a_photo_shows_the_plant():
    """The same scene with a heavier, then a thicker plant: more green, then darker green."""
    plant = msd.grow(30, 42).iloc[0].to_dict() | {
        "experiment_id": 4,
        "age": 21,
        "thickness": 0.0,
        "off_x": 0,
        "off_y": 0,
    }

    def leaf_pixels(**changes):
        photo = np.asarray(msd.draw_photo(plant | changes, 42, 0), float)
        bare = np.asarray(msd.draw_photo(plant | changes | {"leaf_area": 1e-6}, 42, 0), float)
        changed = np.abs(photo - bare).sum(axis=-1) > 90
        return changed.sum(), photo[changed].mean()

    areas = [leaf_pixels(leaf_area=area)[0] for area in (1, 4, 16)]
    assert areas[0] * 2 < areas[1] and areas[1] * 2 < areas[2]
    thin, thick = leaf_pixels(leaf_area=8, thickness=-0.6)[1], leaf_pixels(leaf_area=8, thickness=0.6)[1]
    assert thick < 0.85 * thin


def test_same_pixels_and_cells_whatever_the_number_of_workers(tmp_path):
    for name, workers, seed in (("one", 1, 5), ("three", 3, 5), ("other", 1, 6)):
        arguments = ["--num_images", "40", "--out", tmp_path / name, "--num_workers", workers, "--seed", seed]
        assert msd.main([str(argument) for argument in arguments]) == 0
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "three")
    pd.testing.assert_frame_equal(read_sheet(tmp_path / "one"), read_sheet(tmp_path / "three"))
    assert (tmp_path / "one" / msd.README).read_text() == (tmp_path / "three" / msd.README).read_text()
    assert not set(fingerprints(tmp_path / "one").values()) & set(fingerprints(tmp_path / "other").values())


# --- the faults ---


def test_faults_are_those_that_the_readme_lists_and_no_others(drawn, faulty):
    listed = [line[2:].split(": ", 1) for line in (faulty / msd.README).read_text().splitlines() if line[:2] == "- "]
    fault = dict(listed)
    assert len(listed) == len(fault) == 10
    clean, spoilt = fingerprints(drawn), fingerprints(faulty)
    photos, sheet, cleansheet = faulty / msd.IMAGES, read_sheet(faulty), read_sheet(drawn)
    cells = sheet.set_index("filename")["fresh_weight_total"]

    assert fault["missing file"] not in spoilt and fault["missing file"] in cells
    with pytest.raises(OSError):
        Image.open(photos / fault["truncated PNG"]).load()
    modes = {"RGBA photo": "RGBA", "palette photo": "P", "16-bit grey photo": "I;16"}
    for name, mode in modes.items():
        with Image.open(photos / fault[name]) as photo:
            assert photo.mode == mode and photo.size == (256, 256)
    twin, original = fault["duplicate photo"].split(" holds the bytes of ")
    assert spoilt[twin] == spoilt[original] == clean[original] and twin.split("_")[2] != original.split("_")[2]
    correct = cleansheet.set_index("filename")["fresh_weight_total"]
    comma, negative = fault["text weight with a decimal comma"], fault["negative weight"]
    assert cells[comma] == f"{correct[comma]:.4f}".replace(".", ",")
    assert cells[negative] == -correct[negative]
    assert sheet[sheet.duplicated()]["filename"].tolist() == [fault["duplicate row"]]
    unused = fault["unused photo"]
    assert unused not in cells and spoilt[unused] not in clean.values()

    broken = {fault["missing file"], fault["truncated PNG"], twin, unused, *(fault[name] for name in modes)}
    assert {name: spoilt[name] for name in spoilt if name not in broken} == {
        name: clean[name] for name in clean if name not in broken
    }
    whole = sheet.drop_duplicates(ignore_index=True)
    rest = ~whole["filename"].isin([comma, negative])
    pd.testing.assert_frame_equal(whole[rest], cleansheet[rest], check_dtype=False)
    assert len(broken | {comma, negative, fault["duplicate row"]}) == 10
    assert correct[list((broken - {unused}) | {comma, negative, fault["duplicate row"]})].notna().all()


# --- the command line ---


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_images", 0],
        ["--num_images", "many"],
        ["--num_images", 10**9],
        ["--seed", -1],
        ["--num_workers", 0],
        ["--num_images", 5, "--with_faults"],
        ["--no"],
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, tmp_path, capsys):
    refused(capsys, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_it_did_not_draw_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / msd.README).write_text("my own notes")
    assert "was not drawn by this script" in refused(capsys, "--out", tmp_path / "mine")
    refused(capsys, "--out", tmp_path / "mine" / msd.README)
    refused(capsys, "--out", tmp_path / "mine" / msd.README / "below_a_file")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", msd.README]
    assert (tmp_path / "mine" / msd.README).read_text() == "my own notes"


def test_a_drawn_folder_that_a_user_changed_is_left_alone(tmp_path, capsys):
    draw = ["--out", str(tmp_path / "out"), "--num_workers", "1", "--num_images", "2"]
    assert msd.main(draw) == 0
    mine = tmp_path / "out" / msd.IMAGES / "mine.png"
    mine.write_bytes(b"a user's own photo")
    assert "was not drawn by this script" in refused(capsys, *draw)
    assert mine.read_bytes() == b"a user's own photo"
    mine.unlink()
    read_sheet(tmp_path / "out").assign(fresh_weight_total=0.5).to_excel(tmp_path / "out" / msd.SHEET, index=False)
    refused(capsys, *draw)
    assert (read_sheet(tmp_path / "out")["fresh_weight_total"] == 0.5).all()


def test_redraws_its_own_folder_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    draw = ["--out", str(out), "--num_workers", "1", "--num_images"]
    assert msd.main([*draw, "3"]) == 0
    (out / "notes.txt").write_text("a user's own file")
    assert msd.main([*draw, "2"]) == 0
    before = fingerprints(out)
    assert set(before) == set(read_sheet(out)["filename"]) and len(before) == 2
    assert {path.name for path in out.iterdir()} == {msd.SHEET, msd.IMAGES, msd.README, "notes.txt"}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def fill_up(source, target, replace=os.replace):
        if source.name == msd.README and source.parent.name != "old" and target == out / msd.README:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(msd.os, "replace", fill_up)
        assert "No space left" in refused(capsys, *draw, "4")
    assert fingerprints(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]
    assert msd.main([*draw, "2"]) == 0  # it knows the folder as its own still

    monkeypatch.setattr(pd.DataFrame, "to_excel", interrupt)
    with pytest.raises(SystemExit) as stop:
        msd.main([*draw, "4"])
    assert stop.value.code == 130
    assert fingerprints(out) == before and [path.name for path in out.parent.iterdir()] == ["out"]


def test_runs_as_a_script(run_script, tmp_path):
    done = run_script("make_sample_data.py", "--num_images", 20, "--num_workers", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 photos" in done.stdout and "noise floor" in done.stdout
    readme = (tmp_path / "sample_data" / msd.README).read_text()
    assert "--num_images 20" in readme and "Noise floor" in readme
    assert len(read_sheet(tmp_path / "sample_data")) == 20


if __name__ == "__main__":
    print(as_markdown(compare(read_sheet(Path(sys.argv[1])))))

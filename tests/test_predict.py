"""What a user of predict.py would notice: the weights, the interval, the notes, the message on bad input."""

import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHEET, TARGET, flags_of, quick, train
from PIL import Image, ImageEnhance, ImageFilter

import cross_validate
import predict
import train_model
from biomass import plant, reading, writing

PHOTOS = "images_med_res"


def weigh(model, out, *flags, engine=quick):
    """Exit status of predict.py, and its table by file name."""
    with engine():
        status = predict.main(["--model", model, "--out", out, "--device", "cpu", "--cache_dir", "none", *flags])
    return status, pd.read_csv(out).set_index("filename") if out.is_file() else None


def assert_same(table, out):
    wanted = pd.read_csv(out / "predictions.csv").set_index("filename")["predicted_g"]
    assert table.loc[wanted.index, "predicted_g"].to_numpy() == pytest.approx(wanted.to_numpy(), abs=1e-6)


def pixels_of(drawn, names, side=64):
    photos = (Image.open(drawn / PHOTOS / name).convert("RGB").resize((side, side), Image.BILINEAR) for name in names)
    return torch.from_numpy(np.stack([*map(np.array, photos)])).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def judged(once, drawn):
    """A model of cross_validate.py, which knows its errors and its training photos; quickly trained."""
    flags = ["--folds", 3, "--standardize_features", "--augmentation", "none", "--group_by", "filename", "--epochs", 5]
    flags += ["--no_erasing"]
    return once("by_photo", lambda folder: train(drawn, folder / "out", *flags, script=cross_validate)) / "out/model.pt"


@pytest.fixture(scope="session")
def clean(once, drawn, judged):
    folder = once("clean", lambda folder: weigh(judged, folder / "p.csv", drawn / PHOTOS))
    return pd.read_csv(folder / "p.csv").set_index("filename")


@pytest.fixture(scope="session")
def with_metadata(once, drawn):
    flags = (
        "--model_name resnet18 --weights none --target_transform log --metadata_columns age_days lab_book_page".split()
    )
    return once("with_metadata", lambda folder: train(drawn, folder / "out", *flags)) / "out"


@pytest.mark.parametrize("flags", [
    "--standardize_features --target_transform log --precision fp32", "--unfreeze_from conv5 --precision fp32",
    "--unfreeze_backbone --precision bf16 --epochs 1", "--precision bf16",
])  # fmt: skip
def test_predictions_are_those_of_the_training_run(drawn, flags, tmp_path):
    train(drawn, tmp_path / "out", *flags.split())
    precision = flags.split()[flags.split().index("--precision") + 1]
    more = ["--precision", precision, "--cache_dir", tmp_path / "cache"]  # bf16 also where it is emulated
    status, table = weigh(tmp_path / "out" / "model.pt", tmp_path / "p.csv", drawn / PHOTOS, *more)
    assert status == 0 and len(table) == 60
    assert_same(table, tmp_path / "out")
    assert table["predicted_g"].nunique() > 50  # the head computes in fp32: bf16 would give a grid of few values
    assert table[["low_g", "high_g", "note"]].isna().all(axis=None)  # only cross_validate.py teaches these


def test_the_engine_gives_what_training_and_plain_pytorch_give(drawn, tmp_path):
    assert train_model.main(flags_of(drawn, tmp_path / "out", "--augmentation", "none", "--epochs", 1)) == 0
    table = weigh(tmp_path / "out" / "model.pt", tmp_path / "p.csv", drawn / PHOTOS, engine=nullcontext)[1]
    assert_same(table, tmp_path / "out")
    model = predict.read_checkpoint(tmp_path / "out" / "model.pt").model
    with torch.no_grad():
        plain = model.predict(pixels_of(drawn, table.index)[:, None], torch.zeros(60, 0), torch.zeros(60, 0)).numpy()
    assert table["predicted_g"].to_numpy() == pytest.approx(plain, abs=1e-4)


def test_a_folder_with_odd_photos_is_weighed_photo_by_photo(drawn, judged, clean, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(drawn / PHOTOS, photos / "deeper" / "still")
    shutil.copy(next((drawn / PHOTOS).glob("*.png")), photos / "top.PNG")
    first, second = ("deeper/still/" + name for name in clean.index[:2])
    (photos / first).write_bytes((photos / first).read_bytes()[:1000])
    (photos / second).write_text("no photo")
    status, odd = weigh(judged, tmp_path / "p.csv", photos, "--recursive", "--sheet", tmp_path / "sheet.png")
    assert status == 1 and "59 photos weighed" in (printed := capsys.readouterr().out) and "2 unreadable" in printed
    assert odd.loc[[first, second], "note"].str.startswith("unreadable photo").all()
    assert odd.loc[[first, second], ["predicted_g", "low_g", "high_g"]].isna().all(axis=None)
    same, numbers = odd.loc["deeper/still/" + clean.index[2:]], ["predicted_g", "low_g", "high_g"]
    assert same[numbers].to_numpy() == pytest.approx(clean[numbers][2:].to_numpy(), abs=1e-6)
    assert 800 < Image.open(tmp_path / "sheet.png").width < 1200 and (tmp_path / "sheet.png").stat().st_size < 400_000
    status, top = weigh(judged, tmp_path / "top.csv", photos, drawn / PHOTOS / clean.index[0])
    assert status == 0 and sorted(top.index) == sorted(["top.PNG", clean.index[0]])


def test_an_interval_promises_what_its_plants_can(drawn, judged, clean, tmp_path, capsys):
    assert list(clean)[:4] == ["predicted_g", "low_g", "high_g", "note"]
    assert clean["predicted_g"].between(clean["low_g"], clean["high_g"]).all() and clean["low_g"].min() >= 0
    narrow = weigh(judged, tmp_path / "p.csv", drawn / PHOTOS, "--coverage", 0.5)[1]
    assert (narrow["low_g"] >= clean["low_g"]).all() and narrow["high_g"].mean() < clean["high_g"].mean()
    assert "holds 50.0% of the weights in a filename never seen" in capsys.readouterr().out
    few = {"groups": 9, "independent": 9, "grouped_by": "experiment_id", "growth": [0.1, 0.0, 0.01], "floor": 0.0}
    few |= {"scores": [float(score) for score in range(-4, 5)], "weights": [0.1] * 9}
    torch.save(torch.load(judged, weights_only=True) | {"calibration": few}, tmp_path / "few.pt")
    table = weigh(tmp_path / "few.pt", tmp_path / "p.csv", drawn / PHOTOS)[1]
    assert "9 experiment_ids can promise 80.0% at most" in capsys.readouterr().out
    assert (table["high_g"] - table["predicted_g"]).to_numpy() == pytest.approx(0.4, abs=1e-6)  # the largest of nine


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_the_interval_is_made_of_the_quantiles_of_weighted_errors(coverage):
    random = np.random.default_rng(0)
    scores, weights = np.sort(random.gamma(1, 1, 99) - 0.5), random.uniform(0.5, 1.5, 99)
    weights *= 99 / 100 / weights.sum()
    known = {"scores": scores.tolist(), "weights": weights.tolist(), "growth": [0.1, 0.2, 0.01], "floor": -np.inf}
    predicted = np.array([0.5, 1, 3])
    low, high = writing.interval(known, predicted, coverage)
    side = (1 + coverage) / 2  # of all weights must lie within each end; errors are measured - predicted
    upper = next(score for score in scores if weights[scores <= score].sum() >= side)
    lower = next(score for score in scores[::-1] if weights[scores >= score].sum() >= side)
    assert high == pytest.approx(predicted + (0.1 + 0.2 * predicted) * upper)
    assert low == pytest.approx(predicted + (0.1 + 0.2 * predicted) * lower) and upper != pytest.approx(-lower)
    table = pd.DataFrame({"predicted": predicted, "measured": [low[0] - 0.01, 1, high[2] + 0.01]})
    checkpoint = SimpleNamespace(calibration=known | {"groups": 99, "independent": 99, "grouped_by": "plant"})
    marked, promised = predict.add_interval(table, checkpoint, coverage)
    assert marked["outside"].tolist() == [True, False, True] and promised == coverage
    assert marked["low"].to_numpy() == pytest.approx(low)


def test_photos_unlike_the_training_photos_are_marked(drawn, judged, clean, tmp_path):
    checkpoint = torch.load(judged, weights_only=True)
    with torch.no_grad():
        features = predict.read_checkpoint(judged).model.backbone(pixels_of(drawn, clean.index)).numpy()
    familiar = {name: value.numpy() for name, value in checkpoint["familiar"].items()}
    distances = writing.unlikeness(familiar, features)
    familiar["limit"].fill(np.quantile(distances, 0.71))  # it shares the checkpoint's memory
    torch.save(checkpoint, tmp_path / "strict.pt")
    table = weigh(tmp_path / "strict.pt", tmp_path / "p.csv", drawn / PHOTOS)[1]
    assert table["note"].notna().tolist() == (distances > familiar["limit"]).tolist()
    assert table["note"].dropna().str.startswith(f"{predict.UNLIKE}: ").all()


def test_the_note_says_in_what_a_photo_is_unlike(drawn, judged, clean, tmp_path):
    checkpoint = torch.load(judged, weights_only=True)
    checkpoint["familiar"]["limit"].fill_(-1)  # all are unlike
    torch.save(checkpoint, tmp_path / "strict.pt")
    photo, photos = Image.open(drawn / PHOTOS / clean.index[0]).convert("RGB"), tmp_path / "photos"
    photos.mkdir()
    red, green, blue = photo.split()
    changed = {
        "dark": ImageEnhance.Brightness(photo).enhance(0.3),
        "bright": ImageEnhance.Brightness(photo).enhance(2.5),
        "bluer": Image.merge("RGB", (red.point(lambda value: value // 2), green, blue.point(lambda value: 2 * value))),
        "plant larger": photo.crop((112, 112, 144, 144)).resize((256, 256)),
        "blurred": photo.filter(ImageFilter.GaussianBlur(6)),
        "another scene": photo,
    }
    for name, one in changed.items():
        one.save(photos / f"{name}.png")
    note = weigh(tmp_path / "strict.pt", tmp_path / "p.csv", photos)[1]["note"]
    words = dict(zip(changed, changed, strict=True)) | {"dark": "darker (lightness", "bright": "lighter"}
    for name in changed:
        assert words[name] in note[f"{name}.png"], note.to_dict()
    assert note["another scene.png"] == f"{predict.UNLIKE}: another scene"


def test_plants_and_times_of_the_sheet_stand_in_the_table(drawn, judged, tmp_path, capsys):
    sheet = pd.read_excel(drawn / SHEET).head(8)
    sheet.assign(pot=["007", *"1234567"], when="2024-05-03").to_csv(tmp_path / "new.csv", index=False)
    flags = ["--labels_path", tmp_path / "new.csv", "--image_dir", drawn / PHOTOS]
    kept = weigh(judged, tmp_path / "p.csv", *flags)[1]
    assert list(kept)[:4] == ["timestamp", "predicted_g", "low_g", "high_g"]  # this model's plants are its photos
    assert kept["timestamp"].tolist() == sheet["timestamp"].tolist()
    named = weigh(judged, tmp_path / "p.csv", *flags, "--group_by", "pot", "--time_column", "when")[1]
    assert list(named)[:3] == ["pot", "when", "predicted_g"] and named["when"].eq("2024-05-03").all()
    for flag in ("--group_by", "--time_column"):
        assert weigh(judged, tmp_path / "q.csv", *flags, flag, "nothing") == (2, None)
        assert "has no column 'nothing'" in capsys.readouterr().err
    assert weigh(judged, tmp_path / "q.csv", drawn / PHOTOS, "--time_column", "when") == (2, None)
    assert "pass --labels_path" in capsys.readouterr().err


def test_a_sheet_gives_measured_weights_and_decimal_commas(drawn, judged, clean, tmp_path, capsys, monkeypatch):
    sheet = pd.read_excel(drawn / SHEET)[["filename", TARGET]].dropna().head(20)
    sheet.loc[sheet.index[0], TARGET] = 9.5
    sheet["filename"] = sheet["filename"].str.upper()
    rows = pd.concat([sheet, pd.DataFrame({"filename": [None, "gone.png"], TARGET: 0.2})])
    rows.to_csv(tmp_path / "new.csv", sep=";", decimal=",", index=False)
    flags = ["--labels_path", tmp_path / "new.csv", "--image_dir", drawn / PHOTOS, "--sheet", tmp_path / "sheet.png"]
    drawings = []
    monkeypatch.setattr(writing, "save_figure", lambda figure, *_, **__: drawings.append(figure))
    status, table = weigh(judged, tmp_path / "p.csv", *flags)
    assert status == 1 and table.loc["gone.png", "note"] == "no such file" and len(table) == 21
    predicted = table["predicted_g"].dropna().to_numpy()
    assert predicted == pytest.approx(clean.loc[sheet["filename"].str.lower(), "predicted_g"].to_numpy(), abs=1e-6)
    errors = predicted - sheet[TARGET].to_numpy()
    assert "1 rows without a file name" in (printed := capsys.readouterr().out)
    assert f"against 20 measured: RMSE {np.sqrt((errors**2).mean()):.4f} g, bias {errors.mean():.4f} g" in printed
    titles = [axis.get_title() for axis in drawings[0].axes if axis.get_title()]
    marked = [axis for axis in drawings[0].axes if "outside" in axis.get_title()]
    assert len(titles) == 20 and len(marked) == 1 and all(title.count("\n") == 1 for title in titles)
    ends = [line.get_xdata().tolist() for line in marked[0].lines]
    odd = table.loc[table.index.isin(sheet["filename"].head(1)), ["low_g", "high_g", "predicted_g"]].iloc[0] / 9.5
    assert ends == [[0, 1], pytest.approx(odd[["low_g", "high_g"]].tolist()), [pytest.approx(odd["predicted_g"])], [1]]


def test_metadata_come_from_the_sheet(drawn, with_metadata, tmp_path):
    sheet = pd.read_excel(drawn / SHEET)[["filename", "age_days", "lab_book_page"]]
    judged_rows = sheet["filename"].isin(pd.read_csv(with_metadata / "predictions.csv")["filename"])
    sheet.loc[~judged_rows, "age_days"] = np.nan
    sheet.to_excel(tmp_path / "new.xlsx", index=False)
    flags = ["--labels_path", tmp_path / "new.xlsx", "--image_dir", drawn / PHOTOS]
    status, table = weigh(with_metadata / "model.pt", tmp_path / "p.csv", *flags)
    lacks = table["note"].fillna("").str.contains("without age_days").to_numpy()
    assert status == 0 and (lacks == sheet["age_days"].isna()).all()
    assert_same(table, with_metadata)


def test_heat_maps_weigh_a_whole_photo_as_the_table_does(drawn, with_metadata, tmp_path, heat_maps):
    flags = ["--labels_path", drawn / SHEET, "--image_dir", drawn / PHOTOS, "--explain", tmp_path / "heat.png"]
    status, table = weigh(with_metadata / "model.pt", tmp_path / "p.csv", *flags)
    assert status == 0 and (tmp_path / "heat.png").is_file()
    (heats, whole) = heat_maps
    assert whole == pytest.approx([table["predicted_g"].min(), table["predicted_g"].max()], rel=1e-4)
    assert heats.shape == (2, 8, 8) and heats.std() > 0


MISTAKES = {
    "nowhere.pt {photos}": "no model at nowhere.pt: train one",
    "photo.pt {photos}": "photo.pt is not a checkpoint",
    "code.pt {photos}": "code.pt is not a checkpoint",
    "other.pt {photos}": "other.pt is not a checkpoint",
    "{metadata} {photos}": "{metadata} has learned from age_days, lab_book_page too: pass them by --labels_path",
    "{metadata} --labels_path header.csv": "header.csv has no column 'age_days'",
    "{model}": "pass either photos and folders, or --labels_path",
    "{model} empty": "no photo at empty",
    "{model} {photos} --out empty": "cannot write empty (it is a folder)",
    "{model} {photos} --sheet sheet.jpg": "sheet.jpg: a picture's name must end in .png",
    "{model} --labels_path header.csv --image_dir {photos}": "no row of header.csv has a file name",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_get_one_line(flags, drawn, judged, with_metadata, tmp_path, monkeypatch, capsys):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.pt").write_bytes(b"no model")
    (tmp_path / "header.csv").write_text("filename,plant_number\n")
    checkpoint = torch.load(judged, weights_only=True)
    torch.save({"model_state": Code()}, "code.pt")
    torch.save(checkpoint | {"settings": checkpoint["settings"] | {"name": "resnet18"}}, "other.pt")
    places = {"photos": drawn / PHOTOS, "model": judged, "metadata": with_metadata / "model.pt"}
    assert predict.main(["--device", "cpu", "--model", *flags.format(**places).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"predict.py: error: {MISTAKES[flags].format(**places)}") and error.count("\n") == 1
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("kind", ["with_metadata", "with_traits"])
def test_export_gives_the_same_grams(kind, drawn, tmp_path, request, recwarn):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model = request.getfixturevalue(kind) / "model.pt"
    assert weigh(model, tmp_path / "p.csv", "--export", tmp_path / "model.onnx") == (0, None)
    assert not recwarn.list
    table = weigh(model, tmp_path / "p.csv", "--labels_path", drawn / SHEET)[1].head(5)
    rows = pd.read_excel(drawn / SHEET).set_index("filename").loc[table.index]
    traits = [plant.measure_traits(Image.open(drawn / PHOTOS / name).convert("RGB")) for name in table.index]
    beside = {
        "with_metadata": {"metadata": reading.encode_metadata(rows, torch.load(model, weights_only=True)["metadata"])},
        "with_traits": {"traits": np.stack(traits)[:, : len(plant.TRAITS)]},
    }
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for side, tolerance in ((64, 1e-4), (256, 0.02)):  # where it resizes it does so in floats
        photos = pixels_of(drawn, table.index, side).numpy()
        grams = session.run(None, {"photos": photos, **beside[kind]})[0]
        assert grams == pytest.approx(table["predicted_g"].to_numpy(), abs=tolerance)


AS_SCRIPT = f"""import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import conftest
with conftest.quick():
    runpy.run_path({str(ROOT / "train_model.py")!r}, run_name="__main__")
"""


def test_photos_that_the_store_holds_are_not_seen_again(drawn, tmp_path, capsys):
    flags = ["--augmentation", "none", "--epochs", 1]
    command = [sys.executable, "-c", AS_SCRIPT, *flags_of(drawn, tmp_path / "out", *flags)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = len(pd.read_excel(drawn / SHEET).dropna(subset=TARGET))
    train(drawn, tmp_path / "again", *flags)  # as a module, by another name than the script's own
    assert f"features: {known} found, 0 to compute" in capsys.readouterr().out
    more = ["--cache_dir", tmp_path / "cache", "--explain", tmp_path / "heat.png"]
    for found in (known, 60):
        weigh(tmp_path / "out" / "model.pt", tmp_path / "p.csv", drawn / PHOTOS, *more)
        printed = capsys.readouterr().out
        assert f"features: {found} found, {60 - found} to compute" in printed
        # of the two heat maps: 64 hidden patches and the photo itself
        assert ("features: 130 found, 0 to compute" in printed) == (found == 60)


def test_a_model_of_bf16_on_a_processor_without_it_says_what_that_costs(drawn, judged, tmp_path, capsys, monkeypatch):
    checkpoint = torch.load(judged, weights_only=True)
    checkpoint["settings"]["precision"] = "bf16"
    torch.save(checkpoint, tmp_path / "bf16.pt")
    monkeypatch.setattr(train_model, "has_bf16", lambda on_cpu: False)
    weigh(tmp_path / "bf16.pt", tmp_path / "p.csv", drawn / PHOTOS)
    printed = capsys.readouterr().out
    assert "was trained in bf16, which this processor lacks: computed in fp32" in printed and ", fp32, cpu" in printed


def test_export_asks_for_its_packages_before_the_photos_are_weighed(drawn, judged, tmp_path, capsys, monkeypatch):
    real = predict.importlib.util.find_spec
    monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name: None if name == "onnx" else real(name))
    assert weigh(judged, tmp_path / "p.csv", drawn / PHOTOS, "--export", tmp_path / "m.onnx") == (2, None)
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err

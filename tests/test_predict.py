"""What a user of predict.py would notice: the weights, the interval, the notes, the message on bad input."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_train_model import SHEET, TARGET, train

import predict
from calibration import calibrate, interval

PHOTOS = "images_med_res"


def weigh(*flags):
    return predict.main([str(flag) for flag in ("--device", "cpu", *flags)])


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory):
    """A model trained with folds on the drawn photos, quickly."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--folds", 5, "--epochs", 15, "--standardize_features", "--target_transform", "sqrt", "--image_size", 96]
    train(drawn, out, *flags, "--group_by", "filename")
    return out / "model.pt"


def test_predictions_are_those_of_the_training_run(drawn, tmp_path):
    for name, flags in {
        "stored": ["--standardize_features", "--target_transform", "log"],
        "layers": ["--unfreeze_from", "layer4.1", "--image_size", 64],
        "images": ["--unfreeze_backbone", "--image_size", 64, "--epochs", 1],
    }.items():
        train(drawn, tmp_path / name, "--epochs", 2, "--precision", "fp32", *flags)
        model, out = tmp_path / name / "model.pt", tmp_path / f"{name}.csv"
        assert weigh("--model", model, drawn / PHOTOS, "--out", out) == 0
        wanted = pd.read_csv(tmp_path / name / "predictions.csv").set_index("filename")["predicted_g"]
        table = pd.read_csv(out).set_index("filename")
        assert len(table) == 60
        assert table.loc[wanted.index, "predicted_g"].to_numpy() == pytest.approx(wanted.to_numpy(), abs=1e-6)
        assert table[["low_g", "high_g", "note"]].isna().all(axis=None)


def test_intervals_hold_for_new_plants_and_grow_with_the_prediction():
    random = np.random.default_rng(0)

    def draw(plants):
        plant = np.repeat(np.arange(plants), random.integers(1, 20, plants))
        predicted = random.lognormal(-1.5, 0.9, plants)[plant] * random.uniform(0.8, 1.25, len(plant))
        noise = random.normal(0, 0.8, plants)[plant] + random.gamma(2, 0.5, len(plant)) - 1
        return predicted, (0.02 + 0.2 * predicted) * noise, plant

    covered, heavy = [], []
    for _ in range(40):
        predicted, errors, plant = draw(120)
        calibration = calibrate(predicted, errors, plant)
        predicted, errors, plant = draw(120)
        measured = (predicted - errors).clip(min=0)
        low, high = interval(calibration, predicted, 0.9)
        inside = (low <= measured) & (measured <= high)
        covered.append(pd.Series(inside).groupby(plant).mean().mean())
        heavy.append(inside[predicted > np.quantile(predicted, 0.75)].mean())
        assert (low >= 0).all() and (low <= predicted).all() and (predicted <= high).all()
    assert 0.89 <= np.mean(covered) <= 0.92
    assert np.mean(heavy) > 0.85
    width = high - low
    assert np.median(width[predicted > 0.5]) > 3 * np.median(width[predicted < 0.1])
    few = calibrate([0.1, 0.2, 0.3], [0.01, -0.02, 0.03], [1, 2, 3])
    assert np.isinf(interval(few, [0.2], 0.9)[1]).all() and np.isfinite(interval(few, [0.2], 0.4)[1]).all()


def test_a_folder_with_odd_photos_is_weighed_photo_by_photo(drawn, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(drawn / PHOTOS, photos)
    assert weigh("--model", trained, photos, "--out", tmp_path / "clean.csv") == 0
    clean = pd.read_csv(tmp_path / "clean.csv").set_index("filename")
    assert list(clean) == ["predicted_g", "low_g", "high_g", "note"]
    assert (clean["low_g"] >= 0).all() and (clean["low_g"] <= clean["predicted_g"]).all()
    assert (clean["predicted_g"] <= clean["high_g"]).all() and np.isfinite(clean["high_g"]).all()
    assert clean["note"].notna().sum() <= 3

    first, second, third = (photos / name for name in sorted(clean.index)[:3])
    first.write_bytes(first.read_bytes()[:1000])
    second.write_text("no photo")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    Image.open(third).transpose(Image.Transpose.ROTATE_90).save(photos / "turned.jpg", quality=95, exif=turned)
    for suffix in ("tif", "webp"):
        Image.open(third).save(photos / f"same.{suffix}", lossless=True)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    Image.new("RGB", (256, 256), "white").save(photos / "blank.png")
    capsys.readouterr()
    flags = ["--model", trained, photos, "--sheet", tmp_path / "sheet.png"]
    assert weigh(*flags, "--out", tmp_path / "odd.csv") == 1
    assert "63 photos weighed" in (printed := capsys.readouterr().out) and "2 unreadable" in printed
    odd = pd.read_csv(tmp_path / "odd.csv").set_index("filename")
    assert odd.loc[[first.name, second.name], "note"].str.startswith("unreadable photo").all()
    assert odd.loc[[first.name, second.name], ["predicted_g", "low_g", "high_g"]].isna().all(axis=None)
    good = sorted(set(clean.index) - {first.name, second.name})
    assert odd.loc[good, "predicted_g"].to_numpy() == pytest.approx(clean.loc[good, "predicted_g"].to_numpy(), abs=1e-5)
    assert odd.loc[["same.tif", "same.webp"], "predicted_g"].nunique() == 1
    assert odd.loc["turned.jpg", "predicted_g"] == pytest.approx(clean.loc[third.name, "predicted_g"], rel=0.1)
    assert (odd.loc[["noise.png", "blank.png"], "note"] == predict.UNLIKE).all()
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert picture.shape[1] > 1500 and picture.std() > 5
    weigh(*flags, "--out", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "odd.csv").read_bytes()


def test_a_sheet_gives_metadata_and_measured_weights(drawn, tmp_path, capsys):
    flags = ["--folds", 3, "--epochs", 5, "--image_size", 64, "--standardize_features"]
    train(drawn, tmp_path / "out", *flags, "--metadata_columns", "age_days", "lab_book_page")
    sheet = pd.read_excel(drawn / SHEET)
    sheet[[TARGET, "lab_book_page", "filename", "age_days"]].to_csv(tmp_path / "new.csv", index=False)
    capsys.readouterr()
    flags = ["--model", tmp_path / "out" / "model.pt", "--out", tmp_path / "p.csv"]
    assert weigh(*flags, "--labels_path", tmp_path / "new.csv", "--image_dir", drawn / PHOTOS) == 0
    assert f"against {sheet[TARGET].count()} measured: RMSE" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["filename"].tolist() == sheet["filename"].tolist() and table["predicted_g"].notna().all()
    for wrong, text in ((["--labels_path", tmp_path / "old.csv"], "age_days"), ([drawn / PHOTOS], "--labels_path")):
        sheet[["filename"]].to_csv(tmp_path / "old.csv", index=False)
        with pytest.raises(SystemExit) as stop:
            weigh(*flags, *wrong, "--image_dir", drawn / PHOTOS)
        assert stop.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (["--model", "nowhere.pt", "{photos}"], ["no model at nowhere.pt", "train_model.py"]),
        (["--model", "photo.pt", "{photos}"], ["photo.pt", "not a checkpoint"]),
        (["--model", "foreign.pt", "{photos}"], ["foreign.pt", "not a checkpoint", "lacks"]),
        (["--model", "code.pt", "{photos}"], ["code.pt", "not a checkpoint"]),
        (["--model", "{model}"], ["photos and folders", "--labels_path"]),
        (["--model", "{model}", "nowhere"], ["no photo and no folder at nowhere"]),
        (["--model", "{model}", "empty"], ["no photo in empty", "--recursive"]),
        (["--model", "{model}", "{photos}", "--coverage", "1"], ["--coverage", "below 1"]),
        (["--model", "{model}", "{photos}", "--out", "empty"], ["empty"]),
        (["--model", "{model}", "{photos}", "--out", "photo.pt/p.csv"], ["photo.pt"]),
        (["--model", "other.pt", "{photos}"], ["other.pt", "does not fit"]),
        (["--model", "{model}", "--labels_path", "header.csv", "--image_dir", "{photos}"], ["header.csv", "no row"]),
    ],
)
def test_mistakes_get_one_line(flags, texts, drawn, trained, tmp_path, monkeypatch, capsys):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.pt").write_bytes(b"no model")
    torch.save({"state_dict": {}}, "foreign.pt")
    torch.save({"model_state": Code()}, "code.pt")
    other = torch.load(trained, weights_only=True)
    torch.save(other | {"settings": other["settings"] | {"model_name": "resnet34"}}, "other.pt")
    (tmp_path / "header.csv").write_text("filename,plant_number\n")
    with pytest.raises(SystemExit) as stop:
        weigh(*(flag.format(photos=drawn / PHOTOS, model=trained) for flag in flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(text in error for text in texts), error
    assert not (tmp_path / "was_run").exists()


def test_export_gives_the_same_grams(drawn, trained, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit):
            weigh("--model", trained, "--export", out)
        assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err and not out.exists()
        return
    assert weigh("--model", trained, "--export", out) == 0
    weigh("--model", trained, drawn / PHOTOS, "--precision", "fp32", "--out", tmp_path / "p.csv")
    table = pd.read_csv(tmp_path / "p.csv")[:6]
    photos = np.stack([np.asarray(Image.open(drawn / PHOTOS / name)).transpose(2, 0, 1) for name in table["filename"]])
    grams = onnxruntime.InferenceSession(str(out)).run(None, {"photos": photos})[0]
    assert grams == pytest.approx(table["predicted_g"].to_numpy(), rel=0.02, abs=0.002)  # it resizes in floats

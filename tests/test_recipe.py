"""Symmetries, traits and recipes: what goes into a prediction, made again by hand in the plainest way."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TARGET, WITH_TRAITS, prepared, quick, train
from PIL import Image
from test_predict import assert_same, weigh

import cross_validate
import eda
import predict
import train_model as tm
from biomass import plant, reading

PHOTOS = "images_med_res"


def turned_by_hand(pixels):
    """The eight symmetries of a square (side, side, 3)."""
    return [np.rot90(side, quarter) for side in (pixels, pixels[:, ::-1]) for quarter in range(4)]


def grams_by_hand(model, path, versions=8):
    """The mean over the versions of the grams, from a file, with nothing of the loop, the store or the engine."""
    photo = Image.open(path).convert("RGB")
    pixels = np.stack(turned_by_hand(np.array(photo.resize((64, 64), Image.BILINEAR)))[:versions])
    traits = torch.from_numpy(plant.measure_traits(photo)[None, : len(plant.TRAITS)])
    with torch.no_grad():
        found = model.backbone(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous())
        outputs = model.eval()(found[None], traits, torch.zeros(1, 0))
        return float(model.to_grams(outputs).mean())


def test_the_versions_are_the_eight_symmetries_and_the_first_is_the_photo(drawn, tmp_path):
    this = prepared(drawn, tmp_path / "out", *WITH_TRAITS)[1]
    found = this.dataset[3, range(8), None][0]
    photo = Image.open(this.dataset.paths[3]).convert("RGB").resize((64, 64), Image.BILINEAR)
    assert np.array_equal(found[0].permute(1, 2, 0), np.array(photo))
    wanted = {turned.tobytes() for turned in turned_by_hand(np.array(photo))}
    assert {version.permute(1, 2, 0).numpy().tobytes() for version in found} == wanted and len(wanted) == 8
    in_graph = this.dataset.augmentation.of_tensor(found[:1])[0]  # what --export makes of one photo
    assert {version.permute(1, 2, 0).numpy().tobytes() for version in in_graph} == wanted
    trained = [this.dataset.augmentation.trained(number, np.arange(9)).tolist() for number in range(9)]
    assert trained == [[number % 8] * 9 for number in range(9)]
    mixed = [tm.Symmetries(0, 0, mixed=True).trained(number, np.arange(800)) for number in (0, 1)]  # where layers learn
    assert all((np.bincount(versions, minlength=8) > 60).all() for versions in mixed)
    assert 60 < (mixed[0] == mixed[1]).sum() < 140


def test_a_prediction_is_the_mean_over_eight_with_the_traits_of_its_own_photo(drawn, with_traits, tmp_path):
    model = predict.read_checkpoint(with_traits / "model.pt").model
    status, table = weigh(with_traits / "model.pt", tmp_path / "p.csv", drawn / PHOTOS)
    assert status == 0
    assert_same(table, with_traits)
    by_hand = [grams_by_hand(model, drawn / PHOTOS / name) for name in table.index[:20]]
    assert table["predicted_g"][:20].tolist() == pytest.approx(by_hand, abs=1e-5)
    plain = [grams_by_hand(model, drawn / PHOTOS / name, versions=1) for name in table.index[:20]]
    assert table["predicted_g"][:20].tolist() != pytest.approx(plain, rel=1e-3)
    this = prepared(drawn, tmp_path / "out", *WITH_TRAITS)[1]
    with quick():  # what heat maps and erased photos are weighed by
        photos = [reading.open_photo(drawn / PHOTOS / name) for name in table.index[:3]]
        weighed = tm.weigh(model, this.batches, photos, torch.zeros(3, 0))
    assert weighed.tolist() == pytest.approx(by_hand[:3], abs=1e-5)


def test_folds_judge_and_calibrate_what_predict_gives(drawn, tmp_path):
    out = tmp_path / "out"
    metrics = train(drawn, out, *WITH_TRAITS, "--folds", 3, "--no_erasing", script=cross_validate)
    table, checkpoint = pd.read_csv(out / "predictions.csv"), torch.load(out / "model.pt", weights_only=True)
    offset, slope, least = checkpoint["calibration"]["growth"]
    size = np.maximum(offset + slope * table["predicted_g"], least)
    scores = np.sort((table["measured_g"] - table["predicted_g"]) / size)
    assert np.array(checkpoint["calibration"]["scores"]) == pytest.approx(scores, rel=1e-3, abs=1e-4)
    assert metrics["val_rmse"] == pytest.approx(((table["measured_g"] - table["predicted_g"]) ** 2).mean() ** 0.5)
    this = prepared(drawn, out, *WITH_TRAITS)[1]
    first = table[table["fold"] == 1]["filename"]
    held = this.labels["filename"].isin(first).to_numpy()
    split = np.flatnonzero(~held), np.flatnonzero(held)
    with quick():
        this.batches.collect(*split)
        model = tm.new_model(this.batches, this.backbone, split[0])
        tm.fit(model, this.batches, split, this.progress)
    by_hand = [grams_by_hand(model, drawn / PHOTOS / name) for name in first]
    assert table["predicted_g"][table["fold"] == 1].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_traits_stay_out_where_plants_are_not_seen(drawn, copied, tmp_path, capsys):
    for path in sorted((copied / PHOTOS).glob("*.png"))[:20]:
        Image.fromarray(np.asarray(Image.open(path).convert("RGB"))[..., [0, 0, 0]]).save(path)  # grey
    train(copied, tmp_path / "out", *WITH_TRAITS, "--epochs", 1)
    assert "traits left out: " in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert checkpoint["settings"]["traits"] is False and len(checkpoint["model_state"]["trait_mean"]) == 0


@pytest.mark.parametrize("script", ["eda", "predict"])
def test_traits_are_those_of_each_photo_in_its_pixels_or_mm(script, with_traits, tmp_path):
    """Rectangles, whose traits are known: 200 x 100 pixels of a photo of 512 are 100 x 50 of the small copy."""
    folder, sides = tmp_path / "photos", {"b.png": (200, 100), "a.png": (120, 80), "c.png": (0, 0)}
    folder.mkdir()
    for name, (width, height) in sides.items():
        pixels = np.full((512, 512, 3), 90, np.uint8)
        pixels[200 : 200 + height, 100 : 100 + width] = (60, 180, 60)
        Image.fromarray(pixels).save(folder / name)
    rows = {"filename": [*sides], "plant_number": [1, 2, 3], TARGET: [0.1, 0.2, 0.3]}
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    places = ["--labels_path", str(tmp_path / "labels.csv"), "--image_dir", str(folder), "--mm_per_pixel", "0.25"]
    if script == "eda":
        flags = ["--figures_dir", str(tmp_path / "figures"), "--summary_path", str(tmp_path / "s.json")]
        assert eda.main([*places, *flags, "--traits", str(tmp_path / "t.csv")]) == 0
        table = pd.read_csv(tmp_path / "t.csv").set_index("filename")
    else:
        table = weigh(with_traits / "model.pt", tmp_path / "p.csv", *places)[1]
    assert sorted(table.index) == sorted(sides)
    big, small, none = (table.loc[name] for name in sides)
    assert big["area_mm2"] == pytest.approx(200 * 100 / 16) and small["area_mm2"] == pytest.approx(120 * 80 / 16)
    assert big["hull_area_mm2"] == pytest.approx(200 * 100 / 16) and big["eg50_area_mm2"] == big["area_mm2"]
    assert (big["box_length_mm"], big["box_width_mm"], big["thickness_mm"]) == pytest.approx((50, 25, 12.5))
    assert big["perimeter_mm"] == pytest.approx(99 + 49)  # between the middles of the outer pixels of the copy
    axes = np.sqrt(16 * (np.array([100, 50]) ** 2 - 1) / 12) / 2  # of the ellipse with the same moments
    assert (big["long_axis_mm"], big["short_axis_mm"]) == pytest.approx(tuple(axes), rel=1e-4)
    assert big["eccentricity"] == pytest.approx(np.sqrt(1 - (axes[1] / axes[0]) ** 2), abs=1e-4)
    assert (big["solidity"], big["parts"], big["hue"]) == pytest.approx((1, 1, 1 / 3), abs=1e-4)
    colour = big["saturation"], big["value"], big["value_sd"]
    assert colour == pytest.approx((2 / 3, 180 / 255, 0), abs=0.01)  # the edge is mixed
    assert (none[["area_mm2", "box_length_mm", "parts"]] == 0).all() and np.isnan(none["hue"])


def test_a_recipe_sets_its_flags_and_one_that_is_given_wins(drawn, tmp_path, capsys):
    given = ["--recipe", "recommended", "--epochs", 1, "--dropout", 0.3]  # which is the default, yet it was given
    arguments = train(drawn, tmp_path / "out", *given)["run"]["arguments"]
    assert "recipe recommended, but for flags that were given: --model_name tf_" in capsys.readouterr().out
    assert (arguments["epochs"], arguments["dropout"], arguments["image_size"]) == (1, 0.3, 64)  # 64 is TINY's
    assert (arguments["augmentation"], arguments["features"]) == ("symmetries", ["last", "stages", "traits"])
    assert vars(tm.parse_arguments(tm.build_parser(), [])) == vars(tm.build_parser().parse_args([]))
    log = (tmp_path / "out" / "training.log").read_text(encoding="utf-8")
    assert "recipe=recommended" in log and json.loads((tmp_path / "out" / "metrics.txt").read_text())

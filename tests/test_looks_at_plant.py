"""Does cross_validate.py find out what tells the weight? Planted truth: one set where the plants do, one where not."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import prepared, quick, train
from PIL import Image, ImageEnhance
from scipy.ndimage import binary_opening, gaussian_filter

import cross_validate
import make_sample_data
from biomass import plant, reading

PHOTOS = 60


def plant_truth(folder, kind, photos=PHOTOS):
    """A folder of drawn photos of one experiment, whose weight the plants tell, or how bright the photo is."""
    (folder / "images_med_res").mkdir(parents=True)
    plants = make_sample_data.grow(photos, 3).assign(experiment_id=1)
    weights = plants["expected"].to_numpy()
    random = np.random.default_rng(0)
    told = random.permutation(weights) if kind == "background" else weights
    bright = 0.5 + 0.9 * told.argsort().argsort() / photos
    names = [f"{index}.png" for index in range(photos)]
    for index, grown in enumerate(plants.to_dict("records")):
        photo = make_sample_data.draw_photo(grown, 3, index)
        photo = ImageEnhance.Brightness(photo).enhance(bright[index]) if kind == "background" else photo
        photo.save(folder / "images_med_res" / names[index])
    sheet = {"filename": names, "plant_number": np.arange(photos) // 4, "experiment_id": np.arange(photos) % 2}
    pd.DataFrame(sheet | {"fresh_weight_total": told}).to_csv(folder / "labels.csv", index=False)


@pytest.mark.parametrize(
    ("kind", "least", "most", "sentence"),
    [("background", 0.5, 1, "mostly from the background"), ("plants", -1, 0.3, "read from the plants")],
)
def test_planted_truth_is_found(kind, least, most, sentence, tmp_path):
    plant_truth(tmp_path / "data", kind)
    flags = ["--labels_path", tmp_path / "data" / "labels.csv", "--image_dir", tmp_path / "data" / "images_med_res"]
    flags += ["--recipe", "recommended", "--image_size", "96", "--epochs", "10", "--least_steps", "20", "--folds", "3"]
    flags += ["--augmentation", "none", "--precision", "fp32", "--results_dir", tmp_path / "out"]
    flags += ["--log_path", tmp_path / "log", "--model_out", tmp_path / "m.pt", "--cache_dir", tmp_path / "cache"]
    with quick(pictures=True):
        assert cross_validate.main([*map(str, flags)]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.txt").read_text())
    assert least < metrics["val_r_plant_erased"] < most, metrics["looks_at"]
    assert sentence in metrics["looks_at"] and sentence in (tmp_path / "log").read_text()
    assert metrics["val_r_ci95"][0] < metrics["val_r"] < metrics["val_r_ci95"][1]
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert metrics["val_r"] == pytest.approx(np.corrcoef(table["predicted_g"], table["measured_g"])[0, 1])
    experiment = pd.read_csv(tmp_path / "data" / "labels.csv").set_index("filename")["experiment_id"]
    groups = table["filename"].map(experiment)
    around = table["measured_g"] - table["measured_g"].groupby(groups).transform("mean")
    r2 = 1 - (table["error_g"] ** 2).sum() / (around**2).sum()
    assert metrics["val_r2_within_groups"] == pytest.approx(r2, rel=1e-6)
    assert [group["rows"] for group in metrics["within"]["groups"]] == groups.value_counts().sort_index().tolist()
    picture = np.asarray(Image.open(tmp_path / "out" / "where_it_looks.png").convert("L"))
    assert picture.shape[1] > 350 and picture.std() > 20


def test_a_plant_is_what_an_opening_of_the_green_leaves():
    green = np.random.default_rng(0).normal(size=(60, 80))
    photo = np.full((60, 80, 3), 90, np.uint8)
    photo[gaussian_filter(green, 1) > 0.1] = 40, 150, 40
    photo = Image.fromarray(photo)
    for threshold in (0.2, 0.5):
        wanted = binary_opening(plant.excess_green(photo) > threshold, np.ones((3, 3)))
        assert np.array_equal(plant.find_plant(photo, threshold), wanted) and 500 < wanted.sum() < 2400


def test_erasing_takes_the_plant_and_nothing_else():
    plants = make_sample_data.grow(40, 5).sort_values("expected")
    for index in (0, 20, 38):
        photo = make_sample_data.draw_photo(plants.iloc[index].to_dict(), 5, index)
        erased = plant.erase_plant(photo)
        hole = plant.plant_mask(photo, plant.WIDEN)
        assert not (plant.find_plant(photo) & ~hole).any()
        assert plant.green_area(erased) < 0.1 * plant.green_area(photo) + 0.002
        far = ~np.asarray(Image.fromarray(hole).convert("L").resize(photo.size), bool)
        beside = ~plant.plant_mask(photo, plant.WIDEN + 6)
        assert np.array_equal(np.asarray(photo)[beside & far], np.asarray(erased)[beside & far])
        alone = np.asarray(plant.erase_background(photo))
        assert (alone[beside] == plant.GREY).all()
        leaf = plant.plant_mask(photo, 0)
        rim = hole & ~leaf & plant.plant_mask(photo, 3)  # where the lens has spread the leaf's colour
        assert (np.asarray(photo) != np.asarray(erased)).any(2)[rim].mean() > 0.9
    grey = Image.new("RGB", (64, 64), (90, 80, 70))
    assert np.array_equal(np.asarray(plant.erase_plant(grey)), np.asarray(grey))
    assert np.array_equal(np.asarray(plant.erase_background(grey)), np.asarray(grey))


def test_a_heat_map_is_positive_where_hiding_takes_from_the_prediction():
    photo = Image.fromarray(np.random.default_rng(0).integers(60, 90, (160, 160, 3), dtype=np.uint8))
    bare = photo.copy()
    photo.paste((60, 180, 60), (102, 22, 118, 38))  # in the patch of row 1, column 5

    def weigh(photos, numbers):
        assert numbers.tolist() == [0] * 65 + [1] * 65
        return np.array([plant.green_area(photo) for photo in photos])

    without, heat = plant.heat_maps([bare, photo], weigh)
    assert not without.any()
    assert np.unravel_index(heat.argmax(), heat.shape) == (1, 5)
    assert heat[1, 5] == pytest.approx(plant.green_area(photo)) and np.abs(np.delete(heat, 13)).max() < 1e-6


@pytest.mark.parametrize("flags", ["--features last traits", "--unfreeze_backbone"])
def test_heat_maps_weigh_a_whole_photo_as_the_fold_does(flags, drawn, tmp_path, heat_maps):
    flags = ["--folds", 2, "--epochs", 1, "--metadata_columns", "age_days", *flags.split()]
    train(drawn, tmp_path / "out", *flags, script=cross_validate)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").query("fold == 1").sort_values("measured_g")
    (heats, whole) = heat_maps
    assert whole == pytest.approx(table["predicted_g"].iloc[[0, -1]].tolist(), rel=1e-4)
    assert heats.shape == (2, 8, 8) and heats.std() > 0


def test_erased_photos_are_judged_by_their_own_pixels_and_traits(drawn, tmp_path):
    _, this = prepared(drawn, tmp_path / "out", "--augmentation", "symmetries", "--features", "last", "traits")
    batches, rows, edit = this.batches, np.array([4, 1]), plant.erase_plant
    with quick():
        batches.collect(rows, rows, {edit: rows})
        (found, traits, *_), *more = batches.judge(rows, edit)
    assert not more
    for row, features, measured in zip(rows, found, traits, strict=True):
        photo = edit(reading.open_photo(this.dataset.paths[row]))
        assert measured.numpy() == pytest.approx(plant.measure_traits(photo)[: len(measured)], nan_ok=True)
        with torch.inference_mode():
            wanted = this.backbone(this.dataset.pixels(photo, range(8)))
        torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-4)
    whole = this.dataset.traits[None][rows]
    assert (whole[:, 0] > traits[:, 0]).all()

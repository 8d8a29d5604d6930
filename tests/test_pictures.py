"""The pictures show the numbers: what is drawn, where, in which colour."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TARGET
from PIL import Image

from biomass import writing

ARGS = argparse.Namespace(labels_path=None, target=TARGET, group_by=["plant_number"], results_dir=Path("results"))
ARGS.curves_path = Path("curves.png")


@pytest.fixture
def figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(writing, "save_figure", lambda figure, path, **more: drawn.append(figure))
    return drawn


@pytest.fixture
def table(tmp_path):
    random = np.random.default_rng(0)
    measured = random.uniform(0.1, 2, 30)
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 20)).save(path)
    rows = pd.DataFrame({"measured": measured, "predicted": measured + random.normal(0, 0.2, 30), "_path": str(path)})
    rows = rows.assign(error=rows["predicted"] - rows["measured"], _plant=range(30))
    return rows.assign(filename=[f"{number}.png" for number in range(30)])


def test_curves_are_the_losses_by_epoch_and_their_mean_over_the_folds(figures):
    rows = [(fold, epoch, 10 * fold / epoch, 20 * fold / epoch) for fold in (0, 1, 2, 3) for epoch in (1, 2, 4)]
    history = pd.DataFrame(rows, columns=["fold", "epoch", "train_loss", "val_loss"])  # fold 0 learns from all rows
    writing.plot_curves(history, {}, ARGS)
    for name, mean in (("training", 20), ("validation", 40)):
        (line,) = (line for line in figures[0].axes[0].lines if line.get_label() == f"{name}, mean of 3 folds")
        assert dict(zip(*line.get_data(), strict=True)) == pytest.approx({1: mean, 2: mean / 2, 4: mean / 4})


def test_the_prediction_is_above_the_measurement_and_the_error_above_the_prediction(figures, table):
    writing.plot_predictions(table, {"val_bias": 0.1, "val_r2": 0.5, "val_rmse": 0.2}, ARGS)
    for axis, columns in zip(figures[0].axes, (["measured", "predicted"], ["predicted", "error"]), strict=True):
        assert np.asarray(axis.collections[0].get_offsets()) == pytest.approx(table[columns].to_numpy())
        assert (columns[0] in axis.get_xlabel()) and ("predicted" in axis.get_ylabel())


def test_the_worst_predictions_are_the_worst(figures, table):
    writing.plot_worst(table, ARGS)
    shown = [axis.get_title().splitlines()[0] for axis in figures[0].axes]
    assert shown == table.iloc[table["error"].abs().argsort()[::-1]]["filename"][:9].tolist()


def test_a_heat_map_is_red_where_hiding_takes_from_the_prediction(figures):
    writing.draw_heat([(Image.new("RGB", (80, 80)), np.array([[1.0, -1.0]]), "title")], "heat.png", "g")
    image = figures[0].axes[1].images[-1]  # below the photo
    (lost, gained) = image.cmap(image.norm(image.get_array()))[0, :, :3]
    assert lost[0] > 2 * lost[2] and gained[2] > 2 * gained[0]
    assert "prediction lost (red)" in figures[0].axes[-1].get_ylabel()

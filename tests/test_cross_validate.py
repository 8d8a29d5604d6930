"""cross_validate.py: each row predicted once by a model that never saw its plant, and the numbers that follow."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHEET, TARGET, prepared, quick, tensors_of, train
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from scipy.optimize import nnls
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.model_selection import GroupKFold

import cross_validate
import train_model as tm
from biomass import plant, writing


@pytest.fixture(scope="session")
def judged(once, drawn):
    flags = ["--folds", 3, "--group_by", "experiment_id", "plant_number"]
    out = once("judged", lambda folder: train(drawn, folder / "out", *flags, script=cross_validate)) / "out"
    return out, json.loads((out / "metrics.txt").read_text())


def test_each_row_is_predicted_once_apart_from_its_plant_with_the_numbers_of_scikit_learn(judged, drawn):
    out, metrics = judged
    table, labelled = pd.read_csv(out / "predictions.csv"), pd.read_excel(drawn / SHEET).dropna(subset=TARGET)
    assert sorted(table["filename"]) == sorted(labelled["filename"])
    wanted = labelled.set_index("filename").loc[table["filename"], TARGET]
    assert table["measured_g"].tolist() == pytest.approx(wanted.tolist())
    assert table.groupby(["experiment_id", "plant_number"])["fold"].nunique().max() == 1
    assert set(table["fold"]) == {1, 2, 3}
    measured, predicted = table["measured_g"], table["predicted_g"]
    assert metrics["val_rmse"] == pytest.approx(root_mean_squared_error(measured, predicted), rel=1e-6)
    assert metrics["val_mae"] == pytest.approx(mean_absolute_error(measured, predicted), rel=1e-6)
    assert metrics["val_r2"] == pytest.approx(r2_score(measured, predicted), rel=1e-5)
    assert metrics["val_bias"] == pytest.approx((predicted - measured).mean(), rel=1e-4)
    assert metrics["val_rows"] == len(table)
    assert metrics["val_plants"] == len(table.groupby(["experiment_id", "plant_number"]))
    assert metrics["epoch"] == 2 and metrics["epoch_chosen_on"] == "none" and "last_epoch_val_rmse" not in metrics
    mean = [measured[table["fold"] != fold].mean() for fold in table["fold"]]
    assert metrics["baseline_mean_rmse"] == pytest.approx(root_mean_squared_error(measured, mean), rel=1e-5)
    each = metrics["folds"]["each"]
    for row, (fold, rows) in zip(each, table.groupby("fold"), strict=True):
        assert row["fold"] == fold and row["val_rows"] == len(rows) and row["train_rows"] == len(table) - len(rows)
        wanted = root_mean_squared_error(rows["measured_g"], rows["predicted_g"])
        assert row["val_rmse"] == pytest.approx(wanted, rel=1e-6)
    rmse = [row["val_rmse"] for row in each]
    assert metrics["folds"]["val_rmse_mean"] == pytest.approx(np.mean(rmse))
    assert metrics["folds"]["val_rmse_sd"] == pytest.approx(np.std(rmse, ddof=1))


def test_the_table_keeps_plant_and_time_and_an_interval_from_the_errors_of_other_folds(judged, drawn):
    table = pd.read_csv(judged[0] / "predictions.csv")
    numbers = ["measured_g", "predicted_g", "error_g", "low_g", "high_g"]
    wanted = ["filename", "experiment_id", "plant_number", "timestamp", "fold", *numbers, "drawn_data"]
    assert list(table) == wanted and table["drawn_data"].all()
    times = pd.read_excel(drawn / SHEET).set_index("filename")["timestamp"]
    assert table["timestamp"].tolist() == times.loc[table["filename"]].tolist()
    args = tm.build_parser().parse_args(["--labels_path", str(drawn / SHEET)])
    named = table.rename(columns=lambda name: name.removesuffix("_g"))
    named["_plant"] = table.groupby(["experiment_id", "plant_number"]).ngroup()
    others = cross_validate.calibrate(named[table["fold"] != 2], pd.DataFrame({TARGET: named["measured"]}), args)
    promised = min(0.9, writing.most_coverage(others))
    low, high = writing.interval(others, named.loc[table["fold"] == 2, "predicted"], promised)
    assert table.loc[table["fold"] == 2, "low_g"].tolist() == pytest.approx(low.tolist(), rel=1e-4, abs=1e-6)
    assert table.loc[table["fold"] == 2, "high_g"].tolist() == pytest.approx(high.tolist(), rel=1e-4)


def test_a_learning_curve_trains_on_nested_parts_and_ends_at_the_folds_own_error(drawn, tmp_path, monkeypatch):
    for name, value in {"FEWEST": 2, "SHARES": (1 / 4, 1 / 2), "DRAWS": 2}.items():
        monkeypatch.setattr(cross_validate, name, value)
    train_fold, squares = cross_validate.train_fold, {}

    def noted(run, args, split, name):
        model, learn, result = train_fold(run, args, split, name)
        squares[name] = (result["predicted"] - run.dataset.targets[split[1]]).square()
        return model, learn, result

    monkeypatch.setattr(cross_validate, "train_fold", noted)
    flags = ["--learning_curve", "--folds", 2, "--no_erasing", "--epochs", 1, "--augmentation", "none"]
    plants = ["--group_by", "experiment_id", "plant_number"]
    metrics = train(drawn, tmp_path / "out", *flags, *plants, script=cross_validate)
    curve, found = pd.read_csv(tmp_path / "out" / "learning_curve.csv"), metrics["learning_curve"]
    assert curve.groupby("plants").size().tolist() == [2, 2, 1]  # all plants are drawn in one way
    assert curve["plants"].iloc[-1] == metrics["val_plants"] / 2
    first = torch.cat([found for name, found in squares.items() if "share 0.25, draw 1" in name])
    assert len(first) == metrics["val_rows"] and curve["rmse"][0] == pytest.approx(float(first.mean().sqrt()), rel=1e-6)
    assert curve["rmse"].iloc[-1] == pytest.approx(metrics["val_rmse"], rel=1e-6) == found["rmse"][-1]
    assert (tmp_path / "out" / "learning_curve.png").is_file()
    assert found["sentence"] in (tmp_path / "out" / "training.log").read_text(encoding="utf-8")
    args = cross_validate.build_parser().parse_args(["--folds", "2"])
    labels = pd.DataFrame({"_plant": np.repeat(np.arange(40), 3)})
    learn = np.arange(90)
    parts = cross_validate.parts_of_folds(labels, {"fold 1": (learn, np.arange(90, 120))}, args)
    for draw in (1, 2):
        small, large = (parts[share, draw, "fold 1"][0] for share in (1 / 4, 1 / 2))
        assert set(small) < set(large) < set(learn) and len(small) == 24 and len(large) == 45
        assert (labels["_plant"].iloc[small].value_counts() == 3).all()


def test_the_sentence_of_a_learning_curve_is_what_its_numbers_say():
    plants, random = {share: 160 * share for share in (1 / 8, 1 / 4, 1 / 2, 1.0)}, np.random.default_rng(0)
    law = {share: 0.03 + 0.4 * count**-0.7 for share, count in plants.items()}
    table, args = pd.DataFrame({"_plant": np.repeat(np.arange(50), 4)}), cross_validate.build_parser().parse_args([])
    errors = random.normal(0, 1, (200, 1)) ** 2
    errors /= errors.mean()
    columns = pd.MultiIndex.from_product([plants, (1, 2, 3)])

    def judge(rmse, green=None, part=slice(None)):
        squares = pd.DataFrame(errors * np.repeat(np.array(rmse) ** 2, 3), columns=columns)
        kept = dict(list(plants.items())[part])
        return cross_validate.judge_curve(squares[list(kept)], kept, green, table, args)

    found = judge([*law.values()], green=0.06)
    assert [found[name] for name in "abc"] == pytest.approx([0.03, 0.4, 0.7], rel=1e-2)
    assert found["twice"] == pytest.approx(0.03 + 0.4 * 320**-0.7, rel=1e-3)
    assert found["all_from_half"] == pytest.approx(law[1.0], rel=1e-3)
    assert found["twice_ci95"][0] < found["twice"] < found["twice_ci95"][1]
    crossing = ((0.06 - 0.03) / 0.4) ** (-1 / 0.7)
    assert f"the green-area law (0.06 g) is better below {crossing:.0f} plants" in found["sentence"]
    assert "is better up to 160 plants" in judge([*law.values()], green=0.01)["sentence"]
    assert "is worse from 20 plants on" in judge([*law.values()], green=0.9)["sentence"]
    assert "no fall can be told" in judge([0.05, 0.05, 0.05, 0.05])["sentence"]
    few = judge([*law.values()], part=slice(2, None))
    assert "cannot be told from 50 plants, it takes 50" in few["sentence"] and "twice" not in few


def test_the_last_epoch_counts_and_fold_0_learns_from_all_rows(judged):
    out, metrics = judged
    history = pd.read_csv(out / "history.csv")
    assert history.groupby("fold").size().to_dict() == {0: 2, 1: 2, 2: 2, 3: 2}
    last = history[(history["epoch"] == 2) & (history["fold"] > 0)].set_index("fold")["val_rmse"]
    assert last.tolist() == pytest.approx([row["val_rmse"] for row in metrics["folds"]["each"]], rel=1e-5)
    assert history.loc[history["fold"] == 0, "val_loss"].isna().all()


def test_it_is_the_plain_loop_over_scikit_learns_folds(judged, drawn, tmp_path):
    flags = ["--group_by", "experiment_id", "plant_number"]
    _, this = prepared(drawn, tmp_path / "plain", *flags)
    found = pd.read_csv(judged[0] / "predictions.csv").set_index("filename")["predicted_g"]
    folds, unlike = GroupKFold(n_splits=3, shuffle=True, random_state=42), []
    with quick():
        for train_rows, val_rows in folds.split(this.labels, groups=this.labels["_plant"]):
            batches = this.batches
            batches.collect(train_rows, np.arange(len(this.labels)))
            model = tm.new_model(batches, this.backbone, train_rows)
            optimizer = torch.optim.AdamW(model.head.parameters(), 1e-3, weight_decay=0.01)
            torch.manual_seed(42)
            for epoch in (1, 2):
                model.train()
                for inputs, none, no_metadata, targets in batches.train(train_rows, epoch):
                    optimizer.zero_grad()
                    outputs = model(inputs, none, no_metadata)[:, 0]
                    torch.nn.functional.mse_loss(outputs, model.to_loss_unit(targets)).backward()
                    optimizer.step()
            predicted, _ = tm.evaluate(model, batches.judge(val_rows), batches)
            names = this.labels["filename"].iloc[val_rows]
            assert found.loc[names].tolist() == pytest.approx(predicted.tolist(), abs=1e-5)
            familiar = cross_validate.describe_features(batches.features(model, train_rows))
            unlike += writing.unlikeness(familiar, batches.features(model, val_rows)).tolist()
    limit = torch.load(judged[0] / "model.pt", weights_only=True)["familiar"]["limit"]
    assert float(limit) == pytest.approx(np.quantile(unlike, 0.99), rel=1e-3)  # of photos that were held out


def test_the_checkpoint_knows_how_far_it_may_be_off_and_what_it_was_trained_on(judged):
    out, metrics = judged
    table = pd.read_csv(out / "predictions.csv")
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    calibration, familiar = checkpoint["calibration"], checkpoint["familiar"]
    assert calibration["groups"] == metrics["val_plants"] and len(calibration["scores"]) == len(table)
    independent = calibration["independent"]
    assert calibration["groups"] <= independent <= len(table)
    assert sum(calibration["weights"]) == pytest.approx(independent / (independent + 1))
    offset, slope, least = calibration["growth"]
    size = np.maximum(offset + slope * table["predicted_g"], least)
    scores = (table["measured_g"] - table["predicted_g"]) / size
    order = np.argsort(scores.to_numpy())
    assert np.array(calibration["scores"]) == pytest.approx(scores[order].to_numpy(), rel=1e-3, abs=1e-4)
    photos = table.groupby(["experiment_id", "plant_number"])["filename"].transform("size")
    assert photos.max() > 1  # each plant counts as one, however many photos it has
    share = independent / (independent + 1) / metrics["val_plants"]
    assert np.array(calibration["weights"]) == pytest.approx(share / photos[order].to_numpy())
    terms = np.column_stack([np.ones(len(table)), table["predicted_g"]])
    assert [offset, slope] == pytest.approx(nnls(terms, table["error_g"].abs().to_numpy())[0], rel=1e-3, abs=1e-5)
    assert familiar["mean"].shape == (1024,) and float(familiar["limit"]) > 0
    assert checkpoint["model_state"].keys() == tensors_of(out).keys() and checkpoint["epoch"] == 2


def test_with_patience_the_epoch_is_chosen_on_training_plants_that_are_kept_aside(drawn, tmp_path):
    flags = ["--folds", 3, "--patience", 1, "--epochs", 8, "--lr_schedule", "cosine", "--target_transform", "log"]
    flags += ["--metadata_columns", "age_days", "--standardize_features", "--loss", "huber", "--no_erasing"]
    flags += ["--learning_rate", 3e-4]  # with which folds choose different epochs
    metrics = train(drawn, tmp_path / "out", *flags, script=cross_validate)
    assert metrics["epoch_chosen_on"] == "training plants kept aside"
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    best = [history[history["fold"] == fold].set_index("epoch")["val_loss"].idxmin() for fold in (1, 2, 3)]
    assert metrics["epoch"] == np.median(best) == history.loc[history["fold"] == 0, "epoch"].max()
    sheet = pd.read_excel(drawn / SHEET).dropna(subset=TARGET)
    trained_on = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["trained_on"]
    assert trained_on == {"rows": len(sheet), "plants": sheet["plant_number"].nunique()}
    assert metrics["val_rows"] == len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == len(sheet)
    for row in metrics["folds"]["each"]:  # what it was chosen on is not what is reported
        assert (history.loc[history["fold"] == row["fold"], "val_loss"] - row["val_mse"]).abs().min() > 1e-6


def test_photos_that_show_only_their_plant_do_not_beat_the_mean_on_other_plants(tmp_path):
    random, rows, photos = np.random.default_rng(3), [], tmp_path / "data" / "images_med_res"
    photos.mkdir(parents=True)
    for pot in range(12):
        weight, colour = random.uniform(0.1, 1), random.integers(20, 236, 3)
        for number in range(8):
            pixels = np.clip(colour + random.integers(-3, 4, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(photos / f"{pot}_{number}.png")
            rows.append({"filename": f"{pot}_{number}.png", "plant_number": pot, TARGET: weight})
    pd.DataFrame(rows).to_excel(tmp_path / "data" / SHEET, index=False)
    flags = ["--epochs", 25, "--folds", 3, "--learning_rate", 3e-3, "--augmentation", "none", "--standardize_features"]
    flags += ["--no_erasing"]
    by_row, by_plant = (
        train(tmp_path / "data", tmp_path / by, *flags, "--group_by", by, script=cross_validate)
        for by in ("filename", "plant_number")
    )
    assert by_row["val_rmse"] < 0.6 * by_row["baseline_mean_rmse"]
    assert by_plant["val_rmse"] > 0.9 * by_plant["baseline_mean_rmse"]


def test_one_photo_in_two_plants_is_left_out_of_training_where_it_is_held_out(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "data")
    sheet = pd.read_excel(drawn / SHEET).dropna(subset=TARGET).drop_duplicates("plant_number")["filename"].tolist()
    photos = tmp_path / "data" / "images_med_res"
    shutil.copy(photos / sheet[0], photos / sheet[1])
    flags, older = ["--folds", 5, "--epochs", 1, "--no_erasing"], ["learning_curve", "where_it_looks"]
    (tmp_path / "out").mkdir()
    for name in older:
        (tmp_path / "out" / f"{name}.png").write_bytes(b"of an earlier run")
    metrics = train(tmp_path / "data", tmp_path / "out", *flags, script=cross_validate)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("filename")
    folds = table.loc[sheet[:2], "fold"].tolist()
    left = [len(table) - fold["val_rows"] - fold["train_rows"] for fold in metrics["folds"]["each"]]
    wanted = [int(fold in folds and folds[0] != folds[1]) for fold in range(1, 6)]
    assert left == wanted and sum(wanted) == 2, (left, folds)
    printed = capsys.readouterr().out
    assert printed.count("left 1 training rows out, their photo is in validation too") == 2
    for name in older:  # it would be taken for this run's
        assert not (tmp_path / "out" / f"{name}.png").exists() and f"kept as {name}.older.png" in printed
        assert (tmp_path / "out" / f"{name}.older.png").read_bytes() == b"of an earlier run"


@pytest.mark.parametrize(("plants", "photos", "alike"), [(20, 20, 0.4), (34, 2, 0.6), (150, 10, 0.0), (40, 20, 0.9)])
def test_the_interval_holds_what_it_promises_of_new_plants_however_alike_their_photos_err(plants, photos, alike):
    random, held, promised = np.random.default_rng(0), [], []
    args = tm.build_parser().parse_args([])
    for _ in range(150):
        of_plant, of_photo = random.normal(0, 1, (2 * plants, 1)), random.normal(0, 1, (2 * plants, photos))
        errors = 0.1 * (np.sqrt(alike) * of_plant + np.sqrt(1 - alike) * of_photo)
        table = pd.DataFrame({"_plant": np.repeat(np.arange(plants), photos), "error": errors[:plants].ravel()})
        table["predicted"] = 1.0
        known = cross_validate.calibrate(table, pd.DataFrame({TARGET: [1.0]}), args)
        assert plants <= known["independent"] <= plants * photos + 1e-6
        promised.append(min(0.9, writing.most_coverage(known)))
        low, high = writing.interval(known, [1.0], promised[-1])
        held.append(((1 - errors[plants:] >= low) & (1 - errors[plants:] <= high)).mean())
    assert np.mean(promised) - 0.02 < np.mean(held) < np.mean(promised) + 0.05


def test_photos_that_err_as_one_are_worth_one():
    group, photos = np.repeat(np.arange(12), 5), np.full(12, 5)
    random = np.random.default_rng(0)
    assert cross_validate.count_independent(random.normal(0, 1, 12)[group], group, photos) == pytest.approx(12)
    assert cross_validate.count_independent(random.normal(0, 1, 12), np.arange(12), np.ones(12)) == 12
    assert cross_validate.count_independent(np.zeros(60), group, photos) == 12
    for counts in (photos, np.arange(1, 13)):  # of unequal numbers too
        group, count = np.repeat(np.arange(12), counts), counts.sum()
        scores = random.normal(0, 1, count) + 0.7 * random.normal(0, 1, 12)[group]
        ratio = stats.f_oneway(*np.split(scores, np.cumsum(counts)[:-1])).statistic
        alike = (ratio - 1) / (ratio - 1 + (count - (counts**2).sum() / count) / 11)  # the intraclass correlation
        wanted = 12 / np.mean(alike + (1 - alike) / counts)
        assert 15 < wanted < count - 10
        assert cross_validate.count_independent(scores, group, counts) == pytest.approx(wanted)


@pytest.mark.parametrize("photos", [12, 40, 400])
def test_odd_photos_are_unlike_however_few_there_are(photos):
    random = np.random.default_rng(0)
    mix = random.normal(0, 1, (60, 900)) * np.linspace(1, 0.05, 60)[:, None]
    drawn = random.normal(0, 1, (photos + 40, 60)) @ mix + random.normal(0, 0.3, (photos + 40, 900))
    familiar = cross_validate.describe_features(drawn[:photos])
    like = writing.unlikeness(familiar, drawn[photos:])
    odd = writing.unlikeness(familiar, drawn[photos:] + random.normal(0, 8, 900))
    assert familiar["rest"] > 1e-3 and odd.min() > np.quantile(like, cross_validate.FAMILIAR_SHARE)
    # outside the components a photo of the same kind is as far as the training photos vary there, not a million times
    assert like.max() < 100 * drawn.shape[1]


def test_unlikeness_is_the_squared_distance_under_the_covariance_of_the_training_photos():
    random = np.random.default_rng(0)
    found = random.normal(0, 1, (200, 40)) * np.linspace(3, 0.1, 40) + 5
    familiar = cross_validate.describe_features(found)
    values, vectors = np.linalg.eigh(np.cov(found.T, ddof=0))
    count = len(familiar["components"])
    values[:-count] = values[:-count].mean()  # what lies outside the components varies alike in all directions
    inverse = vectors @ np.diag(1 / values) @ vectors.T
    new = random.normal(0, 3, (5, 40)) + 5
    wanted = [(row - found.mean(0)) @ inverse @ (row - found.mean(0)) for row in new]
    assert writing.unlikeness(familiar, new) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("erased", "told"), [(0.2, "from the plants"), (0.5, "partly from the back"), (0.8, "mostly from the back")]
)
def test_the_verdict_hangs_on_what_is_left_of_r(erased, told):
    metrics = {"val_r": 0.9, "val_r_ci95": [0.8, 0.95], "val_r_plant_erased": erased, "val_r_background_erased": 0.1}
    assert f"the weight is read {told}" in cross_validate.verdict(metrics, np.full(100, 0.2))


def test_within_experiments_errors_are_about_each_ones_own_mean_and_bars_are_rmse(tmp_path):
    random = np.random.default_rng(0)
    names, groups = [f"{number}.png" for number in range(60)], np.repeat([1, 2, 3], 20)
    measured = random.gamma(1, 1, 60) + groups
    table = pd.DataFrame({"filename": names, "measured": measured, "predicted": measured + random.normal(0.2, 0.5, 60)})
    table = table.assign(error=table["predicted"] - table["measured"])
    sheet = {"filename": names, "experiment_id": groups, "plant_number": 1, TARGET: measured}
    pd.DataFrame(sheet).to_csv(tmp_path / "labels.csv", index=False)
    args = cross_validate.build_parser().parse_args(["--labels_path", str(tmp_path / "labels.csv")])
    found = cross_validate.judge_within(table, args)
    around = measured - pd.Series(measured).groupby(groups).transform("mean")
    assert found["val_r2_within_groups"] == pytest.approx(1 - (table["error"] ** 2).sum() / (around**2).sum())
    axis = Figure().subplots()
    cross_validate.plot_within(found["within"], args, axis)
    rmse = [root_mean_squared_error(rows["measured"], rows["predicted"]) for _, rows in table.groupby(groups)]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(rmse)
    assert list(axis.lines[0].get_xdata()) == pytest.approx(table.groupby(groups)["error"].mean().tolist())


def test_the_verdict_is_withheld_where_erasing_takes_no_plant():
    metrics = {"val_r": 0.9, "val_r_ci95": [0.8, 0.95], "val_r_plant_erased": 0.85, "val_r_background_erased": 0.1}
    shares = np.random.default_rng(0).uniform(0.05, 0.3, 100)
    assert "mostly from the background: r 0.90, plants erased 0.85" in cross_validate.verdict(metrics, shares)
    for spoiled, told in (
        (np.where(np.arange(100) < 21, 0, shares), "21% of the photos show no green"),
        (shares / 1000, "takes 0.02% of the middle photo"),
        (1 - shares / 10, "of the middle photo"),
    ):
        sentence = cross_validate.verdict(metrics, spoiled)
        assert "cannot be told" in sentence and told in sentence and "background" not in sentence
    assert "mostly" in cross_validate.verdict(metrics, np.where(np.arange(100) < 3, 0, shares))
    grey = Image.new("RGB", (1200, 900), (90, 80, 70))
    grey.putpixel((3, 3), (91, 80, 70))  # which a smaller copy would not show
    assert plant.green_area(grey) == 0
    for edit in cross_validate.ERASED.values():  # of larger photos too nothing is changed
        assert np.array_equal(np.asarray(edit(grey)), np.asarray(grey))


def test_trackers_get_growing_steps_over_all_folds(drawn, tmp_path, monkeypatch):
    logged, real, wandb = [], tm.importlib.util.find_spec, tm.importlib.util.find_spec("json")
    monkeypatch.setattr(tm.importlib.util, "find_spec", lambda name, *rest: wandb if name == "wandb" else real(name))
    monkeypatch.setattr(tm.Accelerator, "init_trackers", lambda *arguments: None)
    monkeypatch.setattr(tm.Accelerator, "log", lambda accelerator, values, step: logged.append((step, values)))
    train(drawn, tmp_path / "out", "--folds", 2, "--no_erasing", "--track", "wandb", script=cross_validate)
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert "fold_1/val_rmse" in logged[0][1] and "fold_2/val_rmse" in logged[2][1]
    assert "final_model/train_loss" in logged[4][1]

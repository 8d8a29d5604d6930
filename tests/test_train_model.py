"""What a user of train_model.py would notice: the files that come out, the numbers, the message on bad input."""

import colorsys
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

import devices
import loaders
import outputs
import report
import train_model
from model import BiomassModel

TARGET = "fresh_weight_total"
SHEET = "digital_biomass_labels.xlsx"


def train(data, out, *flags):
    """Train on a drawn folder with random weights and all outputs in `out`; returns metrics.txt."""
    places = ["--results_dir", out, "--log_path", out / "training.log", "--model_out", out / "model.pt"]
    places += ["--cache_dir", out.parent / "cache"]
    flags = ["--data_dir", data, "--weights", "none", "--device", "cpu", *places, *flags]
    assert train_model.main([str(flag) for flag in flags]) == 0
    return json.loads((out / "metrics.txt").read_text())


def load(sheet, *flags):
    return train_model.load_labels(train_model.build_parser().parse_args(["--labels_path", str(sheet), *flags]))


def checkpoint_digest(path):
    state = torch.load(path, weights_only=True)["model_state"]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


def test_the_study_command_writes_all_its_outputs(drawn, tmp_path, run_script):
    (tmp_path / "infos").mkdir()
    shutil.copytree(drawn, tmp_path / "infos" / "mlops_biomass_data")
    study = "--epochs 2 --batch_size 16 --learning_rate 5e-4 --model_out models/resnet18_biomass.pt --freeze_backbone"
    done = run_script("train_model.py", *study.split(), "--weights", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    metrics = json.loads((tmp_path / "results" / "metrics.txt").read_text())
    assert list(metrics)[:3] == ["val_mse", "val_rmse", "epoch"]
    table = pd.read_csv(tmp_path / "results" / "predictions.csv")
    assert list(table) == ["filename", "plant_number", "fold", "measured_g", "predicted_g", "error_g"]
    measured, predicted = table["measured_g"], table["predicted_g"]
    assert metrics["val_rmse"] == pytest.approx(root_mean_squared_error(measured, predicted), rel=1e-9)
    assert metrics["val_mae"] == pytest.approx(mean_absolute_error(measured, predicted), rel=1e-9)
    assert metrics["val_r2"] == pytest.approx(r2_score(measured, predicted), rel=1e-9)
    assert metrics["val_bias"] == pytest.approx((predicted - measured).mean(), rel=1e-6)
    assert metrics["val_rmse_ci95"][0] < metrics["val_rmse"] < metrics["val_rmse_ci95"][1]
    assert metrics["epoch_chosen_on"] == "validation"

    sheet = pd.read_excel(drawn / SHEET).set_index("filename")
    assert table["measured_g"].tolist() == pytest.approx(sheet.loc[table["filename"], TARGET].tolist())
    training = sheet.dropna(subset=TARGET)
    training = training[~training["plant_number"].isin(table["plant_number"])]
    assert metrics["train_rows"] == len(training) and metrics["val_rows"] == len(table)
    assert metrics["train_plants"] == training["plant_number"].nunique()
    assert metrics["val_plants"] == table["plant_number"].nunique()
    baseline = root_mean_squared_error(measured, np.full(len(table), training[TARGET].mean()))
    assert metrics["baseline_mean_rmse"] == pytest.approx(baseline, rel=1e-5)

    history = pd.read_csv(tmp_path / "results" / "history.csv")
    assert list(history) == ["epoch", "train_loss", "val_loss", "val_rmse"]
    assert metrics["epoch"] == history["val_loss"].idxmin() + 1
    assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-5)
    assert metrics["last_epoch_val_rmse"] == pytest.approx(history["val_rmse"].iloc[-1])
    for name in ("training_curves.png", "predictions.png", "worst_predictions.png"):
        picture = np.asarray(Image.open(tmp_path / "results" / name).convert("L"))
        assert picture.shape[0] > 600 and picture.shape[1] >= 900 and picture.std() > 5, name

    log = (tmp_path / "training.log").read_text()
    printed = done.stdout.splitlines()
    assert [line.split("  ", 1)[1] for line in log.splitlines()] == printed
    for text in (
        f"dropped {len(sheet) - len(sheet.dropna(subset=TARGET))} rows without {TARGET}",
        f"train: {metrics['train_rows']} rows of {metrics['train_plants']} plants, mean {TARGET}",
        f"validation: {metrics['val_rows']} rows of {metrics['val_plants']} plants, mean {TARGET}",
        "learning_rate=0.0005",
        f"torch {torch.__version__}",
        "epoch 2/2  train_loss",
        f"wrote {Path('models/resnet18_biomass.pt')}",
        "elapsed",
    ):
        assert text in log
    run = metrics["run"]
    assert run["command"] == f"python train_model.py {study} --weights none"
    assert run["arguments"]["batch_size"] == 16 and run["seconds"] > 0
    assert run["device"] == str(devices.pick_device("auto"))

    checkpoint = torch.load(tmp_path / "models" / "resnet18_biomass.pt", weights_only=True)
    assert checkpoint["target"] == TARGET and checkpoint["epoch"] == metrics["epoch"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_frozen_backbone_is_bit_identical_after_training(drawn, tmp_path):
    train(drawn, tmp_path / "out", "--epochs", 2, "--seed", 7)
    trained = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model_state"]
    torch.manual_seed(7)
    fresh = BiomassModel("resnet18").state_dict()
    assert trained.keys() == fresh.keys()
    for name, tensor in fresh.items():
        assert torch.equal(trained[name], tensor) == name.startswith(("backbone.", "head.target")), name


def test_a_frozen_model_keeps_its_batchnorm_still_in_train_mode():
    model = BiomassModel("resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.zeros(4, 0)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "head.image.1.weight", "head.image.1.bias", "head.last.weight", "head.last.bias",
    ]  # fmt: skip


def test_no_plant_is_on_both_sides_whatever_the_seed():
    random = np.random.default_rng(0)
    labels = pd.DataFrame({"_plant": random.integers(0, 40, 500)})
    for seed in range(200):
        train_rows, val_rows = train_model.split_by_plant(labels, 0.2, seed)
        assert not set(labels["_plant"].iloc[train_rows]) & set(labels["_plant"].iloc[val_rows])
        assert sorted([*train_rows, *val_rows]) == list(range(500))
    for seed in range(20):
        folds = train_model.folds_by_plant(labels, 5, seed)
        assert sorted(row for _, val_rows in folds for row in val_rows) == list(range(500))
        for train_rows, val_rows in folds:
            assert not set(labels["_plant"].iloc[train_rows]) & set(labels["_plant"].iloc[val_rows])


def test_equal_seeds_give_equal_files_with_or_without_the_store_and_with_worker_processes(drawn, tmp_path):
    flags = ["--epochs", 2, "--batch_size", 16]
    train(drawn, tmp_path / "cold", *flags)
    train(drawn, tmp_path / "warm", *flags)
    train(drawn, tmp_path / "no_store", *flags, "--no_cache")
    train(drawn, tmp_path / "workers", *flags, "--no_cache", "--num_workers", 1)
    train(drawn, tmp_path / "other_seed", *flags, "--seed", 43)
    for name in ("history.csv", "predictions.csv", "training_curves.png", "predictions.png", "worst_predictions.png"):
        content = (tmp_path / "cold" / name).read_bytes()
        for again in ("warm", "no_store", "workers"):
            assert (tmp_path / again / name).read_bytes() == content, (again, name)
        assert (tmp_path / "other_seed" / name).read_bytes() != content
    digests = {
        name: checkpoint_digest(tmp_path / name / "model.pt") for name in ("cold", "warm", "no_store", "workers")
    }
    assert len(set(digests.values())) == 1


def test_the_loop_overfits_eight_photos(drawn):
    labels = load(drawn / SHEET)
    labels = train_model.filter_missing_images(labels, drawn / "images_med_res", TARGET).iloc[:8]
    photos = train_model.BiomassDataset(labels, TARGET, seed=0)
    torch.manual_seed(0)
    model = BiomassModel("resnet18")
    model.new_head(standardize=True)
    images, metadata, targets = loaders.PhotoBatches(photos, [(row, loaders.PLAIN) for row in range(8)], 8)[0]
    with torch.inference_mode():
        model.eval()
        features = model.extractor(model.split())(images)
        model.head.standardize.fit(features)
        assert torch.allclose(model(features, metadata), model(images, metadata), atol=1e-4)
    batches = [(features.clone(), metadata, targets)]
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
    for _ in range(300):
        train_model.train_one_epoch(model, batches, optimizer, torch.nn.functional.mse_loss, torch.device("cpu"))
    loss, predictions = train_model.evaluate(model, batches, torch.device("cpu"))
    assert loss == pytest.approx(np.mean((predictions - photos.targets.numpy()) ** 2))
    assert math.sqrt(loss) < 0.2 * photos.targets.std()


def test_losses_are_means_over_rows_not_over_batches():
    model = BiomassModel(None)
    model.new_head(metadata_width=1)
    for parameter in model.head.last.parameters():
        torch.nn.init.zeros_(parameter)
    targets = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])
    columns = (torch.zeros(5, 0), torch.zeros(5, 1), targets)
    batches = list(zip(*(column.split(4) for column in columns), strict=True))
    assert train_model.evaluate(model, batches, torch.device("cpu"))[0] == pytest.approx(13 / 5)
    still, loss = torch.optim.SGD(model.parameters(), lr=0.0), torch.nn.functional.l1_loss
    assert train_model.train_one_epoch(model, batches, still, loss, torch.device("cpu")) == pytest.approx(13 / 5)


def test_all_layers_learn_when_the_backbone_is_not_frozen(drawn, tmp_path):
    train(drawn, tmp_path / "out", "--epochs", 1, "--unfreeze_backbone", "--seed", 7)
    trained = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model_state"]
    torch.manual_seed(7)
    fresh = BiomassModel("resnet18").state_dict()
    same = [name for name, tensor in fresh.items() if torch.equal(trained[name], tensor)]
    assert same == ["head.target.mean", "head.target.scale", "head.target.ratio"]


def test_imagenet_weights_come_from_the_cache_of_torch(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)
    source = torchvision.models.ResNet18_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / source.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(5)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, path)
    train(drawn, tmp_path / "out", "--epochs", 1, "--weights", "imagenet")
    trained = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model_state"]
    assert torch.equal(trained["backbone.layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])
    train(drawn, tmp_path / "file", "--epochs", 1, "--weights", path)
    assert checkpoint_digest(tmp_path / "file" / "model.pt") == checkpoint_digest(tmp_path / "out" / "model.pt")


def test_a_failed_download_says_where_the_weights_belong(drawn, tmp_path):
    environment = os.environ | {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    command = [sys.executable, train_model.__file__, "--data_dir", str(drawn)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]  # older releases of torch say before it what they download
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in message
    assert "--weights none" in message and "https://download.pytorch.org" in message
    assert not (tmp_path / "training.log").exists()


def test_faults_of_a_folder_are_dropped_by_name_and_change_no_other_row(drawn, faulty, tmp_path, capsys):
    train(faulty, tmp_path / "out", "--epochs", 1)
    printed = capsys.readouterr().out
    faults = dict(
        line[2:].split(": ", 1) for line in (faulty / "README.txt").read_text().splitlines() if line[:2] == "- "
    )
    sheet = pd.read_excel(faulty / SHEET)
    row = sheet.index[sheet["filename"] == faults["missing file"]][0] + 2
    assert f"row {row} ({faults['missing file']}) no such file" in printed
    assert f"({faults['truncated PNG']}) unreadable photo" in printed
    assert f"({faults['negative weight']})" in printed
    assert f"({faults['duplicate row']})" in printed
    labels = {}
    for folder in (drawn, faulty):
        table = load(folder / SHEET)
        table = train_model.filter_missing_images(table, folder / "images_med_res", TARGET)
        labels[folder] = table.set_index("filename")[[TARGET, "plant_number"]]
    lost = [faults[name] for name in ("missing file", "truncated PNG", "negative weight")]
    pd.testing.assert_frame_equal(labels[faulty], labels[drawn].drop(lost))


def test_sixteen_bit_grey_palette_alpha_and_turned_photos_keep_their_light(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=turned)
    clear = Image.fromarray(ramp).convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    for name, wanted in {
        "grey16": ramp,
        "palette": ramp,
        "turned": np.rot90(ramp, -1),
        "clear": ramp * 0 + 255,
    }.items():
        photo = np.asarray(train_model.open_photo(tmp_path / f"{name}.png"))
        assert np.array_equal(photo, np.repeat(wanted[:, :, None], 3, axis=2)), name


def test_a_csv_with_semicolons_and_decimal_commas_trains_the_same(drawn, tmp_path):
    sheet = pd.read_excel(drawn / SHEET)
    sheet.to_csv(tmp_path / "labels.csv", sep=";", decimal=",", index=False)
    wanted = load(drawn / SHEET, "--group_by", "experiment_id", "plant_number")
    read = load(tmp_path / "labels.csv", "--group_by", "experiment_id", "plant_number")
    pd.testing.assert_frame_equal(read, wanted, check_dtype=False)


def test_rows_without_a_plant_stay_together_and_mixed_ids_are_one_plant(tmp_path, capsys):
    plants = [1, "1", "1 ", 2, None, None, 10]
    sheet = pd.DataFrame({"filename": [f"{n}.png" for n in range(7)], "plant_number": plants, TARGET: 0.1})
    sheet.to_excel(tmp_path / "labels.xlsx", index=False)
    with outputs.logging_to_console():
        labels = load(tmp_path / "labels.xlsx")
    assert pd.factorize(labels["_plant"])[0].tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert "2 rows without plant_number: kept together as one plant" in capsys.readouterr().out


def test_folds_predict_each_photo_once_by_a_model_that_never_saw_its_plant(drawn, tmp_path, capsys):
    metrics = train(drawn, tmp_path / "out", "--epochs", 2, "--folds", 3, "--group_by", "experiment_id", "plant_number")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    labelled = pd.read_excel(drawn / SHEET).dropna(subset=TARGET)
    assert sorted(table["filename"]) == sorted(labelled["filename"])
    assert table.groupby(["experiment_id", "plant_number"])["fold"].nunique().max() == 1
    assert set(table["fold"]) == {1, 2, 3}
    assert metrics["epoch"] == 2 and metrics["epoch_chosen_on"] == "none" and "last_epoch_val_rmse" not in metrics
    assert metrics["val_rmse"] == pytest.approx(
        root_mean_squared_error(table["measured_g"], table["predicted_g"]), rel=1e-9
    )
    each = metrics["folds"]["each"]
    for row, (fold, rows) in zip(each, table.groupby("fold"), strict=True):
        assert row["fold"] == fold and row["val_rows"] == len(rows) and row["train_rows"] == len(table) - len(rows)
        assert row["val_rmse"] == pytest.approx(
            root_mean_squared_error(rows["measured_g"], rows["predicted_g"]), rel=1e-9
        )
    assert metrics["folds"]["val_rmse_sd"] == pytest.approx(np.std([row["val_rmse"] for row in each], ddof=1))
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert history.groupby("fold").size().to_dict() == {0: 2, 1: 2, 2: 2, 3: 2}  # fold 0 learns from all rows


def test_an_own_weight_does_not_move_its_own_out_of_fold_prediction(drawn, tmp_path):
    flags = ["--epochs", 2, "--folds", 3]
    train(drawn, tmp_path / "out", *flags)
    changed = tmp_path / "changed"
    shutil.copytree(drawn, changed)
    sheet = pd.read_excel(drawn / SHEET)
    row = sheet[TARGET].first_valid_index() + 5
    sheet.loc[row, TARGET] = 1.9
    sheet.to_excel(changed / SHEET, index=False)
    train(changed, tmp_path / "again", *flags)
    before, after = (
        pd.read_csv(tmp_path / name / "predictions.csv").set_index("filename") for name in ("out", "again")
    )
    fold = before["fold"] == before.loc[sheet.loc[row, "filename"], "fold"]
    assert before.loc[fold, "predicted_g"].equals(after.loc[fold, "predicted_g"])
    assert not before.loc[~fold, "predicted_g"].equals(after.loc[~fold, "predicted_g"])


def test_photos_that_show_only_their_plant_do_not_beat_the_mean_on_other_plants(tmp_path):
    random = np.random.default_rng(3)
    rows = []
    (tmp_path / "data" / "images_med_res").mkdir(parents=True)
    for plant in range(12):
        weight, colour = random.uniform(0.1, 1), 255 * np.array(colorsys.hsv_to_rgb(plant / 12, 1, 0.8))
        for photo in range(8):
            name = f"{plant}_{photo}.png"
            pixels = np.clip(colour + random.integers(-3, 4, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "images_med_res" / name)
            rows.append({"filename": name, "plant_number": plant, TARGET: weight})
    pd.DataFrame(rows).to_excel(tmp_path / "data" / SHEET, index=False)
    flags = ["--epochs", 40, "--folds", 4, "--learning_rate", 3e-3, "--augment_views", 1, "--standardize_features"]
    by_rows = train(tmp_path / "data", tmp_path / "rows", *flags, "--group_by", "filename")
    by_plant = train(tmp_path / "data", tmp_path / "plants", *flags)
    assert by_rows["val_rmse"] < 0.75 * by_rows["baseline_mean_rmse"]
    assert by_plant["val_rmse"] > 0.95 * by_plant["baseline_mean_rmse"]


def test_a_photo_on_both_sides_is_taken_out_of_training(tmp_path, drawn, capsys):
    shutil.copytree(drawn, tmp_path / "data")
    photos = tmp_path / "data" / "images_med_res"
    train(tmp_path / "data", tmp_path / "before", "--epochs", 1)
    validated = pd.read_csv(tmp_path / "before" / "predictions.csv")["filename"]
    sheet = pd.read_excel(tmp_path / "data" / SHEET).dropna(subset=TARGET)
    trained = sheet.loc[~sheet["filename"].isin(validated), "filename"].iloc[0]
    shutil.copy(photos / validated[0], photos / trained)
    capsys.readouterr()
    metrics = train(tmp_path / "data", tmp_path / "after", "--epochs", 1)
    assert f"left 1 training rows out, their photo is in validation too: {trained}" in capsys.readouterr().out
    assert metrics["train_rows"] == len(sheet) - len(validated) - 1


def test_the_interval_covers_the_true_error_of_a_known_predictor():
    random = np.random.default_rng(1)
    plants = np.repeat(np.arange(60), 6)
    covered = []
    for seed in range(300):
        errors = random.normal(0, 0.8, 60)[plants] + random.normal(0, 0.6, len(plants))  # true RMSE: 1
        low, high = report.rmse_interval(errors, plants, seed)
        covered.append(low <= 1 <= high)
    assert 0.90 <= np.mean(covered) <= 0.98
    assert report.rmse_interval(np.ones(3), [1, 1, 1], 0) is None


def test_other_targets_have_no_unit(drawn, tmp_path):
    metrics = train(drawn, tmp_path / "out", "--epochs", 1, "--target", "total_leaves")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(table) == ["filename", "plant_number", "fold", "measured", "predicted", "error"]
    assert metrics["val_rows"] == len(table)
    assert torch.load(tmp_path / "out" / "model.pt", weights_only=True)["unit"] == ""


def sheet_without(column, folder, drawn):
    pd.read_excel(drawn / SHEET).drop(columns=column).to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv"


BAD_INPUT = {
    "no data": (["--data_dir", "nowhere"], ["no data folder at nowhere", "--data_dir", "make_sample_data.py"]),
    "no sheet": (["--labels_path", "nowhere.xlsx"], ["no label sheet at nowhere.xlsx"]),
    "not a sheet": (["--labels_path", "photo.xlsx"], ["photo.xlsx"]),
    "no photos": (["--image_dir", "nowhere"], ["no image folder at nowhere"]),
    "other photos": (["--image_dir", "."], ["no photo of the sheet can be read in ."]),
    "no column": (["--target", "fresh_weight"], ["'fresh_weight'", "nearest: 'fresh_weight_", "plant_number"]),
    "no group column": (["--group_by", "plantnumber"], ["'plantnumber'", "nearest: 'plant_number'"]),
    "no labelled row": (["--labels_path", "unlabelled.csv"], ["no row of", "unlabelled.csv"]),
    "one plant": (["--labels_path", "one_plant.csv"], ["1 plant(s)", "empty", "--group_by"]),
    "folds": (["--folds", "500"], ["--folds 500", "lower --folds"]),
    "one fold": (["--folds", "1"], ["--folds 1"]),
    "epochs": (["--epochs", "0"], ["--epochs", "at least 1"]),
    "batch size": (["--batch_size", "0"], ["--batch_size", "at least 1"]),
    "batch text": (["--batch_size", "many"], ["--batch_size", "'many'"]),
    "val_split": (["--val_split", "1"], ["--val_split", "below 1"]),
    "learning rate": (["--learning_rate", "nan"], ["--learning_rate"]),
    "model": (["--model_name", "resnet19"], ["resnet19", "resnet18", "resnet34", "efficientnet_v2_s", "convnext_tiny"]),
    "device": (["--device", "tpu"], ["tpu", "cuda", "cpu"]),
    "weights": (["--weights", "nowhere.pth"], ["no weight file at nowhere.pth"]),
    "bad weights": (["--weights", "photo.xlsx"], ["photo.xlsx"]),
    "results": (["--results_dir", "photo.xlsx"], ["cannot write", "photo.xlsx"]),
    "log": (["--log_path", "folder"], ["cannot write folder"]),
    "both": (["--freeze_backbone", "--unfreeze_backbone"], ["not allowed with"]),
    "reserved": (["--group_by", "fold"], ["'fold'", "rename"]),
    "curves": (["--curves_path", "curves.foo"], ["curves.foo", ".png"]),
    "picture": (["--results_dir", "taken"], ["cannot write", "worst_predictions.png"]),
    "empty sheet": (["--labels_path", "empty.csv"], ["empty.csv"]),
    "layer": (["--unfreeze_from", "layer9"], ["--unfreeze_from layer9", "layer4"]),
    "nothing to train": (["--unfreeze_from", "avgpool"], ["--unfreeze_from avgpool", "layer4"]),
    "two freezings": (["--unfreeze_from", "layer4", "--unfreeze_backbone"], ["not allowed with"]),
    "frozen rate": (["--backbone_learning_rate", "1e-4"], ["--backbone_learning_rate", "--unfreeze_backbone"]),
    "image size": (["--model_name", "vit_b_16", "--image_size", "100"], ["--image_size 100", "vit_b_16"]),
    "loss": (["--loss", "mape"], ["--loss", "huber"]),
    "decay": (["--weight_decay", "-1"], ["--weight_decay", "0 or more"]),
    "no metadata": (["--metadata_only"], ["--metadata_only", "--metadata_columns"]),
    "unknown metadata": (["--metadata_columns", "age"], ["'age'", "nearest: 'age_days'"]),
    "harvest": (["--metadata_columns", "age_days", "fresh_weight_shoot"], ["fresh_weight_shoot", "harvest", "--allow"]),
    "classes": (["--metadata_columns", "class", "--labels_path", "copied.csv"], ["class", "correlation"]),
    "a copy": (["--metadata_columns", "mass_mg", "--labels_path", "copied.csv"], ["mass_mg", "correlation", "1.000"]),
    "remarks": (["--metadata_columns", "remark", "--labels_path", "copied.csv"], ["remark", "different texts"]),
    "cache": (["--cache_dir", "photo.xlsx"], ["cannot write", "photo.xlsx"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_gets_one_line_and_leaves_earlier_outputs_alone(case, drawn, tmp_path, monkeypatch, capsys):
    flags, texts = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    sheet = pd.read_excel(drawn / SHEET)
    sheet.assign(**{TARGET: None}).to_csv("unlabelled.csv", index=False)
    sheet.assign(plant_number=1).to_csv("one_plant.csv", index=False)
    copied = sheet.assign(mass_mg=1000 * sheet[TARGET], remark=[f"remark {row}" for row in range(len(sheet))])
    copied[TARGET] = np.where(copied[TARGET].isna(), np.nan, np.arange(len(sheet)) // 15 + 0.1 + copied[TARGET] / 10)
    copied["class"] = "class " + (np.arange(len(sheet)) // 15).astype(str).astype(object)
    copied["mass_mg"] = 1000 * copied[TARGET]
    copied.to_csv("copied.csv", index=False)
    Path("photo.xlsx").write_bytes(b"neither sheet nor weights")
    Path("folder").mkdir()
    Path("taken/worst_predictions.png").mkdir(parents=True)
    Path("empty.csv").touch()
    for name in ("training.log", "results/metrics.txt", "models/biomass_resnet.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("of an earlier run")
    if "--data_dir" not in flags:
        flags = ["--data_dir", str(drawn), *flags]
    with pytest.raises(SystemExit) as stop:
        train_model.main(["--weights", "none", "--epochs", "1", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("train_model.py: error: ")
    assert all(text in error for text in texts), error
    for name in ("training.log", "results/metrics.txt", "models/biomass_resnet.pt"):
        assert Path(name).read_text() == "of an earlier run"


def test_a_weight_that_is_no_number_is_named_and_odd_names_are_drawn(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "data")
    sheet = pd.read_excel(drawn / SHEET)
    sheet[TARGET] = sheet[TARGET].astype(object)
    first = sheet[TARGET].first_valid_index()
    sheet.loc[first, TARGET] = "ca. 0.3"
    for row in sheet.index[sheet[TARGET].notna()]:
        name = f"a$x^${row}.png"
        (tmp_path / "data" / "images_med_res" / sheet.loc[row, "filename"]).rename(
            tmp_path / "data" / "images_med_res" / name
        )
        sheet.loc[row, "filename"] = name
    sheet = sheet.rename(columns={"plant_number": "plant"})
    sheet.to_excel(tmp_path / "data" / SHEET, index=False)
    train(tmp_path / "data", tmp_path / "out", "--epochs", 1, "--group_by", "plant")
    assert f"whose {TARGET} is no number: row {first + 2} (a$x^${first}.png)" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("filename")
    assert table["plant"].equals(sheet.set_index("filename").loc[table.index, "plant"])


def test_help_shows_the_defaults_of_the_study():
    help_text = " ".join(train_model.build_parser().format_help().split())
    defaults = vars(train_model.build_parser().parse_args([]))
    study = {
        "epochs": 20, "batch_size": 32, "learning_rate": 1e-3, "model_name": "resnet18", "val_split": 0.2,
        "num_workers": 0, "seed": 42, "freeze_backbone": True, "device": "auto",
        "data_dir": Path("infos/mlops_biomass_data"), "model_out": Path("models/biomass_resnet.pt"),
    }  # fmt: skip
    assert {name: defaults[name] for name in study} == study
    for flag in (*study, "labels_path", "image_dir", "unfreeze_backbone", "curves_path", "metrics_path"):
        assert f"--{flag}" in help_text

"""Backbones, heads, target transforms and metadata: what training changes, and that it can be undone and read back."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from test_train_model import SHEET, TARGET, checkpoint_digest, train
from torchvision.models import get_model

import train_model
from metadata import MetadataEncoder
from model import BACKBONES, TRANSFORMS, BiomassModel, TargetTransform, from_checkpoint, take_classifier_off

LISTED = {  # the backbones that the README names, and a part of each from which on it can be trained
    "resnet18": "layer4",
    "resnet34": "layer4",
    "resnet50": "layer4",
    "efficientnet_b0": "features.7",
    "efficientnet_v2_s": "features.6",
    "mobilenet_v3_large": "features.15",
    "convnext_tiny": "features.6",
    "regnet_y_400mf": "trunk_output.block4",
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_target_transforms_invert(kind):
    targets = torch.tensor([0.0021, 0.058, 0.148, 0.365, 2.113])
    transform = TargetTransform(kind)
    transform.fit(targets)
    assert transform.undo(transform.apply_to(targets)).numpy() == pytest.approx(targets.numpy(), rel=1e-5)
    if kind != "none":
        assert transform.apply_to(targets).mean().item() == pytest.approx(0, abs=1e-6)
        assert transform.apply_to(targets).std(correction=0).item() == pytest.approx(1, abs=1e-6)
    if transform.curved:  # what is lost by averaging logarithms or roots is made up for on the training rows
        means = transform.apply_to(targets).mean().expand(5)
        assert transform.undo(means).sum() < 0.8 * targets.sum()
        transform.balance(transform.undo(means).numpy(), targets.numpy())
        assert transform.undo(means).sum().item() == pytest.approx(targets.sum().item(), rel=1e-5)


def table_of(random, rows):
    numbers = random.normal(20, 5, rows).round(2).astype(object)
    numbers[::5] = None
    numbers[1] = "17,25"
    soil = random.choice(["peat", "sand", "loam "], rows).astype(object)
    soil[::7] = None
    return pd.DataFrame({"age": numbers, "soil": soil, "empty": [None] * rows, "other": random.normal(0, 1, rows)})


def test_metadata_are_encoded_as_scikit_learn_does_and_columns_may_change_places():
    random = np.random.default_rng(0)
    training, later = table_of(random, 40), table_of(random, 15)
    later.loc[2, "soil"] = "never seen"
    encoder = MetadataEncoder.fit(training, ["age", "soil", "empty"])
    clean = [
        table.assign(
            age=pd.to_numeric(table["age"].astype(str).str.replace(",", "."), errors="coerce"),
            soil=table["soil"].str.strip(),
        )
        for table in (training, later)
    ]
    numeric = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    text = OneHotEncoder(categories=[["loam", "peat", "sand"]], handle_unknown="ignore", sparse_output=False)
    plain = ColumnTransformer([("age", numeric, ["age"]), ("soil", text, ["soil"])]).fit(clean[0]).transform(clean[1])
    encoded = encoder.encode(later)
    assert encoded.shape == (15, encoder.width) == (15, 2 + 3 + 2)
    assert encoded[:, [0, 2, 3, 4]] == pytest.approx(plain, abs=1e-6)
    assert encoded[:, 1].tolist() == later["age"].isna().tolist()
    assert np.array_equal(encoded[:, 5:], np.tile([0, 1], (15, 1)))  # a column without a value
    again = MetadataEncoder(json.loads(json.dumps(encoder.plan)))
    assert np.array_equal(again.encode(later[["other", "empty", "soil", "age"]]), encoded)
    assert np.isfinite(encoder.encode(later.assign(age=None, soil=None))).all()
    assert MetadataEncoder.fit(training.assign(age=3.5), ["age"]).width == 1  # nothing missing, nothing to tell
    lacking = encoder.unknown(later.assign(empty=1))
    assert (lacking[later["age"].isna() & later["soil"].notna()].str.split().str[0] == "age").all()
    assert "soil" in lacking[2] and (lacking == "").any()


def test_statistics_come_from_training_rows_alone(drawn, tmp_path):
    flags = ["--epochs", 1, "--standardize_features", "--target_transform", "log", "--loss", "huber"]
    flags += ["--metadata_columns", "age_days", "temperature"]
    train(drawn, tmp_path / "out", *flags)
    before = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("filename")
    changed = tmp_path / "changed"
    shutil.copytree(drawn, changed)
    sheet = pd.read_excel(drawn / SHEET)
    heavy, hot = before.index[[3, 4]]
    sheet.loc[sheet["filename"] == heavy, TARGET] = 50.0
    sheet.loc[sheet["filename"] == hot, "temperature"] = 1e6
    sheet.to_excel(changed / SHEET, index=False)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(changed / "images_med_res" / hot)
    train(changed, tmp_path / "again", *flags)
    after = pd.read_csv(tmp_path / "again" / "predictions.csv").set_index("filename")
    assert after.loc[heavy, "measured_g"] == 50
    assert before["predicted_g"].drop(hot).equals(after["predicted_g"].drop(hot))
    assert before.loc[hot, "predicted_g"] != after.loc[hot, "predicted_g"]
    assert checkpoint_digest(tmp_path / "out" / "model.pt") == checkpoint_digest(tmp_path / "again" / "model.pt")


@pytest.mark.parametrize("model_name", LISTED)
def test_listed_backbones_train_a_step_are_cut_and_read_back(model_name, tmp_path):
    torch.manual_seed(0)
    model = BiomassModel(model_name, LISTED[model_name], image_size=64)
    step = {"column": "age_days", "median": 14.0, "mean": 15.0, "scale": 7.0, "indicator": True}
    model.encoder = MetadataEncoder([step])
    model.new_head(metadata_width=2, standardize=True, target_transform="sqrt")
    images, metadata = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.rand(4, 2)
    targets = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model.target.fit(targets)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    mse = torch.nn.functional.mse_loss
    train_model.train_one_epoch(model, [(images, metadata, targets)], optimizer, mse, torch.device("cpu"))
    frozen = {name for name, _ in model.frozen_modules()}
    for name, tensor in model.state_dict().items():
        still = name.rpartition(".")[0] in frozen or name.startswith(("head.target", "head.standardize"))
        assert torch.equal(tensor, start[name]) or not still, name
        assert still or not torch.equal(tensor, start[name]) or name.endswith("layer_scale"), name

    args = train_model.build_parser().parse_args(["--model_out", str(tmp_path / "model.pt")])
    train_model.save_checkpoint(model, args, epoch=1)
    again = from_checkpoint(torch.load(tmp_path / "model.pt", weights_only=True), torch.device("cpu"))
    model.eval()
    with torch.inference_mode():
        wanted = model(images, metadata)
        assert again(images, metadata).numpy() == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-5)
        stored = model.extractor(model.split())(images)
        assert model(stored, metadata).numpy() == pytest.approx(wanted.numpy(), rel=1e-3, abs=1e-4)


def test_every_backbone_of_the_list_can_lose_its_classifier():
    for name in BACKBONES:
        if not name.startswith("regnet"):  # they need real weights, and one of them is listed above
            with torch.device("meta"):  # shapes alone
                width = take_classifier_off(get_model(name, weights=None))
            assert 300 < width < 8000, name


def test_training_from_a_layer_on_is_the_same_with_stored_features_and_with_images(drawn, tmp_path, monkeypatch):
    flags = ["--epochs", 2, "--precision", "fp32", "--unfreeze_from", "layer4.1", "--image_size", 96, "--seed", 7]
    train(drawn, tmp_path / "stored", *flags)
    monkeypatch.setattr(BiomassModel, "split", lambda model: None)
    train(drawn, tmp_path / "images", *flags)
    tables = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("stored", "images")]
    assert tables[0]["predicted_g"].to_numpy() == pytest.approx(tables[1]["predicted_g"].to_numpy(), abs=2e-3)
    torch.manual_seed(7)
    fresh = BiomassModel("resnet18", "layer4.1").state_dict()
    trained = torch.load(tmp_path / "stored" / "model.pt", weights_only=True)["model_state"]
    for name, tensor in fresh.items():
        if name.startswith("backbone."):
            assert torch.equal(trained[name], tensor) != name.startswith("backbone.layer4.1"), name


def test_all_flags_together_with_folds(drawn, tmp_path, capsys):
    flags = "--folds 2 --epochs 3 --unfreeze_from layer4.1 --image_size 64 --model_name resnet34 --batch_size 16 "
    flags += "--standardize_features --target_transform log --loss huber --lr_schedule cosine --weight_decay 0.1 "
    flags += "--patience 1 --backbone_learning_rate 1e-4 --metadata_columns age_days total_leaves lab_book_page"
    metrics = train(drawn, tmp_path / "out", *flags.split())
    assert metrics["epoch_chosen_on"] == "training plants kept aside"
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(table) == metrics["val_rows"] == pd.read_excel(drawn / SHEET)[TARGET].count()
    assert np.isfinite(table["predicted_g"]).all() and (table["predicted_g"] > 0).all()
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert set(history["fold"]) == {0, 1, 2}
    assert metrics["epoch"] == history[history["fold"] == 0].set_index("epoch")["val_loss"].idxmin()
    assert "metadata age_days: numbers, missing or unreadable in" in capsys.readouterr().out


def test_each_flag_alone_changes_the_answer_and_not_its_unit(drawn, tmp_path):
    answers = {}
    for flags in (
        "",
        "--loss mae",
        "--target_transform standardize --loss huber",
        "--target_transform log",
        "--target_transform sqrt",
        "--standardize_features",
        "--lr_schedule cosine",
        "--weight_decay 10",
        "--metadata_columns age_days",
        "--unfreeze_from layer4.1.conv2",
    ):
        metrics = train(drawn, tmp_path / "out", "--epochs", 3, "--image_size", 64, *flags.split())
        answers[flags] = metrics["last_epoch_val_rmse"]
        history = pd.read_csv(tmp_path / "out" / "history.csv")
        assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-5)
    assert len(set(answers.values())) == len(answers)
    stopped = train(drawn, tmp_path / "out", "--epochs", 50, "--patience", 2, "--image_size", 64)
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == stopped["epoch"] + 2 < 50


def test_metadata_alone_tell_what_they_know_without_a_look_at_the_photos(drawn, tmp_path, capsys):
    flags = ["--epochs", 150, "--learning_rate", 1e-2, "--metadata_only", "--metadata_columns"]
    leaky = train(drawn, tmp_path / "leaky", *flags, "fresh_weight_shoot", "--allow_leaky_columns", "--folds", 3)
    assert leaky["val_r2"] > 0.8
    assert train(drawn, tmp_path / "fair", *flags, "humidity", "--folds", 3)["val_r2"] < 0.3
    assert "features:" not in capsys.readouterr().out
    state = torch.load(tmp_path / "leaky" / "model.pt", weights_only=True)
    assert not any(name.startswith("backbone") for name in state["model_state"])
    assert state["metadata"][0]["column"] == "fresh_weight_shoot"

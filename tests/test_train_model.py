"""What a user of train_model.py would notice: the files that come out, the numbers, the cache, the message."""

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, SHEET, TARGET, flags_of, labels_of, prepared, quick, tensors_of, train
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import cross_validate
import train_model as tm
from biomass import features, plant, reading, writing

MEAN, STD = (torch.tensor(value).view(1, 3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Stub(torch.nn.Module):
    """A backbone whose features are given."""

    def __init__(self, width):
        super().__init__()
        self.net, self.width = torch.nn.Identity(), width


@pytest.fixture
def batches():
    """What the loop asks for, around batches that a test gives it."""
    AcceleratorState._reset_state()
    return features.Batches(None, None, None, tm.build_parser().parse_args([]), Accelerator(cpu=True))


def change_sheet(folder, change):
    sheet = change(pd.read_excel(folder / SHEET))
    sheet.to_excel(folder / SHEET, index=False)
    return sheet


def predictions_of(out):
    return pd.read_csv(out / "predictions.csv").set_index("filename")


def computed(capsys):
    """Of how many photos the features were not in the cache."""
    return sum(int(number) for number in re.findall(r"found, (\d+) to compute", capsys.readouterr().out))


# ---------------------------------------------------------------- the run as a whole


def test_the_script_with_its_folder_runs_the_study_and_writes_all_outputs(drawn, tmp_path, run_script):
    shutil.copytree(drawn, tmp_path / "infos" / "mlops_biomass_data")
    shutil.copy(ROOT / "train_model.py", tmp_path)
    alone = run_script(tmp_path / "train_model.py", cwd=tmp_path)
    assert alone.returncode == 1 and alone.stderr.count("\n") == 1 and "needs the folder biomass/" in alone.stderr
    shutil.copytree(ROOT / "biomass", tmp_path / "biomass")
    study = "--epochs 2 --batch_size 16 --learning_rate 5e-4 --model_out models/resnet18_biomass.pt --freeze_backbone"
    flags = [*study.split(), "--weights", "none", "--image_size", 64]
    done = run_script(tmp_path / "train_model.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

    metrics = pd.read_json(tmp_path / "results" / "metrics.txt", typ="series")
    assert list(metrics.index)[:3] == ["val_mse", "val_rmse", "epoch"]
    table = pd.read_csv(tmp_path / "results" / "predictions.csv")
    assert list(table) == ["filename", "plant_number", "fold", "measured_g", "predicted_g", "error_g"]
    measured, predicted = table["measured_g"], table["predicted_g"]
    assert metrics["val_rmse"] == pytest.approx(root_mean_squared_error(measured, predicted), rel=1e-6)
    assert metrics["val_mse"] == pytest.approx(metrics["val_rmse"] ** 2)
    assert metrics["val_mae"] == pytest.approx(mean_absolute_error(measured, predicted), rel=1e-6)
    assert metrics["val_r2"] == pytest.approx(r2_score(measured, predicted), rel=1e-6)
    percent = 100 * (predicted - measured).abs() / measured
    assert metrics["val_median_error_percent"] == pytest.approx(percent.median(), rel=1e-6)
    assert metrics["val_bias"] == pytest.approx((predicted - measured).mean(), rel=1e-5)
    assert metrics["val_rmse_ci95"][0] < metrics["val_rmse"] < metrics["val_rmse_ci95"][1]
    assert metrics["epoch_chosen_on"] == "validation"

    sheet = pd.read_excel(drawn / SHEET).set_index("filename")
    assert measured.tolist() == pytest.approx(sheet.loc[table["filename"], TARGET].tolist())
    training = sheet.dropna(subset=TARGET)
    training = training[~training["plant_number"].isin(table["plant_number"])]
    assert metrics["train_rows"] == len(training) and metrics["val_rows"] == len(table)
    assert metrics["train_plants"] == training["plant_number"].nunique()
    assert metrics["val_plants"] == table["plant_number"].nunique()
    baseline = root_mean_squared_error(measured, np.full(len(table), training[TARGET].mean()))
    assert metrics["baseline_mean_rmse"] == pytest.approx(baseline, rel=1e-5)
    lines = (drawn / "drawn_expected_weights.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines if not line.startswith("#")]
    place = cells[0].index("filename"), cells[0].index("expected_weight_g")
    expected = {row[place[0]]: float(row[place[1]]) for row in cells[1:]}
    floor = root_mean_squared_error(measured, [expected[name] for name in table["filename"]])
    assert metrics["noise_floor_rmse"] == pytest.approx(floor)

    history = pd.read_csv(tmp_path / "results" / "history.csv")
    assert list(history) == ["epoch", "train_loss", "val_loss", "val_rmse"]
    assert metrics["epoch"] == history["val_loss"].idxmin() + 1
    assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-5)
    assert metrics["last_epoch_val_rmse"] == pytest.approx(history["val_rmse"].iloc[-1])
    for name in ("training_curves.png", "predictions.png", "worst_predictions.png"):
        picture = np.asarray(Image.open(tmp_path / "results" / name).convert("L"))
        assert picture.shape[0] > 500 and picture.shape[1] >= 700 and picture.std() > 5, name

    log = (tmp_path / "training.log").read_text()
    assert [line.split("  ", 1)[1] for line in log.splitlines()] == done.stdout.splitlines()
    for text in (
        f"dropped {len(sheet) - len(sheet.dropna(subset=TARGET))} rows without {TARGET}",
        f"train: {metrics['train_rows']} rows of {metrics['train_plants']} plants, mean {TARGET}",
        f"validation: {metrics['val_rows']} rows of {metrics['val_plants']} plants, mean {TARGET}",
        "learning_rate=0.0005",
        f"torch {torch.__version__.split('+')[0]}",
        "epoch 2/2  train_loss",
        f"wrote {Path('models/resnet18_biomass.pt')}",
        f"no model of these drawn photos can be below {floor:.4f} g",
        "elapsed",
    ):
        assert text in log, text
    run = metrics["run"]
    assert run["command"] == f"python train_model.py {study} --weights none --image_size 64"
    assert run["arguments"]["batch_size"] == 16 and run["seconds"] > 0 and run["commit"] is None
    checkpoint = torch.load(tmp_path / "models" / "resnet18_biomass.pt", weights_only=True)
    assert checkpoint["target"] == TARGET and checkpoint["epoch"] == metrics["epoch"]
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.progress")]


def test_help_shows_the_defaults_of_the_study():
    help_text = " ".join(tm.build_parser().format_help().split())
    study = {
        "epochs": 20, "batch_size": 32, "learning_rate": 1e-3, "model_name": "resnet18", "val_split": 0.2,
        "num_workers": 0, "seed": 42, "freeze_backbone": True, "device": "auto", "labels_path": None,
        "image_dir": None, "data_dir": Path("infos/mlops_biomass_data"), "model_out": Path("models/biomass_resnet.pt"),
    }  # fmt: skip
    assert study.items() <= vars(tm.build_parser().parse_args([])).items()
    for flag in (*study, "unfreeze_backbone", "curves_path", "metrics_path"):
        assert f"--{flag}" in help_text


def test_equal_seeds_give_equal_files_with_a_warm_and_a_cold_cache_and_with_worker_processes(drawn, tmp_path):
    train(drawn, tmp_path / "cold", pictures=True)
    train(drawn, tmp_path / "warm", pictures=True)
    train(drawn, tmp_path / "workers", "--cache_dir", "none", "--num_workers", 1, pictures=True)
    train(drawn, tmp_path / "other_seed", "--seed", 43)
    for name in ("history.csv", "predictions.csv", "training_curves.png", "predictions.png", "worst_predictions.png"):
        content = (tmp_path / "cold" / name).read_bytes()
        assert all((tmp_path / again / name).read_bytes() == content for again in ("warm", "workers")), name
    assert (tmp_path / "cold" / "history.csv").read_bytes() != (tmp_path / "other_seed" / "history.csv").read_bytes()
    cold = tensors_of(tmp_path / "cold")
    for again in ("warm", "workers"):
        state = tensors_of(tmp_path / again)
        assert all(torch.equal(cold[name], tensor) for name, tensor in state.items()), again


def test_no_plant_is_on_both_sides_whatever_the_seed():
    random = np.random.default_rng(0)
    labels = pd.DataFrame({"_plant": random.integers(0, 40, 500), "_content": np.arange(500)})
    labels[TARGET] = random.random(500)
    flags = {"val_split": 0.2, "folds": 5, "group_by": ["plant_number"], "target": TARGET}
    for seed in range(200):
        args = argparse.Namespace(seed=seed, **flags)
        splits = [tm.split_by_plant(labels, args)]
        folds = list(cross_validate.folds_by_plant(labels, args).values()) if seed < 20 else []
        for train_rows, val_rows in splits + folds:
            assert not set(labels["_plant"].iloc[train_rows]) & set(labels["_plant"].iloc[val_rows])
            assert sorted([*train_rows, *val_rows]) == list(range(500))
        assert not folds or sorted(row for _, val_rows in folds for row in val_rows) == list(range(500))
    with pytest.raises(RuntimeError, match="both sides"):
        tm.check_split(labels, (np.arange(250), np.arange(250, 500)), args)


def test_each_flag_alone_changes_the_answer_and_not_its_unit(drawn, tmp_path):
    answers = {}
    for flags in (
        "", "--loss mae", "--target_transform none", "--loss huber",
        "--target_transform log", "--target_transform sqrt", "--standardize_features", "--features stages",
        "--lr_schedule cosine", "--weight_decay 10", "--metadata_columns age_days", "--augmentation none",
        "--augmentation symmetries", "--features stages traits", "--dropout 0.1", "--least_steps 30",
        "--augment_views 1", "--unfreeze_from conv5", "--unfreeze_backbone", "--image_size 96",
        "--unfreeze_backbone --backbone_learning_rate 1e-5", "--unfreeze_backbone --head_epochs 2",
    ):  # fmt: skip
        metrics = train(drawn, tmp_path / "out", "--epochs", 2, "--batch_size", 8, *flags.split())
        table, history = predictions_of(tmp_path / "out"), pd.read_csv(tmp_path / "out" / "history.csv")
        rmse = root_mean_squared_error(table["measured_g"], table["predicted_g"])
        assert metrics["val_rmse"] == pytest.approx(rmse, rel=1e-6), flags
        assert metrics["val_mse"] == pytest.approx(history["val_loss"].min(), rel=1e-5), flags
        assert table["predicted_g"].min() >= 0
        answers[flags] = history["train_loss"].iloc[-1], metrics["last_epoch_val_rmse"]
    assert len(set(answers.values())) == len(answers), answers
    stopped = train(drawn, tmp_path / "out", "--epochs", 60, "--patience", 2, "--learning_rate", 0.01)
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == stopped["epoch"] + 2 < 60


@pytest.mark.parametrize("package", ["mlflow", "tensorboard", "wandb"])
def test_a_tracker_without_its_package_and_folds_are_told_in_one_line(package, drawn, tmp_path, capsys, monkeypatch):
    real = tm.importlib.util.find_spec
    monkeypatch.setattr(tm.importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name))
    assert tm.main(flags_of(drawn, tmp_path / "out", "--track", package)) == 2
    assert tm.main(flags_of(drawn, tmp_path / "out", "--folds", 5)) == 2
    tracker, folds = capsys.readouterr().err.splitlines()
    assert tracker == f"train_model.py: error: --track {package} needs its package: pip install {package}"
    assert folds.startswith("train_model.py: error: --folds: cross_validate.py")


# ---------------------------------------------------------------- backbone and weights


def test_a_frozen_backbone_is_bit_identical_after_training_and_the_rest_has_learned(drawn, tmp_path):
    for flags, still in (("", "backbone."), ("--unfreeze_from conv5", "backbone.net.(conv1|stage)"), ("all", "(?!)")):
        out = tmp_path / (flags or "frozen")
        flags = ["--unfreeze_backbone"] if flags == "all" else flags.split()
        this = prepared(drawn, out, "--seed", 7)[1]
        fresh = {f"backbone.{name}": tensor.clone() for name, tensor in this.backbone.state_dict().items()}
        train(drawn, out, "--seed", 7, "--epochs", 1, "--augmentation", "none", *flags)
        trained = tensors_of(out)
        assert trained.keys() > fresh.keys()
        for name, tensor in fresh.items():
            assert torch.equal(trained[name], tensor) == bool(re.match(still, name)), name
        assert trained["head.last.bias"] != 0


def test_a_frozen_part_keeps_its_batchnorm_still_in_train_mode():
    for learn_from, moved in ((None, []), ("layer4", ["layer4"])):
        model = tm.BiomassModel(tm.Backbone("resnet18", 64), learn_from).train()
        before = {name: tensor.clone() for name, tensor in model.backbone.net.state_dict().items()}
        model(
            torch.randint(0, 256, (4, 1, 3, 64, 64), dtype=torch.uint8), torch.zeros(4, 0), torch.zeros(4, 0)
        ).sum().backward()
        changed = {name for name, tensor in model.backbone.net.state_dict().items() if (before[name] != tensor).any()}
        assert sorted({name.partition(".")[0] for name in changed}) == moved
        learned = {name.split(".")[:3][-1] for name, p in model.named_parameters() if p.grad is not None}
        assert learned == {"1", "weight", "bias", *moved}


def test_weights_come_from_the_cache_of_torch_or_a_file_of_either_kind(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / source.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(5)
    weights = torchvision.models.shufflenet_v2_x0_5().state_dict()
    name = f"{path.stem}.safetensors"
    safetensors.torch.save_file(weights, tmp_path / name)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *arguments, **more: (_ for _ in ()).throw(OSError(9)))
    assert tm.main(flags_of(drawn, tmp_path / "failed", "--weights", "imagenet")) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(path) in message and source.url in message
    assert "--model_name tf_efficientnet_lite0" in message and not (tmp_path / "failed" / "training.log").exists()
    torch.save(weights, path)
    for kind in ("imagenet", path, tmp_path / name):
        train(drawn, tmp_path / "out", "--epochs", 1, "--weights", kind)
        trained = tensors_of(tmp_path / "out")
        assert all(torch.equal(trained[f"backbone.net.{name}"], weights[name]) for name in weights if name[:2] != "fc")


def test_a_failed_download_of_timm_names_the_file_and_a_way_without(drawn, tmp_path, monkeypatch, capsys):
    real = timm.create_model

    def offline(name, pretrained=False, **more):
        if pretrained:
            raise ConnectionError("[Errno 101] Network is unreachable")
        return real(name, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    flags = ["--model_name", "mobilenetv3_small_050", "--weights", "imagenet"]
    assert tm.main(flags_of(drawn, tmp_path / "out", *flags)) == 2
    message = capsys.readouterr().err
    assert (
        message.count("\n") == 1 and "timm/mobilenetv3_small_050.lamb_in1k" in message and "--weights FILE" in message
    )
    assert "--model_name tf_efficientnet_lite0" in message


def test_lite0_brings_its_weights_and_gives_the_features_of_the_original_network():
    """The constants come from EfficientNet of the package efficientnet_lite_pytorch, with the same file of weights."""
    rows = torch.arange(224)
    picture = torch.stack([rows[:, None].expand(224, 224), rows[None].expand(224, 224), rows[:, None] * rows[None]])
    backbone = tm.Backbone("tf_efficientnet_lite0")
    features.load_weights(backbone, "imagenet")
    with torch.inference_mode():
        found = backbone.eval()((picture % 256).to(torch.uint8)[None])[0]
    assert found.shape == (1280,)
    wanted = {0: 0.07765, 2: 0.98368, 56: 1.1131, 79: 2.11056, 91: 1.86938, 113: 4.28714, 480: 2.27645, 800: 0.13172}
    assert found[list(wanted)].tolist() == pytest.approx(list(wanted.values()), abs=1e-4)
    assert found.sum().item() == pytest.approx(232.6038, abs=0.01) and (found > 0).sum() == 500


def test_stages_are_the_averages_that_plain_hooks_give():
    photos = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.manual_seed(0))
    stages = {"resnet18": ["relu", "layer1", "layer2", "layer3"]}
    stages["tf_efficientnet_lite0"] = ["bn1", *(f"blocks.{number}" for number in range(7))]
    for name, paths in stages.items():
        torch.manual_seed(1)
        backbone, averages = tm.Backbone(name, 96, True).eval(), []
        torch.manual_seed(1)
        plain = tm.Backbone(name, 96).eval()
        for path in paths:
            module = plain.net.get_submodule(path)
            module.register_forward_hook(lambda module, inputs, output, to=averages: to.append(output.mean((2, 3))))
        with torch.inference_mode():
            found, last = backbone(photos), plain(photos)
        wanted = torch.cat([last, *averages], 1)
        assert backbone.width == wanted.shape[1] == {"resnet18": 512 + 512}.get(name, 1280 + 32 + 784)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(backbone(photos[:1].repeat(3, 1, 1, 1))[0], found[0], rtol=1e-3, atol=1e-4)


def test_drop_path_leaves_blocks_out_in_training_alone_and_scales_the_rest():
    photos = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    whole = tm.Backbone("tf_efficientnet_lite0", 32).eval()
    dropping = tm.Backbone("tf_efficientnet_lite0", 32, drop_path=0.4).eval()
    dropping.load_state_dict(whole.state_dict())
    assert torch.equal(dropping(photos), whole(photos))
    block = dropping.net.blocks[5][3]  # near the end
    block.drop_path.train()
    maps = torch.randn(64, 192, 4, 4)
    added, wanted = (part.blocks[5][3](maps) - maps for part in (dropping.net, whole.net))
    left_out = (added == 0).all((1, 2, 3))
    assert 8 < left_out.sum() < 40
    assert (wanted / added)[~left_out].mean().item() == pytest.approx(1 - block.drop_path.drop_prob, rel=1e-4)
    for name in ("resnet18", "mobilenet_v3_small"):
        with pytest.raises(reading.UserError, match=f"{name} knows no stochastic depth; pass --drop_path 0"):
            tm.Backbone(name, 32, drop_path=0.4)
        tm.Backbone(name, 32, drop_path=0)


def test_autocast_spares_depthwise_convolutions_alone_and_gradients_stay_the_same():
    torch.manual_seed(0)
    net = tm.Backbone("tf_efficientnet_lite0", 32).eval().net
    features.keep_depthwise_in_fp32(net)
    net, kinds = copy.deepcopy(net), set()  # as each fold has its own
    for module in net.modules():  # but BatchNorm, of whose statistics in so small a batch gradients hang much
        module.training = isinstance(module, torch.nn.Conv2d)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda conv, _, output: kinds.add((conv.groups > 1, output.dtype)))
    photos, gradients = torch.randn(4, 3, 32, 32), {}
    for dtype in (torch.bfloat16, torch.float32):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
            net(photos).float().square().mean().backward()
            assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
        gradients[dtype] = net.blocks[0][0].conv_dw.weight.grad.clone()
        assert kinds == {(True, torch.float32), (False, dtype)}
        kinds.clear()
    one, other = gradients.values()
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.9


def test_bf16_is_taken_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    intel, amd = ({"cpu_name": name, "avx512_bf16": True} for name in ("Intel Xeon", "AMD EPYC"))
    cases = [({}, False), (intel, False), (intel | {"amx_bf16": True}, True), (amd, True), ({"bf16": True}, True)]
    for able, faster in cases:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert tm.is_faster_in_bf16(on_cpu=True) == faster, able


def test_a_last_batch_of_one_photo_is_no_hurdle_and_one_value_is_told(drawn, copied, tmp_path, capsys):
    rows = train(drawn, tmp_path / "count", "--epochs", 1)["train_rows"]
    size = next(size for size in range(2, rows) if rows % size == 1)
    train(drawn, tmp_path / "out", "--unfreeze_backbone", "--batch_size", size, "--epochs", 1)
    capsys.readouterr()
    two = pd.read_excel(copied / SHEET).dropna(subset=TARGET).drop_duplicates("plant_number").head(2)
    two.to_excel(copied / SHEET, index=False)
    with quick():
        assert tm.main(flags_of(copied, tmp_path / "out", "--val_split", 0.5, "--loss", "huber")) == 2
        assert tm.main(flags_of(drawn, tmp_path / "out", "--unfreeze_backbone", "--batch_size", 1)) == 2
    one, single = capsys.readouterr().err.splitlines()
    assert "nothing can be learned from one value" in one and "must be at least 2" in single


def test_a_vision_transformer_of_timm_runs_and_says_that_it_has_no_stages(drawn, tmp_path, capsys):
    flags = ["--features", "stages", "--epochs", 1]
    train(drawn, tmp_path / "out", "--model_name", "vit_tiny_patch16_224", "--weights", "none", *flags)
    assert "vit_tiny_patch16_224 has no maps of stages: its last features alone are taken" in capsys.readouterr().out
    assert tensors_of(tmp_path / "out")["feature_mean"].shape == (192,)


def test_a_network_that_loads_its_tensors_by_version_runs(drawn, tmp_path):
    train(drawn, tmp_path / "out", "--model_name", "mnasnet0_5", "--weights", "none", "--epochs", 1)


# ---------------------------------------------------------------- features and their cache


def test_the_engine_sends_nothing_and_gives_what_plain_pytorch_gives_on_the_pixels(drawn, tmp_path):
    code = """if True:
        import socket, sys
        calls = []
        def noted(*arguments, **more):
            calls.append(arguments)
            raise OSError("no network in this test")
        for name in ("connect", "connect_ex", "sendto"):
            setattr(socket.socket, name, noted)
        socket.getaddrinfo = noted
        import train_model
        assert train_model.main(sys.argv[1:]) == 0
        engine = sys.modules.get("openvino")
        reporters = [name for name, module in sys.modules.items() if "telemetry" in name and module is not None
                     and not name.startswith("openvino.") and "opentelemetry" not in name]
        sys.exit(f"{calls} {reporters}" if calls or reporters else 0 if engine else "openvino was not used")
    """
    pytest.importorskip("openvino")
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, *flags_of(drawn, out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = predictions_of(out)
    net = torchvision.models.shufflenet_v2_x0_5()
    net.fc = torch.nn.Identity()
    state = tensors_of(out)
    start = "backbone.net."
    net.load_state_dict({name[len(start) :]: tensor for name, tensor in state.items() if name.startswith(start)})
    head = torch.nn.Sequential(torch.nn.Linear(1024, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    names = {
        "0.weight": "features.1.weight",
        "0.bias": "features.1.bias",
        "2.weight": "last.weight",
        "2.bias": "last.bias",
    }
    head.load_state_dict({name: state[f"head.{saved}"] for name, saved in names.items()})
    for name, predicted in table["predicted_g"].items():
        photo = Image.open(drawn / "images_med_res" / name).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            grams = head(net.eval()((pixels - MEAN) / STD)) * state["target_scale"] + state["target_mean"]
        assert grams.clamp(min=0).item() == pytest.approx(predicted, abs=1e-4)


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_short_batch_and_an_extraction_in_two_parts_give_the_same_features(engine, drawn, tmp_path, monkeypatch):
    if engine == "torch":
        monkeypatch.setattr(features, "has_openvino", lambda: False)
    rows, wanted = np.arange(37), {(None, 0): np.arange(37), (None, 1): np.arange(37)}
    _, this = prepared(drawn, tmp_path / "out")
    collect = this.batches.reader
    whole = collect(wanted)
    this.batches.store = features.Store(tmp_path)
    collect({(None, 0): rows[5:12], (None, 1): rows[9:10]})
    parts = collect(wanted)
    for version in (0, 1):
        of_all = np.full((37, 1), version)
        assert torch.equal(whole(rows, of_all), parts(rows, of_all))
        photos = torch.cat([this.dataset[row, (version,), None][0] for row in range(37)])
        with torch.inference_mode():
            plain = this.backbone.net((photos / 255 - MEAN) / STD)
        torch.testing.assert_close(whole(rows, of_all)[:, 0], plain, rtol=1e-3, atol=1e-4)
    each = np.column_stack([rows % 2, 1 - rows % 2])  # a row's own versions
    both, first = whole(rows, each), whole(rows, np.zeros((37, 1), int))[:, 0]
    assert torch.equal(both[rows, rows % 2], first) and not torch.equal(both[:, 0], both[:, 1])
    monkeypatch.setattr(features, "MOST_HELD", 0)  # read from the file, batch by batch
    assert torch.equal(collect(wanted)(rows[::-1].copy(), each[::-1]), both.flip(0))


def test_what_matters_is_computed_anew_and_nothing_else(drawn, copied, tmp_path, capsys, monkeypatch):
    metrics = train(copied, tmp_path / "out", "--epochs", 1)
    trained, all_rows = metrics["train_rows"], metrics["train_rows"] + metrics["val_rows"]
    assert computed(capsys) == all_rows
    shutil.copytree(copied / "images_med_res", copied / "moved")
    for flags, number in {
        "--epochs 1 --learning_rate 1 --loss mae": 0, f"--epochs 1 --image_dir {copied / 'moved'}": 0,
        "--epochs 2": trained, "--epochs 1 --image_size 96": all_rows, "--epochs 1 --precision bf16": all_rows,
        "--epochs 1 --features stages": all_rows, "--epochs 1 --weights none": all_rows,
    }.items():  # fmt: skip
        train(copied, tmp_path / "out", *flags.split())
        assert computed(capsys) == number, flags
    monkeypatch.setattr(tm.StudyAugmentation, "DEGREES", 11)
    train(copied, tmp_path / "out", "--epochs", 1)
    assert computed(capsys) == trained  # what validation sees is as it was
    monkeypatch.setattr(reading, "BACKGROUND", "black")  # which no photo here shows
    train(copied, tmp_path / "out", "--epochs", 1)
    assert computed(capsys) == all_rows


COPIED = f"""import json, linecache, pathlib, sys
sys.path[:0] = ["", {str(ROOT / "tests")!r}, {str(ROOT)!r}]
sys.dont_write_bytecode = True  # of two states within a second the second would be taken for the first
script = pathlib.Path("train_model.py")
for old, new in json.loads(sys.argv.pop(1)):
    assert old in script.read_text(encoding="utf-8")
    script.write_text(script.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    linecache.clearcache()
    for name in ("conftest", "cross_validate", "train_model"):
        sys.modules.pop(name, None)
    import conftest, train_model
    with conftest.quick():
        assert train_model.main(sys.argv[1:]) == 0
"""  # runs the copy in the folder where it starts, after each of some changes


def test_the_code_of_pixels_is_in_the_key_down_to_its_helpers_and_the_head_is_not(drawn, tmp_path):
    for name in ("train_model.py", "cross_validate.py", "biomass"):
        (shutil.copytree if name == "biomass" else shutil.copy)(ROOT / name, tmp_path / name)
    helper = "def rarely(photo):\n    return photo\n\n\nclass StudyAugmentation("
    once = "        if random.random() < 1e-9:\n            photo = rarely(photo)\n"
    once += "        return photo\n\n    def describe"
    changes = [
        ("", ""), ("HEAD_WIDTH, METADATA_WIDTH = 256", "HEAD_WIDTH, METADATA_WIDTH = 128"),
        ("class StudyAugmentation(", helper), ("        return photo\n\n    def describe", once),
        ("    return photo\n\n\nclass", "    return photo.convert('L').convert('RGB')\n\n\nclass"),
    ]  # fmt: skip
    flags = flags_of(drawn, tmp_path / "out", "--epochs", 1)
    command = [sys.executable, "-c", COPIED, json.dumps(changes), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [*map(int, re.findall(r"found, (\d+) to compute", done.stdout))]
    metrics = pd.read_json(tmp_path / "out" / "metrics.txt", typ="series")
    assert counts == [metrics["train_rows"] + metrics["val_rows"], 0, 0, metrics["train_rows"], metrics["train_rows"]]


def test_a_changed_photo_is_noticed_and_the_others_are_not_read_again(copied, tmp_path, capsys, monkeypatch):
    validated = train(copied, tmp_path / "out", "--epochs", 1) and predictions_of(tmp_path / "out").index[0]
    path = copied / "images_med_res" / validated
    with Image.open(path) as photo:
        photo.convert("RGB").save(path, "PNG", compress_level=0)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)  # files are no longer fresh
    train(copied, tmp_path / "out", "--epochs", 1)
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", lambda *arguments, **more: pytest.fail("a photo was opened"))
        train(copied, tmp_path / "out", "--epochs", 1)
    before, old, size = predictions_of(tmp_path / "out"), path.stat().st_mtime_ns, path.stat().st_size
    with Image.open(path) as photo:
        ImageOps.invert(photo).save(path, "PNG", compress_level=0)
    os.utime(path, ns=(old, old))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, old)
    capsys.readouterr()
    train(copied, tmp_path / "out", "--epochs", 1)
    assert computed(capsys) == 1
    after = predictions_of(tmp_path / "out")
    assert list(before.index[before["predicted_g"] != after["predicted_g"]]) == [validated]


def test_copies_are_computed_once_and_none_of_a_validated_photo_is_trained_on(copied, tmp_path, capsys):
    metrics = train(copied, tmp_path / "before", "--epochs", 1)
    validated, photos = predictions_of(tmp_path / "before").index, copied / "images_med_res"
    sheet = pd.read_excel(copied / SHEET).dropna(subset=TARGET)
    trained = sheet.loc[~sheet["filename"].isin(validated), "filename"].tolist()
    shutil.copy(photos / validated[0], photos / trained[0])
    shutil.copy(photos / validated[1], photos / validated[2])
    shutil.copy(photos / trained[1], photos / trained[2])
    capsys.readouterr()
    after = train(copied, tmp_path / "after", "--epochs", 1, "--cache_dir", tmp_path / "new")
    printed = capsys.readouterr().out
    assert "left 1 training rows out, their photo is in validation too: row" in printed and trained[0] in printed
    assert after["train_rows"] == metrics["train_rows"] - 1 and after["val_rows"] == metrics["val_rows"]
    assert f"{after['train_rows'] - 1 + after['val_rows'] - 1} to compute" in printed
    table = predictions_of(tmp_path / "after")
    assert table.loc[validated[1], "predicted_g"] == table.loc[validated[2], "predicted_g"]


def test_the_studys_augmentation_flips_half_turns_a_little_and_jitters():
    """A bar from the middle to the right: its direction tells flip and turn, its brightness the jitter."""
    photo = Image.new("RGB", (101, 101))
    photo.paste((150, 100, 60), (51, 48, 91, 53))
    study, angles, brightness = tm.StudyAugmentation(0, 4), [], []
    for version in range(1, 201):
        grey = np.asarray(study.make(photo, version, "0" * 32).convert("L"), float) - np.arange(1)
        down, right = np.average(np.indices(grey.shape).reshape(2, -1), 1, (grey - grey[0, 0]).clip(0).ravel()) - 50
        angles.append(np.degrees(np.arctan2(down, right)))
        brightness.append(grey.max())
    flipped = np.abs(angles) > 90
    turned = np.where(flipped, 180 - np.abs(angles), np.abs(angles))
    assert 0.35 < flipped.mean() < 0.65 and 8 < turned.max() < 10.5
    assert 0.05 < np.std(brightness) / np.mean(brightness) < 0.2
    assert [study.trained(number, np.arange(2)).tolist() for number in range(6)] == [[n, n] for n in (1, 2, 3, 4, 1, 2)]


# ---------------------------------------------------------------- head, loss and target


def test_losses_are_means_over_rows_not_over_batches(batches):
    model = tm.BiomassModel(Stub(3), metadata=1)
    for parameter in model.head.last.parameters():
        torch.nn.init.zeros_(parameter)
    targets = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])
    parts = (part.split(4) for part in (torch.rand(5, 1, 3), torch.zeros(5, 0), torch.rand(5, 1), targets))
    loader = list(zip(*parts, strict=True))
    predicted, measured = tm.evaluate(model, loader, batches)
    assert (predicted - measured).square().mean() == pytest.approx(13 / 5)
    still, loss = torch.optim.SGD(model.parameters(), lr=0.0), torch.nn.L1Loss()
    assert tm.train_one_epoch(model, loader, still, loss, batches) == pytest.approx(13 / 5)


def test_the_loop_overfits_eight_photos(drawn, tmp_path):
    flags = ["--epochs", 300, "--standardize_features", "--target_transform", "standardize", "--augmentation", "none"]
    _, this = prepared(drawn, tmp_path / "out", *flags)
    rows, batches = np.arange(8), this.batches
    with quick():
        batches.collect(rows, rows)
        model = tm.new_model(batches, this.backbone, rows)
        outcome = tm.fit(model, batches, (rows, rows), this.progress)
        predictions, measured = (found.numpy() for found in tm.evaluate(model, batches.judge(rows), batches))
    loss = np.mean((predictions - measured) ** 2)
    assert measured.tolist() == pytest.approx(this.labels[TARGET].to_numpy()[:8].tolist())
    assert loss == pytest.approx(outcome["history"][outcome["epoch"] - 1]["val_loss"], rel=1e-4)
    assert np.sqrt(loss) < 0.2 * measured.std()


def test_a_step_is_that_of_a_plain_loop_with_the_traits_and_metadata_of_each_row(batches):
    torch.manual_seed(0)
    model = tm.BiomassModel(Stub(3), traits=len(plant.TRAITS), metadata=2, dropout=0)
    plain, rows = copy.deepcopy(model), (torch.rand(6, 1, 3), torch.rand(6, len(plant.TRAITS)), torch.rand(6, 2))
    loader = list(zip(*(part.split(3) for part in (*rows, torch.rand(6))), strict=True))
    tm.train_one_epoch(model, loader, torch.optim.SGD(model.parameters(), 0.01), torch.nn.MSELoss(), batches)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    for inputs, traits, metadata, targets in loader:
        one_by_one = [plain(*(part[row : row + 1] for part in (inputs, traits, metadata)))[0, 0] for row in range(3)]
        optimizer.zero_grad()
        ((torch.stack(one_by_one) - targets) ** 2).mean().backward()
        optimizer.step()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_each_pass_takes_all_rows_in_another_order_and_the_next_version(batches, monkeypatch):
    batches.dataset, batches.args.least_steps = argparse.Namespace(augmentation=tm.Symmetries(0, 0)), 75
    monkeypatch.setattr(batches, "make", lambda rows, versions: [(rows, versions)])
    passes = [one for epoch in (1, 2) for one in batches.train(np.arange(100), epoch)]
    assert len(passes) == 2 * 19  # of four steps each, so that an epoch takes at least 75
    assert len({rows.tobytes() for rows, _ in passes}) == len(passes)
    assert all(sorted(rows) == list(range(100)) for rows, _ in passes)
    assert [{*versions.flat} for _, versions in passes] == [{number % 8} for number in range(len(passes))]


def test_rates_decay_and_loss_are_those_of_the_flags(drawn, tmp_path, monkeypatch):
    flags = ["--lr_schedule", "cosine", "--epochs", 4, "--weight_decay", 0.3, "--loss", "huber"]
    args, this = prepared(drawn, tmp_path / "out", *flags, "--target_transform", "none")
    seen, rows = [], np.arange(len(this.labels))

    def note(learner, loader, optimizer, loss_function, batches):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"], loss_function.delta))
        return 1.0

    monkeypatch.setattr(tm, "train_one_epoch", note)
    tm.fit(tm.new_model(this.batches, this.backbone, rows), this.batches, (rows, rows[:0]), this.progress, "", 4)
    rates, decays, bends = zip(*seen, strict=True)
    assert rates == pytest.approx([args.learning_rate * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)])
    assert set(decays) == {0.3} and bends == pytest.approx([this.labels[TARGET].std()] * 4)


def test_the_best_epoch_is_that_of_the_lowest_error_on_validation():
    model, done = argparse.Namespace(learned_state=dict), {"history": []}
    for epoch, loss in enumerate((3.0, 1.0, 2.0), start=1):
        done = tm.add_epoch(done, {"epoch": epoch, "val_loss": loss}, epoch, model, True, "")
    assert (done["epoch"], done["predictions"], len(done["history"])) == (2, 2, 3)
    assert tm.add_epoch(done, {"epoch": 4}, None, model, False, "")["epoch"] == 4  # where nothing is chosen, the last


def test_traits_are_standardised_by_training_rows_cut_and_weighted(drawn, tmp_path):
    _, this = prepared(drawn, tmp_path / "out", "--features", "last", "traits")
    rows, sizes = np.arange(20), len(plant.SIZES)
    traits = this.dataset.traits[None]
    model = tm.new_model(this.batches, this.backbone, rows).eval()
    inputs = np.concatenate([traits, np.log1p(traits[:, :sizes])], 1)[rows].astype(float)
    assert model.trait_mean.numpy() == pytest.approx(np.nanmean(inputs, 0), rel=1e-4)
    varied = np.nanstd(inputs, 0) > 1e-6
    assert model.trait_scale.numpy()[varied] == pytest.approx(np.nanstd(inputs, 0)[varied], rel=1e-4)
    seen = []
    model.head.register_forward_pre_hook(lambda head, given: seen.append(given[0][:, -inputs.shape[1] :]))
    odd = traits[20:22].clone()
    odd[1] = 1e6
    model(torch.zeros(2, 1, model.backbone.width), odd, torch.zeros(2, 0))
    wanted = np.concatenate([odd, np.log1p(odd[:, :sizes])], 1)
    wanted = ((wanted - np.nanmean(inputs, 0)) / np.nanstd(inputs, 0)).clip(-4, 4) * tm.TRAITS_WEIGHT
    assert seen[0].numpy()[:, varied] == pytest.approx(wanted[:, varied], abs=1e-3)


@pytest.mark.parametrize("kind", ["none", "log", "sqrt", "standardize"])
def test_target_transforms_are_undone_the_bias_is_made_up_for_and_no_weight_is_below_0(kind):
    targets = torch.tensor([0.0021, 0.058, 0.148, 0.365, 2.113])
    model = tm.BiomassModel(Stub(2), target_transform=kind)
    model.fit_targets(targets)
    bent = model.to_loss_unit(targets)
    torch.testing.assert_close(model.to_grams(bent).float(), targets)
    if kind != "none":
        plain = {"log": np.log, "sqrt": np.sqrt}.get(kind, np.asarray)(targets.numpy().astype(float))
        assert bent.numpy() == pytest.approx((plain - plain.mean()) / plain.std(), rel=1e-4)
    if kind in ("log", "sqrt"):  # what is lost by averaging logarithms or roots
        means = bent.mean().expand(5)
        assert model.to_grams(means).sum() < 0.8 * targets.sum()
        model.balance(model.to_grams(means), targets)
        assert model.to_grams(means).sum().item() == pytest.approx(targets.sum().item(), rel=1e-5)
    assert model.to_grams(torch.tensor([-1e6, -3.0])).min() == 0
    if kind in ("none", "standardize"):  # a target that may be negative is not held at 0
        model.fit_targets(targets - 1)
        torch.testing.assert_close(model.to_grams(model.to_loss_unit(targets - 1)).float(), targets - 1)


@pytest.mark.parametrize("own_deviation", [False, True])
def test_a_feature_of_one_training_photo_moves_no_other_by_more_than_weights_differ(own_deviation, batches):
    random = np.random.default_rng(0)
    found = torch.from_numpy(random.normal(-0.5, 1.0, (400, 512))).float().relu()
    weights = torch.from_numpy(random.lognormal(-1.5, 0.8, 400)).float() + 0.05 * found[:, 1:6].sum(1)
    found[:, 0] = 0
    found[17, 0] = 0.01
    torch.manual_seed(0)
    model = tm.BiomassModel(Stub(512), target_transform="standardize")
    model.fit_targets(weights[:300])
    model.fit_features(found[:300])
    if own_deviation:  # as it must not be: this shows that the test can fail
        model.feature_scale.copy_(found[:300].std(0))
    optimizer, none = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.zeros(400, 0)
    parts = (part[:300].split(32) for part in (found[:, None], none, none, weights))
    loader = list(zip(*parts, strict=True))
    for _ in range(40):
        tm.train_one_epoch(model, loader, optimizer, torch.nn.MSELoss(), batches)
    seen, odd = found[300:, None], found[300:, None].clone()
    odd[..., 0] = 3
    with torch.inference_mode():
        model.eval()
        change = (model.predict(odd, *(none[300:],) * 2) - model.predict(seen, *(none[300:],) * 2)).abs().max()
    assert (change < weights[:300].std()) != own_deviation, change


# ---------------------------------------------------------------- rows, ids, metadata and units


def test_metadata_are_encoded_as_scikit_learn_does(drawn, tmp_path):
    random = np.random.default_rng(0)

    def draw(rows):
        numbers = random.normal(20, 5, rows).round(2).astype(object)
        numbers[::5], numbers[1] = None, "17,25"
        soil = random.choice(["peat", "sand", "loam "], rows).astype(object)
        soil[::7] = None
        return pd.DataFrame({"age": numbers, "soil": soil, "empty": [None] * rows})

    training, later = draw(40), draw(15)
    later.loc[2, "soil"] = "never seen"
    encoded = reading.encode_metadata(later, reading.plan_metadata(training, ["age", "soil", "empty"]))
    number = [
        pd.to_numeric(table["age"].astype(str).str.replace(",", "."), errors="coerce") for table in (training, later)
    ]
    clean = [t.assign(age=n, soil=t["soil"].str.strip()) for t, n in zip((training, later), number, strict=True)]
    numeric = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    text = OneHotEncoder(categories=[["loam", "peat", "sand"]], handle_unknown="ignore", sparse_output=False)
    plain = ColumnTransformer([("age", numeric, ["age"]), ("soil", text, ["soil"])]).fit(clean[0]).transform(clean[1])
    assert encoded.shape == (15, 2 + 3 + 2) and np.isfinite(encoded).all()
    assert encoded[:, [0, 2, 3, 4]] == pytest.approx(plain, abs=1e-6)
    assert encoded[:, 1].tolist() == number[1].isna().tolist()


def test_metadata_have_a_head_of_their_own_and_statistics_come_from_training_rows(drawn, copied, tmp_path):
    flags = ["--epochs", 1, "--standardize_features", "--target_transform", "log", "--loss", "huber"]
    flags += ["--metadata_columns", "age_days", "temperature"]
    train(drawn, tmp_path / "out", *flags)
    state, before = tensors_of(tmp_path / "out"), predictions_of(tmp_path / "out")
    assert (
        state["head.metadata.0.weight"].shape[1] == 4
        and state["head.last.weight"].shape[1] > state["head.features.1.bias"].shape[0]
    )
    changed = before.index[0]

    def change(sheet):
        at = sheet["filename"] == changed
        return sheet.assign(**{TARGET: sheet[TARGET].mask(at, 1.9), "age_days": sheet["age_days"].mask(at, 90)})

    change_sheet(copied, change)
    train(copied, tmp_path / "again", *flags)
    after = predictions_of(tmp_path / "again")
    differ = before["predicted_g"] != after["predicted_g"]
    assert list(before.index[differ]) == [changed] and after.loc[changed, "measured_g"] == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("column", "told"),
    [("fresh_weight_shoot", "harvest"), ("dry_weight_shoot", "harvest"), ("shoot_root_ratio_fresh", "harvest"),
     ("mass", "correlation with fresh_weight_total is -0.9"), ("rank", "correlation"), ("remark", "different texts")],
)  # fmt: skip
def test_columns_that_give_the_weight_away_are_refused(column, told, copied, tmp_path, capsys):
    def add(sheet):
        weights = sheet[TARGET] + np.random.default_rng(0).normal(0, 0.1 * sheet[TARGET].std(), len(sheet))
        return sheet.assign(mass=-weights, rank=sheet[TARGET].rank() ** 9, remark=[f"no. {row}" for row in sheet.index])

    change_sheet(copied, add)
    assert tm.main(flags_of(copied, tmp_path / "out", "--metadata_columns", "age_days", column)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"--metadata_columns {column}: " in message and told in message


@pytest.mark.parametrize("kind", ["xlsx", "csv", "parquet"])
def test_one_id_in_letters_does_not_split_the_other_plants(kind, tmp_path):
    plants = ["12a", "12", "12.0", "12 ", 12, "007", "7", None, " ", "13"]
    plants = plants if kind == "xlsx" else [plant if plant is None else str(plant) for plant in plants]
    sheet = pd.DataFrame({"filename": [f"{n}.png" for n in range(10)], "plant_number": plants, TARGET: 0.1})
    path = tmp_path / f"labels.{kind}"
    {"xlsx": sheet.to_excel, "csv": sheet.to_csv, "parquet": sheet.to_parquet}[kind](path, index=False)
    plants = labels_of(path)["_plant"]
    assert [*plants.index] == [0, 1, 2, 3, 4, 5, 6, 9]  # rows without a plant are left out
    assert plants[1:4].nunique() == 1 and plants[5] == plants[6]
    assert len({plants[0], plants[1], plants[9], plants[5]}) == 4
    assert labels_of(path, "--group_by", "plant_number", "filename")["_plant"].nunique() == 8


def test_experiments_are_not_called_plants(drawn, tmp_path, capsys, monkeypatch):
    texts = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **more: texts.append(text))
    metrics = train(drawn, tmp_path / "out", "--epochs", 1, "--group_by", "experiment_id", pictures=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("train:", "validation:"))]
    assert f"{metrics['val_plants']} experiment_ids" in lines[1] and f"{metrics['train_plants']} exper" in lines[0]
    assert any("experiment_ids that the model was not trained on" in text for text in texts)
    assert not any("plants" in text for text in texts + lines)


def test_a_target_without_a_unit_has_none(drawn, tmp_path):
    assert [reading.unit_of(name) for name in (TARGET, "fresh_weight_mg", "total_leaves")] == ["g", "mg", ""]
    metrics = train(drawn, tmp_path / "out", "--epochs", 1, "--target", "total_leaves")
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(table) == ["filename", "plant_number", "fold", "measured", "predicted", "error"]
    assert metrics["val_rows"] == len(table) and "noise_floor_rmse" not in metrics
    assert torch.load(tmp_path / "out" / "model.pt", weights_only=True)["unit"] == ""


def test_faults_of_a_folder_are_dropped_by_name_and_change_no_other_row(drawn, faulty, tmp_path, capsys):
    train(faulty, tmp_path / "out", "--epochs", 1)
    printed = capsys.readouterr().out
    lines = (faulty / "README.txt").read_text().splitlines()
    faults = dict(line[2:].split(": ", 1) for line in lines if line[:2] == "- ")
    sheet = pd.read_excel(faulty / SHEET)
    row = sheet.index[sheet["filename"] == faults["missing file"]][0] + 2
    assert f"row {row} ({faults['missing file']}) no such file" in printed
    assert f"({faults['truncated PNG']}) unreadable photo" in printed
    assert f"({faults['negative weight']})" in printed and f"({faults['duplicate row']})" in printed
    tables = [prepared(folder, tmp_path / folder.parent.name)[1].labels for folder in (drawn, faulty)]
    lost = [faults[name] for name in ("missing file", "truncated PNG", "negative weight")]
    wanted, found = (table.set_index("filename")[TARGET] for table in tables)
    pd.testing.assert_series_equal(found, wanted.drop(lost))


@pytest.mark.parametrize("plants", [7, 60])
def test_the_intervals_cover_the_truth(plants):
    random, of_rows, covered = np.random.default_rng(1), np.repeat(np.arange(plants), 6), []
    for _ in range(200):
        errors = random.normal(0, 0.8, plants)[of_rows] + random.normal(0, 0.6, len(of_rows))  # true RMSE: 1
        low, high = writing.rmse_interval(errors**2, of_rows)
        x = random.normal(0, 1, plants)[of_rows]  # true r of x and y: 0.6 / 1
        y = 0.6 * x + 0.8 * (random.normal(0, 0.8, plants)[of_rows] + random.normal(0, 0.6, len(of_rows)))
        r_low, r_high = cross_validate.correlation_interval(x, y, of_rows)
        covered.append((low <= 1 <= high, r_low <= 0.6 <= r_high))
    held = np.mean(covered, 0)
    assert (held > 0.89).all() and (held < 0.995).all(), held
    assert writing.rmse_interval(np.array([1.0, 4.0]), [1, 1]) is None

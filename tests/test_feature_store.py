"""The store's answer is the backbone's, its keys change with all that matters, and damage to it is survived."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import loaders
import train_model
from devices import ALONE
from feature_store import FeatureStore, digest
from model import BiomassModel

TARGET = "fresh_weight_total"
SHEET = "digital_biomass_labels.xlsx"
RECIPE = {"backbone": "resnet18", "weights": "a"}


@pytest.fixture(scope="module")
def photos(drawn):
    labels = train_model.load_labels(train_model.build_parser().parse_args(["--labels_path", str(drawn / SHEET)]))
    labels = train_model.filter_missing_images(labels, drawn / "images_med_res", TARGET)
    return train_model.BiomassDataset(labels, TARGET, 42)


def loader(photos, cache_dir, model, **flags):
    """A FeatureLoader over ten training and ten validation photos, and the (row, view) pairs that it had to compute."""
    arguments = [f"--{name}={value}" for name, value in {"cache_dir": cache_dir, **flags}.items()]
    args = train_model.build_parser().parse_args(arguments)
    computed = []

    class Watched(loaders.FeatureLoader):
        def extract(self, pairs, group):
            computed.extend(map(tuple, pairs.tolist()))
            return super().extract(pairs, group)

    return Watched(model, model.split(), photos, [(np.arange(10), np.arange(10, 20))], args), computed


def stored(features, view, rows):
    return features.stored[features.place[view][rows]]


def features_of(store, keys, compute):
    keys = np.array(keys, "S32")
    store.complete(keys, compute, ALONE)
    return store[store.places(keys)]


def model_of(seed, precision="fp32"):
    torch.manual_seed(seed)
    return BiomassModel("resnet18", precision=precision)


def test_stored_features_equal_those_of_the_whole_model(photos, tmp_path):
    model = model_of(0)
    for _ in range(2):  # computed, then found
        features, computed = loader(photos, tmp_path, model, epochs=3)
        batches = loaders.PhotoBatches(photos, [(row, 2) for row in range(10)], 10)
        with torch.inference_mode():
            direct = model.backbone(model.normalize(batches[0][0]))
            plain = model.backbone(model.normalize(torch.stack([photos[row][0] for row in range(10, 20)])))
        assert stored(features, 2, range(10)) == pytest.approx(direct.numpy(), rel=1e-4, abs=1e-5)
        assert stored(features, loaders.PLAIN, range(10, 20)) == pytest.approx(plain.numpy(), rel=1e-4, abs=1e-5)
    assert computed == []
    with torch.inference_mode():
        model.eval()
        predicted = torch.cat([model(batch, none) for batch, none, _ in features.validation(np.arange(10, 20))])
        whole = model(torch.stack([photos[row][0] for row in range(10, 20)]), torch.zeros(10, 0))
    assert predicted.numpy() == pytest.approx(whole.numpy(), abs=1e-5)


def test_half_precision_is_stored_without_a_loss_that_a_scale_would_show(photos, tmp_path):
    model = model_of(0, "bf16").eval()
    features, _ = loader(photos, tmp_path, model, epochs=1)
    images = torch.stack([photos[row][0] for row in range(10, 20)])
    with torch.inference_mode():
        kept = torch.cat([model(batch, none) for batch, none, _ in features.validation(np.arange(10, 20))])
        direct = model(model.extractor(model.split())(images), torch.zeros(10, 0))
    assert kept.numpy() == pytest.approx(direct.numpy(), abs=1e-3)


def test_epochs_walk_through_the_views(photos, tmp_path):
    model = model_of(0)
    features, computed = loader(photos, tmp_path, model, augment_views=2, epochs=5)
    assert len(computed) == 10 * 2 + 10
    rows = np.arange(10)

    def epoch(number):
        order = loaders.shuffled(rows, 42, number)
        batches = torch.cat([batch for batch, *_ in features.train(rows, number)])
        return batches[np.argsort(order)]

    assert torch.equal(epoch(1), epoch(3)) and torch.equal(epoch(2), epoch(4))
    assert not torch.equal(epoch(1), epoch(2))
    args = train_model.build_parser().parse_args(["--no_augmentation", "--cache_dir", str(tmp_path)])
    plain = loaders.FeatureLoader(model, model.split(), photos, [(rows, np.arange(10, 20))], args)
    wanted = torch.cat([batch for batch, *_ in plain.validation(rows)])
    trained = torch.cat([batch for batch, *_ in plain.train(rows, 3)])
    assert torch.equal(trained[np.argsort(loaders.shuffled(rows, 42, 3))], wanted)
    fresh, computed = loader(photos, tmp_path, model, augment_views=0, epochs=5)
    assert computed == []  # validation rows are in the store
    list(fresh.train(rows, 1))
    list(fresh.train(rows, 4))
    assert [view for _, view in computed] == [0] * 10 + [3] * 10


def test_a_view_does_not_depend_on_order_workers_or_batch(photos):
    pairs = [(row, view) for row in range(6) for view in (loaders.PLAIN, 0, 1)]
    wanted = {(row, view): photos[row, view][0] for row, view in reversed(pairs)}
    for order, size, workers in ((pairs, 4, 0), (pairs[::-1], 5, 2), (pairs, 18, 1)):
        batches = loaders.PhotoBatches(photos, order, size)
        images = torch.cat([images for images, *_ in loaders.read_ahead(batches, workers)])
        for pair, image in zip(order, images, strict=True):
            assert torch.equal(image, wanted[pair])
    assert not torch.equal(wanted[0, 0], wanted[0, 1])
    assert wanted[0, loaders.PLAIN].shape == (3, 224, 224) and wanted[0, loaders.PLAIN].dtype == torch.uint8


def test_what_matters_makes_a_new_key_and_what_does_not_costs_nothing(photos, tmp_path):
    model = model_of(0)
    assert len(loader(photos, tmp_path / "store", model, epochs=1)[1]) == 20
    assert loader(photos, tmp_path / "store", model, epochs=1)[1] == []
    assert len(loader(photos, tmp_path / "store", model, epochs=2)[1]) == 10  # one more view of the training rows
    assert len(loader(photos, tmp_path / "store", model_of(1), epochs=1)[1]) == 20  # other weights
    assert len(loader(photos, tmp_path / "store", model_of(0, "bf16"), epochs=1)[1]) == 20  # other precision

    moved = tmp_path / "elsewhere"  # copied to another folder under other names, and one pixel of one photo changed
    moved.mkdir()
    labels = pd.DataFrame({"_path": photos.paths, TARGET: photos.targets})
    for row, path in enumerate(photos.paths):
        shutil.copy(path, moved / f"{row}.png")
    labels["_path"] = [str(moved / f"{row}.png") for row in range(len(photos))]
    photo = Image.open(moved / "3.png")
    photo.putpixel((0, 0), (1, 2, 3))
    photo.save(moved / "3.png")
    labels["_content"] = [digest(train_model.check_photo(path)[0]) for path in labels["_path"]]
    again = train_model.BiomassDataset(labels, TARGET, 42)
    assert loader(again, tmp_path / "store", model, epochs=1)[1] == [(3, 0)]

    other_seed = train_model.BiomassDataset(labels, TARGET, 43)
    assert {view for _, view in loader(other_seed, tmp_path / "store", model, epochs=1)[1]} == {0}
    model.image_size = again.image_size = 192
    assert len(loader(again, tmp_path / "store", model, epochs=1)[1]) == 20


def test_damaged_and_half_written_files_are_named_and_replaced(tmp_path, caplog):
    caplog.set_level("INFO")
    keys = [f"{number:032x}" for number in range(5)]
    wanted = np.arange(20, dtype=np.float32).reshape(5, 4)

    def compute(missing):
        yield wanted[missing]

    def features():
        return features_of(FeatureStore(tmp_path, RECIPE, (4,), np.float32), keys, compute)

    assert np.array_equal(features(), wanted)
    (path,) = tmp_path.glob("*/*.npy")
    for damage in (b"", path.read_bytes()[:-7], path.read_bytes()[:-1] + b"?"):
        path.write_bytes(damage)
        caplog.clear()
        assert np.array_equal(features(), wanted)
        assert f"damaged feature file {path}" in caplog.text and "0 found, 5 to compute" in caplog.text
        caplog.clear()
        assert np.array_equal(features(), wanted) and "5 found, 0 to compute" in caplog.text


def test_two_runs_share_a_store_and_no_store_is_a_store_that_keeps_nothing(tmp_path):
    first, second = (FeatureStore(tmp_path, RECIPE, (2,), np.float16) for _ in range(2))
    for store in (first, second, first):
        store.make_folder()
        store.add(["a" * 32], np.ones((1, 2)))
        store.add(["b" * 32], np.zeros((1, 2)))
    store = FeatureStore(tmp_path, RECIPE, (2,), np.float16)
    places = store.places(np.array(["b" * 32, "c" * 32, "a" * 32], "S32"))
    assert (places >= 0).tolist() == [True, False, True] and store[places[[0, 2]]].tolist() == [[0, 0], [1, 1]]
    killed, writing = (store.folder / f"{name}.npy.partial" for name in ("killed", "writing"))
    for partial in (killed, writing):
        partial.write_bytes(b"?")
    os.utime(killed, (0, 0))
    first.make_folder()
    assert writing.exists() and not killed.exists()
    other = FeatureStore(tmp_path, {**RECIPE, "weights": "b"}, (2,), np.float16)
    assert other.places(np.array(["a" * 32], "S32")) == -1
    asked = []
    for _ in range(2):
        nothing = FeatureStore(None, RECIPE, (2,), np.float16)
        features_of(nothing, ["a" * 32], lambda missing: asked.append(missing) or [np.ones((1, 2))])
    assert len(asked) == 2


def test_features_beyond_float16_are_refused():
    store = FeatureStore(None, RECIPE, (1,), np.float16)
    with pytest.raises(OverflowError):
        features_of(store, ["a" * 32], lambda missing: [np.full((1, 1), 1e6, np.float32)])

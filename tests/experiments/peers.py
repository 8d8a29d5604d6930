"""What else could one pick? Simpler or well-known ways on the same photos and the same folds as cross_validate.py's.

    python3 -m venv ../peers_venv
    ../peers_venv/bin/pip install -r requirements.txt -r tests/experiments/peers_requirements.txt
    ../peers_venv/bin/python tests/experiments/peers.py --real FOLDER --sets lettuce pigs

Traits of a mask, by excess green or by Otsu's threshold of the colour's distance from the photo's edge, with a ridge, a
forest or boosted trees, whichever is best in folds of the training rows; a ridge on the last features of lite0; the
same network fine-tuned by fastai, at the learning rate that its lr_find tells on the training rows. FOLDER is that of
recipes.py. Writes results/peers.csv: set, peer, rmse (in the target's unit), r2, seconds (of all folds, with what they
need). Lines that are there are not computed again. Minutes a set, but for fastai: on two cores some ten minutes for 50
photos, an hour for 400.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from recipes import (
    ROOT,
    SEED,
    STUDY,
    add_set_flags,
    cross_validate,
    features_of,
    find_sets,
    forest,
    load,
    on_root,
    ridge_on_features,
    score,
    tm,
    traits_of,
)
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from biomass import features, plant, reading

TABLE = ROOT / "results" / "peers.csv"
COLUMNS = ["set", "peer", "rmse", "r2", "seconds", "commit"]
EPOCHS = 10  # of fastai, after one of the head alone


# ---------------------------------------------------------------- traits, and features with a ridge


def find_by_otsu(photo, threshold=None):
    """Where a photo's colour is unlike that of its edge, by Otsu's threshold: bool (height, width)."""
    from scipy.ndimage import binary_opening
    from skimage.color import rgb2lab
    from skimage.filters import threshold_otsu

    colours = rgb2lab(np.asarray(photo))
    edge = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    distance = np.linalg.norm(colours - np.median(edge, 0), axis=2)
    return binary_opening(distance > threshold_otsu(distance), np.ones((3, 3)))


def best_of_three(groups):
    """A ridge, a forest or boosted trees, whichever is best in folds of the groups that it learns from."""
    models = [make_pipeline(StandardScaler(), Ridge(alpha)) for alpha in np.logspace(-1, 4, 11)]
    models += [forest(groups), GradientBoostingRegressor(n_estimators=300, learning_rate=0.05, subsample=0.7)]
    inner = list(GroupKFold(4).split(groups, groups=groups))
    return GridSearchCV(Pipeline([("model", Ridge())]), {"model": models}, cv=inner, scoring="neg_mean_squared_error")


def by_table(found_of, make, run, args):
    """predict_fold of a model on a table of numbers, one row a photo."""
    found, groups, targets = found_of(run), run.labels["_plant"].to_numpy(), run.dataset.targets.numpy()

    def predict_fold(fold, split):
        learn, held_out = split
        imputer = SimpleImputer(strategy="median", keep_empty_features=True)
        model = make_pipeline(imputer, on_root(make(groups[learn]))).fit(found[learn], targets[learn])
        return model.predict(found[held_out])

    return predict_fold


def traits_by_otsu(run):
    with mock.patch.object(plant, "find_plant", find_by_otsu):
        return traits_of(run)


# ---------------------------------------------------------------- fastai


def make_learner(run, split, folder):
    """fastai's learner for a fold as its tutorials make one, with the weights that pip has installed."""
    from fastai.vision.all import (
        ColReader,
        DataBlock,
        ImageBlock,
        IndexSplitter,
        Normalize,
        RegressionBlock,
        Resize,
        aug_transforms,
        rmse,
        vision_learner,
    )

    table = run.labels.assign(target=run.dataset.targets.numpy()).iloc[np.concatenate(split)].reset_index(drop=True)
    block = DataBlock(
        blocks=(ImageBlock, RegressionBlock),
        get_x=ColReader("_path"),
        get_y=ColReader("target"),
        splitter=IndexSplitter(range(len(split[0]), len(table))),  # which chooses nothing, see by_fastai
        item_tfms=Resize(run.backbone.size, method="squish"),
        batch_tfms=[*aug_transforms(flip_vert=True), Normalize.from_stats([0.5] * 3, [0.5] * 3)],
    )
    loaders = block.dataloaders(table, bs=16 if len(table) < 200 else 32, num_workers=0, device="cpu")
    reach = (0, 1.2 * float(table["target"][: len(split[0])].max()))
    learner = vision_learner(
        loaders, "tf_efficientnet_lite0", pretrained=False, y_range=reach, metrics=rmse, path=folder
    )
    network = learner.model[0].model
    weights = features.imagenet_weights("tf_efficientnet_lite0")
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return learner


def by_fastai(run, args):
    """predict_fold of fastai's fine_tune, at the learning rate that lr_find tells; the last epoch counts."""
    torch.set_num_threads(reading.cores())

    def predict_fold(fold, split):
        from fastai.vision.all import set_seed, valley

        set_seed(SEED)
        with tempfile.TemporaryDirectory() as folder:
            learner = make_learner(run, split, folder)
            with learner.no_bar(), learner.no_logging():
                learner.freeze()
                rate = learner.lr_find(suggest_funcs=(valley,), show_plot=False).valley
                learner.fine_tune(EPOCHS, rate)
                predictions = learner.get_preds(ds_idx=1)[0][:, 0]
        print(f"{fold}fastai: learning rate {rate:.2g}", flush=True)
        return predictions.numpy()

    return predict_fold


PEERS = {  # functions of a run and its arguments that give predict_fold(fold, split)
    "traits of the green mask, best of three models": functools.partial(by_table, traits_of, best_of_three),
    "traits of Otsu's mask, best of three models": functools.partial(by_table, traits_by_otsu, best_of_three),
    "ridge on the last features of lite0": functools.partial(by_table, features_of, ridge_on_features),
    "fastai, lite0 fine-tuned": by_fastai,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_set_flags(parser)
    parser.add_argument("--only", nargs="+", help="parts of the names of peers")
    args = parser.parse_args()
    table = pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=COLUMNS)
    commit = tm.git("rev-parse", "HEAD")  # of the code that is loaded, whatever is committed meanwhile
    for name, data in find_sets(args).items():
        done = set(table.loc[table["set"] == name, "peer"])
        peers = [peer for peer in PEERS if peer not in done]
        peers = [peer for peer in peers if not args.only or any(part in peer for part in args.only)]
        with tempfile.TemporaryDirectory() as out:
            plain = ["--augmentation", "none", "--no_erasing", "--seed", SEED]
            run, recipe = load([*STUDY, *plain, *data], Path(out)) if peers else (None, None)
        for peer in peers:
            started, splits = time.perf_counter(), cross_validate.folds_by_plant(run.labels, recipe).items()
            found = score(run, recipe, splits, PEERS[peer](run, recipe))
            line = {"set": name, "peer": peer, "rmse": found["val_rmse"], "r2": found["val_r2"]}
            line |= {"seconds": round(time.perf_counter() - started), "commit": commit}
            print("{set:12s} {peer:50s} RMSE {rmse:.4f}  R2 {r2:.3f}  {seconds} s".format(**line), flush=True)
            table = pd.concat([table, pd.DataFrame([line])])
            table.to_csv(TABLE, columns=COLUMNS, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()

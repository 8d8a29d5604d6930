"""Which recipe is best on drawn and real photos together? One change at a time from the recommended one, by folds.

    python tests/experiments/recipes.py --real FOLDER                    all sets; some two hours on two cores
    python tests/experiments/recipes.py --real FOLDER --sets lettuce pigs --only px traits

Reads full_sample and sample_data (4,294 and 400 photos of make_sample_data.py), and in FOLDER three sets of real
photos, each a labels.csv and a folder images, that are not ours to hand on, from GitHub: lettuce_hydro (swarrier246/
plant_weight_estimation, MIT), pigs (TitoFM16/pig-weight-predictor-CNN), ecustfd (Liang-yc/ECUSTFD-resized-). Each
recipe is judged by cross_validate.py's own folds and models. All run with one seed, the best five with two more.
Yardsticks: other models on the features that the recommended recipe sees, or on traits alone.

Writes results/recipes.csv: set, recipe, seed, rmse (of all held-out rows, in the target's unit), best (lowest RMSE of a
recipe on that set, as the mean of its seeds), ratio (rmse / best). Lines that are there are not computed again: delete
the file to start anew. What `load`, `train` and `predict` do, the scripts beside this one do too.
"""

import argparse
import contextlib
import math
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cross_validate  # noqa: E402
import train_model as tm  # noqa: E402
from biomass import plant, writing  # noqa: E402

STUDY, RECOMMENDED = ["--model_name", "tf_efficientnet_lite0"], ["--recipe", "recommended"]
SEED, MORE_SEEDS, BEST = 42, (43, 44), 5
TABLE = ROOT / "results" / "recipes.csv"
COLUMNS = ["set", "recipe", "seed", "rmse", "best", "ratio", "commit"]
DRAWN = {"drawn 4294": "full_sample", "drawn 400": "sample_data"}
REAL = {  # folder, target, what is kept together
    "lettuce": ("lettuce_hydro", "weight_g", "plant"),
    "pigs": ("pigs", "weight_kg", "pig"),
    "food": ("ecustfd", "weight_g", "item"),
}
tm.SAVE_EVERY = math.inf  # else a training would go on from the state that the one before it has left


# ---------------------------------------------------------------- what the scripts beside this one share


def load(flags, out):
    """A run that is prepared as by cross_validate.py, with all features, and its arguments."""
    places = ["--results_dir", out, "--model_out", Path(out) / "model.pt", "--log_path", Path(out) / "log"]
    flags = [*map(str, [*flags, *places])]
    args = tm.parse_arguments(cross_validate.build_parser(), flags)
    with contextlib.ExitStack() as started:
        run = tm.prepare("", flags, args, started)
    rows = np.arange(len(run.labels))
    run.batches.collect(rows, rows, {} if args.no_erasing else dict.fromkeys(cross_validate.ERASED.values(), rows))
    return run, args


def train(run, args, rows):
    """A model that has learned from `rows` for all epochs."""
    model = tm.new_model(run.batches, run.backbone, rows)
    tm.fit(model, run.batches, (rows, rows[:0]), run.progress, "", args.epochs)
    return model


def predict(run, args, model, split, fold=1):
    predictions, _ = tm.evaluate(model, run.batches.judge(split[1]), run.batches)
    return writing.prediction_table(run.labels, split, predictions, args, fold)


def score(run, args, splits, predict_fold):
    """Scores over all rows, where predict_fold(name, split) gives the predictions of a fold's held-out rows."""
    tables = [writing.prediction_table(run.labels, split, predict_fold(name, split), args) for name, split in splits]
    return writing.scores(pd.concat(tables))


def add_set_flags(parser):
    """Add the flags that say which sets there are; find_sets reads them."""
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="of the sets of real photos (default: without)")
    parser.add_argument("--sets", nargs="+", choices=[*DRAWN, *REAL], help="these alone (default: all)")
    parser.add_argument("--data", type=Path, default=ROOT, metavar="FOLDER", help="that holds the drawn sets")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / ".feature_cache", help="of features")


def find_sets(args):
    """The flags of each set's data, by its name."""
    sets = {name: ["--data_dir", args.data / folder] for name, folder in DRAWN.items()}
    for name, (folder, target, group) in REAL.items() if args.real else ():
        places = ["--labels_path", args.real / folder / "labels.csv", "--image_dir", args.real / folder / "images"]
        sets[name] = [*places, "--target", target, "--group_by", group]
    return {name: [*sets[name], "--cache_dir", args.cache_dir] for name in args.sets or sets}


# ---------------------------------------------------------------- recipes: flags, and changes of train_model.py


class HeadWithLine(tm.Head):
    """The head with a linear path from the features to the output beside it."""

    def __init__(self, width, metadata_width, dropout):
        super().__init__(width, metadata_width, dropout)
        self.line = torch.nn.Linear(width, 1)

    def forward(self, features, metadata):
        return super().forward(features, metadata) + self.line(features).squeeze(1)


def keep_mean_and_maximum(backbone, module, inputs, output):
    backbone.averages += [output.mean((2, 3)), output.amax((2, 3))]


def scale_each_by_its_own(model, found):
    model.feature_mean.copy_(found.mean(0))
    model.feature_scale.copy_(found.std(0).clamp(min=1e-6))


RECIPES = {
    "recommended": ("", {}),
    "224 px": ("--image_size 224", {}),
    "256 px": ("--image_size 256", {}),
    "288 px": ("--image_size 288", {}),
    "320 px": ("--image_size 320", {}),
    "without traits": ("--features last stages", {}),
    "without stages": ("--features last traits", {}),
    "traits' weight 3": ("", {"TRAITS_WEIGHT": 3}),
    "traits' weight 6": ("", {"TRAITS_WEIGHT": 6}),
    "traits' weight 12": ("", {"TRAITS_WEIGHT": 12}),
    "target as it is": ("--target_transform none", {}),
    "target standardized": ("--target_transform standardize", {}),
    "target's root": ("--target_transform sqrt", {}),
    "target's logarithm": ("--target_transform log", {}),
    "weight decay 0.01": ("--weight_decay 0.01", {}),
    "weight decay 1": ("--weight_decay 1", {}),
    "weight decay 3": ("--weight_decay 3", {}),
    "weight decay 10": ("--weight_decay 10", {}),
    "20 epochs": ("--epochs 20", {}),
    "40 epochs": ("--epochs 40", {}),
    "100 epochs": ("--epochs 100", {}),
    "no least steps": ("--least_steps 0", {}),
    "constant learning rate": ("--lr_schedule constant", {}),
    "huber loss": ("--loss huber", {}),
    "head of 128": ("", {"HEAD_WIDTH": 128}),
    "head of 256": ("", {"HEAD_WIDTH": 256}),
    "head of 512": ("", {"HEAD_WIDTH": 512}),
    "head with a linear path": ("", {"Head": HeadWithLine}),
    "no dropout": ("--dropout 0", {}),
    "dropout 0.3": ("--dropout 0.3", {}),
    "no augmentation": ("--augmentation none", {}),
    "study's augmentation, 2 views": ("--augmentation study --augment_views 2", {}),
    "study's augmentation, 4 views": ("--augmentation study --augment_views 4", {}),
    "symmetries": ("--augmentation symmetries", {}),
    "stages' mean and maximum": ("", {"Backbone.keep_average": keep_mean_and_maximum}),
    "each feature by its own deviation": ("", {"BiomassModel.fit_features": scale_each_by_its_own}),
}


def is_another(name):
    """Whether a recipe is the recommended one itself, or differs from it."""
    flags, changes = RECIPES[name]
    parse, parser = tm.parse_arguments, cross_validate.build_parser()
    differs = parse(parser, [*RECOMMENDED, *flags.split()]) != parse(parser, RECOMMENDED)
    return name == "recommended" or differs or any(vars(tm).get(what) != value for what, value in changes.items())


def judge_recipe(name, data, seeds):
    """RMSE by seed: the folds are those of SEED, `seeds` those of the training."""
    flags, changes = RECIPES[name]
    with contextlib.ExitStack() as changed, tempfile.TemporaryDirectory() as out:
        for what, value in changes.items():
            changed.enter_context(mock.patch(f"train_model.{what}", value))
        run, args = load([*RECOMMENDED, "--seed", SEED, "--no_erasing", *flags.split(), *data], out)
        splits = cross_validate.folds_by_plant(run.labels, args).items()
        for seed in seeds:
            args.seed = seed
            judged = {fold: cross_validate.judge_fold(run, args, split, fold) for fold, split in splits}
            found = score(run, args, splits, lambda fold, split, judged=judged: judged[fold]["predicted"])
            yield seed, found["val_rmse"]


# ---------------------------------------------------------------- yardsticks


def on_root(model):
    """A model of the target's root, as the recommended recipe is one."""
    return TransformedTargetRegressor(model, func=np.sqrt, inverse_func=square, check_inverse=False)


def square(root):
    return np.clip(root, 0, None) ** 2


def ridge(groups):
    """A ridge whose penalty is chosen by folds of the groups that it learns from."""
    inner = list(GroupKFold(4).split(groups, groups=groups))
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13), cv=inner))


def ridge_on_features(groups):
    return make_pipeline(StandardScaler(with_std=False), ridge(groups)[-1])


def gaussian_process(groups):
    kernel = ConstantKernel() * RBF(50, (1, 1e4)) + WhiteKernel(0.1, (1e-8, 10))
    return make_pipeline(StandardScaler(with_std=False), GaussianProcessRegressor(kernel, normalize_y=True))


def forest(groups):
    return RandomForestRegressor(500, max_features=1 / 3, n_jobs=-1, random_state=SEED)


YARDSTICKS = {  # what they see, and what they are, made for the groups to learn from
    "ridge on features": ("features", ridge_on_features),
    "Gaussian process on features": ("features", gaussian_process),
    "ridge on traits": ("traits", ridge),
    "forest on traits": ("traits", forest),
}


def features_of(run):
    """Features of all photos (n, width), the mean over the versions, with one common deviation."""
    found = torch.cat([inputs.mean(1) for inputs, *_ in run.batches.judge(np.arange(len(run.labels)))]).numpy()
    return found / (found - found.mean(0)).std()


def traits_of(run):
    """Traits of all photos with the logarithms of the sizes (n, k); NaN are colours where there is no plant."""
    measured = run.batches.measured(np.arange(len(run.labels)))[:, : len(plant.TRAITS)]
    return tm.trait_inputs(torch.from_numpy(measured)).numpy()


def judge_yardsticks(names, data):
    """Name and RMSE of other models on the recommended recipe's folds."""
    with tempfile.TemporaryDirectory() as out:
        run, args = load([*RECOMMENDED, "--seed", SEED, "--no_erasing", *data], out)
    inputs = {"features": features_of(run), "traits": traits_of(run)}
    groups, targets = run.labels["_plant"].to_numpy(), run.labels[args.target].to_numpy()
    splits = cross_validate.folds_by_plant(run.labels, args).items()
    for name in names:
        what, make = YARDSTICKS[name]

        def predict_fold(fold, split, found=inputs[what], make=make):
            learn, held_out = split
            imputer = SimpleImputer(strategy="median", keep_empty_features=True)
            model = make_pipeline(imputer, on_root(make(groups[learn])))
            return model.fit(found[learn], targets[learn]).predict(found[held_out])

        yield name, score(run, args, splits, predict_fold)["val_rmse"]


# ---------------------------------------------------------------- the table


def read_table():
    return pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=COLUMNS)


def add_line(**line):
    """Append to the table at once, so that a run that is stopped goes on from here."""
    lines = pd.DataFrame([line], columns=COLUMNS)
    lines.to_csv(TABLE, mode="a", header=not TABLE.is_file(), index=False, float_format="%.6g")
    print("{set:12s} {recipe:35s} seed {seed}  RMSE {rmse:.4f}".format(**line), flush=True)


def judge_set(name, data, seeds_of):
    """Compute the lines of a set that are wanted, {recipe: seeds}, and not there yet."""
    table, commit = read_table().query("set == @name"), tm.git("rev-parse", "HEAD")
    done = set(zip(table["recipe"], table["seed"], strict=True))
    lacking = {recipe: [seed for seed in seeds if (recipe, seed) not in done] for recipe, seeds in seeds_of.items()}
    for recipe in [recipe for recipe, seeds in lacking.items() if seeds and recipe in RECIPES]:
        for seed, rmse in judge_recipe(recipe, data, lacking[recipe]):
            add_line(set=name, recipe=recipe, seed=seed, rmse=rmse, commit=commit)
    yardsticks = [recipe for recipe, seeds in lacking.items() if seeds and recipe in YARDSTICKS]
    for yardstick, rmse in judge_yardsticks(yardsticks, data) if yardsticks else ():
        add_line(set=name, recipe=yardstick, seed=SEED, rmse=rmse, commit=commit)


def compare(table):
    """The table with best and ratio, and for each recipe the mean of its ratios over the sets."""
    means = table.groupby(["set", "recipe"])["rmse"].mean().unstack()
    best = means[means.columns.intersection(list(RECIPES))].min(axis=1)
    table = table.assign(best=table["set"].map(best))
    ratios = means.div(best, axis=0).T.assign(mean=lambda ratios: ratios.mean(axis=1)).sort_values("mean")
    return table.assign(ratio=table["rmse"] / table["best"]).sort_values(["set", "recipe", "seed"]), ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_set_flags(parser)
    parser.add_argument("--only", nargs="+", help="parts of the names of recipes, which then run with one seed")
    parser.add_argument("--jobs", type=int, default=2, help="sets at once; each trains on one core")
    args = parser.parse_args()
    names = [name for name in [*RECIPES, *YARDSTICKS] if name in YARDSTICKS or is_another(name)]
    names = [name for name in names if not args.only or any(part in name for part in args.only)]
    sets = find_sets(args)

    def judge(seeds_of):
        with ProcessPoolExecutor(args.jobs) as pool:  # by sets, so that no two processes make the same features
            list(pool.map(judge_set, sets, sets.values(), [seeds_of] * len(sets)))
        return compare(read_table().query("set in @sets"))[1]

    ratios = judge({name: [SEED] for name in names})
    if not args.only:
        best = [name for name in ratios.index if name in RECIPES][:BEST]
        ratios = judge({name: [SEED, *MORE_SEEDS] for name in best})
    compare(read_table())[0].to_csv(TABLE, columns=COLUMNS, index=False, float_format="%.6g")
    print(ratios.to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()

"""Tell how good a recipe of train_model.py is on plants never seen: every photo is predicted once, by folds.

    python cross_validate.py                                                  the study's recipe, five folds by plant
    python cross_validate.py --data_dir sample_data --model_name tf_efficientnet_lite0
    python cross_validate.py --group_by experiment_id --folds 9               how good in an experiment never seen?
    python cross_validate.py --resume                                         go on with the folds that are left

Takes the flags of train_model.py and --folds. Writes the same files, pooled over all held-out rows, into
results/cross_validation/, and models/biomass_cross_validated.pt: a model trained on all rows that also knows, from the
held-out ones, how far its predictions may be off and which photos are unlike those that it was trained on.
"""

import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import train_model as tm

COMPONENTS = 32  # of the training features; what lies outside them counts too
FAMILIAR_SHARE = 0.99  # of held-out photos that count as like the training photos

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- folds


def folds_by_plant(labels, args):
    """Pairs of row numbers for training and validation: shuffled GroupKFold, so each plant is validated once."""
    from sklearn.model_selection import GroupKFold

    plants = labels["_plant"].nunique()
    if plants < args.folds:
        raise tm.UserError(f"--folds {args.folds} needs as many {tm.group_name(args)}s, the data have {plants}")
    folds = GroupKFold(n_splits=args.folds, shuffle=True, random_state=args.seed)
    splits = list(folds.split(labels, groups=labels["_plant"]))
    names = [f"fold {number}/{args.folds}  " for number in range(1, args.folds + 1)]
    return {name: tm.check_split(labels, split, args, name) for name, split in zip(names, splits, strict=True)}


def keep_aside(labels, rows, args):
    """Two parts of `rows`, by plant: to learn from, and with --patience to choose the epoch on."""
    if not args.patience:
        return rows, rows[:0]
    learn, watch = tm.split_by_plant(labels.iloc[rows], args)
    return rows[learn], rows[watch]


def judge_fold(this, split, args, batches, name):
    """Train on a fold's training rows and predict those that it holds out, which chose nothing."""
    learn, watch = keep_aside(this.labels, split[0], args)
    model = tm.new_model(this.labels, this.dataset, this.backbone, batches, learn, args, this.accelerator)
    shown = (learn, watch) if args.patience else split
    outcome = tm.fit(
        model, this.dataset, batches, shown, args, this.accelerator, this.progress, name, bool(args.patience)
    )
    predictions = tm.evaluate(model, batches(split[1], tm.PLAIN), this.accelerator)[1]
    familiar = describe_features(tm.features_of(model, batches, learn, this.accelerator))
    distances = unlikeness(familiar, tm.features_of(model, batches, split[1], this.accelerator))
    outcome = {"history": outcome["history"], "epoch": outcome["epoch"], "predictions": predictions}
    return outcome | {"distances": torch.from_numpy(distances)}


# ---------------------------------------------------------------- what held-out photos teach of new ones


def calibrate(table, labels, args):
    """What train_model.interval needs, in plain values, from out-of-fold errors.

    The size of the errors is taken to grow with the prediction as a + b * |predicted|; a and b, neither below 0, are
    fitted by least squares. Errors in that unit are kept with a weight: all plants count alike, so that one with
    forty photos does not speak for the others.
    """
    from sklearn.linear_model import LinearRegression

    predicted, errors = table["predicted"].to_numpy(float), table["error"].to_numpy(float)
    terms = np.column_stack([np.ones(len(predicted)), np.abs(predicted)])
    line = LinearRegression(positive=True, fit_intercept=False).fit(terms, np.abs(errors))
    growth = [*map(float, line.coef_), float(np.abs(errors).mean() / 20)]
    size = error_size(growth, predicted)
    _, plant, photos = np.unique(table["_plant"], return_inverse=True, return_counts=True)
    order = np.argsort(-errors / size)
    return {
        "growth": growth,
        "scores": (-errors / size)[order].tolist(),
        "weights": (1 / photos[plant] / (len(photos) + 1))[order].tolist(),
        "groups": len(photos),
        "grouped_by": tm.group_name(args),
        "floor": 0.0 if (labels[args.target] >= 0).all() else -math.inf,
    }


def describe_features(features):
    """The training photos' features (n, width) as a probabilistic PCA, in plain arrays for train_model.unlikeness."""
    from sklearn.decomposition import PCA

    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    scale = float((features - mean).std()) or 1.0  # one for all, see BiomassModel.fit_features
    components = max(min(COMPONENTS, *features.shape) - 1, 1)
    pca = PCA(components, svd_solver="randomized", random_state=0).fit((features - mean) / scale)
    rest = max(float(pca.noise_variance_), 1e-9)
    described = {"mean": mean, "scale": scale, "components": pca.components_}
    return described | {"variance": pca.explained_variance_.clip(rest), "rest": rest}


def train_on_all(this, args, batches, table, results):
    """Train the model that is saved on all rows, and give it what the folds taught."""
    learn, watch = keep_aside(this.labels, np.arange(len(this.labels)), args)
    model = tm.new_model(this.labels, this.dataset, this.backbone, batches, learn, args, this.accelerator)
    name = "final model  "
    outcome = tm.fit(model, this.dataset, batches, (learn, watch), args, this.accelerator, this.progress, name)
    familiar = describe_features(tm.features_of(model, batches, learn, this.accelerator))
    held_out = np.concatenate([result["distances"].numpy() for result in results])
    familiar["limit"] = float(np.quantile(held_out, FAMILIAR_SHARE))
    if this.accelerator.is_main_process:
        familiar = {name: torch.as_tensor(value) for name, value in familiar.items()}
        tm.save_checkpoint(model, args, outcome["epoch"], calibrate(table, this.labels, args), familiar)
    return outcome


def interval(calibration, predicted, coverage):
    """Lower and upper ends, like `predicted`, between which a share `coverage` of the photos of new plants lies.

    Split-conformal prediction with errors scaled by their expected size (Lei et al. 2018, Journal of the American
    Statistical Association 113, 1094-1111), with out-of-fold errors and a quantile for each side. A new plant
    counts as one more with an infinite error (Dunn, Wasserman and Ramdas 2023, same journal 118, 2491-2502): few
    plants give wide intervals, in the end infinite ones.
    """
    predicted = np.asarray(predicted, float)
    size = error_size(calibration["growth"], predicted)
    scores, weights = np.array(calibration["scores"]), np.array(calibration["weights"])  # of measured - predicted

    def quantile(scores, weights):
        place = np.searchsorted(np.cumsum(weights), (1 + coverage) / 2 - 1e-9)
        return scores[place] if place < len(scores) else np.inf

    low = predicted - size * quantile(-scores[::-1], weights[::-1])
    high = predicted + size * quantile(scores, weights)
    return np.maximum(low, calibration["floor"]), np.maximum(high, calibration["floor"])


def error_size(growth, predicted):
    intercept, slope, least = growth
    return np.maximum(intercept + slope * np.abs(predicted), max(least, 1e-12))


def unlikeness(familiar, features):
    """How far features (n, width) are from the training photos': the squared distance under a probabilistic PCA.

    Tipping and Bishop 1999, Journal of the Royal Statistical Society B 61, 611-622.
    """
    centred = (np.asarray(features, np.float64) - familiar["mean"]) / familiar["scale"]
    along = centred @ familiar["components"].T
    outside = (centred**2).sum(1) - (along**2).sum(1)
    return (along**2 / familiar["variance"]).sum(1) + outside / familiar["rest"]


# ---------------------------------------------------------------- the run


def build_parser():
    parser = tm.build_parser(
        "cross_validate.py", __doc__, "results/cross_validation", "models/biomass_cross_validated.pt"
    )
    parser.add_argument_group("cross-validation").add_argument(
        "--folds", type=tm.number(int, 2), default=5, help="parts of the plants, each held out once"
    )
    return parser


def summarize(table, results, final, splits, labels, args):
    """What metrics.txt says of all held-out rows together, and of each fold."""
    how = "training plants kept aside" if args.patience else "none"
    metrics = tm.summarize(table, final["epoch"], how, [], args)
    metrics |= {"val_rows": len(table), "val_plants": int(table["_plant"].nunique())}
    each = [{"fold": fold, **tm.scores(rows)} for fold, rows in table.groupby("fold")]
    each = [scores | tm.count_sides(labels, split) for scores, split in zip(each, splits.values(), strict=True)]
    rmse = [fold["val_rmse"] for fold in each]
    spread = {"val_rmse_mean": float(np.mean(rmse)), "val_rmse_sd": float(np.std(rmse, ddof=1))}
    return metrics | {"folds": spread | {"each": each}}


def cross_validate(argv, started):
    """The whole run, from the flags to the report; returns the exit status."""
    begun = time.perf_counter()
    args = build_parser().parse_args(argv)
    this = tm.prepare("cross_validate.py", argv, args, started)
    splits = folds_by_plant(this.labels, args)
    tm.open_log(args.log_path, append=bool(this.progress["results"] or this.progress["state"]))
    tm.log_run(this.run)
    rows = np.arange(len(this.labels))
    batches = tm.make_batches(this.dataset, this.backbone, tm.versions_wanted(rows, rows, args), args, this.accelerator)
    done = this.progress["results"]
    for name, split in splits.items():
        if name in done:
            logger.info(f"{name}was done before")
        else:
            done[name] = judge_fold(this, split, args, batches, name)
            tm.write_progress(this.progress, args)
    results = [done[name] for name in splits]
    tables = enumerate(zip(splits.values(), results, strict=True), start=1)
    table = pd.concat(
        tm.predicted_rows(this.labels, split, result["predictions"], args, fold) for fold, (split, result) in tables
    )
    final = train_on_all(this, args, batches, table, results)
    if not this.accelerator.is_main_process:
        return 0
    history = [{"fold": fold, **row} for fold, result in enumerate(results, 1) for row in result["history"]]
    history += [{"fold": 0, **row} for row in final["history"]]
    metrics = summarize(table, results, final, splits, this.labels, args)
    tm.finish(table, history, metrics, this.run, begun, args)
    Path(f"{args.model_out}.progress").unlink(missing_ok=True)
    return 0


def main(argv=None):
    return tm.run_script("cross_validate.py", cross_validate, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Run a recipe of cross_validate.py many times in one process: the scripts beside this one share it."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cross_validate  # noqa: E402
import train_model as tm  # noqa: E402
from biomass import writing  # noqa: E402

STUDY = ["--model_name", "tf_efficientnet_lite0"]
RECOMMENDED = [*STUDY, "--features", "stages", "--standardize_features", "--target_transform", "sqrt"]
RECOMMENDED += ["--lr_schedule", "cosine", "--epochs", "40", "--weight_decay", "1"]


def load(flags, data_dir, out, rows=None):
    """A run that is prepared as by cross_validate.py, and its arguments; `rows` photos at the most."""
    places = ["--results_dir", out, "--model_out", Path(out) / "model.pt", "--log_path", Path(out) / "log"]
    flags = [*map(str, ["--data_dir", data_dir, *places, *flags])]
    args = cross_validate.build_parser().parse_args(flags)
    with contextlib.ExitStack() as started:
        run = tm.prepare("", flags, args, started)
    if rows:
        kept = np.sort(np.random.default_rng(0).permutation(len(run.labels))[:rows])
        run.labels = run.labels.iloc[kept].reset_index(drop=True)
        run.dataset = tm.BiomassDataset(run.labels, args, run.backbone, run.dataset.augmentation)
        run.batches.dataset = run.dataset
    everything = np.arange(len(run.labels))
    edits = {} if args.no_erasing else dict.fromkeys(cross_validate.ERASED.values(), everything)
    run.batches.collect(everything, everything, edits)
    return run, args


def train(run, args, rows):
    """A model that has learned from `rows` for all epochs."""
    model = tm.new_model(run.batches, run.backbone, rows)
    tm.fit(model, run.batches, (rows, rows[:0]), run.progress, "", args.epochs)
    return model


def predict(run, args, model, split, fold=1):
    predictions, _ = tm.evaluate(model, run.batches.judge(split[1]), run.batches)
    return writing.prediction_table(run.labels, split, predictions, args, fold)


def by_folds(run, args, seed):
    """All rows with their out-of-fold predictions: the folds are those of --seed, `seed` is that of the training."""
    splits = cross_validate.folds_by_plant(run.labels, args)
    args.seed, kept = seed, args.seed
    tables = []
    for fold, split in enumerate(splits.values(), start=1):
        tables.append(predict(run, args, train(run, args, split[0]), split, fold))
    args.seed = kept
    return pd.concat(tables)

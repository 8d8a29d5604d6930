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

STUDY = ["--model_name", "tf_efficientnet_lite0"]
RECOMMENDED = [*STUDY, "--features", "stages", "--standardize_features", "--target_transform", "sqrt"]
RECOMMENDED += ["--lr_schedule", "cosine", "--epochs", "40", "--weight_decay", "1"]


def load(flags, data_dir, out, rows=None):
    """A run that is prepared as by cross_validate.py, its arguments, and its batches; `rows` photos at the most."""
    places = ["--results_dir", out, "--model_out", Path(out) / "model.pt", "--log_path", Path(out) / "log"]
    flags = [*map(str, ["--data_dir", data_dir, *places, *flags])]
    args = cross_validate.build_parser().parse_args(flags)
    with contextlib.ExitStack() as started:
        this = tm.prepare("", flags, args, started)
    if rows:
        kept = np.sort(np.random.default_rng(0).permutation(len(this.labels))[:rows])
        this.labels = this.labels.iloc[kept].reset_index(drop=True)
        this.dataset = tm.BiomassDataset(this.labels, args, this.backbone.size, this.backbone.interpolation)
    this.dataset.edits = {} if args.no_erasing else cross_validate.ERASERS
    all_rows = np.arange(len(this.labels))
    wanted = tm.versions_wanted(all_rows, all_rows, args) | {view: all_rows for view in this.dataset.edits}
    return this, args, tm.make_batches(this.dataset, this.backbone, wanted, args, this.accelerator)


def train(this, args, batches, rows):
    """A model that has learned from `rows` for all epochs."""
    model = tm.new_model(this.labels, this.dataset, this.backbone, batches, rows, args, this.accelerator)
    tm.fit(model, this.dataset, batches, (rows, rows[:0]), args, this.accelerator, dict(this.progress), "", False)
    return model


def predict(this, args, batches, model, split, fold=1):
    predictions = tm.evaluate(model, batches(split[1], tm.PLAIN), this.accelerator)[1]
    return tm.predicted_rows(this.labels, split, predictions, args, fold)


def by_folds(this, args, batches, seed):
    """All rows with their out-of-fold predictions: the folds are those of --seed, `seed` is that of the training."""
    splits = cross_validate.folds_by_plant(this.labels, args)
    args.seed, kept = seed, args.seed
    tables = []
    for fold, split in enumerate(splits.values(), start=1):
        tables.append(predict(this, args, batches, train(this, args, batches, split[0]), split, fold))
    args.seed = kept
    return pd.concat(tables)

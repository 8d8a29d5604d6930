"""Columns of the sheet as input beside the photo: which ones are fair, and how they become numbers."""

import logging

import numpy as np
import pandas as pd

from inputs import to_numbers

# Measured at the harvest that gives the target, so they are not known of a plant that is still to be weighed
HARVEST_COLUMNS = ("fresh_weight_shoot", "fresh_weight_root", "dry_weight_shoot", "shoot_root_ratio_fresh")
TELLS_THE_ANSWER = 0.95  # correlation with the target, plain or of ranks, from which on a column is taken for it
MOST_CATEGORIES = 50  # a text column with more is a name or a remark

logger = logging.getLogger("train_model")


def leaks(name, cells, target_name, target):
    """Why a column gives the target away ("" if it does not): by its name, or because the two nearly agree."""
    if name == target_name:
        return "it is the target"
    if name in HARVEST_COLUMNS or "weight" in name.lower():
        return f"it is measured at the harvest, like {target_name}"
    numbers = to_numbers(cells)
    if not is_numeric(cells):  # what the mean of its category tells of the target, if categories are large enough
        text = as_text(cells)
        numbers = target.groupby(text).transform("mean").where(text.map(text.value_counts()) >= 10)
    both = pd.DataFrame({"cells": numbers, "target": target}).dropna()
    if len(both) >= 10 and both["cells"].nunique() > 1 and both["target"].nunique() > 1:
        r = max(abs(table["cells"].corr(table["target"])) for table in (both, both.rank()))
        if r > TELLS_THE_ANSWER:
            return f"its correlation with {target_name} is {r:.3f}"
    return ""


def is_numeric(cells):
    """Whether a column is one of numbers: most cells that hold something hold a number."""
    return to_numbers(cells).count() >= cells.count() / 2


class MetadataEncoder:
    """Numbers for columns of a sheet, by what was learned from the training rows alone.

    Of a numeric column: the median where it is missing, scaled to mean 0 and standard deviation 1, and, if training
    rows lack it, a column that tells where it was missing. Of a text column: one column of 0 and 1 for each value; an
    unknown or missing value is 0 everywhere. `plan` is the list of what is done to each column, in plain values: a
    checkpoint holds it.
    """

    def __init__(self, plan=()):
        self.plan = list(plan)

    @classmethod
    def fit(cls, rows, columns):
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        plan = []
        for name in columns:
            cells = rows[name]
            if is_numeric(cells):
                numbers = to_numbers(cells).to_numpy()[:, None]
                imputer = SimpleImputer(strategy="median", keep_empty_features=True).fit(numbers)
                scaler = StandardScaler().fit(imputer.transform(numbers))
                values = zip(
                    ("median", "mean", "scale"), (imputer.statistics_, scaler.mean_, scaler.scale_), strict=True
                )
                step = {what: float(np.nan_to_num(value[0])) for what, value in values}
                plan.append({"column": name, **step, "indicator": bool(np.isnan(numbers).any())})
            else:
                known = as_text(cells).dropna().to_numpy(object)[:, None]
                plan.append({"column": name, "categories": OneHotEncoder().fit(known).categories_[0].tolist()})
        return cls(plan)

    @property
    def width(self):
        return sum(len(step["categories"]) if "categories" in step else 1 + step["indicator"] for step in self.plan)

    def encode(self, rows):
        """float32 (len(rows), width), in the order of `plan`, whatever the order of the sheet's columns."""
        parts = [np.empty((len(rows), 0))]
        for step in self.plan:
            cells = rows[step["column"]]
            if "categories" in step:
                parts.append(as_text(cells).to_numpy(object, na_value=None)[:, None] == np.array(step["categories"]))
            else:
                numbers = to_numbers(cells).to_numpy()
                missing = np.isnan(numbers)
                numbers = np.where(missing, step["median"], numbers)
                parts.append(((numbers - step["mean"]) / step["scale"])[:, None])
                if step["indicator"]:
                    parts.append(missing[:, None])
        return np.concatenate(parts, axis=1).astype(np.float32)

    def unknown(self, rows):
        """Names of the columns that each row lacks, or whose value no training row had; "" for a complete row."""
        names = pd.Series("", index=rows.index)
        for step in self.plan:
            cells = rows[step["column"]]
            lacking = ~as_text(cells).isin(step["categories"]) if "categories" in step else to_numbers(cells).isna()
            names = names.mask(lacking, names + " " + step["column"])
        return names.str.strip()


def as_text(cells):
    return cells.astype("string").str.strip()

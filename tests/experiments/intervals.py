"""Which 95 % interval of RMSE and r holds for few groups? A simulation on the errors of a documented run.

    python tests/experiments/intervals.py --trials 1000                                 some minutes on two cores

Groups (plants) are drawn from those of results/cross_validation/predictions.csv, which stand for all plants there are:
their RMSE and r are the truth. Printed: how often each method's interval holds it, and its median width.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
ENDS, DRAWS = np.array([0.025, 0.975]), 1000


def log_mse(sums):
    """Half the logarithm of the mean squared error: of the RMSE, whose intervals are more even on this scale."""
    return np.log(sums[..., 1] / sums[..., 0]) / 2


def fisher_z(sums):
    n, _, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    below = np.sqrt((n * xx - x**2) * (n * yy - y**2))
    return np.arctanh(np.clip((n * xy - x * y) / below, -1 + 1e-12, 1 - 1e-12))


def without_each(groups):
    return groups.sum(-2, keepdims=True) - groups


def jackknife_error(statistic, groups):
    left = statistic(without_each(groups))
    count = groups.shape[-2]
    return np.sqrt((count - 1) / count * ((left - left.mean(-1, keepdims=True)) ** 2).sum(-1))


def bootstrap(statistic, groups, random):
    drawn = groups[random.integers(0, len(groups), (DRAWS, len(groups)))]
    return np.quantile(statistic(drawn.sum(1)), ENDS)


def bca(statistic, groups, random):
    """Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 14."""
    drawn = statistic(groups[random.integers(0, len(groups), (DRAWS, len(groups)))].sum(1))
    below = np.clip(np.mean(drawn < statistic(groups.sum(0))), 1 / DRAWS, 1 - 1 / DRAWS)
    left = statistic(without_each(groups))
    lean = ((left.mean() - left) ** 3).sum() / (6 * ((left.mean() - left) ** 2).sum() ** 1.5)
    bias, ends = stats.norm.ppf(below), stats.norm.ppf(ENDS)
    return np.quantile(drawn, stats.norm.cdf(bias + (bias + ends) / (1 - lean * (bias + ends))))


def jackknife_t(statistic, groups, random):
    reach = stats.t.ppf(ENDS, len(groups) - 1) * jackknife_error(statistic, groups)
    return statistic(groups.sum(0)) + reach


def bootstrap_t(statistic, groups, random):
    """The same book, chapter 12."""
    drawn = groups[random.integers(0, len(groups), (DRAWS, len(groups)))]
    middle, error = statistic(groups.sum(0)), jackknife_error(statistic, groups)
    with np.errstate(all="ignore"):
        t = (statistic(drawn.sum(1)) - middle) / jackknife_error(statistic, drawn)
    return middle - error * np.quantile(t[np.isfinite(t)], ENDS[::-1])


METHODS = {"bootstrap": bootstrap, "BCa": bca, "jackknife, t": jackknife_t, "bootstrap-t": bootstrap_t}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 5, 9, 20, 30, 60, 168])
    args = parser.parse_args()
    table = pd.read_csv(ROOT / "results" / "cross_validation" / "predictions.csv")
    x, y = table["predicted_g"], table["measured_g"]
    columns = {"n": 1.0, "square": (x - y) ** 2, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    plants = pd.DataFrame(columns).groupby(table["plant_number"]).sum().to_numpy()
    random = np.random.default_rng(0)
    for name, statistic, shown in (("RMSE", log_mse, np.exp), ("r", fisher_z, np.tanh)):
        truth = statistic(plants.sum(0))
        print(f"\n| {name}, groups | " + " | ".join(METHODS) + " |\n| --- |" + " --- |" * len(METHODS))
        for count in args.groups:
            found = {method: [] for method in METHODS}
            for _ in range(args.trials):
                groups = plants[random.integers(0, len(plants), count)]
                for method, interval in METHODS.items():
                    low, high = interval(statistic, groups, random)
                    found[method].append((low <= truth <= high, shown(high) - shown(low)))
            held = {method: np.mean([holds for holds, _ in tries]) for method, tries in found.items()}
            width = {method: np.median([width for _, width in tries]) for method, tries in found.items()}
            print(f"| {count} | " + " | ".join(f"{held[m]:.1%} ({width[m]:.3f})" for m in METHODS) + " |", flush=True)


if __name__ == "__main__":
    main()

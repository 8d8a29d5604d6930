"""What held-out photos teach about new ones: how far a prediction may be off, and which photos are unlike the rest."""

import numpy as np
import pandas as pd

COMPONENTS = 32  # of the training features; what lies outside them counts too
BOOTSTRAP_DRAWS = 2000
HELD_OUT_SHARE = 0.99  # of held-out photos that count as like the training photos


def rmse_interval(errors, plants, seed):
    """95 % interval of the RMSE by a percentile bootstrap over plants, None for fewer than two plants.

    Photos of one plant go together into each draw: their errors are alike, and rows drawn singly would make the
    interval too narrow (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 8).
    """
    squares = pd.Series(np.square(errors)).groupby(np.asarray(plants)).agg(["sum", "size"]).to_numpy()
    if len(squares) < 2:
        return None
    rng, count = np.random.default_rng(seed), len(squares)
    if count > 5000:  # one draw at a time, as all at once would fill the memory
        draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(BOOTSTRAP_DRAWS))
        sums = np.array([draw.astype(float) @ squares for draw in draws])
    else:
        sums = rng.multinomial(count, np.full(count, 1 / count), BOOTSTRAP_DRAWS) @ squares
    total, rows = sums.T
    return np.percentile(np.sqrt(total / rows), [2.5, 97.5]).tolist()


def calibrate(predicted, errors, plants, growing=True, floor=0.0):
    """What `interval` needs, in plain values, from out-of-fold predictions and errors (predicted - measured).

    The size of the errors is taken to grow with the prediction as a + b * |predicted|; a and b, neither below 0, are
    fitted by least squares, and it is at least a twentieth of the mean error. `floor` is the lowest possible target.
    With `growing` False it is taken to be the same for all. Errors in that unit are kept with
    a weight: all plants count alike, so that a plant with forty photos does not speak for the others.
    """
    from sklearn.linear_model import LinearRegression

    predicted, errors = np.asarray(predicted, float), np.asarray(errors, float)
    mean = np.abs(errors).mean()
    growth = [mean, 0.0, mean]
    if growing:
        terms = np.column_stack([np.ones(len(predicted)), np.abs(predicted)])
        line = LinearRegression(positive=True, fit_intercept=False).fit(terms, np.abs(errors))
        growth = [*line.coef_, mean / 20]
    size = error_size(growth, predicted)
    _, plant, photos = np.unique(np.asarray(plants), return_inverse=True, return_counts=True)
    order = np.argsort(-errors / size)
    return {
        "growth": [float(term) for term in growth],
        "scores": (-errors / size)[order].tolist(),  # measured - predicted
        "weights": (1 / photos[plant] / (len(photos) + 1))[order].tolist(),
        "plants": len(photos),
        "floor": float(floor),
    }


def error_size(growth, predicted):
    intercept, slope, least = growth
    return np.maximum(intercept + slope * np.abs(predicted), max(least, 1e-12))


def quantile(scores, weights, level):
    """The smallest of the sorted scores up to which the weights sum up to `level`, infinite if all do not."""
    place = np.searchsorted(np.cumsum(weights), level - 1e-9)
    return scores[place] if place < len(scores) else np.inf


def interval(calibration, predicted, coverage):
    """Lower and upper end, arrays like `predicted`, between which a share `coverage` of new plants' photos lies.

    Split-conformal prediction with errors scaled by their expected size (Lei et al. 2018, Journal of the American
    Statistical Association 113, 1094-1111), with out-of-fold errors in place of a split (Vovk 2015, Annals of
    Mathematics and Artificial Intelligence 74, 9-28) and a quantile of its own for each side. The new plant counts
    as one more plant with an infinite error (Dunn, Wasserman and Ramdas 2023, Journal of the American Statistical
    Association 118, 2491-2502), so few plants give wide intervals, in the end infinite ones. No end lies below the
    lowest possible target.
    """
    predicted, level = np.asarray(predicted, float), (1 + coverage) / 2
    size = error_size(calibration["growth"], predicted)
    scores, weights = np.array(calibration["scores"]), np.array(calibration["weights"])
    low = predicted - size * quantile(-scores[::-1], weights[::-1], level)
    high = predicted + size * quantile(scores, weights, level)
    return np.maximum(low, calibration["floor"]), np.maximum(high, calibration["floor"])


def describe_features(features):
    """The training photos' features (n, width) as a probabilistic PCA (Tipping and Bishop 1999), in plain arrays."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    components = max(min(COMPONENTS, *features.shape) - 1, 1)
    pca = PCA(components, svd_solver="randomized", random_state=0).fit(scaler.transform(features))
    return {
        "mean": scaler.mean_,
        "scale": scaler.scale_,
        "components": pca.components_,
        "variance": pca.explained_variance_,
        "rest": max(float(pca.noise_variance_), 1e-9),
    }


def limit_of(distances):
    """The distance beyond which a photo is called unlike the training photos, from those of held-out photos."""
    return {"limit": float(np.quantile(np.concatenate(distances), HELD_OUT_SHARE))}


def distances(description, features):
    """How unlike the training photos each row of `features` is: its squared distance under the PCA's Gaussian."""
    standardized = (features - description["mean"]) / description["scale"]
    along = standardized @ description["components"].T
    outside = (standardized**2).sum(axis=1) - (along**2).sum(axis=1)
    return (along**2 / description["variance"]).sum(axis=1) + outside / description["rest"]

"""Tell how good a recipe of train_model.py is on plants never seen: every photo is predicted once, by folds.

    python cross_validate.py                                                  the study's recipe, five folds by plant
    python cross_validate.py --data_dir sample_data --model_name tf_efficientnet_lite0
    python cross_validate.py --group_by experiment_id --folds 9               how good in an experiment never seen?
    python cross_validate.py --learning_curve                                 how many plants must be weighed?
    python cross_validate.py --resume                                         go on with the folds that are left

Takes the flags of train_model.py and --folds. Writes the same files, pooled over all held-out rows, into
results/cross_validation/, and models/biomass_cross_validated.pt: a model trained on all rows that also knows, from the
held-out ones, how far its predictions may be off and which photos are unlike those that it was trained on.
"""

import functools
import logging
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import train_model as tm
from biomass import features, plant, reading, writing
from biomass.reading import UserError

SHOWN = 12  # photos with a heat map
COMPONENTS = 31  # of the training features; what lies outside them counts too
FAMILIAR_SHARE = 0.99  # of held-out photos that count as like the training photos
SCENE_SHARE = 0.99  # of training photos whose lightness, colour and scale are told where a photo is unlike them
COVERAGE = 0.9  # of the intervals in predictions.csv, as predict.py gives them
MOST_ERASED = 500  # photos that are also predicted erased; so many tell r well enough
SHARES, DRAWS, FEWEST = (1 / 16, 1 / 8, 1 / 4, 1 / 2), 3, 10  # of the training plants on a learning curve; plants
LEAST_PLANT, MOST_PLANT = 0.0005, 0.7  # of the frame, in the median photo, between which it can be the plant
ERASED = {"plant erased": plant.erase_plant, "background erased": plant.erase_background}
MOST_DESCRIBED = 5000  # photos that tell what is familiar; more would cost memory

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- folds


def folds_by_plant(labels, args):
    """Row numbers for training and validation by fold's name: shuffled GroupKFold, each plant is validated once."""
    from sklearn.model_selection import GroupKFold

    plants = labels["_plant"].nunique()
    if plants < args.folds:
        named = reading.group_name(args.group_by)
        raise UserError(f"--folds {args.folds} needs as many {named}s, the data have {plants}")
    folds = GroupKFold(n_splits=args.folds, shuffle=True, random_state=args.seed)
    splits = list(folds.split(labels, groups=labels["_plant"]))
    names = [f"fold {number}/{args.folds}  " for number in range(1, args.folds + 1)]
    return {name: tm.check_split(labels, split, args, name) for name, split in zip(names, splits, strict=True)}


def judge_fold(run, args, split, name):
    """Train on a fold's training rows and predict those that it holds out, which choose nothing.

    With --patience the epoch is chosen on a part of the training plants that is kept aside.
    """
    batches, held_out = run.batches, split[1]
    model, learn, result = train_fold(run, args, split, name)
    erased = np.intersect1d(held_out, rows_to_erase(run, args))
    for what, edit in ERASED.items() if len(erased) else ():
        result[what] = tm.evaluate(model, batches.judge(erased, edit), batches)[0]
    familiar = describe_features(batches.features(model, learn))
    result["unlikeness"] = torch.from_numpy(writing.unlikeness(familiar, batches.features(model, held_out)))
    if not args.no_erasing and name.startswith("fold 1/"):
        by_weight = held_out[np.argsort(run.dataset.targets[held_out].numpy(), kind="stable")]
        rows = by_weight[np.unique(np.linspace(0, len(by_weight) - 1, SHOWN).astype(int))]
        photos, metadata = [run.dataset.open(row) for row in rows], run.dataset.metadata[rows]
        heats = plant.heat_maps(photos, lambda hidden, numbers: tm.weigh(model, batches, hidden, metadata[numbers]))
        result["heats"] = {"rows": torch.from_numpy(rows), "heats": torch.from_numpy(heats)}
    return result


def train_fold(run, args, split, name):
    """The model, the rows that it has learned from, and its history, epoch and predictions of the held-out rows."""
    batches, (learn, held_out) = run.batches, split
    watch, epochs = held_out, args.epochs
    if args.patience:
        labels = run.labels.iloc[learn]
        kept, aside = tm.check_split(labels, tm.split_by_plant(labels, args), args, name)
        learn, watch, epochs = learn[kept], learn[aside], None
    model = tm.new_model(batches, run.backbone, learn)
    outcome = tm.fit(model, batches, (learn, watch), run.progress, name, epochs)
    if "interrupted" in outcome:  # after fewer epochs than the others
        raise KeyboardInterrupt
    result = {"history": outcome["history"], "epoch": outcome["epoch"]}
    return model, learn, result | {"predicted": tm.evaluate(model, batches.judge(held_out), batches)[0]}


def train_on_all(run, args, table, results):
    """Train the model that is saved on all rows, and give it what the folds taught; with --patience how long, too."""
    rows, name = np.arange(len(run.labels)), "final model  "
    model = tm.new_model(run.batches, run.backbone, rows)
    epochs = round(np.median([result["epoch"] for result in results]))
    outcome = tm.fit(model, run.batches, (rows, rows[:0]), run.progress, name, epochs)
    familiar = describe_features(run.batches.features(model, rows))
    held_out = np.concatenate([result["unlikeness"].numpy() for result in results])
    familiar["limit"] = float(np.quantile(held_out, FAMILIAR_SHARE))
    scenes = run.batches.measured(some_rows(run, args))[:, [plant.MEASURED.index(name) for name in plant.SCENE]]
    familiar["scene"] = np.quantile(scenes, [(1 - SCENE_SHARE) / 2, (1 + SCENE_SHARE) / 2], axis=0)
    if run.accelerator.is_main_process:
        familiar = {name: torch.as_tensor(value) for name, value in familiar.items()}
        tm.save_checkpoint(model, args, outcome["epoch"], calibrate(table, run.labels, args), familiar)
    return outcome


# ---------------------------------------------------------------- what held-out photos teach of new ones


def calibrate(table, labels, args):
    """What writing.interval needs, in plain values, from out-of-fold errors.

    The size of the errors is taken to grow with the prediction as a + b * |predicted|; a and b, neither below 0, are
    fitted by least squares. Errors in that unit are kept with a weight: all plants count alike, so that one with
    forty photos does not speak for the others. `independent` is how many single errors they are worth together.
    """
    from sklearn.linear_model import LinearRegression

    predicted, errors = table["predicted"].to_numpy(float), table["error"].to_numpy(float)
    terms = np.column_stack([np.ones(len(predicted)), np.abs(predicted)])
    line = LinearRegression(positive=True, fit_intercept=False).fit(terms, np.abs(errors))
    growth = [*map(float, line.coef_), float(np.abs(errors).mean() / 20)]
    size = writing.error_size(growth, predicted)
    _, group, photos = np.unique(table["_plant"], return_inverse=True, return_counts=True)
    scores = -errors / size
    independent, order = count_independent(scores, group, photos), np.argsort(scores)
    return {
        "growth": growth,
        "scores": scores[order].tolist(),
        "weights": (1 / photos[group] / len(photos) * independent / (independent + 1))[order].tolist(),
        "groups": len(photos),
        "independent": independent,
        "grouped_by": reading.group_name(args.group_by),
        "floor": 0.0 if (labels[args.target] >= 0).all() else -math.inf,
    }


def count_independent(scores, group, photos):
    """How many independent errors the scores are worth: as many as there are plants, up to as many as photos.

    It hangs on how alike the errors of one plant's photos are (Kish 1965, Survey Sampling, chapter 5): on their
    intraclass correlation, by the analysis of variance (Donner 1986, International Statistical Review 54, 67-82).
    `group` (n,) numbers the plant of each score, `photos` counts those of each plant.
    """
    count, groups = len(scores), len(photos)
    if groups < 2 or groups == count:
        return float(groups)
    means = np.bincount(group, scores) / photos
    between = (photos * (means - scores.mean()) ** 2).sum() / (groups - 1)
    within = ((scores - means[group]) ** 2).sum() / (count - groups)
    typical = (count - (photos**2).sum() / count) / (groups - 1)
    spread = between + (typical - 1) * within
    alike = float(np.clip((between - within) / spread, 0, 1)) if spread > 0 else 1.0
    return groups / (alike + (1 - alike) * float((1 / photos).mean()))


def describe_features(found):
    """The training photos' features (n, width) as a probabilistic PCA, in plain arrays for writing.unlikeness.

    There are at most half as many components as photos, so that some variance remains outside them.
    """
    from sklearn.decomposition import PCA

    if len(found) > MOST_DESCRIBED:
        found = found[np.random.default_rng(0).permutation(len(found))[:MOST_DESCRIBED]]
    found = np.asarray(found, np.float64)
    mean = found.mean(0)
    scale = float((found - mean).std()) or 1.0  # one for all, see BiomassModel.fit_features
    scaled, (photos, width) = (found - mean) / scale, found.shape
    components = max(min(COMPONENTS, photos // 2, width - 1), 1)
    pca = PCA(components, svd_solver="randomized", random_state=0).fit(scaled)
    variance = pca.explained_variance_ * (photos - 1) / photos  # of all photos, as the total variance is
    rest = max(float((scaled**2).mean(0).sum() - variance.sum()) / max(width - components, 1), 1e-9)
    described = {"mean": mean, "scale": scale, "components": pca.components_}
    return described | {"variance": variance.clip(rest), "rest": rest}


# ---------------------------------------------------------------- does it look at the plant?


def some_rows(run, args):
    """At most MOST_ERASED rows, by chance: they are predicted with their plant erased, and all but their plant."""
    return np.sort(np.random.default_rng(args.seed).permutation(len(run.labels))[:MOST_ERASED])


def rows_to_erase(run, args):
    return some_rows(run, args)[: 0 if args.no_erasing else None]


def judge_erased(table, shares):
    """Correlation of predictions with measurements, of photos whole and erased, each with an interval; the verdict.

    `shares` of the frame are what shows plant in each photo of which the table holds predictions erased.
    """
    metrics = {"photos_erased": len(shares), "photos_without_plant": int((shares == 0).sum())}
    for name in ("predicted", *ERASED):
        rows = table.dropna(subset=name)
        key = "val_r" if name == "predicted" else f"val_r_{name.replace(' ', '_')}"
        metrics[key] = correlation(rows[name], rows["measured"])
        metrics[f"{key}_ci95"] = correlation_interval(rows[name], rows["measured"], rows["_plant"])
    metrics["looks_at"] = verdict(metrics, shares)
    logger.info(metrics["looks_at"])
    return metrics


def verdict(metrics, shares):
    """One sentence of three, by the share of the correlation that is left once the plant is erased.

    Where nothing says that what was erased is the plant, none of the three.
    """
    whole, erased, alone = (metrics[f"val_r{name}"] for name in ("", "_plant_erased", "_background_erased"))
    without, middle = (shares == 0).mean(), np.median(shares)
    if metrics["val_r_ci95"] and metrics["val_r_ci95"][0] <= 0:
        return f"no weight can be read from these photos: r {whole:.2f}"
    withheld = "whether the weight is read from the plants cannot be told: "
    if without > 1 - features.WITH_PLANT:
        return f"{withheld}{without:.0%} of the photos show no green that could be taken for a plant"
    if not LEAST_PLANT < middle < MOST_PLANT:
        return f"{withheld}what is green takes {middle:.2%} of the middle photo, so it is hardly the plant"
    share = max(erased, 0) / whole
    kinds = {1 / 3: "from the plants", 2 / 3: "partly from the background", math.inf: "mostly from the background"}
    kind = next(kind for limit, kind in kinds.items() if share <= limit)
    numbers = f"r {whole:.2f}, plants erased {erased:.2f}, all else erased {alone:.2f}"
    return f"the weight is read {kind}: {numbers}; {(shares == 0).sum():,} of {len(shares):,} photos show no plant"


def correlation(x, y):
    """Pearson's r, 0 where nothing varies."""
    return float(r_of_sums(products(x, y).sum(0)))


def correlation_interval(x, y, groups):
    """95 % interval of Pearson's r, by Fisher's z, over the groups that the rows belong to."""
    sums = pd.DataFrame(products(x, y)).groupby(np.asarray(groups)).sum().to_numpy()
    return writing.group_interval(lambda s: np.arctanh(np.clip(r_of_sums(s), -1 + 1e-9, 1 - 1e-9)), sums, np.tanh)


def products(x, y):
    x, y = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)  # r is the same, and more exact
    return np.column_stack([np.ones(len(x)), x, y, x * x, y * y, x * y])


def r_of_sums(sums):
    """Pearson's r from n and the sums of x, y, their squares and products (..., 6); 0 where nothing varies."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    below = np.sqrt(np.maximum((n * xx - x**2) * (n * yy - y**2), 0))
    return np.divide(n * xy - x * y, below, out=np.zeros_like(below), where=below > 0)


def draw_where_it_looks(run, heats, table, args):
    predicted, unit, items = table["predicted"], reading.unit_of(args.target), []
    for row, heat in zip(heats["rows"].tolist(), heats["heats"].numpy(), strict=True):
        both = f"measured {run.dataset.targets[row]:.3f} {unit}\npredicted {predicted[row]:.3f} {unit}"
        items.append((run.dataset.open(row), heat, both))
    writing.draw_heat(items, args.results_dir / "where_it_looks.png", unit, args.labels_path)


# ---------------------------------------------------------------- how many plants must be weighed?


def parts_of_folds(labels, splits, args):
    """Splits by share of the training plants, draw and fold's name: the larger shares of a draw hold the smaller."""
    plants, parts = labels["_plant"].to_numpy(), {}
    least = min(len(np.unique(plants[learn])) for learn, _ in splits.values())
    for number, (name, (learn, held_out)) in enumerate(splits.items()):
        for draw in range(1, DRAWS + 1):
            order = np.random.default_rng([args.seed, number, draw]).permutation(np.unique(plants[learn]))
            for share in SHARES:
                drawn = learn[np.isin(plants[learn], order[: round(share * len(order))])]
                if round(share * least) >= FEWEST:
                    parts[share, draw, name] = drawn, held_out
    return parts


def learn_from_parts(run, args, splits, table):
    """Squared errors of the held-out rows by share and draw, and the plants that a model of the share learned from."""
    parts, done = parts_of_folds(run.labels, splits, args), run.progress.results
    squares = {(1.0, draw): table["error"] ** 2 for draw in range(1, DRAWS + 1)}
    plants = {1.0: np.mean([tm.plants_of(run.labels, learn) for learn, _ in splits.values()])}
    for (share, draw, name), split in tqdm(parts.items(), desc="learning curve", unit="model", disable=None):
        part = f"{name.strip()}, share {share:g}, draw {draw}  "
        if part not in done:
            logger.setLevel(logging.WARNING)  # of sixty models the epochs are not told
            try:
                run.progress.finish(part, train_fold(run, args, split, part)[2])
            finally:
                logger.setLevel(logging.INFO if run.accelerator.is_main_process else logging.ERROR)
        errors = pd.Series(done[part]["predicted"].numpy(), split[1]) - table["measured"].loc[split[1]]
        squares.setdefault((share, draw), pd.Series(np.nan, table.index)).update(errors**2)
        plants[share] = np.mean([tm.plants_of(run.labels, parts[key][0]) for key in parts if key[0] == share])
    return pd.DataFrame(squares).sort_index(axis=1), dict(sorted(plants.items()))


def power_law(plants, a, b, c):
    return a + b * plants**-c


def fit_power_law(plants, rmse):
    """a, b and c of the RMSE a + b n^-c after n plants, a and b not below 0, c from 0 to 1: least relative squares."""
    from scipy.optimize import least_squares

    scaled, last = plants / plants[-1], rmse[-1]
    bounds = [0, 0, 0], [np.inf, np.inf, 1]
    a, b, c = least_squares(lambda law: power_law(scaled, *law) / rmse - 1, [last / 2, last / 2, 0.5], bounds=bounds).x
    return a, b * plants[-1] ** c, c


def forecast(plants, rmse, wanted):
    return power_law(wanted, *fit_power_law(plants, rmse))


def green_area_rmse(run, splits, args):
    """RMSE of the law of green area on the same folds; None where it cannot be: photos without green, weights of 0."""
    areas = run.batches.measured(np.arange(len(run.labels)))[:, plant.MEASURED.index("share")].astype(float)
    grams = run.dataset.targets.numpy().astype(float)
    if (areas > 0).mean() < features.WITH_PLANT or (grams <= 0).any():
        return None
    laws = [(plant.fit_law(areas[learn], grams[learn])[1], rows) for learn, rows in splits.values()]
    return math.sqrt(np.concatenate([(law(areas[rows]) - grams[rows]) ** 2 for law, rows in laws]).mean())


def judge_curve(squares, plants, green, table, args):
    """The learning curve in numbers: its power law, what twice the plants would give, and a sentence on them.

    `squares` are those of the errors by row, and by share and draw. The interval holds the spread of the held-out
    plants, which judge all models and are jackknifed (writing.group_interval), and that of the draws.
    """
    from scipy.special import stdtrit

    sizes, groups = np.array([*plants.values()]), table["_plant"]
    sums = squares.T.groupby(level=0).mean().T.assign(rows=1.0).groupby(groups).sum().to_numpy()
    rmse = rmse_of(sums.sum(0))
    found = {"plants": sizes.tolist(), "rmse": rmse.tolist(), "green_area_rmse": green}
    if len(sizes) < 3:
        least = math.ceil(FEWEST / SHARES[-2] * args.folds / (args.folds - 1))
        few = f"{groups.nunique()} {reading.group_name(args.group_by)}s"
        return found | {"sentence": f"how the error falls with more plants cannot be told from {few}, it takes {least}"}

    def ln_of_twice(sums):
        return np.log(np.apply_along_axis(lambda rmse: forecast(sizes, rmse, 2 * sizes[-1]), -1, rmse_of(sums)))

    def ln_of_fall(sums):
        return np.diff(np.log(rmse_of(sums)[..., [0, -1]]))[..., 0]

    low, high = writing.group_interval(ln_of_twice, sums, float)
    draws = [ln_of_twice(np.append(part.sum(axis=1), len(groups))) for _, part in squares.T.groupby(level=1)]
    of_draws = stdtrit(DRAWS - 1, 0.975) * np.std(draws, ddof=1) / math.sqrt(DRAWS)
    middle, reach = ln_of_twice(sums.sum(0)), math.hypot((high - low) / 2, of_draws)
    found |= dict(zip("abc", map(float, fit_power_law(sizes, rmse)), strict=True))
    found |= {"twice": float(np.exp(middle)), "twice_ci95": np.exp([middle - reach, middle + reach]).tolist()}
    if len(sizes) > 3:
        halves = sizes <= sizes[-1] / 1.9
        found["all_from_half"] = float(forecast(sizes[halves], rmse[halves], sizes[-1]))
    falls = writing.group_interval(ln_of_fall, sums, np.exp)[1] < 1
    return found | {"sentence": tell_curve(found, falls, args)}


def rmse_of(sums):
    return np.sqrt(sums[..., :-1] / sums[..., -1:])


def tell_curve(found, falls, args):
    """What a learning curve means for who has to weigh the plants."""
    unit, named = f" {reading.unit_of(args.target)}".rstrip(), f"{reading.group_name(args.group_by)}s"
    (least, *_, most), (first, *_, last), green = found["plants"], found["rmse"], found["green_area_rmse"]
    if not falls:
        both = f"RMSE {first:.4g} after {least:.0f}, {last:.4g}{unit} after {most:.0f} {named}"
        return f"{both}: no fall can be told, nor what more {named} would give"
    low, high = found["twice_ci95"]
    text = f"RMSE {last:.4g}{unit} after {most:.0f} {named}; after twice as many about {found['twice']:.4g}{unit}"
    text += f" (95 % interval {low:.4g} to {high:.4g})"
    if green is None:
        return text
    text += f"; the green-area law ({green:.4g}{unit})"
    if last >= green:
        return f"{text} is better up to {most:.0f} {named}"
    if first <= green:
        return f"{text} is worse from {least:.0f} {named} on"
    if green > found["a"] and found["b"] > 0 and found["c"] > 0.01:
        crossing = ((green - found["a"]) / found["b"]) ** (-1 / found["c"])
    else:  # the law is flat, or does not come so low: between the sizes that were tried
        falling = np.minimum.accumulate(found["rmse"])
        crossing = np.exp(np.interp(-green, -falling, np.log(found["plants"])))
    return f"{text} is better below {crossing:.0f} {named}"


def draw_curve(squares, found, metrics, args):
    """RMSE against the plants weighed: each draw, their mean, the power law and what it promises, and baselines."""
    figure = writing.new_figure(args.labels_path, (5, 4.4))
    axis, unit = figure.subplots(), writing.in_brackets(reading.unit_of(args.target))
    sizes, draws = np.array(found["plants"]), np.sqrt(squares.mean())
    for draw, rmse in draws.groupby(level=1):
        axis.plot(sizes, rmse, "o", color="#0072B2", mfc="none", ms=6, label="a draw" if draw == 1 else None)
    axis.plot(sizes, found["rmse"], "o", color="#0072B2", ms=3, label=f"mean of {DRAWS} draws")
    if "a" in found:
        along = np.geomspace(sizes[0], 2 * sizes[-1])
        law = power_law(along, *(found[name] for name in "abc"))
        told = f"{found['a']:.3g} + {found['b']:.3g} n$^{{-{found['c']:.2f}}}$"
        axis.plot(along, law, color="#0072B2", linewidth=1, label=told)
        ends = np.abs(np.array(found["twice_ci95"])[:, None] - found["twice"])
        axis.errorbar(2 * sizes[-1], found["twice"], ends, fmt="ks", ms=3, capsize=4, label="forecast, 95 % interval")
    lines = {"training mean": ("baseline_mean_rmse", "#777777", "--")}
    lines |= {"green-area law": ("green_area_rmse", "#E69F00", "-."), "noise floor": ("noise_floor_rmse", "black", ":")}
    for label, (name, colour, style) in lines.items():
        if (level := (metrics | found).get(name)) is not None:
            axis.axhline(level, color=colour, linestyle=style, linewidth=1.2, label=label)
    named = writing.plain(reading.group_name(args.group_by))
    axis.set(xscale="log", ylim=(0, None), ylabel=f"RMSE of {writing.plain(args.target)}{unit}")
    axis.set_xlabel(f"{named}s weighed, n; each point by the same {len(squares):,} photos", fontsize=9)
    ticks = [*sizes, 2 * sizes[-1]] if "a" in found else sizes
    axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    axis.set_title(textwrap.fill(writing.plain(found["sentence"]), 70), fontsize=8)
    writing.save_figure(figure, args.results_dir / "learning_curve.png", dpi=200)


def report_curve(run, splits, table, args):
    """Train on parts of the plants; learning_curve.csv and .png, and what metrics.txt says of them."""
    squares, plants = learn_from_parts(run, args, splits, table)
    found = judge_curve(squares, plants, green_area_rmse(run, splits, args), table, args)
    rows = np.sqrt(squares.mean()).rename_axis(["share", "draw"]).rename("rmse").reset_index()
    rows = rows[(rows["share"] < 1) | (rows["draw"] == 1)]  # all of them are drawn in one way only
    if run.accelerator.is_main_process:
        with writing.whole_file(args.results_dir / "learning_curve.csv") as partial:
            rows.assign(plants=rows["share"].map(plants))[["plants", "draw", "rmse"]].to_csv(partial, index=False)
        draw_curve(squares, found, writing.metrics_of(table, None, "", [], args), args)
        logger.info(found["sentence"])
    return {"learning_curve": found}


# ---------------------------------------------------------------- within experiments


def judge_within(table, args):
    """Errors within each value of the --within column, as a pooled R2 can come from differences between them alone."""
    sheet = read_again(args, {args.within: ""}).drop_duplicates("filename").set_index("filename")
    if args.within not in sheet or sheet[args.within].isna().all():
        logger.info(f"not judged within {args.within}: the sheet has no such column, or it is empty")
        return {}
    values = table["filename"].map(reading.to_ids(sheet[args.within])).astype(object)
    groups = []
    for value in sorted(values.dropna().unique(), key=lambda value: (len(value), value)):
        rows = table[values == value]
        rmse, bias = writing.scores(rows)["val_rmse"], rows["error"].mean()
        groups.append({"value": value, "rows": len(rows), "rmse": rmse, "bias": bias})
        groups[-1]["r"] = correlation(rows["predicted"], rows["measured"])
        numbers = "RMSE {rmse:.4f}, bias {bias:.4f}, r {r:.3f}".format(**groups[-1])
        logger.info(f"{args.within} {value}: {len(rows):,} rows, {numbers}")
    around = table["measured"] - table["measured"].groupby(values).transform("mean")
    within = {"column": args.within, "groups": groups}
    errors, around = (table["error"][around.notna()] ** 2).sum(), (around**2).sum()
    return {"val_r2_within_groups": 1 - float(errors / around) if around else None, "within": within}


def plot_within(within, args, axis):
    """RMSE and bias within each group, with r beside it."""
    groups, column = pd.DataFrame(within["groups"]), writing.plain(within["column"])
    places = np.arange(len(groups))
    axis.barh(places, groups["rmse"], color="tab:blue", alpha=0.5, label="RMSE")
    axis.plot(groups["bias"], places, "D", color="tab:red", label="bias")
    for place, rmse, r in zip(places, groups["rmse"], groups["r"], strict=True):
        axis.text(rmse, place, f" r {r:.2f}", va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(places, [f"{group['value']} (n = {group['rows']:,})" for group in within["groups"]])
    axis.set_xlim(right=groups["rmse"].max() * 1.2)
    unit = writing.in_brackets(reading.unit_of(args.target))
    axis.set(xlabel=f"error{unit}", ylabel=column, title=f"Within each {column}")
    axis.invert_yaxis()
    axis.legend()


# ---------------------------------------------------------------- the run


def build_parser():
    parser = tm.build_parser(
        "cross_validate.py", __doc__, "results/cross_validation", "models/biomass_cross_validated.pt"
    )
    add = parser.add_argument_group("cross-validation").add_argument
    add("--folds", type=writing.number(int, 2), default=5, help="parts of the plants, each held out once")
    add("--within", default="experiment_id", metavar="COLUMN", help="also judge within each value of this column")
    add("--time_column", metavar="COLUMN", help="kept in predictions.csv (default: timestamp, else age_days)")
    add("--learning_curve", action="store_true", help="also train on 1/16 to 1/2 of the plants: how many are needed?")
    add("--no_erasing", action="store_true", help="do not ask whether it looks at the plant")
    return parser


def held_out_table(run, splits, results, args):
    """All held-out rows with their predictions, of the photos whole and erased."""
    tables = []
    for fold, (split, result) in enumerate(zip(splits.values(), results, strict=True), start=1):
        table = writing.prediction_table(run.labels, split, result["predicted"], args, fold)
        erased = np.intersect1d(split[1], rows_to_erase(run, args))
        for name in ERASED if len(erased) else ():
            table[name] = pd.Series(result[name].numpy(), erased)
        tables.append(table)
    return add_intervals(add_time(pd.concat(tables), args), run.labels, args)


def read_again(args, wanted):
    """The sheet with more columns; by those of the training too, so that the same one of a workbook is taken."""
    return reading.read_sheet(args.labels_path, wanted | reading.asked_columns(args), args, args.target)


def add_time(table, args):
    """`table` with the column of the sheet that says when each photo was taken, which growth.py asks for."""
    sheet = read_again(args, {args.time_column: "--time_column"} if args.time_column else {})
    name = args.time_column = reading.time_column(args.time_column, sheet)
    if name is None or name in table:
        return table
    times = sheet.drop_duplicates("filename").set_index("filename")[name]
    return table.assign(**{name: table["filename"].map(times)})


def add_intervals(table, labels, args):
    """`table` with the low and high of each prediction, by the errors of the other folds: no row judges itself."""
    parts = []
    for fold, rows in table.groupby("fold"):
        known = calibrate(table[table["fold"] != fold], labels, args)
        low, high = writing.interval(known, rows["predicted"], min(COVERAGE, writing.most_coverage(known)))
        parts.append(rows.assign(low=low, high=high))
    return pd.concat(parts)


def pool_metrics(run, table, splits, shares, args):
    """What metrics.txt says of all held-out rows together, of each fold, of erased photos and within groups."""
    how = "training plants kept aside" if args.patience else "none"
    metrics = writing.metrics_of(table, None, how, [], args)
    metrics |= {"val_rows": len(table), "val_plants": int(table["_plant"].nunique())}
    if len(shares):
        metrics |= judge_erased(table, shares)
    each = [{"fold": fold, **writing.scores(rows)} for fold, rows in table.groupby("fold")]
    each = [scores | tm.count_sides(run.labels, split) for scores, split in zip(each, splits.values(), strict=True)]
    rmse = [fold["val_rmse"] for fold in each]
    spread = {"val_rmse_mean": float(np.mean(rmse)), "val_rmse_sd": float(np.std(rmse, ddof=1))}
    return metrics | {"folds": spread | {"each": each}} | judge_within(table, args)


def set_older_apart(args):
    """Rename what an earlier run has left in the folder and this one does not write: it would be taken for its own."""
    left = [] if args.learning_curve else ["learning_curve.csv", "learning_curve.png"]
    left += ["where_it_looks.png"] if args.no_erasing else []
    for path in filter(Path.is_file, (args.results_dir / name for name in left)):
        older = path.with_suffix(f".older{path.suffix}")
        try:
            path.replace(older)
            logger.info(f"{path} of an earlier run is kept as {older.name}")
        except OSError:  # open in Excel
            logger.info(f"warning: {path} is of an earlier run")


def cross_validate(argv, started):
    """The whole run, from the flags to the report; returns the exit status."""
    args = tm.parse_arguments(build_parser(), argv)
    run = tm.prepare("cross_validate.py", argv, args, started, recipe=[judge_fold, train_on_all, tm.weigh])
    splits, rows, done = folds_by_plant(run.labels, args), np.arange(len(run.labels)), run.progress.results
    writing.open_log(args.log_path, append=bool(done or run.progress.states))
    tm.log_run(run.description)
    erased = rows_to_erase(run, args)
    run.batches.collect(rows, rows, dict.fromkeys(ERASED.values(), erased) if len(erased) else {})
    shares = run.batches.measured(erased)[:, plant.MEASURED.index("share")] if len(erased) else erased
    for name, split in splits.items():
        if name in done:
            logger.info(f"{name}was done before")
        else:
            run.progress.finish(name, judge_fold(run, args, split, name))
    results = [done[name] for name in splits]
    table = held_out_table(run, splits, results, args)
    curve = report_curve(run, splits, table, args) if args.learning_curve else {}
    final = train_on_all(run, args, table, results)
    if run.accelerator.is_main_process:
        history = [{"fold": fold, **row} for fold, result in enumerate(results, 1) for row in result["history"]]
        history += [{"fold": 0, **row} for row in final["history"]]
        metrics = pool_metrics(run, table, splits, shares, args) | {"epoch": final["epoch"]} | curve
        panel = functools.partial(plot_within, metrics["within"], args) if "within" in metrics else None
        if not args.no_erasing:
            draw_where_it_looks(run, results[0]["heats"], table, args)
        set_older_apart(args)
        tm.finish(table, history, metrics, run, args, panel)
    run.progress.remove()
    return 0


def main(argv=None):
    return writing.run_script("cross_validate.py", cross_validate, argv, resumable=True)


if __name__ == "__main__":
    sys.exit(main())

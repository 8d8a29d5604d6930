"""Tell how good a recipe of train_model.py is on plants never seen: every photo is predicted once, by folds.

    python cross_validate.py                                                  the study's recipe, five folds by plant
    python cross_validate.py --data_dir sample_data --model_name tf_efficientnet_lite0
    python cross_validate.py --group_by experiment_id --folds 9               how good in an experiment never seen?
    python cross_validate.py --resume                                         go on with the folds that are left

Takes the flags of train_model.py and --folds. Writes the same files, pooled over all held-out rows, into
results/cross_validation/, and models/biomass_cross_validated.pt: a model trained on all rows that also knows, from the
held-out ones, how far its predictions may be off and which photos are unlike those that it was trained on.
"""

import functools
import itertools
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter

import train_model as tm

EXCESS_GREEN, DARK = 0.25, 60  # as in eda.py
MOST_SIDE, WIDEN, SOIL_RADIUS = 512, 6, 0.33  # pixels, pixels, share of the frame within which every pot shows soil
GREY = np.uint8([124, 116, 104])  # the mean of ImageNet
PATCHES = 8  # a side of a heat map
SHOWN = 12  # photos with a heat map
COMPONENTS = 31  # of the training features; what lies outside them counts too
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
    shown, choose = ((learn, watch), True) if args.patience else (split, False)
    outcome = tm.fit(model, this.dataset, batches, shown, args, this.accelerator, this.progress, name, choose)
    if "interrupted" in outcome:  # after fewer epochs than the others
        raise KeyboardInterrupt
    result = {"history": outcome["history"], "epoch": outcome["epoch"]}
    for view in (tm.PLAIN, *this.dataset.edits):
        result[view] = tm.evaluate(model, batches(split[1], view), this.accelerator)[1]
    familiar = describe_features(features_of(this, model, batches, learn))
    distances = unlikeness(familiar, features_of(this, model, batches, split[1]))
    result["distances"] = torch.from_numpy(distances)
    if this.dataset.edits and name.startswith("fold 1/") and this.accelerator.is_main_process:
        by_weight = split[1][np.argsort(this.dataset.targets[split[1]].numpy(), kind="stable")]
        rows = by_weight[np.unique(np.linspace(0, len(by_weight) - 1, SHOWN).astype(int))]
        weigh = make_weigh(model, args, this.accelerator)
        to_pixels = functools.partial(pixels_of, this.dataset)
        photos = {row: tm.open_photo(this.dataset.paths[row]) for row in rows.tolist()}
        heats = [heat_map(photos[row], this.dataset.metadata[row], weigh, to_pixels) for row in photos]
        result["heats"] = {"rows": torch.from_numpy(rows), "heats": torch.from_numpy(np.stack(heats))}
    return result


# ---------------------------------------------------------------- what held-out photos teach of new ones


def calibrate(table, labels, args):
    """What interval needs, in plain values, from out-of-fold errors.

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


def features_of(this, model, batches, rows):
    """Features (len(rows), width) in the precision in which predict.py computes them."""
    with this.accelerator.autocast():
        return tm.features_of(model, batches, rows, this.accelerator)


def describe_features(features):
    """The training photos' features (n, width) as a probabilistic PCA, in plain arrays for unlikeness."""
    from sklearn.decomposition import PCA

    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    scale = float((features - mean).std()) or 1.0  # one for all, see BiomassModel.fit_features
    components = max(min(COMPONENTS, min(features.shape) - 1), 1)
    pca = PCA(components, svd_solver="randomized", random_state=0).fit((features - mean) / scale)
    # not noise_variance_, which divides by the photos where they are fewer than the features
    rest = ((features - mean) ** 2).mean(0).sum() / scale**2 - pca.explained_variance_.sum()
    rest = max(float(rest) / max(features.shape[1] - components, 1), 1e-9)
    described = {"mean": mean, "scale": scale, "components": pca.components_}
    return described | {"variance": pca.explained_variance_.clip(rest), "rest": rest}


def train_on_all(this, args, batches, table, results):
    """Train the model that is saved on all rows, and give it what the folds taught."""
    learn, watch = keep_aside(this.labels, np.arange(len(this.labels)), args)
    model = tm.new_model(this.labels, this.dataset, this.backbone, batches, learn, args, this.accelerator)
    name = "final model  "
    outcome = tm.fit(model, this.dataset, batches, (learn, watch), args, this.accelerator, this.progress, name)
    if "interrupted" in outcome:
        raise KeyboardInterrupt
    familiar = describe_features(features_of(this, model, batches, learn))
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


# ---------------------------------------------------------------- does it look at the plant?


def plant_mask(photo, widen):
    """Where a photo is green, as eda.py finds it, and `widen` pixels around: bool (height, width).

    Excess green 2g - r - b on chromatic coordinates (Woebbecke et al. 1995, Transactions of the ASAE 38, 259-269).
    """
    coarse = np.asarray(photo.reduce(2), np.float32)
    total = coarse.sum(2)
    green = (3 * coarse[..., 1] - total > EXCESS_GREEN * total) & (total > DARK)
    mask = Image.fromarray(np.uint8(255 * green)).resize(photo.size, Image.Resampling.NEAREST)
    return np.asarray(mask.filter(ImageFilter.BoxBlur(widen))) > 0


def work_copy(photo):
    photo = photo.copy()
    photo.thumbnail((MOST_SIDE, MOST_SIDE))
    return photo


def erase_background(photo):
    """The plant alone, on one grey; a photo without green stays as it is."""
    photo = work_copy(photo)
    plant = plant_mask(photo, 1)
    return Image.fromarray(np.where(plant[..., None], np.asarray(photo), GREY)) if plant.any() else photo


def erase_plant(photo):
    """The pot without its plant, filled with soil of the same photo; one without green stays as it is.

    Soil is copied from beside the plant, within the radius in which every pot shows soil: a few large pieces, moved
    as they are, so that grain and noise stay. Leaves beyond it are replaced by what lies at the same distance from
    the pot's centre, turned or mirrored: rim by rim, tray by tray.
    """
    photo = work_copy(photo)
    hole = plant_mask(photo, WIDEN)
    if not hole.any():
        return photo
    centre, side = pot_centre(photo.convert("L"), hole), min(photo.size)
    soil = np.hypot(*(np.indices(hole.shape) - centre[:, None, None])) < SOIL_RADIUS * side
    pixels, left = np.array(photo), hole.copy()
    for here, ways in ((soil, shifts(side)), (True, turns(centre)), (True, shifts(side))):
        left = fill(pixels, left, np.broadcast_to(here, hole.shape), list(ways))
    soft = Image.fromarray(np.uint8(255 * hole)).filter(ImageFilter.GaussianBlur(1.2))
    weight = np.maximum(np.asarray(soft, np.float32) / 255, hole)[..., None]
    return Image.fromarray(np.uint8(np.asarray(photo) * (1 - weight) + pixels * weight + 0.5))


def pot_centre(grey, hole, reach=6, radius=28):
    """Row and column about which the photo is most like itself turned by 180 degrees, the hole left out."""
    small = np.pad(np.asarray(grey.resize((64, 64), Image.Resampling.BOX), np.int16), 32)
    seen = np.pad(np.asarray(Image.fromarray(~hole).resize((64, 64), Image.Resampling.NEAREST)), 32)
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) < radius
    best = (math.inf, 0, 0)
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        part = np.s_[64 + down - radius : 65 + down + radius, 64 + right - radius : 65 + right + radius]
        both = disc & seen[part] & seen[part][::-1, ::-1]
        unlike = (np.abs(small[part] - small[part][::-1, ::-1]) * both).sum() / max(both.sum(), 1)
        best = min(best, (unlike * (1 + 0.01 * math.hypot(down, right)), down, right))
    return (0.5 + np.array(best[1:]) / 64) * hole.shape


def fill(pixels, hole, here, ways):
    """Fill the hole `here` with pixels from `here`, a way after another, the one that serves most first.

    A way (matrix, offset) takes each pixel from matrix @ place + offset. Returns what is left of the hole.
    """
    hole = hole.copy()
    while ways:
        places = np.argwhere(hole & here)
        served = [np.count_nonzero(sources(places[::16], hole, here, way)[1]) for way in ways]
        origins, good = sources(places, hole, here, ways.pop(int(np.argmax(served))))
        if not good.any():
            break
        pixels[tuple(places[good].T)] = pixels[tuple(origins[good].T)]
        hole[tuple(places[good].T)] = False
    return hole


def sources(places, hole, here, way):
    """From where a way takes the pixels at `places`, and whether they can be taken from there."""
    origins = places @ way[0].T + np.round(way[1]).astype(int)
    inside = ((origins >= 0) & (origins < hole.shape)).all(1)
    origins = np.where(inside[:, None], origins, 0)
    return origins, inside & ~hole[tuple(origins.T)] & here[tuple(origins.T)]


def shifts(side):
    """Ways to move pixels by an eighth to a half of the frame, in directions that differ."""
    for length, first in ((0.12, 0), (0.2, 1), (0.3, 2), (0.42, 3), (0.55, 4)):
        for angle in first + np.arange(10) * math.pi / 5:
            yield np.eye(2, dtype=int), length * side * np.array([math.sin(angle), math.cos(angle)])


def turns(centre):
    """The seven ways to turn and mirror a square about the pot's centre, pixel by pixel."""
    for number in range(1, 8):
        matrix = np.linalg.matrix_power([[0, 1], [-1, 0]], number % 4) @ np.diag([1, -1 if number >= 4 else 1])
        yield matrix, centre - 0.5 - matrix @ (centre - 0.5)


ERASERS = {"plant erased": erase_plant, "background erased": erase_background}


def judge_erased(table, args):
    """Correlation of predictions with measurements, of photos whole and erased, each with an interval."""
    metrics = {}
    for name in ("predicted", *ERASERS):
        if name in table:
            key = "val_r" if name == "predicted" else f"val_r_{name.replace(' ', '_')}"
            metrics |= {key: correlation(table[name], table["measured"])}
            products = table.assign(one=1, x=table[name], y=table["measured"])
            products = products.assign(xx=products["x"] ** 2, yy=products["y"] ** 2, xy=products["x"] * products["y"])
            products = products[["_plant", "one", "x", "y", "xx", "yy", "xy"]]
            metrics[f"{key}_ci95"] = tm.bootstrap_interval(r_of_sums, products, args.seed)
    return metrics


def r_of_sums(sums):
    """Pearson's r from n and the sums of x, y, their squares and products; 0 where nothing varies."""
    n, x, y, xx, yy, xy = sums
    below = np.sqrt(np.maximum((n * xx - x**2) * (n * yy - y**2), 0))
    return np.divide(n * xy - x * y, below, out=np.zeros_like(below), where=below > 0)


def correlation(first, second):
    products = [len(first), first.sum(), second.sum(), (first**2).sum(), (second**2).sum(), (first * second).sum()]
    return float(r_of_sums(np.array(products, float)[:, None])[0])


def verdict(metrics):
    """One sentence of three, by the share of the correlation that is left once the plant is erased."""
    whole, erased, alone = (metrics[f"val_r{name}"] for name in ("", "_plant_erased", "_background_erased"))
    if metrics["val_r_ci95"] and metrics["val_r_ci95"][0] <= 0:
        return f"no weight can be read from these photos: r {whole:.2f}"
    share = max(erased, 0) / whole
    kinds = {1 / 3: "from the plants", 2 / 3: "partly from the background", math.inf: "mostly from the background"}
    kind = next(kind for limit, kind in kinds.items() if share <= limit)
    numbers = f"r {whole:.2f}, plants erased {erased:.2f}, all else erased {alone:.2f}"
    return f"the weight is read {kind}: {numbers}; {metrics['photos_not_erased']:,} photos had no plant to erase"


# ---------------------------------------------------------------- where it looks


def heat_map(photo, metadata, weigh, to_pixels):
    """What hiding each of PATCHES x PATCHES squares takes from a photo's prediction, in its unit.

    Occlusion (Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, ECCV), by the same photo
    without its plant, turned by 180 degrees: a flat patch would be something that no photo shows. `photo` is a Pillow
    image, to_pixels makes uint8 (3, size, size) of one, weigh predicts from such photos and their metadata.
    """
    whole, other = to_pixels(photo), to_pixels(erase_plant(photo).transpose(Image.Transpose.ROTATE_180))
    edges = np.linspace(0, whole.shape[-1], PATCHES + 1).round().astype(int)
    hidden = whole.repeat(PATCHES**2 + 1, 1, 1, 1)
    for number, (row, column) in enumerate(itertools.product(range(PATCHES), repeat=2)):
        patch = np.s_[:, edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        hidden[number][patch] = other[patch]
    predicted = weigh(hidden, metadata.repeat(len(hidden), 1))
    return (predicted[-1] - predicted[:-1]).reshape(PATCHES, PATCHES)


def pixels_of(dataset, photo):
    """A Pillow photo as the backbone takes it: uint8 (3, size, size)."""
    return torch.from_numpy(np.array(dataset.transform(photo, tm.PLAIN, ""))).permute(2, 0, 1)


def make_weigh(model, args, accelerator):
    """Function from photos uint8 (n, 3, size, size) and metadata to predictions (n,), by the engine of training."""
    size = tm.BATCH[accelerator.device.type]
    engine, _ = tm.make_engine(model.backbone, accelerator.device, args.precision)

    @torch.inference_mode()
    def weigh(photos, metadata):
        model.eval()
        full = torch.cat([photos, photos[-1:].repeat(-len(photos) % size, 1, 1, 1)]).split(size)
        features = torch.from_numpy(engine(full)[: len(photos)]).to(accelerator.device)
        return model.to_grams(model(features, metadata.to(accelerator.device))).cpu().numpy()

    return weigh


def draw_heat(items, args, path, unit, columns=6):
    """Photos above their heat maps, on one common scale; items are (photo, heat, title)."""
    rows = -(-len(items) // columns)
    figure, axes = tm.new_figure(args, rows * 2, columns, (10, 3.8 * rows))
    most = max(float(np.abs(heat).max()) for _, heat, _ in items) or 1.0
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (photo, heat, title) in enumerate(items):
        above, below = axes[number // columns * 2 : number // columns * 2 + 2, number % columns]
        above.imshow(photo)
        above.set_title(title, fontsize=8)
        below.imshow(photo.convert("L"), cmap="gray")
        extent = (0, photo.width, photo.height, 0)
        drawn = below.imshow(heat, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.6, extent=extent)
    label = f"red: prediction lost by hiding the patch{f' ({unit})' if unit else ''}, blue: gained"
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.7)
    figure.suptitle("Where it looks: each patch hidden in turn by what the photo shows without its plant")
    tm.save_figure(figure, path, photos=True)


# ---------------------------------------------------------------- the run


def build_parser():
    parser = tm.build_parser(
        "cross_validate.py", __doc__, "results/cross_validation", "models/biomass_cross_validated.pt"
    )
    add = parser.add_argument_group("cross-validation").add_argument
    add("--folds", type=tm.number(int, 2), default=5, help="parts of the plants, each held out once")
    add("--within", default="experiment_id", metavar="COLUMN", help="also judge within each value of this column")
    add("--no_erasing", action="store_true", help="do not ask whether it looks at the plant")
    return parser


def judge_within(table, args):
    """Errors within each value of the --within column, as a pooled R2 can come from differences between them alone."""
    sheet = tm.read_sheet(args.labels_path).drop_duplicates("filename").set_index("filename")
    if args.within not in sheet or sheet[args.within].isna().all():
        logger.info(f"not judged within {args.within}: the sheet has no such column, or it is empty")
        return {}
    values = table["filename"].map(tm.to_ids(sheet[args.within])).astype(object)
    groups = []
    for value in sorted(values.dropna().unique(), key=lambda value: (len(value), value)):
        rows = table[values == value]
        group = {"value": value, "rows": len(rows), "rmse": tm.scores(rows)["val_rmse"], "bias": rows["error"].mean()}
        groups.append(group | {"r": correlation(rows["predicted"], rows["measured"])})
        numbers = "RMSE {rmse:.4f}, bias {bias:.4f}, r {r:.3f}".format(**groups[-1])
        logger.info(f"{args.within} {value}: {len(rows):,} rows, {numbers}")
    around = table["measured"] - table["measured"].groupby(values).transform("mean")
    within = {"column": args.within, "groups": groups}
    errors, around = (table["error"][around.notna()] ** 2).sum(), (around**2).sum()
    return {"val_r2_within_groups": 1 - float(errors / around) if around else None, "within": within}


def plot_within(within, args, axis):
    """RMSE and bias within each group, with r beside it."""
    groups = pd.DataFrame(within["groups"])
    places = np.arange(len(groups))
    axis.barh(places, groups["rmse"], color="tab:blue", alpha=0.5, label="RMSE")
    axis.plot(groups["bias"], places, "D", color="tab:red", label="bias")
    for place, rmse, r in zip(places, groups["rmse"], groups["r"], strict=True):
        axis.text(rmse, place, f" r {r:.2f}", va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(places, [f"{group['value']} (n = {group['rows']:,})" for group in within["groups"]])
    axis.set_xlim(right=groups["rmse"].max() * 1.2)
    unit = f" ({tm.unit_of(args.target)})" if tm.unit_of(args.target) else ""
    axis.set(
        xlabel=f"error{unit}", ylabel=tm.plain(within["column"]), title=f"Within each {tm.plain(within['column'])}"
    )
    axis.invert_yaxis()
    axis.legend()


def summarize(table, final, splits, labels, args):
    """What metrics.txt says of all held-out rows together, of each fold and within groups."""
    how = "training plants kept aside" if args.patience else "none"
    metrics = tm.summarize(table, final["epoch"], how, [], args)
    metrics |= {"val_rows": len(table), "val_plants": int(table["_plant"].nunique())} | judge_erased(table, args)
    if not args.no_erasing:
        # where nothing could be erased, the photos are the same to the last bit, and so are the predictions
        lowest = 0 if (table["measured"] >= 0).all() else -math.inf  # to which others are clamped too
        same = (table["plant erased"] == table["predicted"]) & (table["predicted"] > lowest)
        metrics["photos_not_erased"] = int(same.sum())
        metrics["looks_at"] = verdict(metrics)
        logger.info(metrics["looks_at"])
    each = [{"fold": fold, **tm.scores(rows)} for fold, rows in table.groupby("fold")]
    each = [scores | tm.count_sides(labels, split) for scores, split in zip(each, splits.values(), strict=True)]
    rmse = [fold["val_rmse"] for fold in each]
    spread = {"val_rmse_mean": float(np.mean(rmse)), "val_rmse_sd": float(np.std(rmse, ddof=1))}
    return metrics | {"folds": spread | {"each": each}} | judge_within(table, args)


def predicted_rows(this, splits, results, args):
    """All held-out rows with their predictions, of the photos whole and erased."""
    tables = []
    for fold, (split, result) in enumerate(zip(splits.values(), results, strict=True), start=1):
        table = tm.predicted_rows(this.labels, split, result[tm.PLAIN], args, fold)
        tables.append(table.assign(**{view: result[view].numpy() for view in this.dataset.edits}))
    return pd.concat(tables)


def draw_where_it_looks(this, heats, table, args):
    predicted, unit, items = table["predicted"], tm.unit_of(args.target), []
    for row, heat in zip(heats["rows"].tolist(), heats["heats"].numpy(), strict=True):
        both = f"measured {this.dataset.targets[row]:.3f} {unit}\npredicted {predicted[row]:.3f} {unit}"
        items.append((tm.open_photo(this.dataset.paths[row]), heat, both))
    draw_heat(items, args, args.results_dir / "where_it_looks.png", unit)


def cross_validate(argv, started):
    """The whole run, from the flags to the report; returns the exit status."""
    begun = time.perf_counter()
    args = build_parser().parse_args(argv)
    this = tm.prepare("cross_validate.py", argv, args, started)
    splits = folds_by_plant(this.labels, args)
    tm.open_log(args.log_path, append=bool(this.progress["results"] or this.progress["state"]))
    tm.log_run(this.run)
    rows = np.arange(len(this.labels))
    this.dataset.edits = {} if args.no_erasing else ERASERS
    wanted = tm.versions_wanted(rows, rows, args) | {view: rows for view in this.dataset.edits}
    batches = tm.make_batches(this.dataset, this.backbone, wanted, args, this.accelerator)
    done = this.progress["results"]
    for name, split in splits.items():
        if name in done:
            logger.info(f"{name}was done before")
            continue
        done[name] = judge_fold(this, split, args, batches, name)
        this.progress["state"] = {}
        if this.accelerator.is_main_process:
            tm.write_progress(this.progress, args)
    results = [done[name] for name in splits]
    table = predicted_rows(this, splits, results, args)
    final = train_on_all(this, args, batches, table, results)
    if this.accelerator.is_main_process:
        history = [{"fold": fold, **row} for fold, result in enumerate(results, 1) for row in result["history"]]
        history += [{"fold": 0, **row} for row in final["history"]]
        metrics = summarize(table, final, splits, this.labels, args)
        within = metrics.get("within")
        panel = functools.partial(plot_within, within, args) if within else None
        tm.finish(table, history, metrics, this.run, begun, args, panel)
        if this.dataset.edits:
            draw_where_it_looks(this, results[0]["heats"], table, args)
        Path(f"{args.model_out}.progress").unlink(missing_ok=True)
    return 0


def main(argv=None):
    return tm.run_script("cross_validate.py", cross_validate, argv)


if __name__ == "__main__":
    sys.exit(main())

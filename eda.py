"""Look at plant photos and their label sheet before a model does: plots, an audit, and what green area alone tells.

    python eda.py                                    # the FarmBot data in infos/mlops_biomass_data
    python eda.py --data_dir sample_data             # data drawn by `python make_sample_data.py`
    python eda.py --labels_path leaves.csv --image_dir photos --target leaf_weight --group_by tray pot

Writes figures/target_distribution.png, sample_images.png, correlation_heatmap.png, age_vs_biomass.png,
               image_pixel_analysis.png, green_area_vs_biomass.png
       results/eda_summary.json: statistics; `audit`, faults by row and file and facts of the structure; `baselines`,
               the errors that a model has to beat
"""

import os
import signal
import sys

if __name__ == "__main__":  # before the libraries, which take seconds to load
    signal.signal(signal.SIGINT, lambda *_: (sys.stderr.write("eda.py: interrupted\n"), os._exit(130)))

import functools
import hashlib
import logging
import warnings
from pathlib import Path

try:
    from biomass import plant, reading, writing
    from biomass.reading import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: eda.py needs the folder biomass/ beside it: copy it there too ({error})")

import numpy as np
import pandas as pd
from PIL import ImageOps, ImageStat
from tqdm.contrib.concurrent import thread_map

CHANNELS = ["red", "green", "blue"]
PLANT = ["experiment_id", "plant_number"]  # plant numbers restart in every experiment
NUMBERS = ["timestamp", "age_days", "fresh_weight_total", "fresh_weight_shoot", "fresh_weight_root"]  # if absent, empty

logger = logging.getLogger("biomass")


def load_sheet(args):
    """The sheet with numbers and ids in its cells and names as in the folder, the same as typed, and each row's faults.

    `_fault` of the rows is what keeps a model from learning from them, as training will say it, `_missing` what is
    wrong with their photo's place; here no row is dropped.
    """
    columns = dict.fromkeys([*PLANT, *NUMBERS], "") | reading.asked_columns(args)
    typed = reading.read_sheet(args.labels_path, columns, args, args.target)
    reading.tell_readings(typed, args.labels_path)
    sheet, found = typed.copy(), reading.find_photos(typed["filename"], args.image_dir)
    root = os.path.realpath(args.image_dir)
    places = [None if fault else Path(os.path.relpath(path, root)).as_posix() for path, fault in found.to_numpy()]
    sheet["filename"] = pd.Series(places, sheet.index, object)
    for column in typed.columns.drop("filename"):
        is_id = column in [*PLANT, *args.group_by]
        cells = reading.to_ids(typed[column]) if is_id else typed[column]
        numbers = reading.to_numbers(cells)
        fits = numbers.nunique() == cells.nunique() if is_id else numbers.count() > (~reading.is_gap(cells)).sum() / 2
        sheet[column] = numbers if fits or column in [args.target, *NUMBERS] else cells
    if args.target == "filename" or not sheet[args.target].count():
        text = f"no row of {args.labels_path} has a number in '{args.target}'"
        raise UserError(f"{text}: name the column of the weights by --target")
    missing = found["_fault"]
    rows = reading.load_rows(typed, args)
    return sheet, typed, reading.blame(rows, missing != "", missing).assign(_missing=missing)


def scan_photos(named, folder, with_traits=False):
    """Open once each photo that is named or in the folder, by threads, as Pillow releases the interpreter."""
    own = filter(reading.is_photo, reading.list_files(folder, told=False))
    names = sorted({*named.dropna(), *own})
    scan = functools.partial(scan_photo, with_traits)
    looks = thread_map(scan, [folder / name for name in names], desc="photos", unit="photo", disable=None)
    columns = ["problem", "note", "mode", "size", "digest", "green_area", "traits", *CHANNELS]
    return pd.DataFrame(looks, index=pd.Index(names, dtype=object), columns=columns)


def scan_photo(with_traits, path):
    """What one photo tells: mode, size, digest of its pixels, green area and mean channels (0..1), or its problem."""
    try:
        content = reading.read_file(path)
        photo, mode = reading.open_photo(content), reading.open_file(content).mode
    except Exception as error:  # a broken file makes Pillow raise almost anything
        return {"problem": reading.fault_of(error)}
    size = f"{photo.width}x{photo.height}"
    digest = hashlib.sha256(size.encode() + photo.tobytes()).hexdigest()
    means = dict(zip(CHANNELS, np.array(ImageStat.Stat(photo).mean) / 255, strict=True))
    found = {"mode": mode, "size": size, "digest": digest, "green_area": plant.green_area(photo)} | means
    found |= {"note": photo.info["note"]} if photo.info["note"] else {}
    return found | ({"traits": plant.measure_traits(photo)} if with_traits else {})


def write_labels(sheet, typed, rows, args):
    """Write all rows as they were understood, and why a model would not learn from one: a sheet for all scripts."""
    table = typed.copy()
    plain = [bool(name) and name == name.encode(errors="ignore").decode() for name in sheet["filename"]]
    table["filename"] = sheet["filename"].where(plain, typed["filename"].astype(object))
    for column in typed.columns.drop(["filename", *args.group_by], errors="ignore"):
        known = reading.to_numbers(sheet[column]).notna() & pd.api.types.is_numeric_dtype(sheet[column])
        unclear = typed[column].astype(str).str.contains(",")  # beside numbers as they are written here it could be one
        table[column] = sheet[column].astype(object).where(known, typed[column].astype(object).mask(~known & unclear))
        if pd.api.types.is_datetime64_any_dtype(typed[column]):
            table[column] = typed[column].dt.strftime("%Y-%m-%d %H:%M:%S")
    typed_weights = " (" + typed[args.target].astype(str) + ")"
    odd = sheet[args.target].isna() & typed[args.target].notna()
    table["left_out_because"] = rows["_fault"] + typed_weights.where(odd, "")
    first = dict.fromkeys(["filename", *args.group_by, args.target])
    table = table[[*first, *table.columns.drop([*first])]].replace(r"\s*[\r\n]+\s*", " ", regex=True)
    with writing.whole_file(args.write_labels) as partial:
        table.to_csv(partial, index=False, encoding="utf-8-sig")  # by whose mark Excel knows it


def name_cells(typed, rows, *columns):
    """Name rows by their number in a spreadsheet, their photo, and what was typed into the columns."""
    found = typed.loc[rows, ["filename", *columns]].astype(object).itertuples(name=None)
    shown = [(row, name, ["empty" if pd.isna(cell) else str(cell) for cell in cells]) for row, name, *cells in found]
    return [f"row {row + 2} ({name}): {', '.join(cells)}" for row, name, cells in shown]


def find_faults(sheet, typed, rows, photos, args):
    """Texts by kind of fault."""
    target, weights, names, missing = args.target, sheet[args.target], sheet["filename"], rows["_missing"]
    text = typed[target].map(lambda cell: isinstance(cell, str)) & weights.notna()
    number_columns = [column for column in typed.columns.drop("filename") if column not in args.group_by]
    lost = {column: sheet[column].isna() & ~reading.is_gap(typed[column]) for column in number_columns}
    dates = {column: at & typed[column].astype(str).str.match(reading.DATE) for column, at in lost.items()}
    total, shoot, root = (sheet.get(column, weights * np.nan) for column in NUMBERS[2:])
    off = (total - shoot - root).abs() > 0.001 + 0.01 * total.abs()  # more than rounding three weights explains
    modes, twins = photos["mode"].dropna(), photos["digest"].dropna()[lambda digests: digests.duplicated(keep=False)]
    is_weight = bool(reading.unit_of(target))
    others, _ = reading.other_unit(weights, reading.unit_of(target))
    same_photo = pd.Series(pd.factorize(names)[0], names.index).where(names.notna())
    plants = rows["_plant"].groupby(same_photo).transform("nunique") > 1
    pairs = zip(names, typed["filename"].astype(str).str.replace("\\", "/", regex=False), strict=True)
    other = [bool(name) and reading.same_name(name) != reading.same_name(asked) for name, asked in pairs]
    renamed = (missing == "") & np.array(other, bool)
    return {
        "text_weights": name_cells(typed, text & (text.mean() < 0.5), target),  # in a CSV file all cells are text
        "dates_for_numbers": [
            f"{name} in {column}" for column, at in dates.items() for name in name_cells(typed, at, column)
        ],
        "cells_not_numbers": [
            f"{name} in {column}"
            for column, at in lost.items()
            for name in name_cells(typed, at & ~dates[column], column)
        ],
        "negative_weights": name_cells(typed, (weights < 0) & is_weight, target),
        "weights_of_zero": name_cells(typed, (weights == 0) & is_weight, target),
        "weights_in_other_units": name_cells(typed, others, target),
        "wrong_totals": name_cells(typed, off, *NUMBERS[2:]) if off.any() else [],
        "rows_without_plant": name_cells(typed, sheet[args.group_by].isna().any(axis=1), *args.group_by),
        "rows_twice": name_cells(typed, names.notna() & sheet.duplicated(["filename", target]), target),
        "photos_with_several_weights": name_cells(typed, weights.groupby(same_photo).transform("nunique") > 1, target),
        "photos_of_several_plants": name_cells(typed, plants, *args.group_by),
        "photos_found_under_other_names": name_cells(typed.assign(found=names), renamed, "found"),
        "missing_photos": name_cells(typed.assign(fault=missing), missing != "", "fault"),
        "unreadable_photos": [f"{name}: {problem}" for name, problem in photos["problem"].dropna().items()],
        "photos_with_a_doubt": [f"{name}: {note}" for name, note in photos["note"].dropna().items()],
        "unused_photos": [*photos.index.difference(names.dropna())],
        "photos_not_rgb": [f"{name}: mode {mode}" for name, mode in modes[modes != "RGB"].items()],
        "photos_under_several_names": [" = ".join(same) for same in twins.index.groupby(twins).values()],
    }


def summarize(sheet, typed, rows, photos, args):
    """Statistics and audit, in which a fault wants mending and a fact wants knowing; shares are fractions."""
    weights, times, ages = sheet[args.target], sheet.get("timestamp"), sheet.get("age_days")
    number = "plant_number" if "plant_number" in sheet else args.group_by
    photos_per_number, plants = sheet.groupby(number).size(), {}
    if not {*PLANT} - {*sheet}:
        experiments = sheet.groupby("plant_number")["experiment_id"].nunique()
        plants = {"numbers": len(experiments), "in_several_experiments": (experiments > 1).sum()}
        plants |= {"by_experiment_and_number": sheet.groupby(PLANT).ngroups}
    r, empty = sheet.select_dtypes("number").corr(min_periods=10)[args.target].drop(args.target), sheet.isna().mean()
    r, drops = r.dropna(), rows["_fault"]
    facts = {
        "missing_share": empty[empty > 0].to_dict(),
        "rows_that_training_drops": drops[drops != ""].value_counts().to_dict(),
        "photo_sizes": photos["size"].value_counts().to_dict(),
        "plants": plants,
        "columns_that_tell_the_answer": r[r.index.str.contains("weight|shoot|root") | (r.abs() > 0.95)].to_dict(),
    }
    faults = find_faults(sheet, typed, rows, photos, args)
    counted = {name: {"count": len(found), "found": found} for name, found in faults.items()}
    return {
        "num_records": len(sheet),
        "num_images_on_disk": len(photos),
        "num_labeled": weights.count(),
        "pct_labeled": weights.notna().mean(),
        "fresh_weight_stats": weights.describe().to_dict() | {"count": weights.count()},
        "age_missing_pct": None if ages is None else ages.isna().mean(),
        "target_missing_pct": weights.isna().mean(),
        "plants_with_multiple_samples": (photos_per_number > 1).sum(),
        "max_images_per_plant": photos_per_number.max(),
        "timestamp_span_days": None if times is None else (times.max() - times.min()) / 86400,
        "data_quality_issues": [*describe(faults), *describe(facts)],
        "audit": {"readings": typed.attrs["readings"], "faults": counted, "facts": facts},
    }


def describe(audit):
    """A line of text for each fault or fact."""
    for name, found in audit.items():
        shown = [f"{key} {value:.4g}" for key, value in found.items()] if isinstance(found, dict) else found[:5]
        more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        if found:
            yield f"{name.replace('_', ' ')} ({len(found)}): {'; '.join(shown)}{more}"


def measure_baselines(sheet, args):
    """Errors of the training mean and of the law of green area on held-out groups; None for too few."""
    from sklearn.model_selection import GroupKFold

    rows = sheet[sheet[args.target] > 0].dropna(subset=["photo_green_area", *args.group_by])
    areas, grams = rows["photo_green_area"].to_numpy(), rows[args.target].to_numpy()
    groups = rows.groupby(args.group_by).ngroup()
    if len(set(grams)) < 2:
        logger.info(f"no baselines: {args.target} has one value alone in the rows with a photo and a plant")
        return None
    guesses = {"training_mean": np.empty_like(grams), "green_area_law": np.empty_like(grams)}
    try:
        for train, held_out in GroupKFold(5, shuffle=True, random_state=args.seed).split(areas, groups=groups):
            guesses["training_mean"][held_out] = grams[train].mean()
            guesses["green_area_law"][held_out] = plant.fit_law(areas[train], grams[train])[1](areas[held_out])
    except (TypeError, ValueError):  # of GroupKFold for too few groups, of polyfit for too few areas
        return None
    how = f"5-fold cross-validation by {', '.join(args.group_by)}, scored over all held-out rows"
    baselines = {"how": how, "rows": len(rows), "groups": groups.nunique()}
    for name, guess in guesses.items():
        squares = (guess - grams) ** 2
        numbers = {"rmse": squares.mean() ** 0.5, "rmse_ci95": writing.rmse_interval(squares, groups)}
        baselines[name] = numbers | {"r2": 1 - squares.mean() / grams.var()}
        rmse = f"RMSE {numbers['rmse']:.4f} {reading.unit_of(args.target)}".rstrip()
        logger.info(f"{name.replace('_', ' ')}: {rmse}, R2 {baselines[name]['r2']:.3f}")
    baselines["green_area_law"] |= plant.fit_law(areas, grams)[0] | {"rows_without_green": (areas == 0).sum()}
    return baselines


def need(found, what):
    """Raise ValueError, for which a figure is left out, if nothing was found."""
    if not len(found):
        raise ValueError(f"no {what}")


def target_distribution(figure, sheet, photos, args):
    import seaborn

    weights = sheet[args.target].dropna().rename(args.label)
    linear, logarithmic = figure.subplots(1, 2)
    seaborn.histplot(weights, bins=40, color="seagreen", ax=linear)
    middle = f"mean {weights.mean():.4g}, median {weights.median():.4g} {reading.unit_of(args.target)}".rstrip()
    linear.set(title=f"n = {len(weights)}, {middle}", ylabel="rows")
    seaborn.histplot(weights[weights > 0], bins=40, color="seagreen", log_scale=True, ax=logarithmic)
    logarithmic.set(title=f"n = {(weights > 0).sum()} above zero, on a log axis", ylabel="rows")
    plain_ticks(logarithmic.xaxis)


def plain_ticks(axis):
    """Numbers as people write them on a logarithmic axis, several also where it spans less than a decade."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    steps = (1, 3) if high < 1e5 * low else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=steps) if high > 20 * low else ticker.AutoLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def sample_images(figure, sheet, photos, args):
    rows = sheet[sheet["filename"].isin(photos.index[photos["problem"].isna()])].dropna(subset=args.target)
    need(rows, "photo that can be read, with a weight")
    parts = np.array_split(rows.sort_values(args.target, kind="stable").index, 12)
    rng = np.random.default_rng(args.seed)
    figure.suptitle(f"{args.label}: photos over its range, chosen from n = {len(rows)}")
    for axes, part in zip(figure.subplots(3, 4).flat, parts, strict=True):
        axes.set_axis_off()
        for row in rng.choice(part, min(1, len(part))):
            axes.imshow(ImageOps.contain(reading.open_photo(args.image_dir / rows["filename"][row]), (256, 256)))
            age = f", {rows['age_days'][row]:g} days".replace("nan days", "no age") if "age_days" in rows else ""
            grams = f"{rows[args.target][row]:.4g} {reading.unit_of(args.target)}".rstrip()
            axes.set_title(f"row {row + 2}: {grams}{age}", size=8)


def correlation_heatmap(figure, sheet, photos, args):
    import seaborn

    figure.set_figheight(6)
    r = sheet.select_dtypes("number").corr(min_periods=3)
    need(r[args.target].dropna().drop(args.target), f"other column of numbers that vary with {args.target}")
    strongest = r[args.target].abs().nlargest(21).index  # the target itself and twenty others
    order = r.loc[strongest, args.target].sort_values(ascending=False).index
    r, counts, axes = r.loc[order[1:], order[:-1]], sheet[order].count(), figure.subplots()
    style = {"cmap": "vlag", "vmin": -1, "vmax": 1, "cbar": False, "annot_kws": {"size": 6}, "linewidths": 0.5}
    seaborn.heatmap(r, mask=np.triu(np.ones(r.shape), 1) > 0, annot=True, fmt=".2f", ax=axes, **style)
    axes.set_title(f"Pearson's r, sorted by r with {args.target}, n = {counts.min()} to {counts.max()} a column")


def age_vs_biomass(figure, sheet, photos, args):
    import seaborn

    need([column for column in sheet if column == "age_days"], "column age_days")
    rows = sheet.dropna(subset="age_days")[lambda rows: rows[args.target] > 0]
    need(rows, "row with both")
    rows["week"] = (rows["age_days"] / 7).round() * 7
    jittered = rows["age_days"] + np.random.default_rng(args.seed).uniform(-1.5, 1.5, len(rows))
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        axes.scatter(jittered, rows[args.target], s=4, alpha=0.4, color="seagreen", linewidths=0)
        seaborn.boxplot(rows, x="week", y=args.target, ax=axes, native_scale=True, fill=False, fliersize=0, color="k")
        axes.plot(rows.groupby("week")[args.target].median(), color="darkorange", marker="o", label="median")
        sizes = rows["week"].value_counts()
        axes.set_xticks(sizes.index, [f"{week:g}\nn = {n}" for week, n in sizes.items()])
        axes.set(xlabel="age, to the week (days)", ylabel=args.label, yscale=scale)
        axes.legend(loc="upper left")
    figure.suptitle(f"{args.label} by age on a linear and a log axis, n = {len(rows)} with both; boxes: quartiles")


def image_pixel_analysis(figure, sheet, photos, args):
    import seaborn

    need(photos["red"].dropna(), "photo that can be read")
    figure.suptitle(f"Mean channel intensity per photo, n = {photos['red'].count()}")
    for axes, channel in zip(figure.subplots(3, 1, sharex=True, sharey=True), CHANNELS, strict=True):
        seaborn.histplot(photos[channel].dropna(), binwidth=0.01, binrange=(0, 1), color=channel, ax=axes)
        axes.set(title=f"{channel}, median {photos[channel].median():.3f}", xlim=(0, 1), ylabel="photos")
    axes.set_xlabel("mean intensity of the channel in a photo (0..1)")


def green_area_vs_biomass(figure, sheet, photos, args):
    rows, axes = sheet[(sheet[args.target] > 0) & (sheet["photo_green_area"] > 0)], figure.subplots()
    need(rows, "photo with any green, with a weight")
    areas, grams = rows["photo_green_area"].sort_values(), rows[args.target]
    law, weight_of = plant.fit_law(areas, grams[areas.index])
    axes.scatter(areas, grams[areas.index], s=6, alpha=0.4, color="seagreen", linewidths=0)
    axes.plot(areas, weight_of(areas), color="black")
    axes.set(xscale="log", yscale="log", xlabel="green area A (share of the frame, 0..1)", ylabel=args.label)
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    formula = f"{law['smearing_factor'] * law['a']:.4g} * A^{law['b']:.3f}"
    axes.set_title(f"{args.label} by green area, n = {len(rows)} with any green; line: {formula}")


FIGURES = [target_distribution, sample_images, correlation_heatmap]
FIGURES += [age_vs_biomass, image_pixel_analysis, green_area_vs_biomass]


def write_figure(plot, sheet, photos, args):
    """Write a figure; returns its name and why it could not be drawn, if so."""
    figure = writing.new_figure(args.labels_path, (6.5, 4.4))
    try:
        plot(figure, sheet, photos, args)
        # a palette makes photos a third of the size
        writing.save_figure(figure, args.figures_dir / f"{plot.__name__}.png", dpi=130, colours=128)
    except (KeyError, TypeError, ValueError) as error:  # for want of rows or columns, or by numbers beyond any axis
        return [f"{plot.__name__}.png ({reading.one_line(error)})"]
    return []


def build_parser():
    parser = writing.new_parser("eda.py", __doc__)
    reading.add_data_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--figures_dir", type=reading.a_path, default="figures", help="folder of the plots")
    add("--summary_path", type=reading.a_path, default="results/eda_summary.json", help="JSON")
    add("--write_labels", type=reading.a_path, metavar="CSV", help="also write all rows as understood")
    add("--traits", type=reading.a_path, metavar="CSV", help="also write the traits of the plant in each photo")
    scale = writing.number(float, 0, ends=False)
    add("--mm_per_pixel", type=scale, help="scale of the photos: traits in mm, else in pixels")
    seed = writing.number(int, 0, 2**32 - 1)
    add("--seed", type=seed, default=42, help="of the sample photos, the jitter and the folds of the baselines")
    return parser


def explore(argv, started):
    """The whole run, from the flags to the summary; returns the exit status."""
    import matplotlib

    args = build_parser().parse_args(argv)
    reading.complete_data_flags(args)
    unit = reading.unit_of(args.target)
    args.label = args.target.replace("_", " ").removesuffix(f" {unit}") + writing.in_brackets(unit)
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 9, "figure.titlesize": 10})
    warnings.simplefilter("ignore")  # of the libraries on odd data, which the audit names
    sheet, typed, rows = load_sheet(args)
    outputs = [args.summary_path, *filter(None, [args.traits, args.write_labels])]
    outputs += [args.figures_dir / f"{plot.__name__}.png" for plot in FIGURES]
    writing.check_writable(outputs, [args.labels_path], args.image_dir)
    photos = scan_photos(sheet["filename"], args.image_dir, bool(args.traits))
    drawn = reading.is_drawn(args.labels_path)
    summary = summarize(sheet, typed, rows, photos, args)
    heading = f"{len(sheet)} rows, {len(photos)} photos{' drawn data, not measured' if drawn else ''}"
    logger.info("\n- ".join([heading, *summary["data_quality_issues"]]))
    if args.write_labels:
        write_labels(sheet, typed, rows, args)
    areas = photos["green_area"].to_dict()
    sheet["photo_green_area"] = [float(areas.get(name, np.nan)) for name in sheet["filename"]]
    summary |= {"baselines": measure_baselines(sheet, args), "drawn_data": drawn}
    lacking = [text for plot in FIGURES for text in write_figure(plot, sheet, photos, args)]
    if lacking:
        logger.info(f"not drawn, as the data do not suffice: {', '.join(lacking)}")
    writing.write_json(summary, args.summary_path)
    if args.traits:
        write_traits(photos["traits"].dropna(), args)
    return 0


def write_traits(traits, args):
    table = plant.trait_table(np.stack(list(traits)), args.mm_per_pixel)
    with writing.whole_file(args.traits) as partial:
        table.assign(filename=traits.index).set_index("filename").to_csv(partial, float_format="%.6g")


def main(argv=None):
    return writing.run_script("eda.py", explore, argv)


if __name__ == "__main__":
    sys.exit(main())

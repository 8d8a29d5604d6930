"""Tell how fast each plant grows, from weights that were read from its photos on several days.

    python growth.py predictions.csv                                    the table of predict.py or cross_validate.py
    python growth.py weights.xlsx --plant experiment pot --time date --value fresh_weight --compare treatment

Writes growth.csv, a row a plant: photos, first and last day, growth_rate (relative, a day: the slope of ln weight on
days) with a 95 % interval, doubling_days (if it surely grows), gain_a_day and a note on what is odd; and growth.png.
Errors of single days show as scatter around a plant's line; of those that its photos share error_of tells.
"""

import itertools
import logging
import math
import sys

import numpy as np
import pandas as pd
from scipy import stats

from biomass import reading, writing
from biomass.reading import UserError

FORGETS = 1.9  # in ln weight: how far a plant grows until a model's error on it is another; see error_of
SHARED = 8  # days that the scatter of all plants counts beside a plant's own
ODD_DAY, ODD_PLANT = 0.03, 0.001  # chance that a plant without fault is noted, by a day and by its scatter
FACTOR = 2  # between photos of a day, or scatters of plants, from which on they are hardly of one plant
NAMED, ODD = 12, "#D55E00"  # odd plants with their name in the picture, and their colour
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000"]  # of Okabe and Ito, told apart by all

logger = logging.getLogger("biomass")


def choose_columns(names, args):
    """Fill in the columns that no flag names, as predict.py and cross_validate.py write them."""
    args.value = args.value or next((name for name in names if name.startswith("predicted")), None)
    args.time = args.time or reading.time_column(None, names)
    kept = itertools.takewhile(lambda name: not name.startswith(("predicted", "measured")), names)  # before weights
    others = "filename", "fold", args.time, args.value, args.compare
    args.plant = args.plant or [name for name in kept if name not in others] or [None]
    args.plant = list(dict.fromkeys([*args.plant, *filter(None, [args.compare])]))
    for flag, columns in (("value", [args.value]), ("time", [args.time]), ("plant or --compare", args.plant)):
        if lost := [name for name in columns if name not in names]:
            fault = f"no column '{lost[0]}'" if lost[0] else f"no column that tells the {flag[:5]} by its name"
            raise UserError(f"{args.table} has {fault}: name one by --{flag}, of {', '.join(names[:20])}")
    args.unit = reading.unit_of(args.value)


def gather(table, args):
    """A row for each plant and day: time (days), mean, least and most weight, photos, and the model's error."""
    value = reading.to_numbers(table[args.value])
    days, args.dates = reading.to_days(table[args.time], args.table)
    rows = table[args.plant].apply(reading.to_ids).assign(time=days, weight=value, error=error_told(table, value, args))
    unknown, named = rows.drop(columns="error").isna().any(axis=1), ", ".join([*args.plant, args.time, args.value])
    for fault, bad in ((f"without one of {named}", unknown), (f"with {args.value} not above 0", value <= 0)):
        if bad.any():
            logger.info(f"dropped {bad.sum():,} rows {fault}, row {bad.idxmax() + 2} first")
    rows = rows[~unknown & (value > 0)].sort_values("time", kind="stable")
    by_day = rows.groupby([*args.plant, np.floor(rows["time"]).rename("day")], sort=False)
    ends = by_day["weight"].agg(photos="size", least="min", most="max")
    return by_day[["time", "weight", "error"]].mean().join(ends).reset_index()


def error_told(table, value, args):
    """One standard deviation of each weight's error, as its share, by low and high; 0 where the table lacks them."""
    ends = [next((name for name in (f"{end}_{args.unit}", end) if name in table), None) for end in ("low", "high")]
    of_others = any(name.startswith("predicted") and not args.value.startswith("predicted") for name in table)
    if None in ends or of_others or table[ends].isna().all(axis=None):
        logger.info(f"no low and high of {args.value}: intervals of growth lack errors that photos of a plant share")
        return 0.0
    low, high = (reading.to_numbers(table[end]).fillna(math.inf) for end in ends)
    return (high - low) / value / (2 * stats.norm.ppf((1 + args.coverage) / 2))


def fit_line(days):
    """The least-squares line of ln weight on days: slope, squares that are left, and their degrees of freedom."""
    times, logs = days["time"].to_numpy(), np.log(days["weight"].to_numpy())
    line = stats.linregress(times, logs)
    return line.slope, ((logs - line.intercept - line.slope * times) ** 2).sum(), len(times) - 2


def pool_scatter(fits):
    """Variance of a day around its plant's line, in the middle plant, as odd ones would double the mean; and its df."""
    variances = [squares / stats.chi2.median(freedom) for _, squares, freedom in fits]
    return max(float(np.median(variances or math.nan)), 1e-12), sum(freedom for *_, freedom in fits)  # less is rounding


def scatter_of(squares, freedom, pool):
    """Variance of a plant's days, from its own squares and the scatter of all plants, and its degrees of freedom."""
    shared = max(min(SHARED, pool[1] - freedom), 0)
    together = freedom + shared
    return max((squares + shared * pool[0]) / together, 1e-12) if together else math.nan, together


def error_of(contrast, days, slope, variance):
    """Standard error of a weighted sum of ln weights of a plant's days, which scatter independently, with `variance`.

    The model's errors have the size that low and high tell, and correlate by exp(-d^2 / 2 FORGETS^2) between days on
    which ln weight differs by d; FORGETS is what drawn pots need (tests/experiments/growth.py).
    """
    time, weighted = days["time"].to_numpy(), contrast * days["error"].to_numpy()
    alike = np.exp(-((slope * (time[:, None] - time) / FORGETS) ** 2) / 2)
    return math.sqrt(variance * (contrast**2).sum() + max(weighted @ alike @ weighted, 0))


def find_odd_day(days, pool):
    """Place of the day that lies off the line of the plant's other days, beyond all errors; None if none does."""
    chances, times, logs = [], days["time"].to_numpy(), np.log(days["weight"].to_numpy())
    for place in range(len(days)):
        slope, squares, freedom = fit_line(days.drop(days.index[place]))
        variance, freedom = scatter_of(squares, freedom, pool)
        from_here = np.vander(np.delete(times, place) - times[place], 2)
        contrast = np.insert(-np.linalg.pinv(from_here)[1], place, 1)  # less what the others' line gives here
        off = contrast @ logs / error_of(contrast, days, slope, variance)
        chances.append(2 * stats.t.sf(abs(off), freedom) * len(days))
    return int(np.argmin(chances)) if min(chances) < ODD_DAY else None


def judge_plant(days, pool, args):
    """What growth.csv says of a plant; a day that does not fit is named and left out of the line."""
    name = [f"{pd.to_datetime(time, unit='D'):%Y-%m-%d}" if args.dates else f"{time:g}" for time in days["time"]]
    row, notes = {"photos": days["photos"].sum(), "first": name[0], "last": name[-1]}, []
    for place in np.flatnonzero(days["most"] > FACTOR * days["least"])[:1]:
        notes.append(f"photos of {name[place]} differ more than {FACTOR}-fold: one name for two plants?")
    odd = find_odd_day(days, pool) if len(days) > 2 else None
    if odd is not None:
        notes.append(f"{name[odd]} does not fit, left out: mistaken for another plant?")
        days = days.drop(days.index[odd])
    row |= rate_of(days, pool, notes) if len(days) > 1 else {"growth_rate": math.nan}
    return row | {"note": "; ".join(notes if len(days) > 1 else [*notes, "photos of one day only"])}


def rate_of(days, pool, notes):
    """Growth rate a day with its 95 % interval, doubling time and gain; adds to the notes what they tell."""
    rate, squares, freedom = fit_line(days)
    if freedom and stats.chi2.sf(squares / pool[0] / FACTOR**2, freedom) < ODD_PLANT:
        times = math.sqrt(squares / freedom / pool[0])
        notes.append(f"scatters {times:.1f} times as far around its line as others: several plants?")
    variance, freedom = scatter_of(squares, freedom, pool)
    share = np.linalg.pinv(np.vander(days["time"] - days["time"].mean(), 2))[0]  # of each day in the slope
    reach = stats.t.ppf(0.975, freedom) * error_of(share, days, rate, variance)
    if not math.isfinite(reach):
        notes.append("no interval: it needs a plant with three days, and finite low and high")
        reach = math.nan
    if rate + reach < 0:
        notes.append("loses weight: harvested, wilted, or mistaken for another?")
    row = {"growth_rate": rate, "growth_rate_low": rate - reach, "growth_rate_high": rate + reach}
    row["doubling_days"] = math.log(2) / rate if rate > reach else math.nan  # it may not grow at all
    return row | {"gain": stats.linregress(days["time"], days["weight"]).slope}


def compare(plants, column):
    """A line for each pair of groups: how far their growth rates differ; Welch's t by plants, with Bonferroni."""
    groups = [(name, rows["growth_rate"].dropna()) for name, rows in plants.groupby(column)]
    pairs = list(itertools.combinations(groups, 2))
    for (first, one), (second, other) in pairs:
        told = "not compared, a group needs two plants with a growth rate"
        if min(len(one), len(other)) > 1:
            low, high = stats.ttest_ind(other, one, equal_var=False).confidence_interval(1 - 0.05 / len(pairs))
            told = f"{other.mean() - one.mean():+.4f} a day (95 % interval {low:+.4f} to {high:+.4f})"
            told += ", they differ" if low * high > 0 else ", no difference can be told"
        yield f"{column} {second} (n = {len(other)}) - {first} (n = {len(one)}): {told}"


def mean_interval(weights):
    logs = np.log(weights)
    return np.exp(stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs)))


def draw_growth(days, plants, drawn, args):
    import seaborn

    figure, start = writing.new_figure(None, (5, 4.2), drawn), days["day"].min() if args.dates else 0
    days = days.merge(plants[[*args.plant, "note"]]).assign(name=days[args.plant].agg(" ".join, axis=1))
    days[["time", "day"]] -= start
    counts = plants[args.compare].value_counts() if args.compare else {}
    days["group"] = (
        [f"{writing.plain(name)}, n = {counts[name]}" for name in days[args.compare]] if args.compare else ""
    )
    groups = sorted(days["group"].unique())
    palette = (COLOURS * len(groups))[: len(groups)] if args.compare else ["#777777"]
    look = {"y": "weight", "hue": "group", "hue_order": groups, "palette": palette, "ax": figure.subplots()}
    axis = seaborn.lineplot(days, x="time", units="name", estimator=None, lw=0.5, alpha=0.5, legend=False, **look)
    if args.compare:
        shared = days.groupby(["group", "day"]).filter(lambda plants: len(plants) > 2)
        seaborn.lineplot(shared, x="day", estimator=stats.gmean, errorbar=mean_interval, lw=2, **look)
        axis.legend(title=f"mean by {writing.plain(args.compare)}, 95 % interval", fontsize=8, title_fontsize=8)
    odd = list(days[days["note"] != ""].groupby("name"))
    for name, own in odd[:NAMED]:
        axis.plot(own["time"], own["weight"], color=ODD, lw=1.2)
        axis.annotate(writing.plain(name), own[["time", "weight"]].iloc[-1], color=ODD, fontsize=7)
    label = f"{args.value.removesuffix(f'_{args.unit}')}{writing.in_brackets(args.unit)}, log scale"
    xlabel = f"days since {pd.to_datetime(start, unit='D'):%Y-%m-%d}" if args.dates else f"{args.time} (days)"
    axis.set(yscale="log", ylabel=writing.plain(label), xlabel=xlabel)
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_title(f"n = {len(plants):,} plants, {len(odd):,} with a note{', some named' * bool(odd)}", fontsize=10)
    writing.save_figure(figure, args.out.with_suffix(".png"), dpi=200)


def log_growth(plants, pool, args):
    logger.info(f"{len(plants):,} plants: growth rate {plants['growth_rate'].median():.4f} a day in the middle plant")
    for line in compare(plants, args.compare) if args.compare else ():
        logger.info(line)
    for plant in plants[plants["note"] != ""].to_dict("records"):
        logger.info(f"{' '.join(plant[name] for name in args.plant)}: {plant['note']}")
    if (factor := math.exp(math.sqrt(pool[0]))) > 1.5:
        text = "as of harvested plants, or of several with one name: --plant tells what a plant is"
        logger.info(f"warning: days lie off their plant's line by a factor of {factor:.2f}, {text}")


def build_parser():
    parser = writing.new_parser("growth.py", __doc__)
    add = parser.add_argument
    add("table", type=reading.a_path, help="of predict.py or cross_validate.py, or any with plants, times and weights")
    add("--plant", nargs="+", metavar="COLUMN", help="together name a plant (default: those that the table keeps)")
    add("--time", metavar="COLUMN", help="dates, ISO times, Unix seconds or days (default: timestamp, else age_days)")
    add("--value", metavar="COLUMN", help="weight (default: the predicted one)")
    add("--compare", metavar="COLUMN", help="groups of plants, say treatment, whose growth is compared")
    add("--coverage", type=writing.number(float, 0, 1, ends=False), default=0.9, help="share that low to high hold")
    add("--out", type=reading.a_path, default="growth.csv", help="table; the picture lies beside it, as .png")
    return parser


def tell_growth(argv, started):
    """The whole run, from the flags to the table and the picture; returns the exit status."""
    args = build_parser().parse_args(argv)
    writing.check_writable([args.out, args.out.with_suffix(".png")], [args.table], None)
    table = reading.read_table(args.table)
    choose_columns(list(table), args)
    days = gather(table, args)
    lines = dict(list(days.groupby(args.plant, sort=False)))
    if all(len(own) < 2 for own in lines.values()):
        raise UserError(f"{args.table}: no plant (by --plant {' '.join(args.plant)}) has photos of two days")
    pool = pool_scatter([fit_line(own) for own in lines.values() if len(own) > 2])
    rows = [dict(zip(args.plant, plant, strict=True)) | judge_plant(own, pool, args) for plant, own in lines.items()]
    plants = pd.DataFrame(rows).rename(columns={"gain": f"gain_a_day_{args.unit}".rstrip("_")})
    log_growth(plants, pool, args)
    with writing.whole_file(args.out) as partial:
        plants.to_csv(partial, index=False, float_format="%.6g")
    draw_growth(days, plants, "drawn_data" in table, args)
    return 0


def main(argv=None):
    return writing.run_script("growth.py", tell_growth, argv)


if __name__ == "__main__":
    sys.exit(main())

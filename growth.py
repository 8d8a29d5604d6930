"""Tell how fast each plant grows, from weights that were read from its photos on several days.

    python growth.py predictions.csv                                     the table of predict.py or cross_validate.py
    python growth.py predictions.csv --plant experiment_id plant_number --compare treatment
    python growth.py weights.xlsx --plant pot --time date --value fresh_weight

Writes growth.csv, a row a plant: photos, first and last day, growth_rate (relative, a day: the slope of ln weight on
days) with a 95 % interval, doubling_days (if it surely grows), gain_a_day and a note on what is odd; and growth.png.

The interval has two parts. Errors of single days show as scatter around a plant's line. Those that the photos of a
plant share do not: one that is the same on all days cancels in the slope, but a model errs differently on a plant that
has grown. How far it errs, `low` and `high` of the predictions tell; error_of says how alike the errors are.
"""

import itertools
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from biomass import reading, writing
from biomass.reading import UserError

FORGETS = 1.7  # in ln weight: how far a plant grows until the model's error on it is another; see experiments/growth.py
SHARED = 8  # days that the scatter of all plants counts beside a plant's own
ODD_DAY, ODD_PLANT = 0.01, 0.001  # chance that a plant without fault is noted, by a day and by its scatter
FACTOR = 2  # between photos of one plant and day from which on they are hardly of one plant
WIDE = math.log(1.5)  # scatter of days from which on they are hardly of plants that stay
EXACT = 1e-12  # variance of ln weight below which it is rounding
NAMED = 12  # odd plants with their name in the picture
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000"]  # of Okabe and Ito, told apart by all
ODD, OTHERS = "#D55E00", "#777777"

logger = logging.getLogger("biomass")


# ---------------------------------------------------------------- the table


def choose_columns(names, args):
    """Fill in the columns that no flag names, as predict.py and cross_validate.py write them."""
    args.value = args.value or next((name for name in names if name.startswith("predicted")), None)
    args.time = args.time or reading.time_column(None, names)
    ours = "filename" in names and args.value in names
    kept = names[names.index("filename") + 1 : names.index(args.value)] if ours else []
    no_plant = [args.time, "fold", *(name for name in names if name.startswith("measured"))]
    args.plant = args.plant or [name for name in kept if name not in no_plant] or [None]
    chosen = {"--value": [args.value], "--time": [args.time], "--plant": args.plant, "--compare": [args.compare]}
    for flag, columns in chosen.items():
        lost = [name for name in columns if name not in names and (name or flag != "--compare")]
        if lost:
            fault = f"no column '{lost[0]}'" if lost[0] else f"none of the columns that {flag} stands for by itself"
            raise UserError(f"{args.table} has {fault}: pass {flag} with some of {', '.join(names[:20])}")
    args.plant = list(dict.fromkeys([*args.plant, *filter(None, [args.compare])]))
    predicted = args.value.startswith("predicted")
    args.unit = args.value.removeprefix("predicted").strip("_") if predicted else reading.unit_of(args.value)


def gather(table, args):
    """A row for each plant and day: time (days), mean, least and most weight, photos, and the model's error.

    The error is one standard deviation, as a share of the weight; 0 where the table tells none.
    """
    value = reading.to_numbers(table[args.value])
    days, args.dates = reading.to_days(table[args.time], args.table)
    rows = table[args.plant].apply(reading.to_ids).assign(time=days, weight=value, error=error_told(table, value, args))
    faults = {f"without {name}": rows[name].isna() for name in args.plant} | {f"without {args.time}": days.isna()}
    faults |= {f"without {args.value}": value.isna(), f"with {args.value} not above 0": value <= 0}
    for fault, bad in faults.items():
        if bad.any():
            logger.info(f"dropped {bad.sum():,} rows {fault}, row {bad.idxmax() + 2} first")
    rows = rows[~np.logical_or.reduce([*faults.values()])].sort_values([*args.plant, "time"])
    by_day = rows.groupby([*args.plant, np.floor(rows["time"]).rename("day")], sort=False)
    numbers = {"photos": ("weight", "size"), "least": ("weight", "min"), "most": ("weight", "max")}
    return by_day.agg(
        time=("time", "mean"), weight=("weight", "mean"), error=("error", "mean"), **numbers
    ).reset_index()


def error_told(table, value, args):
    """What low and high of the predictions tell of each one's error, as one standard deviation's share of it."""
    ends = [next((name for name in table if name.startswith(end)), None) for end in ("low", "high")]
    of_others = not args.value.startswith("predicted") and any(name.startswith("predicted") for name in table)
    if None in ends or of_others or table[ends].isna().all(axis=None):
        text = f"no low and high of {args.value}: the intervals hold what differs between days"
        logger.info(f"{text}, and nothing of errors that the photos of a plant share")
        return 0.0
    low, high = (reading.to_numbers(table[end]).fillna(math.inf) for end in ends)
    return (high - low) / value / (2 * stats.norm.ppf((1 + args.coverage) / 2))


# ---------------------------------------------------------------- a plant's line and its errors


def fit_line(days):
    """The least-squares line of ln weight on days: slope, squares that are left, and their degrees of freedom."""
    logs, days = np.log(days["weight"]), days["time"]
    line = stats.linregress(days, logs)
    return line.slope, float(((logs - line.intercept - line.slope * days) ** 2).sum()), len(days) - 2


def pool_scatter(fits):
    """Variance of a day around its plant's line, in the middle plant, as odd ones would double the mean; and its df."""
    known = [(squares / stats.chi2.median(df), df) for _, squares, df in fits if df > 0]
    variances, freedom = zip(*known, strict=True) if known else ([math.nan], [0])
    return max(float(np.median(variances)), EXACT), sum(freedom)


def scatter_of(squares, freedom, pool):
    """Variance of a plant's days, from its own squares and the scatter of all plants, and its degrees of freedom."""
    variance, days = pool
    shared = max(min(SHARED, days - freedom), 0)
    together = freedom + shared
    return max((squares + shared * variance) / together, EXACT) if together else math.nan, together


def error_of(contrast, days, slope, variance):
    """Standard error of a weighted sum of ln weights of a plant's days.

    Days scatter independently, with `variance`. The model's errors have the size that low and high tell, and the
    correlation of a Gaussian process, exp(-d^2 / 2 FORGETS^2), between days on which ln weight differs by d.
    """
    time, weighted = days["time"].to_numpy(), contrast * days["error"].to_numpy()
    alike = np.exp(-((slope * (time[:, None] - time) / FORGETS) ** 2) / 2)
    return math.sqrt(variance * (contrast**2).sum() + max(weighted @ alike @ weighted, 0))


def shares(times):
    """How much each day's ln weight counts in the slope of a line."""
    return (times - times.mean()) / ((times - times.mean()) ** 2).sum()


def find_odd_day(days, pool):
    """Place of the day that lies off the line of the plant's other days, beyond all errors; None if none does."""
    chances, times, logs = [], days["time"].to_numpy(), np.log(days["weight"].to_numpy())
    for place in range(len(days)):
        slope, squares, freedom = fit_line(days.drop(days.index[place]))
        variance, freedom = scatter_of(squares, freedom, pool)
        others = np.delete(times, place)
        contrast = np.insert(-1 / len(others) - (times[place] - others.mean()) * shares(others), place, 1)
        off = contrast @ logs / error_of(contrast, days, slope, variance)
        chances.append(2 * stats.t.sf(abs(off), freedom) * len(days))
    return int(np.argmin(chances)) if min(chances) < ODD_DAY else None


# ---------------------------------------------------------------- a row a plant


def judge_plant(days, pool, args):
    """What growth.csv says of a plant; a day that does not fit is named and left out of the line."""
    name = [
        f"{pd.Timestamp(0) + pd.Timedelta(days=time):%Y-%m-%d}" if args.dates else f"{time:g}" for time in days["time"]
    ]
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
    if freedom and stats.chi2.sf(squares / pool[0], freedom) < ODD_PLANT:
        times = math.sqrt(squares / freedom / pool[0])
        notes.append(f"scatters {times:.1f} times as far around its line as others: several plants?")
    variance, freedom = scatter_of(squares, freedom, pool)
    reach = stats.t.ppf(0.975, freedom) * error_of(shares(days["time"].to_numpy()), days, rate, variance)
    if not math.isfinite(reach):
        notes.append("no interval: it needs a plant with three days, and finite low and high")
        reach = math.nan
    if rate + reach < 0:
        notes.append("loses weight: harvested, wilted, or mistaken for another?")
    row = {"growth_rate": rate, "growth_rate_low": rate - reach, "growth_rate_high": rate + reach}
    row |= {"doubling_days": math.log(2) / rate if rate - reach > 0 else math.nan}  # else it may not grow at all
    return row | {"gain": stats.linregress(days["time"], days["weight"]).slope}


# ---------------------------------------------------------------- all plants, and groups of them


def compare(plants, column):
    """A line for each pair of groups: how far their growth rates differ; Welch's t by plants, with Bonferroni."""
    groups = [(name, rows["growth_rate"].dropna()) for name, rows in plants.groupby(column)]
    pairs = list(itertools.combinations(groups, 2))
    for (first, one), (second, other) in pairs:
        both = f"{column} {second} ({len(other)} plants) against {first} ({len(one)})"
        if min(len(one), len(other)) < 2:
            yield f"{both}: not compared, a group needs two plants with a growth rate"
            continue
        low, high = stats.ttest_ind(other, one, equal_var=False).confidence_interval(1 - 0.05 / len(pairs))
        verdict = "they differ" if low * high > 0 else "no difference can be told"
        difference = f"{other.mean() - one.mean():+.4f} a day, 95 % interval {low:+.4f} to {high:+.4f}"
        yield f"{both}: growth rate {difference}; {verdict}"


def plot_mean(days, colour, label, axis):
    """Geometric mean of plants by day, with its 95 % interval as a band, where three plants or more have the day."""
    logs = np.log(days["weight"]).groupby(days["day"]).agg(["mean", "sem", "size"]).query("size > 2")
    reach = stats.t.ppf(0.975, logs["size"] - 1) * logs["sem"]
    axis.plot(logs.index, np.exp(logs["mean"]), color=colour, linewidth=2, label=label)
    axis.fill_between(logs.index, np.exp(logs["mean"] - reach), np.exp(logs["mean"] + reach), color=colour, alpha=0.25)


def draw_growth(days, plants, drawn, args):
    figure = writing.new_figure(None, (5, 4.2), drawn)
    axis, names, start = figure.subplots(), [], days["day"].min() if args.dates else 0
    days = days.assign(time=days["time"] - start, day=days["day"] - start).merge(plants[[*args.plant, "note"]])
    names = sorted(days[args.compare].unique()) if args.compare else []
    colours = dict(zip(names, COLOURS, strict=False))
    for number, (plant, own) in enumerate(
        sorted(days.groupby(args.plant), key=lambda one: one[1]["note"].iloc[0] == "")
    ):
        odd = own["note"].iloc[0] != ""
        colour = colours.get(own[args.compare].iloc[0]) if names else ODD if odd else OTHERS
        axis.plot(own["time"], own["weight"], color=colour, linewidth=1.2 if odd else 0.5, alpha=1 if odd else 0.5)
        if odd and number < NAMED:
            last, text = own[["time", "weight"]].iloc[-1], writing.plain(" ".join(plant))
            axis.annotate(text, last, (3, -3), textcoords="offset points", color=colour, fontsize=7)
    for name in names:
        count = (plants[args.compare] == name).sum()
        plot_mean(days[days[args.compare] == name], colours[name], f"{writing.plain(name)}, n = {count}", axis)
    if names:
        axis.legend(
            title=f"mean of each {writing.plain(args.compare)}\nband: its 95 % interval", fontsize=8, title_fontsize=8
        )
    since = f"days since {pd.Timestamp(0) + pd.Timedelta(days=start):%Y-%m-%d}"
    unit = f" ({args.unit})" if args.unit else ""
    axis.set(
        yscale="log", ylabel=f"{writing.plain(args.value)}{unit}", xlabel=since if args.dates else f"{args.time} (days)"
    )
    axis.set_title(f"n = {len(plants):,} plants, {(plants['note'] != '').sum():,} with a note (named)", fontsize=10)
    writing.save_figure(figure, args.out.with_suffix(".png"), dpi=200)


# ---------------------------------------------------------------- the run


def build_parser():
    parser = writing.new_parser("growth.py", __doc__)
    add = parser.add_argument
    add("table", type=Path, help="of predict.py or cross_validate.py, or any with plants, times and weights")
    add("--plant", nargs="+", metavar="COLUMN", help="together name a plant (default: those that the table keeps)")
    add("--time", metavar="COLUMN", help="dates, ISO times, Unix seconds or days (default: timestamp, else age_days)")
    add("--value", metavar="COLUMN", help="weight (default: the predicted one)")
    add("--compare", metavar="COLUMN", help="groups of plants, say treatment, whose growth is compared")
    add("--coverage", type=writing.number(float, 0, 1, ends=False), default=0.9, help="share that low to high hold")
    add("--out", type=Path, default="growth.csv", help="table; the picture lies beside it, as .png")
    return parser


def tell_growth(argv, started):
    """The whole run, from the flags to the table and the picture; returns the exit status."""
    args = build_parser().parse_args(argv)
    writing.check_writable([args.out, args.out.with_suffix(".png")], [args.table], None)
    table = reading.read_table(args.table)
    choose_columns(list(table), args)
    days = gather(table, args)
    lines = {plant: own for plant, own in days.groupby(args.plant, sort=False)}
    if all(len(own) < 2 for own in lines.values()):
        text = f"{args.table}: each of {len(lines):,} plants has photos of one day, growth needs two"
        raise UserError(f"{text}; --plant names the columns that tell plants apart (now {' '.join(args.plant)})")
    pool = pool_scatter([fit_line(own) for own in lines.values() if len(own) > 1])
    rows = [dict(zip(args.plant, plant, strict=True)) | judge_plant(own, pool, args) for plant, own in lines.items()]
    plants = pd.DataFrame(rows)
    log_growth(plants, pool, args)
    with writing.whole_file(args.out) as partial:
        named = plants.rename(columns={"gain": f"gain_a_day_{args.unit}".rstrip("_")})
        named.to_csv(partial, index=False, float_format="%.6g")
    draw_growth(days, plants, "drawn_data" in table, args)
    return 0


def log_growth(plants, pool, args):
    low, middle, high = plants["growth_rate"].quantile([0.25, 0.5, 0.75])
    rates = f"growth rate {middle:.4f} a day in the middle plant, {low:.4f} to {high:.4f} in half of them"
    logger.info(f"{len(plants):,} plants, {plants['photos'].sum():,} photos: {rates}")
    for line in compare(plants, args.compare) if args.compare else ():
        logger.info(line)
    for plant in plants[plants["note"] != ""].to_dict("records"):
        logger.info(f"{' '.join(plant[name] for name in args.plant)}: {plant['note']}")
    if pool[0] > WIDE**2:
        text = f"warning: the days of a plant scatter by a factor of {math.exp(math.sqrt(pool[0])):.2f} around its line"
        logger.info(f"{text}: plants that were harvested, or share a name, have no growth; name all columns in --plant")


def main(argv=None):
    return writing.run_script("growth.py", tell_growth, argv)


if __name__ == "__main__":
    sys.exit(main())

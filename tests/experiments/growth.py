"""Do the growth rates of growth.py hold? On drawn pots that stay, and on real pigs: results/growth.json and growth.png.

    python tests/experiments/growth.py --model models/biomass_cross_validated.pt --real ../shared/real/pigs

The model is one of cross_validate.py on the usual drawn set. It weighs 60 pots on ten days each, drawn by the functions
of make_sample_data.py: a pot grows from its own smaller self by a rate of its own, turned and lit a little differently
each day. Measured are how often the 95 % intervals hold the true rates, how wide they are beside the width that would
just hold 95 %, and how many of 20 plants are noted of which one day is exchanged with that of another plant, at least
twice as heavy or as light. The pigs are weighed by folds by pig, and their growth compared with that of the scales.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ImageEnhance

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import cross_validate  # noqa: E402
import growth  # noqa: E402
import make_sample_data as drawing  # noqa: E402
import predict  # noqa: E402
import train_model as tm  # noqa: E402
from biomass import writing  # noqa: E402

POTS, DAYS, EXCHANGED, REPEATS = 60, 10, 20, 10
LIGHTEST, SLOWEST, FASTEST = 0.25, 0.06, 0.22  # g on the last day; growth rates a day
TURN, LIGHT = 0.15, 0.04  # standard deviations: rad, and ln of the brightness


def call(script, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        if script.main([*map(str, flags)]):
            raise SystemExit(f"{script.__name__} has failed")


# ---------------------------------------------------------------- drawn pots


def draw_pots(folder, seed):
    """Photos of pots that stay, and their sheet with the true weights and rates."""
    random, rows = np.random.default_rng([seed, POTS]), []
    plants = drawing.grow(1000, seed)
    chosen = plants[plants["expected"] > LIGHTEST].sample(POTS, random_state=seed)
    (folder / "images_med_res").mkdir()
    for number, (index, plant) in enumerate(chosen.iterrows(), start=1):
        rate = random.uniform(SLOWEST, FASTEST)
        for day in range(DAYS):
            weight = plant["expected"] * np.exp(-rate * (DAYS - 1 - day))
            area = (weight / drawing.ALLOMETRY * np.exp(-plant["thickness"])) ** (1 / drawing.EXPONENT)
            turned = plant["start_angle"] + random.normal(0, TURN)
            today = plant.to_dict() | {"expected": weight, "leaf_area": area, "start_angle": turned}
            today |= {"plant_number": number, "age": plant["age"] - (DAYS - 1 - day)}
            photo = ImageEnhance.Brightness(drawing.draw_photo(today, seed, index))
            name = f"{number:02d}_{day}.png"
            photo.enhance(np.exp(random.normal(0, LIGHT))).save(folder / "images_med_res" / name, **drawing.PNG)
            rows.append({"filename": name, "plant_number": number, "timestamp": f"2024-05-{day + 1:02d}"})
            rows[-1] |= {"rate": rate, "fresh_weight_total": weight}
    sheet = pd.DataFrame(rows)
    drawing.write_expected_weights(sheet.assign(expected=sheet["fresh_weight_total"]), folder / drawing.EXPECTED)
    sheet.to_csv(folder / "pots.csv", index=False)
    return sheet


def exchange(table, random):
    """The table with days of EXCHANGED plants exchanged in pairs, and the plants."""
    table, weights = table.copy(), table.pivot(index="plant_number", columns="timestamp", values="predicted_g")
    numbers, free = ["predicted_g", "low_g", "high_g"], list(random.permutation(weights.index))
    exchanged = []
    while len(exchanged) < EXCHANGED:
        one, day = free.pop(), random.choice(weights.columns)
        ratios = weights.loc[free, day] / weights.loc[one, day]
        others = ratios[(ratios >= 2) | (ratios <= 0.5)].index
        if len(others):
            other = random.choice(others)
            free.remove(other)
            exchanged += [one, other]
            of_day = table["timestamp"] == day
            rows = [table.index[of_day & (table["plant_number"] == plant)][0] for plant in (one, other)]
            table.loc[rows, numbers] = table.loc[rows[::-1], numbers].to_numpy()
    return table, exchanged


def judge_rates(rates, low, high, truth):
    """Coverage and median width of intervals, beside the width at which as wide intervals would just hold 95 %."""
    width, needed = high - low, 2 * float((rates - truth).abs().quantile(0.95))
    held = {"coverage": float(truth.between(low, high).mean()), "median_width": float(width.median())}
    return held | {"width_that_holds_95": needed, "times_as_wide": float(width.median()) / needed}


def judge_pots(args, folder):
    sheet = draw_pots(folder, args.seed)
    places = ["--labels_path", folder / "pots.csv", "--image_dir", folder / "images_med_res"]
    call(predict, "--model", args.model, *places, "--out", folder / "p.csv", "--cache_dir", args.cache_dir)
    table = pd.read_csv(folder / "p.csv")
    call(growth, folder / "p.csv", "--out", folder / "g.csv")
    found = pd.read_csv(folder / "g.csv").set_index("plant_number")
    found["truth"] = sheet.groupby("plant_number")["rate"].first()
    ends = found["growth_rate"], found["growth_rate_low"], found["growth_rate_high"]
    result = {"plants": POTS, "days": DAYS} | judge_rates(*ends, found["truth"])
    result["noted_unexchanged"] = float(found["note"].notna().mean())
    noted, others = [], []
    for repeat in range(REPEATS):
        changed, plants = exchange(table, np.random.default_rng([args.seed, repeat]))
        changed.to_csv(folder / "x.csv", index=False)
        call(growth, folder / "x.csv", "--out", folder / "xg.csv")
        has_note = pd.read_csv(folder / "xg.csv").set_index("plant_number")["note"].notna()
        noted.append(has_note[plants].mean())
        others.append(has_note.drop(plants).mean())
    return result | {"noted_of_exchanged": float(np.mean(noted)), "noted_of_others": float(np.mean(others))}, found


# ---------------------------------------------------------------- real pigs


def judge_pigs(args, folder):
    flags = ["--labels_path", args.real / "labels.csv", "--image_dir", args.real / "images", "--target", "weight_kg"]
    flags += ["--group_by", "pig", "--time_column", "date", "--recipe", "recommended", "--no_erasing"]
    flags += ["--results_dir", folder / "cv", "--log_path", folder / "log", "--model_out", folder / "m.pt"]
    call(cross_validate, *flags, "--cache_dir", args.cache_dir)
    tables = {}
    for value in ("predicted", "measured"):
        column = next(name for name in pd.read_csv(folder / "cv" / "predictions.csv") if name.startswith(value))
        call(growth, folder / "cv" / "predictions.csv", "--time", "date", "--value", column, "--out", folder / "g.csv")
        tables[value] = pd.read_csv(folder / "g.csv").set_index("pig")
        tables[value]["gain"] = tables[value].filter(like="gain").iloc[:, 0]
    predicted, measured = tables["predicted"], tables["measured"]
    ends = predicted["growth_rate"], predicted["growth_rate_low"], predicted["growth_rate_high"]
    result = {"pigs": len(predicted), "photos": int(predicted["photos"].sum())}
    result |= judge_rates(*ends, measured["growth_rate"])
    result["growth_rate_r"] = float(predicted["growth_rate"].corr(measured["growth_rate"]))
    result["gain_r"] = float(predicted["gain"].corr(measured["gain"]))
    result |= {f"gain_kg_a_day_{name}": float(table["gain"].mean()) for name, table in tables.items()}
    result["noted"] = float(predicted["note"].notna().mean())
    return result, predicted.assign(truth=measured["growth_rate"])


# ---------------------------------------------------------------- the report


def draw(tables, path):
    """Growth rates by growth.py against the true ones, with their 95 % intervals."""
    figure = writing.new_figure(None, (6.5, 3.4))
    for axis, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        low, high = table["growth_rate"] - table["growth_rate_low"], table["growth_rate_high"] - table["growth_rate"]
        style = {"fmt": "o", "markersize": 3, "linewidth": 0.8, "color": "#0072B2", "label": "95 % interval"}
        axis.errorbar(table["truth"], table["growth_rate"], [low, high], **style)
        axis.axline((table["truth"].mean(),) * 2, slope=1, color="black", linewidth=1, label="equality")
        axis.set(xlabel="true growth rate (1/day)", ylabel="growth rate from photos (1/day)")
        axis.set_title(f"{name}, n = {len(table)}", fontsize=10)
        axis.legend(fontsize=8)
    writing.save_figure(figure, path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "biomass_cross_validated.pt")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="with labels.csv and images of the pigs")
    parser.add_argument("--seed", type=int, default=24)
    parser.add_argument("--cache_dir", default="none")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of growth.json and growth.png")
    args = parser.parse_args()
    result = {"commit": tm.git("rev-parse", "HEAD")}
    with tempfile.TemporaryDirectory() as pots, tempfile.TemporaryDirectory() as pigs:
        result["drawn"], table = judge_pots(args, Path(pots))
        tables = {"drawn pots, not measured": table}
        if args.real:
            result["pigs"], tables["real pigs, by scales"] = judge_pigs(args, Path(pigs))
    draw(tables, args.out / "growth.png")
    (args.out / "growth.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

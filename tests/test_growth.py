"""growth.py: growth as NumPy gives it, intervals that hold, notes on what is odd, one line on a mistake."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import growth
from biomass import writing

DAYS = np.arange(8)


def grow(plants=12, seed=0, scatter=0.04, **columns):
    """A table as of predict.py: plants that grow by rates of their own, one photo a day; their rates are its attrs."""
    random, rows = np.random.default_rng(seed), []
    rates = random.uniform(0.05, 0.2, plants)
    for plant, rate in enumerate(rates, start=1):
        weights = random.uniform(0.05, 0.3) * np.exp(rate * DAYS + random.normal(0, scatter, len(DAYS)))
        rows += [{"plant_number": plant, "day": day, "predicted_g": w} for day, w in zip(DAYS, weights, strict=True)]
    table = pd.DataFrame(rows)
    table.insert(0, "filename", [f"{row}.png" for row in range(len(table))])
    table.insert(2, "timestamp", [f"2024-05-{day + 1:02d}" for day in table.pop("day")])
    table = table.assign(low_g=0.8 * table["predicted_g"], high_g=1.2 * table["predicted_g"], **columns)
    table.attrs["rates"] = rates.tolist()
    return table


def judge(table, folder, *flags, name="p.csv"):
    """growth.csv of a table, by plant."""
    table.to_csv(folder / name, index=False)
    assert growth.main([folder / name, "--out", folder / "growth.csv", *flags]) == 0
    return pd.read_csv(folder / "growth.csv")


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(writing, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def test_rates_doublings_and_gains_are_those_of_numpy(tmp_path):
    table = grow()
    found = judge(table, tmp_path).set_index("plant_number")
    assert list(found.columns) == [
        *("photos", "first", "last", "growth_rate", "growth_rate_low", "growth_rate_high"),
        *("doubling_days", "gain_a_day_g", "note"),
    ]
    for plant, rows in table.groupby("plant_number"):
        rate = np.polyfit(DAYS, np.log(rows["predicted_g"]), 1)[0]
        assert found.loc[plant, "growth_rate"] == pytest.approx(rate, rel=1e-4)
        assert found.loc[plant, "gain_a_day_g"] == pytest.approx(np.polyfit(DAYS, rows["predicted_g"], 1)[0], rel=1e-4)
        assert found.loc[plant, "growth_rate_low"] < rate < found.loc[plant, "growth_rate_high"]
    sure = found[found["growth_rate_low"] > 0]
    assert sure["doubling_days"].to_numpy() == pytest.approx(np.log(2) / sure["growth_rate"].to_numpy(), rel=1e-3)
    assert found["first"].eq("2024-05-01").all() and found["last"].eq("2024-05-08").all()
    assert found["photos"].eq(len(DAYS)).all() and found["note"].isna().all()


def test_without_errors_of_the_model_the_interval_is_the_textbooks(tmp_path):
    table = grow(plants=1).drop(columns=["low_g", "high_g"])
    found = judge(table, tmp_path).iloc[0]
    line = stats.linregress(DAYS, np.log(table["predicted_g"]))
    reach = stats.t.ppf(0.975, len(DAYS) - 2) * line.stderr
    assert found["growth_rate_high"] - found["growth_rate"] == pytest.approx(reach, rel=1e-3)


def test_intervals_hold_with_the_models_error_and_not_without(tmp_path):
    table, random = grow(plants=60, seed=1), np.random.default_rng(2)
    number, logs = table["plant_number"] - 1, np.log(table["predicted_g"])
    error = 0.15
    shared, steeper = random.normal(0, 1, 60)[number], random.normal(0, error / growth.FORGETS, 60)[number]
    table["predicted_g"] = np.exp(logs + shared + steeper * (logs - logs.mean()))
    reach = stats.norm.ppf(0.95) * error * table["predicted_g"]
    table = table.assign(low_g=table["predicted_g"] - reach, high_g=table["predicted_g"] + reach)
    held = {}
    for name, part in {"with": table, "without": table.drop(columns=["low_g", "high_g"])}.items():
        found = judge(part, tmp_path)
        truth = np.array(table.attrs["rates"])[found["plant_number"] - 1]
        held[name] = np.mean((found["growth_rate_low"] < truth) & (truth < found["growth_rate_high"]))
    assert 0.9 <= held["with"] <= 0.99 and held["without"] < 0.85, held


def test_a_wider_promise_means_a_smaller_error(tmp_path):
    table = grow()
    narrow, wide = (judge(table, tmp_path, "--coverage", share) for share in (0.99, 0.5))
    width = [(found["growth_rate_high"] - found["growth_rate_low"]).median() for found in (narrow, wide)]
    assert width[1] > 1.5 * width[0]


def test_an_exchanged_day_is_named_and_left_out(tmp_path, figures):
    table = grow()
    place = table.index[(table["plant_number"] == 3) & (table["timestamp"] == "2024-05-04")]
    table.loc[place, ["predicted_g", "low_g", "high_g"]] *= 2
    found = judge(table, tmp_path).set_index("plant_number")
    assert found["note"].dropna().to_dict() == {3: "2024-05-04 does not fit, left out: mistaken for another plant?"}
    rows = table[table["plant_number"] == 3].drop(place)
    rate = np.polyfit(np.delete(DAYS, 3), np.log(rows["predicted_g"]), 1)[0]
    assert found.loc[3, "growth_rate"] == pytest.approx(rate, rel=1e-4)
    axis = figures[0].axes[0]
    assert [text.get_text() for text in axis.texts] == ["3"] and "12 plants, 1 with a note" in axis.get_title()


def test_plants_that_lose_weight_scatter_or_share_a_name_are_noted(tmp_path):
    table = grow(plants=20, seed=3)
    of = table["plant_number"]
    table.loc[of == 1, "predicted_g"] = 0.5 * np.exp(-0.2 * DAYS)
    table.loc[of == 2, "predicted_g"] *= np.tile([1, 3], 4)
    twice = table[of == 3].assign(predicted_g=5.0)
    table.loc[(of == 4) & (table["timestamp"] > "2024-05-01"), "plant_number"] = np.nan
    table = pd.concat([table, twice.head(1)])
    table[["low_g", "high_g"]] = table[["predicted_g"]].to_numpy() * [0.9, 1.1]
    found = judge(table, tmp_path).set_index("plant_number")
    note, unsure = found["note"].fillna(""), found["growth_rate_low"] <= 0
    assert unsure[2] and found.loc[unsure, "doubling_days"].isna().all()
    assert note[1] == "loses weight: harvested, wilted, or mistaken for another?"
    assert "times as far around its line as others: several plants?" in note[2]
    assert "photos of 2024-05-01 differ more than 2-fold: one name for two plants?" in note[3]
    assert note[4] == "photos of one day only" and (note.drop([1, 2, 3, 4]) != "").sum() <= 1  # of 16, by chance


def test_photos_of_a_day_count_as_their_mean_and_what_is_not_above_0_is_counted(tmp_path, capsys):
    table = grow()
    day, numbers = table["timestamp"] == "2024-05-02", ["predicted_g", "low_g", "high_g"]
    parts = [table.loc[day, numbers] * share for share in (0.9, 1.1)]
    both = [table[day].assign(**part) for part in parts]
    bad = table.head(3).assign(predicted_g=[0, -1, np.nan])
    same, found = judge(table, tmp_path), judge(pd.concat([table[~day], *both, bad]), tmp_path)
    numbers = ["growth_rate", "growth_rate_low", "growth_rate_high"]
    assert found[numbers].to_numpy() == pytest.approx(same[numbers].to_numpy(), rel=1e-4)
    assert (found["photos"] == same["photos"] + 1).all()
    printed = capsys.readouterr().out
    assert (
        "dropped 2 rows with predicted_g not above 0, row 110 first" in printed and "dropped 1 rows without" in printed
    )


@pytest.mark.parametrize("first, times", {
    "2024-05-01": [f"2024-05-{day + 1:02d}T10:30:00+02:00" for day in DAYS],
    "2024-05-01 ": (1714521600 + 86400 * DAYS).tolist(),
    "0": DAYS.tolist(), "2024-05-01  ": [pd.Timestamp("2024-05-01") + pd.Timedelta(days=day) for day in DAYS],
}.items())  # fmt: skip
def test_times_in_four_formats_say_the_same(first, times, tmp_path):
    table = grow(plants=3)
    wanted = judge(table, tmp_path)
    table["timestamp"] = times * 3
    table.to_excel(tmp_path / "p.xlsx", index=False)
    assert growth.main([tmp_path / "p.xlsx", "--out", tmp_path / "growth.csv"]) == 0
    found = pd.read_csv(tmp_path / "growth.csv")
    assert found["growth_rate"].to_numpy() == pytest.approx(wanted["growth_rate"].to_numpy(), rel=1e-4)
    assert found["first"].astype(str).eq(first.strip()).all()


def test_groups_are_compared_by_plants(tmp_path, capsys, figures):
    table = grow(plants=20, drawn_data=True)
    table.insert(2, "treatment", np.where(table["plant_number"] > 10, "wet", "dry"))
    table.loc[table["treatment"] == "wet", "predicted_g"] *= np.tile(np.exp(0.1 * DAYS), 10)
    found = judge(table, tmp_path, "--compare", "treatment")
    wet, dry = (found.loc[found["treatment"] == name, "growth_rate"] for name in ("wet", "dry"))
    low, high = stats.ttest_ind(wet, dry, equal_var=False).confidence_interval(0.95)
    told = f"treatment wet (n = 10) - dry (n = 10): {wet.mean() - dry.mean():+.4f} a day"
    assert f"{told} (95 % interval {low:+.4f} to {high:+.4f}), they differ" in capsys.readouterr().out
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["dry, n = 10", "wet, n = 10"]
    assert "drawn data" in figures[0].get_supxlabel()
    table["treatment"] = pd.cut(table["plant_number"], 3, labels=["dry", "moist", "wet"]).astype(str)
    found = judge(table, tmp_path, "--compare", "treatment")
    wet, dry = (found.loc[found["treatment"] == name, "growth_rate"] for name in ("wet", "dry"))
    low, high = stats.ttest_ind(wet, dry, equal_var=False).confidence_interval(1 - 0.05 / 3)  # one of three pairs
    assert f"(95 % interval {low:+.4f} to {high:+.4f})" in capsys.readouterr().out


def test_harvests_are_told_from_growth(tmp_path, capsys):
    table = grow(scatter=0.8)
    judge(table, tmp_path)
    assert "warning: days lie off their plant's line by a factor of" in capsys.readouterr().out


def test_measured_weights_have_no_use_for_the_intervals_of_predicted_ones(tmp_path, capsys):
    table = grow(measured_g=1.0)
    table["measured_g"] = table["predicted_g"]
    found = judge(table, tmp_path, "--value", "measured_g")
    assert "no low and high of measured_g" in capsys.readouterr().out
    assert (found["growth_rate_high"] - found["growth_rate_low"]).max() < 0.05


MISTAKES = {
    "gone.csv": (grow(), "no table at"),
    "p.csv --time when": (grow(), "has no column 'when': name one by --time"),
    "p.csv": (grow().drop(columns="timestamp"), "has no column that tells the time by its name: name one by --time"),
    "p.csv ": (grow().drop(columns="plant_number"), "has no column that tells the plant by its name"),
    "p.csv --value": (grow().rename(columns={"predicted_g": "x"}), "has no column that tells the value by its name"),
    "p.csv  ": (
        grow().drop_duplicates("plant_number"),
        "no plant (by --plant plant_number) has photos of two days",
    ),
    "p.csv   ": (grow().replace("2024-05-02", "02/05/2024"), "row 3: timestamp '02/05/2024' can be read in no way"),
    "p.csv    ": (grow().assign(timestamp=20240502), "holds neither Unix seconds nor days; write dates as 2024-05-03"),
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_get_one_line(flags, tmp_path, monkeypatch, capsys):
    table, told = MISTAKES[flags]
    monkeypatch.chdir(tmp_path)
    table.to_csv("p.csv", index=False)
    assert growth.main([flag for flag in flags.split() if flag != "--value"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "growth.csv").exists()


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.undo()
    judge(grow(), tmp_path)
    assert 10_000 < (tmp_path / "growth.png").stat().st_size < 400_000

"""The README says what the result files say, and its commands name flags that exist.

python tests/test_readme.py    # prints the tables for the README, from the result files
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "experiments")]

import lettuces  # noqa: E402

import cross_validate  # noqa: E402
import eda  # noqa: E402
import predict  # noqa: E402
import train_model  # noqa: E402

RUNS = {  # folder in results/: what the README calls it, and what it was judged on
    "two_epochs": ("lite0, the study's two epochs", "20 %, best epoch"),
    ".": ("lite0, else the study's defaults", "20 %, best epoch"),
    "all_layers": ("all layers", "20 %, best epoch"),
    "random_resnet18": ("random ResNet18, the study's defaults", "20 %, best epoch"),
    "study_folds": ("lite0, else the study's defaults", "five folds"),
    "cross_validation": ("recommended", "five folds"),
    "study_by_experiment": ("lite0, else the study's defaults", "nine experiments"),
    "by_experiment": ("recommended", "nine experiments"),
}
SETS = {  # set in recipes.csv and peers.csv: the folder of the recommended recipe's run
    "lettuce": "lettuce",
    "pigs": "pigs",
    "food": "food",
    "drawn 400": "drawn_400",
    "drawn 4294": "cross_validation",
}
NAMES = {"drawn": "drawn 4294", "400 drawn": "drawn 400", "food": "food", "lettuces": "lettuce", "pigs": "pigs"}
OTHERS = [  # in recipes.csv and peers.csv
    "ridge on features", "Gaussian process on features", "forest on traits", "ridge on traits",
    "traits of the green mask, best of three models", "ridge on the last features of lite0",
]  # fmt: skip
CHANGES = [  # of the recommended recipe, in recipes.csv
    "20 epochs", "224 px", "320 px", "weight decay 10", "without traits",
    "target as it is", "target's logarithm", "study's augmentation, 4 views",
    "each feature by its own deviation",
]  # fmt: skip
SCRIPTS = {"train_model.py": train_model, "cross_validate.py": cross_validate, "predict.py": predict, "eda.py": eda}


def metrics(folder):
    return json.loads((RESULTS / folder / "metrics.txt").read_text())


def results_table():
    lines = [
        "| model | judged on | RMSE | 95 % CI | R2 | mean | floor |",
        "| ----------- | ------- | ---- | ---------- | --- | --- | --- |",  # pandoc takes widths from these
    ]
    law = json.loads((RESULTS / "eda_summary.json").read_text())["baselines"]["green_area_law"]
    low, high = law["rmse_ci95"]
    best = metrics("cross_validation")  # of the same rows and folds
    lines.append(
        f"| green area alone | five folds | {law['rmse']:.3f} | {low:.3f} to {high:.3f} | {law['r2']:.2f} | "
        f"{best['baseline_mean_rmse']:.3f} | {best['noise_floor_rmse']:.3f} |"
    )
    for folder, (name, judged) in RUNS.items():
        found = metrics(folder)
        low, high = found["val_rmse_ci95"]
        lines.append(
            f"| {name} | {judged} | {found['val_rmse']:.3f} | {low:.3f} to {high:.3f} | {found['val_r2']:.2f} | "
            f"{found['baseline_mean_rmse']:.3f} | {found['noise_floor_rmse']:.3f} |"
        )
    return lines


def sets_table():
    """RMSE of the recommended recipe, of the training mean, and of what else one could pick, by set."""
    lines = {"recommended recipe": {}, "training mean": {}}
    for name, folder in SETS.items():
        found = metrics(folder)
        lines["recommended recipe"][name], lines["training mean"][name] = found["val_rmse"], found["baseline_mean_rmse"]
    for table, what in (("recipes.csv", "recipe"), ("peers.csv", "peer")):
        found = pd.read_csv(RESULTS / table)
        found = found[found[what].isin(OTHERS) & found["set"].isin(SETS)]
        for row in found.itertuples():
            lines.setdefault(getattr(row, what), {})[row.set] = row.rmse
    head = ["| way | lettuce, g | pigs, kg | food, g | 400 drawn, g | 4,294 drawn, g |"]
    head.append("| ---------------------- | ---- | ---- | ---- | ----- | ----- |")
    return head + [
        " | ".join([f"| {name}", *(f"{row[of]:#.3g}" if of in row else "-" for of in SETS)]) + " |"
        for name, row in lines.items()
    ]


def changes_table():
    """RMSE of the recommended recipe with one thing changed, relative to it, by set."""
    rmse = pd.read_csv(RESULTS / "recipes.csv").query("seed == 42").set_index(["recipe", "set"])["rmse"].unstack()
    ratios = (rmse / rmse.loc["recommended"]).rename(columns={of: name for name, of in NAMES.items()})
    ratios = ratios.loc[CHANGES, list(NAMES)].dropna(axis=1, how="all")  # of the sets that they were tried on
    lines = [" | ".join(["| changed", *ratios]) + " |", " | ".join(["| -----", *["---"] * ratios.shape[1]]) + " |"]
    return lines + [
        " | ".join([f"| {name}", *("-" if ratio != ratio else f"{ratio:.2f}" for ratio in row)]) + " |"
        for name, *row in ratios.itertuples()
    ]


def speed_table():
    """Seconds of whole runs beside the plain loop that the study would write, from the benchmark."""
    found = json.loads((RESULTS / "benchmark.json").read_text())
    lines = [
        "| run on the full drawn set, ResNet18 | seconds | plain loop | times |",
        "| --- | --- | --- | --- |",
    ]
    for run in found["runs"]:
        times = f"{run['seconds']:.0f} | {run['plain_seconds']:.0f} | {run['times']:.1f}"
        lines.append(f"| {run['run']} | {times} |")
    return lines


def tables():
    """The README's tables, from the result files."""
    return {
        "metrics.txt": results_table(),
        "sets": sets_table(),
        "changes": changes_table(),
        "benchmark.json": speed_table(),
    }


def commands(readme):
    """Commands of the README's blocks, with their lines joined."""
    blocks = re.findall(r"```\n(.*?)```", readme, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_readme_is_short_plain_and_wrapped():
    readme = (ROOT / "README.md").read_text()
    assert len(readme) <= 18_000 and readme.isascii()
    for line in readme.splitlines():
        assert len(line) <= 100 or line.startswith(("|", "![")), line
    assert "<" not in re.sub(r"```.*?```", "", readme, flags=re.S)


def test_tables_and_pictures_are_those_of_the_result_files():
    readme = (ROOT / "README.md").read_text()
    for name, lines in tables().items():
        for line in lines:
            assert line in readme, (name, line)
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", readme):
        assert (ROOT / picture).is_file() and (ROOT / picture).stat().st_size < 400_000, picture
    best = metrics("cross_validation")
    assert f"off by {best['val_rmse']:.3f} g" in readme.replace("\n", " ")
    assert best["looks_at"].split(":")[0] in readme.replace("\n", " ")


def test_what_the_text_says_of_errors_and_ranges_is_in_the_tables_of_predictions():
    readme, held, errors = (ROOT / "README.md").read_text().replace("\n", " "), {}, {}
    for name, folder in SETS.items():
        table = pd.read_csv(RESULTS / folder / "predictions.csv").rename(columns=lambda of: re.sub("_k?g$", "", of))
        held[name] = table["measured"].between(table["low"], table["high"]).mean()
        errors[name] = 100 * (table["error"].abs() / table["measured"]).median()
        if name == "lettuce":
            side = table["filename"].isin([f"IMG_{number}.jpg" for number in lettuces.FROM_THE_SIDE.split()])
            above, beside = (table.loc[rows, "error"].pow(2).mean() ** 0.5 for rows in (~side, side))
            assert f"({above:.0f} g on those from above, {beside:.0f} g on {side.sum()} from the side)" in readme
    told = [f"{name} {held[of]:.0%}" for name, of in NAMES.items()]
    assert ", ".join(told).replace("%", " %") in readme, told
    assert f"weights of seedlings are within {errors['drawn 4294']:.0f} % of the balance" in readme
    assert f"of lettuces within {errors['lettuce']:.0f} %" in readme


def test_what_the_text_says_of_plants_kept_away_and_of_many_photos_is_in_the_result_files():
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    away = json.loads((RESULTS / "held_out.json").read_text())
    drawn, food = (f"{away[name]['interval_90']['share']:.0%}" for name in ("drawn 4294", "food"))
    lettuce, pigs = (f"{away[name]['share']:.0%}" for name in ("lettuce", "pigs"))
    told = f"of a fifth of the drawn plants {drawn}, of the food {food}; over twenty random fifths {lettuce} of the "
    told += f"lettuces and {pigs} of the pigs"
    assert told.replace("%", " %") in readme, told
    drawn = away["drawn 4294"]
    assert f"{drawn['unlike_held_out']:.1%} of the drawn photos kept away".replace("%", " %") in readme
    assert drawn["unlike_others"] == 1 and f"all of {len(drawn['others'])} photos of other subjects" in readme
    scale = json.loads((RESULTS / "scale.json").read_text())
    most, cores = scale["runs"][-1], {1: "one core", 2: "two cores"}[scale["cores"]]
    told = f"{most['rows']:,} photos of 96 pixels by a small network (`results/scale.json`): "
    told += f"{most['peak_gb']:.1f} GB of memory, {most['store_gb']:.1f} GB of disk, "
    told += f"{most['ms_a_row']:.0f} ms a photo on {cores}, {scale['time_a_row_ratio']:.1f} times that of 10,000"
    assert told in readme, told


def test_what_the_text_says_of_all_layers_is_by_the_last_epochs():
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    ways = [f"{name}{recipe}" for name in ("pigs_fifth", "food_fifth") for recipe in ("_all_layers", "")]
    assert len({metrics(folder)["run"]["commit"] for folder in ways}) == 1
    ends = [metrics(folder)["last_epoch_val_rmse"] for folder in ("all_layers", "drawn_fifth", *ways)]
    minutes = round(metrics("all_layers")["run"]["seconds"] / 60)
    told = f"{ends[0]:.3f} g on the 20 % after {minutes} minutes on one core, "
    told += f"where the frozen recipe ends at {ends[1]:.3f} g. "
    told += f"On a fifth of the pigs it ends at {ends[2]:.1f} kg, frozen at {ends[3]:.1f} kg; "
    told += f"of the food at {ends[4]:.1f} g, frozen at {ends[5]:.1f} g"
    assert told in readme, told


def test_documented_runs_are_of_one_commit_and_of_the_recipes_as_they_are():
    """But for all layers, whose recipe is younger."""
    younger = [folder.name for folder in RESULTS.glob("*all_layers")]
    runs = {folder: metrics(folder)["run"] for folder in {*RUNS, *SETS.values(), "drawn_fifth", *younger}}
    assert all(run["clean_tree"] for run in runs.values())
    commits = {folder: run["commit"] for folder, run in runs.items() if folder not in younger}
    commits["erasing"] = json.loads((RESULTS / "erasing.json").read_text())["commit"]
    assert len(set(commits.values())) == 1, commits
    assert f"commit: {commits['.']}" in (ROOT / "training.log").read_text()
    parser = train_model.build_parser()
    plain = vars(parser.parse_args([]))
    for folder, run in runs.items():
        recipe = vars(parser.parse_args(train_model.RECIPES[run["arguments"]["recipe"]].split()))
        for name in recipe.keys() & run["arguments"].keys():
            assert recipe[name] in (plain[name], run["arguments"][name]), (folder, name)


def test_flags_in_commands_exist(capsys):
    readme, script = (ROOT / "README.md").read_text(), (ROOT / "tests" / "experiments" / "documented.sh").read_text()
    known = {}
    for name, module in SCRIPTS.items():
        with pytest.raises(SystemExit):
            module.main(["--help"])
        known[name] = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    found = 0
    for line in [*commands(readme), *script.replace("\\\n", " ").splitlines()]:
        for part in line.split("&&"):
            for name in known:
                if f"{name} " in part and "experiments" not in part:
                    flags = re.findall(r"(?<=\s)--[a-z_]+", part.split(name, 1)[1])
                    assert known[name].issuperset(flags), (part, flags)
                    found += len(flags)
    assert found > 15


@pytest.mark.skipif(not shutil.which("pandoc") or not shutil.which("pdflatex"), reason="pandoc and LaTeX are not here")
def test_pandoc_makes_the_pdf(tmp_path):
    command = ["pandoc", "README.md", "-o", str(tmp_path / "README.pdf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Missing character" not in done.stderr, done.stderr
    assert (tmp_path / "README.pdf").stat().st_size > 100_000


if __name__ == "__main__":
    for name, lines in tables().items():
        print(f"\n{name}\n" + "\n".join(lines))

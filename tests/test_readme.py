"""The README says what the committed result files say, and becomes a PDF."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import ablation
import pytest

import make_sample_data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows_of(first_cell):
    """Cells of the README's table row that begins so."""
    rows = re.findall(rf"^\| {re.escape(first_cell)} \|.*$", README, flags=re.MULTILINE)
    assert len(rows) == 1, f"{len(rows)} rows begin with '{first_cell}'"
    return [cell.strip() for cell in rows[0].strip("|").split("|")][1:]


def committed(name):
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


RUNS = {
    "study's two epochs": "two_epochs/metrics.txt",
    "defaults, 20 epochs": "metrics.txt",
    "five folds by plant number": "folds/metrics.txt",
    "nine folds by experiment": "folds_by_experiment/metrics.txt",
}


@pytest.mark.parametrize("run", RUNS)
def test_results_of_a_run_stand_in_the_readme(run):
    metrics = committed(RUNS[run])
    low, high = metrics["val_rmse_ci95"]
    assert rows_of(run) == [f"{metrics['val_rmse']:.4f}", f"{low:.4f} to {high:.4f}", f"{metrics['val_r2']:.3f}"]
    assert metrics["run"]["clean_tree"]
    assert metrics["val_rows"] == (773 if "folds" not in metrics else 3684)


def test_baselines_and_noise_floor_stand_in_the_readme():
    baselines = committed("eda_summary.json")["baselines"]
    for name in ("training_mean", "green_area_law"):
        low, high = baselines[name]["rmse_ci95"]
        cells = [f"{baselines[name]['rmse']:.4f}", f"{low:.4f} to {high:.4f}", f"{baselines[name]['r2']:.3f}"]
        assert rows_of(name.replace("_", " ").replace("green area law", "green-area law")) == cells
    floor = make_sample_data.noise_floor(make_sample_data.grow(4294, 42))
    assert rows_of("noise floor")[0] == f"{floor:.4f}"
    assert f"{floor:.4f} g at full size" in README


def test_the_log_and_the_metrics_come_from_the_same_run():
    for name, log in (
        ("metrics.txt", "training.log"),
        *((path, f"results/{Path(path).parent}/training.log") for path in list(RUNS.values()) if "/" in path),
    ):
        text, metrics = (ROOT / log).read_text(encoding="utf-8"), committed(name)
        assert metrics["run"]["command"] in text and metrics["run"]["commit"] in text
        assert f"validation RMSE {metrics['val_rmse']:.4f} g" in text


def test_pictures_and_files_that_the_readme_names_are_there():
    for path in re.findall(r"^!\[[^]]+\]\(([^)]+)\)$", README, flags=re.MULTILINE):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|txt|log|csv|png|json))`", README):
        places = (ROOT / path, ROOT / "results" / path, ROOT / "tests" / path)
        assert any(place.is_file() for place in places), path


def test_the_table_of_improvements_is_that_of_the_committed_runs():
    table = ablation.read_table(ROOT / "results" / "ablation.csv")
    summary = ablation.summarize(table)
    assert set(summary["setting"]) == set(ablation.SETTINGS)
    for row in summary.itertuples():
        flags, judged, seeds = ablation.SETTINGS[row.setting]
        runs = table[table["setting"] == row.setting]
        assert (runs["flags"] == flags).all() and (runs["judged"] == judged).all() and len(runs) == seeds
        cells = rows_of(row.setting)
        assert cells[0] == judged and cells[1].startswith(f"{runs['rmse'].mean():.3f}")
        assert seeds == 1 or cells[1].endswith(f"{runs['rmse'].std():.3f}")
    command = " ".join(README.replace("\\\n", " ").split())
    assert f"python train_model.py --folds 5 {ablation.SETTINGS['recommended'][0]}" in command


def test_speed_and_held_out_plants_stand_in_the_readme():
    for name, run in committed("benchmark.json")["runs"]["result"]["runs"].items():
        wanted = [f"{run['plain_seconds']:.0f}", f"{run['seconds']:.1f}", f"{run['ratio']:.1f}", str(run["peak_mib"])]
        assert rows_of(name) == wanted
    held_out = committed("held_out.json")
    assert rows_of("RMSE on the plants kept away") == [f"{held_out['rmse']:.4f} g"]
    assert rows_of("weights in the 90 % interval") == [f"{held_out['coverage']:.1%}"]


def test_large_data_and_several_processes_stand_in_the_readme():
    for line in committed("benchmark.json")["rows"]["result"]:
        seconds = [f"{line['cold_seconds']:.0f}", f"{line['warm_seconds']:.0f}"]
        assert rows_of(f"{line['rows']:,} rows") == [*seconds, f"{line['cold_mib']:,.0f}", f"{line['store_mib']:.0f}"]
    measured = committed("processes.json")
    texts = {"frozen": "frozen", "all layers, rate 1e-5": "all layers"}
    for run, text in texts.items():
        for line in measured["compared"][run]:
            who = f"{line['processes']} process{'es' * (line['processes'] > 1)}" + " of 2 threads" * (
                line["threads"] > 1
            )
            difference = f"{line['difference']:.1e}" if line["difference"] else "0"
            assert rows_of(f"{text}, {who}") == [f"{line['val_rmse']:.6f}", difference, f"{line['seconds']:.1f}"]
            assert line["difference"] < (1e-6 if run == "frozen" else 1e-4) and line.get("same_bits", True)
    same = sum(line["same_bits"] for line in measured["killed"])
    assert f"of {len(measured['killed'])} runs whose first or second process was killed" in README
    assert f"random moment, {same} ended after `--resume` with the bits" in README


@pytest.mark.skipif(not (shutil.which("pandoc") and shutil.which("pdflatex")), reason="pandoc or LaTeX is missing")
def test_the_readme_becomes_a_pdf(tmp_path):
    command = ["pandoc", "README.md", "-o", str(tmp_path / "README.pdf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "README.pdf").stat().st_size > 200_000

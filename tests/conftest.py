"""A small drawn data set that the tests share, and a way to run the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests share the cores, and waiting threads of torch take them all

import pandas as pd
import pytest

import make_sample_data

pd.set_option("io.excel.xlsx.reader", "calamine")  # what the scripts read with; silences pandas' change of default
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Folder of 60 drawn photos with their sheet; tests read it and never write to it."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    assert make_sample_data.main(["--num_images", "60", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    """The same set with the faults of real folders drawn in."""
    folder = tmp_path_factory.mktemp("faulty") / "data"
    assert make_sample_data.main(["--num_images", "60", "--with_faults", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run_script():
    """Run a script by its command line: run_script("eda.py", "--seed", 1, cwd=folder) -> CompletedProcess."""

    def run(script, *arguments, cwd):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})

    return run

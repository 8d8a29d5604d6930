"""Keep what a frozen backbone says of a photo, so that no photo goes through it twice.

A store is one folder for one recipe (backbone, its weights, preprocessing, precision) with a file for every batch of
features that was ever added. Nothing in it is changed later: a file is written aside, named by the SHA-256 of its own
bytes and moved into place. So two runs can share a store, a killed run leaves whole files only, and a damaged file
shows itself by its name.
"""

import hashlib
import io
import json
import logging
import time
from pathlib import Path

import numpy as np
from filelock import FileLock

from outputs import whole_file

KEY_LENGTH = 32  # hexadecimal digits of a SHA-256, enough that no two photos of any collection meet
FEATURES_A_FILE = 2048  # so that an interrupted run loses seconds of work
BYTES_A_FILE = 2**26  # of features that are whole maps

logger = logging.getLogger("train_model")


def digest(*parts):
    """Name for a sequence of bytes and texts: the first 128 bits of their SHA-256, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        sha.update(part)
    return sha.hexdigest()[:KEY_LENGTH]


class FeatureStore:
    """Features by key, on disk under `cache_dir`, in a folder of their own for each recipe.

    `recipe` is a flat dict of all that the features depend on beside the key; features are arrays of `shape` and
    `dtype`. Files are mapped, not read, so that only the features that are asked for take memory. A file that does not
    hold what its name promises is named in the log and removed. With `cache_dir` None it keeps nothing. Raises OSError
    where the folder cannot be written, OverflowError for features that `dtype` cannot hold.
    """

    def __init__(self, cache_dir, recipe, shape, dtype):
        recipe = json.dumps({**recipe, "shape": shape, "dtype": np.dtype(dtype).name}, indent=2, sort_keys=True)
        self.row = np.dtype([("key", f"S{KEY_LENGTH}"), ("feature", dtype, shape)])
        self.files = []
        self.folder = None if cache_dir is None else Path(cache_dir) / digest(recipe)
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._writing():
                for partial in self.folder.glob("*.partial"):  # of a run that was killed, as none holds the lock
                    partial.unlink()
            self._write("recipe.json", recipe.encode())
            self.files = [self._read(path) for path in sorted(self.folder.glob("*.npy"))]
        self.keys = np.concatenate([np.empty(0, self.row["key"]), *(rows["key"] for rows in self.files)])
        self.starts = np.cumsum([0, *map(len, self.files)])
        self.order = np.argsort(self.keys, kind="stable")

    def features(self, keys, compute):
        """Features (len(keys), *shape) of `dtype`, those that are not kept by `compute(numbers of their keys)`.

        `compute` yields arrays of features in the order of the numbers; they are kept as they come.
        """
        found, features = self.find(keys)
        missing = np.flatnonzero(~found)
        logger.info(f"features: {found.sum():,} found, {len(missing):,} to compute")
        started, done, waiting = time.perf_counter(), 0, []
        enough = min(FEATURES_A_FILE, 1 + BYTES_A_FILE // self.row.itemsize)
        for computed in compute(missing) if len(missing) else ():
            with np.errstate(over="ignore"):  # it is refused below
                waiting.append(computed.astype(self.row["feature"].base))  # kept or not: one answer for both
            done += len(computed)
            if sum(map(len, waiting)) >= enough or done == len(missing):
                computed, waiting = np.concatenate(waiting), []
                if not np.isfinite(computed).all():
                    raise OverflowError(f"a feature is beyond the range of {computed.dtype}")
                numbers = missing[done - len(computed) : done]
                features[numbers] = computed
                self.add([keys[number] for number in numbers], computed)
        if done:
            seconds = time.perf_counter() - started
            logger.info(f"features: {done:,} computed in {seconds:.1f} s, {done / seconds:.0f} photos/s")
        return features

    def find(self, keys):
        """Which `keys` are kept, a mask (len(keys),), and features (len(keys), *shape), filled in where they are."""
        keys = np.array(keys, dtype=self.row["key"])
        features = np.empty(len(keys), self.row["feature"])
        if not len(self.keys):
            return np.zeros(len(keys), dtype=bool), features
        place = np.searchsorted(self.keys, keys, sorter=self.order)
        candidate = self.order[np.minimum(place, len(self.order) - 1)]
        found = self.keys[candidate] == keys
        for start, rows in zip(self.starts, self.files, strict=False):
            here = np.flatnonzero(found & (candidate >= start) & (candidate < start + len(rows)))
            features[here] = rows["feature"][candidate[here] - start]
        return found, features

    def add(self, keys, features):
        """Keep `features` (n, *shape) under `keys` for later runs; this object goes on answering as it was opened."""
        if self.folder:
            rows = np.empty(len(keys), self.row)
            rows["key"], rows["feature"] = keys, features
            content = io.BytesIO()
            np.save(content, rows, allow_pickle=False)
            self._write(f"{hashlib.sha256(content.getbuffer()).hexdigest()}.npy", content.getbuffer())

    def _writing(self):
        return FileLock(self.folder / "writing.lock")

    def _write(self, name, content):
        if not (self.folder / name).exists():
            with self._writing(), whole_file(self.folder / name, told=False) as partial:
                partial.write_bytes(content)

    def _read(self, path):
        try:
            sha = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(2**20):
                    sha.update(part)
            rows = np.lib.format.open_memmap(path, mode="r") if sha.hexdigest() == path.stem else None
            if rows is not None and rows.dtype == self.row and rows.ndim == 1:
                return rows
        except FileNotFoundError:  # another run has just found it damaged
            return np.empty(0, self.row)
            rows = None
        except OSError:
            raise
        except Exception:  # it is whole, but no table of numbers; NumPy raises whatever its header makes of it
            pass
        logger.info(f"removed the damaged feature file {path}: what it held is computed again")
        path.unlink(missing_ok=True)
        return np.empty(0, self.row)

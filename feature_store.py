"""Keep what a frozen backbone says of a photo, so that no photo goes through it twice.

A store is one folder for one recipe (backbone, its weights, preprocessing, precision) with a file for every batch of
features that was ever added. Nothing in it is changed later: a file is written aside, named by the SHA-256 of its own
bytes and moved into place. So two runs can share a store, a killed run leaves whole files only, and a damaged file
shows itself by its name.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import socket
import time
import uuid
from pathlib import Path

import numpy as np
import torch

KEY_LENGTH = 32  # hexadecimal digits of a SHA-256, enough that no two photos of any collection meet
FEATURES_A_FILE = 2048  # so that an interrupted run loses seconds of work
BYTES_A_FILE = 2**26  # of features that are whole maps
LONGEST_WRITE = 600  # seconds, after which a file that is half written belongs to a run that was killed

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
    hold what its name promises is named in the log and removed. With `cache_dir` None features are kept in memory.
    Raises OSError where the folder cannot be written, OverflowError for features that `dtype` cannot hold.
    """

    def __init__(self, cache_dir, recipe, shape, dtype):
        recipe = json.dumps({**recipe, "shape": shape, "dtype": np.dtype(dtype).name}, indent=2, sort_keys=True)
        self.row = np.dtype([("key", f"S{KEY_LENGTH}"), ("feature", dtype, shape)])
        self.tables, self.names = [], set()  # what has been read, and the names of its files
        self.keys, self.starts, self.order = np.empty(0, self.row["key"]), np.zeros(1, int), np.empty(0, int)
        self.folder = None if cache_dir is None else Path(cache_dir) / digest(recipe)
        self.recipe = recipe

    def make_folder(self):
        """Make the store's folder, without what a killed run has left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError):  # another run removes it too
                if time.time() - partial.stat().st_mtime > LONGEST_WRITE:
                    partial.unlink()
        self._write("recipe.json", self.recipe.encode())

    def complete(self, keys, compute, group, batch=1, by_all=True):
        """Keep what is missing of `keys`, by `compute(their numbers)`: each process of `group` computes its share.

        `compute` yields arrays of features in the order of the numbers; they are kept as they come. A share is a run
        of whole batches of `batch` numbers. Without a folder the first process alone has them all unless `by_all`.
        """
        if self.folder:
            group.first(self.make_folder)
            if not (self.folder / "recipe.json").is_file():
                raise FileNotFoundError(f"{socket.gethostname()} does not see {self.folder}: all need the same folder")
        missing = group.first(self.missing, keys)  # one answer for all, as other runs may add to the store meanwhile
        logger.info(f"features: {len(keys) - len(missing):,} found, {len(missing):,} to compute")
        started, done, waiting = time.perf_counter(), 0, []
        enough = min(FEATURES_A_FILE, 1 + BYTES_A_FILE // self.row.itemsize)
        own = missing[group.share(len(missing), batch)]
        for computed in compute(own) if len(own) else ():
            with np.errstate(over="ignore"):  # it is refused below
                waiting.append(computed.astype(self.row["feature"].base))  # kept or not: one answer for both
            done += len(computed)
            if sum(map(len, waiting)) >= enough or done == len(own):
                computed, waiting = np.concatenate(waiting), []
                if not np.isfinite(computed).all():
                    raise OverflowError(f"a feature is beyond the range of {computed.dtype}")
                self.add(keys[own[done - len(computed) : done]], computed)
        group.wait()
        if not self.folder:
            self.tables = [table for tables in group.gather(self.tables, by_all) for table in tables]
        if len(missing):
            seconds = time.perf_counter() - started
            logger.info(
                f"features: {len(missing):,} computed in {seconds:.1f} s, {len(missing) / seconds:.0f} photos/s"
            )

    def missing(self, keys):
        """Numbers of the `keys` that are not kept, each key once: copies of a photo are seen once."""
        missing = np.flatnonzero(self.places(keys) < 0)
        _, first = np.unique(keys[missing], return_index=True)
        return missing[np.sort(first)]

    def places(self, keys):
        """Where each of the `keys` is kept, to be asked for as store[places]; -1 for those that are not."""
        self.refresh()
        if not len(self.keys):
            return np.full(len(keys), -1)
        near = np.searchsorted(self.keys, keys, sorter=self.order)
        places = self.order[np.minimum(near, len(self.order) - 1)]
        return np.where(self.keys[places] == keys, places, -1)

    def __getitem__(self, places):
        """Features (len(places), *shape); places are those that the last call of `places` gave."""
        features = np.empty(len(places), self.row["feature"])
        tables = np.searchsorted(self.starts, places, side="right") - 1
        for table in np.unique(tables):
            here = tables == table
            features[here] = self.tables[table]["feature"][places[here] - self.starts[table]]
        return features

    def refresh(self):
        """Read the files that have come since."""
        for path in sorted(self.folder.glob("*.npy")) if self.folder else ():
            table = None if path.name in self.names else self._read(path)
            if table is not None:
                self.names.add(path.name)
                self.tables.append(table)
        if len(self.keys) == sum(map(len, self.tables)):
            return
        self.keys = np.concatenate([np.empty(0, self.row["key"]), *(table["key"] for table in self.tables)])
        self.starts = np.cumsum([0, *map(len, self.tables)])
        self.order = np.argsort(self.keys, kind="stable")

    def add(self, keys, features):
        """Keep `features` (n, *shape) under `keys`."""
        rows = np.empty(len(keys), self.row)
        rows["key"], rows["feature"] = keys, features
        if self.folder:
            content = io.BytesIO()
            np.save(content, rows, allow_pickle=False)
            self._write(f"{hashlib.sha256(content.getbuffer()).hexdigest()}.npy", content.getbuffer())
        else:
            self.tables.append(rows)

    def _write(self, name, content):
        if not (self.folder / name).exists():
            partial = self.folder / f"{name}.{uuid.uuid4().hex}.partial"  # whoever else writes the same
            try:
                partial.write_bytes(content)
                os.replace(partial, self.folder / name)
            finally:
                partial.unlink(missing_ok=True)

    def _read(self, path):
        """Rows of a feature file; None, and it is removed, if it does not hold what its name promises."""
        try:
            rows = self._map(path)
            if rows is not None:
                return rows
        except FileNotFoundError:  # another run has just found it damaged
            return None
        except OSError:
            raise
        except Exception:  # it is whole, but no table of numbers; NumPy raises whatever its header makes of it
            pass
        logger.info(f"removed the damaged feature file {path}: what it held is computed again")
        path.unlink(missing_ok=True)
        return None

    def _map(self, path):
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(2**20):
                sha.update(part)
            if sha.hexdigest() != path.stem:
                return None
            size = file.tell()
            file.seek(0)
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        if dtype != self.row or len(shape) != 1 or size != start + shape[0] * dtype.itemsize:
            return None
        # Not np.memmap, which keeps each file open: a store of a million photos has more files than may be open
        return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()[start:].view(self.row)

"""Write files whole or not at all, by one run at a time, and with nothing in them that a reader's program would run."""

import argparse
import contextlib
import logging
import logging.handlers
import os
import re
import sys
import tempfile
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from inputs import PHOTO_SUFFIXES, UserError

# What a spreadsheet takes for a formula, at the start of a text or after what it may split cells at (OWASP)
FORMULA = re.compile(r"(^|[;,\t\r\n])(?=\s*[=+\-@])")

logger = logging.getLogger("train_model")


# ---------------------------------------------------------------- log


class Lines(logging.Formatter):
    def format(self, record):
        return printable(super().format(record))


class Console(logging.StreamHandler):
    def format(self, record):
        """What the console's encoding cannot hold is shown as escapes too."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record):
        """Go on without a console that is closed, as by `| head`."""


class LogFile(logging.FileHandler):
    def handleError(self, record):
        """Stop the run where the log cannot be written."""
        error = sys.exc_info()[1]
        error.filename = self.baseFilename
        raise error


@contextlib.contextmanager
def logging_to_console():
    """Log to the console, and keep the lines for the log file that a run opens once its input has proved sound."""
    lines = logging.handlers.MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    console = Console(sys.stdout)
    console.setFormatter(Lines())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [console, lines]
    try:
        yield lines
    finally:
        while logger.handlers:
            handler = logger.handlers[0]
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                handler.close()


def open_log(lines, path, append=False):
    """Write the kept `lines` to a log file, after what it held before with `append`, and all lines to come."""
    file = LogFile(path, mode="a" if append else "w", encoding="utf-8")
    file.setFormatter(Lines("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    lines.setTarget(file)
    lines.flush()
    logger.removeHandler(lines)
    logger.addHandler(file)


def printable(text):
    """Text without control characters, by which a file's name could steer a terminal; they are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage of thirty flags before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path, told=True):
    """Path to write to beside `path`; what is written there is moved over `path` once it is complete."""
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not tell it
        raise
    finally:
        with contextlib.suppress(OSError):  # of a folder that is gone
            partial.unlink(missing_ok=True)
    if told:
        logger.info(f"wrote {path}")


def check_writable(outputs, inputs=(), photo_folders=()):
    """Make the folders of files that are to be written, and find out whether they can be.

    Raises UserError for an output that is a folder, one of the `inputs` or there twice, that would lie
    among the photos of `photo_folders`, or that cannot be written.
    """
    taken = {os.path.realpath(path): "is an input" for path in inputs}
    folders = {os.path.realpath(folder) for folder in photo_folders}
    for path in outputs:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        if os.path.realpath(path) in taken:
            raise UserError(f"cannot write {path}: it {taken[os.path.realpath(path)]}; choose another place for it")
        taken[os.path.realpath(path)] = "is another output too"
        if path.suffix.lower() in PHOTO_SUFFIXES and os.path.dirname(os.path.realpath(path)) in folders:
            raise UserError(f"cannot write {path}: it would lie among the photos; choose another place for it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another place for it") from error


@contextlib.contextmanager
def alone(outputs):
    """Keep other runs from writing the same `outputs` meanwhile, by a lock file beside each of them.

    Raises UserError where another run holds one. A killed run holds none: its lock files may lie about, that is all.
    """
    with contextlib.ExitStack() as stack:
        for path in dict.fromkeys(map(Path, outputs)):
            place = path.with_name(path.name + ".lock")
            lock = FileLock(place)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"{path} is in use by another run, says {place}: wait for it, or choose another place"
                ) from None
            except NotImplementedError:  # a file system without locks
                continue
            stack.callback(unlock, lock, place)
        yield


def unlock(lock, place):
    """Remove the lock file and release it; on Windows the other way round, as an open file cannot be removed there."""
    for step in (lock.release, place.unlink) if os.name == "nt" else (place.unlink, lock.release):
        with contextlib.suppress(OSError):
            step()


def harmless(table):
    """A table whose texts no spreadsheet takes for formulas: an apostrophe stands before them."""

    def escape(cell):
        return FORMULA.sub(r"\1'", cell) if isinstance(cell, str) else cell

    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{name: table[name].map(escape) for name in texts}).rename(columns=escape)

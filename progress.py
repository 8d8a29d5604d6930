"""What a training run has done so far, in a file beside the model, so that a run that was stopped can go on."""

import logging
import time

from inputs import UserError
from model import load_plain, save_plain

WRITE_EVERY = 1  # seconds; epochs on stored features follow one another faster than they can be written

logger = logging.getLogger("train_model")


class Progress:
    """The stages of a run: results of those that are finished, and the state of training in the one that runs.

    A stage is one training from its start, of a fold or of the one split. States and results are plain values and
    tensors. With `resume` they are read from `path`; raises UserError if the run that wrote it had other `settings`, a
    flat dict of all that the result depends on.
    """

    def __init__(self, path, settings, resume=False):
        self.path, self.settings, self.written = path, settings, 0.0
        self.results, self.states, self.found = {}, {}, False
        self.kept = True  # written to the file, by one process of a run
        if resume and path.is_file():
            self.read()
        elif resume:
            logger.info(f"nothing to resume, there is no {path}: the run starts from the beginning")

    def read(self):
        try:
            kept = load_plain(self.path)
            settings, self.results, self.states = (dict(kept[name]) for name in ("settings", "results", "states"))
            different = [name for name, now in self.settings.items() if bool(settings.get(name) != now)]
        except Exception as error:  # whatever a foreign file makes the unpickler stumble over
            raise self.damaged(error) from error
        if different:
            before, now = (told(values.get(different[0])) for values in (settings, self.settings))
            raise UserError(
                f"--resume: {self.path} is of a run with {different[0]} {before}, now it is {now}; start with what "
                "was, or anew without --resume"
            )
        self.found = True

    def damaged(self, error):
        return UserError(f"--resume: {self.path} is damaged ({type(error).__name__}); start anew without --resume")

    def reached(self, stage, state):
        """Note the state of training after an epoch; state() gives it, and is asked for only if it is written."""
        if self.kept and time.monotonic() - self.written > WRITE_EVERY:
            self.states = {stage: state()}
            self.write()
            self.states = {}

    def finished(self, stage, result):
        self.results[stage] = result
        self.states = {}
        self.write()

    def write(self):
        if self.kept:
            save_plain(
                {"settings": self.settings, "results": self.results, "states": self.states}, self.path, told=False
            )
        self.written = time.monotonic()

    def remove(self):
        self.path.unlink(missing_ok=True)


def told(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

"""What computes: the device, its precision, and the processes that torchrun has started to do one run together."""

import os
import socket
import traceback

import torch

from inputs import UserError


class Alone:
    """The one process of a run that torchrun did not start; distributed.Group is the same for several."""

    rank, size = 0, 1

    def first(self, function, *arguments):
        """function(*arguments), called by the first process alone; all get what it returns."""
        return function(*arguments)

    def gather(self, value, by_all=True):
        """The values of all processes, in their order; without `by_all` the first process alone has them."""
        return [value]

    def total(self, number):
        """The sum over all processes."""
        return number

    def start_batch(self, rows):
        """Rows of the batch that is trained on next, of which this process has so many."""
        return rows

    def wait(self):
        """Go on when all processes have come here."""

    def share(self, count, batch=1):
        """This process's part of `count` items, a slice: whole batches, the same that a single process would make."""
        batches = -(-count // batch)
        start, stop = (batches * rank // self.size * batch for rank in (self.rank, self.rank + 1))
        return slice(start, min(stop, count))

    def deal(self, items, batch_size):
        """This process's part of each batch of `items`, every size-th item, as DistributedSampler deals them.

        Parts may differ by one item: DistributedSampler would repeat items, which BatchNorm would count twice.
        """
        starts = range(0, len(items), batch_size)
        return [items[start : start + batch_size][self.rank :: self.size] for start in starts]

    def interleave(self, parts):
        """Whole batches one after another, from each process's parts of them as they were dealt: tensors (n, ...)."""
        return torch.cat(parts)

    def parallel(self, model):
        """What to call in training in place of `model`."""
        return model

    def make_way(self):
        """Let others tell an error, where several may have it."""

    def leave(self, status):
        """End this process, once the others have been told or have nothing left to do."""


ALONE = Alone()


def together(run):
    """run(group), with all processes that torchrun has started or with this one alone; returns its exit status."""
    group = ALONE
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        from distributed import Group

        group = Group()
    try:
        status = run(group)
    except SystemExit as end:
        group.leave(end.code)
        raise
    except BaseException:
        if group.size > 1:  # the interpreter cannot wind up connections that are in use
            traceback.print_exc()
            group.leave(1)
        raise
    group.leave(status)
    return status


def check_seen(path, group):
    """Stop where a process on another machine does not see a file that the first process has found."""
    if group.rank and not os.path.lexists(path):
        raise UserError(f"{socket.gethostname()} does not see {path}: all machines need the same folders")


def cores():
    """Cores for this process, if each process of a run on this machine takes as many."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def pick_device(name, group=ALONE):
    """The torch device that `--device` names; each process of a group on a machine has a GPU of its own."""
    several, asked = group.size > 1, name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() and not several else name
    if several and name == "mps":
        raise UserError("--device mps is for one process: start it without torchrun, or pass --device cpu")
    if several and name == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(
                f"torchrun has started {here} processes on a machine with {gpus} GPUs: "
                f"pass --nproc_per_node {max(gpus, 1)} to it, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        name = f"cuda:{torch.cuda.current_device()}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): try --device cpu"
        ) from error
    device = torch.device(name)
    if len(set(group.gather(device.type))) > 1:
        raise UserError(f"--device {asked} is another device on each machine: pass --device cpu, or mend their GPUs")
    return device


def pick_precision(name, device):
    """bf16 where the processor computes in it natively, else fp32, unless `name` says which."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = {"avx512_bf16", "amx_bf16", "bf16"}
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases have the private check alone
    native = any(capabilities.get(name) for name in native) or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if device.type == "cpu" and native else "fp32"

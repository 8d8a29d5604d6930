"""Several processes, started by torchrun, that do one run together; imported by devices.together for them alone.

Objects and tensors on the CPU go by gloo, gradients on GPUs by nccl. All processes call the same methods of the group
in the same order. Each watches whether the first one is there, and the first one watches all: a process that dies
ends the run within seconds, in one line that names it, instead of leaving the others to wait for it.
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import StochasticDepth

from devices import Alone, cores
from inputs import one_line

MEETING = datetime.timedelta(minutes=5)  # for the processes to find one another
FOREVER = datetime.timedelta(days=30)  # they may wait hours for the slowest one; the watch ends what never ends
SILENCE = datetime.timedelta(minutes=10)  # after which a process counts as lost: a large sheet is read in silence
BEAT = 30  # seconds between two signs of life
ALIVE = -1  # what is said between the exit statuses


class Group(Alone):
    """All processes of the run; ends them with a line if they do not find one another."""

    def __init__(self):
        try:
            dist.init_process_group("gloo", timeout=MEETING)
            self.work = dist.new_group(backend="gloo", timeout=FOREVER)
            # A pair each, because silence within a gloo group breaks all its connections.
            others = range(1, dist.get_world_size())
            self.watched = [None, *(dist.new_group([0, other], SILENCE, "gloo") for other in others)]
        except (RuntimeError, ValueError) as error:
            self._tell(
                f"the processes do not find one another ({one_line(error)}): check the addresses that were given to "
                "torchrun; GLOO_SOCKET_IFNAME names the network between the machines"
            )
            sys.exit(2)
        self.rank, self.size, self.gpus = dist.get_rank(), dist.get_world_size(), None
        self.process, self.status = os.getpid(), None  # status: with which another process has ended
        self.seeing = threading.Lock()
        self.names = self.gather(f"rank {self.rank} of {self.size} (pid {os.getpid()} on {socket.gethostname()})")
        if torch.get_num_threads() == 1:  # what torchrun sets unasked; here the processes of a machine share its cores
            torch.set_num_threads(cores())
        signal.signal(signal.SIGTERM, self._end_by_signal)
        if self.rank:  # the first process alone speaks, and takes Ctrl-C
            sys.stdout = open(os.devnull, "w")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        others = [0] if self.rank else range(1, self.size)
        self.watches = [threading.Thread(target=self._watch, args=[other], daemon=True) for other in others]
        for thread in (*self.watches, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    def first(self, function, *arguments):
        answer = [None if self.rank else function(*arguments)]
        dist.broadcast_object_list(answer, group=self.work)
        return answer[0]

    def gather(self, value, by_all=True):
        values = [None] * self.size if by_all or not self.rank else None
        if by_all:
            dist.all_gather_object(values, value, group=self.work)
        else:
            dist.gather_object(value, values, group=self.work)
        return values or []

    def total(self, number):
        number = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(number, group=self.work)
        return number.item()

    def wait(self):
        waiting = dist.barrier(group=self.work, async_op=True)
        while not waiting.is_completed():  # rather than in wait(), which lets no Ctrl-C through
            time.sleep(0.01)
        waiting.wait()

    def start_batch(self, rows):
        Dealt.rows = int(self.total(rows))
        return Dealt.rows

    def interleave(self, parts):
        everyone = self.gather(parts)
        whole = []
        for dealt in zip(*everyone, strict=True):
            batch = dealt[0].new_empty(sum(map(len, dealt)), *dealt[0].shape[1:])
            for rank, part in enumerate(dealt):
                batch[rank :: self.size] = part
            whole.append(batch)
        return torch.cat(whole)

    def parallel(self, model):
        """`model` with one answer for a batch, however it is dealt; its gradients are the mean over the processes."""
        device = next(model.parameters()).device
        gpu = device.type == "cuda"
        if gpu and not self.gpus:
            self.gpus = dist.new_group(backend="nccl", timeout=FOREVER)
        Dealt.group, GpuBatchNorm.process_group = self.work, self.gpus
        frozen = {id(module) for _, module in model.frozen_modules()}
        for module in model.modules():
            # The class alone is changed, because graphs of the model hold the same modules.
            if id(module) in frozen:
                continue
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = GpuBatchNorm if gpu else CpuBatchNorm
            elif isinstance(module, nn.Dropout):
                module.__class__ = DealtDropout
            elif isinstance(module, StochasticDepth):
                module.__class__ = DealtStochasticDepth
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of few layers; each process would say it
        return DistributedDataParallel(
            model, device_ids=[device] if gpu else None, process_group=self.gpus or self.work
        )

    # ------------------------------------------------------------ the end

    def leave(self, status):
        """End this process with its exit status, and all others too.

        A process that has nothing left to do waits for the first one: torchrun takes one that ends for the beginning
        of the end.
        """
        if self.rank and not status:
            try:
                self.watches[0].join()
            except SystemExit as end:  # by a signal
                status = end.code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is nothing left to end
        self._say(status)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # of a pipe that is closed, as by `| head`
                stream.flush()
        os._exit(status)  # at once: threads of the watch still wait for the others

    def make_way(self):
        """Leave the others the time to tell an error that several may have, and to end this process."""
        time.sleep(3 + 0.5 * self.rank)

    def _watch(self, other):
        status, error = torch.tensor([ALIVE]), None
        try:
            while status == ALIVE:
                dist.recv(status, src=other, group=self.watched[self.rank or other])
        except RuntimeError as lost:  # the connection is closed, and nothing was said
            status, error = torch.tensor([1]), lost
        if not status:  # the first one has come to its end
            os._exit(0)
        with self.seeing:
            if self.status is not None:
                return
            if error and self.rank in (0, 1):
                how = "cannot be reached" if "imed out" in str(error) else "died"
                self._tell(f"{self.names[other]} {how}; start the same command again with --resume")
            self.status = int(status)
        if not self.rank:  # before others find this one gone
            self._say(self.status)
        # The main thread removes what it has begun to write, if nothing holds it up.
        if os.name == "nt":
            signal.raise_signal(signal.SIGTERM)
        else:  # this wakes it, too
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(10)
        os._exit(self.status)

    def _beat(self):
        while True:
            time.sleep(BEAT)
            self._say(ALIVE)

    def _say(self, status):
        for other in [0] if self.rank else range(1, self.size):
            with contextlib.suppress(RuntimeError):  # of one that has gone before
                dist.send(torch.tensor([status]), dst=other, group=self.watched[self.rank or other])

    def _tell(self, message):
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")

    def _end_by_signal(self, *_):
        """torchrun ends the rest by SIGTERM when a process dies: let the first one name it before all go."""
        if os.getpid() != self.process:  # a worker that decodes photos
            os._exit(128 + signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        if os.name != "nt":
            signal.signal(signal.SIGCHLD, lambda *_: None)  # torch's own would tell that the workers end too
        for _ in range(100 + 5 * self.rank if self.rank else 60):  # a dead process's workers keep its connections 5 s
            if self.status is not None:
                sys.exit(self.status)
            time.sleep(0.1)
        self._tell(f"{self.names[self.rank]} was ended by SIGTERM; start the same command again with --resume")
        sys.exit(128 + signal.SIGTERM)


# ---------------------------------------------------------------- layers that depend on the whole batch


class Dealt:
    """A layer that is given a process's part of a batch of so many `rows` in all, dealt to the processes of `group`."""

    rows, group = 0, None

    def own(self, batch):
        return batch[dist.get_rank() :: dist.get_world_size()]


class DealtDropout(Dealt, nn.Dropout):
    """Dropout that draws for the whole batch in each process, and takes its part: the noise of a single process."""

    def forward(self, part):
        if not self.training or not self.p:
            return part
        return part * self.own(super().forward(part.new_ones(self.rows, *part.shape[1:])))


class DealtStochasticDepth(Dealt, StochasticDepth):
    """The same for whole paths of a network."""

    def forward(self, part):
        if not self.training or not self.p:
            return part
        return part * self.own(super().forward(part.new_ones(self.rows, *[1] * (part.dim() - 1))))


class GpuBatchNorm(nn.SyncBatchNorm):
    """BatchNorm over the whole batch, always in float32: an empty part would be told to the others in another type."""

    process_group = None  # of the class, because a module that holds one cannot be copied

    def forward(self, part):
        return super().forward(part.float()).to(part.dtype)


class CpuBatchNorm(Dealt, nn.modules.batchnorm._BatchNorm):
    """The same for the CPU, which nn.SyncBatchNorm does not serve."""

    def _check_input_dim(self, part):
        """Any number of dimensions will do."""

    def forward(self, part):
        if not self.training:
            return super().forward(part)
        output, mean, variance, count = Normalize.apply(part, self.weight, self.bias, self.eps, self.group)
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return output


class Normalize(torch.autograd.Function):
    """Batch normalization over all processes (Ioffe and Szegedy 2015, arXiv 1502.03167, with its gradients).

    A part (n, channels, ...) gives the part normalized, mean and biased variance of the batch, and its values a
    channel. A process's part may be empty.
    """

    @staticmethod
    def forward(ctx, part, weight, bias, eps, group):
        values, dims = part.float(), [0, *range(2, part.dim())]
        shape = [1, -1, *[1] * (part.dim() - 2)]
        count = part.numel() / part.shape[1]
        sums = torch.cat([values.sum(dims, dtype=torch.float64), torch.tensor([count], dtype=torch.float64)])
        dist.all_reduce(sums, group=group)
        count = sums[-1].item()
        mean = (sums[:-1] / count).float()
        squares = (values - mean.view(shape)).square().sum(dims, dtype=torch.float64)
        dist.all_reduce(squares, group=group)
        variance = (squares / count).float()
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(part, weight, mean, scale)
        ctx.dims, ctx.shape, ctx.count, ctx.group = dims, shape, count, group
        factor = weight * scale
        output = torch.addcmul((bias - mean * factor).view(shape), values, factor.view(shape))
        count = torch.tensor(count)
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(part.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        part, weight, mean, scale = ctx.saved_tensors
        dims, shape = ctx.dims, ctx.shape
        gradient = gradient.float()
        normal = (part.float() - mean.view(shape)) * scale.view(shape)
        own = torch.stack([(gradient * normal).sum(dims, dtype=torch.float64), gradient.sum(dims, dtype=torch.float64)])
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        along, level = (sums / ctx.count).float()
        change = gradient - level.view(shape) - normal * along.view(shape)
        change = change * (weight * scale).view(shape)
        return change.to(part.dtype), *own.float(), None, None

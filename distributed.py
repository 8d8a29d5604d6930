"""Several processes, started by torchrun, that do one run together; imported by nothing but devices.join.

Objects and tensors on the CPU go by gloo, gradients on GPUs by nccl. All processes call the same methods of the group
in the same order. Each watches whether the first one is there, and the first one watches all: a process that dies
ends the run within a second, in one line that names it, instead of leaving the others to wait for it.
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import StochasticDepth

from devices import Alone
from inputs import one_line

FOREVER = datetime.timedelta(days=30)  # a process may wait hours for the slowest one; the watch ends what never ends


class Group(Alone):
    """All processes of the run; ends them with a line if they do not find together."""

    def __init__(self):
        try:
            dist.init_process_group("gloo", timeout=FOREVER)
            self.watched = dist.new_group(backend="gloo", timeout=FOREVER)
        except (RuntimeError, ValueError) as error:
            self._tell(f"the processes do not find one another ({one_line(error)}): start them by torchrun")
            sys.exit(2)
        self.rank, self.size, self.gpus = dist.get_rank(), dist.get_world_size(), None
        self.names = self.gather(f"rank {self.rank} of {self.size} (pid {os.getpid()} on {socket.gethostname()})")
        self.process = os.getpid()
        signal.signal(signal.SIGTERM, self._end_by_signal)
        if self.rank:  # the first process alone speaks, and takes Ctrl-C
            sys.stdout = open(os.devnull, "w")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for other in [0] if self.rank else range(1, self.size):
            threading.Thread(target=self._watch, args=[other], daemon=True).start()

    def first(self, function, *arguments):
        answer = [None if self.rank else function(*arguments)]
        dist.broadcast_object_list(answer)
        return answer[0]

    def gather(self, value):
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def total(self, number):
        number = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(number)
        return number.item()

    def wait(self):
        waiting = dist.barrier(async_op=True)
        while not waiting.is_completed():  # rather than in wait(), which lets no Ctrl-C through
            time.sleep(0.01)
        waiting.wait()

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
        if device.type == "cuda" and not self.gpus:
            self.gpus = dist.new_group(backend="nccl", timeout=FOREVER)
        for module in model.modules():  # the class alone is changed: graphs of the model hold the same modules
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.process_group = self.gpus
                module.__class__ = nn.SyncBatchNorm if device.type == "cuda" else SyncedBatchNorm
            elif isinstance(module, nn.Dropout):
                module.__class__ = DealtDropout
            elif isinstance(module, StochasticDepth):
                module.__class__ = DealtStochasticDepth
        gpu = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=gpu, process_group=self.gpus)

    # ------------------------------------------------------------ the end

    def leave(self, status):
        """End this process; the others learn its exit status, and end too unless it is 0."""
        self._say(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # at once: threads of the watch still wait for the others

    def make_way(self):
        """Leave the first process or the watch the time to tell an error, and to end this process."""
        time.sleep(3)

    def _watch(self, other):
        status = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(status, src=other, group=self.watched)
        except RuntimeError:  # the connection is closed, and nothing was said
            if self.rank in (0, 1):
                self._tell(f"{self.names[other]} died; start the same command again with --resume")
            status += 1
        if self.rank or status:
            self.leave(int(status))

    def _say(self, status):
        for other in [0] if self.rank else range(1, self.size):
            with contextlib.suppress(RuntimeError):  # of one that has gone before
                dist.send(torch.tensor([status]), dst=other, group=self.watched)

    def _tell(self, message):
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")

    def _end_by_signal(self, *_):
        """torchrun ends the rest by SIGTERM when a process dies: let the first one name it before all go."""
        if os.getpid() != self.process:  # a worker that decodes photos
            os._exit(128 + signal.SIGTERM)
        time.sleep(5 if self.rank else 1)
        self._tell(f"{self.names[self.rank]} was ended by SIGTERM; start the same command again with --resume")
        self.leave(128 + signal.SIGTERM)


# ---------------------------------------------------------------- layers that depend on the whole batch


def whole(part):
    """Rows of the batch that has been dealt to all."""
    rows = torch.tensor(len(part))
    dist.all_reduce(rows)
    return int(rows)


def dealt(batch):
    return batch[dist.get_rank() :: dist.get_world_size()]


class DealtDropout(nn.Dropout):
    """Dropout that draws for the whole batch in each process, and takes its part: the noise of a single process."""

    def forward(self, part):
        if not self.training or not self.p:
            return part
        return part * dealt(super().forward(part.new_ones(whole(part), *part.shape[1:])))


class DealtStochasticDepth(StochasticDepth):
    """The same for whole paths of a network."""

    def forward(self, part):
        if not self.training or not self.p:
            return part
        return part * dealt(super().forward(part.new_ones(whole(part), *[1] * (part.dim() - 1))))


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the whole batch, for the CPU, which nn.SyncBatchNorm does not serve."""

    def _check_input_dim(self, part):
        """Any number of dimensions will do."""

    def forward(self, part):
        if not self.training:
            return super().forward(part)
        output, mean, variance, count = Normalize.apply(part, self.weight, self.bias, self.eps)
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
    def forward(ctx, part, weight, bias, eps):
        values, dims = part.float(), [0, *range(2, part.dim())]
        shape = [1, -1, *[1] * (part.dim() - 2)]
        count = part.numel() / part.shape[1]
        sums = torch.cat([values.sum(dims, dtype=torch.float64), torch.tensor([count], dtype=torch.float64)])
        dist.all_reduce(sums)
        count = sums[-1].item()
        mean = (sums[:-1] / count).float()
        squares = (values - mean.view(shape)).square().sum(dims, dtype=torch.float64)
        dist.all_reduce(squares)
        variance = (squares / count).float()
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(part, weight, mean, scale)
        ctx.dims, ctx.shape, ctx.count = dims, shape, count
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
        dist.all_reduce(sums)
        along, level = (sums / ctx.count).float()
        change = gradient - level.view(shape) - normal * along.view(shape)
        change = change * (weight * scale).view(shape)
        return change.to(part.dtype), *own.float(), None

"""Several processes as one run, as `torchrun` starts them: rank, shards and collectives.

    torchrun --nproc_per_node=2 flickr_image_caption.py ...

Collectives (`broadcast`, `all_gather`, `all_reduce_sum`, `all_reduce_max`, `barrier`) must be called
by all processes, in the same order; they use gloo on the CPU, while gradients use nccl on GPUs. In a
process that is alone they cost nothing. Rank 0 writes files and prints; the others compute.
"""

import contextlib
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

LOST = (
    "another process of this run ended: its own message says why; "
    "--resume latest goes on from the last checkpoint, with any number of processes"
)


# rank 0 may wait for another run's cache; one that dies is noticed at once, as its sockets close
PATIENCE = timedelta(days=30)


def world_size():
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which process this is, from 0; rank 0 writes."""
    return int(os.environ.get("RANK", 0))


def local_ranks():
    """This process's number among those that torchrun started on this machine, and theirs."""
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


@contextlib.contextmanager
def joined(device):
    """Make the processes that torchrun started one group while the block runs.

    All but rank 0 are silent on stdout. `device` is this process's own.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with lost_peers():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
        )
    with Path(os.devnull).open("w") as devnull:
        stdout = devnull if rank() else sys.stdout
        with contextlib.redirect_stdout(stdout):
            yield
    distributed.destroy_process_group()


@contextlib.contextmanager
def lost_peers():
    """Turn torch's error when a peer is gone into one line. Raises: ConnectionError."""
    try:
        yield
    except RuntimeError as error:  # gloo raises plain ones
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(LOST) from error


def broadcast(value):
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    with lost_peers():
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def all_gather(value):
    """The values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with lost_peers():
        distributed.all_gather_object(values, value)
    return values


def all_reduce_sum(values):
    """Elementwise sums of the ranks' lists of numbers."""
    return [math.fsum(column) for column in zip(*all_gather(values), strict=True)]


def all_reduce_max(number):
    """The largest of the ranks' whole numbers: cheap enough for every step."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    with lost_peers():
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def barrier():
    """Return once all ranks have called this."""
    all_reduce_max(0)


def send(value, to):
    """Send an object to rank `to`, which waits for it in `receive`."""
    with lost_peers():
        distributed.send_object_list([value], to)


def receive(sender):
    """The object that rank `sender` sends."""
    values = [None]
    with lost_peers():
        distributed.recv_object_list(values, sender)
    return values[0]


def shard(count):
    """This rank's slice of `count` items; the ranks' slices cover all and differ by one at most."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def data_parallel(module, seed):
    """A module as several processes train it together; each draws dropout of its own."""
    if rank():
        torch.manual_seed(seed + 1_000_003 * rank())
    if world_size() == 1 or not [*module.parameters()]:
        return module
    return nn.parallel.DistributedDataParallel(
        module, forward_sync_buffers=False, gradient_as_bucket_view=True
    )

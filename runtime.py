"""The machine and the operating system: device, precision, threads, memory, terminal, signals.

    hardware = resolve_hardware("auto", "auto")
    with hardware.autocast(): ...
    with listen_for_stop() as received:
        for batch in until_stopped(received, batches): ...  # raises Stopped between two batches

Nothing here knows captions.
"""

import contextlib
import ctypes
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

import process_group

# codes of C0 and C1, marks that turn the direction of text, line ends, halves of characters
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PROBE_ROUNDS, PROBE_STEPS = 5, 12  # about 0.3 s in all
FREED_IS_KEPT = threading.Event()  # whether malloc was told so, which cannot be asked
# torch.fx replaces nn.Module.__call__ in all threads while it traces: no other may compute then.
# A thread that encodes or searches meanwhile holds its lock, one that traces holds both
ENCODING, SEARCHING = threading.Lock(), threading.Lock()
ALL_ARE_SLOWER = 1.3  # times, before one thread is taken: a quiet machine decides alike each time


class Hardware(NamedTuple):
    """What this machine decides: where a run computes, and in which precision."""

    device: torch.device
    precision: str  # float32, bfloat16 or float16

    @property
    def dtype(self):
        """The precision as torch.dtype."""
        return getattr(torch, self.precision)

    def autocast(self):
        """The context in which decoders compute."""
        enabled = self.precision != "float32"
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)


def resolve_hardware(device, precision):
    """--device and --precision -> Hardware, prepared. Raises: ValueError when it is not there."""
    device = resolve_device(device)
    hardware = Hardware(device, resolve_precision(precision, device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "cpu":
        keep_freed_memory()
    return hardware


def resolve_device(name):
    """--device -> torch.device; auto takes CUDA, then MPS, then the CPU.

    Under torchrun CUDA is this process's own GPU, and no other is touched.
    Raises: ValueError when this machine lacks the device.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        return own_device(torch.device(best))
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("another kind of device")
        device = own_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name}: not to be had here ({reason}): give auto, cpu, cuda, cuda:N or mps"
        ) from error
    return device


def own_device(device):
    """The device, or under torchrun, where it is CUDA, this process's GPU. Raises: as `own_gpu`."""
    if device.type != "cuda" or process_group.world_size() == 1:
        return device
    return own_gpu(device, *process_group.local_ranks(), torch.cuda.device_count())


def own_gpu(device, local_rank, local_world_size, num_gpus):
    """The GPU of one of the `local_world_size` processes on this machine.

    Raises: ValueError when there are fewer GPUs than processes, or `device` names one.
    """
    if device.index is not None:
        raise ValueError(
            f"--device {device}: torchrun gives each process a GPU of its own: give --device cuda"
        )
    if local_world_size > num_gpus:
        raise ValueError(
            f"--device cuda: torchrun started {local_world_size} processes here, more than the "
            f"number of GPUs, {num_gpus}: give a smaller --nproc_per_node, or --device cpu"
        )
    return torch.device("cuda", local_rank)


def to_device(tensor, device):
    """The tensor on the device. A copy to CUDA starts from pinned memory and is not waited for."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def available_cpus():
    """Cores that this process may use, at least 1; processes of one run share the machine's evenly.

    The machine may have more: they are limited by affinity (taskset, Slurm) and cgroups (containers).
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, of this machine
    return max(1, int(min(cores, cgroup_quota()) // ranks))


def cgroup_quota(process=Path("/proc/self"), mount=Path("/sys/fs/cgroup")):
    """Cores that a process's cgroup and those above it allow (cgroup v2); infinity without a limit."""
    quotas = [math.inf]
    with contextlib.suppress(OSError):
        entries = (process / "cgroup").read_text().splitlines()
        own = mount / "".join(entry[4:] for entry in entries if entry.startswith("0::/"))
        for folder in (own, *own.parents):
            file = folder / "cpu.max"  # "max 100000", or microseconds of each such period
            if file.is_file() and not (limit := file.read_text()).startswith("max"):
                microseconds, period = map(int, limit.split())
                quotas.append(microseconds / period)
    return min(quotas)


def set_threads(threads, device, typed):
    """Compute with --threads CPU threads; auto measures where nothing else decides.

    typed: whether `threads` was; else OMP_NUM_THREADS counts for more.
    Returns: what auto chose and why, for the console; None where it did not measure.
    """
    most, told = available_cpus(), "OMP_NUM_THREADS" in os.environ
    if threads != "auto" and (typed or not told):
        torch.set_num_threads(threads if typed else min(threads, most))  # a checkpoint's
        return None
    if device.type != "cpu" or most == 1 or told:
        torch.set_num_threads(min(most, torch.get_num_threads()))
        return None
    seconds = median_seconds(probe, (1, most))
    chosen = 1 if ALL_ARE_SLOWER * seconds[1] < seconds[most] else most
    torch.set_num_threads(chosen)
    took = ", ".join(f"{1000 * s:.0f} ms with {count}" for count, s in seconds.items())
    busy = ": the machine is busy" if chosen == 1 else ""
    return f"threads: {chosen} (a probe took {took}{busy})"


def median_seconds(timer, counts):
    """{count: median of `timer(count)`}, the counts in turn so that all meet the same load."""
    rounds = [[timer(count) for count in counts] for _ in range(PROBE_ROUNDS)]
    return dict(zip(counts, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def probe(threads):
    """Seconds of a little work with so many threads: a decoder's, of small products and gates.

    Threads meet after each operation, so one that waits for a busy core delays all.
    """
    torch.set_num_threads(threads)
    hidden, weight = torch.full((64, 512), 0.5), torch.full((512, 2048), 1 / 512)
    started = time.perf_counter()
    for _ in range(PROBE_STEPS):
        i, f, g, o = (hidden @ weight).chunk(4, dim=1)
        hidden = o.sigmoid() * (f.sigmoid() * hidden + i.sigmoid() * g.tanh()).tanh()
    return time.perf_counter() - started


def keep_freed_memory():
    """Have malloc keep the memory that tensors free, for computing on the CPU.

    Memory that goes back to the kernel returns zeroed, page by page: a training step would take
    40,000 page faults. Does nothing where malloc is not glibc's.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes kept at the end of the heap
    FREED_IS_KEPT.set()


def return_freed_memory():
    """Have malloc return large blocks to the kernel after all, undoing `keep_freed_memory`.

    Blocks of hundreds of megabytes whose sizes change from step to step leave holes in the heap that
    the next ones do not fit into: it would grow until memory ran out.
    """
    FREED_IS_KEPT.clear()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger blocks are mappings of their own
        libc.mallopt(-4, 2**16)  # M_MMAP_MAX: so many of them


@contextlib.contextmanager
def large_blocks_returned():
    """Within, freed memory goes back as after `return_freed_memory`; then as before.

    For a loop that keeps a little of each large block, such as its mean. In the heap that would be put
    into the hole which the block left, and the next block would not fit there.
    """
    kept = FREED_IS_KEPT.is_set()
    if kept:
        return_freed_memory()
    try:
        yield
    finally:
        if kept:
            keep_freed_memory()


def memory_shortage(error):
    """What to tell a user of an `error` that means that memory ran out; None of any other."""
    text = str(error)
    if "DataLoader worker" in text and re.search("killed by signal|exited unexpectedly", text):
        return (
            "a process that decodes images was killed, which usually means that memory ran out: "
            "lower --num_workers"
        )
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in text  # no own class
    if not (on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
        return None
    where = "CUDA out of memory" if text.startswith("CUDA") else "out of memory"
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)
    number, unit = asked.groups() if asked else ("", "")
    if unit == "bytes":
        number, unit = f"{int(number) / 1e9:.1f}", "GB"
    amount = f" ({number} {unit} asked for)" if asked else ""
    return f"{where}{amount}: lower --batch_size, --num_workers or the decoder's sizes"


def counted(number, noun):
    """Such as `1 epoch` or `2 epochs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text):
    """`text` with its control characters escaped: names from anywhere must not drive a terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def warn(text):
    """Say on stderr, once for all processes, what a user may not expect."""
    if process_group.rank() == 0:
        print(f"warning: {printable(text)}", file=sys.stderr)


def resolve_precision(name, device):
    """--precision -> float32, bfloat16 or float16; auto takes the fastest with hardware support.

    Raises: ValueError for float16 on a CPU, where torch lacks parts of it.
    """
    if name == "float16" and device.type == "cpu":
        raise ValueError("--precision float16 is for GPUs: give bfloat16 or float32 on a CPU")
    if name in ("float32", "bfloat16", "float16"):
        return name
    if name != "auto":
        raise ValueError(f"--precision {name}: give auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    native = device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
    return "bfloat16" if native else "float32"


def arithmetic(device, precision):
    """What computes there, as far as results show it: cpu, cuda, mps, or "cuda tf32".

    TF32 is how CUDA multiplies float32 from compute capability 8.0 on: with 10 bits of mantissa.
    """
    tf32 = device.type == "cuda" and precision == "float32" and torch.backends.cudnn.allow_tf32
    if tf32 and torch.cuda.get_device_capability(device) >= (8, 0):
        return "cuda tf32"
    return device.type


def leave_broken_pipe():
    """Drop what is left for a stdout that nobody reads, as of `| head`. Returns the exit status."""
    with Path(os.devnull).open("w") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())  # or Python would complain at its exit
    return 128 + signal.SIGPIPE


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; `args[0]` is its number."""


@contextlib.contextmanager
def listen_for_stop():
    """Yield a list that collects SIGINT and SIGTERM; the second of a kind has its usual effect.

    Of several processes each is signalled twice for one request, by Slurm or a terminal and by
    torchrun: there a repeated signal has no effect of its own.
    """
    received = []

    def on_signal(signum, _frame):
        received.append(signum)
        if process_group.world_size() == 1:
            signal.signal(signum, previous[signum])

    signums = (signal.SIGINT, signal.SIGTERM)
    previous = {signum: signal.signal(signum, on_signal) for signum in signums}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def until_stopped(received, items, most=0):
    """Yield from `items`; once any process has had a signal, raise Stopped between two of them.

    most: the largest number of items of any process, where they differ. The processes compare what
    they received after each item, and must do so equally often.
    """
    compared = 0
    for item in items:
        yield item
        stop_if_signalled(received)
        compared += 1
    for _ in range(compared, most):
        stop_if_signalled(received)


def stop_if_signalled(received):
    """Raise Stopped if any process has had a signal; all processes call this together."""
    signum = process_group.all_reduce_max(received[0] if received else 0)
    if signum:
        raise Stopped(signum)

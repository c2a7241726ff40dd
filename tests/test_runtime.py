"""runtime.py: device and precision, signals to stop, and the memory that tensors give back."""

import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import process_group
import runtime
from runtime import (
    Hardware,
    Stopped,
    arithmetic,
    cgroup_quota,
    listen_for_stop,
    median_seconds,
    resolve_device,
    resolve_hardware,
    resolve_precision,
    set_threads,
    until_stopped,
)
from split_data import decode_chunks

# ----------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_cuda_comes_before_mps_before_the_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize("name", ["cud", "cuda:99", "gpu", "meta:x"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^--device {name}: .*give auto") as error:
        resolve_device(name)
    assert "\n" not in str(error.value)


def test_under_torchrun_cuda_is_the_gpu_of_the_process():
    cuda = torch.device("cuda")
    assert [runtime.own_gpu(cuda, rank, 3, 4) for rank in range(3)] == [
        torch.device("cuda", rank) for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("name", "num_gpus", "message"),
    [
        ("cuda:1", 8, "--device cuda:1: torchrun gives each process a GPU of its own"),
        (
            "cuda",
            1,
            "--device cuda: torchrun started 2 processes here, more than the number of GPUs, 1: ",
        ),
        (
            "cuda",
            0,
            "--device cuda: torchrun started 2 processes here, more than the number of GPUs, 0: ",
        ),
    ],
)
def test_under_torchrun_a_gpu_that_cannot_be_given_is_refused(name, num_gpus, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        runtime.own_gpu(torch.device(name), 0, 2, num_gpus)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_under_torchrun_no_other_gpu_is_touched(monkeypatch, name):
    """Every process once made its first tensor on GPU 0, where it took memory for nothing."""
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda _size, device: touched.append(str(device)))
    for variable, value in (("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value)  # the second of two machines with two GPUs, say
    assert resolve_device(name) == torch.device("cuda:1")
    assert touched == (["cuda:1"] if name == "cuda" else [])


@pytest.mark.parametrize(
    ("device", "hardware", "expected"),
    [
        ("cpu", {"amx": False, "avx": False}, "float32"),
        ("cpu", {"amx": True, "avx": False}, "bfloat16"),
        ("cpu", {"amx": False, "avx": True}, "bfloat16"),
        ("cuda", {"capability": (7, 5)}, "float16"),
        ("cuda", {"capability": (8, 0)}, "bfloat16"),
        ("cuda", {"capability": (9, 0)}, "bfloat16"),
        ("mps", {"amx": True, "avx": True}, "float32"),
    ],
)
def test_auto_takes_the_precision_that_the_hardware_has_and_a_given_one_is_kept(
    monkeypatch, device, hardware, expected
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: hardware["amx"])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware["avx"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: hardware["capability"])
    assert resolve_precision("auto", torch.device(device)) == expected
    for name in ("float32", "bfloat16", *(["float16"] if device != "cpu" else [])):
        assert resolve_precision(name, torch.device(device)) == name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_hardware_computes_in_its_precision_and_keeps_freed_memory_on_a_cpu(monkeypatch, precision):
    kept = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: kept.append(True))
    hardware = resolve_hardware("cpu", precision)
    assert hardware == Hardware(torch.device("cpu"), precision) and kept == [True]
    assert hardware.dtype == getattr(torch, precision)
    with hardware.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == hardware.dtype


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"^--precision float16 .*give bfloat16 or float32"):
        resolve_hardware("cpu", "float16")


def test_on_cuda_matrix_products_may_be_tf32(monkeypatch):
    asked, kept = [], []
    monkeypatch.setattr(runtime, "resolve_device", torch.device)
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert resolve_hardware("cuda", "float16") == Hardware(torch.device("cuda"), "float16")
    assert (asked, kept) == (["high"], [])


@pytest.mark.parametrize(
    ("device", "precision", "capability", "tf32", "expected"),
    [
        ("cpu", "float32", None, True, "cpu"),
        ("mps", "float32", None, True, "mps"),
        ("cuda:1", "float32", (9, 0), True, "cuda tf32"),
        ("cuda", "float32", (9, 0), False, "cuda"),
        ("cuda", "float32", (7, 5), True, "cuda"),  # which has none
        ("cuda", "bfloat16", (9, 0), True, "cuda"),
    ],
)
def test_what_computes_is_told_apart(monkeypatch, device, precision, capability, tf32, expected):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert arithmetic(torch.device(device), precision) == expected


# ------------------------------------------------------------------------------------------ the cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_affinity_limits_the_cores_and_the_ranks_of_a_machine_share_them():
    script = "import os, runtime; os.sched_setaffinity(0, {%s}); print(runtime.available_cpus())"
    cores = sorted(os.sched_getaffinity(0))[:2]

    def counted(given, ranks):
        command = [sys.executable, "-c", script % ", ".join(map(str, given))]
        where = {"cwd": Path(runtime.__file__).parent, "text": True}
        return int(
            subprocess.check_output(command, env=os.environ | {"LOCAL_WORLD_SIZE": ranks}, **where)
        )

    assert counted(cores[:1], "1") == 1
    assert counted(cores, "1") == max(1, int(min(len(cores), cgroup_quota())))
    assert counted(cores, "2") == 1
    assert counted(cores, "64") == 1  # never none


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, math.inf),
        ({"job/step/cpu.max": "max 100000"}, math.inf),
        ({"job/step/cpu.max": "150000 100000"}, 1.5),
        ({"job/step/cpu.max": "max 100000", "job/cpu.max": "400000 100000"}, 4),
        ({"job/step/cpu.max": "200000 50000", "cpu.max": "300000 100000"}, 3),  # a container's
        ({"other/cpu.max": "100000 100000"}, math.inf),
    ],
)
def test_the_narrowest_cgroup_quota_counts(tmp_path, limits, expected):
    (tmp_path / "process").mkdir()
    (tmp_path / "process/cgroup").write_text("1:cpu:/old/kind\n0::/job/step\n")
    for name, content in limits.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(content + "\n")
    assert cgroup_quota(tmp_path / "process", tmp_path / "mount") == expected
    assert cgroup_quota(tmp_path / "no such process", tmp_path / "mount") == math.inf


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("alone", "together", "chosen", "reason"),
    [
        (0.080, 0.041, 4, "threads: 4 (a probe took 80 ms with 1, 41 ms with 4)"),
        (0.041, 0.050, 4, "threads: 4 (a probe took 41 ms with 1, 50 ms with 4)"),  # by chance
        (0.041, 0.190, 1, "threads: 1 (a probe took 41 ms with 1, 190 ms with 4: the machine is busy)"),
    ],
)  # fmt: skip
def test_auto_takes_all_unless_one_thread_is_clearly_faster(
    one_thread, monkeypatch, alone, together, chosen, reason
):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime, "available_cpus", lambda: 4)
    monkeypatch.setattr(runtime, "probe", {1: alone, 4: together}.get)
    assert set_threads("auto", CPU, typed=False) == reason
    assert torch.get_num_threads() == chosen


def test_one_slow_round_decides_nothing_and_the_counts_take_turns():
    asked, seconds = [], iter([9.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert median_seconds(lambda n: asked.append(n) or next(seconds), (1, 4)) == {1: 1.0, 4: 2.0}
    assert asked == [1, 4] * 5


def test_the_probe_is_short_and_leaves_the_threads_it_chose(one_thread, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runtime, "available_cpus", lambda: 2)
    state, started = torch.get_rng_state(), time.process_time()
    chosen = re.match(
        r"threads: ([12]) \(a probe took \d+ ms with 1, \d+ ms with 2",
        set_threads("auto", CPU, typed=False),
    )
    assert torch.get_num_threads() == int(chosen[1])
    assert time.process_time() - started < 5  # of both threads; about 0.5 where nothing else runs
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_that_are_typed_or_in_the_environment_are_taken(one_thread, monkeypatch):
    monkeypatch.setattr(runtime, "probe", None)
    monkeypatch.setattr(runtime, "available_cpus", lambda: 4)
    assert (
        set_threads("auto", CPU, typed=False) is None and torch.get_num_threads() == 1
    )  # OMP_NUM_THREADS
    assert set_threads(3, CPU, typed=False) is None and torch.get_num_threads() == 1
    assert set_threads(3, CPU, typed=True) is None and torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (
        set_threads(2, CPU, typed=False) is None and torch.get_num_threads() == 2
    )  # a checkpoint's
    assert set_threads(3, CPU, typed=True) is None and torch.get_num_threads() == 3
    assert (
        set_threads("auto", torch.device("cuda"), typed=False) is None
        and torch.get_num_threads() == 3
    )
    monkeypatch.setattr(runtime, "available_cpus", lambda: 1)
    assert set_threads("auto", CPU, typed=False) is None and torch.get_num_threads() == 1
    assert (
        set_threads(3, CPU, typed=False) is None and torch.get_num_threads() == 1
    )  # smaller machine


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_items_and_the_second_acts_at_once(signum):
    def usual(*_):
        raise InterruptedError

    before = signal.signal(signum, usual)
    try:
        with listen_for_stop() as received:
            items = until_stopped(received, "abc")
            assert next(items) == "a"
            signal.raise_signal(signum)
            assert received == [signum]
            with pytest.raises(Stopped) as stopped:
                next(items)
            assert stopped.value.args == (signum,)
            with pytest.raises(InterruptedError):
                signal.raise_signal(signum)
        assert signal.getsignal(signum) is usual
    finally:
        signal.signal(signum, before)


def test_a_signal_to_another_process_stops_this_one(monkeypatch):
    monkeypatch.setattr(process_group, "all_reduce_max", lambda signum: max(signum, 15))
    with pytest.raises(Stopped, match="15"):
        list(until_stopped([], "ab"))


@pytest.mark.parametrize("items", ["", "a", "ab", "abc"])
def test_processes_with_fewer_items_compare_as_often(monkeypatch, items):
    compared = []
    monkeypatch.setattr(process_group, "all_reduce_max", lambda _: compared.append(1) or 0)
    assert list(until_stopped([], items, most=3)) == [*items]
    assert len(compared) == 3


def test_among_several_processes_a_repeated_signal_is_the_same_request(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with listen_for_stop() as received:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM] * 3


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("héé 犬 🐕 a b\\c.jpg", "héé 犬 🐕 a b\\c.jpg"),
        ("क्ष \u200d.jpg", "क्ष \u200d.jpg"),  # a joiner belongs to its word
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("a\r\nb\tc\x00\x7f\x9b31m", r"a\r\nb\tc\x00\x7f\x9b31m"),
        ("gpj.\u202eexe\u2066", r"gpj.\u202eexe\u2066"),
        ("caf\udce9.jpg", r"caf\udce9.jpg"),
    ],
)
def test_only_what_drives_a_terminal_is_escaped(text, shown):
    assert runtime.printable(text) == shown
    runtime.printable(text).encode()  # so that any stream can take it


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."
            ),
            "CUDA out of memory (20.00 MiB asked for): lower --batch_size, --num_workers or the "
            "decoder's sizes",
        ),
        (
            MemoryError(),
            "out of memory: lower --batch_size, --num_workers or the decoder's sizes",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"),
            "a process that decodes images was killed, which usually means that memory ran out: "
            "lower --num_workers",
        ),
        (RuntimeError("Caught KeyError in DataLoader worker process 0."), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("can't allocate memory"), None),
    ],
)
def test_a_want_of_memory_is_told_from_other_errors(error, line):
    assert runtime.memory_shortage(error) == line


def test_large_blocks_are_returned_while_features_come_in_chunks_and_then_kept_again(monkeypatch):
    kept = threading.Event()
    kept.set()
    monkeypatch.setattr(runtime, "FREED_IS_KEPT", kept)
    monkeypatch.setattr(runtime, "keep_freed_memory", kept.set)
    monkeypatch.setattr(runtime, "return_freed_memory", kept.clear)
    features = SimpleNamespace(paths=range(250), stream=lambda chunks: map(len, chunks))
    states = [(number, kept.is_set()) for number in decode_chunks(features)]
    assert states == [(100, False), (100, False), (50, False)] and kept.is_set()
    abandoned = decode_chunks(features)
    next(abandoned)
    assert not kept.is_set()
    abandoned.close()
    assert kept.is_set()
    kept.clear()  # a large vocabulary's run, which returns its memory all along
    list(decode_chunks(features))
    assert not kept.is_set()


FAULTS = """
import resource, sys, torch, runtime
if sys.argv[1] != "plain":
    runtime.keep_freed_memory()
if sys.argv[1] == "return":
    runtime.return_freed_memory()
for _ in range(36):
    torch.ones(2**24)  # 64 MiB, given back at once
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    warm = faults if _ < 24 else warm  # until there is a hole of that size in the heap
print(faults - warm)
"""


GROWTH = """
import contextlib, re, sys, torch, runtime
runtime.keep_freed_memory()
apart = runtime.large_blocks_returned() if sys.argv[1] == "return" else contextlib.nullcontext()
kept = []
with apart:
    for _ in range(36):
        fine, coarse = torch.ones(2**24).half().float(), torch.ones(2**23).half().float()
        chunk = torch.cat([fine, coarse])  # 96 MiB
        kept.append(torch.ones(2**18))  # 1 MiB
    assert runtime.FREED_IS_KEPT.is_set() == (sys.argv[1] != "return")
assert runtime.FREED_IS_KEPT.is_set()
print(int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_what_is_kept_of_each_large_block_leaves_no_holes_where_they_are_returned():
    root = Path(runtime.__file__).parent
    grown, returned = (
        int(subprocess.check_output([sys.executable, "-c", GROWTH, how], cwd=root, text=True))
        for how in ("keep", "return")
    )
    assert returned < 1200 < grown  # MiB


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_memory_that_tensors_free_is_not_faulted_in_again_unless_it_is_returned():
    root = Path(runtime.__file__).parent
    kept, plain, returned = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], cwd=root, text=True))
        for how in ("keep", "plain", "return")
    )
    assert kept < 100_000 < min(plain, returned)  # 16,384 pages each time

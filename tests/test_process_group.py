"""process_group.py, and training by several processes that torchrun starts on the CPU (gloo)."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import experiment_utils
import flickr_image_caption as program_module
import process_group

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_end_to_end import ATTENTION, TINY, load, program, run_dir, succeed, train

import checkpoints
import runtime
from caption_batches import CaptionBatches

PROGRAM = Path(experiment_utils.__file__).with_name("flickr_image_caption.py")
pytestmark = pytest.mark.usefixtures("shop")
WAIT = 300  # seconds, on a machine that is busy with other things
PLAIN = f"{TINY} --drop_prob 0 --label_smoothing 0.1"
FIRST_GRADIENTS = """
import sys, torch
import flickr_image_caption as program, process_group, runtime

def first_gradients():  # a function, as a reducer alive at the interpreter's end may abort it
    run = program.set_up(options, hardware)
    run.state.optimizer = torch.optim.SGD(run.parameters, lr=0.0)
    batch, features = next(run.training.epoch(0))
    program.train_step(run, features, batch)
    return dict(enumerate(p.grad for p in run.parameters))

options = program.parse_args(sys.argv[2:])
hardware = runtime.resolve_hardware("cpu", options.run.precision)
with process_group.joined(hardware.device):
    gradients = first_gradients()
    if process_group.rank() == 0:
        torch.save(gradients, sys.argv[1])
"""


def environment():
    """One thread per process; a torchrun above this test must not be seen by the one below it."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = {name: value for name, value in os.environ.items() if name not in outer}
    return variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent)}


def torchrun(processes, script, *words, start=subprocess.run, **options):
    """Run `script` as torchrun does, in the test's folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={processes}", str(script), *map(str, words)]
    return start(command, env=environment(), text=True, **options)


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_processes_are_one_run(tmp_path, device):
    """Weights after an epoch to 1e-4, the same scores, one run directory, one cache of both.

    On GPUs, whose sums have no fixed order, to 1e-2.
    """
    attention = f"{PLAIN} {ATTENTION} --device {device}"
    coarser = 1 if device == "cpu" else 100
    alone = train(attention, "--epochs 1")
    Path("feature_cache").unlink()  # the link to the workshop's: an empty one instead
    done = torchrun(2, PROGRAM, *attention.split(), "--batch_size", 40, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Epoch 1 completed") == 1 and done.stdout.count("run directory:") == 1
    together = run_dir(done.stdout)
    config = json.loads((together / "run_config.json").read_text())
    assert config["command"].startswith(f"torchrun --nproc_per_node=2 {PROGRAM} --dataset_type")
    assert (config["environment"]["world_size"], config["environment"]["threads"]) == (2, 1)
    assert len(list(together.parent.iterdir())) == 2  # the other is the run alone
    ours, theirs = load(alone / "best.pt"), load(together / "best.pt")
    for name, weight in ours["model"].items():
        close = {"atol": 1e-4 * coarser, "rtol": 0, "msg": name}
        torch.testing.assert_close(theirs["model"][name], weight, **close)
    for name, tolerance in (("val_loss", 1e-4), ("train_loss", 1e-4), ("CIDEr", 1e-3)):
        expected = pytest.approx(ours["history"][0][name], abs=tolerance * coarser)
        assert theirs["history"][0][name] == expected, name
    (cache,) = Path("feature_cache").iterdir()
    stored = (cache / "features.f16").stat().st_size
    # 36 training and validation images, each once
    assert stored == 36 * 7 * 7 * theirs["encoder"]["channels"] * 2
    assert np.isfinite(np.fromfile(cache / "features.f16", np.float16)).all()
    # from which two processes of an LSTM run take their means
    lstm_words = [*PLAIN.split(), "--decoder", "lstm", "--device", device]
    lstm = torchrun(2, PROGRAM, *lstm_words, capture_output=True)
    assert lstm.returncode == 0, lstm.stderr
    (means,) = Path("feature_cache").glob("*_pooled/features.f32")
    assert means.stat().st_size == 2 * stored // 49
    assert stored == (cache / "features.f16").stat().st_size
    assert np.isfinite(np.fromfile(means, np.float32)).all()
    # and one process goes on where two stopped
    resumed = program("--resume", together / "model_epoch_1.pt", f"--epochs 1 --device {device}")
    assert resumed.status == 0, resumed.err
    assert load(run_dir(resumed) / "model_epoch_2.pt")["step"] == 8


@pytest.mark.slow
def test_the_first_steps_gradients_are_those_of_one_process(tmp_path, monkeypatch):
    script = tmp_path / "gradients.py"
    script.write_text(FIRST_GRADIENTS)
    words = f"{PLAIN} {ATTENTION} --grad_clip 0 --fine_tune_encoder 1".split()
    monkeypatch.setattr(sys, "argv", [str(script), "one.pt", *words])
    runpy.run_path(str(script))
    two = torchrun(2, script, "two.pt", *words, capture_output=True)
    assert two.returncode == 0, two.stderr
    alone, together = load("one.pt"), load("two.pt")
    norm = torch.cat([gradient.flatten() for gradient in alone.values()]).norm()
    for name, gradient in alone.items():
        assert (together[name] - gradient).norm() <= 1e-6 * norm, name


@pytest.mark.slow
def test_two_processes_learn_from_the_reward_together():
    """They draw other samples than one would, of the same weights: the mean reward is alike."""
    flags = f"{PLAIN} {ATTENTION} --scst_epochs 1 --scst_samples 20 --scst_learning_rate 1e-9"
    alone = load(train(flags) / "model_epoch_2.pt")["history"]
    done = torchrun(2, PROGRAM, *flags.split(), capture_output=True)
    assert done.returncode == 0, done.stderr
    together = load(run_dir(done.stdout) / "model_epoch_2.pt")["history"]
    assert together[1]["train_reward"] == pytest.approx(alone[1]["train_reward"], rel=0.1)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line_and_an_intact_checkpoint():
    with Path("err.txt").open("w") as err:
        streams = {"stderr": err, "stdout": subprocess.DEVNULL}
        words = [*PLAIN.split(), *ATTENTION.split(), "--epochs", 500]
        running = torchrun(2, PROGRAM, *words, start=subprocess.Popen, **streams)
        try:
            wait_for(lambda: list(Path().glob("saved_models/**/model_epoch_2.pt")))
            os.kill(wait_for(lambda: worker(running.pid, rank=1)), signal.SIGKILL)
            assert running.wait(WAIT) != 0
        finally:
            running.kill()
    lines = Path("err.txt").read_text().splitlines()
    errors = [line for line in lines if line.startswith("flickr_image_caption.py")]
    assert errors == [f"flickr_image_caption.py: error: {process_group.LOST}"]
    last = checkpoints.resolve_checkpoint("saved_models", "newest")
    assert load(last)["epoch"] >= 2
    assert not list(last.parent.glob("*.partial"))


WAITING = """
import datetime, os, signal, sys, time, torch
import process_group

patience, end = sys.argv[1:]
if patience:
    process_group.PATIENCE = datetime.timedelta(seconds=int(patience))
with process_group.joined(torch.device("cpu")):
    if process_group.rank() == 0:
        time.sleep(4 + int(patience or 0))  # as while another run fills the cache
        if end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        print("got", process_group.broadcast("rows"), file=sys.stderr)
    except ConnectionError as error:
        print(f"lost after {time.monotonic() - started:.0f} s: {error}", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patience", "end", "expected"),
    [
        ("", "goes on", ["got rows"] * 2),
        # what is set counts; it must be enough for the processes to meet on a busy machine
        ("10", "goes on", [r"lost after \d+ s"] * 2),
        ("", "dies", ["lost after [45] s"]),  # when it did, not at the end of all patience
    ],
)
def test_ranks_wait_for_rank_0_however_long_and_notice_at_once_that_it_died(
    tmp_path, patience, end, expected
):
    assert process_group.PATIENCE.days > 7
    (tmp_path / "waiting.py").write_text(WAITING)
    done = torchrun(2, tmp_path / "waiting.py", patience, end, capture_output=True)
    lines = [line for line in done.stderr.splitlines() if re.match("got |lost ", line)]
    assert len(lines) == len(expected), done.stderr
    assert all(map(re.match, expected, lines)), lines


HELD = """
import os, sys, time
from pathlib import Path
import flickr_image_caption as program, process_group

name, number = sys.argv[1], int(sys.argv[2])
original, calls, agent = getattr(program, name), [], os.getppid()

def held(*given, **options):  # the function; call `number` first waits for a file
    calls.append(1)
    if len(calls) == number:
        Path(f"held_{process_group.rank()}").touch()
        while not Path("go").exists() and os.getppid() == agent:
            time.sleep(0.02)
    return original(*given, **options)

setattr(program, name, held)
sys.exit(program.main(program.parse_args(sys.argv[3:])))
"""


def signalled(script, name, number, words):
    """Two processes, each signalled twice in call `number` of a function -> (status, stdout)."""
    with Path("out.txt").open("w") as out, Path("err.txt").open("w") as err:
        streams, held = {"stdout": out, "stderr": err}, [name, number, *words]
        running = torchrun(2, script, *held, start=subprocess.Popen, **streams)
        try:
            wait_for(lambda: len(list(Path().glob("held_*"))) == 2)
            workers = [worker(running.pid, rank) for rank in (0, 1)]
            for process in (*workers, running.pid, *workers):  # as Slurm and the agent signal them
                os.kill(process, signal.SIGTERM)
            Path("go").touch()
            status = running.wait(WAIT)
        finally:
            running.kill()
    for file in Path("go"), *Path().glob("held_*"):
        file.unlink()
    return status, Path("out.txt").read_text()


@pytest.mark.slow
def test_sigterm_under_torchrun_ends_the_processes_once_all_is_saved(tmp_path):
    """In a step of epoch 2, and when gone on from there, in the decoding of its validation."""
    script = tmp_path / "held.py"
    script.write_text(HELD)
    straight = load(train(PLAIN, "--epochs 2") / "model_epoch_2.pt")
    words, stops = [*PLAIN.split(), "--epochs", 2], [("train_step", 6, 80), ("generate", 1, 160)]
    for name, number, position in stops:
        status, out = signalled(script, name, number, words)
        assert status == 1 and "stopped by SIGTERM in epoch 2" in out, Path("err.txt").read_text()
        last = run_dir(out) / "last.pt"
        state = load(last)
        assert (state["epoch"], state["data_position"]["captions"]) == (1, position)
        words = ["--resume", last]
    resumed = load(run_dir(succeed(f"--resume {last}")) / "model_epoch_2.pt")
    assert straight["step"] == resumed["step"] == 8
    for name, weight in straight["model"].items():
        torch.testing.assert_close(resumed["model"][name], weight, atol=1e-4, rtol=0, msg=name)
    for one, other in zip(straight["history"], resumed["history"], strict=True):
        assert other["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)


GLOO = "[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (RuntimeError(GLOO), ConnectionError),
        (torch.distributed.DistNetworkError("the server socket has failed"), ConnectionError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_a_fault_of_ones_own_is_not_blamed_on_a_lost_peer(error, becomes):
    with pytest.raises(becomes) as caught, process_group.lost_peers():
        raise error
    assert (caught.value is error) == (becomes is not ConnectionError)


def test_what_one_process_raises_ends_it_without_waiting_for_the_others(monkeypatch):
    options = program_module.parse_args(TINY.split())
    hardware = runtime.resolve_hardware("cpu", "float32")
    run, gathered = program_module.set_up(options, hardware), []
    step = program_module.train_step

    def failing(run, *given):
        if run.state.loop["step"] == 1:
            raise ValueError("of this process alone")
        return step(run, *given)

    monkeypatch.setattr(program_module, "train_step", failing)
    monkeypatch.setattr(program_module, "start_run", lambda *_: run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "all_reduce_max", lambda number: number)
    monkeypatch.setattr(
        process_group, "all_gather", lambda value: gathered.append(value) or [value]
    )
    with pytest.raises(ValueError, match="of this process alone"):
        program_module.train(options, hardware, None)
    assert run.state.loop["step"] == 1 and not gathered


def worker(launcher, rank):
    """Id of the process of that rank that this torchrun started, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (
                parent == launcher
                and f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes()
            ):
                return int(folder.name)
        except (OSError, IndexError):
            continue
    return None


def wait_for(condition, seconds=WAIT):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def test_testing_and_captioning_are_for_one_process(monkeypatch, shop):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = program("--mode test --model_path", shop / "attention/best.pt")
    assert outcome.status == 2 and "--mode test runs in one process" in outcome.err


def test_a_gpu_that_is_named_under_torchrun_is_one_line_and_status_2(monkeypatch):
    for variable, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value)
    outcome = program(PLAIN, "--device cuda:1")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "error: --device cuda:1: torchrun gives each process a GPU of its own" in outcome.err


@pytest.mark.parametrize(("count", "processes"), [(10, 3), (2, 3), (128, 2), (0, 2)])
def test_shares_cover_everything_once(count, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    covered = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        covered += range(count)[process_group.shard(count)]
    assert covered == list(range(count))


def test_over_the_averaged_gradients_every_caption_counts_once(monkeypatch):
    """A process that has no caption left in a batch computes another's, with weight 0."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    captions = [[[4, 5]], [[6]], [[7]], [[8, 9, 4]], [[5]], [[6, 7]]]
    batches, shares = CaptionBatches(captions, 4, 9, seed=0), []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(batches.epoch(0)))
    first, second = zip(*shares, strict=True)  # of 4 captions, and of 2
    assert sorted(len(share.image_index) for share in first) == [1, 1, 2]
    assert [share.weight for share in first] == [3, 3, 3]
    assert [len(share.image_index) for share in second] == [1, 1, 1]
    assert sorted(share.weight for share in second) == [0, 3, 3]
    for batch, num_captions in ((first, 4), (second, 2)):
        assert {share.num_captions for share in batch} == {num_captions}
        assert sum(share.weight * len(share.image_index) for share in batch) / 3 == num_captions
        num_tokens = sum(share.weight * len(share.targets) for share in batch) / 3
        assert {share.num_tokens for share in batch} == {num_tokens}
    assert first[0].num_tokens + second[0].num_tokens == 10 + 6  # words and <EOS>


def test_alone_nothing_is_sent():
    assert (process_group.world_size(), process_group.rank()) == (1, 0)
    assert process_group.broadcast("x") == "x"
    assert process_group.all_gather(1) == [1]
    assert process_group.all_reduce_max(15) == 15
    assert process_group.all_reduce_sum([1.5, 2]) == [1.5, 2]
    with process_group.joined(torch.device("cpu")):
        assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

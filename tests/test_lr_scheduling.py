"""The learning rate of every epoch and step, for each of the five schedulers, new and resumed.

python tests/test_lr_scheduling.py     prints each schedule's rates and runs the same checks
"""

import contextlib
import copy
import functools
import io
import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from small_runs import make_batch, make_run, one_caption_each

import checkpoints
import flickr_image_caption as program
import run_output
import train_state
from caption_options import inherit, parse_args
from runtime import Hardware
from trained_models import open_checkpoint

RATE, BATCHES = 0.01, 4  # --learning_rate, batches per epoch
SCHEDULES = {
    "none": "",
    "reduce_lr_on_plateau": "--scheduler_patience 1 --scheduler_factor 0.5 --min_lr 0.001",
    "step": "--scheduler_step_size 3 --scheduler_gamma 0.3",
    "cosine": "--scheduler_t_max 5 --min_lr 0.0001",
    "exponential": "--scheduler_gamma 0.8",
    "one_cycle": "--warmup_epochs 2",
}
LOSSES = [5.0, 4.0, 4.1, 4.2, 4.3, 3.9, 3.95, 3.96, 3.97, 3.98]  # validation, epoch by epoch
# one caption of one image
BATCH = make_batch(torch.tensor([[1, 5, 6, 2]]), torch.tensor([3]), torch.tensor([0]))
FEATURES = torch.ones(1, 2, 3)
EPOCH = one_caption_each(BATCHES)
SAVE = run_output.save
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_checkpoint_per_epoch(monkeypatch):
    monkeypatch.setattr(run_output, "save", lambda run, name, is_best=False: None)
    monkeypatch.setattr(checkpoints, "link_file", lambda source, path: None)


def options(name, *more, epochs=8):
    """Options of a run with that schedule."""
    scheduled = [] if name == "none" else ["--use_scheduler", "--scheduler_type", name]
    given = ["--epochs", str(epochs), "--learning_rate", str(RATE), *scheduled]
    return parse_args([*given, *SCHEDULES[name].split(), *more])


def start(options, folder, checkpoint=None, batches=BATCHES):
    """A run over one constant batch, new or gone on from a checkpoint."""
    torch.manual_seed(0)
    decoder = program.LSTMDecoder(3, 8, embed_size=3, hidden_size=4, num_layers=1, drop_prob=0.0)
    if checkpoint:
        decoder.load_state_dict(checkpoint["model"])
    run = make_run(decoder, options, num_batches=batches, checkpoint=checkpoint)
    run.validation = SimpleNamespace(table=["an image"])
    run.tracker = SimpleNamespace(log_metrics=lambda **row: None, log_samples=lambda *_: None)
    run.samples = [SimpleNamespace(image="dog.jpg", caption="a dog runs")]
    run.splits = {"train": [], "val": [], "test": []}
    run.folder, run.config = folder, options.as_dict() | {"image_size": 224}
    return run


def current_rate(run):
    """The learning rate of the next step."""
    return run.state.optimizer.param_groups[0]["lr"]


def take_step(run):
    """As the loop over an epoch does."""
    program.train_step(run, FEATURES, BATCH)
    run.state.loop["captions"] += 1
    run.state.loop["step"] += 1


def rates(run, stop=None):
    """Train to the plan's last epoch, or for `stop` steps: every step's rate, read before it."""
    found, loop = [], run.state.loop
    while loop["epoch"] < run.state.plan["epochs"]:
        for _ in range(loop["captions"], run.training.batches.num_batches):
            if len(found) == stop:
                return found
            found.append(current_rate(run))
            take_step(run)
        row = {"epoch": loop["epoch"] + 1, "train_loss": -loop["epoch"]}
        row |= {"val_loss": LOSSES[loop["epoch"]], "learning_rate": found[-1]}
        row |= {"CIDEr": 1 / (1 + loop["epoch"]), "BLEU-4": 0.0}
        row |= {"share_unique": 1.0, "share_cut": 0.0, "epoch_time_seconds": 6.0}
        run_output.record_epoch(run, row, run.state.epoch_finished(row))
    return found


@functools.cache
def straight_through(name, *more):
    """Every step's rate of a run of 8 epochs that was never stopped, and the run."""
    run = start(options(name, *more), Path())
    return rates(run), run


def per_epoch(found):
    """The rate of each epoch; it must not change within one."""
    epochs = [found[start : start + BATCHES] for start in range(0, len(found), BATCHES)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


def plateau(losses, patience=1, factor=0.5, least=0.001):
    """ReduceLROnPlateau: cut the rate after more than `patience` epochs without a loss 0.01 % below the best."""
    rate, best, waited, found = RATE, math.inf, 0, []
    for loss in losses:
        found.append(rate)
        best, waited = (loss, 0) if loss < best * 0.9999 else (best, waited + 1)
        if waited > patience:
            rate, waited = max(rate * factor, least), 0
    return found


def cosine(start, end, share):
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def test_one_cycle_rises_to_each_groups_own_rate(tmp_path):
    """The encoder's, where it is fine-tuned, is another."""
    settled = options("one_cycle", "--fine_tune_encoder", "1", "--encoder_learning_rate", "0.003")
    captioner = start(settled, tmp_path).captioner
    captioner.encoder.tail = torch.nn.Linear(1, 1)
    plan = {"schedule": "one_cycle", "epochs": 4, "reward_epochs": 0, "batches": 4, "steps": 16}
    state, found = program.new_state(captioner, settled, plan, "any"), []
    for _ in range(16):
        found.append([group["lr"] for group in state.optimizer.param_groups])
        state.optimizer.step()
        state.step_finished()
    decays, others, tuned = zip(*found, strict=True)
    assert decays == others and max(decays) == pytest.approx(0.01)
    assert tuned == pytest.approx([0.3 * rate for rate in decays])


@pytest.mark.parametrize(
    "typed, factors",
    [({"learning_rate": 0.02}, (2, 1)), ({"encoder_learning_rate": 0.006}, (1, 2))],
)
def test_each_groups_rate_is_scaled_on_resume_by_its_own_option(tmp_path, typed, factors):
    settled = options("one_cycle", "--fine_tune_encoder", "1", "--encoder_learning_rate", "0.003")
    captioner = start(settled, tmp_path).captioner
    captioner.encoder.tail = torch.nn.Linear(1, 1)
    plan = {"schedule": "one_cycle", "epochs": 4, "reward_epochs": 0, "batches": 4, "steps": 16}
    state = program.new_state(captioner, settled, plan, "any")
    before = [group["max_lr"] for group in state.optimizer.param_groups]
    checkpoint = {"config": settled.as_dict(), "plan": plan}
    program.change_course(
        state, settled._replace(training=settled.training._replace(**typed)), checkpoint
    )
    after = [group["max_lr"] for group in state.optimizer.param_groups]
    decoder, encoder = factors
    assert after == pytest.approx([decoder * before[0], decoder * before[1], encoder * before[2]])


def one_cycle(steps, warmup_steps):
    """The rate of every step: half cosines from RATE / 25 up to RATE, then down to RATE / 250,000."""
    peak = warmup_steps - 1
    return [
        cosine(RATE / 25, RATE, step / peak) if step <= peak
        else cosine(RATE, RATE / 25e4, (step - peak) / (steps - 1 - peak))
        for step in range(steps)
    ]  # fmt: skip


# New runs


def test_without_use_scheduler_the_rate_is_constant(tmp_path):
    run = start(options("none"), tmp_path)
    assert run.state.scheduler is None and run.state.plan["schedule"] is None
    assert rates(run) == [RATE] * 8 * BATCHES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step", [RATE * 0.3 ** (epoch // 3) for epoch in range(8)]),
        ("exponential", [RATE * 0.8**epoch for epoch in range(8)]),
        (
            "cosine",
            [cosine(RATE, 1e-4, epoch / 5) for epoch in range(8)],
        ),  # beyond T_max, 5, it climbs
        # 4.1 and 4.2 are two epochs without a better loss: half. 3.9 is better again; 3.95 is the first that is not
        ("reduce_lr_on_plateau", [RATE, RATE, RATE, RATE, RATE / 2, RATE / 2, RATE / 2, RATE / 2]),
    ],
)
def test_the_rate_of_every_epoch(name, expected):
    found, _ = straight_through(name)
    assert per_epoch(found) == pytest.approx(expected, rel=1e-6)


def test_the_plateau_watches_the_validation_loss_and_stops_at_min_lr(tmp_path):
    typed = ["--scheduler_patience", "0", "--min_lr", "0.003"]
    run = start(options("reduce_lr_on_plateau", *typed, epochs=10), tmp_path)
    found = per_epoch(rates(run))  # the training loss falls in every epoch
    assert found == pytest.approx(plateau(LOSSES, patience=0, least=0.003), rel=1e-6)
    assert found == pytest.approx(
        [0.01, 0.01, 0.01, 0.005, 0.003, 0.003, 0.003, 0.003, 0.003, 0.003]
    )


@pytest.mark.parametrize("warmup", [0, 2, 7])
def test_one_cycle_moves_with_every_batch_up_to_the_learning_rate(tmp_path, warmup):
    found = rates(start(options("one_cycle", "--warmup_epochs", str(warmup)), tmp_path))
    assert found == pytest.approx(one_cycle(8 * BATCHES, warmup * BATCHES), rel=1e-6)
    if warmup:
        assert max(found) == pytest.approx(RATE)
        assert found.index(max(found)) == warmup * BATCHES - 1  # the last batch of the warm-up
    assert found[-1] == pytest.approx(RATE / 25 / 1e4)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_one_cycle_with_one_batch_per_epoch(tmp_path, warmup):
    run = start(options("one_cycle", "--warmup_epochs", str(warmup)), tmp_path, batches=1)
    found = rates(run)
    assert len(found) == 8 and max(found) <= RATE * (1 + 1e-9) and all(rate > 0 for rate in found)
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("none", "none"),
        ("reduce_lr_on_plateau", "ReduceLROnPlateau (factor=0.5, patience=1)"),
        ("step", "StepLR (step_size=3, gamma=0.3)"),
        ("cosine", "CosineAnnealingLR (T_max=5)"),
        ("exponential", "ExponentialLR (gamma=0.8)"),
        ("one_cycle", "OneCycleLR (max_lr=0.01, warmup_epochs=2, steps=32)"),
    ],
)
def test_each_epoch_says_its_rate_and_schedule(tmp_path, capsys, name, line):
    run = start(options(name), tmp_path)
    found = rates(run)
    blocks = capsys.readouterr().out.split("Epoch ")[1:]
    assert len(blocks) == 8
    for number, block in enumerate(blocks, start=1):
        lines = block.splitlines()
        assert lines[0] == f"{number} completed ({number}/8):"
        assert lines[1] == f"  Training Loss: {1 - number:.5f}"
        assert lines[2] == f"  Validation Loss: {LOSSES[number - 1]:.5f}"
        assert lines[3] == f"  Learning Rate: {found[number * BATCHES - 1]:.6f}"
        assert lines[4] == f"  Scheduler: {line}"
        assert lines[6] == f"  Model checkpoint saved (best: {number == 1})"


@pytest.mark.parametrize(
    ("name", "given", "epochs", "said"),
    [
        (
            "cosine",
            ["--scheduler_t_max", "10"],
            11,
            ["--epochs 11", "--scheduler_t_max 10", "climbs"],
        ),
        ("cosine", ["--scheduler_t_max", "10"], 10, []),
        (
            "exponential",
            ["--scheduler_gamma", "0.1"],
            5,
            ["--scheduler_gamma 0.1", "3 epochs", "0.001"],
        ),
        ("exponential", ["--scheduler_gamma", "0.5"], 5, ["--scheduler_gamma 0.5", "0.12"]),
        ("exponential", ["--scheduler_gamma", "0.51"], 5, []),
        ("step", ["--scheduler_gamma", "0.1"], 20, []),
        ("none", [], 30, []),
    ],
)
def test_a_schedule_that_surprises_is_announced(capsys, name, given, epochs, said):
    settled = options(name, *given, epochs=epochs)
    program.warn_about_schedule(settled.schedule, program.make_plan(settled, EPOCH))
    message = capsys.readouterr().err
    assert message.count("warning") == bool(said)
    assert all(part in message for part in said)


# Resumed runs


def resume(folder, run, *typed, batches=BATCHES):
    """A new run that goes on from where `run` stands; what is not typed comes from its checkpoint."""
    SAVE(run, "last.pt")
    settled, checkpoint = open_checkpoint(
        parse_args(["--model_path", str(folder / "last.pt"), *typed])
    )
    return start(settled, folder, checkpoint, batches)


def assert_same(one, other):
    """Nested plain values and tensors are equal, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for value, other_value in zip(one, other, strict=True):
            assert_same(value, other_value)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@every_schedule
@pytest.mark.parametrize("done", [1, 3 * BATCHES, 5 * BATCHES + 2])
def test_a_state_that_was_loaded_is_the_state_that_was_given(tmp_path, name, done):
    settled = options(name)
    run = start(settled, tmp_path)
    rates(run, stop=done)
    run.state.loop |= {"loss_sum": 12.5, "tokens": 7, "seconds": 3.25, "rate": 0.004}
    run.state.history = [{"epoch": 1, "CIDEr": 0.5}]
    torch.rand(3)  # the random state has moved on
    given = copy.deepcopy(run.state.state_dict())
    torch.manual_seed(99)
    captioner = start(settled, tmp_path).captioner
    other = program.new_state(captioner, settled, dict(given["plan"]), run.state.order)
    other.load_state_dict(given)
    assert_same(other.state_dict(), given)
    assert other.loop == run.state.loop


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_state_of_another_precision_goes_on_in_float16_and_back(tmp_path, precision):
    """Only float16 scales its losses; its scaler starts anew where the checkpoint has none."""
    settled = options("cosine")
    device = torch.device("cpu")
    run = start(settled, tmp_path)
    rates(run, stop=3)
    states = []
    for hardware in (Hardware(device, precision), Hardware(device, "float16")) * 2:
        captioner = start(settled, tmp_path).captioner
        captioner.hardware = hardware
        plan = dict(run.state.plan)
        states.append(program.new_state(captioner, settled, plan, run.state.order))
        states[-1].load_state_dict((states[-2] if states[1:] else run.state).state_dict())
    assert [state.scaler.is_enabled() for state in states] == [False, True, False, True]
    assert states[-1].scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()
    assert states[-1].loop == run.state.loop


def test_the_loss_scale_of_float16_goes_on(tmp_path):
    settled = options("none")
    run = start(settled, tmp_path)
    run.captioner.hardware = Hardware(torch.device("cpu"), "float16")
    states = [
        program.new_state(run.captioner, settled, dict(run.state.plan), "theirs") for _ in range(2)
    ]
    scale = {"scale": 128.0, "_growth_tracker": 5}
    states[0].scaler.load_state_dict(states[0].scaler.state_dict() | scale)
    states[1].load_state_dict(states[0].state_dict())
    assert states[1].scaler.state_dict().items() >= scale.items()


@every_schedule
@pytest.mark.parametrize(
    "done", [3 * BATCHES, 3 * BATCHES + 2]
)  # after an epoch; in the middle of one
def test_stopped_and_resumed_is_straight_through(tmp_path, name, done):
    expected, straight = straight_through(name)
    stopped = start(options(name), tmp_path)
    before = rates(stopped, stop=done)
    resumed = resume(tmp_path, stopped)
    assert type(resumed.state.scheduler) is type(straight.state.scheduler)
    assert before + rates(resumed) == expected
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@every_schedule
def test_epochs_typed_on_resume_are_additional_and_the_schedule_goes_on(tmp_path, name, capsys):
    expected, _ = straight_through(name)
    run = start(options(name, epochs=8 if name == "one_cycle" else 4), tmp_path)
    before = rates(run, stop=4 * BATCHES)
    resumed = resume(tmp_path, run, "--epochs", "4")
    assert resumed.state.plan == run.state.plan | {"epochs": 8}
    assert before + rates(resumed) == expected
    assert "Epoch 8 completed (8/8)" in capsys.readouterr().out


def test_one_cycle_keeps_its_first_plan_whatever_number_of_epochs_is_typed(tmp_path, capsys):
    expected = rates(start(options("one_cycle", epochs=5), tmp_path))
    run = start(options("one_cycle", epochs=5), tmp_path)
    before = rates(run, stop=1 * BATCHES)
    capsys.readouterr()
    resumed = resume(tmp_path, run, "--epochs", "7")  # 8 in all
    assert capsys.readouterr().err.count("warning: one_cycle was planned for 20 steps") == 1
    found = before + rates(resumed)
    assert found[:20] == pytest.approx(expected)
    assert found[20:] == [found[19]] * 3 * BATCHES  # past its end the rate stays


@pytest.mark.parametrize(("batches", "warmup"), [(2, 2), (8, 2), (8, 0), (3, 2)])
def test_one_cycle_goes_on_along_the_same_curve_in_batches_of_another_size(
    tmp_path, capsys, batches, warmup
):
    """After 2 of 8 epochs; the curve over epochs is that of a run with such batches all along."""
    settled = options("one_cycle", "--warmup_epochs", str(warmup))
    run = start(settled, tmp_path)
    rates(run, stop=2 * BATCHES)
    resumed = resume(tmp_path, run, batches=batches)
    assert resumed.state.plan["steps"] == 8 * batches
    found = rates(resumed)
    straight = one_cycle(8 * batches, warmup * batches)
    assert found[1:] == pytest.approx(straight[2 * batches + 1 :], rel=1e-6)
    assert found[-1] == pytest.approx(RATE / 25 / 1e4) and max(found[batches:]) < RATE
    assert "warning" not in capsys.readouterr().err


def test_one_cycle_within_its_plan_warns_of_nothing(tmp_path, capsys):
    run = start(options("one_cycle"), tmp_path)
    rates(run, stop=2 * BATCHES + 1)
    resume(tmp_path, run)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["step", "exponential", "cosine", "one_cycle"])
@pytest.mark.parametrize(("old", "moved"), [("reduce_lr_on_plateau", RATE / 2), ("none", RATE)])
def test_another_type_of_schedule_starts_fresh_and_says_so(tmp_path, name, old, moved, capsys):
    run = start(options(old, epochs=6), tmp_path)
    assert rates(run, stop=5 * BATCHES)[-1] == moved
    typed = ["--use_scheduler", "--scheduler_type", name, *SCHEDULES[name].split(), "--epochs", "3"]
    resumed = resume(tmp_path, run, *typed)
    assert (
        f"--scheduler_type {name} is new to this run: its schedule starts now"
        in capsys.readouterr().out
    )
    expected = {
        "step": [RATE] * 3 * BATCHES,
        "exponential": [RATE * 0.8**epoch for epoch in range(3) for _ in range(BATCHES)],
        "cosine": [cosine(RATE, 1e-4, epoch / 5) for epoch in range(3) for _ in range(BATCHES)],
        "one_cycle": one_cycle(3 * BATCHES, 2 * BATCHES),
    }
    assert rates(resumed) == pytest.approx(expected[name], rel=1e-6)


@every_schedule
def test_the_same_type_typed_again_goes_on(tmp_path, name, capsys):
    expected, _ = straight_through(name)
    run = start(options(name), tmp_path)
    before = rates(run, stop=3 * BATCHES)
    typed = [] if name == "none" else ["--use_scheduler", "--scheduler_type", name]
    assert before + rates(resume(tmp_path, run, *typed)) == expected
    assert "is new to this run" not in capsys.readouterr().out


@every_schedule
def test_a_learning_rate_typed_on_resume_scales_the_rest_of_the_schedule(tmp_path, name):
    free = ["--min_lr", "0"] if "--min_lr" in SCHEDULES[name] else []
    expected, _ = straight_through(name, *free)
    run = start(options(name, *free), tmp_path)
    rates(run, stop=5 * BATCHES)
    found = rates(resume(tmp_path, run, "--learning_rate", str(RATE / 2)))
    assert found == pytest.approx([rate / 2 for rate in expected[5 * BATCHES :]], rel=1e-6)


def test_a_gamma_typed_on_resume_holds_from_there_on(tmp_path):
    run = start(options("exponential"), tmp_path)
    rates(run, stop=3 * BATCHES)
    found = per_epoch(rates(resume(tmp_path, run, "--scheduler_gamma", "0.5")))
    assert found == pytest.approx([RATE * 0.8**3 * 0.5**epoch for epoch in range(5)])


@pytest.mark.parametrize("name", ["none", "cosine"])
def test_a_weight_decay_typed_on_resume_holds_from_there_on(tmp_path, name):
    run = start(options(name, "--weight_decay", "0.1"), tmp_path)
    rates(run, stop=3 * BATCHES)
    for typed, expected in (([], [0.1, 0.0]), (["--weight_decay", "0.3"], [0.3, 0.0])):
        groups = resume(tmp_path, run, *typed).state.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == expected


# The plan


def test_a_new_runs_plan():
    expected = {"epochs": 8, "reward_epochs": 0, "batches": BATCHES, "steps": 8 * BATCHES}
    expected |= {"schedule": "cosine"}
    assert program.make_plan(options("cosine"), EPOCH) == expected
    assert program.make_plan(options("none"), EPOCH) == expected | {"schedule": None}


def resumed_plan(typed, epoch, batch=0):
    """The plan of a run that goes on from a cosine of 8 epochs, with the options typed."""
    first = options("cosine")
    plan = program.make_plan(first, EPOCH)
    checkpoint = {"plan": plan, "epoch": epoch, "data_position": {"captions": batch}}
    resumed = parse_args(["--resume", "model_epoch_5.pt", *typed.split()])
    resumed = inherit(resumed, "model_epoch_5.pt", first.as_dict())
    return program.make_plan(resumed, EPOCH, checkpoint)


@pytest.mark.parametrize(
    ("typed", "batch", "epochs", "steps", "schedule"),
    [
        ("", 2, 8, 32, "cosine"),
        ("--use_scheduler --scheduler_type cosine", 2, 8, 32, "cosine"),
        ("--use_scheduler --scheduler_type cosine --epochs 2", 0, 7, 32, "cosine"),
        ("--use_scheduler --scheduler_type one_cycle", 3, 8, 9, "one_cycle"),  # three epochs left
        ("--use_scheduler --scheduler_type one_cycle --epochs 6", 0, 11, 24, "one_cycle"),
    ],
)
def test_the_plan_of_a_run_that_goes_on_after_epoch_5(typed, batch, epochs, steps, schedule):
    expected = {"epochs": epochs, "reward_epochs": 0, "batches": BATCHES, "steps": steps}
    assert resumed_plan(typed, 5, batch) == expected | {"schedule": schedule}


def test_the_reward_s_epochs_follow_the_schedule_s():
    plan = program.make_plan(options("one_cycle", "--scst_epochs", "3"), EPOCH)
    assert (plan["epochs"], plan["reward_epochs"], plan["steps"]) == (11, 3, 8 * BATCHES)


@pytest.mark.parametrize(
    ("planned", "epoch", "inside", "typed", "asked", "expected"),
    [
        ((11, 3), 5, False, "", (10, 3), (11, 3)),
        ((11, 3), 9, True, "", (10, 3), (11, 3)),
        ((11, 3), 5, False, "epochs", (1, 3), (9, 3)),  # those on the reward follow
        ((11, 3), 5, False, "epochs", (0, 3), (8, 3)),
        ((11, 3), 5, True, "epochs", (0, 3), (9, 3)),  # the epoch ends as it began
        ((11, 3), 5, False, "scst_epochs", (10, 0), (8, 0)),
        ((8, 0), 8, False, "scst_epochs", (10, 2), (10, 2)),
        ((8, 0), 5, False, "epochs scst_epochs", (0, 2), (7, 2)),
        ((11, 3), 10, False, "scst_epochs", (10, 4), (14, 6)),  # additional ones
        ((11, 3), 8, False, "scst_epochs", (10, 1), (9, 1)),
    ],
)
def test_a_run_that_goes_on_has_the_epochs_that_are_asked_for(
    planned, epoch, inside, typed, asked, expected
):
    plan = dict(zip(("epochs", "reward_epochs"), planned, strict=True))
    found = train_state.planned_epochs(plan, epoch, inside, set(typed.split()), *asked)
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(
    "typed", ["epochs", "learning_rate", "use_scheduler scheduler_type", "scheduler_type"]
)
def test_epochs_on_captions_do_not_follow_the_reward_s(typed):
    plan = {"epochs": 11, "reward_epochs": 3}
    for epoch in (8, 11):
        with pytest.raises(ValueError, match="is for epochs on captions, and these are done"):
            train_state.planned_epochs(plan, epoch, False, set(typed.split()), 1, 3)


def test_a_new_schedule_on_resume_warms_up_for_a_share_of_the_epochs_that_are_left(tmp_path):
    run = start(options("cosine"), tmp_path)
    rates(run, stop=4 * BATCHES)
    typed = ["--use_scheduler", "--scheduler_type", "one_cycle", "--warmup_epochs", "2"]
    scheduler = resume(tmp_path, run, *typed).state.scheduler
    assert scheduler.total_steps == 4 * BATCHES
    assert scheduler._schedule_phases[0]["end_step"] == pytest.approx(2 * BATCHES - 1, abs=1e-3)


def test_a_plan_that_goes_on_keeps_its_warm_up(tmp_path):
    run = start(options("one_cycle"), tmp_path)
    rates(run, stop=4 * BATCHES)
    with pytest.raises(ValueError, match="--warmup_epochs belongs to a new plan"):
        resume(tmp_path, run, "--warmup_epochs", "3")


def test_a_plan_that_is_done_asks_for_epochs():
    with pytest.raises(ValueError, match="its plan of 8 epochs is done: give --epochs for more"):
        resumed_plan("", 8)
    assert resumed_plan("--epochs 1", 8)["epochs"] == 9
    assert resumed_plan("--scst_epochs 1", 8)["reward_epochs"] == 1


def print_rates():
    """A line for each schedule: the rate that each epoch begins at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_output, "save", lambda run, name: None)
        for name in SCHEDULES:
            with contextlib.redirect_stdout(io.StringIO()):
                found, _ = straight_through(name)
            print(f"{name:21}", *(f"{rate:.6f}" for rate in found[::BATCHES]))


if __name__ == "__main__":
    print_rates()
    raise SystemExit(pytest.main([__file__, "-q", *sys.argv[1:]]))

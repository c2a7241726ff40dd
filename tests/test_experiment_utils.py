"""The run directory, its files and plots, and checkpoints on disk; a checkpoint here is a small dictionary."""

import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import checkpoints
import experiment_utils
from checkpoints import (
    check_writable_dir,
    load_checkpoint,
    prune_checkpoints,
    replace_file,
    resolve_checkpoint,
    save_checkpoint,
    write_json,
    write_text,
)
from experiment_utils import (
    RunTracker,
    best_epoch,
    create_run_dir,
    environment,
    git_info,
    random_state,
    run_name,
    set_random_state,
    set_seed,
)

STAMP = "20241201_143022"
CONFIG = {  # document A's example
    "seed": 7, "encoder": "resnet50", "dataset_type": "flickr30k", "decoder": "attention", "epochs": 20,
    "batch_size": 32, "learning_rate": 0.0005, "embed_size": 512, "hidden_size": 1024, "num_layers": 3,
    "attention_dim": 512, "drop_prob": 0.3, "num_workers": 4, "use_scheduler": True, "scheduler_type": "cosine",
    "scheduler_t_max": 20, "min_lr": 1e-6, "save_attention_viz": True, "attention_viz_samples": 5,
    "advanced_attention_viz": True,
}  # fmt: skip
DOCUMENT_CONFIG = """{
  "dataset_type": "flickr30k",
  "decoder_type": "attention",
  "epochs": 20,
  "batch_size": 32,
  "learning_rate": 0.0005,
  "embed_size": 512,
  "hidden_size": 1024,
  "num_layers": 3,
  "attention_dim": 512,
  "drop_prob": 0.3,
  "num_workers": 4,
  "use_scheduler": true,
  "scheduler_type": "cosine",
  "scheduler_t_max": 20,
  "min_lr": 1e-6,
  "save_attention_viz": true,
  "attention_viz_samples": 5,
  "advanced_attention_viz": true,
  "timestamp": "20241201_143022"
}"""
DOCUMENT_SUMMARY = """Training Run Summary
===================

Run Directory: flickr30k_attention_ep20_bs32_lr5e-04_cosine_att_20241201_143022
Timestamp: 20241201_143022

Dataset: flickr30k
Decoder: attention
Epochs: 20
Batch Size: 32
Learning Rate: 0.0005
Embed Size: 512
Hidden Size: 1024
Num Layers: 3
Attention Dim: 512
Dropout: 0.3
Num Workers: 4

Learning Rate Scheduler: cosine
  T_max: 20
  Min LR: 1e-06

Attention Visualization: Enabled
  Samples: 5
  Advanced: True

Full configuration saved to: run_config.json
"""
COMMAND = ["python", "flickr_image_caption.py", "--image_dir", "my pictures"]


def checkpoint(**changes):
    state = {
        "config": {"decoder": "lstm"}, "vocabulary": {"words": ["hund", "犬"]}, "model": {"weight": torch.arange(6.0)},
        "optimizer": {"state": {}}, "scheduler": None, "scaler": None, "plan": {"epochs": 3}, "epoch": 2, "step": 40,
        "data_position": 0, "history": [], "best_score": 0.5, "early_stopping": 0, "random_state": random_state(),
        "encoder": {"name": "resnet50"}, "splits": {"train": ["a.jpg"]},
    }  # fmt: skip
    return state | changes


def row(epoch, **metrics):
    return {
        "epoch": epoch, "train_loss": 4 / epoch, "val_loss": 1 + 3 / epoch, "learning_rate": 1e-3 / epoch,
        "epoch_time_seconds": 1.5,
    } | metrics  # fmt: skip


def touch(path, written=1_700_000_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (written, written))
    return path


# ------------------------------------------------------------------------------------------------- the run directory


@pytest.mark.parametrize(
    ("changes", "stamp", "expected"),
    [
        (
            {"dataset_type": "flickr8k", "decoder": "lstm", "epochs": 15, "batch_size": 64, "learning_rate": 0.001,
             "save_attention_viz": False},
            STAMP,
            "flickr8k_lstm_ep15_bs64_lr1e-03_cosine_20241201_143022",
        ),
        (
            {"epochs": 30, "batch_size": 128, "learning_rate": 0.0001, "use_scheduler": False},
            "20241201_143045",
            "flickr30k_attention_ep30_bs128_lr1e-04_att_20241201_143045",
        ),
        ({}, STAMP, "flickr30k_attention_ep20_bs32_lr5e-04_cosine_att_20241201_143022"),
    ],
)  # fmt: skip
def test_run_name_is_document_a_s(changes, stamp, expected):
    assert run_name(CONFIG | changes, stamp) == expected


def test_run_name_keeps_every_digit_of_the_learning_rate():
    assert "_lr2.5e-04_" in run_name(CONFIG | {"learning_rate": 0.00025}, STAMP)
    assert "_lr1e+00_" in run_name(CONFIG | {"learning_rate": 1.0}, STAMP)


def test_resnet50_writes_resnet_and_other_encoders_their_own_name(tmp_path):
    assert (
        create_run_dir(tmp_path, CONFIG, STAMP).parent
        == tmp_path / "flickr30k" / "resnet_attention"
    )
    mobile = create_run_dir(
        tmp_path, CONFIG | {"encoder": "mobilenet_v2", "decoder": "lstm"}, STAMP
    )
    assert mobile.parent == tmp_path / "flickr30k" / "mobilenet_v2_lstm"


def test_run_directories_of_one_second_and_two_processes_are_distinct(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        made = pool.starmap(create_run_dir, [(tmp_path, CONFIG, STAMP)] * 40, chunksize=1)
    name = run_name(CONFIG, STAMP)
    assert sorted(run_dir.name for run_dir in made) == sorted(
        [name] + [f"{name}_{n}" for n in range(2, 41)]
    )


def test_run_directory_carries_the_local_time_of_its_making(tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment_utils.time, "strftime", lambda layout: {"%Y%m%d_%H%M%S": STAMP}[layout]
    )
    assert create_run_dir(tmp_path, CONFIG).name.endswith("_att_20241201_143022")


def test_run_config_opens_with_document_a_s_keys_and_keeps_everything_else(tmp_path):
    run_dir = create_run_dir(tmp_path, CONFIG, STAMP)
    RunTracker(run_dir, CONFIG | {"cache_dir": Path("feature_cache")}, COMMAND)
    written = json.loads((run_dir / "run_config.json").read_text())
    expected = json.loads(DOCUMENT_CONFIG)
    assert list(written.items())[: len(expected)] == list(expected.items())
    rest = list(written)[len(expected) :]
    assert rest == ["seed", "encoder", "cache_dir", "command", "git", "environment"]
    assert (written["seed"], written["cache_dir"]) == (7, "feature_cache")
    assert written["command"] == "python flickr_image_caption.py --image_dir 'my pictures'"
    assert written["environment"]["torch"] == torch.__version__.split("+")[0]


def test_run_summary_is_document_a_s_and_the_command(tmp_path):
    run_dir = create_run_dir(tmp_path, CONFIG, STAMP)
    RunTracker(run_dir, CONFIG, COMMAND)
    command = (
        "\nCommand to reproduce:\n  python flickr_image_caption.py --image_dir 'my pictures'\n"
    )
    assert (run_dir / "run_summary.txt").read_text() == DOCUMENT_SUMMARY + command


@pytest.mark.parametrize(
    ("scheduler", "flags", "lines"),
    [
        ("step", {"scheduler_step_size": 7, "scheduler_gamma": 0.1}, ["  Step Size: 7", "  Gamma: 0.1"]),
        ("reduce_lr_on_plateau", {"scheduler_patience": 3, "scheduler_factor": 0.5},
         ["  Patience: 3", "  Factor: 0.5", "  Min LR: 1e-06"]),
        ("exponential", {"scheduler_gamma": 0.1}, ["  Gamma: 0.1"]),
        ("one_cycle", {"warmup_epochs": 2}, ["  Warmup Epochs: 2"]),
    ],
)  # fmt: skip
def test_run_summary_shows_the_chosen_scheduler_s_own_parameters(scheduler, flags, lines):
    text = experiment_utils.run_summary(
        "run", CONFIG | flags | {"scheduler_type": scheduler}, COMMAND
    )
    assert f"Learning Rate Scheduler: {scheduler}\n" + "\n".join(lines) + "\n\nAttention" in text


def test_run_summary_without_scheduler_and_pictures():
    changes = {"use_scheduler": False, "save_attention_viz": False}
    text = experiment_utils.run_summary("run", CONFIG | changes, COMMAND)
    assert (
        "Learning Rate Scheduler: none\n\nAttention Visualization: Disabled\n\nFull configuration"
        in text
    )


def test_git_info_in_a_repository_with_a_change_and_outside_one(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in (
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
    ):  # set where a git hook runs the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(experiment_utils, "__file__", str(tmp_path / "experiment_utils.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_info() == {"commit": None, "branch": None, "dirty": None}
    git("init", "-q", "-b", "trunk")
    (tmp_path / "experiment_utils.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_info() == {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "dirty": False}
    (tmp_path / "experiment_utils.py").write_text("2")
    assert git_info()["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    assert git_info() == {"commit": None, "branch": None, "dirty": None}


def test_environment_says_what_the_numbers_depend_on():
    told = environment()
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["torch_threads"] == torch.get_num_threads()
    assert len(told["devices"]) >= torch.cuda.device_count()
    assert told["cpu_count"] == os.cpu_count()
    assert told["cpu_model"]


# ----------------------------------------------------------------------------------------------------------- history


def test_curves_and_metrics_of_three_epochs(tmp_path):
    tracker = RunTracker(tmp_path, CONFIG, COMMAND)
    tracker.log_epoch(row(1, CIDEr=np.float32(0.25)))
    tracker.log_epoch(row(2, CIDEr=0.5, WER=None))
    tracker.log_epoch(row(4, CIDEr=0.375, share_unique=math.nan))
    assert json.loads((tmp_path / "loss_curve.json").read_text()) == {
        "epochs": [1, 2, 4],
        "train_losses": [4.0, 2.0, 1.0],
        "val_losses": [4.0, 2.5, 1.75],
        "learning_rates": [0.001, 0.0005, 0.00025],
    }
    assert json.loads((tmp_path / "metrics_history.json").read_text()) == {
        "epochs": [1, 2, 4],
        "CIDEr": [0.25, 0.5, 0.375],
        "WER": [None, None, None],
        "share_unique": [None, None, None],
    }


def test_metrics_csv_keeps_a_right_header_when_columns_come_and_go(tmp_path):
    """System B appended rows under its first header: a metric that came later shifted the columns."""
    tracker = RunTracker(tmp_path, CONFIG, COMMAND)
    tracker.log_epoch(row(1, CIDEr=0.25))
    tracker.log_epoch(row(2, WER=0.75, CIDEr=0.5))
    tracker.log_epoch(row(3))
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == (
        "epoch,train_loss,val_loss,learning_rate,epoch_time_seconds,CIDEr,WER"
    )
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["CIDEr"].tolist()[:2] == [0.25, 0.5]
    assert table["WER"].isna().tolist() == [True, False, True]
    assert table["WER"][1] == 0.75


def test_a_resumed_run_goes_on_with_the_history_it_was_given(tmp_path):
    earlier = [row(1, CIDEr=0.25), row(2, CIDEr=0.5)]
    tracker = RunTracker(tmp_path, CONFIG, COMMAND, history=earlier)
    tracker.log_epoch(row(3, CIDEr=0.4))
    assert json.loads((tmp_path / "loss_curve.json").read_text())["epochs"] == [1, 2, 3]
    assert [past["epoch"] for past in tracker.history] == [1, 2, 3]
    assert len(earlier) == 2


def test_history_of_numpy_scores_can_be_loaded_from_a_checkpoint(tmp_path):
    tracker = RunTracker(tmp_path, CONFIG, COMMAND)
    tracker.log_epoch(row(1, CIDEr=np.float64(0.25), count=np.int64(3)))
    save_checkpoint(tmp_path / "best.pt", checkpoint(history=tracker.history))
    assert load_checkpoint(tmp_path / "best.pt")["history"] == [row(1, CIDEr=0.25, count=3)]


def test_best_epoch_is_the_first_with_the_highest_cider_else_the_lowest_loss():
    assert best_epoch([row(1, CIDEr=0.1), row(2, CIDEr=0.3), row(3, CIDEr=0.3)])["epoch"] == 2
    assert (
        best_epoch([row(1, val_loss=2.0), row(2, val_loss=1.0), row(3, val_loss=None)])["epoch"]
        == 2
    )
    assert best_epoch([row(1, val_loss=None)]) is None


def colours(path):
    """How many pixels of each saturated curve colour (blue, orange) and of anything but white the PNG has."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1280, 800)
        pixels = np.asarray(picture.convert("RGB")).astype(int)

    def near(colour):
        return int((np.abs(pixels - colour).sum(axis=-1) < 30).sum())

    return near((0, 114, 178)), near((213, 94, 0)), int((pixels.sum(axis=-1) < 765).sum())


def test_plots_are_pictures_with_their_curves_in_them(tmp_path):
    rows = [row(epoch, CIDEr=0.5 - (epoch - 11) ** 2 / 300) for epoch in range(1, 16)]
    RunTracker(tmp_path, CONFIG, COMMAND, history=rows[:-1]).log_epoch(rows[-1])
    blue, orange, drawn = colours(tmp_path / "training_losses.png")
    assert min(blue, orange) > 1500
    assert drawn < 0.2 * 1280 * 800
    blue, orange, _ = colours(tmp_path / "learning_rate.png")
    assert blue > 1500
    assert orange == 0


@pytest.mark.parametrize("rate", [0.0, 1e-4])
def test_plots_of_one_epoch_without_validation(tmp_path, rate):
    tracker = RunTracker(tmp_path, CONFIG, COMMAND)
    tracker.log_epoch(row(1, val_loss=None, learning_rate=rate))
    blue, orange, _ = colours(tmp_path / "training_losses.png")
    assert blue > 50
    assert orange == 0
    assert colours(tmp_path / "learning_rate.png")[0] > 50


def test_plots_need_neither_pyplot_nor_a_display(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "matplotlib.pyplot", None
    )  # importing it is now an ImportError
    monkeypatch.delenv("DISPLAY", raising=False)
    experiment_utils.plot_losses(tmp_path / "losses.png", [row(1), row(2)])
    assert colours(tmp_path / "losses.png")[0] > 500


# ------------------------------------------------------------------------------------------------------ atomic files


def test_write_json_is_strict_and_keeps_every_script(tmp_path):
    value = {
        "path": Path("a/b"),
        "犬": ["ein Hund", np.int64(3), torch.tensor(0.5), np.array([1, 2])],
        4: -math.inf,
    }
    write_json(tmp_path / "a.json", value | {"name": os.fsdecode(b"caf\xe9.jpg")})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "犬" in text
    expected = {
        "path": "a/b",
        "犬": ["ein Hund", 3, 0.5, [1, 2]],
        "4": None,
        "name": "caf\udce9.jpg",
    }
    assert json.loads(text) == expected


class Stopped(BaseException):
    """Stands for KeyboardInterrupt, which pytest itself listens to."""


@pytest.mark.parametrize("function", ["os.fsync", "os.replace", "torch.save"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stopped()])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, function, error
):
    def fail(*arguments, **options):
        raise error

    save_checkpoint(tmp_path / "last.pt", checkpoint(epoch=1))
    monkeypatch.setattr(function, fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path / "last.pt", checkpoint(epoch=2))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_dev_full
@pytest.mark.parametrize("writer", [write_text, lambda path, text: write_json(path, [text])])
def test_a_text_that_does_not_fit_leaves_the_old_one(tmp_path, writer):
    """The temporary file lies on /dev/full, so the operating system itself refuses the bytes."""
    path = tmp_path / "run_config.json"
    path.write_text("old")
    (tmp_path / f"{path.name}.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        writer(path, "x" * 10_000)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@needs_dev_full
def test_a_checkpoint_on_a_full_disk_is_an_oserror_not_torch_s_own(tmp_path):
    (tmp_path / f"last.pt.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(tmp_path / "last.pt", checkpoint(model={"weight": torch.zeros(100_000)}))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_over_the_file_size_limit_leaves_the_old_one(tmp_path):
    resource = pytest.importorskip("resource")
    save_checkpoint(tmp_path / "last.pt", checkpoint(epoch=1))
    larger = checkpoint(epoch=2, model={"weight": torch.zeros(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path / "last.pt", larger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replace_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = checkpoint(
        optimizer={"state": {0: {"exp_avg": torch.randn(3), "step": torch.tensor(4.0)}}}
    )
    save_checkpoint(tmp_path / "best.pt", state)
    back = load_checkpoint(tmp_path / "best.pt")
    assert back.keys() == {"format_version", *state}
    assert torch.equal(back["model"]["weight"], torch.arange(6.0))
    assert torch.equal(
        back["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"]
    )
    assert back["format_version"] == checkpoints.FORMAT_VERSION
    assert (back["vocabulary"], back["epoch"]) == ({"words": ["hund", "犬"]}, 2)


def test_saving_a_checkpoint_without_one_of_its_keys_is_our_bug(tmp_path):
    state = checkpoint()
    del state["splits"]
    with pytest.raises(AssertionError, match="splits"):
        save_checkpoint(tmp_path / "best.pt", state)
    assert list(tmp_path.iterdir()) == []


class Attack:
    """A pickle of this makes a folder when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refusal(path):
    with pytest.raises(ValueError, match=r".") as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message  # torch's own advice is to switch the protection off
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("archive", [True, False])
def test_a_hostile_checkpoint_is_refused_and_its_code_not_run(tmp_path, archive):
    bad, proof = tmp_path / "bad.pt", tmp_path / "proof"
    hostile = checkpoint(
        format_version=checkpoints.FORMAT_VERSION, config={"a": Attack(str(proof))}
    )
    if archive:
        torch.save(hostile, bad)
        assert "could run code" in refusal(bad)
    else:
        bad.write_bytes(pickle.dumps(hostile))
        assert "no torch archive" in refusal(bad)
    assert not proof.exists()
    torch.load(bad, weights_only=False) if archive else pickle.loads(bad.read_bytes())
    assert proof.exists()  # so the attack was a real one


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    save_checkpoint(tmp_path / "best.pt", checkpoint())
    whole = (tmp_path / "best.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        assert "cut short" in refusal(tmp_path / "cut.pt")


def test_one_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    """torch itself loads such a file without a word."""
    save_checkpoint(tmp_path / "best.pt", checkpoint(model={"weight": torch.full((50,), 1.5)}))
    data = bytearray((tmp_path / "best.pt").read_bytes())
    data[data.index(torch.full((50,), 1.5).numpy().tobytes()) + 40] ^= 1
    (tmp_path / "bad.pt").write_bytes(data)
    assert "is damaged" in refusal(tmp_path / "bad.pt")


def test_random_damage_never_shows_a_traceback_or_another_value(tmp_path):
    save_checkpoint(tmp_path / "best.pt", checkpoint(random_state=None))
    whole, draw = (tmp_path / "best.pt").read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "bad.pt").write_bytes(data)
        try:
            state = load_checkpoint(tmp_path / "bad.pt")
        except ValueError as error:
            assert "\n" not in str(error)
        else:  # the bit was in the archive's padding or headers
            assert torch.equal(state["model"]["weight"], torch.arange(6.0))
            assert state["config"] == {"decoder": "lstm"}


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    assert "compressed" in refusal(tmp_path / "bomb.pt")


def test_an_archive_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    data = buffer.getvalue().replace((1000).to_bytes(4, "little"), (10**9).to_bytes(4, "little"))
    (tmp_path / "big.pt").write_bytes(data)
    assert refusal(tmp_path / "big.pt").startswith("not a usable checkpoint (its archive")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "not a usable checkpoint (it has no format_version)"),
        ({"conv1.weight": torch.zeros(3)}, "not a usable checkpoint (it has no format_version)"),
        ({"format_version": torch.zeros(2)}, "not a usable checkpoint (it has no format_version)"),
        (
            {"format_version": 1},
            "checkpoint format version 1, expected 3: use the version of this program that wrote",
        ),
        (
            {"format_version": 3},
            "not a usable checkpoint (its 'config' is missing or not of type dict)",
        ),
        (
            checkpoint(format_version=3, model=[]),
            "not a usable checkpoint (its 'model' is missing or not of type dict)",
        ),
    ],
)
def test_other_files_of_torch_are_refused_by_what_they_lack(tmp_path, content, expected):
    torch.save(content, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt").startswith(expected)


def test_a_missing_checkpoint_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt: no such checkpoint file"):
        load_checkpoint(tmp_path / "nothing.pt")


# --------------------------------------------------------------------------------------------- finding a checkpoint


@pytest.fixture
def saved_models(tmp_path):
    """Two finished runs of one kind, a third that stopped before any checkpoint, and another kind's older run."""
    family = tmp_path / "saved_models" / "flickr30k" / "resnet_attention"
    for name in ("best.pt", "model_epoch_1.pt", "model_epoch_2.pt", "model_epoch_10.pt"):
        touch(family / "flickr30k_attention_ep10_bs32_lr1e-04_20241201_143022" / name)
    for name in ("best.pt", "model_epoch_11.pt"):
        touch(family / "flickr30k_attention_ep15_bs32_lr1e-04_20241201_143045" / name)
    (family / "flickr30k_attention_ep15_bs32_lr1e-04_20250101_000000").mkdir()
    touch(
        tmp_path
        / "saved_models/flickr8k/resnet_lstm/flickr8k_lstm_ep1_bs8_lr1e-03_20231201_143045/best.pt"
    )
    return tmp_path / "saved_models"


def test_a_file_is_itself(saved_models):
    file = next(saved_models.rglob("model_epoch_2.pt"))
    assert resolve_checkpoint(file) == resolve_checkpoint(str(file), prefer="newest") == file


def test_a_folder_is_its_newest_run_that_has_a_checkpoint(saved_models):
    family = saved_models / "flickr30k" / "resnet_attention"
    newest = family / "flickr30k_attention_ep15_bs32_lr1e-04_20241201_143045"
    for folder in (family, family.parent, saved_models, newest):
        assert resolve_checkpoint(folder) == newest / "best.pt"
        assert resolve_checkpoint(folder, prefer="newest") == newest / "model_epoch_11.pt"
    assert resolve_checkpoint(saved_models, "newest") == newest / "model_epoch_11.pt"


def test_document_a_s_flat_paths_are_found_in_the_newest_run_that_has_them(saved_models):
    family = saved_models / "flickr30k" / "resnet_attention"
    assert resolve_checkpoint(family / "best.pt").parent.name.endswith("143045")
    found = resolve_checkpoint(family / "model_epoch_10.pt", prefer="newest")
    assert (
        found
        == family / "flickr30k_attention_ep10_bs32_lr1e-04_20241201_143022" / "model_epoch_10.pt"
    )


def test_the_tenth_run_of_a_second_is_newer_than_its_second(tmp_path):
    for suffix in ("", "_2", "_10"):
        touch(tmp_path / f"flickr8k_lstm_{STAMP}{suffix}" / "best.pt")
    assert resolve_checkpoint(tmp_path).parent.name == f"flickr8k_lstm_{STAMP}_10"


def test_a_renamed_run_goes_by_the_time_of_its_file(tmp_path):
    touch(
        tmp_path / f"flickr8k_lstm_{STAMP}" / "best.pt"
    )  # December 2024, whatever its file's own time
    renamed = touch(tmp_path / "my good one" / "best.pt", written=1_600_000_000)  # September 2020
    assert resolve_checkpoint(tmp_path).parent.name == f"flickr8k_lstm_{STAMP}"
    touch(renamed, written=1_800_000_000)  # January 2027
    assert resolve_checkpoint(tmp_path) == renamed


def test_within_a_run_the_newest_is_the_last_written(tmp_path):
    for epoch in (10, 9, 2):
        touch(tmp_path / f"model_epoch_{epoch}.pt")
    touch(tmp_path / "best.pt", written=1_900_000_000)
    touch(tmp_path / "model_epoch_x.pt", written=1_900_000_000)
    assert resolve_checkpoint(tmp_path, "newest").name == "model_epoch_10.pt"
    last = touch(tmp_path / "last.pt", written=1_600_000_000)  # interrupted during an earlier epoch
    assert resolve_checkpoint(tmp_path, "newest").name == "model_epoch_10.pt"
    touch(last, written=1_700_000_001)
    assert resolve_checkpoint(tmp_path, "newest") == last


def test_a_best_copied_into_a_resumed_run_is_not_its_newest_checkpoint(tmp_path):
    """A resumed run that was stopped at once has only the copy: going on from it would lose epochs."""
    touch(tmp_path / f"lstm_{STAMP}" / "model_epoch_9.pt")
    touch(tmp_path / "lstm_20251201_143022" / "best.pt")
    assert resolve_checkpoint(tmp_path, "newest").name == "model_epoch_9.pt"
    assert (
        resolve_checkpoint(tmp_path / "lstm_20251201_143022", "newest").name == "best.pt"
    )  # a released model, alone


def test_what_is_not_there_is_said_with_what_is(saved_models, tmp_path):
    family = saved_models / "flickr30k" / "resnet_attention"
    with pytest.raises(
        FileNotFoundError,
        match=r"model_epoch_99\.pt: no such checkpoint: existing ones are .*143045",
    ):
        resolve_checkpoint(family / "model_epoch_99.pt")
    with pytest.raises(FileNotFoundError, match=r"existing ones are .*flickr8k_lstm_ep1"):
        resolve_checkpoint(saved_models / "flickr8k" / "resnet_attention" / "best.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"there is none in .*empty or below it: --mode train writes them"
    ):
        resolve_checkpoint(tmp_path / "empty", "newest")


def test_prune_keeps_the_last_epochs_and_every_other_file(tmp_path):
    for name in (
        "best.pt",
        "last.pt",
        "model_epoch_x.pt.txt",
        *(f"model_epoch_{n}.pt" for n in (1, 2, 9, 10, 11)),
    ):
        touch(tmp_path / name)
    prune_checkpoints(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 8
    prune_checkpoints(tmp_path, 2)
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [
        "best.pt",
        "last.pt",
        "model_epoch_10.pt",
        "model_epoch_11.pt",
        "model_epoch_x.pt.txt",
    ]


# ------------------------------------------------------------------------------------------- random numbers, folders


def test_seed_fixes_all_three_generators_and_the_state_goes_on_where_it_stopped(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    set_seed(5)
    first = draw()
    save_checkpoint(tmp_path / "last.pt", checkpoint())
    later = torch.rand(3).tolist()
    set_seed(5)
    assert draw() == first
    torch.rand(100)
    set_random_state(load_checkpoint(tmp_path / "last.pt")["random_state"])
    assert torch.rand(3).tolist() == later


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_state_of_a_gpu_goes_on_too():
    torch.rand(3, device="cuda")
    state = random_state()
    later = torch.rand(3, device="cuda").tolist()
    set_random_state(state)
    assert torch.rand(3, device="cuda").tolist() == later


FAULTS = """
import resource, sys, torch, runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)  # 64 MiB, given back at once
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first = faults if _ == 0 else first
print(faults - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_memory_that_tensors_give_back_is_not_faulted_in_again():
    root = Path(experiment_utils.__file__).parent
    kept, plain = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], cwd=root, text=True))
        for how in ("keep", "plain")
    )
    assert kept < 100_000 < plain  # 16,384 pages each time


def test_an_output_folder_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable_dir(tmp_path, "--cache_dir")
    check_writable_dir(tmp_path / "new" / "folder", "--cache_dir")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ValueError, match=r"^--output_dir .*/file is not a folder: give a folder"
        ):
            check_writable_dir(path, "--output_dir")


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a folder that nobody can write in"
)
def test_an_output_folder_that_cannot_be_made_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^--output_dir /proc/none: cannot write in /proc .*: give another folder$",
    ):
        check_writable_dir("/proc/none", "--output_dir")

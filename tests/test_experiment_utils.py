"""experiment_utils.py: the run directory with its files and plots, seeds and random states."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_checkpoints import checkpoint

import experiment_utils
from checkpoints import load_checkpoint, save_checkpoint
from experiment_utils import (
    ExperimentTracker,
    best_epoch,
    create_run_dir,
    environment,
    get_git_info,
    launch_command,
    plot_losses,
    random_state,
    run_name,
    run_summary,
    set_global_seed,
    set_random_state,
    write_run_files,
)

STAMP = "20241201_143022"
CONFIG = {
    "seed": 7, "encoder": "resnet50", "dataset_type": "flickr30k", "decoder": "attention",
    "epochs": 20, "batch_size": 32, "learning_rate": 0.0005, "embed_size": 512, "hidden_size": 1024,
    "num_layers": 3, "attention_dim": 512, "drop_prob": 0.3, "num_workers": 4,
    "use_scheduler": True, "scheduler_type": "cosine", "scheduler_t_max": 20, "min_lr": 1e-6,
    "save_attention_viz": True, "attention_viz_samples": 5, "advanced_attention_viz": True,
}  # fmt: skip
COSINE_OPTIONS = ("scheduler_t_max", "min_lr")
# run_config.json and run_summary.txt as they were specified, for CONFIG.
SPECIFIED_CONFIG = """{
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
SPECIFIED_SUMMARY = """Training Run Summary
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


def read_json(path):
    return json.loads(Path(path).read_text())


def row(epoch, **metrics):
    losses = {"train_loss": 4 / epoch, "val_loss": 1 + 3 / epoch}
    rest = {"learning_rate": 1e-3 / epoch, "epoch_time_seconds": 1.5}
    return {"epoch": epoch} | losses | rest | metrics


# -------------------------------------------------------------------------------- the run directory


def test_run_name_holds_the_parameters_and_the_time():
    assert run_name(CONFIG, STAMP) == (
        "flickr30k_attention_ep20_bs32_lr5e-04_cosine_att_20241201_143022"
    )


def test_run_name_leaves_out_what_is_off():
    lstm = {"dataset_type": "flickr8k", "decoder": "lstm", "epochs": 15, "batch_size": 64}
    changes = lstm | {"learning_rate": 0.001, "save_attention_viz": False}
    assert run_name(CONFIG | changes, STAMP) == (
        "flickr8k_lstm_ep15_bs64_lr1e-03_cosine_20241201_143022"
    )
    changes = {"epochs": 30, "batch_size": 128, "learning_rate": 0.0001, "use_scheduler": False}
    assert run_name(CONFIG | changes, "20241201_143045") == (
        "flickr30k_attention_ep30_bs128_lr1e-04_att_20241201_143045"
    )


def test_run_name_keeps_every_digit_of_the_learning_rate():
    assert "_lr2.5e-04_" in run_name(CONFIG | {"learning_rate": 0.00025}, STAMP)
    assert "_lr1e+00_" in run_name(CONFIG | {"learning_rate": 1.0}, STAMP)


def test_resnet50_writes_resnet_and_other_encoders_their_own_name(tmp_path):
    resnet = create_run_dir(tmp_path, CONFIG, STAMP)
    assert resnet.parent == tmp_path / "flickr30k" / "resnet_attention"
    changes = {"encoder": "mobilenet_v2", "decoder": "lstm"}
    mobile = create_run_dir(tmp_path, CONFIG | changes, STAMP)
    assert mobile.parent == tmp_path / "flickr30k" / "mobilenet_v2_lstm"


def test_run_directories_of_one_second_and_two_processes_are_distinct(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        made = pool.starmap(create_run_dir, [(tmp_path, CONFIG, STAMP)] * 40, chunksize=1)
    first = run_name(CONFIG, STAMP)
    names = [first] + [f"{first}_{n}" for n in range(2, 41)]
    assert sorted(run_dir.name for run_dir in made) == sorted(names)


def test_run_directory_carries_the_local_time_of_its_making(tmp_path, monkeypatch):
    local_time = {"%Y%m%d_%H%M%S": STAMP}.__getitem__
    monkeypatch.setattr(experiment_utils.time, "strftime", local_time)
    assert create_run_dir(tmp_path, CONFIG).name.endswith("_att_20241201_143022")


def test_run_config_opens_with_the_specified_keys_and_keeps_everything_else(tmp_path):
    run_dir = create_run_dir(tmp_path, CONFIG, STAMP)
    origins = {"seed": Path("flag")}  # anything with a text
    config = CONFIG | {"cache_dir": Path("feature_cache")}
    write_run_files(run_dir, config, COMMAND, origins=origins)
    written = json.loads((run_dir / "run_config.json").read_text())
    expected = json.loads(SPECIFIED_CONFIG)
    assert list(written.items())[: len(expected)] == list(expected.items())
    rest = list(written)[len(expected) :]
    assert rest == ["seed", "encoder", "cache_dir", "command", "git", "environment", "origins"]
    assert written["origins"] == {"seed": "flag"}
    assert (written["seed"], written["cache_dir"]) == (7, "feature_cache")
    assert written["command"] == "python flickr_image_caption.py --image_dir 'my pictures'"
    assert written["environment"]["torch"] == torch.__version__.split("+")[0]


def test_run_summary_is_as_specified_and_ends_with_the_command(tmp_path):
    run_dir = create_run_dir(tmp_path, CONFIG, STAMP)
    write_run_files(run_dir, CONFIG, COMMAND, COSINE_OPTIONS)
    command = "  python flickr_image_caption.py --image_dir 'my pictures'\n"
    expected = f"{SPECIFIED_SUMMARY}\nCommand to reproduce:\n{command}"
    assert (run_dir / "run_summary.txt").read_text() == expected


@pytest.mark.parametrize(
    ("scheduler", "options", "lines"),
    [
        ("step", {"scheduler_step_size": 7, "scheduler_gamma": 0.1},
         "  Step Size: 7\n  Gamma: 0.1"),
        ("reduce_lr_on_plateau",
         {"scheduler_patience": 3, "scheduler_factor": 0.5, "min_lr": 1e-6},
         "  Patience: 3\n  Factor: 0.5\n  Min LR: 1e-06"),
        ("cosine", {"min_lr": 1e-6, "scheduler_t_max": 20}, "  Min LR: 1e-06\n  T_max: 20"),
        ("exponential", {"scheduler_gamma": 0.1}, "  Gamma: 0.1"),
        ("one_cycle", {"warmup_epochs": 2}, "  Warmup Epochs: 2"),
    ],
)  # fmt: skip
def test_run_summary_shows_the_schedule_s_options_in_the_given_order(scheduler, options, lines):
    config = CONFIG | options | {"scheduler_type": scheduler}
    text = run_summary("run", config, COMMAND, schedule_options=tuple(options))
    assert f"Learning Rate Scheduler: {scheduler}\n{lines}\n\nAttention" in text


def test_run_summary_without_scheduler_and_pictures():
    changes = {"use_scheduler": False, "save_attention_viz": False}
    text = run_summary("run", CONFIG | changes, COMMAND)
    middle = "Learning Rate Scheduler: none\n\nAttention Visualization: Disabled\n\nFull config"
    assert middle in text


def test_git_info_in_a_repository_with_a_change_and_outside_one(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a git hook sets them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(experiment_utils, "__file__", str(tmp_path / "experiment_utils.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert get_git_info() == {"commit": None, "branch": None, "dirty": None, "remote_url": None}
    git("init", "-q", "-b", "trunk")
    (tmp_path / "experiment_utils.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert get_git_info() == {
        "commit": git("rev-parse", "HEAD"),
        "branch": "trunk",
        "dirty": False,
        "remote_url": None,
    }
    (tmp_path / "experiment_utils.py").write_text("2")
    assert get_git_info()["dirty"] is True
    git("checkout", "-q", ".")
    (tmp_path / "results.csv").write_text("3")
    assert get_git_info()["dirty"] is False  # a file that git does not know is no change
    git("checkout", "-q", "--detach")
    assert get_git_info() == {
        "commit": git("rev-parse", "HEAD"),
        "branch": None,
        "dirty": False,
        "remote_url": None,
    }
    git("remote", "add", "origin", "https://me:secret@example.org/captions.git")
    assert get_git_info()["remote_url"] == "https://example.org/captions.git"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    assert get_git_info() == {"commit": None, "branch": None, "dirty": None, "remote_url": None}


PYTHON = Path(sys.executable).name
LAUNCHES = [
    ({}, PYTHON),
    ({"OMP_NUM_THREADS": "3"}, f"env OMP_NUM_THREADS=3 {PYTHON}"),
    ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, PYTHON),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
     "torchrun --nproc_per_node=2"),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4"},
     "env OMP_NUM_THREADS=4 torchrun --nproc_per_node=2"),
    ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "first"},
     "torchrun --nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=first"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "launcher"), LAUNCHES)
def test_the_command_starts_as_the_run_was_started(monkeypatch, variables, launcher):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ["flickr_image_caption.py", "--epochs", "2"]
    assert launch_command(words) == [*launcher.split(), *words]


def test_the_command_has_the_variables_that_gave_options(monkeypatch):
    for name in ("WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPTION_SEED", "7")
    assert launch_command(["x.py"], ["CAPTION_SEED"]) == ["env", "CAPTION_SEED=7", PYTHON, "x.py"]


def test_environment_says_what_the_numbers_depend_on():
    snapshot = environment()
    assert snapshot["python"] == ".".join(map(str, sys.version_info[:3]))
    assert snapshot["threads"] == torch.get_num_threads()
    assert snapshot["world_size"] == 1
    assert snapshot["cpu_count"] == os.cpu_count()
    assert snapshot["cpu_model"]


def test_environment_names_every_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert environment()["devices"] == ["GPU 0", "GPU 1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert environment()["devices"] == ["mps"]


# ------------------------------------------------------------------------------------------ history


@pytest.fixture
def no_plots(monkeypatch):
    """They take most of an epoch's time; what they show is tested below."""
    for name in ("plot_losses", "plot_learning_rate"):
        monkeypatch.setattr(experiment_utils, name, lambda path, *_: None)


@pytest.mark.usefixtures("no_plots")
def test_curves_and_metrics_of_three_epochs(tmp_path):
    tracker = ExperimentTracker(tmp_path)
    tracker.log_metrics(**row(1, CIDEr=np.float32(0.25)))
    tracker.log_metrics(**row(2, CIDEr=0.5, WER=None))
    tracker.log_metrics(**row(4, CIDEr=0.375, share_unique=math.nan))
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


@pytest.mark.usefixtures("no_plots")
def test_metrics_csv_keeps_a_right_header_when_columns_come_and_go(tmp_path):
    """Rows appended under the first header would shift once a metric comes later."""
    tracker = ExperimentTracker(tmp_path)
    tracker.log_metrics(**row(1, CIDEr=0.25))
    tracker.log_metrics(**row(2, WER=0.75, CIDEr=0.5))
    tracker.log_metrics(**row(3))
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == (
        "epoch,train_loss,val_loss,learning_rate,epoch_time_seconds,CIDEr,WER"
    )
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["CIDEr"].tolist()[:2] == [0.25, 0.5]
    assert table["WER"].isna().tolist() == [True, False, True]
    assert table["WER"][1] == 0.75


@pytest.mark.usefixtures("no_plots")
def test_a_resumed_run_goes_on_with_the_history_it_was_given(tmp_path):
    earlier = [row(1, CIDEr=0.25), row(2, CIDEr=0.5)]
    tracker = ExperimentTracker(tmp_path, history=earlier)
    tracker.log_metrics(**row(3, CIDEr=0.4))
    assert json.loads((tmp_path / "loss_curve.json").read_text())["epochs"] == [1, 2, 3]
    assert [past["epoch"] for past in tracker.history] == [1, 2, 3]
    assert len(earlier) == 2


@pytest.mark.usefixtures("no_plots")
def test_history_of_numpy_scores_can_be_loaded_from_a_checkpoint(tmp_path):
    tracker = ExperimentTracker(tmp_path)
    tracker.log_metrics(**row(1, CIDEr=np.float64(0.25), count=np.int64(3)))
    save_checkpoint(tmp_path / "best.pt", checkpoint(history=tracker.history))
    assert load_checkpoint(tmp_path / "best.pt")["history"] == [row(1, CIDEr=0.25, count=3)]


@pytest.mark.usefixtures("no_plots")
def test_a_tracked_run_is_told_by_the_files_that_are_documented(tmp_path):
    """The specification's own calls; the configuration is nested, and has none of our options."""
    config = {"training": {"epochs": 2, "batch_size": 64}, "model": {"hidden_dim": 256}}
    tracker = ExperimentTracker(tmp_path / "new/run_001", run_name="baseline", seed=42)
    folder = tracker.run_dir
    assert read_json(folder / "run_summary.json")["metadata"]["status"] == "running"
    tracker.log_config(config)
    tracker.log_metrics(epoch=1, train_loss=2.0, val_loss=2.2, learning_rate=1e-4, accuracy=0.85)
    tracker.log_metrics(epoch=2, train_loss=1.9, val_loss=2.3)
    tracker.log_metrics(epoch=2, custom_metric=0.5)  # as a callback of one's own adds to an epoch
    tracker.log_bleu_scores(bleu1=0.65, bleu2=0.45, bleu3=0.35, bleu4=0.25)
    tracker.log_bleu_scores(bleu1=0.6, bleu2=0.4, bleu3=0.3, bleu4=0.2, split="val")
    path = tracker.finalize()
    assert path == folder / "run_summary.json"
    summary = read_json(path)
    run = summary.pop("metadata")
    assert re.fullmatch(r"\d{8}_\d{6}_[0-9a-f]{8}", run["run_id"])
    assert (run["run_name"], run["seed"], run["status"]) == ("baseline", 42, "completed")
    assert run["start_time"] <= run["end_time"] and run["error"] is None
    assert run["git_info"].keys() == {"commit", "branch", "dirty", "remote_url"}
    named = {"python_version", "torch_version", "gpu_available", "gpu_devices"}
    assert run["environment"].keys() == named
    last = {"epoch": 2, "train_loss": 1.9, "val_loss": 2.3, "custom_metric": 0.5}
    assert summary == {
        "config": config,
        "final_metrics": last,
        "best_metrics": {"epoch": 1, "train_loss": 2.0, "val_loss": 2.2, "learning_rate": 1e-4}
        | {"accuracy": 0.85},
        "bleu_scores": {"test_bleu1": 0.65, "test_bleu2": 0.45, "test_bleu3": 0.35}
        | {"test_bleu4": 0.25, "val_bleu1": 0.6, "val_bleu2": 0.4, "val_bleu3": 0.3}
        | {"val_bleu4": 0.2},
        "total_epochs": 2,
    }
    text = json.dumps(config, sort_keys=True)
    digest = hashlib.md5(text.encode()).hexdigest()[:8]
    assert read_json(folder / "config_snapshot.json") == config | {"_config_hash": digest}
    assert (folder / "metrics.csv").read_text().splitlines()[0] == (
        "epoch,train_loss,val_loss,learning_rate,epoch_time_seconds,accuracy,custom_metric"
    )


@pytest.mark.usefixtures("no_plots")
def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (Path(experiment_utils.__file__).parent / "docs/EXPERIMENTS.md").read_text()
    (example,) = re.findall(r"^```python\n(from experiment_utils.+?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    summary = read_json("experiments/run_001/run_summary.json")
    assert summary["metadata"]["status"] == "completed" and summary["metadata"]["seed"] == 42
    assert read_json("experiments/run_001/artifacts/predictions.json")


def test_the_config_s_hash_is_that_of_its_content_not_of_its_order(tmp_path):
    def hashed(config):
        ExperimentTracker(tmp_path).log_config(config)
        return read_json(tmp_path / "config_snapshot.json")["_config_hash"]

    assert hashed({"a": 1, "b": 2}) == hashed({"b": 2, "a": 1}) != hashed({"a": 1, "b": 3})


def test_artifacts_are_json_or_arrays_inside_the_run(tmp_path):
    tracker = ExperimentTracker(tmp_path)
    path = tracker.log_artifact("predictions", {"a.jpg": "a dog"}, artifact_type="json")
    assert path == tmp_path / "artifacts/predictions.json" and read_json(path) == {"a.jpg": "a dog"}
    matrix = np.arange(6.0).reshape(2, 3)
    path = tracker.log_artifact("embeddings", matrix, artifact_type="numpy")
    assert path == tmp_path / "artifacts/embeddings.npy" and (np.load(path) == matrix).all()
    for name in ("../up", "a/b", "/a", ""):
        with pytest.raises(ValueError, match="give a plain name"):
            tracker.log_artifact(name, {})
    with pytest.raises(ValueError, match="type 'pickle' is unknown: give json or numpy"):
        tracker.log_artifact("x", {}, artifact_type="pickle")


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("bad rate"), "bad rate"), (KeyboardInterrupt(), "Keyboard")]
)
def test_an_error_that_ends_a_run_is_in_its_summary(tmp_path, error, said):
    with pytest.raises(type(error)), ExperimentTracker(tmp_path):
        raise error
    run = read_json(tmp_path / "run_summary.json")["metadata"]
    assert run["status"] == "failed" and run["error"].startswith(said) and run["end_time"]


def test_a_run_that_leaves_its_context_is_completed_unless_it_has_failed_before(tmp_path):
    with ExperimentTracker(tmp_path):
        pass
    assert read_json(tmp_path / "run_summary.json")["metadata"]["status"] == "completed"
    with ExperimentTracker(tmp_path) as tracker:
        tracker.finalize(error="stopped by SIGINT in epoch 2")
    run = read_json(tmp_path / "run_summary.json")["metadata"]
    assert (run["status"], run["error"]) == ("failed", "stopped by SIGINT in epoch 2")


def sample(image, caption):
    references = [f"{image} one", f"{image} two"]
    return experiment_utils.Sample(image, Path(image), references, caption, caption.split())


def test_sample_captions_grow_and_go_on_where_the_run_is_resumed(tmp_path):
    tracker = ExperimentTracker(tmp_path / "old")
    for epoch, caption in enumerate(("a", "a dog", "a dog runs"), start=1):
        tracker.log_samples(epoch, [sample("dog.jpg", caption), sample("cat.jpg", "a cat")])
    past = experiment_utils.earlier_sample_captions(tmp_path / "old", 2)  # of model_epoch_2.pt
    resumed = ExperimentTracker(tmp_path / "new", sample_captions=past)
    resumed.log_samples(3, [sample("dog.jpg", "a dog sits"), sample("cat.jpg", "a cat")])
    dog, cat = read_json(tmp_path / "new/sample_captions.json")
    captions = ["a", "a dog", "a dog sits"]
    assert dog == {
        "image": "dog.jpg",
        "references": ["dog.jpg one", "dog.jpg two"],
        "captions": [{"epoch": n, "caption": text} for n, text in enumerate(captions, start=1)],
    }
    assert cat["image"] == "cat.jpg" and len(cat["captions"]) == 3


@pytest.mark.parametrize(
    "content", [None, "{", "[1]", '[{"image": "a"}]', "[" * 100_000, '{"a": 1}']
)
def test_sample_captions_that_are_lost_or_damaged_begin_anew(tmp_path, content):
    if content:
        (tmp_path / "sample_captions.json").write_text(content)
    assert experiment_utils.earlier_sample_captions(tmp_path, 5) == []


class Recorder:
    """A listener that notes what it hears, and fails at one event."""

    name = "recorder"

    def __init__(self, fails_at=None):
        self.heard, self.fails_at = [], fails_at

    def __getattr__(self, event):
        def note(*values):
            self.heard.append(event)
            if event == self.fails_at:
                raise RuntimeError("no network\nTraceback of others")

        return note


@pytest.mark.usefixtures("no_plots")
def test_a_listener_that_fails_is_told_no_more_and_the_run_goes_on(tmp_path, capsys):
    failing, other = Recorder("metrics_logged"), Recorder()
    with ExperimentTracker(tmp_path, listeners=[failing, other]) as tracker:
        tracker.log_config({})
        tracker.log_metrics(**row(1))
        tracker.log_samples(1, [])
    assert failing.heard == ["config_logged", "metrics_logged"]
    assert other.heard == [*failing.heard, "samples_logged", "run_ended"]
    warning = "warning: recorder hears no more of this run: RuntimeError: no network\n"
    assert capsys.readouterr().err == warning
    assert read_json(tmp_path / "run_summary.json")["metadata"]["status"] == "completed"


def test_plots_are_drawn_every_ten_seconds_and_at_the_end(tmp_path, monkeypatch):
    now, drawn = [100.0], []
    monkeypatch.setattr(experiment_utils.time, "monotonic", lambda: now[0])
    for name in ("plot_losses", "plot_learning_rate"):
        monkeypatch.setattr(
            experiment_utils,
            name,
            lambda path, history, rule: drawn.append((path.name, len(history))),
        )
    with ExperimentTracker(tmp_path) as tracker:
        for seconds in (0, 2, 7.9, 0.1, 3):
            now[0] += seconds
            tracker.log_metrics(**row(len(tracker.history) + 1))
        epochs = [epochs for name, epochs in drawn if name == "training_losses.png"]
        assert epochs == [1, 4]
    assert drawn[-2:] == [("training_losses.png", 5), ("learning_rate.png", 5)]
    with tracker:
        pass
    assert len(drawn) == 6  # nothing new, nothing to draw


def test_best_epoch_is_the_one_with_the_highest_cider_else_the_lowest_loss():
    assert best_epoch([row(1, CIDEr=0.1), row(2, CIDEr=0.3), row(3, CIDEr=0.2)])["epoch"] == 2
    ties = [row(number, CIDEr=0.0, val_loss=loss) for number, loss in enumerate((3.0, 2.0, 2.5), 1)]
    assert best_epoch(ties)["val_loss"] == 2.0
    unscored = [row(1, val_loss=2.0), row(2, val_loss=1.0), row(3, val_loss=None)]
    assert best_epoch(unscored)["epoch"] == 2
    assert best_epoch([row(1, val_loss=None)]) is None


def colours(path):
    """How many pixels of a PNG are blue, how many orange, and how many anything but white."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1280, 800)
        pixels = np.asarray(picture.convert("RGB")).astype(int)

    def near(colour):
        return int((np.abs(pixels - colour).sum(axis=-1) < 30).sum())

    return near((0, 114, 178)), near((213, 94, 0)), int((pixels.sum(axis=-1) < 765).sum())


def test_plots_are_pictures_with_their_curves_in_them(tmp_path):
    rows = [row(epoch, CIDEr=0.5 - (epoch - 11) ** 2 / 300) for epoch in range(1, 16)]
    ExperimentTracker(tmp_path, history=rows[:-1]).log_metrics(**rows[-1])
    blue, orange, drawn = colours(tmp_path / "training_losses.png")
    assert min(blue, orange) > 1500
    assert drawn < 0.2 * 1280 * 800
    blue, orange, _ = colours(tmp_path / "learning_rate.png")
    assert blue > 1500
    assert orange == 0


@pytest.mark.parametrize("rate", [0.0, 1e-4])
def test_plots_of_one_epoch_without_validation(tmp_path, rate):
    tracker = ExperimentTracker(tmp_path)
    tracker.log_metrics(**row(1, val_loss=None, learning_rate=rate))
    blue, orange, _ = colours(tmp_path / "training_losses.png")
    assert blue > 50
    assert orange == 0
    assert colours(tmp_path / "learning_rate.png")[0] > 50


def test_a_dashed_line_marks_the_best_epoch(tmp_path):
    def marked(best):
        rows = [row(epoch, CIDEr=float(epoch == best)) for epoch in range(1, 16)]
        plot_losses(tmp_path / "losses.png", rows)
        with Image.open(tmp_path / "losses.png") as picture:
            grey = np.abs(np.asarray(picture.convert("L")).astype(int) - 0x55) < 20
        assert grey.sum(axis=0).max() > 200  # of 800 rows; a letter's edges have fewer
        return grey.sum(axis=0).argmax()

    early, middle, late = (marked(epoch) for epoch in (3, 8, 13))
    assert early < middle < late and middle - early == pytest.approx(late - middle, abs=3)


def test_rates_that_span_a_decade_are_drawn_on_a_logarithmic_axis(tmp_path):
    """On which rates that fall by the same factor lie on a straight line."""

    def heights(rates):
        rows = [row(epoch, learning_rate=rate) for epoch, rate in enumerate(rates, start=1)]
        experiment_utils.plot_learning_rate(tmp_path / "rates.png", rows)
        with Image.open(tmp_path / "rates.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        ys, xs = np.nonzero(np.abs(pixels - (0, 114, 178)).sum(axis=-1) < 30)
        curve = ys < 600  # the legend's sample of the line lies below the axes
        xs, ys = xs[curve], ys[curve]
        thirds = np.linspace(xs.min() + 10, xs.max() - 10, 3).astype(int)
        return [ys[xs == x].mean() for x in thirds]

    left, middle, right = heights([1e-2, 1e-3, 1e-4])
    assert middle == pytest.approx((left + right) / 2, abs=5)
    left, middle, right = heights([1e-2, 5e-3, 2.5e-3])
    assert middle > (left + right) / 2 + 20


def test_plots_need_neither_pyplot_nor_a_display(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # makes its import an error
    monkeypatch.delenv("DISPLAY", raising=False)
    plot_losses(tmp_path / "losses.png", [row(1), row(2)])
    assert colours(tmp_path / "losses.png")[0] > 500


# ----------------------------------------------------------------------------------- random numbers


def test_seed_fixes_all_three_generators_and_the_state_goes_on_where_it_stopped(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    set_global_seed(5)
    first = draw()
    assert os.environ["PYTHONHASHSEED"] == "5" and torch.backends.cudnn.deterministic
    save_checkpoint(tmp_path / "last.pt", checkpoint(random_state=random_state()))
    later = torch.rand(3).tolist()
    set_global_seed(5)
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

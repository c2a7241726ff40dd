"""tracking_backends.py, with the real packages: what TensorBoard's and W&B's own files hold."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption_options
import experiment_utils
import tracking_backends

BACKENDS = ("tensorboard", "wandb")


def missing(name):
    """Why a test of this package is skipped, or None."""
    return None if name in installed() else f"{name} is not installed: requirements-tracking.txt"


def installed():
    from importlib.util import find_spec

    return [name for name in BACKENDS if find_spec(name)]


@pytest.fixture
def track(tmp_path, monkeypatch):
    """A function that tracks a run of two epochs with these backends and returns its folder."""
    for name in ("plot_losses", "plot_learning_rate"):
        monkeypatch.setattr(experiment_utils, name, lambda path, *_: None)
    photograph = tmp_path / "dog.jpg"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(photograph)
    maps = np.zeros((2, 2, 2))
    maps[:, 0, 0] = 1

    def run(*names):
        folder, weights = tmp_path / "run", torch.nn.Linear(3, 2)
        folder.mkdir()
        asked = SimpleNamespace(**{name: name in names for name in BACKENDS})
        listeners = tracking_backends.open_listeners(asked, folder, weights.named_parameters)
        assert len(listeners) == len(names)
        with experiment_utils.ExperimentTracker(folder, listeners=listeners) as tracker:
            tracker.log_config({"learning_rate": 0.1, "seeds": [1, 2], "decoder": "lstm"})
            (folder / "best.pt").write_bytes(b"weights")
            for epoch, caption in ((1, "a <b>dog"), (2, "a dog | runs")):
                sample = experiment_utils.Sample(
                    "dog.jpg", photograph, ["a brown dog"], caption, ["a", "dog"], maps, {}
                )
                tracker.log_samples(epoch, [sample])
                tracker.log_metrics(epoch, train_loss=2 / epoch, CIDEr=0.25 * epoch, WER=None)
            assert tracker.listeners == listeners  # none has failed
        return folder

    return run


@pytest.mark.skipif(missing("tensorboard") is not None, reason=str(missing("tensorboard")))
def test_tensorboard_has_scalars_histograms_captions_attention_and_settings(track):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(track("tensorboard") / "logs"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert [(point.step, point.value) for point in events.Scalars("CIDEr")] == [(1, 0.25), (2, 0.5)]
    assert [point.value for point in events.Scalars("train_loss")] == [2.0, 1.0]
    assert "WER" not in tags["scalars"]
    assert set(tags["histograms"]) == {"weights/weight", "weights/bias"}
    assert events.Histograms("weights/weight")[0].histogram_value.num == 6
    texts = [
        event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("validation captions/text_summary")
    ]
    assert "| dog&#46;jpg |" in texts[0] or "| dog.jpg |" in texts[0]
    assert "a &#60;b&#62;dog" in texts[0] and "a dog &#124; runs" in texts[1]
    assert "a brown dog" in texts[0]
    pictures = events.Images("attention/dog.jpg")
    assert [picture.step for picture in pictures] == [1, 2] and pictures[0].width > 100
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"learning_rate" in plugin and b"[1, 2]" in plugin
    assert events.Scalars("best/CIDEr")[0].value == 0.5


@pytest.mark.skipif(missing("wandb") is not None, reason=str(missing("wandb")))
def test_wandb_offline_has_losses_captions_with_references_and_the_checkpoint(track, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = track("wandb")
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # W&B's own process writes it
    while b"best.pt" not in (content := record.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in (b"train_loss", b"best/CIDEr", b"learning_rate", b"image-captioning", b"best.pt"):
        assert name in content
    tables = [
        json.loads(path.read_text())
        for path in folder.glob("wandb/offline-run-*/files/media/table/*")
    ]
    rows = sorted(table["data"][0] for table in tables)
    assert rows[0] == [1, "dog.jpg", "a <b>dog", "a brown dog"]
    assert rows[1][:3] == [2, "dog.jpg", "a dog | runs"]
    run_id = json.loads((folder / "run_summary.json").read_text())["metadata"]["run_id"]
    assert f"model-{run_id}".encode() in content


@pytest.mark.skipif(missing("wandb") is not None, reason=str(missing("wandb")))
def test_wandb_without_a_network_keeps_the_run_offline(track, monkeypatch, capsys):
    import wandb

    opened, init = [], wandb.init

    def without_network(**how):
        opened.append(how["mode"])
        if how["mode"] == "online":
            raise wandb.errors.CommError("no route to host\nat line 3")
        return init(**how)

    monkeypatch.setattr(wandb, "init", without_network)
    monkeypatch.setenv("WANDB_MODE", "online")
    folder = track("wandb")
    assert opened == ["online", "offline"] and list(folder.glob("wandb/offline-run-*"))
    warning = "warning: W&B keeps this run offline: no route to host\n"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("name", BACKENDS)
def test_a_missing_package_is_named_before_anything_is_read(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # makes it absent
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        caption_options.parse_args([f"--{name}"])
    line = f"--{name} needs the package {name}: pip install -r requirements-tracking.txt\n"
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(line)


def test_nothing_is_opened_that_was_not_asked_for(tmp_path):
    asked = SimpleNamespace(tensorboard=False, wandb=False)
    assert tracking_backends.open_listeners(asked, tmp_path, None) == []

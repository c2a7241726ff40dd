"""model_versions.py: versions registered whole or not at all, read only undamaged, and used as a --model_path."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoints import checkpoint
from test_end_to_end import program, read_json, snapshot, succeed

import caption_options
import checkpoints
import model_versions
from checkpoints import BrokenSeal
from model_versions import ModelVersionManager, resolve_model_path, version_order

ROOT = Path(__file__).resolve().parents[1]
ROW = {"epoch": 2, "train_loss": 2.0, "val_loss": 2.5, "learning_rate": 0.1, "CIDEr": 0.5}
VERSION_FILES = {
    "best.pt", "config.json", "vocabulary.json", "scores.json", "metadata.json", "README.md",
    "version.sha256",
}  # fmt: skip


def make_run(folder, **changes):
    """A run's folder with a best.pt that holds an encoder's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = checkpoint()["encoder"] | {"weights": {"conv": torch.ones(3)}}
    splits = {split: [f"{split}.jpg"] for split in ("train", "val", "test")}
    state = checkpoint(encoder=encoder, splits=splits, history=[ROW | {"epoch": 1}, ROW])
    checkpoints.save_checkpoint(folder / "best.pt", state | changes)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "lstm_20241201_143022")


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """An empty registry, which MODEL_REGISTRY names, too."""
    monkeypatch.setenv("MODEL_REGISTRY", str(tmp_path / "models"))
    return ModelVersionManager(tmp_path / "models")


def command(*arguments):
    """The exit status of the command."""
    try:
        return model_versions.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code


# ------------------------------------------------------------------------------------- the numbers


def test_versions_are_ordered_as_the_standard_has_them():
    """Semantic Versioning 2.0.0, section 11, and numbers that are not in the order of their digits."""
    order = [
        "0.9.0", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
        "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.9.0", "1.10.0", "2.0.0",
    ]  # fmt: skip
    assert sorted(random.Random(0).sample(order, len(order)), key=version_order) == order


@pytest.mark.parametrize(
    "version", ["1.2", "v1.2.0", "01.2.0", "1.2.0+build", "1.2.0-", "../1.2.0", "1.2.0\n", "", "\u0661.2.0", 1.2]
)  # fmt: skip
def test_what_is_no_version_is_refused(version, manager, run):
    for call in (
        lambda: manager.register_version(version, run),
        lambda: manager.delete_version(version),
    ):
        with pytest.raises(ValueError, match=r"give MAJOR\.MINOR\.PATCH"):
            call()
    assert not manager.folder.exists()


# ------------------------------------------------------------------------------------- registering


def test_a_version_is_a_folder_with_all_that_explains_it(manager, run, tmp_path):
    """Called as the document that this class comes from calls it."""
    vocabulary = tmp_path / "artifacts"
    vocabulary.mkdir()
    (vocabulary / "wordtoix.json").write_text("{}")
    (run / "neighbours.pt").write_bytes(b"captions")
    version = manager.register_version(
        version="1.0.0",
        model_path=str(run / "best.pt"),
        vocab_dir=str(vocabulary),
        run_id="run_001",
        metrics={"bleu4": 0.25, "val_loss": 2.3},
        description="Initial <b>release</b>",
    )
    folder = manager.folder / "1.0.0"
    files = {file.name for file in folder.iterdir()}
    assert files == VERSION_FILES | {"wordtoix.json", "neighbours.pt"}
    assert version == manager.get_version("1.0.0") == manager.get_latest_version()
    assert (folder / "best.pt").read_bytes() == (run / "best.pt").read_bytes()
    assert version["metrics"] == {"val_loss": 2.3, "val_CIDEr": 0.5, "bleu4": 0.25}
    assert (version["run_id"], version["words"], version["epoch"]) == ("run_001", 2, 2)
    assert read_json(folder / "config.json") == {"decoder": "lstm"}
    assert read_json(folder / "vocabulary.json") == {"words": ["hund", "犬"]}
    assert read_json(folder / "scores.json") == {"validation": ROW, "test": {}}
    assert version["path"] == str(folder) and version["model_hash"] == version["files"]["best.pt"]
    card = (folder / "README.md").read_text()
    assert "| val\\_CIDEr | 0.5 |" in card and "Initial \\<b\\>release\\</b\\>" in card


def test_the_card_has_intervals_the_command_and_captions(manager, run):
    scores = {"CIDEr": 0.6, "checkpoint": str(run / "best.pt"), "intervals": {"CIDEr": [0.5, 0.7]}}
    rows = [{"file_name": f"{n}.jpg", "caption": f"a *dog* {n}"} for n in range(7)]
    for name, value in {
        "test_metrics.json": scores,
        "test_captions.json": rows,
        "run_config.json": {"command": "python flickr_image_caption.py --epochs 2"},
    }.items():
        (run / name).write_text(json.dumps(value))
    version = manager.register_version("1.0.0", run)
    assert version["intervals"] == {"test_CIDEr": [0.5, 0.7]}
    card = (manager.folder / "1.0.0" / "README.md").read_text()
    assert "| test\\_CIDEr | 0.6 [0.5, 0.7] |" in card
    assert "\n    python flickr_image_caption.py --epochs 2\n" in card
    assert "| 4.jpg | a \\*dog\\* 4 |" in card and "5.jpg" not in card
    assert "## Licence" in card


def test_the_card_of_a_model_that_was_not_tested_has_validation_captions(manager, run):
    captions = [{"epoch": 1, "caption": "early"}, {"epoch": 2, "caption": "a dog"}]
    entry = {"image": "v.jpg", "references": [], "captions": captions}
    (run / "sample_captions.json").write_text(json.dumps([entry, {"image": 3}, "damaged"]))
    manager.register_version("1.0.0", run)
    card = (manager.folder / "1.0.0" / "README.md").read_text()
    assert "| v.jpg | a dog |" in card and "early" not in card and "## Training" not in card


def test_the_run_s_own_name_and_test_scores_are_kept(manager, run):
    """Scores of another checkpoint, of an ensemble, or from before this checkpoint are not its own."""
    (run / "run_summary.json").write_text('{"metadata": {"run_id": "20241201_143022_0a1b2c3d"}}')
    scores = {"checkpoint": f"{run}/best.pt", "CIDEr": 0.4, "images": 500, "ensemble": []}
    others = [{"checkpoint": "last.pt"}, {"ensemble": ["b.pt"]}, {"foreign_dataset": {"name": "x"}}]
    file = run / "test_metrics.json"
    for number, other in enumerate(others):
        file.write_text(json.dumps(scores | other))
        version = manager.register_version(f"0.0.{number}", run)
        assert version["metrics"] == {"val_loss": 2.5, "val_CIDEr": 0.5}
    file.write_text(json.dumps(scores))
    version = manager.register_version("1.0.0", run)
    assert version["metrics"] == {"val_loss": 2.5, "val_CIDEr": 0.5, "test_CIDEr": 0.4}
    assert version["run_id"] == "20241201_143022_0a1b2c3d"
    os.utime(file, (1, 1))
    assert "test_CIDEr" not in manager.register_version("1.0.1", run)["metrics"]


def test_a_registered_version_is_never_replaced(manager, run):
    manager.register_version("1.0.0", run)
    assert manager.register_version("1.0.1", run, description=None, metrics={"x": np.float32(1)})
    before = snapshot(manager.folder)
    make_run(run, epoch=3)
    with pytest.raises(ValueError, match=r"1\.0\.0: there is this version"):
        manager.register_version("1.0.0", run)
    assert snapshot(manager.folder) == before


@pytest.mark.parametrize("changes", [{"config": {"mean": {1, 2}}}, {"vocabulary": {"words": 3}}])
def test_what_a_checkpoint_cannot_mean_is_refused_by_its_file(changes, manager, run):
    make_run(run, **changes)
    with pytest.raises(ValueError, match=rf"^{run}/best\.pt: not a usable checkpoint"):
        manager.register_version("1.0.0", run)
    assert manager.list_versions() == [] and not list(manager.folder.glob("*.partial"))


def test_what_cannot_be_registered_leaves_the_registry_as_it_was(
    manager, run, tmp_path, monkeypatch
):
    manager.register_version("1.0.0", run)
    before = snapshot(manager.folder)
    make_run(tmp_path / "bare", encoder=checkpoint()["encoder"])
    (tmp_path / "bad.pt").write_bytes(b"PK")
    calls = {
        "no encoder weights": {"model_path": tmp_path / "bare"},
        r"bad\.pt: not a usable checkpoint": {"model_path": tmp_path / "bad.pt"},
        "no such checkpoint": {"model_path": tmp_path / "absent"},
        "vocab_dir .*no such folder": {"model_path": run, "vocab_dir": "absent"},
        "metrics: CIDEr is no finite number": {
            "model_path": run,
            "metrics": {"CIDEr": float("nan")},
        },
    }
    for message, arguments in calls.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            manager.register_version("1.1.0", **arguments)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10))
        with pytest.raises(ValueError, match="give another --registry"):
            manager.register_version("1.1.0", run)
    assert snapshot(manager.folder) == before


# --------------------------------------------------------------------------------------- processes


def start(work):
    """Call `work` in a forked process, which exits with 0, or 1 after an exception. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        status = 0
    finally:
        os._exit(status)


def exit_status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_processes_that_register_at_once_all_succeed(manager, run):
    versions = [f"1.{number}.0" for number in range(6)]
    pids = [start(lambda v=version: manager.register_version(v, run)) for version in versions]
    assert [exit_status(pid) for pid in pids] == [0] * 6
    assert manager.verify() == dict.fromkeys(versions)


def test_of_processes_that_register_one_version_one_succeeds(manager, run):
    pids = [start(lambda: manager.register_version("1.0.0", run)) for _ in range(4)]
    assert sorted(exit_status(pid) for pid in pids) == [0, 1, 1, 1]
    assert manager.verify() == {"1.0.0": None}


def test_a_living_process_keeps_its_folder_and_a_dead_one_s_is_removed(manager, run):
    manager.folder.mkdir()
    partial = manager.folder / ".9.0.0.partial"

    def hold():
        with manager._changing():
            partial.mkdir()
            time.sleep(0.5)
            assert partial.exists()

    pid = start(hold)
    while not partial.exists():
        time.sleep(0.01)
    manager.register_version("1.0.0", run)  # waits
    assert exit_status(pid) == 0 and not partial.exists()


def test_a_register_killed_at_any_moment_leaves_the_registry_as_it_was(manager, run):
    """A smaller version of what was done fifty times with a checkpoint of 210 MB."""
    make_run(run, model={"weight": torch.zeros(1_000_000)})
    started = time.monotonic()
    manager.register_version("1.0.0", run)
    duration, rng = time.monotonic() - started, random.Random(0)
    versions, killed = {"1.0.0"}, 0
    for number in range(1, 9):
        pid = start(lambda n=number: manager.register_version(f"1.0.{n}", run))
        time.sleep(duration * rng.uniform(0, 0.9))
        os.kill(pid, signal.SIGKILL)
        killed += exit_status(pid) == -signal.SIGKILL
        assert versions <= manager.verify().keys() <= versions | {f"1.0.{number}"}
        versions = set(manager.verify())
        assert manager.verify() == dict.fromkeys(versions)
    manager.register_version("2.0.0", run)
    assert killed and not list(manager.folder.glob(".*"))
    assert manager.verify() == dict.fromkeys([*sorted(versions, key=version_order), "2.0.0"])


# ------------------------------------------------------------------------------------------ reading


@pytest.fixture
def three(manager, run):
    """The manager of 1.0.0, 1.9.0 and 1.10.0, registered in another order, which differ in a score."""
    for version, score in (("1.9.0", 0.9), ("1.10.0", 0.8), ("1.0.0", 0.7)):
        config = {"decoder": "lstm", "beam_size": len(version)}
        make_run(run, history=[ROW | {"CIDEr": score}], config=config)
        manager.register_version(version, run)
    return manager


def test_latest_is_the_highest_number(three):
    assert three.get_latest_version()["version"] == "1.10.0"
    assert [version["version"] for version in three.list_versions()] == ["1.0.0", "1.9.0", "1.10.0"]


def test_two_versions_are_compared_by_score_and_setting(three, run):
    comparison = three.compare_versions("1.0.0", "1.10.0")
    assert comparison["versions"] == ["1.0.0", "1.10.0"]
    cider = comparison["metrics"]["val_CIDEr"]
    assert cider == {"values": [0.7, 0.8], "difference": pytest.approx(0.1)}
    assert comparison["config"] == {"beam_size": [5, 6]}
    assert comparison["same_images"] == {"val": True, "test": True}
    make_run(run, splits={"train": ["a.jpg"], "val": ["b.jpg"], "test": ["test.jpg"]})
    three.register_version("2.0.0", run, metrics={"bleu4": 0.2})
    other = three.compare_versions("1.0.0", "latest")
    assert other["metrics"]["bleu4"] == {"values": [None, 0.2], "difference": None}
    assert other["same_images"] == {"val": False, "test": True}


def test_a_tag_names_one_version_at_a_time(three):
    three.tag_version("1.0.0", "production")
    three.tag_version("latest", "production")
    assert three.get_version("production")["version"] == "1.10.0"
    assert [version["tags"] for version in three.list_versions()] == [[], [], ["production"]]
    with pytest.raises(ValueError, match="tagged production: untag it first"):
        three.delete_version("1.10.0")
    three.untag("production")
    three.delete_version("1.10.0")
    assert three.get_latest_version()["version"] == "1.9.0"
    assert not (three.folder / "1.10.0").exists()
    for name in ("production", "1.10.0", "../runs"):
        with pytest.raises(FileNotFoundError, match=r"no version .*: it has 1\.0\.0, 1\.9\.0$"):
            three.get_version(name)
    for tag in ("latest", "1.0.0", "a b", "../x"):
        with pytest.raises(ValueError, match="give a letter"):
            three.tag_version("1.0.0", tag)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", sorted(VERSION_FILES))
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flip", "unlink"])
def test_a_damaged_version_is_refused_by_name_and_the_others_are_served(three, name, damage):
    damage(three.folder / "1.9.0" / name)
    message = r"models/1\.9\.0/[\w.]+: (damaged|missing)"
    for call in (three.get_version, lambda version: three.compare_versions("1.0.0", version)):
        with pytest.raises(BrokenSeal, match=message):
            call("1.9.0")
    faults = three.verify()
    assert re.search(message, faults.pop("1.9.0")) and set(faults.values()) == {None}
    assert three.get_version("1.0.0")["version"] == "1.0.0"
    assert len(three.list_versions()) == 3


def test_a_file_that_was_not_registered_is_damage_and_a_hidden_one_is_not(three):
    (three.folder / "1.0.0" / ".DS_Store").touch()
    assert three.verify()["1.0.0"] is None
    (three.folder / "1.0.0" / "neighbours.pt").touch()
    with pytest.raises(BrokenSeal, match=r"1\.0\.0/neighbours\.pt: damaged"):
        three.get_version("1.0.0")


def test_a_folder_renamed_by_hand_is_no_version(three):
    (three.folder / "1.9.0").rename(three.folder / "3.0.0")
    with pytest.raises(
        BrokenSeal, match=r"metadata\.json: damaged: it is not of a version 3\.0\.0"
    ):
        three.get_latest_version()


def test_damaged_tags_are_said_by_file(three):
    (three.folder / "model_registry.json").write_text('{"tags": {"a": 1}}')
    with pytest.raises(ValueError, match=r"model_registry\.json: damaged: delete it"):
        three.tags()


# ------------------------------------------------------------------------------------- the command


def test_the_command_s_words_and_statuses(manager, run, capsys):
    assert command("register", run, "--version", "1.0.0", "--description", "first\x1b[2J") == 0
    assert "registered" in capsys.readouterr().out
    assert command("register", run, "--version", "1.0.0") == 2
    assert command("register", run, "--version", "1") == 2
    assert command("tag", "1.0.0", "production") == 0
    capsys.readouterr()
    assert command("list") == 0
    assert re.search(r"1\.0\.0 .* 0\.5000 +none +production first \[2J\n", capsys.readouterr().out)
    assert command("show", "production") == 0
    assert capsys.readouterr().out.startswith("# Image captioning model 1.0.0\n")
    assert command("show", "latest", "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1.0.0"
    assert command("compare", "1.0.0", "production") == 0
    assert re.search(r"val_CIDEr +0\.5000 +0\.5000 +0\.0000\n", capsys.readouterr().out)
    assert command("verify") == 0
    assert command("show", "2.0.0") == 2 and command("untag", "nobody") == 2
    flip(manager.folder / "1.0.0" / "metadata.json")
    for words in (["verify"], ["verify", "1.0.0"], ["list"], ["show", "1.0.0"]):
        capsys.readouterr()
        assert command(*words) == 1
        assert "1.0.0/metadata.json: damaged" in capsys.readouterr().err
    assert command("untag", "production") == command("delete", "1.0.0") == 0
    assert manager.list_versions() == []
    assert command("list", "--registry", run / "best.pt") == 0  # no folder holds no versions
    assert command("register", run, "--version", "1.0.0", "--registry", run / "best.pt") == 2


def test_help_and_mistakes_answer_without_torch():
    """Which takes seconds to import."""
    script = (
        "import sys, model_versions\n"
        "try: model_versions.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for words in (["--help"], ["list"], ["show", "1.0.0"]):
        done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True)
        assert done.returncode == 0


# ------------------------------------------------------------------------------------ --model_path


def test_a_version_is_found_by_reference_folder_and_file(three, tmp_path):
    three.tag_version("1.9.0", "production")
    expected = {
        "registry:latest": "1.10.0", "registry:1.0.0": "1.0.0", "registry:production": "1.9.0",
        three.folder: "1.10.0", three.folder / "1.0.0": "1.0.0",
        three.folder / "1.0.0" / "best.pt": "1.0.0",
    }  # fmt: skip
    for path, version in expected.items():
        for prefer in ("best", "newest"):
            assert resolve_model_path(path, prefer) == three.folder / version / "best.pt"
    assert resolve_model_path(tmp_path).parent.parent == tmp_path / "runs"
    (three.folder / "1.9.0" / checkpoints.SEAL).unlink()
    with pytest.raises(BrokenSeal, match=r"1\.9\.0/version\.sha256: missing"):
        resolve_model_path("registry:production")


def test_a_version_that_is_not_there_is_refused_before_torch(three, capsys):
    for flags in ("--model_path registry:3.0.0", "--model_path x --ensemble registry:3.0.0"):
        flags = flags.replace("x", str(three.folder)).split()
        options = caption_options.parse_args(["--mode", "caption", "--images", "a.jpg", *flags])
        with pytest.raises(SystemExit, match="2"):
            caption_options.check_files(options)
        message = r"no version '3\.0\.0' of a model: it has 1\.0\.0, 1\.9\.0, 1\.10\.0"
        assert re.search(message, capsys.readouterr().err)


def test_every_mode_takes_a_version_and_leaves_it_as_it_was(shop):
    """The registry is the default one, in the working folder."""
    manager = ModelVersionManager()
    for version, decoder in (("1.0.0", "attention"), ("1.10.0", "lstm"), ("1.9.0", "adaptive")):
        manager.register_version(version, shop / decoder)
    before = {version: snapshot(manager.folder / version) for version in manager.verify()}
    picture = next(Path("data/sample/Images").iterdir())
    latest, run = (
        succeed("--mode caption", "--images", picture, "--model_path", path)
        for path in ("registry:latest", shop / "lstm" / "best.pt")
    )
    assert latest == run
    ensemble = "--mode caption --model_path registry:1.0.0 --ensemble registry:1.9.0 --images"
    assert succeed(ensemble, picture).count("\t") == 1
    out = succeed("--mode test --model_path models/1.0.0 --rerank consensus --neighbours 2")
    results = read_json("models/results/1.0.0/test_metrics.json")
    assert (
        results["checkpoint"] == "models/1.0.0/best.pt" and "written: models/results/1.0.0" in out
    )
    out = succeed("--dataset_type sample --epochs 1 --model_path registry:1.0.0")
    assert "checkpoint: models/1.0.0/best.pt" in out and Path("saved_models").is_dir()
    tuned = program("--mode tune --model_path registry:1.0.0")
    assert tuned.status == 2 and "1.0.0: a version of a model is never edited" in tuned.err
    assert {version: snapshot(manager.folder / version) for version in before} == before
    flip(manager.folder / "1.10.0" / "best.pt")
    damaged = program("--mode caption --model_path registry:latest --images", picture)
    assert damaged.status == 2 and "models/1.10.0/best.pt: damaged" in damaged.err
    assert succeed("--mode caption --model_path registry:1.0.0 --images", picture)

"""checkpoints.py: files written atomically; checkpoints saved, loaded, refused, found and pruned.

A checkpoint here is a small dictionary.
"""

import io
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
from checkpoints import (
    BrokenSeal,
    check_free_space,
    check_seal,
    check_writable_dir,
    checkpoint_errors,
    load_checkpoint,
    prune_checkpoints,
    replace_file,
    resolve_checkpoint,
    runs_folder,
    save_checkpoint,
    seal_folder,
    sealed_files,
    write_json,
    write_text,
)
from runtime import memory_shortage

STAMP = "20241201_143022"


def checkpoint(**changes):
    state = {
        "config": {"decoder": "lstm"}, "vocabulary": {"words": ["hund", "犬"]},
        "model": {"weight": torch.arange(6.0)}, "optimizer": {"state": {}}, "scheduler": None,
        "scaler": None, "plan": {"epochs": 3}, "epoch": 2, "step": 40, "data_position": 0,
        "history": [], "best_score": 0.5, "early_stopping": 0,
        "random_state": {"cpu": torch.get_rng_state(), "cuda": [], "mps": None},
        "encoder": {
            "name": "resnet50", "weights_sha256": "0" * 64, "image_size": 224, "channels": 2048,
        },
        "splits": {"train": ["a.jpg"]},
    }  # fmt: skip
    return state | changes


def touch(path, written=1_700_000_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (written, written))
    return path


# ------------------------------------------------------------------------------------- atomic files


def test_write_json_is_strict_and_keeps_every_script(tmp_path):
    value = {
        "path": Path("a/b"),
        "犬": ["ein Hund", np.int64(3), torch.tensor(0.5), np.array([1, 2])],
        4: -math.inf,
    }
    write_json(tmp_path / "a.json", value | {"name": os.fsdecode(b"caf\xe9.jpg")})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "犬" in text
    expected = {"path": "a/b", "犬": ["ein Hund", 3, 0.5, [1, 2]], "4": None}
    assert json.loads(text) == expected | {"name": "caf\udce9.jpg"}


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


def test_the_file_and_then_its_new_name_are_brought_to_the_disk(tmp_path, monkeypatch):
    """Or a power cut could leave an empty file, or the old name."""
    path, flushed, fsync = tmp_path / "a.txt", [], os.fsync

    def noted_fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    write_text(path, "new")
    assert flushed == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_an_output_folder_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable_dir(tmp_path, "--cache_dir")
    check_writable_dir(tmp_path / "new" / "folder", "--cache_dir")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    message = r"^--output_dir .*/file is not a folder: give a folder"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=message):
            check_writable_dir(path, "--output_dir")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="nobody can write in /proc")
def test_an_output_folder_that_cannot_be_made_is_refused():
    message = r"^--output_dir /proc/none: cannot write in /proc .*: give another folder$"
    with pytest.raises(ValueError, match=message):
        check_writable_dir("/proc/none", "--output_dir")


# ------------------------------------------------------------------ saving and loading a checkpoint


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    moments = {"exp_avg": torch.randn(3), "step": torch.tensor(4.0)}
    state = checkpoint(optimizer={"state": {0: moments}})
    save_checkpoint(tmp_path / "best.pt", state)
    back = load_checkpoint(tmp_path / "best.pt")
    assert back.keys() == {"format_version", *state}
    assert torch.equal(back["model"]["weight"], torch.arange(6.0))
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], moments["exp_avg"])
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
    version = checkpoints.FORMAT_VERSION
    hostile = checkpoint(format_version=version, config={"a": Attack(str(proof))})
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
        ([1, 2], "it has no format_version"),
        ({"conv1.weight": torch.zeros(3)}, "it has no format_version"),
        ({"format_version": torch.zeros(2)}, "it has no format_version"),
        (
            {"format_version": checkpoints.FORMAT_VERSION},
            "its 'config' is missing or not of type dict",
        ),
        (
            checkpoint(model=[], format_version=checkpoints.FORMAT_VERSION),
            "its 'model' is missing or not of type dict",
        ),
    ],
)
def test_other_files_of_torch_are_refused_by_what_they_lack(tmp_path, content, expected):
    torch.save(content, tmp_path / "other.pt")
    message = refusal(tmp_path / "other.pt")
    assert message.startswith(f"not a usable checkpoint ({expected})")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("epoch", -1),
        ("step", -1),
        ("model", {"weight": [1.0]}),
        ("model", {3: torch.zeros(1)}),
        ("encoder", {}),
        ("encoder", checkpoint()["encoder"] | {"weights_sha256": 3}),
        ("encoder", checkpoint()["encoder"] | {"channels": 2**40}),
        ("encoder", checkpoint()["encoder"] | {"image_size": torch.tensor([1, 2])}),
        ("encoder", checkpoint()["encoder"] | {"coarse_size": None}),
        ("encoder", checkpoint()["encoder"] | {"weights": {"conv1.weight": "x"}}),
        ("history", [1]),
        ("history", [{"epoch": 1}]),
        ("history", [{"epoch": 1, "learning_rate": 0.1, "CIDEr": torch.zeros(2)}]),
    ],
    ids=str,
)
def test_a_part_of_another_type_is_named(tmp_path, part, value):
    save_checkpoint(tmp_path / "bad.pt", checkpoint(**{part: value}))
    assert f"(its {part!r} is damaged)" in refusal(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**50),  # a quadrillion numbers in a file of four bytes
        torch.zeros(13).as_strided((7, 7), (1, 1)),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
    ],
    ids=["stride 0", "overlapping", "meta", "sparse", "complex"],
)
@pytest.mark.parametrize("part", ["model", "optimizer", "random_state"])
def test_a_tensor_without_its_numbers_is_refused_wherever_it_is(tmp_path, part, tensor):
    contents = {"a": tensor} if part == "model" else {"state": [({"a": tensor},)]}
    save_checkpoint(tmp_path / "bad.pt", checkpoint(**{part: contents}))
    refused = refusal(tmp_path / "bad.pt")
    assert "it has a tensor without its numbers" in refused or "not readable" in refused


def test_tensors_that_are_views_of_one_storage_are_whole(tmp_path):
    """As an LSTM's weights are on a GPU, and a transposed matrix is anywhere."""
    weights = torch.arange(12.0)
    model = {"first": weights[:4].view(2, 2).T, "second": weights[4:]}
    save_checkpoint(tmp_path / "best.pt", checkpoint(model=model))
    assert torch.equal(load_checkpoint(tmp_path / "best.pt")["model"]["first"], model["first"])


def test_a_list_that_holds_itself_is_looked_at_once(tmp_path):
    endless = []
    endless.append(endless)
    save_checkpoint(tmp_path / "best.pt", checkpoint(optimizer=endless))
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: bytearray(2**62)])
def test_a_want_of_memory_is_not_the_checkpoint_s_fault(tmp_path, monkeypatch, allocate):
    """Both of torch's kind and of Python's; the allocation is a real one."""
    save_checkpoint(tmp_path / "best.pt", checkpoint())
    with pytest.raises((MemoryError, RuntimeError)) as caught, checkpoint_errors("best.pt"):
        allocate()
    assert not isinstance(caught.value, ValueError) and memory_shortage(caught.value)
    monkeypatch.setattr(torch, "load", lambda *_, **__: allocate())
    with pytest.raises(type(caught.value)):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("version", [3, 6])
def test_another_format_version_is_refused_by_its_number(tmp_path, version):
    torch.save({"format_version": version}, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt") == (
        f"checkpoint format version {version}, expected 4 or 5: "
        "use the version of this program that wrote it"
    )


def test_a_missing_checkpoint_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt: no such checkpoint file"):
        load_checkpoint(tmp_path / "nothing.pt")


# ------------------------------------------------------------------ finding and pruning checkpoints


@pytest.fixture
def saved_models(tmp_path):
    """Two finished runs, one that has no checkpoint yet, and another decoder's older run."""
    family = tmp_path / "saved_models" / "flickr30k" / "resnet_attention"
    for name in ("best.pt", "model_epoch_1.pt", "model_epoch_2.pt", "model_epoch_10.pt"):
        touch(family / "flickr30k_attention_ep10_bs32_lr1e-04_20241201_143022" / name)
    for name in ("best.pt", "model_epoch_11.pt"):
        touch(family / "flickr30k_attention_ep15_bs32_lr1e-04_20241201_143045" / name)
    (family / "flickr30k_attention_ep15_bs32_lr1e-04_20250101_000000").mkdir()
    other_family = tmp_path / "saved_models" / "flickr8k" / "resnet_lstm"
    touch(other_family / "flickr8k_lstm_ep1_bs8_lr1e-03_20231201_143045" / "best.pt")
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


def test_a_path_without_its_run_is_found_in_the_newest_run_that_has_it(saved_models):
    family = saved_models / "flickr30k" / "resnet_attention"
    assert resolve_checkpoint(family / "best.pt").parent.name.endswith("143045")
    older_run = family / "flickr30k_attention_ep10_bs32_lr1e-04_20241201_143022"
    tenth = resolve_checkpoint(family / "model_epoch_10.pt", prefer="newest")
    assert tenth == older_run / "model_epoch_10.pt"


def test_the_tenth_run_of_a_second_is_newer_than_its_second(tmp_path):
    for suffix in ("", "_2", "_10"):
        touch(tmp_path / f"flickr8k_lstm_{STAMP}{suffix}" / "best.pt")
    assert resolve_checkpoint(tmp_path).parent.name == f"flickr8k_lstm_{STAMP}_10"


def test_a_renamed_run_goes_by_the_time_of_its_file(tmp_path):
    touch(tmp_path / f"flickr8k_lstm_{STAMP}" / "best.pt")  # December 2024; its file's time is not
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
    """A resumed run that was stopped at once has only the copy: resuming it would lose epochs."""
    touch(tmp_path / f"lstm_{STAMP}" / "model_epoch_9.pt")
    touch(tmp_path / "lstm_20251201_143022" / "best.pt")
    assert resolve_checkpoint(tmp_path, "newest").name == "model_epoch_9.pt"
    released = resolve_checkpoint(tmp_path / "lstm_20251201_143022", "newest")
    assert released.name == "best.pt"


def test_an_error_for_a_missing_checkpoint_names_those_that_exist(saved_models, tmp_path):
    family = saved_models / "flickr30k" / "resnet_attention"
    message = r"model_epoch_99\.pt: no such checkpoint: the newest one nearby is .*143045/\w+\.pt$"
    with pytest.raises(FileNotFoundError, match=message):
        resolve_checkpoint(family / "model_epoch_99.pt")
    with pytest.raises(FileNotFoundError, match=r"the newest one nearby is .*flickr8k_lstm_ep1"):
        resolve_checkpoint(saved_models / "flickr8k" / "resnet_attention" / "best.pt")
    (tmp_path / "empty").mkdir()
    message = r"there is none in .*empty or below it: --mode train writes them"
    with pytest.raises(FileNotFoundError, match=message):
        resolve_checkpoint(tmp_path / "empty", "newest")


RUN = f"flickr8k/resnet_lstm/flickr8k_lstm_ep15_bs64_lr1e-03_cosine_{STAMP}"


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        (f"saved_models/{RUN}/best.pt", "saved_models"),
        (f"/a/my models/{RUN}_2/model_epoch_3.pt", "/a/my models"),
        (f"{RUN}/last.pt", "."),
        (f"a/{RUN}_renamed/last.pt", None),
        (f"a/{RUN.replace('flickr8k/', 'flickr30k/')}/last.pt", None),
        (f"a/{RUN.replace('resnet_lstm', 'resnet_attention')}/last.pt", None),
        ("best.pt", None),
    ],
)
def test_the_folder_of_all_runs_is_known_by_the_folders_of_a_run(
    tmp_path, monkeypatch, file, folder
):
    monkeypatch.chdir(tmp_path)
    assert runs_folder(file) == (folder and Path(folder))


def test_a_checkpoint_named_from_within_its_folders_knows_them_too(tmp_path, monkeypatch):
    (tmp_path / RUN).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / RUN)
    assert runs_folder("best.pt") == tmp_path


def test_where_the_best_is_meant_no_other_is_taken(tmp_path):
    """A run stopped in its first epoch: its last.pt was never the best."""
    touch(tmp_path / f"lstm_{STAMP}" / "last.pt")
    with pytest.raises(FileNotFoundError, match=r"the newest one nearby is .*last\.pt$"):
        resolve_checkpoint(tmp_path)


def test_of_many_checkpoints_nearby_the_newest_is_named(tmp_path):
    for second in range(10, 17):
        touch(tmp_path / f"lstm_20241201_1430{second}" / "best.pt")
    with pytest.raises(FileNotFoundError) as caught:
        resolve_checkpoint(tmp_path / "model_epoch_3.pt")
    assert re.findall(r"1430(\d\d)/best\.pt", str(caught.value)) == ["16"]


def test_free_space_may_be_used_up_to_the_last_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2_000_000_000))
    check_free_space(tmp_path / "new", 2_000_000_000, "the files", "make room")
    message = r"^the files need 2\.00 GB, 2\.00 GB are free; make room$"
    with pytest.raises(ValueError, match=message):
        check_free_space(tmp_path / "new", 2_000_000_001, "the files", "make room")


def test_prune_keeps_the_last_epochs_and_every_other_file(tmp_path):
    others = ["best.pt", "last.pt", "model_epoch_x.pt.txt"]
    for name in (*others, *(f"model_epoch_{n}.pt" for n in (1, 2, 9, 10, 11))):
        touch(tmp_path / name)
    prune_checkpoints(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 8
    prune_checkpoints(tmp_path, 2)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {*others, "model_epoch_10.pt", "model_epoch_11.pt"}


@pytest.fixture
def sealed(tmp_path):
    """A sealed folder with a checkpoint and a text."""
    folder = tmp_path / "1.0.0"
    folder.mkdir()
    save_checkpoint(folder / "best.pt", checkpoint())
    write_text(folder / "README.md", "a card")
    seal_folder(folder)
    return folder


def test_a_sealed_folder_is_read_and_sha256sum_can_check_it(sealed):
    assert load_checkpoint(sealed / "best.pt")["epoch"] == 2
    assert sealed_files(sealed).keys() == {"best.pt", "README.md"}
    command = ["sha256sum", "--check", "--quiet", checkpoints.SEAL]
    assert subprocess.run(command, cwd=sealed).returncode == 0


def test_no_file_of_a_sealed_folder_is_replaced_or_added(sealed):
    before = {file: file.read_bytes() for file in sealed.iterdir()}
    for name in ("best.pt", "new.json"):
        with pytest.raises(PermissionError, match=rf"never edited: .*{name}"):
            write_json(sealed / name, {})
    with pytest.raises(PermissionError, match="never edited"):
        checkpoints.update_config(sealed / "best.pt", {"beam_size": 9})
    for folder in (sealed, sealed / "new"):
        with pytest.raises(
            ValueError, match=r"^--output_dir .*1\.0\.0.*: .* is never edited: give "
        ):
            check_writable_dir(folder, "--output_dir")
    assert {file: file.read_bytes() for file in sealed.iterdir()} == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, seal: torch.save(checkpoint(epoch=3), file),
        lambda file, seal: file.unlink(),
        lambda file, seal: seal.write_text(seal.read_text().replace("best.pt", "beste.pt")),
        lambda file, seal: seal.write_text(""),
        lambda file, seal: seal.write_bytes(b"\xff" * 100),
        lambda file, seal: seal.write_text("0" * 64 + "  ../best.pt\n" + seal.read_text()),
    ],
    ids=["other", "absent", "unlisted", "empty", "binary", "outside"],
)
def test_what_is_not_as_it_was_sealed_is_refused_by_version_and_file(sealed, damage):
    """The other checkpoint is whole in itself: nothing but its hash tells."""
    damage(sealed / "best.pt", sealed / checkpoints.SEAL)
    with pytest.raises(BrokenSeal, match=r"1\.0\.0/(best\.pt|version\.sha256): (damaged|missing)"):
        check_seal(sealed / "best.pt")


def test_a_sealed_folder_is_no_run_of_the_folder_above(sealed, tmp_path):
    run = touch(tmp_path / f"lstm_{STAMP}" / "best.pt")  # older than the version's
    assert resolve_checkpoint(tmp_path) == run
    assert resolve_checkpoint(sealed) == sealed / "best.pt"

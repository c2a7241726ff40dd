"""feature_cache.py: pictures are encoded once, whatever happens to the run, the disk or the cache's files."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import UNIX, grey_images, save_image, unreadable_files
from PIL import Image
from tqdm import tqdm

import feature_cache
from feature_cache import FeatureSource, cached_features
from image_loading import ImagePaths


class FakeEncoder:
    """Grid of 2 x 2 cells with 3 channels: grey level + 10 * cell + channel / 8.

    `images`: how many it was given.
    """

    grid, num_cells, channels, image_size = [2, 2], 4, 3, 8
    weights, interpolation = "0", "bilinear"

    def __init__(self, break_after=None, error=None, overflow=None, seconds=0.0):
        """overflow: (grey level, the value one of its features takes)."""
        self.images, self.break_after, self.error = 0, break_after, error
        self.overflow, self.seconds = overflow, seconds

    def __call__(self, pixels):
        if self.break_after is not None and self.images >= self.break_after:
            raise self.error
        self.images += len(pixels)
        time.sleep(self.seconds)
        level = pixels[:, 0, 0, 0].float()
        features = (
            level[:, None, None] + 10.0 * torch.arange(4)[:, None] + torch.arange(3) / 8
        )  # (n, 4, 3)
        if self.overflow is not None:
            features[level == self.overflow[0], 3, 1] = self.overflow[1]
        return features

    def key(self):
        return {"name": "fake/net", "weights": self.weights, "image_size": self.image_size}


class NoiseEncoder(FakeEncoder):
    """Random grids of 7 x 7 cells, laid out in memory as those of a real encoder.

    `encoded`: grey levels so far.
    """

    grid, num_cells, channels = [7, 7], 49, 96

    def __init__(self):
        self.noise, self.encoded = torch.rand(8, 49, 96) * 9, []

    def __call__(self, pixels):
        levels = pixels[:, 0, 0, 0].long()
        self.encoded += levels.tolist()
        return self.noise[levels].transpose(1, 2).contiguous().transpose(1, 2)


def _expected(levels):
    levels = torch.tensor(levels, dtype=torch.float16)
    return levels[:, None, None] + 10 * torch.arange(4)[:, None] + torch.arange(3) / 8


def _cached(paths, encoder, cache_dir, batch_size=2, **options):
    return cached_features(
        paths, encoder, cache_dir=cache_dir, batch_size=batch_size, progress=False, **options
    )


def _folder(cache_dir: Path) -> Path:
    (folder,) = cache_dir.iterdir()
    return folder


def _named(folder: Path, table="images") -> list[tuple]:
    """What the index names: (path, size, modified, row)."""
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as index:
        return index.execute(f"SELECT * FROM {table}").fetchall()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_picture_is_encoded_once(tmp_path, num_workers):
    paths, cache, encoder = grey_images(tmp_path / "i", 5), tmp_path / "cache", FakeEncoder()
    features, unreadable = _cached(paths, encoder, cache, num_workers=num_workers)
    assert unreadable == {}
    assert encoder.images == 5
    assert torch.equal(features[torch.tensor([4, 0, 4])], _expected([4, 0, 4]))
    assert features[[1]].dtype == torch.float16
    again, _ = _cached(paths[::-1], FakeEncoder(break_after=0, error=AssertionError), cache)
    assert torch.equal(again[range(5)], _expected([4, 3, 2, 1, 0]))
    folder = _folder(cache)
    assert folder.name.startswith("fake_net_")
    assert json.loads((folder / "key.json").read_text())["weights"] == "0"
    assert (folder / "features.f16").stat().st_size == 5 * 24


FILES = {"float32": "f32", "float16": "f16"}


@pytest.mark.parametrize("name", FILES)
def test_every_dtype_has_a_cache_of_its_own(tmp_path, name):
    paths, cache, dtype = grey_images(tmp_path / "i", 3), tmp_path / "cache", getattr(torch, name)
    _cached(paths, FakeEncoder(), cache)  # float16
    encoder = FakeEncoder()
    for _ in range(2):
        features, _ = _cached(paths, encoder, cache, dtype=dtype)
    assert encoder.images == (0 if name == "float16" else 3)
    assert features[[2, 0]].dtype == dtype and features[torch.tensor([], dtype=int)].shape == (
        0,
        4,
        3,
    )
    assert torch.equal(features[[2, 0]].float(), _expected([2, 0]).to(dtype).float())
    (file,) = cache.glob(f"*/features.{FILES[name]}")
    assert file.stat().st_size == 3 * 12 * dtype.itemsize
    assert isinstance(features.data, np.memmap)  # not read into memory
    assert json.loads(file.with_name("key.json").read_text())["dtype"] == name


def test_features_in_a_devices_memory_read_as_those_on_disk(tmp_path):
    features, _ = _cached(grey_images(tmp_path / "i", 3), FakeEncoder(), tmp_path / "cache")
    resident = features.to(torch.device("cpu"))
    assert resident.nbytes == features.nbytes == 3 * 24
    assert torch.equal(resident[torch.tensor([2, 0])], features[torch.tensor([2, 0])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pooled_cache_holds_the_means(tmp_path, dtype):
    paths, cache = [*grey_images(tmp_path / "i", 3), tmp_path / "none.png"], tmp_path / "cache"
    means, unreadable = _cached(paths, FakeEncoder(), cache, dtype=dtype, pooled=True)
    assert (
        means[[0]].shape == (1, 1, 3)
        and means[[0]].dtype == torch.float32
        and list(unreadable) == paths[3:]
    )
    exact = torch.tensor([[15, 15.125, 15.25], [16, 16.125, 16.25], [17, 17.125, 17.25]])
    torch.testing.assert_close(means[range(3)][:, 0], exact, rtol=0, atol=0)
    assert _folder(cache).name.endswith("_pooled")
    assert [path.stat().st_size for path in _folder(cache).glob("features.*")] == [3 * 3 * 4]
    encoder = FakeEncoder()  # the grids are another matter
    _cached(paths, encoder, cache, dtype=dtype)
    assert encoder.images == 3


def test_means_of_stored_grids_are_taken_without_encoding(tmp_path):
    paths, cache, encoder = grey_images(tmp_path / "i", 5), tmp_path / "cache", NoiseEncoder()
    _cached([paths[3], paths[1]], encoder, cache)
    taken, _ = _cached(paths, encoder, cache, pooled=True)
    assert encoder.encoded == [3, 1, 0, 2, 4]
    torch.testing.assert_close(
        taken[range(5)], encoder.noise[:5].mean(1, keepdim=True), rtol=1e-3, atol=0
    )
    fresh, _ = _cached(paths, encoder, tmp_path / "other", pooled=True)
    torch.testing.assert_close(taken[range(5)], fresh[range(5)], rtol=1e-3, atol=0)
    paths += grey_images(tmp_path / "i", 1, start=5)
    del encoder.encoded[:]
    added, _ = _cached(paths, encoder, cache, pooled=True)
    assert encoder.encoded == [5] and torch.equal(added[range(5)], taken[range(5)])


def test_means_are_taken_from_what_a_killed_run_left_of_the_grids(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 5), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    _tear(_folder(cache) / "features.f16", lambda data: data[:-5])
    encoder = FakeEncoder()
    means, _ = _cached(paths, encoder, cache, pooled=True)
    assert encoder.images == 1
    assert torch.equal(means[range(5)], _expected(range(5)).mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("features.f16", None),  # deleted
        ("features.f16", b""),
        ("index.sqlite", None),
        ("index.sqlite", b""),
        ("index.sqlite", b"garbage" * 99),
    ],
)
def test_means_do_without_grids_that_cannot_be_had(tmp_path, capsys, name, content):
    paths, cache = grey_images(tmp_path / "i", 3), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    file = _folder(cache) / name
    file.unlink() if content is None else file.write_bytes(content)
    before = sorted(_folder(cache).iterdir())
    encoder = FakeEncoder()
    _cached(paths, encoder, cache, pooled=True)
    assert encoder.images == 3
    assert sorted(before[0].parent.iterdir()) == before and capsys.readouterr().err == ""


def test_another_key_is_another_cache(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 2), tmp_path / "cache"
    for attributes in ({}, {"weights": "1"}, {"image_size": 4}):
        encoder = FakeEncoder()
        vars(encoder).update(attributes)
        _cached(paths, encoder, cache)
        assert encoder.images == 2
    assert len(list(cache.iterdir())) == 3


def test_mirrored_images_are_another_cache(tmp_path):
    """Of a picture that is black on its left."""
    picture, cache = Image.new("RGB", (8, 8)), tmp_path / "cache"
    picture.paste((50, 50, 50), (4, 0, 8, 8))
    paths = [save_image(tmp_path / "i" / "half.png", picture)]
    for options, level in (({}, 0), ({"mirrored": True}, 50), ({}, 0)):
        features, _ = _cached(paths, FakeEncoder(), cache, **options)
        assert torch.equal(features[[0]], _expected([level]))
    assert len(list(cache.iterdir())) == 2


def test_added_and_changed_pictures_encode_only_themselves(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 4), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    paths += grey_images(tmp_path / "i", 1, start=4)
    save_image(paths[1], Image.new("RGB", (8, 8), (99, 99, 99)))
    os.utime(paths[1], ns=(1, 1))
    os.link(paths[2], tmp_path / "i" / "other_name.png")
    (tmp_path / "i" / "link.png").symlink_to(paths[3])
    encoder = FakeEncoder()
    features, _ = _cached([*paths, tmp_path / "i" / "link.png"], encoder, cache)
    assert encoder.images == 2
    assert torch.equal(features[range(6)], _expected([0, 99, 2, 3, 4, 3]))


@UNIX
def test_names_and_times_that_sqlite_has_no_type_for(tmp_path):
    """A name that is not UTF-8, a time before 1970 and one that needs 64 bits."""
    paths, cache = grey_images(tmp_path / "i", 3), tmp_path / "cache"
    paths[0] = paths[0].rename(tmp_path / "i" / os.fsdecode(b"\xff.png"))
    os.utime(paths[1], (-1, -1))
    os.utime(paths[2], (10_000_000_000, 10_000_000_000))
    for seen in (3, 0):
        encoder = FakeEncoder()
        features, _ = _cached(paths, encoder, cache)
        assert encoder.images == seen and torch.equal(features[range(3)], _expected(range(3)))


def test_names_in_folders_and_links_mean_the_files_they_lead_to(tmp_path):
    """Names below a folder are stamped as text; a path made of them is another spelling, no other picture."""
    paths, encoder = grey_images(tmp_path / "i", 3), FakeEncoder()
    _cached(paths, encoder, tmp_path / "cache")
    (tmp_path / "other").symlink_to(tmp_path / "i")
    (tmp_path / "i" / "link.png").symlink_to(paths[2])
    names = [paths[1].name, "link.png", f"../other/{paths[0].name}"]
    images = ImagePaths(tmp_path / "other", names)
    features, unreadable = _cached(
        images, FakeEncoder(break_after=0, error=AssertionError), tmp_path / "cache"
    )
    assert torch.equal(features[range(3)], _expected([1, 2, 0]))
    assert unreadable == {}


def test_a_missing_name_below_a_folder_is_returned_by_its_path(tmp_path):
    paths = grey_images(tmp_path / "i", 2)
    images = ImagePaths(tmp_path / "i", [paths[1].name, "none.png"])
    assert _cached(images, FakeEncoder(), tmp_path / "cache")[1] == {
        tmp_path / "i" / "none.png": "No such file or directory"
    }


@pytest.mark.parametrize("pooled", [False, True])
def test_other_datasets_entries_in_the_index_are_not_read(tmp_path, pooled):
    """30,000 of them took 9 MB in a process that asks for three of its own."""
    paths, cache = grey_images(tmp_path / "i", 3), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    folder, strangers = _folder(cache), 30_000
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as index, index:
        entries = (
            (f"/strange/{row:030}.png".encode(), row, row, row) for row in range(3, strangers)
        )
        index.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", entries)
    with (folder / "features.f16").open("ab") as file:
        file.truncate(strangers * 24)  # 2 x 2 cells of 3 channels in float16
    tracemalloc.start()
    features, _ = _cached(
        paths, FakeEncoder(break_after=0, error=AssertionError), cache, pooled=pooled
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert len(features) == 3


def test_unreadable_images_are_returned(tmp_path):
    files = unreadable_files(tmp_path / "bad")
    good = grey_images(tmp_path / "i", 3)
    paths = [good[0], *files.values(), *good[1:]]
    encoder = FakeEncoder()
    features, unreadable = _cached(paths, encoder, tmp_path / "cache")
    assert set(unreadable) == set(files.values())
    assert unreadable[files["truncated.jpg"]].startswith("not a readable image (")
    assert unreadable[files["missing.jpg"]] == "No such file or directory"
    assert encoder.images == 3
    assert torch.equal(features[[0, len(paths) - 1]], _expected([0, 2]))
    with pytest.raises(IndexError, match="unreadable"):
        features[[0, 1]]


def test_nothing_readable(tmp_path):
    features, unreadable = _cached([tmp_path / "none.png"], FakeEncoder(), tmp_path / "cache")
    assert list(unreadable) == [tmp_path / "none.png"]
    assert len(features) == 1


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("a broken disk")])
def test_an_interrupted_cache_is_continued(tmp_path, error, pooled):
    paths, cache, options = (
        grey_images(tmp_path / "i", 7),
        tmp_path / "cache",
        {"pooled": pooled, "dtype": torch.float32},
    )
    with pytest.raises(type(error)):
        _cached(paths, FakeEncoder(break_after=4, error=error), cache, **options)
    encoder = FakeEncoder()
    features, _ = _cached(paths, encoder, cache, **options)
    assert encoder.images == 3
    expected = _expected(range(7)).float()
    assert torch.equal(features[range(7)], expected.mean(1, keepdim=True) if pooled else expected)


def _tear(file: Path, change):
    content = file.read_bytes()
    file.write_bytes(change(content))


@pytest.mark.parametrize(
    ("name", "change", "encoded_again"),
    [
        ("features.f16", lambda data: data + b"torn row", 0),  # rows the index does not name yet
        ("features.f16", lambda data: data + bytes(24), 0),
        ("features.f16", lambda data: data[:-5], 1),  # a disk that kept the index and lost the data
        ("features.f16", lambda data: b"", 5),
    ],
)
def test_a_torn_tail_is_cut_off_and_the_work_goes_on(tmp_path, name, change, encoded_again):
    paths, cache = grey_images(tmp_path / "i", 5), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    _tear(_folder(cache) / name, change)
    encoder = FakeEncoder()
    features, _ = _cached(paths, encoder, cache)
    assert encoder.images == encoded_again
    assert torch.equal(features[range(5)], _expected(range(5)))
    last, _ = _cached(paths, FakeEncoder(break_after=0, error=AssertionError), cache)
    assert torch.equal(last[range(5)], _expected(range(5)))
    assert (_folder(cache) / "features.f16").stat().st_size == 5 * 24


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"\xff\0garbage\n" * 999,
        lambda content: b"garbage",
        lambda content: content[:4096],
        lambda content: content[:-4096],
        lambda content: content[:16] + bytes(84) + content[100:],
        lambda content: content[:4096] + bytes(len(content) - 4096),
        lambda content: content[:4096] + b"\xff" * 200 + content[4296:],
        lambda content: content.replace(b"modified", b"modifier"),
        lambda content: content.replace(b"tableimages", b"tablefaults"),
    ],
)
def test_a_damaged_index_begins_anew_and_says_so(tmp_path, capsys, change):
    paths, cache = grey_images(tmp_path / "i", 5), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    _tear(_folder(cache) / "index.sqlite", change)
    emptied = (_folder(cache) / "index.sqlite").stat().st_size == 0
    (_folder(cache) / "index.sqlite-journal").write_bytes(b"garbage")
    encoder = FakeEncoder()
    features, _ = _cached(paths, encoder, cache)
    assert torch.equal(features[range(5)], _expected(range(5)))
    assert encoder.images == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if emptied else 1) and all(": damaged (" in line for line in lines)
    again, _ = _cached(paths, FakeEncoder(break_after=0, error=AssertionError), cache)
    assert torch.equal(again[range(5)], _expected(range(5)))
    assert len(_named(_folder(cache))) == 5
    assert (_folder(cache) / "features.f16").stat().st_size == 5 * 24


def test_the_index_may_name_rows_that_the_data_lacks(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 5), tmp_path / "cache"
    _cached(paths[:2], FakeEncoder(), cache)
    strays = [(b"/x.png", 1, 1, 99), (b"/y.png", 1, 1, 3), (b"/z.png", 1, 1, -1)]
    with contextlib.closing(sqlite3.connect(_folder(cache) / "index.sqlite")) as index, index:
        index.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", strays)
    features, _ = _cached(paths, FakeEncoder(), cache)
    assert torch.equal(features[range(5)], _expected(range(5)))
    assert sorted(row for *_stamp, row in _named(_folder(cache))) == [0, 1, 2, 3, 4]


def test_a_locked_index_is_no_damaged_one(tmp_path, monkeypatch):
    paths, cache = grey_images(tmp_path / "i", 2), tmp_path / "cache"
    _cached(paths, FakeEncoder(), cache)
    connect = sqlite3.connect
    with contextlib.closing(connect(_folder(cache) / "index.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", lambda file: connect(file, timeout=0))
        with pytest.raises(OSError, match=r"index\.sqlite: database is locked"):
            _cached(paths, FakeEncoder(), cache)
    _cached(paths, FakeEncoder(break_after=0, error=AssertionError), cache)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float16", 65_520.0),  # the largest is 65,504
        ("float16", -70_000.0),
        ("float16", float("nan")),
        ("float32", float("inf")),
    ],
)
def test_features_beyond_the_dtype_are_refused_and_the_rest_is_kept(tmp_path, dtype, value):
    paths, cache, options = (
        grey_images(tmp_path / "i", 6),
        tmp_path / "cache",
        {"dtype": getattr(torch, dtype)},
    )
    with pytest.raises(
        ValueError,
        match=rf"4\.png: the encoder's output overflows {dtype}; use a wider --cache_dtype",
    ):
        _cached(paths, FakeEncoder(overflow=(4, value)), cache, **options)
    encoder = FakeEncoder()
    features, _ = _cached(paths, encoder, cache, **options)
    assert encoder.images == 2
    assert torch.equal(features[range(6)].float(), _expected(range(6)).to(options["dtype"]).float())


@pytest.mark.parametrize("options", [{}, {"pooled": True, "dtype": torch.float32}])
def test_free_space_is_checked_first(tmp_path, monkeypatch, options):
    usage, row = shutil.disk_usage(tmp_path), 24 if not options else 12  # bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=3 * row - 1))
    paths, encoder = grey_images(tmp_path / "i", 3), FakeEncoder()
    with pytest.raises(ValueError, match=r"--cache_dir .*--cache_dtype or --no_feature_cache"):
        _cached(paths, encoder, tmp_path / "cache", **options)
    assert encoder.images == 0
    _cached(paths[:2], encoder, tmp_path / "cache", **options)
    assert encoder.images == 2


def test_a_cache_dir_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=r"--cache_dir .*cannot be used"):
        _cached(grey_images(tmp_path / "i", 1), FakeEncoder(), tmp_path / "cache")


def _fill(paths, cache, seconds, queue, file_size_limit=None):
    """In a process of its own: fill the cache and report (images encoded, error)."""
    feature_cache.COMMIT_SECONDS = -1.0
    torch.set_num_threads(1)  # the parent's thread pool does not survive a fork
    if file_size_limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    encoder, error = FakeEncoder(seconds=seconds), None
    sys.stderr = captured = io.StringIO()
    try:
        features, _ = _cached(paths, encoder, cache)
        assert torch.equal(features[range(len(paths))], _expected(range(len(paths))))
    except OSError as caught:
        error = type(caught).__name__
    queue.put((encoder.images, error, captured.getvalue()))


FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def _start(*arguments):
    queue = FORK.Queue()
    process = FORK.Process(target=_fill, args=(*arguments[:3], queue, *arguments[3:]))
    process.start()
    return process, queue


@UNIX
def test_a_second_run_waits_for_the_first_and_reuses_it(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 8), tmp_path / "cache"
    runs = [_start(paths, cache, 0.15) for _ in range(2)]
    results = sorted(queue.get(timeout=60) for _, queue in runs)
    assert [images for images, _, _ in results] == [0, 8]
    assert results[0][2].startswith("waiting for another run that fills ")
    assert results[0][2].count("\n") == 1
    assert results[1][2] == ""


@UNIX
def test_a_killed_run_is_continued(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 40), tmp_path / "cache"
    process, _ = _start(paths, cache, 0.1)
    deadline = time.monotonic() + 60
    while (
        not list(cache.glob("*/features.f16"))
        or not _folder(cache).joinpath("features.f16").stat().st_size
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.join()
    encoder = FakeEncoder()
    features, _ = _cached(paths, encoder, cache)
    assert 0 < encoder.images < 40
    assert torch.equal(features[range(40)], _expected(range(40)))


def _check_whole(cache, copy):
    """Every row that the index names is what the encoder gives for its file. Returns their number."""
    if not list(cache.glob("*/index.sqlite")):
        return 0
    shutil.copytree(cache, copy)  # looking at it rolls back what a killed run began
    try:
        named = _named(_folder(copy))
    except sqlite3.OperationalError:  # no such table, yet
        named = []
    rows = np.fromfile(_folder(copy) / "features.f16", np.float16).reshape(-1, 4, 3)
    for path, size, modified, row in named:
        file = Path(os.fsdecode(path))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (size, modified)
        assert np.array_equal(rows[row], _expected([int(file.stem)])[0])
    shutil.rmtree(copy)
    return len(named)


def _fill_until(line, paths, cache):
    """In a process of its own: fill the cache, killed at that line of those executed there."""
    lines = itertools.count()

    def trace(frame, event, _argument):
        if frame.f_code.co_filename != feature_cache.__file__:
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    feature_cache.COMMIT_SECONDS = -1.0
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the one that forks share stays taken if its holder is killed
    sys.settrace(trace if line else None)
    _cached(paths, FakeEncoder(), cache)


@UNIX
@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_the_cache_whole(tmp_path):
    """By turns between two lines of feature_cache.py and at any time, so within SQLite, too."""
    paths, cache, draw = grey_images(tmp_path / "i", 120), tmp_path / "cache", random.Random(0)
    kills, kept = 0, []
    while kills < 50:
        line = draw.randrange(1, 4000) if kills % 2 else 0
        process = FORK.Process(target=_fill_until, args=(line, paths, cache))
        process.start()
        if not line:
            process.join(timeout=draw.uniform(0, 0.1))
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        kept.append(_check_whole(cache, tmp_path / "copy"))
        if kept[-1] == len(paths):
            shutil.rmtree(cache)
    features, _ = _cached(paths, FakeEncoder(), cache)
    assert torch.equal(features[range(120)], _expected(range(120)))
    assert sum(0 < count < 120 for count in kept) > 20  # most came while rows were being added


@UNIX
def test_a_full_disk_leaves_a_usable_cache(tmp_path):
    paths, cache = grey_images(tmp_path / "i", 100), tmp_path / "cache"
    process, queue = _start(paths, cache, 0.0, 4 * 4096)  # bytes per file: an index of four pages
    images, error, _ = queue.get(timeout=60)
    process.join()
    assert error == "OSError"
    kept = len(_named(_folder(cache)))
    encoder = FakeEncoder()
    features, _ = _cached(paths, encoder, cache)
    assert 0 < encoder.images < 100
    assert torch.equal(features[range(100)], _expected(range(100)))
    assert images >= kept > 0


# ------------------------------------------------------------------------------- features of a list


class LeftEdge(FakeEncoder):
    """A FakeEncoder that says what it is. Its grey level is the left edge's, so mirroring is seen."""

    grid, num_cells, channels, image_size, batch_size = (2, 2), 4, 3, 8, 3

    @property
    def parts(self):
        return [self]

    def key(self):
        """As an encoder's."""
        return {"name": "left/edge", "weights_sha256": "0"}


def _half_grey_images(folder: Path, count: int) -> list[Path]:
    """Images whose left half has grey level n, the right half n + 100."""
    paths = []
    for level in range(count):
        pixels = np.full((8, 8, 3), level, np.uint8)
        pixels[:, 4:] += 100
        paths.append(save_image(folder / f"{level}.png", Image.fromarray(pixels)))
    return paths


def _source(paths, cache_dir, encoder=None, **options):
    options = {"pooled": False, "dtype": torch.float16, "num_workers": 0} | options
    return FeatureSource(
        encoder or LeftEdge(), paths, cache_dir=cache_dir, device=torch.device("cpu"), **options
    )


BATCHES = [torch.tensor([2, 0]), torch.tensor([1]), torch.tensor([3, 3, 1])]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("mirror", [None, [False, True, False, True]])
def test_a_source_streams_the_features_of_each_batch(tmp_path, pooled, cached, mirror):
    paths, cache = _half_grey_images(tmp_path / "i", 4), tmp_path / "cache" if cached else None
    coins = None if mirror is None else torch.tensor(mirror)
    source = _source(paths, cache, pooled=pooled, mirrored=mirror is not None)
    assert source.unreadable == {} and source.paths == paths and source.pooled == pooled
    batches = list(source.stream(iter(BATCHES), coins))
    for rows, features in zip(BATCHES, batches, strict=True):
        levels = [row + 100 * (mirror is not None and mirror[row]) for row in rows.tolist()]
        expected = _expected(levels).float()
        expected = expected.mean(1, keepdim=True) if pooled else expected
        assert features.dtype == torch.float32 and not features.is_inference()
        torch.testing.assert_close(features, expected)
    assert cached == (tmp_path / "cache").exists()


@pytest.mark.parametrize("mirror", [None, [False, True, False, True]])
def test_features_in_a_devices_memory_are_streamed_as_from_the_disk(tmp_path, mirror):
    """Here the device is the CPU: what a GPU is given is a tensor, too, instead of a memory map."""
    coins = None if mirror is None else torch.tensor(mirror)
    source = _source(_half_grey_images(tmp_path / "i", 4), tmp_path / "cache", mirrored=True)
    expected = list(source.stream(BATCHES, coins))
    for name in ("features", "mirrored"):
        setattr(source, name, getattr(source, name).to(torch.device("cpu")))
    shutil.rmtree(tmp_path / "cache")
    assert isinstance(source.features, torch.Tensor) and source.features.dtype == torch.float16
    for features, batch in zip(source.stream(BATCHES, coins), expected, strict=True):
        assert features.dtype == torch.float32 and torch.equal(features, batch)


def test_features_are_copied_to_a_device_part_by_part(tmp_path):
    file = feature_cache.FeatureFile(tmp_path / "features.f16", (4, 3), torch.float16)
    values = np.random.default_rng(0).random((5000, 4, 3)).astype(np.float16)
    values.tofile(file.path)
    features = feature_cache.Features(file, np.arange(5000)[::-1].copy())
    tracemalloc.start()
    copied = features.to(torch.device("cpu"))
    _, peak = tracemalloc.get_traced_memory()  # NumPy's memory, not torch's
    tracemalloc.stop()
    assert peak < features.nbytes / 2
    assert np.array_equal(copied.numpy(), values[::-1])


def test_a_source_with_a_cache_encodes_once_and_without_one_each_time(tmp_path):
    paths = _half_grey_images(tmp_path / "i", 4)
    for cache, counts in ((tmp_path / "cache", [4, 4, 4]), (None, [0, 6, 12])):
        encoder = LeftEdge()
        source, images = _source(paths, cache, encoder), [encoder.images]
        for _ in range(2):
            list(source.stream(BATCHES))
            images.append(encoder.images)
        assert images == counts
    _source(paths, tmp_path / "cache", LeftEdge(break_after=0, error=AssertionError))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("mirror", [None, [False, False, True]])
def test_a_source_leaves_out_unreadable_images(tmp_path, cached, mirror):
    readable = _half_grey_images(tmp_path / "i", 3)
    paths = [readable[0], tmp_path / "none.png", *readable[1:]]
    source = _source(paths, tmp_path / "cache" if cached else None, mirrored=True)
    assert list(source.unreadable) == paths[1:2] and source.paths == readable
    coins = None if mirror is None else torch.tensor(mirror)
    (features,) = source.stream([torch.tensor([2, 0])], coins)
    assert torch.equal(features, _expected([102 if mirror else 2, 0]).float())


def test_a_source_of_names_in_a_folder_stays_one(tmp_path):
    """A million names with a bad picture among them do not become a million paths."""
    first, last = grey_images(tmp_path / "i", 2)
    images = ImagePaths(tmp_path / "i", [first.name, "none.png", last.name])
    source = _source(images, tmp_path / "cache")
    assert isinstance(source.paths, ImagePaths)
    assert list(source.paths) == [first, last]
    assert list(source.unreadable) == [tmp_path / "i" / "none.png"]


class RightEdge(LeftEdge):
    """Another encoder, of a grid of its own; grey level from the right edge."""

    grid = (1, 4)

    def __call__(self, pixels):
        return super().__call__(pixels.flip(-1)) * 2

    def key(self):
        return {"name": "right/edge", "weights_sha256": "1"}


class BothEdges:
    """Encoders side by side, whose channels are joined."""

    def __init__(self):
        self.parts, self.image_size, self.batch_size = [LeftEdge(), RightEdge()], 8, 3
        self.interpolation = "bilinear"

    def join(self, features):
        return torch.cat(features, dim=-1)

    def __call__(self, pixels):
        return self.join([part(pixels) for part in self.parts])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("mirror", [None, [False, True, False, True]])
def test_encoders_side_by_side_stream_what_each_does_alone_from_its_own_cache(
    tmp_path, pooled, mirror
):
    paths = _half_grey_images(tmp_path / "i", 4)
    paths.insert(1, tmp_path / "missing.png")
    coins = None if mirror is None else torch.tensor(mirror)
    options = {"pooled": pooled, "dtype": torch.float16, "num_workers": 0}
    options |= {"mirrored": mirror is not None, "device": torch.device("cpu")}

    def stream(encoder, cache):
        source = feature_cache.open_source(encoder, paths, cache_dir=cache, **options)
        assert list(source.unreadable) == [tmp_path / "missing.png"] and len(source.paths) == 4
        return list(source.stream(iter(BATCHES), coins))

    both = BothEdges()
    joined = stream(both, tmp_path / "cache")
    alone = [
        stream(encoder, tmp_path / name) for name, encoder in zip("ab", both.parts, strict=True)
    ]
    for found, *each in zip(joined, *alone, strict=True):
        assert torch.equal(found, torch.cat(each, dim=-1))
    encoded = [part.images for part in both.parts]
    stream(RightEdge(), tmp_path / "cache")  # a run of one of them finds its features there
    assert [part.images for part in both.parts] == encoded
    single = RightEdge()
    feature_cache.open_source(single, paths, cache_dir=tmp_path / "cache", **options)
    assert single.images == 0


def test_encoders_side_by_side_without_a_cache_see_each_picture_once(tmp_path):
    paths = _half_grey_images(tmp_path / "i", 3)
    source = feature_cache.open_source(
        BothEdges(), paths, cache_dir=None, pooled=False, dtype=torch.float16, num_workers=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert isinstance(source, FeatureSource)
    (features,) = source.stream([torch.tensor([2, 0])])
    assert features.shape == (2, 4, 6)
    assert features[0, 0].tolist()[::3] == [2, 204]

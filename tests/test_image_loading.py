"""image_loading.py: pixels, batches of files, and shards, which fill the cache as files do."""

import gzip
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import UNIX, grey_images, png_bomb, quarters, save_image, unreadable_files
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_end_to_end import ATTENTION, TINY, load, program, run_dir, snapshot, succeed, train
from test_feature_cache import FakeEncoder, _cached, _expected, _folder, _named

import caption_data
import image_loading
import process_group
from image_loading import find_shards, find_unreadable, load_batches, load_image, open_image

# Pixels


def test_a_picture_of_the_right_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    path = save_image(tmp_path / "a.png", Image.fromarray(pixels))
    assert np.array_equal(load_image(path, 24), pixels)


def test_a_picture_is_squashed_whole_without_a_crop(tmp_path):
    black_white = np.array([[0, 255]], np.uint8)
    wide = Image.fromarray(black_white.repeat(60, 1).repeat(30, 0))  # 30 x 120
    pixels = load_image(save_image(tmp_path / "a.png", wide), 20)
    assert pixels.shape == (20, 20, 3)
    assert (pixels[:, :9] == 0).all()
    assert (pixels[:, 11:] == 255).all()


def test_a_large_jpeg_is_decoded_at_reduced_size(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    path = save_image(
        tmp_path / "a.jpg", Image.fromarray(colours).resize((2000, 1500), Image.Resampling.BICUBIC)
    )
    whole, half = (2000, 1500), (1000, 750)
    for size, expected in ((None, whole), (376, whole), (375, half), (224, half)):
        assert open_image(path, size=size).size == expected
    exact = np.asarray(open_image(path).resize((224, 224), Image.Resampling.BILINEAR), np.float32)
    difference = np.abs(load_image(path, 224) - exact)  # of 255
    assert difference.mean() < 0.5 and difference.max() <= 3


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    path = save_image(tmp_path / "a.png", quarters(), exif=exif)
    pixels = load_image(path, 16)
    assert pixels[4, 4].tolist() == [0, 0, 255]  # the left column, read upwards, is the top row now
    assert pixels[4, 12].tolist() == [255, 0, 0]
    wide = save_image(tmp_path / "b.png", Image.new("L", (40, 10), 7), exif=exif)
    turned = open_image(wide)
    assert (turned.size, turned.mode, turned.getpixel((0, 0))) == ((10, 40), "RGB", (7, 7, 7))


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm", "a.avif", "a.heic"]
)
def test_every_format_is_read(tmp_path, name):
    pixels = load_image(save_image(tmp_path / name, quarters()), 16).astype(int)
    assert np.abs(pixels[4, 4] - [255, 0, 0]).max() < 40
    assert np.abs(pixels[12, 12] - 255).max() < 40


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (8, 8), 100), [100, 100, 100]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
        (Image.new("P", (8, 8), 3), None),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), [255, 255, 255]),  # transparent: white shows
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("LA", (8, 8), (50, 255)), [50, 50, 50]),
        (Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), [128, 128, 128]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, image, colour):
    pixels = load_image(save_image(tmp_path / "a.png", image), 8)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert colour is None or pixels[0, 0].tolist() == colour


def test_cmyk_and_a_transparent_palette_become_rgb(tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = load_image(save_image(tmp_path / "a.jpg", red), 8)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 12
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert (load_image(save_image(tmp_path / "b.png", palette, transparency=0), 8) == 255).all()


def test_an_unreadable_image_is_one_line_that_names_it(tmp_path):
    files = unreadable_files(tmp_path / "bad")
    expected = {
        "text.jpg": "none of JPEG",
        "truncated.jpg": "truncated",
        "bomb.png": "decoding its 30000 x 30000 pixels takes 3,600 MB, more than 805: scale it down",
        "program.eps": "none of JPEG",
        "folder.jpg": "it is a folder",
        "missing.jpg": "there is no such file",
        "float.tif": "no fixed range",
    }
    for name, path in files.items():
        with pytest.raises(ValueError) as caught:
            load_image(path, 32)
        message = str(caught.value)
        assert message.startswith(f"{path}: not a readable image ("), message
        assert expected.get(name, "") in message
        assert "\n" not in message


def jpeg_in_three_scans(side):
    """A baseline JPEG of a grey picture, whose three components come one after the other."""
    content = io.BytesIO()
    Image.new("L", (side, side), 80).save(content, "JPEG")
    grey = content.getvalue()
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    sides = grey[frame + 5 : frame + 9]
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    colours = b"\xff\xc0\0\x11\x08" + sides + b"\x03" + components
    length = 2 + int.from_bytes(grey[frame + 2 : frame + 4])
    head, end = grey[:frame] + colours + grey[frame + length : scan], b"\xff\xd9"
    start, data = grey[scan : scan + 5], grey[scan + 6 : -2]
    return head + b"".join(start + bytes([number]) + data for number in (1, 2, 3)) + end


def test_a_jpeg_in_several_scans_is_counted_with_its_coefficients(tmp_path, monkeypatch):
    """libjpeg holds two bytes of every sample at full size, however small the picture comes."""
    contents = {"three scans": jpeg_in_three_scans(800)}
    for name, options in (("one scan", {}), ("progressive", {"progressive": True})):
        content = io.BytesIO()
        Image.new("RGB", (800, 800), "red").save(content, "JPEG", subsampling=0, **options)
        contents[name] = content.getvalue()
    expected = Image.new("YCbCr", (1, 1), (80, 80, 80)).convert("RGB").getpixel((0, 0))
    found = open_image("three scans", contents["three scans"], 50).getpixel((9, 9))
    assert np.abs(np.subtract(found, expected)).max() < 3
    small, coefficients = 4 * 100**2, 2 * 3 * 800**2
    for name, needed in (
        ("one scan", small),
        ("progressive", small + coefficients),
        ("three scans", small + coefficients),
    ):
        monkeypatch.setattr(image_loading, "MAX_DECODING_BYTES", needed)
        assert open_image(name, contents[name], 50).size == (100, 100)
        monkeypatch.setattr(image_loading, "MAX_DECODING_BYTES", needed - 1)
        with pytest.raises(ValueError, match=f"^{name}: .*800 x 800 pixels .*scale it down"):
            open_image(name, contents[name], 50)


PEAKS = """
import re, sys, image_loading
image_loading.open_image("warm.png")
for name in sys.argv[1:]:
    image_loading.MAX_DECODING_BYTES = 0
    try:
        image_loading.open_image(name, size=64)
    except ValueError as error:
        promised = float(re.search("takes ([0-9,]+) MB", str(error))[1].replace(",", ""))
    image_loading.MAX_DECODING_BYTES = 10**12
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    memory = lambda key: int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    before = memory("VmRSS")
    image_loading.open_image(name, size=64)
    print(name, promised, (memory("VmHWM") - before) * 1024 / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_decoding_takes_no_more_memory_than_is_counted(tmp_path):
    """Measured in a process of its own, with 6 million pixels, in MB."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    colours = colours.resize((3000, 2000), Image.Resampling.BILINEAR)
    alpha = colours.convert("RGBA")
    alpha.putalpha(100)
    grey = colours.convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    files = {
        "a.jpg": (colours, {}), "progressive.jpg": (colours, {"progressive": True}),
        "all.jpg": (colours, {"progressive": True, "subsampling": 0}),
        "cmyk.jpg": (colours.convert("CMYK"), {}), "a.png": (colours, {"compress_level": 1}),
        "alpha.png": (alpha, {"compress_level": 1}), "grey.png": (grey, {"compress_level": 1}),
        "sixteen.png": (sixteen, {"compress_level": 1}), "a.gif": (colours.quantize(16), {}),
        "a.tif": (colours, {"compression": "tiff_lzw"}), "a.webp": (colours, {"method": 0}),
        "alpha.webp": (alpha, {"method": 0}), "a.heic": (colours, {}), "alpha.heic": (alpha, {}),
        "a.avif": (colours, {"speed": 10}),
    }  # fmt: skip
    for name, (image, options) in files.items():
        save_image(tmp_path / name, image, **options)
    save_image(tmp_path / "warm.png", quarters())
    environment = os.environ | {"PYTHONPATH": str(Path(image_loading.__file__).parent)}
    command = [sys.executable, "-c", PEAKS, *files]
    lines = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).splitlines()
    assert len(lines) == len(files)
    for line in lines:
        name, promised, measured = line.split()
        assert float(measured) < 1.1 * float(promised) + 4, line


@UNIX
def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="not a readable image"):
        load_image(tmp_path / "pipe.jpg", 8)


# Batches of files


def test_paths_are_joined_when_they_are_asked_for():
    paths = image_loading.ImagePaths(Path("folder"), ["a.jpg", "b/c.jpg", "d.jpg"])
    assert [*paths] == [Path("folder/a.jpg"), Path("folder/b/c.jpg"), Path("folder/d.jpg")]
    assert len(paths) == 3 and paths[-1] == Path("folder/d.jpg") and not paths[:0]
    assert [*paths[1:]] == [*paths][1:]
    with pytest.raises(IndexError):
        paths[3]


def test_digests_tell_contents_apart_whatever_their_names(tmp_path):
    middle = bytes(2**15)
    contents = {"a": b"1", "b": b"1", "c": b"2", "empty": b"", "long": b"1" + middle + b"1",
                "other start": b"2" + middle + b"1", "other end": b"1" + middle + b"2",
                "longer": b"1" + middle + b"\0001"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    nowhere = ["absent", "fifo", ".", "nul\0", "n" * 300]
    digests = image_loading.content_digests(tmp_path, [*contents, *nowhere]).tolist()
    assert digests[len(contents) :] == [0] * len(nowhere)
    assert digests[0] == digests[1] and len({*digests}) == len(contents)
    assert image_loading.content_digests(tmp_path, []).tolist() == []


def test_processes_of_a_run_share_the_hashing(tmp_path, monkeypatch):
    names = [path.name for path in grey_images(tmp_path, 7)]
    alone, shares = image_loading.content_digests(tmp_path, names), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(process_group, "all_gather", lambda share: shares.append(share) or shares)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        digests = image_loading.content_digests(tmp_path, names)
    assert digests.equal(alone) and [len(share) for share in shares] == [2, 2, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_load_batches_keeps_order_and_leaves_the_random_state_alone(tmp_path, num_workers):
    paths = grey_images(tmp_path, 6)
    batches = [torch.tensor([5, 0]), [3], range(1, 3)]
    state = torch.get_rng_state()
    pixels = list(load_batches(paths, 4, batches, num_workers))
    assert [batch[:, 0, 0, 0].tolist() for batch in pixels] == [[5, 0], [3], [1, 2]]
    assert pixels[0].shape == (2, 3, 4, 4)
    assert pixels[0].dtype == torch.uint8
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_of_a_batch_are_decoded_at_the_same_time_in_their_order(tmp_path, monkeypatch):
    paths, meeting = [*grey_images(tmp_path, 6), tmp_path / "none.png"], threading.Barrier(2)
    original = image_loading.load_image

    def load_image(path, size, content=None, interpolation="bilinear"):
        if path in paths[:2]:
            meeting.wait(timeout=60)  # fails unless two threads are in here
        return original(path, size, content, interpolation)

    monkeypatch.setattr(image_loading, "available_cpus", lambda: 3)
    monkeypatch.setattr(image_loading, "load_image", load_image)
    filters = [*warnings.filters]
    ((positions, pixels, reasons),) = image_loading.decode_images(paths, 4, 7, num_workers=0)
    assert positions == pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert reasons == {6: "not a readable image (there is no such file)"}
    assert warnings.filters == filters  # as Python's own, which threads share, was


def test_pictures_to_draw_are_no_larger_than_a_drawing_needs(tmp_path):
    large = save_image(tmp_path / "a.jpg", quarters().resize((5000, 2500)))
    tall = save_image(tmp_path / "b.png", quarters().resize((20, 2048)))
    small = save_image(tmp_path / "c.png", quarters())
    drawn = list(image_loading.open_images([large, tall, small]))
    assert [image.size for image in drawn] == [(1024, 512), (10, 1024), (16, 16)]
    assert drawn[0].getpixel((10, 10))[0] > 200
    assert np.array_equal(drawn[2], quarters())


def test_unreadable_images_are_found_without_a_cache(tmp_path):
    paths = [*grey_images(tmp_path, 2), tmp_path / "none.png"]
    assert find_unreadable(paths) == {paths[2]: "not a readable image (there is no such file)"}
    with pytest.raises(ValueError, match=r"none\.png: not a readable image"):
        list(load_batches(paths, 4, [[0, 2]], 0))


# Shards


def png(level):
    """A picture of 8 x 8 pixels, all of this grey."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(content, "PNG")
    return content.getvalue()


def write_shard(path, members):
    """A tar file of {name: content}; None makes a symbolic link to /etc/passwd."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def grey_shards(folder, count=6, each=2):
    """`count` pictures whose grey level is their number, a text beside each; the shards' pattern."""
    for start in range(0, count, each):
        levels = range(start, min(start + each, count))
        members = {f"{i}.png": png(i) for i in levels} | {f"{i}.txt": b"a caption" for i in levels}
        write_shard(folder / f"grey-{start // each}.tar", members)
    return f"{folder}/grey-{{0..{(count - 1) // each}}}.tar"


def shards_at(source):
    return find_shards(source, caption_data.PICTURE_NAME)


def images_in(source, names):
    shards = shards_at(source)
    return [shards / name for name in names]


CACHE_FILES = {"features.f16", "index.sqlite", "key.json", "lock"}
NEVER = {"encoder": FakeEncoder(break_after=0, error=AssertionError)}


def no_streaming(patch):
    def read(urls, wanted):
        raise AssertionError("the shards are streamed")

    patch.setattr(image_loading, "read", read)


# Which shards


def test_folders_patterns_urls_and_pipes_of_shards_are_recognised(tmp_path):
    write_shard(tmp_path / "tars/b.tar", {})
    write_shard(tmp_path / "tars/a.tgz", {})
    (tmp_path / "tars/a.json").write_text("{}")
    assert [Path(url).name for url in shards_at(tmp_path / "tars").urls] == ["a.tgz", "b.tar"]
    pattern = f"{tmp_path}/tars/{{b.tar,a.tgz}}"
    assert [Path(url).name for url in shards_at(pattern).urls] == ["b.tar", "a.tgz"]
    assert shards_at("https://a.org/x-{00..02}.tar").urls[2] == "https://a.org/x-02.tar"
    assert shards_at("pipe:cat a.tar").urls == ("pipe:cat a.tar",)
    assert shards_at("pipe:" + "x" * 5000).size == 0
    for name in (
        "dog.jpg",
        "dog.HEIC",
        "folder/",
    ):  # what beside tar files makes an ordinary image folder
        folder = tmp_path / name.strip("/.jpg")
        write_shard(folder / "a.tar", {})
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
        assert shards_at(folder) is None
    assert shards_at(tmp_path / "nowhere") is None and shards_at("") is None


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("grey-{0..4}.tar", r"2 of 5 shards are missing, the first is .*grey-3\.tar"),
        ("none.tar", r"1 of 1 shards are missing"),
        ("grey-{0..2.tar", "not a pattern"),
        ("{pipe:touch proof;#,x}.tar", "2 of 2 shards are missing"),
        ("PIPE:touch proof.tar", "1 of 1 shards are missing"),
    ],
)
def test_missing_shards_are_one_line_that_names_the_flag(tmp_path, monkeypatch, pattern, fault):
    monkeypatch.chdir(tmp_path)
    grey_shards(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"^--image_dir .*{fault}"):
        shards_at(pattern)
    assert not Path("proof").exists()


def test_without_webdataset_one_line_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(ValueError, match=r"pip install webdataset$"):
        shards_at(grey_shards(tmp_path))


# What they fill the cache with


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_fill_the_cache_as_files_do_and_are_read_once(tmp_path, monkeypatch, num_workers):
    images = images_in(grey_shards(tmp_path / "tars"), [f"{i}.png" for i in range(6)])
    files = tmp_path / "files"
    files.mkdir()
    for i in range(6):
        (files / f"{i}.png").write_bytes(png(i))
    from_files, _ = _cached([files / image.name for image in images], FakeEncoder(), tmp_path / "a")
    encoder = FakeEncoder()
    features, unreadable = _cached(images[::-1], encoder, tmp_path / "b", num_workers=num_workers)
    assert (encoder.images, unreadable) == (6, {})
    assert torch.equal(features[range(6)], from_files[range(5, -1, -1)])
    if not num_workers:
        stored = [(_folder(tmp_path / cache) / "features.f16").read_bytes() for cache in "ab"]
        assert stored[0] == stored[1]
    no_streaming(monkeypatch)
    again, _ = _cached(images, **NEVER, cache_dir=tmp_path / "b")
    assert torch.equal(again[range(6)], from_files[range(6)])


def test_an_interrupted_run_over_shards_is_continued(tmp_path):
    images = images_in(grey_shards(tmp_path), [f"{i}.png" for i in range(6)])
    encoder = FakeEncoder()
    with pytest.raises(KeyboardInterrupt):
        _cached(images, FakeEncoder(break_after=4, error=KeyboardInterrupt), tmp_path / "cache")
    features, _ = _cached(images, encoder, tmp_path / "cache")
    assert encoder.images == 2
    assert torch.equal(features[range(6)], _expected(range(6)))


def test_changed_shards_are_encoded_again(tmp_path):
    names, pattern = ["0.png", "5.png"], grey_shards(tmp_path)
    _cached(images_in(pattern, names), FakeEncoder(), tmp_path / "cache")
    write_shard(tmp_path / "grey-2.tar", {"5.png": png(99)})
    features, _ = _cached(images_in(pattern, names), FakeEncoder(), tmp_path / "cache")
    assert torch.equal(features[range(2)], _expected([0, 99]))


def test_missing_and_broken_members_are_returned_and_remembered(tmp_path, monkeypatch):
    """A link is no picture, a name is not looked for in another folder, and the second run makes no pass."""
    strange = "\ud800\udcff.jpg"  # as JSON may name it; UTF-8 cannot
    bad = {
        "text.jpg": b"not an image",
        "bomb.png": png_bomb(30_000),
        "link.jpg": None,
        "folder/1.png": png(1),
    }
    write_shard(tmp_path / "a.tar", {"./0.png": png(0)} | bad)
    images = images_in(tmp_path / "a.tar", ["0.png", "1.png", *bad, strange])
    for _ in range(2):
        features, unreadable = _cached(images, FakeEncoder(), tmp_path / "cache")
        assert {image.name: reason.split(",")[0][:32] for image, reason in unreadable.items()} == {
            "1.png": "no shard holds it by this name",
            strange: "no shard holds it by this name",
            "link.jpg": "no shard holds it by this name",
            "text.jpg": "not a readable image (none of JP",
            "bomb.png": "not a readable image (decoding i",
        }
        assert torch.equal(features[[0, 5]], _expected([0, 1]))
        no_streaming(monkeypatch)


def test_one_pass_serves_all_splits(tmp_path, monkeypatch):
    pattern = grey_shards(tmp_path / "tars", 20, each=10)
    splits = ["val", "test", *["train"] * 19]  # the last image is in no shard
    rows = [f"{i}.png,a dog runs,{split}\n" for i, split in enumerate(splits)]
    (tmp_path / "captions.csv").write_text("image,caption,split\n" + "".join(rows))
    dataset = caption_data.load_dataset(
        "custom", pattern, tmp_path / "captions.csv", max_bad_fraction=0.05
    )
    paths = {
        split: [dataset.image_dir / name for name in names]
        for split, names in dataset.split_names().items()
    }
    encoder = FakeEncoder()
    _, unreadable = _cached(paths["train"], encoder, tmp_path / "cache")
    assert encoder.images == 20
    note = dataset.drop_unreadable({path.name: reason for path, reason in unreadable.items()})
    assert note.endswith("1 of 21 images skipped: 20.png (no shard holds it by this name)")
    no_streaming(monkeypatch)
    features, _ = _cached(paths["test"], **NEVER, cache_dir=tmp_path / "cache")
    assert torch.equal(features[[0]], _expected([1]))


def test_a_name_that_two_shards_hold_is_one_image(tmp_path, monkeypatch):
    monkeypatch.setattr(image_loading, "available_cpus", lambda: 2)
    write_shard(tmp_path / "a.tar", {"0.png": b"broken", "1.png": png(1)})
    write_shard(tmp_path / "b.tar", {"0.png": png(0), "1.png": png(1)})
    for num_workers in (0, 2):
        images = images_in(f"{tmp_path}/{{a,b}}.tar", ["0.png", "1.png"])
        features, unreadable = _cached(
            images, FakeEncoder(), tmp_path / f"cache/{num_workers}", num_workers=num_workers
        )
        # one process takes the first shard's, two take a readable one
        assert len(unreadable) == (1 if num_workers == 0 else 0)
        assert torch.equal(features[[1]], _expected([1]))


def test_processes_of_a_run_read_different_shards(tmp_path, monkeypatch):
    """Rank 0 stores in turn what three ranks encode of two shards, the third none."""
    images = images_in(grey_shards(tmp_path / "tars", 5, each=3), [f"{i}.png" for i in range(6)])
    encoders, sent = [FakeEncoder() for _ in range(3)], {1: [], 2: []}
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (1, 2):
        monkeypatch.setenv("RANK", str(rank))
        answers = iter([images, (np.array([-1, -1]), {"path": "reason"})])
        monkeypatch.setattr(process_group, "broadcast", lambda _value, told=answers: next(told))
        monkeypatch.setattr(
            process_group, "send", lambda value, to, to_zero=sent[rank]: to_zero.append(value)
        )
        features, unreadable = _cached(images, encoders[rank], tmp_path / "cache", batch_size=1)
        assert features.rows.tolist() == [-1, -1] and unreadable == {"path": "reason"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(process_group, "broadcast", lambda value: value)
    monkeypatch.setattr(process_group, "receive", lambda sender: sent[sender].pop(0))
    features, unreadable = _cached(images, encoders[0], tmp_path / "cache")
    assert [encoder.images for encoder in encoders] == [3, 2, 0]
    assert unreadable == {images[5]: "no shard holds it by this name"}
    assert torch.equal(features[range(5)], _expected(range(5)))


def test_hostile_names_write_nothing_anywhere(tmp_path, monkeypatch):
    (tmp_path / "deep/tars").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/tars")
    names = [
        "../../x.jpg",
        f"{tmp_path}/x.jpg",
        "..\\x.jpg",
        "a/../../x.jpg",
        "ok.png",
        "\x1b[2J.jpg",
        "x" * 3000 + ".jpg",
    ]
    write_shard(tmp_path / "deep/tars/a.tar", dict.fromkeys(names, png(7)))
    before = snapshot(tmp_path)
    images = images_in(tmp_path / "deep/tars", names)
    assert len(list(image_loading.open_images(images))) == len(names)
    assert snapshot(tmp_path) == before
    _cached(images, FakeEncoder(), tmp_path / "cache")
    new = {Path(path).relative_to(tmp_path) for path in snapshot(tmp_path).keys() - before.keys()}
    assert {path.parts[0] for path in new} == {"cache"}
    assert {path.name for path in new if len(path.parts) > 2} == CACHE_FILES


def test_a_huge_member_is_not_taken_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(image_loading, "MAX_IMAGE_BYTES", 1000)
    write_shard(tmp_path / "a.tar.gz", {"0.png": png(0) + bytes(2**20)})
    ((name, content),) = image_loading.read([str(tmp_path / "a.tar.gz")], ["0.png"])
    assert (name, len(content)) == ("0.png", 1000)


def test_a_small_shard_that_claims_a_huge_member_takes_little_memory(tmp_path, monkeypatch):
    """A tar stores of a sparse file only what is not zero; this one claims 4 GiB of zeros."""
    monkeypatch.setattr(image_loading, "MAX_IMAGE_BYTES", 1000)
    member = tarfile.TarInfo("0.png")
    member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**32)}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(member)
    contents, peak = peak_memory(
        lambda: dict(image_loading.read([str(tmp_path / "a.tar")], ["0.png"]))
    )
    assert contents == {"0.png": bytes(1000)}
    assert peak < 2**20


def test_memory_does_not_grow_with_the_number_of_members(tmp_path):
    write_shard(tmp_path / "a.tar", {f"{i}.txt": b"" for i in range(5000)})
    members, peak = peak_memory(
        lambda: list(image_loading.read([str(tmp_path / "a.tar")], ["0.png"]))
    )
    assert members == []
    assert peak < 2**21  # of which half is the buffer; 5000 headers take as much again


def peak_memory(call):
    """What the call returns, and by how many bytes at most Python held more meanwhile.

    The least of three measurements: a thread that an earlier test left may allocate during one, and
    keep what it allocates.
    """
    call()  # imports what it needs
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(3):
            result = None  # of the measurement before
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            result = call()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return result, min(peaks)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["text", "cut", "cut_gzip", "exit 3"])
def test_a_damaged_shard_stops_the_run_and_is_named(tmp_path, damage, num_workers):
    """`exit 3`: a command that fails after whole members, as a broken download does."""
    good = write_shard(tmp_path / "a.tar", {"0.png": png(0)})
    bad = write_shard(tmp_path / "b.tar", {"1.png": png(1) + bytes(5000), "2.png": png(2)})
    whole = bad.read_bytes()
    bad.write_bytes(
        {
            "text": b"a shard? " * 999,
            "cut": whole[:3000],
            "cut_gzip": gzip.compress(whole)[:-30],
        }.get(damage, whole)
    )
    source = f"pipe:cat {bad} && exit 3" if damage == "exit 3" else str(bad)
    images = images_in(f"{good}::{source}", [f"{i}.png" for i in range(4)])
    with pytest.raises(OSError, match=rf"^{source}: a shard that cannot be read: .+") as caught:
        _cached(images, FakeEncoder(), tmp_path / "cache", num_workers=num_workers)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert _named(_folder(tmp_path / "cache"), "faults") == []


def test_shards_come_over_http_and_from_pipes(tmp_path):
    """A file that is not there is an error; a pipe that is left early is none."""
    grey_shards(tmp_path / "tars", 4)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "tars")

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        images = images_in(address + "grey-{0..1}.tar", [f"{i}.png" for i in range(4)])
        features, unreadable = _cached(images, FakeEncoder(), tmp_path / "cache")
        assert unreadable == {} and torch.equal(features[range(4)], _expected(range(4)))
        with pytest.raises(OSError, match=r"nothing\.tar: a shard that cannot be read: .*exit 22"):
            list(image_loading.read([address + "nothing.tar"], ["0.png"]))
        server.shutdown()
    endless = f"pipe:cat {tmp_path}/tars/grey-0.tar /dev/zero"
    assert [name for name, _ in image_loading.read([endless], ["0.png"])] == ["0.png"]
    touchy = f"pipe:trap '' PIPE; cat {tmp_path}/tars/grey-0.tar && head -c 1000000 /dev/zero 2>&1"
    assert [name for name, _ in image_loading.read([touchy], ["0.png", "9.png"])] == ["0.png"]


# The program


def sample_shards(folder="shards", each=15):
    """The sample dataset's pictures in shards; the flags that name them."""
    paths = sorted(Path("data/sample/Images").iterdir())
    for number, start in enumerate(range(0, len(paths), each)):
        members = {path.name: path.read_bytes() for path in paths[start : start + each]}
        write_shard(Path(folder) / f"sample-{number}.tar", members)
    return f"--image_dir {folder}/sample-{{0..{number}}}.tar"


@pytest.mark.usefixtures("shop")
def test_the_program_trains_tests_and_draws_from_shards_as_from_files():
    flags = f"{ATTENTION} --save_attention_viz --attention_viz_samples 2"
    from_files, shards = train(flags), sample_shards()
    from_shards = run_dir(succeed(TINY, flags, shards, "--cache_dir own_cache"))
    assert (
        load(from_files / "best.pt")["history"][0]["train_loss"]
        == load(from_shards / "best.pt")["history"][0]["train_loss"]
    )
    for number in (1, 2):
        name = f"attention_viz_sample_{number}.png"
        assert (from_files / name).read_bytes() == (from_shards / name).read_bytes()
    (cache,) = Path("own_cache").iterdir()
    assert len(_named(cache)) == 40  # the test split too
    with pytest.MonkeyPatch.context() as patch:
        no_streaming(patch)
        flags = "--mode test --precision float32 --cache_dir own_cache --model_path"
        succeed(flags, from_shards / "best.pt")
    refused = program(TINY, shards, "--no_feature_cache")
    assert (
        refused.status == 2 and refused.err.count("\n") == 1 and "--no_feature_cache" in refused.err
    )
    refused = program(TINY, "--image_dir shards/sample-{0..9}.tar")
    assert refused.status == 2 and refused.err.count("\n") == 1 and "--image_dir" in refused.err


@pytest.mark.usefixtures("shop")
def test_a_checkpoint_s_commands_are_not_run(shop):
    """A checkpoint may come from anyone: its command runs only when the user types it, too."""
    checkpoint = load(shop / "attention/best.pt")
    checkpoint["config"]["image_dir"] = "pipe:touch proof; cat shards/*.tar"
    torch.save(checkpoint, "theirs.pt")
    outcome = program("--mode test --model_path theirs.pt")
    assert (
        outcome.status == 2
        and outcome.err.count("\n") == 1
        and "give --image_dir yourself" in outcome.err
    )
    assert not Path("proof").exists()
    picture = next(Path("data/sample/Images").iterdir())
    succeed("--mode caption --model_path theirs.pt --images", picture)
    sample_shards(each=40)
    out = succeed(
        "--mode test --model_path theirs.pt --image_dir", Path("pipe:touch proof; cat shards/*.tar")
    )
    assert Path("proof").exists() and "sample test: 4 images" in out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

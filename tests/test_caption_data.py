"""caption_data.py: words, batches and pixels. Datasets and splits are in test_dataset_support.py."""

import io
import os
import random
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import caption_batches
from caption_batches import CaptionBatches, Vocabulary, tokenize
from image_loading import find_unreadable, load_batches, load_image, open_image

UNIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and FIFOs")

# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man in a T-shirt , jumps .", "a man in a t-shirt jumps"),
        ("The dog's owner doesn't run!", "the dog 's owner does n't run"),
        ("dog--brown and dog\u2014black", "dog brown and dog black"),
        ("jumps.The dog (black/white) & $5 🐕", "jumps the dog black white 5"),
        ("cafe\u0301 \u00c9T\u00c9", "caf\u00e9 \u00e9t\u00e9"),
        ("Две собаки бегут по снегу.", "две собаки бегут по снегу"),
        ("दो कुत्ते बर्फ में दौड़ रहे हैं।", "दो कुत्ते बर्फ में दौड़ रहे हैं"),
        ("\u200fيركض كلب؟", "يركض كلب"),
        ("שני כְּלָבִים רצים", "שני כְּלָבִים רצים"),
        ("می\u200cروند", "می\u200cروند"),
        ("두 마리의 개가 달린다.", "두 마리의 개가 달린다"),
        ("两只狗,2人。", "两 只 狗 2 人"),
        ("犬がスーパー", "犬 が ス ー パ ー"),
        ("วิ่งอยู่", "วิ่ ง อ ยู่"),
        ("... !? — 🐕", ""),
    ],
)
def test_words_of_a_caption(text, words):
    assert tokenize(text) == words.split(" ") if words else tokenize(text) == []


def test_words_are_stable_under_a_second_tokenisation():
    text = "The dogs' owner can't see a t-shirt; 两只狗 at 10:30"
    assert tokenize(" ".join(tokenize(text))) == tokenize(text)


def test_splitting_at_spaces_first_changes_no_word():
    """A text's words are those that spaCy finds in the whole of it, whichever of its special cases meet."""
    draw, tokenizer = random.Random(0), caption_batches._spacy_tokenizer()
    pieces = [
        *tokenizer.rules,
        *"()[].,;:!?'\"-/&%$8DPxO",
        "\u0301",
        "A",
        "dogs'",
        "T-shirt",
        "ye\u0301",
        "犬が",
        "\t",
        "\n",
    ]
    for _ in range(3000):
        text = "".join(
            draw.choice(pieces) + draw.choice(["", " ", " ", "  "])
            for _ in range(draw.randint(1, 9))
        )
        whole = caption_batches.UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", text))
        words = [word for token in tokenizer(whole) if any(map(str.isalnum, word := token.lower_))]
        assert tokenize(text) == words, text


def test_vocabulary_counts_orders_and_cuts():
    vocabulary = Vocabulary.build(["b b b a a c", "A d", "d d"], freq_threshold=2)
    assert vocabulary.words == [
        "<PAD>",
        "<SOS>",
        "<EOS>",
        "<UNK>",
        "a",
        "b",
        "d",
    ]  # three each: alphabetical; c once
    assert (vocabulary.pad, vocabulary.sos, vocabulary.eos, vocabulary.unk, len(vocabulary)) == (
        0,
        1,
        2,
        3,
        7,
    )
    assert vocabulary.encode("D, a c <EOS>") == [
        6,
        4,
        3,
        3,
    ]  # a typed <EOS> is a word, not the special
    assert vocabulary.decode([1, 4, 3, 5, 0, 2, 6]) == "a b"


@pytest.mark.parametrize(
    "caption", ["a dog runs", "两只狗在雪地里奔跑", "2人が走る", "वह दौड़ रहे", "วิ่งอยู่", "穿t恤的人"]
)
def test_encode_then_decode_gives_the_caption(caption):
    vocabulary = Vocabulary.from_plain(Vocabulary.build([caption], 1).to_plain())
    assert vocabulary.decode(vocabulary.encode(caption)) == caption


@pytest.mark.parametrize(
    "plain",
    [
        None,
        {},
        {"words": "abc"},
        {"words": ["<PAD>", "<SOS>", "<EOS>"]},
        {"words": ["<SOS>", "<PAD>", "<EOS>", "<UNK>", "a"]},
        {"words": [*Vocabulary.SPECIALS, "a", "a"]},
        {"words": [*Vocabulary.SPECIALS, 5]},
        {"words": [*Vocabulary.SPECIALS, ""]},
        {"words": [*Vocabulary.SPECIALS, "two words"]},
        {"words": [*Vocabulary.SPECIALS, "\x1b[2J"]},
        {"words": [*Vocabulary.SPECIALS, "\ud800"]},
    ],
)
def test_a_damaged_vocabulary_is_refused(plain):
    with pytest.raises(ValueError, match=r"^vocabulary: "):
        Vocabulary.from_plain(plain)


# Batches

CAPTIONS = [
    [[4, 5], [6]],
    [[7, 8, 9]],
    [],
    [[10], [11, 12], [13]],
]  # of four images, one without any


def test_batches_worked_by_hand():
    batches = list(
        CaptionBatches(CAPTIONS, batch_size=4, max_length=3, seed=0).epoch(0, shuffle=False)
    )
    first, second = batches
    assert first.image_rows.tolist() == [0, 1, 3]
    assert first.image_index.tolist() == [0, 0, 1, 2]
    assert first.captions.tolist() == [
        [1, 4, 5, 2],
        [1, 6, 2, 0],
        [1, 7, 8, 2],
        [1, 10, 2, 0],
    ]  # 9 is beyond step 3
    assert first.lengths.tolist() == [3, 2, 3, 2]
    assert second.image_rows.tolist() == [3]
    assert second.captions.tolist() == [[1, 11, 12, 2], [1, 13, 2, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in first)


def _sequence(batches):
    return [[tensor.tolist() for tensor in batch] for batch in batches]


def test_an_epoch_is_decided_by_seed_and_number_alone():
    captions = [[[10 * image + k] for k in range(1 + image % 5)] for image in range(1, 40)]
    batches = CaptionBatches(captions, 7, 20, seed=3)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    straight = _sequence(batches.epoch(5))
    assert torch.equal(state, torch.get_rng_state())
    assert len(straight) == batches.num_batches == 17  # 114 captions
    assert straight == _sequence(CaptionBatches(captions, 7, 20, seed=3).epoch(5))
    for start in (1, 16, 17, 30):
        assert _sequence(batches.epoch(5, start=start)) == straight[start:]
    assert straight != _sequence(batches.epoch(6))
    assert straight != _sequence(CaptionBatches(captions, 7, 20, seed=4).epoch(5))


def test_every_caption_comes_once_with_its_own_image():
    captions = [[[1000 * image + k] for k in range(5)] for image in range(1, 30)]
    seen = []
    for batch in CaptionBatches(captions, 8, 20, seed=0).epoch(2):
        owners = batch.image_rows[batch.image_index]
        words = batch.captions[:, 1]
        assert torch.equal(words // 1000, owners + 1)
        seen += words.tolist()
        assert (batch.image_index.diff() >= 0).all()  # captions of an image lie together
    assert sorted(seen) == sorted(caption[0] for image in captions for caption in image)


# Pixels


def _save(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def _quarters() -> Image.Image:
    """2 x 2 blocks of 8 pixels: red, green / blue, white."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1))


def test_a_picture_of_the_right_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    assert np.array_equal(
        load_image(_save(tmp_path / "a.png", Image.fromarray(pixels)), 24), pixels
    )


def test_a_picture_is_squashed_whole_without_a_crop(tmp_path):
    wide = Image.fromarray(
        np.repeat(np.array([[0, 255]], np.uint8), 60, 1).repeat(30, 0)
    )  # 30 x 120, black | white
    pixels = load_image(_save(tmp_path / "a.png", wide), 20)
    assert pixels.shape == (20, 20, 3)
    assert (pixels[:, :9] == 0).all()
    assert (pixels[:, 11:] == 255).all()


def test_a_large_jpeg_is_decoded_at_reduced_size(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    path = _save(
        tmp_path / "a.jpg", Image.fromarray(colours).resize((2000, 1500), Image.Resampling.BICUBIC)
    )
    for size, expected in (
        (None, (2000, 1500)),
        (376, (2000, 1500)),
        (375, (1000, 750)),
        (224, (1000, 750)),
    ):
        assert open_image(path, size=size).size == expected
    exact = np.asarray(open_image(path).resize((224, 224), Image.Resampling.BILINEAR), np.float32)
    difference = np.abs(load_image(path, 224) - exact)  # of 255
    assert difference.mean() < 0.5 and difference.max() <= 3


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    path = _save(tmp_path / "a.png", _quarters(), exif=exif)
    pixels = load_image(path, 16)
    assert pixels[4, 4].tolist() == [0, 0, 255]  # the left column, read upwards, is the top row now
    assert pixels[4, 12].tolist() == [255, 0, 0]
    wide = _save(tmp_path / "b.png", Image.new("L", (40, 10), 7), exif=exif)
    assert (open_image(wide).size, open_image(wide).mode, open_image(wide).getpixel((0, 0))) == (
        (10, 40),
        "RGB",
        (7, 7, 7),
    )


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm", "a.avif"]
)
def test_every_format_is_read(tmp_path, name):
    pixels = load_image(_save(tmp_path / name, _quarters()), 16).astype(int)
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
    pixels = load_image(_save(tmp_path / "a.png", image), 8)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert colour is None or pixels[0, 0].tolist() == colour


def test_cmyk_and_palette_transparency(tmp_path):
    cmyk = load_image(_save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))), 8)
    assert np.abs(cmyk.astype(int) - [255, 0, 0]).max() < 12
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert (load_image(_save(tmp_path / "b.png", palette, transparency=0), 8) == 255).all()


def _bomb(side: int) -> bytes:
    """A PNG header that promises side x side pixels and holds none."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def _unreadable_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    whole = io.BytesIO()
    _quarters().resize((300, 300)).save(whole, "JPEG")
    contents = {
        "text.jpg": b"not an image",
        "empty.jpg": b"",
        "truncated.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "bomb_warning.png": _bomb(11_000),
        "bomb_error.png": _bomb(30_000),
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    _save(folder / "float.tif", Image.new("F", (4, 4)))
    return {path.name: path for path in folder.iterdir()} | {"missing.jpg": folder / "missing.jpg"}


def test_an_unreadable_image_is_one_line_that_names_it(tmp_path):
    files = _unreadable_files(tmp_path / "bad")
    expected = {
        "text.jpg": "none of JPEG",
        "truncated.jpg": "truncated",
        "bomb_warning.png": "bomb",
        "bomb_error.png": "bomb",
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


@UNIX
def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="not a readable image"):
        load_image(tmp_path / "pipe.jpg", 8)


def _grey(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Images whose grey level is their number."""
    return [
        _save(folder / f"{i}.png", Image.new("RGB", (8, 8), (i, i, i)))
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_keeps_order_and_leaves_the_random_state_alone(tmp_path, num_workers):
    paths = _grey(tmp_path, 6)
    batches = [torch.tensor([5, 0]), [3], range(1, 3)]
    state = torch.get_rng_state()
    pixels = list(load_batches(paths, 4, batches, num_workers))
    assert [batch[:, 0, 0, 0].tolist() for batch in pixels] == [[5, 0], [3], [1, 2]]
    assert pixels[0].shape == (2, 3, 4, 4)
    assert pixels[0].dtype == torch.uint8
    assert torch.equal(state, torch.get_rng_state())


def test_unreadable_images_are_found_without_a_cache(tmp_path):
    paths = [*_grey(tmp_path, 2), tmp_path / "none.png"]
    assert find_unreadable(paths) == {paths[2]: "not a readable image (there is no such file)"}
    with pytest.raises(ValueError, match=r"none\.png: not a readable image"):
        list(load_batches(paths, 4, [[0, 2]], 0))

"""sample_dataset.py: pictures, captions and boxes of the drawn dataset agree and can be redrawn.

Drawing into a folder, or finding it drawn, is in test_download_datasets.py.
"""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from download_datasets import draw_sample_dataset
from sample_dataset import SAMPLE_COLOURS


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    return draw_sample_dataset(folder, seed=3, num_images=60)


def read_boxes(folder):
    return json.loads((folder / "boxes.json").read_text())


def read_captions(folder):
    """{file name: its captions}, read without the csv module: no caption here needs quotes."""
    header, *rows = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert header == "image,caption"
    captions = {}
    for row in rows:
        name, caption = row.split(",", 1)
        captions.setdefault(name, []).append(caption)
    return captions


def test_each_picture_depends_on_the_seed_and_its_number_alone(sample, tmp_path):
    again = draw_sample_dataset(tmp_path / "again", seed=3, num_images=20)
    for path in sorted((again / "Images").iterdir()):
        assert path.read_bytes() == (sample / "Images" / path.name).read_bytes()
    assert read_captions(again).items() <= read_captions(sample).items()
    other = draw_sample_dataset(tmp_path / "other", seed=4, num_images=20)
    assert list(read_captions(other).values()) != list(read_captions(again).values())


def test_the_captions_of_seed_0_are_pinned(tmp_path):
    captions = read_captions(draw_sample_dataset(tmp_path / "sample", num_images=10))
    assert captions["sample_0_0000.jpg"] == [
        "The picture shows a green car above a purple house in the snow.",
        "This is a picture of a green car above a purple house in the snow.",
        "Someone drew a purple house below a green car in the snow.",
        "There is a green car above a purple house in the snow.",
        "A green car is above a purple house in the snow.",
    ]


def test_every_sample_picture_has_five_different_captions_and_a_split(sample):
    captions = read_captions(sample)
    names = [path.name for path in sorted((sample / "Images").iterdir())]
    assert list(captions) == names and len(names) == 60
    assert all(len(set(five)) == 5 for five in captions.values())
    splits = ("dev", "test", "train")
    lists = [(sample / f"sample.{split}Images.txt").read_text().split() for split in splits]
    assert [len(members) for members in lists] == [6, 6, 48]
    assert sorted(itertools.chain(*lists)) == names
    with Image.open(sample / "Images" / names[0]) as picture:
        assert picture.size == (224, 224) and picture.mode == "RGB"


def test_sample_boxes_lie_inside_apart_and_are_named_in_every_caption(sample):
    captions, boxes = read_captions(sample), read_boxes(sample)
    counts = {"a": 1, "an": 1, "two": 2, "three": 3}
    for name, objects in boxes.items():
        for thing in objects:
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            assert 0.045 < (x1 - x0) * (y1 - y0) < 0.125
            for caption in captions[name]:
                words = caption.lower().rstrip(".").split()
                noun = next(word for word in words if word in thing["names"])
                number = words[words.index(noun) - 2]  # "two red balls"
                assert counts[number] == sum(other["names"] == thing["names"] for other in objects)
        for one, other in itertools.combinations((thing["box"] for thing in objects), 2):
            assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


RELATIONS = {  # phrase -> the axis and the sign of the second object's centre minus the first's
    " above ": (1, 1),
    " below ": (1, -1),
    "the left of": (0, 1),
    "the right of": (0, -1),
}


def test_sample_captions_say_where_things_are(sample):
    captions, checked = read_captions(sample), 0
    for name, objects in read_boxes(sample).items():
        centres = {noun: centre(thing["box"]) for thing in objects for noun in thing["names"]}
        for caption, (phrase, (axis, sign)) in itertools.product(captions[name], RELATIONS.items()):
            halves = caption.lower().rstrip(".").split(phrase)
            if len(halves) == 2:
                first, second = (next(w for w in half.split() if w in centres) for half in halves)
                assert sign * (centres[second][axis] - centres[first][axis]) > 0, caption
                checked += 1
    assert checked > 50


def centre(box):
    x0, y0, x1, y1 = box
    return (x0 + x1) / 2, (y0 + y1) / 2


def test_sample_objects_have_the_colour_the_caption_names(sample):
    captions = read_captions(sample)
    for name, objects in read_boxes(sample).items():
        words = captions[name][0].lower().rstrip(".").split()
        with Image.open(sample / "Images" / name) as picture:
            for thing in objects:
                noun = next(i for i, word in enumerate(words) if word in thing["names"])
                close = colours_in(picture, thing["box"])
                named = close[words[noun - 1]]
                assert named > 0.15 and named == max(close.values()), (name, thing, close)


def colours_in(picture, box):
    """{colour: share of the box within 40 of it in every channel}."""
    pixels = np.asarray(picture.crop([round(edge * 224) for edge in box])).astype(int)
    return {
        colour: (abs(pixels - rgb).max(axis=-1) < 40).mean()
        for colour, rgb in SAMPLE_COLOURS.items()
    }

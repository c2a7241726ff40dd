"""flickr30k_entities.py: made-up annotations in its layout -> boxes.json, and files that are not in it."""

import numpy as np
import pytest

import download_datasets
import flickr30k_entities
from metrics_utils import peak_in_box, read_boxes

SENTENCES = """\
[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#3/bodyparts their hands] .
[/EN#1/people Two men] in [/EN#4/clothing/other green] beside [/EN#5/animals/other a Dog] in [/EN#6/scene the yard] .
[/EN#7/people One] and [/EN#8/people another] look at [/EN#0/notvisual it] .
"""


def box(chains, *corners):
    """An object as its XML."""
    names = "".join(f"<name>{chain}</name>" for chain in chains)
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object>{names}<bndbox>{sides}</bndbox></object>"


def annotation(
    *objects, size="<size><width>200</width><height>100</height><depth>3</depth></size>"
):
    """A file of Annotations."""
    return f"<annotation><filename>10.jpg</filename>{size}{''.join(objects)}</annotation>"


OBJECTS = [
    box([1], 0, 0, 50, 50), box([1, 4], 50, 0, 100, 50), box([5], 150, 50, 260, 100),
    box([7], 0, 0, 9, 9), box([8], 0, 0, 9, 9), box([5], 300, 0, 400, 50), box([2], 9, 9, 9, 20),
    "<object><name>6</name><scene>1</scene><nobndbox>0</nobndbox></object>",
    "<object><name>3</name><scene>0</scene><nobndbox>1</nobndbox></object>",
]  # fmt: skip


@pytest.fixture
def entities(tmp_path):
    """A folder of two images."""
    for folder in ("Annotations", "Sentences"):
        (tmp_path / folder).mkdir()
    (tmp_path / "Annotations/10.xml").write_text(annotation(*OBJECTS))
    (tmp_path / "Sentences/10.txt").write_text(SENTENCES)
    (tmp_path / "Annotations/11.xml").write_text(annotation())
    (tmp_path / "Sentences/11.txt").write_text("A caption without phrases .\n")
    return tmp_path


def convert(entities):
    """The exit status of the command, which writes tmp_path/data/flickr30k/boxes.json."""
    (entities / "data/flickr30k").mkdir(parents=True, exist_ok=True)
    return download_datasets.main(
        ["--entities", str(entities), "--data_dir", str(entities / "data")]
    )


def test_boxes_of_phrases_are_named_by_their_last_words_and_measured(entities, capsys):
    assert convert(entities) == 0
    path = entities / "data/flickr30k/boxes.json"
    assert capsys.readouterr().out == (
        f"flickr30k: 3 named boxes of 2 images in {path}; 2 without area in their picture left out\n"
    )
    boxes = read_boxes(path, ["10.jpg"])
    assert boxes == {
        "10.jpg": [
            {"names": ["guys", "men"], "box": [0, 0, 0.25, 0.5]},
            {"names": ["guys", "men"], "box": [0.25, 0, 0.5, 0.5]},
            {"names": ["dog"], "box": [0.75, 0.5, 1, 1]},  # cut at the picture's edge
        ],
        "11.jpg": [],
    }
    maps = np.zeros((3, 2, 4))
    maps[0, 0, 1] = maps[1, 0, 0] = maps[2, 1, 3] = 1  # men: the second's box; look; dog
    found = peak_in_box([(["men", "look", "dog"], maps, boxes["10.jpg"])])
    assert (found["peak_in_box"], found["nouns"]) == (1, 2)
    assert found["chance"] == pytest.approx((0.25 + 0.125) / 2)
    assert peak_in_box([(["dog"], maps[:1], boxes["10.jpg"])])["peak_in_box"] == 0


BOMB = "<!DOCTYPE b [<!ENTITY a0 'ha'>" + "".join(
    f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12)
)
BAD = {
    "<annotation><size>": "mismatched|no element|unclosed",
    f"{BOMB}]><annotation>&a11;</annotation>": "it has a DTD",
    annotation(size=""): "expected a number as <width>, got ''",
    annotation(size="<size><width>0</width><height>5</height></size>"): "size is not above 0",
    annotation(box([1], 0, "nan", 5, 5)): "expected a number as <ymin>, got 'nan'",
    annotation(box([1], 0, "1e999", 5, 5)): "expected a number as <ymin>, got '1e999'",
    annotation(" " * 2**20): "more than 1,048,576 bytes",
    "\xff": "not UTF-8 text",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_an_annotation_that_is_none_is_one_line_that_names_it(content, entities, capsys):
    path = entities / "Annotations/11.xml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"11\.xml: .*({BAD[content]})"):
        flickr30k_entities.read_objects(path)
    assert convert(entities) == 1 and not (entities / "data/flickr30k/boxes.json").exists()
    said = capsys.readouterr().err
    assert said.startswith(f"download_datasets.py: error: {path}: ") and said.count("\n") == 1


def test_sentences_that_are_missing_or_broken_are_named(entities, capsys):
    path = entities / "Sentences/11.txt"
    path.write_text("A dog .\n[/EN#1/animals A dog runs .\n")
    assert convert(entities) == 1
    assert f"{path}:2: expected phrases like" in capsys.readouterr().err
    path.unlink()
    assert convert(entities) == 1
    assert f"{path}: no such file" in capsys.readouterr().err


def test_a_folder_without_annotations_or_without_the_dataset_is_named(entities, tmp_path, capsys):
    assert download_datasets.main(["--entities", str(tmp_path), "--data_dir", "nowhere"]) == 1
    assert "nowhere/flickr30k: not there; get it with:" in capsys.readouterr().err
    (entities / "Annotations").rename(tmp_path / "elsewhere")
    assert convert(entities) == 1
    assert f"{entities}: no Annotations/*.xml: unpack annotations.zip" in capsys.readouterr().err

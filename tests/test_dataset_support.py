"""caption_data.py: default folders, file formats, splits, bad rows.

Also runs as python tests/test_dataset_support.py. Three tests tell of bugs of the original program:
splits drawn by caption row, references looked up by position, a vocabulary that had read validation
captions.
"""

import json
import os
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the run without pytest

from caption_batches import CaptionBatches, Vocabulary
from caption_data import load_dataset, read_captions
from caption_splits import checked_splits, splits_sha256

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k"


def _write(path: Path, text: str, encoding="utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def _images(folder: Path, names) -> Path:
    """Empty files: a dataset is read without opening its pictures."""
    for name in names:
        _write(folder / name, "")
    return folder


def _names(count: int) -> list[str]:
    return [f"{i:03}.jpg" for i in range(count)]


def _csv(names, captions_each=2) -> str:
    rows = [
        f"{name},a picture number {name[:3]} told {k} times"
        for name in names
        for k in range(captions_each)
    ]
    return "\n".join(["image,caption", *rows]) + "\n"


def _dataset(folder: Path, count=20, text=None, **options):
    names = _names(count)
    captions = _write(folder / "captions.txt", _csv(names) if text is None else text)
    return load_dataset("custom", _images(folder / "Images", names), captions, **options)


def _rows(dataset):
    return [*dataset.table.itertuples(index=False, name=None)]


# Folders


@pytest.mark.parametrize(
    ("dataset_type", "folder", "file", "text"),
    [
        (
            "flickr8k",
            "Images",
            "captions.txt",
            "image,caption\n{0},one dog\n{1},two dogs\n{2},three dogs\n",
        ),
        (
            "flickr8k",
            "Flicker8k_Dataset",
            "Flickr8k.token.txt",
            "{0}#0\tone dog\n{1}#0\ttwo dogs\n{2}#0\tthree dogs\n",
        ),
        (
            "flickr30k",
            "flickr30k_images",
            "results.csv",
            "image_name| comment_number| comment\n{0}| 0| one dog\n{1}| 0| two dogs\n{2}| 0| three dogs\n",
        ),
        (
            "flickr30k",
            "flickr30k-images",
            "results_20130124.token",
            "{0}#0\tone dog\n{1}#0\ttwo dogs\n{2}#0\tthree dogs\n",
        ),
        (
            "flickr30k",
            "images",
            "dataset_flickr30k.json",
            '{{"{0}": ["one dog"], "{1}": "two dogs", "{2}": ["three dogs"]}}',
        ),
        (
            "sample",
            "Images",
            "captions.txt",
            "image,caption\n{0},one dog\n{1},two dogs\n{2},three dogs\n",
        ),
    ],
)
def test_a_dataset_is_found_in_its_default_folder(
    tmp_path, monkeypatch, dataset_type, folder, file, text
):
    monkeypatch.chdir(tmp_path)
    names = _names(3)
    _images(Path("data") / dataset_type / folder, names)
    _write(Path("data") / dataset_type / file, text.format(*names))
    dataset = load_dataset(dataset_type)
    assert dataset.image_dir == Path("data") / dataset_type / folder
    assert dataset.captions_file == Path("data") / dataset_type / file
    assert [row[:2] for row in _rows(dataset)] == list(
        zip(names, [["one dog"], ["two dogs"], ["three dogs"]], strict=True)
    )
    assert sorted(dataset.table.split) == ["test", "train", "val"]


def test_a_missing_dataset_says_which_command_gets_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset_type in ("flickr8k", "flickr30k", "coco", "sample"):
        with pytest.raises(
            FileNotFoundError, match=f"python download_datasets.py --dataset {dataset_type}$"
        ):
            load_dataset(dataset_type)
    _images(Path("data/flickr8k/Images"), ["a.jpg"])
    with pytest.raises(
        FileNotFoundError, match=r"data/flickr8k: no captions file .*--dataset flickr8k$"
    ):
        load_dataset("flickr8k")


def test_a_path_that_is_missing_is_named_by_its_flag(tmp_path):
    with pytest.raises(ValueError, match="--image_dir and --captions_file"):
        load_dataset("custom", image_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--image_dir .*none: no such folder"):
        load_dataset("custom", tmp_path / "none", _write(tmp_path / "c.csv", ""))
    with pytest.raises(FileNotFoundError, match=r"--captions_file .*none: no such file"):
        load_dataset("custom", tmp_path, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"--captions_file .*: no such file"):
        load_dataset("custom", tmp_path, tmp_path)  # a folder


# Formats

TWO = [("a.jpg", "A dog, running", None), ("b.jpg", 'The "big" cat', None)]


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\na.jpg,"A dog, running"\nb.jpg,"The ""big"" cat"\n',
        '\ufeffimage,caption\r\na.jpg,"A dog, running"\r\n\r\nb.jpg,"The ""big"" cat"\r\n',
        '"Caption";"id";"File_Name"\n"A dog, running";1;a.jpg\n"The ""big"" cat";2;b.jpg',
        'text\tfilename\nA dog, running\ta.jpg\nThe "big" cat\tb.jpg\n',
        'image_name| comment_number| comment\na.jpg| 0| A dog, running\nb.jpg| 0| The "big" cat\n',
        'a.jpg#0\tA dog, running\nb.jpg#0\tThe "big" cat\n',
        'a.jpg#0\tA dog, running\r\nb.jpg#0\tThe "big" cat\r\n',
        'image,caption\n./a.jpg,"A dog,\n  running"\n b.jpg ,"The ""big"" cat",,\n',
        '[{"image": "a.jpg", "caption": "A dog, running"}, {"file_name": "b.jpg", "captions": ["The \\"big\\" cat"]}]',
        '{"a.jpg": ["A dog, running"], "b.jpg": "The \\"big\\" cat"}',
        '{"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}, {"id": 9, "file_name": "c"}],'
        ' "annotations": [{"image_id": 7, "caption": "A dog, running"},'
        ' {"image_id": 8, "caption": "The \\"big\\" cat"}]}',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_formats_are_recognised_by_content(tmp_path, text, encoding):
    rows, problems = read_captions(_write(tmp_path / "no_matter.xyz", text, encoding))
    assert [(name.removeprefix("./"), caption, split) for name, caption, split in rows] == TWO
    assert problems == []


def test_karpathy_json_gives_folders_and_splits(tmp_path):
    def image(name, split, *captions, **more):
        return {
            "filename": name,
            "split": split,
            "sentences": [{"raw": raw} for raw in captions],
            **more,
        }

    images = [
        image("a.jpg", "train", "a dog", "the dog", filepath="val2014"),
        image("b.jpg", "restval", "a cat"),
        image("c.jpg", "val", "a cow"),
        image("d.jpg", "test", "an owl"),
    ]
    captions = _write(tmp_path / "k.json", json.dumps({"dataset": "coco", "images": images}))
    _images(tmp_path, ["val2014/a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    assert _rows(load_dataset("custom", tmp_path, captions)) == [
        ("val2014/a.jpg", ["a dog", "the dog"], "train"),
        ("b.jpg", ["a cat"], "train"),
        ("c.jpg", ["a cow"], "val"),
        ("d.jpg", ["an owl"], "test"),
    ]


# Folders that hold captions


def _coco_json(names, first_id=0) -> str:
    images = [{"id": first_id + i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"image_id": image["id"], "caption": f"number {image['id']}"} for image in images]
    return json.dumps({"images": images, "annotations": captions})


def _coco_folder(root: Path, year=2014, train=6, val=4) -> Path:
    """COCO as its authors lay it out: the same base names in both folders."""
    for subset, count, first_id in (("train", train, 0), ("val", val, 100)):
        names = _names(count)
        _images(root / f"{subset}{year}", names)
        text = _coco_json(names, first_id)
        _write(root / "annotations" / f"captions_{subset}{year}.json", text)
    return root


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_is_found_and_half_of_its_val_is_test(tmp_path, monkeypatch, year):
    monkeypatch.chdir(tmp_path)
    _coco_folder(Path("data/coco"), year)
    _write(Path("data/coco/annotations/instances_val2014.json"), "{}")
    dataset = load_dataset("coco")
    assert dataset.image_dir == Path("data/coco")
    assert dataset.captions_file == Path("data/coco/annotations")
    captions = dict(zip(dataset.table.image, dataset.table.captions, strict=True))
    assert captions == {f"train{year}/{i:03}.jpg": [f"number {i}"] for i in range(6)} | {
        f"val{year}/{i:03}.jpg": [f"number {100 + i}"] for i in range(4)
    }
    splits = dataset.split_names()
    assert splits["train"] == [f"train{year}/{name}" for name in _names(6)]
    assert len(splits["val"]) == len(splits["test"]) == 2
    assert {*splits["val"], *splits["test"]} == {f"val{year}/{name}" for name in _names(4)}
    assert (
        "splits: as recorded in annotations; no test there: 50% of val drawn for it with "
        "--split_seed 42" in dataset.notes
    )
    assert load_dataset("coco").split_names() == splits
    others = [load_dataset("coco", split_seed=seed).split_names()["val"] for seed in range(9)]
    assert len({*map(tuple, others)}) > 1


def test_karpathys_splits_of_coco_win_over_the_official_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = _coco_folder(Path("data/coco"))
    splits = ["train"] * 6 + ["restval", "val", "test", "test"]
    images = [
        {"filepath": folder, "filename": name, "split": split, "sentences": [{"raw": "a b"}]}
        for (folder, name), split in zip(
            [("train2014", name) for name in _names(6)] + [("val2014", name) for name in _names(4)],
            splits,
            strict=True,
        )
    ]
    _write(root / "dataset_coco.json", json.dumps({"images": images}))
    names = load_dataset("coco").split_names()
    assert names["train"][-1] == "val2014/000.jpg" and len(names["train"]) == 7
    assert (names["val"], names["test"]) == (
        ["val2014/001.jpg"],
        ["val2014/002.jpg", "val2014/003.jpg"],
    )


def test_two_years_of_coco_are_the_same_pictures_and_refused(tmp_path):
    folder = _coco_folder(_coco_folder(tmp_path, 2014), 2017) / "annotations"
    with pytest.raises(ValueError, match=r"captions of 2014 and 2017, which are of the same"):
        load_dataset("custom", tmp_path, folder)


def _metadata(folder: Path, rows: list[dict], kind: str):
    """metadata.csv, .jsonl or .parquet of {file_name, text} rows, and their empty pictures."""
    _images(folder, [row["file_name"] for row in rows])
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="needs requirements-hub.txt")
        pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    elif kind == "jsonl":
        _write(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    else:
        pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_imagefolder_with_a_folder_for_each_split(tmp_path, kind):
    for number, split in enumerate(("train", "validation", "test")):
        rows = [{"file_name": f"{k}/{number}.jpg", "text": f"{split} picture {k}"} for k in "ab"]
        _metadata(tmp_path / split, rows, kind)
    assert _rows(load_dataset("custom", tmp_path, tmp_path)) == [
        ("test/a/2.jpg", ["test picture a"], "test"),
        ("test/b/2.jpg", ["test picture b"], "test"),
        ("train/a/0.jpg", ["train picture a"], "train"),
        ("train/b/0.jpg", ["train picture b"], "train"),
        ("validation/a/1.jpg", ["validation picture a"], "val"),
        ("validation/b/1.jpg", ["validation picture b"], "val"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_imagefolder_with_lists_of_captions_in_one_file(tmp_path, kind):
    rows = [
        {"file_name": f"data/{folder}/{i}.jpg", "captions": [f"one {i}", f"two {i}"]}
        for i, folder in enumerate(("Train", "valid", "test"))
    ]
    _metadata(tmp_path, rows, kind)
    expected = [
        (f"data/{folder}/{i}.jpg", [f"one {i}", f"two {i}"], split)
        for i, (folder, split) in enumerate(
            [("Train", "train"), ("valid", "val"), ("test", "test")]
        )
    ]
    assert _rows(load_dataset("custom", tmp_path, tmp_path)) == expected
    assert _rows(load_dataset("custom", tmp_path, tmp_path / f"metadata.{kind}"))[0][1] == [
        "one 0",
        "two 0",
    ]


def test_a_column_of_splits_wins_over_the_imagefolders_folders(tmp_path):
    rows = [
        {"file_name": f"train/{i}.jpg", "text": f"number {i}", "split": split}
        for i, split in enumerate(("train", "validation", "test"))
    ]
    _metadata(tmp_path, rows, "csv")
    assert [row[2] for row in _rows(load_dataset("custom", tmp_path, tmp_path))] == [
        "train",
        "val",
        "test",
    ]


def test_several_metadata_files_in_one_folder_are_refused(tmp_path):
    rows = [{"file_name": "a.jpg", "text": "a dog"}]
    _metadata(tmp_path, rows, "csv")
    _metadata(tmp_path, rows, "jsonl")
    with pytest.raises(ValueError, match=r"several of metadata\.csv, .* expected one of them"):
        load_dataset("custom", tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["../../a.jpg", "/etc/a.jpg", "..\\a.jpg"])
def test_a_name_in_metadata_that_leads_out_of_the_folder_is_a_bad_image(tmp_path, name):
    for split in ("train", "val", "test"):
        rows = [{"file_name": f"{i}.jpg", "text": "a dog"} for i in range(3)]
        _metadata(tmp_path / split, rows, "jsonl")
    with (tmp_path / "val/metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": "a thief"}))
    dataset = load_dataset("custom", tmp_path, tmp_path, max_bad_fraction=0.5)
    assert len(dataset.table) == 9 and len(dataset.bad_images) == 1
    assert "not a relative path below the image folder" in "".join(dataset.notes)


def test_damaged_json_lines_are_named(tmp_path):
    lines = [
        '{"file_name": "a.jpg", "text": "a dog"}',
        '{"file_name": "b.jpg", "text": "a',
        '{"file_name": "c.jpg"}',
        "",
        '["d.jpg", "a cat"]',
    ]
    rows, malformed = read_captions(_write(tmp_path / "m.jsonl", "\n".join(lines)))
    assert rows == [("a.jpg", "a dog", None)]
    assert [where for where, _ in malformed] == ["line 2", "line 3", "line 5"]
    assert malformed[0][1].startswith("damaged JSON")
    assert read_captions(_write(tmp_path / "one.jsonl", lines[0])) == (rows, [])


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    pytest.importorskip("pyarrow", reason="needs requirements-hub.txt")
    for content in (b"PAR1", b"PAR1" + bytes(100), b"PAR1" + bytes(50) + b"PAR1"):
        (tmp_path / "c.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.parquet") as failure:
            read_captions(tmp_path / "c.parquet")
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("recorded", "sizes", "note"),
    [
        (("train", "val"), (10, 5, 5), "no test there: 50% of val drawn for it"),
        (("train", "test"), (9, 1, 10), "no val there: 10% of train drawn for it"),
        (("train", "train"), (16, 2, 2), "splits: drawn by image with --split_seed 42"),
    ],
    ids=["no test", "no val", "train alone"],
)
def test_a_split_that_a_folder_does_not_record_is_drawn_and_said(tmp_path, recorded, sizes, note):
    """A file that records splits is refused where it lacks one, as it may be the wrong file."""
    names = _names(20)
    for split in {*recorded}:
        own = [name for i, name in enumerate(names) if recorded[i % 2] == split]
        _metadata(tmp_path / split, [{"file_name": n, "text": "a dog"} for n in own], "csv")
    dataset = load_dataset("custom", tmp_path, tmp_path)
    splits = dataset.split_names()
    assert tuple(map(len, splits.values())) == sizes
    assert any(note in line for line in dataset.notes)
    in_train = {f"train/{name}" for i, name in enumerate(names) if recorded[i % 2] == "train"}
    assert {*splits["train"]} <= in_train
    assert len({name for split in splits.values() for name in split}) == 20
    again = load_dataset("custom", tmp_path, tmp_path, splits=splits)
    assert again.split_names() == splits
    rows = [f"{name},a dog,{recorded[i % 2]}" for i, name in enumerate(names)]
    with pytest.raises(ValueError, match="split has no images"):
        _dataset(tmp_path / "file", text="\n".join(["image,caption,split", *rows]))


def test_test_mode_draws_no_split_of_a_foreign_dataset(tmp_path):
    rows = [
        f"{name},a dog,{split}" for name, split in zip(_names(4), ("train", "val") * 2, strict=True)
    ]
    text = "\n".join(["image,caption,split", *rows])
    theirs = {"train": ["x.jpg"], "val": ["y.jpg"], "test": ["z.jpg"]}
    with pytest.raises(ValueError, match="the test split has no images"):
        _dataset(tmp_path, 4, text, splits=theirs, typed=True, scored="test")


def test_names_and_captions_are_read_in_any_script(tmp_path):
    names = ["犬 1.jpg", "щчж.jpg", "café.jpg", "a,b.jpg"]
    text = (
        'image,caption\n犬 1.jpg,两只狗。\nщчж.jpg,Две собаки.\ncafé.jpg,दो कुत्ते\n"a,b.jpg",كلبان\n'
    )
    captions = _write(tmp_path / "c.csv", text)
    dataset = load_dataset("custom", _images(tmp_path, names), captions)
    assert dataset.table.image.tolist() == names
    assert dataset.table.captions.tolist() == [["两只狗。"], ["Две собаки."], ["दो कुत्ते"], ["كلبان"]]


MALFORMED = {
    "image,caption\na.jpg\na.jpg,x y,z\na.jpg,a dog\n": [
        "line 2: 1 fields, expected 2",
        "line 3: 3 fields, expected 2",
    ],
    "image,caption\n,a dog\na.jpg,\na.jpg, . !\na.jpg,a dog\n": [
        "line 2: no image name",
        "line 3: no words in its caption",
        "line 4: no words in its caption",
    ],
    "image,caption,split\na.jpg,a dog,train\na.jpg,a cat,exam\n": [
        "line 3: unknown split 'exam', expected train, val or test",
    ],
    "image_name| comment_number| comment\na.jpg| 3| a dog\na.jpg| 4   A dog runs .\n": [
        "line 3: 2 fields, expected 3",  # the real results.csv has such a row
    ],
    'image,caption\na.jpg,a dog\nb.jpg,"an open quote\nc.jpg,a cat\nd.jpg,a cow\n': [
        f"line {line}: in a quote opened on line 3" for line in (3, 4, 5)
    ],
    f"image,caption\na.jpg,a dog\na.jpg,{'x' * 2001}\n": [
        "line 3: its caption has 2001 characters, more than 2000",
    ],
    "a.jpg#0\ta dog\nno tab\n\nb.jpg\tx\n": [
        "line 2: expected 'image.jpg#0<TAB>caption', got 'no tab'",
        "line 4: expected 'image.jpg#0<TAB>caption', got 'b.jpg\\tx'",
    ],
    '[{"image": "a.jpg", "caption": "a dog"}, 5, {"image": 3, "caption": "x"}, {"image": "b", "captions": []}]': [
        "entry 2: no image name",
        "entry 3: no image name",
        "entry 4: no words in its caption",
    ],
    '{"a.jpg": ["a dog", null, "\\ud800 dog"], "b.jpg": []}': [
        "image 'a.jpg': no words in its caption",
        "image 'a.jpg': half a character (a lone surrogate)",
        "image 'b.jpg': no words in its caption",
    ],
    '{"images": [{"id": 1, "file_name": "a.jpg"}, 4], "annotations": [{"image_id": 1, "caption": "a dog"},'
    ' {"image_id": 2, "caption": "a cat"}, "x", {"image_id": [1], "caption": "x"}]}': [
        f"annotation {number}: no image name" for number in (2, 3, 4)
    ],
    '{"images": [{"filename": "a.jpg", "sentences": [{"raw": "a dog"}, 1]}, {"filename": "b.jpg"}, 7]}': [
        "image 1: no words in its caption",
        "image 2: no words in its caption",
        "image 3: no image name",
    ],
}


@pytest.mark.parametrize(("text", "expected"), MALFORMED.items())
def test_malformed_rows_are_named(tmp_path, text, expected):
    rows, problems = read_captions(_write(tmp_path / "c", text))
    assert rows == [("a.jpg", "a dog", "train" if "split" in text.partition("\n")[0] else None)]
    assert [f"{where}: {reason}" for where, reason in problems] == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"image,caption\n", "no captions in it"),
        (b"image,caption\na.jpg,...\n", r"no captions in it \(line 2: no words in its caption\)"),
        (b"[]", "no captions in it"),
        (b"{}", "no captions in it"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not a text file in UTF-8"),
        (b"GIF89a\0\0\0", "a binary file"),
        (b"\xff\xfe\x00\xd8", "not a text file"),
        (b"a,b\n1,2\n", "not a captions file: .*got 'a,b'"),
        (b"hello\n", "not a captions file"),
        (b'{"a.jpg": ["a dog"', "damaged JSON"),
        (b"[" * 100_000, "damaged JSON"),
        (b"[" + b"9" * 10_000 + b"]", "damaged JSON"),
        (b'image,caption\na.jpg,"' + b"x" * 200_000, "line 2: damaged CSV"),
        (b'"image,caption' + b"x" * 200_000, "not a captions file"),
    ],
)
def test_a_file_without_captions_is_one_line(tmp_path, content, reason):
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_captions(tmp_path / "c.txt")
    assert str(caught.value).startswith(f"{tmp_path / 'c.txt'}: ")
    assert "\n" not in str(caught.value)


# What is skipped


def test_duplicates_merge_and_captions_follow_the_image_name(tmp_path):
    text = "image,caption\n" + "".join(
        f"{prefix}{name},{prefix or 'plain'} {name[:3]}\n"
        for prefix in ("", "./")
        for name in _names(20)
    )
    dataset = _dataset(tmp_path, text=text)
    assert dataset.table.image.tolist() == _names(20)
    assert dataset.table.captions.tolist() == [
        [f"plain {name[:3]}", f"./ {name[:3]}"] for name in _names(20)
    ]


def test_bad_rows_and_images_are_counted_named_and_bounded(tmp_path):
    names = _names(200)
    stray = "2258277193_586949ec62.jpg.1"  # Flickr8k.token.txt names it, no such file exists
    text = (
        "".join(f"{name}#{k}\ta dog number {k}\n" for name in [*names, stray] for k in range(2))
        + "stray row\n"
    )
    dataset = _dataset(tmp_path, 200, text=text)
    assert len(dataset.table) == 200
    assert dataset.bad_images == {stray: f"not in {tmp_path / 'Images'}"}
    notes = "\n".join(dataset.notes)
    assert (
        "1 of 403 rows skipped: line 403 (expected 'image.jpg#0<TAB>caption', got 'stray row')"
        in notes
    )
    assert f"1 of 201 images skipped: {stray} (not in " in notes
    with pytest.raises(ValueError, match=r"1 of 403 rows skipped: .* --max_bad_fraction 0.001"):
        _dataset(tmp_path, 200, text=text, max_bad_fraction=0.001)
    with pytest.raises(ValueError, match=r"1 of 201 images skipped: .* --max_bad_fraction 0.004"):
        _dataset(tmp_path, 200, text=text, max_bad_fraction=0.004)


def test_of_many_bad_rows_ten_are_named(tmp_path):
    dataset = _dataset(tmp_path, 60, text=_csv(_names(60)) + "x\n" * 12, max_bad_fraction=0.5)
    (note,) = [note for note in dataset.notes if "rows skipped" in note]
    assert note.count("line ") == 10
    assert note.endswith("; ...")
    assert "\n" not in note


@pytest.mark.parametrize(
    "name",
    ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "C:\\x.jpg", "..\\x.jpg", "C:/x.jpg", "n" * 5000],
)
def test_a_name_that_leads_out_of_the_folder_is_a_bad_image(tmp_path, name):
    _write(tmp_path / "x.jpg", "")
    text = _csv(_names(20)) + f"{name},a dog\n"
    bad = _dataset(tmp_path, text=text, max_bad_fraction=0.1).bad_images
    reason = f"not in {tmp_path / 'Images'}"
    if ".." in name or ":" in name or name.startswith("/"):  # the last one is only too long
        reason = "not a relative path below the image folder"
    assert bad == {name: reason}
    with pytest.raises(ValueError, match="1 of 21 images skipped"):
        _dataset(tmp_path, text=text)


def test_control_codes_of_a_hostile_file_do_not_reach_the_terminal(tmp_path):
    dataset = _dataset(
        tmp_path, text=_csv(_names(20)) + "\x1b[2J.jpg,a dog\n", max_bad_fraction=0.1
    )
    assert all(note.isprintable() for note in dataset.notes)
    assert "\\x1b[2J.jpg" in "\n".join(dataset.notes)


def test_pictures_without_captions_are_left_out_and_counted(tmp_path):
    _images(tmp_path / "Images", ["extra.jpg", "notes.txt"])
    dataset = _dataset(tmp_path)
    assert len(dataset.table) == 20
    assert f"{tmp_path / 'Images'}: 1 images have no captions and are left out" in dataset.notes


def test_unreadable_images_are_dropped_and_counted_with_the_missing(tmp_path):
    text = _csv([*_names(20), "missing.jpg"])
    dataset = _dataset(tmp_path, text=text, max_bad_fraction=0.1)
    line = dataset.drop_unreadable({"003.jpg": "truncated"})
    assert "2 of 21 images skipped: missing.jpg (not in " in line
    assert "003.jpg (truncated)" in line
    assert dataset.notes[-1] == line
    assert dataset.table.image.tolist() == [name for name in _names(20) if name != "003.jpg"]
    assert dataset.table.index.tolist() == list(range(19))
    assert dataset.drop_unreadable({}) == ""
    with pytest.raises(ValueError, match=r"3 of 21 images skipped: .*--max_bad_fraction 0.1"):
        dataset.drop_unreadable({"004.jpg": "truncated"})


def test_a_split_that_loses_its_last_image_is_an_error(tmp_path):
    dataset = _dataset(tmp_path, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="the val split has no images"):
        dataset.drop_unreadable(dict.fromkeys(dataset.split_names()["val"], "truncated"))


# Splits


def test_drawn_splits_are_disjoint_by_image(tmp_path):
    """The original split caption rows: other captions of a validation image were trained on."""
    dataset = _dataset(tmp_path, 60)
    names = dataset.split_names()
    assert {split: len(listed) for split, listed in names.items()} == {
        "train": 48,
        "val": 6,
        "test": 6,
    }
    assert sorted(name for listed in names.values() for name in listed) == _names(60)
    told = {
        split: {c for cs in dataset.table.captions[dataset.table.split == split] for c in cs}
        for split in names
    }
    assert len(told["train"]) == 2 * 48
    assert not told["train"] & (told["val"] | told["test"])
    assert names == _dataset(tmp_path, 60).split_names()
    assert names != _dataset(tmp_path, 60, split_seed=43).split_names()
    assert names["val"] != _names(60)[:6]


def test_the_shares_of_drawn_splits_can_be_chosen(tmp_path):
    def sizes(count, *ratios):
        names = _dataset(tmp_path, count, split_ratios=ratios).split_names()
        return [len(names[split]) for split in ("train", "val", "test")]

    assert sizes(60, 0.6, 0.2, 0.2) == [36, 12, 12]
    assert sizes(60, 0.9, 0.05, 0.05) == [54, 3, 3]
    assert sizes(5, 0.98, 0.01, 0.01) == [3, 1, 1]  # never none
    dataset = _dataset(tmp_path, 60, split_ratios=(0.6, 0.2, 0.2))
    assert "splits: drawn by image with --split_seed 42 --split_ratios 0.6 0.2 0.2" in dataset.notes
    assert (
        dataset.split_names() == _dataset(tmp_path, 60, split_ratios=[0.6, 0.2, 0.2]).split_names()
    )


def test_ratios_that_lists_leave_nothing_to_do_are_said_to_be_idle(tmp_path):
    _dataset(tmp_path, 60)
    for split, rows in (("train", slice(40)), ("dev", slice(40, 50)), ("test", slice(50, 60))):
        (tmp_path / f"{split}.txt").write_text("\n".join(_names(60)[rows]))
    notes = _dataset(tmp_path, 60, split_ratios=(0.6, 0.2, 0.2)).notes
    idle = "; --split_ratios does nothing with these"
    assert f"splits: from train.txt, dev.txt, test.txt{idle}" in notes
    assert "splits: from train.txt, dev.txt, test.txt" in _dataset(tmp_path, 60).notes


def test_a_missing_image_does_not_reshuffle_the_others(tmp_path):
    before = _dataset(tmp_path / "a", 60).split_names()
    _dataset(tmp_path / "b", 60)
    gone = before["train"][0]
    (tmp_path / "b" / "Images" / gone).unlink()
    after = load_dataset(
        "custom", tmp_path / "b" / "Images", tmp_path / "b" / "captions.txt", max_bad_fraction=0.1
    )
    assert after.split_names() == before | {"train": before["train"][1:]}


def _lists(
    folder: Path, names=("train_images.txt", "Flickr_8k.devImages.txt", "TEST.txt"), extra=""
):
    images = _names(20)
    for name, listed in zip(names, (images[:10], images[10:12], images[12:15]), strict=True):
        _write(folder / name, "\r\n".join(listed) + "\r\n" + extra)


def test_lists_beside_the_captions_file_give_the_splits(tmp_path):
    _lists(tmp_path)
    _write(tmp_path / "readme of the test.txt", "No image is named here.\n")
    _write(tmp_path / "validation results.txt", "\xff\n", "latin-1")
    dataset = _dataset(tmp_path)
    assert {split: len(names) for split, names in dataset.split_names().items()} == {
        "train": 10,
        "val": 2,
        "test": 3,
    }
    (note,) = [note for note in dataset.notes if note.startswith("splits: ")]
    assert note == (
        "splits: from train_images.txt, Flickr_8k.devImages.txt, TEST.txt; 5 images in no split are left out"
    )


def test_lists_may_lack_extensions_and_name_unknown_images(tmp_path):
    for name, listed in {"train": ["000", "001", "404"], "val": ["002"], "test": ["003"]}.items():
        _write(tmp_path / f"{name}.txt", "\n".join(listed))
    dataset = _dataset(tmp_path, 4)
    assert dataset.split_names() == {
        "train": ["000.jpg", "001.jpg"],
        "val": ["002.jpg"],
        "test": ["003.jpg"],
    }
    assert "splits: from train.txt, val.txt, test.txt; 1 names are not in the data" in dataset.notes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "TEST.txt").unlink(), "one test list .* found none"),
        (
            lambda folder: _write(folder / "my_test.txt", "001.jpg"),
            "one test list .* found TEST.txt and my_test.txt",
        ),
        (
            lambda folder: _write(folder / "TEST.txt", "012.jpg\n001.jpg"),
            "'001.jpg' is in both train and test",
        ),
    ],
)
def test_incomplete_ambiguous_or_leaking_lists_are_refused(tmp_path, change, reason):
    _lists(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=reason):
        _dataset(tmp_path)


def test_a_recorded_split_wins_over_lists(tmp_path):
    _lists(tmp_path)
    split = {0: "dev", 1: "test", 2: ""}
    rows = [f"{name},a dog,{split.get(i, 'Train')}" for i, name in enumerate(_names(20))]
    dataset = _dataset(tmp_path, text="\n".join(["image,caption,split", *rows]))
    assert dataset.split_names() == {
        "train": _names(20)[3:],
        "val": ["000.jpg"],
        "test": ["001.jpg"],
    }
    assert "splits: as recorded in captions.txt; 1 images in no split are left out" in dataset.notes


def test_an_image_recorded_in_two_splits_stays_in_its_first(tmp_path):
    rows = [
        f"{name},a dog,{'val' if i == 0 else 'test' if i == 1 else 'train'}"
        for i, name in enumerate(_names(20))
    ]
    text = "\n".join(["image,caption,split", *rows, "000.jpg,a leak,train"])
    dataset = _dataset(tmp_path, text=text, max_bad_fraction=0.1)
    assert dataset.table.captions[0] == ["a dog"]
    assert (
        "1 of 21 rows skipped: '000.jpg' 'a leak' (image is in split val already, not train)"
        in "\n".join(dataset.notes)
    )


def test_splits_of_a_checkpoint_win_over_all(tmp_path):
    _lists(tmp_path)
    splits = {"train": ["005.jpg", "gone.jpg"], "val": ["001.jpg"], "test": ["000.jpg", "002.jpg"]}
    dataset = _dataset(tmp_path, splits=splits)
    assert dataset.split_names() == splits | {"train": ["005.jpg"]}
    assert (
        "splits: from the checkpoint; 16 images that its run did not use are left out; 1 names are not in the data"
        in dataset.notes
    )
    assert _dataset(tmp_path, splits=dataset.split_names()).split_names() == dataset.split_names()


@pytest.mark.parametrize(
    "splits", [[], {}, {"train": [], "val": []}, {"train": [5], "val": [], "test": []}]
)
def test_damaged_splits_of_a_checkpoint_are_refused(tmp_path, splits):
    with pytest.raises(ValueError, match="the checkpoint's splits are damaged"):
        _dataset(tmp_path, splits=splits)


def test_an_empty_split_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="the val split has no images"):
        _dataset(tmp_path, splits={"train": ["001.jpg"], "val": [], "test": ["002.jpg"]})
    with pytest.raises(ValueError, match="the train split has no images"):
        _dataset(tmp_path / "two", 2)


def test_max_train_images_takes_a_random_few(tmp_path):
    whole = _dataset(tmp_path, 100).split_names()
    few = _dataset(tmp_path, 100, max_train_images=8).split_names()
    assert (few["val"], few["test"]) == (whole["val"], whole["test"])
    assert len(few["train"]) == 8
    assert set(few["train"]) < set(whole["train"])
    assert few["train"] != whole["train"][:8]
    assert few == _dataset(tmp_path, 100, max_train_images=8).split_names()
    more = _dataset(tmp_path, 100, max_train_images=9).split_names()
    assert set(few["train"]) < set(more["train"])
    resumed = _dataset(tmp_path, 100, max_train_images=8, splits=few)
    assert resumed.split_names() == few
    assert _dataset(tmp_path, 100, max_train_images=800).split_names() == whole
    with pytest.raises(ValueError, match="--max_train_images 0: expected at least 1"):
        _dataset(tmp_path, max_train_images=0)


def test_max_val_images_takes_a_random_few_that_nothing_else_uses(tmp_path):
    whole = _dataset(tmp_path, 100).split_names()
    few = _dataset(tmp_path, 100, max_val_images=4).split_names()
    assert (few["train"], few["test"]) == (whole["train"], whole["test"])
    assert len(few["val"]) == 4 and set(few["val"]) < set(whole["val"])
    assert few["val"] != whole["val"][:4]
    more = _dataset(tmp_path, 100, max_val_images=5).split_names()
    assert set(few["val"]) < set(more["val"])
    assert _dataset(tmp_path, 100, max_val_images=4, splits=few).split_names() == few
    assert _dataset(tmp_path, 100, max_val_images=10).split_names() == whole
    with pytest.raises(ValueError, match="--max_val_images 0: expected at least 1"):
        _dataset(tmp_path, max_val_images=0)


def test_files_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    """At a million images that took most of the start."""
    asked, isfile = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(Path(path)) or isfile(path))
    names = [*_names(9), "below/a.jpg", "below/b.jpg", "nowhere/c.jpg", "folder.jpg"]
    (tmp_path / "Images/folder.jpg").mkdir(parents=True)
    folder = _images(tmp_path / "Images", names[:10])
    captions = _write(tmp_path / "captions.csv", _csv(names))
    dataset = load_dataset("custom", folder, captions, max_bad_fraction=0.5)
    absent = ["below/b.jpg", "nowhere/c.jpg", "folder.jpg"]
    assert dataset.bad_images == dict.fromkeys(absent, f"not in {folder}")
    assert asked == [folder / name for name in absent]


# What a checkpoint knows

SPLITS_20 = {"train": _names(16), "val": _names(18)[16:], "test": _names(20)[18:]}


def _captioned(folder: Path, contents: dict[str, str], **options):
    """A dataset of these files, {name: content}; `lists` lie beside it, {file name: image names}."""
    for name, content in contents.items():
        _write(folder / name, content)
    for name, listed in options.pop("lists", {}).items():
        _write(folder / name, "\n".join(listed))
    captions = _write(folder / "captions.csv", _csv(contents))
    return load_dataset("custom", folder, captions, **options)


def _remembered(folder: Path, digests=True) -> dict:
    """What a checkpoint remembers of 20 images, whose contents are their names."""
    dataset = _captioned(folder, {name: name for name in _names(20)}, splits=SPLITS_20)
    splits = dataset.splits()
    assert splits["digests"].keys() == SPLITS_20.keys()
    return splits if digests else dataset.split_names()


def _scored(dataset, split="test") -> list[str]:
    assert set(dataset.table.split) == {split}
    return dataset.table.image.tolist()


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("prefix", ["", "Images/"])
def test_a_checkpoint_finds_its_splits_in_its_dataset_under_base_names(tmp_path, prefix, digests):
    known = _remembered(tmp_path / "old", digests)
    for scored in (None, "train", "test"):
        contents = {f"{prefix}{name}": name for name in [*_names(20), "new.jpg"]}
        dataset = _captioned(tmp_path / "new", contents, splits=known, typed=True, scored=scored)
        assert dataset.foreign is None
        ours = {split: [prefix + name for name in known[split]] for split in SPLITS_20}
        assert dataset.split_names() == ours
        assert any(
            "from the checkpoint; 1 images that its run did not use" in note
            for note in dataset.notes
        )


@pytest.mark.parametrize(("digests", "told_by"), [(True, "content"), (False, "base name")])
def test_what_was_trained_on_is_not_scored(tmp_path, digests, told_by):
    """Names that differ by a folder, and a test image that was missing, once had it split anew."""
    known = _remembered(tmp_path / "old", digests)
    contents = {f"Images/{name}": name for name in _names(19)} | {"Images/new.jpg": "new"}
    options = {"splits": known, "typed": True, "scored": "test"}
    dataset = _captioned(tmp_path / "new", contents, **options)
    assert _scored(dataset) == ["Images/018.jpg", "Images/new.jpg"]
    assert dataset.foreign == ("none, all images are scored", 18, told_by, 0)
    assert "18 images left out that the checkpoint was trained" in str(dataset.foreign)
    assert f"compared by {told_by}" in str(dataset.foreign)
    with pytest.raises(ValueError, match="trained or validated on all 18 images"):
        _captioned(tmp_path / "known", dict(list(contents.items())[:18]), **options)


def test_contents_tell_datasets_apart_that_share_names(tmp_path):
    known = _remembered(tmp_path / "old")
    options = {"splits": known, "typed": True, "scored": "test"}
    contents = {name: f"another {name}" for name in _names(20)} | {"a.jpg": "003.jpg"}
    dataset = _captioned(tmp_path / "other", contents, **options)
    assert _scored(dataset) == _names(20)  # a.jpg is 003.jpg, by content
    assert dataset.foreign == ("none, all images are scored", 1, "content", 18)
    assert "18 others have the names of such images" in str(dataset.foreign)
    resumed = _captioned(
        tmp_path / "other", {n: f"another {n}" for n in _names(30)}, splits=known, typed=True
    )
    assert (
        resumed.split_names()
        == _captioned(tmp_path / "same", dict.fromkeys(_names(30), "")).split_names()
    )
    assert any(note.endswith("; no image is the checkpoint's") for note in resumed.notes)


def test_a_foreign_dataset_is_scored_by_its_own_test_list_alone(tmp_path):
    contents = {f"{name}.jpg": name for name in "abcde"}
    options = {"splits": _remembered(tmp_path / "old"), "typed": True, "scored": "test"}
    lists = {"my test images.txt": ["b.jpg", "d.jpg"]}
    dataset = _captioned(tmp_path / "new", contents, lists=lists, **options)
    assert _scored(dataset) == ["b.jpg", "d.jpg"]
    assert dataset.foreign.splits == "from my test images.txt; 3 images in no split are left out"
    whole = _captioned(
        tmp_path / "whole", contents, **options | {"max_train_images": 1, "scored": "train"}
    )
    assert _scored(whole, "train") == [*contents]
    with pytest.raises(ValueError, match="expected one val list beside the captions, found none"):
        _captioned(tmp_path / "new", contents, **options | {"scored": "val"})


def test_recorded_splits_of_a_foreign_dataset_hold(tmp_path):
    rows = [
        "image,caption,split",
        "a.jpg,one dog,test",
        "b.jpg,two dogs,train",
        "003.jpg,a cat,test",
    ]
    text, known = "\n".join(rows), _remembered(tmp_path / "old")
    folder = _images(tmp_path / "new", ["a.jpg", "b.jpg"])
    _write(folder / "003.jpg", "003.jpg")
    captions = _write(tmp_path / "captions.csv", text)
    how = {"splits": known, "typed": True, "max_bad_fraction": 1.0}
    dataset = load_dataset("custom", folder, captions, scored="test", **how)
    assert _scored(dataset) == ["a.jpg"]
    assert dataset.foreign[:3] == ("as recorded in captions.csv", 1, "content")
    with pytest.raises(ValueError, match="the val split has no images"):
        load_dataset("custom", folder, captions, scored="val", **how)


@pytest.mark.parametrize("digests", [True, False])
def test_training_goes_on_with_a_part_of_the_dataset_in_the_same_splits(tmp_path, digests):
    """Renamed and in part, it was once split anew: training images became test images."""
    known = _remembered(tmp_path / "old", digests)
    contents = {f"x/{name}": name for name in _names(20)[5:]}
    dataset = _captioned(tmp_path / "new", contents, splits=known, typed=True)
    parts = {split: [f"x/{n}" for n in known[split] if n >= "005"] for split in SPLITS_20}
    assert dataset.split_names() == parts


def test_a_base_name_that_two_images_share_names_neither(tmp_path):
    known = {"train": ["a/1.jpg"], "val": ["a/2.jpg"], "test": ["b/1.jpg"]}
    options = {"splits": known, "typed": True, "scored": "test"}
    dataset = _captioned(tmp_path / "one", {"1.jpg": "", "3.jpg": ""}, **options)
    assert _scored(dataset) == ["3.jpg"]  # 1.jpg may have been trained on
    own = _captioned(tmp_path / "two", {"a/1.jpg": "", "b/1.jpg": ""}, **options)
    assert own.foreign is None and own.split_names() == {
        "train": ["a/1.jpg"],
        "val": [],
        "test": ["b/1.jpg"],
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda digests: None,
        lambda digests: {"test": digests["test"]},
        lambda digests: digests | {"val": digests["val"].tolist()},
        lambda digests: digests | {"val": digests["val"][1:]},
        lambda digests: digests | {"val": digests["val"].float()},
    ],
)
def test_damaged_digests_of_a_checkpoint_are_refused(tmp_path, damage):
    known = _remembered(tmp_path)
    assert checked_splits(known | {"more": 1}).keys() == known.keys()
    with pytest.raises(ValueError, match="the checkpoint's splits are damaged"):
        checked_splits(known | {"digests": damage(known["digests"])})


def test_a_resumed_run_hashes_the_same_images_once(tmp_path):
    known = _remembered(tmp_path)
    again = _captioned(tmp_path, dict.fromkeys(_names(20), "changed"), splits=known)
    assert again.splits(known) is known
    assert again.splits({split: known[split] for split in SPLITS_20})["digests"][
        "val"
    ].tolist() != (known["digests"]["val"].tolist())


def test_the_hash_of_splits_does_not_depend_on_the_order_of_names():
    one = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    other = {"test": ["d"], "val": ["c"], "train": ["b", "a"], "digests": None}
    assert (
        splits_sha256(one) == splits_sha256(other) == splits_sha256({"sha256": splits_sha256(one)})
    )
    assert splits_sha256(one) != splits_sha256(one | {"train": ["a"], "val": ["b", "c"]})


def test_a_dataset_split_anew_must_agree_with_the_hash(tmp_path):
    hashed = {"sha256": splits_sha256(_dataset(tmp_path, split_seed=1).split_names())}
    same = _dataset(tmp_path, split_seed=1, splits=hashed, typed=True, scored="test")
    assert len(same.split_names()["test"]) == 2
    for options in ({"split_seed": 2}, {"max_train_images": 3}, {"count": 21}):
        with pytest.raises(ValueError, match="split otherwise than for the checkpoint"):
            _dataset(tmp_path, **{"split_seed": 1} | options, splits=hashed)


# What training sees


def _training(dataset):
    return dataset.table[dataset.table.split == "train"]


def test_the_vocabulary_comes_from_training_captions_only(tmp_path):
    """The original counted words of validation captions, too."""
    splits = {"train": _names(20)[:16], "val": _names(20)[16:18], "test": _names(20)[18:]}
    rows = [
        f"{name},a dog seen in {'summer' if name in splits['train'] else 'winter'}"
        for name in _names(20)
    ]
    dataset = _dataset(tmp_path, text="\n".join(["image,caption", *rows]), splits=splits)
    vocabulary = Vocabulary.build(
        (caption for captions in _training(dataset).captions for caption in captions), 2
    )
    assert vocabulary.words[4:] == ["a", "dog", "in", "seen", "summer"]
    assert vocabulary.decode(vocabulary.encode("in winter")) == "in"


def test_references_follow_the_image_through_the_batches(tmp_path):
    """The original looked references up by position, in the full set: they were other images'."""
    dataset = _dataset(tmp_path, 60)
    val = dataset.table[dataset.table.split == "val"].reset_index(drop=True)
    # every caption has its image's number as a word: 7 is of 007.jpg
    words = [[int(caption.split()[3]) for caption in captions] for captions in val.captions]
    assert [[name[:3]] * 2 for name in val.image] == [
        [f"{n:03}" for n in numbers] for numbers in words
    ]
    ids = [[[4 + number] for number in numbers] for numbers in words]
    seen = 0
    for batch in CaptionBatches(ids, batch_size=5, max_length=9, seed=0).epoch(0):
        first_words = batch.targets[: len(batch.image_index)]
        for row, word in zip(batch.image_rows[batch.image_index], first_words, strict=True):
            assert val.image[int(row)] == f"{int(word) - 4:03}.jpg"
            seen += 1
    assert seen == 12


def test_captions_of_flickr30k_are_read_in_seconds(tmp_path):
    names = [f"{i:08}.jpg" for i in range(31_783)]
    rows = (
        f"{name}| {k}| Two young men , {name} , are hanging out {k}"
        for name in names
        for k in range(5)
    )
    captions = _write(
        tmp_path / "results.csv", "image_name| comment_number| comment\n" + "\n".join(rows)
    )
    start = time.perf_counter()
    rows, problems = read_captions(captions)
    assert time.perf_counter() - start < 10
    assert (len(rows), problems) == (158_915, [])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/flickr8k")
def test_the_real_flickr8k_has_its_published_splits():
    dataset = load_dataset("flickr8k", SHARED / "Images", SHARED / "captions.txt")
    sizes = {split: len(names) for split, names in dataset.split_names().items()}
    assert sizes == {"train": 6000, "val": 500, "test": 500}
    assert dataset.table.captions.map(len).eq(5).all()
    assert dataset.split_names()["test"] == sorted(
        (SHARED / "Flickr_8k.testImages.txt").read_text().split()
    )
    assert dataset.bad_images == {}
    vocabulary = Vocabulary.build(
        (caption for captions in _training(dataset).captions for caption in captions), 5
    )
    assert 2400 < len(vocabulary) < 2700


def test_exactly_max_bad_fraction_may_be_bad(tmp_path):
    text = _csv([*_names(19), "missing.jpg"])
    assert len(_dataset(tmp_path, 19, text, max_bad_fraction=0.05).table) == 19


@pytest.mark.parametrize("options", [{}, {"max_train_images": 8}])
def test_the_order_of_the_rows_decides_no_split(tmp_path, options):
    one, other = (
        _dataset(tmp_path, 60, _csv(names), **options).split_names()
        for names in (_names(60), _names(60)[::-1])
    )
    assert {split: sorted(names) for split, names in other.items()} == one


def test_split_seed_chooses_the_training_images_of_recorded_splits_too(tmp_path):
    whole = _dataset(tmp_path, 60).split_names()
    one, same, other = (
        _dataset(tmp_path, 60, splits=whole, max_train_images=8, split_seed=seed).split_names()
        for seed in (1, 1, 2)
    )
    assert one == same != other and len(other["train"]) == 8


def test_captions_without_pictures_hide_no_picture_without_captions(tmp_path):
    _images(tmp_path / "Images", ["extra.jpg"])
    dataset = _dataset(tmp_path, 20, _csv([*_names(20), "missing.jpg"]), max_bad_fraction=0.1)
    assert f"{tmp_path / 'Images'}: 1 images have no captions and are left out" in dataset.notes


def test_a_caption_s_ordinal_is_a_number(tmp_path):
    text = "a.jpg#0\ta dog\na.jpg#x\ta cat\n"
    rows, malformed = read_captions(_write(tmp_path / "c", text))
    assert rows == [("a.jpg", "a dog", None)] and malformed[0][0] == "line 2"


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))


def test_a_folder_of_ones_own_that_lacks_captions_is_not_sent_to_the_downloader(tmp_path):
    (tmp_path / "Images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no captions file .*; give --image_dir"):
        load_dataset("custom", data_dir=tmp_path)

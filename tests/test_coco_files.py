"""coco_files.py: what COCO's files name, a part of them, and the program on COCO's and imagefolder's layouts.

How COCO is fetched is in test_download_datasets.py.
"""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_end_to_end import ATTENTION, TINY, run_dir, succeed

import coco_files

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k"


def some_pictures(train, val):
    sizes = coco_files.Picture("", (4, 3), 5)
    names = [f"train2014/{i}.jpg" for i in range(train)] + [f"val2014/{i}.jpg" for i in range(val)]
    return dict.fromkeys(names, sizes)


def test_a_choice_has_every_split_and_stays_the_same():
    pictures = some_pictures(100, 60)
    split_of = dict.fromkeys(pictures, "train")
    split_of |= {f"val2014/{i}.jpg": ("val", "test")[i % 2] for i in range(40)}
    chosen = coco_files.choose(pictures, split_of, 30)
    counts = [sum(split_of[name] == split for name in chosen) for split in ("train", "val", "test")]
    assert counts == [24, 3, 3] and len(set(chosen)) == 30
    assert coco_files.choose(dict(reversed(pictures.items())), split_of, 30) == chosen
    official = coco_files.choose(pictures, {}, 30)
    assert sum(name.startswith("val2014/") for name in official) == 6
    assert len(coco_files.choose(pictures, split_of, 3)) == 3
    assert coco_files.choose(pictures, split_of, 150) != coco_files.choose(pictures, {}, 150)
    assert coco_files.choose(pictures, split_of, 999) == sorted(pictures)


@pytest.mark.parametrize(
    "change",
    [
        {"file_name": "../a.jpg"},
        {"file_name": ".a.jpg"},
        {"file_name": 7},
        {"coco_url": "file:///etc/passwd"},
        {"width": 60_000},
        {"height": -3},
        {"width": "4"},
        {"id": 9},
    ],
    ids=str,
)
def test_a_hostile_captions_file_is_one_line(tmp_path, change):
    image = {"id": 1, "file_name": "a.jpg", "coco_url": "http://x/a.jpg", "width": 4, "height": 3}
    (tmp_path / "annotations").mkdir()
    good = {"images": [image], "annotations": [{"image_id": 1, "caption": "a b"}]}
    for subset, content in (("train2014", good), ("val2014", good | {"images": [image | change]})):
        coco_files.captions_file(tmp_path, subset).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"captions_val2014\.json: not COCO's captions") as failure:
        coco_files.read_pictures(tmp_path, 2014)
    assert "\n" not in str(failure.value)


def test_a_picture_must_be_a_whole_jpeg_of_its_size(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 30)).save(path)
    coco_files.check_picture(path, (40, 30))
    with pytest.raises(ValueError, match="40 x 30 pixels, expected 30 x 40"):
        coco_files.check_picture(path, (30, 40))
    Image.new("RGB", (40, 30)).save(path, "PNG")
    with pytest.raises(ValueError, match="not a whole JPEG"):
        coco_files.check_picture(path, (40, 30))


def photographs(count):
    """{name: captions} of real photographs."""
    captions = {}
    with (SHARED / "captions.txt").open() as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    names = sorted(name for name in captions if (SHARED / "Images" / name).exists())
    return {name: captions[name] for name in names[:count]}


def lay_out_coco(root, photos):
    (root / "annotations").mkdir(parents=True)
    names = list(photos)
    for subset, part in (("train2014", names[:12]), ("val2014", names[12:])):
        (root / subset).mkdir()
        for name in part:
            shutil.copy(SHARED / "Images" / name, root / subset / name)
        images = [{"id": i, "file_name": name} for i, name in enumerate(part)]
        captions = [
            {"image_id": i, "caption": text} for i, name in enumerate(part) for text in photos[name]
        ]
        content = {"images": images, "annotations": captions}
        coco_files.captions_file(root, subset).write_text(json.dumps(content))
    return "--dataset_type coco"


def lay_out_imagefolder(root, photos):
    names = list(photos)
    for split, part in (("train", names[:12]), ("validation", names[12:16]), ("test", names[16:])):
        (root / split).mkdir(parents=True)
        lines = [json.dumps({"file_name": name, "captions": photos[name]}) for name in part]
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
        for name in part:
            shutil.copy(SHARED / "Images" / name, root / split / name)
    return f"--dataset_type custom --image_dir {root} --captions_file {root}"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/flickr8k")
@pytest.mark.parametrize("lay_out", [lay_out_coco, lay_out_imagefolder])
def test_the_program_trains_and_tests_on_photographs(tmp_path, monkeypatch, one_thread, lay_out):
    monkeypatch.chdir(tmp_path)
    data = lay_out(Path("data/coco"), photographs(20))
    out = succeed(TINY.replace("--dataset_type sample", data), ATTENTION)
    assert "train 12, val 4, test 4 images" in out
    assert ("no test there: 50% of val drawn" in out) == (lay_out is lay_out_coco)
    run = run_dir(out)
    succeed("--mode test --precision float32 --model_path", run / "best.pt")
    scores = json.loads((run / "test_metrics.json").read_text())
    assert scores["images"] == 4
    captioned = json.loads((run / "test_captions.json").read_text())
    assert len(captioned) == 4


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

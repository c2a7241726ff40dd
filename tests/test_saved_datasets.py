"""saved_datasets.py: Hugging Face's datasets on disk fill the cache as files do; damaged ones are one line."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pictures import png_bomb
from test_end_to_end import ATTENTION, TINY, listed, load, program, run_dir, succeed, train
from test_feature_cache import FakeEncoder, _cached, _expected

import image_loading
import saved_datasets
from caption_data import PICTURE_NAME, load_dataset

datasets = pytest.importorskip("datasets", reason="needs requirements-hub.txt")
pyarrow = pytest.importorskip("pyarrow", reason="needs requirements-hub.txt")
datasets.disable_progress_bars()


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def rows_of(pictures, **columns):
    """A Dataset of pictures, each bytes or None, and of the columns."""
    stored = [{"bytes": content, "path": None} if content else None for content in pictures]
    table = datasets.Dataset.from_dict({"image": stored, **columns})
    return table.cast_column("image", datasets.Image())


def grey(levels, **columns):
    """A Dataset of grey pictures, whose captions name their levels unless columns are given."""
    columns = columns or {"captions": [[f"level {n}", f"grey {n}"] for n in levels]}
    return rows_of(map(png, levels), **columns)


@pytest.fixture
def saved(tmp_path):
    """A DatasetDict of 5 + 2 + 2 pictures, its train split in two files."""
    splits = {"train": grey(range(5)), "validation": grey([5, 6]), "test": grey([7, 8])}
    folder = tmp_path / "saved"
    datasets.DatasetDict(splits).save_to_disk(
        folder, num_shards={"train": 2, "validation": 1, "test": 1}
    )
    return folder


def test_a_saved_dataset_has_its_captions_splits_and_places(saved):
    dataset = load_dataset("custom", saved, saved)
    first, second = (f"train/data-0000{k}-of-00002" for k in (0, 1))
    val, test = (f"{split}/data-00000-of-00001" for split in ("validation", "test"))
    places = [f"{first}/0", f"{first}/1", f"{first}/2", f"{second}/0", f"{second}/1"]
    places += [f"{val}/0", f"{val}/1", f"{test}/0", f"{test}/1"]
    assert dataset.table.image.tolist() == places
    assert dataset.table.split.tolist() == ["train"] * 5 + ["val"] * 2 + ["test"] * 2
    assert dataset.table.captions.tolist() == [[f"level {n}", f"grey {n}"] for n in range(9)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_its_pictures_fill_the_cache_as_files_do(saved, tmp_path, num_workers):
    dataset, encoder = load_dataset("custom", saved, saved), FakeEncoder()
    paths = [dataset.image_dir / name for name in dataset.table.image]
    features, unreadable = _cached(paths[:7], encoder, tmp_path / "c", num_workers=num_workers)
    assert unreadable == {} and encoder.images == 9  # one pass for all splits
    assert torch.equal(features[range(7)], _expected(range(7)))
    later, _ = _cached(paths[7:], FakeEncoder(break_after=0, error=AssertionError), tmp_path / "c")
    assert torch.equal(later[range(2)], _expected([7, 8]))
    shown = [np.asarray(image)[0, 0, 0] for image in image_loading.open_images(paths[6:8])]
    assert shown == [6, 7]


@pytest.mark.parametrize(
    "columns",
    [
        {"caption_1": ["a dog", "a cat"], "caption_0": ["one", "two"], "id": [1, 2]},
        {"text": [["one", "a dog"], ["two", "a cat"]], "labels": ["no", "no"]},
    ],
    ids=["numbered", "list"],
)
def test_a_dataset_without_splits_and_with_other_columns(tmp_path, columns):
    grey([3, 4], **columns).save_to_disk(tmp_path / "d")
    found = [entry for _, entry in saved_datasets.captioned(tmp_path / "d")]
    place = "data-00000-of-00001"
    assert found == [
        (f"{place}/0", ["one", "a dog"], None),
        (f"{place}/1", ["two", "a cat"], None),
    ]
    shards = image_loading.find_shards(tmp_path / "d", PICTURE_NAME)
    assert dict(image_loading.read(shards.urls, [f"{place}/1", f"{place}/9", "x/0"])) == {
        f"{place}/1": png(4)
    }


def test_a_column_of_splits_wins_over_the_folder(tmp_path):
    table = grey([1, 2, 3], caption=["a b", "c d", "e f"], split=["train", "restval", "val"])
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "d")
    splits = [split for _, (_, _, split) in saved_datasets.captioned(tmp_path / "d")]
    assert splits == ["train", "restval", "val"]


def test_hostile_pictures_and_rows_without_one_are_named_not_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    pictures = [png(1), None, png_bomb(30_000), b"%!PS-Adobe-3.0 EPSF-3.0\nquit\n", png(2)]
    table = rows_of(pictures, caption=["a b"] * 5)
    arrow = table.data.table.to_pydict()
    arrow["image"][1] = {"bytes": None, "path": str(secret)}  # a path must not be opened
    hostile = datasets.Dataset(pyarrow.table(arrow, schema=table.data.schema))
    folder = tmp_path / "d"
    table.save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    with datasets.arrow_writer.ArrowWriter(path=str(file), features=table.features) as writer:
        writer.write_table(hostile.data.table)
        writer.finalize()
    shards = image_loading.find_shards(folder, PICTURE_NAME)
    paths = [shards / f"data-00000-of-00001/{place}" for place in range(5)]
    features, unreadable = _cached(paths, FakeEncoder(), tmp_path / "cache")
    assert torch.equal(features[[0, 4]], _expected([1, 2]))
    assert list(unreadable) == paths[1:4]
    reasons = [unreadable[path] for path in paths[1:4]]
    assert "not a readable image" in reasons[0] and "not a readable image" in reasons[2]
    assert "30000 x 30000 pixels" in reasons[1]


def test_rows_are_streamed(tmp_path):
    """Memory that Arrow allocates is that of texts, not of the 32 MB of pictures."""
    noise = np.random.default_rng(0).bytes(2**20)
    rows_of([noise] * 32, caption=["a b"] * 32).save_to_disk(tmp_path / "d")
    (file,) = saved_datasets.arrow_files(tmp_path / "d")
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in saved_datasets.captioned(tmp_path / "d"):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    wanted = [f"{file.stem}/{place}" for place in range(32)]
    for _, content in saved_datasets.read_pictures(file, wanted, 1000):
        assert content == noise[:1000]
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 2**20


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "dataset_dict.json: names '../x'": ("dataset_dict.json", lambda _: b'{"splits": ["../x"]}'),
    "dataset_dict.json: 'splits'": ("dataset_dict.json", lambda _: b"{}"),
    "state.json: names '/etc/passwd'": (
        "train/state.json",
        lambda _: b'{"_data_files": [{"filename": "/etc/passwd"}]}',
    ),
    "state.json: Expecting value": ("test/state.json", lambda _: b"no"),
    "of-00001.arrow: ": ("test/data-00000-of-00001.arrow", lambda _: b"no arrow file at all"),
    "of-00002.arrow: ": ("train/data-00000-of-00002.arrow", lambda content: content[:400]),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=range(len(DAMAGES)))
def test_a_damaged_dataset_is_one_line_that_names_the_file(saved, message, damage):
    spoil(saved, *damage)
    with pytest.raises(ValueError) as failure:
        load_dataset("custom", saved, saved)
    assert message in str(failure.value) and str(saved) in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda: grey([1], label=["x"]), "no column of captions"),
        (
            lambda: datasets.Dataset.from_dict({"caption": ["a b"]}),
            "no column of pictures: caption",
        ),
    ],
    ids=["captions", "pictures"],
)
def test_a_dataset_that_lacks_a_column_says_which(tmp_path, table, message):
    table().save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        load_dataset("custom", tmp_path / "d", tmp_path / "d")


def test_files_of_an_older_dataset_in_the_folder_are_not_read(saved):
    (saved / "test/data-00000-of-00009.arrow").write_bytes(b"left over")
    names = [path.name for path in saved_datasets.arrow_files(saved)]
    assert len(names) == 4 and "data-00000-of-00009.arrow" not in names


@pytest.mark.parametrize("package", ["datasets", "pyarrow.parquet"])
def test_without_the_package_one_line_names_the_command(saved, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    captions = saved if package == "datasets" else tmp_path / "c.parquet"
    with pytest.raises(ValueError, match=r"pip install -r requirements-hub\.txt$") as failure:
        load_dataset("custom", saved, captions)
    assert "\n" not in str(failure.value)


@pytest.mark.slow
@pytest.mark.usefixtures("shop")
def test_the_program_trains_and_tests_as_from_files():
    with Path("data/sample/captions.txt").open() as file:
        captions = {}
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    splits = {}
    for name, split in (("train", "train"), ("validation", "dev"), ("test", "test")):
        images = [image for image in captions if image in set(listed(split))]
        pictures = [(Path("data/sample/Images") / image).read_bytes() for image in images]
        splits[name] = rows_of(pictures, captions=[captions[image] for image in images])
    datasets.DatasetDict(splits).save_to_disk("saved")
    flags = f"{ATTENTION} --save_attention_viz --attention_viz_samples 1"
    saved = "--dataset_type custom --image_dir saved --captions_file saved --cache_dir own"
    runs = train(flags), run_dir(succeed(TINY.replace("--dataset_type sample", saved), flags))
    losses = [load(run / "best.pt")["history"][0]["train_loss"] for run in runs]
    assert losses[0] == losses[1]
    pictures = [(run / "attention_viz_sample_1.png").read_bytes() for run in runs]
    assert pictures[0] == pictures[1]
    test = "--mode test --precision float32 --model_path"
    assert "custom test: 4 images" in succeed(test, runs[1] / "best.pt", "--cache_dir own")
    scores = [json.loads((run / "test_metrics.json").read_text()) for run in runs[1:]]
    succeed(test, runs[0] / "best.pt")
    scores.append(json.loads((runs[0] / "test_metrics.json").read_text()))
    assert scores[0]["CIDEr"] == scores[1]["CIDEr"] and scores[0]["BLEU-4"] == scores[1]["BLEU-4"]
    refused = program(TINY.replace("--dataset_type sample", saved), "--no_feature_cache")
    assert refused.status == 2 and refused.err.count("\n") == 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

"""kaggle_setup.py on made-up trees, as Kaggle and Colab mount them."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import caption_options
import kaggle_setup
from kaggle_setup import create_kaggle_config, setup_kaggle_training


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """`kaggle(path, text)` writes below the folder that stands for /kaggle/input, where it works in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").mkdir()

    def add(path, text=""):
        file = tmp_path / "input" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return add


def configured(**arguments):
    """The written settings."""
    path = create_kaggle_config("kaggle.yaml", root="input", working="working", **arguments)
    return yaml.safe_load(path.read_text())


def add_pictures(kaggle, folder, count=3):
    """Files whose content is never looked at."""
    for number in range(count):
        kaggle(f"{folder}/{number}.jpg")


def as_csv(count=3):
    return "image,caption\n" + "".join(f"{n}.jpg,a dog runs\n" for n in range(count))


def coco(folder=""):
    images = [{"id": n, "file_name": f"{folder}{n}.jpg"} for n in range(3)]
    rows = [{"image_id": n, "caption": "a dog runs"} for n in range(3)]
    return json.dumps({"images": images, "annotations": rows})


def karpathy(folder):
    images = [
        {"filename": f"{n}.jpg", "filepath": folder, "split": s, "sentences": [{"raw": "a dog"}]}
        for n, s in enumerate(["train", "val", "test"])
    ]
    return json.dumps({"images": images})


LAYOUTS = {  # captions file, its text, the pictures' folder, --image_dir, --dataset_type
    "flickr8k": ("flickr8k/captions.txt", as_csv(), "flickr8k/Images", None, "flickr8k"),
    "mounted by owner": (
        "datasets/adityajn105/flickr8k/captions.txt",
        as_csv(),
        "datasets/adityajn105/flickr8k/Images",
        None,
        "flickr8k",
    ),
    "flickr30k": (
        "flickr-image-dataset/flickr30k_images/results.csv",
        "image_name| comment_number| comment\n0.jpg| 0| a dog\n1.jpg| 0| a cat\n",
        "flickr-image-dataset/flickr30k_images/flickr30k_images",
        None,
        "flickr30k",
    ),
    "tokens": ("f/Text/F.token.txt", "0.jpg#0\ta dog\n", "f/Flicker8k_Dataset", None, "custom"),
    "coco": ("coco/annotations/captions_train2017.json", coco(), "coco/train2017", None, "custom"),
    "karpathy": ("k/dataset_coco.json", karpathy("val2014"), "coco/val2014", "coco", "custom"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_and_the_file_is_read_by_the_program(layout, kaggle):
    captions, text, folder, image_dir, dataset_type = LAYOUTS[layout]
    kaggle(captions, text)
    kaggle("another/readme.txt", "image,caption")
    add_pictures(kaggle, folder)
    configured()
    options = caption_options.check_files(caption_options.parse_args(["--config", "kaggle.yaml"]))
    assert Path(options.data.captions_file) == Path("input") / captions
    assert Path(options.data.image_dir) == Path("input") / (image_dir or folder)
    assert options.data.dataset_type == dataset_type
    assert options.run.model_save_dir == "working/saved_models"
    assert options.features.cache_dir == "working/feature_cache"
    assert options.model.attention == "adaptive"


def test_what_was_found_is_said(kaggle, capsys):
    add_pictures(kaggle, "flickr8k/Images", 4)
    kaggle("flickr8k/captions.txt", as_csv())
    kaggle("weights/efficientnet_b3_rwightman-cf984f9c.pth")
    kaggle("weights/resnet50-0676ba61.pth")
    kaggle("weights/unet.pth")
    for length in (50, 100, 200):
        kaggle(f"glove6b/glove.6B.{length}d.txt", "a " + "0.5 " * length)
    settings = configured()
    assert settings["encoder"] == "resnet50"
    assert settings["encoder_weights"] == "input/weights/resnet50-0676ba61.pth"
    assert settings["glove_path"] == "input/glove6b/glove.6B.200d.txt"
    assert settings["embed_size"] == 200
    assert capsys.readouterr().out.splitlines() == [
        "passed over: input/glove6b/glove.6B.50d.txt: its length is no multiple of the attention heads",
        "images: input/flickr8k/Images, 3 that have captions",
        "captions: input/flickr8k/captions.txt, 3",
        "encoder weights: input/weights/resnet50-0676ba61.pth, of efficientnet_b3, resnet50",
        "GloVe: input/glove6b/glove.6B.200d.txt, 200 numbers a word",
        "written: kaggle.yaml; train with: python flickr_image_caption.py --config kaggle.yaml",
    ]
    caption_options.check_files(caption_options.parse_args(["--config", "kaggle.yaml"]))


def test_a_file_with_splits_comes_before_one_without(kaggle, capsys):
    add_pictures(kaggle, "flickr8k/Images")
    kaggle("flickr8k/captions.txt", as_csv())
    kaggle("karpathy/dataset_flickr8k.json", karpathy(""))
    assert configured()["captions_file"] == "input/karpathy/dataset_flickr8k.json"
    assert "not used: input/flickr8k/captions.txt" in capsys.readouterr().out.splitlines()


def test_of_two_datasets_one_must_be_named(kaggle):
    for name in ("flickr8k", "holiday"):
        add_pictures(kaggle, f"{name}/Images")
        kaggle(f"{name}/captions.txt", as_csv())
    with pytest.raises(ValueError, match=r"^input: several datasets, flickr8k, holiday: choose by"):
        configured()
    assert configured(flickr_dataset="me/holiday")["image_dir"] == "input/holiday/Images"
    with pytest.raises(FileNotFoundError, match="below a folder nobody"):
        configured(flickr_dataset="me/nobody")
    with pytest.raises(FileNotFoundError, match=r"no glove\.\.\.d\.txt below a folder glove6b"):
        configured(flickr_dataset="me/holiday", glove_dataset="incorpes/glove6b")


def test_nothing_usable_is_one_line_and_no_file(kaggle, capsys):
    kaggle("other/captions.txt", as_csv())
    kaggle("damaged/captions.json", "{")
    add_pictures(kaggle, "x/Images", 1)
    arguments = ["--root", "input", "--output", "kaggle.yaml"]
    with pytest.raises(SystemExit) as caught:
        kaggle_setup.main(arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.err.count("\n") == 1 and not Path("kaggle.yaml").exists()
    assert said.err.startswith("kaggle_setup.py: error: input: no images with a captions file ")
    assert said.out.splitlines()[1] == (
        "passed over: input/other/captions.txt: of its 3 images most in input/x/Images, 1"
    )
    assert said.out.startswith("passed over: input/damaged/captions.json: damaged JSON")


def test_folders_that_cannot_be_read_are_named_and_links_are_followed_once(kaggle, monkeypatch):
    add_pictures(kaggle, "../elsewhere/Images")
    kaggle("captions.txt", as_csv())
    Path("input/link").symlink_to("../elsewhere")
    Path("elsewhere/back").symlink_to("../input")
    Path("input/broken").symlink_to("nowhere")
    Path("input/locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    tree = kaggle_setup.look_through(Path("input"))
    assert tree.notes == ["input/locked: not readable (Permission denied)"]
    assert [*tree.pictures] == [Path("input/link/Images")]
    assert configured()["image_dir"] == "input/link/Images"


def test_no_picture_is_opened_or_asked_for_its_size(kaggle, monkeypatch):
    add_pictures(kaggle, "flickr8k/Images", 50)
    kaggle("flickr8k/captions.txt", as_csv(50))
    asked = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: asked.append(path) or stat(path, **how))
    kaggle_setup.find_datasets(kaggle_setup.look_through(Path("input")))
    assert asked and not [path for path in asked if path.suffix == ".jpg"]


def test_a_huge_tree_is_left_with_a_note(kaggle, monkeypatch):
    monkeypatch.setattr(kaggle_setup, "MOST_FOLDERS", 5)
    for number in range(9):
        kaggle(f"{number}/a.txt")
    tree = kaggle_setup.look_through(Path("input"))
    assert tree.notes == ["input: only the first 5 folders were looked through"]
    assert len(tree.files) < 9


def test_the_environment_is_said(monkeypatch, capsys):
    gpu = SimpleNamespace(name="Tesla T4", total_memory=15_800_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(kaggle_setup, "has_internet", lambda: False)
    assert (
        setup_kaggle_training(verbose=False)["gpus"]
        == [{"name": "Tesla T4", "memory_gb": 15.8}] * 2
    )
    assert capsys.readouterr().out == ""
    environment = setup_kaggle_training()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "GPU: Tesla T4, 15.8 GB; Tesla T4, 15.8 GB"
    assert lines[-1] == "internet: no: encoder weights must be in a dataset"
    assert environment["torch"] == torch.__version__ and environment["cpu_cores"] >= 1


def test_no_internet_is_known_in_time_even_where_the_name_server_hangs(monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stop.wait(30) and [])
    started = time.monotonic()
    assert not kaggle_setup.has_internet(seconds=0.1)
    assert time.monotonic() - started < 5
    stop.set()


def test_an_answer_means_internet():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert kaggle_setup.has_internet(server.getsockname())


def test_packages_that_are_there_in_any_version_are_not_installed_anew(tmp_path):
    (tmp_path / "r.txt").write_text("# a\ntorch==0.1\n\nno-such-package==2.0 # why\n")
    assert kaggle_setup.missing_packages(tmp_path / "r.txt") == ["no-such-package==2.0"]


def test_a_run_on_kaggles_layout(shop, tmp_path):
    """The sample dataset's pictures as flickr8k, and the written file as the only other argument."""
    from test_end_to_end import succeed

    (tmp_path / "input/flickr8k").mkdir(parents=True)
    for name in ("Images", "captions.txt"):
        (tmp_path / "input/flickr8k" / name).symlink_to(tmp_path / "data/sample" / name)
    create_kaggle_config("configs/kaggle.yaml", root="input", working="working")
    tiny = "--encoder shufflenet_v2_x0_5 --encoder_weights random --embed_size 16 --hidden_size 16"
    succeed(f"--config configs/kaggle.yaml --freq_threshold 1 --epochs 1 --warmup_epochs 0 {tiny}")
    assert len(list(Path("working/saved_models/flickr8k").rglob("best.pt"))) == 1
    assert list(Path("working/feature_cache").iterdir())

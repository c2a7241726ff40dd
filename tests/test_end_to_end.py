"""flickr_image_caption.py as its users run it: train, stop, resume, test, caption forty pictures.

The program runs inside this process, because importing torch takes longer than a training run here;
what needs a process of its own is in test_command_line.py.
"""

import collections
import contextlib
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from specified_commands import RESUME_AND_TEST_COMMANDS, TRAINING_COMMANDS
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import attention_measures
import attention_visualization
import caption_batches
import caption_objectives
import caption_options
import caption_pictures
import caption_splits
import checkpoints
import consensus
import decoding_tuning
import download_datasets
import experiment_utils
import feature_cache
import flickr_image_caption as fic
import image_loading
import metrics_utils
import progress
import run_output
import score_details
from caption_decoding import Hypothesis
from reranking import index_owner

pytestmark = [
    pytest.mark.filterwarnings("error"),  # a user would see it on stderr
    pytest.mark.usefixtures("shop"),
]

ON_SAMPLE = """--dataset_type sample --encoder shufflenet_v2_x0_5 --encoder_weights random
    --num_workers 0 --freq_threshold 1 --batch_size 40 --learning_rate 0.01
    --precision float32 --max_length 12 --epochs 1"""
TINY = f"{ON_SAMPLE} --embed_size 16 --hidden_size 16 --num_layers 1"
GPT2 = "--decoder gpt2 --gpt2_model scratch --gpt2_layers 1 --gpt2_width 16 --gpt2_heads 1"
TINY_GPT2 = f"{ON_SAMPLE} {GPT2}"
BATCH_SIZE, CAPTIONS = 40, 160  # of 32 training images
STEPS = 4  # per epoch
DECODERS = {
    "lstm": "--decoder lstm",
    "attention": "--decoder attention --attention_dim 8",
    "multi_head": "--decoder attention --attention multi_head --attention_dim 8",
    "adaptive": "--decoder attention --attention adaptive --attention_dim 8",
}
ATTENTION = DECODERS["attention"]
RUN_FILES = {
    "run_config.json",
    "run_summary.txt",
    "loss_curve.json",
    "metrics_history.json",
    "metrics.csv",
    "config_snapshot.json",
    "run_summary.json",
    "sample_captions.json",
}
BEST_FILES = {"best.pt", "best_loss.pt", "best_eval.pt"}
RUN_FILES |= {"training_losses.png", "learning_rate.png", *BEST_FILES}
RUN_FILES |= {"val_examples.json", "report.html"}
EPOCH_BLOCK = re.compile(
    r"^Epoch (\d+) completed \(\1/(\d+)\):\n"
    r"  Training Loss: (\d+\.\d{5})\n"
    r"  Validation Loss: (\d+\.\d{5})\n"
    r"  Learning Rate: (\d+\.\d{6})\n"
    r"  Scheduler: (.+)\n"
    r"(?:  .+\n)*?"
    r"  Model checkpoint saved \(best: (True|False)\)\n",
    re.MULTILINE,
)


TABLE = caption_options.TABLE


class Outcome(NamedTuple):
    """What a shell sees of a command."""

    status: int
    out: str
    err: str


def program(*flags):
    """Run the program in this process. `flags`: texts that are split at spaces, and paths, which are not."""
    words = [
        word for flag in flags for word in ([str(flag)] if isinstance(flag, Path) else flag.split())
    ]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["flickr_image_caption.py", *words])
        try:
            status = fic.main(fic.parse_args(words))
        except SystemExit as stop:
            status = stop.code
    return Outcome(status, out.getvalue(), err.getvalue())


def succeed(*flags):
    """As `program`, for runs that must end well: returns what it printed on stdout."""
    outcome = program(*flags)
    assert outcome.status == 0, outcome.err
    return outcome.out


def warnings_in(outcome):
    """The lines on stderr but for the one about METEOR, which machines without pycocoevalcap have."""
    return [line for line in outcome.err.splitlines() if not line.startswith("METEOR is not")]


def run_dir(outcome):
    """The directory that a training run said it writes to."""
    out = outcome if isinstance(outcome, str) else outcome.out
    return Path(re.search(r"^run directory: (.+)$", out, re.MULTILINE)[1])


def train(*flags, tiny=TINY):
    """Train tiny; returns the run's directory."""
    return run_dir(succeed(tiny, *flags))


@functools.cache
def workshop():
    """A folder, made once, with data/sample, a feature_cache and a run of each decoder."""
    folder = tempfile.TemporaryDirectory(
        prefix="workshop"
    )  # lives as long as the process: the cache holds it
    path = Path(folder.name)
    download_datasets.draw_sample_dataset(path / "data/sample", seed=3, num_images=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        skip_plots(patch)
        share_encoders(patch)
        for decoder, flags in DECODERS.items():
            shutil.move(train(flags, "--epochs 4 --learning_rate 0.02"), path / decoder)
        shutil.move(train("--epochs 4", tiny=TINY_GPT2), path / "gpt2")
    return folder


def skip_plots(patch):
    """Each takes half a second; test_a_run_directory draws them."""
    for name in ("plot_losses", "plot_learning_rate"):
        patch.setattr(experiment_utils, name, lambda path, *_: path.touch())


BUILD_ENCODER = fic.Encoder.__init__
BUILT = {}  # the attributes of encoders by their weights, name and geometry


def share_encoders(patch):
    """Building one takes half of a run here, and it is frozen: runs with the same weights share it."""

    def build(encoder, name, state, source, *geometry, model=None):
        if type(encoder) is not fic.Encoder:  # it learns
            return BUILD_ENCODER(encoder, name, state, source, *geometry, model=model)
        try:
            weights = ((part, hash(value.numpy().tobytes())) for part, value in state.items())
            key = name, repr(model and model.configuration), *geometry, *weights
        except (AttributeError, TypeError):  # no weights, which is for the program to say
            key = object()
        if key not in BUILT:
            BUILD_ENCODER(encoder, name, state, source, *geometry, model=model)
            BUILT[key] = vars(encoder)
        vars(encoder).update({part: copy.copy(value) for part, value in BUILT[key].items()})
        return None

    patch.setattr(fic.Encoder, "__init__", build)


def enter(folder, patch):
    """Make `folder` the working folder of a test, with the workshop's data and cache, and no plots."""
    shop = Path(workshop().name)
    patch.chdir(folder)
    for name in ("data", "feature_cache"):
        (folder / name).symlink_to(shop / name)
    skip_plots(patch)
    share_encoders(patch)
    return shop


def read_json(path):
    return json.loads(Path(path).read_text())


def load(path):
    return torch.load(path, weights_only=True)


def listed(split):
    """Image names of a split, as the list beside the captions has them."""
    return Path(f"data/sample/sample.{split}Images.txt").read_text().split()


def references():
    """{image: captions} read without the program's own reader."""
    captions = {}
    with Path("data/sample/captions.txt").open() as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return captions


def own_copy(folder="data_copy"):
    """A copy of the dataset that a test may damage; returns the flags that name it."""
    shutil.copytree("data/sample", folder)
    return f"--captions_file {folder}/captions.txt --image_dir {folder}/Images"


def snapshot(folder="."):
    """{file: digest} of everything below a folder; links are not followed."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in Path(folder).glob("**/*")
        if not path.is_symlink()
    }


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_run_directory_has_its_files_and_their_keys(decoder, tmp_path, monkeypatch):
    """Draws the plots. The files were once called model_epochN.pth and best_model.pth."""
    monkeypatch.undo()  # the shortcut past the plots
    monkeypatch.chdir(tmp_path)
    flags = "--epochs 2 --use_scheduler --scheduler_type cosine"
    folder = train(DECODERS[decoder], flags)
    kind = "lstm" if decoder == "lstm" else "attention"
    assert folder.parent == Path(f"saved_models/sample/shufflenet_v2_x0_5_{kind}")
    assert re.fullmatch(rf"sample_{kind}_ep2_bs40_lr1e-02_cosine_\d{{8}}_\d{{6}}", folder.name)
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {
        "model_epoch_1.pt",
        "model_epoch_2.pt",
    }
    config = read_json(folder / "run_config.json")
    assert list(config)[: len(experiment_utils.CONFIG_KEYS)] == list(experiment_utils.CONFIG_KEYS)
    assert (
        config["decoder_type"] == kind
        and config["learning_rate"] == 0.01
        and config["drop_prob"] == 0.3
    )
    assert config.keys() >= {"git", "environment"} | TABLE.keys() - {"decoder"}
    typed = f"{TINY} {DECODERS[decoder]} {flags}"
    command = experiment_utils.launch_command(["flickr_image_caption.py", *typed.split()])
    assert shlex.split(config["command"]) == command
    assert config["command"] in (folder / "run_summary.txt").read_text()
    curve, metrics = (
        read_json(folder / "loss_curve.json"),
        read_json(folder / "metrics_history.json"),
    )
    assert list(curve) == ["epochs", "train_losses", "val_losses", "learning_rates"] and curve[
        "epochs"
    ] == [1, 2]
    assert metrics.keys() >= {
        "BLEU-1",
        "BLEU-4",
        "WER",
        "ROUGE-L",
        "CIDEr",
        "share_unique",
        "share_cut",
    }
    assert "METEOR" not in metrics and all(len(values) == 2 for values in metrics.values())
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert list(rows[0])[:5] == [
        "epoch",
        "train_loss",
        "val_loss",
        "learning_rate",
        "epoch_time_seconds",
    ]
    assert [float(row["val_loss"]) for row in rows] == curve["val_losses"]
    for name in ("training_losses.png", "learning_rate.png"):
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # ink on paper


def test_each_epoch_prints_its_block():
    out = succeed(TINY, "--epochs 2 --use_scheduler --scheduler_type cosine --scheduler_t_max 20")
    history = load(run_dir(out) / "model_epoch_2.pt")["history"]
    blocks = EPOCH_BLOCK.findall(out)
    assert [(epoch, of) for epoch, of, *_ in blocks] == [("1", "2"), ("2", "2")]
    for (_, _, train_loss, val_loss, rate, scheduler, _), row in zip(blocks, history, strict=True):
        assert float(train_loss) == pytest.approx(row["train_loss"], abs=1e-5)
        assert float(val_loss) == pytest.approx(row["val_loss"], abs=1e-5)
        assert float(rate) == pytest.approx(row["learning_rate"], abs=1e-6)
        assert scheduler == "CosineAnnealingLR (T_max=20)"
    assert blocks[0][-1] == "True"
    said = re.findall(
        r"BLEU-4 (\S+), CIDEr (\S+), (\d+)% unique, (\d+)% cut at --max_length$", out, re.MULTILINE
    )
    names = ("BLEU-4", "CIDEr", "share_unique", "share_cut")
    for values, row in zip(said, history, strict=True):
        bleu, cider, unique, cut = map(float, values)
        expected = pytest.approx([row[name] for name in names], abs=0.005)
        assert [bleu, cider, unique / 100, cut / 100] == expected


def test_nothing_but_results_on_the_streams_of_a_pipe(shop):
    """Progress bars are for terminals."""
    outcome = program("--epochs 1 --model_path", shop / "lstm/model_epoch_4.pt")
    assert outcome.status == 0 and outcome.err == "" and "\r" not in outcome.out


def test_captions_that_all_look_alike_are_warned_of(monkeypatch):
    """Blind decoder: every feature is 0, so all images are alike."""
    monkeypatch.setattr(
        fic.Encoder, "forward", lambda self, images: torch.zeros(len(images), 49, self.channels)
    )
    outcome = program(TINY, "--no_feature_cache")
    assert outcome.status == 0 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("warning: every validation image got the same caption")
    assert read_json(run_dir(outcome) / "metrics_history.json")["share_unique"] == [0.25]
    assert "25% unique" in outcome.out


def test_the_size_that_checkpoints_take_is_said_at_the_start():
    out = succeed(TINY, "--embed_size 256 --hidden_size 300 --epochs 3 --keep_checkpoints 2")
    said = re.search(
        r"checkpoints will take (\d+) MiB at most, ([\d,]+) MiB are free: (\d+) MiB", out
    )
    files = {path.name: path for path in run_dir(out).glob("*.pt")}
    assert files.keys() == {"model_epoch_2.pt", "model_epoch_3.pt", *BEST_FILES}
    encoder = sum(t.nbytes for t in load(files["best.pt"])["encoder"]["weights"].values())
    each = files["best.pt"].stat().st_size - encoder
    # two that are kept, and two of best epochs before these, which all but one may hold the encoder
    assert int(said[1]) == pytest.approx((4 * each + 3 * encoder) / 2**20, rel=0.1)
    assert int(said[2].replace(",", "")) == pytest.approx(
        shutil.disk_usage(".").free / 2**20, rel=0.1
    )
    assert int(said[3]) == pytest.approx(each / 2**20, abs=1)
    assert out.index("checkpoints will take") < out.index("Epoch 1") and "--keep_checkpoints" in out


def test_a_run_whose_checkpoints_do_not_fit_stops_before_it_makes_a_folder(monkeypatch):
    little = shutil._ntuple_diskusage(10**9, 10**9, 200_000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: little)
    outcome = program(TINY, "--epochs 30")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert (
        "--model_save_dir ./saved_models: the checkpoints to keep (30) and best.pt need"
        in outcome.err
    )
    assert "0.00 GB are free; give --keep_checkpoints N" in outcome.err
    assert not Path("saved_models").exists()


def test_the_best_epochs_checkpoint_is_written_once(monkeypatch):
    replace_cider(monkeypatch, iter([0.1, 0.3, 0.2]))
    replace_losses(monkeypatch, [3.0, 3.1, 2.9])
    folder = train("--epochs 3")
    best, of_loss, first, second, third = (
        folder / name
        for name in ("best.pt", "best_loss.pt", *(f"model_epoch_{n}.pt" for n in (1, 2, 3)))
    )
    assert best.samefile(second) and best.samefile(folder / "best_eval.pt")
    assert of_loss.samefile(third)
    assert [path.stat().st_nlink for path in (first, second, third)] == [1, 3, 2]
    assert [load(path)["epoch"] for path in (first, second, third)] == [1, 2, 3]


@pytest.mark.parametrize("decoder", DECODERS)
def test_losses_are_plain_cross_entropy_in_nats_per_token(decoder):
    """Neither label smoothing nor the attention penalty is in them.

    Recomputed here, caption by caption, from the weights of a run whose only step is too small to
    change them.
    """
    penalty = "--alpha_c 3" if decoder == "attention" else ""
    flags = "--label_smoothing 0.2 --drop_prob 0 --batch_size 160 --learning_rate 1e-12"
    folder = train(DECODERS[decoder], flags, penalty)
    model, vocabulary, encoder = opened(folder / "best.pt")
    for split, name in (("dev", "val_loss"), ("train", "train_loss")):
        total, tokens = 0.0, 0
        for image in listed(split):
            features = encode(encoder, f"data/sample/Images/{image}")
            features = features.half().float()  # as the cache has them
            for text in references()[image]:
                words = vocabulary.encode(text)[:11]
                logits = teacher_forced(model, features, [vocabulary.sos, *words])
                targets = torch.tensor([*words, vocabulary.eos])
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
                tokens += len(targets)
        expected = pytest.approx(total / tokens, rel=1e-4)
        assert load(folder / "best.pt")["history"][0][name] == expected


def opened(path):
    """(decoder in eval mode, vocabulary, encoder) of a checkpoint, put together by hand."""
    state = load(path)
    config, encoder = state["config"], state["encoder"]
    vocabulary = caption_batches.Vocabulary.from_plain(state["vocabulary"])
    decoder_class = fic.decoder_class(config)
    sizes = {name: config[name] for name in decoder_class.options}
    decoder = decoder_class(encoder["channels"], len(vocabulary), **sizes)
    decoder.load_state_dict(state["model"])
    return decoder.eval(), vocabulary, fic.Encoder(config["encoder"], encoder["weights"], path)


def teacher_forced(decoder, features, tokens):
    """Logits (T, V) of what follows each of `tokens`, by the training pass over one caption."""
    alone = torch.zeros(len(tokens), dtype=torch.long)
    batch = caption_batches.Batch(
        image_rows=alone[:1],
        image_index=alone[:1],
        caption_index=alone,
        image_tokens=torch.arange(len(tokens)).unsqueeze(0),
        token_place=torch.arange(len(tokens)),
        inputs=torch.tensor(tokens),
        targets=alone,  # not looked at
        batch_sizes=torch.ones_like(alone),
        num_tokens=len(tokens),
        num_captions=1,
        weight=1.0,
    )
    with torch.no_grad():
        return decoder(features, batch)[0]


def encode(encoder, path):
    """A picture file -> features (1, P, F)."""
    pixels = torch.from_numpy(image_loading.load_image(path, encoder.image_size)).permute(2, 0, 1)
    return encoder(pixels.unsqueeze(0))


def test_ties_of_cider_go_to_the_lower_validation_loss(monkeypatch):
    """Captions of small datasets score 0 for epochs while the loss falls."""
    replace_cider(monkeypatch, itertools.repeat(0.0))
    replace_losses(monkeypatch, [3.0, 2.0, 2.0])
    out = succeed(TINY, "--epochs 4 --early_stopping_patience 2")
    assert load(run_dir(out) / "best.pt")["epoch"] == 2
    assert [best for *_, best in EPOCH_BLOCK.findall(out)] == ["True", "True", "False"]
    assert "stopped early: no better CIDEr for 2 epochs" in out


def test_best_pt_is_the_highest_validation_cider(monkeypatch):
    scores = iter([0.2, 0.9, 0.9, 0.4])
    replace_cider(monkeypatch, scores)
    out = succeed(TINY, "--epochs 4")
    state = load(run_dir(out) / "best.pt")
    assert state["epoch"] == 2 and state["best_score"] == 0.9
    assert [best for *_, best in EPOCH_BLOCK.findall(out)] == ["True", "True", "False", "False"]
    assert load(run_dir(out) / "model_epoch_4.pt")["best_score"] == 0.9  # the best, not the latest


def epochs_of(folder):
    """The epochs of best.pt, best_loss.pt and best_eval.pt."""
    return [load(folder / name)["epoch"] for name in ("best.pt", "best_loss.pt", "best_eval.pt")]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", [2, 3, 2]),  # by CIDEr
        ("--select_by loss", [3, 3, 2]),
        ("--select_by bleu4", [4, 3, 4]),
        ("--select_by meteor-centric", [1, 3, 1]),
    ],
)
def test_best_pt_is_what_the_rule_chooses_beside_the_lowest_loss(flags, expected, monkeypatch):
    replace_losses(monkeypatch, [3.0, 2.8, 2.6, 2.7])
    others = {"ROUGE-L": 0.3, "BLEU-1": 0.5, "BLEU-2": 0.3}
    table = zip((0.2, 0.9, 0.5, 0.4), (0.10, 0.12, 0.11, 0.13), (0.30, 0.2, 0.2, 0.2), strict=True)
    rows = [dict(zip(("CIDEr", "BLEU-4", "METEOR"), row, strict=True)) | others for row in table]
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: "tables")
    replace_scores(monkeypatch, *rows)
    monkeypatch.setattr(metrics_utils, "find_meteor_tables", lambda: None)
    out = succeed(TINY, "--epochs 4", flags)
    folder = run_dir(out)
    assert epochs_of(folder) == expected
    summary = read_json(folder / "run_summary.json")
    assert summary["best_metrics"]["epoch"] == expected[0]
    said = {"": "best CIDEr 0.9000: ", "--select_by loss": "best validation loss 2.6000: "}
    said |= {"--select_by bleu4": "best BLEU-4 0.1300: "}
    assert said.get(flags, "best METEOR (meteor-centric) 0.3000: ") + str(folder / "best.pt") in out
    other, file = (
        ("CIDEr 0.9000", "best_eval.pt") if "loss" in flags else ("loss 2.6000", "best_loss.pt")
    )
    assert f"{other}: {folder / file}" in out


def test_meteor_is_computed_only_where_the_rule_looks_at_it(monkeypatch, tables):
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: tables)
    row, with_meteor = (
        load(train(flags) / "best.pt")["history"][0] for flags in ("", "--select_by pareto")
    )
    assert "METEOR" not in row and 0 <= with_meteor["METEOR"] <= 1


def test_without_its_tables_a_rule_that_needs_meteor_is_refused(monkeypatch):
    monkeypatch.setattr(metrics_utils, "find_tables", lambda: None)
    before = snapshot()
    outcome = program(TINY, "--select_by multi-criteria")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "--select_by multi-criteria needs METEOR's tables: pip install" in outcome.err
    assert snapshot() == before


def test_early_stopping_counts_what_the_rule_calls_better(monkeypatch):
    replace_losses(monkeypatch, [3.0, 2.9, 2.95, 2.96])
    replace_cider(monkeypatch, itertools.count(1.0))  # CIDEr rises for ever
    out = succeed(TINY, "--epochs 6 --select_by loss --early_stopping_patience 2")
    assert "stopped early: no better validation loss for 2 epochs" in out
    assert len(EPOCH_BLOCK.findall(out)) == 4


@pytest.mark.parametrize("name", ["best_loss.pt", "best_eval.pt"])
def test_each_best_file_is_tested_and_captions_where_there_is_nothing_else(name, shop, monkeypatch):
    images = [Path("data/sample/Images") / image for image in listed("test")]
    Path("alone").mkdir()
    replace_losses(monkeypatch, [3.0, 2.0])
    replace_cider(monkeypatch, iter([0.9, 0.1]))
    shutil.copy(train("--epochs 2") / name, "alone")
    out = succeed("--mode test --model_path", Path("alone", name))
    assert (Path("alone") / "test_metrics.json").is_file() and "CIDEr" in out
    assert (
        len(
            succeed(
                "--mode caption --model_path", Path("alone", name), "--images", *images
            ).splitlines()
        )
        == 4
    )


def test_a_folder_means_best_pt_and_a_name_that_is_not_there_is_looked_for(shop, monkeypatch):
    replace_losses(monkeypatch, [3.0, 2.0])
    replace_cider(monkeypatch, iter([0.9, 0.1]))
    folder = train("--epochs 2")
    flat = folder.parent
    assert checkpoints.resolve_checkpoint(flat) == folder / "best.pt"
    assert checkpoints.resolve_checkpoint(flat, "newest") == folder / "model_epoch_2.pt"
    for name in ("best_loss.pt", "best_eval.pt"):
        assert checkpoints.resolve_checkpoint(flat / name) == folder / name
    (folder / "model_epoch_1.pt").unlink()
    (folder / "model_epoch_2.pt").unlink()
    assert checkpoints.resolve_checkpoint(flat, "newest") == folder / "best.pt"


def two_epochs(patch):
    """The folder of a run whose CIDEr and loss are best in epoch 1, its BLEU-4 in epoch 2."""
    replace_losses(patch, [2.0, 3.0, 3.0])
    replace_scores(
        patch, *({"CIDEr": c, "BLEU-4": b} for c, b in ((0.9, 0.1), (0.5, 0.3), (0.6, 0.2)))
    )
    return train("--epochs 2")


@pytest.mark.parametrize("kept", ["all", "best files"])
def test_another_rule_on_resume_begins_with_what_it_chooses_of_the_history(kept, monkeypatch):
    first = two_epochs(monkeypatch)
    start = first / "model_epoch_2.pt"
    if kept == "best files":  # of which none is of epoch 2
        state = load(start)
        state["epoch"], state["data_position"]["captions"] = 2, BATCH_SIZE
        start = Path("moved.pt")
        torch.save(state, start)
    out = succeed("--select_by bleu4 --epochs 1 --model_path", start)
    folder = run_dir(out)
    assert "--select_by bleu4 is new to this run: its best epoch so far is 2" in out
    best = load(folder / "best.pt")
    if kept == "all":
        assert epochs_of(folder) == [2, 1, 2]
        assert best["encoder"]["weights"] and best["splits"]["test"] == listed("test")
        assert not list(differences(best["model"], load(first / "model_epoch_2.pt")["model"]))
        assert (
            load(folder / "model_epoch_3.pt")["early_stopping"]["epochs_without_improvement"] == 1
        )
        Path("alone").mkdir()
        shutil.copy(folder / "best.pt", "alone")
        succeed("--mode test --model_path alone/best.pt")
    else:
        assert "the best epoch is chosen anew" in out and best["epoch"] == 3


def test_a_checkpoint_from_before_there_was_a_choice_goes_on(monkeypatch):
    first = two_epochs(monkeypatch)
    Path("old").mkdir()
    for name in ("best.pt", "model_epoch_2.pt"):
        state = load(first / name)
        del state["selection"], state["config"]["select_by"]
        torch.save(state, Path("old", name))
    out = succeed("--epochs 1 --model_path old/model_epoch_2.pt")
    assert "anew" not in out and epochs_of(run_dir(out)) == [1, 1, 1]
    state = load(run_dir(out) / "model_epoch_3.pt")
    assert state["best_score"] == 0.9 and state["early_stopping"]["best_loss"] == 2.0
    assert state["early_stopping"]["epochs_without_improvement"] == 2


@pytest.mark.parametrize("done", range(3))
def test_a_run_that_is_killed_between_an_epochs_files_goes_on_with_its_best(done, monkeypatch):
    """Each file is whole at any time, and some file of the best epoch is there."""

    class Killed(BaseException):
        pass

    original, number = checkpoints.link_file, itertools.count()

    def link_file(source, path):
        if next(number) == 3 + done:  # after the first epoch's three, and some of the second's
            raise Killed
        original(source, path)

    replace_losses(monkeypatch, [3.0, 2.0, 2.5])
    replace_cider(monkeypatch, iter([0.1, 0.9, 0.5]))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "link_file", link_file)
        train("--epochs 2")
    (folder,) = Path("saved_models").glob("*/*/*")
    for path in folder.glob("*.pt"):
        checkpoints.load_checkpoint(path)
    out = succeed("--resume latest --epochs 1")
    assert epochs_of(run_dir(out)) == [2, 2, 2] and "anew" not in out


def test_where_stderr_is_no_terminal_lines_tell_how_far_it_is(monkeypatch):
    """Half a minute apart; here as often as something is done."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    outcome = program(TINY, "--epochs 2 --cache_dir own")
    lines, run = [], r", \d\d:\d\d in the run"
    for title, total, unit, left in (
        ("encoding train images", 32, "images", ""),
        ("encoding val images", 4, "images", ""),
        ("epoch 1", STEPS, "captions", run),
        ("epoch 1 validation loss", 1, "captions", ""),
        ("epoch 1 validation captions", 4, "images", ""),
        ("epoch 2 validation captions", 4, "images", ""),
    ):
        line = rf"^{title}: {total}/{total}, \S+ {unit}/s, 00:00 left{left}$"
        lines.append(re.search(line, outcome.err, re.MULTILINE).start())
    assert lines == sorted(lines)
    monkeypatch.setattr(fic, "READ_LOSS_EVERY", 1)
    checked = program(TINY, "--epochs 1 --no_feature_cache")
    assert "\nchecking val images: 4/4, " in checked.err
    assert re.search(r"^epoch 1: 3/4, loss=\d\.\d{3}, .* left$", checked.err, re.MULTILINE)
    tested = program("--mode test --cache_dir own --model_path", run_dir(outcome))
    assert "\ntesting: 4/4, " in tested.err and "encoding test images: 4/4, " in tested.err


def test_each_epoch_says_how_long_it_took_and_shows_the_same_caption(shop):
    out = succeed(TINY, DECODERS["lstm"], "--epochs 3")
    folder, name = run_dir(out), listed("dev")[0]
    ends = re.findall(
        rf"\(best: \w+\)\n  Time: (\d+\.\d) s(, about 00:\d\d left)?\n"
        rf"  First validation image {name}: (.*)\n",
        out,
    )
    seconds = [row["epoch_time_seconds"] for row in load(folder / "best.pt")["history"]]
    assert len(ends) == 3 and [bool(left) for _, left, _ in ends] == [True, True, False]
    assert [float(time) for time, *_ in ends][: len(seconds)] == [round(s, 1) for s in seconds]
    path = f"data/sample/Images/{name}"
    model = folder / "model_epoch_3.pt"
    caption = "--mode caption --algorithm greedy --encoder_weights random --images"
    assert succeed(caption, path, "--model_path", model) == f"{path}\t{ends[-1][2]}\n"


def replace_losses(patch, losses):
    """Replace each epoch's validation loss by the next of `losses`."""
    losses = iter(losses)
    patch.setattr(fic, "validation_loss", lambda run, received: next(losses))


def replace_scores(patch, *rows):
    """Replace scores of each epoch's validation captions by those of the next of `rows`."""
    original, rows = fic.validation_scores, iter(rows)
    patch.setattr(fic, "validation_scores", lambda *args: original(*args) | next(rows))


def replace_cider(patch, scores):
    """Replace each epoch's validation CIDEr by the next of `scores`."""
    original = fic.validation_scores
    patch.setattr(fic, "validation_scores", lambda *args: original(*args) | {"CIDEr": next(scores)})


def test_training_reads_no_image_once_they_are_in_the_cache_and_the_encoder_rests(monkeypatch):
    def never(*_):
        raise AssertionError("an image was read or encoded a second time")

    monkeypatch.setattr(fic.Encoder, "forward", never)
    monkeypatch.setattr(image_loading, "load_image", never)
    train()
    train(ATTENTION)


@pytest.mark.parametrize("decoder", DECODERS)
def test_without_the_cache_features_are_the_same_up_to_float16(decoder):
    flags = f"{DECODERS[decoder]} --learning_rate 0.001"  # at 0.01 dot products blow rounding up
    cached, fresh = train(flags), train(flags, "--no_feature_cache")
    for one, other in zip(
        load(cached / "best.pt")["history"], load(fresh / "best.pt")["history"], strict=True
    ):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
    rows, paths = torch.arange(4), [Path(f"data/sample/Images/{name}") for name in listed("test")]
    features = []
    for cache_dir in ("feature_cache", None):
        source = feature_cache.FeatureSource(
            opened(cached / "best.pt")[2],
            paths,
            pooled=decoder == "lstm",
            cache_dir=cache_dir,
            dtype=torch.float16,
            num_workers=0,
            device=torch.device("cpu"),
        )
        features.append(next(source.stream([rows])))
    assert features[0].shape == (4, 1 if decoder == "lstm" else 49, 1024)
    torch.testing.assert_close(*features, rtol=2e-3, atol=1e-4)
    assert not torch.equal(*features)  # it did encode anew


# ----------------------------------------------------------------------------------------- what training may look at


def test_no_validation_or_test_image_is_trained_on(monkeypatch):
    """The split was once drawn over caption rows: a validation image's other captions were trained on."""
    seen, original = set(), fic.train_step

    def train_step(run, features, batch):
        paths = run.training.features.paths
        seen.update(paths[row].name for row in batch.image_rows.tolist())
        return original(run, features, batch)

    monkeypatch.setattr(fic, "train_step", train_step)
    train()
    assert seen == set(listed("train"))
    assert not seen & {*listed("dev"), *listed("test")}


def test_the_vocabulary_comes_from_training_captions_alone():
    flags, held_out = own_copy(), {*listed("dev"), *listed("test")}
    with Path("data_copy/captions.txt").open("a") as file:
        rows = csv.writer(file)
        for image in references():
            rows.writerow(
                [image, "zebra zebra zebra" if image in held_out else "okapi okapi okapi"]
            )
    words = load(train(flags) / "best.pt")["vocabulary"]["words"]
    assert "okapi" in words and "zebra" not in words
    assert words[:4] == ["<PAD>", "<SOS>", "<EOS>", "<UNK>"]


def test_the_vocabularys_origin_is_said(shop):
    """A resumed run has the checkpoint's words, whatever captions it trains on."""
    counts = collections.Counter()
    for image in listed("train"):
        for text in references()[image]:
            counts.update(caption_batches.tokenize(text))
    kept = sum(count >= 20 for count in counts.values())
    assert 0 < kept < len(counts)
    seen = "seen 20 times or more in 160 training captions\n"
    assert f"vocabulary: {kept} words, {seen}" in succeed(TINY, "--freq_threshold 20")
    path = shop / "lstm/best.pt"
    resumed = succeed("--max_train_images 20 --epochs 1 --model_path", path)
    assert f"vocabulary: {len(counts)} words, those of {path}\n" in resumed


def test_validation_scores_go_by_image(monkeypatch):
    """References were once those of other images. Here each image's own first caption is decoded."""
    flags = own_copy()
    header, *captions = Path("data_copy/captions.txt").read_text().splitlines()
    Path("data_copy/captions.txt").write_text("\n".join([header, *reversed(captions)]) + "\n")
    names, set_up = [], fic.set_up

    def caption_features(captioner, *_):
        for name in names:
            words = captioner.vocabulary.encode(references()[name][0])
            yield [Hypothesis(words, -1.0, -1.0, True, None)]

    def set_up_and_look(*args):
        run = set_up(*args)
        names.extend(path.name for path in run.validation.features.paths)
        return run

    monkeypatch.setattr(fic.Captioner, "caption_features", caption_features)
    monkeypatch.setattr(fic, "set_up", set_up_and_look)
    folder = train(flags)
    assert sorted(names) == sorted(listed("dev"))
    history = read_json(folder / "metrics_history.json")
    assert history["BLEU-4"] == [1.0] and history["WER"] == [0.0]


@pytest.mark.parametrize("name", ["best.pt", "model_epoch_4.pt"])
def test_a_checkpoint_is_plain_and_holds_every_hyperparameter(name, shop):
    """attention_dim and drop_prob were once missing, and a pickled class of __main__ was inside."""
    state = torch.load(shop / "attention" / name, weights_only=True)
    assert state.keys() == checkpoints.CHECKPOINT_KEYS.keys() | {"format_version", "selection"}
    assert state["format_version"] == 5 and state["config"].keys() == TABLE.keys()
    assert state["config"]["attention_dim"] == 8 and state["config"]["drop_prob"] == 0.3
    assert state["early_stopping"].keys() == {"best_loss", "epochs_without_improvement"}
    assert state["encoder"]["name"] == "shufflenet_v2_x0_5"
    assert state["encoder"]["image_size"] == 224
    splits = {"train": listed("train"), "val": listed("dev"), "test": listed("test")}
    digests = state["splits"].pop("digests", None)
    best_files = (shop / "attention" / best for best in BEST_FILES)
    is_best = any(map((shop / "attention" / name).samefile, best_files))
    assert (state["encoder"]["weights"] is not None) == is_best
    if is_best:
        assert state["splits"] == splits
        assert {split: len(digests[split]) for split in splits} == {
            "train": 32,
            "val": 4,
            "test": 4,
        }
    else:  # a million names would be as large as the model
        assert state["splits"] == {"sha256": caption_splits.splits_sha256(splits)}
    assert {type(value).__module__ for value in leaves(state)} <= {"builtins", "torch"}


def test_training_leaves_the_encoder_as_it_was(shop):
    """BatchNorm's statistics once drifted during training."""
    initial = download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", 0)
    trained = load(shop / "attention/best.pt")["encoder"]["weights"]
    assert trained and all(torch.equal(value, initial[key]) for key, value in trained.items())


def leaves(value):
    """Every value in nested dictionaries, lists and tuples."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def test_images_that_cannot_be_read_are_named_and_skipped_or_stop_the_run_before_training():
    flags = own_copy()
    broken = listed("train")[0], listed("dev")[0]
    for name in broken:
        Path(f"data_copy/Images/{name}").write_bytes(b"no picture")
    for cache in ("--cache_dir own_cache", "--no_feature_cache"):
        outcome = program(TINY, flags, cache, "--max_bad_fraction 0.04")
        assert outcome.status == 2 and outcome.err.count("\n") == 1
        assert not Path("saved_models").exists()
        assert "2 of 40 images" in outcome.err and all(name in outcome.err for name in broken)
    outcome = program(TINY, flags, "--cache_dir own_cache --max_bad_fraction 0.05")
    assert outcome.status == 0 and "2 of 40 images skipped" in outcome.out
    splits = load(run_dir(outcome) / "best.pt")["splits"]
    assert len(splits["train"]) == 31 and len(splits["val"]) == 3
    assert not set(broken) & {*splits["train"], *splits["val"]}


def test_without_a_cache_a_bad_image_is_left_out_and_no_image_is_checked_twice(monkeypatch):
    flags, checked, original = own_copy(), [], image_loading.open_image
    (broken, *others) = listed("train")
    Path(f"data_copy/Images/{broken}").write_bytes(b"no picture")

    def open_image(path, content=None, size=None):
        checked.extend([path.name] * (size == 8))  # the size at which images are checked
        return original(path, content, size)

    monkeypatch.setattr(image_loading, "open_image", open_image)
    outcome = program(TINY, flags, "--no_feature_cache --max_bad_fraction 0.05")
    assert outcome.status == 0 and "1 of 40 images skipped" in outcome.out
    assert sorted(checked) == sorted([broken, *others, *listed("dev")])
    assert load(run_dir(outcome) / "best.pt")["splits"]["train"] == others


# ------------------------------------------------------------------------------------------------------------- resume

SCHEDULERS = {
    "none": "",
    "plateau": "--use_scheduler --scheduler_type reduce_lr_on_plateau --scheduler_patience 0 --scheduler_factor 0.3",
    "step": "--use_scheduler --scheduler_type step --scheduler_step_size 2",
    "cosine": "--use_scheduler --scheduler_type cosine --scheduler_t_max 3",
    "exponential": "--use_scheduler --scheduler_type exponential --scheduler_gamma 0.7",
    "one_cycle": "--use_scheduler --scheduler_type one_cycle --warmup_epochs 1",
}


@functools.cache
def straight_run(decoder, scheduler):
    """The folder, kept in the workshop, of a run of three epochs that was never stopped."""
    folder = Path(workshop().name) / f"straight_{decoder}_{scheduler}"
    shutil.move(train(DECODERS[decoder], f"--epochs 3 {SCHEDULERS[scheduler]}"), folder)
    return folder


def rates_of(folder):
    """The learning rate of each epoch of a run."""
    return read_json(folder / "loss_curve.json")["learning_rates"]


def stopped(*flags, at_step, signum=signal.SIGINT):
    """Train and send a signal while step `at_step` of this process is computed; returns the outcome."""
    steps, original = itertools.count(1), fic.train_step

    def train_step(run, features, batch):
        if next(steps) == at_step:
            os.kill(os.getpid(), signum)
        return original(run, features, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fic, "train_step", train_step)
        return program(*flags)


def differences(one, other, place=""):
    """Where two checkpoints differ, bit for bit; times and the paths of the run aside."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key not in ("epoch_time_seconds", "seconds", "model_path", "resume", "epochs"):
                yield from differences(one.get(key), other.get(key), f"{place}/{key}")
    elif (
        isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other)
    ):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}/{number}")
    elif isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield place
    elif one != other:
        yield f"{place}: {one} != {other}"


@pytest.mark.parametrize(
    "decoder, scheduler", [*(("lstm", name) for name in SCHEDULERS), ("attention", "one_cycle")]
)
def test_stop_and_go_on_equals_straight_through(decoder, scheduler):
    """Stopped inside epoch 2, resumed, stopped again, resumed. Each schedule goes on as it was."""
    flags = f"{DECODERS[decoder]} --epochs 3 {SCHEDULERS[scheduler]}"
    straight = straight_run(decoder, scheduler)
    first = stopped(TINY, flags, at_step=STEPS + 2)
    assert first.status == 130
    last = run_dir(first) / "last.pt"
    assert (
        load(last)["epoch"] == 1
        and load(last)["step"] == STEPS + 2
        and load(last)["data_position"]["captions"] == 2 * BATCH_SIZE
    )
    second = stopped("--model_path", last, at_step=1, signum=signal.SIGTERM)
    assert second.status == 143
    third = run_dir(succeed("--model_path", run_dir(second) / "last.pt"))
    assert not list(
        differences(load(straight / "model_epoch_3.pt"), load(third / "model_epoch_3.pt"))
    )
    assert not list(differences(load(straight / "best.pt"), load(third / "best.pt")))
    assert len(load(third / "model_epoch_3.pt")["history"]) == 3


@pytest.mark.parametrize("reading", ["", "--prefix_length 2"])
def test_gpt2_goes_on_as_if_it_had_never_been_stopped_and_serves_every_mode(reading):
    """In parts of a batch and with layers that are computed twice: it is the same run bit for bit."""
    flags = (
        f"{TINY_GPT2} {reading} --epochs 2 --gradient_accumulation_steps 2 --gradient_checkpointing"
    )
    straight = run_dir(succeed(flags))
    last = run_dir(stopped(flags, at_step=STEPS + 2)) / "last.pt"
    resumed = run_dir(succeed("--model_path", last))
    assert not list(differences(load(straight / "best.pt"), load(resumed / "best.pt")))
    method = "gradient" if reading else "attention"
    succeed(f"--mode test --save_attention_viz --viz_method {method} --model_path", straight)
    assert read_json(straight / "test_metrics.json")["attention"]["method"] == method
    assert len(list(straight.glob("attention_viz_sample_*.png"))) == 3
    succeed("--mode tune --model_path", straight)
    reward = succeed("--epochs 0 --scst_epochs 1 --model_path", straight / "model_epoch_2.pt")
    assert "Training Reward" in reward


def test_every_caption_is_seen_once_when_an_epoch_goes_on_in_batches_of_another_size(monkeypatch):
    first = stopped(TINY, at_step=3)
    seen, original = [], fic.train_step

    def train_step(run, features, batch):
        seen.append(batch)
        return original(run, features, batch)

    monkeypatch.setattr(fic, "train_step", train_step)
    out = succeed("--model_path", run_dir(first) / "last.pt", "--batch_size 30")
    assert f"epoch 1, {3 * BATCH_SIZE} of {CAPTIONS} captions seen" in out
    assert [batch.num_captions for batch in seen] == [30, 10]
    words = [sorted(batch.targets.tolist()) for batch in seen]
    seen.clear()
    train("--batch_size 10")  # of the same order
    assert sorted(words[0]) == sorted(word for b in seen[12:15] for word in b.targets.tolist())
    assert words[1] == sorted(seen[15].targets.tolist())


@pytest.mark.parametrize("typed", ["--seed 5", "--max_train_images 20"])
def test_an_epoch_does_not_go_on_in_another_order(typed, shop):
    torch.save(load(shop / "lstm/best.pt")["encoder"]["weights"], "encoder.pth")  # of no seed
    first = stopped(TINY, "--encoder_weights encoder.pth --epochs 2", at_step=STEPS + 3)
    last, whole = run_dir(first) / "last.pt", run_dir(first) / "model_epoch_1.pt"
    before = snapshot()
    outcome = program("--model_path", last, typed)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert typed.split()[0] in outcome.err and "model_epoch_N.pt" in outcome.err
    assert snapshot() == before
    succeed("--model_path", whole, typed)


def test_a_checkpoint_of_format_version_4_goes_on(shop):
    """It counted batches, and knew neither the best loss nor the batches of its plan."""
    state = load(run_dir(stopped(TINY, "--epochs 2", at_step=STEPS + 3)) / "last.pt")
    position, early = state["data_position"], state["early_stopping"]
    state["format_version"], position["batch"] = 4, position.pop("captions") // BATCH_SIZE
    del position["order"], early["best_loss"], state["plan"]["batches"]
    torch.save(state, "old.pt")
    out = succeed("--model_path old.pt")
    assert f"epoch 2, {3 * BATCH_SIZE} of {CAPTIONS} captions seen" in out
    assert [number for number, *_ in EPOCH_BLOCK.findall(out)] == ["2"]
    planned = "--epochs 2 --use_scheduler --scheduler_type one_cycle"
    anew = load(run_dir(succeed("--model_path old.pt", planned)) / "model_epoch_3.pt")
    assert anew["plan"]["steps"] == 1 + STEPS  # what is left of epoch 2, and epoch 3


def test_each_schedule_changes_the_rate_as_documented(monkeypatch):
    """one_cycle moves with each step; it was once built for steps, but moved with each epoch."""
    rates = {name: rates_of(straight_run("lstm", name)) for name in SCHEDULERS}
    seen, original = [], fic.train_step

    def train_step(run, features, batch):
        seen.append(run.state.optimizer.param_groups[0]["lr"])
        return original(run, features, batch)

    monkeypatch.setattr(fic, "train_step", train_step)
    train(f"--epochs 3 {SCHEDULERS['one_cycle']}")
    assert rates["none"] == [0.01] * 3 and rates["exponential"] == pytest.approx(
        [0.01, 0.007, 0.0049]
    )
    assert rates["step"] == pytest.approx([0.01, 0.01, 0.001])
    assert rates["cosine"] == pytest.approx([0.01, 0.0075, 0.0025], rel=1e-3)
    assert (
        rates["one_cycle"] == [seen[0], seen[STEPS], seen[2 * STEPS]]
        and len(set(seen)) == 3 * STEPS
    )
    assert seen[0] == pytest.approx(0.01 / 25) and max(seen) == pytest.approx(
        0.01
    ) == pytest.approx(seen[3])
    assert seen[-1] == pytest.approx(0.01 / 25 / 1e4)


@pytest.mark.parametrize("part", ["validation_loss", "validation_scores"])
def test_a_stop_during_validation_validates_again(part, monkeypatch):
    straight = train("--epochs 2")
    original, calls = getattr(fic, part), itertools.count(1)

    def stopping(run, received):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, received)

    monkeypatch.setattr(fic, part, stopping)
    outcome = program(TINY, "--epochs 2")
    assert outcome.status == 143
    assert load(run_dir(outcome) / "last.pt")["data_position"]["captions"] == CAPTIONS
    resumed = run_dir(succeed("--resume", run_dir(outcome) / "last.pt"))
    one, other = (load(folder / "model_epoch_2.pt") for folder in (straight, resumed))
    assert not list(differences(one, other))


@pytest.mark.parametrize("decoder", DECODERS)
def test_units_that_are_hidden_between_steps_are_the_same_after_a_stop(decoder):
    flags = f"{DECODERS[decoder]} --recurrent_dropout 0.4 --epochs 2"
    straight, first = train(flags), stopped(TINY, flags, at_step=STEPS + 2)
    resumed = run_dir(succeed("--resume", run_dir(first) / "last.pt"))
    one, other = (load(folder / "model_epoch_2.pt") for folder in (straight, resumed))
    assert not list(differences(one, other))


@pytest.mark.slow
@pytest.mark.parametrize("begins", ["", "--fine_tune_after 1"])
def test_random_crops_go_on_as_if_training_had_not_been_stopped(begins):
    """Stopped inside an epoch and at the border before it: the crops are the epoch's own, past the cache."""
    flags = f"{ATTENTION} --fine_tune_encoder 2 --encoder_learning_rate 0.01 --random_crop"
    flags += f" --horizontal_flip --epochs 2 {begins}"
    straight = train(flags)
    halted = stopped(TINY, flags, at_step=STEPS + 2)
    inside, border = (run_dir(halted) / name for name in ("last.pt", "model_epoch_1.pt"))
    assert halted.status == 130 and load(inside)["data_position"]["captions"] == 2 * BATCH_SIZE
    expected, begun = (load(straight / f"model_epoch_{epoch}.pt") for epoch in (2, 1))
    for path in (inside, border):
        resumed = run_dir(succeed("--model_path", path))
        assert not list(differences(expected, load(resumed / "model_epoch_2.pt")))
    weights = expected["encoder"]["weights"]
    assert any(
        not torch.equal(begun["encoder"]["weights"][name], weights[name]) for name in weights
    )
    uncropped = load(train(flags.replace("--random_crop", "")) / "model_epoch_2.pt")
    assert any(differences(expected["model"], uncropped["model"]))


def test_a_run_that_fine_tunes_its_encoder_goes_on_and_is_tested_as_it_was_left():
    """From cached features of the frozen blocks; with other weights than the ones it began with."""
    flags = f"{ATTENTION} --fine_tune_encoder 2 --encoder_learning_rate 0.01 --horizontal_flip"
    flags += " --epochs 2 --fine_tune_after 1"
    straight = train(flags)
    first = stopped(TINY, flags, at_step=STEPS + 2)
    resumed = run_dir(succeed("--resume", run_dir(first) / "last.pt"))
    one, other = (load(folder / "model_epoch_2.pt") for folder in (straight, resumed))
    assert not list(differences(one, other))
    begun = load(straight / "model_epoch_1.pt")["encoder"]["weights"]
    changed = {
        name for name in begun if not torch.equal(begun[name], one["encoder"]["weights"][name])
    }
    assert {name.split(".")[0] for name in changed} == {"conv5", "stage4"}
    seeds = "--seeds", straight / "model_epoch_1.pt"  # whose encoder has learnt less
    alike = program(
        "--mode test --output_dir seeds --model_path", straight / "model_epoch_2.pt", *seeds
    )
    assert alike.status == 0 and not warnings_in(alike)
    succeed("--mode test --precision float32 --model_path", straight / "model_epoch_2.pt")
    rows = {row["file_name"]: row for row in read_json(straight / "test_captions.json")}
    captioner, options = fic.load_captioner(straight / "model_epoch_2.pt", "cpu", "float32")
    names = sorted(rows)
    paths = [Path("data/sample/Images") / name for name in names]
    for name, (best, *_) in zip(names, captioner.caption(paths, options.decoding), strict=True):
        assert captioner.vocabulary.decode(best.tokens) == rows[name]["caption"]
        assert best.log_prob == pytest.approx(rows[name]["log_prob"], abs=0.05)  # float16 features


def test_a_stopped_run_says_how_to_go_on_and_that_command_does():
    outcome = stopped(TINY, "--epochs 2", at_step=2)
    command = re.search(r"to go on: python flickr_image_caption.py (.+)", outcome.out)[1]
    assert "stopped by SIGINT in epoch 1" in outcome.out and outcome.err == ""
    last = load(run_dir(outcome) / "last.pt")
    assert last["splits"]["val"] == listed("dev")  # no best.pt has them
    resumed = succeed(command)
    assert [number for number, *_ in EPOCH_BLOCK.findall(resumed)] == ["1", "2"]
    assert run_dir(resumed).name.startswith("sample_lstm_ep2_")  # the plan's epochs, not those left


def test_a_stopped_run_has_failed_and_the_resumed_one_goes_on_with_its_sample_captions():
    """Of the same images, with the captions that validation found: the console shows the first."""
    outcome = stopped(TINY, "--epochs 3", at_step=2 * STEPS + 1)
    folder = run_dir(outcome)
    run = read_json(folder / "run_summary.json")["metadata"]
    assert (run["status"], run["error"]) == ("failed", "stopped by SIGINT in epoch 3")
    out = succeed("--resume", folder / "last.pt")
    summary = read_json(run_dir(out) / "run_summary.json")
    assert summary["metadata"]["status"] == "completed" and summary["total_epochs"] == 3
    samples = read_json(run_dir(out) / "sample_captions.json")
    val = listed("dev")
    assert [entry["image"] for entry in samples] == val[: experiment_utils.SAMPLE_IMAGES]
    assert samples[0]["references"] == references()[val[0]]
    shown = re.findall(r"First validation image \S+: (.+)", outcome.out + out)
    assert [past["caption"] for past in samples[0]["captions"]] == shown and len(shown) == 3
    assert all([past["epoch"] for past in entry["captions"]] == [1, 2, 3] for entry in samples)


def test_a_failed_run_says_why_and_a_tested_one_what_it_scored(shop, monkeypatch):
    shutil.copytree(shop / "lstm", "run")
    assert succeed("--mode test --model_path run/best.pt")
    scores, summary = read_json("run/test_metrics.json"), read_json("run/run_summary.json")
    assert summary["bleu_scores"]["test_bleu4"] == scores["BLEU-4"]

    def validation_loss(*_):
        raise FloatingPointError("the validation loss of epoch 1 is nan")

    monkeypatch.setattr(fic, "validation_loss", validation_loss)
    killed = Path("saved_models/sample/shufflenet_v2_x0_5_lstm/killed")
    killed.mkdir(parents=True)
    checkpoints.write_json(killed / "run_summary.json", {"metadata": {"status": "running"}})
    (killed / ".running").touch()
    outcome = program(TINY)
    assert f"an earlier run was killed, and is marked as failed now: {killed}" in outcome.out
    assert read_json(killed / "run_summary.json")["metadata"]["status"] == "failed"
    run = read_json(run_dir(outcome) / "run_summary.json")["metadata"]
    assert (run["status"], run["error"]) == ("failed", "the validation loss of epoch 1 is nan")


def test_commands_that_are_printed_can_be_pasted(monkeypatch):
    """Wherever the script lies, and with spaces in names."""
    models, cache = Path("my models"), Path("a cache")
    program_at = "../my code/flickr_image_caption.py"
    original = run_output.finish_run

    def finish_run(run):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program_at])
            original(run)

    monkeypatch.setattr(run_output, "finish_run", finish_run)
    out = succeed(TINY, "--model_save_dir", models, "--cache_dir", cache)
    words = shlex.split(re.search("^test it: (.+)$", out, re.MULTILINE)[1])
    best = str(run_dir(out) / "best.pt")
    expected = [
        "python",
        program_at,
        "--mode",
        "test",
        "--model_path",
        best,
        "--cache_dir",
        "a cache",
    ]
    assert words == expected
    succeed(*map(Path, words[2:]))


def test_one_epoch_is_no_epochs(shop):
    out = succeed("--model_path", shop / "lstm/model_epoch_4.pt", "--epochs 1")
    assert "1 epoch to go" in out and "1 epochs" not in out


def test_what_a_shortened_run_did_not_use_is_said_to_be_so():
    best = train("--max_train_images 20") / "best.pt"
    out = succeed("--mode test --output_dir out --model_path", best)
    assert "; 12 images that its run did not use are left out" in out and "in no split" not in out


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_ends_the_program_without_a_word(shop):
    images = "data/sample/Images"
    command = [
        sys.executable,
        fic.__file__,
        "--mode",
        "caption",
        "--model_path",
        shop / "lstm/best.pt",
    ]
    with subprocess.Popen(
        [*command, "--images", images], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 128 + signal.SIGPIPE


def test_epochs_on_resume_are_additional_and_epoch_numbers_go_on(shop):
    out = succeed("--model_path", shop / "lstm/model_epoch_4.pt", "--epochs 2")
    assert [(epoch, of) for epoch, of, *_ in EPOCH_BLOCK.findall(out)] == [("5", "6"), ("6", "6")]
    folder = run_dir(out)
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {
        "model_epoch_5.pt",
        "model_epoch_6.pt",
    }
    assert read_json(folder / "loss_curve.json")["epochs"] == [1, 2, 3, 4, 5, 6]


def test_a_student_learns_from_teachers_and_goes_on_learning_from_them(shop, monkeypatch):
    """Its weights are not those without teachers, and those of a run that was stopped on the way."""
    teachers = f"--distill_from {shop / 'attention'} {shop / 'lstm' / 'best.pt'}"
    flags = "--decoder lstm --epochs 2 --cache_dir own_cache"
    alone = load(train(flags) / "model_epoch_2.pt")["model"]
    out = succeed(TINY, flags, teachers, "--distill_weight 0.9")
    assert f"teachers: {shop / 'attention' / 'best.pt'}, {shop / 'lstm' / 'best.pt'}" in out
    straight = run_dir(out)
    (file,) = Path("own_cache/teachers").glob("*.pt")
    assert load(file)["words"].shape[1] == 32
    config = load(straight / "best.pt")["config"]
    assert len(config["distill_from"]) == 2 and config["distill_weight"] == 0.9

    monkeypatch.setattr(caption_objectives, "soft_targets", None)  # they are not asked again
    halted = stopped(TINY, flags, teachers, "--distill_weight 0.9", at_step=STEPS + 2)
    assert halted.status == 130
    resumed = run_dir(succeed("--cache_dir own_cache --resume", run_dir(halted) / "last.pt"))
    last = [load(folder / "model_epoch_2.pt")["model"] for folder in (straight, resumed)]
    assert not list(differences(*last))
    assert list(differences(last[0], alone))


def test_teachers_know_the_same_words_and_are_there(shop):
    lost = program(TINY, "--distill_from lost/best.pt")
    assert lost.status == 2 and "lost/best.pt" in lost.err and lost.err.count("\n") == 1
    other = program(TINY, "--freq_threshold 9 --distill_from", shop / "lstm/best.pt")
    assert other.status == 2 and "--distill_from" in other.err and "vocabulary" in other.err
    alone = program(TINY, "--distill_weight 0.2")
    assert alone.status == 2 and "--distill_weight needs --distill_from" in alone.err


def test_an_epoch_on_the_reward_goes_on_as_if_it_had_not_been_stopped():
    """Stopped inside the first one and at the border before it; its samples are drawn by the stored state."""
    flags = "--epochs 1 --scst_epochs 2 --use_scheduler --scheduler_type one_cycle"
    out = succeed(TINY, flags, "--scst_learning_rate 0.003 --scst_samples 2")
    straight = run_dir(out)
    assert [number for number, *_ in EPOCH_BLOCK.findall(out)] == ["1"]
    rewards = re.findall(
        r"^  Training Reward: (\d\.\d{5})\n(?:.+\n){2}  Scheduler: none$", out, re.M
    )
    rows = load(straight / "model_epoch_3.pt")["history"]
    assert [float(x) for x in rewards] == pytest.approx(
        [r["train_reward"] for r in rows[1:]], abs=1e-5
    )
    assert [row["learning_rate"] for row in rows[1:]] == [0.003, 0.003]
    curve = read_json(straight / "loss_curve.json")
    assert curve["train_losses"][0] > 0 and curve["train_losses"][1:] == [None, None]
    metrics = read_json(straight / "metrics_history.json")["train_reward"]
    assert metrics == [None, *(row["train_reward"] for row in rows[1:])]

    halted = stopped(TINY, flags, "--scst_learning_rate 0.003 --scst_samples 2", at_step=STEPS + 3)
    inside, border = (run_dir(halted) / name for name in ("last.pt", "model_epoch_1.pt"))
    assert halted.status == 130 and load(inside)["data_position"]["captions"] == 3 * BATCH_SIZE
    for path in (inside, border):
        resumed = run_dir(succeed("--model_path", path))
        pair = [load(folder / "model_epoch_3.pt") for folder in (straight, resumed)]
        for state in pair:
            del state["encoder"]["weights"]  # which the border's file had, as the best one's
        assert not list(differences(*pair))
    late = program("--epochs 1 --model_path", straight / "model_epoch_3.pt")
    assert late.status == 2 and "--epochs is for epochs on captions" in late.err
    more = succeed("--scst_epochs 1 --model_path", straight / "model_epoch_3.pt")
    assert "Epoch 4 completed (4/4):\n  Training Reward:" in more


def test_a_finished_plan_needs_epochs(shop):
    before = snapshot()
    outcome = program("--model_path", shop / "lstm/model_epoch_4.pt")
    assert outcome.status == 2 and "--epochs" in outcome.err and outcome.err.count("\n") == 1
    assert snapshot() == before


def test_a_resumed_run_leaves_the_old_directory_alone_and_brings_the_best_along(shop):
    before = snapshot(shop / "attention")
    outcome = stopped("--model_path", shop / "attention/model_epoch_4.pt", "--epochs 3", at_step=1)
    folder = run_dir(outcome)
    assert snapshot(shop / "attention") == before and folder.absolute() != shop / "attention"
    assert {path.name for path in folder.iterdir()} == {
        "run_config.json",
        "run_summary.txt",
        "config_snapshot.json",
        "run_summary.json",
        "last.pt",
        *BEST_FILES,
    }
    for name in BEST_FILES:
        assert (folder / name).read_bytes() == (shop / "attention" / name).read_bytes()
    assert (folder / "best.pt").samefile(folder / "best_eval.pt")


def test_a_damaged_best_beside_the_checkpoint_is_named_and_passed_over(monkeypatch):
    replace_cider(monkeypatch, iter([0.3, 0.2, 0.1]))
    folder = train("--epochs 2")
    for name in ("best.pt", "best_eval.pt", "model_epoch_1.pt"):
        (folder / name).unlink()
        (folder / name).write_bytes(b"PK damaged")
    out = succeed("--epochs 1 --model_path", folder / "model_epoch_2.pt")
    assert f"without the best.pt of before: {folder / 'best.pt'}: not a usable" in out
    assert load(run_dir(out) / "best.pt")["epoch"] == 3


def test_a_best_of_a_later_epoch_is_not_the_best_so_far(monkeypatch):
    replace_cider(monkeypatch, iter([0.1, 0.2, 0.15]))
    first = train("--epochs 2")
    out = succeed("--model_path", first / "model_epoch_1.pt", "--epochs 1")
    state = load(run_dir(out) / "best.pt")
    assert state["epoch"] == 2 and state["best_score"] == 0.15


def test_resume_latest_and_a_folder_mean_the_newest_checkpoint_of_the_newest_run(shop):
    train("--epochs 2")
    newest = run_dir(stopped(TINY, "--epochs 3", at_step=STEPS + 1))
    for flags in (
        "--resume latest",
        "--model_path saved_models",
        "--model_path saved_models/sample",
    ):
        shutil.copytree("saved_models", "kept")
        out = succeed(flags)
        assert f"checkpoint: {newest / 'last.pt'}" in out
        assert [number for number, *_ in EPOCH_BLOCK.findall(out)] == ["2", "3"]
        shutil.rmtree("saved_models")
        Path("kept").rename("saved_models")


def stand_in_for_flickr30k():
    """A run with the files model_epoch_10.pt and model_epoch_15.pt, where the commands look for it."""
    Path("own").mkdir()
    Path("own/flickr30k").symlink_to(Path("data/sample").resolve())
    Path("data").unlink()
    Path("own").rename("data")
    folder = train("--dataset_type flickr30k --epochs 2", ATTENTION)
    assert folder.parent == Path("saved_models/flickr30k/shufflenet_v2_x0_5_attention")
    flat = Path("saved_models/flickr30k/resnet_attention") / folder.name
    flat.parent.mkdir()
    folder.rename(flat)
    (flat / "model_epoch_1.pt").rename(flat / "model_epoch_10.pt")
    (flat / "model_epoch_2.pt").rename(flat / "model_epoch_15.pt")
    return flat


def test_the_specified_resume_and_test_commands():
    """Their flat paths are looked up in the newest run below them, and the choice is printed."""
    held_out, flat = set(listed("test")), stand_in_for_flickr30k()
    schedule, pictures, test = RESUME_AND_TEST_COMMANDS
    out = succeed(schedule)
    assert f"checkpoint: {flat / 'model_epoch_10.pt'}" in out
    assert "--scheduler_type cosine is new to this run" in out
    assert [number for number, *_ in EPOCH_BLOCK.findall(out)] == ["2", "3", "4", "5", "6"]
    out = succeed(pictures, "--epochs 1")
    assert f"checkpoint: {flat / 'model_epoch_15.pt'}" in out
    drawn = sorted(path.name for path in run_dir(out).glob("*viz*.png"))
    assert drawn == [f"attention_viz_sample_{number}.png" for number in (1, 2, 3)]
    out = succeed(test)
    assert f"checkpoint: {flat / 'best.pt'}" in out
    assert {row["file_name"] for row in read_json(flat / "test_captions.json")} == held_out


OTHER_ARCHITECTURE = {
    "decoder": "attention", "encoder": "resnet18", "image_size": 96, "coarse_size": 64,
    "freq_threshold": 2, "embed_size": 17, "hidden_size": 17, "num_layers": 2, "attention_dim": 9,
    "attention": "adaptive", "attention_heads": 2, "fine_tune_encoder": 1,
    "gpt2_model": "gpt2", "gpt2_layers": 2, "gpt2_width": 8, "gpt2_heads": 2, "prefix_length": 1,
    "trainable": "cross",
}  # fmt: skip


def test_every_option_that_a_checkpoint_fixes_is_tried():
    fixed = {name for name, option in TABLE.items() if option.stored == caption_options.FIXED}
    assert fixed == OTHER_ARCHITECTURE.keys()


@pytest.mark.parametrize("name", OTHER_ARCHITECTURE)
def test_another_architecture_encoder_or_vocabulary_on_resume_is_an_error(name, shop):
    before, typed = snapshot(), f"--{name} {OTHER_ARCHITECTURE[name]}"
    kind = {"attention_dim": "attention", "attention": "attention", "attention_heads": "adaptive"}
    kind |= {
        option: "gpt2" for option, row in TABLE.items() if row.needs.get("decoder") == ("gpt2",)
    }
    path = shop / kind.get(name, "lstm") / "model_epoch_4.pt"
    outcome = program("--model_path", path, "--epochs 1", typed)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert f"{typed} (stored: {load(path)['config'][name]})" in outcome.err
    assert snapshot() == before


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_same_architecture_typed_again_is_fine(decoder, shop):
    same = "--encoder shufflenet_v2_x0_5 --encoder_weights random --image_size 224"
    same += " --freq_threshold 1 --embed_size 16 --hidden_size 16 --num_layers 1"
    path = shop / decoder / "model_epoch_4.pt"
    assert EPOCH_BLOCK.search(succeed("--model_path", path, "--epochs 1", same, DECODERS[decoder]))


def test_other_encoder_weights_on_resume_are_an_error(shop):
    torch.save(
        download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", 99), "other.pth"
    )
    outcome = program(
        "--model_path", shop / "lstm/model_epoch_4.pt", "--epochs 1 --encoder_weights other.pth"
    )
    assert (
        outcome.status == 2
        and outcome.err.count("\n") == 1
        and "--encoder_weights other.pth" in outcome.err
    )


def test_options_that_were_not_typed_come_from_the_checkpoint(shop):
    own = {"drop_prob": 0.45, "alpha_c": 0.5, "label_smoothing": 0.07, "grad_clip": 2.5, "seed": 4, "max_length": 9,
           "batch_size": 33, "val_beam_size": 2, "learning_rate": 0.003, "beam_size": 3, "split_seed": 7}  # fmt: skip
    first = train(ATTENTION, *(f"--{name} {value}" for name, value in own.items()))
    resumed = read_json(run_dir(succeed("--model_path", first / "best.pt", "--epochs 1 --drop_prob 0.1"))
                        / "run_config.json")  # fmt: skip
    assert {name: resumed[name] for name in own} == own | {"drop_prob": 0.1}
    assert resumed["decoder_type"] == "attention" and resumed["hidden_size"] == 16
    out = succeed("--mode test --model_path", first / "best.pt", "--output_dir tested")
    decoding = read_json("tested/test_metrics.json")["decoding"]
    assert decoding["beam_size"] == 3 and decoding["max_length"] == 9 and "beam 3" in out


def test_the_same_scheduler_typed_goes_on_and_another_starts_fresh_and_says_so():
    first = train("--epochs 2 --use_scheduler --scheduler_type exponential --scheduler_gamma 0.8")
    path = first / "model_epoch_2.pt"
    out = succeed("--model_path", path, "--epochs 2 --use_scheduler --scheduler_type exponential")
    assert "is new to this run" not in out
    rates = read_json(run_dir(out) / "loss_curve.json")["learning_rates"]
    assert rates == pytest.approx([0.01 * 0.8**epoch for epoch in range(4)])
    out = succeed("--model_path", path, "--epochs 3 --scheduler_type step --scheduler_step_size 2")
    assert "--scheduler_type step is new to this run" in out
    rates = read_json(run_dir(out) / "loss_curve.json")["learning_rates"]
    assert rates == pytest.approx(
        [0.01, 0.008, 0.01, 0.01, 0.008]
    )  # its gamma came from the checkpoint


@pytest.mark.parametrize("name", ["none", "cosine", "one_cycle"])
def test_a_typed_learning_rate_on_resume_counts(name):
    straight = straight_run("lstm", name)
    path, old = straight / "model_epoch_1.pt", rates_of(straight)
    new = rates_of(run_dir(succeed("--model_path", path, "--learning_rate 0.001")))
    assert new == pytest.approx([old[0], *(rate / 10 for rate in old[1:])], abs=1e-7)  # min_lr


def test_weight_decay_on_resume_is_the_typed_one_or_the_checkpoints():
    path = train("--epochs 1 --weight_decay 0.5") / "model_epoch_1.pt"
    for flags, decay in (
        ("", 0.5),
        ("--weight_decay 0.1", 0.1),
        ("--use_scheduler --weight_decay 0", 0.0),
    ):
        resumed = run_dir(succeed("--model_path", path, "--epochs 1", flags)) / "model_epoch_2.pt"
        groups = load(resumed)["optimizer"]["param_groups"]
        assert [group.pop("weight_decay") for group in groups] == [decay, 0.0]
        assert [{**group, "params": None} for group in groups] == [
            {**groups[0], "params": None}
        ] * 2


def test_one_cycle_keeps_the_length_of_its_first_plan_and_then_its_last_rate():
    flags = f"--epochs 3 {SCHEDULERS['one_cycle']}"
    first = train(flags)
    planned = read_json(first / "loss_curve.json")["learning_rates"]
    outcome = program(
        "--model_path", first / "model_epoch_1.pt", "--epochs 4"
    )  # two epochs beyond the plan
    assert outcome.status == 0
    warnings = [line for line in outcome.err.splitlines() if "one_cycle" in line]
    assert len(warnings) == 1 and f"{3 * STEPS} steps" in warnings[0]
    state = load(run_dir(outcome) / "model_epoch_5.pt")
    rates = [row["learning_rate"] for row in state["history"]]
    assert rates[:3] == planned
    assert (
        rates[3]
        == rates[4]
        == state["optimizer"]["param_groups"][0]["lr"]
        == pytest.approx(0.01 / 25 / 1e4)
    )
    finished = program("--model_path", first / "model_epoch_1.pt", "--epochs 2")
    assert "one_cycle was planned" not in finished.err


def test_one_cycle_may_go_on_for_fewer_epochs_than_its_warm_up_took():
    """The warm-up belongs to the first plan, so --epochs on resume has no say in it."""
    first = train("--epochs 3 --use_scheduler --scheduler_type one_cycle --warmup_epochs 2")
    planned = read_json(first / "loss_curve.json")["learning_rates"]
    folder = run_dir(succeed("--model_path", first / "model_epoch_1.pt", "--epochs 1"))
    assert read_json(folder / "loss_curve.json")["learning_rates"] == planned[:2]
    assert load(folder / "model_epoch_2.pt")["optimizer"]["param_groups"][0]["lr"] == planned[2]


def test_a_fresh_one_cycle_warms_up_for_the_epochs_it_was_told():
    first = train("--epochs 2")
    out = succeed("--model_path", first / "model_epoch_2.pt", "--epochs 2",
                  "--use_scheduler --scheduler_type one_cycle --warmup_epochs 1")  # fmt: skip
    rates = read_json(run_dir(out) / "loss_curve.json")["learning_rates"]
    assert rates[2] == pytest.approx(0.01 / 25)
    quarter = (
        1 + math.cos(math.pi / 4)
    ) / 2  # peak at the last step of the first epoch, then a cosine of four steps
    assert rates[3] == pytest.approx(0.01 * quarter, rel=1e-3)


def test_early_stopping_counts_on_over_a_resume(monkeypatch):
    replace_cider(monkeypatch, itertools.repeat(0.5))
    first = train("--epochs 2 --early_stopping_patience 2")  # epoch 2 is no better
    out = succeed("--model_path", first / "model_epoch_2.pt", "--epochs 5")
    assert [number for number, *_ in EPOCH_BLOCK.findall(out)] == ["3"] and "stopped early" in out


# ------------------------------------------------------------------------------------ beginning with another model


NEW_DATA = "--dataset_type sample --freq_threshold 1 --num_workers 0 --precision float32 --epochs 1"


def renamed_captions():
    """A copy of the dataset whose captions say scarlet for red; returns its flags."""
    flags = own_copy()
    path = Path("data_copy/captions.txt")
    path.write_text(path.read_text().replace(" red ", " scarlet "))
    return flags


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_new_run_begins_as_a_trained_model_and_goes_on_without_it(decoder, shop):
    """Its sizes and encoder need not be typed; words, splits and schedule are its own."""
    source = Path("source.pt")
    shutil.copy(shop / decoder / "best.pt", source)
    trained, data = load(source), f"{NEW_DATA} {renamed_captions()} --learning_rate 1e-30"
    outcome = program(data, "--init_from source.pt --seed 5")
    assert outcome.status == 0
    words = len(trained["vocabulary"]["words"]) - 4
    assert (
        f"decoder: begins as source.pt, which knows {words - 1} of these words; anew: 1 word\n"
        in outcome.out
    )
    assert "Epoch 1 completed (1/1)" in outcome.out
    folder = run_dir(outcome)
    config, begun = read_json(folder / "run_config.json"), load(folder / "best.pt")
    assert config["init_from"] == "source.pt" and "--init_from source.pt" in config["command"]
    assert config["embed_size"] == 16 and config["encoder"] == "shufflenet_v2_x0_5"
    ids = {word: number for number, word in enumerate(trained["vocabulary"]["words"])}
    assert "scarlet" in begun["vocabulary"]["words"] and "red" not in begun["vocabulary"]["words"]
    for name in ("embed.weight", "head.bias"):
        old, new = trained["model"][name], begun["model"][name]
        for row, word in zip(new, begun["vocabulary"]["words"], strict=True):
            assert word == "scarlet" or torch.equal(row, old[ids[word]])
    mean = begun["model"]["feature_mean"]
    assert torch.equal(mean, trained["model"]["feature_mean"])  # which the projections know
    source.unlink()  # and with it the only copy of the encoder that --seed 0 drew
    again = succeed("--resume", folder / "model_epoch_1.pt", "--epochs 1")
    last = run_dir(succeed("--resume", run_dir(again) / "model_epoch_2.pt", "--epochs 1"))
    assert load(last / "model_epoch_3.pt")["encoder"]["weights"].keys()
    assert read_json(last / "run_config.json")["init_from"] is None


def test_a_run_that_began_with_the_best_of_a_folder_is_stopped_and_goes_on_as_if_it_was_not(shop):
    shutil.copytree(shop / "lstm", "runs")
    out = succeed(NEW_DATA, "--init_from runs")
    assert "decoder: begins as runs/best.pt, which knows " in out
    assert "; anew: 0 words\n" in out
    straight = run_dir(succeed(NEW_DATA, "--epochs 2 --init_from runs"))
    first = stopped(NEW_DATA, "--epochs 2 --init_from runs", at_step=1)
    shutil.rmtree("runs")
    resumed = run_dir(succeed("--resume", run_dir(first) / "last.pt"))
    states = [load(folder / "model_epoch_2.pt") for folder in (straight, resumed)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


@pytest.mark.parametrize(
    "other", ["--encoder mnasnet0_5 --encoder_weights random", "--encoder_weights other.pth",
              "--image_size 192", "--coarse_size 96"]
)  # fmt: skip
def test_with_another_encoder_what_reads_features_begins_anew_and_it_is_said(other, shop):
    torch.save(
        download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", 99), "other.pth"
    )
    source = shop / "attention/best.pt"
    out = succeed(NEW_DATA, "--learning_rate 1e-30 --init_from", source, other)
    anew = (
        "attention.project_keys, feature_mean, feature_std, init_cell, init_hidden, project_values"
    )
    assert f"; anew: 0 words, and for another encoder {anew}\n" in out
    model, trained = load(run_dir(out) / "best.pt")["model"], load(source)["model"]
    same = {
        name
        for name in model
        if model[name].shape == trained[name].shape and torch.equal(model[name], trained[name])
    }
    renewed = {name for name in model if name.startswith(tuple(anew.split(", ")))}
    assert same == model.keys() - renewed


def test_images_that_the_model_to_begin_with_was_trained_on_are_not_scored_without_a_warning(shop):
    """With the same lists none was; with the lists of training and test exchanged most were."""
    source = shop / "lstm/best.pt"
    assert "trained on" not in program(NEW_DATA, "--init_from", source).err
    own = own_copy()
    train_list, test_list = (
        Path(f"data_copy/sample.{split}Images.txt") for split in ("train", "test")
    )
    train_names, test_names = train_list.read_text(), test_list.read_text()
    test_list.write_text(train_names)
    train_list.write_text(test_names)
    outcome = program(NEW_DATA, own, "--init_from", source)
    assert outcome.status == 0
    assert (
        f"warning: 32 of 36 validation and test images are among those that {source} was trained on: "
        in outcome.err
    )


def test_what_contradicts_the_model_to_begin_with_is_one_line(shop):
    before = snapshot()
    outcome = program(NEW_DATA, "--hidden_size 8 --init_from", shop / "lstm")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "--init_from" in outcome.err and "--hidden_size 8 (stored: 16)" in outcome.err
    assert snapshot() == before


# ------------------------------------------------------------------------------------------------------ test, caption


@pytest.mark.parametrize("decoder", DECODERS)
def test_test_mode_scores_the_whole_test_split(decoder, shop, capsys):
    """Its scores are those of metrics_utils run as a command on the captions it wrote."""
    out = succeed("--mode test --model_path", shop / decoder / "best.pt", "--output_dir found")
    rows, scores = read_json("found/test_captions.json"), read_json("found/test_metrics.json")
    assert [row["file_name"] for row in rows] == listed("test") and scores["images"] == 4
    assert not any("<" in row["caption"] for row in rows)
    Path("h.json").write_text(
        json.dumps([{"image_id": row["file_name"], "caption": row["caption"]} for row in rows])
    )
    annotations = [
        {"image_id": name, "caption": text, "id": number}
        for number, (name, text) in enumerate(
            (name, text) for name in listed("test") for text in references()[name]
        )
    ]
    Path("r.json").write_text(json.dumps({"annotations": annotations}))
    metrics_utils.main(["--references", "r.json", "--hypotheses", "h.json"])
    command = json.loads(capsys.readouterr().out)
    for name in (*metrics_utils.METRIC_NAMES, "caption_length", "vocabulary_used", "share_unique"):
        assert scores[name] == command[name], name
    for name in ("BLEU-4", "CIDEr", "WER", "ROUGE-L"):
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high
        assert re.search(rf"{name} +{scores[name]:.4f}\b", out), name
    assert scores["decoding"].keys() >= {"algorithm", "beam_size", "max_length", "length_penalty"}
    assert scores["wall_time_seconds"] > 0 and 0 <= scores["share_copied"] <= 1


def test_test_mode_tells_what_the_score_hides(shop):
    """Recall is counted anew from what it wrote; a better score with duller captions is said to be one."""
    test = ("--mode test --output_dir found --model_path", shop / "lstm/best.pt")
    out = succeed(*test)
    rows, scores = read_json("found/test_captions.json"), read_json("found/test_metrics.json")
    details, texts = scores["details"], references()
    training = [text for name in listed("train") for text in texts[name]]
    counts = collections.Counter(
        itertools.chain.from_iterable(map(metrics_utils.tokenize, training))
    )
    hits = []
    for row in rows:
        written = set(metrics_utils.tokenize(row["caption"]))
        content = set(
            itertools.chain.from_iterable(map(metrics_utils.tokenize, texts[row["file_name"]]))
        )
        content = {word for word in content if score_details.kind_of(word) != "function words"}
        hits += [word in written for word in content if counts[word] < 100]
    assert len(hits) >= 8
    assert details["rare_recall"] == pytest.approx(sum(hits) / len(hits))
    assert details["unsupported"]["colours"]["written"] > 0
    lengths = [len(metrics_utils.tokenize(row["caption"])) for row in rows]
    images = sum(length < 8 for length in lengths)
    assert details["by_length"].get("0-7", {"images": 0})["images"] == images
    assert f"rare_recall, of those below 100: {details['rare_recall']:.4f}\n" in out
    assert scores["duller"] is None and "duller" not in out

    lively = scores | {"CIDEr": -1.0, "vocabulary_used": 999}
    Path("found/test_metrics.json").write_text(json.dumps(lively))
    out, duller = succeed(*test), read_json("found/test_metrics.json")["duller"]
    assert f"words used 999 -> {scores['vocabulary_used']}" in duller
    assert f"\nsince the last test here: {duller}\n" in out
    out = succeed(*test, f"--captions_file named.txt {foreign_captions()}")
    details = read_json("found/test_metrics.json")["details"]
    assert details["recall"] is None and "rare_recall" not in out


def foreign_captions():
    """Writes named.txt, which has not all of the checkpoint's images; returns the other flag that it needs."""
    names = [name for name in references() if name != listed("test")[0]]
    captions_named("named.txt", {name: f"Images/{name}" for name in names})
    return "--image_dir data/sample"


@pytest.mark.parametrize("split, listing", [("val", "dev"), ("train", "train")])
def test_other_splits_have_files_of_their_own(split, listing, shop):
    succeed(
        f"--mode test --split {split} --algorithm greedy --output_dir found --model_path",
        shop / "lstm/best.pt",
    )
    assert {path.name for path in Path("found").iterdir()} == {
        f"{split}_captions.json",
        f"{split}_metrics.json",
        f"{split}_examples.json",
        "report.html",
    }
    assert [row["file_name"] for row in read_json(f"found/{split}_captions.json")] == listed(
        listing
    )


def test_test_mode_writes_beside_the_checkpoint_unless_told(shop):
    shutil.copytree(shop / "lstm", "run")
    succeed("--mode test --model_path run")
    assert Path("run/test_metrics.json").is_file() and Path("run/test_captions.json").is_file()


@pytest.mark.parametrize("decoder", DECODERS)
def test_log_prob_and_greedy_choices_are_those_of_the_training_pass(decoder, shop):
    """Training and generation once disagreed about <SOS>."""
    succeed(
        "--mode test --algorithm greedy --precision float32 --output_dir found --model_path",
        shop / decoder / "best.pt",
    )
    model, vocabulary, encoder = opened(shop / decoder / "best.pt")
    for row in read_json("found/test_captions.json"):
        words = vocabulary.encode(row["caption"])
        finished = [vocabulary.eos] if len(words) < 12 else []
        targets = torch.tensor([*words, *finished])
        features = encode(encoder, f"data/sample/Images/{row['file_name']}")
        features = features.half().float()  # as cached
        inputs = [vocabulary.sos, *words][: len(targets)]
        log_probs = teacher_forced(model, features, inputs).log_softmax(-1)
        total = float(log_probs.gather(1, targets[:, None]).sum())
        assert row["log_prob"] == pytest.approx(total, rel=1e-4)
        log_probs[:, [vocabulary.pad, vocabulary.sos, vocabulary.unk]] = -math.inf  # never written
        assert log_probs.argmax(1).tolist() == targets.tolist()


def test_the_splits_of_the_checkpoint_are_reused(shop):
    """Lists beside the captions, and --split_seed, may have changed since."""
    flags = own_copy()
    for name in ("train", "dev", "test"):
        Path(f"data_copy/sample.{name}Images.txt").unlink()
    folder = train(flags, "--split_seed 1")
    held_out = load(folder / "best.pt")["splits"]["test"]
    out = succeed("--mode test --split_seed 2 --output_dir found --model_path", folder / "best.pt")
    assert "from the checkpoint" in out
    assert {row["file_name"] for row in read_json("found/test_captions.json")} == set(held_out)
    trained = set(load(folder / "best.pt")["splits"]["train"])
    assert len(held_out) == 4 and not trained & set(held_out)
    resumed = run_dir(succeed("--split_seed 3 --epochs 1 --model_path", folder / "best.pt"))
    one, other = (load(run / "best.pt")["splits"] for run in (folder, resumed))
    assert not list(differences(one, other))


def test_names_of_splits_come_from_the_best_pt_beside_a_checkpoint(shop):
    flags = own_copy() + " --algorithm greedy --output_dir found --mode test --model_path"
    shutil.copytree(shop / "lstm", "run")
    Path("run/best.pt").rename("best.pt")
    path = Path("run/model_epoch_4.pt")
    state = load(path)  # of the best epoch, which has the names; any other has their hash
    state["splits"] = {"sha256": caption_splits.splits_sha256(state["splits"])}
    torch.save(state, path)
    out = succeed(flags, path)
    assert "splits: from sample.trainImages.txt" in out  # which agree with the hash
    for name in ("train", "dev", "test"):
        Path(f"data_copy/sample.{name}Images.txt").unlink()
    for command in (flags, flags[: flags.index("--algorithm")] + "--epochs 1 --model_path"):
        outcome = program(command, path)
        assert outcome.status == 2 and outcome.err.count("\n") == 1
        assert "split otherwise than for the checkpoint" in outcome.err and "best.pt" in outcome.err
    Path("best.pt").rename("run/best.pt")
    assert "splits: from the checkpoint" in succeed(flags, path)
    assert [row["file_name"] for row in read_json("found/test_captions.json")] == listed("test")


def test_a_best_of_other_validation_images_is_not_the_best_so_far(shop):
    out = succeed("--epochs 1 --max_val_images 3 --model_path", shop / "lstm/model_epoch_4.pt")
    assert "best.pt was validated on other images" in out
    best = load(run_dir(out) / "best.pt")
    assert best["epoch"] == 5 and len(best["splits"]["val"]) == 3


def captions_named(path, names):
    """A captions file of the sample's pictures under other names, {picture: name}."""
    texts = references()
    rows = ((name, text) for picture, name in names.items() for text in texts[picture])
    Path(path).write_text("".join(f"{name}#0\t{text}\n" for name, text in rows))


def test_test_mode_scores_nothing_that_was_trained_on(shop):
    """A captions file that names the same photographs otherwise was once split anew."""
    held_out, everything = listed("test"), [*references()]
    best = shop / "lstm/best.pt"
    flags = "--mode test --algorithm greedy --image_dir data/sample --captions_file named.txt"
    captions_named("named.txt", {name: f"Images/{name}" for name in everything})
    whole = program(flags, "--output_dir whole --model_path", best)
    assert whole.status == 0 and warnings_in(whole) == []
    scores = read_json("whole/test_metrics.json")
    assert scores["images"] == 4 and scores["foreign_dataset"] is None
    assert 0 <= scores["share_copied"] <= 1

    captions_named(
        "named.txt", {name: f"Images/{name}" for name in everything if name != held_out[0]}
    )
    foreign = program(flags, "--output_dir part --model_path", best)
    assert foreign.status == 0 and len(warnings_in(foreign)) == 1
    assert "36 images left out that the checkpoint was trained or validated on" in foreign.err
    assert "compared by content" in foreign.err
    rows, scores = read_json("part/test_captions.json"), read_json("part/test_metrics.json")
    assert [row["file_name"] for row in rows] == [f"Images/{name}" for name in held_out[1:]]
    assert scores["foreign_dataset"] == {
        "splits": "none, all images are scored",
        "left_out": 36,
        "compared_by": "content",
        "same_names": 0,
    }
    assert scores["images"] == 3 and scores["share_copied"] is None

    captions_named("named.txt", {name: f"Images/{name}" for name in listed("train")})
    refused = program(flags, "--output_dir none --model_path", best)
    assert refused.status == 2 and refused.err.count("\n") == 1 and not Path("none").exists()
    assert "trained or validated on all 32 images" in refused.err


def test_caption_mode_prints_path_tab_caption_and_agrees_with_test_mode(shop):
    path = shop / "attention/best.pt"
    succeed(
        "--mode test --no_feature_cache --output_dir found --model_path", path
    )  # float32 in both, then
    rows = read_json("found/test_captions.json")
    images = [f"data/sample/Images/{row['file_name']}" for row in rows]
    outcome = program("--mode caption --model_path", path, "--images", *images)
    assert outcome.status == 0 and outcome.err == ""
    assert outcome.out == "".join(
        f"{i}\t{row['caption']}\n" for i, row in zip(images, rows, strict=True)
    )
    lines = [json.loads(line) for line in succeed("--mode caption --json --model_path", path, "--images", *images,
                                                  "--num_captions 3").splitlines()]  # fmt: skip
    assert [line["image"] for line in lines] == images
    for line, row in zip(lines, rows, strict=True):
        assert [len(line["captions"]), line["captions"][0]["caption"]] == [3, row["caption"]]
        log_probs = [caption["log_prob"] for caption in line["captions"]]
        assert log_probs[0] == row["log_prob"] and log_probs == sorted(log_probs, reverse=True)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_loaded_captioner_writes_what_caption_mode_prints(decoder, shop):
    path = shop / decoder / "best.pt"
    images = [Path(f"data/sample/Images/{name}") for name in listed("test")]
    printed = succeed("--mode caption --model_path", path, "--images", *images).splitlines()
    captioner, options = fic.load_captioner(path)
    assert options.decoding.beam_size == 5
    assert fic.decoder_class(options.as_dict()) is type(captioner.decoder)
    hypotheses = captioner.caption(images, options.decoding)
    texts = [captioner.vocabulary.decode(best.tokens) for best, *_ in hypotheses]
    assert [f"{image}\t{text}" for image, text in zip(images, texts, strict=True)] == printed
    greedy = captioner.caption(images[:1], options.decoding._replace(algorithm="greedy"))
    (line,) = succeed(
        "--mode caption --algorithm greedy --model_path", path, "--images", images[0]
    ).splitlines()
    assert line == f"{images[0]}\t{captioner.vocabulary.decode(greedy[0][0].tokens)}"


@pytest.mark.parametrize("decoder", ["lstm", "adaptive"])
def test_two_encoders_side_by_side_are_trained_on_tested_and_caption(decoder, shop):
    """Their features come from caches of their own, and best.pt holds both."""
    names = "squeezenet1_1+shufflenet_v2_x0_5"
    folder = train(DECODERS[decoder], f"--encoder {names} --encoder_weights random --image_size 64")
    assert folder.parent.name == f"{names}_{'lstm' if decoder == 'lstm' else 'attention'}"
    caches = {path.name.rpartition("_")[0] for path in Path("feature_cache").glob("*f[0-9a-f]*")}
    checkpoint = load(folder / "best.pt")
    encoder = checkpoint["encoder"]
    assert encoder["channels"] == 512 + 1024 and len(encoder["parts"]) == 2
    assert not any("+" in name for name in caches)
    succeed("--mode test --no_feature_cache --output_dir found --model_path", folder / "best.pt")
    rows = read_json("found/test_captions.json")
    images = [f"data/sample/Images/{row['file_name']}" for row in rows]
    lines = succeed("--mode caption --model_path", folder / "best.pt", "--images", *images)
    assert [line.split("\t")[1] for line in lines.splitlines()] == [row["caption"] for row in rows]
    features = fic.load_captioner(folder / "best.pt")[0].decoder.feature_mean
    assert features.shape == (1536,) and features[:512].abs().sum() > 0 < features[512:].abs().sum()
    typed = "--mode test --no_feature_cache --output_dir typed --encoder_weights random+random"
    succeed(typed, "--model_path", folder / "best.pt")
    assert read_json("typed/test_captions.json") == rows
    other = "--mode test --output_dir none --encoder_weights data/sample/captions.txt+random"
    refused = program(other, "--model_path", folder / "best.pt")
    assert refused.status == 2 and refused.err.count("\n") == 1


RERANK = "--rerank consensus --neighbours 5 --beam_size 8 --rerank_weight"


def test_a_beams_captions_are_reranked_by_those_of_similar_training_images(shop):
    """With all weight on them the caption is the beam's that is most like them; with none, the beam's best."""
    shutil.copytree(shop / "attention", "run")
    found = {}
    for weight in ("0", "1000"):
        succeed(f"--mode test --model_path run/best.pt --output_dir {weight} {RERANK} {weight}")
        found[weight] = [row["caption"] for row in read_json(f"{weight}/test_captions.json")]
    plain = "--mode test --model_path run/best.pt --beam_size 8 --output_dir plain"
    succeed(plain)
    assert found["0"] == [row["caption"] for row in read_json("plain/test_captions.json")]
    assert found["1000"] != found["0"]
    scores = read_json("1000/test_metrics.json")
    assert scores["rerank"] == {"rerank": "consensus", "neighbours": 5, "rerank_weight": 1000}

    captioner, options = fic.load_captioner("run/best.pt")
    images = [f"data/sample/Images/{name}" for name in listed("test")]
    decoding = options.decoding._replace(beam_size=8, num_captions=8)
    features = captioner.encode([Path(image) for image in images])
    beams = list(captioner.caption_features([features], decoding))
    owner = index_owner("run/best.pt", checkpoints.load_checkpoint("run/best.pt"))
    index = consensus.load_index("run/neighbours.pt", owner)
    agreement = index.agreement(index.nearest(features.mean(1), 5), beams)
    pairs = zip(beams, agreement, strict=True)
    likest = [beam[values.index(max(values))].tokens for beam, values in pairs]
    assert found["1000"] == [captioner.vocabulary.decode(caption) for caption in likest]
    texts = [text for name in listed("train") for text in references()[name]]
    assert index.plain["features"].shape[0] == 32 and len(index.plain["tokens"]) == len(texts)

    lines = succeed(f"--mode caption --model_path run/best.pt {RERANK} 1000 --images", *images)
    assert [line.split("\t")[1] for line in lines.splitlines()] == found["1000"]


def test_a_run_that_reranks_makes_its_index_and_its_checkpoint_asks_for_it(shop, monkeypatch):
    """Its epochs are chosen by reranked captions."""
    folder = train(f"{RERANK} 3 --val_beam_size 8 --epochs 2")
    assert (folder / "neighbours.pt").is_file()
    succeed("--mode test --split val --output_dir val --model_path", folder / "best.pt")
    best = max(read_json(folder / "metrics_history.json")["CIDEr"])
    assert read_json("val/val_metrics.json")["CIDEr"] == pytest.approx(best)
    images = [f"data/sample/Images/{name}" for name in listed("test")]
    lines = succeed("--mode caption --model_path", folder / "best.pt", "--images", *images)
    monkeypatch.setattr(consensus, "build_index", None)  # is not made again
    succeed("--mode test --output_dir found --model_path", folder / "best.pt")
    rows = read_json("found/test_captions.json")
    assert [line.split("\t")[1] for line in lines.splitlines()] == [row["caption"] for row in rows]
    captioner, _ = fic.load_captioner(folder / "best.pt")
    assert (captioner.reranker.neighbours, captioner.reranker.weight) == (5, 3)
    Path("alone").mkdir()
    shutil.copy(folder / "best.pt", "alone")
    alone = program("--mode caption --model_path alone/best.pt --images", *images)
    plain = succeed("--mode caption --rerank none --model_path alone/best.pt --images", *images)
    assert (alone.status, alone.out, alone.err.count("\n")) == (0, plain, 1)
    assert (
        "not reranked" in alone.err and "no neighbours.pt of it beside alone/best.pt" in alone.err
    )


def test_tune_tries_every_setting_as_test_mode_would_and_keeps_the_best(shop):
    shutil.copytree(shop / "attention", "run")
    epoch = max(Path("run").glob("model_epoch_*.pt"), key=lambda path: path.stat().st_mtime)
    before = load(epoch)["config"]
    out = succeed("--mode tune --no_repeat_ngram_size 2 --neighbours 4 --model_path run/best.pt")
    rows = read_json("run/val_tuning.json")
    assert len(rows) == 3 * 4 * 5
    assert {row["no_repeat_ngram_size"] for row in rows} == {2}
    for row in rows[::17]:
        settings = ["beam_size", "length_penalty", "no_repeat_ngram_size"]
        flags = " ".join(f"--{name} {row[name]}" for name in settings)
        if row["rerank_weight"]:
            flags += f" --rerank consensus --neighbours 4 --rerank_weight {row['rerank_weight']}"
        command = f"--mode test --split val --output_dir found --model_path run/best.pt {flags}"
        succeed(command + " --rerank none" * (not row["rerank_weight"]))
        scores = read_json("found/val_metrics.json")
        assert {name: scores[name] for name in ("CIDEr", "BLEU-4", "ROUGE-L")} == {
            name: pytest.approx(row[name]) for name in ("CIDEr", "BLEU-4", "ROUGE-L")
        }
    best = max(rows, key=lambda row: row["CIDEr"])
    config, changed = load("run/best.pt")["config"], decoding_tuning.GRID
    assert {name: config[name] for name in changed} == {name: best[name] for name in changed}
    assert config["rerank"] == ("consensus" if best["rerank_weight"] else "none")
    assert f"best: {best['CIDEr']:.4f} with --beam_size {best['beam_size']}" in out
    assert load(epoch)["config"] == before
    succeed("--mode test --split val --output_dir chosen --model_path run/best.pt")
    assert read_json("chosen/val_metrics.json")["CIDEr"] == pytest.approx(best["CIDEr"])


def test_tune_is_for_the_data_that_was_trained_on(shop):
    captions_named("named.txt", {name: f"Images/{name}" for name in listed("test")})
    flags = "--mode tune --image_dir data/sample --captions_file named.txt --model_path"
    outcome = program(flags, shop / "lstm/best.pt")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "--mode tune needs the data that" in outcome.err and not Path("named.pt").exists()


def test_tune_is_for_beams_alone(shop):
    outcome = program("--mode tune --algorithm greedy --model_path", shop / "lstm/best.pt")
    assert outcome.status == 2 and "--mode tune is for --algorithm beam alone" in outcome.err


def test_reranking_without_an_index_or_of_training_images_is_refused(shop):
    picture = f"data/sample/Images/{listed('test')[0]}"
    missing = program(
        "--mode caption --rerank consensus --model_path", shop / "lstm/best.pt", "--images", picture
    )
    assert (missing.status, missing.out, missing.err.count("\n")) == (2, "", 1)
    assert "neighbours.pt" in missing.err and "--mode test" in missing.err
    own = program(
        "--mode test --split train --rerank consensus --model_path", shop / "lstm/best.pt"
    )
    assert own.status == 2 and "--split train" in own.err and "--rerank none" in own.err


def test_caption_mode_takes_folders_and_goes_on_past_what_is_no_image(shop):
    Path("album").mkdir()
    for number, name in enumerate(listed("test")[:2]):
        shutil.copy(f"data/sample/Images/{name}", f"album/{number}.jpg")
    Path("album/0b.png").write_text("no picture")
    Path("album/notes.txt").write_text("not looked at: its name is no picture's")
    outcome = program(
        "--mode caption --model_path", shop / "lstm/best.pt", "--images album album/notes.txt"
    )
    assert outcome.status == 1
    assert [line.split("\t")[0] for line in outcome.out.splitlines()] == [
        "album/0.jpg",
        "album/1.jpg",
    ]
    assert all(line.split("\t")[1] for line in outcome.out.splitlines())
    assert (
        outcome.err.count("\n") == 2
        and "album/0b.png" in outcome.err
        and "album/notes.txt" in outcome.err
    )


def test_a_folder_of_a_phone_is_captioned_and_what_cannot_be_read_is_counted(shop):
    Path("album").mkdir()
    with Image.open(f"data/sample/Images/{listed('test')[0]}") as picture:
        picture.save("album/IMG_1.HEIC", quality=95)
    with Image.open("album/IMG_1.HEIC") as heic:
        heic.save("album/img_2.png")
    for name in ("a.CR2", "b.svg", "c.psd", "d.nef", "notes.txt", "data.json"):
        Path("album", name).write_text("")
    outcome = program("--mode caption --model_path", shop / "lstm/best.pt", "--images album")
    heic, png = (line.split("\t") for line in outcome.out.splitlines())
    assert outcome.status == 0 and [heic[0], png[0]] == ["album/IMG_1.HEIC", "album/img_2.png"]
    assert heic[1] == png[1]
    assert outcome.err == (
        "--images album: left out 4 of formats that are not read: a.CR2, b.svg, c.psd, ...\n"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_more_pictures_than_are_decoded_together_are_captioned_in_their_order(shop, workers):
    """A picture that is none, in the second chunk, shifts nothing."""
    Path("none.jpg").write_text("no picture")
    folders = ["data/sample/Images"] * 3
    flags = f"--mode caption --algorithm greedy --num_workers {workers} --model_path"
    once = succeed(flags, shop / "lstm/best.pt", "--images", folders[0])
    assert once.count("\n") == 40 < fic.DECODE_CHUNK < 120
    images = [*folders[:2], "data/sample/Images", "none.jpg", folders[2]]
    outcome = program(flags, shop / "lstm/best.pt", "--images", *images)
    assert outcome.status == 1 and outcome.out == 4 * once
    assert outcome.err.count("\n") == 1 and "none.jpg: not a readable image" in outcome.err


def test_attention_pictures_carry_the_photographs_names_from_chunk_to_chunk(shop, monkeypatch):
    """Two of the same name, in two folders, get two pictures; one that is no picture none."""
    monkeypatch.setattr(fic, "DECODE_CHUNK", 2)
    images = [f"data/sample/Images/{name}" for name in listed("test")[:2]]
    stems = [Path(image).stem for image in images]
    Path("none.jpg").write_text("no picture")
    Path("other").mkdir()
    shutil.copy(images[0], "other")
    same = Path("other", Path(images[0]).name)
    flags = "--mode caption --num_workers 0 --save_attention_viz --output_dir out --model_path"
    outcome = program(
        flags, shop / "attention/best.pt", "--images", images[0], "none.jpg", images[1], same
    )
    names = {path.name for path in Path("out").glob("attention_viz_*.png")}
    assert names == {f"attention_viz_{stem}.png" for stem in (*stems, f"{stems[0]}_2")}
    where = "attention pictures: out/*attention_viz_*.png\n"
    assert outcome.err.endswith(where) and "attention pictures" not in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"progressive": True, "subsampling": 0}], ids=str
)
def test_a_phones_largest_photograph_is_captioned(shop, options):
    with Image.open(f"data/sample/Images/{listed('test')[0]}") as picture:
        picture.resize((12000, 9000), Image.Resampling.BILINEAR).save("large.jpg", **options)
    (line,) = succeed(
        "--mode caption --model_path", shop / "lstm/best.pt", "--images large.jpg"
    ).splitlines()
    path, text = line.split("\t")
    assert path == "large.jpg" and text


def test_file_names_of_any_bytes_are_captioned(shop):
    """Linux takes any bytes for a name; a stdout in UTF-8, as a terminal's is, must take them too."""
    name = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(f"data/sample/Images/{listed('test')[0]}", name)
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(written):
        status = fic.main(fic.parse_args(["--mode", "caption", "--model_path", str(shop / "lstm/best.pt"),
                                          "--images", name]))  # fmt: skip
    written.flush()
    assert status == 0 and written.buffer.getvalue().startswith(b"caf")


def test_best_pt_alone_captions_pictures_where_there_is_nothing_else(shop, monkeypatch):
    """No cache, no dataset, no weights file: they are gone, and nothing is put in their place."""
    torch.save(
        download_datasets.load_encoder_weights("shufflenet_v2_x0_5", "random", 1), "weights.pth"
    )
    flags = "--encoder_weights weights.pth --cache_dir cache_of_this_test"
    path = train(ATTENTION, flags) / "best.pt"
    picture = f"data/sample/Images/{listed('test')[0]}"
    expected = succeed("--mode caption --model_path", path, "--images", picture).split("\t")[1]
    Path("empty").mkdir()
    shutil.copy(path, "empty/best.pt")
    shutil.copy(picture, "empty/picture.jpg")
    for folder in ("cache_of_this_test", "saved_models"):
        shutil.rmtree(folder)
    for file in ("weights.pth", "data", "feature_cache"):
        Path(file).unlink()
    monkeypatch.chdir("empty")
    before = snapshot()
    assert (
        succeed("--mode caption --model_path best.pt --images picture.jpg")
        == f"picture.jpg\t{expected}"
    )
    assert snapshot() == before


# ------------------------------------------------------------------------------------------------- attention pictures


def check_pictures(folder, names, advanced=False):
    """Pictures and raw maps of these names, and of no other; each map (h, w) sums to 1 and they differ by word."""
    kinds = ("attention_viz", "advanced_attention_viz")[: 1 + advanced]
    expected = {f"{kind}_{name}.png" for kind in kinds for name in names}
    expected |= {f"attention_maps_{name}.npz" for name in names}
    assert {path.name for path in Path(folder).iterdir() if "attention_" in path.name} == expected
    for name in names:
        raw = np.load(Path(folder) / f"attention_maps_{name}.npz")
        assert raw["maps"].shape == (len(raw["words"]), 7, 7) and len(raw["words"]) >= 2
        assert raw["maps"].sum(axis=(1, 2)) == pytest.approx(1, abs=1e-4)
        assert (
            raw["maps"].std(axis=(1, 2)).min() > 0
            and np.abs(raw["maps"][0] - raw["maps"][1]).max() > 0
        )
        assert not set(raw["words"]) & set(caption_batches.Vocabulary.SPECIALS)
        with Image.open(Path(folder) / f"attention_viz_{name}.png") as picture:
            assert picture.width > 300


def test_training_draws_attention_pictures_without_a_display(monkeypatch):
    """plt.show() once stopped the training loop; pyplot, which it belongs to, is not even imported."""
    pyplot = sys.modules.pop("matplotlib.pyplot", None)
    monkeypatch.delenv("DISPLAY", raising=False)
    out = succeed(TINY, ATTENTION, "--save_attention_viz --attention_viz_samples 2 --min_length 3")
    folder = run_dir(out)
    assert f"attention pictures: {folder}/*attention_viz_*.png\n" in out
    assert "matplotlib.pyplot" not in sys.modules
    if pyplot:
        sys.modules["matplotlib.pyplot"] = pyplot
    assert "_att_" in folder.name
    check_pictures(folder, ["sample_1", "sample_2"])


def test_test_mode_draws_the_first_images_of_the_split(shop):
    out = succeed("--mode test --min_length 3 --advanced_attention_viz --attention_viz_samples 1 --output_dir found",
                  "--model_path", shop / "attention/best.pt")  # fmt: skip
    assert "CIDEr" in out and "attention pictures: found/*attention_viz_*.png\n" in out
    check_pictures("found", ["sample_1"], advanced=True)
    words = np.load("found/attention_maps_sample_1.npz")["words"]
    assert " ".join(words) == read_json("found/test_captions.json")[0]["caption"]


def test_caption_mode_draws_every_picture(shop):
    images = [f"data/sample/Images/{name}" for name in listed("test")[:2]]
    out = succeed("--mode caption --min_length 3 --save_attention_viz --output_dir found --images", *images,
                  "--model_path", shop / "attention/best.pt")  # fmt: skip
    check_pictures("found", [Path(image).stem for image in images])
    for image, line in zip(images, out.splitlines(), strict=True):
        raw = np.load(f"found/attention_maps_{Path(image).stem}.npz")
        assert " ".join(raw["words"]) == line.split("\t")[1]
        with Image.open(image) as photograph:
            assert np.array_equal(raw["photograph"], np.asarray(photograph.convert("RGB")))


def test_boxes_beside_the_captions_give_a_peak_in_box_rate(shop, monkeypatch):
    """Of one word of each caption, whose box is the columns up to its first peak, or those beside it."""
    monkeypatch.setattr(attention_visualization, "_draw", lambda *_, **__: b"")  # the maps suffice
    flags, path = own_copy(), shop / "attention/best.pt"
    test, maps = f"--mode test --min_length 2 {flags}", "--save_attention_viz"
    succeed(test, maps, "--attention_viz_samples 4 --output_dir found --model_path", path)
    boxes, hits, shares = {}, [], []
    for number, row in enumerate(read_json("found/test_captions.json"), start=1):
        raw = np.load(f"found/attention_maps_sample_{number}.npz")
        word = str(raw["words"][number % 2])
        peaks = (raw["maps"].reshape(-1, 49).argmax(1) % 7)[raw["words"] == word]
        columns = [range(peaks[0] + 1), range(peaks[0]) or range(1, 7)][number % 2]
        box = [columns.start / 7, 0, columns.stop / 7, 1]
        boxes[row["file_name"]] = [{"names": [word, "thing"], "box": box}]
        hits.extend(peak in columns for peak in peaks)
        shares.extend(len(columns) / 7 for _ in peaks)
    Path("data_copy/boxes.json").write_text(json.dumps(boxes))
    out = succeed(test, "--output_dir again --model_path", path)
    found, rate = read_json("again/test_metrics.json")["attention"], sum(hits) / len(hits)
    chance = sum(shares) / len(shares)
    assert found["nouns"] == len(hits) >= 4 and 0 < rate < 1
    expected = {"peak_in_box": rate, "chance": chance, "ratio": rate / chance, "nouns": len(hits)}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert f"attention peak in its noun's box: {rate:.3f}, {rate / chance:.1f} times chance" in out
    succeed(f"--mode test {flags} --output_dir lstm --model_path", shop / "lstm/best.pt")
    assert "attention" not in read_json("lstm/test_metrics.json")


def test_seeds_of_another_split_are_refused_and_of_another_recipe_said_to_be_so(shop):
    test = (
        "--mode test --algorithm greedy --model_path",
        shop / "lstm",
        "--output_dir out --seeds",
    )
    odd = train("--max_train_images 20") / "best.pt"
    outcome = program(*test, shop / "attention", odd)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and not Path("out").exists()
    assert f"error: --seeds {odd}: has another split than {shop / 'lstm/best.pt'}" in outcome.err
    outcome = program(*test, shop / "attention", train("--learning_rate 0.005"))
    said = warnings_in(outcome)
    assert outcome.status == 0 and len(said) == 2
    assert "it has --decoder attention (lstm), --attention_dim 8 (512)" in said[0]
    assert said[1].endswith("it has --learning_rate 0.005 (0.02), a plan of 1 epoch (4)")
    assert len(read_json("out/test_seeds.json")["checkpoints"]) == 3


@pytest.mark.parametrize("ensemble", [False, True])
def test_attention_is_measured_in_test_mode(ensemble, shop, monkeypatch):
    """Of an ensemble as of one decoder: its maps are the mean of the members', and so are its words."""
    monkeypatch.setattr(attention_visualization, "_draw", lambda *_, **__: b"")  # the maps suffice
    members = ("--ensemble", shop / "lstm/best.pt") if ensemble else ()
    out = succeed("--mode test --min_length 3 --save_attention_viz --attention_viz_samples 4",
                  "--output_dir found --model_path", shop / "attention/best.pt", *members)  # fmt: skip
    maps = [np.load(f"found/attention_maps_sample_{n}.npz")["maps"] for n in (1, 2, 3, 4)]
    maps = np.concatenate(maps).reshape(-1, 49)
    found = read_json("found/test_metrics.json")["attention"]
    entropy = -(maps * np.log(maps)).sum(1).mean() / np.log(49)
    assert found["entropy_share"]["all"] == pytest.approx(entropy, rel=1e-5)
    assert found["images"] == 4 and found["words"]["all"] == len(maps) >= 12
    falls = [
        found[way][share]["all"] for way in ("deletion", "insertion") for share in ("0.1", "0.5")
    ]
    assert all(math.isfinite(fall["map"]) and fall["map"] != fall["random"] for fall in falls)
    fall = found["deletion"]["0.2"]["all"]
    numbers = rf"{entropy:.3f} +{fall['map']:.3f} +{fall['random']:.3f}"
    assert re.search(rf"^    all +{len(maps)} +{numbers}$", out, re.MULTILINE)


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_maps_by_gradients_are_measured_for_any_decoder(decoder, shop, monkeypatch):
    """As the pictures have them, peaks in boxes too; its captions stay what they were."""
    monkeypatch.setattr(attention_visualization, "_draw", lambda *_, **__: b"")  # the maps suffice
    monkeypatch.setattr(attention_measures, "MEASURED_IMAGES", 3)
    flags = f"--mode test --min_length 2 {own_copy()} --model_path {shop / decoder / 'best.pt'}"
    drawn = "--viz_method gradient --save_attention_viz --attention_viz_samples 4"
    Path("data_copy/boxes.json").unlink()
    out = succeed(flags, "--output_dir plain")
    assert "reads grids" not in out
    out = succeed(flags, drawn, "--output_dir found")
    assert ("--viz_method gradient reads grids" in out) == (decoder == "lstm")
    raw = [np.load(f"found/attention_maps_sample_{n}.npz") for n in (1, 2, 3, 4)]
    maps = np.concatenate([each["maps"] for each in raw[:3]]).reshape(-1, 49)
    found = read_json("found/test_metrics.json")["attention"]
    entropy = -(maps * np.log(np.maximum(maps, 1e-30))).sum(1).mean() / np.log(49)
    assert found["method"] == "gradient" and found["words"]["all"] == len(maps)
    assert found["entropy_share"]["all"] == pytest.approx(entropy, rel=1e-4)
    fall = found["deletion"]["0.2"]["all"]
    assert fall["map"] > fall["random"] and "peak_in_box" not in found
    assert "  gradient maps of 3 images: entropy" in out
    captions = [read_json(f"{folder}/test_captions.json") for folder in ("plain", "found")]
    assert [row["caption"] for row in captions[0]] == [row["caption"] for row in captions[1]]

    boxes = {
        row["file_name"]: [{"names": [str(each["words"][0])], "box": [0, 0, 1, 1]}]
        for row, each in zip(captions[1], raw, strict=True)
    }
    Path("data_copy/boxes.json").write_text(json.dumps(boxes))
    succeed(flags, "--viz_method gradient --output_dir boxes")  # of all four pictures
    found = read_json("boxes/test_metrics.json")["attention"]
    nouns = sum((each["words"] == each["words"][0]).sum() for each in raw)
    assert found["nouns"] == nouns and found["peak_in_box"] == 1 and found["images"] == 3


def test_an_ensemble_without_attention_is_mapped_by_gradients(shop):
    members = [shop / "lstm/best.pt", shop / "lstm/model_epoch_4.pt"]
    succeed(
        "--mode test --viz_method gradient --output_dir found --model_path",
        members[0],
        "--ensemble",
        members[1],
    )
    found = read_json("found/test_metrics.json")["attention"]
    assert found["method"] == "gradient" and 0 < found["entropy_share"]["all"] < 1


def test_maps_by_gradients_are_drawn_of_lstm_in_training_and_caption_mode(shop):
    """Training reads means for itself and grids of the validation images that it draws."""
    drawn = "--viz_method gradient --save_attention_viz --min_length 3"
    out = succeed(TINY, "--decoder lstm", drawn, "--attention_viz_samples 2")
    folder = run_dir(out)
    check_pictures(folder, ["sample_1", "sample_2"])
    assert f"--mode test --model_path {folder / 'best.pt'}" in out
    assert out.count("--viz_method gradient reads grids") == 1
    image = f"data/sample/Images/{listed('test')[0]}"
    out = succeed(
        "--mode caption",
        drawn,
        "--output_dir found --images",
        image,
        "--model_path",
        folder / "best.pt",
    )
    name = Path(image).stem
    check_pictures("found", [name])
    words = np.load(f"found/attention_maps_{name}.npz")["words"]
    assert " ".join(words) == out.strip().split("\t")[1]


def test_only_the_first_images_are_measured(shop, monkeypatch):
    monkeypatch.setattr(attention_measures, "MEASURED_IMAGES", 3)
    succeed(
        "--mode test --algorithm greedy --output_dir found --model_path", shop / "attention/best.pt"
    )
    scores = read_json("found/test_metrics.json")
    assert scores["images"] == 4 and scores["attention"]["images"] == 3


def test_validation_logs_the_entropy_of_attention_and_warns_once_where_it_is_uniform():
    """It is what test mode measures."""
    outcome = program(TINY, ATTENTION, "--epochs 3 --learning_rate 0.0001")
    folder, warning = run_dir(outcome), "warning: attention maps are all but uniform"
    assert [line.startswith(warning) for line in warnings_in(outcome)].count(True) == 1
    logged = read_json(folder / "metrics_history.json")["attention_entropy"]
    said = re.findall(r"^  Attention entropy: (\S+) of uniform$", outcome.out, re.MULTILINE)
    assert said == [f"{entropy:.3f}" for entropy in logged] and len(said) == 3
    path = folder / "model_epoch_3.pt"
    succeed("--mode test --split val --algorithm greedy --output_dir found --model_path", path)
    found = read_json("found/val_metrics.json")["attention"]["entropy_share"]["all"]
    assert logged[-1] == pytest.approx(found, rel=1e-5) and 0.97 < found < 1
    lstm = program(TINY, "--epochs 2 --decoder lstm")
    assert "Attention entropy" not in lstm.out and "attention maps" not in lstm.err
    assert "attention_entropy" not in (run_dir(lstm) / "metrics.csv").read_text()


def test_a_run_from_before_attention_was_measured_goes_on(shop):
    checkpoint = load(shop / "attention/model_epoch_4.pt")
    for row in checkpoint["history"]:
        del row["attention_entropy"]
    torch.save(checkpoint, "model_epoch_4.pt")
    folder = run_dir(succeed("--epochs 1 --model_path", Path("model_epoch_4.pt")))
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    entropies = [row["attention_entropy"] for row in rows]
    assert entropies[:4] == [""] * 4 and 0 < float(entropies[4]) <= 1


@pytest.mark.parametrize("content", ["{", '{"a.jpg": [[10, 20, 30, 40]]}', '{"a.jpg": []}'])
def test_foreign_boxes_are_named_before_decoding_and_the_test_goes_on(content, shop):
    """They once ended it after all decoding."""
    flags = own_copy()
    Path("data_copy/boxes.json").write_text(content)
    flags += " --mode test --algorithm greedy --output_dir found --model_path"
    outcome = program(flags, shop / "attention/best.pt")
    (warning,) = warnings_in(outcome)
    assert outcome.status == 0 and warning.startswith("warning: data_copy/boxes.json: ")
    scores = read_json("found/test_metrics.json")
    assert scores["images"] == 4 and "peak_in_box" not in scores["attention"]
    assert warnings_in(program(flags, shop / "lstm/best.pt")) == []


@pytest.mark.slow
def test_the_specified_training_commands_run(monkeypatch):
    """Made small, on stand-ins for the two datasets; no pictures drawn."""
    shutil.copytree("data/sample", "own/flickr8k")
    Path("own/flickr30k").symlink_to("flickr8k")
    Path("data").unlink()
    Path("own").rename("data")
    monkeypatch.setattr(caption_pictures, "draw_attention", lambda *_: None)
    small = " ".join(TINY.split()[2:])
    for command in TRAINING_COMMANDS:
        name, decoder = re.search(r"--dataset_type (\w+) --decoder (\w+)", command).groups()
        out = succeed(command, small, DECODERS[decoder], "--batch_size 160")
        assert run_dir(out).parent == Path(f"saved_models/{name}/shufflenet_v2_x0_5_{decoder}")
        assert len(EPOCH_BLOCK.findall(out)) == 1


@pytest.mark.slow
def test_a_signal_to_a_real_process_ends_it_with_last_pt():
    """Ctrl-C in a terminal reaches the whole process; here it comes once the first epoch was printed."""
    command = [sys.executable, "-u", str(Path(fic.__file__)), *TINY.split(), "--epochs", "1000000"]
    command += ["--keep_checkpoints", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        try:
            lines = iter(child.stdout.readline, "")
            folder = run_dir(next(line for line in lines if line.startswith("run directory")))
            next(line for line in lines if line.startswith("Epoch 1 completed"))
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130 and "Traceback" not in err
    assert load(folder / "last.pt")["epoch"] >= 1
    assert not list(folder.glob("*.partial"))

"""config_file.py: what a file or the environment gives, where it gives way, and what is refused."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption_options
import config_file
import decoding_tuning
import flickr_image_caption as program
from caption_options import DEFAULTS, ENCODERS, TABLE, inherit, parse_args, path_notes
from split_data import open_dataset

ROOT = Path(caption_options.__file__).parent
DOCUMENTED = """\
# Data Configuration
images_path: "/kaggle/input/flickr8k/Images/"
captions_file: "/kaggle/input/flickr8k/captions.txt"
glove_path: "/kaggle/input/glove6b200d/glove.6B.200d.txt"

train_ratio: 0.6
val_ratio: 0.2
test_ratio: 0.2
word_count_threshold: 5  # Min word frequency
random_seed: 42

# Model Configuration
feature_extractor: "EfficientNetB3"  # or "InceptionV3"
feature_dim: 1536  # 1536 for EfficientNetB3, 2048 for InceptionV3
image_size: [300, 300]  # [299, 299] for InceptionV3

embedding_dim: 200  # GloVe dimension
hidden_dim: 256     # LSTM/attention dimension
num_attention_heads: 4

dropout_rate: 0.3
recurrent_dropout: 0.2

# Training Configuration
batch_size: 64
epochs: 20
learning_rate: 0.0001

lr_decay_factor: 0.5  # Reduce LR by this factor on plateau
lr_patience: 3        # Epochs to wait before reducing LR
min_lr: 0.000001

early_stopping_patience: 5

use_mixed_precision: true  # float16 for faster training

artifacts_dir: "../shared/artifacts"
"""
MEANT = {  # by DOCUMENTED
    "image_dir": "/kaggle/input/flickr8k/Images/", "captions_file": "/kaggle/input/flickr8k/captions.txt",
    "dataset_type": "custom", "split_ratios": (0.6, 0.2, 0.2), "freq_threshold": 5, "seed": 42,
    "split_seed": 42, "encoder": "efficientnet_b3", "image_size": 300, "embed_size": 200,
    "hidden_size": 256, "attention_dim": 256, "attention_heads": 4, "decoder": "attention",
    "attention": "adaptive", "drop_prob": 0.3, "batch_size": 64, "epochs": 20,
    "learning_rate": 0.0001, "use_scheduler": True, "scheduler_type": "reduce_lr_on_plateau",
    "scheduler_factor": 0.5, "scheduler_patience": 3, "min_lr": 1e-6,
    "early_stopping_patience": 5, "precision": "auto", "model_save_dir": "../shared/artifacts",
    "glove_path": "/kaggle/input/glove6b200d/glove.6B.200d.txt", "recurrent_dropout": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder; no variable of ours is set."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith(config_file.PREFIX)]:
        monkeypatch.delenv(variable)
    return tmp_path


def write(text, path="exp.yaml"):
    """A file in the working folder."""
    Path(path).write_text(text)
    return path


def options_of(text, *flags):
    """The options of a run with --config, whose file holds `text`."""
    return parse_args(["--config", write(text), *" ".join(flags).split()])


def refusal(capsys, text, *flags):
    """The one line with which a file is refused, after the program's name."""
    with pytest.raises(SystemExit) as stop:
        options_of(text, *flags)
    captured = capsys.readouterr()
    start = "flickr_image_caption.py: error: "
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith(start) and captured.err.count("\n") == 1
    return captured.err.removeprefix(start).rstrip("\n")


def origins_of(options, *names):
    return [str(options.origins[name]) for name in names]


# ------------------------------------------------------------------------------------------ precedence


def test_a_flag_comes_before_the_environment_that_before_the_file_and_that_before_the_default(
    monkeypatch,
):
    monkeypatch.setenv("CAPTION_BATCH_SIZE", "22")
    monkeypatch.setenv("CAPTION_SEED", "2")
    text = "batch_size: 33\nseed: 3\nepochs: 3\n"
    options = options_of(text, "--batch_size 11")
    assert (options.training.batch_size, options.run.seed, options.training.epochs) == (11, 2, 3)
    assert origins_of(options, "batch_size", "seed", "epochs", "learning_rate") == [
        "flag",
        "environment CAPTION_SEED",
        "file exp.yaml:3",
        "default",
    ]
    assert options.typed == {"config", "batch_size", "seed", "epochs"}
    assert options.variables == ["CAPTION_SEED"]


def test_a_file_comes_before_the_checkpoint_and_that_before_the_default():
    options = options_of("batch_size: 33\n", "--model_path best.pt")
    options = inherit(options, "best.pt", {"batch_size": 7, "learning_rate": 0.5})
    assert (options.training.batch_size, options.training.learning_rate) == (33, 0.5)
    names = ("batch_size", "learning_rate", "model_save_dir", "model_path")
    assert origins_of(options, *names) == [
        "file exp.yaml:1",
        "checkpoint best.pt",
        "default",
        "flag",
    ]
    assert path_notes(options, {"batch_size": 7}) == [
        "--batch_size 33 (file exp.yaml:1), not the checkpoint's 7"
    ]


@pytest.mark.parametrize("text, flags", [("preset: laptop\n", ""), ("", "--preset laptop")])
def test_what_a_file_says_comes_before_a_preset_typed_or_named_by_the_file(text, flags):
    options = options_of(f"{text}hidden_size: 64\n", flags)
    assert (options.model.hidden_size, options.model.embed_size) == (64, 256)
    assert origins_of(options, "embed_size") == ["preset laptop"]


def test_the_model_that_a_new_run_begins_with_comes_after_a_file():
    options = options_of("drop_prob: 0.1\nhidden_size: 8\n", "--init_from runs")
    adopted = caption_options.adopt(options, "a.pt", {"drop_prob": 0.4, "hidden_size": 8})
    assert (adopted.model.drop_prob, adopted.model.hidden_size) == (0.1, 8)
    with pytest.raises(
        ValueError, match=r"--hidden_size 8 \(stored: 16\).*\(hidden_size: exp\.yaml:2\)$"
    ):
        caption_options.adopt(options, "a.pt", {"hidden_size": 16})


def test_every_option_can_come_from_the_environment_and_from_a_file():
    """As typed: the same text, of the same type."""
    for name, option in TABLE.items():
        if name == "config" or option.default in (None, ()) or option.kind is bool:
            continue
        parts = option.default if option.several else [option.default]
        text = " ".join(map(str, parts))
        (setting,) = config_file.read_environment({f"CAPTION_{name.upper()}": text}, TABLE).values()
        assert setting.value == option.default and type(setting.value) is type(option.default)
        write(f"{name}: {json.dumps(parts if option.several else parts[0])}\n")
        (setting,) = config_file.read_config("exp.yaml", caption_options.GROUPS).settings.values()
        assert setting.value == option.default and type(setting.value) is type(option.default)


def test_common_names_in_the_environment_count_below_ours_and_are_named(
    monkeypatch, capsys, tmp_path
):
    for name, text in {"DEVICE": "cpu", "BATCH_SIZE": "16", "NUM_EPOCHS": "7"}.items():
        monkeypatch.setenv(name, text)
    options = parse_args([])
    assert (options.run.device, options.training.batch_size, options.training.epochs) == (
        "cpu",
        16,
        7,
    )
    assert capsys.readouterr().err.splitlines() == [
        "flickr_image_caption.py: --device comes from the environment variable DEVICE",
        "flickr_image_caption.py: --batch_size comes from the environment variable BATCH_SIZE",
        "flickr_image_caption.py: --epochs comes from the environment variable NUM_EPOCHS",
    ]
    (tmp_path / "exp.yaml").write_text("batch_size: 5\nlearning_rate: 0.5\n")
    monkeypatch.setenv("CAPTION_DEVICE", "cuda:1")
    options = parse_args(["--epochs", "3", "--config", str(tmp_path / "exp.yaml")])
    assert (options.run.device, options.training.batch_size, options.training.epochs) == (
        "cuda:1",
        16,
        3,
    )
    assert options.training.learning_rate == 0.5
    assert capsys.readouterr().err.count("\n") == 1  # of BATCH_SIZE
    monkeypatch.setenv("BATCH_SIZE", "many")
    with pytest.raises(SystemExit):
        parse_args([])
    assert (
        "environment variable BATCH_SIZE: 'many' is not a whole number" in capsys.readouterr().err
    )


def test_switches_and_lists_in_the_environment(monkeypatch):
    monkeypatch.setenv("CAPTION_USE_SCHEDULER", "yes")
    monkeypatch.setenv("CAPTION_HORIZONTAL_FLIP", "false")
    monkeypatch.setenv("CAPTION_DISTILL_FROM", "a.pt 'b c.pt'")
    monkeypatch.setenv("CAPTION_EPOCHS", "")
    options = parse_args([])
    assert options.schedule.use_scheduler is True and options.training.horizontal_flip is False
    assert options.training.distill_from == ("a.pt", "b c.pt")
    assert "epochs" not in options.typed


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CAPTION_EPOCHS", "many", "environment variable CAPTION_EPOCHS: 'many' is not a whole number"),
        ("CAPTION_DECODER", "gru", "environment variable CAPTION_DECODER: 'gru' is none of lstm, attention, gpt2"),
        ("CAPTION_BATCHSIZE", "3", "environment variable CAPTION_BATCHSIZE: no such option (did you mean "
         "CAPTION_BATCH_SIZE?)"),
        ("CAPTION_MIN_LENGTH", "99", "--min_length 99 must be below --max_length 40 "
         "(--min_length: CAPTION_MIN_LENGTH)"),
    ],
)  # fmt: skip
def test_variables_are_refused_by_name(monkeypatch, capsys, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit):
        parse_args([])
    assert capsys.readouterr().err == f"flickr_image_caption.py: error: {message}\n"


def test_other_programs_variables_are_theirs(monkeypatch):
    """Kubernetes sets such ones for a service named caption."""
    monkeypatch.setenv("CAPTION_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("CAPTION_PORT", "tcp://10.0.0.1:80")
    assert parse_args([]).as_dict() == DEFAULTS


# --------------------------------------------------------------------- what does nothing is left out


def test_a_file_serves_every_mode():
    text = "epochs: 20\nbatch_size: 64\nbeam_size: 3\nhidden_size: 8\npreset: laptop\n"
    options = options_of(text, "--mode test --model_path best.pt")
    assert options.typed == {"config", "mode", "model_path", "beam_size", "hidden_size"}
    settled = inherit(options, "best.pt", {"hidden_size": 8, "batch_size": 7})
    assert (settled.decoding.beam_size, settled.training.batch_size) == (3, 7)
    with pytest.raises(
        ValueError, match=r"--hidden_size 8 \(stored: 16\).*\(hidden_size: exp\.yaml:4\)$"
    ):
        inherit(options, "best.pt", {"hidden_size": 16})


def test_tune_searches_what_a_file_would_fix():
    text = "beam_size: 3\nrerank: none\nalgorithm: greedy\nlength_penalty: 0.5\n"
    options = options_of(
        text.replace("beam_size", "max_length"), "--mode tune --model_path best.pt"
    )
    options = inherit(options, "best.pt", {})
    assert decoding_tuning.make_grid(options) == decoding_tuning.GRID
    assert options.rerank.rerank == "consensus"


def test_a_resumed_run_keeps_its_plan_unless_more_epochs_are_typed():
    text = "epochs: 20\nuse_scheduler: true\nscheduler_type: one_cycle\nwarmup_epochs: 2\n"
    stored = {"use_scheduler": True, "scheduler_type": "one_cycle", "warmup_epochs": 2}
    options = inherit(options_of(text, "--resume latest"), "best.pt", stored)
    assert options.typed == {"config", "resume"}  # as if nothing had been said
    options = inherit(options_of(text, "--resume latest --epochs 5"), "best.pt", stored)
    assert options.typed == {"config", "resume", "epochs"} and options.training.epochs == 5
    both = options_of("model_path: best.pt\nepochs: 4\n")  # a file that goes on by itself
    assert both.typed == {"config", "model_path", "epochs"}


def test_what_the_checkpoint_has_already_is_the_checkpoints():
    """Else a file that repeats encoder_weights would have the weights of best.pt fetched anew."""
    text = "encoder_weights: imagenet\nimage_dir: pictures\nlearning_rate: 0.1\n"
    options = options_of(text, "--resume latest")
    stored = {"encoder_weights": "imagenet", "image_dir": "pictures", "learning_rate": 0.2}
    assert inherit(options, "best.pt", stored).typed == {"config", "resume", "learning_rate"}


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        ("--decoder lstm", {"attention", "attention_dim", "attention_heads", "patch_dropout"}),
        ("--attention additive", {"attention", "attention_heads"}),
        ("--algorithm greedy", {"beam_size", "rerank", "neighbours"}),
    ],
)
def test_a_file_gives_way_to_flags_that_leave_it_nothing_to_do(flags, left_out):
    text = """decoder: attention\nattention: adaptive\nattention_dim: 8\nattention_heads: 2
patch_dropout: 0.1\nbeam_size: 3\nrerank: consensus\nneighbours: 7\nembed_size: 6\n"""
    options = options_of(text, flags)
    values = options.as_dict()
    given = {
        "attention",
        "attention_dim",
        "attention_heads",
        "patch_dropout",
        "beam_size",
        "rerank",
    }
    kept = (given | {"neighbours", "embed_size"}) - left_out
    assert kept <= options.typed
    typed = flags.removeprefix("--").split()[0]
    assert {n: values[n] for n in left_out - {typed}} == {
        n: DEFAULTS[n] for n in left_out - {typed}
    }


def test_the_environment_gives_way_to_whatever_leaves_it_nothing_to_do(monkeypatch):
    monkeypatch.setenv("CAPTION_ATTENTION_DIM", "8")
    assert "attention_dim" not in parse_args([]).typed
    assert parse_args(["--decoder", "attention"]).model.attention_dim == 8
    assert options_of("decoder: attention\n").model.attention_dim == 8


def test_a_typed_start_replaces_that_of_a_file():
    assert options_of("resume: latest\npreset: laptop\n", "--model_path a.pt").checkpoint == "a.pt"
    vectors = "glove_path: words.txt\nfreeze_embeddings: true\n"
    assert options_of(vectors).training.glove_path == "words.txt"
    for flag in ("init_from", "resume", "model_path"):  # whose words have vectors of their own
        options = options_of(vectors, f"--{flag} a.pt")
        assert options.training.glove_path is None and not options.model.freeze_embeddings
    options = options_of("model_path: a.pt\n", "--preset laptop")
    assert options.checkpoint is None and options.model.embed_size == 256
    options = options_of("seeds: [a.pt, b.pt]\n", "--mode test --model_path c.pt --ensemble d.pt")
    assert options.output.seeds == () and options.output.ensemble == ("d.pt",)


# ------------------------------------------------------------------------------- another trainer's file


def test_the_documented_file_means_what_it_says(capsys):
    options = options_of(DOCUMENTED)
    assert options.as_dict() == DEFAULTS | MEANT | {"config": "exp.yaml"}
    assert capsys.readouterr().err == ""


def test_headings_are_for_the_reader(capsys):
    nested = DOCUMENTED.replace("# Data Configuration", "data:")
    nested = nested.replace("# Model Configuration", "model:")
    nested = nested.replace("# Training Configuration", "training:")
    nested = re.sub(r"^(?=\w+: )", "  ", nested, flags=re.MULTILINE)
    assert options_of(nested).as_dict() == options_of(DOCUMENTED).as_dict()
    assert options_of("decoding:\n  beam_size: 2\nschedule:\n").decoding.beam_size == 2


def test_flags_come_before_the_documented_file():
    options = options_of(
        DOCUMENTED, "--decoder lstm --encoder resnet18 --split_seed 3 --scheduler_type step"
    )
    assert (options.model.decoder, options.features.encoder) == ("lstm", "resnet18")
    assert (options.data.split_seed, options.run.seed) == (3, 42)
    assert not options.typed & {"attention", "attention_heads", "attention_dim", "scheduler_factor"}


def test_what_a_key_only_implies_gives_way_to_what_the_file_says():
    options = options_of(
        "hidden_dim: 64\nattention_dim: 32\nnum_attention_heads: 2\nattention: adaptive\n"
    )
    assert (options.model.hidden_size, options.model.attention_dim) == (64, 32)
    assert options_of("hidden_dim: 64\n").as_dict()["attention_dim"] == 512  # of lstm


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("use_mixed_precision: false", "precision", "float32"),
        ("use_mixed_precision: True", "precision", "auto"),
        ("image_size: 96", "image_size", 96),
        ("feature_extractor: resnet18\nfeature_dim: 512", "encoder", "resnet18"),
        ("feature_extractor: InceptionV3\nfeature_dim: 2048", "encoder", "inception_v3"),
        ("feature_extractor: resnet18+vgg11\nfeature_dim: 1024", "encoder", "resnet18+vgg11"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # in YAML 1.1 text
        ("resnet_weights: random", "encoder_weights", "random"),
        ("decoder_type: attention", "decoder", "attention"),
        ("split_ratios: [0.6, 0.3, 0.1]", "split_ratios", (0.6, 0.3, 0.1)),
        ("distill_from: a.pt", "distill_from", ("a.pt",)),
        ("max_train_images:", "max_train_images", None),
        ("model_save_dir: 2020", "model_save_dir", "2020"),
        ("horizontal_flip: on", "horizontal_flip", True),
    ],
)
def test_values_are_read_as_if_they_were_typed(text, name, value):
    assert options_of(text).as_dict()[name] == value


def test_every_key_is_in_the_documentation():
    page = (ROOT / "docs/EXPERIMENTS.md").read_text()
    written = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.MULTILINE))
    assert written.keys() == config_file.KEYS.keys()
    for key, row in config_file.KEYS.items():
        names = [name for name in (row.option, *row.also) if name in TABLE]
        assert re.findall(r"`--(\w+)", written[key]) == names, key


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b3", "vgg11", "convnext_tiny",
     "squeezenet1_1", "swin_t"],
)  # fmt: skip
def test_the_table_of_channels_is_torchvisions(name):
    with torch.device("meta"):
        model, grid = torchvision.models.get_model(name, weights=None), torch.rand(2, 3, 64, 64)
        for module in ENCODERS[name]:
            grid = getattr(model, module)(grid)
    assert config_file.FEATURE_DIMS[name] == grid.size(1)


def test_the_table_of_channels_has_every_encoder():
    assert config_file.FEATURE_DIMS.keys() >= ENCODERS.keys()


# -------------------------------------------------------------------------------------- a run's record


def test_the_record_of_an_old_run_repeats_it():
    """It names every option, also those that do nothing, and much that is no option."""
    typed = "--decoder lstm --encoder resnet18 --use_scheduler --scheduler_type step --epochs 3 --preset laptop"
    options = parse_args(typed.split())
    record = options.as_dict() | {"decoder_type": "lstm", "timestamp": "20241201_143022"}
    del record["decoder"]
    record |= {"command": "python x.py", "git": {"commit": "c"}, "environment": {"gpus": []}}
    record["origins"] = {"decoder": "flag"}
    again = options_of(json.dumps(record, indent=2))
    assert again.as_dict() == options.as_dict() | {"config": "exp.yaml"}
    other = options_of(json.dumps(record), "--decoder attention --mode test --model_path a.pt")
    assert (other.run.mode, other.model.decoder) == ("test", "attention")


def test_what_a_record_holds_beside_options_is_unknown_in_another_file(capsys):
    assert refusal(capsys, "git: {}\n").startswith("exp.yaml:1: 'git': expected a value")
    assert refusal(capsys, "command: x\n").startswith("exp.yaml:1: unknown key 'command'")


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nbatchsize: 3", "exp.yaml:2: unknown key 'batchsize' (did you mean batch_size?)"),
        ("hiden_dim: 3", "exp.yaml:1: unknown key 'hiden_dim' (did you mean hidden_dim?)"),
        ("trainin: {epochs: 3}", "exp.yaml:1: 'trainin': expected a value or a list of values"),
        ("model:\n  batch_size: 3\n  sgd: 1", "exp.yaml:3: unknown key 'sgd'"),
        ("batch_size: many", "exp.yaml:1: batch_size 'many' is not a whole number"),
        ("batch_size: 2.5", "exp.yaml:1: batch_size '2.5' is not a whole number"),
        ("batch_size: true", "exp.yaml:1: batch_size 'true' is not a whole number"),
        ("batch_size: [1, 2]", "exp.yaml:1: batch_size takes one value, not a list"),
        ("batch_size: {a: 2}", "exp.yaml:1: 'batch_size': expected a value or a list of values"),
        ("batch_size: 0", "exp.yaml:1: batch_size must be at least 1 and at most 65536, got 0"),
        ("batch_size:", "exp.yaml:1: batch_size has no value"),
        ("use_scheduler: maybe", "exp.yaml:1: use_scheduler 'maybe' is not true or false"),
        ("use_mixed_precision: 16", "exp.yaml:1: use_mixed_precision '16' is not true or false"),
        ("algorithm: beem", "exp.yaml:1: algorithm 'beem' is none of greedy, beam, full_beam, sample "
         "(did you mean beam?)"),
        ("image_size: [300, 299]", "exp.yaml:1: image_size is no square, to which pictures are squashed: give "
         "its side"),
        ("image_dir: ''", "--image_dir is empty: give a path (image_dir: exp.yaml:1)"),
        ("a: 1\nepochs: 2\nepochs: 3", "exp.yaml:3: 'epochs' stands in line 2 already: give it once"),
        ("epochs: 2\ntraining:\n  epochs: 3", "exp.yaml:3: 'epochs' stands in line 1 already: give it once"),
        ("embed_size: 8\nembedding_dim: 8", "exp.yaml:2: embedding_dim is the same as embed_size, exp.yaml:1: "
         "give one"),
        ("train_ratio: 0.6\nval_ratio: 0.2\ntest_ratio: 0.3", "--split_ratios 0.6 0.2 0.3: give three shares, of "
         "train, val and test, that sum to 1 (train_ratio, val_ratio, test_ratio: exp.yaml:1)"),
        ("train_ratio: 0.6\nval_ratio: 0.4", "exp.yaml:1: train_ratio needs test_ratio beside it"),
        ("train_ratio: 0.6\nval_ratio: x\ntest_ratio: 0.2", "exp.yaml:2: val_ratio 'x' is not a number"),
        ("feature_extractor: EfficientNetB3\n\nfeature_dim: 2048", "exp.yaml:3: feature_dim 2048, but --encoder "
         "efficientnet_b3 gives 1536: correct it or leave it out"),
        ("feature_dim: 1536", "exp.yaml:1: feature_dim 1536, but --encoder resnet50 gives 2048: correct it or "
         "leave it out"),
        ("feature_dim: big", "exp.yaml:1: feature_dim 'big' is not a whole number"),
        ("attention_dim: 8", "--attention_dim belongs to --decoder attention, not lstm (attention_dim: exp.yaml:1)"),
        ("decoder: lstm\nnum_attention_heads: 4", "--attention_heads belongs to --decoder attention, not lstm "
         "(num_attention_heads: exp.yaml:2, decoder: exp.yaml:1)"),
        ("min_lr: 1e-6", "--min_lr needs --use_scheduler (min_lr: exp.yaml:1)"),
        ("learning_rate: 0.1\nuse_scheduler: true\nmin_lr: 1", "--min_lr 1 is above --learning_rate 0.1 "
         "(min_lr: exp.yaml:3, learning_rate: exp.yaml:1)"),
        ("config: other.yaml", "exp.yaml:1: config is not read from a file: a file names no other one"),
        ("plugin: mine.py", "exp.yaml:1: plugin is not read from a file: it runs code: type it, as --plugin"),
        # no YAML, or more of YAML than values
        ("", "exp.yaml: holds no keys: expected lines such as 'batch_size: 64'"),
        ("- 1\n- 2", "exp.yaml: holds no keys: expected lines such as 'batch_size: 64'"),
        ("epochs: 3\n---\nepochs: 4", "exp.yaml:2: but found another document"),
        ("epochs: 3\nbatch_size = 4\nseed: 1", "exp.yaml:3: could not find expected ':'"),
        ("epochs: [3", "exp.yaml:1: expected ',' or ']', but got '<stream end>'"),
        ("? [a]\n: 1", "exp.yaml:1: a key must be a word"),
        ("seed: &a 1\nepochs: *a", "exp.yaml:2: alias *a is not followed: write the value out"),
        ("seed: 1\nencoder: !!python/object/apply:os.system ['touch hacked']", "exp.yaml:2: tag "
         "'tag:yaml.org,2002:python/object/apply:os.system' is not read: write a plain value"),
        ("seed: !secret 1", "exp.yaml:1: tag '!secret' is not read: write a plain value"),
        ("seed: 1\x00", "exp.yaml:1: holds control characters: no YAML file"),
        ("[" * 500, "exp.yaml: nested too deeply for a configuration"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_and_line(capsys, text, message):
    assert refusal(capsys, text) == message
    assert not Path("hacked").exists()


def test_files_that_are_none(capsys, folder):
    def line(path):
        with pytest.raises(SystemExit):
            parse_args(["--config", str(path)])
        return capsys.readouterr().err.removeprefix("flickr_image_caption.py: error: ").rstrip()

    assert line("gone.yaml") == "--config gone.yaml: no such file"
    assert line(folder) == f"--config {folder}: is a folder: give a YAML file"
    assert line("/dev/zero") == "--config /dev/zero: is no file: give a YAML file"
    Path("binary").write_bytes(b"epochs: 3\n\xff\xfe\x89PNG")
    assert line("binary") == "binary:2: no text in UTF-8: give a YAML file"
    with Path("huge.yaml").open("wb") as file:
        file.truncate(100 * 2**20)
    tracemalloc.start()
    assert line("huge.yaml") == "huge.yaml: larger than 64 KiB: no configuration"
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_a_bomb_of_aliases_takes_neither_time_nor_memory(capsys):
    """Nine levels of ten aliases each: a billion values, were they followed."""
    levels = ["a0: &a0 [lol, lol]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)
    ]
    started = time.process_time()
    assert refusal(capsys, "\n".join(levels)).startswith("exp.yaml:2: alias *a0 is not followed")
    assert time.process_time() - started < 2


def test_paths_of_a_file_are_looked_up_before_torch_is_imported(capsys, folder):
    options = options_of(DOCUMENTED)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        caption_options.check_files(options)
    assert capsys.readouterr().err == (
        "flickr_image_caption.py: error: --image_dir /kaggle/input/flickr8k/Images: no such file or folder "
        "(images_path: exp.yaml:2)\n"
    )


def test_shards_that_a_command_fetches_are_not_opened_on_a_file_s_word(monkeypatch):
    write("image,caption\na.jpg,a dog\n", "captions.csv")
    source = "pipe:touch hacked"
    options = options_of(f"image_dir: '{source}'\ncaptions_file: captions.csv\n")
    with pytest.raises(
        ValueError, match=f"^--image_dir {source}: shards that a command fetches are not"
    ):
        open_dataset(options)
    assert not Path("hacked").exists()
    monkeypatch.setenv("CAPTION_IMAGE_DIR", source)  # which is the user's own
    assert "image_dir" in options_of("image_dir: pictures\n").by_hand


def test_a_file_and_its_mistakes_are_read_without_torch():
    write("epochs: 3\n")
    code = "import sys, caption_options as c; c.parse_args(['--config', 'exp.yaml']); print('torch' in sys.modules)"
    out = subprocess.check_output(
        [sys.executable, "-c", code], cwd=".", env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert out == b"False\n"


# ------------------------------------------------------------------------------------------ whole runs


def run(*flags):
    """Train; returns the run's folder, what it printed and its run_config.json."""
    options = caption_options.check_files(parse_args(" ".join(map(str, flags)).split()))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert program.main(options) == 0
    path = Path(re.search(r"^run directory: (.+)$", out.getvalue(), re.MULTILINE)[1])
    return path, out.getvalue(), json.loads((path / "run_config.json").read_text())


def test_the_sample_configuration_runs_and_its_record_repeats_it(shop, monkeypatch):
    monkeypatch.setenv("CAPTION_SEED", "5")
    path, _, record = run("--config", ROOT / "configs/sample.yaml", "--batch_size 40")
    assert (record["batch_size"], record["seed"], record["epochs"]) == (40, 5, 3)
    wanted = ("batch_size", "seed", "epochs", "learning_rate", "grad_clip")
    file = f"file {ROOT}/configs/sample.yaml"
    assert [record["origins"][name] for name in wanted] == [
        "flag", "environment CAPTION_SEED", f"{file}:18", f"{file}:20", "default"]  # fmt: skip
    assert " CAPTION_SEED=5 " in record["command"]
    monkeypatch.delenv("CAPTION_SEED")
    again, _, second = run("--config", path / "run_config.json")
    assert again != path and second["origins"]["seed"].startswith(f"file {path}/run_config.json:")
    curves = [json.loads((each / "loss_curve.json").read_text()) for each in (path, again)]
    assert curves[0]["train_losses"] == curves[1]["train_losses"]


@pytest.mark.parametrize("text", [DOCUMENTED, None], ids=["documented", "configs/flickr8k.yaml"])
def test_files_for_flickr8k_run_on_a_folder_laid_out_like_it(shop, tmp_path, monkeypatch, text):
    """Forty drawn pictures in Flickr8k's layout, without split lists; a small encoder for speed."""
    data = tmp_path / "input/data/flickr8k"
    data.mkdir(parents=True)
    (data / "Images").symlink_to(shop / "data/sample/Images")
    (data / "captions.txt").write_text((shop / "data/sample/captions.txt").read_text())
    monkeypatch.chdir(data.parents[1])
    Path("words.txt").write_text("the" + " 0.5" * 200 + "\n")
    text = text or (ROOT / "configs/flickr8k.yaml").read_text()
    text = text.replace("/kaggle/input/glove6b200d/glove.6B.200d.txt", "words.txt")
    write(text.replace("/kaggle/input/flickr8k", "data/flickr8k"))
    path, out, record = run(
        "--config exp.yaml --encoder shufflenet_v2_x0_5 --encoder_weights random --image_size 224"
        " --epochs 1 --hidden_size 16 --num_workers 0 --freq_threshold 1 --cache_dir",
        shop / "feature_cache",
    )
    ratios = "0.6 0.2 0.2" if "glove_path" in text else "0.8 0.1 0.1"
    assert f"splits: drawn by image with --split_seed 42 --split_ratios {ratios}" in out
    assert record["scheduler_type"] == "reduce_lr_on_plateau" and record["attention_heads"] == 4
    assert (path / "best.pt").is_file()


def test_the_hubs_variables_name_where_to_push(monkeypatch, capsys):
    monkeypatch.setenv("HF_REPO_NAME", "ann/captions")
    monkeypatch.setenv("HF_PRIVATE", "true")
    options = parse_args([])
    assert (options.run.push_to_hub, options.run.hub_private) == ("ann/captions", True)
    assert (
        "--push_to_hub comes from the environment variable HF_REPO_NAME" in capsys.readouterr().err
    )
    assert parse_args(["--push_to_hub", "ben/other"]).run.push_to_hub == "ben/other"
    monkeypatch.setenv("HF_REPO_NAME", "no user")
    with pytest.raises(SystemExit):
        parse_args([])
    assert "HF_REPO_NAME: 'no user': give USER/NAME" in capsys.readouterr().err

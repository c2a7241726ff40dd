"""caption_options.py: where a value comes from, what is refused, and what a checkpoint may decide."""

import contextlib
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import caption_options
import flickr_image_caption as program
from caption_options import (
    CAPTION,
    DEBUG,
    DEFAULTS,
    FIXED,
    GROUPS,
    INHERITED,
    MODES,
    OWN,
    TABLE,
    TEST,
    TRAIN,
    TUNE,
    adopt,
    inherit,
    parse_args,
    settle,
)

ROOT = Path(caption_options.__file__).parent
NEEDED = {
    TRAIN: "--model_path best.pt",
    TEST: "--mode test --model_path best.pt",
    CAPTION: "--mode caption --model_path best.pt --images dog.jpg",
    DEBUG: "--mode debug --model_path best.pt --images dog.jpg",
    TUNE: "--mode tune --model_path best.pt",
}


DATASET = ["--dataset_type", "custom", "--image_dir", ".", "--captions_file", __file__]


def other_value(name):
    """A value that the option may have and that is not its default."""
    option = TABLE[name]
    if isinstance(option.kind, tuple):
        return next(value for value in option.kind if value != option.default)
    if option.kind is bool:
        return not option.default
    own = {
        "push_to_hub": "user/model",
        "device": "cpu",
        "encoder": "resnet18+vgg11",
        "split_ratios": (0.5, 0.25, 0.25),
    }
    if name in own:
        return own[name]
    if option.kind is str:
        return ("typed",) if option.several else "typed"
    divides = {"attention_heads": (2,), "gpt2_heads": (2,), "gpt2_width": (64,)}
    for value in divides.get(name, (1e-5, 3, 64)):
        if value != option.default and caption_options.is_value_of(option, value):
            return value
    raise AssertionError(f"no other value of --{name}")


def as_flags(values):
    """The command line that types these values."""
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def needs_of(name, values):
    """`values` changed so that the option acts."""
    option, values = TABLE[name], dict(values)
    for other, wanted in option.needs.items():
        if values.get(other, DEFAULTS[other]) not in wanted:
            value = wanted[0] if isinstance(wanted, tuple) else other_value(other)
            values |= needs_of(other, values) | {other: value}
    if name in ("save_attention_viz", "advanced_attention_viz", "viz_method"):
        values["decoder"] = "attention"
    if name in ("advanced_attention_viz", "viz_method"):
        values["save_attention_viz"] = True
    return values


def resumed(config, mode=TRAIN, typed=""):
    """Options of a run that starts from best.pt, whose configuration holds `config`."""
    options = parse_args([*NEEDED[mode].split(), *typed.split()])
    return inherit(options, Path("runs/best.pt"), config)


def refusal(capsys, command):
    """The one line with which a command is refused, after the program's name."""
    with pytest.raises(SystemExit) as stop:
        parse_args(command.split())
    message = capsys.readouterr().err
    start = "flickr_image_caption.py: error: "
    assert stop.value.code == 2 and message.startswith(start) and message.count("\n") == 1
    return message.removeprefix(start).rstrip("\n")


# ------------------------------------------------------------------------------------------ precedence


def test_without_flags_every_option_has_its_default():
    options = parse_args([])
    assert options.as_dict() == DEFAULTS
    assert options.typed == frozenset() and options.checkpoint is None


# a plugin is no value, and --runs names no checkpoint that could come before or after it
@pytest.mark.parametrize(
    "name", [n for n in TABLE if n not in ("mode", "config", "plugin", "runs")]
)
def test_what_is_typed_comes_before_the_checkpoint_and_that_before_the_default(name):
    option, mode = TABLE[name], TABLE[name].modes[0]
    value = other_value(name)
    stored = needs_of(name, {})
    if option.stored in (INHERITED, FIXED):
        assert resumed(stored | {name: value}, mode).as_dict()[name] == value
    if name in ("model_path", "resume", "preset", "init_from", "glove_path", "freeze_embeddings"):
        typed = as_flags(stored | {name: value})  # which say what to start from
        assert parse_args(typed).as_dict()[name] == value
        return
    # what is needed is typed, too, as far as this mode lets it be
    typeable = {other: wanted for other, wanted in stored.items() if mode in TABLE[other].modes}
    base = [*NEEDED[mode].split(), *as_flags(typeable)]
    if name != "images":
        options = inherit(parse_args(base), "best.pt", stored)
        assert options.as_dict()[name] == option.default
    options = parse_args([*base, *as_flags({name: value})])
    assert name in options.typed
    if option.stored != FIXED:
        assert inherit(options, "best.pt", stored).as_dict()[name] == value


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.stored == FIXED])
def test_what_shapes_the_model_comes_from_the_checkpoint_and_may_not_be_typed_otherwise(name):
    stored = needs_of(name, {})
    stored |= {name: other_value(name)}
    for mode in MODES:
        assert resumed(stored, mode).as_dict()[name] == stored[name]
        again = f"--{name} {stored[name]}"
        assert resumed(stored, mode, again).as_dict()[name] == stored[name]
    alien = next(value for value in alternatives(name) if value not in (stored[name], None))
    line = re.escape(f"--{name} {alien} (stored: {stored[name]}): leave them out")
    message = rf"^runs/best\.pt: .*{line}"
    for mode in MODES:
        with pytest.raises(ValueError, match=message):
            resumed(stored, mode, f"--{name} {alien}")


def test_a_fine_tuned_model_that_was_tuned_to_rerank_is_trained_on_without():
    stored = {"fine_tune_encoder": 2, "rerank": "consensus"}
    assert resumed(stored, TRAIN).rerank.rerank == "none"
    assert resumed(stored, "test").rerank.rerank == "consensus"


def test_only_a_tracker_that_is_asked_for_needs_its_package(monkeypatch, capsys, tmp_path):
    """The record of a run names it, too, as false."""
    monkeypatch.setattr(caption_options.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "record.yaml").write_text("tensorboard: false\nwandb: false\n")
    parse_args(["--config", str(tmp_path / "record.yaml")])
    assert "pip install -r requirements-tracking.txt" in refusal(capsys, "--wandb")


def alternatives(name):
    """Values that an option may have."""
    kind = TABLE[name].kind
    if name in ("attention_heads", "gpt2_heads", "gpt2_width"):  # they divide sizes
        return [2, 8, 16]
    if name == "encoder":
        return [*caption_options.ENCODERS]
    return kind if isinstance(kind, tuple) else [33, 34, 35]


def test_every_option_that_differs_from_the_model_is_named():
    with pytest.raises(
        ValueError, match=r"--embed_size 7 \(stored: 5\), --num_layers 2 \(stored: 4\)"
    ):
        resumed({"embed_size": 5, "num_layers": 4}, typed="--embed_size 7 --num_layers 2")


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.stored == OWN])
def test_what_each_run_has_of_its_own_is_never_the_checkpoints(name):
    stored = needs_of(name, {}) | {name: other_value(name)}
    for mode in MODES:
        value = resumed(stored, mode).as_dict()[name]
        expected = {"mode": mode, "model_path": "runs/best.pt"}.get(name, DEFAULTS[name])
        if name == "images" and mode in (CAPTION, DEBUG):
            expected = ("dog.jpg",)
        assert value == expected


@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if isinstance(row.stored, tuple)])
def test_some_options_are_inherited_in_some_modes_only(name):
    stored = needs_of(name, {}) | {name: other_value(name)}
    for mode in MODES:
        inherited = mode in TABLE[name].stored
        assert resumed(stored, mode).as_dict()[name] == (
            stored[name] if inherited else TABLE[name].default
        )


def test_options_that_the_checkpoint_lacks_have_their_defaults():
    options = resumed({})
    expected = DEFAULTS | {"model_path": "runs/best.pt"}
    assert options.as_dict() == expected


def test_a_run_that_goes_on_names_the_checkpoint_it_found_and_no_longer_resume():
    options = inherit(parse_args(["--resume", "latest"]), Path("a/model_epoch_3.pt"), {})
    assert (options.run.model_path, options.run.resume) == ("a/model_epoch_3.pt", None)


@pytest.mark.parametrize(
    ("typed", "checkpoint"),
    [
        ("", None),
        ("--model_path runs", "runs"),
        ("--resume runs/last.pt", "runs/last.pt"),
        ("--resume latest --model_save_dir elsewhere", "elsewhere"),
        ("--mode test --model_path best.pt", "best.pt"),
    ],
)
def test_where_the_checkpoint_is_looked_for(typed, checkpoint):
    assert parse_args(typed.split()).checkpoint == checkpoint


def test_advanced_attention_pictures_are_attention_pictures():
    options = parse_args(["--decoder", "attention", "--advanced_attention_viz"])
    assert options.pictures.save_attention_viz and options.pictures.advanced_attention_viz
    assert "save_attention_viz" not in options.typed


def test_an_alias_is_the_option():
    options = parse_args(["--resnet_weights", "own.pth"])
    assert options.features.encoder_weights == "own.pth"
    assert options.typed == {"encoder_weights"}


def test_a_rule_of_another_name_is_the_rule():
    """As document C names it; a run's files have one name for it."""
    options = parse_args(["--select_by", "bleu"])
    assert options.training.select_by == "bleu4"
    assert resumed({"select_by": "bleu"}).training.select_by == "bleu4"


def test_settled_options_cannot_be_changed():
    options = parse_args([])
    with pytest.raises(AttributeError):
        options.training = None
    for group in GROUPS:
        values = getattr(options, group)
        for name in values._fields:
            with pytest.raises(AttributeError):
                setattr(values, name, None)
        with pytest.raises(AttributeError):
            values.more = 1
    assert all(isinstance(getattr(options, group), tuple) for group in GROUPS)
    assert isinstance(options.typed, frozenset)


def test_paths_that_a_checkpoint_decides_are_shown_and_its_cache_is_named():
    config = {"captions_file": "a.csv", "image_dir": "b", "cache_dir": "c", "model_save_dir": "d"}

    def notes(mode, typed=""):
        return caption_options.path_notes(resumed(config, mode, typed), config)

    read = ["image dir (from the checkpoint): b", "captions file (from the checkpoint): a.csv"]
    cache = (
        "features go to ./feature_cache; the checkpoint's run used --cache_dir c: "
        "give it to reuse its features"
    )
    assert notes(TRAIN) == notes(TEST) == [*read, cache]
    assert notes(CAPTION) == []
    assert notes(TEST, "--captions_file own.csv --cache_dir own") == read[:1]
    assert notes(TEST, "--no_feature_cache") == read
    assert caption_options.path_notes(resumed(DEFAULTS, TEST), DEFAULTS) == []


def seeds_of(*paths, output_dir=None):
    """Options of a test of a/best.pt and --seeds."""
    options = resumed({}, TEST)
    output = options.output._replace(seeds=paths, output_dir=output_dir)
    run = options.run._replace(model_path="a/best.pt")
    return options._replace(run=run, output=output)


def test_seeds_are_options_of_a_test_each():
    alone = caption_options.each_alone(seeds_of())
    assert alone == [seeds_of()]
    options = seeds_of("b/best.pt", "./a/best.pt", "c/best.pt", "b/best.pt")
    alone = caption_options.each_alone(options)
    paths = ["a/best.pt", "b/best.pt", "c/best.pt"]
    assert [each.run.model_path for each in alone] == paths
    for each, path in zip(alone, paths, strict=True):
        run = each.run._replace(model_path="a/best.pt")
        assert each._replace(run=run) == seeds_of() and each.run.model_path == path
    alone = caption_options.each_alone(seeds_of("a/last.pt", "c/best.pt", output_dir="out"))
    assert [each.output.output_dir for each in alone] == ["out/1", "out/2", "out/3"]


def test_seeds_that_write_the_same_files_or_are_none_are_refused():
    with pytest.raises(
        ValueError, match=r"^--seeds names no checkpoint but a/best\.pt: give others$"
    ):
        caption_options.each_alone(seeds_of("./a/best.pt"))
    line = r"^--seeds b/last\.pt: its files would replace those of b/best\.pt: give --output_dir$"
    with pytest.raises(ValueError, match=line):
        caption_options.each_alone(seeds_of("b/best.pt", "b/last.pt"))


def test_what_two_recipes_differ_in():
    one = resumed({"learning_rate": 0.1, "decoder": "lstm", "seed": 1}, TEST)
    other = {"decoder": "attention", "seed": 2, "keep_checkpoints": 1, "captions_file": "a"}
    other = resumed(other, TEST)
    differences = ["--decoder attention (lstm)", "--learning_rate 0.0001 (0.1)"]
    assert caption_options.recipe_differences(one, other) == differences
    assert caption_options.recipe_differences(one, one) == []


# ------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", caption_options.PRESETS)
def test_a_preset_is_what_typing_its_options_would_be(name):
    preset = caption_options.PRESETS[name]
    options = parse_args(["--preset", name])
    given = {option: value for option, value in preset.items() if value is not None}
    assert options.as_dict() == parse_args(as_flags(given)).as_dict() | {"preset": name}
    assert options.typed == {"preset"}
    assert options.as_dict().items() >= preset.items()


def test_the_presets_are_the_recipes_that_they_are_named_after():
    def given(name, *options):
        return [caption_options.PRESETS[name][option] for option in options]

    sizes = ("embed_size", "hidden_size", "num_layers", "epochs", "batch_size", "learning_rate")
    assert given("laptop", *sizes) == given("best", *sizes) == [256, 512, 1, 15, 256, 0.003]
    assert given("document-a", *sizes) == [512, 1024, 3, 15, 64, 0.001]
    pictures = ("encoder", "image_size", "coarse_size")
    assert given("laptop", *pictures) == ["mobilenet_v2", 320, 224]
    assert given("best", *pictures) == ["resnet50+mobilenet_v2", 320, 224]
    assert given("best", "rerank", "no_repeat_ngram_size") == ["consensus", 3]


def test_what_is_typed_comes_before_the_preset_and_that_before_the_default():
    options = parse_args(["--preset", "laptop", "--hidden_size", "64"]).as_dict()
    assert (options["hidden_size"], options["embed_size"]) == (64, 256)
    assert options["beam_size"] == DEFAULTS["beam_size"]


@pytest.mark.parametrize(
    ("typed", "left_out"),
    [
        ("--decoder lstm", {"attention", "attention_dim", "patch_dropout"}),
        ("--attention additive", set()),
        ("--scheduler_type step", {"warmup_epochs"}),
        ("--epochs 1", {"warmup_epochs"}),
        ("--image_size 160", {"coarse_size"}),
    ],
)
def test_a_preset_s_options_give_way_to_typed_ones_that_make_them_idle(typed, left_out):
    options = parse_args(["--preset", "laptop", *typed.split()])
    laptop = caption_options.PRESETS["laptop"]
    kept = laptop.keys() - left_out - options.typed
    values = options.as_dict()
    assert {name: values[name] for name in kept} == {name: laptop[name] for name in kept}
    assert {values[name] for name in left_out} == {DEFAULTS[name] for name in left_out}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--preset laptop --resume latest", "--preset is for a new run: a resumed one has its "
         "checkpoint's options"),
        ("--preset laptop --model_path a.pt", "--preset is for a new run: a resumed one has its "
         "checkpoint's options"),
        ("--mode test --model_path a.pt --preset best", "--preset belongs to --mode train, not test"),
        ("--preset laptop --decoder lstm --attention_dim 8",
         "--attention_dim belongs to --decoder attention, not lstm"),
    ],
)  # fmt: skip
def test_a_preset_is_refused_where_it_would_do_nothing(capsys, command, message):
    assert refusal(capsys, command) == message


def test_the_documentation_spells_the_presets_out():
    lines = caption_options.as_markdown().splitlines()
    for name in caption_options.PRESETS:
        (line,) = (line for line in lines if line.startswith(f"- `{name}`: "))
        flags = line.removeprefix(f"- `{name}`: ").strip("`")
        spelt_out = parse_args(flags.split()).as_dict()
        assert spelt_out | {"preset": name} == parse_args(["--preset", name]).as_dict()


# ------------------------------------------------------------------------------- another model's weights

ADAPTIVE = {"decoder": "attention", "attention": "adaptive", "embed_size": 256, "hidden_size": 512,
            "num_layers": 1, "attention_dim": 256, "drop_prob": 0.4, "patch_dropout": 0.5}  # fmt: skip
PICTURES = {"encoder": "mobilenet_v2", "encoder_weights": "own.pth", "image_size": 320,
            "coarse_size": 224}  # fmt: skip


def adopted(config, typed=""):
    """Options of a new run whose decoder begins as that of a checkpoint with this configuration."""
    options = parse_args(["--init_from", "runs", *typed.split()])
    return adopt(options, Path("runs/best.pt"), config).as_dict()


def test_what_builds_decoder_and_encoder_comes_from_the_model_it_begins_with_and_nothing_else():
    everything = {name: other_value(name) for name, row in TABLE.items() if row.stored != OWN}
    built = PICTURES | ADAPTIVE | {"attention_heads": 2, "freeze_embeddings": True}
    others = [name for name in GROUPS["model"].rows if name.startswith(("gpt2_", "prefix_"))]
    others += ["recurrent_dropout", "attention_layer", "clip_model"]
    built |= {name: everything[name] for name in others}
    expected = DEFAULTS | built | {"init_from": "runs/best.pt"}
    assert adopted(everything | built) == expected


def test_typed_comes_before_the_preset_that_before_the_model_it_begins_with_and_that_before_defaults():
    values = adopted(ADAPTIVE | {"drop_prob": 0.1, "attention_heads": 8}, "--preset laptop")
    assert (values["drop_prob"], values["attention_heads"]) == (0.4, 8)  # the preset has no heads
    values = adopted(ADAPTIVE, "--preset laptop --drop_prob 0.2 --patch_dropout 0")
    assert (values["drop_prob"], values["patch_dropout"]) == (0.2, 0)
    assert (values["learning_rate"], values["beam_size"]) == (0.003, DEFAULTS["beam_size"])
    assert adopted({"decoder": "attention"}, "--alpha_c 3")["alpha_c"] == 3


@pytest.mark.parametrize(
    ("typed", "encoder", "coarse_size"),
    [("--encoder resnet18", "resnet18", None), ("--preset best", "resnet50+mobilenet_v2", 224)],
)
def test_another_encoder_has_its_own_weights_and_sizes(typed, encoder, coarse_size):
    values = adopted(PICTURES | ADAPTIVE | {"coarse_size": 160}, typed)
    assert values["encoder"] == encoder and values["encoder_weights"] == "imagenet"
    assert values["coarse_size"] == coarse_size
    assert adopted(PICTURES, "--image_size 256")["coarse_size"] == 224  # the same encoder's


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--decoder lstm", "--decoder lstm (stored: attention)"),
        ("--attention additive --num_layers 3", "--num_layers 3 (stored: 1), --attention additive "
         "(stored: adaptive)"),
        ("--preset laptop --embed_size 8", "--embed_size 8 (stored: 256)"),
        ("--preset document-a --decoder attention --embed_size 256 --hidden_size 512",
         "--num_layers 3 (--preset document-a; stored: 1)"),
    ],
)  # fmt: skip
def test_another_decoder_than_the_one_it_begins_with_is_refused(typed, message):
    expected = (
        f"--init_from runs/best.pt: its decoder has other options than {message}: "
        "leave them out, they come from it, or give what is stored"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        adopted(ADAPTIVE, typed)


def test_sizes_that_a_decoder_does_not_have_do_not_contradict_it():
    assert adopted({"decoder": "lstm", "attention_dim": 8} | LSTM, "--preset document-a")
    with pytest.raises(ValueError, match="--attention_dim belongs to --decoder attention, not lst"):
        adopted({"decoder": "lstm"}, "--attention_dim 8")


LSTM = {"embed_size": 512, "hidden_size": 1024, "num_layers": 3}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--init_from a.pt --resume latest", "--init_from is for a new run: a resumed one has its "
         "checkpoint's weights"),
        ("--init_from a.pt --model_path b.pt", "--init_from is for a new run: a resumed one has its "
         "checkpoint's weights"),
        *((f"--glove_path a.txt --{other} b.pt", "--glove_path is for a new decoder: leave it out, "
           "a checkpoint's words have vectors of their own") for other in ("init_from", "resume", "model_path")),
        ("--mode test --model_path a.pt --init_from b.pt",
         "--init_from belongs to --mode train, not test"),
        ("--init_from=", "--init_from is empty: give a path"),
    ],
)  # fmt: skip
def test_beginning_with_another_model_is_for_a_new_run(capsys, command, message):
    assert refusal(capsys, command) == message


def test_a_run_that_begins_with_another_model_has_a_plan_of_its_own():
    one_cycle = "--use_scheduler --scheduler_type one_cycle --warmup_epochs 3 --epochs 3"
    with pytest.raises(ValueError, match="--warmup_epochs 3 must be below --epochs 3"):
        adopted(ADAPTIVE, one_cycle)


def test_a_model_to_begin_with_whose_options_are_unusable_is_named():
    with pytest.raises(ValueError, match=r"^runs/best\.pt: .* no usable --hidden_size"):
        adopted({"hidden_size": 2**30})
    with pytest.raises(ValueError, match=r"^runs/best\.pt: its configuration contradicts itself"):
        adopted(ADAPTIVE | {"attention_heads": 3})


# --------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--min_length 40", "--min_length 40 must be below --max_length 40"),
        ("--split_ratios 0.6 0.2 0.3", "--split_ratios 0.6 0.2 0.3: give three shares, of train, val "
         "and test, that sum to 1"),
        ("--split_ratios 0.5 0.5", "--split_ratios 0.5 0.5: give three shares, of train, val "
         "and test, that sum to 1"),
        ("--max_length 3 --min_length 3", "--min_length 3 must be below --max_length 3"),
        (
            "--use_scheduler --scheduler_type one_cycle --epochs 3 --warmup_epochs 3",
            "--warmup_epochs 3 must be below --epochs 3",
        ),
        (
            "--use_scheduler --min_lr 0.1 --learning_rate 0.01",
            "--min_lr 0.1 is above --learning_rate 0.01",
        ),
        (
            "--use_scheduler --scheduler_type cosine --learning_rate 1e-8",
            "--min_lr 1e-07 is above --learning_rate 1e-08",
        ),
        ("--min_lr 0.1", "--min_lr needs --use_scheduler"),
        ("--scheduler_type step", "--scheduler_type needs --use_scheduler"),
        (
            "--use_scheduler --scheduler_gamma 0.5",
            "--scheduler_gamma belongs to --scheduler_type step or exponential, not "
            "reduce_lr_on_plateau",
        ),
        ("--attention_dim 5", "--attention_dim belongs to --decoder attention, not lstm"),
        ("--alpha_c 0.5 --decoder lstm", "--alpha_c belongs to --decoder attention, not lstm"),
        (
            "--save_attention_viz",
            "--save_attention_viz belongs to --decoder attention, not lstm: --viz_method gradient "
            "maps any decoder",
        ),
        (
            "--viz_method attention --advanced_attention_viz",
            "--advanced_attention_viz belongs to --decoder attention, not lstm: --viz_method "
            "gradient maps any decoder",
        ),
        ("--viz_method gradient", "--viz_method needs --save_attention_viz in --mode train"),
        (
            "--decoder attention --viz_method attention",
            "--viz_method needs --save_attention_viz in --mode train",
        ),
        (
            "--decoder attention --attention_viz_samples 3",
            "--attention_viz_samples needs --save_attention_viz",
        ),
        (
            "--no_feature_cache --cache_dir elsewhere",
            "--cache_dir does nothing with --no_feature_cache",
        ),
        ("--temperature 2", "--temperature belongs to --algorithm sample, not beam"),
        ("--algorithm greedy --beam_size 3", "--beam_size belongs to --algorithm beam or full_beam, not greedy"),
        ("--mode test", "--mode test needs --model_path, the checkpoint to use"),
        ("--mode caption --model_path a.pt", "--mode caption needs --images, pictures or folders of them"),
        ("--mode test --model_path a.pt --epochs 3", "--epochs belongs to --mode train, not test"),
        ("--images a.jpg", "--images belongs to --mode caption and debug, not train"),
        ("--split val", "--split belongs to --mode test and compare, not train"),
        ("--ensemble a.pt", "--ensemble belongs to --mode test, caption and debug, not train"),
        ("--seeds a.pt", "--seeds belongs to --mode test, not train"),
        ("--mode test --model_path a.pt --seeds b.pt --ensemble c.pt",
         "--seeds and --ensemble exclude each other: only single checkpoints have a mean"),
        ("--fine_tune_encoder 2 --encoder resnet18+mobilenet_v2",
         "--fine_tune_encoder takes one encoder, not resnet18+mobilenet_v2"),
        ("--fine_tune_encoder 2 --fine_tune_after 10",
         "--fine_tune_after 10 must be below --epochs 10"),
        ("--encoder clip --viz_method gradient --save_attention_viz",
         "--viz_method gradient: --decoder lstm reads the pooled token of --encoder clip, which has no cells"),
        ("--fine_tune_encoder 2 --distill_from a.pt",
         "--distill_from: its teachers do not know an encoder that --fine_tune_encoder changes"),
        ("--fine_tune_encoder 2 --rerank consensus",
         "--rerank consensus compares pictures by an encoder that --fine_tune_encoder still changes: "
         "give it to --mode test"),
        ("--fine_tune_encoder 2 --use_scheduler --scheduler_type cosine --min_lr 1e-4 --learning_rate 1e-3 "
         "--encoder_learning_rate 1e-5",
         "--min_lr 0.0001 is above --encoder_learning_rate 1e-05"),
        (
            "--mode test --resume latest",
            "--resume belongs to --mode train, not test: give --model_path",
        ),
        (
            "--resume latest --model_path a.pt",
            "--resume and --model_path name the same thing: give one of them",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(capsys, command, message):
    assert refusal(capsys, command) == message


@pytest.mark.parametrize("name", ["model_path", "cache_dir", "image_dir", "captions_file"])
def test_an_empty_path_is_refused(capsys, name):
    with pytest.raises(SystemExit) as stop:
        parse_args([f"--{name}", ""])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --{name} is empty: give a path\n")
    with pytest.raises(SystemExit):
        parse_args(["--mode", "caption", "--model_path", "a.pt", "--images", "a.jpg", ""])
    assert "--images is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "most"),
    [
        ("--algorithm greedy", 1),
        ("--algorithm beam --beam_size 3", 3),
        ("--algorithm full_beam --beam_size 3", 3),
        ("--algorithm sample", None),
    ],
)
def test_no_more_captions_than_the_algorithm_finds(typed, most):
    def settled(count):
        return resumed({}, CAPTION, f"{typed} --num_captions {count}").decoding.num_captions

    assert settled(most or 1000) == (most or 1000)
    if most:
        algorithm = typed.split()[1]
        message = (
            rf"--num_captions {most + 1} is more than --algorithm {algorithm} finds \({most}\)"
        )
        with pytest.raises(ValueError, match=message):
            settled(most + 1)


@pytest.mark.parametrize(
    "command",
    [
        "--max_length 3 --min_length 2",
        "--use_scheduler --scheduler_type one_cycle --epochs 3 --warmup_epochs 2",
        "--use_scheduler --min_lr 0.01 --learning_rate 0.01",
        "--use_scheduler --scheduler_type step --learning_rate 1e-8",  # which has no smallest rate
        "--learning_rate 1e-8",
    ],
)
def test_what_only_nearly_contradicts_is_taken(command):
    assert parse_args(command.split()).typed


def test_a_resumed_one_cycle_may_go_on_for_fewer_epochs_than_its_warm_up_took():
    stored = {"use_scheduler": True, "scheduler_type": "one_cycle", "warmup_epochs": 4, "epochs": 9}
    assert resumed(stored, typed="--epochs 2").training.epochs == 2


def test_a_typed_option_is_judged_by_what_the_checkpoint_says():
    assert resumed({"decoder": "attention"}, typed="--alpha_c 0.3").training.alpha_c == 0.3
    with pytest.raises(ValueError, match="--alpha_c belongs to --decoder attention, not lstm"):
        resumed({"decoder": "lstm"}, typed="--alpha_c 0.3")
    adaptive = {"decoder": "attention", "attention": "adaptive"}
    with pytest.raises(
        ValueError, match="--alpha_c belongs to --attention additive or multi_head, not adaptive"
    ):
        resumed(adaptive, typed="--alpha_c 0.3")
    with pytest.raises(ValueError, match="--min_length 9 must be below --max_length 9"):
        resumed({"max_length": 9}, typed="--min_length 9")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("batch_size", "0"), ("batch_size", "1.5"), ("batch_size", "many"), ("epochs", "-1"),
        ("epochs", "9" * 400), ("num_workers", "-1"), ("learning_rate", "0"), ("learning_rate", "nan"),
        ("learning_rate", "inf"), ("weight_decay", "-0.1"), ("drop_prob", "1"),
        ("image_size", "31"), ("image_size", "1025"), ("seed", str(2**32)), ("max_bad_fraction", "1.1"),
        ("length_penalty", "11"), ("encoder", "vit_b_16"), ("decoder", "transformer"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_flag(capsys, name, text):
    message = refusal(capsys, f"--{name} {text}")
    assert message.startswith(f"argument --{name}") and text in message


@pytest.mark.parametrize("name", ["num_workers", "split_seed", "min_length"])
def test_a_number_of_any_number_of_digits_is_judged_without_a_traceback(name):
    """Python cannot turn a whole number of 400 digits into a float."""
    huge = 10**400
    assert caption_options.is_value_of(TABLE[name], huge)
    values = vars(caption_options.build_parser().parse_args([f"--{name}", str(huge)]))
    assert values == {name: huge}


def test_flags_are_not_abbreviated(capsys):
    assert "--batch" in refusal(capsys, "--batch 3")


# ------------------------------------------------------------------------------ a checkpoint's options

STORED = [name for name, option in TABLE.items() if option.stored != OWN]
NEVER = [
    None,
    True,
    "",
    "x",
    0,
    -1,
    0.5,
    2.5,
    10**9,
    float("nan"),
    float("inf"),
    [],
    {},
    b"x",
    (1,),
]


def is_usable(option, value):
    """By the documentation: the right type, within the range."""
    if value is None:
        return option.default is None
    if option.kind is bool:
        return isinstance(value, bool)
    if isinstance(option.kind, tuple):
        return isinstance(value, str) and value in option.kind
    if option.several:
        one = option._replace(several=False)
        return isinstance(value, tuple) and all(is_usable(one, part) for part in value)
    if option.kind is str:
        return isinstance(value, str)
    if option.kind is caption_options.encoder_name:
        return isinstance(value, str) and value in caption_options.ENCODERS
    low, high, above, whole = bounds(option)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return low <= value <= high and value != float("inf") and not (above and value == low)


def bounds(option):
    """low, high, whether low itself is excluded, and whether only whole numbers are meant."""
    names = inspect.getclosurevars(option.kind).nonlocals
    if "low" not in names:  # auto, or a number
        names = inspect.getclosurevars(names["kind"]).nonlocals
    return names["low"], names["high"], names["above"], names["kind"] is int


@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_may_hold_only_what_could_be_typed(name):
    refused = 0
    for value in NEVER:
        if is_usable(TABLE[name], value):
            checked = caption_options.check_config("best.pt", {name: value})
            assert checked[name] == value
            continue
        refused += 1
        message = rf"^best\.pt: its configuration has no usable --{name}: give another checkpoint$"
        with pytest.raises(ValueError, match=message):
            caption_options.check_config("best.pt", {name: value})
    assert refused > 8
    for tensor in (torch.ones(3), torch.ones(()), torch.zeros(0)):
        with pytest.raises(ValueError, match=f"no usable --{name}:"):
            caption_options.check_config("best.pt", {name: tensor})


@pytest.mark.parametrize(
    "name", [n for n in STORED if inspect.isfunction(TABLE[n].kind) and n != "encoder"]
)
def test_the_ends_of_every_range(name):
    low, high, above, whole = bounds(TABLE[name])
    step = 1 if whole else 1e-9
    usable = functools.partial(caption_options.is_value_of, TABLE[name]._replace(several=False))
    assert usable(low) != above
    assert usable(low + step) and not usable(low - step)
    if high != float("inf"):
        assert usable(high) and not usable(high + (1 if whole else 1e-6))


@pytest.mark.parametrize(
    "typed, message",
    [
        ("resnet50+resnet5", "no encoder 'resnet5' (did you mean resnet50?)"),
        ("resnet50+", "no encoder ''"),
        ("resnet50+vgg11+resnet50", "names an encoder twice"),
    ],
)
def test_encoders_that_are_joined_are_in_the_table_and_differ(typed, message, capsys):
    assert message in refusal(capsys, f"--encoder {typed}")
    with pytest.raises(ValueError, match="no usable --encoder"):
        caption_options.check_config("best.pt", {"encoder": typed})
    assert (
        parse_args(["--encoder", "resnet50+vgg11", *DATASET]).features.encoder == "resnet50+vgg11"
    )


@pytest.mark.parametrize(
    "encoder, weights, parts",
    [
        ("vgg11", "a+b.pth", (["vgg11"], ["a+b.pth"])),
        ("vgg11+resnet18", "random", (["vgg11", "resnet18"], ["random"] * 2)),
        ("vgg11+resnet18", "a.pth+imagenet", (["vgg11", "resnet18"], ["a.pth", "imagenet"])),
    ],
)
def test_each_encoder_has_its_weights(encoder, weights, parts):
    features = parse_args(["--encoder", encoder, "--encoder_weights", weights, *DATASET]).features
    assert caption_options.encoder_parts(features) == parts


def test_as_many_weights_as_encoders(capsys, tmp_path):
    for weights in ("a.pth", "a.pth+b.pth+c.pth"):
        typed = ["--encoder", "vgg11+resnet18", "--encoder_weights", weights, *DATASET]
        with pytest.raises(SystemExit):
            caption_options.check_files(parse_args(typed))
        assert "takes one for each of its 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in STORED if isinstance(TABLE[n].kind, tuple)])
def test_every_choice_is_usable(name):
    for choice in TABLE[name].kind:
        assert caption_options.check_config("best.pt", {name: choice})[name] == choice


def test_what_a_checkpoint_says_of_its_own_run_or_of_unknown_options_is_not_looked_at():
    stored = {"mode": 7, "device": "gone:1", "split": [], "a_flag_of_the_future": object()}
    assert resumed(stored).as_dict() == DEFAULTS | {"model_path": "runs/best.pt"}


def test_a_checkpoint_whose_options_contradict_each_other_is_refused():
    with pytest.raises(ValueError, match="--min_length 40 must be below --max_length 7"):
        resumed({"min_length": 40, "max_length": 7})


# ---------------------------------------------------------------------------- the table and the program


def test_every_option_is_in_one_group_and_its_default_is_a_value():
    names = [name for group in GROUPS.values() for name in group.rows]
    assert len(names) == len(set(names)) == len(TABLE)
    for name, option in TABLE.items():
        assert set(option.needs) <= set(TABLE), name
        assert set(option.modes) <= set(caption_options.EVERY_MODE), name
        absent = option.default is None or option.default == ()
        assert absent or caption_options.is_value_of(option, option.default), name
        for other, wanted in option.needs.items():
            kind = TABLE[other].kind
            if other == "encoder":
                assert all(caption_options.encoder_name(value) == value for value in wanted)
            elif kind is str:
                assert all(isinstance(value, str) for value in wanted), name
            else:
                known = set(kind) if isinstance(kind, tuple) else {True, False}
                assert set(wanted) <= known, name


KINDS = {"lstm": ("lstm", "additive")} | {
    name: ("attention", name) for name in caption_options.ATTENTIONS
}


def test_the_decoders_are_the_programs():
    assert {*KINDS, "gpt2", "prefix"} == set(program.DECODERS)
    for length, name in ((0, "gpt2"), (3, "prefix")):
        values = {"decoder": "gpt2", "attention": "additive", "prefix_length": length}
        assert program.decoder_class(values) is program.DECODERS[name]
    for name, (decoder, attention) in KINDS.items():
        values = {"decoder": decoder, "attention": attention}
        assert program.decoder_class(values) is program.DECODERS[name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_takes_the_options_that_the_table_gives_it(kind):
    """The group's others say which it is; --alpha_c, of another group, is the objective's."""
    rows, (name, attention) = GROUPS["model"].rows, KINDS[kind]
    expected = {
        option
        for option, row in rows.items()
        if name in row.needs.get("decoder", name)
        and attention in row.needs.get("attention", attention)
    } - {"attention", "decoder", "freeze_embeddings"}
    decoder = program.DECODERS[kind]
    assert set(decoder.options) == expected and len(decoder.options) == len(expected)
    assert [name for name, row in rows.items() if not row.needs] == ["decoder", "drop_prob"]
    arguments = inspect.signature(decoder).parameters
    named = [name for name, argument in arguments.items() if argument.kind != argument.VAR_KEYWORD]
    passed_on = ["attention_heads"] if kind == "multi_head" else []
    assert [*named, *passed_on] == ["feature_dim", "vocab_size", *decoder.options]


@pytest.mark.parametrize(("name", "length"), [("gpt2", 0), ("prefix", 3)])
def test_gpt2_takes_the_options_that_the_table_gives_it(name, length):
    decoder, rows = program.DECODERS[name], TABLE.items()
    values = {"decoder": "gpt2", "gpt2_model": "scratch", "prefix_length": length}
    expected = {
        option
        for option, row in rows
        if row.needs.get("decoder") == ("gpt2",)
        and all(values[other] in wanted for other, wanted in row.needs.items())
    } - {"gpt2_model", "gpt2_tokenizer"}  # which `settle`, `begin` and `new_vocabulary` take
    expected = (expected | {"drop_prob"}) - ({"prefix_length"} if not length else set())
    assert set(decoder.options) == expected and len(decoder.options) == len(expected)


def test_the_algorithms_are_the_searches():
    import caption_decoding

    rows = GROUPS["decoding"].rows
    assert rows["algorithm"].kind == caption_options.ALGORITHMS == (*caption_decoding.ALGORITHMS,)
    for name, function in caption_decoding.ALGORITHMS.items():
        taken = {option for option, row in rows.items() if name in row.needs.get("algorithm", ())}
        # what ranks a beam is the loop's; how many captions are drawn is not asked in every mode
        no_flags = {"generator", "num_captions", "eos", "length_penalty"}
        theirs = {*caption_decoding.settings_of(function)} - no_flags
        assert taken - {"length_penalty"} == theirs
    searched = inspect.signature(caption_decoding.generate).parameters
    assert set(GROUPS["decoding"].rows) <= set(searched)
    for name, option in GROUPS["decoding"].rows.items():
        assert option.default == searched[name].default


@pytest.mark.parametrize("name", caption_options.SCHEDULES)
def test_a_schedule_names_torchs_class_and_its_arguments(name):
    schedule = caption_options.SCHEDULES[name]
    parameters = inspect.signature(
        getattr(torch.optim.lr_scheduler, schedule.torch_name)
    ).parameters
    ours = {"warmup_epochs"}  # from which one_cycle's share of rising steps is computed
    assert set(schedule.arguments) - ours <= set(parameters)
    assert set(schedule.shown) <= set(schedule.arguments)
    assert set(schedule.arguments.values()) <= set(TABLE)
    for option in schedule.arguments.values():
        if option != "learning_rate":
            assert name in TABLE[option].needs["scheduler_type"]
    names = set(GROUPS["schedule"].rows) - {"use_scheduler", "scheduler_type"}
    assert {n for n in names if name in TABLE[n].needs["scheduler_type"]} == (
        set(schedule.arguments.values()) - {"learning_rate"}
    )


def test_options_are_parsed_without_torch():
    code = "import sys, caption_options; caption_options.parse_args([]); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "caption_options" in loaded
    assert not {"torch", "torchvision", "numpy", "pandas", "spacy"} & set(loaded)


# -------------------------------------------------------------------------------------- documentation


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"], description="What it is.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it is." in text
    unbroken = text.replace("- ", "-")  # a line may end with a hyphen
    for group in GROUPS.values():
        assert f"{group.title}:" in text
    for name, option in TABLE.items():
        assert re.search(rf"--{name}\b", text), name
        assert caption_options.describe(option).replace("- ", "-") in unbroken, name
    assert "--resnet_weights" in text


def test_a_row_of_help_says_for_whom_it_is():
    describe = caption_options.describe
    assert describe(TABLE["ensemble"]).startswith(
        "test, caption, debug: more checkpoints, or folders of runs"
    )
    assert describe(TABLE["num_captions"]) == "caption: how many captions per image (1)"
    assert describe(TABLE["attention_dim"]) == "attention: units that compare cells (512)"
    factor = "reduce_lr_on_plateau: what the rate is multiplied by when it falls (0.5)"
    assert describe(TABLE["scheduler_factor"]) == factor
    assert describe(TABLE["drop_prob"]) == "dropout probability in training (0.3)"


def test_no_row_of_help_is_two_words():
    assert [name for name, option in TABLE.items() if len(option.help.split()) < 3] == []


def test_the_documentation_has_a_row_for_every_option():
    lines = caption_options.as_markdown().splitlines()
    rows = [line for line in lines if line.startswith("| `--")]
    assert [re.match(r"\| `--(\w+)` \|", row)[1] for row in rows] == list(TABLE)
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row  # four cells
    titles = [group.title for group in GROUPS.values()]
    assert [line[3:] for line in lines if line.startswith("## ")] == [*titles, "Presets"]
    assert (
        "| `--cache_dir` | ./feature_cache | train, test, tune, without `--no_feature_cache` |"
        in ("\n".join(rows))
    )
    assert "also spelt `--resnet_weights`" in "\n".join(rows)


def test_running_the_file_prints_the_documentation():
    printed = subprocess.check_output([sys.executable, "caption_options.py"], cwd=ROOT, text=True)
    assert printed == caption_options.as_markdown()


def test_settling_names_what_was_typed():
    options = settle({"batch_size": 3}, {"seed": 5})
    assert options.typed == {"batch_size"}
    assert (options.training.batch_size, options.run.seed, options.run.mode) == (3, 5, TRAIN)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"save_attention_viz": True}, "--save_attention_viz belongs to --decoder attention"),
        ({"min_length": 50}, "--min_length 50 must be below --max_length 40"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused_by_its_name(stored, message):
    options = parse_args(["--resume", "last.pt"])
    with pytest.raises(ValueError, match=rf"^last\.pt: its configuration .*{message}"):
        caption_options.inherit(options, "last.pt", caption_options.DEFAULTS | stored)


def test_gradients_map_any_decoder():
    for decoder in caption_options.DECODERS:
        typed = f"--decoder {decoder} --viz_method gradient --save_attention_viz".split()
        assert parse_args(typed).pictures.viz_method == "gradient"


@pytest.mark.parametrize(
    ("mode", "typed", "decoder", "message"),
    [
        (TEST, "--viz_method gradient", "lstm", None),  # it is measured
        (TEST, "--viz_method attention", "attention", None),
        (TEST, "--viz_method attention", "lstm", "--viz_method attention belongs to --decoder"),
        (TEST, "", "lstm", None),
        (CAPTION, "--viz_method gradient", "lstm", "--viz_method needs --save_attention_viz in"),
        (CAPTION, "--viz_method gradient --save_attention_viz", "lstm", None),
    ],
)
def test_a_method_of_maps_acts_where_they_are_drawn_or_measured(mode, typed, decoder, message):
    expected = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with expected:
        resumed(DEFAULTS | {"decoder": decoder}, mode, typed)


def test_an_output_folder_that_nothing_would_be_written_to_is_refused():
    typed = [
        "--mode",
        "caption",
        "--model_path",
        "best.pt",
        "--images",
        "a.jpg",
        "--output_dir",
        "out",
    ]
    stored = caption_options.DEFAULTS | {"decoder": "attention"}
    with pytest.raises(ValueError, match="--output_dir needs --save_attention_viz"):
        caption_options.inherit(parse_args(typed), "best.pt", stored)
    drawn = parse_args([*typed, "--save_attention_viz"])
    assert caption_options.inherit(drawn, "best.pt", stored).output.output_dir == "out"


def test_a_second_look_must_be_smaller_than_the_first(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--image_size", "96", "--coarse_size", "96"])
    assert "--coarse_size 96 must be below the image size, 96" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["multi_head", "adaptive"])
@pytest.mark.parametrize(("name", "size"), [("attention_dim", 30), ("embed_size", 50)])
def test_heads_divide_what_they_share(name, size, attention, capsys):
    typed = ["--decoder", "attention", "--attention", attention, f"--{name}", str(size)]
    assert parse_args([*typed, "--attention_heads", "2"]).model.attention_heads == 2
    with pytest.raises(SystemExit):
        parse_args(typed)
    assert f"--attention_heads 4 does not divide --{name} {size}" in capsys.readouterr().err
    assert parse_args(["--decoder", "attention", f"--{name}", str(size)])  # additive has no heads


def test_a_checkpoint_from_before_there_were_kinds_of_attention_is_additive():
    stored = {
        name: value for name, value in caption_options.DEFAULTS.items() if name != "attention"
    }
    assert resumed(stored | {"decoder": "attention"}, typed="").model.attention == "additive"


def test_a_preset_takes_either_kind_of_attention():
    assert parse_args(["--preset", "laptop"]).model.attention == "adaptive"
    additive = parse_args(["--preset", "laptop", "--attention", "additive"])
    assert additive.model.attention == "additive" and additive.model.attention_dim == 256
    assert additive.training.alpha_c == DEFAULTS["alpha_c"]


def test_the_pictures_scales_and_formats_are_the_drawing_rooms():
    import attention_visualization

    assert TABLE["viz_scale"].kind == attention_visualization.SCALES
    assert TABLE["viz_format"].kind == attention_visualization.FORMATS

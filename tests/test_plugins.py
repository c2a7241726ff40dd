"""Plugins: encoders and decoding algorithms of a user's own, and what is said of files that are none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import CPU

import caption_options
import encoder_models
import flickr_image_caption as program
import run_folder
from caption_decoding import generate, register_algorithm
from caption_options import inherit, parse_args, register_encoder
from download_datasets import load_encoder_weights

TINY = """
import torch
from caption_options import register_encoder

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, stride=8)
        self.second = torch.nn.Conv2d(4, 5, 1)
        self.head = torch.nn.Linear(5, 2)

register_encoder("tiny", Tiny, "first second", image_size=40, mean=(0, 0, 0), std=(1, 1, 0.5))
"""


@pytest.fixture
def tiny(documented_plugins):
    """Options that name a plugin's encoder of two convolutions."""
    (documented_plugins / "tiny.py").write_text(TINY)
    return ["--plugin", "tiny.py", "--encoder", "tiny", "--encoder_weights", "random"]


class Chain:
    """A decoder of five words, whose next one depends on the last alone: ids 0 to 3 are special."""

    log_probs = torch.tensor(
        [
            [0, 0, 1.0, 0, 0.0, 0.0, 0.0],
            [0, 0, 0.0, 0, 0.5, 0.3, 0.2],  # after <SOS>
            [0, 0, 1.0, 0, 0.0, 0.0, 0.0],
            [0, 0, 1.0, 0, 0.0, 0.0, 0.0],
            [0, 0, 0.1, 0, 0.0, 0.9, 0.0],
            [0, 0, 0.7, 0, 0.1, 0.0, 0.2],
            [0, 0, 0.4, 0, 0.0, 0.6, 0.0],
        ]
    ).log()
    pad, sos, eos, unk = range(4)

    def start(self, features):
        return (), torch.zeros(len(features), 1, 1)

    def step(self, tokens, state):
        return self.log_probs[tokens], state, None


def error_of(capsys, *argv):
    """The one line that the command ends with, with status 2."""
    with pytest.raises(SystemExit) as exit:
        parse_args([*argv])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("flickr_image_caption.py: error: ")


# ----------------------------------------------------------------------------------------- algorithms


def test_the_documented_algorithm_begins_each_caption_with_another_word(documented_plugins):
    options = parse_args(
        ["--mode", "caption", "--model_path", "x", "--images", "x", "--plugin", "first_words.py",
         "--algorithm", "first_words", "--num_captions", "3"]
    )  # fmt: skip
    how = options.decoding._asdict()
    for captions in generate(Chain(), torch.zeros(2, 1, 1), Chain, **how):
        assert [hypothesis.tokens for hypothesis in captions] == [[4, 5], [5], [6, 5]]
        expected = [0.5 * 0.9 * 0.7, 0.3 * 0.7, 0.2 * 0.6 * 0.7]
        found = torch.tensor([hypothesis.log_prob for hypothesis in captions]).exp()
        torch.testing.assert_close(found, torch.tensor(expected))


def test_an_algorithm_is_given_what_it_takes_and_its_flags_are_accepted(documented_plugins, capsys):
    Path("hot.py").write_text(
        "from caption_decoding import register_algorithm, sample_step\n"
        "SEEN = []\n"
        "@register_algorithm('hot')\n"
        "def hot(beams, logits, log_norm, temperature, beam_size, generator):\n"
        "    SEEN.append((temperature, beam_size))\n"
        "    return sample_step(beams, logits, log_norm, beam_size, temperature, 0, 1.0, generator)\n"
    )
    hot = ["--plugin", "hot.py", "--algorithm", "hot"]
    decoding = parse_args([*hot, "--temperature", "2", "--beam_size", "4"]).decoding
    how = decoding._replace(num_captions=4)._asdict()
    (captions,) = generate(Chain(), torch.zeros(1, 1, 1), Chain, **how)
    assert len(captions) == 4
    (module,) = [module for name, module in sys.modules.items() if name.endswith("_hot")]
    assert set(module.SEEN) == {(2.0, 4)}
    assert "--top_k belongs to --algorithm sample, not hot" in error_of(
        capsys, *hot, "--top_k", "3"
    )
    assert parse_args(["--algorithm", "beam", "--beam_size", "4"]).decoding.beam_size == 4


def test_names_that_are_taken_and_unknown_settings_are_refused(documented_plugins):
    with pytest.raises(ValueError, match=r"^there is an algorithm 'beam' already"):
        register_algorithm("beam")(lambda beams, logits, log_norm: None)
    with pytest.raises(
        ValueError, match=r"^algorithm 'mine' takes width, which is none of beam_size"
    ):
        register_algorithm("mine")(lambda beams, logits, log_norm, width: None)
    with pytest.raises(ValueError, match=r"^there is an encoder 'resnet18' already"):
        register_encoder("resnet18", torch.nn.Identity, "layer1")
    with pytest.raises(ValueError, match=r"^encoder 'a\+b': give it a name of letters"):
        register_encoder("a+b", torch.nn.Identity, "layer1")


# ------------------------------------------------------------------------------------------- encoders


@torch.inference_mode()
def test_a_plugin_s_encoder_gives_its_model_s_grid(tiny):
    options = parse_args(tiny)
    encoder = program.build_encoder(options, CPU)
    assert (encoder.image_size, encoder.grid, encoder.channels) == (40, [5, 5], 5)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    state = load_encoder_weights("tiny", "random", options.run.seed)
    model = encoder_models.find_model("tiny").build()
    model.load_state_dict(state)
    seen = images / 255 / torch.tensor([1, 1, 0.5]).view(3, 1, 1)
    expected = model.second(model.first(seen)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(images), expected)


def test_features_of_changed_code_are_not_those_of_the_old(tiny):
    keys = []
    for comment in ("", "# another stride, perhaps"):
        Path("tiny.py").write_text(TINY + comment)
        for table in (caption_options.ENCODERS, encoder_models.ADDED):
            table.pop("tiny", None)
        caption_options.plugins.LOADED.clear()
        keys.append(program.build_encoder(parse_args(tiny), CPU).key())
    assert keys[0] != keys[1]
    assert keys[0]["weights_sha256"] == keys[1]["weights_sha256"]
    assert "code_sha256" not in encoder_models.find_model("resnet18").key()


def test_a_plugin_s_last_blocks_can_be_trained_and_lie_beside_others(tiny):
    tuned = program.build_encoder(parse_args([*tiny, "--fine_tune_encoder", "1"]), CPU)
    assert [*tuned.tail.state_dict()] == ["blocks.0.weight", "blocks.0.bias"]
    beside = [*tiny[:3], "tiny+squeezenet1_1", *tiny[4:]]
    encoder = program.build_encoder(parse_args(beside), CPU)
    assert (encoder.channels, encoder.image_size) == (5 + 512, 224)


def test_the_documented_encoder_is_regnet_s_grid(documented_plugins):
    parse_args(["--plugin", "regnet.py", "--encoder", "regnet_y_400mf"])
    model = encoder_models.find_model("regnet_y_400mf")
    assert model.weights.__self__.url.endswith(".pth")
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        whole = model.build().eval()
        encoder = program.Encoder("regnet_y_400mf", whole.state_dict(), "random", image_size=64)
        images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        pooled = encoder(images).mean(1)
        mean, std = encoder_models.IMAGENET_MEAN, encoder_models.IMAGENET_STD
        seen = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(whole.fc(pooled), whole(seen), rtol=1e-3, atol=1e-5)
    assert encoder.channels == 440


def test_faults_of_a_plugin_s_encoder_are_said_in_one_line(tiny):
    parse_args(tiny)
    with pytest.raises(
        ValueError, match=r"^--encoder_weights imagenet: --encoder tiny comes without"
    ):
        load_encoder_weights("tiny", "imagenet", 0)
    caption_options.ENCODERS["tiny"] = ["first", "third"]
    with pytest.raises(
        ValueError, match=r"^--encoder tiny: its model has no module third: it has first"
    ):
        encoder_models.empty_trunk("tiny", ["first", "third"])
    with pytest.raises(ValueError, match=r"^--encoder tiny: gives 2 axes, not \(N, F, h, w\)"):
        encoder_models.grid_shape(torch.nn.Flatten(), 40, "tiny")


# ------------------------------------------------------------------------------------ files, checkpoints


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\nx = = 2\n", "bad.py:2: is no Python (invalid syntax)"),
        ("\n\nraise RuntimeError('out of\\nluck')\n", "bad.py:3: RuntimeError: out of luck"),
        ("import sys\nsys.exit(3)\n", "bad.py:2: SystemExit: 3"),
        ("import nothing_like_it\n", "bad.py:1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("from caption_options import register_encoder\ndef f():\n    register_encoder('vgg11', None, '')\n\nf()\n",
         "bad.py:3: ValueError: there is an encoder 'vgg11' already: choose another name"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "bad.py:1: is no Python"),
    ],
)  # fmt: skip
def test_a_plugin_that_fails_is_named_with_its_line(code, said, documented_plugins, capsys):
    Path("bad.py").write_bytes(code if isinstance(code, bytes) else code.encode())
    assert error_of(capsys, "--plugin", "bad.py").startswith(f"--plugin {said}")
    assert not [name for name in sys.modules if name.endswith("_bad")]


def test_a_plugin_that_is_not_there_is_named(documented_plugins, capsys):
    assert error_of(capsys, "--plugin", "gone.py") == "--plugin gone.py: no such file"
    assert error_of(capsys, "--plugin", ".").startswith("--plugin .: is no file")


def test_a_plugin_is_typed_or_not_run(tiny, monkeypatch, capsys):
    monkeypatch.setenv("CAPTION_PLUGIN", "tiny.py")
    line = "environment variable CAPTION_PLUGIN: it runs code: type it, as --plugin"
    assert error_of(capsys) == line
    monkeypatch.delenv("CAPTION_PLUGIN")
    record = "timestamp: 1\nplugin: [tiny.py]\nencoder: tiny\nencoder_weights: random\n"
    Path("run_config.json").write_text(record)
    line = error_of(capsys, "--config", "run_config.json")
    assert line.startswith("run_config.json:3: encoder no encoder 'tiny'")
    assert line.endswith("or --plugin FILE.py that registers it")
    options = parse_args(["--config", "run_config.json", "--plugin", "tiny.py"])
    assert options.features.encoder == "tiny" and options.run.plugin == ("tiny.py",)


def test_a_checkpoint_says_which_plugin_it_needs(tiny, capsys):
    given = ["--mode", "test", "--model_path", "best.pt"]
    config = caption_options.DEFAULTS | {"plugin": ("tiny.py",), "encoder": "tiny"}
    options = parse_args(given)
    with pytest.raises(ValueError) as error:
        inherit(options, "best.pt", config)
    says = "best.pt: its configuration has no usable --encoder: tiny is a plugin's, give --plugin tiny.py"
    assert str(error.value) == says
    assert "tiny" not in caption_options.ENCODERS  # it was not run
    with pytest.raises(ValueError, match=r"--algorithm: own is a plugin's, give --plugin a\.py$"):
        inherit(
            options, "best.pt", caption_options.DEFAULTS | {"plugin": ("a.py",), "algorithm": "own"}
        )
    with pytest.raises(ValueError, match=r"--algorithm: give another checkpoint$"):
        inherit(options, "best.pt", caption_options.DEFAULTS | {"algorithm": "own"})
    options = parse_args([*given, "--plugin", "tiny.py"])
    assert inherit(options, "best.pt", config).features.encoder == "tiny"


def test_the_command_that_goes_on_from_a_run_has_its_plugin(tiny):
    run = SimpleNamespace(options=parse_args([*tiny, "--cache_dir", "kept"]))
    command = run_folder.next_command(run, "--mode", "test")
    assert command.endswith(" --mode test --plugin tiny.py --cache_dir kept")


def test_help_names_what_a_plugin_adds(tiny, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--plugin", "tiny.py", "first_words.py", "--help"])
    text = capsys.readouterr().out
    assert " swin_v2_b tiny" in " ".join(text.split())
    assert "{greedy,beam,full_beam,sample,first_words}" in text

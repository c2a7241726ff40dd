"""Encoders of timm and transformers: the libraries' own features, folders of models, checkpoints, faults.

Nothing is fetched: models are built small from their configuration and saved as local folders.
"""

import functools
import json
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CPU
from test_command_line import refused
from test_end_to_end import (
    ATTENTION,
    ON_SAMPLE,
    TINY,
    listed,
    load,
    read_json,
    run_dir,
    succeed,
    train,
)

import flickr_image_caption as fic
import hub_encoders
import image_loading
from caption_options import parse_args
from download_datasets import load_encoder_weights

timm = pytest.importorskip("timm", reason="requirements-hub.txt")
transformers = pytest.importorskip("transformers", reason="requirements-hub.txt")
safetensors_torch = pytest.importorskip("safetensors.torch")

VISION = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TRANSFORMERS = {  # kind -> model, how many tokens come before the cells, how large pictures are typed in
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**VISION, intermediate_size=24)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**VISION, intermediate_size=24)
    ),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION, mlp_ratio=2)),
}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1}
PROCESSOR = {
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": 3, "do_resize": True,
    "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
    "rescale_factor": 1 / 255, "do_normalize": True,
}  # fmt: skip


def save_folder(folder, kind="clip", processor=PROCESSOR, model=None):
    """A folder of a tiny vision model, as save_pretrained leaves it. Returns the model."""
    torch.manual_seed(5)
    model = model or TRANSFORMERS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms count, too
    model.save_pretrained(folder)
    if processor:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def clip_encoder(folder, *flags):
    """The encoder of a tiny run with --encoder clip."""
    words = f"{TINY} --encoder clip --encoder_weights imagenet --clip_model {folder}"
    return fic.build_encoder(parse_args(f"{words} {' '.join(flags)}".split()), CPU)


def cells(tokens, prefix):
    """Tokens (N, prefix + h * h, F) as a grid (N, F, h, h), the plain way."""
    tokens = tokens[:, prefix:]
    side = round(tokens.size(1) ** 0.5)
    return tokens.permute(0, 2, 1).reshape(len(tokens), -1, side, side)


def pictures(size, count=2):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_cells_are_the_patch_tokens_that_transformers_gives(kind, size, tmp_path):
    """At the model's own size and at a larger one, to which positions are interpolated."""
    model = save_folder(tmp_path, kind)
    encoder = clip_encoder(tmp_path, ATTENTION, f"--image_size {size}")
    images = pictures(size).byte()
    pixels = (images / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.25]
    ).view(3, 1, 1)
    how = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    expected = cells(model(pixels, **how).last_hidden_state, PREFIX[kind])
    assert (encoder.grid, encoder.channels) == ([size // 8, size // 8], 16)
    features = encoder(images)
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert features.std() > 0.1  # they say something


@pytest.mark.parametrize("more", ["", "--fine_tune_encoder 1"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_gpt2_sees_the_class_token_behind_the_cells_where_there_is_one(kind, more, tmp_path):
    """As transformers' VisionEncoderDecoderModel, which hands on the whole last_hidden_state."""
    model = save_folder(tmp_path, kind)
    gpt2 = "--decoder gpt2 --gpt2_model scratch --gpt2_layers 1 --gpt2_width 16 --gpt2_heads 1"
    words = f"{ON_SAMPLE} --encoder clip --encoder_weights imagenet --clip_model {tmp_path}"
    encoder = fic.build_encoder(parse_args(f"{words} {gpt2} {more}".split()), CPU)
    images = pictures(32).byte()
    pixels = (images / 255 - torch.tensor(PROCESSOR["image_mean"]).view(3, 1, 1)) / torch.tensor(
        PROCESSOR["image_std"]
    ).view(3, 1, 1)
    tokens = model(pixels).last_hidden_state
    expected = torch.cat([tokens[:, PREFIX[kind] :], tokens[:, : PREFIX[kind]]], dim=1)
    assert (encoder.grid, encoder.num_cells) == ([4, 4], 16 + PREFIX[kind])
    assert encoder.beside_cells == ("class",) * PREFIX[kind]
    features = encoder.tail(encoder(images))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    stored = {"configuration": encoder.model.configuration}
    options = parse_args(f"{ON_SAMPLE} --encoder clip --clip_model gone {gpt2} {more}".split())
    (row,) = fic.encoder_rows(options, stored)
    assert row.beside_cells == encoder.beside_cells
    del stored["configuration"]["class_token"]  # as checkpoints of before have it
    assert fic.encoder_rows(options, stored)[0].beside_cells == ()


def test_attention_on_the_class_token_is_shown_beside_the_cells(tmp_path, shop):
    save_folder(tmp_path / "clip")
    gpt2 = "--decoder gpt2 --gpt2_model scratch --gpt2_layers 1 --gpt2_width 16 --gpt2_heads 1"
    model = f"--encoder clip --encoder_weights imagenet --clip_model {tmp_path / 'clip'}"
    folder = train(gpt2, model, "--cache_dir own_cache", tiny=ON_SAMPLE)
    flags = "--save_attention_viz --attention_viz_samples 1 --algorithm greedy"
    succeed("--mode test", flags, f"--model_path {folder / 'best.pt'}")
    (raw,) = folder.glob("attention_maps_*.npz")
    arrays = np.load(raw)
    assert arrays["beside_names"].tolist() == ["class"]
    assert arrays["maps"].shape[1:] == (4, 4) and 0 < arrays["beside"].min() < 1


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_decoder_without_a_grid_reads_the_pooled_token(kind, tmp_path):
    model = save_folder(tmp_path, kind)
    encoder = clip_encoder(tmp_path, "--decoder lstm")
    images = pictures(32).byte()
    pixels = (images / 255 - torch.tensor(PROCESSOR["image_mean"]).view(3, 1, 1)) / torch.tensor(
        PROCESSOR["image_std"]
    ).view(3, 1, 1)
    assert (encoder.grid, encoder.channels) == ([1, 1], 16)
    expected = model(pixels).pooler_output.unsqueeze(1)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    grid = clip_encoder(tmp_path, ATTENTION)
    assert encoder.key() != grid.key()


def test_a_whole_clip_with_its_text_gives_its_vision_model(tmp_path):
    """Its config.json names only what differs from the defaults, its processor is in another file."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
            "intermediate_size": 16}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION | {"intermediate_size": 24}, projection_dim=8
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    nested = {"image_processor": PROCESSOR, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    encoder = clip_encoder(tmp_path, ATTENTION)
    expected = cells(model.vision_model(torch.zeros(1, 3, 32, 32)).last_hidden_state, 1)
    torch.testing.assert_close(encoder.grid_of(torch.zeros(1, 3, 32, 32)), expected)


def test_weights_may_be_a_file_under_the_librarys_names_or_random(tmp_path):
    model = save_folder(tmp_path)
    own = {f"vision_model.{name}": x for name, x in model.state_dict().items()}
    safetensors_torch.save_file(own | {"logit_scale": torch.ones(1)}, tmp_path / "own.safetensors")
    encoders = [
        clip_encoder(tmp_path, ATTENTION, f"--encoder_weights {weights}")
        for weights in ("imagenet", tmp_path / "own.safetensors", "random", "random --seed 1")
    ]
    hashes = [encoder.key()["weights_sha256"] for encoder in encoders]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_the_key_tells_apart_what_the_configuration_alone_changes(tmp_path):
    """The same weights with another activation are other features."""
    model = save_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    keys = [clip_encoder(tmp_path / name, ATTENTION).key() for name in "ab"]
    assert keys[0]["weights_sha256"] == keys[1]["weights_sha256"]
    assert [key["configuration"]["vision"].pop("hidden_act") for key in keys] == [
        "quick_gelu",
        "gelu",
    ]
    assert keys[0] == keys[1]
    assert (
        json.loads(json.dumps(keys[0])) | {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
        == keys[0]
    )
    assert model.config.hidden_act == "quick_gelu"


# ----------------------------------------------------------------------------------------------- timm

SMALL = {  # name -> pixels a side of the test's pictures
    "test_resnet": 96, "test_convnext": 96, "test_vit": 96, "test_vit2": 96, "test_efficientnet": 96,
    "swin_tiny_patch4_window7_224": 96, "efficientnet_b3": 64, "inception_v3": 96, "densenet121": 64,
    "mobilenetv3_small_050": 64, "regnety_002": 64, "vgg11": 64, "resnetv2_50": 64,
    "swinv2_tiny_window8_256": 96, "eva02_tiny_patch14_224": 224,
}  # fmt: skip
SLOW = {"swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "efficientnet_b3", "vgg11",
        "inception_v3", "densenet121", "resnetv2_50", "eva02_tiny_patch14_224"}  # fmt: skip


@functools.cache
def timm_encoder(name, size):
    model = hub_encoders.find_model(f"timm/{name}")
    state = load_encoder_weights(f"timm/{name}", "random", 0, model)
    return fic.Encoder(f"timm/{name}", state, "random", image_size=size, model=model)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SMALL]
)
def test_cells_are_what_timm_gives_before_its_head(name):
    encoder = timm_encoder(name, SMALL[name])
    torch.manual_seed(0)  # as load_encoder_weights
    sizes = {"dynamic_img_size": True} if encoder.image_size != encoder.model.image_size else {}
    vit = "vit" in name or "swin" in name
    reference = timm.create_model(name, **sizes if vit else {}).eval()
    config = timm.data.resolve_model_data_config(reference)
    model = encoder.model
    assert (model.mean, model.std, model.interpolation) == (
        tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
    )  # fmt: skip
    assert model.image_size == config["input_size"][1]
    pixels = torch.randn(2, 3, SMALL[name], SMALL[name], generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference.forward_features(pixels)
        features = encoder.grid_of(pixels)
    if expected.ndim == 3:
        expected = cells(expected, reference.num_prefix_tokens)
    elif "swin" in name:
        expected = expected.permute(0, 3, 1, 2)
    scale = float(expected.abs().max())
    torch.testing.assert_close(features / scale, expected / scale, atol=1e-5, rtol=1e-5)
    assert list(features.shape[1:]) == [encoder.channels, *encoder.grid]


def test_published_weights_of_timm_are_read_from_the_hubs_cache(tmp_path, monkeypatch):
    """A file as timm publishes it, where huggingface_hub keeps what it fetched."""
    import huggingface_hub

    torch.manual_seed(9)
    published = timm.create_model("test_resnet")
    file = tmp_path / "model.safetensors"
    safetensors_torch.save_file(published.state_dict(), file)

    def hf_hub_download(repository, filename, etag_timeout, local_files_only=False):
        assert (repository, filename) == ("timm/test_resnet.r160_in1k", "model.safetensors")
        assert local_files_only
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    model = hub_encoders.find_model("timm/test_resnet")
    state = load_encoder_weights("timm/test_resnet", "imagenet", 0, model)
    assert torch.equal(state["layer4.0.conv1.weight"], published.layer4[0].conv1.weight)
    torch.save(published.state_dict(), tmp_path / "whole.pth")  # with the classifier
    again = load_encoder_weights("timm/test_resnet", str(tmp_path / "whole.pth"), 0, model)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    foreign = load_encoder_weights("timm/test_resnet", "random", 0, model) | {"x": torch.ones(1)}
    with pytest.raises(ValueError, match="not weights of --encoder timm/test_resnet"):
        fic.Encoder("timm/test_resnet", foreign, "x.pth", model=model)


BLOCKS = {  # name -> how many its authors built: the stem, then residual blocks, downsampling, a last convolution
    "test_vit": 1 + 6, "test_convnext": 1 + 9 + 3, "test_convnext2": 1 + 4, "test_resnet": 1 + 6,
    "test_efficientnet": 1 + 5 + 1, "mobilenetv3_small_050": 1 + 11 + 1, "regnetx_002": 1 + 1 + 1 + 4 + 7,
    "resnetv2_18": 1 + 8, "ghostnet_050": 18, "test_mambaout": 8, "densenet121": 8, "test_coatnet": 5,
    "test_byobnet": 5, "test_nfnet": 9, "levit_128s": 12, "test_vit_relpos": 1 + 9,
}  # fmt: skip
SIZES = {"levit_128s": 224, "test_vit_relpos": 160, "test_coatnet": 160}  # that takes no other


def fine_tuned(name, size, blocks):
    whole = timm_encoder(name, size)
    state = whole.trunk.state_dict()
    how = ("random", "float32", size)
    return fic.FineTunedEncoder(
        f"timm/{name}", state, *how, trained_blocks=blocks, model=whole.model
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_frozen_and_what_learns_give_timms_features_together(name):
    size = SIZES.get(name, 64)
    with pytest.raises(ValueError, match=f"timm/{name} has {BLOCKS[name]} blocks"):
        fine_tuned(name, size, BLOCKS[name])
    tuned = fine_tuned(name, size, max(1, BLOCKS[name] // 2))
    images = pictures(size).byte()
    torch.manual_seed(0)  # as load_encoder_weights
    reference = hub_encoders.new_timm(name).eval()
    pixels = (images / 255 - tuned.mean) / tuned.std
    with torch.no_grad():
        expected = reference.forward_features(pixels)
        features = tuned.tail(tuned.stem(images))
    if expected.ndim == 4:
        expected = expected if expected.size(1) == tuned.channels else expected.movedim(3, 1)
        expected = expected.flatten(2).transpose(1, 2)
    else:
        expected = expected[:, getattr(reference, "num_prefix_tokens", 0) :]
    scale = float(expected.abs().max())
    torch.testing.assert_close(features / scale, expected / scale, atol=1e-5, rtol=1e-5)
    trained = {name for name, p in tuned.trunk.named_parameters() if p.requires_grad}
    assert trained and len(trained) < len([*tuned.trunk.parameters()])
    assert trained <= {*reference.state_dict()}  # under the library's names


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_layernorm_learns(name):
    tuned = fine_tuned(name, 64, 2)
    trained = {name for name, p in tuned.trunk.named_parameters() if p.requires_grad}
    assert any("norm" in name and "weight" in name for name in trained)


def test_modules_that_take_turns_are_no_chain_of_sequentials():
    assert hub_encoders.keeps_order(["stem", "layers.0.blocks.0", "layers.0.blocks.1", "layers.1"])
    assert not hub_encoders.keeps_order(["layers.0", "norms.0", "layers.1", "norms.1"])


def test_a_timm_model_that_is_one_knot_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^--fine_tune_encoder 1: timm/cait_xxs24_224 cannot"):
        fine_tuned("cait_xxs24_224", 224, 1)
    with pytest.raises(ValueError, match=r"^--encoder timm/coat_tiny: gives several features"):
        hub_encoders.find_model("timm/coat_tiny").build()


# --------------------------------------------------------------------------------- runs of the program


@pytest.fixture
def folder(tmp_path_factory):
    """A folder of a tiny CLIP, outside the working folder."""
    folder = tmp_path_factory.mktemp("clip")
    save_folder(folder)
    return folder


CLIP = "--encoder clip --encoder_weights imagenet --cache_dir own_cache"


@pytest.mark.parametrize(
    "flags", [ATTENTION, "--decoder lstm", f"{ATTENTION} --fine_tune_encoder 1"]
)
def test_best_pt_alone_captions_where_neither_folder_nor_hub_is(flags, folder, shop, monkeypatch):
    path = train(flags, CLIP, "--clip_model", folder) / "best.pt"
    picture = f"data/sample/Images/{listed('test')[0]}"
    expected = succeed("--mode caption --model_path", path, "--images", picture)
    succeed("--mode test --cache_dir own_cache --model_path", path)
    captions = read_json(path.parent / "test_captions.json")
    shutil.rmtree(folder)
    monkeypatch.setattr(hub_encoders, "open_folder", None)  # nothing is asked for
    assert succeed("--mode caption --model_path", path, "--images", picture) == expected
    succeed("--mode test --cache_dir another_cache --model_path", path)
    assert read_json(path.parent / "test_captions.json") == captions
    configuration = load(path)["encoder"]["configuration"]
    assert configuration["vision"]["hidden_size"] == 16
    assert configuration["picture"]["interpolation"] == "bicubic"


def test_pictures_are_scaled_as_the_model_asks_and_the_cache_knows_it(folder, shop):
    flags = f"{TINY} {CLIP} {ATTENTION} --clip_model {folder}".split()
    run = fic.set_up(parse_args(flags), CPU)
    path = run.training.features.paths[0]
    features = next(run.training.features.stream([torch.tensor([0])]))
    bicubic, bilinear = (
        torch.from_numpy(image_loading.load_image(path, 32, interpolation=name).transpose(2, 0, 1))
        for name in ("bicubic", "bilinear")
    )
    encoder = run.captioner.encoder
    torch.testing.assert_close(features, encoder(bicubic[None]), atol=2e-3, rtol=2e-3)
    assert (encoder(bicubic[None]) - encoder(bilinear[None])).abs().max() > 0.02
    assert torch.equal(run.captioner.encode([path]), encoder(bicubic[None]))
    assert encoder.key()["interpolation"] == "bicubic"
    flags = " ".join(flags).replace("--cache_dir own_cache", "--no_feature_cache")
    run = fic.set_up(parse_args(flags.split()), CPU)
    uncached = next(run.training.features.stream([torch.tensor([0])]))
    torch.testing.assert_close(uncached, features, atol=2e-3, rtol=2e-3)


def test_joined_with_another_encoder_each_cell_has_the_channels_of_both(folder, shop, monkeypatch):
    flags = f"--encoder clip+shufflenet_v2_x0_5 --encoder_weights imagenet+random {ATTENTION}"
    flags += f" --cache_dir own_cache --image_size 64 --clip_model {folder}"
    path = train(flags) / "best.pt"
    encoder = load(path)["encoder"]
    assert (encoder["channels"], encoder["grid"]) == (16 + 1024, [8, 8])
    assert [part["interpolation"] for part in encoder["parts"]] == ["bicubic", "bicubic"]
    picture = f"data/sample/Images/{listed('test')[0]}"
    expected = succeed("--mode caption --model_path", path, "--images", picture)
    shutil.rmtree(folder)
    assert succeed("--mode caption --model_path", path, "--images", picture) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "timm/test_vit"])
def test_a_run_that_fine_tunes_goes_on_as_if_it_had_not_stopped(name, folder, shop):
    flags = f"{ATTENTION} {CLIP} --fine_tune_encoder 2 --encoder_learning_rate 0.01 --image_size 64"
    flags += f" --encoder {name} --random_crop --horizontal_flip"
    flags += f" --clip_model {folder}" if name == "clip" else " --encoder_weights random"
    whole = load(train(flags, "--epochs 2") / "model_epoch_2.pt")
    first = train(flags, "--epochs 1") / "model_epoch_1.pt"
    begun = load(first)["encoder"]["weights"]
    out = succeed("--epochs 1 --cache_dir own_cache --model_path", first)
    resumed = load(run_dir(out) / "model_epoch_2.pt")
    ours, theirs = resumed["encoder"]["weights"], whole["encoder"]["weights"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(torch.equal(resumed["model"][key], whole["model"][key]) for key in whole["model"])
    assert any(not torch.equal(begun[key], ours[key]) for key in ours)


# ------------------------------------------------------------------------------------------- bad input


def clip_refused(folder, *said, more=""):
    refused(TINY, CLIP, ATTENTION, f"--clip_model {folder}", more, naming=said)


def test_a_name_that_the_hub_cannot_give_is_one_line_within_seconds(shop, monkeypatch):
    """A hub that refuses connections, and one that never answers."""
    import huggingface_hub

    monkeypatch.setattr(hub_encoders, "HUB_SECONDS", 1)
    for answers in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            if not answers:
                server.close()
            with monkeypatch.context() as patch:
                address = f"http://127.0.0.1:{port}"
                patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
                started = time.monotonic()
                cache = huggingface_hub.constants.HF_HUB_CACHE
                clip_refused(
                    "some/model", "--clip_model some/model", cache, "give a folder", "hf download"
                )
                refused(TINY, "--encoder timm/test_vit --encoder_weights imagenet", naming=[
                    "--encoder timm/test_vit: neither", "give --encoder_weights FILE or random",
                    "hf download timm/test_vit.r160_in1k",
                ])  # fmt: skip
                assert time.monotonic() - started < 20


def test_folders_that_cannot_be_used_are_named(tmp_path_factory, shop):
    work = tmp_path_factory.mktemp("models")

    def broken(name, change):
        save_folder(work / name)
        change(work / name)
        return work / name

    def config(**changes):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def processor(**changes):
        return lambda folder: (folder / "preprocessor_config.json").write_text(
            json.dumps(PROCESSOR | changes)
        )

    clip_refused(work / "none", f"--clip_model {work}/none: no such folder")
    bare = broken("bare", lambda folder: (folder / "preprocessor_config.json").unlink())
    clip_refused(bare, "no preprocessor_config.json")
    other = broken("other", processor(crop_size={"height": 48, "width": 48}))
    clip_refused(
        other, "makes pictures of 48 pixels a side, but the vision model of config.json is of 32"
    )
    flat = broken("flat", processor(image_std=[0.1, 0.0, 0.2]))
    clip_refused(flat, "std [0.1, 0.0, 0.2], expected three numbers above 0")
    scaled = broken("scaled", processor(rescale_factor=0.5))
    clip_refused(scaled, "rescale_factor 0.5, expected 1/255")
    bert = broken("bert", config(model_type="bert"))
    clip_refused(
        bert, "model_type 'bert', expected the vision model of one of clip, siglip, dinov2"
    )
    huge = broken("huge", config(num_hidden_layers=10**9))
    clip_refused(huge, "num_hidden_layers 1000000000 of the vision model cannot be")
    deeper = broken("deeper", config(num_hidden_layers=4))
    clip_refused(deeper, "its weights lack encoder.layers.3")
    wider = broken("wider", config(hidden_size=32))
    clip_refused(wider, "its weights cannot be read as those of its config.json")
    text = broken("text", lambda folder: (folder / "config.json").write_text("{"))
    clip_refused(text, "config.json: no readable JSON")
    cut = broken("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 50))
    clip_refused(cut, "its weights cannot be read")
    empty = broken("empty", lambda folder: (folder / "model.safetensors").unlink())
    clip_refused(empty, "no weights: the folder needs config.json")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/evil_of_test_hub_encoders"),)


def test_pickled_weights_are_read_without_running_what_is_in_them(folder, shop, tmp_path_factory):
    model = hub_encoders.load_transformer(folder, hub_encoders.read_vision(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert clip_encoder(folder, ATTENTION).channels == 16
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    clip_refused(folder, "its weights cannot be read")
    assert not Path("/tmp/evil_of_test_hub_encoders").exists()


def test_a_repositorys_code_is_never_run(folder, shop):
    path, ran = folder / "config.json", folder / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    (folder / "modeling.py").write_text(code)
    plain = clip_encoder(folder, ATTENTION).key()
    mapped = {"auto_map": {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    assert clip_encoder(folder, ATTENTION).key() == plain and not ran.exists()


def test_an_unknown_timm_model_is_guessed(shop):
    refused(
        TINY, "--encoder timm/resnet5o", naming=["has no such model (did you mean timm/resnet50?)"]
    )
    refused(TINY, "--encoder timm/resnet50.x", naming=["no such weights: give one of resnet50."])
    refused(TINY, "--encoder timm/../x", naming=["no encoder 'timm/../x'"])


def test_without_the_packages_a_hub_encoder_says_what_brings_them(shop, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("clip", "transformers"), ("timm/resnet18", "timm")):
        line = f"--encoder {name} needs the package {package}: pip install -r requirements-hub.txt"
        refused(TINY, "--encoder", name, naming=[line])
        with pytest.raises(ValueError, match=line):  # also on a checkpoint's word
            hub_encoders.find_model(name)


@pytest.mark.parametrize(
    "change",
    [
        {"vision": {}}, {"vision": None}, {"picture": {}}, {"picture": None},
        {"vision": {"num_hidden_layers": 10**9}}, {"vision": {"hidden_act": "os.system"}},
        {"vision": {"hidden_size": 17}}, {"vision": {"layer_norm_eps": "x"}},
        {"picture": {"size": 10**9}}, {"picture": {"std": [0, 0, 0]}}, {"picture": {"interpolation": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoints_configuration_is_checked(change, folder):
    configuration = clip_encoder(folder, ATTENTION).key()["configuration"]
    for key, value in change.items():
        configuration[key] = configuration[key] | value if value else value
    with pytest.raises(ValueError, match=r"^--clip_model"):
        hub_encoders.find_model("clip", "x", stored=configuration)


def test_pictures_that_do_not_fit_the_patches_are_refused(shop):
    flags = "--encoder timm/test_vit --encoder_weights random --image_size 50"
    refused(
        TINY,
        flags,
        naming=["--encoder timm/test_vit makes no grid of pictures of 50 pixels a side"],
    )

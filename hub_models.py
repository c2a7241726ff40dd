"""Trained models as folders for the Hugging Face hub: saved, read, pushed. No pickle among their files.

    save_pretrained("saved_models/flickr8k/.../best.pt", "folder")
    state = read_pretrained("folder/captioner.json")      # as checkpoints.load_checkpoint
    push("saved_models/flickr8k/.../best.pt", "USER/NAME")

    folder/  captioner.json    configuration, encoder, splits, and where each tensor is
             *.safetensors     the tensors of decoder and encoder, each of them once
             vocabulary.json  scores.json  README.md

A model of `--encoder clip --decoder gpt2` has beside that what transformers' own VisionEncoderDecoderModel,
AutoTokenizer and AutoImageProcessor read: config.json, model.safetensors and theirs. The hub's packages are
imported where they are needed.

Shapes: N images, P cells, F channels of the encoder, W width of GPT-2.
"""

import hashlib
import os
import shlex
import tempfile
from pathlib import Path

import torch

import checkpoints
import clip_gpt2
import hub_encoders
import model_card
from caption_batches import SubwordVocabulary, vocabulary_from_plain
from checkpoints import HUB_FILE, write_json, write_text
from model_card import SCORES, VOCABULARY

OUR_TENSORS = "captioner.safetensors"
MAX_JSON_BYTES = 2**27  # of a file: COCO has 123,000 names of pictures
PREFIXES = {
    "model": "decoder.",
    "encoder": "encoder.",
    "digests": "digests.",
}  # of our tensors' names
KEPT = ("config", "epoch")  # what a checkpoint holds and a folder keeps as it is
TAGS = "---\npipeline_tag: image-to-text\nlicense: other\ntags: [image-captioning]\n{}---\n\n"
USE = """pip install -r requirements-hub.txt
hf download {name} --local-dir model
python flickr_image_caption.py --mode caption --images dog.jpg --model_path model"""
PLAIN_USE = """from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

model = VisionEncoderDecoderModel.from_pretrained("{name}").eval()
processor = AutoImageProcessor.from_pretrained("{name}", backend="pil")
tokenizer = AutoTokenizer.from_pretrained("{name}")
pixels = processor(Image.open("dog.jpg").convert("RGB"), return_tensors="pt").pixel_values
print(tokenizer.decode(model.generate(pixels)[0], skip_special_tokens=True).strip())"""


# -------------------------------------------------------------------------------------------- saving


def save_pretrained(source, folder, *, name="USER/NAME", description=""):
    """Write a trained model into a folder, which is made.

    Args:
        source: the file of a checkpoint that holds its encoder, such as a run's best.pt.
        name: under which the hub will have it; description: a line for its card.
    Returns: None, or why transformers alone cannot read it, for a decoder that it could.
    Raises: FileNotFoundError, ValueError naming the checkpoint, OSError.
    """
    source, folder = Path(source), Path(folder)
    state = checkpoints.load_checkpoint(source)
    if state["encoder"].get("weights") is None:
        raise ValueError(
            f"{source}: it has no encoder weights, so it captions nothing on another machine: "
            "give the run's best.pt"
        )
    checkpoints.check_writable_dir(folder, "the folder")
    folder.mkdir(parents=True, exist_ok=True)
    old_files = [*folder.glob("*.safetensors"), *folder.glob(HUB_FILE)]
    if old_files and not (folder / HUB_FILE).is_file():
        raise ValueError(f"{folder}: has another model's {old_files[0].name}: give another folder")
    for old in old_files:
        old.unlink()
    reason = not_plain(state)
    if reason is None:
        with checkpoints.checkpoint_errors(source):
            save_plain(state, folder)
    places = write_tensors(folder, tensors_of(state))
    encoder = {key: value for key, value in state["encoder"].items() if key != "weights"}
    record = {key: state[key] for key in KEPT} | {"encoder": encoder, "tensors": places}
    record |= {"splits": {k: v for k, v in state["splits"].items() if k != "digests"}}
    record |= {"history": [model_card.validation_scores(state)]}
    write_json(folder / VOCABULARY, state["vocabulary"])
    write_json(folder / SCORES, model_card.all_scores(source, state))
    metadata = model_card.describe(source, state, description=description)
    uses = [USE] if reason is not None else [PLAIN_USE, USE]
    card = model_card.model_card(metadata, "\n\n".join(uses).replace("{name}", name))
    write_text(
        folder / model_card.CARD, TAGS.format("library_name: transformers\n" * (not reason)) + card
    )
    write_json(folder / HUB_FILE, {"format_version": checkpoints.FORMAT_VERSION, **record})
    return reason if state["config"].get("decoder") == "gpt2" else None


def tensors_of(state):
    """{name: tensor} of a checkpoint's decoder and encoder, and of what its pictures are known by."""
    parts = {"model": state["model"], "encoder": state["encoder"]["weights"]}
    parts["digests"] = state["splits"].get("digests", {})
    return {PREFIXES[part] + name: tensor for part in parts for name, tensor in parts[part].items()}


def write_tensors(folder, tensors):
    """Write those that no .safetensors of the folder holds yet. Returns: {name: that of an equal one}."""
    from safetensors.torch import save_file

    known = {}
    for file in sorted(folder.glob("*.safetensors")):
        known |= {digest(tensor): name for name, tensor in read_file(file).items()}
    places, new = {}, {}
    for name, tensor in tensors.items():
        own = digest(tensor)
        if own not in known:
            known[own] = f"captioner.{name}"
            new[known[own]] = tensor.contiguous()
        places[name] = known[own]
    if new:
        save_file(new, folder / OUR_TENSORS, {"format": "pt"})
    return places


def digest(tensor):
    """Equal for tensors of the same numbers, shape and type alone."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    kind = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.sha256(kind + content.tobytes()).digest()


# ------------------------------------------------------------------------------------------- reading


def read_pretrained(path):
    """What `save_pretrained` wrote, as `checkpoints.load_checkpoint` gives it: without a training's state.

    path: the folder's captioner.json. Raises: FileNotFoundError or ValueError that name the file.
    """
    path = Path(path)
    record, vocabulary = read_object(path), read_object(path.with_name(VOCABULARY))
    places, encoder = record.get("tensors"), record.get("encoder")
    if not isinstance(places, dict) or not isinstance(encoder, dict):
        raise checkpoints.unusable(path, "its tensors or its encoder are missing")
    tensors = {}
    for file in sorted(path.parent.glob("*.safetensors")):
        tensors |= read_file(file)
    absent = [name for name in places.values() if not isinstance(name, str) or name not in tensors]
    if absent:
        raise checkpoints.unusable(path, f"no .safetensors beside it has {str(absent[0])[:80]!r}")
    parts = {
        part: {
            name.removeprefix(prefix): tensors[place].clone()
            for name, place in places.items()
            if name.startswith(prefix)
        }
        for part, prefix in PREFIXES.items()
    }
    config = record.get("config")
    if isinstance(config, dict):  # JSON has no tuples
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    state = dict.fromkeys(checkpoints.CHECKPOINT_KEYS)
    state |= {key: record.get(key) for key in ("format_version", "history", "splits", *KEPT)}
    if parts["digests"] and isinstance(state["splits"], dict):
        state["splits"] |= {"digests": parts["digests"]}
    state |= {"config": config, "vocabulary": vocabulary, "step": 0, "model": parts["model"]}
    state |= {"encoder": encoder | {"weights": parts["encoder"]}}
    checkpoints.check_state(path, state)
    return state


def read_object(path):
    """The object in a JSON file. Raises: FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: give a folder that save_pretrained wrote")
    return checkpoints.read_json_object(path, MAX_JSON_BYTES)


def read_file(path):
    """{name: tensor} of a .safetensors. Raises: ValueError where it is none, or damaged."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"{path}: needs the package safetensors: pip install -r requirements-hub.txt"
        ) from error
    try:
        return load_file(path)
    except (OSError, SafetensorError, *checkpoints.UNREADABLE) as error:
        raise ValueError(f"{path}: no readable safetensors ({str(error)[:100]})") from error


def find_folder(name):
    """The folder of a model: `name` itself, or what the hub has, downloaded once. Raises: FileNotFoundError."""
    if Path(name).exists() or not hub_encoders.HUB_NAME.fullmatch(str(name)):
        return Path(name)
    import huggingface_hub

    wanted = (str(name), ["*.json", "*.safetensors"], "give a folder that save_pretrained wrote")
    download = huggingface_hub.snapshot_download
    return hub_encoders.from_hub(download, f"model {name}", *wanted, is_whole=is_whole)


def is_whole(folder):
    """Whether a folder has a model's description, its vocabulary and weights."""
    named = all((folder / file).is_file() for file in (HUB_FILE, VOCABULARY))
    return named and any(folder.glob("*.safetensors"))


# --------------------------------------------------------------------------- for transformers alone


def not_plain(state):
    """Why transformers' VisionEncoderDecoderModel cannot be this model; None where it can."""
    config, encoder = state["config"], state["encoder"]
    configuration = encoder.get("configuration") or {}
    vision = configuration.get("vision") or {}
    if config.get("decoder") != "gpt2" or config.get("prefix_length"):
        return "its decoder is no GPT-2 with cross-attention"
    if encoder["name"] != "clip" or not vision:
        return "its encoder is not --encoder clip"
    if encoder.get("coarse_size"):
        return "it looks at each picture twice (--coarse_size)"
    has_class_token = hub_encoders.has_class_token(vision)
    if has_class_token and not configuration.get("class_token"):
        return "its decoder was trained without the encoder's class token: train it anew"
    return None


def save_plain(state, folder):
    """Write what transformers reads without us: model, generation, tokenizer and image processor."""
    transformers = clip_gpt2.import_transformers()
    vocabulary = vocabulary_from_plain(state["vocabulary"])
    encoder, decoder = plain_encoder(state), plain_decoder(state, len(vocabulary))
    ids = {
        "decoder_start_token_id": vocabulary.sos,
        "bos_token_id": vocabulary.sos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder.config, decoder.config, **ids
    )
    model = transformers.VisionEncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)
    fold_reader(model, state["model"])
    search = plain_search(state["config"], vocabulary)
    model.generation_config = transformers.GenerationConfig(**search, **ids)
    with hub_encoders.Quietly(transformers):
        model.eval().save_pretrained(folder)
    plain_tokenizer(vocabulary).save_pretrained(folder)
    plain_processor(state["encoder"]).save_pretrained(folder)


def plain_processor(encoder):
    """transformers' image processor for a checkpoint's encoder: pictures squashed to a square, as ours are."""
    numbers = {name: number for number, name in hub_encoders.INTERPOLATIONS.items()}
    picture, side = encoder["configuration"]["picture"], encoder["image_size"]
    return clip_gpt2.import_transformers().CLIPImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"height": side, "width": side},
        resample=numbers[encoder.get("interpolation", "bilinear")],
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(picture["mean"]),
        image_std=list(picture["std"]),
    )


def plain_encoder(state):
    """transformers' vision model with a checkpoint's weights, of the size of its pictures."""
    vision = state["encoder"]["configuration"]["vision"]
    if "vision_use_head" in vision:
        vision = vision | {"vision_use_head": False}  # it pools, which nobody asks for
    model = hub_encoders.new_transformer(vision)
    class_token = hub_encoders.has_class_token(vision)
    trunk = hub_encoders.trunk_of_transformer(model, vision, pooled=False, class_token=class_token)
    trunk.load_state_dict(state["encoder"]["weights"])
    size = state["encoder"]["image_size"]
    if size == vision["image_size"] or hub_encoders.KINDS[vision["model_type"]].any_size:
        return model
    embeddings = model.embeddings
    cells = (size // vision["patch_size"]) ** 2
    blank = torch.zeros(1, cells + class_token, vision["hidden_size"])
    positions = embeddings.interpolate_pos_encoding(blank, size, size)[0].detach()
    larger = hub_encoders.new_transformer(vision | {"image_size": size})
    larger.load_state_dict(model.state_dict() | {"embeddings.position_embedding.weight": positions})
    return larger


def plain_decoder(state, vocab_size):
    """transformers' GPT-2 with a checkpoint's weights; it still lacks what reads the picture."""
    transformers, config = clip_gpt2.import_transformers(), state["config"]
    sizes = (config[f"gpt2_{name}"] for name in ("width", "layers", "heads"))
    ours = clip_gpt2.make_config(vocab_size, *sizes, config["drop_prob"], True)
    plain = transformers.GPT2Config(**ours.to_dict() | {"attn_implementation": "sdpa"})
    model = transformers.GPT2LMHeadModel(plain)
    own = {name: x for name, x in state["model"].items() if name.startswith("gpt2.")}
    model.load_state_dict({name.removeprefix("gpt2."): x for name, x in own.items()})
    return model


def fold_reader(model, weights):
    """Let a plain model read features as ours: standardised, then projected to GPT-2's width.

    Both are linear, so they are one matrix and a bias: x -> A x + b. That is the model's own projection
    where the widths differ, else it goes into what each layer makes keys and values with.
    """
    weight, bias, mean, std = (
        weights[name].double()
        for name in ("project.weight", "project.bias", "feature_mean", "feature_std")
    )
    a = weight / std  # (W, F)
    b = bias - a @ mean
    with torch.no_grad():
        if hasattr(model, "enc_to_dec_proj"):
            model.enc_to_dec_proj.weight.copy_(a)
            model.enc_to_dec_proj.bias.copy_(b)
            return
        for block in model.decoder.transformer.h:
            keys = block.crossattention.c_attn  # x -> x @ weight + bias
            before = keys.weight.double()
            keys.bias.copy_(keys.bias.double() + b @ before)
            keys.weight.copy_(a.T @ before)


def plain_search(config, vocabulary):
    """What `generate` of transformers is told so that it searches as a checkpoint's options say.

    Its beam is our full_beam.
    """
    forbidden = {vocabulary.pad, vocabulary.sos, vocabulary.unk} - {None, vocabulary.eos}
    search = {
        "max_new_tokens": config["max_length"],
        "min_new_tokens": config["min_length"] or None,
        "no_repeat_ngram_size": config["no_repeat_ngram_size"],
        "suppress_tokens": sorted(forbidden) or None,
    }
    if config["algorithm"] == "sample":
        names = ("temperature", "top_k", "top_p")
        return search | {"do_sample": True} | {name: config[name] for name in names}
    beams = config["beam_size"] if config["algorithm"] in ("beam", "full_beam") else 1
    penalty = (
        {"length_penalty": config["length_penalty"], "early_stopping": "never"} if beams > 1 else {}
    )
    return search | {"num_beams": beams, "do_sample": False, **penalty}


def plain_tokenizer(vocabulary):
    """transformers' tokenizer of a vocabulary: it puts captions together as `decode` does, but for a space in front."""
    import tokenizers

    transformers = clip_gpt2.import_transformers()
    if isinstance(vocabulary, SubwordVocabulary):
        tokenizer = tokenizers.Tokenizer.from_str(vocabulary.tokenizer_json)
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), vocabulary.SPECIALS[0])
    else:
        pad, sos, eos, unk = vocabulary.SPECIALS
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary.ids, unk))
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        names = {"pad_token": pad, "bos_token": sos, "eos_token": eos, "unk_token": unk}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )


# ------------------------------------------------------------------------------------------- pushing


def push(source, name, *, private=False, description=""):
    """Upload a trained model to the hub, in one commit. Returns: its address there, and `save_pretrained`'s note.

    Args: source, description: as of `save_pretrained`; name: USER/NAME; private: if it is made now.
    Raises: as `save_pretrained`; OSError of one line where the hub does not take it, which tells the
    command that pushes again.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import httpx
    except ImportError as error:
        raise ValueError(
            "to push needs the package huggingface_hub: pip install -r requirements-hub.txt"
        ) from error
    with tempfile.TemporaryDirectory(prefix="push_") as folder:
        note = save_pretrained(source, folder, name=name, description=description)
        api = huggingface_hub.HfApi(token=hub_token() or False)
        try:
            if not hub_token():
                raise PermissionError(NO_TOKEN)
            url = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the model")
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            command = ["python", "model_versions.py", "push", str(source), name]
            command += ["--hub_private"] * private
            command += ["--description", description] if description else []
            again = shlex.join(command)
            raise OSError(f"{name} was not pushed ({reason}); to push again: {again}") from error
    return str(url), note


NO_TOKEN = "no token: set HF_TOKEN or HUGGINGFACE_TOKEN, or run hf auth login"


def hub_token():
    """The user's token, from where huggingface_hub looks for it, or HUGGINGFACE_TOKEN; None without."""
    import huggingface_hub

    return huggingface_hub.get_token() or os.environ.get("HUGGINGFACE_TOKEN") or None

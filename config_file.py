"""Values of options that are not typed but written down: in a configuration file, in the environment.

    config = read_config("exp.yaml", GROUPS)          # .settings: {option: Setting}
    settings = read_environment(os.environ, TABLE)    # CAPTION_BATCH_SIZE=64

A file is YAML whose keys are our flags or KEYS, or the run_config.json of an old run. Each value is
read as the same text would be if it were typed. Only YAML's syntax is used: no object is ever made
of a tag, and no alias is followed, so a file can neither run code nor grow in memory.
"""

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

FLAG, ENVIRONMENT, FILE = SOURCES = ("flag", "environment", "file")  # what comes first wins
PREFIX = "CAPTION_"  # of environment variables
# Another trainer's variables for the same things; CAPTION_ and the flag comes before them.
PLAIN_VARIABLES = {
    "DEVICE": "device", "BATCH_SIZE": "batch_size", "NUM_EPOCHS": "epochs",
    "DATA_DIR": "data_dir", "HF_REPO_NAME": "push_to_hub", "HF_PRIVATE": "hub_private",
}  # fmt: skip
OF_THE_SERVICE = {"model"}  # CAPTION_MODEL is read by caption_service
MOST_BYTES = 2**16  # of a file
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ["str", "int", "float", "bool", "null", "seq", "map"]
}
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Origin(NamedTuple):
    """Where a value comes from."""

    source: str  # one of SOURCES; of what is not given "preset", "checkpoint" or "default"
    where: str = ""  # the variable, FILE:LINE, the preset or the checkpoint
    key: str = ""  # how a file spells the option
    tolerant: bool = False  # not a mistake where it does nothing

    def __str__(self):
        return f"{self.source} {self.where}".rstrip()

    def is_stronger(self, other):
        """Whether this source comes before that of `other`; those that are not given come last."""
        ranks = [
            SOURCES.index(origin.source) if origin and origin.source in SOURCES else len(SOURCES)
            for origin in (self, other)
        ]
        return ranks[0] < ranks[1]


class Setting(NamedTuple):
    """The value of an option, and where it comes from."""

    value: object
    origin: Origin


class Config(NamedTuple):
    """What a file says."""

    settings: Mapping[str, Setting] = MappingProxyType({})
    notes: tuple[str, ...] = ()  # of keys that have no effect
    feature_dim: Setting | None = None


# ------------------------------------------------------------------------------- another trainer's keys


def square(value):
    """The side of a picture's [height, width]. Raises: ValueError if these differ."""
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ValueError("is no square, to which pictures are squashed: give its side")
    return value[0]


def mixed_precision(value):
    """What --precision is where a file only says whether to mix."""
    return "auto" if read_switch(value) else "float32"


def encoder_spelling(value):
    """Our name of an encoder that has another one in Keras."""
    return {"EfficientNetB3": "efficientnet_b3", "InceptionV3": "inception_v3"}.get(value, value)


class Key(NamedTuple):
    """What a key of a file stands for."""

    option: str | None
    read: Callable = lambda value: value  # from the file's text, or list of texts, to ours
    also: Mapping = MappingProxyType({})  # further options, unless given; None: the same value
    note: str = ""


PLATEAU = {"use_scheduler": "true", "scheduler_type": "reduce_lr_on_plateau"}
KEYS = {  # of image-captioning-production's config.yaml, where they are not spelt as our flags
    "images_path": Key("image_dir", also={"dataset_type": "custom"}),
    "glove_path": Key("glove_path"),
    "train_ratio": Key("split_ratios"),
    "val_ratio": Key("split_ratios"),
    "test_ratio": Key("split_ratios"),
    "word_count_threshold": Key("freq_threshold"),
    "random_seed": Key("seed", also={"split_seed": None}),
    "feature_extractor": Key("encoder", encoder_spelling),
    "feature_dim": Key(None, note="is compared with what the encoder gives"),
    "image_size": Key("image_size", square),
    "embedding_dim": Key("embed_size"),
    "hidden_dim": Key("hidden_size", also={"attention_dim": None}),
    "num_attention_heads": Key(
        "attention_heads", also={"decoder": "attention", "attention": "adaptive"}
    ),
    "dropout_rate": Key("drop_prob"),
    "recurrent_dropout": Key("recurrent_dropout"),
    "lr_decay_factor": Key("scheduler_factor", also=PLATEAU),
    "lr_patience": Key("scheduler_patience", also=PLATEAU),
    "use_mixed_precision": Key("precision", mixed_precision),
    "bleu_sample_size": Key(None, note="has no effect: every image is scored, by --mode test"),
    "artifacts_dir": Key("model_save_dir"),
    "decoder_type": Key("decoder"),  # of run_config.json
}
RATIOS = ("train_ratio", "val_ratio", "test_ratio")
HEADINGS = ("data", "model", "training")
# In the record of a run, which one of these marks, the others are no options.
RECORD_MARKS = {"timestamp", "_config_hash"}
RECORD_KEYS = RECORD_MARKS | {"command", "git", "environment", "origins", "config", "plugin"}
ONLY_TYPED = {
    "config": "a file names no other one",
    "plugin": "it runs code: type it, as --plugin",
}

FEATURE_DIMS = {  # channels of an encoder's last grid
    name: channels
    for channels, names in {
        512: "resnet18 resnet34 vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn "
        "squeezenet1_0 squeezenet1_1",
        576: "mobilenet_v3_small",
        768: "convnext_tiny convnext_small swin_t swin_s swin_v2_t swin_v2_s",
        960: "mobilenet_v3_large",
        1024: "convnext_base shufflenet_v2_x0_5 shufflenet_v2_x1_0 swin_b swin_v2_b",
        1280: "mobilenet_v2 efficientnet_b0 efficientnet_b1 efficientnet_v2_s efficientnet_v2_m "
        "mnasnet0_5 mnasnet1_0",
        1408: "efficientnet_b2",
        1536: "efficientnet_b3",
        1792: "efficientnet_b4",
        2048: "resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d "
        "wide_resnet50_2 wide_resnet101_2 inception_v3",
    }.items()
    for name in names.split()
}


def check_feature_dim(stated, encoder):
    """Raises: ValueError where a file's feature_dim is not what the encoders give together.

    Encoders that the table does not know, such as a user's own, are not compared.
    """
    names = encoder.split("+")
    if not FEATURE_DIMS.keys() >= set(names):
        return
    channels = sum(FEATURE_DIMS[name] for name in names)
    if stated.value != channels:
        raise ValueError(
            f"{stated.origin.where}: feature_dim {stated.value}, but --encoder {encoder} gives "
            f"{channels}: correct it or leave it out"
        )


# ---------------------------------------------------------------------------------------- texts, values


def quoted(text):
    """A file's text as a message may show it."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def did_you_mean(word, known):
    """The end of a message about an unknown word: the nearest known one, if any is near."""
    near = difflib.get_close_matches(word[:60], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def read_switch(text):
    """True or False. Raises: ValueError."""
    if isinstance(text, list) or text.lower() not in SWITCH:
        raise ValueError(f"{quoted(str(text))} is not true or false")
    return SWITCH[text.lower()]


def read_value(option, text):
    """What typing `text` would give, a str or a list of them. Raises: ValueError saying why not.

    option: a row of caption_options.TABLE.
    """
    if option.several:
        texts = text if isinstance(text, list) else [text]
        one = option._replace(several=False)
        return tuple(read_value(one, part) for part in texts)
    if isinstance(text, list):
        raise ValueError("takes one value, not a list")
    if option.kind is bool:
        return read_switch(text)
    if isinstance(option.kind, tuple):
        if text not in option.kind:
            known = ", ".join(option.kind)
            raise ValueError(f"{quoted(text)} is none of {known}{did_you_mean(text, option.kind)}")
        return text
    try:
        return option.kind(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)[:1000]) from error
    except ValueError as error:
        raise ValueError(f"{quoted(text)} is not a {option.kind.__name__}") from error


# ---------------------------------------------------------------------------------------- environment


def read_environment(environ, table):
    """{option: Setting} of the variables CAPTION_<FLAG>, else of PLAIN_VARIABLES; an empty one counts as not set.

    A variable that no option has is another program's, unless one is nearly spelt so.
    Raises: ValueError naming the variable.
    """
    variables = {plain: name for plain, name in PLAIN_VARIABLES.items() if name in table}
    variables |= {PREFIX + name.upper(): name for name in table}
    settings = {}
    for variable, text in sorted(environ.items(), key=lambda pair: pair[0] not in PLAIN_VARIABLES):
        if variable in variables and text:
            name = variables[variable]
            if name == "plugin":
                raise ValueError(f"environment variable {variable}: {ONLY_TYPED[name]}")
            try:
                words = shlex.split(text) if table[name].several else text
                value = read_value(table[name], words)
            except ValueError as error:
                raise ValueError(f"environment variable {variable}: {error}") from error
            settings[name] = Setting(value, Origin(ENVIRONMENT, variable, tolerant=True))
        elif variable.startswith(PREFIX) and variable not in variables:
            name = variable.removeprefix(PREFIX).lower()
            if name in OF_THE_SERVICE:
                continue
            if near := difflib.get_close_matches(name, table, n=1, cutoff=0.85):
                meant = PREFIX + near[0].upper()
                raise ValueError(
                    f"environment variable {variable}: no such option (did you mean {meant}?)"
                )
    return settings


# ------------------------------------------------------------------------------------------------ files


def read_config(path, groups):
    """The Config of a file.

    Args:
        groups: caption_options.GROUPS, whose names, too, may stand as headings.
    Raises: FileNotFoundError or ValueError of one line, with the file and mostly line and key.
    """
    table = {name: option for group in groups.values() for name, option in group.rows.items()}
    aliases = {option.alias: Key(name) for name, option in table.items() if option.alias}
    keys = {name: Key(name) for name in table} | aliases | KEYS
    entries = read_entries(path, {*HEADINGS, *groups})
    is_record = bool(RECORD_MARKS & entries.keys())
    if is_record:
        entries = {key: entry for key, entry in entries.items() if key not in RECORD_KEYS}
    feature_dim = take_feature_dim(path, entries)
    settings, notes = take_ratios(path, entries, table), []
    for key, (line, value) in entries.items():
        where = f"{path}:{line}"
        row = look_up(where, key, value, keys)
        if row.option not in table:
            note = row.note or f"has no effect: there is no --{row.option}"
            notes.append(f"{where}: {key} {note}")
            continue
        option = table[row.option]
        if (value, option.default) in ((None, None), ([], ())):
            continue  # which a record has of what was not given
        if row.option in settings:
            other = settings[row.option].origin
            raise ValueError(f"{where}: {key} is the same as {other.key}, {other.where}: give one")
        origin = Origin(FILE, where, key, tolerant=is_record)
        settings[row.option] = Setting(read_entry(where, key, value, row, option), origin)
    return Config(implied_by(settings, entries, table) | settings, tuple(notes), feature_dim)


def look_up(where, key, value, keys):
    """The Key of a file's key. Raises: ValueError for one that is unknown or not to be in files."""
    if key in ONLY_TYPED and value:
        raise ValueError(f"{where}: {key} is not read from a file: {ONLY_TYPED[key]}")
    if key not in keys:
        guess = did_you_mean(key, [*keys, *HEADINGS])
        raise ValueError(f"{where}: unknown key {quoted(key)}{guess}")
    return keys[key]


def read_entry(where, key, value, row, option):
    """The value of one key. Raises: ValueError with the line, the key and the reason."""
    try:
        if value is None:
            raise ValueError("has no value")
        return read_value(option, row.read(value))
    except ValueError as error:
        raise ValueError(f"{where}: {key} {error}") from error


def implied_by(settings, entries, table):
    """The settings of which keys speak without naming them, as `Key.also` says."""
    implied = {}
    for _, origin in settings.values():
        also = KEYS[origin.key].also if origin.key in KEYS else {}
        for name, text in also.items():
            value = read_value(table[name], text or entries[origin.key][1])
            implied[name] = Setting(value, origin._replace(tolerant=True))
    return implied


def take_feature_dim(path, entries):
    """The Setting of feature_dim, or None; the key leaves `entries`. Raises: ValueError."""
    if "feature_dim" not in entries:
        return None
    line, value = entries.pop("feature_dim")
    if not isinstance(value, str) or not re.fullmatch("[0-9]{1,9}", value):
        raise ValueError(f"{path}:{line}: feature_dim {quoted(str(value))} is not a whole number")
    return Setting(int(value), Origin(FILE, f"{path}:{line}", "feature_dim"))


def take_ratios(path, entries, table):
    """{"split_ratios": Setting} from the three keys of it, or {}; they leave `entries`. Raises: ValueError."""
    found = {key: entries.pop(key) for key in RATIOS if key in entries}
    if not found:
        return {}
    first, (line, _) = next(iter(found.items()))
    if missing := [key for key in RATIOS if key not in found]:
        raise ValueError(f"{path}:{line}: {first} needs {' and '.join(missing)} beside it")
    one = table["split_ratios"]._replace(several=False)
    shares = tuple(
        read_entry(f"{path}:{line}", key, value, KEYS[key], one)
        for key, (line, value) in found.items()
    )
    return {"split_ratios": Setting(shares, Origin(FILE, f"{path}:{line}", ", ".join(RATIOS)))}


def read_entries(path, headings):
    """{key: (line, value)} of a file, in its order: a value is a str, a list of them, or None.

    Keys below a heading count as if they stood alone.
    """
    entries, lines = {}, {}

    def read(mapping, headings):
        for key_node, node in mapping.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                raise ValueError(f"{path}:{line}: a key must be a word")
            key = key_node.value
            if key in lines:
                raise ValueError(
                    f"{path}:{line}: {quoted(key)} stands in line {lines[key]} already: give it once"
                )
            lines[key] = line
            if key in headings and node.id == "mapping":
                read(node, ())
            elif not (key in headings and is_empty(node)):
                entries[key] = line, node

    read(compose(path), headings)
    record = RECORD_KEYS if RECORD_MARKS & entries.keys() else ()
    return {
        key: (line, None if key in record else plain(f"{path}:{line}: {quoted(key)}", node))
        for key, (line, node) in entries.items()
    }


def is_empty(node):
    """Whether a YAML node is null."""
    return node.tag == "tag:yaml.org,2002:null"


def plain(what, node):
    """A YAML node's text, list of texts, or None. Raises: ValueError beginning with `what`."""
    if node.id == "scalar":
        return None if is_empty(node) else node.value
    if node.id == "mapping" or any(part.id != "scalar" for part in node.value):
        raise ValueError(f"{what}: expected a value or a list of values")
    return [part.value for part in node.value]


def compose(path):
    """The top mapping of a YAML file, as nodes. Raises: FileNotFoundError, ValueError."""
    import yaml

    class Composer(yaml.SafeLoader):
        """YAML's syntax tree without aliases, and without any tags but the plain ones."""

        def compose_node(self, parent, index):
            event, fault = self.peek_event(), None
            if isinstance(event, yaml.AliasEvent):
                fault = f"alias *{event.anchor} is not followed: write the value out"
            elif event.tag not in (None, "!", *PLAIN_TAGS):
                fault = f"tag {quoted(event.tag)} is not read: write a plain value"
            if fault:
                raise yaml.MarkedYAMLError(problem=fault, problem_mark=event.start_mark)
            return super().compose_node(parent, index)

    text = read_text(path)
    try:
        root = yaml.compose(text, Loader=Composer)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}:{line}: holds control characters: no YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"{path}:{line}: {' '.join(error.problem.split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply for a configuration") from error
    if root is None or root.id != "mapping":
        raise ValueError(f"{path}: holds no keys: expected lines such as 'batch_size: 64'")
    return root


def read_text(path):
    """A small file's text. Raises: FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--config {path}: no such file")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"--config {path}: is {kind}: give a YAML file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: larger than {MOST_BYTES // 1024} KiB: no configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: no text in UTF-8: give a YAML file") from error

"""Released models: numbered folders that are never edited. A class, and a command.

    python model_versions.py register saved_models/flickr8k --version 1.2.0
    python model_versions.py list
    python flickr_image_caption.py --mode caption --model_path registry:1.2.0 --images dog.jpg

    manager = ModelVersionManager("models/")
    manager.register_version(version="1.2.0", model_path="saved_models/flickr8k")
    latest = manager.get_latest_version()  # latest["path"] is a --model_path

A registry is a folder: `models`, or what the environment variable MODEL_REGISTRY names.

    models/1.2.0/    best.pt  config.json  vocabulary.json  scores.json  metadata.json  README.md
                     version.sha256: their SHA-256, checked whenever one of them is read
    models/model_registry.json    tags, such as production, and the version that each names
    models/results/1.2.0/         what is made with a version, such as its test scores

The folders are the index. A version is made in a hidden folder and renamed into place, so that it
is whole or not there. Who changes a registry holds its lock, which the system frees when a process
dies; what a dead one left behind is removed by the next. torch comes with the first checkpoint that
is read.
[1] Preston-Werner 2013, Semantic Versioning 2.0.0.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import checkpoints
import model_card
from checkpoints import SEAL, BrokenSeal, is_sealed, replace_file, write_json
from model_card import CARD, CONFIG, METADATA, is_number, printable, read_json

DEFAULT_REGISTRY = "models"
PREFIX = "registry:"
LATEST = "latest"
# [1], without build numbers, in which two versions of one rank could differ
_NUMBER, _WORDS = r"(0|[1-9][0-9]{0,8})", r"[0-9A-Za-z-]{1,30}(?:\.[0-9A-Za-z-]{1,30}){0,4}"
VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-({_WORDS}))?")
TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
WEIGHTS = "best.pt"
NEIGHBOURS = "neighbours.pt"  # which captions are reranked by, where the run has it
VOCABULARY_FILES = ("wordtoix.json", "ixtoword.json")  # of --vocab_dir


def version_order(version):
    """A sort key: 1.9.0 < 1.10.0-rc.2 < 1.10.0-rc.10 < 1.10.0 [1].

    Raises: ValueError when it is no semantic version.
    """
    match = VERSION.fullmatch(str(version))
    if not match:
        raise ValueError(f"version {version!r}: give MAJOR.MINOR.PATCH, as 1.2.0 or 1.2.0-rc.1")
    *numbers, words = match.groups()
    rank = [
        (0, int(word), "") if word.isdecimal() else (1, 0, word)
        for word in (words.split(".") if words else ())
    ]
    return *map(int, numbers), words is None, rank


# ------------------------------------------------------------------------------------- --model_path


def resolve_model_path(path, prefer="best"):
    """The checkpoint file that a --model_path means.

    `registry:1.2.0`, `registry:production` (a tag) and `registry:latest` are versions of the
    registry that MODEL_REGISTRY names; a registry's folder is its latest version. All else, a
    version's folder too, is as in `checkpoints.resolve_checkpoint`.
    Raises: FileNotFoundError; BrokenSeal where a version has lost its hashes.
    """
    if str(path).startswith(PREFIX):
        path = ModelVersionManager().folder_of(str(path).removeprefix(PREFIX))
    elif any(map(is_sealed, ModelVersionManager(path).folders())):
        path = ModelVersionManager(path).folder_of(LATEST)
    return checkpoints.resolve_checkpoint(path, prefer)


def results_folder(checkpoint):
    """Where what is made with a checkpoint file goes: beside it, but never into a version."""
    folder = Path(checkpoint).parent
    return folder.parent / "results" / folder.name if is_sealed(folder) else folder


# --------------------------------------------------------------------------------------- the registry


class ModelVersionManager:
    """The versions in a registry's folder, which need not exist before the first is registered.

    A version is named by its number, a tag, or "latest", the highest number, whenever it was
    registered. A damaged version raises BrokenSeal, a ValueError that names the version and the
    file, and leaves the others as they are; one that is not there raises FileNotFoundError.
    """

    def __init__(self, registry=None):
        self.folder = Path(registry or os.environ.get("MODEL_REGISTRY") or DEFAULT_REGISTRY)

    def folders(self):
        """The versions' folders, in the order of their numbers."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        folders = [entry for entry in entries if VERSION.fullmatch(entry.name) and entry.is_dir()]
        return sorted(folders, key=lambda folder: version_order(folder.name))

    def folder_of(self, name):
        """The folder of a version, whose files are checked when they are read."""
        numbered = {folder.name: folder for folder in self.folders()}
        version = name
        if name == LATEST and numbered:
            version = list(numbered)[-1]
        elif TAG.fullmatch(name):
            version = self.tags().get(name)
        if version not in numbered:
            known = ", ".join([*numbered, *self.tags()]) or "none"
            raise FileNotFoundError(
                f"{self.folder}: no version {name!r} of a model: it has {known}"
            )
        if not is_sealed(numbered[version]):
            raise BrokenSeal(
                f"{numbered[version] / SEAL}: missing: use another version than {version}"
            )
        return numbered[version]

    # ---- reading

    def get_version(self, version):
        """A version whose files are all as they were registered.

        Returns: what metadata.json has (`version`, `created_at`, `description`, `run_id`, `source`,
        `metrics`, ...), `tags`, `path` (the folder), `files` and `model_hash` (SHA-256).
        """
        folder = self.folder_of(version)
        _check_files(folder)
        return self._describe(folder)

    def get_latest_version(self):
        """As `get_version`, of the highest number."""
        return self.get_version(LATEST)

    def list_versions(self):
        """What `get_version` returns of each version, by number, with the weights not read.

        Of a damaged one: `version`, and `damaged`, the message.
        """
        versions = []
        for folder in self.folders():
            try:
                versions.append(self._describe(self.folder_of(folder.name)))
            except BrokenSeal as error:
                versions.append({"version": folder.name, "damaged": str(error)})
        return versions

    def compare_versions(self, version_1, version_2):
        """Two versions' scores and what differs between their configurations.

        Returns: {"versions": [1, 2], "metrics": {name: {"values": [1, 2], "difference": 2 - 1}},
        "config": {option: [1, 2]}, "same_images": {"val": bool, "test": bool}}, None for what a
        version has not. Scores of other images are no comparison.
        """
        both = [self.get_version(version) for version in (version_1, version_2)]
        metrics = [version["metrics"] for version in both]
        configs = [read_json(Path(version["path"], CONFIG)) for version in both]
        values = {name: [of.get(name) for of in metrics] for name in metrics[0] | metrics[1]}
        settings = {name: [of.get(name) for of in configs] for name in configs[0] | configs[1]}
        images = [version["images"] for version in both]
        return {
            "versions": [version["version"] for version in both],
            "metrics": {
                name: {"values": pair, "difference": None if None in pair else pair[1] - pair[0]}
                for name, pair in values.items()
            },
            "config": {name: pair for name, pair in settings.items() if pair[0] != pair[1]},
            "same_images": {
                split: images[0].get(split) == images[1].get(split) for split in ("val", "test")
            },
        }

    def verify(self, version=None):
        """Read every file of one version, or of all. Returns: {version: None or what is wrong}."""
        folders = self.folders() if version is None else [self.folder_of(version)]
        return {folder.name: self._fault(folder) for folder in folders}

    def tags(self):
        """{tag: version}. Raises: ValueError when the file is damaged."""
        file = self.folder / "model_registry.json"
        if not file.exists():
            return {}
        tags = (read_json(file) or {}).get("tags")
        if not isinstance(tags, dict) or not all(
            TAG.fullmatch(tag) and isinstance(version, str) for tag, version in tags.items()
        ):
            raise ValueError(f"{file}: damaged: delete it and set the tags anew")
        return tags

    def _fault(self, folder):
        try:
            self.get_version(folder.name)
        except BrokenSeal as error:
            return str(error)
        return None

    def _describe(self, folder):
        """What `get_version` returns, of a folder's metadata.json and its hashes."""
        file = folder / METADATA
        checkpoints.check_seal(file)
        metadata, files = read_json(file), checkpoints.sealed_files(folder)
        if not _is_metadata(metadata) or metadata["version"] != folder.name or WEIGHTS not in files:
            raise BrokenSeal(f"{file}: damaged: it is not of a version {folder.name}")
        tags = [tag for tag, version in self.tags().items() if version == folder.name]
        derived = {"files": files, "model_hash": files[WEIGHTS]}
        return metadata | {"tags": tags, "path": str(folder)} | derived

    # ---- changing

    def register_version(
        self, version, model_path, vocab_dir=None, run_id=None, metrics=None, description=""
    ):
        """Copy a trained model into the registry, whole or not at all. Returns: as `get_version`.

        Args:
            model_path: a best.pt, or a folder of runs.
            vocab_dir: None, or a folder whose wordtoix.json and ixtoword.json are kept, too; the
                words that captions are made of are the checkpoint's.
            run_id: of the run, else that of its run_summary.json, else its folder's name.
            metrics: {name: number} beside those of the run: `val_...` of the checkpoint's epoch
                and `test_...` of a test_metrics.json that is newer than the checkpoint.
        Raises: ValueError when there is such a version, or the number, the checkpoint or a metric
        is none; FileNotFoundError; OSError (a full disk): then the registry is as it was.
        """
        version_order(version)
        source = resolve_model_path(model_path)
        metrics = checkpoints.plain_values(metrics or {})
        _check_given(vocab_dir, metrics)
        files, target = _files_to_copy(source, vocab_dir), self.folder / version
        self._make_folder(target, sum(file.stat().st_size for file in files.values()))
        with self._changing():
            if target.exists():
                raise ValueError(
                    f"{target}: there is this version, and none is edited: give another number"
                )
            partial = self.folder / f".{version}.partial"
            partial.mkdir()
            try:
                _copy(files, partial)
                state = _load_copy(source, partial / WEIGHTS)
                with checkpoints.checkpoint_errors(source):
                    known = {"version": version, "description": description, "run_id": run_id}
                    metadata = model_card.describe(source, state, metrics=metrics, **known)
                    model_card.write_documents(partial, source, state, metadata)
                checkpoints.seal_folder(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed
            checkpoints.flush_folder(self.folder)
        return self._describe(target)

    def delete_version(self, version):
        """Remove a version, damaged ones too. Raises: ValueError while it is tagged."""
        version_order(version)
        with self._changing():
            tags = [tag for tag, tagged in self.tags().items() if tagged == version]
            if tags:
                raise ValueError(f"version {version} is tagged {', '.join(tags)}: untag it first")
            folder, partial = self.folder / version, self.folder / f".{version}.partial"
            if not folder.is_dir():
                raise FileNotFoundError(f"{self.folder}: no version {version}")
            folder.rename(partial)
            shutil.rmtree(partial)

    def tag_version(self, version, tag):
        """Let a tag name this version, and no longer another. Raises: ValueError for a bad tag."""
        if not TAG.fullmatch(tag) or tag == LATEST:
            raise ValueError(f"tag {tag!r}: give a letter, then letters, digits, _ and -")
        with self._changing():
            self._write_tags(self.tags() | {tag: self.folder_of(version).name})

    def untag(self, tag):
        """Remove a tag. Raises: FileNotFoundError when there is none."""
        with self._changing():
            tags = self.tags()
            if tag not in tags:
                raise FileNotFoundError(f"{self.folder}: no tag {tag!r}")
            self._write_tags({name: version for name, version in tags.items() if name != tag})

    def _make_folder(self, target, num_bytes):
        """Make the registry. Raises: ValueError where it cannot be, or a version does not fit."""
        checkpoints.check_writable_dir(self.folder, "--registry")
        advice = "give another --registry"
        checkpoints.check_free_space(self.folder, num_bytes, f"{target}: the files", advice)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _write_tags(self, tags):
        write_json(self.folder / "model_registry.json", {"tags": tags})

    @contextlib.contextmanager
    def _changing(self):
        """Alone among processes, without what an interrupted one left behind."""
        import filelock

        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such registry: register a version first")
        lock = filelock.FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"waiting for another process that changes {self.folder}", file=sys.stderr)
            lock.acquire()
        try:
            for leftover in self.folder.glob("*.partial"):  # of the dead: we hold the lock
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield
        finally:
            lock.release()


def _check_files(folder):
    """Raise BrokenSeal unless a version's files are those that were registered, all and no other."""
    recorded = checkpoints.sealed_files(folder).keys()
    present = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    for name in sorted(recorded | present - {SEAL}):
        checkpoints.check_seal(folder / name)


# ------------------------------------------------------------------------------- a version's files


def _check_given(vocab_dir, metrics):
    """Raise FileNotFoundError or ValueError for what `register_version` cannot keep."""
    if vocab_dir is not None and not Path(vocab_dir).is_dir():
        raise FileNotFoundError(f"vocab_dir {vocab_dir}: no such folder")
    for name, value in metrics.items():
        if not is_number(value):
            raise ValueError(f"metrics: {name} is no finite number")


def _files_to_copy(source, vocab_dir):
    """{name in the version: file} of the checkpoint and of what belongs to it."""
    beside = [source.with_name(NEIGHBOURS)]
    beside += [Path(vocab_dir, name) for name in VOCABULARY_FILES if vocab_dir]
    return {WEIGHTS: source} | {file.name: file for file in beside if file.is_file()}


def _copy(files, folder):
    for name, original in files.items():
        with original.open("rb") as file, replace_file(folder / name) as copy:
            shutil.copyfileobj(file, copy)


def _load_copy(source, copy):
    """The checkpoint as it was copied: a run may replace its own. Raises: ValueError, of `source`."""
    try:
        state = checkpoints.load_checkpoint(copy)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(source))) from error
    if state["encoder"].get("weights") is None:
        raise ValueError(
            f"{source}: it has no encoder weights, so it captions nothing on another machine: "
            "give the run's best.pt"
        )
    return state


def _is_metadata(value):
    """Whether it is a dict with what this program reads of it."""
    kinds = {"version": str, "created_at": str, "description": str, "metrics": dict, "images": dict}
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), kind) for key, kind in kinds.items())
        and all(map(is_number, value["metrics"].values()))
    )


# ------------------------------------------------------------------------------------- the command


def build_parser():
    """The command's parser."""
    shared, as_json = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    where = f"the registry's folder; default: $MODEL_REGISTRY, else {DEFAULT_REGISTRY}"
    shared.add_argument("--registry", metavar="DIR", help=where)
    as_json.add_argument("--json", action="store_true", help="JSON on stdout")
    parser = argparse.ArgumentParser(
        prog="model_versions.py",
        usage="model_versions.py COMMAND ... [--registry DIR]",
        description="Versions of trained models: registered, listed, compared, verified.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(usage, about, *more):
        name, *arguments = usage.split()
        sub = commands.add_parser(
            name,
            usage=f"model_versions.py {usage} [--registry DIR]",
            help=about,
            description=about,
            parents=[shared, *more],
        )
        for argument in filter(str.isupper, arguments):
            optional = argument.startswith("[")
            sub.add_argument(argument.strip("[]").lower(), nargs="?" if optional else None)
        return sub

    register = command("register RUN", "copy a run's best checkpoint into the registry")
    register.usage = "model_versions.py register RUN --version 1.2.0 [--registry DIR]"
    register.add_argument("--version", required=True, help="MAJOR.MINOR.PATCH, such as 1.2.0")
    register.add_argument("--description", default="", help="a line for the model card")
    register.add_argument("--run_id", help="the run's name; default: its own")
    command("list", "all versions, by number", as_json)
    command("show VERSION", "a version's model card", as_json)
    command("compare FIRST SECOND", "two versions' scores and settings", as_json)
    command("verify [VERSION]", "check every file's SHA-256")
    command("delete VERSION", "remove a version")
    command("tag VERSION TAG", "let a tag name a version")
    command("untag TAG", "remove a tag")
    about = "write a version, a checkpoint or a run's best as a folder for the Hugging Face hub"
    save = command("save MODEL FOLDER", about)
    push = command("push MODEL NAME", "upload a version, a checkpoint or a run's best to the hub")
    push.usage = "model_versions.py push MODEL USER/NAME [--hub_private] [--registry DIR]"
    push.add_argument("--hub_private", action="store_true", help="what it makes there is private")
    for each in (save, push):
        each.add_argument("--description", default="", help="a line for the model card")
    return parser


def register(manager, args):
    """A command as COMMANDS has them: the registry and the arguments -> the exit status."""
    version = manager.register_version(
        args.version, args.run, run_id=args.run_id, description=args.description
    )
    print(printable(f"registered {version['path']}: {version['source']}"))
    scores = {name: value for name, value in version["metrics"].items() if "CIDEr" in name}
    print(", ".join(f"{name} {value:.4f}" for name, value in scores.items()) or "no scores")
    if "test_CIDEr" not in scores:
        print("no test scores: no test_metrics.json of this checkpoint lies beside it")
    return 0


def list_all(manager, args):
    """`list`: a line for each version; damaged ones go to stderr."""
    versions = manager.list_versions()
    whole = [version for version in versions if "damaged" not in version]
    if args.json:
        print(json.dumps(versions, indent=2))
    else:
        print(*map(printable, _table(whole)), sep="\n")
    return _report([version["damaged"] for version in versions if "damaged" in version])


def _table(versions):
    """Lines of `list`."""
    yield f"{'version':12} {'registered':20} {'val_CIDEr':>9} {'test_CIDEr':>10}  tags, description"
    for version in versions:
        val, test = (_number(version["metrics"].get(f"{split}_CIDEr")) for split in ("val", "test"))
        words = " ".join([*version["tags"], version["description"]])
        date = version["created_at"].partition("+")[0]
        yield f"{version['version']:12} {date:20} {val:>9} {test:>10}  {words}"


def _number(value):
    if value is None:
        return "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def show(manager, args):
    """`show`: the model card of a version whose hashes are right."""
    version = manager.get_version(args.version)
    card = Path(version["path"], CARD).read_text("utf-8").splitlines()
    lines = [json.dumps(version, indent=2)] if args.json else map(printable, card)
    print(*lines, sep="\n")
    return 0


def compare(manager, args):
    """`compare`: two versions' scores and differing options."""
    comparison = manager.compare_versions(args.first, args.second)
    lines = [json.dumps(comparison, indent=2)] if args.json else _differences(comparison)
    print(*lines, sep="\n")
    return 0


def _differences(comparison):
    """Lines of `compare`."""
    first, second = comparison["versions"]
    yield f"{'':24} {first:>12} {second:>12} {'difference':>12}"
    for name, row in comparison["metrics"].items():
        cells = map(_number, [*row["values"], row["difference"]])
        yield printable(f"{name:24} " + " ".join(f"{cell:>12}" for cell in cells))
    for name, (one, other) in comparison["config"].items():
        yield printable(f"--{name}: {one} -> {other}")
    for split, same in comparison["same_images"].items():
        if not same:
            yield f"not the same {split} images: {split}_ scores do not compare the models"


def verify(manager, args):
    """`verify`: one version, or all; status 1 if a file is damaged."""
    faults = manager.verify(args.version)
    for version in faults:
        if faults[version] is None:
            print(f"{version}: every file is as it was registered")
    return _report(filter(None, faults.values()))


def delete(manager, args):
    """`delete`: a version that has no tag."""
    manager.delete_version(args.version)
    print(f"deleted version {args.version}")
    return 0


def tag(manager, args):
    """`tag`: let a tag name a version."""
    manager.tag_version(args.version, args.tag)
    print(f"{args.tag}: {manager.folder_of(args.tag)}")
    return 0


def untag(manager, args):
    """`untag`: remove a tag."""
    manager.untag(args.tag)
    return 0


def source_of(manager, name):
    """The checkpoint of a version, whose files are checked, or of a file or a folder of runs."""
    registered = VERSION.fullmatch(name) or name in (LATEST, *manager.tags())
    if registered and not Path(name).exists():
        return Path(manager.get_version(name)["path"], WEIGHTS)
    return resolve_model_path(name)


def save(manager, args):
    """`save`: a folder for the hub."""
    import hub_models  # and torch

    source = source_of(manager, args.model)
    note = hub_models.save_pretrained(source, args.folder, description=args.description)
    print(_note(f"saved {args.folder}: {source}", note))
    return 0


def push(manager, args):
    """`push`: upload a model. Status 1 where the hub does not take it."""
    import hub_models  # and torch

    source = source_of(manager, args.model)
    how = {"private": args.hub_private, "description": args.description}
    address, note = hub_models.push(source, args.name, **how)
    print(_note(f"pushed {address}: {source}", note))
    return 0


def _note(line, note):
    """The console's line, with why transformers alone cannot read the folder, if so."""
    return printable(line + (f" (not for transformers alone: {note})" if note else ""))


COMMANDS = {
    "register": register, "list": list_all, "show": show, "compare": compare, "verify": verify,
    "delete": delete, "tag": tag, "untag": untag, "save": save, "push": push,
}  # fmt: skip


def _report(faults):
    """Print what is wrong on stderr. Returns: the exit status, 1 if anything is."""
    status = 0
    for fault in faults:
        print(printable(f"model_versions.py: error: {fault}"), file=sys.stderr)
        status = 1
    return status


def main(argv=None):
    """The command. Returns the exit status: 0 done, 1 damage or another failure, 2 misuse."""
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command](ModelVersionManager(args.registry), args)
    except KeyboardInterrupt:
        return 130
    except BrokenSeal as error:
        return _report([error])
    except (ValueError, FileNotFoundError) as error:
        _report([error])
        return 2
    except OSError as error:
        return _report([error])


if __name__ == "__main__":
    sys.exit(main())

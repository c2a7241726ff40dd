"""The folder of a training run: made, given the best checkpoint of before, and named in commands.

    run_folder.open_folder(run)               # run: flickr_image_caption.Run before its first step

What is in the files is `experiment_utils`' and `checkpoints`' affair.
"""

import shlex
import shutil
import sys
from pathlib import Path

import caption_splits
import checkpoints
import experiment_utils
import run_records
from caption_options import SCHEDULES
from runtime import printable
from tracking_backends import open_listeners


def open_folder(run):
    """Make the run's folder and its first files; a resumed run brings the best checkpoint along."""
    options, state = run.options, run.state
    best = find_best(run)
    check_checkpoint_sizes(run)
    run.folder = experiment_utils.create_run_dir(options.run.model_save_dir, run.config)
    schedule = SCHEDULES.get(state.plan["schedule"])
    taken = schedule.arguments.values() if schedule else ()
    experiment_utils.write_run_files(
        run.folder,
        run.config,
        experiment_utils.launch_command(sys.argv, options.variables),
        [name for name in taken if name in options.schedule._fields],
        options.origins,
    )
    run.tracker = open_tracker(run)
    state.history = run.tracker.history
    print(f"run directory: {run.folder}")
    for killed in run_records.end_killed_beside(run.folder):
        print(printable(f"an earlier run was killed, and is marked as failed now: {killed}"))
    if best:
        with checkpoints.replace_file(run.folder / "best.pt") as copy, best.open("rb") as original:
            shutil.copyfileobj(original, copy)
        return
    state.loop["best_score"] = None


def open_tracker(run):
    """The tracker of a run whose folder is made; of a resumed one, with its past."""
    options, state = run.options, run.state
    past = []
    if options.run.model_path:
        folder = Path(options.run.model_path).parent
        past = experiment_utils.earlier_sample_captions(folder, state.loop["epoch"])
    tracker = experiment_utils.ExperimentTracker(
        run.folder,
        seed=options.run.seed,
        history=state.history,
        sample_captions=past,
        listeners=open_listeners(options.run, run.folder, run.captioner.decoder.named_parameters),
    )
    tracker.log_config(run.config)
    return tracker


def take_samples(run, hypotheses):
    """The Samples of the first validation images, from the hypotheses that validation found."""
    captioner, table, paths = run.captioner, run.validation.table, run.validation.features.paths
    samples = []
    for row, hypothesis in enumerate(hypotheses[: experiment_utils.SAMPLE_IMAGES]):
        looked = hypothesis.attention is not None
        samples.append(
            experiment_utils.Sample(
                image=table.image[row],
                path=paths[row],
                references=table.captions[row],
                caption=captioner.vocabulary.decode(hypothesis.tokens),
                words=captioner.words(hypothesis),
                maps=captioner.attention_grid(hypothesis) if looked else None,
                beside=captioner.attention_beside(hypothesis) if looked else None,
            )
        )
    return samples


def find_best(run):
    """The best.pt beside the checkpoint that a run goes on from; None where it is of no use to it."""
    if run.state.loop["best_score"] is None:
        return None
    path = Path(run.options.run.model_path).with_name("best.pt")
    try:
        best = checkpoints.load_checkpoint(path)
        splits = caption_splits.stored_splits(path, best)
    except (FileNotFoundError, ValueError) as error:
        fault = str(error)
    else:
        if best["epoch"] > run.state.loop["epoch"]:
            fault = f"{path} is of a later epoch"
        elif caption_splits.splits_sha256(splits) != caption_splits.splits_sha256(run.splits):
            fault = f"{path} was validated on other images"
        else:
            return path
    print(f"the best epoch is chosen anew, without the best.pt of before: {printable(fault)}")
    return None


def check_checkpoint_sizes(run):
    """Say what the run's checkpoints will take on the disk. Raises: ValueError when it is too full."""
    epochs = run.state.plan["epochs"] - run.state.loop["epoch"]
    each = sum(p.nbytes for p in run.captioner.decoder.parameters())
    each += sum(p.nbytes for p in run.parameters) * 2  # Adam's two moments
    encoder = sum(t.nbytes for t in run.captioner.encoder.trunk.state_dict().values())
    if run.captioner.encoder.from_checkpoint:  # which all of them hold, as `save` says
        each, encoder = each + encoder, 0
    kept = min(epochs, run.options.training.keep_checkpoints or epochs)
    folder = run.options.run.model_save_dir
    print(experiment_utils.checkpoint_sizes(folder, kept, each, encoder))


def next_command(run, *words):
    """A command that goes on from this run, for the shell that started it."""
    features, plugins = run.options.features, run.options.run.plugin
    code = ["--plugin", *plugins] if plugins else []
    cache = ["--cache_dir", features.cache_dir] if "cache_dir" in run.options.typed else []
    return shlex.join(["python", sys.argv[0], *map(str, words), *code, *cache])

"""The folder of a training run: made, given the best checkpoints of before, and named in commands.

    check_needs(options)
    open_folder(run)                          # run: flickr_image_caption.Run before its first step

What is in the files is `experiment_utils`' and `checkpoints`' affair.
"""

import shlex
import shutil
import sys
from pathlib import Path

import caption_splits
import checkpoints
import experiment_utils
import hub_models
import metrics_utils
import model_selection
import run_records
from caption_options import SCHEDULES
from runtime import printable, warn
from split_data import check_cache_dir
from tracking_backends import open_listeners


def check_needs(options):
    """Ask for what a run will need, before its hours begin. Raises: ValueError where it cannot be had."""
    checkpoints.check_writable_dir(options.run.model_save_dir, "--model_save_dir")
    check_cache_dir(options.features)
    check_selection(options.training.select_by)
    if options.run.push_to_hub and not hub_models.hub_token():
        warn(f"--push_to_hub {options.run.push_to_hub} will fail: {hub_models.NO_TOKEN}")


def check_selection(select_by):
    """Raises: ValueError where the rule that chooses the best epoch needs what is not installed."""
    if model_selection.needs_meteor(select_by) and metrics_utils.find_tables() is None:
        raise ValueError(
            f"--select_by {select_by} needs METEOR's tables: pip install -r requirements.txt, which "
            "has pycocoevalcap, or give another rule"
        )


def open_folder(run):
    """Make the run's folder and its first files; a resumed run brings the best checkpoints along."""
    options, state = run.options, run.state
    sources = {file: find_best(run, file, best) for file, best in state.loop["bests"].items()}
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
    for file, source in sources.items():
        if source:
            bring_along(run, source, run.folder / file)
        else:
            state.loop["bests"][file] = None
    chosen = model_selection.chosen_file(state.select_by)
    if sources[chosen]:
        checkpoints.link_file(run.folder / chosen, run.folder / model_selection.BEST)


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


def find_best(run, file, best):
    """The checkpoint beside the one that a run goes on from which holds the best epoch so far; or None.

    file: the run's name for it, such as best_loss.pt; best: its model_selection.Best, or None.
    """
    if best is None:
        return None
    beside = Path(run.options.run.model_path)
    names = dict.fromkeys([file, model_selection.BEST, f"model_epoch_{best.epoch}.pt", beside.name])
    faults = {}
    for name in names:
        faults[name] = fault_of(run, beside.with_name(name), best.epoch)
        if not faults[name]:
            return beside.with_name(name)
    if file == model_selection.chosen_file(run.state.select_by):
        fault = printable(faults[model_selection.BEST])
        print(f"the best epoch is chosen anew, without the best.pt of before: {fault}")
    else:
        print(f"{file} is chosen anew: no file of epoch {best.epoch} is beside {printable(beside)}")
    return None


def fault_of(run, path, epoch):
    """Why a checkpoint is not what the run had after its best epoch; None if it is."""
    try:
        found = checkpoints.load_checkpoint(path)
        splits = caption_splits.stored_splits(path, found)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if found["epoch"] != epoch or found["data_position"]["captions"]:
        return f"{path} is of another epoch than {epoch}"
    if caption_splits.splits_sha256(splits) != caption_splits.splits_sha256(run.splits):
        return f"{path} was validated on other images"
    return None


def bring_along(run, source, path):
    """Copy the checkpoint of a best epoch; it is given the encoder and the splits if it lacks them."""
    state = checkpoints.load_checkpoint(source)
    if state["encoder"]["weights"] is not None and "sha256" not in state["splits"]:
        with checkpoints.replace_file(path) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy)
        return
    state["encoder"] |= {"weights": run.captioner.encoder.trunk.state_dict()}
    checkpoints.save_checkpoint(path, state | {"splits": run.splits})


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
    bests = 2 if kept < epochs else 1  # of epochs whose own file is no longer kept
    print(experiment_utils.checkpoint_sizes(folder, kept, bests, each, encoder))


def next_command(run, *words):
    """A command that goes on from this run, for the shell that started it."""
    features, plugins = run.options.features, run.options.run.plugin
    code = ["--plugin", *plugins] if plugins else []
    cache = ["--cache_dir", features.cache_dir] if "cache_dir" in run.options.typed else []
    return shlex.join(["python", sys.argv[0], *map(str, words), *code, *cache])

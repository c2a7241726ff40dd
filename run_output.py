"""What a training run shows and writes: bars, checkpoints and curves of each epoch, a report at its end.

    for batch in epoch_progress(run, "", batches, len(batches), "captions", 64): ...
    record_epoch(run, row, best_files)        # run: flickr_image_caption.Run
    finish_run(run)

Its folder is made by `run_folder`; the files themselves are `experiment_utils`' and `checkpoints`'.
"""

import signal
import sys

import torch

import attention_measures
import caption_pictures
import caption_report
import caption_splits
import checkpoints
import consensus
import experiment_utils
import hub_models
import model_selection
import process_group
import run_folder
from caption_options import SCHEDULES
from progress import Progress
from reranking import index_owner
from runtime import warn
from trained_models import described


def epoch_progress(run, part, items, total, unit, each=1):
    """`items` of a part of the epoch, behind a progress bar that also knows the plan.

    unit, each: what an item holds, and how many of them. part: empty for the training itself.
    """
    state = run.state
    known = [row["epoch_time_seconds"] for row in state.history[-1:]]
    title, epochs = f"epoch {state.loop['epoch'] + 1}", state.plan["epochs"]
    return Progress(
        items,
        f"{title} {part}".strip(),
        total,
        unit,
        each,
        rounds=epochs - state.loop["epoch"] - 1 if known or not part else 0,
        round_seconds=known[0] if known else None,
        disable=process_group.rank() > 0,
    )


def save(run, name, is_best=False):
    """Write the whole state to a file of the run's folder.

    That of a best epoch holds the encoder, too, and every file does where the encoder's weights came
    from a checkpoint. Once there is a best.pt, only the best epochs' have the names of the splits.
    """
    captioner, splits = run.captioner, run.splits
    if not is_best and (run.folder / model_selection.BEST).is_file():
        splits = {"sha256": caption_splits.splits_sha256(splits)}
    holds_encoder = is_best or captioner.encoder.from_checkpoint
    weights = captioner.encoder.trunk.state_dict() if holds_encoder else None
    checkpoint = described(captioner, splits)
    checkpoint["encoder"] |= {"weights": weights}
    checkpoint |= {"config": run.config, "model": captioner.decoder.state_dict()}
    checkpoints.save_checkpoint(run.folder / name, checkpoint | run.state.state_dict())


def save_stopped(run, signum):
    """Write last.pt after a signal. Returns the exit status."""
    if process_group.rank() == 0:
        save(run, "last.pt")
        reason = f"stopped by {signal.Signals(signum).name} in epoch {run.state.loop['epoch'] + 1}"
        run.tracker.finalize(reason)
        if sys.stdout.isatty():
            print()  # the terminal's ^C has a line of its own
        print(
            f"{reason}; to go on: {run_folder.next_command(run, '--resume', run.folder / 'last.pt')}"
        )
    process_group.barrier()  # once one process has ended, torchrun ends the one that saves
    return 128 + signum


def record_epoch(run, row, best_files):
    """Write an epoch's checkpoints, curves and console block. best_files: whose best epoch it is."""
    state, keep = run.state, run.options.training.keep_checkpoints
    run.tracker.log_samples(row["epoch"], run.samples)
    run.tracker.log_metrics(**row)
    name = f"model_epoch_{row['epoch']}.pt"
    save(run, name, is_best=bool(best_files))
    for best in best_files:
        checkpoints.link_file(run.folder / name, run.folder / best)
    if keep:
        checkpoints.prune_checkpoints(run.folder, keep)
    plan = state.plan | ({"schedule": None} if "train_reward" in row else {})
    scheduler = describe_scheduler(run.options, plan)
    epochs, example = state.plan["epochs"], run.samples[0]
    is_best = model_selection.BEST in best_files
    print(experiment_utils.epoch_summary(row, epochs, scheduler, is_best, example), flush=True)
    images = len(run.validation.table)
    if images > 1 and row["share_unique"] * images < 1.5:
        warn(
            "every validation image got the same caption: the decoder does not see the "
            "images (yet); lower --learning_rate if it stays so"
        )
    if attention_measures.newly_uniform(state.history):
        warn(
            f"attention maps are all but uniform (entropy {row['attention_entropy']:.3f} of uniform): "
            "they show nothing of where words come from"
        )


def describe_scheduler(options, plan):
    """What the console says of the schedule, such as `CosineAnnealingLR (T_max=20)`."""
    if plan["schedule"] is None:
        return "none"
    schedule = SCHEDULES[plan["schedule"]]
    values = options.as_dict()
    shown = [f"{name}={values[schedule.arguments[name]]}" for name in schedule.shown]
    shown += [f"steps={plan['steps']}"] if plan["schedule"] == "one_cycle" else []
    return f"{schedule.torch_name} ({', '.join(shown)})"


def finish_run(run):
    """Report on the run, draw the attention pictures that were asked for, say what to do next."""
    best, options = run.folder / model_selection.BEST, run.options
    paths, pictures = run.validation.features.paths, options.pictures
    if pictures.save_attention_viz:
        hypotheses = first_captions(run, pictures.attention_viz_samples)
        caption_pictures.draw_attention(run.folder, run.captioner, paths, hypotheses, options)
        print(caption_pictures.pictures_note(run.folder, options))
    with caption_report.only_warns():
        shown = first_captions(run, caption_report.EACH)
        source = "val", run.validation.table, paths
        caption_report.report(run.folder, run.captioner, *source, shown, pictures.viz_method)
    if run.captioner.reranker:
        owner = index_owner(best, described(run.captioner, run.splits))
        index = run.captioner.reranker.index
        consensus.save_index(index, run.folder / consensus.FILE_NAME, owner)
    select_by, bests = options.training.select_by, run.state.loop["bests"]
    for file, rule in model_selection.rules_of_files(select_by).items():
        if bests[file].epoch != run.state.best.epoch:
            print(f"best {model_selection.label(rule, bests[file])}: {run.folder / file}")
    print(
        f"best {model_selection.label(select_by, run.state.best)}: {best}\n"
        f"test it: {run_folder.next_command(run, '--mode', 'test', '--model_path', best)}"
    )


def push_best(run):
    """Upload the best model where --push_to_hub says. Raises: OSError that says how to do it later."""
    name, private = run.options.run.push_to_hub, run.options.run.hub_private
    if name:
        best = run.folder / model_selection.BEST
        address, note = hub_models.push(best, name, private=private)
        print(f"pushed: {address}" + (f" (not for transformers alone: {note})" if note else ""))


def first_captions(run, number):
    """What the best epoch's model writes of the first validation images: a hypothesis each."""
    captioner, features, options = run.captioner, run.validation.features, run.options
    best = checkpoints.load_checkpoint(run.folder / model_selection.BEST)
    captioner.decoder.load_state_dict(best["model"])
    captioner.encoder.trunk.load_state_dict(best["encoder"]["weights"])  # its tail may have learnt
    images = [torch.arange(len(features.paths))[:number]]
    chunks = features.stream(images)
    hypotheses = captioner.caption_features(chunks, options.decoding, options.run.seed)
    best_of_each = [image[0] for image in hypotheses]
    return captioner.with_maps(options.pictures.viz_method, features.stream(images), best_of_each)

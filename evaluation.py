"""How good the captions of a split are: their scores, what their maps tell, and what a test leaves of it.

    scorer = make_scorer(table, training_texts)
    captions, scores, per_image = score_captions(captioner, scorer, table.image, best)
    split = CaptionedSplit(options, captioner, dataset, table, features, best, boxes)
    scores = write(split, *score(split, judge), folder, started)

Validation and test score alike. captioner: as flickr_image_caption.Captioner; a hypothesis is one of
caption_decoding's, the best of its image.
"""

import itertools
import time
from dataclasses import dataclass

import pandas
import torch

import attention_measures
import caption_pictures
import caption_report
import checkpoints
import clip_score
import metrics_utils
import run_records
import score_details
from caption_data import Dataset
from caption_options import BEAMS, Options
from feature_cache import FeatureSource
from progress import Progress
from runtime import warn


def make_scorer(table, training_texts):
    """What scores captions of the images in a table; training texts tell which are copied."""
    references = dict(zip(table.image, table.captions, strict=True))
    return metrics_utils.CaptionScorer(references, training_texts)


def score_captions(captioner, scorer, names, best, **how):
    """{name: text} of each image's best hypothesis, their scores, and the scores by image."""
    texts = (captioner.vocabulary.decode(hypothesis.tokens) for hypothesis in best)
    captions = dict(zip(names, texts, strict=True))
    scores, per_image = scorer.score(captions, **how)
    scores["share_cut"] = sum(not hypothesis.finished for hypothesis in best) / len(best)
    return captions, scores, per_image


# ------------------------------------------------------------------------------------- test mode


@dataclass
class CaptionedSplit:
    """A split whose captions are written, and what else is asked to judge them."""

    options: Options
    captioner: object
    dataset: Dataset
    table: pandas.DataFrame  # of the split's images
    features: FeatureSource
    best: list  # a Hypothesis of each image
    boxes: dict | None  # of the objects in them, as `open_boxes`


def open_judge(options, hardware):
    """The clip_score.ClipJudge that --clip_score names, or None."""
    source = options.output.clip_score
    return clip_score.ClipJudge(source, hardware.device) if source else None


def open_boxes(dataset, table):
    """The object boxes beside the captions; None without, or where they are of no use."""
    path = dataset.captions_file.with_name("boxes.json")
    try:
        return metrics_utils.read_boxes(path, table.image) if path.is_file() else None
    except ValueError as error:
        warn(f"{error}: attention is not compared with boxes")
        return None


def map_first(captioner, features, best, pictures, boxes):
    """The best hypotheses with --viz_method's maps, of those images whose maps are looked at: all with boxes."""
    number = max(attention_measures.MEASURED_IMAGES, pictures.attention_viz_samples)
    number = len(best) if boxes else min(number, len(best))
    chunks = first_features(features, number, "mapping by gradients")
    return [*captioner.with_maps(pictures.viz_method, chunks, best[:number]), *best[number:]]


def score(split, judge):
    """Scores of a CaptionedSplit by name, and a row per image for the captions file. judge: a ClipJudge or None."""
    scores, rows = score_texts(split)
    has_maps = split.best[0].attention is not None
    if has_maps and split.boxes:
        scores["attention"] = peak_in_box(split)
    if judge:
        references = split.table.captions.tolist()
        scores, rows = judge.add_scores(scores, rows, split.features.paths, references)
    if has_maps:
        method = {"method": split.options.pictures.viz_method}
        scores["attention"] = method | scores.get("attention", {}) | measure_attention(split)
    return scores, rows


def score_texts(split):
    """As `score`, of what the captions say alone."""
    training = split.dataset.table.captions[split.dataset.table.split == "train"]
    texts = None if split.dataset.foreign else list(itertools.chain.from_iterable(training))
    scorer = make_scorer(split.table, texts or None)  # None where they are not at hand
    how = {"meteor": True, "bootstrap": 1000, "group_of": score_details.length_band}
    names = split.table.image
    captions, scores, per_image = score_captions(split.captioner, scorer, names, split.best, **how)
    scores["details"] = score_details.describe(scorer, captions, scores.pop("groups"))
    rows = [
        {"image_id": number, "file_name": name, "caption": text, "log_prob": hypothesis.log_prob}
        | per_image[name]
        for number, ((name, text), hypothesis) in enumerate(
            zip(captions.items(), split.best, strict=True)
        )
    ]
    return scores, rows


def peak_in_box(split):
    """How often a word's attention peaks in a box of the object that it names."""
    captioner, boxes = split.captioner, split.boxes
    records = [
        (captioner.words(hypothesis), captioner.attention_grid(hypothesis), boxes.get(name, []))
        for name, hypothesis in zip(split.table.image, split.best, strict=True)
    ]
    return metrics_utils.peak_in_box(records)


def measure_attention(split):
    """What `attention_measures.measure` finds in the best hypotheses of a split's first images."""
    captioner, best = split.captioner, split.best[: attention_measures.MEASURED_IMAGES]
    chunks = first_features(split.features, len(best), "measuring attention")
    chunks = map(captioner.grids, chunks)
    decoder, words, hardware = captioner.decoder, captioner.vocabulary, captioner.hardware
    seed = split.options.run.seed
    return attention_measures.measure(decoder, chunks, best, words, hardware, seed)


def first_features(features, number, title):
    """Yield features of a split's first images in chunks (n, P, F), behind a progress bar."""
    each = attention_measures.CHUNK
    rows = torch.arange(number).split(each)
    yield from Progress(features.stream(rows), title, len(rows), "images", each)


def write(split, scores, rows, folder, started):
    """Draw, write, print and report what `score` found of a CaptionedSplit. Returns the scores as written.

    started: when the test began, by time.perf_counter.
    """
    options, name = split.options, split.options.output.split
    folder.mkdir(parents=True, exist_ok=True)
    if options.pictures.save_attention_viz:
        paths = split.features.paths[: options.pictures.attention_viz_samples]
        caption_pictures.draw_attention(folder, split.captioner, paths, split.best, options)
        print(caption_pictures.pictures_note(folder, options))
    scores |= circumstances(split) | {"wall_time_seconds": time.perf_counter() - started}
    scores["duller"] = score_details.duller_than_before(folder / f"{name}_metrics.json", scores)
    checkpoints.write_json(folder / f"{name}_captions.json", rows)
    checkpoints.write_json(folder / f"{name}_metrics.json", scores)
    print_scores(folder, split.captioner, scores, options)
    if not (options.output.ensemble or split.dataset.foreign):  # else they are not the run's own
        run_records.add_scores(folder, name, scores)
    with caption_report.only_warns():
        report_examples(split, rows, folder)
    return scores


def circumstances(split):
    """What scores are to be read with: data, search, model."""
    options, foreign = split.options, split.dataset.foreign
    return {
        "dataset_type": options.data.dataset_type,
        "split": options.output.split,
        "images": len(split.table),
        "foreign_dataset": foreign and foreign._asdict(),
        "decoding": options.decoding._asdict(),
        "rerank": split.captioner.reranker and options.rerank._asdict(),
        "seed": options.run.seed,
        "checkpoint": options.run.model_path,
        "clip_score": options.output.clip_score,
        "ensemble": options.output.ensemble,
    }


def report_examples(split, rows, folder):
    """Report on the test, with pictures of some rows of the captions file."""
    captioner, method = split.captioner, split.options.pictures.viz_method
    chosen = caption_report.choose(rows)
    chunks = split.features.stream([torch.tensor(chosen)])
    shown = captioner.with_maps(method, chunks, [split.best[row] for row in chosen])
    source = split.options.output.split, split.table, split.features.paths
    caption_report.report(folder, captioner, *source, shown, method, chosen)


def print_scores(folder, captioner, scores, options):
    """The console's tables of a test, and where its files are."""
    algorithm, split = options.decoding.algorithm, scores["split"]
    search = algorithm + f" {options.decoding.beam_size}" * (algorithm in BEAMS)
    search += f", consensus of {options.rerank.neighbours} neighbours" * bool(captioner.reranker)
    print(f"{options.data.dataset_type} {split}: {scores['images']} images, {search}")
    print(metrics_utils.scores_table(scores))
    print(score_details.details_table(scores["details"]))
    if scores["duller"]:
        print(f"since the last test here: {scores['duller']}")
    print(f"written: {folder / f'{split}_metrics.json'} and {split}_captions.json")


def write_seeds(folder, split, tests):
    """Write and print the mean over several seeds. tests: the scores of each, as `write` returned them."""
    path, summary = folder / f"{split}_seeds.json", score_details.over_seeds(tests)
    checkpoints.write_json(path, summary)
    print(score_details.seeds_table(summary))
    print(f"written: {path}")

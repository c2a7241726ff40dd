"""Choose how captions are searched for by the scores of validation captions.

    table = try_searches(captioner, features, index, options, score)
    keep_best(table, options, folder)                         # as the checkpoint's defaults

A beam is searched once for each size and n-gram block: which captions it holds depends on these
alone, because finished ones keep their places. Length penalty and rerank weight only order them.
"""

import itertools
from typing import NamedTuple

import pandas

import checkpoints
from caption_decoding import rescored
from consensus import ordered
from progress import Progress
from reranking import mean_features
from split_data import decode_chunks

GRID = {  # what is tried of each setting that is not typed
    "beam_size": (3, 5, 10),
    "no_repeat_ngram_size": (0, 3),
    "length_penalty": (0.0, 0.5, 0.8, 1.0),
    "rerank_weight": (0.0, 0.5, 1.0, 2.0, 4.0),  # 0: no reranking
}


class Search(NamedTuple):
    """What decides which captions a beam holds."""

    beam_size: int
    no_repeat_ngram_size: int


def make_grid(options):
    """GRID, with what was typed at its value alone. options: caption_options.Options."""
    typed = {name: (options.as_dict()[name],) for name in GRID.keys() & options.typed}
    if options.rerank.rerank == "none":
        typed["rerank_weight"] = (0.0,)
    return {name: typed.get(name, values) for name, values in GRID.items()}


def as_options(chosen, options):
    """Chosen settings as values of options by name, for a checkpoint's configuration."""
    rerank = "consensus" if chosen["rerank_weight"] else "none"
    return options.rerank._asdict() | chosen | {"algorithm": "beam", "rerank": rerank}


def searches(grid):
    """Every Search of a grid."""
    return itertools.starmap(Search, itertools.product(*(grid[name] for name in Search._fields)))


def try_searches(captioner, features, index, options, score):
    """One row per combination that is tried, as `try_all` gives it.

    Args:
        captioner: a flickr_image_caption.Captioner.
        features: FeatureSource of the N images.
        index: consensus.ConsensusIndex of the training images.
        options: what was typed is not varied.
        score: as of `try_all`.
    """
    grid = make_grid(options)
    nearest = index.nearest(mean_features(captioner, features), options.rerank.neighbours)
    candidates = {}
    for search in searches(grid):
        beams = whole_beams(captioner, features, options.decoding, search)
        candidates[search] = beams, index.agreement(nearest, beams)
    return try_all(grid, candidates, score)


def whole_beams(captioner, features, decoding, search):
    """Every caption that each image's beam holds, whatever its rank."""
    decoding = decoding._replace(num_captions=search.beam_size, **search._asdict())
    beams = captioner.caption_features(decode_chunks(features), decoding)
    return list(Progress(beams, f"beam {search.beam_size}", len(features.paths), "images"))


def try_all(grid, candidates, score):
    """One row per combination, as a pandas.DataFrame: the settings and the scores.

    Args:
        candidates: {Search: (beams, agreement)}, N lists each, of Hypothesis and of their agreement
            with similar images' captions.
        score: from the N best hypotheses to a dict of scores, CIDEr among them.
    """
    rows = []
    for search, (beams, agreement) in candidates.items():
        for penalty, weight in itertools.product(grid["length_penalty"], grid["rerank_weight"]):
            best = [
                ordered([rescored(h, penalty) for h in beam], of_image, weight)[0]
                for beam, of_image in zip(beams, agreement, strict=True)
            ]
            settings = {"length_penalty": penalty, "rerank_weight": weight}
            rows.append(search._asdict() | settings | score(best))
    return pandas.DataFrame(rows)


def choose(table):
    """The settings of highest CIDEr, of the first row that has it."""
    return {name: table.loc[table.CIDEr.idxmax(), name].item() for name in GRID}


def as_text(table, chosen):
    """CIDEr of every combination, rows by search and penalty, a column per rerank weight; the choice."""
    rows = [name for name in GRID if name != "rerank_weight"]
    wide = table.pivot_table(index=rows, columns="rerank_weight", values="CIDEr")
    settings = ", ".join(f"--{name} {value:g}" for name, value in chosen.items())
    lines = ["validation CIDEr", wide.to_string(float_format="{:.4f}".format)]
    return "\n".join([*lines, f"best: {table.CIDEr.max():.4f} with {settings}"])


def keep_best(table, options, folder):
    """Make the best settings the checkpoint's defaults; write all scores, and print them."""
    path, chosen = options.run.model_path, choose(table)
    checkpoints.update_config(path, as_options(chosen, options))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(folder / "val_tuning.json", table.to_dict("records"))
    print(as_text(table, chosen))
    print(f"{path}: these are its defaults now; all scores: {folder / 'val_tuning.json'}")

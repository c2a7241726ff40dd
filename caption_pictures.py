"""The pictures that are drawn beside captions: where each word looked, and how its search went.

    draw_attention(folder, captioner, paths, hypotheses, options)
    status = draw_searches(folder, captioner, paths, options)

captioner: as flickr_image_caption.Captioner. matplotlib, which takes a second, is imported by what
draws with it: few runs do.
"""

import itertools
import sys

import image_loading
from caption_decoding import ALGORITHMS
from runtime import printable


def draw_attention(folder, captioner, paths, hypotheses, options, names=None):
    """A picture for the hypothesis of each path: its map per word. Numbered without names."""
    import attention_visualization

    pictures = image_loading.open_images(paths)
    for name, picture, hypothesis in zip(names or itertools.count(1), pictures, hypotheses):  # noqa: B905
        attention_visualization.save_attention_viz(
            folder,
            name,
            picture,
            captioner.words(hypothesis),
            captioner.attention_grid(hypothesis),
            advanced=options.pictures.advanced_attention_viz,
            log_prob=hypothesis.log_prob,
            beside=captioner.attention_beside(hypothesis),
            scale=options.pictures.viz_scale,
            form=options.pictures.viz_format,
        )


def pictures_note(folder, options):
    """Where the pictures are and what drew their maps, for the console."""
    method, files = options.pictures.viz_method, f"*attention_viz_*.{options.pictures.viz_format}"
    return printable(f"{method} pictures: {folder / files}")


def draw_searches(folder, captioner, paths, options):
    """Print how each algorithm searches for a picture's caption, and draw the beam's tree.

    Returns: the exit status, 1 if one of the files is no picture.
    """
    import search_tree
    from attention_visualization import picture_names

    status, vocabulary = 0, captioner.vocabulary
    for path, name in zip(paths, picture_names(paths), strict=True):
        try:
            features = captioner.encode([path])
        except ValueError as error:
            print(f"flickr_image_caption.py: {printable(str(error))}", file=sys.stderr)
            status = 1
            continue
        print(printable(path))
        trees = {each: search_tree.trace(captioner, features, each, options) for each in ALGORITHMS}
        folder.mkdir(parents=True, exist_ok=True)
        (photograph,) = image_loading.open_images([path])
        file = folder / f"{name}_search_tree.{options.pictures.viz_format}"
        search_tree.save_search_tree(
            file, photograph, trees["beam"], vocabulary.words, vocabulary.eos
        )
        print(f"  search tree: {printable(file)}")
    return status

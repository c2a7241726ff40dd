"""Flickr30k Entities' boxes of phrases -> boxes.json, with which test mode compares attention.

    images, boxes, left_out = write_boxes(Path("Flickr30kEntities"), Path("data/flickr30k/boxes.json"))

Annotations/<image id>.xml has an image's boxes, in pixels, and the coreference chains that each shows;
Sentences/<image id>.txt its captions, in which phrases are marked: [/EN#283585/people Two young guys].
The last word of a phrase names what its chain shows, unless it is a function word ("another") or a
colour. A box thus has the names of all phrases of its chains, and a name the boxes of all its chains.
Source: Plummer et al. 2015, Flickr30k Entities, section 3; the measure: Liu et al. 2017.
"""

import math
import re
from xml.etree import ElementTree

import checkpoints
from caption_batches import tokenize
from metrics_utils import COLOURS
from score_details import is_function_word

PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s/\]]+)+ ([^\[\]]+)\]")
MOST_BYTES = 2**20  # of a file; the largest of the data set have some thousand


def write_boxes(folder, path):
    """Write the boxes of all images in Flickr30k Entities' folder into the JSON file `path`.

    Returns: (images, boxes, boxes left out because nothing of them lies in the picture).
    Raises: ValueError, one line that names the file, for one that is not in Entities' layout;
    nothing is written then.
    """
    annotations = sorted((folder / "Annotations").glob("*.xml"))
    if not annotations:
        raise ValueError(
            f"{folder}: no Annotations/*.xml: unpack annotations.zip of Flickr30k Entities there"
        )
    boxes, left_out = {}, 0
    for annotation in annotations:
        sentences = folder / "Sentences" / f"{annotation.stem}.txt"
        objects, outside = read_objects(annotation)
        boxes[f"{annotation.stem}.jpg"] = named_boxes(objects, read_names(sentences))
        left_out += outside
    checkpoints.write_json(path, boxes)
    return len(boxes), sum(map(len, boxes.values())), left_out


def named_boxes(objects, names):
    """(chains, box) of each object, {chain: names} -> boxes as `metrics_utils.peak_in_box` takes them."""
    named = [
        {"names": sorted(set().union(*(names.get(chain, ()) for chain in chains))), "box": box}
        for chains, box in objects
    ]
    return [entry for entry in named if entry["names"]]


def read_names(path):
    """A file of sentences -> {chain: the words that name it}. Raises: ValueError naming file and line."""
    names = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        phrases = PHRASE.findall(line)
        if len(phrases) != line.count("[/EN#"):
            raise ValueError(
                f"{path}:{number}: expected phrases like [/EN#283585/people Two young guys], "
                f"got {line[:60]!r}"
            )
        for chain, phrase in phrases:
            words = tokenize(phrase)
            if words and words[-1] not in COLOURS and not is_function_word(words[-1]):
                names.setdefault(chain, set()).add(words[-1])
    return names


def read_objects(path):
    """An image's annotations -> [(chains, [x0, y0, x1, y1])], boxes outside the picture.

    Boxes are fractions of the picture's width and height. One that crosses its edge is cut there, as
    annotators drew beyond it; of one outside, or without area, nothing is left.
    Raises: ValueError naming the file.
    """
    objects, outside = [], 0
    try:
        root = ElementTree.fromstring(
            read_text(path).encode(), ElementTree.XMLParser(target=WithoutDTD(), encoding="utf-8")
        )
        width, height = read_numbers(root.find("size"), "width", "height")
        if min(width, height) <= 0:
            raise ValueError("the picture's size is not above 0")
        for entry in root.findall("object"):
            chains = [name.text for name in entry.findall("name")]
            for box in entry.findall("bndbox"):  # none of a scene
                x0, y0, x1, y1 = read_numbers(box, "xmin", "ymin", "xmax", "ymax")
                corners = [x0 / width, y0 / height, x1 / width, y1 / height]
                x0, y0, x1, y1 = corners = [min(max(corner, 0.0), 1.0) for corner in corners]
                if x0 < x1 and y0 < y1:
                    objects.append((chains, corners))
                else:
                    outside += 1
    except (ElementTree.ParseError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not an annotation of Flickr30k Entities: {reason}") from None
    return objects, outside


class WithoutDTD(ElementTree.TreeBuilder):
    """Refuses a document type before any entity of it is declared: they may grow without bounds."""

    def doctype(self, *_):
        raise ValueError("it has a DTD")


def read_numbers(element, *names):
    """The numbers in an element's children. Raises: ValueError naming the child."""
    numbers = []
    for name in names:
        text = element.findtext(name, "") if element is not None else ""
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise ValueError(f"expected a number as <{name}>, got {text[:20]!r}")
    return numbers


def read_text(path):
    """The text of a small UTF-8 file. Raises: ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: has more than {MOST_BYTES:,} bytes")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None

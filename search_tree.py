"""What a search did for one picture: its steps as text, and a beam's tree as a picture.

    tree = trace(captioner, features, "beam", options)  # which prints the steps
    save_search_tree("dog_search_tree.png", photograph, tree, vocabulary.words, vocabulary.eos)

`generate` tells the recorder what each of its steps chose among: the search is the one that writes
captions everywhere else. In the picture time goes to the right. The caption that won is a straight
line; what left it stands above and below, the later the nearer, so that no two branches cross.

Axes: K hypotheses before a step, W after it, h x w grid cells.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from attention_visualization import FAINT, INK, PALE, map_peak, rendered, text_width
from checkpoints import replace_file
from runtime import printable

WON = "#2f6db3"
END = "end"  # how <EOS> is drawn
# Inches
PHOTOGRAPH = 1.25  # its longer side
LANE, BOX = 0.44, 0.34  # from one hypothesis to the next, and height of a word's box
GAP = 0.2  # between the boxes of two steps
PADDING = 0.14  # of a box, both sides together
MARGIN = 0.12
LEGEND = 0.3  # height
WORD, NUMBER = 9, 7  # points


def trace(captioner, features, algorithm, options):
    """Print what an algorithm returns for one picture, and its steps. Returns their tree, as `grow`.

    captioner: has `caption_features`, `vocabulary`, `encoder`, and maps of a hypothesis by name.
    features: of the picture, as it gives them; options: what the search and the seed come from.
    """
    vocabulary, decoding = captioner.vocabulary, options.decoding._replace(algorithm=algorithm)
    recorder = Recorder(options.output.debug_candidates)
    how = {"record": recorder, "fixed_shapes": False}
    ((best,),) = captioner.caption_features([features], decoding, options.run.seed, **how)
    tree = grow(recorder.steps, best, vocabulary.eos)
    size = decoding.beam_size
    title = {"beam": f"beam {size}", "full_beam": f"full beam {size}"}
    title["sample"] = f"sample, seed {options.run.seed}"
    rated = f"log probability {best.log_prob:.3f}"
    if algorithm in ("beam", "full_beam") and decoding.length_penalty:
        rated += f", score {best.score:.3f} with length penalty {decoding.length_penalty:g}"
    caption = printable(vocabulary.decode(best.tokens))
    print(f"  {title.get(algorithm, algorithm)}: {caption} ({rated})")
    peaks, grid = (), captioner.encoder.grid
    if best.attention is not None:
        beside = captioner.attention_beside(best)
        peaks = peak_texts(captioner.attention_grid(best), beside)
    lines = trace_lines(tree, vocabulary.words, peaks, grid)
    print(*(f"    {printable(line)}" for line in lines), sep="\n", flush=True)
    return tree


class Step(NamedTuple):
    """What one step of the search chose, of one picture."""

    candidates: list  # of each of the K: [(word id, probability), ...], likeliest first
    before: list[float]  # (K,) log-probability so far
    finished: list[bool]  # (K,)
    parents: list[int]  # (W,) which of the K each new hypothesis goes on from
    words: list[int]  # (W,)
    log_prob: list[float]  # (W,) nats, with the word


class Recorder:
    """Keeps the steps of a search for one picture: the `record` of `generate`."""

    def __init__(self, num_candidates):
        self.num_candidates, self.steps = num_candidates, []

    def __call__(self, beams, logits, log_norm, choice):
        """As an algorithm is called, and what it chose: parents, words, log_prob, each (1, W)."""
        log_probs = logits[0] - log_norm[0].unsqueeze(-1)  # (K, V)
        best = log_probs.topk(min(self.num_candidates, log_probs.size(-1)))
        pairs = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        candidates = [list(zip(*pair, strict=True)) for pair in pairs]
        state = (beams.log_prob[0].tolist(), beams.finished[0].tolist())
        self.steps.append(Step(candidates, *state, *(part[0].tolist() for part in choice)))


@dataclass(eq=False)
class Node:
    """A word that the search wrote, after those of the nodes above it."""

    word: int | None  # id; None for the root
    probability: float = 1.0  # of the word
    log_prob: float = 0.0  # nats, of all words so far
    step: int = 0
    rank: int = 1  # among the hypotheses of its step, 1 is the likeliest
    beam: int = 1  # how many those are
    candidates: list = field(default_factory=list)  # what the word was chosen from
    parent: "Node | None" = None
    children: list = field(default_factory=list)
    is_last: bool = False  # a hypothesis of the final beam ends here
    goes_on: bool = False  # the search went on from here, which the tree does not show
    is_kept: bool = False  # it leads to one of these
    has_won: bool = False

    @property
    def path(self):
        """The nodes from the first word to this one."""
        node, found = self, []
        while node.parent:
            found.append(node)
            node = node.parent
        return found[::-1]

    @property
    def below(self):
        """This node and all that come after it."""
        found = [self]
        for node in found:
            found += node.children
        return found


def grow(steps, best, eos):
    """The tree of a search's steps, as its root, up to the one that wrote the last word of what it returned.

    best: the Hypothesis that it returned; eos: the id of <EOS>. A search goes on while another
    hypothesis may still become better.
    """
    root = Node(None)
    beam = [root]  # the node at which each hypothesis stands
    for number, step in enumerate(steps, start=1):
        beam = [
            beam[parent] if step.finished[parent] else add_word(beam[parent], number, step, place)
            for place, parent in enumerate(step.parents)
        ]
    for node in beam:
        node.is_last = node.log_prob > -np.inf
        for each in node.path if node.is_last else ():
            each.is_kept = True
    tokens = [*best.tokens, *([eos] if best.finished else [])]
    possible = (node for node in beam if node.is_last)
    (winner,) = {node for node in possible if [each.word for each in node.path] == tokens}
    for node in (root, *winner.path):
        node.is_kept = node.has_won = True
    for node in root.below:
        if node.step == winner.step and node.children:
            node.children, node.goes_on = [], True
    return root


def add_word(parent, number, step, place):
    """The Node of a new hypothesis, number `place` of a step; one that cannot be has no place in the tree."""
    source, log_prob = step.parents[place], step.log_prob[place]
    node = Node(
        word=step.words[place],
        probability=float(np.exp(log_prob - step.before[source])),
        log_prob=log_prob,
        step=number,
        rank=1 + sum(other > log_prob for other in step.log_prob),
        beam=sum(other > -np.inf for other in step.log_prob),
        candidates=step.candidates[source],
        parent=parent,
    )
    if log_prob > -np.inf:
        parent.children.append(node)
    return node


# ------------------------------------------------------------------------------------------- text


def peak_texts(maps, beside):
    """Where each word looked most, such as `row 3, column 5: 12 %`; rows and columns count from 1.

    maps: (T, h, w), each sums to 1 over the cells; beside: shares (T,) by name of what no cell got.
    The share is of all that the word looked at.
    """
    texts = []
    for place, attention_map in enumerate(maps):
        shares = {name: values[place] for name, values in beside.items()}
        peak = map_peak(attention_map)
        of_cells = 1 - sum(shares.values())
        share = f"{attention_map.max() * of_cells:.0%}"
        text = (
            f"row {peak[0] + 1}, column {peak[1] + 1}: {share}" if peak else f"everywhere: {share}"
        )
        texts.append(", ".join([text, *(f"{name} {value:.0%}" for name, value in shares.items())]))
    return texts


def trace_lines(tree, names, peaks=(), grid=None):
    """A table of the steps to the caption that won: word, probability, rank, peak, leading candidates.

    names: the word of each id; peaks: `peak_texts` of the words, if there are maps, of a grid (h, w).
    """
    path = next(node for node in tree.below if node.has_won and not any_won(node.children)).path
    ranks = any(node.beam > 1 for node in path)
    head = ["step", "word", "p", *(["in beam"] if ranks else [])]
    head += [f"looked at, of {grid[0]} x {grid[1]}"] if peaks else []
    head += ["candidates"]
    rows = [head]
    for place, node in enumerate(path):
        row = [str(node.step), names[node.word], share_text(node.probability)]
        row += [f"{node.rank} of {node.beam}"] if ranks else []
        row += [peaks[place] if place < len(peaks) else ""] if peaks else []
        row.append("  ".join(f"{names[word]} {share_text(p)}" for word, p in node.candidates))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def share_text(probability):
    """A probability with three digits; one that is smaller is said to be."""
    return f"{probability:.3f}" if probability >= 0.0005 else "<.001"


def any_won(nodes):
    """Whether the winning caption goes on in one of these."""
    return any(node.has_won for node in nodes)


# ----------------------------------------------------------------------------------------- layout


def lanes(root):
    """{node: the lane that it is drawn in}: the winning caption's is 0, the others' above and below.

    Each branch keeps its lane. On either side one that leaves later lies nearer, so none is crossed.
    """
    placed, tops = {}, {1: {}, -1: {}}  # of each side: the outermost lane taken, by step
    trunk = [node for node in root.below if node.has_won]
    for node in trunk:
        placed[node] = 0
    for node in reversed(trunk):
        for child in sorted(node.children, key=branch_length):
            if child.has_won:
                continue
            local = branch_lanes(child)
            bases = {side: free_lane(local, top) for side, top in tops.items()}
            side = min(bases, key=lambda side: (bases[side], len(tops[side]), side))
            put(local, bases[side], tops[side])
            placed |= {each: side * (lane + bases[side]) for each, lane in local.items()}
    return placed


def branch_length(node):
    """How many steps a branch lives."""
    return max(each.step for each in node.below)


def branch_lanes(node):
    """{node: lane} of a branch by itself: its longest line has lane 0, what leaves it lies outside."""
    line = [node]
    while line[-1].children:
        line.append(max(line[-1].children, key=lambda child: (child.is_kept, branch_length(child))))
    placed, top = dict.fromkeys(line, 0), {each.step: 0 for each in line}
    for each in reversed(line):
        for child in sorted(each.children, key=branch_length):
            if child not in placed:
                local = branch_lanes(child)
                base = free_lane(local, top)
                put(local, base, top)
                placed |= {other: lane + base for other, lane in local.items()}
    return placed


def free_lane(local, top):
    """The innermost lane at which a branch lies outside of all that is there: at every step from where it leaves."""
    steps = range(min(n.step for n in local), max(n.step for n in local) + 1)
    return 1 + max(top.get(step, 0) for step in steps)


def put(local, base, top):
    """Note which lanes a branch takes from its base on."""
    for node, lane in local.items():
        top[node.step] = max(top.get(node.step, 0), lane + base)


# ---------------------------------------------------------------------------------------- picture


def save_search_tree(path, photograph, tree, names, eos):
    """Draw a search's tree into a PNG, PDF or SVG file, by the name's ending; whole or not at all.

    Args:
        photograph: RGB PIL image, any size.
        tree: the root that `grow` returned.
        names: the word of each id; eos: the id of <EOS>.
    """
    path, photograph = Path(path), photograph.convert("RGB")
    photograph.thumbnail((600, 600))
    texts = {
        node: END if node.word == eos else names[node.word].strip()
        for node in tree.below
        if node.word is not None
    }
    data = rendered(
        lambda: tree_figure(np.asarray(photograph), tree, texts),
        "".join(texts.values()),
        path.suffix.removeprefix("."),
    )
    with replace_file(path) as file:
        file.write(data)


def tree_figure(photograph, tree, texts):
    """The figure: the photograph, then a column of boxes for each step."""
    placed, columns = lanes(tree), {}
    for node, text in texts.items():
        columns[node.step] = max(columns.get(node.step, 0), box_width(node, text))
    height, width = (PHOTOGRAPH * side / max(photograph.shape[:2]) for side in photograph.shape[:2])
    lefts, right = {}, MARGIN + width + 2 * GAP
    for step, column in sorted(columns.items()):
        lefts[step], right = right, right + column + GAP
    ends = [right + text_width("-00.00", NUMBER)]
    low, high = min(placed.values()), max(placed.values())
    above = max(height / 2, -low * LANE + BOX / 2) + MARGIN
    below = max(height / 2, high * LANE + BOX / 2) + MARGIN
    figure = Figure((max(ends) + MARGIN, above + below + LEGEND))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, max(ends) + MARGIN)
    axes.set_ylim(above + below + LEGEND, 0)
    axes.imshow(
        photograph,
        extent=(MARGIN, MARGIN + width, above + height / 2, above - height / 2),
        aspect="auto",
    )
    centre = {node: above + placed[node] * LANE for node in placed}
    for node in sorted(texts, key=lambda node: (node.has_won, node.is_kept)):  # the winner on top
        start = MARGIN + width if node.step == 1 else lefts[node.step - 1] + columns[node.step - 1]
        draw_edge(axes, node, (start, centre[node.parent]), (lefts[node.step], centre[node]))
        draw_box(axes, node, texts[node], lefts[node.step], columns[node.step], centre[node])
    draw_legend(axes, max(node.beam for node in texts))
    return figure


def box_width(node, text):
    """Inches of a word's box."""
    font = FontProperties(weight="bold" if node.has_won else "normal")
    drawn = TextPath((0, 0), text, size=WORD, prop=font).get_extents().width / 72
    # the second for scripts that take another font than this one
    return max(drawn, text_width(text, WORD), text_width("0.00", NUMBER)) + PADDING


def colours(node):
    """(line, box, text, number) of a node."""
    if node.has_won:
        return WON, WON, "white", "white"
    if node.is_kept:
        return INK, "white", INK, FAINT
    return PALE, "white", FAINT, FAINT


def draw_edge(axes, node, start, end):
    """A curve from the word before to this one, the thicker the likelier the word."""
    middle = (start[0] + end[0]) / 2
    points = [start, (middle, start[1]), (middle, end[1]), end]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    line, *_ = colours(node)
    thickness = 0.6 + 2.4 * node.probability
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=line, linewidth=thickness, zorder=1))


def draw_box(axes, node, text, left, width, y):
    """A word and its probability; at the end of a hypothesis of the final beam what it has in all."""
    line, fill, ink, pale = colours(node)
    box = FancyBboxPatch(
        (left, y - BOX / 2),
        width,
        BOX,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=fill,
        edgecolor=line,
        linewidth=0.8,
        zorder=2,
    )
    axes.add_patch(box)
    place = {"ha": "center", "va": "center", "zorder": 3}
    weight = "bold" if node.has_won else "normal"
    style = "italic" if text == END else "normal"
    axes.text(
        left + width / 2,
        y - 0.055,
        text,
        fontsize=WORD,
        color=ink,
        weight=weight,
        style=style,
        **place,
    )
    axes.text(
        left + width / 2, y + 0.1, f"{node.probability:.2f}", fontsize=NUMBER, color=pale, **place
    )
    if node.goes_on or node.is_last:
        label = f"{node.log_prob:.2f}".replace("-", "\N{MINUS SIGN}")
        label = "…" if node.goes_on else label
        x, ink = left + width + 0.06, FAINT if line == PALE else line
        axes.text(x, y, label, fontsize=NUMBER, color=ink, weight=weight, ha="left", va="center")


def draw_legend(axes, beam):
    """What colours, numbers and lines mean, along the lower edge."""
    parts = (
        (f"beam of {beam}:", INK, "normal"),
        ("the caption that won", WON, "bold"),
        ("in the beam at the end", INK, "normal"),
        ("pruned", FAINT, "normal"),
        (
            "\N{EM DASH} in a box the word's probability, at an end the log probability in nats",
            FAINT,
            "normal",
        ),
    )
    texts = [
        TextArea(text, textprops={"fontsize": NUMBER, "color": colour, "weight": weight})
        for text, colour, weight in parts
    ]
    line = HPacker(children=texts, sep=7, pad=0)
    axes.add_artist(AnchoredOffsetbox("lower left", child=line, frameon=False, pad=0, borderpad=1))

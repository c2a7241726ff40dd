"""Attention maps -> pictures for a paper, and the raw maps beside them.

    words = ["a", "dog", "runs"]
    save_attention_viz("figures", 1, Image.open("dog.jpg"), words, maps, advanced=True)

writes into the directory `figures`

    attention_viz_sample_1.png            the photograph, then for every word where it looked
    advanced_attention_viz_sample_1.png   also raw cells, peaks and entropies
    attention_maps_sample_1.npz           `words`, `maps`, the reduced `photograph`, any `log_prob`

and the last file is enough to draw the pictures again, in any style:

    raw = np.load("figures/attention_maps_sample_1.npz")
    save_attention_viz("redrawn", 1, raw["photograph"], list(raw["words"]), raw["maps"], form="pdf")

A word's panel is the photograph, at full brightness where the word looked and darker and greyer
elsewhere. Brightness grows linearly from the uniform weight, 1 / P for P cells, to the largest of
the caption, so that panels can be compared, or of the word (`scale`), but to no less and no more
than FULL times uniform: a decoder that looks nowhere in particular gives an evenly dimmed
photograph, and not its noise; a word that hardly looked does not light up; and one very sharp map
leaves the others visible. An outline holds the fewest cells that weigh half together, where these
are heavy. What a word took from no cell is a bar under its panel.

Axes: T words, h x w = P grid cells, H x W pixels. The encoder sees the whole photograph, so a grid
covers all of it. After figures 2 and 3 of Xu et al. 2015, Show, Attend and Tell, who smooth with a
Gaussian and scale each word alone, and figure 4 of Lu et al. 2017, Knowing When to Look, who print
beside each word how much of it came from the picture.
"""

import io
import itertools
import math
import os
import sys
import textwrap
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font
from PIL import Image

from checkpoints import replace_file

DPI = 150
PRINT_DPI = 300  # of photographs in a vector file
LONG_SIDE = 600  # pixels; a larger photograph is reduced to this first
FORMATS = ("png", "pdf", "svg")
SCALES = ("caption", "word")
# of the raw cells: perceptually uniform, and its lightness survives a grey printout
COLORS = matplotlib.colormaps["inferno"]
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601
DIM, GREYED = 0.4, 0.85  # brightness, and share of grey, where a word did not look
FULL = 4, 8  # times uniform: least and most weight that full brightness asks for
OUTLINED = 3  # times uniform: what outlined cells weigh at least, on average

# Inches
PANEL = 1.7  # side of a square panel
NARROWEST = 1.1  # width kept for a word
WIDEST = 15  # width of a figure
GAP = 0.1  # between panels
TITLE = 0.22  # above a panel
MARGIN = 0.12  # around the figure
STRIP = 0.8  # height of the entropy bars
LEGEND = 0.5  # height below the panels
LEGEND_BAR = 1.9  # width
BESIDE = 0.22  # height of the bar under a panel, with its labels

INK, FAINT, PALE = "#222222", "#777777", "#d8d8d8"
BESIDE_COLORS = ("#2f6db3", "#d9822b", "#4c9a5b", "#8a5aa8")


class Caption(NamedTuple):
    """What the pictures of a caption show."""

    photograph: np.ndarray  # (H, W, 3) uint8
    words: list[str]  # T
    maps: np.ndarray  # (T, h, w), each sums to 1
    beside: dict[str, np.ndarray]  # shares (T,) of a word's attention that no cell got, by name
    log_prob: float | None  # nats
    scale: str  # one of SCALES

    @property
    def uniform(self):
        """The weight of a cell where all weigh alike."""
        return 1 / math.prod(self.maps.shape[1:])

    @property
    def weights(self):
        """(T, h, w) what each cell got of a word's attention: all of it but for what no cell got."""
        of_cells = 1 - sum(self.beside.values(), np.zeros(len(self.maps)))
        return self.maps * of_cells[:, None, None]

    @property
    def full(self):
        """(T,) weights that get full brightness."""
        least, most = (min(times * self.uniform, 1) for times in FULL)
        return self.largest.clip(least, most)

    @property
    def largest(self):
        """(T,) largest weight of the caption, or with the scale "word" of each word."""
        largest = self.weights.max(axis=(1, 2), initial=0)
        return largest if self.scale == "word" else np.full_like(largest, largest.max(initial=0))


def save_attention_viz(
    directory,
    name,
    photograph,
    words,
    maps,
    *,
    advanced=False,
    log_prob=None,
    beside=None,
    scale="caption",
    form="png",
):
    """Write one caption's attention pictures and raw maps, each file whole or not at all.

    Args:
        directory: folder, made if absent.
        name: goes into the file names, `attention_viz_{name}.png`; a number n is `sample_{n}`.
        photograph: RGB PIL image or (H, W, 3) uint8, any size, in its original aspect ratio.
        words: list of T str, in any script; a character no installed font has is drawn as a box,
            and a line on stderr names the package of one that has it.
        maps: (T, h, w) float, attention weights of the cells; each map sums to 1.
        advanced: also write the picture with raw cells, peaks and entropies.
        log_prob: the caption's log probability in nats, printed beside it if given.
        beside: shares (T,) in 0..1 of each word's attention that no cell got, by name, such as
            "language": bars under the words. The maps say how the cells share the rest.
        scale: whose largest weight gets full brightness, one of SCALES.
        form: of the pictures, one of FORMATS; in pdf and svg text stays text.
    Returns: list of the Paths written, the basic picture first.
    Raises: ValueError if shapes disagree, a map is not a distribution, or there is no such scale
        or form.
    """
    if scale not in SCALES or form not in FORMATS:
        raise ValueError(
            f"scale and form: expected one of {SCALES} and of {FORMATS}, got {scale} and {form}"
        )
    maps = _checked_maps(words, maps)
    beside = _checked_beside(words, beside or {})
    caption = Caption(_reduced(photograph), words, maps, beside, log_prob, scale)
    name = f"sample_{name}" if isinstance(name, int) else name
    files = {
        f"attention_viz_{name}.{form}": _draw(caption, form, advanced=False),
        f"attention_maps_{name}.npz": _raw(caption),
    }
    if advanced:
        files[f"advanced_attention_viz_{name}.{form}"] = _draw(caption, form, advanced=True)
    Path(directory).mkdir(parents=True, exist_ok=True)
    for file_name, data in files.items():
        with replace_file(Path(directory) / file_name) as file:
            file.write(data)
    return [Path(directory) / file_name for file_name in files]


def _raw(caption):
    """The bytes of the file from which the pictures can be drawn again."""
    arrays = {
        "words": np.array(caption.words, dtype=str),
        "maps": caption.maps.astype(np.float32),
        "photograph": caption.photograph,
    }
    if caption.log_prob is not None:
        arrays["log_prob"] = float(caption.log_prob)
    if caption.beside:
        arrays["beside_names"] = np.array(list(caption.beside))
        arrays["beside"] = np.array(list(caption.beside.values()), dtype=np.float32)
    raw = io.BytesIO()
    np.savez_compressed(raw, **arrays)
    return raw.getvalue()


def upsample_map(attention_map, size):
    """Stretch a grid of weights over a picture: smoothly, and without peaks the grid lacks.

    Args:
        attention_map: (h, w) float.
        size: (H, W) in pixels.
    Returns: (H, W) float64. Cell (i, j) has its centre at ((j + 0.5) / w, (i + 0.5) / h) of the
        picture and its weight there; between centres the values stay between those of the
        neighbours, where bicubic interpolation would overshoot, also below 0, and a Gaussian would
        flatten the peak. The mean over the picture is that of the grid, up to the error of sampling
        it at pixels.
    Source: monotone piecewise cubic interpolation, Fritsch and Butland 1984, along the columns,
        then along the rows.
    """
    height, width = size
    cells = np.asarray(attention_map, dtype=np.float64)
    stretched = _stretched(_stretched(cells, height).T, width).T
    return stretched.clip(cells.min(), cells.max())  # rounding can leave the range


def _stretched(cells, size):
    """(n, m) -> (size, m): columns interpolated from n cell centres to `size` pixel centres.

    Both ends are flat.
    """
    cells = np.pad(cells, ((1, 1), (0, 0)), mode="edge")
    # in padded cells: the grid's centre i is at i + 1
    position = (np.arange(size) + 0.5) * (len(cells) - 2) / size + 0.5
    before = position.astype(int)
    t = (position - before)[:, None]
    rise = np.diff(cells, axis=0)
    slope = _slopes(cells, rise)
    start, end, rise = slope[before], slope[before + 1], rise[before]
    cubic = 3 * rise - 2 * start - end + t * (start + end - 2 * rise)
    return cells[before] + t * (start + t * cubic)


def _slopes(cells, rise):
    """Slopes at the centres: 0 at a peak, else the harmonic mean of the rises on both sides."""
    product = rise[:-1] * rise[1:]
    slope = np.zeros_like(cells)
    np.divide(2 * product, rise[:-1] + rise[1:], out=slope[1:-1], where=product > 0)
    return slope


def map_entropy(attention_map):
    """Entropy of an (h, w) map in bits: 0 for one cell, log2(P) for P cells of equal weight."""
    weights = np.asarray(attention_map, dtype=np.float64)
    weights = weights[weights > 0] / weights.sum()
    return float(np.sum(weights * -np.log2(weights)))


def map_peak(attention_map):
    """Row and column of the largest cell of an (h, w) map, or None where several tie."""
    rows, columns = np.nonzero(attention_map == np.max(attention_map))
    return (int(rows[0]), int(columns[0])) if len(rows) == 1 else None


def picture_names(paths):
    """A name for each photograph's pictures: the file's, with a number where it is taken.

    Args:
        paths: Paths of photographs, of any folders.
    Returns: list of str, different even where a file system does not tell case apart; cut, so that
        a prefix and an ending fit into the 255 bytes that a file name may have.
    """
    taken, names = set(), []
    for path in paths:
        stem = os.fsencode(path.stem)[:200].decode(errors="ignore")
        tries = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        names.append(next(name for name in tries if name.casefold() not in taken))
        taken.add(names[-1].casefold())
    return names


def half_cells(attention_map):
    """The fewest cells of an (h, w) map that hold half of its weight: (h, w) bool."""
    weights = np.ravel(attention_map)
    heaviest = np.argsort(-weights, kind="stable")
    held = np.cumsum(weights[heaviest])
    # a sum that is half but for its rounding is half
    count = np.searchsorted(held, held[-1] * (0.5 - 1e-9)) + 1
    within = np.zeros(weights.size, dtype=bool)
    within[heaviest[:count]] = True
    return within.reshape(np.shape(attention_map))


def brightness(weights, uniform, full):
    """Weights (...) -> 0..1: 0 up to the weight `uniform`, then linearly to 1 at `full`."""
    return np.clip((weights - uniform) / max(full - uniform, 1e-9), 0, 1)


def overlay(photograph, attention_map, full):
    """The photograph as it is where a map is heavy, darker and greyer where it is not.

    Args:
        photograph: (H, W, 3) uint8.
        attention_map: (h, w) float, weights that sum to at most 1.
        full: the weight that leaves the photograph as it is; the uniform one dims it most.
    Returns: (H, W, 3) float in 0..1.
    """
    weights = upsample_map(attention_map, photograph.shape[:2])  # (H, W)
    light = brightness(weights, 1 / np.size(attention_map), full)[..., None]
    bright = photograph / 255
    dim = DIM * (GREYED * (bright @ LUMA)[..., None] + (1 - GREYED) * bright)
    return dim + light * (bright - dim)


def _checked_maps(words, maps):
    """The maps as (T, h, w) float64, or ValueError."""
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim != 3 or len(maps) != len(words) or 0 in maps.shape[1:]:
        expected = f"({len(words)}, h, w) for {len(words)} words"
        raise ValueError(f"attention maps: expected {expected}, got {maps.shape}")
    if not (np.isfinite(maps).all() and (maps >= 0).all()):
        reason = "expected weights from 0 to 1, got negative or non-finite ones"
        raise ValueError(f"attention maps: {reason}")
    sums = maps.sum(axis=(1, 2))
    errors = np.abs(sums - 1)
    if (errors > 0.01).any():  # 0.01: weights may have been rounded to bfloat16
        worst = int(errors.argmax())
        raise ValueError(
            f"attention maps: expected each to sum to 1, but that of {words[worst]!r} "
            f"sums to {sums[worst]:.4g}"
        )
    return maps


def _checked_beside(words, beside):
    """The shares by name as (T,) float64, or ValueError."""
    beside = {name: np.asarray(shares, dtype=np.float64) for name, shares in beside.items()}
    for name, shares in beside.items():
        if shares.shape != (len(words),) or not ((shares >= 0) & (shares <= 1.01)).all():
            raise ValueError(
                f"attention beside the cells: expected a share from 0 to 1 of {name!r} for each of "
                f"{len(words)} words, got {shares.tolist()}"
            )
    return beside


def _reduced(photograph):
    """The photograph as (H, W, 3) uint8 with a long side of at most LONG_SIDE pixels."""
    if not isinstance(photograph, Image.Image):
        photograph = np.asarray(photograph)
        shape, dtype = photograph.shape, photograph.dtype
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"photograph: expected (H, W, 3) uint8, got {shape} {dtype}")
        photograph = Image.fromarray(photograph)
    photograph = photograph.convert("RGB")  # a copy, so thumbnail leaves the caller's alone
    photograph.thumbnail((LONG_SIDE, LONG_SIDE))
    return np.asarray(photograph)


def _draw(caption, form, *, advanced):
    """The picture as the bytes of a file."""
    caption = caption._replace(words=[" ".join(word.split()) for word in caption.words])
    return rendered(lambda: _figure(caption, advanced), "".join(caption.words), form)


def rendered(make_figure, words, form):
    """A figure as the bytes of a file, in fonts that have all its characters, the same ones each time.

    Args:
        make_figure: () -> matplotlib Figure.
        words: a text with every character of a caption's words.
        form: one of FORMATS.
    """
    fonts = _fonts_for(words)
    style = {
        # the last for readers of an svg who lack the others
        "font.family": [*fonts, "sans-serif"],
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,  # a word may hold a dollar sign
        "text.usetex": False,
        "axes.linewidth": 0.6,
        # TrueType, which editors and publishers take; but matplotlib also writes as such what is
        # none, such as Noto's fonts of Chinese, whose characters are then not drawn
        "pdf.fonttype": 42 if fonts == ["DejaVu Sans"] else 3,
        "svg.fonttype": "none",
        "svg.hashsalt": "attention",  # ids are random without it
    }
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[form]
    file = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        dpi = DPI if form == "png" else PRINT_DPI
        make_figure().savefig(file, format=form, dpi=dpi, metadata=undated)
    return file.getvalue()


class Layout(NamedTuple):
    """How the panels of a figure lie, in inches."""

    width: float  # of a panel
    height: float
    slot: float  # width kept for a panel, which may be too narrow for its word
    row: float  # height of a row of panels
    columns: int
    total: float  # width of the figure

    def corner(self, place, top):
        """Left and upper edge of the slot at `place`, below its title, in rows that begin at `top`."""
        left = MARGIN + place % self.columns * (self.slot + GAP)
        return left, top + place // self.columns * self.row + TITLE


def _figure(caption, advanced):
    """The figure: rows of panels under the caption; if advanced, the raw cells below each row."""
    words = caption.words
    advanced = advanced and len(words) > 0  # an empty caption has nothing to add to the photograph
    layout = _layout(caption, advanced)
    total = layout.total
    text = _wrapped(" ".join(words) or "(empty caption)", total - 2 * MARGIN)
    top = MARGIN + 0.2 * (text.count("\n") + 1) + (0.15 if caption.log_prob is not None else 0)
    legend = top + math.ceil((len(words) + 1) / layout.columns) * layout.row
    bottom = legend + (_legend_height(total) if words else 0)
    strip = _strip_height(words, total) if advanced else 0
    figure = Figure((total, bottom + strip + MARGIN))
    _heading(figure, text, caption.log_prob)
    _panels(figure, layout, top, caption, advanced)
    if words:
        _legend(figure, legend, caption)
    if advanced:
        axes = _axes(figure, MARGIN + 0.4, bottom + 0.15, total - 2 * MARGIN - 0.4, STRIP)
        _entropy_strip(axes, words, caption.maps)
    return figure


def _layout(caption, advanced):
    """The Layout of a panel per word and the photograph; if advanced, each has a second below."""
    aspect = caption.photograph.shape[1] / caption.photograph.shape[0]
    # the same area for every photograph
    width, height = PANEL * math.sqrt(aspect), PANEL / math.sqrt(aspect)
    shrink = min(1, 2 * PANEL / max(width, height))
    width, height = width * shrink, height * shrink
    slot = max(width, NARROWEST)  # a word needs room over a tall panel
    row = TITLE + height + (height + GAP if advanced else 0) + GAP
    row += BESIDE if caption.beside else 0
    columns = _columns(len(caption.words) + 1, slot + GAP, row)
    return Layout(width, height, slot, row, columns, 2 * MARGIN + columns * (slot + GAP) - GAP)


def _panels(figure, layout, top, caption, advanced):
    """The photograph and a panel for each word; if advanced, with a second panel below each."""
    for place in range(len(caption.words) + 1):
        slot, above = layout.corner(place, top)
        left = slot + (layout.slot - layout.width) / 2
        below = above + layout.height + GAP
        upper = _axes(figure, left, above, layout.width, layout.height)
        lower = _axes(figure, left, below, layout.width, layout.height) if advanced else None
        if place == 0:
            _show(upper, caption.photograph)
            if advanced:
                _color_bar(lower, caption)
            continue
        _word_panels(upper, lower, caption, place - 1, layout.slot)
        if caption.beside:
            under = above + layout.row - TITLE - GAP - BESIDE + 0.04
            shares = {name: values[place - 1] for name, values in caption.beside.items()}
            _beside_bar(_axes(figure, slot, under, layout.slot, 0.06), shares)


def _columns(panels, width, height):
    """Panels per row: the figure is near 1.5 : 1, has few empty places and is not over WIDEST."""

    def badness(columns):
        rows = math.ceil(panels / columns)
        distance = abs(math.log(columns * width / (rows * height) / 1.5))
        return distance + (rows * columns - panels) / panels

    most = max(1, min(panels, int(WIDEST / width)))
    return min(range(1, most + 1), key=badness)


def _axes(figure, left, top, width, height):
    """Axes placed in inches from the figure's upper left corner."""
    total_width, total_height = figure.get_size_inches()
    x, y = left / total_width, 1 - (top + height) / total_height
    return figure.add_axes((x, y, width / total_width, height / total_height))


def _show(axes, pixels, interpolation="auto"):
    """Fill the axes with an image; coordinates run from (0, 0), its upper left, to (1, 1)."""
    axes.imshow(pixels, extent=(0, 1, 1, 0), aspect="auto", interpolation=interpolation)
    axes.set_axis_off()


def _heading(figure, caption, log_prob):
    """The wrapped caption and, below it, its log probability."""
    height = figure.get_size_inches()[1]
    place = {"x": 0.5, "ha": "center", "va": "top"}
    figure.text(y=1 - MARGIN / height, s=caption, fontsize=11, linespacing=1.25, **place)
    if log_prob is not None:
        y = 1 - (MARGIN + 0.2 * (caption.count("\n") + 1)) / height
        figure.text(y=y, s=f"log_prob {log_prob:.2f} nats", fontsize=8, color=FAINT, **place)


def _word_panels(upper, lower, caption, number, width):
    """The overlay of word `number` with the word above; on `lower`, if any, its raw cells."""
    attention_map, full = caption.maps[number], caption.full[number]
    weights = caption.weights[number]
    per_word = caption.scale == "word"
    word = _shortened(caption.words[number], width - (0.7 if per_word else 0))
    upper.set_title(word, pad=3, fontsize=9)
    if per_word:  # the word's own scale
        corner = {"transform": upper.transAxes, "ha": "right", "va": "bottom"}
        upper.text(1, 1.02, f"{full:.2g}", fontsize=6.5, color=FAINT, **corner)
    _show(upper, overlay(caption.photograph, weights, full))
    within = half_cells(attention_map)
    outlined = weights[within].mean() >= OUTLINED * caption.uniform
    if outlined:
        _outline(upper, within)
    if lower is None:
        return
    _show(lower, COLORS(weights / caption.largest[number])[..., :3], "nearest")
    peak = map_peak(attention_map)
    if peak is not None:
        x, y = (peak[1] + 0.5) / attention_map.shape[1], (peak[0] + 0.5) / attention_map.shape[0]
        for axes in (upper, lower) if outlined else (lower,):  # a flat map's is noise
            for color, thickness in (("black", 2.4), ("white", 1.0)):  # seen on dark and bright
                axes.plot(x, y, "o", ms=7, mfc="none", mec=color, mew=thickness)


def _outline(axes, within):
    """A line along the edges of the cells of `within`, (h, w) bool, its corners rounded."""
    h, w = within.shape
    fine = 16  # points per cell
    # 0 around the grid, so that the line closes at its border; 0.5 lies on the cells' edges
    inside = upsample_map(np.pad(within, 1), (fine * (h + 2), fine * (w + 2)))
    y, x = (((np.arange(fine * (n + 2)) + 0.5) / fine - 1) / n for n in (h, w))
    axes.autoscale(False)
    for color, thickness in (("black", 2.4), ("white", 1.2)):  # seen on dark and bright
        axes.contour(x, y, inside, levels=[0.5], colors=color, linewidths=thickness)


def _beside_bar(axes, shares):
    """A bar as wide as the whole of a word's attention: the shares beside the cells, labelled."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.barh(0, 1, color=PALE)
    start = 0
    for number, (name, share) in enumerate(shares.items()):
        color = BESIDE_COLORS[number % len(BESIDE_COLORS)]
        axes.barh(0, share, left=start, color=color)
        start += share
        place = number / max(len(shares) - 1, 1)
        label = {"ha": ("left", "center", "right")[round(2 * place)], "va": "top"}
        text = f"{name} {share:.0%}"
        axes.text(place, -0.6, text, fontsize=6, color=color, **label)


def _legend_height(total):
    """Inches for the legend of a figure `total` inches wide: its text beside the bar, or below."""
    return LEGEND if total >= 2 * LEGEND_BAR + 1 else LEGEND + 0.4


def _legend(figure, top, caption):
    """What brightness, outlines and bars mean, at the left below the panels."""
    total, height = figure.get_size_inches()
    width = min(LEGEND_BAR, total - 2 * MARGIN)
    bar = _axes(figure, MARGIN, top + 0.2, width, 0.1)
    ramp = DIM + (1 - DIM) * np.linspace(0, 1, 256)
    bar.imshow(ramp[None], extent=(0, 1, 0, 1), aspect="auto", cmap="gray", vmin=0, vmax=1)
    full = "each word's own" if caption.scale == "word" else f"{caption.full[0]:.2g}"
    if caption.largest[0] > caption.full[0] and caption.scale == "caption":
        full += " and more"
    bar.set_xticks([0, 1], [f"uniform {caption.uniform:.2g}", full])
    for label, side in zip(bar.get_xticklabels(), ("left", "right"), strict=True):
        label.set_ha(side)
    bar.set_yticks([])
    bar.tick_params(length=2, pad=2, labelsize=7, width=0.6)
    title = "a cell's share of the word"
    lines = [
        "outline: the fewest cells that hold half of what cells got,",
        f"where they weigh {OUTLINED} times uniform",
    ]
    if caption.beside:
        lines.append("bar: all of a word's attention; grey: what cells got")
    bar.set_title(title, fontsize=7, pad=3, loc="left")
    beside = _legend_height(total) == LEGEND
    x, y = (MARGIN + width + 0.25, top + 0.08) if beside else (MARGIN, top + LEGEND)
    place = {"x": x / total, "y": 1 - y / height, "va": "top", "linespacing": 1.25}
    figure.text(s="\n".join(lines), fontsize=7, **place)


def _color_bar(axes, caption):
    """The legend of the raw cells' colours, across the free place below the photograph."""
    axes.set_axis_off()
    bar = axes.inset_axes((0.1, 0.5, 0.8, 0.08))
    bar.imshow(COLORS(np.linspace(0, 1, 256))[None], extent=(0, 1, 0, 1), aspect="auto")
    largest = caption.largest[0]
    if caption.scale == "word":
        bar.set_xticks([0, 1], ["0", "largest"])
    else:
        bar.set_xticks([0, 1], ["0", f"{largest:.2g}"])
        bar.axvline(caption.uniform / largest, color="white", linewidth=1)
    bar.set_yticks([])
    bar.tick_params(length=2, pad=2, labelsize=7, width=0.6)
    bar.set_title("raw cells", fontsize=8, pad=3)


def _entropy_strip(axes, words, maps):
    """A bar of entropy per word, from 0 bits (one cell) to the dashed line (all cells alike)."""
    uniform = math.log2(maps[0].size)
    entropies = [map_entropy(attention_map) for attention_map in maps]
    axes.bar(range(len(words)), entropies, width=0.6, color="#b5485d")
    axes.axhline(uniform, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.25 * uniform or 1)
    axes.set_ylabel("entropy (bits)", fontsize=8)
    axes.set_xlim(-0.6, len(words) - 0.4)
    axes.set_xticks(range(len(words)), [_shortened(word, NARROWEST) for word in words])
    if _crowded(words, axes.get_figure().get_size_inches()[0]):
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=2, pad=2, labelsize=8, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    right_end = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.text(1, uniform, f"uniform: {uniform:.2f}", fontsize=7, color=FAINT, **right_end)


def _strip_height(words, width):
    """Inches for the entropy strip and the words below it, upright where they would touch."""
    longest = max(text_width(_shortened(word, NARROWEST), 8) for word in words)
    return STRIP + 0.15 + (longest if _crowded(words, width) else 0.15) + 0.05


def _crowded(words, width):
    """Whether the longest word is wider than a bar's share of a figure `width` inches wide."""
    longest = max(text_width(_shortened(word, NARROWEST), 8) for word in words)
    return longest + 0.08 > (width - 2 * MARGIN - 0.4) / len(words)


def text_width(text, points):
    """About how many inches a line of text takes: an East Asian wide character one em, else 0.6."""
    ems = (1 if unicodedata.east_asian_width(character) in "WF" else 0.6 for character in text)
    return sum(ems) * points / 72


def _wrapped(caption, width):
    """The caption in lines of about `width` inches of the heading's 11 points."""
    return textwrap.fill(caption, max(8, int(len(caption) * width / text_width(caption, 11))))


def _shortened(word, width):
    """The word, cut to about `width` inches of a panel title's 9 points."""
    letters = int(len(word) * width / max(text_width(word, 9), 0.01))
    return word if len(word) <= letters else word[: max(letters - 1, 1)] + "…"


def _fonts_for(text):
    """Font families that together draw the text: matplotlib's DejaVu Sans, then what it lacks.

    A line on stderr names the package of a font for characters that none of them has.
    """
    families = ["DejaVu Sans"]
    missing = {ord(character) for character in text if not character.isspace()}
    missing -= _characters_in(findfont("DejaVu Sans"))
    for entry in _other_fonts():
        if not missing:
            break
        if entry.name.startswith("Last Resort"):  # has every character, as a box
            continue
        if covered := missing & _characters_in(entry.fname):
            families.append(entry.name)
            missing -= covered
    for package, characters in _packages(sorted(map(chr, missing))).items():
        if package not in _named_packages:
            _named_packages.add(package)
            print(
                f"attention pictures: no installed font has {' '.join(characters)}, drawn as boxes; "
                f"Debian's package {package} has one",
                file=sys.stderr,
            )
    return families


_named_packages = set()  # a line each is enough for all pictures


def _other_fonts():
    """FontEntries that matplotlib has listed, then those of fonts installed since."""
    listed = list(fontManager.ttflist)
    yield from listed
    for file in sorted(set(findSystemFonts()) - {entry.fname for entry in listed}):
        try:
            fontManager.addfont(file)
        except (OSError, RuntimeError):  # damaged
            continue
    yield from fontManager.ttflist[len(listed) :]


def _packages(characters):
    """Debian's packages of fonts that have the characters, each with those it has."""
    packages = {}
    for character in characters:
        category = unicodedata.category(character)
        if category.startswith("S"):
            package = "fonts-symbola"
        elif unicodedata.east_asian_width(character) in "WFH":
            package = "fonts-noto-cjk"
        elif category.startswith("C"):  # no font has what is unassigned or private
            continue
        else:
            package = "fonts-noto-core"
        packages.setdefault(package, []).append(character)
    return packages


def _characters_in(font_file):
    """Code points of a font file; none if it is damaged, or gone since matplotlib listed it."""
    try:
        return get_font(font_file).get_charmap().keys()
    except (OSError, RuntimeError):
        return set()

"""Attention maps -> pictures for a paper, and the raw maps beside them.

    words = ["a", "dog", "runs"]
    save_attention_viz("figures", 1, Image.open("dog.jpg"), words, maps, advanced=True)

writes into the directory `figures`

    attention_viz_sample_1.png            the photograph, then the map of every word laid over it
    advanced_attention_viz_sample_1.png   also raw cells, peaks, entropies and the colour bar
    attention_maps_sample_1.npz           `words`, `maps`, the reduced `photograph`, any `log_prob`

and the last file is enough to draw the pictures again, in any style:

    raw = np.load("figures/attention_maps_sample_1.npz")
    save_attention_viz("redrawn", 1, raw["photograph"], list(raw["words"]), raw["maps"])

One colour scale serves all words of a caption, so that panels can be compared: black is 0 and the
brightest is the caption's largest weight. A map stretched to its own maximum would make a decoder
that looks nowhere in particular seem as sure as one that looks at the dog. The scale is that of the
square root, as the colour bar shows: on a linear one a single sharp word leaves the other panels
black. The photograph under a map is grey, so every colour seen is attention.

Axes: T words, h x w grid cells, H x W pixels. The encoder sees the whole photograph, so a grid
covers all of it. After figure 3 of Xu et al. 2015, Show, Attend and Tell, who smooth with a
Gaussian and scale each word alone.
"""

import io
import math
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
LONG_SIDE = 600  # pixels; a larger photograph is reduced to this first
# perceptually uniform, and its lightness survives a grey printout
COLORS = matplotlib.colormaps["inferno"]
OPACITY = 0.2, 0.75  # of the colour over the grey photograph, for no weight and for the largest

# Inches
PANEL = 1.7  # side of a square panel
NARROWEST = 1.1  # width kept for a word
WIDEST = 15  # width of a figure
GAP = 0.1  # between panels
TITLE = 0.22  # above a panel
MARGIN = 0.12  # around the figure
STRIP = 0.8  # height of the entropy bars

INK, FAINT = "#222222", "#777777"


def save_attention_viz(directory, index, photograph, words, maps, *, advanced=False, log_prob=None):
    """Write one caption's attention pictures and raw maps, each file whole or not at all.

    Args:
        directory: folder, made if absent.
        index: goes into the file names, `attention_viz_sample_{index}.png`.
        photograph: RGB PIL image or (H, W, 3) uint8, any size, in its original aspect ratio.
        words: list of T str, in any script; a character no installed font has is drawn as a box,
            and a line on stderr names the package of one that has it.
        maps: (T, h, w) float, attention weights; each map sums to 1.
        advanced: also write the picture with raw cells, peaks and entropies.
        log_prob: the caption's log probability in nats, printed beside it if given.
    Returns: list of the Paths written, the basic picture first.
    Raises: ValueError if shapes disagree or a map is not a distribution.
    """
    maps = _checked_maps(words, maps)
    photograph = _reduced(photograph)
    known = {} if log_prob is None else {"log_prob": float(log_prob)}
    raw = io.BytesIO()
    stored_words, stored_maps = np.array(words, dtype=str), maps.astype(np.float32)
    np.savez_compressed(raw, words=stored_words, maps=stored_maps, photograph=photograph, **known)
    basic = _draw(photograph, words, maps, log_prob, advanced=False)
    files = {
        f"attention_viz_sample_{index}.png": basic,
        f"attention_maps_sample_{index}.npz": raw.getvalue(),
    }
    if advanced:
        picture = _draw(photograph, words, maps, log_prob, advanced=True)
        files[f"advanced_attention_viz_sample_{index}.png"] = picture
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with replace_file(Path(directory) / name) as file:
            file.write(data)
    return [Path(directory) / name for name in files]


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


def colored(weights, largest):
    """Weights (...) -> colours (..., 3) in 0..1, by square root; 0 is black, `largest` bright."""
    return COLORS(np.sqrt(weights / largest))[..., :3]


def overlay(photograph, attention_map, largest):
    """Lay a map over the grey photograph, opaque where it is heavy, so that the rest stays legible.

    Args:
        photograph: (H, W, 3) uint8.
        attention_map: (h, w) float.
        largest: the weight that gets the brightest colour; 0 gets black.
    Returns: (H, W, 3) float in 0..1.
    """
    grey = photograph @ np.array([0.299, 0.587, 0.114]) / 255  # (H, W), ITU-R 601 luma
    weights = upsample_map(attention_map, grey.shape)  # (H, W)
    opacity = np.interp(np.sqrt(weights / largest), (0, 1), OPACITY)[..., None]
    background = 0.8 * grey[..., None]  # snow must not outshine a peak
    return (1 - opacity) * background + opacity * colored(weights, largest)


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


def _draw(photograph, words, maps, log_prob, *, advanced):
    """The picture as the bytes of a PNG file."""
    style = {
        "font.family": _fonts_for("".join(words)),
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,  # a word may hold a dollar sign
        "text.usetex": False,
        "axes.linewidth": 0.6,
    }
    words = [" ".join(word.split()) for word in words]
    png = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _figure(photograph, words, maps, log_prob, advanced).savefig(png, dpi=DPI)
    return png.getvalue()


class Layout(NamedTuple):
    """How the panels of a figure lie, in inches."""

    width: float  # of a panel
    height: float
    slot: float  # width kept for a panel, which may be too narrow for its word
    row: float  # height of a row of panels
    columns: int
    total: float  # width of the figure

    def corner(self, place, top):
        """Left and upper edge of the panel at `place`, counted in rows that begin at `top`."""
        slot_left = MARGIN + place % self.columns * (self.slot + GAP)
        left = slot_left + (self.slot - self.width) / 2
        return left, top + place // self.columns * self.row + TITLE


def _figure(photograph, words, maps, log_prob, advanced):
    """The figure: rows of panels under the caption; if advanced, the raw cells below each row."""
    advanced = advanced and len(words) > 0  # an empty caption has nothing to add to the photograph
    layout = _layout(photograph, len(words) + 1, advanced)
    total = layout.total
    caption = _wrapped(" ".join(words) or "(empty caption)", total - 2 * MARGIN)
    top = MARGIN + 0.2 * (caption.count("\n") + 1) + (0.15 if log_prob is not None else 0)
    bottom = top + math.ceil((len(words) + 1) / layout.columns) * layout.row
    strip = _strip_height(words, total) if advanced else 0
    figure = Figure((total, bottom + strip + MARGIN))
    _heading(figure, caption, log_prob)
    _panels(figure, layout, top, photograph, words, maps, advanced)
    if advanced:
        axes = _axes(figure, MARGIN + 0.4, bottom + 0.15, total - 2 * MARGIN - 0.4, STRIP)
        _entropy_strip(axes, words, maps)
    return figure


def _layout(photograph, panels, advanced):
    """The Layout of `panels` panels; if advanced, each row has a second one below it."""
    aspect = photograph.shape[1] / photograph.shape[0]
    # the same area for every photograph
    width, height = PANEL * math.sqrt(aspect), PANEL / math.sqrt(aspect)
    shrink = min(1, 2 * PANEL / max(width, height))
    width, height = width * shrink, height * shrink
    slot = max(width, NARROWEST)  # a word needs room over a tall panel
    row = TITLE + height + (height + GAP if advanced else 0) + GAP
    columns = _columns(panels, slot + GAP, row)
    return Layout(width, height, slot, row, columns, 2 * MARGIN + columns * (slot + GAP) - GAP)


def _panels(figure, layout, top, photograph, words, maps, advanced):
    """The photograph and a panel for each word; if advanced, with a second panel below each."""
    largest = maps.max(initial=0)
    for place in range(len(words) + 1):
        left, above = layout.corner(place, top)
        upper = _axes(figure, left, above, layout.width, layout.height)
        lower = None
        if advanced:
            below = above + layout.height + GAP
            lower = _axes(figure, left, below, layout.width, layout.height)
        if place > 0:
            word = _shortened(words[place - 1], layout.slot)
            _word_panels(upper, lower, photograph, word, maps[place - 1], largest)
        else:
            _show(upper, photograph)
            if advanced:
                _color_bar(lower, largest)


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


def _word_panels(upper, lower, photograph, title, attention_map, largest):
    """The overlay with its word above; on `lower`, if any, the raw cells; rings on both peaks."""
    upper.set_title(title, pad=3, fontsize=9)
    _show(upper, overlay(photograph, attention_map, largest))
    if lower is None:
        return
    _show(lower, colored(attention_map, largest), "nearest")
    peak = map_peak(attention_map)
    if peak is not None:
        x, y = (peak[1] + 0.5) / attention_map.shape[1], (peak[0] + 0.5) / attention_map.shape[0]
        for axes in (upper, lower):
            for color, thickness in (("black", 2.4), ("white", 1.0)):  # seen on dark and bright
                axes.plot(x, y, "o", ms=7, mfc="none", mec=color, mew=thickness)


def _color_bar(axes, largest):
    """The legend of the colours, across the middle of the free place below the photograph."""
    axes.set_axis_off()
    bar = axes.inset_axes((0.1, 0.5, 0.8, 0.08))
    bar.imshow(COLORS(np.linspace(0, 1, 256))[None], extent=(0, 1, 0, 1), aspect="auto")
    # by the square root, half way is a quarter
    bar.set_xticks([0, 0.5, 1], ["0", f"{largest / 4:.2g}", f"{largest:.2g}"])
    bar.set_yticks([])
    bar.tick_params(length=2, pad=2, labelsize=7, width=0.6)
    bar.set_title("attention weight\nper cell", fontsize=8, pad=3)


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
    longest = max(_text_width(_shortened(word, NARROWEST), 8) for word in words)
    return STRIP + 0.15 + (longest if _crowded(words, width) else 0.15) + 0.05


def _crowded(words, width):
    """Whether the longest word is wider than a bar's share of a figure `width` inches wide."""
    longest = max(_text_width(_shortened(word, NARROWEST), 8) for word in words)
    return longest + 0.08 > (width - 2 * MARGIN - 0.4) / len(words)


def _text_width(text, points):
    """About how many inches a line of text takes: an East Asian wide character one em, else 0.6."""
    ems = (1 if unicodedata.east_asian_width(character) in "WF" else 0.6 for character in text)
    return sum(ems) * points / 72


def _wrapped(caption, width):
    """The caption in lines of about `width` inches of the heading's 11 points."""
    return textwrap.fill(caption, max(8, int(len(caption) * width / _text_width(caption, 11))))


def _shortened(word, width):
    """The word, cut to about `width` inches of a panel title's 9 points."""
    letters = int(len(word) * width / max(_text_width(word, 9), 0.01))
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

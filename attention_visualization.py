"""Attention maps -> pictures for a paper, and the raw maps beside them.

    save_attention_viz("figures", 1, Image.open("dog.jpg"), ["a", "dog", "runs"], maps, advanced=True)

writes into the directory `figures`

    attention_viz_sample_1.png            the photograph, then the map of every word laid over it
    advanced_attention_viz_sample_1.png   also the raw cells, each map's peak and entropy, and the colour bar
    attention_maps_sample_1.npz           `words`, `maps`, the reduced `photograph` and, where known, `log_prob`

and the last file is enough to draw both pictures again, in any style:

    raw = np.load("figures/attention_maps_sample_1.npz")
    save_attention_viz("redrawn", 1, raw["photograph"], list(raw["words"]), raw["maps"], advanced=True)

One colour scale serves all words of a caption: black is 0 and the brightest is the caption's largest weight, so panels
can be compared. A map stretched to its own maximum would make a decoder that looks nowhere in particular seem as sure
as one that looks at the dog. The scale is that of the square root: on a linear one a single sharp word leaves the other
panels black. The colour bar shows it. The photograph under a map is grey, so every colour seen is attention.

Axes: T words, h x w grid cells, H x W pixels. The encoder sees the whole photograph, so a grid covers all of it.
After figure 3 of Xu et al. 2015, Show, Attend and Tell, who smooth with a Gaussian and scale each word alone.
"""

import io
import math
import textwrap
import unicodedata
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image

from checkpoints import replace_file

DPI = 150
LONG_SIDE = 600  # pixels; a larger photograph is reduced to this first
COLORS = matplotlib.colormaps[
    "inferno"
]  # perceptually uniform, and its lightness survives a grey printout
OPACITY = 0.2, 0.75  # of the colour over the grey photograph, for no weight and for the largest
PANEL, NARROWEST, WIDEST = (
    1.7,
    1.1,
    15,
)  # inches: side of a square panel, width kept for a word, width of a figure
GAP, TITLE, MARGIN, STRIP = (
    0.1,
    0.22,
    0.12,
    0.8,
)  # inches: between panels, above a panel, border, height of entropy bars
INK, FAINT = "#222222", "#777777"


def save_attention_viz(directory, index, photograph, words, maps, *, advanced=False, log_prob=None):
    """Write one caption's attention pictures and raw maps, each file whole or not at all.

    Args:
        directory: folder, made if absent.
        index: goes into the file names, `attention_viz_sample_{index}.png`.
        photograph: RGB PIL image or (H, W, 3) uint8, any size, in its original aspect ratio.
        words: list of T str, in any script; a character no installed font has is drawn as a box.
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
    np.savez_compressed(
        raw,
        words=np.array(words, dtype=str),
        maps=maps.astype(np.float32),
        photograph=photograph,
        **known,
    )
    files = {
        f"attention_viz_sample_{index}.png": _draw(
            photograph, words, maps, log_prob, advanced=False
        ),
        f"attention_maps_sample_{index}.npz": raw.getvalue(),
    }
    if advanced:
        files[f"advanced_attention_viz_sample_{index}.png"] = _draw(
            photograph, words, maps, log_prob, advanced=True
        )
    Path(directory).mkdir(parents=True, exist_ok=True)
    return [_write_whole(Path(directory) / name, data) for name, data in files.items()]


def upsample_map(attention_map, size):
    """Stretch a grid of weights over a picture: smooth, and with no peak that the grid has not.

    Args:
        attention_map: (h, w) float.
        size: (H, W) in pixels.
    Returns: (H, W) float64. Cell (i, j) has its centre at ((j + 0.5) / w, (i + 0.5) / h) of the picture and its weight
        there; between centres the values stay between those of the neighbours, where bicubic interpolation would
        overshoot, also below 0, and a Gaussian would flatten the peak. The mean over the picture is that of the grid,
        up to the error of sampling it at pixels.
    Source: monotone piecewise cubic interpolation, Fritsch and Butland 1984, along the columns, then along the rows.
    """
    height, width = size
    cells = np.asarray(attention_map, dtype=np.float64)
    return _stretched(_stretched(cells, height).T, width).T.clip(
        cells.min(), cells.max()
    )  # clip: rounding


def _stretched(cells, size):
    """(n, m) -> (size, m): each column interpolated from n cell centres to `size` pixel centres, flat at both ends."""
    cells = np.pad(cells, ((1, 1), (0, 0)), mode="edge")
    position = (np.arange(size) + 0.5) * (
        len(cells) - 2
    ) / size + 0.5  # in padded cells: the grid's centre i is at i + 1
    before = position.astype(int)
    t = (position - before)[:, None]
    rise = np.diff(cells, axis=0)
    product = rise[:-1] * rise[1:]
    slope = np.zeros_like(
        cells
    )  # at the centres: 0 at a peak, else the harmonic mean of the rises on both sides
    np.divide(2 * product, rise[:-1] + rise[1:], out=slope[1:-1], where=product > 0)
    start, end, rise = slope[before], slope[before + 1], rise[before]
    return cells[before] + t * (
        start + t * (3 * rise - 2 * start - end + t * (start + end - 2 * rise))
    )


def map_entropy(attention_map):
    """Entropy of one (h, w) map in bits: 0 if one cell has all weight, log2(P) if P cells share it equally."""
    weights = np.asarray(attention_map, dtype=np.float64)
    weights = weights[weights > 0] / weights.sum()
    return float(np.sum(weights * -np.log2(weights)))


def map_peak(attention_map):
    """Row and column of the largest cell of an (h, w) map, or None where several tie: a uniform map has no peak."""
    rows, columns = np.nonzero(attention_map == np.max(attention_map))
    return (int(rows[0]), int(columns[0])) if len(rows) == 1 else None


def colored(weights, largest):
    """Attention weights (...) -> colours (..., 3) in 0..1, by square root: 0 is black, `largest` the brightest."""
    return COLORS(np.sqrt(weights / largest))[..., :3]


def overlay(photograph, attention_map, largest):
    """Lay one map over the grey photograph, the more opaque the heavier: what is not attended to stays legible.

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
        raise ValueError(
            f"attention maps: expected ({len(words)}, h, w) for {len(words)} words, got {maps.shape}"
        )
    if not (np.isfinite(maps).all() and (maps >= 0).all()):
        raise ValueError(
            "attention maps: expected weights from 0 to 1, got negative or non-finite ones"
        )
    sums = maps.sum(axis=(1, 2))
    if not np.allclose(
        sums, 1, rtol=0, atol=0.01
    ):  # 0.01: weights may have been rounded to bfloat16
        worst = int(np.abs(sums - 1).argmax())
        raise ValueError(
            f"attention maps: expected each to sum to 1, but that of {words[worst]!r} sums to {sums[worst]:.4g}"
        )
    return maps


def _reduced(photograph):
    """The photograph as (H, W, 3) uint8 with a long side of at most LONG_SIDE pixels."""
    if not isinstance(photograph, Image.Image):
        photograph = np.asarray(photograph)
        if (
            photograph.dtype != np.uint8
            or photograph.ndim != 3
            or photograph.shape[2] != 3
            or 0 in photograph.shape
        ):
            raise ValueError(
                f"photograph: expected (H, W, 3) uint8, got {photograph.shape} {photograph.dtype}"
            )
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
    png = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _figure(
            photograph, [" ".join(word.split()) for word in words], maps, log_prob, advanced
        ).savefig(png, dpi=DPI)
    return png.getvalue()


def _figure(photograph, words, maps, log_prob, advanced):
    """Lay the panels out in rows under the caption; if advanced, with the raw cells below each row."""
    advanced = advanced and len(words) > 0  # an empty caption has nothing to add to the photograph
    aspect = photograph.shape[1] / photograph.shape[0]
    width, height = (
        PANEL * math.sqrt(aspect),
        PANEL / math.sqrt(aspect),
    )  # every photograph gets the same area
    shrink = min(1, 2 * PANEL / max(width, height))
    width, height = width * shrink, height * shrink
    slot = max(width, NARROWEST)  # a word needs room over a tall panel
    row = TITLE + height + (height + GAP if advanced else 0) + GAP
    columns = _columns(len(words) + 1, slot + GAP, row)
    total = 2 * MARGIN + columns * (slot + GAP) - GAP
    caption = _wrapped(" ".join(words) or "(empty caption)", total - 2 * MARGIN)
    top = MARGIN + 0.2 * (caption.count("\n") + 1) + (0.15 if log_prob is not None else 0)
    bottom = top + math.ceil((len(words) + 1) / columns) * row
    strip = _strip_height(words, total) if advanced else 0
    figure = Figure((total, bottom + strip + MARGIN))
    _heading(figure, caption, log_prob)
    largest = maps.max(initial=0)
    for place in range(len(words) + 1):
        left = MARGIN + place % columns * (slot + GAP) + (slot - width) / 2
        above = top + place // columns * row + TITLE
        upper = _axes(figure, left, above, width, height)
        lower = _axes(figure, left, above + height + GAP, width, height) if advanced else None
        if place == 0:
            _show(upper, photograph)
            if advanced:
                _color_bar(lower, largest)
        else:
            _word_panels(
                upper,
                lower,
                photograph,
                _shortened(words[place - 1], slot),
                maps[place - 1],
                largest,
            )
    if advanced:
        _entropy_strip(
            _axes(figure, MARGIN + 0.4, bottom + 0.15, total - 2 * MARGIN - 0.4, STRIP), words, maps
        )
    return figure


def _columns(panels, width, height):
    """How many panels per row make the figure nearest to 1.5 : 1, with few empty places and not over WIDEST."""

    def badness(columns):
        rows = math.ceil(panels / columns)
        return (
            abs(math.log(columns * width / (rows * height) / 1.5))
            + (rows * columns - panels) / panels
        )

    most = max(1, min(panels, int(WIDEST / width)))
    return min(range(1, most + 1), key=badness)


def _axes(figure, left, top, width, height):
    """Axes placed in inches from the figure's upper left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (
            left / total_width,
            1 - (top + height) / total_height,
            width / total_width,
            height / total_height,
        )
    )


def _show(axes, pixels, interpolation="auto"):
    """Fill the axes with an image; coordinates run from (0, 0), its upper left corner, to (1, 1)."""
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
    """The overlay with its word above and, in the advanced picture, the raw cells below, a ring on the peak of each."""
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
    """The colours' meaning, across the middle of the free place below the photograph."""
    axes.set_axis_off()
    bar = axes.inset_axes((0.1, 0.5, 0.8, 0.08))
    bar.imshow(COLORS(np.linspace(0, 1, 256))[None], extent=(0, 1, 0, 1), aspect="auto")
    bar.set_xticks(
        [0, 0.5, 1], ["0", f"{largest / 4:.2g}", f"{largest:.2g}"]
    )  # square root: half way is a quarter
    bar.set_yticks([])
    bar.tick_params(length=2, pad=2, labelsize=7, width=0.6)
    bar.set_title("attention weight\nper cell", fontsize=8, pad=3)


def _entropy_strip(axes, words, maps):
    """One bar per word: how far its map is spread, from 0 bits (one cell) to the dashed line (all cells alike)."""
    uniform = math.log2(maps[0].size)
    axes.bar(
        range(len(words)),
        [map_entropy(attention_map) for attention_map in maps],
        width=0.6,
        color="#b5485d",
    )
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
    """Inches for the entropy strip, words below it included; they stand upright where they would touch."""
    longest = max(_text_width(_shortened(word, NARROWEST), 8) for word in words)
    return STRIP + 0.15 + (longest if _crowded(words, width) else 0.15) + 0.05


def _crowded(words, width):
    """Whether the longest word is wider than a bar's share of a figure `width` inches wide."""
    longest = max(_text_width(_shortened(word, NARROWEST), 8) for word in words)
    return longest + 0.08 > (width - 2 * MARGIN - 0.4) / len(words)


def _text_width(text, points):
    """About how many inches a line of text takes: an East Asian wide character is one em, another 0.6."""
    return (
        sum(1 if unicodedata.east_asian_width(character) in "WF" else 0.6 for character in text)
        * points
        / 72
    )


def _wrapped(caption, width):
    """The caption in lines of about `width` inches of the heading's 11 points."""
    return textwrap.fill(caption, max(8, int(len(caption) * width / _text_width(caption, 11))))


def _shortened(word, width):
    """The word, cut to about `width` inches of a panel title's 9 points."""
    letters = int(len(word) * width / max(_text_width(word, 9), 0.01))
    return word if len(word) <= letters else word[: max(letters - 1, 1)] + "…"


def _fonts_for(text):
    """Font families that draw the text together: matplotlib's own DejaVu Sans, then installed ones that add to it."""
    families = ["DejaVu Sans"]
    missing = {ord(character) for character in text if not character.isspace()}
    missing -= _characters_in(findfont("DejaVu Sans"))
    for entry in fontManager.ttflist:
        if not missing:
            break
        if entry.name.startswith("Last Resort"):  # has every character, as a box
            continue
        if covered := missing & _characters_in(entry.fname):
            families.append(entry.name)
            missing -= covered
    return families


def _characters_in(font_file):
    """Code points a font file has; none if it is damaged or was removed since matplotlib listed it."""
    try:
        return get_font(font_file).get_charmap().keys()
    except (OSError, RuntimeError):
        return set()


def _write_whole(path, data):
    """Write bytes to a file in one rename, so that no reader ever sees half of it. Returns the path."""
    with replace_file(path) as file:
        file.write(data)
    return path

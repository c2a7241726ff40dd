"""Attention pictures: geometry and entropy worked by hand, files as they lie on disk."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import attention_visualization as viz
from attention_visualization import map_entropy, map_peak, overlay, save_attention_viz, upsample_map


def one_hot(row, column, h=7, w=7):
    attention_map = np.zeros((h, w))
    attention_map[row, column] = 1
    return attention_map


def photograph(width=90, height=60):
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("cell", [(0, 0), (0, 3), (2, 1), (4, 6)])
def test_the_peak_stays_at_the_centre_of_its_cell(cell):
    """5 x 7 cells of 9 x 11 pixels: pixel (9 i + 4, 11 j + 5) is the centre of cell (i, j)."""
    attention_map = np.random.default_rng(1).random((5, 7))
    attention_map[cell] = 2
    large = upsample_map(attention_map, (45, 77))
    assert large[4::9, 5::11] == pytest.approx(attention_map)
    assert large[9 * cell[0] + 4, 11 * cell[1] + 5] == large.max() == pytest.approx(2)


def test_upsampling_invents_no_weight_below_or_above_the_cells_and_keeps_the_mean():
    attention_map = np.random.default_rng(2).random((14, 14)) ** 4
    large = upsample_map(attention_map, (280, 420))
    assert attention_map.min() <= large.min() and large.max() <= attention_map.max()
    assert large.mean() == pytest.approx(attention_map.mean(), rel=1e-3)


def test_upsampling_between_two_cells_worked_by_hand():
    """3t^2 - 2t^3 between the centres of the cells 0 and 1, constant outside; t = -1/4 to 5/4."""
    assert upsample_map([[0.0, 1.0]], (1, 4)).tolist() == [[0, 10 / 64, 54 / 64, 1]]


def test_upsampling_a_ramp_is_monotone_and_one_cell_is_constant():
    assert (np.diff(upsample_map([[0.0, 0.1, 0.5, 0.6, 3.0]], (1, 200))) >= 0).all()
    assert (upsample_map([[1.0]], (3, 5)) == np.ones((3, 5))).all()


def test_entropy_by_hand():
    assert map_entropy(np.full((7, 7), 1 / 49)) == pytest.approx(np.log2(49))
    assert map_entropy(one_hot(3, 2)) == 0
    assert map_entropy(np.array([[0.5, 0.25], [0.25, 0]])) == pytest.approx(1.5)


def test_peak_is_row_and_column_and_a_tie_has_none():
    assert map_peak(one_hot(5, 2)) == (5, 2)
    assert map_peak(np.full((7, 7), 1 / 49)) is None


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[0.4, 0.3], [0.2, 0.1]], [[1, 1], [0, 0]]),  # 0.4 is too little
        ([[0.5, 0.3], [0.2, 0]], [[1, 0], [0, 0]]),
        ([[0.1, 0.1, 0.3], [0.3, 0.1, 0.1]], [[0, 0, 1], [1, 0, 0]]),
        ([[1.0]], [[1]]),
    ],
)
def test_half_of_the_weight_is_in_the_fewest_cells(weights, expected):
    assert viz.half_cells(np.array(weights)).tolist() == np.array(expected, dtype=bool).tolist()


def test_half_of_ten_equal_cells_is_five_in_spite_of_rounding():
    assert viz.half_cells(np.full((2, 5), 0.1)).sum() == 5


def test_brightness_grows_linearly_from_the_uniform_weight():
    weights = np.array([0, 0.02, 0.04, 0.05, 0.08, 0.2])
    expected = [0, 0, 1 / 3, 0.5, 1, 1]
    assert viz.brightness(weights, 0.02, 0.08) == pytest.approx(expected)


def test_full_brightness_is_the_largest_weight_from_four_to_eight_times_uniform():
    maps = np.stack([one_hot(0, 0, 4, 5), np.full((4, 5), 0.05)])
    maps[0] = 0.3 * maps[0] + 0.7 / 20

    def full(scale, maps=maps):
        return viz.Caption(None, [], maps, {}, None, scale).full.tolist()

    assert full("caption") == pytest.approx([0.335, 0.335])
    assert full("word") == pytest.approx([0.335, 0.2])
    assert full("caption", one_hot(0, 0, 4, 5)[None]) == pytest.approx([0.4])
    assert full("caption", maps[1:]) == pytest.approx([0.2])
    assert full("caption", np.ones((1, 1, 1))) == [1]  # no weight is above 1


def test_a_word_that_hardly_looked_does_not_light_up():
    """Of its attention the cells got a tenth: all of that in one cell is little beside the other word's."""
    maps = np.stack([one_hot(0, 0, 4, 5), one_hot(3, 4, 4, 5)])
    beside = {"language": np.array([0.9, 0.2])}
    caption = viz.Caption(None, ["of", "dog"], maps, beside, None, "caption")
    assert caption.weights.sum(axis=(1, 2)) == pytest.approx([0.1, 0.8])
    assert caption.largest.tolist() == pytest.approx([0.8, 0.8])
    light = viz.brightness(caption.weights, caption.uniform, caption.full[0])
    assert light[:, [0, 3], [0, 4]].tolist() == [pytest.approx([1 / 7, 0]), pytest.approx([0, 1])]


def test_a_map_near_uniform_gives_an_evenly_dimmed_photograph():
    """Noise of 10 % must not be seen: no more than 3 % of the light comes and goes."""
    grey = np.full((70, 70, 3), 100, dtype=np.uint8)
    noisy = 1 + np.random.default_rng(4).uniform(-0.1, 0.1, (7, 7))
    picture = overlay(grey, noisy / noisy.sum(), full=viz.FULL[0] / 49)
    assert picture.max() - picture.min() < 0.03
    assert picture.mean() == pytest.approx(viz.DIM * 100 / 255, abs=0.01)
    assert (overlay(grey, np.ones((1, 1)), full=1) == overlay(grey, np.ones((1, 1)), full=9)).all()


def test_overlay_keeps_the_colours_where_the_word_looks_and_greys_the_rest():
    red = np.full((70, 70, 3), (200, 40, 40), dtype=np.uint8)
    picture = overlay(red, one_hot(3, 3), full=1)
    assert picture[35, 35] == pytest.approx(np.array([200, 40, 40]) / 255, abs=0.02)
    far = picture[0, 0]
    grey = 0.299 * 200 + 0.701 * 40
    mixed = viz.GREYED * grey + (1 - viz.GREYED) * np.array([200, 40, 40])
    assert far == pytest.approx(viz.DIM * mixed / 255)


@pytest.mark.parametrize(
    ("cell", "corner"), [((0, 0), (0, 0)), ((0, 6), (0, -1)), ((6, 0), (-1, 0)), ((6, 6), (-1, -1))]
)
def test_overlay_is_brightest_in_the_corner_attended_to(cell, corner):
    white = np.full((70, 140, 3), 255, dtype=np.uint8)  # the hardest background
    picture = overlay(white, one_hot(*cell), full=1)
    light = picture.sum(axis=2)
    assert light[corner] == light.max() > 1.2 * light[35, 70]
    assert picture.min() >= 0 and picture.max() <= 1


def test_one_colour_scale_serves_all_words(tmp_path):
    """A word's panel is the darker the sharper the caption's sharpest map is, up to a point; not on its own scale."""
    diffuse = 0.9 / 49 + 0.1 * one_hot(3, 3)

    def light(sharpest, scale):
        maps = np.stack([diffuse, (1 - sharpest) / 49 + sharpest * one_hot(1, 1)])
        image = Image.new("RGB", (60, 60), (120, 120, 120))
        caption = viz.Caption(np.asarray(image), ["x", "y"], maps, {}, None, scale)
        return viz._figure(caption, advanced=False).axes[1].images[0].get_array().mean()

    assert light(0.1, "caption") > light(0.12, "caption") > light(0.15, "caption")
    assert light(0.15, "caption") == light(0.9, "caption")
    assert light(0.1, "word") == light(0.9, "word") == light(0.1, "caption")


def test_different_words_give_different_panels_and_equal_maps_equal_ones(tmp_path):
    """Panels 2 x 2: photograph, first / second, third. The photograph's colour is where a word looks."""
    image = Image.new("RGB", (100, 100), (90, 120, 150))
    maps = np.array([one_hot(*cell) for cell in ((1, 1), (5, 5), (1, 1))])
    figure = pixels(save_attention_viz(tmp_path, 1, image, ["x", "x", "x"], maps)[0])
    side = viz.PANEL * viz.DPI

    def bright(row, column):
        """Rows and columns of a panel's bright pixels."""
        top = viz.MARGIN + 0.2 + viz.TITLE + row * (viz.PANEL + viz.TITLE + viz.GAP)
        left = viz.MARGIN + column * (viz.PANEL + viz.GAP)
        top, left = round(top * viz.DPI), round(left * viz.DPI)
        panel = figure[top : top + int(side), left : left + int(side)]
        return np.nonzero((abs(panel - (90, 120, 150)) < 12).all(axis=2))

    centres = [np.mean(bright(*place), axis=1) for place in ((0, 1), (1, 0), (1, 1))]
    for centre, cell in zip(centres, (1.5, 5.5, 1.5), strict=True):
        assert centre == pytest.approx(cell / 7 * side, abs=3)
    assert len(bright(0, 0)[0]) > 0.98 * side**2  # the photograph is bright all over
    assert len(bright(0, 1)[0]) < 0.04 * side**2


def caption_of(words, maps, **changes):
    """A Caption of the tests' photograph."""
    caption = viz.Caption(np.asarray(photograph()), words, np.array(maps), {}, None, "caption")
    return caption._replace(**changes)


def test_what_the_advanced_picture_shows_of_each_word():
    """Three words over 2 x 3 cells; the axes before matplotlib draws them."""
    maps = np.array(
        [
            [[0, 0, 0.8], [0.2, 0, 0]],
            [[0.5, 0.25, 0], [0, 0, 0.25]],
            [[0.25, 0.15, 0.15], [0.15, 0.15, 0.15]],
        ]
    )
    caption = caption_of(["dog", "runs", "a"], maps, log_prob=-2.5)
    figure = viz._figure(caption, advanced=True)
    assert [text.get_text() for text in figure.texts][:2] == ["dog runs a", "log_prob -2.50 nats"]
    whole, colors, *panels, legend, strip = figure.axes
    assert (whole.images[0].get_array() == np.asarray(photograph())).all()
    labels = colors.child_axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["0", "0.8"]
    assert colors.child_axes[0].lines[0].get_xdata()[0] == pytest.approx(1 / 6 / 0.8)
    assert [label.get_text() for label in legend.get_xticklabels()] == ["uniform 0.17", "0.8"]
    assert [panel.get_title() for panel in panels] == ["dog", "", "runs", "", "a", ""]
    for number, peak in enumerate([(2.5 / 3, 0.5 / 2), *[(0.5 / 3, 0.5 / 2)] * 2]):
        overlaid, raw = panels[2 * number : 2 * number + 2]
        cells = viz.COLORS(maps[number] / 0.8)[..., :3]
        np.testing.assert_allclose(raw.images[0].get_array(), cells)
        mixed = overlay(np.asarray(photograph()), maps[number], 0.8)
        np.testing.assert_allclose(overlaid.images[0].get_array(), mixed)
        rings = [pytest.approx(np.array([peak]))] * 2  # of two colours
        assert [line.get_xydata() for line in raw.lines] == rings
        # the last map's half is spread over half of the cells
        assert [line.get_xydata() for line in overlaid.lines] == (rings if number < 2 else [])
    bars = [bar.get_height() for bar in strip.patches]
    flat = 0.25 * np.log2(4) + 0.75 * np.log2(1 / 0.15)
    assert bars == pytest.approx([0.8 * np.log2(1 / 0.8) + 0.2 * np.log2(5), 1.5, flat])
    assert strip.lines[0].get_ydata()[0] == pytest.approx(np.log2(6))


def test_the_word_s_own_scale_is_told_beside_it():
    maps = np.stack([0.9 / 49 + 0.1 * one_hot(3, 3), one_hot(1, 1)])
    figure = viz._figure(caption_of(["a", "dog"], maps, scale="word"), advanced=False)
    _, *panels, legend = figure.axes
    assert [panel.texts[0].get_text() for panel in panels] == ["0.12", "0.16"]
    labels = [label.get_text() for label in legend.get_xticklabels()]
    assert labels == ["uniform 0.02", "each word's own"]


def test_an_outline_goes_around_few_cells_that_hold_half_and_a_flat_map_has_none():
    """Cells (0, 1) and (1, 1) of 4 x 4: upper half of the second column, in two colours."""
    sharp = np.zeros((4, 4))
    sharp[:2, 1] = 0.3, 0.25
    sharp[3] = 0.45 / 4
    flat = np.full((4, 4), 1 / 16)
    figure = viz._figure(caption_of(["dog", "the"], [sharp, flat]), advanced=False)
    _, dog, the, _ = figure.axes
    assert len(dog.collections) == 2 and len(the.collections) == 0
    (line,) = dog.collections[0].get_paths()
    corners = line.vertices.min(axis=0), line.vertices.max(axis=0)
    assert np.array(corners) == pytest.approx(np.array([[0.25, 0], [0.5, 0.5]]), abs=1e-3)
    length = np.hypot(*np.diff(line.vertices, axis=0).T).sum()
    assert 1.2 < length < 1.5  # 2 x (1/4 + 1/2), but for rounded corners


def test_what_no_cell_got_is_a_labelled_bar_under_each_word(tmp_path):
    maps = np.stack([one_hot(1, 1), one_hot(2, 2)])
    beside = {"picture": np.array([0.25, 0.1]), "language": np.array([0.5, 0])}
    figure = viz._figure(caption_of(["a", "dog"], maps, beside=beside), advanced=False)
    bars = figure.axes[2], figure.axes[4]
    for bar, shares in zip(bars, ((0.25, 0.5), (0.1, 0)), strict=True):
        whole, picture, language = bar.patches
        assert whole.get_width() == 1 and picture.get_width() == shares[0]
        assert (language.get_x(), language.get_width()) == shares
    assert [text.get_text() for text in bars[0].texts] == ["picture 25%", "language 50%"]
    path = save_attention_viz(tmp_path, 1, photograph(), ["a", "dog"], maps, beside=beside)[1]
    with np.load(path) as raw:
        assert raw["beside_names"].tolist() == ["picture", "language"]
        assert raw["beside"].tolist() == [pytest.approx([0.25, 0.1]), [0.5, 0]]
    path = save_attention_viz(tmp_path, 2, photograph(), ["a", "dog"], maps)[1]
    with np.load(path) as raw:
        assert "beside" not in raw


@pytest.mark.parametrize("shares", [[0.5], [0.5, -0.1], [0.5, 1.2], [0.5, np.nan]])
def test_shares_beside_the_cells_that_are_none_are_refused(tmp_path, shares):
    maps = np.stack([one_hot(1, 1), one_hot(2, 2)])
    with pytest.raises(ValueError, match="a share from 0 to 1 of 'language' for each of 2 words"):
        save_attention_viz(
            tmp_path, 1, photograph(), ["a", "dog"], maps, beside={"language": shares}
        )


@pytest.mark.parametrize("form", viz.FORMATS)
def test_every_format_is_the_same_file_twice_and_has_its_text_as_text(tmp_path, form):
    def draw(folder):
        flags = {"advanced": True, "form": form, "beside": {"language": [0.25]}}
        return save_attention_viz(
            tmp_path / folder, 1, photograph(), ["zebra"], [one_hot(1, 1)], **flags
        )

    one, two = draw("one"), draw("two")
    assert [path.name for path in one] == [
        f"attention_viz_sample_1.{form}",
        "attention_maps_sample_1.npz",
        f"advanced_attention_viz_sample_1.{form}",
    ]
    for path in (0, 2):
        data = one[path].read_bytes()
        assert data == two[path].read_bytes()
        start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[form]
        assert data.startswith(start)
        assert form != "svg" or (b">zebra</text>" in data and b"sans-serif" in data)
        assert form != "pdf" or (b"/Type /Font /Subtype /Type0" in data and b"/Type3" not in data)


@pytest.mark.parametrize("wrong", [{"scale": "image"}, {"form": "gif"}])
def test_a_scale_or_form_that_there_is_not_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="scale and form: expected one of"):
        save_attention_viz(tmp_path, 1, photograph(), ["a"], [one_hot(0, 0)], **wrong)


def test_pictures_carry_the_photographs_names_each_its_own():
    paths = map(Path, ["a/dog.jpg", "b/Dog.png", "cat.tar.gz", "dog_2.jpg", "x/dog.jpg", "ä" * 150])
    names = viz.picture_names(paths)
    assert names == ["dog", "Dog_2", "cat.tar", "dog_2_2", "dog_3", "ä" * 100]


def test_files_and_their_round_trip(tmp_path):
    maps = np.random.default_rng(3).dirichlet(np.ones(12), size=2).reshape(2, 3, 4)
    written = save_attention_viz(
        tmp_path / "new", 7, photograph(), ["a", "dög"], maps, advanced=True, log_prob=-2.5
    )
    names = [
        "attention_viz_sample_7.png",
        "attention_maps_sample_7.npz",
        "advanced_attention_viz_sample_7.png",
    ]
    assert [path.name for path in written] == names
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(names)
    with np.load(written[1], allow_pickle=False) as raw:
        assert raw["words"].tolist() == ["a", "dög"] and raw["log_prob"] == -2.5
        assert raw["maps"] == pytest.approx(maps, abs=1e-7)
        assert (raw["photograph"] == np.asarray(photograph())).all()
        stored = raw["photograph"], list(raw["words"]), raw["maps"]
        again = save_attention_viz(tmp_path, 7, *stored, advanced=True, log_prob=raw["log_prob"])
    for picture in (0, 2):  # float32 maps may move a colour by one step
        assert (pixels(again[picture]) == pixels(written[picture])).mean() > 0.999


def test_basic_alone_writes_no_advanced_picture(tmp_path):
    save_attention_viz(tmp_path, 1, photograph(), ["dog"], one_hot(1, 1)[None])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attention_maps_sample_1.npz",
        "attention_viz_sample_1.png",
    ]


@pytest.mark.parametrize(
    ("size", "count", "grid"),
    [
        ((1200, 400), 12, (7, 7)),
        ((400, 1200), 5, (14, 14)),
        ((500, 375), 30, (14, 14)),
        ((8, 3000), 2, (7, 7)),
        ((3000, 8), 2, (7, 7)),
        ((1, 1), 1, (1, 1)),
    ],
)
def test_pictures_of_any_shape_have_a_sane_size(tmp_path, size, count, grid):
    maps, image = np.full((count, *grid), 1 / (grid[0] * grid[1])), Image.new("RGB", size, "green")
    for path in save_attention_viz(tmp_path, 1, image, ["word"] * count, maps, advanced=True):
        assert path.stat().st_size < 2_000_000
        if path.suffix == ".png":
            width, height = Image.open(path).size
            assert 150 <= width <= 15.5 * viz.DPI and 150 <= height <= 25 * viz.DPI


def test_a_large_photograph_is_reduced_and_the_callers_is_left_alone(tmp_path):
    large = Image.new("RGB", (3000, 1500))
    written = save_attention_viz(tmp_path, 1, large, ["dog"], one_hot(1, 1)[None])
    assert np.load(written[1])["photograph"].shape == (300, 600, 3)
    assert large.size == (3000, 1500)


def test_an_empty_caption_still_gives_pictures(tmp_path):
    written = save_attention_viz(tmp_path, 1, photograph(), [], np.zeros((0, 7, 7)), advanced=True)
    assert len(written) == 3 and np.load(written[1])["maps"].shape == (0, 7, 7)


def test_words_in_other_scripts_and_mathtext_signs_draw_without_a_warning(tmp_path):
    words = ["$x_1$", "$\\frac{", "a_b", "собака", "犬が", "कुत्ता", "\U0001f436", ""]
    words.append("Donaudampfschifffahrtsgesellschaftskapitän")
    maps = np.array([one_hot(2, 2)] * len(words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_attention_viz(tmp_path, 1, photograph(), words, maps, advanced=True)


def test_a_font_that_has_the_missing_character_is_found_and_a_removed_one_passed_over(monkeypatch):
    """U+20D2 is in STIXGeneral, which comes with matplotlib, and not in DejaVu Sans."""
    fonts = viz.fontManager.ttflist
    gone = type(fonts[0])(fname="/nowhere/gone.ttf", name="Gone")
    stix = [font for font in fonts if font.name == "STIXGeneral"]
    monkeypatch.setattr(viz.fontManager, "ttflist", [gone, *stix])
    assert viz._fonts_for("dog") == ["DejaVu Sans"]
    assert viz._fonts_for("dog \u20d2") == ["DejaVu Sans", "STIXGeneral"]


def test_a_character_that_another_font_has_is_drawn_with_that_font(tmp_path):
    words, maps = ["dog \u20d2"], [one_hot(1, 1)]
    path = save_attention_viz(tmp_path, 1, photograph(), words, maps, form="pdf")[0]
    assert b"STIXGeneral" in path.read_bytes() and b"DejaVuSans" in path.read_bytes()
    assert b"/Type3" in path.read_bytes()  # which has the outlines of any kind of font


def test_a_font_installed_since_matplotlib_listed_its_fonts_is_found(monkeypatch, tmp_path):
    """matplotlib keeps its list in a file, and would not see a font until that is deleted."""
    fonts = viz.fontManager.ttflist
    (stix,) = {font.fname for font in fonts if Path(font.fname).name == "STIXGeneral.ttf"}
    broken = tmp_path / "broken.ttf"
    broken.write_text("no font")
    monkeypatch.setattr(viz.fontManager, "ttflist", [])
    monkeypatch.setattr(viz, "findSystemFonts", lambda: [str(broken), stix])
    monkeypatch.setattr(viz, "findfont", lambda _: stix.replace("STIXGeneral", "DejaVuSans"))
    assert viz._fonts_for("dog \u20d2") == ["DejaVu Sans", "STIXGeneral"]


def test_a_character_that_no_font_has_is_named_once_with_a_package_that_has_it(monkeypatch, capsys):
    monkeypatch.setattr(viz, "_other_fonts", list)
    monkeypatch.setattr(viz, "_named_packages", set())
    viz._fonts_for("犬が कु \U0001f436 dog \U000f0000")
    lines = capsys.readouterr().err.splitlines()
    start = "attention pictures: no installed font has"
    end = "drawn as boxes; Debian's package"
    assert sorted(lines) == [
        f"{start} क ु, {end} fonts-noto-core has one",
        f"{start} が 犬, {end} fonts-noto-cjk has one",
        f"{start} \U0001f436, {end} fonts-symbola has one",
    ]
    viz._fonts_for("猫")
    assert capsys.readouterr().err == ""


BAD = {
    "one map too few": (
        ["a", "dog"],
        one_hot(0, 0)[None],
        r"expected \(2, h, w\) for 2 words, got \(1, 7, 7\)",
    ),
    "flat": (["a"], np.full((1, 49), 1 / 49), r"got \(1, 49\)"),
    "not a distribution": (
        ["a", "dog"],
        np.stack([one_hot(0, 0), 0.9 * one_hot(1, 1)]),
        "'dog' sums to 0.9",
    ),
    "negative": (["a"], (2 * one_hot(0, 0) - one_hot(1, 1))[None], "negative"),
    "not finite": (["a"], (one_hot(0, 0) * np.nan)[None], "non-finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_maps_that_are_no_distributions_are_refused_before_anything_is_written(tmp_path, case):
    words, maps, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        save_attention_viz(tmp_path / "new", 1, photograph(), words, maps)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_a_photograph_of_another_form_is_refused(tmp_path, array):
    with pytest.raises(ValueError, match=r"photograph: expected \(H, W, 3\) uint8"):
        save_attention_viz(tmp_path, 1, array, ["a"], one_hot(0, 0)[None])


def test_a_failed_write_leaves_the_old_picture_whole_and_nothing_else(tmp_path, monkeypatch):
    path = save_attention_viz(tmp_path, 1, photograph(), ["dog"], one_hot(1, 1)[None])[0]
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_attention_viz(tmp_path, 1, photograph(), ["cat"], one_hot(5, 5)[None])
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "attention_maps_sample_1.npz",
        "attention_viz_sample_1.png",
    ]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

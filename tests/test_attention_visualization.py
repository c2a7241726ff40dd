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
    ("cell", "corner"), [((0, 0), (0, 0)), ((0, 6), (0, -1)), ((6, 0), (-1, 0)), ((6, 6), (-1, -1))]
)
def test_overlay_is_brightest_in_the_corner_attended_to(cell, corner):
    white = np.full((70, 140, 3), 255, dtype=np.uint8)  # the hardest background
    picture = overlay(white, one_hot(*cell), largest=1)
    light = picture.sum(axis=2)
    assert light[corner] == light.max() > 1.2 * light[35, 70]
    assert picture.min() >= 0 and picture.max() <= 1


def test_one_colour_scale_serves_all_words(tmp_path):
    """The overlay of a diffuse map is the darker the sharper the caption's sharpest map is."""
    grey = np.full((30, 30, 3), 100, dtype=np.uint8)
    diffuse = np.full((2, 2), 0.25)
    light = [overlay(grey, diffuse, largest).mean() for largest in (0.25, 0.5, 1)]
    assert light[0] > light[1] > light[2]


def test_different_words_give_different_panels_and_equal_maps_equal_ones(tmp_path):
    """Panels 2 x 2: photograph, first / second, third. A peak is the only yellow in the picture."""
    image = Image.new("RGB", (100, 100), (90, 120, 150))
    maps = np.array([one_hot(*cell) for cell in ((1, 1), (5, 5), (1, 1))])
    figure = pixels(save_attention_viz(tmp_path, 1, image, ["x", "x", "x"], maps)[0])
    bright = (figure.sum(axis=2) > 420) & (figure[..., 0] > figure[..., 2] + 60)  # yellow: a peak
    rows, columns = np.nonzero(bright)
    side = viz.PANEL * viz.DPI
    step = (viz.PANEL + viz.GAP) * viz.DPI
    across = figure.shape[1] / 2
    peaks = {
        "first": (rows < figure.shape[0] / 2) & (columns > across),
        "second": (rows > figure.shape[0] / 2) & (columns < across),
        "third": (rows > figure.shape[0] / 2) & (columns > across),
    }
    centre = {name: (rows[where].mean(), columns[where].mean()) for name, where in peaks.items()}
    four_cells = pytest.approx(4 / 7 * side, abs=3)
    # The same map in the same column; the second map's peak four cells further right and down.
    assert centre["first"][1] == pytest.approx(centre["third"][1], abs=2)
    assert centre["second"][1] + step - centre["third"][1] == four_cells
    assert centre["second"][0] - centre["third"][0] == four_cells
    panel = bright[: int(figure.shape[0] / 2), : int(across)]
    assert not panel.any()  # the photograph has no overlay


def test_what_the_advanced_picture_shows_of_each_word():
    """Two words over 2 x 3 cells; the axes before matplotlib draws them."""
    maps = np.array([[[0, 0, 0.8], [0.2, 0, 0]], [[0.5, 0.25, 0], [0, 0, 0.25]]])
    words = ["a", "dog"]
    figure = viz._figure(np.asarray(photograph()), words, maps, -2.5, advanced=True)
    assert [text.get_text() for text in figure.texts] == ["a dog", "log_prob -2.50 nats"]
    whole, legend, *panels, strip = figure.axes
    assert (whole.images[0].get_array() == np.asarray(photograph())).all()
    labels = legend.child_axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["0", "0.2", "0.8"]  # a quarter is half way
    assert [panel.get_title() for panel in panels] == ["a", "", "dog", ""]
    for number, peak in enumerate([(2.5 / 3, 0.5 / 2), (0.5 / 3, 0.5 / 2)]):
        overlaid, raw = panels[2 * number : 2 * number + 2]
        cells = viz.COLORS(np.sqrt(maps[number] / 0.8))[..., :3]
        np.testing.assert_allclose(raw.images[0].get_array(), cells)
        mixed = overlay(np.asarray(photograph()), maps[number], 0.8)
        np.testing.assert_allclose(overlaid.images[0].get_array(), mixed)
        for axes in (overlaid, raw):  # a ring of two colours
            assert [line.get_xydata() for line in axes.lines] == [
                pytest.approx(np.array([peak]))
            ] * 2
    bars = [bar.get_height() for bar in strip.patches]
    assert bars == pytest.approx([0.8 * np.log2(1 / 0.8) + 0.2 * np.log2(5), 1.5])
    assert strip.lines[0].get_ydata()[0] == pytest.approx(np.log2(6))


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

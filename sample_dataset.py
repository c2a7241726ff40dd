"""The sample dataset, drawn: scenes of one to three objects, with captions and boxes.

    write_sample_dataset(Path("data/sample"), seed=0, names=["0.jpg", "1.jpg", ...])

draws a scene of 224 x 224 pixels per name, with five captions and the boxes of its objects.
download_datasets.py makes the folder.
"""

import csv
import itertools
import json
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SAMPLE_SIDE = 224  # pixels
TILE = 300  # pixels: an object is drawn large once and scaled down, which smooths its edges
SAMPLE_COLOURS = {
    "red": (222, 44, 52),
    "orange": (250, 140, 20),
    "yellow": (252, 218, 52),
    "green": (52, 166, 74),
    "blue": (44, 104, 222),
    "purple": (146, 62, 186),
}
INK, CREAM, BROWN = (48, 44, 60), (255, 250, 232), (126, 84, 52)


def polar(centre, radius, turns):
    """The point `turns` of a full turn clockwise from straight up, on a circle."""
    angle = 2 * math.pi * turns
    return centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle)


# Objects are drawn in a square of side 100; `pen(shape, points, fill)` scales and outlines.
def draw_ball(pen, colour):
    """A ball with two highlights."""
    pen("ellipse", [(4, 4), (96, 96)], colour)
    pen("ellipse", [(24, 18), (44, 36)], CREAM, outline=False)
    pen("arc", [(14, 14), (86, 86)], CREAM, start=15, end=75)


def draw_star(pen, colour):
    """A smiling five-pointed star."""
    radii = [50, 23] * 5
    corners = [polar((50, 53), radius, corner / 10) for corner, radius in enumerate(radii)]
    pen("polygon", corners, colour)
    pen("ellipse", [(38, 44), (44, 52)], INK, outline=False)
    pen("ellipse", [(56, 44), (62, 52)], INK, outline=False)
    pen("arc", [(40, 48), (60, 66)], INK, start=20, end=160)


def draw_heart(pen, colour):
    """A heart with a highlight."""
    curve = []
    for step in range(60):
        t = 2 * math.pi * step / 60
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((50 + 2.9 * x, 46 - 2.9 * y))
    pen("polygon", curve, colour)
    pen("ellipse", [(20, 20), (36, 36)], CREAM, outline=False)


def draw_house(pen, colour):
    """A house with a chimney."""
    pen("rectangle", [(68, 10), (80, 40)], BROWN)
    pen("rectangle", [(12, 46), (88, 96)], colour)
    pen("polygon", [(2, 48), (50, 6), (98, 48)], colour)
    pen("rectangle", [(42, 62), (60, 96)], CREAM)
    pen("rectangle", [(20, 60), (34, 76)], CREAM)
    pen("rectangle", [(68, 60), (82, 76)], CREAM)


def draw_tree(pen, colour):
    """A fir tree; the colour is its needles'."""
    pen("rectangle", [(42, 60), (58, 98)], BROWN)
    for bottom, half in ((78, 40), (56, 33), (36, 25)):
        pen("polygon", [(50 - half, bottom), (50, bottom - 36), (50 + half, bottom)], colour)


def draw_car(pen, colour):
    """A car seen from its side."""
    pen("polygon", [(24, 46), (36, 22), (70, 22), (84, 46)], colour)
    pen("polygon", [(33, 44), (41, 28), (52, 28), (52, 44)], CREAM)
    pen("polygon", [(57, 44), (57, 28), (67, 28), (75, 44)], CREAM)
    pen("rounded_rectangle", [(2, 44), (98, 74)], colour, radius=10)
    pen("ellipse", [(90, 50), (97, 60)], CREAM)
    for left in (14, 62):
        pen("ellipse", [(left, 60), (left + 24, 84)], INK)
        pen("ellipse", [(left + 8, 68), (left + 16, 76)], CREAM, outline=False)


def draw_fish(pen, colour):
    """A fish that swims to the left."""
    pen("polygon", [(70, 50), (98, 24), (92, 50), (98, 76)], colour)
    pen("polygon", [(30, 30), (48, 14), (58, 30)], colour)
    pen("ellipse", [(2, 24), (78, 76)], colour)
    pen("ellipse", [(14, 38), (28, 52)], CREAM)
    pen("ellipse", [(18, 42), (24, 48)], INK, outline=False)
    pen("arc", [(30, 36), (44, 64)], INK, start=-60, end=60)
    pen("polygon", [(46, 50), (62, 42), (62, 60)], CREAM)


def draw_boat(pen, colour):
    """A boat with two sails; the colour is the hull's and one sail's."""
    pen("rectangle", [(47, 4), (52, 70)], BROWN)
    pen("polygon", [(55, 8), (55, 62), (94, 62)], colour)
    pen("polygon", [(44, 18), (44, 62), (12, 62)], CREAM)
    pen("polygon", [(3, 68), (97, 68), (80, 95), (20, 95)], colour)


OBJECTS = {  # noun -> (plural, how to draw it)
    "ball": ("balls", draw_ball),
    "star": ("stars", draw_star),
    "heart": ("hearts", draw_heart),
    "house": ("houses", draw_house),
    "tree": ("trees", draw_tree),
    "car": ("cars", draw_car),
    "fish": ("fish", draw_fish),
    "boat": ("boats", draw_boat),
}


def draw_tile(noun, colour):
    """One object, cropped to its outline: an RGBA picture, transparent around it."""
    tile = Image.new("RGBA", (TILE, TILE))
    draw = ImageDraw.Draw(tile)
    line = TILE // 42

    def pen(shape, points, fill, outline=True, **options):
        scaled = [(x * TILE / 100, y * TILE / 100) for x, y in points]
        if "radius" in options:
            options["radius"] *= TILE / 100
        if shape == "arc":
            draw.arc(scaled, fill=fill, width=line, **options)
        else:
            options["outline"] = INK if outline else None
            getattr(draw, shape)(scaled, fill=fill, width=line, **options)

    OBJECTS[noun][1](pen, SAMPLE_COLOURS[colour])
    return tile.crop(tile.getbbox()).reduce(2)


def gradient(side, top, bottom):
    """A square RGB picture that fades from colour `top` to colour `bottom`."""
    column = np.linspace(top, bottom, side)[:, None].round().astype(np.uint8)  # (side, 1, 3)
    return Image.fromarray(column).resize((side, side), Image.Resampling.NEAREST)


def ground(picture, rng, height, top, bottom):
    """Cover the picture below about `height` (a fraction of its side) with rolling ground."""
    side = picture.width
    phase, waves = rng.random(), rng.uniform(0.5, 1.1)
    edge = []
    for x in range(0, side + 4, 4):
        wave = math.sin(2 * math.pi * (phase + waves * x / side))
        edge.append((x, side * (height + 0.03 * wave)))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).polygon([*edge, (side, side), (0, side)], fill=255)
    picture.paste(gradient(side, top, bottom), mask=mask)


def dots(picture, rng, count, top, colours, radius):
    """Strew small round dots below `top` (a fraction of the side); `radius` in pixels."""
    draw, side = ImageDraw.Draw(picture), picture.width
    for _ in range(count):
        x, y = rng.uniform(0, side), rng.uniform(top * side, side)
        size = rng.uniform(0.5, 1) * radius
        draw.ellipse([x - size, y - size, x + size, y + size], fill=rng.choice(colours))


def draw_meadow(side, rng):
    """Two hills with flowers below a blue sky."""
    picture = gradient(side, (138, 200, 242), (226, 242, 250))
    ground(picture, rng, rng.uniform(0.40, 0.50), (176, 214, 140), (176, 214, 140))
    ground(picture, rng, rng.uniform(0.55, 0.62), (150, 200, 112), (104, 168, 84))
    dots(picture, rng, 40, 0.68, [(255, 255, 255), (255, 240, 150), (250, 200, 215)], side / 110)
    return picture


def draw_sea(side, rng):
    """Waves up to a horizon."""
    picture = gradient(side, (196, 226, 242), (246, 244, 232))
    horizon = rng.uniform(0.30, 0.40)
    picture.paste(gradient(side, (60, 150, 186), (22, 92, 146)), (0, round(horizon * side)))
    draw = ImageDraw.Draw(picture)
    for _ in range(26):
        x, y = rng.uniform(-0.05, 1) * side, rng.uniform(horizon + 0.05, 1) * side
        box = [x, y, x + side * 0.08, y + side * 0.03]
        draw.arc(box, 200, 340, fill=(190, 226, 238), width=side // 110)
    return picture


def draw_beach(side, rng):
    """Sand, with a strip of sea at the top."""
    picture = gradient(side, (150, 214, 238), (236, 248, 248))
    horizon = rng.uniform(0.16, 0.22)
    ImageDraw.Draw(picture).rectangle([0, horizon * side, side, side], fill=(92, 190, 204))
    ground(picture, rng, horizon + 0.12, (255, 250, 240), (255, 250, 240))
    ground(picture, rng, horizon + 0.14, (244, 222, 170), (228, 194, 132))
    dots(picture, rng, 90, horizon + 0.25, [(206, 170, 110), (252, 238, 204)], side / 160)
    return picture


def draw_snow(side, rng):
    """Hills in falling snow."""
    picture = gradient(side, (176, 192, 216), (222, 230, 240))
    ground(picture, rng, rng.uniform(0.40, 0.48), (226, 234, 244), (226, 234, 244))
    ground(picture, rng, rng.uniform(0.56, 0.64), (248, 251, 255), (226, 236, 248))
    dots(picture, rng, 90, 0.0, [(255, 255, 255)], side / 75)
    return picture


def draw_night(side, rng):
    """Stars and a moon over dark hills."""
    picture = gradient(side, (16, 20, 56), (58, 56, 112))
    dots(picture, rng, 70, 0.0, [(255, 255, 240), (200, 210, 255)], side / 170)
    x, y, size = rng.uniform(0.08, 0.86) * side, rng.uniform(0.04, 0.10) * side, side * 0.09
    draw = ImageDraw.Draw(picture)
    draw.ellipse([x, y, x + size, y + size], fill=(250, 246, 214))
    shade = [x + size * 0.3, y - size * 0.1, x + size * 1.2, y + size * 0.8]
    draw.ellipse(shade, fill=(22, 25, 62))
    ground(picture, rng, rng.uniform(0.72, 0.80), (28, 32, 66), (18, 20, 46))
    return picture


WALLPAPERS = (  # two colours of stripes
    ((248, 228, 214), (240, 212, 194)),
    ((244, 236, 214), (234, 222, 190)),
    ((240, 226, 236), (228, 208, 224)),
)


def draw_room(side, rng):
    """Striped wallpaper over a wooden floor."""
    light, dark = rng.choice(WALLPAPERS)
    picture = Image.new("RGB", (side, side), light)
    draw = ImageDraw.Draw(picture)
    for left in range(0, side, side // 8):
        draw.rectangle([left, 0, left + side // 16, side], fill=dark)
    draw.rectangle([0, side * 0.86, side, side], fill=(184, 138, 96))
    draw.rectangle([0, side * 0.84, side, side * 0.87], fill=(252, 248, 240))
    return picture


BACKGROUNDS = {  # where a scene is -> how to draw it
    "in the meadow": draw_meadow,
    "in the sea": draw_sea,
    "on the beach": draw_beach,
    "in the snow": draw_snow,
    "at night": draw_night,
    "in the room": draw_room,
}
SENTENCES = (
    "{subject} {relation} {where}",
    "{subject} {relation} can be seen {where}",
    "{subject} {verb} {relation} {where}",
    "there {verb} {subject} {relation} {where}",
    "{where} there {verb} {subject} {relation}",
    "the picture shows {subject} {relation} {where}",
    "a picture of {subject} {relation} {where}",
    "this is a picture of {subject} {relation} {where}",
    "you can see {subject} {relation} {where}",
    "{where} you can see {subject} {relation}",
    "we see {subject} {relation} {where}",
    "someone drew {subject} {relation} {where}",
)
BESIDE = ["{a} next to {b}", "{a} next to {b}", "{a} to the left of {b}", "{b} to the right of {a}"]
ABOVE = ["{a} above {b}"] * 3 + ["{b} below {a}"]
# How often each layout is drawn, the centres of its objects as fractions of the side, the share of
# the picture that each object's box covers, and its wordings. Objects of one letter are alike.
LAYOUTS = (
    (6, {"a": [(0.26, 0.5)]}, (0.08, 0.12), ["{a} on the left"]),
    (6, {"a": [(0.74, 0.5)]}, (0.08, 0.12), ["{a} on the right"]),
    (6, {"a": [(0.5, 0.26)]}, (0.08, 0.12), ["{a} at the top"]),
    (6, {"a": [(0.5, 0.74)]}, (0.08, 0.12), ["{a} at the bottom"]),
    (14, {"a": [(0.26, 0.5), (0.74, 0.5)]}, (0.06, 0.10), ["{a} side by side"]),
    (12, {"a": [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)]}, (0.05, 0.06), ["{a} in a row"]),
    (20, {"a": [(0.26, 0.5)], "b": [(0.74, 0.5)]}, (0.06, 0.10), BESIDE),
    (20, {"a": [(0.5, 0.26)], "b": [(0.5, 0.74)]}, (0.06, 0.09), ABOVE),
    (10, {"a": [(0.5, 0.26)], "b": [(0.26, 0.74), (0.74, 0.74)]}, (0.05, 0.08), ABOVE),
)


def write_captions(rng, wordings, things, where):
    """Five different captions of one scene. `things`: {"a": (noun, colour, count), ...}."""
    phrases = {key: noun_phrase(*thing) for key, thing in things.items()}
    captions = []
    for sentence in rng.sample(SENTENCES, 5):
        subject, relation = rng.choice(wordings).split(" ", 1)  # "{a}", "next to {b}"
        verb = "is" if things[subject[1]][2] == 1 else "are"
        wording = sentence.format(subject=subject, relation=relation, verb=verb, where=where)
        caption = wording.format(**phrases)
        captions.append(caption[0].upper() + caption[1:] + ".")
    return captions


def noun_phrase(noun, colour, count):
    """Such as "an orange car" or "two red balls"."""
    if count == 1:
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}"
    return f"{('two', 'three')[count - 2]} {colour} {OBJECTS[noun][0]}"


def paste_object(picture, rng, tile, centre, area):
    """Paste `tile` near `centre`, its box covering the share `area` of the picture.

    Returns: the box, [x0, y0, x1, y1] in 0..1.
    """
    tile = tile.rotate(rng.uniform(-7, 7), Image.Resampling.BICUBIC, expand=True)
    tile = tile.crop(tile.getbbox())
    scale = math.sqrt(area * picture.width * picture.height / (tile.width * tile.height))
    size = round(tile.width * scale), round(tile.height * scale)
    tile = tile.resize(size, Image.Resampling.LANCZOS)
    left, top = (
        place_along(rng, *axis) for axis in zip(centre, picture.size, tile.size, strict=True)
    )
    opacity = tile.getchannel("A").filter(ImageFilter.GaussianBlur(2))
    picture.paste(INK, (left + 3, top + 4), opacity.point(lambda alpha: alpha // 3))  # a shadow
    picture.paste(tile, (left, top), tile)
    box = (left, top, left + tile.width, top + tile.height)
    return [round(edge / SAMPLE_SIDE, 4) for edge in box]


def place_along(rng, centre, side, length):
    """First pixel, along one axis, of a tile near `centre` that stays inside the picture."""
    first = round((centre + rng.uniform(-0.05, 0.05)) * side - length / 2)
    return min(max(first, 2), side - length - 2)


def apart(first, second, gap=0.012):
    """Whether two boxes leave at least `gap` between them along an axis."""
    return any(
        first[axis + 2] + gap <= second[axis] or second[axis + 2] + gap <= first[axis]
        for axis in (0, 1)
    )


def draw_scene(rng, tiles):
    """One random scene: an RGB picture, its five captions, and its objects' names and boxes."""
    _, places, areas, wordings = rng.choices(LAYOUTS, weights=[weight for weight, *_ in LAYOUTS])[0]
    where = rng.choice(list(BACKGROUNDS))
    nouns = rng.sample(list(OBJECTS), len(places))
    colours = rng.sample(list(SAMPLE_COLOURS), len(places))
    things = {
        key: (noun, colour, len(places[key]))
        for key, noun, colour in zip(places, nouns, colours, strict=True)
    }
    captions = write_captions(rng, wordings, things, where)
    background = BACKGROUNDS[where](2 * SAMPLE_SIDE, rng).reduce(2)
    picture, objects = place_objects(rng, tiles, background, things, places, areas)
    return add_grain(rng, picture), captions, objects


def place_objects(rng, tiles, background, things, places, areas):
    """Draw the objects over the background, again and again until no two touch."""
    while True:
        picture, objects = background.copy(), []
        for key, (noun, colour, _) in things.items():
            area = rng.uniform(*areas)
            for centre in places[key]:
                box = paste_object(picture, rng, tiles[noun, colour], centre, area)
                objects.append({"names": sorted({noun, OBJECTS[noun][0]}), "box": box})
        boxes = [thing["box"] for thing in objects]
        if all(apart(*pair) for pair in itertools.combinations(boxes, 2)):
            return picture, objects


def add_grain(rng, picture):
    """The picture with noise of up to four grey levels."""
    grain_rng = np.random.default_rng(rng.getrandbits(64))
    grain = grain_rng.integers(-4, 5, (SAMPLE_SIDE, SAMPLE_SIDE, 1), np.int16)
    pixels = np.asarray(picture, np.int16) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_sample_dataset(folder, seed, names):
    """Draw one picture per name into folder/Images, which exists; write the other files beside it.

    These are captions.txt (CSV `image,caption`), sample.{train,dev,test}Images.txt (0.8, 0.1 and
    0.1 of the names) and boxes.json: {file name: [{"names": [noun, plural], "box": [x0, y0, x1,
    y1]}, ...]}, x and y in 0..1.
    """
    tiles = {kind: draw_tile(*kind) for kind in itertools.product(OBJECTS, SAMPLE_COLOURS)}
    boxes = {}
    with (folder / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "caption"])
        for name in names:
            picture, captions, boxes[name] = draw_scene(random.Random(f"{seed} {name}"), tiles)
            picture.save(folder / "Images" / name, quality=92, subsampling=0)
            rows.writerows([name, caption] for caption in captions)
    (folder / "boxes.json").write_text(json.dumps(boxes, indent=1))
    held_out = len(names) // 10
    dev, test, train = names[:held_out], names[held_out : 2 * held_out], names[2 * held_out :]
    for split, members in (("dev", dev), ("test", test), ("train", train)):
        (folder / f"sample.{split}Images.txt").write_text("".join(f"{name}\n" for name in members))

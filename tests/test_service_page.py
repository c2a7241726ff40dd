"""service_page: the page of caption_service, in chromium, with a service that has a small trained model."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from pictures import quarters, save_image
from PIL import Image
from test_caption_report import Page, browser  # noqa: F401, its fixture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import attention_visualization as pictures

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "service_page"
START_SECONDS = 120
LIVE = ["model", "announcement", "note", "explains"]
CONTRAST = """() => {
    const canvas = document.createElement("canvas");
    const pen = canvas.getContext("2d", {willReadFrequently: true});
    const rgba = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const backgroundOf = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const colour = rgba(getComputedStyle(each).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
        const value = colour[i] / 255;
        return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    }, 0);
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.closest(".hidden, noscript, svg")) continue;
        const pair = [rgba(getComputedStyle(element).color), backgroundOf(element)].map(luminance);
        const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        found.push([element.textContent.trim().slice(0, 30), ratio]);
    }
    return found;
}"""
KEEP_FIELDS = """
    const send = window.fetch;
    window.sent = [];
    window.fetch = (path, options) => {
        const fields = [...(options?.body ?? [])].filter(([, value]) => typeof value === "string");
        if (fields.length) window.sent.push(Object.fromEntries(fields));
        return send(path, options);
    };
"""
DROP = """([kind, name, bytes]) => {
    const files = new DataTransfer();
    if (name) files.items.add(new File([new Uint8Array(bytes)], name));
    const event = kind === "paste"
        ? new ClipboardEvent(kind, {clipboardData: files, bubbles: true})
        : new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true});
    document.querySelector("#picture").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/sample and the path of a run on it, whose captions have some words."""
    from test_end_to_end import DECODERS, enter, train

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        return folder, train(DECODERS["adaptive"], "--min_length 6").resolve()


@pytest.fixture(scope="module")
def service(trained):
    """The address of a service with that model."""
    pytest.importorskip("fastapi", reason="no fastapi: pip install -r requirements-service.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "caption_service", "serve", "--port", str(port)]
    environment = os.environ | {"CAPTION_ADMIN_PORT": "0", "CAPTION_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--model_path", str(trained[1])], cwd=ROOT, env=environment
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_until_ready(address, process)
        yield address
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)


def wait_until_ready(address, process):
    for _ in range(10 * START_SECONDS):
        try:
            return urllib.request.urlopen(f"{address}ready", timeout=5)
        except OSError:
            assert process.poll() is None, f"the service ended with status {process.returncode}"
            time.sleep(0.1)
    pytest.fail(f"the service was not ready in {START_SECONDS} s")


@pytest.fixture
def photograph(trained):
    """A drawing of the dataset that the model was trained on."""
    return sorted((trained[0] / "data/sample/Images").iterdir())[0]


@pytest.fixture
def opened(browser, service):  # noqa: F811
    """Opens the page, which keeps what it sends.

    Afterwards the console must have nothing but what the test took out.
    """
    complaints, contexts = [], []

    def open_page(routes=None, **options):
        options = {"reduced_motion": "reduce", "viewport": {"width": 1440, "height": 900}} | options
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.add_init_script(KEEP_FIELDS)
        for path, answer in (routes or {}).items():
            page.route(f"**/{path}", answer)
        page.goto(service)
        page.complaints = complaints
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def upload(page, path):
    """Choose a file; returns the words once they are there."""
    page.set_input_files("#choose", path)
    page.locator("#result").wait_for()
    return page.locator(".word")


def pixels(page, selector="#frame"):
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"))


def chance_of(text):
    """What "12%", "1 in 4,300" and "1 in 1.2 million" mean."""
    if text == "less than 1 in a trillion":
        return 0
    if text.endswith("%"):
        return float(text[:-1]) / 100
    number, _, unit = text.removeprefix("1 in ").replace(",", "").partition(" ")
    units = ["", "thousand", "million", "billion", "trillion"]
    return 1 / (float(number) * 1000 ** units.index(unit))


def forget(complaints, text):
    """Take out what the browser itself says of a fault, once."""
    (index,) = [i for i, complaint in enumerate(complaints) if text in complaint]
    del complaints[index]


# ----------------------------------------------------------------------------------------------- as files


def test_the_page_is_light_and_has_nothing_from_elsewhere():
    texts = {path.name: path.read_text("utf-8") for path in PARTS.iterdir()}
    assert sum(len(text.encode()) for text in texts.values()) < 100_000
    addresses = re.findall(
        r"(?:https?:)?//[\w.]+",
        "".join(re.sub(r"\s// .*|^// .*", "", t, flags=re.M) for t in texts.values()),
    )
    assert addresses == ["http://www.w3.org"]  # the icon's namespace, which nobody fetches
    html = texts["index.html"]
    assert not re.search(r"\sstyle=|<style|\son\w+=|javascript:", html)
    scripts = re.findall(r"<script[^>]*>\s*</script>|<script", html)
    assert scripts == ['<script type="module" src="page.js"></script>']


def test_every_control_has_a_label_and_every_reference_a_target():
    elements = Page((PARTS / "index.html").read_text("utf-8")).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    inputs = {attributes["id"] for tag, attributes in elements if tag == "input"}
    assert inputs == {attributes["for"] for tag, attributes in elements if tag == "label"}
    pointed = [
        value
        for _, attributes in elements
        for name, value in attributes.items()
        if name in ("aria-labelledby", "for")
    ]
    assert set(pointed) <= set(ids)
    assert ("html", {"lang": "en"}) in elements


# --------------------------------------------------------------------------------------------- a caption


def test_a_picture_gets_the_service_s_caption(opened, photograph, service):
    page = opened()
    words = upload(page, photograph)
    asked = page.request.post(
        f"{service}predict",
        multipart={"file": {"name": "a.png", "mimeType": "image/png", "buffer": photograph.read_bytes()},
                   "algorithm": "beam", "beam_size": "5", "num_captions": "5", "attention": "true"},
    ).json()  # fmt: skip
    best = asked["captions"][0]
    assert words.all_inner_texts() == best["words"] and best["caption"]
    assert page.locator("#announcement").inner_text() == f"Caption: {best['caption']}"
    assert page.locator("#photograph").get_attribute("alt") == best["caption"]
    listed = page.locator(".alternative").all_inner_texts()
    assert len(listed) == len(asked["captions"]) == 5
    for text, each in zip(listed, asked["captions"], strict=True):
        caption, chance = text.split("\n")[0], text.split("\n")[-1]
        assert caption == each["caption"]
        assert chance_of(chance) == pytest.approx(np.exp(each["log_prob"]), rel=0.06, abs=1e-12)
    second = asked["captions"][1]
    page.locator(".alternative").nth(1).click()
    assert page.locator(".word").all_inner_texts() == second["words"]
    pressed = page.locator(".alternative[aria-pressed=true]")
    assert pressed.count() == 1 and second["caption"] in pressed.inner_text()


def test_a_word_that_is_hovered_focused_or_chosen_shows_its_map(opened, photograph):
    page = opened()
    words = upload(page, photograph)
    note, whole = page.locator("#note"), pixels(page)
    assert "from the picture" in note.inner_text() and words.count() >= 3

    def lit():
        return words.evaluate_all(
            "each => each.flatMap((w, i) => w.className.includes('on') ? [i] : [])"
        )

    words.nth(0).hover()
    first = pixels(page)
    assert lit() == [0] and np.abs(first.astype(int) - whole).mean() > 5
    assert note.inner_text().startswith(f"“{words.nth(0).inner_text()}”: ")
    assert re.search(r"\d+% from the picture, .+; \d+% from language", note.inner_text())
    page.locator("h1").hover()
    assert lit() == [] and (pixels(page) == whole).all()
    words.nth(0).locator("input").focus()
    assert lit() == [0] and (pixels(page) == first).all()
    page.keyboard.press("ArrowRight")
    assert lit() == [1]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert lit() == [1]
    page.locator("h1").click()  # the one that is chosen stays
    assert lit() == [1]
    page.keyboard.press("Escape")
    assert lit() == [] and (pixels(page) == whole).all()


def test_maps_are_those_of_the_pictures(opened):
    """attention_visualization has the same interpolation and brightness."""
    weights = np.random.default_rng(0).dirichlet(np.full(12, 0.3), size=3)  # (T, h * w)
    language = np.array([0.25, 0.5, 0.0])
    attention = {
        "grid": [3, 4],
        "maps": weights.tolist(),
        "beside": {"language": language.tolist()},
    }
    page = opened()
    light = page.evaluate(
        "async (attention) => (await import('./maps.js')).lightOfWords(attention).map((each) => [...each])",
        attention,
    )
    weights *= 1 - language[:, None]
    full = np.clip(weights.max(), *(min(1, times / 12) for times in pictures.FULL))
    expected = [
        pictures.brightness(pictures.upsample_map(each, (96, 96)), 1 / 12, full)
        for each in weights.reshape(3, 3, 4)
    ]
    assert np.array(light).reshape(3, 96, 96) == pytest.approx(np.array(expected), abs=1e-5)


@pytest.mark.parametrize(
    "peak, place",
    [
        (0, "mostly at the top left"),
        (5, "mostly in the middle"),
        (11, "mostly at the bottom right"),
        (None, "nowhere in particular"),
    ],
)
def test_where_a_word_looked_is_said(opened, peak, place):
    weights = np.full(12, 1 / 12) if peak is None else 0.5 * np.eye(12)[peak] + 0.5 / 12
    attention = {"grid": [3, 4], "maps": [weights.tolist()], "beside": {}}
    script = "async (attention) => (await import('./maps.js')).placeOfLight(attention, 0)"
    assert opened().evaluate(script, attention) == place


def test_the_words_are_played_unless_motion_is_unwelcome(opened, photograph):
    """Once, for less than five seconds, until the person does something."""
    page = opened(reduced_motion="no-preference")
    words = upload(page, photograph)
    third, lit = page.locator(".word:nth-of-type(3).on"), page.locator(".word.on")
    third.wait_for()
    lit.wait_for(state="detached", timeout=6000)
    page.click("#play")
    third.wait_for()
    words.last.hover()
    page.wait_for_timeout(600)
    assert "on" in words.last.get_attribute("class").split()
    assert page.locator(".word.on").count() == 1


def test_the_figure_can_be_kept(opened, photograph, tmp_path):
    page = opened()
    words = upload(page, photograph)
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "figure.png")
    caption = page.locator("#photograph").get_attribute("alt")
    assert download.value.suggested_filename == caption.replace(" ", "_") + ".png"
    figure = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(int)
    assert figure.shape[1] == 1600 and (figure[0] == 255).all()
    colour = np.asarray(Image.open(photograph).convert("RGB")).mean((0, 1))
    assert np.abs(figure[72:200, 72:200].mean() - colour.mean()) < 60  # the photograph is there
    below = figure[figure.shape[0] // 2 :]
    bars = (np.abs(below - (10, 98, 196)).sum(-1) < 3).any(1).sum()
    assert words.count() and bars >= 5  # what each word took from the picture


# ------------------------------------------------------------------------------------ ways in, and searches


def test_a_picture_can_be_pasted_or_dropped(opened, photograph):
    page = opened()
    for kind in ("paste", "drop"):
        with page.expect_response("**/predict") as answer:
            page.evaluate(DROP, [kind, "a.png", list(photograph.read_bytes())])
        assert answer.value.ok
        page.locator("#result").wait_for()
    page.evaluate(DROP, ["drop", None, []])
    assert page.get_by_role("alert").inner_text().startswith("That was no file")
    assert page.locator("#result").is_hidden()


def test_phones_offer_the_camera(opened):
    camera = "#shoot[capture=environment][accept='image/*']"
    assert opened(has_touch=True, is_mobile=True).locator(f"{camera} + label").is_visible()
    assert not opened().locator(f"{camera} + label").is_visible()


def test_only_what_the_search_takes_is_shown_and_sent(opened, photograph):
    page = opened()
    upload(page, photograph)

    def sent_by(act):
        with page.expect_response("**/predict") as answer:
            act()
        assert answer.value.ok
        return page.evaluate("window.sent.at(-1)"), answer.value.json()["captions"]

    fields, captions = sent_by(page.locator("label[for=sample]").click)
    assert fields == {
        "algorithm": "sample", "attention": "true", "temperature": "1", "top_k": "0", "top_p": "1", "num_captions": "3",
    }  # fmt: skip
    assert len(captions) == 3 and page.get_by_label("Temperature").is_visible()
    assert not page.get_by_label("Beam size").is_visible()
    assert sent_by(page.get_by_role("button", name="Draw again").click)[0] == fields
    fields, captions = sent_by(page.locator("label[for=greedy]").click)
    assert fields == {"algorithm": "greedy", "attention": "true"} and len(captions) == 1
    page.locator("#others").wait_for(state="hidden")
    assert not page.get_by_label("Temperature").is_visible()
    sent_by(page.locator("label[for=beam]").click)
    fields, captions = sent_by(lambda: page.get_by_label("Beam size").fill("2"))
    assert fields["beam_size"] == fields["num_captions"] == "2" and len(captions) == 2


def test_a_model_that_was_tuned_for_a_full_beam_is_asked_for_one(opened, photograph, service):
    with urllib.request.urlopen(service + "model/info") as answer:
        info = json.load(answer)
    info["decoding"] |= {"algorithm": "full_beam", "beam_size": 3}
    page = opened({"model/info": lambda route: route.fulfill(json=info)})
    upload(page, photograph)
    fields = page.evaluate("window.sent.at(-1)")
    assert (fields["algorithm"], fields["beam_size"], fields["num_captions"]) == (
        "full_beam",
        "3",
        "3",
    )
    assert page.get_by_label("Beam size").is_visible()


# ------------------------------------------------------------------------------------------- what goes wrong


def test_what_is_no_picture_is_said_to_be_none(opened, photograph, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    page = opened()
    upload(page, photograph)
    page.set_input_files("#choose", tmp_path / "text.png")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert re.match(r"[A-Z].+\.$", alert.inner_text()) and "text.png" not in alert.inner_text()
    assert page.locator("#result").is_hidden() and page.locator("#retry").is_hidden()
    upload(page, photograph)
    assert alert.count() == 0
    forget(page.complaints, "status of 4")


def test_a_picture_that_only_the_service_can_read_is_captioned(opened, tmp_path):
    page = opened()
    words = upload(page, save_image(tmp_path / "a.tif", quarters()))
    assert (
        words.count() and page.locator("#unseen").inner_text() == "This browser cannot show a.tif."
    )
    assert page.locator("#frame").is_hidden()


def test_a_busy_service_is_asked_again(opened, photograph):
    busy = {"status": 503, "headers": {"Retry-After": "2"}, "json": {"error": "too many requests"}}
    page = opened({"predict": lambda route: route.fulfill(**busy)})
    page.set_input_files("#choose", photograph)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.locator("p").inner_text() == "Too many requests. Wait 2 s."
    page.unroute("**/predict")
    page.get_by_role("button", name="Try again").click()
    page.locator("#result").wait_for()
    assert alert.count() == 0
    forget(page.complaints, "status of 503")


def test_a_service_that_is_gone_is_said_to_be(opened, photograph):
    page = opened({"predict": lambda route: route.abort()})
    page.set_input_files("#choose", photograph)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "cannot be reached" in alert.inner_text()
    forget(page.complaints, "ERR_FAILED")


@pytest.mark.parametrize("body", ['{"captions": [{"capt', ""])
def test_an_answer_that_breaks_off_is_said_to_be_none(opened, photograph, body):
    """Not shown, and the caption of the picture before is not shown either."""
    page = opened()
    upload(page, photograph)
    page.route("**/predict", lambda route: route.fulfill(status=200, body=body))
    page.set_input_files("#choose", photograph)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "answered 200, and not why" in alert.inner_text()
    assert page.locator("#result").is_hidden()
    page.unroute("**/predict")
    page.get_by_role("button", name="Try again").click()
    page.locator("#result").wait_for()


def test_a_picture_waits_for_the_model(opened, photograph):
    loading = [{"ready": False, "fault": None}, {"ready": False, "fault": "no such version"}]

    def answer(route):
        route.fulfill(json=loading.pop(0)) if loading else route.continue_()

    page = opened({"model/info": answer})
    assert page.locator("#model").inner_text() == "The model is loading"
    page.set_input_files("#choose", photograph)
    assert page.locator("#progress").inner_text() == "Waiting for the model"
    page.get_by_text("No such version.").wait_for()
    page.locator("#result").wait_for()
    assert page.locator("#model").inner_text() == "Ready · shufflenet_v2_x0_5 · attention"


def test_a_model_without_attention_has_plain_captions(opened, photograph):
    caption = {
        "caption": "a <b>dog</b>",
        "log_prob": -1.0,
        "words": ["a", "<b>dog</b>"],
        "attention": None,
    }
    answer = {"captions": [caption], "processing_time_seconds": 1.25, "image_size": [3, 2]}
    page = opened({"predict": lambda route: route.fulfill(json=answer)})
    upload(page, photograph)
    assert page.locator("#caption").inner_text() == "a <b>dog</b>"
    assert "no attention" in page.locator("#note").inner_text()
    assert (
        page.locator("#facts")
        .inner_text()
        .startswith("Written in 1.3 s. The picture has 3 \u00d7 2")
    )
    assert page.locator("#play").is_hidden() and page.locator(".word").count() == 0


# ------------------------------------------------------------------------------------------------ for everyone


@pytest.mark.parametrize("width", [320, 390, 1440])
def test_no_width_needs_a_horizontal_scroll(opened, photograph, width):
    page = opened(viewport={"width": width, "height": 844}, has_touch=width < 700)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    words = upload(page, photograph)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width < 700:
        words.nth(1).locator("label").tap()
        assert "on" in words.nth(1).get_attribute("class").split()
        page.locator("#frame").tap()
        assert page.locator(".word.on").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened, photograph, tmp_path, scheme):
    """4.5 to 1, as WCAG 2.2 asks at level AA."""
    (tmp_path / "text.png").write_text("no picture")
    page = opened(color_scheme=scheme)
    checked = page.evaluate(CONTRAST)
    upload(page, photograph).nth(1).hover()
    checked += page.evaluate(CONTRAST)
    page.set_input_files("#choose", tmp_path / "text.png")
    page.get_by_role("alert").wait_for()
    checked += page.evaluate(CONTRAST)
    forget(page.complaints, "status of 4")
    assert len(checked) > 40 and [pair for pair in checked if pair[1] < 4.5] == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(opened, photograph):
    page = opened()
    upload(page, photograph)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    outlined = """() => {
        const each = document.activeElement;
        const shown = each.matches(".choice input, .segments input, .word input") ? each.nextElementSibling : each;
        return [each.id || each.className || each.textContent, getComputedStyle(shown).outlineStyle];
    }"""
    reached = []
    while not reached or reached[-1][0] != "its numbers":
        page.keyboard.press("Tab")
        reached.append(page.evaluate(outlined))
        assert len(reached) < 40
    names = [name for name, _ in reached]
    expected = ["choose", "word-0", "play", "download", *5 * ["alternative"], "beam", "beam_size"]
    assert names == [*expected, "the interface", "the model", "its numbers"]
    assert {style for _, style in reached} == {"solid"}


def test_a_screen_reader_is_told_what_each_part_is(opened, photograph):
    page = opened()
    words = upload(page, photograph)
    for role, name in (
        ("heading", "A picture, in words"), ("region", "Picture"), ("region", "Caption"), ("group", "Search"),
        ("region", "How it chooses words"), ("group", "Where the model looked for each word"),
        ("radio", "Beam"), ("slider", "Beam size"), ("button", "Download figure"), ("list", "What it could have said"),
    ):  # fmt: skip
        assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    assert page.get_by_role("radio", name=words.nth(0).inner_text(), exact=True).count() >= 1
    live = page.locator("[aria-live=polite], [role=status]")
    assert live.evaluate_all("all => all.map((each) => each.id)") == LIVE
    assert page.get_by_label("Beam size").get_attribute("aria-valuetext") == "5"
    veil = page.locator("#veil")
    assert veil.get_attribute("aria-hidden") == "true"

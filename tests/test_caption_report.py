"""caption_report.py: the page of a run's folder, whole, in part, damaged and hostile; and in a browser."""

import base64
import html.parser
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caption_report
from caption_decoding import Hypothesis
from caption_report import choose, grouped, paired_difference, write_report
from checkpoints import write_json

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> & 'more'"
WORDS = ["a", "red", "dog"]
RUN = "saved_models/sample/vgg11_attention/sample_attention_ep2_20260102_030405"
FILES = (
    "run_config",
    "loss_curve",
    "metrics_history",
    "test_metrics",
    "test_captions",
    "test_examples",
)
CONFIG = {
    "dataset_type": "sample", "decoder_type": "attention", "attention": "adaptive", "encoder": "vgg11",
    "epochs": 2, "learning_rate": 0.003, "use_scheduler": False, "timestamp": "20260102_030405",
    "git": {"commit": "0123456789abcdef"}, "command": "python flickr_image_caption.py --epochs 2",
}  # fmt: skip
LOSSES = {
    "epochs": [1, 2],
    "train_losses": [3.0, 2.0],
    "val_losses": [2.5, None],
    "learning_rates": [0.003, 0.003],
}
HISTORY = {"epochs": [1, 2], "CIDEr": [0.5, 0.25], "BLEU-4": [None, None]}
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "WER")
DETAILS = {
    "rare_recall": 0.1,
    "recall": {"0-9": {"words": 1234, "recall": 0.125}},
    "never_used": [{"word": "frisbee", "training": 4321, "images": 7}],
    "unsupported": {"nouns": None, "colours": {"captions": 0.375, "words": 0.5, "written": 8}},
    "by_length": {"0-7": {"images": 12} | dict.fromkeys(NAMES, 0.5)},
}


def test_scores(cider=0.5, images=12):
    """What a test's JSON holds."""
    values = dict.fromkeys(NAMES, 0.25) | {"CIDEr": cider}
    return values | {
        "intervals": {name: [value - 0.1, value + 0.1] for name, value in values.items()},
        "caption_length": 3.0, "vocabulary_used": 1500, "share_unique": 0.5, "details": DETAILS,
        "decoding": {"algorithm": "beam", "beam_size": 5}, "rerank": None, "foreign_dataset": None,
        "dataset_type": "sample", "split": "test", "images": images, "duller": None,
    }  # fmt: skip


test_scores.__test__ = False  # it is none


def rows_of(ciders, caption="a red dog"):
    """A captions file's rows of 0.png, 1.png, ..."""
    return [
        {"file_name": f"{number}.png", "caption": caption}
        | dict.fromkeys(NAMES[3:], 0.5)
        | {"CIDEr": cider}
        for number, cider in enumerate(ciders)
    ]


def captioner(beside=("language",)):
    """As far as words and maps go, of a grid of 2 x 3 cells: each row of attention is cells, then beside."""

    def beside_of(hypothesis):
        columns = hypothesis.attention[:, 6:].T.numpy()
        return dict(zip(beside, columns, strict=True))

    def grid(hypothesis):
        cells = hypothesis.attention[:, :6]
        return (cells / cells.sum(1, keepdim=True)).reshape(-1, 2, 3).numpy()

    return SimpleNamespace(
        vocabulary=SimpleNamespace(decode=lambda tokens: " ".join(tokens)),
        words=lambda hypothesis: hypothesis.tokens,
        attention_grid=grid,
        attention_beside=beside_of,
    )


def hypothesis(words=WORDS, attention="by cell"):
    """Word t looks at cell t with 3 / 4, at language with 1 / 4."""
    if attention is not None:
        attention = 0.75 * torch.eye(7)[torch.arange(len(words)) % 6] + 0.25 * torch.eye(7)[6]
    return Hypothesis(list(words), -1.0, -1.0, True, attention)


def write_run(folder, *, names=None, words=WORDS, references="A dog.", ciders=None, **how):
    """A run's folder with all files and its page."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rows = rows_of(ciders or np.linspace(0, 2, 12).tolist(), " ".join(words))
    for row, name in zip(rows, names or (), strict=False):
        row["file_name"] = name
    contents = (CONFIG, LOSSES, HISTORY, test_scores(images=len(rows)), rows)
    for name, content in zip(FILES, contents, strict=False):
        write_json(folder / f"{name}.json", content)
    paths = [folder.parent / f"{number}.png" for number in range(len(rows))]
    for number, path in enumerate(paths):
        Image.new("RGB", (60, 40), (20 * number, 90, 160)).save(path)
    table = pd.DataFrame(
        {"image": [row["file_name"] for row in rows], "captions": [[references] * 7] * len(rows)}
    )
    chosen = choose(rows)
    hypotheses = [hypothesis(words, **how) for _ in chosen]
    caption_report.report(
        folder, captioner(), "test", table, paths, hypotheses, "attention", chosen
    )
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with one run, made once."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / RUN)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / RUN, tmp_path / RUN))


class Page(html.parser.HTMLParser):
    """The elements of a page, [(tag, attributes)], and its text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open not in ("style", "script"):
            self.words.append(data)


def read_page(folder):
    return Page((folder / "report.html").read_text("utf-8"))


def attributes(page, name):
    return [attrs[name] for _, attrs in page.elements if name in attrs]


# --------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    "number, best, median, worst, first",
    [
        (1, [0], [], [], []),
        (2, [1], [], [0], []),
        (5, [4], [2], [0], [1, 3]),
        (20, [19, 18, 17, 16], [11, 10, 9, 8], [0, 1, 2, 3], [4, 5, 6, 7]),
    ],
)
def test_the_captions_that_are_chosen(number, best, median, worst, first):
    """Rows of rising CIDEr: none comes twice."""
    rows = rows_of([0.1 * row for row in range(number)])
    assert grouped(rows) == {"best": best, "median": median, "worst": worst, "first": first}
    assert choose(rows) == [*best, *median, *worst, *first]


def test_ties_of_cider_go_by_bleu():
    rows = rows_of([1.0, 1.0, 1.0])
    rows[2]["BLEU-4"] = 0.9
    assert grouped(rows)["best"] == [2] and grouped(rows)["worst"] == [1]


def test_a_page_of_everything(run, capsys):
    page = read_page(run)
    assert json.loads((run / "test_examples.json").read_text())["method"] == "attention"
    for text in (
        "vgg11, adaptive attention", "Started 2026-01-02 03:04", "Commit 0123456789", "0.500", "[0.400, 0.600]",
        "beam search of 5", "1,500", "1 of 12 by CIDEr", "frisbee 4,321 7", "0\u20139 1,234 12.5%", "colours 8 37.5%",
        "Learning rate 0.003", "python flickr_image_caption.py --epochs 2", "and 2 more",
        "The dotted line is the best epoch, 1,", "epoch 1: 2.5", "No earlier run",
    ):  # fmt: skip
        assert text in page.text, text
    assert "Not everything" not in page.text and "nouns" not in page.text
    titles = [
        attrs["aria-label"]
        for tag, attrs in page.elements
        if tag == "svg" and "aria-label" in attrs
    ]
    assert [title.split(" over")[0] for title in titles[-3:]] == ["Loss", "CIDEr", "Learning rate"]
    assert (
        attributes(page, "data-note")[0] == "\u201ca\u201d: 75% from the picture, 25% from language"
    )


def test_a_word_s_picture_darkens_what_it_did_not_look_at(run):
    """The uniform weight is dimmed as the attention pictures are, the caption's largest not at all."""
    veils = attributes(read_page(run), "data-veil")
    red = Image.open(io.BytesIO(base64.b64decode(veils[1])))  # which looked at cell 1 of 2 x 3
    assert red.size == (48, 48) and red.mode == "LA"
    alpha = np.asarray(red)[..., 1]
    assert alpha[12, 24] <= 2 and alpha[36, 24] == alpha[12, 8] == round(255 * 0.6)
    assert (np.asarray(red)[..., 0] == 0).all()


def test_maps_keep_the_share_that_the_cells_got():
    example = caption_report.example(captioner(), "a.png", ["A dog."], b"", (60, 40), hypothesis())
    assert example["largest_weight"] == 0.75 and example["beside"] == {"language": [0.25] * 3}
    cells = [list(base64.b64decode(each)) for each in example["maps"]]
    assert cells == (255 * np.eye(6)[:3]).tolist() and example["grid"] == [2, 3]


def test_a_decoder_without_attention_has_captions_without_words_to_choose(tmp_path):
    page = read_page(write_run(tmp_path / RUN, attention=None))
    assert "has no attention maps" in page.text and attributes(page, "data-veil") == []
    assert "a red dog" in page.text and "data:image/jpeg" in attributes(page, "href")[0]


def test_a_run_that_is_not_tested_shows_a_sample(run):
    """Training leaves val_examples.json."""
    for name in ("metrics", "captions"):
        (run / f"test_{name}.json").unlink()
    (run / "test_examples.json").rename(run / "val_examples.json")
    _, notes = write_report(run)
    page = read_page(run)
    assert (
        notes == [] and "Not yet tested." in page.text and len(attributes(page, "data-veil")) == 36
    )
    assert "Scores" not in page.text


def test_captions_of_an_earlier_test_are_not_shown_with_these_scores(run):
    rows = json.loads((run / "test_captions.json").read_text())
    rows[0]["caption"] = "another caption"
    write_json(run / "test_captions.json", rows)
    write_report(run)
    page = read_page(run)
    assert "another caption" in page.text and len(attributes(page, "data-veil")) == 33


# ----------------------------------------------------------------------------------- the run before it


def earlier_run(run, stamp, cider, **changed):
    """Another run of that time, tested on the same images unless `changed` says otherwise."""
    folder = run.parents[1] / "vgg11_lstm" / f"sample_lstm_ep2_{stamp}"
    folder.mkdir(parents=True)
    write_json(folder / "test_metrics.json", test_scores(cider) | changed)
    rows = json.loads((run / "test_captions.json").read_text())
    rows = [row | {"CIDEr": row["CIDEr"] - 0.25} for row in rows]
    write_json(folder / "test_captions.json", rows)
    return folder.name


def test_scores_stand_beside_the_best_earlier_run_of_the_same_images(run):
    earlier_run(run, "20260101_000000", 0.3)
    best = earlier_run(run, "20260101_000001", 0.4)
    earlier_run(run, "20260103_000000", 0.9)  # later
    earlier_run(run, "20260101_000002", 0.9, split="val")
    earlier_run(run, "20260101_000003", 0.9, images=11)
    earlier_run(run, "20260101_000004", 0.9, foreign_dataset={"left_out": 1})
    _, notes = write_report(run)
    text = read_page(run).text
    assert notes == [] and f"is {best} ." in text
    assert "CIDEr differs by +0.250 [+0.250, +0.250], paired by image: more than chance" in text
    assert "CIDEr 0.500 0.400 \u2013 0.600 0.400 +0.100 better" in text
    assert "METEOR 0.250 0.150 \u2013 0.350 0.250 +0.000 the same" in text


def test_scores_of_an_ensemble_are_said_to_be_its(run):
    best = earlier_run(run, "20260101_000000", 0.4, ensemble=["a.pt", "b.pt"])
    write_report(run)
    text = read_page(run).text
    assert f"is {best}, by an ensemble of 3 ." in text and text.count("by an ensemble") == 1
    own = json.loads((run / "test_metrics.json").read_text())
    write_json(run / "test_metrics.json", own | {"ensemble": ["a.pt"]})
    write_report(run)
    assert "beam search of 5, by an ensemble of 2." in read_page(run).text


def test_an_earlier_run_that_is_damaged_is_named_and_passed_over(run):
    best = earlier_run(run, "20260101_000000", 0.3)
    damaged = earlier_run(run, "20260101_000001", 0.4)
    for content in ("{", "[]", '{"dataset_type": "sample"}'):
        (run.parents[1] / "vgg11_lstm" / damaged / "test_metrics.json").write_text(content)
        _, notes = write_report(run)
        assert f"is {best} ." in read_page(run).text
        assert len(notes) == 1 and damaged in notes[0]


def test_a_difference_that_may_be_chance_is_called_so():
    before, after = rows_of([0.0, 1.0, 2.0, 3.0]), rows_of([1.0, 0.0, 3.0, 2.0])
    found = paired_difference(before, after)
    assert found == {"mean": "+0.000", "low": "\u22121.000", "high": "+1.000", "clear": False}
    assert paired_difference(before[:3], after) is None


# ---------------------------------------------------------------------------- missing, damaged, hostile


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_said_and_the_rest_is_shown(name, run):
    (run / f"{name}.json").unlink()
    _, notes = write_report(run)
    page = read_page(run)
    assert len(notes) == 1 and notes[0].startswith(f"{name}.json is not in the folder")
    assert notes[0] in page.text
    shown = {
        "run_config": "Commit 0123456789", "loss_curve": "epoch 1: 2.5", "metrics_history": "CIDEr, epoch 1: 0.5",
        "test_metrics": "[0.400, 0.600]", "test_captions": "1 of 12 by CIDEr", "test_examples": "and 2 more",
    }  # fmt: skip
    assert {key for key, text in shown.items() if text not in page.text} == {name}


DAMAGES = (
    "",
    "{",
    "null",
    "[]",
    "{}",
    "7",
    '"text"',
    "[[[]]]",
    '[{"CIDEr": "1"}]',
    '{"epochs": 3, "examples": [1]}',
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_is_one_line_and_the_rest_is_shown(name, run, monkeypatch):
    monkeypatch.setattr(
        caption_report, "veil_pictures", lambda example: [b""] * len(example["words"])
    )
    whole = caption_report.read_run(run)
    path = run / f"{name}.json"

    def check(damage):
        found = caption_report.read_run(run)
        (note,) = found["notes"]
        assert note.startswith(f"{name}.json is damaged"), damage
        assert "\n" not in note and len(note) < 250
        kept = [
            part for part in ("heading", "scores", "groups", "charts") if found[part] == whole[part]
        ]
        assert len(kept) >= 2, damage
        assert "is damaged" in Page(caption_report.render(found)).text

    for damage in DAMAGES:
        path.write_text(damage)
        check(damage)
    path.write_bytes(b"\xff\x00" * 100)
    check("binary")
    path.unlink()
    path.mkdir()
    check("a folder")


@pytest.mark.parametrize(
    "key, value",
    [("photograph", "???"), ("size", [0, 40]), ("size", [1e9, 40]), ("maps", ["AAAA"] * 3), ("grid", [2**40, 3]),
     ("beside", {"language": [0.5]}), ("words", None), ("largest_weight", "x")],
)  # fmt: skip
def test_an_example_that_is_damaged_leaves_the_captions(key, value, run):
    examples = json.loads((run / "test_examples.json").read_text())
    examples["examples"][0][key] = value
    write_json(run / "test_examples.json", examples)
    _, notes = write_report(run)
    page = read_page(run)
    assert len(notes) == 1 and "test_examples.json is damaged" in notes[0]
    assert "1 of 12 by CIDEr" in page.text and attributes(page, "data-veil") == []


def test_what_files_hold_is_text_and_never_markup(tmp_path):
    names = [f"{HOSTILE} {number}.png" for number in range(12)]
    folder = write_run(
        tmp_path / RUN, names=names, words=[HOSTILE, "</script><b>"], references=HOSTILE
    )
    tags = [tag for tag, _ in read_page(folder).elements]
    write_json(
        folder / "run_config.json",
        {key: f"{HOSTILE}{key}" for key in CONFIG} | {"git": {"commit": HOSTILE}},
    )
    details = DETAILS | {"never_used": [{"word": HOSTILE, "training": 1, "images": 1}]}
    write_json(
        folder / "test_metrics.json", test_scores() | {"details": details, "dataset_type": HOSTILE}
    )
    write_report(folder)
    page = read_page(folder)
    assert {"img", "b"} & {tag for tag, _ in page.elements} == set() and "script" in tags
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert page.text.count(HOSTILE) > 50
    plain = tmp_path / "plain" / RUN
    assert tags == [tag for tag, _ in read_page(write_run(plain, words=["a", "b"])).elements]


def test_the_policy_allows_this_style_and_script_and_nothing_from_elsewhere(run):
    text = (run / "report.html").read_text("utf-8")
    policy = next(attrs["content"] for tag, attrs in Page(text).elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = caption_report.hashlib.sha256(content.encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    page = Page(text)
    assert attributes(page, "style") == [] and attributes(page, "src") == []
    assert all(link.startswith("data:image/") for link in attributes(page, "href"))
    assert "://" not in text


def test_the_largest_photographs_stay_below_the_limit(tmp_path):
    """Noise is what JPEG compresses least, and the page has 16 photographs at most."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8))
    jpeg, size = caption_report.small_jpeg(noise)
    assert len(jpeg) <= caption_report.PHOTOGRAPH_BYTES and 160 <= size[0] <= 640
    assert Image.open(io.BytesIO(jpeg)).size == size and size[0] * 3 == size[1] * 4
    assert caption_report.small_jpeg(Image.new("RGB", (1200, 900)))[1] == (640, 480)
    groups = len(caption_report.GROUPS) * caption_report.EACH
    assert groups * caption_report.PHOTOGRAPH_BYTES * 4 / 3 < caption_report.MAX_PAGE_BYTES / 2


def test_a_page_that_is_too_long_is_not_written(run):
    rows = json.loads((run / "test_captions.json").read_text())
    write_json(run / "test_captions.json", [row | {"caption": "a" * 10**6} for row in rows])
    before = (run / "report.html").read_bytes()
    with pytest.raises(ValueError, match=r"report\.html: would be larger than 5 MB"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


# ---------------------------------------------------------------------------- the command, the program


def test_the_command_makes_the_page_again(run, capsys):
    (run / "report.html").unlink()
    (run / "test_metrics.json").write_text("{")
    caption_report.main([str(run)])
    out, err = capsys.readouterr()
    assert (run / "report.html").exists() and out.endswith(f"written: {run / 'report.html'}\n")
    assert err.count("\n") == 1 and "test_metrics.json is damaged" in err


def test_a_folder_of_no_run_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as stop:
            caption_report.main([str(folder)])
        err = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and err.count("\n") == 1
            and f"{folder}: not the folder of a run" in err
        )
    assert list(tmp_path.iterdir()) == []


def test_training_and_test_write_it_and_no_fault_of_it_stops_them(shop, monkeypatch):
    """Made of the program's own files; with a fault, status and other files are as without."""
    from test_end_to_end import ATTENTION, program, train

    folder = train(ATTENTION)
    page = read_page(folder)
    assert "Not yet tested." in page.text and "Not everything" not in page.text
    assert len([tag for tag, _ in page.elements if tag == "article"]) == caption_report.EACH
    test = ("--mode test --model_path", folder / "best.pt")
    outcome = program(*test)
    page = read_page(folder)
    assert f"report: {folder / 'report.html'}\n" in outcome.out and outcome.status == 0
    assert "4 images of sample" in page.text and "Not everything" not in page.text
    scores = json.loads((folder / "test_metrics.json").read_text())
    assert f"{scores['CIDEr']:.3f}" in page.text
    examples = json.loads((folder / "test_examples.json").read_text())["examples"]
    rows = json.loads((folder / "test_captions.json").read_text())
    captions = {row["file_name"]: row["caption"] for row in rows}
    assert {each["file_name"]: each["caption"] for each in examples} == captions
    assert all(len(each["maps"]) == len(each["words"]) for each in examples)

    def fail(_run):
        raise RuntimeError("a fault\nof the report")

    monkeypatch.setattr(caption_report, "render", fail)
    shutil.copytree(folder, "again")
    outcome = program("--mode test --model_path again/best.pt")
    assert outcome.status == 0 and Path("again/report.html").exists()
    assert "warning: no report.html: RuntimeError: a fault of the report\n" in outcome.err


# ------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def browser():
    """The system's chromium, driven by Playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not found:
        pytest.skip("no chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_words_show_their_maps_in_a_browser(browser, tmp_path):
    """By mouse, keyboard and touch; hostile captions run nothing; no page is wider than a phone."""
    folder = write_run(tmp_path / RUN, words=["a", HOSTILE, "dog"], references=HOSTILE)
    earlier_run(folder, "20260101_000000", 0.4)  # whose table is the widest
    write_report(folder)
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((folder / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    first = page.locator(".card").first
    words, veil, share = first.locator(".word"), first.locator(".veil"), first.locator(".share")
    veils = words.evaluate_all("words => words.map(word => word.dataset.veil)")

    def shown():
        lit = "on" in veil.get_attribute("class").split()
        return veils.index(veil.get_attribute("href").partition(",")[2]) if lit else None

    assert words.nth(1).inner_text() == HOSTILE and len(set(veils)) == 3
    assert veil.get_attribute("href") is None
    words.nth(0).hover()
    assert shown() == 0 and share.inner_text().startswith("\u201ca\u201d: 75% from the picture")
    words.nth(2).hover()
    assert shown() == 2
    first.locator("h3, .references").first.hover()
    assert shown() is None and share.inner_text().startswith("Over the whole caption")
    words.nth(0).locator("input").focus()
    assert shown() == 0
    page.keyboard.press("ArrowRight")
    assert shown() == 1
    page.keyboard.press("ArrowLeft")
    assert shown() == 0
    page.keyboard.press("Escape")
    assert shown() is None
    words.nth(2).locator("label").tap()
    assert shown() == 2
    assert first.locator("image").first.evaluate("image => image.getBBox().width") == 60
    assert complaints == [] and page.title() == "vgg11, adaptive attention \u00b7 run report"


def test_settings_that_few_runs_have_are_shown_where_they_were_asked_for():
    asked = {"fine_tune_encoder": 3, "glove_path": "vectors.txt", "seed": 0}
    labels = dict(caption_report.settings(asked)["rows"])
    assert labels["Encoder blocks that learn"] == 3 and labels["Word vectors"] == "vectors.txt"
    unasked = {"fine_tune_encoder": 0, "glove_path": None, "distill_from": [], "seed": 0}
    assert [label for label, _ in caption_report.settings(unasked)["rows"]] == ["Seed", "Schedule"]

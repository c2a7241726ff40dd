"""What the documentation names is there: files, flags, commands, messages; and imports go one way, as its map says."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import caption_options

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING, DOCS = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs"
LOG = DOCS / "LOG.md"  # of the past: it names what is gone
PAGES = sorted({README, CONTRIBUTING, *DOCS.glob("*.md")} - {LOG})
ROOMS = {path.stem: path for path in ROOT.glob("*.py")}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Flags of other commands that the pages name, and ours of download_datasets.py, metrics_utils.py, benchmark.py.
OTHER_FLAGS = {
    "torchrun": "standalone nproc_per_node nnodes node_rank rdzv_backend rdzv_endpoint",
    "pip": "index-url",
    "hf": "local-dir",
    "ruff": "check",
    "tensorboard": "logdir",
    "download_datasets.py": "dataset data_dir entities force verify_only coco_year max_images",
    "metrics_utils.py": "references hypotheses",
    "benchmark.py": "quick json chart images encoder encoder_weights number rounds num_workers scale scale_dir"
    " train_images",
    "kaggle_setup.py": "output root working flickr_dataset glove_dataset",
    "model_versions.py": "version registry description run_id hub_private",
    "caption_service.py": "host port workers",
    "benchmark_service.py": "pictures clients seconds",
}
OUR_FILE = re.compile(
    r"`((?:docs|tests)/[\w./-]+|\w+\.(?:py|sh|cff)|\.[\w.-]+\.yaml|requirements[\w-]*\.txt)`"
)


def code_blocks(page, language=r"\w*"):
    """The contents of a page's fenced blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    """Arguments of every call of the program in a page's bash blocks, its shell variables filled in."""
    for block in code_blocks(page, "bash"):
        variables = {}
        for line in assignments_apart(block.replace("\\\n", " "), variables):
            for name, value in reversed(variables.items()):
                line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
            words = shlex.split(re.sub(r"\$\{?\w+\}?", "VALUE", line), comments=True)
            if "flickr_image_caption.py" in words:
                yield words[words.index("flickr_image_caption.py") + 1 :]


def assignments_apart(block, variables):
    """The block's lines without `name="value"`, which `variables` collects."""

    def collect(match):
        variables[match[1]] = " ".join(match[2].split())
        return ""

    return re.sub(r'^(\w+)="([^"]*)"', collect, block, flags=re.MULTILINE).splitlines()


def imported_rooms(path):
    """Names of the rooms that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from ROOMS.keys() & set(names)


def test_the_readme_is_one_that_a_visitor_reads_to_its_end():
    assert len(README.read_text().splitlines()) <= 165


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def anchors(page):
    """What links may name after `#`: headings as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_an_anchor_is_spelt_as_github_spells_it(tmp_path):
    (tmp_path / "page.md").write_text("# 300 `--x`, and one's own\n```\n# no heading\n```\n")
    assert anchors(tmp_path / "page.md") == {"300---x-and-ones-own"}


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=lambda page: page.name)
def test_links_lead_to_headings_that_are_there(page):
    links = re.findall(r"\]\(([^)#]*\.md)?#([^)]+)\)", page.read_text())
    targets = [(page.parent / name if name else page, anchor) for name, anchor in links]
    assert [(path.name, name) for path, name in targets if name not in anchors(path)] == []


@every_page
def test_files_that_are_named_exist(page):
    named = OUR_FILE.findall(page.read_text())
    places = (ROOT, ROOT / "tests")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@every_page
def test_flags_that_are_named_exist(page):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text()))
    aliases = {option.alias for option in caption_options.TABLE.values()}
    others = {flag for flags in OTHER_FLAGS.values() for flag in flags.split()}
    assert named - caption_options.TABLE.keys() - aliases - others - {"help"} == set()


@pytest.mark.parametrize("command", [name for name in OTHER_FLAGS if name.endswith(".py")])
def test_flags_of_our_other_commands_are_in_their_parsers(command):
    source = (ROOT / command).read_text()
    assert [flag for flag in OTHER_FLAGS[command].split() if f'"--{flag}"' not in source] == []


NUMBER_OF_COMMANDS = {
    "README.md": 9,
    "DATA.md": 2,
    "EXPERIMENTS.md": 9,
    "HUB.md": 6,
    "PERFORMANCE.md": 1,
    "RESULTS.md": 27,
    "TRAINING.md": 21,
}


@every_page
def test_commands_are_accepted(page, capsys, documented_plugins):
    (documented_plugins / "configs").symlink_to(ROOT / "configs")
    given = list(commands(page))
    assert len(given) == NUMBER_OF_COMMANDS.get(page.name, 0)
    check_accepted(given, capsys)


def test_the_demo_s_commands_are_accepted(capsys):
    lines = (ROOT / "setup.sh").read_text().replace("\\\n", " ").splitlines()
    calls = [line.split() for line in lines if line.lstrip().startswith("python flickr_image")]
    assert len(calls) == 2
    check_accepted([words[2:] for words in calls], capsys)


def check_accepted(given, capsys):
    """Assert that the program takes these lists of arguments."""
    for arguments in given:
        try:
            caption_options.parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{shlex.join(arguments)}: {capsys.readouterr().err}")


def test_the_page_of_options_is_the_table():
    assert (DOCS / "OPTIONS.md").read_text() == caption_options.as_markdown()


def raised(*arguments):
    """A call of the command line, for COMPOSED."""
    return lambda: caption_options.parse_args(arguments)


# Messages of the troubleshooting table that the program puts together, and how to get them.
COMPOSED = {
    "--... belongs to --decoder attention, not lstm": raised("--alpha_c", "1"),
    "--... needs --use_scheduler": raised("--min_lr", "0"),
}
OF_TORCH = ["CUDA out of memory"]


def test_messages_of_the_troubleshooting_table_are_in_the_program():
    """`...` stands for what a message fills in."""
    section = README.read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 8 and set(messages) >= COMPOSED.keys()
    trees = [ast.parse(path.read_text()) for path in ROOMS.values()]
    constants = [
        node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)
    ]
    strings = [value for value in constants if isinstance(value, str)]
    written = [message for message in messages if message not in (*COMPOSED, *OF_TORCH)]
    parts = [part for message in written for part in message.split("...") if part.strip()]
    assert [part for part in parts if not any(part in string for string in strings)] == []


@pytest.mark.parametrize("message", COMPOSED)
def test_messages_that_are_put_together(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        COMPOSED[message]()
    text = f"{caught.value} {capsys.readouterr().err}"
    assert re.search(".+".join(map(re.escape, message.strip(".").split("..."))), text)


def test_the_map_has_every_room_and_imports_go_down_it():
    """Which leaves no cycle."""
    (drawn,) = [block for block in code_blocks(CONTRIBUTING) if block.startswith("benchmark ")]
    order = re.findall(r"^(\w+) +->", drawn, re.MULTILINE)
    assert sorted(order) == sorted(ROOMS)
    upwards = [
        (room, other)
        for room in order
        for other in imported_rooms(ROOMS[room])
        if order.index(other) <= order.index(room)
    ]
    assert upwards == []


def test_pre_commit_runs_what_ci_runs():
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    ci = [line.strip() for line in (ROOT / "setup.sh").read_text().splitlines()]
    assert hooks[:2] == [line for line in ci if line.startswith("ruff ")]
    assert hooks[2] == 'python -m pytest -q -rs -m "not slow"'
    assert 'python -m pytest -q -rs "${@:2}"' in ci

"""The repository root goes on the path, so that `pytest` and `python tests/test_x.py` import the same files."""

import gzip
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Tests keep METEOR's paraphrases in a folder of their own, commands that they start, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread(monkeypatch):
    """Sums have one order, and no run measures how many threads are best."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def documented_plugins(tmp_path, monkeypatch):
    """The working folder, which has the plugins of docs/EXPERIMENTS.md; none is loaded afterwards."""
    import caption_decoding
    import caption_options
    import encoder_models
    import plugins

    page = (Path(__file__).resolve().parents[1] / "docs/EXPERIMENTS.md").read_text()
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page, re.M | re.S):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    tables = [caption_options.ENCODERS, caption_options.DECODING, caption_options.TABLE]
    tables += [encoder_models.ADDED, caption_decoding.ALGORITHMS, plugins.LOADED]
    before = [dict(table) for table in tables]
    yield tmp_path
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture
def shop(tmp_path, monkeypatch, one_thread):
    """The workshop of test_end_to_end; the working folder is the test's own."""
    from test_end_to_end import enter

    return enter(tmp_path, monkeypatch)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder like pycocoevalcap's with small tables of METEOR; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "meteor"
    (folder / "data").mkdir(parents=True)
    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("nonbreaking/english.prefixes", "# comment\n\nvs\nNo #NUMERIC_ONLY#\n")
        jar.writestr("function/english.words", "a\nthe\n")
        jar.writestr("synonym/english.synsets", "auto\n5 6\ncar\n6\n")
        jar.writestr("synonym/english.exceptions", "auto\nautae autos\n")
    pairs = [("before", "in front of"), ("man", "guy"), ("guy", "man"), ("caf\u00e9", "bar")]
    text = "".join(f"0.5\n{phrase}\n{paraphrase}\n" for phrase, paraphrase in pairs)
    (folder / "data" / "paraphrase-en.gz").write_bytes(gzip.compress(text.encode()))
    return folder

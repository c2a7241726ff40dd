"""notebooks/quickstart.ipynb, run from its first cell to its last on a small sample dataset."""

import json
import os
import re
from pathlib import Path

import pytest

import download_datasets

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
RECIPE = (
    "--decoder attention --attention adaptive --encoder shufflenet_v2_x0_5 --encoder_weights random "
    "--embed_size 16 --hidden_size 16 --attention_dim 8 --num_layers 1 --num_workers 0 "
    "--freq_threshold 1 --epochs 1"
)


def cells(kind):
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def test_the_notebook_is_kept_without_outputs():
    assert [c for c in cells("code") if c["outputs"] or c["execution_count"] is not None] == []


def test_each_cell_has_a_sentence_above_it():
    kinds = [c["cell_type"] for c in json.loads(NOTEBOOK.read_text())["cells"]]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2)


@pytest.mark.slow
def test_the_notebook_trains_tests_and_shows_attention(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-test.txt")
    pytest.importorskip("ipykernel", reason="pip install -r requirements-test.txt")
    import nbformat

    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "report_page"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "notebooks").mkdir()
    download_datasets.draw_sample_dataset(tmp_path / "data/sample", seed=0, num_images=40)
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (recipe,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    recipe.source = f"recipe = {RECIPE!r}"
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    picture, link = [output["data"] for output in notebook.cells[-1].outputs]
    assert len(picture["image/png"]) > 10_000
    report = re.search(r"\(<(.+)>\)", link["text/markdown"])[1]
    assert "CIDEr" in (tmp_path / "notebooks" / report).read_text()
    assert not list((tmp_path / "notebooks").iterdir())

"""The repository root goes on the path, so that `pytest` and `python tests/test_x.py` import the same files."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def one_thread(monkeypatch):
    """Sums have one order, and no run measures how many threads are best."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shop(tmp_path, monkeypatch, one_thread):
    """The workshop of test_end_to_end; the working folder is the test's own."""
    from test_end_to_end import enter

    return enter(tmp_path, monkeypatch)

"""progress.py: lines where stderr is no terminal, a bar where it is one."""

import os
import pty
import select
import sys
import termios

import pytest
import tqdm.std

import progress
from progress import Progress

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def taking(monkeypatch):
    """A function: `count` items, of which each takes so many seconds by the clock of tqdm."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

    def items(seconds, count):
        for item in range(count):
            now[0] += seconds
            yield item

    return items


def test_a_line_every_half_minute_of_any_width(taking, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # which tqdm heeds, and some build machines set
    monkeypatch.setenv("LINES", "20")
    items = Progress(taking(10, 10), "testing", 10, "images")
    assert list(items) == list(range(10))
    assert capsys.readouterr().err.splitlines() == [
        "testing: 3/10, 0.10 images/s, 01:10 left",
        "testing: 6/10, 0.10 images/s, 00:40 left",
        "testing: 9/10, 0.10 images/s, 00:10 left",
    ]


def test_a_line_has_loss_rate_and_what_is_left_of_the_run(taking, capsys):
    """A step holds 128 captions; three epochs follow, each as long as this one, or as is known."""
    for known in (None, 600):
        steps, captions = taking(0.5, 120), 128
        bar = Progress(steps, "epoch 2", 120, "captions", captions, rounds=3, round_seconds=known)
        for _ in bar:
            bar.set_postfix(loss="3.412", refresh=False)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 2: 60/120, loss=3.412, 256 captions/s, 00:30 left, 03:30 in the run",
        "epoch 2: 120/120, loss=3.412, 256 captions/s, 00:00 left, 03:00 in the run",
        "epoch 2: 60/120, loss=3.412, 256 captions/s, 00:30 left, 30:30 in the run",
        "epoch 2: 120/120, loss=3.412, 256 captions/s, 00:00 left, 30:00 in the run",
    ]


def test_bytes_are_scaled_and_what_was_there_before_counts_for_no_speed(taking, capsys):
    how = {"unit": "B", "initial": 40_000_000, "unit_scale": True}
    with Progress(title="resnet50", total=100_000_000, **how) as bar:
        for _ in taking(40, 1):
            bar.update(20_000_000)
    assert capsys.readouterr().err.splitlines() == ["resnet50: 60.0M/100M, 500k B/s, 01:20 left"]


@pytest.mark.parametrize("how", [{"disable": True}, {}])
def test_what_is_short_or_disabled_writes_nothing(taking, capsys, how):
    assert len(list(Progress(taking(2, 10), "checking", 10, **how))) == 10
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_that_vanishes(taking, monkeypatch):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = Progress(taking(2, 3), "encoding", 3, "images", rounds=1)
        assert list(bar) == [0, 1, 2]
        drawn = ""
        while select.select([reader], [], [], 0.2)[0]:
            drawn += os.read(reader, 65536).decode()
    os.close(reader)
    assert "encoding:  67%|" in drawn and "0.50 images/s" in drawn and "in the run" in drawn
    assert drawn.count("\n") == 0 and drawn.endswith("\r")
    assert drawn.split("\r")[-2].strip() == ""


def test_no_thread_watches_the_bars():
    """One beside a fork may hold a lock for ever."""
    assert Progress.monitor_interval == 0 and progress.LINE_SECONDS == 30


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))

"""run_records.py: how a run ended, also where it could not say so itself."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_records
from checkpoints import write_json


def summary(status="running"):
    return {"metadata": {"run_id": "1", "status": status}, "final_metrics": {"epoch": 3}}


def read(folder):
    return json.loads((folder / "run_summary.json").read_text())


@pytest.fixture
def killed(tmp_path):
    """The folder of a run whose process was killed with -9."""
    folder = tmp_path / "killed"
    folder.mkdir()
    code = (
        "import run_records, signal, os, sys\n"
        f"lock = run_records.hold(sys.argv[1])\n"
        f"run_records.write_summary(sys.argv[1], {summary()!r}, lock)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    return folder


def test_a_killed_run_is_marked_as_failed_by_who_finds_it(killed):
    assert read(killed)["metadata"]["status"] == "running"
    os.utime(killed / "run_summary.json", (0, 1_000_000_000))
    assert run_records.end_killed(killed)
    run = read(killed)["metadata"]
    assert (run["status"], run["error"], run["run_id"]) == ("failed", run_records.KILLED, "1")
    assert run["end_time"].startswith("2001-09-0")
    assert read(killed)["final_metrics"] == {"epoch": 3}
    assert [file.name for file in killed.iterdir()] == ["run_summary.json"]
    assert not run_records.end_killed(killed)


def test_a_run_that_goes_on_is_left_alone_and_one_that_has_ended_too(tmp_path):
    lock = run_records.hold(tmp_path)
    run_records.write_summary(tmp_path, summary(), lock)
    assert not run_records.end_killed(tmp_path) and read(tmp_path) == summary()
    run_records.write_summary(tmp_path, summary("completed"), lock)
    assert not run_records.end_killed(tmp_path) and read(tmp_path) == summary("completed")
    assert not (tmp_path / run_records.RUNNING).exists()


def test_a_run_of_a_file_system_without_locks_is_not_judged(tmp_path):
    run_records.write_summary(tmp_path, summary(), None)
    assert not run_records.end_killed(tmp_path) and read(tmp_path) == summary()


def test_a_new_run_finds_the_killed_ones_beside_it(killed):
    new, alive, empty = (killed.with_name(name) for name in ("new", "alive", "empty"))
    for folder in (new, alive, empty):
        folder.mkdir()
    locks = [run_records.hold(new), run_records.hold(alive)]
    run_records.write_summary(new, summary(), locks[0])
    run_records.write_summary(alive, summary(), locks[1])
    assert run_records.end_killed_beside(new) == [killed]
    assert read(alive) == read(new) == summary()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"metadata": 3}', "[" * 100_000])
def test_a_damaged_summary_is_no_summary(tmp_path, content):
    (tmp_path / "run_summary.json").write_text(content)
    (tmp_path / run_records.RUNNING).touch()
    assert not run_records.end_killed(tmp_path)
    run_records.add_scores(tmp_path, "test", {f"BLEU-{n}": 0.1 * n for n in range(1, 5)})
    assert (tmp_path / "run_summary.json").read_text() == content


def test_scores_of_a_split_are_added_to_the_summary(tmp_path):
    scores = {"BLEU-1": 0.65, "BLEU-2": 0.45, "BLEU-3": 0.35, "BLEU-4": 0.25, "CIDEr": 1.0}
    run_records.add_scores(tmp_path, "test", scores)
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "run_summary.json", summary("completed"))
    run_records.add_scores(tmp_path, "test", scores)
    run_records.add_scores(tmp_path, "val", scores | {"BLEU-4": 0.2})
    written = read(tmp_path)["bleu_scores"]
    assert [written[f"test_bleu{n}"] for n in range(1, 5)] == [0.65, 0.45, 0.35, 0.25]
    assert written["val_bleu4"] == 0.2 and len(written) == 8


def test_reading_runs_needs_no_torch():
    code = "import run_records, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0

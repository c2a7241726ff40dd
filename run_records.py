"""run_summary.json: what a run was, how it ended and what it scored, also where it was killed.

    lock = run_records.hold(run_dir)                   # while the run goes on
    run_records.write_summary(run_dir, summary, lock)  # once it has ended, the lock is given back
    run_records.end_killed(run_dir)                    # by a later command: a run that ended without a word
    run_records.add_scores(run_dir, "test", scores)    # what --mode test found

A run that goes on holds a lock on its file RUNNING, which the operating system takes back however
the process ends: where the file is there and nobody holds it, the run was killed. torch is not
imported, so that runs can be looked at in a moment.
"""

import contextlib
import json
from datetime import datetime
from pathlib import Path

import filelock

from checkpoints import write_json

FILE_NAME, RUNNING = "run_summary.json", ".running"
KILLED = "the process ended without a word: killed, out of memory or out of power"


def hold(run_dir):
    """The lock that says that a run goes on; None where the file system has no locks."""
    lock = filelock.FileLock(Path(run_dir) / RUNNING, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):  # filelock raises the second where there is no flock
        return None
    return lock


def write_summary(run_dir, summary, lock):
    """Write run_summary.json, and give the lock back if the run has ended."""
    write_json(Path(run_dir) / FILE_NAME, summary)
    if lock and summary["metadata"]["status"] != "running":
        _release(lock)


def _release(lock):
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def read_summary(run_dir):
    """The content of run_summary.json with its metadata; {} where the file is absent or damaged."""
    return read_object(Path(run_dir) / FILE_NAME)


def read_object(path):
    """A JSON file's object; {} where there is none."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def metadata(summary):
    """What a summary says of its run; {} where it is damaged."""
    content = summary.get("metadata")
    return content if isinstance(content, dict) else {}


def end_killed(run_dir):
    """Mark a run as failed that says it is running, and is not. Returns whether it was marked.

    Its end is when it last wrote its summary, which each epoch does. A folder that cannot be
    written to stays as it is.
    """
    path = Path(run_dir) / FILE_NAME
    summary = read_summary(run_dir)
    if metadata(summary).get("status") != "running" or not path.with_name(RUNNING).exists():
        return False
    lock = hold(run_dir)
    if not lock:
        return False
    last = datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="seconds")
    ended = {"status": "failed", "end_time": last, "error": KILLED}
    summary["metadata"] = summary["metadata"] | ended
    with contextlib.suppress(OSError):
        write_summary(run_dir, summary, lock)
        return True
    return False


def end_killed_beside(run_dir):
    """As `end_killed`, of all runs in the folder that a run's lies in. Returns their folders."""
    others = (file.parent for file in Path(run_dir).parent.glob(f"*/{RUNNING}"))
    return [other for other in sorted(others) if other != Path(run_dir) and end_killed(other)]


def add_scores(run_dir, split, scores):
    """Note a split's BLEU-1 to BLEU-4 in a run's summary; does nothing where there is none.

    scores: {"BLEU-1": 0..1, ...} as of metrics_utils.
    """
    summary = read_summary(run_dir)
    if not metadata(summary):
        return
    earlier = summary.get("bleu_scores")
    earlier = earlier if isinstance(earlier, dict) else {}
    summary["bleu_scores"] = earlier | bleu_scores(
        split, [scores[f"BLEU-{n}"] for n in range(1, 5)]
    )
    write_json(Path(run_dir) / FILE_NAME, summary)


def bleu_scores(split, values):
    """{"test_bleu1": ..., "test_bleu4": ...} from BLEU-1 to BLEU-4, 0..1."""
    return {f"{split}_bleu{n}": value for n, value in enumerate(values, start=1)}


def ensemble_size(scores):
    """How many decoders wrote the captions that a metrics file scores: the run's, and those of --ensemble."""
    others = scores.get("ensemble")
    return 1 + len(others) if isinstance(others, list) else 1

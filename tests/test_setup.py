"""setup.sh where the Python at hand is too old. What it installs is not tried: that needs a network."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "setup.sh"
OLD = """#!/bin/sh
if [ "$1" = -V ]; then echo Python 3.9.18; exit; fi
exec {python} -c "import sys; sys.version_info = (3, 9, 18); $2"
"""
NEW = """#!/bin/sh
if [ "$1" = -m ]; then echo "made by $0" >&2; exit 7; fi
exec {python} "$@"
"""
NEEDED = "setup.sh: error: Python 3.11 or newer is needed, "


@pytest.fixture
def set_up(tmp_path):
    """Runs setup.sh in a folder of its own, where PATH has no Python and no uv but these."""
    shutil.copy(SETUP, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(programs):
        for name, text in programs.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(python=sys.executable))
            path.chmod(0o755)
        command = [shutil.which("bash"), tmp_path / "setup.sh"]
        environment = {"PATH": str(tmp_path / "bin")}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"bin/python3": OLD}, "python3 is Python 3.9.18: install it, or uv "),
        ({"bin/python3": OLD, "bin/python3.11": OLD}, "python3 is Python 3.9.18: install it, or "),
        ({".venv/bin/python": OLD}, ".venv has Python 3.9.18: remove .venv and start again\n"),
    ],
    ids=["python3", "two", "venv"],
)
def test_an_old_python_is_one_line_that_says_what_is_needed(set_up, programs, said):
    done = set_up(programs)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(NEEDED + said)


def test_no_python_at_all_is_one_line_too(set_up):
    done = set_up({})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{NEEDED}python3 is missing")


def test_a_newer_python_beside_the_old_one_is_taken(set_up):
    done = set_up({"bin/python3": OLD, "bin/python3.12": NEW})
    assert done.returncode == 7 and done.stderr.strip().endswith("/bin/python3.12")

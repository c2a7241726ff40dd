"""Run a user's Python file, and say in one line what is wrong with it: --plugin.

    run_file("my_plugin.py")

The file is code that the user trusts. It is run once in a process, as a module of its own.
"""

import hashlib
import sys
import traceback
import types
from pathlib import Path

LOADED = {}  # {absolute path: SHA-256 of its code}


def run_file(path):
    """Run the file, unless it was run before. Returns: SHA-256 of its code.

    Raises: FileNotFoundError or ValueError of one line, with the file and the line in it.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"--plugin {path}: no such file")
    if not file.is_file():
        raise ValueError(f"--plugin {path}: is no file: give one of Python code")
    absolute, code = file.resolve(), file.read_bytes()
    if absolute in LOADED:
        return LOADED[absolute]
    module = types.ModuleType(f"plugin_{len(LOADED)}_{file.stem}")
    module.__file__ = str(absolute)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(code, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ValueError(f"--plugin {path}{fault_in(module.__file__, error)}") from error
    LOADED[absolute] = hashlib.sha256(code).hexdigest()
    return LOADED[absolute]


def fault_in(file, error):
    """ ":LINE: what is wrong", where the line is the last of `file` that was being run or read."""
    text = " ".join(str(getattr(error, "msg", error)).split())[:500]
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if not lines:  # it was not even compiled; for null bytes older Pythons raise ValueError
        return f":{getattr(error, 'lineno', None) or 1}: is no Python ({text})"
    return f":{lines[-1]}: {type(error).__name__}: {text}"

"""Word vectors from a file in GloVe's text format: a line `word v1 ... vN` for each word.

    check_length("glove.6B.300d.txt", 300)                    # reads one line
    vectors = read_vectors("glove.6B.300d.txt", words, 300)   # {word: array of 300 floats}

The file may be compressed by gzip, or the first one in a .zip. Millions of words are read line by
line, and nothing is kept but the vectors of the words asked for. Source: Pennington et al. 2014.
"""

import array
import contextlib
import gzip
import io
import zipfile
import zlib
from pathlib import Path

MOST_BYTES = 2**20  # of a line
LARGEST = 3.4028234e38  # of float32


def check_length(path, embed_size):
    """Raises: FileNotFoundError, ValueError unless the first line is a word and `embed_size` numbers."""
    number, line = next(lines_of(path), (1, b""))
    numbers = line.split()[1:]
    if not numbers or not all(map(is_number, numbers)):
        raise malformed(path, number, "numbers", line)
    if len(numbers) != embed_size:
        raise ValueError(
            f"--embed_size {embed_size} must be the length of the vectors in {path}, {len(numbers)}"
        )


def read_vectors(path, words, length):
    """{word: array("f")} of those of `words` that the file has, in its order.

    Of other lines only the length is looked at. A word may hold spaces, as some of Common Crawl's do.
    Raises: FileNotFoundError, ValueError naming file and line.
    """
    wanted, vectors, lines = set(words), {}, {}
    for number, line in lines_of(path):
        word, *numbers = line.rsplit(b" ", length)
        is_longer = b" " in word and is_number(word.rpartition(b" ")[2])
        if is_longer or len(numbers) < length:
            raise malformed(path, number, f"{length} numbers", line)
        try:
            word = word.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"--glove_path {path}:{number}: no text in UTF-8") from error
        if word not in wanted:
            continue
        if word in vectors:
            raise ValueError(
                f"--glove_path {path}:{number}: {word[:40]!r} stands in line {lines[word]} already"
            )
        if not all(map(is_number, numbers)):
            raise malformed(path, number, f"{length} numbers", line)
        vectors[word], lines[word] = array.array("f", map(float, numbers)), number
    return vectors


def is_number(text):
    """Whether bytes are a number that float32 can hold: neither nan nor infinity."""
    try:
        return abs(float(text)) <= LARGEST
    except ValueError:
        return False


def malformed(path, number, expected, line):
    """The ValueError about a line."""
    got = line[:40].decode(errors="replace") + "..." * (len(line) > 40)
    return ValueError(
        f"--glove_path {path}:{number}: expected a word and {expected} with spaces between, got {got!r}"
    )


def lines_of(path):
    """Yield (number, line) of a file, as bytes without spaces at the end, past empty lines.

    Raises: FileNotFoundError, ValueError.
    """
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            file = open_text(Path(path), stack)
            while line := file.readline(MOST_BYTES):
                number += 1
                if len(line) == MOST_BYTES:
                    raise ValueError(f"is longer than {MOST_BYTES // 1024} KiB: no word vectors")
                if line := line.rstrip():
                    yield number, line
    except (EOFError, RuntimeError, ValueError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ValueError(f"--glove_path {path}:{number or 1}: {error}") from error


def open_text(path, stack):
    """The file as a stream of bytes, decompressed. Raises: FileNotFoundError, ValueError."""
    if not path.exists():
        raise FileNotFoundError(f"--glove_path {path}: no such file")
    if not path.is_file():
        raise ValueError("is a folder" if path.is_dir() else "is no file")
    file = stack.enter_context(path.open("rb"))
    start = file.peek(4)[:4]
    if start.startswith(b"\x1f\x8b"):
        return stack.enter_context(gzip.GzipFile(fileobj=file))
    if start == b"PK\x03\x04":
        archive = stack.enter_context(zipfile.ZipFile(file))
        return io.BufferedReader(stack.enter_context(archive.open(archive.namelist()[0])))
    return file

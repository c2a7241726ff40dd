"""word_vectors.py and word_embedding.py: files in GloVe's format, good and hostile; rows that do not learn."""

import gzip
import io
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from caption_batches import Vocabulary
from word_embedding import begin_with_vectors, partly_frozen
from word_vectors import check_length, read_vectors

TEXT = "the 0.5 -1\ndog 2 3e-1\n. . . 7 7\nna\u00efve 4 5 \n\nzebra 8 9"
VOCABULARY = Vocabulary([*Vocabulary.SPECIALS, "dog", "na\u00efve", "cat"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(content, path="v.txt"):
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(text):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("first.txt", text)
        archive.writestr("second.txt", "dog 9 9")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [TEXT, "\ufeff" + TEXT, TEXT.replace("\n", "\r\n"), gzip.compress(TEXT.encode()), zipped(TEXT)],
    ids=["plain", "byte order mark", "Windows", "gzip", "zip"],
)
def test_the_vectors_of_words_that_are_asked_for_are_read(content):
    check_length(write(content), 2)
    vectors = read_vectors("v.txt", ["na\u00efve", "the", "dog", "cat", "."], 2)
    assert list(vectors) == ["the", "dog", "na\u00efve"]
    assert [list(v) for v in vectors.values()] == [[0.5, -1], [2, pytest.approx(0.3)], [4, 5]]


@pytest.mark.parametrize("content, line", [
    ("dog 1 2\ncat 1\n", "v.txt:2: expected a word and 2 numbers with spaces between, got 'cat 1'"),
    ("dog 1 2\ncat 1 2 3\n", "v.txt:2: expected a word and 2 numbers with spaces between, got 'cat 1 2 3'"),
    ("dog 1 2\ncat 1 nan\n", "v.txt:2: expected a word and 2 numbers with spaces between, got 'cat 1 nan'"),
    ("dog 1 2\ncat 1 1e39\n", "v.txt:2: expected a word and 2 numbers with spaces between, got 'cat 1 1e39'"),
    ("dog 1 2\n\ncat 1 x\n", "v.txt:3: expected a word and 2 numbers with spaces between, got 'cat 1 x'"),
    ("dog 1 2\ncat\t1\t2\n", r"v.txt:2: expected a word and 2 numbers with spaces between, got 'cat\t1\t2'"),
    ("dog 1 2\nzebra 1 2\ndog 1 2\n", "v.txt:3: 'dog' stands in line 1 already"),
    (b"dog 1 2\nna\xefve 1 2\n", "v.txt:2: no text in UTF-8"),
    (b"dog 1 2\n" + bytes(range(256)) * 9000, "v.txt:2: expected a word and 2 numbers with spaces between"),
    (b"dog 1 2\n" + b"1 " * 10**6, "v.txt:2: is longer than 1024 KiB: no word vectors"),
    (gzip.compress(b"zebra 1 2\n" * 99)[:-9], "v.txt:99: Compressed file ended before the end-of-stream"),
    (b"PK\x03\x04" + b"dog 1 2\n", "v.txt:1: File is not a zip file"),
])  # fmt: skip
def test_a_bad_line_is_named(content, line):
    write(content)
    with pytest.raises(ValueError) as caught:
        read_vectors("v.txt", ["dog", "cat", "na\u00efve"], 2)
    message = str(caught.value)
    assert message.startswith(f"--glove_path {line}") and "\n" not in message and len(message) < 200


@pytest.mark.parametrize("content, line", [
    ("dog 1 2 3\n", "--embed_size 2 must be the length of the vectors in v.txt, 3"),
    ("400000 300\n", "--embed_size 2 must be the length of the vectors in v.txt, 1"),
    ("", "--glove_path v.txt:1: expected a word and numbers with spaces between, got ''"),
    ("dog\n", "--glove_path v.txt:1: expected a word and numbers with spaces between, got 'dog'"),
    ("dog 1 nan\n", "--glove_path v.txt:1: expected a word and numbers with spaces between, got 'dog 1 nan'"),
    (b"\x89PNG\r\n", r"--glove_path v.txt:1: expected a word and numbers with spaces between, got '�PNG'"),
    ("dog 1 2".encode("utf-16"), "--glove_path v.txt:1: expected a word and numbers with spaces between"),
    (b"1 " * 10**6, "--glove_path v.txt:1: is longer than 1024 KiB: no word vectors"),
])  # fmt: skip
def test_the_first_line_tells_the_length(content, line):
    write(content)
    with pytest.raises(ValueError) as caught:
        check_length("v.txt", 2)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_folder_and_no_file_are_named():
    Path("a").mkdir()
    with pytest.raises(ValueError, match=r"^--glove_path a:1: is a folder$"):
        check_length("a", 2)
    with pytest.raises(FileNotFoundError, match=r"^--glove_path b: no such file$"):
        check_length("b", 2)


def test_memory_does_not_grow_with_the_file():
    line = " " + " ".join(["0.125"] * 50) + "\n"
    write(gzip.compress(b"".join(f"word{i}{line}".encode() for i in range(6000))))
    tracemalloc.start()
    vectors = read_vectors("v.txt", ["word5999"], 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(vectors["word5999"]) == 50 and peak < 2**19  # of 2 MB


def embedding(frozen):
    torch.manual_seed(0)
    embed = nn.Embedding(len(VOCABULARY), 2)
    return partly_frozen(embed) if frozen else embed


def test_words_begin_with_the_file_s_vectors_and_coverage_counts_words_and_tokens():
    """Neither what begins and ends a caption nor a special that the file names is a word."""
    embed, fresh = embedding(False), embedding(False).weight
    tokens = torch.tensor([1, 4, 6, 3, 2, 1, 4, 4, 2])  # dog cat <UNK>; dog dog
    note = begin_with_vectors(embed, write(TEXT + "\n<UNK> 1 1\n"), VOCABULARY, tokens)
    assert note == (
        "word vectors: 2 of 3 words (66.7%), 60.0% of the words in training captions, begin as in v.txt"
    )
    assert embed.weight[4:6].tolist() == [[2, pytest.approx(0.3)], [4, 5]]
    others = [0, 1, 2, 3, 6]
    assert torch.equal(embed.weight[others], fresh[others])


def test_a_file_without_any_of_the_words_is_refused():
    with pytest.raises(ValueError, match=r"^--glove_path v\.txt: has none of the 3 words, such as"):
        begin_with_vectors(embedding(False), write("the 1 2\n"), VOCABULARY, torch.tensor([4]))


def test_frozen_rows_do_not_learn_and_the_others_do():
    embed, tokens = embedding(True), torch.tensor([[1, 4, 6], [4, 4, 2]])
    assert torch.equal(embed(tokens), embedding(False)(tokens))
    note = begin_with_vectors(embed, write(TEXT), VOCABULARY, tokens.flatten())
    assert note.endswith(" begin as in v.txt and stay so")
    assert embed.frozen.nonzero().flatten().tolist() == [4, 5]
    embed(tokens).square().sum().backward()
    assert embed.weight.grad.any(1).nonzero().flatten().tolist() == [1, 2, 6]

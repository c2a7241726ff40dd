"""download_datasets.py against a misbehaving local server, hostile archives, damaged folders and weights.

What the sample dataset's pictures and captions hold is in test_sample_dataset.py.
"""

import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import threading
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import download_datasets as dd
import sample_dataset
from caption_data import load_dataset

JPEG = b"\xff\xd8\xff\xe0 a picture"


# ---------------------------------------------------------- a server whose paths misbehave as asked


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files[path]: content, status, drops (bytes sent before a lost connection)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        file = self.server.files.get(self.path, {"status": 404})
        content, start = file.get("content", b""), 0
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if asked and not file.get("ignores_range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        status = file.get("status", 206 if asked and not file.get("ignores_range") else 200)
        status = status.pop(0) if isinstance(status, list) else status
        self.send_response(status)
        self.send_header("Content-Type", file.get("type", "application/octet-stream"))
        if not file.get("no_length"):
            self.send_header("Content-Length", str(len(content) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Connection", "close")
        self.end_headers()
        drops = file.get("drops", [])
        self.wfile.write(content[start:][: drops.pop(0)] if drops else content[start:])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A running server; `server.url(path, **behaviour)` adds a file and returns its address."""
    monkeypatch.setattr(dd, "RETRY_SECONDS", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests = {}, []

    def url(path, **behaviour):
        server.files[path] = behaviour
        return f"http://127.0.0.1:{server.server_port}{path}"

    server.url = url
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def remote(content, *urls, name="file.zip", keep=("*.jpg",)):
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return dd.Remote(name, len(content), checksum, urls, keep)


# 256,000 bytes, no two neighbouring blocks of which can be exchanged unnoticed
CONTENT = bytes(range(256)) * 1000
HTML_PAGE = {"content": b"<html>Sign in</html>", "status": 200, "type": "text/html"}


def test_a_dropped_connection_goes_on_where_it_stopped(server, tmp_path):
    url = server.url("/a", content=CONTENT, drops=[100_000, 50_000])
    path = dd.download(remote(CONTENT, url), tmp_path)
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=0-", "bytes=100000-", "bytes=150000-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.zip"]


def test_a_part_file_of_an_earlier_run_is_used(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:200_000])
    dd.download(remote(CONTENT, server.url("/a", content=CONTENT)), tmp_path)
    assert server.requests == [("/a", "bytes=200000-")]


def test_a_server_that_ignores_range_is_read_from_the_beginning(server, tmp_path):
    url = server.url("/a", content=CONTENT, drops=[100_000], ignores_range=True)
    assert dd.download(remote(CONTENT, url), tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_server_that_never_gets_further_is_given_up(server, tmp_path):
    url = server.url("/a", content=CONTENT, drops=[1000] * 50, ignores_range=True)
    with pytest.raises(dd.DownloadError, match=r"the connection ended at 1,000 of 256,000 bytes"):
        dd.fetch(url, tmp_path / "part", len(CONTENT))
    assert len(server.requests) == 1 + dd.ATTEMPTS


def test_a_busy_server_is_asked_again(server, tmp_path):
    url = server.url("/a", content=CONTENT, status=[503, 429, 206])
    assert dd.download(remote(CONTENT, url), tmp_path).read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_the_next_source_tried(server, tmp_path, capsys):
    wrong = server.url("/wrong", content=CONTENT[::-1])  # the right size
    right = server.url("/right", content=CONTENT)
    assert dd.download(remote(CONTENT, wrong, right), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/wrong", "bytes=0-"), ("/right", "bytes=0-")]
    assert "/wrong: wrong content, deleted" in capsys.readouterr().err


def test_nothing_is_left_when_the_only_source_is_wrong(server, tmp_path):
    with pytest.raises(dd.DownloadError, match=r"file\.zip: no source works"):
        dd.download(remote(CONTENT, server.url("/wrong", content=CONTENT[::-1])), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"status": 404}, "HTTP 404"),
        (HTML_PAGE, "offers 20 bytes, expected 256,000"),
        ({"content": CONTENT + b"x"}, "offers 256,001 bytes, expected 256,000"),
    ],
)
def test_a_page_in_place_of_the_file_is_refused_before_it_is_stored(
    server, tmp_path, capsys, behaviour, message
):
    page, right = server.url("/page", **behaviour), server.url("/a", content=CONTENT)
    path = dd.download(remote(CONTENT, page, right), tmp_path)
    assert path.read_bytes() == CONTENT
    assert message in capsys.readouterr().err
    assert server.requests == [("/page", "bytes=0-"), ("/a", "bytes=0-")]


def test_a_page_of_unknown_length_is_refused_by_its_content(server, tmp_path):
    longer = b"<html>" * 100_000
    page = server.url("/page", content=longer, no_length=True, ignores_range=True)
    right = server.url("/a", content=CONTENT)
    assert dd.download(remote(CONTENT, page, right), tmp_path).read_bytes() == CONTENT


def test_a_damaged_leftover_does_not_condemn_the_only_source(server, tmp_path):
    (tmp_path / "file.zip").write_bytes(b"x" * len(CONTENT))
    url = server.url("/a", content=CONTENT)
    assert dd.download(remote(CONTENT, url), tmp_path).read_bytes() == CONTENT
    dd.download(remote(CONTENT, url), tmp_path)  # now whole: not asked for again
    assert len(server.requests) == 1


def test_certificates_are_checked():
    source = Path(dd.__file__).read_text(encoding="utf-8")
    unsafe = ("_create_unverified", "CERT_NONE", "check_hostname", "context=")
    assert not any(word in source for word in unsafe)
    parts = itertools.chain.from_iterable(dd.DATASETS.values())
    urls = [url for file in itertools.chain.from_iterable(parts) for url in file.urls]
    assert all(url.startswith("https://") for url in (*urls, *dd.RESNET50.urls))


# ----------------------------------------------------------------------------------------- archives


def zip_of(*members):
    """Bytes of a zip of (name or ZipInfo, content) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(*members):
    """Bytes of a tar.gz of (TarInfo, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_member(name, kind=tarfile.REGTYPE, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def zip_link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


def encrypted_zip():
    content = bytearray(zip_of(("a.jpg", JPEG)))
    content[6] |= 1  # flag bits of the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and of the central directory
    return bytes(content)


@pytest.mark.parametrize(
    "archive",
    [
        zip_of(
            ("Flicker8k_Dataset/a.jpg", JPEG),
            ("__MACOSX/._a.jpg", b"mac"),
            ("x/notes.txt", b"1"),
            ("b.py", b"2"),
        ),
        tar_of(
            (tar_member("flickr30k-images", tarfile.DIRTYPE), b""),
            (tar_member("flickr30k-images/a.jpg"), JPEG),
            (tar_member("notes.txt"), b"1"),
        ),
    ],
    ids=["zip", "tar"],
)
def test_unpack_sorts_the_wanted_members(tmp_path, archive):
    path, folder = tmp_path / "archive", tmp_path / "out"
    path.write_bytes(archive)
    folder.mkdir()
    assert dd.unpack(path, folder, ("*.jpg", "notes.txt")) == 2
    assert {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")} == {
        str(Path("Images/a.jpg")): JPEG,
        "notes.txt": b"1",
    }


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (zip_of(("../a.jpg", JPEG)), "leads outside"),
        (zip_of(("/tmp/a.jpg", JPEG)), "leads outside"),
        (zip_of(("..\\..\\a.jpg", JPEG)), "leads outside"),
        (zip_of(("C:\\a.jpg", JPEG)), "leads outside"),
        (zip_of((zip_link("a.jpg"), "/etc/passwd")), "a link"),
        (encrypted_zip(), "refused"),
        (zip_of(("x/a.jpg", JPEG), ("y/a.jpg", JPEG)), "'a.jpg' twice"),
        (zip_of(("a.jpg", bytes(3_000_000))), "unpacks to more than"),
        (zip_of(*((f"{number}.jpg", b"") for number in range(60))), "unpacks to more than"),
        (zip_of(("a.jpg", JPEG * 10)).replace(b"PK\x01\x02", b"PK\x01\x03"), "not a whole"),
        (zip_of(("a.txt", b"")), r"holds no \*.jpg"),
        (b"<html>Sign in</html>", "not a whole zip or tar"),
        (tar_of((tar_member("../a.jpg"), JPEG)), "leads outside"),
        (tar_of((tar_member("/tmp/a.jpg"), JPEG)), "leads outside"),
        (tar_of((tar_member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), b"")), "a link"),
        (tar_of((tar_member("a.jpg", tarfile.LNKTYPE, "/etc/passwd"), b"")), "a link"),
        (tar_of((tar_member("a.jpg", tarfile.CHRTYPE), b"")), "a device"),
        (tar_of((tar_member("a.jpg", tarfile.FIFOTYPE), b"")), "a device"),
        (tar_of((tar_member("a.jpg"), bytes(3_000_000))), "unpacks to more than"),
        (tar_of((tar_member("a.jpg"), bytes(range(256)) * 1000))[:-300], "not a whole"),
    ],
)
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(
    tmp_path, monkeypatch, archive, message
):
    monkeypatch.setattr(dd, "MAX_UNPACKED_BYTES", 2_000_000)
    monkeypatch.setattr(dd, "MAX_MEMBERS", 50)
    path, folder = tmp_path / "archive", tmp_path / "in" / "out"
    path.write_bytes(archive)
    folder.mkdir(parents=True)
    with pytest.raises(dd.DownloadError, match=message) as failure:
        dd.unpack(path, folder, ("*.jpg",))
    assert "\n" not in str(failure.value)
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert files - set(folder.rglob("*")) == {path}
    assert not any(file.is_symlink() for file in folder.rglob("*"))


def test_a_flipped_bit_is_noticed_by_the_archive_itself(tmp_path):
    content = bytearray(zip_of((zipfile.ZipInfo("a.jpg"), JPEG)))  # stored, not deflated
    content[content.index(JPEG) + 5] ^= 1
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(dd.DownloadError, match="Bad CRC-32"):
        dd.unpack(tmp_path / "archive", tmp_path, ("*.jpg",))


# ----------------------------------------------------------------------------------- whole datasets

ROWS = list(itertools.product(range(4), range(5)))  # image, caption
TOKENS = "".join(f"{image}.jpg#{k}\ta dog runs .\n" for image, k in ROWS).encode()
IMAGES_ZIP = zip_of(*((f"Flicker8k_Dataset/{number}.jpg", JPEG) for number in range(4)))
TEXT_ZIP = zip_of(
    ("Flickr8k.token.txt", TOKENS),
    ("Flickr_8k.trainImages.txt", b"0.jpg\n"),
    ("readme.txt", b"hello"),
)


@pytest.fixture
def tiny(server, monkeypatch):
    """A Flickr8k of 4 images and 20 captions on the local server; returns its two Remotes."""
    images = remote(IMAGES_ZIP, server.url("/images", content=IMAGES_ZIP), name="images.zip")
    keep = ("Flickr8k.token.txt", "Flickr_8k.*Images.txt")
    text = remote(TEXT_ZIP, server.url("/text", content=TEXT_ZIP), name="text.zip", keep=keep)
    parts = ((images,), (text,))
    monkeypatch.setattr(dd, "DATASETS", {"flickr8k": parts, "flickr30k": parts})
    monkeypatch.setattr(dd, "EXPECTED", {"flickr8k": (4, 20), "flickr30k": (5, 25)})
    return images, text


def test_a_dataset_is_downloaded_once(server, tiny, tmp_path, capsys):
    command = ["--dataset", "flickr8k", "--data_dir", str(tmp_path / "data")]
    assert dd.main(command) == 0
    folder = tmp_path / "data" / "flickr8k"
    assert capsys.readouterr().out == f"flickr8k: 4 images and 20 captions in {folder}\n"
    names = {path.name for path in folder.iterdir()}
    assert names == {"Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "Images"}
    pictures = {path.name for path in (folder / "Images").iterdir()}
    assert pictures == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    assert list((tmp_path / "data" / ".downloads").iterdir()) == []
    assert dd.main(command) == 0 and len(server.requests) == 2
    (folder / "mine.txt").touch()
    assert dd.main([*command, "--force"]) == 0 and len(server.requests) == 4
    assert not (folder / "mine.txt").exists()


def test_both_by_default_and_one_failure_does_not_stop_the_other(tiny, tmp_path, capsys):
    assert dd.main(["--data_dir", str(tmp_path)]) == 1  # flickr30k is one image short
    shown = capsys.readouterr()
    assert shown.out.startswith("flickr8k: 4 images") and "flickr30k" not in shown.out
    assert "4 images, expected at least 5" in shown.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".downloads", "flickr8k"]


def test_a_second_archive_stands_in_for_the_first(server, tiny, tmp_path, monkeypatch):
    images, text = tiny
    hostile = zip_of(("a.jpg", JPEG), ("../b.jpg", JPEG))
    first = remote(hostile, server.url("/hostile", content=hostile), name="hostile.zip")
    monkeypatch.setitem(dd.DATASETS, "flickr8k", ((first, images), (text,)))
    assert dd.download_dataset("flickr8k", tmp_path) == (4, 20)
    assert sorted(path.name for path in (tmp_path / "flickr8k" / "Images").iterdir())[0] == "0.jpg"


def test_no_source_works_says_where_to_ask_and_goes_on_later(server, tiny, tmp_path, capsys):
    del server.files["/text"]
    command = ["--dataset", "flickr8k", "--data_dir", str(tmp_path)]
    assert dd.main(command) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert dd.MANUAL["flickr8k"] in shown.err.splitlines()[-1]
    assert not (tmp_path / "flickr8k").exists()
    server.url("/text", content=TEXT_ZIP)
    assert dd.main(command) == 0
    assert [path for path, _ in server.requests] == ["/images", "/text", "/text"]


def test_a_folder_with_something_else_is_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "flickr8k").mkdir()
    (tmp_path / "flickr8k" / "thesis.txt").write_text("mine")
    assert dd.main(["--dataset", "flickr8k", "--data_dir", str(tmp_path)]) == 1
    assert "no captions file" in capsys.readouterr().err
    assert (tmp_path / "flickr8k" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_found_before_the_download(server, tiny, tmp_path, monkeypatch, capsys):
    usage = dd.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dd.shutil, "disk_usage", lambda path: usage._replace(free=len(IMAGES_ZIP)))
    assert dd.main(["--dataset", "flickr8k", "--data_dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "the files need 0.00 GB, 0.00 GB are free; make room" in err and server.requests == []


def test_resnet50_is_checked(server, tmp_path, monkeypatch, capsys):
    weights = remote(CONTENT, server.url("/w", content=CONTENT), name="resnet50-19c8e357.pth")
    monkeypatch.setattr(dd, "RESNET50", weights)
    monkeypatch.setattr(dd, "WEIGHTS_DIR", tmp_path / "resources" / "models")
    assert dd.main(["--dataset", "resnet50", "--verify_only"]) == 1
    assert dd.main(["--dataset", "resnet50"]) == 0
    assert dd.main(["--dataset", "resnet50", "--verify_only"]) == 0
    path = tmp_path / "resources" / "models" / "resnet50-19c8e357.pth"
    path.write_bytes(CONTENT[:-1] + b"x")
    assert dd.main(["--dataset", "resnet50", "--verify_only"]) == 1
    assert dd.main(["--dataset", "resnet50"]) == 1
    assert "sha256 is" in capsys.readouterr().err
    assert dd.main(["--dataset", "resnet50", "--force"]) == 0
    assert path.read_bytes() == CONTENT


def test_resnet50s_checksum_begins_with_the_digits_in_its_name():
    assert dd.RESNET50.checksum.startswith("sha256:19c8e357")
    assert len(dd.RESNET50.checksum) == len("sha256:") + 64


# --------------------------------------------------------------------------------------------- COCO

KARPATHYS = ("val", "restval", "test", "val", "restval")  # splits of the official val
COCO = [(f"train2014/COCO_train2014_{i:012}.jpg", "train") for i in range(7)]
COCO += [(f"val2014/COCO_val2014_{i:012}.jpg", split) for i, split in enumerate(KARPATHYS)]


def coco_jpeg(number):
    """A picture of 40 x 30 pixels whose colour tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(file, "JPEG")
    return file.getvalue()


PICTURES = {name: coco_jpeg(number) for number, (name, _) in enumerate(COCO)}


def coco_captions(subset, base):
    """captions_*.json of a folder of pictures: two captions each."""
    names = [(number, name) for number, (name, _) in enumerate(COCO) if name.startswith(subset)]
    images = [
        {
            "id": number,
            "file_name": name.partition("/")[2],
            "coco_url": f"{base}/{name}",
            "width": 40,
            "height": 30,
        }
        for number, name in names
    ]
    captions = [{"image_id": i, "caption": f"red {i} by {k}"} for i, _ in names for k in "ab"]
    return json.dumps({"info": {}, "images": images, "annotations": captions})


def karpathys_coco():
    """dataset_coco.json of the same pictures."""
    images = [
        {
            "filepath": name.partition("/")[0],
            "filename": name.partition("/")[2],
            "split": split,
            "sentences": [{"raw": f"red {i} by {k}"} for k in "ab"],
        }
        for i, (name, split) in enumerate(COCO)
    ]
    return json.dumps({"dataset": "coco", "images": images})


@pytest.fixture
def coco(server, monkeypatch, tmp_path):
    """A COCO of 12 pictures and 24 captions on the local server; runs the command, returns status.

    `coco.zips`: {subset: content}; `coco.serve(subset, *behaviours)`: a source for each.
    """
    base = f"http://127.0.0.1:{server.server_port}"
    subsets = ("train2014", "val2014")
    coco_zips = {"annotations": b""}
    for subset in subsets:
        pictures = [item for item in PICTURES.items() if item[0].startswith(subset)]
        coco_zips[subset] = zip_of(*pictures)
    captions = [
        (f"annotations/captions_{each}.json", coco_captions(each, base)) for each in subsets
    ]
    coco_zips["annotations"] = zip_of(*captions, ("annotations/instances_val2014.json", "{}"))
    coco_zips["splits"] = zip_of(("dataset_coco.json", karpathys_coco()))

    def source(subset, *behaviours):
        """A Remote as download_datasets has it: only the splits have a checksum."""
        content = coco_zips[subset]
        urls = [
            server.url(f"/{subset}{number}", **({"content": content} | behaviour))
            for number, behaviour in enumerate(behaviours or [{}])
        ]
        known = remote(content, *urls, name=f"{subset}.zip", keep=("*.jpg",))
        if subset == "splits":
            return known._replace(keep=("dataset_coco.json",))
        keep = ("captions_*.json",) if subset == "annotations" else ("*.jpg",)
        return known._replace(checksum="", keep=keep, into=subset)

    def serve(subset, *behaviours):
        if subset == "splits":
            monkeypatch.setitem(dd.OPTIONAL, "coco2014", (source(subset, *behaviours),))
        else:
            parts[subset] = (source(subset, *behaviours),)
            monkeypatch.setitem(dd.DATASETS, "coco2014", tuple(parts.values()))

    parts = {}
    for subset in coco_zips:
        serve(subset)
    for name, content in PICTURES.items():
        server.url(f"/{name}", content=content)
        server.url(f"/google/{name}", status=404)
    monkeypatch.setattr(dd, "COCO_AMAZON", base)
    monkeypatch.setattr(dd, "COCO_GOOGLE", f"{base}/google")
    monkeypatch.setitem(dd.EXPECTED, "coco2014", (12, 24))

    def run(*arguments):
        return dd.main(["--dataset", "coco", "--data_dir", str(tmp_path / "data"), *arguments])

    return SimpleNamespace(run=run, serve=serve, zips=coco_zips, folder=tmp_path / "data" / "coco")


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


CAPTIONS = {f"annotations/captions_{subset}2014.json" for subset in ("train", "val")}


def test_coco_lies_as_its_authors_lay_it_out(coco, capsys):
    assert coco.run() == 0
    assert capsys.readouterr().out == f"coco2014: 12 images and 24 captions in {coco.folder}\n"
    assert files_below(coco.folder) == {*PICTURES, *CAPTIONS, "dataset_coco.json"}
    assert (coco.folder / COCO[3][0]).read_bytes() == PICTURES[COCO[3][0]]
    assert list((coco.folder.parent / ".downloads").iterdir()) == []
    assert coco.run("--verify_only") == 0
    dataset = load_dataset("custom", coco.folder, coco.folder / "dataset_coco.json")
    assert dataset.table.groupby("split").size().to_dict() == {"test": 1, "train": 9, "val": 2}


def damaged(content):
    """The same size, a zip, but a bit of the first picture in it is another."""
    place = content.index(b"JFIF") + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_zip_without_a_checksum_must_be_whole_or_the_next_source_is_tried(
    coco, server, tmp_path, capsys
):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        for name in (name for name in PICTURES if name.startswith("train")):
            archive.writestr(name, PICTURES[name])
    coco.zips["train2014"] = whole = stored.getvalue()
    coco.serve(
        "train2014",
        {"status": 404},
        {"content": b"<html>Sign in</html>"},  # another size than the zip's
        {"content": bytes(len(whole))},  # a file of the right size that is no zip
        {"content": damaged(whole)},
        {"drops": [len(whole) // 3, 200]},  # the connection is lost twice
    )
    assert coco.run() == 0
    shown = capsys.readouterr().err
    assert "train20140: HTTP 404" in shown
    assert f"train20141: offers 20 bytes, expected {len(whole):,}" in shown
    assert "train20142: wrong content, deleted" in shown and "not a whole zip" in shown
    assert "train20143: wrong content, deleted" in shown and "is damaged" in shown
    ranges = [asked for path, asked in server.requests if path == "/train20144"]
    third = len(whole) // 3
    assert ranges == ["bytes=0-", f"bytes={third}-", f"bytes={third + 200}-"]
    assert files_below(coco.folder) == {*PICTURES, *CAPTIONS, "dataset_coco.json"}


def test_a_coco_that_cannot_be_had_leaves_no_folder_and_goes_on_later(coco, server, capsys):
    coco.serve("train2014", {"content": b"<html>Sign in</html>"})
    assert coco.run() == 1
    shown = capsys.readouterr()
    assert shown.out == "" and not coco.folder.exists()
    assert shown.err.splitlines()[-1].endswith(
        f"get it at https://cocodataset.org/#download and unpack it into {coco.folder}"
    )
    coco.serve("train2014")
    assert coco.run() == 0
    asked = [path for path, _ in server.requests]
    assert [asked.count(f"/{part}0") for part in ("annotations", "val2014", "train2014")] == [
        1,
        1,
        2,
    ]


def test_coco_does_without_karpathys_splits_and_says_so(coco, capsys):
    coco.serve("splits", {"status": 404})
    assert coco.run() == 0
    assert "without dataset_coco.json its splits will be drawn" in capsys.readouterr().err
    assert files_below(coco.folder) == {*PICTURES, *CAPTIONS}


def test_a_part_of_coco_is_fetched_picture_by_picture(coco, server, capsys):
    assert coco.run("--max_images", "6") == 0
    assert capsys.readouterr().out.endswith(
        f"coco2014: 6 images and 12 captions in {coco.folder}, a part of it\n"
    )
    asked = {path for path, _ in server.requests}
    pictures = {path.removeprefix("/") for path in asked if path.endswith(".jpg")}
    assert asked - {f"/{name}" for name in pictures} == {"/annotations0", "/splits0"}
    assert files_below(coco.folder) == {*pictures, *CAPTIONS, "dataset_coco.json"}
    assert all((coco.folder / name).read_bytes() == PICTURES[name] for name in pictures)
    for captions in ("dataset_coco.json", "annotations"):
        dataset = load_dataset("custom", coco.folder, coco.folder / captions)
        assert set(dataset.table.image) == pictures
        assert set(dataset.table.split) == {"train", "val", "test"}
    assert list((coco.folder.parent / ".downloads").iterdir()) == []
    assert coco.run("--verify_only") == 0 and coco.run("--max_images", "6") == 0
    capsys.readouterr()
    for other in ([], ["--max_images", "7"]):  # a part is not taken for the whole, nor for another
        assert coco.run(*other) == 1
        asked_for = "7 pictures" if other else "all pictures"
        assert f"made with 6 pictures, not {asked_for}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"content": b"<html>Sign in</html>"}, "not a whole JPEG"),
        ({"content": PICTURES[COCO[0][0]][:-200]}, "not a whole JPEG"),
        ({"content": JPEG}, "not a whole JPEG"),
        ({"status": 404}, "HTTP 404"),
        ({"content": b"x", "no_length": True, "ignores_range": True}, "says no size"),
        ({"content": bytes(3000)}, "says 3,000 bytes, expected 1 to 2,000 bytes"),
        (
            {"content": PICTURES[COCO[0][0]], "drops": [50] * 99, "ignores_range": True},
            "ended at 50",
        ),
    ],
    ids=["page", "cut", "head", "absent", "unsized", "large", "drops"],
)
def test_a_wrong_picture_is_never_kept_and_the_others_wait(
    coco, server, monkeypatch, capsys, wrong, message
):
    monkeypatch.setattr(dd, "MAX_PICTURE_BYTES", 2000)
    victim = COCO[8][0]
    server.url(f"/{victim}", **wrong)
    assert coco.run("--max_images", "12") == 1
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert "1 of 12 pictures: no source works; the first is http" in last and message in last
    assert shown.out == "" and not coco.folder.exists()
    before = len(server.requests)
    server.url(f"/{victim}", content=PICTURES[victim], drops=[100])
    assert coco.run("--max_images", "12") == 0
    asked = [path for path, _ in server.requests[before:]]
    assert asked == [f"/{victim}"] * 2  # 11 pictures and both zips were there
    assert (coco.folder / victim).read_bytes() == PICTURES[victim]


def test_a_picture_of_another_size_than_the_captions_say_is_refused(coco, server, capsys):
    file = io.BytesIO()
    Image.new("RGB", (30, 40)).save(file, "JPEG")
    server.url(f"/{COCO[0][0]}", content=file.getvalue())
    server.url(f"/google/{COCO[0][0]}", content=PICTURES[COCO[0][0]])  # the second source
    assert coco.run("--max_images", "12") == 0
    assert (coco.folder / COCO[0][0]).read_bytes() == PICTURES[COCO[0][0]]


def test_verify_only_counts_cocos_pictures_by_their_names(coco, capsys):
    assert coco.run("--verify_only") == 1
    assert capsys.readouterr().err == (
        f"download_datasets.py: error: {coco.folder}: not there; "
        "get it with: python download_datasets.py --dataset coco --coco_year 2014\n"
    )
    coco.run()
    (coco.folder / COCO[2][0]).write_bytes(b"<html>")
    (coco.folder / COCO[9][0]).unlink()
    capsys.readouterr()
    assert coco.run("--verify_only") == 1
    message = f"2 of 12 pictures are missing or no JPEG, the first is {COCO[2][0]}"
    assert message in capsys.readouterr().err
    assert coco.run("--verify_only", "--coco_year", "2017") == 1
    assert "captions_train2017.json: No such file or directory" in capsys.readouterr().err


def test_the_official_numbers_of_coco_add_up():
    assert dd.EXPECTED["coco2014"] == (82_783 + 40_504, 414_113 + 202_654)
    assert dd.EXPECTED["coco2017"] == (118_287 + 5_000, 591_753 + 25_014)


# ------------------------------------------------------------------------------------ --verify_only


@pytest.fixture
def flickr8k(tmp_path, monkeypatch):
    """A good Flickr8k folder of 4 images and 20 captions below tmp_path."""
    monkeypatch.setattr(dd, "EXPECTED", {"flickr8k": (4, 20)})
    folder = tmp_path / "flickr8k"
    (folder / "Images").mkdir(parents=True)
    for number in range(4):
        (folder / "Images" / f"{number}.jpg").write_bytes(JPEG)
    rows = "".join(f"{image}.jpg,a dog .\n" for image, _ in ROWS)
    (folder / "captions.txt").write_bytes(f"image,caption\n{rows}".encode())
    return folder


def verify(folder):
    return dd.main(["--dataset", "flickr8k", "--data_dir", str(folder.parent), "--verify-only"])


def test_verify_only_accepts_each_captions_format(flickr8k, capsys):
    assert verify(flickr8k) == 0
    (flickr8k / "captions.txt").unlink()
    rows = "".join(f"{image}.jpg| {k}| a dog .\n" for image, k in ROWS)
    (flickr8k / "results.csv").write_text(f"image_name| comment_number| comment\n{rows}")
    assert verify(flickr8k) == 0
    (flickr8k / "results.csv").unlink()
    (flickr8k / "Flickr8k.token.txt").write_bytes(TOKENS)
    assert verify(flickr8k) == 0
    (flickr8k / "Flickr8k.token.txt").unlink()
    sentences = [{"raw": "a dog ."}] * 5
    images = [{"filename": f"{number}.jpg", "sentences": sentences} for number in range(4)]
    (flickr8k / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    assert verify(flickr8k) == 0
    assert capsys.readouterr().out == f"flickr8k: 4 images and 20 captions in {flickr8k}\n" * 4


def remove_one_image(folder):
    (folder / "Images" / "2.jpg").unlink()


def replace_one_image(folder):
    (folder / "Images" / "2.jpg").write_text("<html>")


def cut_the_captions(folder):
    content = (folder / "captions.txt").read_bytes()
    (folder / "captions.txt").write_bytes(content[: len(content) // 2])


def remove_the_captions(folder):
    (folder / "captions.txt").unlink()


def spoil_the_json(folder):
    (folder / "captions.txt").rename(folder / "dataset_flickr8k.json")


def remove_everything(folder):
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_one_image, "3 images, expected at least 4"),
        (replace_one_image, "3 images, expected at least 4"),
        (cut_the_captions, "captions, expected at least 20"),
        (remove_the_captions, "no captions file"),
        (spoil_the_json, "not one of Karpathy's dataset files"),
        (remove_everything, "get it with: python download_datasets.py --dataset flickr8k"),
    ],
)
def test_verify_only_names_what_is_damaged(flickr8k, capsys, damage, message):
    damage(flickr8k)
    assert verify(flickr8k) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "imagenet"],
        ["--force", "--verify_only"],
        ["--force", "--entities", "folder"],
        ["--dataset", "flickr8k", "--entities", "folder"],
        ["--data_dir", "{file}"],
        ["--dataset", "sample", "extra"],
        ["--dataset", "flickr8k", "--max_images", "9"],
        ["--dataset", "flickr8k", "--coco_year", "2014"],
        ["--dataset", "coco", "--coco_year", "2015"],
        ["--dataset", "coco", "--max_images", "2"],
        ["--dataset", "coco", "--max_images", "9", "--verify_only"],
    ],
)
def test_misuse_is_one_line_and_status_2(tmp_path, arguments):
    (tmp_path / "file").touch()
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    command = [sys.executable, dd.__file__, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == ""
    usage, error = run.stderr.splitlines()
    assert usage.startswith("usage:") and "error:" in error


# ------------------------------------------------------------------------------- the sample dataset


def test_a_complete_sample_is_left_alone_and_another_is_refused(tmp_path):
    sample = dd.draw_sample_dataset(tmp_path / "sample", seed=3, num_images=10)
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    assert dd.draw_sample_dataset(sample, seed=3, num_images=10) == sample
    with pytest.raises(ValueError, match="not the complete sample dataset with these settings"):
        dd.draw_sample_dataset(sample, seed=3, num_images=11)
    assert {path: path.stat().st_mtime_ns for path in sample.rglob("*")} == before


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(rng, tiles):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_dataset, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dd.draw_sample_dataset(tmp_path / "sample", num_images=10)
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_that_finishes_second_keeps_the_first(tmp_path):
    folder = tmp_path / "sample"
    with dd.new_folder(folder) as partial:
        (partial / "slow").touch()
        folder.mkdir()
        (folder / "fast").touch()
    assert set(tmp_path.rglob("*")) == {folder, folder / "fast"}


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_images must be at least 10, got 9"):
        dd.draw_sample_dataset(tmp_path / "sample", num_images=9)


def test_the_sample_command_draws_verifies_and_mends(tmp_path, monkeypatch, capsys):
    draw_ten = functools.partial(dd.draw_sample_dataset, num_images=10)
    monkeypatch.setattr(dd, "draw_sample_dataset", draw_ten)
    command = ["--dataset", "sample", "--data_dir", str(tmp_path)]
    assert dd.main([*command, "--verify_only"]) == 1
    assert dd.main(command) == 0
    assert dd.main([*command, "--verify_only"]) == 0
    line = f"sample: 10 images and 50 captions in {tmp_path / 'sample'}\n"
    assert capsys.readouterr().out == line * 2
    (tmp_path / "sample" / "Images" / "sample_0_0003.jpg").unlink()
    assert dd.main([*command, "--verify_only"]) == 1
    assert dd.main(command) == 1
    assert dd.main([*command, "--force"]) == 0
    (tmp_path / "sample" / "boxes.json").write_text("[1]")
    assert dd.main([*command, "--verify_only"]) == 1


# ---------------------------------------------------------------------------------- encoder weights


def refusal(kind, source, name="squeezenet1_1"):
    """The one line with which a source of weights is refused."""
    with pytest.raises(kind) as error:
        dd.load_encoder_weights(name, source, seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


class Bomb:
    """Pickles as a command that makes the file it is given."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_unusable_weight_files_are_refused_by_name(tmp_path):
    missing, bomb, text, listing, empty = (
        tmp_path / name for name in ("missing.pth", "bomb.pth", "text.pth", "list.pth", "empty.pth")
    )
    bomb.write_bytes(pickle.dumps({"conv1.weight": Bomb(tmp_path / "exploded")}, protocol=2))
    text.write_text("these are no weights")
    torch.save([torch.zeros(2)], listing)
    empty.touch()
    assert str(missing) in refusal(FileNotFoundError, str(missing))
    assert str(tmp_path) in refusal(FileNotFoundError, str(tmp_path))  # a folder
    for file in (bomb, text, listing, empty):
        message = refusal(ValueError, str(file))
        assert str(file) in message and "state dict" in message
    assert "list" in refusal(ValueError, str(listing))
    assert not (tmp_path / "exploded").exists()


def test_a_weight_file_that_was_cut_short_is_refused(tmp_path):
    file = tmp_path / "short.pth"
    torch.save(dd.load_encoder_weights("squeezenet1_1", "random", seed=0), file)
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        assert str(file) in refusal(ValueError, str(file))


def test_a_file_of_weights_is_read_as_it_is(tmp_path):
    saved = dd.load_encoder_weights("squeezenet1_1", "random", seed=0)
    torch.save(saved, tmp_path / "weights.pth")
    state = dd.load_encoder_weights("squeezenet1_1", str(tmp_path / "weights.pth"), seed=5)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def no_network(url, **_options):
    """Stands in for torch.hub's download on a machine without a network."""
    raise urllib.error.URLError("Name or service not known")


def publish(monkeypatch, folder, digest, name="squeezenet1_1"):
    """As if torchvision's weights were a file with this SHA-256, and there were no network. Returns its local place."""
    weights = SimpleNamespace(
        IMAGENET1K_V1=SimpleNamespace(url=f"https://nowhere/{name}-{digest[:8]}.pth")
    )
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _name: weights)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(dd, "WEIGHTS_DIR", folder)
    return folder / f"{name}-{digest[:8]}.pth"


def sha256(file):
    """The file's SHA-256 in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_imagenet_weights_are_looked_for_in_the_documented_folder_first(tmp_path, monkeypatch):
    assert Path("../../resources/models") == dd.WEIGHTS_DIR
    state = dd.load_encoder_weights("squeezenet1_1", "random", seed=3)
    torch.save(state, tmp_path / "weights.pth")
    placed = publish(monkeypatch, tmp_path, sha256(tmp_path / "weights.pth"))
    (tmp_path / "weights.pth").rename(placed)
    found = dd.load_encoder_weights("squeezenet1_1", "imagenet", seed=0)
    assert all(torch.equal(found[name], state[name]) for name in state)

    with placed.open("ab") as file:
        file.write(b"\0")
    message = refusal(ValueError, "imagenet")
    assert str(placed) in message and "SHA-256" in message


@pytest.mark.parametrize(
    "name",
    ["resnet50-19c8e357.pth", "resnet50-0676ba61.pth"],  # torchvision's first and present file
)
def test_resnet50_may_be_placed_under_either_name_but_not_with_other_contents(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(dd, "WEIGHTS_DIR", tmp_path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
    message = refusal(ValueError, "imagenet", "resnet50")
    assert str(tmp_path / name) in message and "SHA-256" in message
    assert not (tmp_path / "exploded").exists()


def test_a_file_whose_hash_merely_begins_as_its_name_says_runs_no_code(tmp_path, monkeypatch):
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
    placed = publish(monkeypatch, tmp_path, sha256(tmp_path / "bomb"))
    (tmp_path / "bomb").rename(placed)
    assert str(placed) in refusal(ValueError, "imagenet")
    assert not (tmp_path / "exploded").exists()


def test_a_broken_file_in_torchs_own_download_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dd, "WEIGHTS_DIR", tmp_path / "models")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").write_text(
        "half a page of some proxy's error message"
    )
    assert "squeezenet1_1-b8a52dc0.pth" in refusal((ValueError, FileNotFoundError), "imagenet")


@pytest.mark.parametrize(
    "fault", [urllib.error.URLError("no route"), TimeoutError("timed out"), ConnectionResetError("reset"),
              RuntimeError('invalid hash value (expected "b8a52dc0", got "0")')]
)  # fmt: skip
def test_weights_that_cannot_be_downloaded_are_an_error_never_random(tmp_path, monkeypatch, fault):
    asked = {}

    def fail(url, **options):
        asked.update(options)
        raise fault

    monkeypatch.setattr(dd, "WEIGHTS_DIR", tmp_path / "models")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    message = refusal(FileNotFoundError, "imagenet")
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in message
    assert f"{tmp_path / 'models'}" in message and "--encoder_weights" in message
    assert asked["check_hash"] and asked["weights_only"]


def test_random_weights_are_drawn_from_the_seed_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = (
        dd.load_encoder_weights("squeezenet1_1", "random", seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    third = dd.load_encoder_weights("squeezenet1_1", "random", 1)
    name = "features.0.weight"
    assert all(torch.equal(first[k], second[k]) and torch.equal(first[k], third[k]) for k in first)
    assert not torch.equal(first[name], other[name])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))

"""The service as its users meet it: over a socket, in this process or, for signals and memory, in one of its own."""

import contextlib
import http.client
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from test_end_to_end import workshop

import benchmark_service
import caption_client
import caption_options
import caption_service
import config_file
import flickr_image_caption as fic
import runtime
from caption_queue import Busy, CaptionQueue
from model_versions import ModelVersionManager
from service_requests import as_maps

ROOT = Path(__file__).resolve().parents[1]
BODY_SECONDS = 2.0
MAX_BODY = 2_000_000


class Reply(NamedTuple):
    status: int
    headers: dict
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)


class Server(NamedTuple):
    """A running service: what a test asks it."""

    port: int
    service: object = None  # caption_service.Service, where it runs in this process
    process: object = None
    admin_port: int = 0
    log: Path | None = None

    def ask(self, path="/predict", files=(), fields=None, method=None, headers=None, port=None):
        """The Reply to a request; files: contents or (field, content) pairs of a multipart body."""
        body, headers = None, dict(headers or {})
        if files or fields is not None:
            pairs = [file if isinstance(file, tuple) else ("file", file) for file in files]
            body, headers["Content-Type"] = form(pairs, fields or {})
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method or ("POST" if body else "GET"), path, body, headers)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def send(self, head, chunks=(), pause=0.0):
        """What comes back for bytes that are sent as they are: head, then the chunks with pauses."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode())
            with contextlib.suppress(OSError):  # it may answer and leave while we send
                for chunk in chunks:
                    connection.sendall(chunk)
                    time.sleep(pause)
                    if pause and readable(connection):
                        break
            received = b""
            with contextlib.suppress(OSError):
                while (part := connection.recv(65536)) and not is_whole(received + part):
                    received += part
                received += part
        head, _, content = received.partition(b"\r\n\r\n")
        return Reply(int(head.split()[1]), {}, content)

    def wait(self, seconds=180):
        """Until a model answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.ask("/ready").status == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(self.log.read_text() if self.log else self.ask("/ready").content)

    def memory(self):
        """Bytes that the service's process holds."""
        return self.memory_of(self.process.pid)

    def memory_of(self, pid):
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def form(files, fields):
    """(field, content) pairs and {name: text} as a multipart body, and its media type."""
    parts = [f'name="{name}"\r\n\r\n{text}'.encode() for name, text in fields.items()]
    parts += [
        f'name="{field}"; filename="secret_name.jpg"\r\n\r\n'.encode() + content
        for field, content in files
    ]
    lines = [b"--rand\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts]
    return b"".join([*lines, b"--rand--\r\n"]), "multipart/form-data; boundary=rand"


def readable(connection):
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK)) or True
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(30)


def is_whole(received):
    head, _, content = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(length) and len(content) >= int(length[1])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def served_here(model, **settings):
    """A Server in this process."""
    given = {"model": str(model), "admin_port": 0, "precision": "float32", "threads": "1"}
    app = caption_service.create_app(caption_service.Settings(**given | settings))
    port = free_port()
    config = uvicorn.Config(app, port=port, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Server(port, app.state.service).wait()
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def served_alone(model, folder, **settings):
    """A Server that is a process of its own, as ./setup.sh serve starts it."""
    ports = {"port": free_port(), "admin_port": free_port()}
    given = {"threads": 1, "precision": "float32"} | ports | settings
    variables = {f"CAPTION_{name.upper()}": str(value) for name, value in given.items()}
    log = folder / "service.log"
    command = [sys.executable, "-m", "caption_service", "serve", "--model_path", str(model)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stderr=file)
    try:
        yield Server(**ports, process=process, log=log).wait()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shop_folder():
    """Where test_end_to_end trained its decoders, tiny ones."""
    return Path(workshop().name)


@pytest.fixture(scope="module")
def pictures(shop_folder):
    """The bytes of some pictures."""
    return [path.read_bytes() for path in sorted(shop_folder.glob("data/sample/Images/*"))[:8]]


@pytest.fixture(scope="module")
def server(shop_folder):
    with served_here(shop_folder / "attention/best.pt") as server:
        yield server


@pytest.fixture(scope="module")
def captioner(shop_folder):
    return fic.load_captioner(shop_folder / "attention/best.pt", "cpu", "float32")


def expected(captioner, contents, **decoding):
    """The hypotheses that the program itself finds."""
    captioner, options = captioner
    size = captioner.encoder.image_size
    pixels = [fic.image_loading.load_image("x", size, content) for content in contents]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return captioner.caption(images, options.decoding._replace(**decoding))


# -------------------------------------------------------------------------------------- what is answered


def test_it_answers_as_the_program_itself_captions(server, captioner, pictures):
    """Captions, their order, log-probabilities, words and maps."""
    fields = {"algorithm": "beam", "beam_size": 4, "num_captions": 3, "attention": "true"}
    reply = server.ask(files=pictures[:1], fields=fields)
    (hypotheses,) = expected(captioner, pictures[:1], beam_size=4, num_captions=3)
    answer, model = reply.json, captioner[0]
    assert reply.status == 200 and len(answer["captions"]) == 3
    assert answer["caption"] == answer["captions"][0]["caption"] and answer["algorithm"] == "beam"
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert answer["image_size"] == list(picture.size)
    assert 0 < answer["processing_time_seconds"] < 30
    for given, hypothesis in zip(answer["captions"], hypotheses, strict=True):
        assert given["caption"] == model.vocabulary.decode(hypothesis.tokens)
        assert given["words"] == model.words(hypothesis)
        assert given["log_prob"] == pytest.approx(hypothesis.log_prob, abs=1e-4)
        attention, grid = given["attention"], model.attention_grid(hypothesis)
        assert attention["grid"] == list(grid.shape[1:]) == model.encoder.grid
        assert np.allclose(attention["maps"], grid.reshape(len(grid), -1), atol=2e-6)
        assert np.allclose(np.sum(attention["maps"], axis=1), 1, atol=1e-4)
        beside = model.attention_beside(hypothesis)
        assert attention["beside"].keys() == beside.keys()
        for name, shares in beside.items():
            assert np.allclose(attention["beside"][name], shares, atol=1e-6)


def test_defaults_are_the_checkpoint_s_and_maps_come_when_asked_for(server, captioner, pictures):
    (hypotheses,) = expected(captioner, pictures[:1])
    (caption,) = server.ask(files=pictures[:1]).json["captions"]
    assert caption["words"] == captioner[0].words(hypotheses[0]) and caption["attention"] is None


def test_a_decoder_that_looks_nowhere_has_no_maps(shop_folder, pictures):
    fields = {"attention": "true", "min_length": 2}
    with served_here(shop_folder / "lstm/best.pt") as server:
        assert server.ask("/model/info").json["attention_maps"] is False
        (caption,) = server.ask(files=pictures[:1], fields=fields).json["captions"]
    assert len(caption["words"]) >= 2 and caption["attention"] is None


def test_the_size_is_that_of_the_picture_as_it_is_shown(server):
    """A phone writes what is upright lying on its side, and says so; a large JPEG is decoded at half its size."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1200, 800), "green").save(file, "JPEG", exif=exif)
    assert server.ask(files=[file.getvalue()]).json["image_size"] == [800, 1200]


def test_greedy_is_a_beam_of_one_and_samples_differ(server, pictures):
    def captions(**fields):
        return [
            each["caption"]
            for each in server.ask(files=pictures[:1], fields=fields).json["captions"]
        ]

    assert captions(algorithm="greedy") == captions(beam_size=1)
    hot = {"algorithm": "sample", "temperature": 3, "num_captions": 4}
    assert len({tuple(captions(**hot)) for _ in range(4)}) == 4
    assert set(captions(**hot | {"top_k": 1})) == set(captions(algorithm="greedy"))
    assert all(len(caption.split()) <= 2 for caption in captions(**hot | {"max_length": 2}))


def test_a_batch_keeps_its_order_and_a_bad_picture_stops_no_other(server, pictures):
    files = [("files", content) for content in (pictures[0], b"no picture", pictures[1])]
    reply = server.ask("/predict/batch", files, {"num_captions": 2})
    alone = [server.ask(files=[content]).json["caption"] for content in pictures[:2]]
    first, bad, second = reply.json["results"]
    assert reply.status == 200 and [first["caption"], second["caption"]] == alone
    assert bad.keys() == {"error"} and "not a readable image" in bad["error"]


def test_requests_that_arrive_together_are_computed_together_and_answered_apart(
    server, captioner, pictures
):
    queue = server.service.queue
    before = server.ask("/metrics", headers={"Accept": "application/json"}).json
    together = pictures * 4
    with ThreadPoolExecutor(len(together)) as pool:
        replies = list(pool.map(lambda content: server.ask(files=[content]), together))
    texts = [
        captioner[0].vocabulary.decode(best.tokens) for best, *_ in expected(captioner, pictures)
    ]
    assert [reply.json["caption"] for reply in replies] == texts * 4
    after = server.ask("/metrics", headers={"Accept": "application/json"}).json
    batches = after["batch_size_count"] - before["batch_size_count"]
    assert after["batch_size_sum"] - before["batch_size_sum"] == len(together)
    assert batches < len(together) / 2 and len(queue) == 0


def test_headers_name_the_request_and_time_its_parts(server, pictures):
    own = server.ask(files=pictures[:1], headers={"X-Request-ID": "my-1.request"})
    assert own.headers["x-request-id"] == own.json["request_id"] == "my-1.request"
    other = server.ask(files=pictures[:1], headers={"X-Request-ID": "a b<script>"})
    assert re.fullmatch("[0-9a-f]{32}", other.json["request_id"])
    parts = dict(re.findall(r"(\w+);dur=([\d.]+)", own.headers["server-timing"]))
    assert parts.keys() == {"decode", "wait", "encode", "search"}
    whole = float(own.headers["x-response-time"].removesuffix("ms"))
    assert 0 < sum(map(float, parts.values())) < whole
    assert own.headers["x-content-type-options"] == "nosniff"


# ------------------------------------------------------------------------------- what else it can be asked


def test_a_browser_gets_the_page_and_a_program_gets_json(server):
    page = server.ask("/", headers={"Accept": "text/html,*/*"})
    policy = page.headers["content-security-policy"]
    assert page.content == (caption_service.PAGE / "index.html").read_bytes()
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for file in caption_service.PAGE.iterdir():
        if file.name != "index.html":
            assert server.ask(f"/{file.name}").content == file.read_bytes()
    info = server.ask("/", headers={"Accept": "application/json"}).json
    assert info["ready"] is True and info["endpoints"]["/predict"] == ["POST"]
    assert server.ask("/../caption_service.py").status == 404


def test_the_model_is_described_without_a_path(server, shop_folder):
    info = server.ask("/model/info").json
    assert info["model_path"] == "attention/best.pt" and str(shop_folder) not in str(info)
    assert info["feature_extractor"] == "shufflenet_v2_x0_5" and info["image_size"] == [224, 224]
    assert (info["decoder"], info["attention_maps"], info["grid"]) == ("attention", True, [7, 7])
    assert info["max_length"] == 12 and info["fault"] is None and info["vocab_size"] > 10


def test_metrics_count_requests_and_errors(server, pictures):
    def numbers():
        return server.ask("/metrics", headers={"Accept": "application/json"}).json

    before = numbers()
    server.ask(files=pictures[:1])
    server.ask(files=[b"no picture"])
    after = numbers()
    assert after["requests_total"] - before["requests_total"] == 3  # the first numbers, too
    assert after["errors_total"] - before["errors_total"] == 1
    assert after["pictures_total"] - before["pictures_total"] == 1
    assert after["uptime_seconds"] > before["uptime_seconds"] and after["ready"] == 1
    assert after["error_rate"] == after["errors_total"] / after["requests_total"]
    text = server.ask("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    lines = text.content.decode()
    for name in ("requests_total", "errors_total", "request_seconds_bucket", "batch_size_bucket"):
        assert re.search(rf"^caption_{name}\{{", lines, re.M)
    assert re.search(r"^caption_queue_length 0\.0$", lines, re.M)


def test_health_does_not_wait_for_a_model_and_readiness_does(tmp_path, pictures):
    """Whose fault is told without its folder."""
    (tmp_path / "best.pt").write_bytes(b"PK damaged")
    settings = caption_service.Settings(model=str(tmp_path / "best.pt"), admin_port=0)
    app = caption_service.create_app(settings)
    port = free_port()
    web = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=web.run)
    thread.start()
    server = Server(port, app.state.service)
    try:
        while not web.started:
            time.sleep(0.01)
        while server.service.model.fault is None:
            assert server.ask("/ready").status == 503
            time.sleep(0.05)
        assert server.ask("/health").status == 200
        for reply in (server.ask("/ready"), server.ask(files=pictures[:1])):
            assert reply.status == 503 and int(reply.headers["retry-after"]) >= 1
            assert "best.pt: not a usable" in reply.json["error"]
            assert str(tmp_path) not in reply.json["error"]
        assert server.ask("/model/info").json["ready"] is False
    finally:
        web.should_exit = True
        thread.join()


def test_the_docs_name_every_endpoint_and_field_and_load_nothing_from_elsewhere(server):
    reply = server.ask("/docs")
    page = reply.content.decode()
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for path in ("/predict", "/predict/batch", "/model/info", "/metrics", "/ready", "/health"):
        assert f" {path}</code>" in page
    for field in ("file", "files", "attention", *caption_options.DECODING):
        assert f"<code>{field}</code>" in page
    assert "<script" not in page and "//" not in page.replace("<!DOCTYPE html>", "")
    schema = server.ask("/openapi.json").json["paths"]["/predict"]["post"]["requestBody"]
    fields = schema["content"]["multipart/form-data"]["schema"]["properties"]
    assert fields["algorithm"]["enum"] == list(caption_options.DECODING["algorithm"].kind)


def test_other_origins_may_ask_where_settings_say_so(shop_folder, pictures, server):
    origin = {"Origin": "https://example.org"}
    with served_here(
        shop_folder / "lstm/best.pt", cors_origins="https://example.org"
    ) as open_server:
        reply = open_server.ask(files=pictures[:1], headers=origin)
        assert reply.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in server.ask("/health", headers=origin).headers


# ------------------------------------------------------------------------------------------- bad requests


def png_bomb():
    """A PNG that says it has 50,000 x 50,000 pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(2**20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def long_gif(frames):
    """An animation of so many frames, assembled from one: Pillow would drop equal ones."""
    file = io.BytesIO()
    pictures = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=20, loop=0)
    content = file.getvalue()
    first = content.index(b"\x21\xf9\x04")
    second = content.index(b"\x21\xf9\x04", first + 1)
    return content[:first] + content[first:second] * frames + b";"


GOOD = "good"  # stands for a picture that can be captioned
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
BAD_FILES = {
    "text": ([b"hello"], {}, 400, "picture: not a readable image"),
    "truncated": (["truncated"], {}, 400, "picture: not a readable image"),
    "bomb": ([png_bomb()], {}, 400, "50000 x 50000 pixels takes"),
    "empty": ([b""], {}, 400, "picture: the file is empty"),
    "svg": ([SVG], {}, 400, "picture: not a readable image"),
    "long gif": ([long_gif(10_000)], {}, 400, "more than 1000 frames"),
    "wrong field": ([("picture", GOOD)], {}, 422, "in the field 'file'"),
    "no file": ([], {"algorithm": "beam"}, 422, "in the field 'file'"),
    "two files": ([GOOD, GOOD], {}, 400, "Too many files"),
    "algorithm": ([GOOD], {"algorithm": "magic"}, 400, "algorithm: 'magic' is none of greedy, beam"),
    "beam": ([GOOD], {"beam_size": "10000"}, 400, "beam_size: must be at least 1 and at most 1024"),
    "wide": ([GOOD], {"beam_size": "1000"}, 400, "beam_size: must be at most 32 here, got 1000"),
    "long": ([GOOD], {"max_length": "1000"}, 400, "max_length: must be at most 100 here"),
    "nan": ([GOOD], {"algorithm": "sample", "temperature": "nan"}, 400, "temperature: must be"),
    "infinite": ([GOOD], {"algorithm": "sample", "temperature": "inf"}, 400, "temperature: must be"),
    "none": ([GOOD], {"num_captions": "0"}, 400, "num_captions: must be at least 1"),
    "more": ([GOOD], {"beam_size": "2", "num_captions": "3"}, 400, "num_captions 3 is more than"),
    "idle": ([GOOD], {"temperature": "2"}, 400, "temperature belongs to algorithm sample, not beam"),
    "words": ([GOOD], {"beam_size": "five"}, 400, "beam_size: 'five' is not a whole number"),
    "top_p": ([GOOD], {"algorithm": "sample", "top_p": "0"}, 400, "top_p: must be above 0"),
    "unknown": ([GOOD], {"beem": "5"}, 400, "no field 'beem': there are file, algorithm"),
    "attention": ([GOOD], {"attention": "maybe"}, 400, "attention: give true or false"),
    "min_length": ([GOOD], {"min_length": "40"}, 400, "min_length 40 must be below max_length"),
    "long field": ([GOOD], {"beam_size": "5" * 5000}, 400, "Part exceeded maximum size"),
    "many digits": ([GOOD], {"beam_size": "5" * 4000}, 400, "beam_size: must be"),
}  # fmt: skip


@pytest.fixture(scope="module")
def lone(shop_folder, tmp_path_factory):
    """A service in a process of its own, with little patience."""
    folder = tmp_path_factory.mktemp("lone")
    limits = {"body_seconds": BODY_SECONDS, "max_body_mb": MAX_BODY / 1e6}
    with served_alone(shop_folder / "attention/best.pt", folder, **limits) as server:
        yield server


def check_refused(reply, status, part):
    assert (reply.status, part in reply.json["error"]) == (status, True), reply
    assert reply.json.keys() == {"error", "request_id"}
    assert "Traceback" not in reply.json["error"] and " /" not in reply.json["error"], reply


def ask_badly(server, case, good):
    files, fields, status, part = BAD_FILES[case]
    stand_ins = {GOOD: good, "truncated": good[: len(good) // 2]}
    files = [
        (file[0], stand_ins[file[1]]) if isinstance(file, tuple) else stand_ins.get(file, file)
        for file in files
    ]
    check_refused(server.ask(files=files, fields=fields), status, part)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_request_is_told_why_and_the_next_good_one_is_served(case, server, pictures):
    ask_badly(server, case, pictures[0])
    assert server.ask(files=pictures[:1]).status == 200


HEAD = """POST /predict HTTP/1.1
Host: here
Content-Type: multipart/form-data; boundary=rand
"""


def huge_body(server, good):
    """100 MB are announced and sent, as far as they are taken."""
    chunks = itertools.repeat(bytes(2**20), 100)
    reply = server.send(HEAD + "Content-Length: 100000000\n\n", chunks)
    check_refused(reply, 413, f"more than {MAX_BODY}")


def chunked_body(server, good):
    body = form([("file", good)], {})[0]
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    reply = server.send(HEAD + "Transfer-Encoding: chunked\n\n", [chunk])
    check_refused(reply, 411, "send Content-Length")


def slow_client(server, good):
    """A byte now and then."""
    body = form([("file", good)], {})[0]
    bytes_of_it = (body[i : i + 1] for i in range(len(body)))
    started = time.monotonic()
    reply = server.send(HEAD + f"Content-Length: {len(body)}\n\n", bytes_of_it, pause=0.2)
    check_refused(reply, 408, "did not arrive within 2 s")
    assert BODY_SECONDS <= time.monotonic() - started < BODY_SECONDS + 20


def no_form(server, good):
    reply = server.send(
        HEAD.replace("multipart/form-data", "image/jpeg") + "Content-Length: 5\n\n", [b"hello"]
    )
    check_refused(reply, 415, "send multipart/form-data")


def no_boundary(server, good):
    reply = server.send(HEAD.replace("; boundary=rand", "") + "Content-Length: 5\n\n", [b"hello"])
    check_refused(reply, 400, "boundary")


def leaving_client(server, good):
    """It sends a picture and does not wait; another half of one, and goes."""
    body = form([("file", good)], {})[0]
    for length in (len(body), len(body) // 2):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = HEAD + f"Content-Length: {len(body)}\n\n"
            connection.sendall(head.replace("\n", "\r\n").encode() + body[:length])


BODIES = [huge_body, chunked_body, slow_client, no_form, no_boundary, leaving_client]


@pytest.mark.parametrize("send", BODIES, ids=lambda send: send.__name__)
def test_a_bad_body_is_refused_and_the_next_good_one_is_served(send, lone, pictures):
    send(lone, pictures[0])
    assert lone.ask(files=pictures[:1]).status == 200


@pytest.mark.slow
def test_bad_requests_take_no_memory(lone, pictures):
    """And their pictures' names, contents and our folders are in no line of the log."""
    bodies = [send for send in BODIES if send is not slow_client]

    def all_of_them():
        for case in BAD_FILES:
            ask_badly(lone, case, pictures[0])
        for send in bodies:
            send(lone, pictures[0])
        assert lone.ask(files=pictures[:1]).status == 200
        return lone.memory()

    all_of_them()
    before = all_of_them()
    after = [all_of_them() for _ in range(4)]
    assert max(after) - before < 20e6, (before, after)
    log = lone.log.read_text()
    assert "secret_name" not in log and "Traceback" not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["endpoint"] for line in requests} <= {"/predict", "/ready"}
    assert 499 in {line["status"] for line in requests}  # who went away
    assert all(len(line["request_id"]) == 32 and line["milliseconds"] >= 0 for line in requests)


# ---------------------------------------------------------------------------- load, reload, signals, workers


@contextlib.contextmanager
def load_of(server, pictures, clients=4):
    """Clients that ask again and again; yields the list of statuses, or errors, they have met."""
    met, stop = [], threading.Event()

    def ask_again():
        while not stop.is_set():
            try:
                met.append(server.ask(files=[random.choice(pictures)]).status)
            except (OSError, http.client.HTTPException) as error:
                met.append(error)

    threads = [threading.Thread(target=ask_again) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield met
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_more(met, number):
    """Until so many more requests were answered."""
    before = len(met)
    wait_until(lambda: len(met) > before + number)


def test_what_it_cannot_hold_is_told_to_come_again(shop_folder, pictures):
    """At once, and while the model is at work; those that were accepted are answered."""
    with served_here(shop_folder / "attention/best.pt", queue_size=3, max_batch=1) as server:
        with ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(lambda _: server.ask(files=pictures[:1]), range(48)))
        statuses = {reply.status for reply in replies}
        refused = [reply for reply in replies if reply.status == 503]
        assert statuses == {200, 503} and server.ask(files=pictures[:1]).status == 200
    for reply in refused:
        assert "too many requests" in reply.json["error"]
        assert int(reply.headers["retry-after"]) >= 1


def test_a_newer_version_takes_over_under_load_and_a_damaged_one_does_not(
    shop_folder, pictures, tmp_path, monkeypatch
):
    """No request fails meanwhile."""
    monkeypatch.setenv("MODEL_REGISTRY", str(tmp_path / "models"))
    manager = ModelVersionManager()
    manager.register_version("1.0.0", shop_folder / "attention/best.pt")
    admin = free_port()
    with (
        served_here("registry:latest", admin_port=admin) as server,
        load_of(server, pictures) as met,
    ):
        assert server.ask("/model/info").json["model_path"] == "1.0.0/best.pt"
        manager.register_version("1.1.0", shop_folder / "multi_head/best.pt")
        reply = server.ask("/admin/reload", method="POST", port=admin)
        assert (reply.status, reply.json["model"]["model_path"]) == (200, "1.1.0/best.pt")
        wait_for_more(met, 8)

        manager.register_version("1.2.0", shop_folder / "lstm/best.pt")
        file = tmp_path / "models/1.2.0/best.pt"
        file.write_bytes(file.read_bytes()[:-100])
        reply = server.ask("/admin/reload", method="POST", port=admin)
        assert reply.status == 409 and "damaged" in reply.json["error"]
        assert str(tmp_path) not in reply.content.decode()
        info = server.ask("/model/info").json
        assert info["model_path"] == "1.1.0/best.pt" and "damaged" in info["fault"]
        assert server.ask("/ready").status == 200
        wait_for_more(met, 8)
    assert set(met) == {200}


def test_pages_of_others_cannot_reload(shop_folder):
    admin = free_port()
    with served_here(shop_folder / "lstm/best.pt", admin_port=admin) as server:
        loaded = server.ask("/model/info").json
        own = {"Origin": "http://evil.example"}
        assert server.ask("/admin/reload", method="POST", port=admin, headers=own).status == 403
        assert server.ask("/admin/reload", method="POST").status == 404  # at the open address
        assert server.ask("/model/info").json == loaded


def test_an_admin_port_that_is_taken_stops_nothing(shop_folder, pictures):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with served_here(shop_folder / "lstm/best.pt", admin_port=port) as server:
            assert server.ask(files=pictures[:1]).status == 200


@pytest.mark.slow
def test_signals_reload_and_end_it_without_a_lost_request(shop_folder, pictures, tmp_path):
    """SIGHUP, then SIGTERM, under load: what was accepted is answered, and it leaves in time."""
    shutil.copy(shop_folder / "attention/best.pt", tmp_path)
    model = tmp_path / "best.pt"
    with served_alone(model, tmp_path, grace_seconds=20) as server:
        with load_of(server, pictures) as met:
            wait_until(lambda: len(met) > 8)
            shutil.copy(shop_folder / "lstm/best.pt", tmp_path / "new.pt")
            (tmp_path / "new.pt").replace(model)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.ask("/model/info").json["decoder"] == "lstm")
            assert set(met) == {200}
            model.write_bytes(b"PK damaged")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: server.ask("/model/info").json["fault"])
            assert server.ask("/ready").status == 200
            wait_for_more(met, 8)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(30)
            assert time.monotonic() - started < 20
        refused = [error for error in met if error != 200]
        assert all(isinstance(error, ConnectionRefusedError) for error in refused), refused[:3]
    answered = met.count(200)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line[:1] == "{"]
    served = [line for line in lines if line.get("endpoint") == "/predict"]
    assert [line["status"] for line in served] == [200] * answered
    (fault,) = [line["event"] for line in lines if line["level"] == "error"]
    assert fault.startswith("no model") and fault.endswith("the one before goes on")


@pytest.mark.slow
def test_workers_share_the_port_and_all_reload(shop_folder, pictures, tmp_path):
    shutil.copy(shop_folder / "attention/best.pt", tmp_path)
    model = tmp_path / "best.pt"

    def loaded(decoder):
        lines = [
            json.loads(line) for line in server.log.read_text().splitlines() if line[:1] == "{"
        ]
        return [line["event"] == "model" and line["decoder"] == decoder for line in lines].count(
            True
        )

    with served_alone(model, tmp_path, workers=2) as server:
        wait_until(lambda: loaded("attention") == 2, 120)
        with load_of(server, pictures) as met:
            shutil.copy(shop_folder / "lstm/best.pt", tmp_path / "new.pt")
            (tmp_path / "new.pt").replace(model)
            reply = server.ask("/admin/reload", method="POST", port=server.admin_port)
            assert reply.status == 202
            wait_until(lambda: loaded("lstm") == 2, 120)
            wait_for_more(met, 16)
        assert set(met) == {200}
        numbers = server.ask("/metrics", headers={"Accept": "application/json"}).json
        assert numbers["pictures_total"] == len(met) and numbers["ready"] == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


# ----------------------------------------------------------------------------------------------- the queue


class Stub:
    """A Captioner whose encoder waits for leave, and whose captions are the pictures' values."""

    def __init__(self):
        self.may_go, self.batches, self.fails_on = threading.Event(), [], None
        self.may_search = threading.Event()
        self.may_go.set()
        self.may_search.set()

    def encode(self, images):
        self.batches.append(images[:, 0, 0, 0].tolist())
        assert self.may_go.wait(10)
        if self.fails_on in self.batches[-1]:
            raise RuntimeError("it fails")
        return images

    def caption_features(self, chunks, decoding, seed):
        assert self.may_search.wait(10)
        for images in chunks:
            yield from images[:, 0, 0, 0].tolist()


def pixels_of(value):
    return np.full((3, 1, 1), value, np.uint8)


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def queue():
    queue = CaptionQueue(capacity=6, max_batch=4, max_wait_seconds=0.3)
    yield queue
    queue.close()


def hold(queue, stub):
    """Let the thread begin with picture 0 and stay there; the queue is empty then."""
    stub.may_go.clear()
    (future,) = queue.submit(stub, [pixels_of(0)], "plain")
    wait_until(lambda: stub.batches)
    return future


def test_waiting_pictures_are_computed_together_as_far_as_they_can_be(queue, stub):
    """Those for another search are not; nobody is overtaken by those that came later and go with others."""
    futures, kinds = [hold(queue, stub)], ["plain", "other", "plain", "plain", "plain", "plain"]
    for value, kind in enumerate(kinds, start=1):
        futures += queue.submit(stub, [pixels_of(value)], kind)
    stub.may_go.set()
    found = [future.result(10) for future in futures]
    assert [each.hypotheses for each in found] == [0, 1, 2, 3, 4, 5, 6]
    assert stub.batches == [[0], [1, 3, 4, 5], [2], [6]]
    assert [each.batch_size for each in found] == [1, 4, 1, 4, 4, 4, 1]
    assert all(each.wait_seconds >= 0 and each.encode_seconds > 0 for each in found)


def test_a_full_queue_takes_all_pictures_of_a_request_or_none(queue, stub):
    first = hold(queue, stub)
    futures = queue.submit(stub, list(map(pixels_of, range(1, 5))), "plain")
    with pytest.raises(Busy) as caught:
        queue.submit(stub, list(map(pixels_of, range(5, 8))), "plain")
    assert caught.value.args[0] > 0 and len(queue) == 4
    futures += queue.submit(stub, list(map(pixels_of, range(5, 7))), "plain")
    stub.may_go.set()
    assert [future.result(10).hypotheses for future in [first, *futures]] == list(range(7))


def test_a_batch_waits_for_pictures_that_are_expected_and_not_otherwise(queue, stub):
    started = time.monotonic()
    queue.submit(stub, [pixels_of(1)], "plain")[0].result(10)
    assert time.monotonic() - started < 0.25  # less than max_wait_seconds
    with queue.expecting():
        first = queue.submit(stub, [pixels_of(2)], "plain")
        second = queue.submit(stub, [pixels_of(3)], "plain")
    assert first[0].result(10).batch_size == second[0].result(10).batch_size == 2
    with queue.expecting():
        (future,) = queue.submit(stub, [pixels_of(4)], "plain")
        assert future.result(10).wait_seconds >= 0.3  # but not for ever


def test_a_batch_is_encoded_while_the_one_before_is_searched(queue, stub):
    stub.may_search.clear()
    (first,) = queue.submit(stub, [pixels_of(1)], "plain")
    wait_until(lambda: stub.batches == [[1]])
    (second,) = queue.submit(stub, [pixels_of(2)], "plain")
    wait_until(lambda: stub.batches == [[1], [2]])
    assert not first.done()
    stub.may_search.set()
    assert (first.result(10).hypotheses, second.result(10).hypotheses) == (1, 2)
    assert first.result().search_seconds > second.result().search_seconds  # it waited for leave


@pytest.mark.parametrize("stage", [runtime.ENCODING, runtime.SEARCHING])
def test_nothing_is_computed_while_a_model_is_traced(queue, stub, stage):
    with stage:  # as who traces holds both
        (future,) = queue.submit(stub, [pixels_of(1)], "plain")
        expected = [] if stage is runtime.ENCODING else [[1]]
        wait_until(lambda: stub.batches == expected)
        time.sleep(0.1)
        assert stub.batches == expected and not future.done()
    assert future.result(10).hypotheses == 1


def test_what_nobody_waits_for_is_not_computed(queue, stub):
    first = hold(queue, stub)
    gone, stays = queue.submit(stub, [pixels_of(1), pixels_of(2)], "plain")
    assert gone.cancel()
    stub.may_go.set()
    assert (first.result(10).hypotheses, stays.result(10).hypotheses) == (0, 2)
    (gone,) = queue.submit(stub, [pixels_of(3)], "plain")
    gone.cancel()
    assert queue.submit(stub, [pixels_of(4)], "plain")[0].result(10).hypotheses == 4
    assert 1 not in itertools.chain(*stub.batches)


def test_a_picture_that_fails_fails_alone(queue, stub):
    first, stub.fails_on = hold(queue, stub), 2
    futures = queue.submit(stub, list(map(pixels_of, (1, 2, 3))), "plain")
    stub.may_go.set()
    assert [futures[row].result(10).hypotheses for row in (0, 2)] == [1, 3]
    with pytest.raises(RuntimeError, match="it fails"):
        futures[1].result(10)
    assert first.result(10).hypotheses == 0


def test_a_batch_that_cannot_be_counted_is_answered(stub):
    """Such as where Prometheus' files find no room."""

    def fail(size):
        raise OSError("no space left on device")

    queue = CaptionQueue(capacity=6, max_batch=1, max_wait_seconds=0, on_batch=fail)
    futures = queue.submit(stub, [pixels_of(value) for value in range(4)], "plain")
    assert [future.result(10).hypotheses for future in futures] == [0, 1, 2, 3]
    queue.close()


def test_a_closed_queue_has_computed_what_it_accepted(stub):
    queue = CaptionQueue(capacity=6, max_batch=4, max_wait_seconds=5)
    first = hold(queue, stub)
    futures = queue.submit(stub, list(map(pixels_of, range(1, 6))), "plain")
    threading.Timer(0.1, stub.may_go.set).start()
    queue.close()
    assert [future.result(0).hypotheses for future in [first, *futures]] == list(range(6))
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(stub, [pixels_of(1)], "plain")


def test_the_maps_of_a_large_answer_do_not_hold_up_the_others():
    """They are rounded in the thread that reads requests: 100 words of 80 x 80 cells, in Python 0.1 s a caption."""
    grid, words = (80, 80), 100
    maps = torch.rand(words, grid[0] * grid[1])
    captioner = SimpleNamespace(
        encoder=SimpleNamespace(grid=grid),
        attention_grid=lambda hypothesis: hypothesis.attention.view(words, *grid).numpy(),
        attention_beside=lambda hypothesis: {},
    )
    started = time.process_time()
    answered = as_maps(captioner, SimpleNamespace(attention=maps))
    elapsed = time.process_time() - started
    started = time.process_time()
    expected = [[round(weight, 6) for weight in row] for row in maps.tolist()]
    assert elapsed < (time.process_time() - started) / 2
    assert answered == {"grid": [80, 80], "maps": expected, "beside": {}}


def test_a_failure_is_a_500_without_what_failed(server, pictures, monkeypatch):
    def fail(*_):
        raise RuntimeError("a secret of /the/house")

    monkeypatch.setattr(server.service.model.current.captioner, "encode", fail)
    reply = server.ask(files=pictures[:1])
    assert reply.status == 500 and reply.json["error"] == "it failed: the log says why"
    monkeypatch.undo()
    assert server.ask(files=pictures[:1]).status == 200


# ------------------------------------------------------------------------------ the client, and the command line


def run_client(*arguments):
    """(status, stdout, stderr) of the client, in a process of its own."""
    command = [sys.executable, "-m", "caption_service", "client", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_client_prints_what_caption_mode_prints(server, shop_folder, tmp_path):
    from test_end_to_end import succeed

    folder = tmp_path / "folder"
    folder.mkdir()
    for path in sorted(shop_folder.glob("data/sample/Images/*"))[:20]:  # more than a request has
        shutil.copy(path, folder)
    single = shutil.copy(next(folder.iterdir()), tmp_path / "one.jpg")
    url = f"http://127.0.0.1:{server.port}/"
    search = ("--num_captions", "2", "--beam_size", "3")
    status, out, err = run_client(url, single, folder, *search)
    model = shop_folder / "attention/best.pt"
    flags = "--precision float32 --num_captions 2 --beam_size 3"
    common = ("--mode caption --model_path", model, flags, "--images", single, folder)
    assert (status, out) == (0, succeed(*common)) and len(out.splitlines()) == 42
    assert "captioning" in err or not err
    status, out, _ = run_client(url, single, *search, "--json")
    (line,) = map(json.loads, out.splitlines())
    (given,) = map(json.loads, succeed(*common[:-1], "--json").splitlines())
    assert line["image"] == given["image"]
    for ours, theirs in zip(line["captions"], given["captions"], strict=True):
        assert ours["caption"] == theirs["caption"]
        assert ours["log_prob"] == pytest.approx(theirs["log_prob"], abs=1e-4)


def test_the_client_names_what_it_could_not_caption(server, pictures, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "good.jpg").write_bytes(pictures[0])
    url = f"http://127.0.0.1:{server.port}"
    status, out, err = run_client(url, tmp_path)
    assert status == 1 and out.startswith(f"{tmp_path / 'good.jpg'}\t") and out.count("\n") == 1
    assert err.startswith(f"caption_service: {tmp_path / 'bad.jpg'}: not a readable image")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("http://127.0.0.1:1", "good.jpg"), "Connection refused"),
        (("127.0.0.1:8000", "good.jpg"), "give the service's address"),
        (("http://127.0.0.1:1", "absent.jpg"), "absent.jpg: no such file or folder"),
        (("http://127.0.0.1:1", "good.jpg", "--beam_size", "0"), "must be at least 1"),
        (("http://127.0.0.1:1",), "required: pictures"),
    ],
    ids=["nobody", "address", "absent", "range", "nothing"],
)
def test_the_client_s_mistakes_are_one_line(arguments, part, tmp_path, monkeypatch, pictures):
    (tmp_path / "good.jpg").write_bytes(pictures[0])
    paths = [tmp_path / word if word.endswith(".jpg") else word for word in arguments]
    status, out, err = run_client(*paths)
    assert (status, out, err.count("\n")) == (2, "", 1) and part in err, err


def serve(*arguments, **variables):
    command = [sys.executable, "-m", "caption_service", "serve", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "part"),
    [
        (("--model_path", "nowhere.pt"), {}, "nowhere.pt"),
        ((), {"CAPTION_MODEL": "registry:9.9.9"}, "9.9.9"),
        (("--port", "many"), {}, "invalid int value: 'many'"),
        (("--modle_path", "x"), {}, "unrecognized arguments: --modle_path"),
        ((), {"CAPTION_MAX_BATCH": "0"}, "CAPTION_MAX_BATCH 0"),
    ],
    ids=["path", "version", "port", "flag", "variable"],
)
def test_mistakes_are_one_line_before_anything_is_served(arguments, variables, part, shop_folder):
    variables = {"CAPTION_MODEL": str(shop_folder / "lstm/best.pt")} | variables
    done = serve(*arguments, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert part in done.stderr and done.stderr.startswith("caption_service")


def test_without_a_model_it_says_what_to_give(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPTION_MODEL", raising=False)
    with pytest.raises(SystemExit) as caught:
        caption_service.parse_args(["serve"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "give --model_path, or make a model with ./setup.sh demo" in error


def test_what_is_typed_reaches_workers_through_the_environment(monkeypatch, shop_folder):
    for name in ("MODEL", "HOST", "PORT", "WORKERS"):
        monkeypatch.setenv(f"CAPTION_{name}", "")
    path = str(shop_folder / "lstm/best.pt")
    typed = ["serve", "--model_path", path, "--host", "::1", "--port", "81", "--workers", "2"]
    caption_service.parse_args(typed)
    settings = caption_service.Settings()
    assert (settings.model, settings.host) == (path, "::1")
    assert (settings.port, settings.workers) == (81, 2)


def test_the_service_s_variables_are_no_misspelt_options_of_the_program():
    variables = {f"CAPTION_{name.upper()}": "1" for name in caption_service.Settings.model_fields}
    shared = {"CAPTION_DEVICE": "cpu", "CAPTION_PRECISION": "auto", "CAPTION_THREADS": "1"}
    given = config_file.read_environment(variables | shared, caption_options.TABLE)
    assert given.keys() == {"device", "precision", "threads"}


def test_the_page_of_settings_names_each_with_its_default():
    page = (ROOT / "docs/SERVICE.md").read_text()
    for name, field in caption_service.Settings.model_fields.items():
        default = "none" if field.default == "" else field.default
        assert f"| `CAPTION_{name.upper()}` | {default} |" in page


# --------------------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_counts_what_was_served(server, pictures, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_service, "WARM_UP_SECONDS", 0.2)
    bodies = [caption_client.as_form({}, [content], "file") for content in pictures]
    process = SimpleNamespace(pid=os.getpid())
    before = server.service.metrics.as_plain()["pictures_total"]
    found = benchmark_service.load(server.port, process, bodies, clients=4, seconds=1.0)
    served = server.service.metrics.as_plain()["pictures_total"] - before
    assert found.errors == 0 and 0 < found.p50 <= found.p95 <= found.p99 < 10_000
    assert 0.5 * served < found.captions_per_second <= served + 1
    assert found.memory_after == pytest.approx(server.memory_of(os.getpid()) / 1e6, rel=0.1)
    alone = benchmark_service.one_alone(server.port, bodies)
    parts = [alone[part] for part in benchmark_service.PARTS]
    assert all(part >= 0 for part in parts) and 0 < sum(parts) < 1.2 * alone["whole"]
    rows = {
        "batching": found._asdict(),
        "each alone": (found._replace(captions_per_second=found[0] / 4))._asdict(),
    }
    program = {"from files": 2 * found[0], "from features": 4 * found[0]}
    how = {"clients": 4, "seconds": 1.0, "pictures": 8, "one request alone, ms": alone}
    table = benchmark_service.as_table(how | rows | {"program": program})
    assert "batching / each alone: 4.00" in table and "the service has 0.50" in table
    missing = ["--model_path", "best.pt", "--images", "nowhere"]
    assert benchmark_service.main(missing) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_client_names_a_picture_that_is_too_large_and_bears_strange_answers(
    tmp_path, monkeypatch
):
    """A proxy may answer with a date, or for hours; what is no answer of the service is a refusal."""
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"x")
    slept, answers = [], iter([
        (503, {"Retry-After": "Fri, 27 Nov 2026 13:00:00 GMT"}, {}),
        (503, {"Retry-After": "3600"}, {}),
        (413, {}, {"error": "the body is larger than 20 MB"}),
        (200, {}, {}),
    ])  # fmt: skip
    monkeypatch.setattr(caption_client, "post", lambda *_: next(answers))
    monkeypatch.setattr(caption_client.time, "sleep", slept.append)
    found = caption_client.ask("http://x", [picture], {})
    assert found == [{"error": "the body is larger than 20 MB"}]
    assert slept == [1, caption_client.PATIENCE_SECONDS]
    with pytest.raises(ValueError, match=r"no reason given \(status 200\)"):
        caption_client.ask("http://x", [picture], {})

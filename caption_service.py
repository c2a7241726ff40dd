"""A trained captioner as a REST service, and the client that asks it.

    ./setup.sh serve --model_path best.pt                      # http://127.0.0.1:8000
    CAPTION_MODEL=registry:production uvicorn caption_service:app
    python -m caption_service client http://127.0.0.1:8000 dog.jpg holiday_folder
    curl -F file=@dog.jpg -F algorithm=beam -F beam_size=3 http://127.0.0.1:8000/predict

It holds what `load_captioner` gives and searches as --mode caption does; what may be asked, and in
which range, is what caption_options says. Requests that arrive together are computed together, see
caption_queue. A model is loaded in the background, the next one too: until that has captioned a
picture, the old one answers. docs/SERVICE.md describes endpoints, settings and limits.
"""

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["client"]:  # which needs no web server's packages
    import caption_client

    sys.exit(caption_client.main(sys.argv[2:]))

import argparse
import asyncio
import contextlib
import functools
import html
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

try:
    import prometheus_client
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from pydantic import Field, ValidationError
    from pydantic_settings import BaseSettings, SettingsConfigDict
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from uvicorn.supervisors import Multiprocess
except ImportError as error:
    raise ImportError(f"{error}: pip install -r requirements-service.txt") from error

import numpy as np

import caption_options
import config_file
import image_loading
from caption_queue import Busy, CaptionQueue, caption_batch
from model_versions import resolve_model_path
from runtime import available_cpus, printable, resolve_device, set_threads

logger = logging.getLogger("caption_service")
PAGE = Path(__file__).with_name("service_page")
MAX_GIF_FRAMES = 1000  # of which the first would be captioned
GIF_FRAME = b"\x21\xf9\x04"  # the extension that stands before each frame of an animation
LINGER_SECONDS = 2.0  # a body that is refused is read so long: a client that sends hears no answer
IDLE_CONNECTIONS = 512  # beside the requests that are held
DEFAULT_MODEL = "saved_models"
TOO_BUSY = "there are too many requests at once: try again"
CLIENT_GONE = 499  # a status of the log alone
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
POLICY = "default-src 'none'; frame-ancestors 'none'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# ----------------------------------------------------------------------------------------- settings


class Settings(BaseSettings):
    """What the environment decides: CAPTION_MODEL and so on. An empty variable counts as not set."""

    model_config = SettingsConfigDict(env_prefix="CAPTION_", env_ignore_empty=True, extra="ignore")

    model: str = Field(DEFAULT_MODEL, description="checkpoint, folder of runs, or registry:VERSION")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535)
    admin_port: int = Field(8001, ge=0, le=65535, description="of 127.0.0.1 alone; 0: none")
    workers: int = Field(1, ge=1, le=64, description="processes, each with a model of its own")
    device: str = Field("auto", description="as --device")
    precision: str = Field("auto", description="as --precision")
    threads: str = Field("auto", description="as --threads, of each worker")
    cors_origins: str = Field("", description="origins of other pages that may ask, commas between")
    grace_seconds: int = Field(30, ge=0, description="to finish what was accepted, after SIGTERM")
    max_body_mb: float = Field(20.0, gt=0, description="largest body of a request")
    body_seconds: float = Field(20.0, gt=0, description="in which a body must have arrived")
    queue_size: int = Field(128, ge=1, description="most requests held, and most pictures waiting")
    max_batch: int = Field(32, ge=1, le=1024, description="most pictures computed together")
    max_wait_ms: float = Field(10.0, ge=0, description="a batch waits for pictures on their way")
    max_files: int = Field(32, ge=1, description="most pictures of /predict/batch")
    max_beam: int = Field(32, ge=1, description="largest beam_size and num_captions")
    max_tokens: int = Field(100, ge=1, description="largest max_length")


# ---------------------------------------------------------------------------------------- the model


class Served(NamedTuple):
    """A model that answers."""

    captioner: object  # flickr_image_caption.Captioner
    options: caption_options.Options  # the checkpoint's, which a request's fields change
    info: dict


class Model:
    """The model that answers, and how another takes its place."""

    def __init__(self, settings):
        self.settings = settings
        self.current = None  # Served, once a first one has captioned a picture
        self.fault = None  # why the latest attempt to load failed
        self._loading = threading.Lock()

    def load(self):
        """Load what the settings name, now; the model that answers stays if that fails. Returns: success."""
        with self._loading:
            try:
                served = load_served(self.settings)
            except Exception as error:
                is_expected = isinstance(error, (OSError, ValueError, RuntimeError, MemoryError))
                line = printable(" ".join(str(error).split()))
                stays = "; the one before goes on" if self.current else ""
                logger.error("no model: %s%s", line, stays, exc_info=not is_expected)
                self.fault = without_paths(line) if is_expected else "unexpected, see the log"
                return False
            self.current, self.fault = served, None
            logger.info("model", extra={"fields": served.info})
            return True


def load_served(settings):
    """The model that the settings name, once it has captioned a grey picture.

    Raises: FileNotFoundError, ValueError that name the file; what torch raises without memory.
    """
    from flickr_image_caption import load_captioner

    started = time.perf_counter()
    device = resolve_device(settings.device)
    share_threads(settings, device)
    captioner, options = load_captioner(settings.model, settings.device, settings.precision)
    size = captioner.encoder.image_size
    grey = np.full((3, size, size), 128, np.uint8)
    ((best, *_),), *_ = caption_batch(captioner, [grey], options.decoding)
    path = Path(options.run.model_path)
    info = {
        "model": without_paths(settings.model),
        "model_path": f"{path.parent.name}/{path.name}",
        "vocab_size": len(captioner.vocabulary),
        "max_length": options.decoding.max_length,
        "feature_extractor": options.features.encoder,
        "image_size": [size, size],
        "decoder": options.model.decoder,
        "attention_maps": best.attention is not None,
        "grid": list(captioner.encoder.grid),
        "decoding": options.decoding._asdict(),
        "rerank": options.rerank.rerank if captioner.reranker else "none",
        "device": str(captioner.hardware.device),
        "precision": captioner.hardware.precision,
        "loaded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_seconds": round(time.perf_counter() - started, 3),
    }
    return Served(captioner, options, info)


def share_threads(settings, device):
    """Compute with so many threads; on auto, workers share the cores."""
    threads = config_file.read_value(caption_options.TABLE["threads"], settings.threads)
    if threads == "auto" and settings.workers > 1:
        threads = max(1, available_cpus() // settings.workers)
    set_threads(threads, device, typed=threads != "auto")


def without_paths(text):
    """`text` with folders left out of its paths: what the machine looks like is nobody's business."""
    return re.sub(r"(?:[^\s/:'\"]*/)+(?=[^\s/])", "", text)


# ------------------------------------------------------------------------------- what a request holds


class Picture(NamedTuple):
    """A file that was decoded."""

    pixels: np.ndarray  # (3, S, S) uint8
    size: tuple[int, int]  # its own width and height
    seconds: float  # that decoding took


def read_picture(file, size):
    """An open file -> Picture of S = `size`; ValueError, returned and not raised, says why it is none."""
    started, content = time.perf_counter(), file.read()
    try:
        if not content:
            raise ValueError("picture: the file is empty")
        if content.startswith(b"GIF8") and content.count(GIF_FRAME) > MAX_GIF_FRAMES:
            raise ValueError(f"picture: it has more than {MAX_GIF_FRAMES} frames: send one of them")
        pixels = image_loading.load_image("picture", size, content).transpose(2, 0, 1)
        return Picture(pixels, image_loading.shown_size(content), time.perf_counter() - started)
    except ValueError as error:
        return error


def read_search(fields, served, settings):
    """{field: text} of a request -> the search as options.decoding, and whether maps are wanted.

    Raises: HTTPException 400 naming the field.
    """
    try:
        with_maps = read_switch(fields.pop("attention", "false"))
        values = {name: read_value(name, text, settings) for name, text in fields.items()}
        return caption_options.settle(values, served.options.as_dict()).decoding, with_maps
    except ValueError as error:
        raise HTTPException(400, str(error).replace("--", "")) from error


def read_switch(text):
    """A field that is true or false. Raises: ValueError."""
    if text not in ("true", "false"):
        raise ValueError(f"attention: give true or false, not {printable(text)[:20]!r}")
    return text == "true"


def read_value(name, text, settings):
    """A field's value, in the range of its flag and of this service. Raises: ValueError."""
    if name not in caption_options.DECODING:
        known = ", ".join(["file", *caption_options.DECODING, "attention"])
        raise ValueError(f"no field {printable(name)[:60]!r}: there are {known}")
    try:
        value = config_file.read_value(caption_options.DECODING[name], text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    most = served_ranges(settings).get(name, value)
    if value > most:
        raise ValueError(f"{name}: must be at most {most} here, got {value}")
    return value


def served_ranges(settings):
    """{field: its largest value} of what one request could ask too much of."""
    beam, tokens = settings.max_beam, settings.max_tokens
    return {"beam_size": beam, "num_captions": beam, "max_length": tokens, "min_length": tokens}


@contextlib.asynccontextmanager
async def open_form(request, settings, max_files):
    """Yield a multipart request's open files and {field: text}. They are spooled to disk beyond 1 MB.

    Raises: HTTPException 4xx that says what is wrong; the body is read only as far as it may count.
    """
    await check_headers(request, settings)
    try:
        async with asyncio.timeout(settings.body_seconds):
            form = await request.form(max_files=max_files, max_fields=32, max_part_size=4096)
    except TimeoutError:
        late = f"the body did not arrive within {settings.body_seconds:g} s"
        raise HTTPException(408, late, {"Connection": "close"}) from None
    try:
        items = form.multi_items()
        texts = [(name, value) for name, value in items if isinstance(value, str)]
        names = {name for name, value in items if not isinstance(value, str)}
        if not names or not names <= {"file", "files"}:
            given = printable(", ".join(sorted(names)))[:60] or "none"
            raise HTTPException(
                422, f"send a picture as a file in the field 'file' (files: {given})"
            )
        if len(dict(texts)) < len(texts):
            raise HTTPException(400, "a field is given twice")
        yield [value.file for _, value in items if not isinstance(value, str)], dict(texts)
    finally:
        await form.close()


async def check_headers(request, settings):
    """Raise HTTPException unless a body of such headers is to be read."""
    length, limit = request.headers.get("content-length"), int(settings.max_body_mb * 1e6)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if length is None or "transfer-encoding" in request.headers:
        await refuse(request, 411, "send Content-Length: a body of unknown length is not read")
    if int(length) > limit:
        await refuse(request, 413, f"the body has {length} bytes, more than {limit}")
    if kind != "multipart/form-data":
        await refuse(request, 415, "send multipart/form-data with a picture in the field 'file'")


async def refuse(request, status, reason, headers=None):
    """Raise HTTPException, after reading on for a while: a client that still sends hears no answer."""
    if "expect" not in request.headers:  # else it waits for leave to send
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(LINGER_SECONDS):
                async for _ in request.stream():
                    pass
    raise HTTPException(status, reason, {"Connection": "close"} | (headers or {}))


# ------------------------------------------------------------------------------------------ its answer


def as_answer(served, captioned, decoding, picture, with_maps):
    """What is answered about one picture, without times."""
    captions = [
        as_caption(served.captioner, hypothesis, with_maps) for hypothesis in captioned.hypotheses
    ]
    return {
        "caption": captions[0]["caption"],
        "algorithm": decoding.algorithm,
        "image_size": list(picture.size),
        "captions": captions,
    }


def as_caption(captioner, hypothesis, with_maps):
    """A hypothesis as JSON holds it; maps only of decoders that look."""
    maps = (
        as_maps(captioner, hypothesis) if with_maps and hypothesis.attention is not None else None
    )
    return {
        "caption": captioner.vocabulary.decode(hypothesis.tokens),
        "log_prob": hypothesis.log_prob,
        "words": captioner.words(hypothesis),
        "attention": maps,
    }


def as_maps(captioner, hypothesis):
    """Where each word looked: its map, in reading order, and its shares that no cell got."""
    maps = captioner.attention_grid(hypothesis)  # (T, h, w)
    beside = captioner.attention_beside(hypothesis)
    return {
        "grid": list(captioner.encoder.grid),
        "maps": [[round(weight, 6) for weight in map_.flatten().tolist()] for map_ in maps],
        "beside": {name: [round(s, 6) for s in shares.tolist()] for name, shares in beside.items()},
    }


def as_timings(pictures, captioned):
    """Milliseconds of each part of the work, the longest where pictures were several, for logs and headers."""
    seconds = {
        "decode": max((picture.seconds for picture in pictures), default=0.0),
        "wait": max((each.wait_seconds for each in captioned), default=0.0),
        "encode": max((each.encode_seconds for each in captioned), default=0.0),
        "search": max((each.search_seconds for each in captioned), default=0.0),
    }
    return {name: round(1000 * value, 2) for name, value in seconds.items()}


# -------------------------------------------------------------------------------------- the service


class Metrics:
    """Numbers for Prometheus. With several workers they add up where PROMETHEUS_MULTIPROC_DIR is set."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        add = {"registry": self.registry, "namespace": "caption"}
        both, gauge = ["endpoint", "status"], {"multiprocess_mode": "livesum"}
        self.requests = prometheus_client.Counter("requests", "Requests answered", both, **add)
        self.errors = prometheus_client.Counter("errors", "Of these, with 4xx and 5xx", both, **add)
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "From a request's first to its answer's last byte", both[:1],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10), **add,
        )  # fmt: skip
        self.pictures = prometheus_client.Counter("pictures", "Pictures captioned", **add)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batch_size = prometheus_client.Histogram(
            "batch_size", "Pictures computed together", buckets=sizes, **add
        )
        self.queue_length = prometheus_client.Gauge(
            "queue_length", "Pictures that wait", **add, **gauge
        )
        self.ready = prometheus_client.Gauge("ready", "Workers that have a model", **add, **gauge)
        gauge = {"multiprocess_mode": "livemax"}
        self.uptime = prometheus_client.Gauge("uptime_seconds", "Since the start", **add, **gauge)

    def collected(self):
        """The registry to read from: of all workers, where they share a folder."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return self.registry
        from prometheus_client import multiprocess

        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return registry

    def as_plain(self):
        """The numbers as JSON holds them."""
        totals = {}
        for metric in self.collected().collect():
            for sample in metric.samples:
                if "le" not in sample.labels and not sample.name.endswith("_created"):
                    totals[sample.name] = totals.get(sample.name, 0) + sample.value
        names = ("requests_total", "errors_total", "pictures_total", "request_seconds_sum")
        names += ("batch_size_count", "batch_size_sum", "queue_length", "ready", "uptime_seconds")
        plain = {name: totals.get(f"caption_{name}", 0) for name in names}
        served = plain["requests_total"]
        return plain | {"error_rate": plain["errors_total"] / served if served else 0.0}


class Service:
    """What the endpoints share: settings, model, queue, numbers."""

    def __init__(self, settings):
        self.settings, self.started, self.held = settings, time.monotonic(), 0
        self.model, self.metrics = Model(settings), Metrics()
        self.queue = CaptionQueue(
            settings.queue_size,
            settings.max_batch,
            settings.max_wait_ms / 1000,
            self.metrics.batch_size.observe,
        )
        self.decoders = ThreadPoolExecutor(available_cpus(), "decoding")
        self.loader = ThreadPoolExecutor(1, "loading")

    def load(self):
        """Load the model in the background. Returns: a concurrent Future of whether that succeeded."""
        return self.loader.submit(self.model.load)

    async def admit(self, request):
        """The model that answers. Raises: HTTPException 503 while there is none, or no room."""
        if self.held >= self.settings.queue_size:
            await refuse(request, 503, TOO_BUSY, {"Retry-After": "1"})
        if self.model.current is None:
            reason = self.model.fault or "it is being loaded"
            await refuse(request, 503, f"there is no model yet: {reason}", {"Retry-After": "5"})
        return self.model.current

    @contextlib.contextmanager
    def holding(self):
        """While inside, a request counts."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def read_pictures(self, files, size):
        """Open files -> Picture or ValueError of each, decoded in threads."""
        run = asyncio.get_running_loop().run_in_executor
        return await asyncio.gather(
            *(run(self.decoders, read_picture, file, size) for file in files)
        )

    def submit(self, served, pictures, decoding):
        """Futures of the pictures' Captioned. Raises: HTTPException 503 when there is no room."""
        pixels = [picture.pixels for picture in pictures]
        try:
            return self.queue.submit(served.captioner, pixels, decoding)
        except Busy as busy:
            after = str(max(1, math.ceil(busy.args[0])))
            raise HTTPException(503, TOO_BUSY, {"Retry-After": after}) from busy

    def update_gauges(self):
        """Bring up to date what is a state and not a count."""
        self.metrics.queue_length.set(len(self.queue))
        self.metrics.ready.set(self.model.current is not None)
        self.metrics.uptime.set(time.monotonic() - self.started)

    def close(self):
        """Compute what was accepted."""
        self.queue.close()
        self.decoders.shutdown()
        self.loader.shutdown(wait=False, cancel_futures=True)


async def unless_gone(request, futures):
    """The futures' results, unless the client goes away: what was not begun then is not computed.

    Raises: ClientDisconnect, and what a future raises.
    """
    results = asyncio.gather(*map(asyncio.wrap_future, futures))
    gone = asyncio.ensure_future(request.receive())  # the body was read: only its end can come
    try:
        await asyncio.wait({results, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            raise ClientDisconnect
        return results.result()
    finally:
        results.cancel()
        gone.cancel()


class Observed:
    """Around every request: an id, times and headers for it, one line in the log, counts.

    An ASGI middleware, outermost, so that nothing escapes it.
    """

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), CLIENT_GONE
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = {"request_id": request_id}
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed = 1000 * (time.perf_counter() - started)
                add_headers(MutableHeaders(scope=message), record, elapsed)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("request %s failed", request_id)
            if status == CLIENT_GONE:  # nothing was sent
                failed = error_answer(500, "it failed: the log says why", request_id)
                await failed(scope, receive, send_with_headers)
        finally:
            self.note(scope, status, time.perf_counter() - started, record)
        return None

    def note(self, scope, status, seconds, record):
        """Count the request and write its line, which has nothing of the picture, its name included."""
        endpoint = getattr(scope.get("route"), "path", "none")  # as declared, not as typed
        metrics = self.service.metrics
        metrics.requests.labels(endpoint, status).inc()
        metrics.seconds.labels(endpoint).observe(seconds)
        if status >= 400:
            metrics.errors.labels(endpoint, status).inc()
        fields = {"method": scope["method"], "endpoint": endpoint, "status": status}
        fields |= {"milliseconds": round(1000 * seconds, 2)} | record
        logger.info("request", extra={"fields": fields})


def add_headers(headers, record, milliseconds):
    """What every answer carries."""
    headers["X-Request-ID"] = record["request_id"]
    headers["X-Response-Time"] = f"{milliseconds:.2f}ms"
    if parts := record.get("parts_ms"):
        headers["Server-Timing"] = ", ".join(f"{name};dur={value}" for name, value in parts.items())
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers.setdefault("Content-Security-Policy", POLICY)


def error_answer(status, reason, request_id, headers=None):
    """A fault as JSON."""
    return JSONResponse({"error": reason, "request_id": request_id}, status, headers)


async def http_fault(request, error):
    """What a HTTPException becomes."""
    return error_answer(
        error.status_code, str(error.detail), request.state.record["request_id"], error.headers
    )


# ----------------------------------------------------------------------------------------- endpoints


def service_of(request):
    """The Service behind a request."""
    return request.app.state.service


def wants(request, kind):
    """Whether the request's Accept header names this media type."""
    return kind in request.headers.get("accept", "")


async def root(request: Request):
    """The page for a browser; for programs, what this service is."""
    if wants(request, "text/html") and (PAGE / "index.html").is_file():
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})
    service = service_of(request)
    return JSONResponse(
        {
            "service": "image captioning",
            "ready": service.model.current is not None,
            "model": service.model.current and service.model.current.info["model"],
            "endpoints": {route.path: sorted(route.methods) for route in request.app.routes},
        }
    )


def page_file(path):
    """An endpoint that answers with a file of the page."""

    async def send_file():
        return FileResponse(path)

    return send_file


async def health(request: Request):
    """That the process answers."""
    return {"status": "ok", "uptime_seconds": time.monotonic() - service_of(request).started}


async def ready(request: Request):
    """200 once a model has captioned a picture, 503 before."""
    model = service_of(request).model
    if model.current:
        return {"ready": True, "model": model.current.info["model"]}
    reason = model.fault or "the model is being loaded"
    raise HTTPException(503, reason, {"Retry-After": "5"})


async def model_info(request: Request):
    """The model that answers, and why the latest attempt to load another one failed."""
    model = service_of(request).model
    return (model.current.info if model.current else {}) | {
        "ready": model.current is not None,
        "fault": model.fault,
    }


async def metrics(request: Request):
    """Numbers as text for Prometheus; JSON where Accept asks for it."""
    service = service_of(request)
    service.update_gauges()
    if wants(request, "application/json"):
        return JSONResponse(service.metrics.as_plain())
    text = prometheus_client.generate_latest(service.metrics.collected())
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def predict(request: Request):
    """Caption the picture in the field `file`."""
    (result,), common = await answer(request, 1)
    if "error" in result:
        raise HTTPException(400, result["error"])
    return JSONResponse(result | common)


async def predict_batch(request: Request):
    """Caption several pictures, each a file in the field `files`; those that are none have an `error`."""
    results, common = await answer(request, service_of(request).settings.max_files)
    return JSONResponse({"results": results} | common)


async def answer(request, max_files):
    """Caption a request's pictures. Returns: what is answered about each, and about all of them."""
    started, service = time.perf_counter(), service_of(request)
    served, record = await service.admit(request), request.state.record
    with service.holding():
        with service.queue.expecting():
            async with open_form(request, service.settings, max_files) as (files, fields):
                decoding, with_maps = read_search(fields, served, service.settings)
                size = served.captioner.encoder.image_size
                pictures = await service.read_pictures(files, size)
            readable = [picture for picture in pictures if isinstance(picture, Picture)]
            futures = service.submit(served, readable, decoding)
        captioned = await unless_gone(request, futures)
    record["parts_ms"] = as_timings(readable, captioned)
    record["batch_sizes"] = sorted({each.batch_size for each in captioned})
    service.metrics.pictures.inc(len(captioned))
    found = iter(captioned)
    results = [
        as_answer(served, next(found), decoding, picture, with_maps)
        if isinstance(picture, Picture)
        else {"error": str(picture)}
        for picture in pictures
    ]
    elapsed = round(time.perf_counter() - started, 6)
    return results, {"processing_time_seconds": elapsed, "request_id": record["request_id"]}


async def docs(request: Request):
    """The endpoints for a reader: of /openapi.json, without scripts, which would come from elsewhere."""
    parts = ["<p>The same for programs: <a href='openapi.json'>openapi.json</a></p>"]
    for path, methods in request.app.openapi()["paths"].items():
        for method, operation in methods.items():
            parts.append(as_html(path, method, operation))
    text = DOCS.format("\n".join(parts))
    return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})


DOCS = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Captioning service</title><link rel="stylesheet" href="style.css"></head>
<body><main><h1>Captioning service</h1>
{}
</main></body></html>
"""


def as_html(path, method, operation):
    """An operation of the OpenAPI schema: its purpose, and its fields as a list."""
    described = html.escape(operation["description"])
    text = f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{described}</p>"
    content = operation.get("requestBody", {}).get("content", {})
    fields = content.get("multipart/form-data", {}).get("schema", {}).get("properties", {})
    items = [
        f"<li><code>{name}</code>: {html.escape(field['description'])}</li>"
        for name, field in fields.items()
    ]
    return text + ("<ul>" + "".join(items) + "</ul>" if items else "")


def form_schema(file_field, several, settings):
    """OpenAPI's account of what /predict and /predict/batch take."""
    one = {"type": "string", "format": "binary", "description": "a picture"}
    many = {"type": "array", "items": one, "description": f"pictures, {settings.max_files} at most"}
    fields = {file_field: many if several else one}
    most = served_ranges(settings)
    for name, row in caption_options.DECODING.items():
        field = {"description": row.help + (f"; at most {most[name]}" if name in most else "")}
        fields[name] = field | ({"enum": list(row.kind)} if isinstance(row.kind, tuple) else {})
    fields["attention"] = {"enum": ["true", "false"], "description": "where each word looked"}
    schema = {"type": "object", "properties": fields, "required": [file_field]}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


# ------------------------------------------------------------------------------------ the application


def create_app(settings=None):
    """The application of these Settings, or of the environment's. It loads nothing before it starts."""
    settings = settings or Settings()
    service = Service(settings)
    app = FastAPI(
        title="Image captioning",
        docs_url=None,
        redoc_url=None,
        lifespan=functools.partial(running, service),
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, http_fault)
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",")]
        exposed = ["X-Request-ID", "X-Response-Time", "Server-Timing", "Retry-After"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], expose_headers=exposed
        )
    app.add_middleware(Observed, service=service)
    gets = {"/": root, "/health": health, "/ready": ready, "/metrics": metrics}
    gets |= {"/model/info": model_info, "/docs": docs}
    for path, endpoint in gets.items():
        app.add_api_route(path, endpoint, methods=["GET"])
    posts = {"/predict": (predict, "file", False), "/predict/batch": (predict_batch, "files", True)}
    for path, (endpoint, *field) in posts.items():
        schema = form_schema(*field, settings)
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=schema)
    for file in PAGE.iterdir() if PAGE.is_dir() else ():
        if file.name != "index.html":
            app.add_api_route(f"/{file.name}", page_file(file), include_in_schema=False)
    return app


def __getattr__(name):
    """`caption_service:app`, made when uvicorn asks for it: an import only defines names."""
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextlib.asynccontextmanager
async def running(service, _app):
    """While the application runs: its log, its model, what reloads that, and its end."""
    write_json_lines()
    service.load()
    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.load)
    async with admin_server(service):
        yield
    await asyncio.to_thread(service.close)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON; `extra={"fields": {...}}` adds to it."""

    def format(self, record):
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        } | getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_json_lines():
    """Send this program's log to stderr, and have uvicorn write no second line for a request."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True


# -------------------------------------------------------------------------------- reload, workers, serve


class QuietServer(uvicorn.Server):
    """A second server in the process: signals are for the first."""

    def capture_signals(self):
        return contextlib.nullcontext()


@contextlib.asynccontextmanager
async def admin_server(service):
    """While inside, POST /admin/reload is answered at the admin port of 127.0.0.1."""
    port = service.settings.admin_port
    try:
        listener = admin_socket(port) if port else None
    except OSError as error:
        logger.warning("no /admin/reload: port %d of 127.0.0.1: %s", port, error.strerror)
        listener = None
    if listener is None:
        yield
        return
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_api_route("/admin/reload", reload_model, methods=["POST"])
    server = QuietServer(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


def admin_socket(port):
    """Workers listen at the same port: any of them passes a request on to all."""
    listener = socket.socket()
    if multiprocessing.parent_process():
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


async def reload_model(request: Request):
    """Load what the settings name now, such as a newer version; the old model stays if that fails."""
    service = service_of(request)
    if "origin" in request.headers:  # a page in somebody's browser
        return JSONResponse({"error": "not from a browser"}, 403)
    if multiprocessing.parent_process():
        os.kill(os.getppid(), signal.SIGHUP)
        return JSONResponse({"status": "all workers are told"}, 202)
    if await asyncio.wrap_future(service.load()):
        return JSONResponse({"status": "reloaded", "model": service.model.current.info})
    return JSONResponse({"error": service.model.fault}, 409)


class Supervisor(Multiprocess):
    """uvicorn's parent of several workers, which on SIGHUP reload their model instead of being replaced."""

    def handle_hup(self):
        for process in self.processes:
            os.kill(process.pid, signal.SIGHUP)


def serve(arguments):
    """Serve until a signal. Returns: the exit status."""
    for name, value in vars(arguments).items():  # workers read the environment
        os.environ[f"CAPTION_{name.upper()}"] = str(value)
    try:
        settings = Settings()
        resolve_model_path(settings.model)
    except ValidationError as error:
        first = error.errors()[0]
        return misuse(f"CAPTION_{str(first['loc'][0]).upper()} {first['input']}: {first['msg']}")
    except (OSError, ValueError) as error:
        advice = "give --model_path, or make a model: ./setup.sh demo"
        return misuse(f"{error}: {advice}" if settings.model == DEFAULT_MODEL else str(error))
    config = uvicorn.Config(
        "caption_service:app",
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=settings.queue_size + IDLE_CONNECTIONS,
        timeout_graceful_shutdown=settings.grace_seconds,
        timeout_worker_healthcheck=60,
    )
    with contextlib.suppress(KeyboardInterrupt):
        if settings.workers == 1:
            uvicorn.Server(config).run()
        else:
            with tempfile.TemporaryDirectory() as folder:  # where workers add up their numbers
                os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
                Supervisor(config, [config.bind_socket()]).run()
    return 0


def misuse(reason):
    """One line on stderr. Returns: the exit status."""
    line = printable(" ".join(str(reason).split()))
    print(f"caption_service: error: {line}", file=sys.stderr)
    return 2


def parse_args(argv=None):
    """What was typed for `serve`, by the name of the setting."""
    parser = argparse.ArgumentParser(
        prog="caption_service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    commands = parser.add_subparsers(title="commands", required=True)
    served = commands.add_parser(
        "serve",
        argument_default=argparse.SUPPRESS,
        help="answer requests until a signal",
        epilog="Every setting is an environment variable, too: docs/SERVICE.md.",
    )
    commands.add_parser("client", help="send pictures to a service: caption_service client --help")
    served.add_argument(
        "--model_path", dest="model", help="checkpoint, folder of runs, registry:VERSION"
    )
    for name in ("host", "port", "workers"):
        served.add_argument(f"--{name}", help=Settings.model_fields[name].description)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(serve(parse_args()))

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

import argparse
import os
import sys

import caption_client
from caption_options import Parser
from model_versions import resolve_model_path

DEFAULT_MODEL = "saved_models"  # where training leaves its runs


def parse_args(argv=None):
    """The command: what was typed for `serve` goes to the environment, for workers read it there.

    Misuse exits with status 2 and one line, a model that is not there, too.
    """
    parser = Parser(
        prog="caption_service",
        usage="caption_service serve|client [options]  (serve --help and client --help list them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    caption_client.add_arguments(
        commands.add_parser("client", help="let a service caption pictures")
    )
    served = commands.add_parser(
        "serve", epilog="More settings are variables of the environment: docs/SERVICE.md."
    )
    path = "checkpoint, folder of runs, or registry:VERSION (saved_models)"
    served.add_argument("--model_path", dest="model", metavar="PATH", help=path)
    served.add_argument("--host", help="address to listen at; 0.0.0.0: all (127.0.0.1)")
    served.add_argument("--port", type=int, help="port to listen at (8000)")
    served.add_argument("--workers", type=int, help="processes, each with its own model (1)")
    arguments = parser.parse_args(argv)
    if arguments.command == "serve":
        for name in ("model", "host", "port", "workers"):
            if getattr(arguments, name) is not None:
                os.environ[f"CAPTION_{name.upper()}"] = str(getattr(arguments, name))
        given = os.environ.get("CAPTION_MODEL")
        try:
            resolve_model_path(given or DEFAULT_MODEL)
        except (OSError, ValueError) as error:
            advice = "" if given else ": give --model_path, or make a model with ./setup.sh demo"
            parser.error(f"{error}{advice}")
    return arguments


if __name__ == "__main__":  # before torch: --help and mistakes answer at once
    ARGUMENTS = parse_args()
    if ARGUMENTS.command == "client":
        sys.exit(caption_client.main(ARGUMENTS))

import asyncio
import contextlib
import functools
import html
import logging
import math
import multiprocessing
import re
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

try:
    import prometheus_client
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from prometheus_client import multiprocess
    from pydantic import Field, ValidationError
    from pydantic_settings import BaseSettings, SettingsConfigDict
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from uvicorn.supervisors import Multiprocess
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(
        f"caption_service: error: {error}: pip install -r requirements-service.txt", file=sys.stderr
    )
    sys.exit(2)

import torch
from PIL import Image

import caption_options
import config_file
from caption_queue import Busy, CaptionQueue
from runtime import available_cpus, printable, resolve_device, set_threads
from service_records import Metrics, Observed, error_answer, write_json_lines
from service_requests import (
    Picture,
    as_answer,
    as_timings,
    form_schema,
    open_form,
    read_picture,
    read_search,
    refuse,
)

logger = logging.getLogger("caption_service")
PAGE = Path(__file__).with_name("service_page")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
IDLE_CONNECTIONS = 512  # beside the requests that are held
TOO_BUSY = "there are too many requests at once: try again"

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
    max_batch: int = Field(16, ge=1, le=1024, description="most pictures computed together")
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

    def load(self):
        """Load what the settings name, now; the model that answers stays if that fails. Returns: success."""
        try:
            if self.current is None:
                share_threads(self.settings)
            served = load_served(self.settings)
        except Exception as error:  # a model that cannot be loaded must not end the one that serves
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
    captioner, options = load_captioner(settings.model, settings.device, settings.precision)
    size = captioner.encoder.image_size
    ((best, *_),) = captioner.caption(grey_picture(size), options.decoding)
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


def grey_picture(size):
    """(1, 3, S, S) uint8 of a JPEG file, read as those of requests are."""
    file = BytesIO()
    Image.new("L", (size, size), 128).save(file, "JPEG")
    file.seek(0)
    return torch.from_numpy(read_picture(file, size).pixels[None])


def share_threads(settings):
    """Compute with so many threads; on auto, workers share the cores."""
    threads = config_file.read_value(caption_options.TABLE["threads"], settings.threads)
    if threads == "auto" and settings.workers > 1:
        threads = max(1, available_cpus() // settings.workers)
    set_threads(threads, resolve_device(settings.device), typed=threads != "auto")


def without_paths(text):
    """`text` with folders left out of its paths: what the machine looks like is nobody's business."""
    return re.sub(r"(?:[^\s/:'\"]*/)+(?=[^\s/])", "", text)


# -------------------------------------------------------------------------------------- the service


class Service:
    """What the endpoints share: settings, model, queue, numbers."""

    def __init__(self, settings):
        self.settings, self.started, self.held = settings, time.monotonic(), 0
        self.model, self.metrics = Model(settings), Metrics()
        self.queue = CaptionQueue(
            settings.queue_size,
            settings.max_batch,
            settings.max_wait_ms / 1000,
            self.note_batch,
        )
        decoders = max(1, available_cpus() // settings.workers)
        self.decoders = ThreadPoolExecutor(decoders, "decoding")
        self.loader = ThreadPoolExecutor(1, "loading")  # one: loads follow each other

    def load(self):
        """Load the model in the background. Returns: a concurrent Future of whether that succeeded."""
        loaded = self.loader.submit(self.model.load)
        loaded.add_done_callback(lambda _: self.update_gauges())
        return loaded

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
            futures = self.queue.submit(served.captioner, pixels, decoding)
        except Busy as busy:
            after = str(max(1, math.ceil(busy.args[0])))
            raise HTTPException(503, TOO_BUSY, {"Retry-After": after}) from busy
        self.metrics.queue_length.set(len(self.queue))
        return futures

    def note_batch(self, size):
        """A batch was computed: where it is counted, because another worker may be asked for the numbers."""
        self.metrics.batch_size.observe(size)
        self.metrics.queue_length.set(len(self.queue))

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
    settings = service_of(request).settings
    results, common = await answer(request, min(settings.max_files, settings.queue_size))
    return JSONResponse({"results": results} | common)


async def answer(request, max_files):
    """Caption a request's pictures. Returns: what is answered about each, and about all of them."""
    started, service = time.perf_counter(), service_of(request)
    served, record = await service.admit(request), request.state.record
    with service.holding():
        with service.queue.expecting():
            async with open_form(request, service.settings, max_files) as (files, fields):
                decoding, with_maps = read_search(fields, served.options, service.settings)
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
        as_answer(served.captioner, next(found), decoding, picture, with_maps)
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
    app.add_middleware(Observed, metrics=service.metrics)
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
        shared = bool(multiprocessing.parent_process())  # any worker passes a request on to all
        listener = socket.create_server(("127.0.0.1", port), reuse_port=shared) if port else None
    except OSError as error:
        logger.warning("no /admin/reload: %s", error.strerror)
        listener = None
    if listener is None:
        yield
        return
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_api_route("/admin/reload", reload_model, methods=["POST"])
    how = {"log_config": None, "access_log": False, "lifespan": "off"}
    server = QuietServer(uvicorn.Config(app, timeout_graceful_shutdown=1, **how))
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


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

    def keep_subprocess_alive(self):
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            multiprocess.mark_process_dead(pid)  # whose gauges count no longer

    def handle_hup(self):
        for process in self.processes:
            os.kill(process.pid, signal.SIGHUP)


def serve():
    """Serve until a signal. Returns: the exit status."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        where = f"environment variable CAPTION_{str(first['loc'][0]).upper()}"
        text = printable(f"{where} {first['input']}: {first['msg']}")
        print(f"caption_service: error: {text}", file=sys.stderr)
        return 2
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


if __name__ == "__main__":
    sys.exit(serve())

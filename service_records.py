"""What the captioning service notes of its requests: numbers, log lines, and headers for the client.

    app.add_middleware(Observed, metrics=Metrics())
    write_json_lines()       # the log goes to stderr, one JSON object a line

Nothing of a picture is noted, neither its content nor its name, and no path but the endpoint's.
"""

import json
import logging
import os
import re
import time
import uuid
from datetime import UTC, datetime

import prometheus_client
from fastapi.responses import JSONResponse
from prometheus_client import multiprocess
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect

logger = logging.getLogger("caption_service")
CLIENT_GONE = 499  # of the log and the numbers: nobody receives it
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
POLICY = "default-src 'none'; frame-ancestors 'none'"  # of answers that are no page


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


class Observed:
    """Around every request: an id, times and headers for it, one line in the log, counts.

    An ASGI middleware, outermost, so that nothing escapes it.
    """

    def __init__(self, app, metrics):
        self.app, self.metrics = app, metrics

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
        except Exception:  # of the application's own code: a request that fails ends nothing else
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
        metrics = self.metrics
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

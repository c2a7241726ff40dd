"""What the captioning service does under load, beside what the program does alone. One table.

    python benchmark_service.py --model_path best.pt --images $F8K/Images --clients 32 --seconds 60

It starts the service on a free port of 127.0.0.1, lets clients ask again and again, and does so once
more with every picture computed alone. Clients are threads of a process of their own, and take cores
from the service as others' would not. Memory is that of the service's process, Linux's VmRSS.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from caption_client import as_form

START_SECONDS = 180.0  # until the service has a model
WARM_UP_SECONDS = 3.0  # of load that is not counted
ALONE_REQUESTS = 30  # one after the other
PARTS = ("decode", "wait", "encode", "search")  # of Server-Timing


class Answered(NamedTuple):
    """A request that was answered."""

    began: float  # time.perf_counter()
    seconds: float
    status: int  # 0: no answer
    parts: dict[str, float]  # milliseconds of each of PARTS


class Load(NamedTuple):
    """What clients met."""

    captions_per_second: float
    p50: float  # milliseconds
    p95: float
    p99: float
    errors: int
    memory_before: float  # MB
    memory_after: float


@contextlib.contextmanager
def running_service(model_path, **settings):
    """(port, process) of a service that has a model; it ends with the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    given = {"port": port, "admin_port": 0} | settings
    variables = {f"CAPTION_{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "caption_service", "serve", "--model_path", model_path]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | variables, stderr=log)
        try:
            wait_until_ready(port, process, log)
            yield port, process
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(port, process, log):
    """Raises: RuntimeError with the log's end when no model answers in time."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"the service did not start: {log.read()[-1000:].decode(errors='replace')}")


def megabytes(process):
    """Memory of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6


def ask(connection, body, kind):
    """An Answered of one request over an open connection."""
    began = time.perf_counter()
    try:
        connection.request("POST", "/predict", body, {"Content-Type": kind})
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        connection.close()  # the next request opens it anew
        return Answered(began, time.perf_counter() - began, 0, {})
    parts = re.findall(r"(\w+);dur=([\d.]+)", response.getheader("Server-Timing") or "")
    parts = {name: float(value) for name, value in parts}
    return Answered(began, time.perf_counter() - began, response.status, parts)


def ask_until(port, bodies, deadline, seed, answered):
    """A client: asks, each time of another picture, until time.perf_counter() is `deadline`."""
    connection, choices = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=60),
        random.Random(seed),
    )
    with contextlib.closing(connection):
        while time.perf_counter() < deadline:
            answered.append(ask(connection, *choices.choice(bodies)))


def load(port, process, bodies, clients, seconds):
    """The Load of so many clients at once."""
    counted_from = time.perf_counter() + WARM_UP_SECONDS
    answered = []
    arguments = (port, bodies, counted_from + seconds)
    threads = [
        threading.Thread(target=ask_until, args=(*arguments, seed, answered))
        for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    time.sleep(WARM_UP_SECONDS)
    before = megabytes(process)
    for thread in threads:
        thread.join()
    counted = [each for each in answered if each.began >= counted_from]
    served = [each.seconds for each in counted if each.status == 200]
    if not served:
        raise RuntimeError("no request was answered with a caption")
    elapsed = max(each.began + each.seconds for each in counted) - counted_from
    quantiles = 1000 * np.quantile(served, (0.5, 0.95, 0.99))
    errors = len(counted) - len(served)
    return Load(len(served) / elapsed, *quantiles, errors, before, megabytes(process))


def one_alone(port, bodies):
    """Median milliseconds of a request that is alone, whole and of each of PARTS."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        requests = itertools.islice(itertools.cycle(bodies), ALONE_REQUESTS + 3)
        answered = [ask(connection, *body) for body in requests][3:]
    if any(each.status != 200 for each in answered):
        raise ValueError("a picture was not captioned: python -m caption_service client says which")
    parts = {part: float(np.median([each.parts[part] for each in answered])) for part in PARTS}
    return {"whole": 1000 * float(np.median([each.seconds for each in answered]))} | parts


def program_alone(model_path, paths, seconds):
    """Captions per second of the program itself: from files, and of `generate` from features.

    In batches of 32 pictures, for about so many seconds each.
    """
    from flickr_image_caption import load_captioner
    from image_loading import load_batches
    from runtime import set_threads

    captioner, options = load_captioner(model_path)
    set_threads("auto", captioner.hardware.device, False)
    size = captioner.encoder.image_size

    def rate(work, items):
        work(items[0])
        started, done, items = time.perf_counter(), 0, itertools.cycle(items)
        while (elapsed := time.perf_counter() - started) < seconds:
            done += work(next(items))
        return done / elapsed

    def search(features):
        return len(list(captioner.caption_features([features], options.decoding)))

    def whole(batch):
        (pixels,) = load_batches(batch, size, [range(len(batch))])
        return search(captioner.encode(pixels))

    batches = [paths[start : start + 32] for start in range(0, len(paths), 32)]
    features = [captioner.encode(batch) for batch in batches[:8]]
    return {"from files": rate(whole, batches), "from features": rate(search, features)}


def measure(arguments):
    """All numbers, as JSON holds them."""
    from image_loading import pictures_in

    paths = pictures_in(Path(arguments.images))[: arguments.pictures]
    bodies = [as_form({}, [path.read_bytes()], "file") for path in paths]
    found = {"pictures": len(paths), "clients": arguments.clients, "seconds": arguments.seconds}
    for name, settings in {"batching": {}, "each alone": {"max_batch": 1}}.items():
        with running_service(arguments.model_path, **settings) as (port, process):
            if name == "batching":
                found["one request alone, ms"] = one_alone(port, bodies)
            under_load = load(port, process, bodies, arguments.clients, arguments.seconds)
        found[name] = under_load._asdict()
    found["program"] = program_alone(arguments.model_path, paths, min(20.0, arguments.seconds))
    return found


def as_table(found):
    """The numbers for a reader."""
    heads = ("captions/s", "p50 ms", "p95 ms", "p99 ms", "errors", "MB before", "MB after")
    lines = [f"{found['clients']} clients for {found['seconds']:g} s, {found['pictures']} pictures"]
    lines += [f"{'':12}" + "".join(f"{head:>12}" for head in heads)]
    for name in ("batching", "each alone"):
        values = found[name].values()
        lines += [f"{name:12}" + "".join(f"{value:12.1f}" for value in values)]
    rate = found["batching"]["captions_per_second"]
    lines += [f"batching / each alone: {rate / found['each alone']['captions_per_second']:.2f}"]
    for name, alone in found["program"].items():
        lines += [
            f"the program alone, {name}: {alone:.1f} captions/s; the service has {rate / alone:.2f}"
        ]
    parts = found["one request alone, ms"]
    lines += [
        "one request alone, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items())
    ]
    return "\n".join(lines)


def main(argv=None):
    """Measure and print. Returns: the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark_service.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model_path", required=True, help="checkpoint, or a folder of runs")
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument("--pictures", type=int, default=256, help="of these, at most (256)")
    parser.add_argument("--clients", type=int, default=32, help="that ask at once (32)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, each time (60)")
    parser.add_argument("--json", action="store_true", help="numbers as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = measure(arguments)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"benchmark_service.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if arguments.json else as_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

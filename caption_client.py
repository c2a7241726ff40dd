"""Ask a captioning service from the command line, and print as --mode caption does.

    python -m caption_service client http://127.0.0.1:8000 dog.jpg holiday_folder --num_captions 3
    python -m caption_service client http://127.0.0.1:8000 holiday_folder --json > captions.jsonl

Pictures go in batches, folders are read as --images reads them, and the flags of the search are the
program's own. A picture that cannot be captioned is named on stderr, and the status is 1.
"""

import http.client
import json
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from caption_options import DECODING, add_option

BATCH = 16  # pictures of a request, at most
BATCH_BYTES = 8_000_000  # a larger picture goes alone
PATIENCE_SECONDS = 120.0  # with a service that is starting or busy


def add_arguments(parser):
    """The client's arguments; flags of the search that are not typed are not sent."""
    parser.description = __doc__.partition("\n")[0]
    parser.add_argument("url", help="where the service is, such as http://127.0.0.1:8000")
    parser.add_argument("pictures", nargs="+", help="pictures, and folders of pictures")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    for name, row in DECODING.items():
        add_option(parser, name, row)


def main(arguments):
    """Print captions. Returns: the status, 1 if a picture has none, 2 for misuse or without a service."""
    from image_loading import pictures_in
    from progress import Progress

    given = vars(arguments)
    fields = {name: str(given[name]) for name in DECODING if given[name] is not None}
    status = 0
    try:
        paths = [path for name in arguments.pictures for path in pictures_in(Path(name))]
        batches = list(in_batches(paths))
        for batch in Progress(
            batches, "captioning", len(batches), "batches", disable=len(batches) < 2
        ):
            for path, result in zip(batch, ask(arguments.url, batch, fields), strict=True):
                status |= print_result(path, result, arguments.json)
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"caption_service: error: {error}", file=sys.stderr)
        return 2
    return status


def in_batches(paths):
    """Yield lists of paths whose files make a request of bearable size."""
    batch, size = [], 0
    for path in paths:
        length = path.stat().st_size
        if batch and (len(batch) == BATCH or size + length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += length
    if batch:
        yield batch


def ask(url, paths, fields):
    """What the service says of each picture. It is asked again while it has no room or no model yet.

    Raises: ValueError with what it refused; OSError, HTTPException when there is no service.
    """
    content, kind = as_form(fields, [path.read_bytes() for path in paths])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        status, headers, answer = post(url, content, kind)
        if status == 200 and "results" in answer:
            return answer["results"]
        if status == 413 and len(paths) == 1:  # the others may still be captioned
            return [{"error": answer.get("error", "too large for the service")}]
        if status != 503 or time.monotonic() > deadline:
            raise ValueError(f"{url}: {answer.get('error', 'no reason given')} (status {status})")
        after = headers.get("Retry-After", "")  # a proxy may give a date
        time.sleep(min(int(after), PATIENCE_SECONDS) if after.isdecimal() else 1)


def as_form(fields, files, file_field="files"):
    """{name: text} and files' contents as multipart/form-data: the body, and its media type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in fields.items()
    ]
    for number, content in enumerate(files):  # their names are nobody's business
        head = f'Content-Disposition: form-data; name="{file_field}"; filename="{number}"'
        parts += [f"--{boundary}\r\n{head}\r\n\r\n".encode(), content, b"\r\n"]
    return b"".join(
        [*parts, f"--{boundary}--\r\n".encode()]
    ), f"multipart/form-data; boundary={boundary}"


def post(url, content, kind):
    """Status, headers and JSON that /predict/batch answers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url}: give the service's address, such as http://127.0.0.1:8000")
    secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connect(parts.netloc, timeout=PATIENCE_SECONDS)
    try:
        path = f"{parts.path.rstrip('/')}/predict/batch"
        connection.request("POST", path, content, {"Content-Type": kind})
        response = connection.getresponse()
        return response.status, response.headers, as_json(response.read())
    finally:
        connection.close()


def as_json(content):
    """The object that an answer holds; {} where something else than our service answers."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def print_result(path, result, as_lines_of_json):
    """A picture's captions on stdout, or on stderr why it has none. Returns: 1 if it has none."""
    from runtime import printable

    shown = printable if sys.stdout.isatty() else str
    if "error" in result:
        reason = result["error"].removeprefix("picture: ")
        print(printable(f"caption_service: {path}: {reason}"), file=sys.stderr)
        return 1
    captions = [{key: each[key] for key in ("caption", "log_prob")} for each in result["captions"]]
    if as_lines_of_json:
        line = {"image": str(path), "captions": captions}
        print(shown(json.dumps(line, ensure_ascii=False)), flush=True)
    else:
        print(
            *(f"{shown(path)}\t{shown(each['caption'])}" for each in captions), sep="\n", flush=True
        )
    return 0

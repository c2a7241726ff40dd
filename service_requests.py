"""What a request to the captioning service holds, and what it is answered.

    async with open_form(request, settings, max_files=1) as (files, fields):
        decoding, with_maps = read_search(fields, options, settings)
        picture = read_picture(files[0], size=224)       # or the ValueError that says why it is none
    answer = as_answer(captioner, captioned, decoding, picture, with_maps)

Requests come from anyone: a body is read as far as it may count, a picture is decoded as far as
image_loading allows, and what may be asked of the search is what its flag takes, and no more than
the service's settings allow. A refusal is a starlette HTTPException whose text is for the client.
"""

import asyncio
import contextlib
import math
import time
from typing import NamedTuple

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import caption_options
import config_file
import image_loading
from runtime import printable

MAX_GIF_FRAMES = 1000  # of which the first would be captioned
GIF_FRAME = b"\x21\xf9\x04"  # the extension that stands before each frame of an animation
LINGER_SECONDS = 2.0  # a body that is refused is read so long: a client that sends hears no answer


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


def read_search(fields, options, settings):
    """{field: text} of a request -> the search as options.decoding, and whether maps are wanted.

    options: the checkpoint's, which stand for what is not given.

    Raises: HTTPException 400 naming the field.
    """
    try:
        with_maps = read_switch(fields.pop("attention", "false"))
        values = {name: read_value(name, text, settings) for name, text in fields.items()}
        return caption_options.settle(values, options.as_dict()).decoding, with_maps
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


def as_answer(captioner, captioned, decoding, picture, with_maps):
    """What is answered about one picture, without times."""
    captions = [as_caption(captioner, hypothesis, with_maps) for hypothesis in captioned.hypotheses]
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
    maps = captioner.attention_grid(hypothesis).astype(float)  # (T, h, w)
    beside = captioner.attention_beside(hypothesis)
    return {
        "grid": list(captioner.encoder.grid),
        "maps": maps.reshape(len(maps), math.prod(captioner.encoder.grid)).round(6).tolist(),
        "beside": {name: x.astype(float).round(6).tolist() for name, x in beside.items()},
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

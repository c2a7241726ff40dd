"""Pictures that arrive together are encoded and searched together: two threads compute, others wait.

    queue = CaptionQueue(capacity=128, max_batch=16, max_wait_seconds=0.01)
    with queue.expecting():                          # a picture is on its way
        pixels = ...                                 # (3, S, S) uint8
        (future,) = queue.submit(captioner, [pixels], decoding)
    captioned = future.result()
    queue.close()                                    # what was accepted is computed

One thread encodes a batch while the other searches the one before. A batch is made of pictures for the
same captioner and the same search. It begins as soon as the encoding thread is free, unless others are
expected: then it waits for them, `max_wait_seconds` at most.
"""

import contextlib
import logging
import queue
import random
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch

from caption_decoding import Hypothesis
from runtime import ENCODING, SEARCHING

logger = logging.getLogger("caption_service")
FIRST_GUESS_SECONDS = 0.1  # of a picture's computation, before one was measured


class Busy(Exception):
    """The queue is full; `args[0]` is about how many seconds later it may have room."""


class Captioned(NamedTuple):
    """What came of one picture, and what its batch took."""

    hypotheses: list[Hypothesis]  # best first
    batch_size: int  # pictures computed together
    wait_seconds: float  # from submit until now, less what was computed
    encode_seconds: float  # on CUDA until the work was handed over, not until it was done
    search_seconds: float


class Job(NamedTuple):
    """A picture that waits."""

    captioner: object  # flickr_image_caption.Captioner
    pixels: np.ndarray  # (3, S, S) uint8
    decoding: NamedTuple  # as options.decoding
    submitted: float  # time.monotonic()
    future: Future  # of Captioned

    @property
    def batched_by(self):
        """Equal for pictures that can be computed together."""
        return id(self.captioner), self.decoding


class Encoded(NamedTuple):
    """A batch between the two threads."""

    jobs: list[Job]
    features: object  # what the encoder's stem gave
    seconds: float  # that encoding took


def encode(jobs):
    """Encode the pictures of jobs that can be computed together."""
    started = time.perf_counter()
    pixels = torch.from_numpy(np.stack([job.pixels for job in jobs]))
    features = jobs[0].captioner.encode(pixels)
    return Encoded(jobs, features, time.perf_counter() - started)


def search(encoded):
    """Returns: a Captioned of each picture. Samples differ from call to call."""
    started = time.perf_counter()
    captioner, _, decoding, *_ = encoded.jobs[0]
    seed = random.getrandbits(32)
    hypotheses = list(captioner.caption_features([encoded.features], decoding, seed))
    seconds = time.perf_counter() - started
    now = time.monotonic()
    return [
        Captioned(
            found,
            len(encoded.jobs),
            max(0.0, now - job.submitted - encoded.seconds - seconds),
            encoded.seconds,
            seconds,
        )
        for job, found in zip(encoded.jobs, hypotheses, strict=True)
    ]


class CaptionQueue:
    """Pictures that wait, and the threads that compute them."""

    def __init__(self, capacity, max_batch, max_wait_seconds, on_batch=None):
        """
        Args:
            capacity: most pictures that wait, beside those that are computed.
            max_batch: most pictures computed together; 1: each alone.
            on_batch: called with the number of pictures of each batch.
        """
        self.capacity, self.max_batch, self.max_wait_seconds = capacity, max_batch, max_wait_seconds
        self.on_batch = on_batch or (lambda size: None)
        self._jobs, self._changed = deque(), threading.Condition()
        self._expected, self._closed = 0, False
        self._seconds_each = FIRST_GUESS_SECONDS
        self._encoded = queue.Queue(maxsize=1)  # what the encoding thread hands to the other
        works = {"encoding": self._encode_all, "searching": self._search_all}
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True) for name, work in works.items()
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self):
        return len(self._jobs)

    @contextlib.contextmanager
    def expecting(self):
        """While inside, a batch waits for pictures of this caller, `max_wait_seconds` at most."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def submit(self, captioner, pictures, decoding):
        """Let pictures, arrays (3, S, S) uint8, wait: all or none. Returns: a Future of Captioned each.

        Raises: Busy when there is no room for all of them, RuntimeError after `close`.
        """
        now = time.monotonic()
        jobs = [Job(captioner, pixels, decoding, now, Future()) for pixels in pictures]
        with self._changed:
            if self._closed:
                raise RuntimeError("the queue is closed")
            if len(self._jobs) + len(jobs) > self.capacity:
                raise Busy(self._seconds_each * len(self._jobs))
            self._jobs.extend(jobs)
            self._changed.notify_all()
        return [job.future for job in jobs]

    def close(self):
        """Compute what was accepted, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _encode_all(self):
        while (jobs := self._next_batch()) is not None:
            if not jobs:  # whoever asked for them has gone
                continue
            try:
                with ENCODING:
                    encoded = encode(jobs)
            except Exception:  # one picture may be the reason, and the thread must outlive it
                self._compute_alone(jobs)
            else:
                self._encoded.put(encoded)
        self._encoded.put(None)

    def _search_all(self):
        while (encoded := self._encoded.get()) is not None:
            try:
                with SEARCHING:
                    captioned = search(encoded)
            except Exception:  # one picture may be the reason here, too
                self._compute_alone(encoded.jobs)
            else:
                self._answer(encoded.jobs, captioned)

    def _compute_alone(self, jobs):
        """Compute the pictures of a batch that failed one by one: one of them may be the reason."""
        for job in jobs:
            try:
                with ENCODING, SEARCHING:
                    captioned = search(encode([job]))
            except Exception as error:  # it belongs to a picture's request, not to the thread
                logger.exception("a picture could not be captioned")
                job.future.set_exception(error)
            else:
                self._answer([job], captioned)

    def _answer(self, jobs, captioned):
        """Fill the futures of a batch."""
        for job, result in zip(jobs, captioned, strict=True):
            job.future.set_result(result)
        slower = max(captioned[0].encode_seconds, captioned[0].search_seconds)  # both work at once
        self._seconds_each = slower / len(jobs)
        try:
            self.on_batch(len(jobs))
        except Exception:  # the caller's counting may fail, but other pictures wait for this thread
            logger.exception("a batch could not be counted")

    def _next_batch(self):
        """The jobs to compute next, those of the longest waiting one's kind; None once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            deadline = self._jobs[0].submitted + self.max_wait_seconds
            self._changed.wait_for(self._is_complete, max(0.0, deadline - time.monotonic()))
            kind = self._jobs[0].batched_by
            same = [job for job in self._jobs if job.batched_by == kind][: self.max_batch]
            taken = set(map(id, same))
            self._jobs = deque(job for job in self._jobs if id(job) not in taken)
        return [job for job in same if job.future.set_running_or_notify_cancel()]

    def _is_complete(self):
        return self._closed or not self._expected or len(self._jobs) >= self.max_batch

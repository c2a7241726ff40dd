"""Pictures that arrive together are encoded and searched together: one thread computes, others wait.

    queue = CaptionQueue(capacity=128, max_batch=32, max_wait_seconds=0.01)
    with queue.expecting():                          # a picture is on its way
        pixels = ...                                 # (3, S, S) uint8
        (future,) = queue.submit(captioner, [pixels], decoding)
    captioned = future.result()
    queue.close()                                    # what was accepted is computed

A batch is made of pictures for the same captioner and the same search. It is computed as soon as the
thread is free, unless others are expected: then it waits for them, `max_wait_seconds` at most.
"""

import contextlib
import logging
import random
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch

from caption_decoding import Hypothesis
from runtime import TRACING

logger = logging.getLogger("caption_service")
FIRST_GUESS_SECONDS = 0.1  # of a picture's computation, before one was measured


class Busy(Exception):
    """The queue is full; `args[0]` is about how many seconds later it may have room."""


class Captioned(NamedTuple):
    """What came of one picture, and what its batch took."""

    hypotheses: list[Hypothesis]  # best first
    batch_size: int  # pictures computed together
    wait_seconds: float  # from submit until the batch began
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


def caption_batch(captioner, pixels, decoding):
    """Caption N pictures: arrays (3, S, S) uint8. Returns: hypotheses of each, encode and search seconds.

    Samples differ from call to call.
    """
    started = time.perf_counter()
    features = captioner.encode(torch.from_numpy(np.stack(pixels)))
    encoded = time.perf_counter()
    seed = random.getrandbits(32)
    hypotheses = list(captioner.caption_features([features], decoding, seed))
    return hypotheses, encoded - started, time.perf_counter() - encoded


class CaptionQueue:
    """Pictures that wait, and the thread that computes them."""

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
        self._thread = threading.Thread(target=self._run, name="captioning", daemon=True)
        self._thread.start()

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
        """Compute what was accepted, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self):
        while (batch := self._next_batch()) is not None:
            if batch:  # else whoever asked for them has gone
                self._compute(batch)

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

    def _compute(self, batch):
        """Fill the futures; where a batch fails, each of its pictures is tried alone."""
        captioner, _, decoding, *_ = batch[0]
        began = time.monotonic()
        try:
            pixels = [job.pixels for job in batch]
            with TRACING:  # of a model that is loaded meanwhile
                hypotheses, encode, search = caption_batch(captioner, pixels, decoding)
        except Exception as error:  # it belongs to a picture's request, not to the thread
            if len(batch) > 1:
                for job in batch:
                    self._compute([job])
            else:
                logger.exception("a picture could not be captioned")
                batch[0].future.set_exception(error)
            return
        self._seconds_each = (time.monotonic() - began) / len(batch)
        self.on_batch(len(batch))
        for job, found in zip(batch, hypotheses, strict=True):
            waited = began - job.submitted
            job.future.set_result(Captioned(found, len(batch), waited, encode, search))

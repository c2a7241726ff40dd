"""The progress of long work: a bar on a terminal, elsewhere a plain line every half a minute.

for image in Progress(images, "testing", len(images), "images"): ...
"""

import sys

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {speed}{postfix}{run_left}]"
LINE = "{desc}: {n_fmt}/{total_fmt}{postfix}, {speed}, {remaining} left{run_left}"


class Progress(tqdm):
    """tqdm, which writes lines where stderr is no terminal, such as

    epoch 2: 120/469, loss=3.412, 812 captions/s, 01:32 left, 21:40 in the run
    """

    monitor_interval = 0  # no thread beside those that fork: each item looks at the clock itself

    def __init__(
        self,
        items=None,
        title=None,
        total=None,
        unit="items",
        each=1,
        *,
        rounds=0,
        round_seconds=None,
        disable=False,
        **how,
    ):
        """
        Args:
            total: the number of items.
            unit, each: what an item holds, in the plural, and how many of them.
            rounds: how many more such passes follow in the run.
            round_seconds: how long each of them takes; None: as long as this one.
            disable: show nothing.
            how: tqdm's `initial`, `unit_scale`.
        """
        self.in_lines = not sys.stderr.isatty()
        self.each, self.rounds, self.round_seconds = each, rounds, round_seconds
        super().__init__(
            items,
            title,
            total,
            leave=False,
            mininterval=LINE_SECONDS if self.in_lines else 0.1,
            miniters=1,
            unit=unit,
            bar_format=LINE if self.in_lines else BAR,
            disable=disable,
            **how,
        )

    @property
    def format_dict(self):
        """What tqdm fills into a format, with `speed` and `run_left`."""
        values, done = super().format_dict, self.n - self.initial
        rate = values["rate"] or (done / values["elapsed"] if values["elapsed"] else 0)
        speed = f"{self.format_sizeof(rate * self.each)} {self.unit}/s"
        width = None if self.in_lines else values["ncols"]
        return values | {"speed": speed, "run_left": self._run_left(rate), "ncols": width}

    def _run_left(self, rate):
        if not (self.rounds and rate):
            return ""
        whole = self.total / rate
        left = (self.total - self.n) / rate + self.rounds * (self.round_seconds or whole)
        return f", {self.format_interval(left)} in the run"

    def display(self, msg=None, pos=None):
        """Draw the bar, or write a line once something is done."""
        if not self.in_lines:
            return super().display(msg, pos)
        if msg is None and self.n > self.initial:
            print(self, file=self.fp, flush=True)
        return False

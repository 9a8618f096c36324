"""Progress of long loops: a bar on a terminal, lines at intervals in a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

#: Seconds between two lines if the output is a file. A shorter loop writes no line.
EVERY = 30.0
LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm on stderr. Without a terminal, it writes a line every EVERY seconds and at the end of a long loop."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.lines = not sys.stderr.isatty()
        if self.lines:
            options = {"bar_format": LINE} | options
            options |= {"mininterval": EVERY, "miniters": 1, "delay": EVERY, "ascii": True}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if not self.lines:
            return super().display(msg, pos)
        print(str(self) if msg is None else msg, file=self.fp, flush=True)
        return True

    def close(self) -> None:
        if self.lines and not self.disable:
            if self.last_print_t > self.start_t and self.n > self.last_print_n:  # the last line is not yet written
                self.display()
            self.disable = True
        super().close()

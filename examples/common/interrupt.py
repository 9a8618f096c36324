"""Ctrl-C during a training."""

from __future__ import annotations

import signal
from typing import Any


class Interrupt:
    """Ctrl-C, remembered: what it raises while a process starts is dropped, and elsewhere may become an error."""

    came = False

    @classmethod
    def listen(cls) -> None:
        cls.came = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, cls.handle)

    @classmethod
    def handle(cls, *_: Any) -> None:
        cls.came = True
        raise KeyboardInterrupt

    @classmethod
    def raise_again(cls) -> None:
        if cls.came:
            raise KeyboardInterrupt


def leave_interrupts(_: int) -> None:
    """In a process that loads images: ignores Ctrl-C, which reaches every process. Ending first would be an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""Handles Ctrl-C during a training."""

from __future__ import annotations

import signal
from typing import Any


class Interrupt:
    """Remembers Ctrl-C, because its KeyboardInterrupt may be dropped or converted to another error."""

    received = False

    @classmethod
    def listen(cls) -> None:
        cls.received = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, cls.handle)

    @classmethod
    def handle(cls, *_: Any) -> None:
        cls.received = True
        raise KeyboardInterrupt

    @classmethod
    def raise_again(cls) -> None:
        if cls.received:
            raise KeyboardInterrupt


def ignore_interrupts(_: int) -> None:
    """Ignores Ctrl-C in a process that loads images. All processes get it, and the main process must end first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

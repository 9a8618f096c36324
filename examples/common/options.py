"""Types for argparse, and the messages and exit statuses of commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

#: Largest number of unreadable images that are named in the terminal.
NAMED = 20


def make_parser(description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that keeps the lines of its description and accepts no abbreviated options: ``--epoch`` is an error."""
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def next_step(text: str) -> None:
    """Prints the last line of a command: what to do next."""
    print(f"\nnext: {text}")


def warn_of_unreadable(problems: Sequence[str], advice: str = "") -> None:
    """Prints a warning with the first of ``problems``, a message for each image that cannot be read. None: nothing.

    Args:
        advice: a last line.
    """
    if problems:
        named = [f"  {problem}" for problem in problems[:NAMED]]
        more = [] if len(problems) <= NAMED else ["  ..."]
        count = (
            "1 image cannot be read and was"
            if len(problems) == 1
            else f"{len(problems)} images cannot be read and were"
        )
        lines = [f"\nwarning: {count} left out:", *named, *more, *([advice] if advice else [])]
        print(*lines, sep="\n", file=sys.stderr)


def exit_status(work: Callable[[], None], interrupted: str = "stopped") -> int:
    """Does the work of a command and returns its exit status.

    Args:
        work: a ValueError or OSError from it is an error that the user can correct. Other errors are raised.
        interrupted: what Ctrl-C prints, such as how to continue.

    Returns:
        0: done. 2: the error is on stderr. 130: interrupted.
    """
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    return 0


def path_of(text: str) -> Path:
    """For argparse: a path with ~ expanded. A shell does not expand it after --out=."""
    return Path(text).expanduser()


def device_name(text: str) -> str:
    """For argparse: an available device of torch. Allocates nothing on it, because each process uses another device."""
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: torch finds no GPU here")
    return text


def default_device() -> str:
    """``"cuda"`` if torch finds a GPU, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def message_of(error: Exception) -> str:
    """The message of an error, without the traceback that torch adds to errors of processes that load images."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.rsplit(f"\n{type(error).__name__}: ", 1)[-1].strip()

"""What a person sees: progress on a terminal, plain lines elsewhere, JSON where asked for."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NoReturn

from rich.console import Console

_EVERY_S = 10.0


def fail(message: str) -> NoReturn:
    """Prints one error and ends with status 1."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def say(text: str) -> None:
    """One line for the person, on stderr so that stdout stays clean for results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Progress:
    """Passing news: one rewritten line on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._last = time.monotonic()
        self._status = self._console.status("") if self._console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def update(self, text: str) -> None:
        """News that the next news replaces."""
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._last > _EVERY_S:
            self._last = time.monotonic()
            say(f"  {text}")

    def line(self, text: str) -> None:
        """News that stays."""
        self._last = time.monotonic()
        if self._status is not None:
            self._console.print(text, markup=False)
        else:
            say(text)

    def stop(self) -> None:
        """Gives the terminal back."""
        if self._status is not None:
            self._status.stop()

"""A bound on the time of a call that may hang, in the thread it was made from.

The thread is interrupted wherever it is in Python, so that nothing of the call lives on: a thread
that was left behind could wake up and write into the model that all sites share. A call that hangs
in compiled code and does not come back to Python cannot be ended in this way.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

_SIGNAL = signal.SIGUSR1  # SIGALRM belongs to whoever bounds the whole process, such as pytest
_ends: list[float] = []  # of the blocks that are open, by the monotonic clock


class DeadlineError(BaseException):
    """The time is over. No Exception, so that nothing in between takes it for its own fault."""


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raises DeadlineError inside the block when it takes longer; blocks may lie in one another.

    Without a bound, or outside the main thread, where Python delivers no signals, nothing happens.
    """
    main = threading.main_thread()
    if seconds is None or threading.current_thread() is not main:
        yield
        return
    # The handler stays: a signal that is late would end the process where there is none.
    signal.signal(_SIGNAL, _interrupt)
    timer = threading.Timer(seconds, signal.pthread_kill, (main.ident, _SIGNAL))
    timer.daemon = True
    end = time.monotonic() + seconds
    try:
        _ends.append(end)
        timer.start()
        yield
    finally:
        _ends.remove(end)
        timer.cancel()
        timer.join()  # it may be about to ring, and must not do so in the next block


def _interrupt(number: int, frame: object) -> None:
    """Others use this signal too, as batch systems do, and Ctrl-C goes before."""
    stopping = isinstance(sys.exc_info()[1], KeyboardInterrupt)
    if _ends and time.monotonic() >= min(_ends) and not stopping:
        raise DeadlineError

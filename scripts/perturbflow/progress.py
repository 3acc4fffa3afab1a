"""Log lines on the progress of a long step."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


def left(seconds: float) -> str:
    """Return the remaining time in words: seconds below a minute and a half, else minutes."""
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


class Progress:
    """Logs how many of n are done and the remaining time, at most every few seconds.

    It logs nothing where all are done sooner. The first one also waits for what is read and compiled once, so the
    remaining time is that of the others.
    """

    def __init__(self, task: str, n: int) -> None:
        self.task, self.n, self.done = task, n, 0
        self.first = self.last_line = time.monotonic()

    def step(self) -> None:
        """Count one more."""
        self.done += 1
        now = time.monotonic()
        if self.done == 1:
            self.first = now
        if self.done < self.n and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            known = ""
            if self.done > 1:
                known = ", " + left((now - self.first) / (self.done - 1) * (self.n - self.done))
            logger.info("%s: %d of %d%s", self.task, self.done, self.n, known)


def progressed(items: Iterable[Item], task: str, n: int | None = None) -> Iterator[Item]:
    """Yield items and log how many are done; without `n` there are as many as the collection holds."""
    progress = Progress(task, len(items) if n is None else n)  # type: ignore[arg-type]  # an iterator comes with its n
    for item in items:
        yield item
        progress.step()

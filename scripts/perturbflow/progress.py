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

    It logs nothing where all are done sooner.
    """

    def __init__(self, task: str, n: int) -> None:
        self.task, self.n, self.done = task, n, 0
        self.started = self.last_line = time.monotonic()

    def step(self) -> None:
        """Count one more."""
        self.done += 1
        now = time.monotonic()
        if self.done < self.n and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(
                "%s: %d of %d, %s",
                self.task,
                self.done,
                self.n,
                left((now - self.started) / self.done * (self.n - self.done)),
            )


def progressed(items: Iterable[Item], task: str, n: int | None = None) -> Iterator[Item]:
    """Yield items and log how many are done; without `n` there are as many as the collection holds."""
    progress = Progress(task, len(items) if n is None else n)  # type: ignore[arg-type]  # an iterator comes with its n
    for item in items:
        yield item
        progress.step()

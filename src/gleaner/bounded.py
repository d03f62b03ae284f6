"""Questions with an end: a shared file system can hang, and whoever only looks must not hang with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def ask(what: str, question: Callable[[], T], seconds: float) -> T:
    """The answer, or what the question raises; TimeoutError, which names `what`, when neither comes in time.

    The thread that asks is left behind: nothing can end a call that hangs in the kernel.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="ask", daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    if errors:
        raise errors[0]
    raise TimeoutError(f"{what}: no answer within {seconds:g} s")


class Patience:
    """Seconds that may be waited, by all who wait for a file system together: one that hangs is waited for once."""

    def __init__(self, seconds: float) -> None:
        self._seconds = self.left = seconds

    def spend(self, wait: Callable[[float], T], at_most: float | None = None) -> T:
        """What `wait` answers when it is called with what is left, or with less."""
        began = time.monotonic()
        try:
            return wait(self.left if at_most is None else min(self.left, max(0.0, at_most)))
        finally:
            self.left = max(0.0, self.left - (time.monotonic() - began))

    def renew(self) -> None:
        """It has answered."""
        self.left = self._seconds

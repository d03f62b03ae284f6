"""Questions with an end: a shared file system can hang, and whoever only looks must not hang with it."""

from __future__ import annotations

import threading
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

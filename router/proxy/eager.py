"""A coroutine is run at once, and becomes a task only if it has to wait.

Most requests find a worker and a connection free: for them a task, and the turn of the event loop that its first step
waits for, would be for nothing. It is what Python 3.12 calls eager_start. Until its first wait the coroutine runs in
no task: before that, `asyncio.timeout` and `asyncio.current_task` do not work.
"""

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


def start(
    coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, name: str
) -> asyncio.Task[None] | None:
    """Run it as far as it comes; the task that it goes on in, or None where it is done. Raises what it raises."""
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return None
    return loop.create_task(_Begun(coroutine, awaited), name=name)


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that came to its first wait, as a task takes it: the task's first step is that wait.

    A task that is cancelled before its first step tells the coroutine, which began already.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited

    def send(self, value: Any) -> Any:
        awaited, self._awaited = self._awaited, None
        return self._coroutine.send(value) if awaited is None else awaited

    def throw(self, *thrown: Any) -> Any:
        self._awaited = None
        return self._coroutine.throw(*thrown)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise NotImplementedError("only for a task")

"""Pins as operators ask for them: remembered in the file before they are answered, while the event loop goes on.

One after the other in the order they came, so the file ends as the last of them has it. A page stays from when its pin
is asked for, and until the end of that pin is on the disk; a pin that cannot be remembered is none.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from kvd import wire
from kvd.daemon.group import NO_PARENT
from kvd.daemon.node import Node
from kvd.errors import Refused

MOST_WAITING: Final = 64


class Pinning:
    """Whoever makes it runs `answer_forever`. On the event loop's thread; only the file is written on another."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked: asyncio.Queue[tuple[wire.Pin, Callable[[wire.Message], None]]] = asyncio.Queue(MOST_WAITING)

    def begin(self, request: wire.Pin, respond: Callable[[wire.Message], None]) -> None:
        """`respond` comes once, later. Raises Refused when too many others wait."""
        try:
            self._asked.put_nowait((request, respond))
        except asyncio.QueueFull:
            raise Refused("too many pins wait to be written", "try again: the disk of pins_file is slow") from None

    async def answer_forever(self) -> None:
        while True:
            request, respond = await self._asked.get()
            try:
                pages = await (self._pin(request) if request.keep else self._unpin(request))
                respond(wire.Pinned(pages, self._node.pins.bytes_in_ram))
            except Refused as refused:
                respond(wire.Refusal(refused.message, refused.hint))

    async def _pin(self, request: wire.Pin) -> int:
        node = self._node
        chain = node.residency.lineage(request.namespace, request.key)
        if not chain or chain[0].parent_key != NO_PARENT:
            raise Refused("that prefix is not in memory from its first page on", "send the prompt once, then pin it")
        if node.pin(chain):
            try:
                await _aside(partial(node.pins.write, node.pins.chains()))
            except Refused:
                node.unpin(request.namespace + request.key, time.monotonic())
                raise
        return len(chain)

    async def _unpin(self, request: wire.Pin) -> int:
        tip = request.namespace + request.key
        await _aside(partial(self._node.pins.write, self._node.pins.without(tip)))
        return self._node.unpin(tip, time.monotonic())


async def _aside(work: Callable[[], None]) -> None:
    """On a thread of its own, for which nobody waits when kvd ends: a disk that hangs must not keep it from that.

    Raises what the work raises, and Refused where there is no thread to be had.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        failed: Exception | None = None
        try:
            work()
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, failed)

    try:
        threading.Thread(target=run, name="pins", daemon=True).start()
    except RuntimeError as error:  # it would end the daemon
        raise Refused(f"cannot write pins: {error}", "raise TasksMax of kvd's unit, or ulimit -u") from error
    await done

"""The connections to one worker, kept open.

One that the worker closed while it lay idle is noticed at once; the race that remains (a request sent into a closing
connection) ends as `no_answer`, which the exchange may try again.
"""

import asyncio

from kvd.router.proxy.upstream import Connection, Lost
from kvd.router.steering import Worker


class Pool:
    """The connections to one worker. At most `most` lie idle."""

    def __init__(self, worker: Worker, connect_s: float, most: int = 256) -> None:
        self.worker = worker
        self.authority = worker.authority
        self._connect_s = connect_s
        self._most = most
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._all)

    def take_nowait(self) -> Connection | None:
        """An idle connection, the one used last."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def connect(self, once: bool = False) -> Connection:
        """A new connection; `once`: for one request. Raises Lost."""
        await asyncio.sleep(0)  # a deadline needs a task: who was eager (kvd.router.proxy.eager) becomes one here
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, once), self.worker.host, self.worker.port
                )
        except TimeoutError:
            raise Lost(f"{self.worker.name} did not accept a connection within {self._connect_s} s") from None
        except OSError as error:
            raise Lost(f"{self.worker.name}: {error.strerror or error}") from None
        return connection

    # What connections say of themselves

    def made(self, connection: Connection) -> None:
        self._all.add(connection)

    def rest(self, connection: Connection) -> None:
        if len(self._idle) < self._most:
            self._idle.append(connection)
        else:
            connection.abandon()

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def cut(self, why: str) -> None:
        """End every connection; who waits for an answer is told."""
        for connection in list(self._all):
            connection.cut(why)
        self._idle.clear()

    def close(self) -> None:
        """Drop every connection, busy ones too. Idempotent."""
        for connection in list(self._all):
            connection.abandon()
        self._idle.clear()

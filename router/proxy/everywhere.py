"""An order that is for every worker, not for some worker: told to all of them, answered once with what each said.

    {"http://10.0.0.1:30000": {"status": 200, "body": ...}, ...}        and the worst of their statuses

Which these are, kvd.router.proxy.endpoints knows. One worker alone is told with `x-kvd-worker: NAME`, of any endpoint
that does not generate: then its answer is passed on as it is.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from kvd.errors import UNDECODABLE
from kvd.router.proxy.answers import JSON, Answer
from kvd.router.proxy.asking import Reply, tell
from kvd.router.proxy.headers import Fields
from kvd.router.proxy.strict import Head
from kvd.router.proxy.upstream import Lost
from kvd.router.steering import Incoming, Worker

if TYPE_CHECKING:
    from kvd.router.proxy.client import Client
    from kvd.router.proxy.house import House

log = logging.getLogger("kvd.router")


class Everywhere:
    """One such order. To its client what kvd.router.proxy.exchange.Exchange is."""

    def __init__(
        self, client: "Client", house: "House", head: Head, request: Incoming, workers: list[Worker], single: bool
    ) -> None:
        self._client = client
        self._house = house
        self._head = head
        self._request = request
        self._single = single
        self._workers = workers
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Tell them."""
        self._task = self._house.loop.create_task(self._run(self._workers), name="everywhere")

    def leave(self) -> None:
        """The client is gone: nobody is told any more who was not told yet. Idempotent."""
        if self._task is not None:
            self._task.cancel()

    def pause(self) -> None:
        """Nothing to do: what is on its way is small."""

    def resume(self) -> None:
        """Nothing to do."""

    def check(self, now: float, silence_s: float) -> None:
        """Nothing to do: each worker has its deadline."""

    async def _run(self, workers: list[Worker]) -> None:
        answer = Answer(self._head, self._request.request_id.encode(), self._head.keep and not self._house.draining)
        fields: Fields = (JSON,)
        try:
            replies = await asyncio.gather(*(self._tell(worker) for worker in workers))
            status = max(reply.status for reply in replies)
            if self._single:
                _, body, fields = replies[0]
            else:
                said = zip(workers, replies, strict=True)
                body = msgspec.json.encode(
                    {one.name: {"status": reply.status, "body": _shown(reply.body)} for one, reply in said}
                )
        except Exception:
            log.exception("request %s failed in the router", self._request.request_id)
            self._house.counts["failures"] += 1
            status, body = 500, b'{"error": "the router failed at this request; its log says why"}'
        self._client.write(answer.whole(status, body, fields))
        self._client.done(answer.keep)

    async def _tell(self, worker: Worker) -> Reply:
        request = self._request
        try:
            within_s = self._house.limits.silence_s
            return await tell(self._house, worker, self._head, request.body, request.request_id.encode(), within_s)
        except Lost as lost:
            return Reply(502, msgspec.json.encode({"error": str(lost)}))


def _shown(body: bytes) -> Any:
    """JSON as it is, anything else as text."""
    try:
        return msgspec.Raw(body) if body and msgspec.json.decode(body) is not None else None
    except UNDECODABLE:
        return body.decode(errors="replace")

"""Small requests on behalf of clients, whose answers are collected, and orders that are for every worker."""

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvd.errors import UNDECODABLE
from kvd.router.asking import Collector
from kvd.router.proxy.answers import JSON
from kvd.router.proxy.headers import Fields, request_head
from kvd.router.proxy.strict import Head
from kvd.router.proxy.upstream import Lost
from kvd.router.steering import Busy, Incoming, Outcome, Worker

if TYPE_CHECKING:
    from kvd.router.proxy.house import House

_OWN_S = 2.0


class Reply(NamedTuple):
    """One worker's answer."""

    status: int
    body: bytes
    fields: Fields = (JSON,)  # of its head, those that say what the body is


async def tell(house: "House", worker: Worker, head: Head, body: bytes, request_id: bytes, within_s: float) -> Reply:
    """One worker's answer. Raises Lost. On a new connection: it may be no request to send twice."""
    pool = house.pools.get(worker.name)
    if pool is None:
        raise Lost(f"{worker.name} has just left")
    connection = await pool.connect(once=True)
    collector = Collector()
    keys = house.tenants.needed, house.worker_key
    try:
        written = request_head(head, worker.authority, len(body), request_id, *keys)
        connection.send(head.method, written, body, collector)
        async with asyncio.timeout(within_s):
            status, said = await collector.whole
            return Reply(status, said, collector.fields)
    except TimeoutError:
        raise Lost(f"{worker.name} did not answer within {within_s:.0f} s") from None
    finally:
        if not collector.whole.done() or collector.whole.cancelled() or collector.whole.exception() is not None:
            connection.abandon()


async def ask(house: "House", request: Incoming, tried: frozenset[str]) -> Any:
    """What some worker answers to a JSON POST, decoded; None where there is no good answer within two seconds."""
    try:
        choice = await house.steering.choose(request, tried)
    except Busy:
        return None
    outcome: Outcome = "cancelled"
    try:
        head = Head("POST", request.path.encode(), 1, [JSON])
        said = await tell(house, choice.worker, head, request.body, request.request_id.encode(), _OWN_S)
        outcome = "answered"
        return msgspec.json.decode(said.body) if said.status == 200 else None
    except Lost:
        outcome = "no_answer"
        return None
    except UNDECODABLE:
        return None
    finally:
        house.steering.finished(choice, outcome, house.loop.time())


async def count_tokens(house: "House", request: Incoming, text: str, tried: frozenset[str]) -> int | None:
    """Tokens of a text, as a worker counts them; None where none says. `request`: for whom it is asked."""
    named = {} if request.model is None else {"model": request.model}  # another model's tokens are others
    body = msgspec.json.encode({**named, "prompt": text, "add_special_tokens": False})
    question = msgspec.structs.replace(
        request, method="POST", path="/tokenize", body=body, routed=False, _json=msgspec.UNSET
    )
    said = await ask(house, question, tried)
    count = said.get("count") if isinstance(said, dict) else None
    return count if isinstance(count, int) else None

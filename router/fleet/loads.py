"""What a worker says of its load, `GET /v1/loads`, as reports. Pure.

Read in SGLang 0.5.23, managers/scheduler_components/load_inquirer.py (get_loads) and pool_stats_observer.py. Of each
data-parallel rank, as of `timestamp`, which is the scheduler's clock when it wrote this down: after each prefill step,
every few decode steps, and when it has nothing to do:

    num_running_reqs             the decode batch. Who is being prefilled is not in it, and joins it a step later
    num_waiting_reqs             the queue before that. A prompt that is being prefilled is not in it either, so in the
                                 course of a step, or of a long prompt's chunks, it is in neither
    num_waiting_uncached_tokens  of the queue, as far as a prefix is known not to be cached (else by the recent hit
                                 rate), and what remains of a prompt whose chunks are being prefilled
    num_used_tokens              KV memory that is neither free nor held by cached prefixes that may leave: of all that
                                 is running or being prefilled, what their prefixes lock included
    max_total_num_tokens         of all KV memory

So where tokens wait and no request does, one request is taken to wait: the prompt those chunks are of. In older
releases what is not said is 0, or this endpoint is not there.
"""

from datetime import datetime
from typing import Annotated, Final

import msgspec

from kvd.errors import UNDECODABLE, PeerError
from kvd.router.load import Report

PATH: Final = "/v1/loads?include=core"
MOST_AGE_S: Final = 3600.0
_Count = Annotated[int, msgspec.Meta(le=1 << 48)]  # JSON has numbers that no float can be: what divides them fails


class _Load(msgspec.Struct):
    timestamp: float = 0.0
    num_running_reqs: _Count = 0
    num_waiting_reqs: _Count = 0
    num_waiting_uncached_tokens: _Count = 0
    num_used_tokens: _Count = 0
    max_total_num_tokens: _Count = 0


class _Answer(msgspec.Struct):
    loads: list[_Load]
    timestamp: str = ""


_decode = msgspec.json.Decoder(_Answer).decode


def report(answer: bytes, now: float) -> Report:
    """All ranks together, as of the oldest. `now`: the router's clock when the answer came. Raises PeerError.

    Both timestamps are of the worker's machine, so what matters is their difference, not whose clock is right.
    """
    try:
        told = _decode(answer)
        asked = datetime.fromisoformat(told.timestamp).timestamp() if told.timestamp else 0.0
    except UNDECODABLE as error:
        raise PeerError(f"its /v1/loads is not understood: {error}") from error
    if not told.loads:
        raise PeerError("its /v1/loads names no rank")
    ages = [asked - load.timestamp for load in told.loads if asked and load.timestamp > 0]
    age = min(max(0.0, *ages), MOST_AGE_S) if ages else 0.0
    waiting = sum(max(0, load.num_waiting_reqs) for load in told.loads)
    tokens = sum(max(0, load.num_waiting_uncached_tokens) for load in told.loads)
    return Report(
        now - age,
        sum(max(0, load.num_running_reqs) for load in told.loads),
        max(waiting, 1) if tokens else waiting,
        tokens,
        sum(max(0, load.num_used_tokens) for load in told.loads),
        sum(max(0, load.max_total_num_tokens) for load in told.loads),
    )

"""A router that knows what it is told, for tests of its pages and of kvdctl: everything is real but the knowledge.

    python -m tests.told_router [PORT [PROCESSES]]        prints its port, serves until killed

It chose workers by the production policy, for the requests in `CHOSEN`; its fleet is a table that can be changed.
Started several times on one port it is what a router of several processes is.
"""

import asyncio
import sys
from dataclasses import dataclass, replace

import uvloop

from kvd.errors import KvdError, Refused
from kvd.router.decisions import Decisions, Made
from kvd.router.leastbusy import LeastBusy
from kvd.router.ledger import Ledger
from kvd.router.load import Load
from kvd.router.pages.told import Told
from kvd.router.policies.baselines import Lmetric
from kvd.router.policies.choice import Candidate, Matched
from kvd.router.policies.kvd import Kvd
from kvd.router.processes import listener
from kvd.router.proxy.client import Client
from kvd.router.proxy.house import House, Limits
from kvd.router.rates import Rates
from kvd.router.tenants import Tenants
from kvd.router.work import Request, Work

A, B, C = (f"http://10.0.0.{n}:30000" for n in (1, 2, 3))
BLOCK = 64


@dataclass(frozen=True)
class Row:
    """A member of the fleet."""

    name: str
    state: str = "serving"
    model: str = "Qwen/Qwen3-8B"
    node: str = "node-1"
    credit: bool = True
    why: str = ""
    remedy: str = ""
    health: str = ""
    parity: str = "equal"
    origin: str = "configured"


LOADS = {A: Load(Work(1, 2048, 2048 * 1024.0), running=3, context_tokens=9000), B: Load(running=1, context_tokens=500)}


class Table:
    """The fleet. Implements kvd.router.pages.told.Fleet."""

    def __init__(self) -> None:
        parity = "its tokens are not the router's: message 2 of the chat canary, at token 17"
        self.rows = {
            A: Row(A),
            B: Row(B),
            C: Row(
                C, credit=False, why=parity, remedy="give the router its model folder: model_path", parity="differs"
            ),
        }

    def members(self) -> list[Row]:
        return list(self.rows.values())

    def add(self, url: str) -> None:
        if not url.startswith("http://"):
            raise KvdError(f"{url} is no worker", "a worker is http://HOST:PORT")
        if url in self.rows:
            raise Refused(f"{url} is there already")
        self.rows[url] = Row(url, "joining", credit=False, why="it has not answered yet")

    def drain(self, name: str) -> None:
        self.rows[name] = replace(self._known(name), state="draining")

    def remove(self, name: str) -> None:
        del self.rows[self._known(name).name]

    def _known(self, name: str) -> Row:
        if name not in self.rows:
            raise Refused(f"there is no worker {name}", f"known are {', '.join(self.rows)}")
        return self.rows[name]


def chosen(now: float) -> Decisions:
    """`answered`: as it should be; `open`: has no first token; `twice`: failed, and was sent again; `blocks`: by a
    policy that knows no seconds; `lone`: there was one worker, and no tokens."""
    decisions, rates = Decisions(), Rates(token_bytes=131072)
    kvd, lmetric = Kvd(lambda _: rates), Lmetric(lambda: 0.5)
    candidates = [
        Candidate(A, Matched(gpu=3584, ram=3840), LOADS[A]),
        Candidate(B, Matched(ram=1024), LOADS[B]),
        Candidate(C, Matched(), Load()),
    ]

    def decide(name: str, at: float, by: Kvd | Lmetric = kvd, among: list[Candidate] = candidates) -> Made:
        request = Request(name, 4096, range(4096 // BLOCK), BLOCK)
        return decisions.add(request, by.choose(request, among, now - at), now - at)

    decide("lone", 9.0, among=candidates[:1]).unknown = "multimodal: a part of type image_url"
    decide("blocks", 8.0, lmetric)
    failed = decide("twice", 7.0)
    failed.ended_at, failed.outcome = now - 6.9, "unreachable"
    decide("twice", 6.8, among=candidates[1:])
    made = decide("answered", 5.0)
    made.first_at, made.ended_at, made.outcome, made.cached = now - 4.75, now - 2.0, "answered", 3584
    decide("open", 1.0)
    return decisions


def counted() -> Ledger:
    ledger = Ledger()
    for n in range(100):
        ledger.sent(str(n), 2048, 2048, Matched(gpu=2048) if n % 10 else Matched(gpu=512))
        ledger.answered(str(n), 4096, 2048 if n % 10 else 512, 2048)
    return ledger


async def serve(port: int, processes: int) -> None:
    loop = asyncio.get_running_loop()
    table = Table()
    told = Told(table, lambda name: LOADS.get(name, Load()), "kvd", processes, chosen(loop.time()), counted())
    house = House({}, LeastBusy([], 1, 0), Tenants([], b""), Limits(), told)
    sock = listener("127.0.0.1", port, beside=True)
    async with await loop.create_server(lambda: Client(house), sock=sock) as server:
        print(sock.getsockname()[1], flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        given = [int(word) for word in sys.argv[1:]]
        runner.run(serve(*given, *(0, 1)[len(given) :]))

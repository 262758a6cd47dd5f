"""What all connections of one router process share: who may come in, what they may ask, and where it goes."""

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from kvd.router.pages.metrics import named
from kvd.router.pages.pages import FOLDER, Pages
from kvd.router.pages.told import Told
from kvd.router.proxy.answers import Answer
from kvd.router.proxy.client import Client
from kvd.router.proxy.endpoints import Endpoint, endpoint
from kvd.router.proxy.pool import Pool
from kvd.router.proxy.strict import Head, Malformed
from kvd.router.steering import Incoming, Steering, Worker
from kvd.router.tenants import Tenant, Tenants, Unsaltable

_ID = re.compile(rb"[0-9A-Za-z_.:-]{1,64}")
_SECONDS = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may do. Bytes and seconds."""

    clients: int = 4096
    head_bytes: int = 32 << 10
    body_bytes: int = 64 << 20
    bodies_bytes: int = 512 << 20  # of all requests together
    head_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0
    send_s: float = 60.0
    silence_s: float = 600.0
    queue_s: float = 30.0
    connect_s: float = 2.0


class House:
    """Everything that outlives a connection. Used by one event loop."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        steering: Steering,
        tenants: Tenants,
        limits: Limits,
        told: Told,
        worker_key: bytes | None = None,
        fleet_numbers: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.steering = steering
        self.tenants = tenants
        self.limits = limits
        self.worker_key = worker_key
        self._fleet_numbers = fleet_numbers
        self.pools = {name: Pool(worker, limits.connect_s) for name, worker in workers.items()}
        self.counts: Counter[str] = Counter()
        self.draining = False
        self._pages = Pages(told, self)
        self._clients: set[Client] = set()
        self._empty = asyncio.Event()  # nobody is connected, or whoever is must not be waited for
        self._hurried = False
        self._bodies = 0
        self._prefix = secrets.token_hex(6)
        self._number = 0

    # Workers: kvd.router.fleet.crew.Doors

    def join(self, worker: Worker) -> None:
        """Requests may be sent there. A no-op where they may already."""
        if worker.name not in self.pools:
            self.pools[worker.name] = Pool(worker, self.limits.connect_s)

    def leave(self, name: str) -> None:
        """Answers still on their way from there are cut, and go on elsewhere where they can."""
        pool = self.pools.pop(name, None)
        if pool is not None:
            pool.cut("the worker was removed")

    # Connections

    def enter(self, client: Client) -> bool:
        """Whether there is room for one more; it must leave by itself if not."""
        self._clients.add(client)
        self.counts["connections"] += 1
        return len(self._clients) <= self.limits.clients

    def exit(self, client: Client) -> None:
        self._clients.discard(client)
        if not self._clients:
            self._empty.set()

    def reserve(self, size: int) -> bool:
        """Count bytes of bodies; False where they are too many."""
        if self._bodies + size > self.limits.bodies_bytes:
            return False
        self._bodies += size
        return True

    def release(self, size: int) -> None:
        self._bodies -= size

    def tick(self, now: float) -> None:
        """A moment passed."""
        self.steering.tick(now)
        for client in list(self._clients):
            client.check(now)

    # Requests

    def request_id(self, head: Head | None) -> str:
        """The client's own, if it is sane; else one that nobody else has."""
        given = head.single.get(b"x-kvd-request-id") if head is not None else None
        if given is not None and _ID.fullmatch(given) is not None:
            return given.decode()
        self._number += 1
        return f"{self._prefix}-{self._number:x}"

    def admit(self, head: Head, peer: str) -> tuple[Endpoint, Tenant]:
        """Who asks, from which address, and for what. Raises Malformed with 401 or 403."""
        known = endpoint(head.path)
        tenant = self.tenants.who(head.single)
        if head.target.startswith(FOLDER):
            self._pages.admit(head, tenant, peer)
            return known, tenant or Tenant("")
        if tenant is None:
            raise Malformed(401, "no known API key: send it as `authorization: Bearer KEY` or `x-api-key: KEY`")
        if not (known.public or tenant.admin):
            raise Malformed(403, f"{head.path} is for administrators")
        if (named := head.single.get(b"x-kvd-worker")) is not None:
            if known.routed:
                raise Malformed(400, "x-kvd-worker names a worker for what does not generate")
            if named.decode("latin-1") not in self.pools:
                raise Malformed(404, f"x-kvd-worker: known are {', '.join(self.pools)}")
        if known.salt == "impossible" and not tenant.shared:
            raise Malformed(403, f"SGLang cannot keep tenants apart at {head.path}: it takes no cache_salt there")
        return known, tenant

    def request(self, head: Head, known: Endpoint, tenant: Tenant, body: bytes) -> Incoming:
        """What steering sees and the worker gets. Raises Malformed."""
        if known.salt == "carried" and not tenant.shared and head.method in ("POST", "PUT"):
            if b"content-encoding" in head.single:
                raise Malformed(415, "a compressed body cannot be given the tenant's salt")
            try:
                body = self.tenants.salted(tenant, body)
            except Unsaltable as error:
                raise Malformed(400, str(error)) from error
        now = self.loop.time()
        seconds = self.limits.queue_s
        within = head.single.get(b"x-kvd-timeout-s")
        if within is not None:
            if not _SECONDS.fullmatch(within):
                raise Malformed(400, "x-kvd-timeout-s is a number of seconds, for instance 2.5")
            seconds = min(seconds, float(within))
        self.counts["requests"] += 1
        return Incoming(
            self.request_id(head), head.method, head.path, head.fields, body, tenant.name, tenant.weight,
            tenant.priority, now, now + seconds, known.routed,
        )  # fmt: skip

    def own_page(self, head: Head, body: bytes) -> bytes | None:
        """The whole answer to a request for the router itself; None for any other."""
        if not head.target.startswith(FOLDER):
            return None
        reply = self._pages.answer(head, body)
        answer = Answer(head, self.request_id(head).encode(), head.keep)
        return answer.whole(reply.status, reply.body, [(b"content-type", reply.kind)])

    def numbers(self) -> dict[str, float]:
        """For /kvd/metrics, by name."""
        numbers: dict[str, float] = {f"{name}_total": count for name, count in sorted(self.counts.items())}
        numbers |= {"clients": len(self._clients), "bodies_bytes": self._bodies}
        numbers |= {named("worker_connections", worker=name): len(pool) for name, pool in self.pools.items()}
        numbers |= {f"fleet_{name}": value for name, value in self._fleet_numbers().items()}
        return numbers | {f"steering_{name}": value for name, value in self.steering.describe().items()}

    # Goodbye

    @property
    def in_progress(self) -> int:
        """Clients that have asked for something and wait for it."""
        return sum(not client.idle for client in self._clients)

    def cut(self) -> None:
        """Who is in a hurry to stop does not wait for answers, neither from now on nor where a drain waits already."""
        self._hurried = True
        self._empty.set()

    async def drain(self, within_s: float) -> None:
        """Finish what was asked, take no new clients; what is not done in time is cut.

        Who is connected and asks once more within a moment is answered, and told that it was the last time: a request
        on its way over a connection that is being closed would be lost.
        """
        self.draining = True
        for client in self._clients:
            client.last_call()
        if self._clients and not self._hurried:
            self._empty.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._empty.wait()
        for client in list(self._clients):
            client.cut()
        await asyncio.sleep(0)
        for pool in self.pools.values():
            pool.close()

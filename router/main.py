"""`kvd-router`: from start to goodbye.

    kvd-router [--config FILE] [--worker URL ...] [--host HOST] [--port PORT] [--print-config | --example-config]
    kvd-router --hash-key            read an API key from standard input, print the digest for the file of keys

Exit status: 0 after a clean stop, 78 when a setting is wrong (systemd does not retry), 1 otherwise. With
`listen.processes` above 1 this process only watches over them: when one of them ends, all do, and systemd starts anew.
"""

import argparse
import asyncio
import gc
import logging
import os
import random
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import uvloop

from kvd import __version__, descriptors, systemd
from kvd.errors import KvdError, SettingsError
from kvd.router.fleet.fleet import Fleet
from kvd.router.informed import Informed
from kvd.router.pages.told import Told
from kvd.router.policies.named import POLICIES
from kvd.router.proxy.client import Client
from kvd.router.proxy.house import House
from kvd.router.settings import RouterSettings, example, load_router_settings
from kvd.router.tenants import digest

log = logging.getLogger("kvd.router")
EX_CONFIG = 78
_TICK_S = 0.25
_BACKLOG = 2048
# As gc.set_threshold takes it. The index has an object for each stretch of a chain: with Python's own thresholds up to
# half of the time in which a snapshot comes in is spent on looking whether these are garbage, often at all of them.
COLLECT_AFTER: Final = (10_000, 20, 50)
_KEPT_BYTES = 8 << 20


def listener(host: str, port: int) -> socket.socket:
    """A socket that other processes may listen at too: siblings, and the next router before this one is gone."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise SettingsError(
            f"cannot listen at {host}:{port}: {error.strerror or error}", "choose another listen.host or listen.port"
        ) from error
    return sock


async def serve(settings: RouterSettings, sock: socket.socket, ready: int | None) -> None:
    """Run until SIGTERM or SIGINT. `ready`: written to once clients are served; None: tell the service manager."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def finish(failure: Exception | None = None) -> None:
        if not stop.done():
            stop.set_result(None) if failure is None else stop.set_exception(failure)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, finish)

    def failed(_: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
        error = what.get("exception") or RuntimeError(what["message"])
        if isinstance(error, OSError):  # of one connection, or of too many: theirs alone
            log.warning("%s: %s", what["message"], error)
        else:
            finish(error)

    loop.set_exception_handler(failed)
    workers = settings.read_workers()
    fleet = Fleet(workers.values(), settings.read_fleet())
    policy = POLICIES[settings.routing.policy](random.random, fleet.rates)
    steering = Informed(list(workers.values()), settings.queue.each, settings.queue.waiting, fleet, policy)
    told = Told(
        fleet, lambda worker: steering.load.at(worker, loop.time()), settings.routing.policy,
        settings.listen.processes, steering.decisions, steering.ledger,
    )  # fmt: skip
    house = House(
        workers, steering, settings.read_tenants(), settings.read_limits(), told, settings.read_worker_key(),
        fleet.describe,
    )  # fmt: skip
    fleet.attach(steering, house, steering.load.reported)
    server = await loop.create_server(lambda: Client(house), sock=sock, backlog=_BACKLOG)
    gc.freeze()  # what lives as long as the process is not looked at again
    gc.set_threshold(*COLLECT_AFTER)
    # From a block of this size that is freed glibc learns not to give memory back at once (mallopt(3), on
    # M_MMAP_THRESHOLD): else each body of some 32 KiB would fault its pages in anew.
    bytes(_KEPT_BYTES)

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            house.tick(loop.time())

    async with asyncio.TaskGroup() as group:
        jobs = [group.create_task(tick(), name="tick"), group.create_task(fleet.run(), name="fleet")]
        log.info("kvd-router %s serves %d workers at %s:%d", __version__, len(workers), *sock.getsockname()[:2])
        _tell(ready, f"READY=1\nSTATUS={len(workers)} workers")
        await stop
        _tell(ready, "STOPPING=1")
        server.close()
        await house.drain(settings.drain_s)
        for job in jobs:
            job.cancel()
    fleet.close()


def _tell(ready: int | None, state: str) -> None:
    if ready is None:
        systemd.notify(state)
    elif state.startswith("READY"):
        os.write(ready, b".")
        os.close(ready)  # whoever waits for others must see that they ended without a word


def run(settings: RouterSettings, sock: socket.socket, ready: int | None = None) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, sock, ready))


def watch(settings: RouterSettings, sock: socket.socket) -> int:
    """Run all processes and wait for them; the first of them that ends by itself ends all. Their exit status."""
    port = sock.getsockname()[1]
    heard, ready = os.pipe()
    children: set[int] = set()
    stopping = False
    for number in range(settings.listen.processes):
        if (child := os.fork()) == 0:
            os.close(heard)
            _be_child(settings, sock if number == 0 else listener(settings.listen.host, port), ready)
        children.add(child)
    sock.close()
    os.close(ready)

    def forward(number: int, _: Any) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            with suppress(ProcessLookupError):  # it has ended, and is just being noticed
                os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    if _all_ready(heard, len(children)):
        systemd.notify(f"READY=1\nSTATUS={len(children)} processes")
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        failed |= status
        if not stopping:
            log.error("process %d ended by itself: so do the others", child)
            failed = 1
            forward(signal.SIGTERM, None)
    return 1 if failed else 0


def _be_child(settings: RouterSettings, sock: socket.socket, ready: int) -> None:
    """Never returns."""
    status = 1
    try:
        run(settings, sock, ready)
        status = 0
    except BaseException:
        log.exception("this process ends")
    finally:
        os._exit(status)


def _all_ready(heard: int, count: int) -> bool:
    said = b""
    while len(said) < count and (more := os.read(heard, count)):
        said += more
    os.close(heard)
    return len(said) == count


def cli() -> None:
    """The console script."""
    parser = argparse.ArgumentParser(prog="kvd-router", description="Sends each request to an SGLang worker.")
    parser.add_argument("--config", type=Path, help="TOML file (default: /etc/kvd/router.toml if it exists)")
    parser.add_argument("--worker", action="append", metavar="URL", help="an SGLang server; instead of the file's")
    parser.add_argument("--host", help="listen.host")
    parser.add_argument("--port", type=int, help="listen.port")
    parser.add_argument("--print-config", action="store_true", help="print the settings in effect as JSON, and exit")
    parser.add_argument(
        "--example-config", action="store_true", help="print all settings with their defaults, as TOML"
    )
    parser.add_argument("--hash-key", action="store_true", help="print the digest of the API key on standard input")
    parser.add_argument("--version", action="version", version=f"kvd-router {__version__}")
    arguments = parser.parse_args()
    if arguments.example_config:
        print(example(), end="")
        return
    if arguments.hash_key:
        key = sys.stdin.buffer.readline().strip()
        if not key:  # its digest in the file would make every stranger that tenant
            print("kvd-router: no API key on standard input (kvd-router --hash-key < FILE)", file=sys.stderr)
            sys.exit(1)
        print(digest(key).hex())
        return
    listen = {name: value for name in ("host", "port") if (value := getattr(arguments, name)) is not None}
    given: dict[str, Any] = {"listen": listen} if listen else {}
    if arguments.worker:
        given["workers"] = arguments.worker
    descriptors.raise_limit()
    try:
        settings = load_router_settings(arguments.config, os.environ, given)
        if arguments.print_config:
            print(settings.model_dump_json(indent=2))
            return
        logging.basicConfig(
            level=settings.log_level.upper(), stream=sys.stderr, format="%(levelname).1s %(name)s: %(message)s"
        )
        settings.read_tenants()  # what is wrong with them is said before anybody is served
        settings.read_fleet()
        sock = listener(settings.listen.host, settings.listen.port)
        if settings.listen.processes > 1:
            sys.exit(watch(settings, sock))
        run(settings, sock)
    except SettingsError as error:
        print(f"kvd-router: {error}", file=sys.stderr)
        sys.exit(EX_CONFIG)
    except KvdError as error:
        print(f"kvd-router: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli()

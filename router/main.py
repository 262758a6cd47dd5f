"""`kvd-router`: from start to goodbye.

    kvd-router [--config FILE] [--worker URL ...] [--host HOST] [--port PORT] [--take-over]
    kvd-router --print-config | --example-config
    kvd-router --hash-key            read an API key from standard input, print the digest for the file of keys

Exit status: 0 after a clean stop, 78 when a setting is wrong (systemd does not retry), 2 when the command line is, 1
otherwise. With `listen.processes` above 1 this process only watches over them (kvd.router.processes).
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
from pathlib import Path
from typing import Any, Final

import uvloop

from kvd import __version__, descriptors, systemd
from kvd.errors import KvdError, SettingsError
from kvd.router.fleet.fleet import Fleet
from kvd.router.informed import Informed
from kvd.router.pages.told import Told
from kvd.router.policies.named import POLICIES
from kvd.router.processes import BACKLOG, listener, watch
from kvd.router.proxy.client import Client
from kvd.router.proxy.house import House
from kvd.router.settings import KEY, RouterSettings, example, load_router_settings
from kvd.router.tenants import digest

log = logging.getLogger("kvd.router")
EX_CONFIG = 78
_LONG_KEY: Final = 16
_TICK_S = 0.25
# timeout(1), terminals and service managers send one order to a process and to those that watch over it, so twice.
_AGAIN_S: Final = 1.0
# As gc.set_threshold takes it. The index has an object for each stretch of a chain: with Python's own thresholds up to
# half of the time in which a snapshot comes in is spent on looking whether these are garbage, often at all of them.
COLLECT_AFTER: Final = (10_000, 20, 50)
_KEPT_BYTES = 8 << 20


async def serve(settings: RouterSettings, sock: socket.socket, ready: int | None) -> None:
    """Run until SIGTERM or SIGINT; another of them a second later cuts what is still being answered. `ready`: written
    to once clients are served; None: tell the service manager."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def finish(failure: Exception | None = None) -> None:
        if not stop.done():
            stop.set_result(None) if failure is None else stop.set_exception(failure)

    asked_at: list[float] = []  # to stop, by signals

    def signalled() -> None:
        asked_at.append(loop.time())
        if asked_at[-1] - asked_at[0] >= _AGAIN_S:
            house.cut()
        finish()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)

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
    server = await loop.create_server(lambda: Client(house), sock=sock, backlog=BACKLOG)
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
        served = "1 worker" if len(workers) == 1 else f"{len(workers)} workers"
        log.info("kvd-router %s serves %s at %s:%d", __version__, served, *sock.getsockname()[:2])
        _tell(ready, f"READY=1\nSTATUS={served}")
        await stop
        _tell(ready, "STOPPING=1")
        await asyncio.sleep(0)  # so that who has connected by now is taken in, and not reset
        server.close()
        log.info(
            "stopping: %d in progress, for %.0f s at most; a second signal cuts", house.in_progress, settings.drain_s
        )
        await house.drain(settings.drain_s)
        for job in jobs:
            job.cancel()
    fleet.close()
    for number in (signal.SIGTERM, signal.SIGINT):  # one more would make a clean stop look like none
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    log.info("stopped")


def _tell(ready: int | None, state: str) -> None:
    if ready is None:
        systemd.notify(state)
    elif state.startswith("READY"):
        os.write(ready, b".")
        os.close(ready)  # whoever waits for others must see that they ended without a word


def run(settings: RouterSettings, sock: socket.socket, ready: int | None = None) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, sock, ready))


def cli() -> None:
    """The console script."""
    parser = argparse.ArgumentParser(
        prog="kvd-router",
        description="Sends each request to an SGLang worker.",
        epilog="exit status: 0 after a clean stop, 78 when a setting is wrong or the port is in use, 2 when the "
        "command line is wrong, 1 otherwise",
    )
    parser.add_argument("--config", type=Path, help="TOML file (default: /etc/kvd/router.toml if it exists)")
    parser.add_argument(
        "--worker", action="append", metavar="URL",
        help="an SGLang server, instead of the file's; once for each of them",
    )  # fmt: skip
    parser.add_argument("--host", help="listen.host")
    parser.add_argument("--port", type=int, help="listen.port")
    parser.add_argument(
        "--take-over", action="store_true", help="listen although another kvd-router does: stop that one then"
    )
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
        _hash_key()
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
        several = settings.listen.processes > 1
        logging.basicConfig(
            level=settings.log_level.upper(), stream=sys.stderr,
            format=f"%(levelname).1s %(name)s{'[%(process)d]' if several else ''}: %(message)s",
        )  # fmt: skip
        settings.read_tenants()  # what is wrong with them is said before anybody is served
        settings.read_fleet()
        sock = listener(settings.listen.host, settings.listen.port, arguments.take_over)
        if several:
            sys.exit(watch(settings, sock, run))
        run(settings, sock)
    except SettingsError as error:
        print(f"kvd-router: {error}", file=sys.stderr)
        sys.exit(EX_CONFIG)
    except KvdError as error:
        print(f"kvd-router: {error}", file=sys.stderr)
        sys.exit(1)


def _hash_key() -> None:
    """Print the digest of the key on standard input, if it is one that a client can send."""
    first, _, rest = sys.stdin.buffer.read().partition(b"\n")
    key = first.strip()
    if not key:  # its digest in the file would make every stranger that tenant
        sys.exit("kvd-router: no API key on standard input (kvd-router --hash-key < FILE)")
    if rest.strip() or not KEY.fullmatch(key):  # it comes in a header
        sys.exit("kvd-router: what is on standard input is not one API key (one line of ASCII without spaces)")
    if len(key) < _LONG_KEY:
        print(f"kvd-router: a key of {len(key)} characters can be guessed (openssl rand -hex 32)", file=sys.stderr)
    print(digest(key).hex())


if __name__ == "__main__":
    cli()

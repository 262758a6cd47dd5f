"""`kvd`: the node daemon, from start to goodbye.

    kvd [--config FILE] [--print-config | --example-config]

Exit status: 0 after a clean stop, 78 when a setting is wrong (systemd does not retry), 1 otherwise.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

from kvd import __version__, descriptors, systemd
from kvd.daemon.room import open_room
from kvd.daemon.shell import Shell
from kvd.errors import KvdError, SettingsError
from kvd.settings import DaemonSettings, example, load_daemon_settings

log = logging.getLogger("kvd")
EX_CONFIG = 78


async def serve(settings: DaemonSettings, inherited: dict[str, int]) -> None:
    """Run until SIGTERM or SIGINT. A job or a callback that fails ends the process, and the next one starts warm."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def finish(failure: Exception | None = None) -> None:
        if not stop.done():
            stop.set_result(None) if failure is None else stop.set_exception(failure)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, finish)
    loop.set_exception_handler(lambda _, what: finish(what.get("exception") or RuntimeError(what["message"])))
    # Pages are many, long-lived and hold no garbage: a full collection over them would stall every worker for tens of
    # milliseconds. The shell collects the young ones.
    gc.disable()
    with open_room(settings, inherited) as room:
        shell = Shell(settings, room)
        try:
            async with asyncio.TaskGroup() as group:
                jobs = [
                    group.create_task(job(), name=job.__name__)
                    for job in (shell.tick, shell.prefault, shell.follow_workers, shell.remember_pins)
                ]
                log.info("kvd %s ready in %s, arena %s", __version__, settings.run_dir, room.memory.name)
                systemd.notify(f"READY=1\nSTATUS={len(room.node.residency)} pages warm")
                await stop
                systemd.notify("STOPPING=1")
                await shell.flush()
                shell.close()
                for job in jobs:
                    job.cancel()
        finally:
            shell.close()


def cli() -> None:
    """The console script."""
    parser = argparse.ArgumentParser(prog="kvd", description="Keeps the KV cache of SGLang workers on this node.")
    parser.add_argument("--config", type=Path, help="TOML file (default: /etc/kvd/kvd.toml if it exists)")
    parser.add_argument("--print-config", action="store_true", help="print the settings in effect as JSON, and exit")
    parser.add_argument(
        "--example-config", action="store_true", help="print all settings with their defaults, as TOML"
    )
    parser.add_argument("--version", action="version", version=f"kvd {__version__}")
    arguments = parser.parse_args()
    if arguments.example_config:
        print(example(), end="")
        return
    descriptors.raise_limit()
    try:
        inherited = systemd.listened_fds(os.environ, os.getpid())
        settings = load_daemon_settings(arguments.config, os.environ)
        if arguments.print_config:
            print(settings.model_dump_json(indent=2))
            return
        logging.basicConfig(
            level=settings.log_level.upper(),
            stream=sys.stderr,
            format="%(levelname).1s %(name)s: %(message)s",
        )
        asyncio.run(serve(settings, inherited))
    except SettingsError as error:
        print(f"kvd: {error}", file=sys.stderr)
        sys.exit(EX_CONFIG)
    except KvdError as error:
        print(f"kvd: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli()

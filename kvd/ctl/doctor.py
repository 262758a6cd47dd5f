"""`kvdctl doctor`: proves the whole path on this node, and says how to repair what is broken.

Changes nothing that lasts. Never hangs: every check has a deadline of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvd.ctl.checks import attached, lower, memory, processes, reach, routing, trip
from kvd.ctl.checks.finding import STEP_S, Finding, within, worst
from kvd.ctl.router.link import URL_VARIABLE, KeyFileOption, router_at
from kvd.ctl.terminal import (
    FINE,
    NO_DAEMON,
    WRONG,
    JsonOption,
    SocketOption,
    printable,
    reporting,
    show_json,
    socket_path,
)
from kvd.errors import Unavailable

_STYLES = {"green": typer.colors.GREEN, "yellow": typer.colors.YELLOW, "red": typer.colors.RED}

_ROUTER_S = 6.5  # two questions, with what each of them may take

AskedRouterOption = Annotated[
    str | None,
    typer.Option(
        "--router", metavar="URL", envvar=URL_VARIABLE, help="A router to look at too. By default none.",
        show_default=False,
    ),
]  # fmt: skip


def command(
    context: typer.Context,
    socket: SocketOption = None,
    router: AskedRouterOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that the cache works on this node.

    Asks the daemon, sends one page through it and compares what comes back, then looks at every attached worker,
    at SGLang processes that should be attached and are not, and at the memory. Each line that is not green says
    what to do. It can run at any time: the page it sends is removed again, and no check takes longer than 3 s.

    With --router it also asks that router: whether it answers, whether each of its workers is there and is sent
    requests for what it has cached (its tokens are the router's own, its node is known exactly), and whether what
    the router believes to be cached is. A machine that has no kvd is then fine as it is, unless --socket or
    KVD_RUN_DIR says that it should have one.

    \b
    Examples:
      kvdctl doctor
      kvdctl doctor --socket /run/kvd/kvd.sock
      kvdctl doctor --router http://127.0.0.1:30080
      kvdctl doctor --json | jq '.checks[] | select(.level != "green")'

    \b
    Exit status: 0 nothing is red, 1 something is red, 2 wrong usage, 3 no daemon reachable, or not the router
    that was named.
    """
    path = socket_path(socket)
    # A variable is for every command that asks a router; who says --router here came for the router.
    source = context.get_parameter_source("router")
    alone = socket is None and source is not None and source.name == "COMMANDLINE"
    absent = reach.none_here(path) if alone else None
    findings, answered = ([absent], True) if absent is not None else diagnose(path)
    if router is not None:
        found, reached = _routed(router, key_file)
        findings, answered = findings + found, answered and reached
    level = worst(findings)
    with reporting(as_json):
        if as_json:
            show_json({"socket": str(path), "level": level, "checks": findings})
        else:
            for finding in findings:
                _show(finding)
            counts = {name: sum(f.level == name for f in findings) for name in ("red", "yellow", "green")}
            print(", ".join(f"{count} {name}" for name, count in counts.items() if count))
    raise typer.Exit(NO_DAEMON if not answered else WRONG if level == "red" else FINE)


def _routed(url: str, key_file: Path | None) -> tuple[list[Finding], bool]:
    """What is found of a router, and whether one answered."""
    gone: list[Unavailable] = []

    def ask() -> list[Finding]:
        try:
            return routing.routing(router_at(url, key_file))
        except Unavailable as error:
            gone.append(error)
            raise

    return within(_ROUTER_S, routing.CHECK, ask, unit="kvd-router"), not gone


def diagnose(path: Path) -> tuple[list[Finding], bool]:
    """All findings, and whether kvd answered: without an answer there is little else to look at."""
    seen = reach.Seen()
    findings = within(STEP_S, reach.CHECK, lambda: reach.reach(path, seen))
    status = seen.status
    if status is None:
        return findings + ([] if seen.answered else within(STEP_S, "room", memory.room_to_start)), seen.answered
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        (trip.CHECK, lambda: trip.trip(path, status)),
        (attached.CHECK, lambda: attached.workers(status)),
        (processes.CHECK, lambda: processes.processes(path, status)),
        ("arena", lambda: memory.arena(status)),
        ("room", lambda: memory.room(status)),
        ("tiers", lambda: lower.tiers(status)),
        ("memlock", lambda: memory.memlock(status)),
        ("damage", lambda: memory.damage(status)),
        ("warning", lambda: memory.warnings(status)),
    ]
    for name, check in checks:
        findings += within(STEP_S, name, check)
    return findings, True


def _show(finding: Finding) -> None:
    level = typer.style(f"{finding.level:<6}", fg=_STYLES[finding.level])
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    typer.echo(f"{level} {finding.check:<9} {printable(finding.message + remedy)}")

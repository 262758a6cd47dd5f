"""`kvdctl top`: the router's workers and what its cache does for it, once a second."""

import time
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from kvd.ctl.router import summed
from kvd.ctl.router.figures import ABSENT, lost, mean, missing
from kvd.ctl.router.link import DEFAULT_URL, KeyFileOption, RouterLink, RouterOption, router_at
from kvd.ctl.terminal import (
    JsonOption,
    on_terminal,
    percent,
    printable,
    reporting,
    several,
    show_facts,
    show_json,
    show_table,
)
from kvd.errors import KvdError
from kvd.router.pages import replies

_EVERY_S: Final = 1.0
_CLEAR: Final = "\x1b[H\x1b[2J"  # the cursor to the corner, and everything away
_COLUMNS: Final = (
    "worker", "state", "running", "queued", "tokens queued", "requests/s", "hit rate", "predicted", "first token",
    "credit",
)  # fmt: skip
_NONE_COUNTED: Final = (
    "none yet whose tokens are known and whose engine said what was cached (credit: kvdctl worker list; SGLang: "
    "--enable-cache-report)"
)

OnceOption = Annotated[bool, typer.Option("--once", help="Show one table and exit.")]


def command(
    router: RouterOption = DEFAULT_URL,
    once: OnceOption = False,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch the router: its workers, their cache hits, first tokens.

    One line per worker, new each second until Ctrl-C: the requests that run there and those that wait for their
    first token; over the last minute, how many requests a second it was sent, what part of their prompts its engine
    found cached, and the mean time to the first token, as predicted and as it came. "credit" says whether requests
    are sent there for what it has cached, or why not. Below, for the whole router since it started: what part of
    all prompts a cache of any size would have had, what part of that was had, and what the rest was lost to.

    \b
    Examples:
      kvdctl top
      kvdctl top --once --router http://10.0.0.5:30080
      kvdctl top --json | jq '.workers.workers[] | select(.credit | not) | .why'

    \b
    Exit status: 0 the router answered, 1 it refused, 2 wrong usage, 3 no router reachable.
    """
    with reporting(as_json):
        link = router_at(router, key_file)
        workers, ledger = _asked(link)
        if as_json:
            show_json({"workers": workers, "ledger": ledger})
        elif once:
            _show(link, workers, ledger)
        else:
            _watch(link, workers, ledger)


def _asked(link: RouterLink) -> tuple[replies.Workers, replies.Ledger]:
    return (
        summed.workers(link.ask_all("/kvd/workers", replies.Workers)),
        summed.ledger(link.ask_all("/kvd/ledger", replies.Ledger)),
    )


def _watch(link: RouterLink, workers: replies.Workers, ledger: replies.Ledger) -> None:
    """Until Ctrl-C. A router that goes away is waited for, and its last figures stay."""
    trouble = ""
    try:
        while True:
            print(_CLEAR if on_terminal() else "", end="")
            _show(link, workers, ledger)
            if trouble:
                print(f"\n{printable(trouble)}")
            print(end="", flush=True)
            time.sleep(_EVERY_S)
            try:
                workers, ledger = _asked(link)
                trouble = ""
            except KvdError as error:
                trouble = f"These figures are old: {error}"
    except KeyboardInterrupt:
        print()


def _show(link: RouterLink, workers: replies.Workers, ledger: replies.Ledger) -> None:
    show_facts(_facts(link, workers, ledger))
    print()
    if workers.workers:
        show_table(_COLUMNS, [_row(worker) for worker in workers.workers])
    else:
        print("No worker is there.")


def _facts(link: RouterLink, workers: replies.Workers, ledger: replies.Ledger) -> Iterator[tuple[str, str]]:
    shared = f", {workers.processes} processes" if workers.processes > 1 else ""
    yield "router", f"kvd-router {workers.version} at {link.url}, policy {workers.policy}{shared}"
    yield "waiting", f"{several(workers.waiting, 'request')} in its queue"
    if not ledger.requests:
        yield "prompts", _NONE_COUNTED
        return
    yield "prompts", f"{ledger.tokens:,} tokens of {several(ledger.requests, 'request')}"
    yield "available", f"{ledger.available:,} tokens, {percent(ledger.available, ledger.tokens)} of them"
    yield "achieved", f"{ledger.achieved:,} tokens, {percent(ledger.achieved, ledger.available)} of those available"
    yield "lost to", lost(ledger)


def _row(worker: replies.Worker) -> tuple[object, ...]:
    lately = worker.recent
    return (
        worker.name,
        worker.state,
        worker.running,
        worker.queued,
        worker.queued_tokens,
        _rate(lately),
        percent(lately.cached_tokens, lately.tokens),
        mean(lately.predicted_ttft_s, lately.timed),
        mean(lately.actual_ttft_s, lately.timed),
        "yes" if worker.credit else f"no: {missing(worker)}",
    )


def _rate(lately: replies.Recent) -> str:
    """A second; two a minute are not none."""
    if not lately.within_s:
        return ABSENT
    rate = lately.requests / lately.within_s
    return f"{rate:.2g}" if 0.0 < rate < 0.1 else f"{rate:.1f}"

"""What does the router cost per request and per event, and how late do tokens arrive?

Four mock workers in C, a load generator in C, and between them in turn: nothing, kvd-router, sglang-router 0.3.2
(round robin and cache aware) and nginx where it is installed. "Per core" is the rate divided by the CPU cores that the
router itself used; all of them share this machine with the load and the workers.

    1 KiB, 1     one connection, chats of 1 KiB: latency
    1 KiB, 64    64 connections: requests a second for each core
    32 KiB, 32   conversations that grow by a turn with each request, 32 KiB on average
    SSE          32 streams of 400 events, as fast as they are taken: events a second for each core
    100/s x 64   64 streams of 100 events a second: from an event's sending to its arrival

All get the same requests; no two are the same, and what they share is what real ones share: see _http_chats.py.

kvd-router steers by exact tokens and by what its workers hold: it has a real kvd's stream of their events, and every
worker's credit (see _http_fleet.py). That this was so for every request is asserted after each load. It has workers of
its own for that. "load alone" is kvd-router without tokens, whose workers publish no events, as all others' do. Ratios
are kvd-router, with tokens, over sglang-router cache aware. "bare uvloop" passes bytes on and does nothing else
(_http_bare.py): with what it takes, a router on that loop would decide at no cost. "bare, by tokens" is the same with
our tokens, hashes and index, and nothing else: what steering by exact prefixes takes before a router does its work.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tools.bench._http import Measured, Running, Tools, bare, direct, kvd_router, load, mocks, nginx, sglang_router
from tools.bench._http_chats import Chats, written
from tools.bench._http_fleet import BLOCK_TOKENS, await_credit, credited, matched
from tools.bench._kvd import scratch
from tools.bench._peers import Missing
from tools.bench._table import Options, Run, Samples, Table, finish, interleave, options, progress, software
from tools.bench._texts import model_folder, source

OURS, ALONE, THEIRS = "kvd-router", "kvd-router, load alone", "sglang-router cache_aware"
BARE = "bare uvloop"  # nothing but the loop and the parser
BY_TOKENS = "bare, by tokens"  # and exact tokens, hashes, an index
PEERS = {
    ALONE: partial(kvd_router, name=ALONE),
    "sglang-router round_robin": partial(sglang_router, policy="round_robin"),
    THEIRS: partial(sglang_router, policy="cache_aware"),
    "nginx": nginx,
    BARE: bare,
}
LOADS = {"1 KiB, 1": 1, "1 KiB, 64": 64, "32 KiB, 32": 32, "SSE": 32, "100/s x 64": 64}


class _Cases:
    """One case for each router and load."""

    def __init__(self, tools: Tools, files: dict[str, Path], seconds: float) -> None:
        self._tools = tools
        self._files = files
        self._seconds = seconds
        self.missing: dict[str, str] = {}

    def of(self, routers: list[Running]) -> list[Run]:
        return [partial(self._measure, router, name) for name in LOADS for router in routers]

    def _measure(self, router: Running, name: str, number: int) -> dict[str, float]:
        if number < 0:
            return {}
        try:
            found = load(self._tools, router, LOADS[name], self._seconds, self._files[name])
        except Missing as error:
            self.missing[f"{router.name}, {name}"] = str(error)
            return {}
        return _figures(f"{router.name} {name}", name, found) | (_steered(router, name) if router.name == OURS else {})


def _figures(key: str, name: str, found: Measured) -> dict[str, float]:
    rate = found.events if name == "SSE" else found.requests
    figures = {f"{key} rate": rate, f"{key} p50_us": found.p50_s * 1e6, f"{key} p99_us": found.p99_s * 1e6}
    if found.cores:
        figures[f"{key} per core"] = rate / found.cores
    return figures


def _steered(router: Running, name: str) -> dict[str, float]:
    """How much of the last prompts the chosen workers had; asserts that every request was steered by tokens."""
    by_events, all_told = matched(router)
    assert by_events > 0, f"{name}: nothing of what workers hold was matched"
    return {f"{OURS} {name} matched_percent": 100 * all_told, f"{OURS} {name} events_percent": 100 * by_events}


def _added(samples: Samples, names: list[str]) -> dict[str, float]:
    """Microseconds that each router adds to a request alone on its connection; both medians over the rounds."""
    found = {}
    for quantile in ("p50_us", "p99_us"):
        direct = samples.median(f"direct 1 KiB, 1 {quantile}")
        for name in names[1:]:
            through = samples.median(f"{name} 1 KiB, 1 {quantile}")
            if direct is not None and through is not None:
                found[f"{name} added {quantile}"] = round(through - direct, 1)
    return found


def main() -> None:
    wanted = options(__doc__)
    with ExitStack() as stack:
        folder, model = stack.enter_context(scratch()), stack.enter_context(model_folder())
        tools, chats = Tools(folder), Chats()
        short, long = chats.short(max_tokens=16), chats.long(max_tokens=16)
        loads = {
            "1 KiB, 1": short, "1 KiB, 64": short, "32 KiB, 32": long,
            "SSE": chats.short(max_tokens=400, stream=True), "100/s x 64": chats.short(max_tokens=101, stream=True),
        }  # fmt: skip
        files = {name: written(bodies, folder / f"bodies-{n}") for n, (name, bodies) in enumerate(loads.items())}
        ports = stack.enter_context(mocks(tools))
        fleet = stack.enter_context(credited(tools, folder, model, [*short, *long]))
        ours = stack.enter_context(kvd_router(fleet.ports, folder, events=fleet.events))
        await_credit(ours)
        routers, missing = [direct(ports), ours], {}
        for name, start in (PEERS | {BY_TOKENS: partial(bare, name=BY_TOKENS, model=model)}).items():
            try:
                routers.append(stack.enter_context(start(ports, folder)))
            except Missing as error:
                missing[name] = str(error)
                progress(f"{name}: {error}")
        cases = _Cases(tools, files, 0.5 if wanted.quick else 3.0)
        samples = interleave(cases.of(routers), wanted.rounds(1, 5), warm_up=0)
    tokens = f"tokens of {model.name} made by {fleet.backend}, blocks of {BLOCK_TOKENS}; texts: {source()}"
    _report(samples, [router.name for router in routers], missing | cases.missing, tokens, wanted)


def _report(samples: Samples, names: list[str], missing: dict[str, str], tokens: str, wanted: Options) -> None:
    columns = ("router", "1 KiB, 1: p50 / p99 us", "1 KiB, 64: 1/s (per core)", "32 KiB, 32: 1/s (per core)",
               "SSE: events/s (per core)", "100/s x 64: p50 / p99 us")  # fmt: skip
    table = Table("HTTP routers: rates, latency, and rates for each CPU core that the router used", columns)

    def latency(key: str) -> str:
        p50, p99 = samples.median(f"{key} p50_us"), samples.median(f"{key} p99_us")
        return "missing" if p50 is None or p99 is None else f"{p50:.0f} / {p99:.0f}"

    def rate(key: str) -> str:
        found, core = samples.median(f"{key} rate"), samples.median(f"{key} per core")
        return "missing" if found is None else f"{found:.0f}" + (f" ({core:.0f})" if core is not None else "")

    for name in names:
        table.add(
            name, latency(f"{name} 1 KiB, 1"), rate(f"{name} 1 KiB, 64"), rate(f"{name} 32 KiB, 32"),
            rate(f"{name} SSE"), latency(f"{name} 100/s x 64"),
        )  # fmt: skip
    table.notes.append(f"{OURS} steers by {tokens}")
    table.notes += [
        f"{name}: the chosen workers had {samples.median(f'{OURS} {name} matched_percent'):.0f} % of the prompts, "
        f"{samples.median(f'{OURS} {name} events_percent'):.0f} % by events"
        for name in LOADS
        if f"{OURS} {name} matched_percent" in samples.rounds
    ]
    table.notes += [f"missing: {name}: {why}" for name, why in missing.items()]
    table.notes.append(software("uvloop", "httptools"))
    ratios = {
        "rps_per_core_1k": samples.ratio(f"{OURS} 1 KiB, 64 per core", f"{THEIRS} 1 KiB, 64 per core"),
        "rps_per_core_32k": samples.ratio(f"{OURS} 32 KiB, 32 per core", f"{THEIRS} 32 KiB, 32 per core"),
        "sse_per_core": samples.ratio(f"{OURS} SSE per core", f"{THEIRS} SSE per core"),
        "delivery_p99": samples.ratio(f"{OURS} 100/s x 64 p99_us", f"{THEIRS} 100/s x 64 p99_us"),
    }
    figures = {name: round(statistic, 1) for name in samples.rounds if (statistic := samples.median(name)) is not None}
    figures |= _added(samples, names)
    finish("router_http", table, wanted, ratios, figures)


if __name__ == "__main__":
    main()

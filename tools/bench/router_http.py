"""What does the router cost per request and per event, and how late do tokens arrive?

Four mock workers in C, a load generator in C, and between them in turn: nothing, kvd-router, sglang-router 0.3.2
(round robin and cache aware) and nginx where it is installed. "Per core" is the rate divided by the CPU cores that the
router itself used; all of them share this machine with the load and the workers.

    1 KiB, 1     one connection, chat requests of 1 KiB: latency
    1 KiB, 64    64 connections: requests a second for each core
    32 KiB, 32   a conversation of 32 KiB in every request
    SSE          32 streams of 400 events, as fast as they are taken: events a second for each core
    100/s x 64   64 streams of 100 events a second: from an event's sending to its arrival

kvd-router chooses the least busy worker here: nothing is tokenized yet. Ratios are kvd-router over sglang-router cache
aware.
"""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tools.bench._http import Measured, Running, Tools, direct, kvd_router, load, mocks, nginx, sglang_router
from tools.bench._kvd import scratch
from tools.bench._peers import Missing
from tools.bench._table import Options, Run, Samples, Table, finish, interleave, options, progress, software

PEERS = {
    "kvd-router": kvd_router,
    "sglang-router round_robin": partial(sglang_router, policy="round_robin"),
    "sglang-router cache_aware": partial(sglang_router, policy="cache_aware"),
    "nginx": nginx,
}
OURS, THEIRS = "kvd-router", "sglang-router cache_aware"
TURN = "Please explain in a few words why the sky is blue at noon and red in the evening. "
LOADS = {"1 KiB, 1": 1, "1 KiB, 64": 64, "32 KiB, 32": 32, "SSE": 32, "100/s x 64": 64}


def bodies(folder: Path) -> dict[str, Path]:
    """The request of each load."""

    def conversation(size: int, turns: int, **more: object) -> bytes:
        def written(text: str) -> bytes:
            roles = ["user" if n % 2 == 0 else "assistant" for n in range(turns)]
            messages = [{"role": role, "content": f"{n} {text}"} for n, role in enumerate(roles)]
            return json.dumps({"model": "mock", **more, "messages": messages}, separators=(",", ":")).encode()

        room = (size - len(written(""))) // turns
        return written((TURN * (room // len(TURN) + 1))[:room])

    made = {
        "1 KiB, 1": conversation(1024, 1, max_tokens=16),
        "1 KiB, 64": conversation(1024, 1, max_tokens=16),
        "32 KiB, 32": conversation(32 << 10, 15, max_tokens=16),
        "SSE": conversation(512, 1, max_tokens=400, stream=True),
        "100/s x 64": conversation(512, 1, max_tokens=101, stream=True),
    }
    files = {name: folder / f"body-{n}.json" for n, name in enumerate(made)}
    for name, body in made.items():
        files[name].write_bytes(body)
    return files


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
        return _figures(f"{router.name} {name}", name, found)


def _figures(key: str, name: str, found: Measured) -> dict[str, float]:
    rate = found.events if name == "SSE" else found.requests
    figures = {f"{key} rate": rate, f"{key} p50_us": found.p50_s * 1e6, f"{key} p99_us": found.p99_s * 1e6}
    if found.cores:
        figures[f"{key} per core"] = rate / found.cores
    return figures


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
        folder = stack.enter_context(scratch())
        tools = Tools(folder)
        ports = stack.enter_context(mocks(tools))
        routers, missing = [direct(ports)], {}
        for name, start in PEERS.items():
            try:
                routers.append(stack.enter_context(start(ports, folder)))
            except Missing as error:
                missing[name] = str(error)
                progress(f"{name}: {error}")
        cases = _Cases(tools, bodies(folder), 0.5 if wanted.quick else 3.0)
        samples = interleave(cases.of(routers), wanted.rounds(1, 5), warm_up=0)
    _report(samples, [router.name for router in routers], missing | cases.missing, wanted)


def _report(samples: Samples, names: list[str], missing: dict[str, str], wanted: Options) -> None:
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
    table.notes.append("kvd-router chooses the least busy worker: nothing is tokenized, no prefix is looked up")
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

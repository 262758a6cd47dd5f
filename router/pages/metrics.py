"""Numbers as Prometheus reads them (text format 0.0.4). Pure.

    # HELP kvd_router_requests_total what it is
    # TYPE kvd_router_requests_total counter
    kvd_router_requests_total 12

A name is `family` or `family{label="value",...}`; what ends in _total is a counter, anything else a gauge. All samples
of a family are together, as the format asks.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Final

from kvd.router.pages import replies

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "kvd_router_"
_HELP: Final = {
    "connections_total": "connections that clients opened",
    "requests_total": "requests that were read whole and let in",
    "refused_total": "requests that were not understood, or not allowed",
    "late_total": "requests that did not arrive in time",
    "failures_total": "requests at which the router itself failed; its log says why",
    "continued_total": "streams whose worker died and that went on at another",
    "unreachable_total": "attempts at a worker that no connection was to be had to, or that said 503",
    "no_answer_total": "attempts at a worker that was lost before its first byte",
    "cut_total": "answers that a worker left in the middle",
    "clients": "connections that are open",
    "bodies_bytes": "bytes of requests' bodies in memory",
    "worker_connections": "connections to the worker, kept open",
    "steering_waiting": "requests in the router's queue, because all workers have enough",
    "steering_running": "requests that the router has at the worker",
    "steering_outcomes_total": "what became of attempts at workers",
    "steering_prompts_total": "requests by what became of their tokens: made, or why there are none",
    "steering_in_flight": "requests at workers whose load is counted",
    "fleet_workers": "workers by state",
    "fleet_credit": "1 where prefixes count for the worker",
    "fleet_parity_differs": "1 where the worker makes other tokens of a prompt than the router",
    "fleet_node_exact": "1 where all is known of what the node holds",
    "fleet_node_crowded": "1 where the node named more ranks, namespaces and media than one node may have",
    "fleet_index_blocks": "blocks that the index knows",
    "fleet_index_holders": "places where blocks are: GPUs of ranks, tiers of nodes",
    "fleet_index_inexact": "places of which the index could not take everything",
    "decisions_total": "requests whose worker was chosen by what is known of its cache",
    "worker_state": "1 for the state that the worker is in",
    "worker_credit": "1 where requests are sent to the worker for what it has cached; 0: see /kvd/workers",
    "worker_running": "requests at the worker that have their first token",
    "worker_queued": "requests at the worker that have no first token yet",
    "worker_queued_tokens": "tokens that the worker has to compute before a new prompt",
    "ledger_requests_total": "requests whose engine said how much was cached",
    "ledger_given_up_total": "requests whose answers never said it",
    "ledger_prompt_tokens_total": "tokens of those prompts",
    "ledger_available_tokens_total": "of them, what a cache of any size would have had",
    "ledger_achieved_tokens_total": "of those, what was cached",
    "ledger_lost_tokens_total": "of those, what was not, by what it was lost to",
}


def named(family: str, **labels: str) -> str:
    """A sample's name; label values are escaped."""
    pairs = [f'{name}="{_escaped(value)}"' for name, value in labels.items()]
    return f"{family}{{{','.join(pairs)}}}"


def exposition(numbers: Mapping[str, float]) -> str:
    """The whole text, families in the order of their first sample."""
    families: dict[str, list[tuple[str, float]]] = {}
    for name, value in numbers.items():
        families.setdefault(name.partition("{")[0], []).append((name, value))
    lines: list[str] = []
    for family, samples in families.items():
        if family in _HELP:
            lines.append(f"# HELP {_PREFIX}{family} {_HELP[family]}")
        lines.append(f"# TYPE {_PREFIX}{family} {'counter' if family.endswith('_total') else 'gauge'}")
        lines += [f"{_PREFIX}{name} {_number(value)}" for name, value in samples]
    return "\n".join(lines) + "\n"


def of_workers(workers: Iterable[replies.Worker]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for worker in workers:
        name = worker.name
        numbers[named("worker_state", worker=name, state=worker.state)] = 1
        numbers[named("worker_credit", worker=name)] = worker.credit
        numbers[named("worker_running", worker=name)] = worker.running
        numbers[named("worker_queued", worker=name)] = worker.queued
        numbers[named("worker_queued_tokens", worker=name)] = worker.queued_tokens
    return numbers


def of_ledger(totals: replies.Ledger) -> dict[str, float]:
    numbers: dict[str, float] = {
        "ledger_requests_total": totals.requests,
        "ledger_given_up_total": totals.given_up,
        "ledger_prompt_tokens_total": totals.tokens,
        "ledger_available_tokens_total": totals.available,
        "ledger_achieved_tokens_total": totals.achieved,
    }
    return numbers | {named("ledger_lost_tokens_total", cause=cause): lost for cause, lost in totals.lost.items()}


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'+' if value > 0 else '-'}Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

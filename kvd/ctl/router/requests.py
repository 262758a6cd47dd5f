"""Where a request went and why, and the last requests: what `kvdctl explain` shows of a router."""

from collections.abc import Iterator

from kvd.ctl.router import summed
from kvd.ctl.router.figures import ABSENT, cached, has, seconds
from kvd.ctl.router.link import RouterLink
from kvd.ctl.terminal import several, show_facts, show_json, show_table, span
from kvd.errors import Refused
from kvd.router.pages import replies

_PAGE = "/kvd/decisions"
_COLUMNS = ("ago", "request", "tokens", "worker", "it had", "cached", "predicted", "first token", "outcome")


def explain(link: RouterLink, request: str, as_json: bool) -> None:
    """Every decision that is kept of one request, the last attempt first. Raises KvdError."""
    said = summed.decisions(link.ask_all(_PAGE, replies.Decisions, request=request), 1024)
    if not said.decisions:
        kept = (
            f"it remembers the last {said.kept:,} of {said.total:,}"
            if said.total
            else "it has decided nothing yet, or goes by load alone"
        )
        raise Refused(
            f"the router at {link.url} knows no request {request}: {kept}",
            "the id is in the answer's x-kvd-request-id; kvdctl explain --requests lists the last ones",
        )
    if as_json:
        show_json(said)
        return
    for number, decision in enumerate(said.decisions):
        if number:
            print()
        show_facts(_facts(decision))
        print()
        _show_candidates(decision)


def last(link: RouterLink, count: int, as_json: bool) -> None:
    """The last requests, one a line. Raises KvdError."""
    said = summed.decisions(link.ask_all(_PAGE, replies.Decisions, last=str(count)), count)
    if as_json:
        show_json(said)
    elif said.decisions:
        show_table(_COLUMNS, [_row(decision) for decision in said.decisions])
        print(
            f"\n{len(said.decisions):,} of {said.total:,} since the router started. Why one of them: kvdctl explain ID"
        )
    else:
        print(f"The router at {link.url} has decided nothing yet: no request came, or it goes by load alone.")


def _facts(made: replies.Decision) -> Iterator[tuple[str, str]]:
    length = f"{'about ' if made.unknown else ''}{made.tokens:,} tokens"
    yield "request", f"{made.request}, {span(made.age_s)} ago: a prompt of {length}"
    if made.unknown:
        yield "no prefix", f"its tokens are not known, so it went by load alone ({made.unknown})"
    yield "went to", f"{made.worker} (policy {made.policy}, {several(made.candidates, 'candidate')})"
    yield "why", made.why
    predicted, actual = made.predicted_ttft_s, made.actual_ttft_s
    yield "predicted", f"{seconds(predicted)} to the first token" if predicted is not None else "not by this policy"
    yield "actual", f"{seconds(actual)} to the first token" if actual is not None else "no first token was seen"
    unsaid = "not told, since the prompt's length is a guess" if made.unknown else "the engine has not said"
    engine = f"{cached(made)} of the prompt" if made.cached_tokens is not None else unsaid
    yield "cached", engine
    took = f" after {seconds(made.took_s)}" if made.took_s is not None else ""
    yield "outcome", f"{made.outcome}{took}" if made.outcome else "not over yet"


def _show_candidates(made: replies.Decision) -> None:
    """The best first. Terms of seconds are headed without their unit: the cells have it."""
    terms = list(dict.fromkeys(name for candidate in made.ranked for name in candidate.terms))
    columns = ("candidate", "has of the prompt", "running", "queued tokens", "cost", "first token")
    rows = [_candidate(each, terms) for each in made.ranked]
    show_table((*columns, *(name.removesuffix("_s") for name in terms)), rows)
    if made.candidates > len(made.ranked):
        print(f"and {made.candidates - len(made.ranked)} more that cost more")


def _candidate(each: replies.Candidate, terms: list[str]) -> tuple[object, ...]:
    def figure(value: float) -> str:
        return seconds(value) if each.ttft_s is not None else f"{value:g}"

    shown = [figure(each.terms[name]) if name in each.terms else "-" for name in terms]
    return (
        each.worker, has(each), each.running, each.queued_tokens, figure(each.cost), seconds(each.ttft_s), *shown,
    )  # fmt: skip


def _row(made: replies.Decision) -> tuple[object, ...]:
    return (
        span(made.age_s),
        made.request,
        made.tokens,
        made.worker,
        has(made.ranked[0]) if made.ranked else ABSENT,
        cached(made),
        seconds(made.predicted_ttft_s),
        seconds(made.actual_ttft_s),
        made.outcome or "not over yet",
    )

"""What the router's pages tell, and whom: bounded, and who may change what. Pure."""

import pytest

from kvd.router.decisions import MOST, MOST_SHOWN, Decisions
from kvd.router.load import Load
from kvd.router.pages import access, telling
from kvd.router.policies.choice import Candidate, Choice, Matched, Scored
from kvd.router.proxy.strict import Malformed, read
from kvd.router.tenants import ANYBODY, Tenant
from kvd.router.work import Request, Work
from tests.told_router import Row

# -- who may ------------------------------------------------------------------------------------------------


def refused(peer: str, *fields: str, tenant: Tenant | None = ANYBODY, keys: bool = False, changes: bool = True) -> int:
    head = read("\r\n".join(["POST /kvd/workers/add HTTP/1.1", "host: x", *fields, "", ""]).encode())
    try:
        access.admit(head, tenant, keys, peer, changes)
    except Malformed as wrong:
        return wrong.status
    return 0


def test_without_keys_only_who_is_on_the_machine_changes_workers() -> None:
    assert [refused(peer) for peer in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")] == [0, 0, 0, 0]
    assert [refused(peer) for peer in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "", "localhost")] == [403] * 5
    assert refused("10.0.0.1", changes=False) == 0


def test_nor_through_a_proxy_or_a_page_in_a_browser() -> None:
    for field in (
        "X-Forwarded-For: 127.0.0.1",
        "Via: 1.1 a",
        "Forwarded: for=x",
        "Origin: http://evil",
        "X-Real-IP: ::1",
    ):
        assert refused("127.0.0.1", field) == 403
    administrator = Tenant("root", admin=True)
    assert refused("10.0.0.1", "Via: 1.1 a", tenant=administrator, keys=True) == 0
    assert refused("127.0.0.1", tenant=Tenant("alice"), keys=True) == 403
    assert refused("127.0.0.1", tenant=None, keys=True) == 401


# -- what is told -------------------------------------------------------------------------------------------


def decided(count: int, candidates: int = 2) -> Decisions:
    decisions = Decisions()
    for n in range(count):
        ranked = tuple(
            Scored(Candidate(f"w{(n + k) % candidates}", Matched(), Load()), float(k), {"t": 1.0}, 0.5)
            for k in range(candidates)
        )
        decisions.add(Request(f"r{n}", 100, (), 64), Choice("kvd", ranked), float(n))
    return decisions


def test_what_is_listed_is_bounded_and_what_is_left_out_is_counted() -> None:
    decisions = decided(300, candidates=40)
    shown = telling.listed(decisions, 10**6, 300.0)
    assert len(shown) == telling.MOST_LISTED
    assert {(len(made.ranked), made.candidates) for made in shown} == {(telling.MOST_SHOWN, 40)}
    (made,) = telling.of_request(decisions, "r7", 300.0)
    assert (len(made.ranked), made.candidates, made.age_s) == (MOST_SHOWN, 40, 293.0)
    assert telling.of_request(decisions, "r300", 300.0) == []


def test_recent_figures_are_of_a_minute_and_of_what_is_known() -> None:
    decisions = decided(100)
    made = decisions.find("r98")
    assert made is not None
    made.first_at, made.ended_at, made.cached = 98.75, 99.0, 64
    found = telling.recent(decisions, 99.0)
    assert (found["w0"].requests, found["w1"].requests) == (30, 31)  # of 39 to 99
    lately = found["w0"]
    assert (lately.counted, lately.tokens, lately.cached_tokens) == (1, 100, 64)
    assert (lately.timed, lately.predicted_ttft_s, lately.actual_ttft_s, lately.within_s) == (1, 0.5, 0.75, 60.0)
    assert telling.recent(Decisions(), 1.0) == {}


def test_recent_figures_of_a_busy_router_are_of_what_it_still_remembers() -> None:
    decisions = Decisions()
    choice = Choice("kvd", (Scored(Candidate("w", Matched(), Load()), 1.0, {}),))
    for n in range(3 * MOST):
        decisions.add(Request(f"r{n}", 1, (), 64), choice, n / 100)
    now = (3 * MOST - 1) / 100
    found = telling.recent(decisions, now)["w"]
    assert found.requests == MOST
    assert found.within_s == pytest.approx((MOST - 1) / 100)


def test_workers_are_told_by_name_with_their_load() -> None:
    loads = {"b": Load(Work(2, 100, 1.0), running=3)}
    first, second = telling.workers(
        [Row("b"), Row("a", state="joining")], lambda name: loads.get(name, Load()), {"a": 4}, {}
    )
    assert (first.name, first.state, first.connections, first.running) == ("a", "joining", 4, 0)
    assert (second.name, second.running, second.queued, second.queued_tokens) == ("b", 3, 2, 100)


def test_the_ledger_in_percent() -> None:
    assert telling.percentages(2000, 1000, 900, {"lag": 100, "gate": 0}) == {
        "available": 50.0, "achieved": 90.0, "lost_to_lag": 10.0, "lost_to_gate": 0.0,
    }  # fmt: skip
    assert set(telling.percentages(0, 0, 0, {"lag": 0}).values()) == {0.0}

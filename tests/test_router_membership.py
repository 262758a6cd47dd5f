"""Who is a member: what nodes announce and operators say, carried out. No I/O."""

import pytest

from kvd.errors import Refused
from kvd.router.fleet.health import Health
from kvd.router.fleet.members import GONE_AFTER_S
from kvd.router.fleet.membership import MOST_WORKERS, Membership
from kvd.router.fleet.told import Told
from kvd.router.leastbusy import LeastBusy
from kvd.router.steering import Worker, worker_at
from kvd.router.tokens.serving import Serving

HERE, ONE, OTHER = "http://127.0.0.1:1", "http://a:1", "http://b:1"


class Silent:
    """A watch that never hears anything, or what a test sets."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.told, self.health, self.heard_at, self.asked = worker, None, Health(), -1e9, False


class Members:
    """A membership without I/O; `open` is where connections may be made."""

    def __init__(self) -> None:
        self.steering, self.open = LeastBusy([], 8, 8), set[str]()
        self.all = Membership(Silent, lambda entry: None)  # type: ignore[arg-type]
        self.all.attach(self.steering, self)

    def join(self, worker: Worker) -> None:
        self.open.add(worker.name)

    def leave(self, name: str) -> None:
        self.open.remove(name)

    def say(self, name: str, life: str) -> None:
        watch = next(entry.watch for entry in self.all if entry.name == name)
        watch.told, watch.asked, watch.heard_at = Told(Serving(), life=life), True, 10.0


def test_a_node_that_announces_workers_without_end_is_bounded() -> None:
    members = Members()
    members.all.announced({f"http://h{n}:1": str(n) for n in range(3 * MOST_WORKERS)}, True, 0.0)
    assert len(members.all) == MOST_WORKERS
    assert members.open == set(), "none has said what it is"
    members.all.add("http://mine:1")
    assert (len(members.all), members.open) == (MOST_WORKERS, {"http://mine:1"}), "an operator's word goes before"
    for number in range(MOST_WORKERS - 1):
        members.all.add(f"http://mine:{number + 2}")
    with pytest.raises(Refused, match="1024 workers"):
        members.all.add("http://one-more:1")
    for number in range(MOST_WORKERS):
        members.all.remove(f"http://mine:{number + 1}")
    members.all.announced({}, True, 100.0)
    assert len(members.all) == 0


def test_one_that_is_announced_waits_until_it_is_known_not_to_be_a_member() -> None:
    members = Members()
    members.all.configured(worker_at(ONE))
    lives = {HERE: "x", OTHER: "y"}
    members.all.announced(lives, True, 0.0)
    members.say(HERE, "x")
    members.say(OTHER, "y")
    members.all.announced(lives, True, 0.0)
    assert members.open == set(), "the configured one may be either of them"
    members.say(ONE, "x")
    members.all.announced(lives, True, 0.0)
    members.all.go_on()
    assert {entry.name for entry in members.all} == {ONE, OTHER}
    assert members.open == {OTHER}
    members.all.announced(lives, True, 0.0)
    assert {entry.name for entry in members.all} == {ONE, OTHER}, "and it is not asked again and again"


def test_one_that_nodes_dropped_leaves_only_where_that_is_sure_and_it_is_silent() -> None:
    members = Members()
    members.all.announced({OTHER: "y"}, True, 0.0)
    members.say(OTHER, "y")
    members.all.announced({OTHER: "y"}, True, 0.0)
    assert members.open == {OTHER}
    members.all.announced({}, False, 100.0)
    members.all.announced({}, True, 10.0 + GONE_AFTER_S)
    assert members.open == {OTHER}
    members.all.announced({}, True, 10.1 + GONE_AFTER_S)
    assert members.open == set()


@pytest.mark.parametrize("order", ["remove", "drain"])
@pytest.mark.parametrize("told", ["x", ""])
def test_what_was_sent_away_under_one_name_does_not_come_back_under_its_nodes(order: str, told: str) -> None:
    members = Members()
    members.all.configured(worker_at(ONE))
    members.open.add(ONE)
    members.say(ONE, "x")
    members.all.announced({HERE: told}, True, 0.0)
    getattr(members.all, order)(ONE)
    members.all.go_on()
    members.all.announced({HERE: told}, True, 1.0)
    for entry in members.all:
        members.say(entry.name, "x")
    for now in (2.0, 3.0):
        members.all.announced({HERE: told}, True, now)
        members.all.go_on()
        assert (len(members.all), members.open) == (0, set())
    members.all.announced({HERE: "y"}, True, 4.0)
    assert len(members.all) == 0, "nor when it is started anew"


def test_what_was_sent_away_stays_away_when_its_nodes_kvd_starts_anew_until_an_operator_adds_it() -> None:
    members = Members()
    lives = {HERE: "x"}
    members.all.announced(lives, True, 0.0)
    members.say(HERE, "x")
    members.all.announced(lives, True, 1.0)
    members.all.remove(HERE)
    members.all.announced({}, True, 2.0)
    members.all.announced(lives, True, 3.0)
    assert len(members.all) == 0
    members.all.add(ONE)
    members.say(ONE, "x")
    members.all.announced(lives, True, 4.0)
    members.all.go_on()
    assert members.open == {ONE}
    members.all.drain("http://A:1/")
    members.all.add(ONE)
    members.all.announced(lives, True, 5.0)
    members.all.go_on()
    assert (members.open, members.all._sent_lives) == ({ONE}, {})


def test_the_lives_that_were_sent_away_are_bounded() -> None:
    members = Members()
    for number in range(MOST_WORKERS + 5):
        members.all.add(ONE)
        members.say(ONE, str(number))
        members.all.remove(ONE)
    assert len(members.all._sent_lives) == MOST_WORKERS
    assert "4" not in members.all._sent_lives

"""What tenants are entitled to in a shared tier: who loses files to whom, and that every node knows whose they are."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.storage.quota import Share
from kvd.storage.shared.compaction import FAN_IN, next_merge
from kvd.storage.shared.copies import SealedFile
from kvd.storage.shared.makingroom import holdings, victims
from kvd.storage.shared.sealed import Rows
from tests.shared_folder import MIB, Node, files, nodes
from tests.tier_samples import Sample, get, held, put, sample

# -- the decisions, without files --------------------------------------------------------------------------------


def file(tenant: str, age: int, size: int = 10, live: bool = True) -> SealedFile:
    """The lower its `age`, the older."""
    found = SealedFile(f"{tenant}{age:02}", age, size, Rows(b"", b""), tenant, newest=age, live_rows=int(live))
    found.payload_bytes = found.live_bytes = size * found.live_rows
    return found


def lost(
    there: list[SealedFile], shares: dict[str, Share], asker: str, incoming: int, excess: int | None = None
) -> list[str] | None:
    """Paths, in the order they go."""
    chosen = victims(there, shares, asker, incoming, incoming if excess is None else excess)
    return None if chosen is None else [file.path for file in chosen]


def test_without_shares_what_counts_for_nothing_goes_first_then_the_oldest() -> None:
    there = [file("b", 3), file("a", 1), file("", 2), file("c", 4, live=False)]
    assert lost(there, {}, "a", 30) == ["c04", "a01", "02"]
    assert lost(there, {}, "a", 41) is None
    assert lost(there, {}, "a", 30, excess=0) == []


def test_a_tenant_is_not_pushed_below_its_reserve_by_another() -> None:
    there = [file("a", 1), file("a", 2), file("a", 3), file("b", 4)]
    shares = {"a": Share(reserve_bytes=20)}
    assert lost(there, shares, "b", 20) == ["a01", "b04"]
    assert lost(there, shares, "c", 30) is None
    assert lost(there, shares, "a", 30) == ["a01", "a02", "a03"]


def test_what_counts_for_nothing_is_no_part_of_what_a_tenant_holds() -> None:
    there = [file("a", 1, live=False), file("a", 2), file("b", 3)]
    shares = {"a": Share(reserve_bytes=10)}
    assert holdings(there, shares).held("a") == 10
    assert lost(there, shares, "b", 20) == ["a01", "b03"]


def test_tenants_above_their_burst_lose_first_until_they_are_not() -> None:
    there = [file("a", 1), file("b", 2), file("b", 3), file("b", 4)]
    assert lost(there, {"b": Share(burst_bytes=15)}, "c", 30) == ["b02", "b03", "a01"]


def test_who_would_rise_above_its_burst_makes_room_at_its_own_expense() -> None:
    there = [file("a", 1), file("b", 2), file("b", 3)]
    shares = {"b": Share(burst_bytes=25)}
    assert lost(there, shares, "b", 10) == ["b02"]
    assert lost(there, shares, "b", 5) == ["a01"]
    assert lost(there, shares, "b", 26) is None


def test_a_file_too_large_to_lose_is_passed_over() -> None:
    there = [file("a", 1, size=30), file("a", 2, size=5), file("a", 3, size=6)]
    shares = {"a": Share(reserve_bytes=34)}
    assert lost(there, shares, "b", 5) == ["a02"]
    assert lost(there, shares, "b", 7) is None


OWNERS = ("", "a", "b", "c")
SHARES = st.builds(
    lambda reserve, more: Share(reserve, None if more is None else reserve + more),
    st.integers(0, 60), st.none() | st.integers(0, 60),
)  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(1, 30), st.booleans()), max_size=20),
    st.dictionaries(st.sampled_from(OWNERS[1:]), SHARES), st.sampled_from(OWNERS), st.integers(1, 60),
    st.integers(-10, 200),
)  # fmt: skip
def test_whatever_there_is_reserves_hold(
    rows: list[tuple[str, int, bool]], shares: dict[str, Share], asker: str, incoming: int, excess: int
) -> None:
    there = [file(owner, age, size, live) for age, (owner, size, live) in enumerate(rows)]
    chosen = victims(there, shares, asker, incoming, excess)
    if chosen is None:
        assert shares or sum(size for _, size, _ in rows) < excess
        return
    paths = {one.path for one in chosen}
    assert len(paths) == len(chosen)
    assert sum(one.size for one in chosen) >= excess
    assert not chosen or sum(one.size for one in chosen[:-1]) < excess, "and no file more"
    before = holdings(there, shares)
    after = holdings([one for one in there if one.path not in paths], shares)
    for owner, share in shares.items():
        assert owner == asker or after.held(owner) >= min(share.reserve_bytes, before.held(owner))


def test_files_of_two_tenants_are_not_made_one() -> None:
    there = [file(owner, age) for age in range(FAN_IN - 1) for owner in ("a", "b", "")]
    assert next_merge(there, 1000) == []
    there += [file("b", 90)]
    assert {one.tenant for one in next_merge(there, 1000)} == {"b"}


# -- nodes on one folder -----------------------------------------------------------------------------------------

SMALL, GREEDY, OTHER = (bytes([n]) * 16 for n in (1, 2, 3))
LENGTH = 100_000


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(tmp_path / "shared") as start:
        yield start


def of(namespace: bytes, *numbers: int) -> list[Sample]:
    samples = [sample(number, LENGTH) for number in numbers]
    return [Sample(what.page._replace(namespace=namespace), what.data) for what in samples]


def tenant_in(path: Path) -> bytes | None:
    """What anybody with pyarrow reads."""
    with pa.memory_map(str(path)) as source:
        about: dict[bytes, bytes] = pa.ipc.open_file(source).schema.metadata
    assert about[b"kvd.version"] == b"1"
    return about.get(b"kvd.tenant")


def test_every_node_knows_whose_a_file_is_also_after_a_restart(node: Node, tmp_path: Path) -> None:
    shares = {"small": Share(MIB), "other": Share()}
    one, two = node("a", shares=shares), node("b", shares=shares)
    one.belongs(SMALL, "small")
    one.belongs(GREEDY, "greedy")
    samples = [*of(SMALL, 1), *of(GREEDY, 2), *of(SMALL, 3), *of(OTHER, 4)]
    assert all(put(one, *samples))
    sizes = [(tenant_in(path), path.stat().st_size) for path in files(tmp_path)]
    assert len(sizes) == 2
    size = dict(sizes)[b"small"]
    assert None in dict(sizes)
    two.news()
    for tier in (one, two, node("a", shares=shares)):
        assert tier.held() == {"small": size, "other": 0}
        assert get(tier, *samples) == samples
    assert node("c").held() == {}
    assert node("d", shares={"other": Share()}).held() == {"other": 0}


def test_merged_files_are_still_the_tenants(node: Node, tmp_path: Path) -> None:
    shares = {"small": Share(MIB)}
    one, two = node("a", shares=shares), node("b", shares=shares)
    one.belongs(SMALL, "small")
    samples = of(SMALL, *range(8)), of(OTHER, *range(100, 108))
    for pair in zip(*samples, strict=True):
        put(one, *pair)
    for _ in range(3):
        one.news()
    assert one.counters["merged files"] == 16
    assert sorted(tenant_in(path) or b"" for path in files(tmp_path)) == [b"", b"small"]
    two.news()
    assert one.held() == two.held() == {"small": sum(p.stat().st_size for p in files(tmp_path) if tenant_in(p))}
    for some in samples:
        assert get(two, *some) == some


def test_tenants_keep_their_reserve_and_lose_above_their_burst_to_all_nodes(node: Node, tmp_path: Path) -> None:
    shares = {"small": Share(7 * LENGTH), "greedy": Share(0, 8 * LENGTH)}
    one, two = (node(name, shares=shares, quota_bytes=4 * MIB, file_bytes=200_000) for name in "ab")
    one.belongs(SMALL, "small")
    one.belongs(GREEDY, "greedy")
    put(one, *of(SMALL, *range(10)))
    put(one, *of(GREEDY, *range(100, 120)))
    two.news()
    for number in range(200, 300):
        assert put(two, *of(OTHER, number)) == [True]
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 4 * MIB
        if number % 10 == 0:
            one.news()
            two.news()
    one.news()
    for tier in (one, two):
        count = {space: sum(name[:16] == space for name in held(tier)) for space in (SMALL, GREEDY, OTHER)}
        assert count[SMALL] >= 6
        assert count[GREEDY] < 8
        assert tier.held()["small"] >= 7 * LENGTH
        assert tier.held()["greedy"] <= 8 * LENGTH


def test_a_tenant_above_its_burst_loses_pages_to_all_and_only_when_room_is_needed(node: Node) -> None:
    tier = node("a", shares={"greedy": Share(0, 3 * LENGTH)}, quota_bytes=MIB)
    tier.belongs(GREEDY, "greedy")
    others, its = of(OTHER, *range(4)), of(GREEDY, *range(100, 120))
    assert all(put(tier, *others))
    for what in its[:5]:
        assert put(tier, what) == [True]
    assert get(tier, *its[:5]) == its[:5], "there was room"
    for what in its[5:]:
        assert put(tier, what) == [True]
    assert held(tier) == {what.page.name for what in [*others, *its[-5:]]}
    put(tier, *of(OTHER, 5))
    assert get(tier, *others, *its[-5:]) == [*others, None, *its[-4:]]


def test_a_put_for_which_nobody_may_be_asked_is_refused_and_evicts_nothing(node: Node) -> None:
    tier = node("a", shares={"small": Share(MIB)}, quota_bytes=MIB)
    tier.belongs(SMALL, "small")
    samples = of(SMALL, *range(8))
    assert all(put(tier, *samples))
    assert put(tier, *of(OTHER, *range(100, 104))) == [False] * 4
    assert get(tier, *samples) == samples
    assert put(tier, *of(SMALL, 50, 51, 52)) == [True] * 3


def test_a_file_written_before_there_were_shares_is_read_and_nobodys(node: Node, tmp_path: Path) -> None:
    samples = [sample(1, 700, 2), sample(2, 1300)]
    folder = tmp_path / "shared" / "old"
    folder.mkdir(parents=True)
    golden = Path(__file__).parent / "golden/sealed-1.pages.arrow"
    shutil.copy(golden, folder / f"{8 << 20:016x}-{'0' * 16}.pages.arrow")
    tier = node("a", shares={"small": Share(MIB)})
    assert get(tier, *samples) == samples
    assert tier.held() == {"small": 0}
    assert tenant_in(golden) is None

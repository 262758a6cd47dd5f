"""Files of a shared tier that are not what they should be, and file systems that refuse: misses, counted."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.errors import SettingsError
from kvd.storage import failpoints
from kvd.storage.quota import Share
from kvd.storage.shared import SharedTier
from kvd.storage.tier import TierError
from tests.shared_folder import MIB, Node, files, nodes, open_tier
from tests.tier_samples import NAMESPACE, filled, get, held, put, sample

_FLIPS = """
from kvd.storage.shared import graves
from kvd.storage.shared.sealed import Unreadable

said = {bytes([n]) * 48: n for n in range(1, 4)}
data = graves.encode(said)
assert graves.decode(data, 9) == said
for at in range(8 * len(data)):
    flipped = bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    try:
        assert graves.decode(bytes(flipped), 9) == said, at
    except Unreadable:
        pass
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(tmp_path / "shared") as start:
        yield start


class TestDamage:
    """Every byte of a file may be anything."""

    def test_a_flipped_payload_is_gone_for_good(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        put(tier, sample(1), sample(2))
        _flip(files(tmp_path)[0], _place(tier, 1) + 100)
        assert get(tier, sample(1), sample(2)) == [None, sample(2)]
        assert tier.news() == ([], [sample(1).page.name])
        assert tier.counters["damaged"] == 1
        assert held(node("b")) == {sample(2).page.name}
        assert put(tier, sample(1)) == [True]
        assert get(tier, sample(1)) == [sample(1)]

    def test_a_file_that_is_gone_is_a_miss_and_news(self, node: Node, tmp_path: Path) -> None:
        tier = node("a", poll_s=99)
        put(tier, sample(1), sample(2))
        files(tmp_path)[0].unlink()
        assert get(tier, sample(1)) == [None]
        assert set(tier.news().left) == {sample(1).page.name, sample(2).page.name}
        assert tier.counters["absent"] == 1

    def test_a_file_cut_short_after_it_was_read_is_a_miss(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        put(tier, *[sample(n) for n in range(4)])
        os.truncate(files(tmp_path)[0], 10_000)
        assert None in get(tier, *[sample(n) for n in range(4)])

    def test_a_file_of_another_version_is_skipped_and_kept(self, node: Node, tmp_path: Path) -> None:
        put(node("a"), sample(1))
        path = files(tmp_path)[0]
        data = bytearray(path.read_bytes())
        at = data.rindex(b"KVDINDEX")
        data[at + 8] = 2
        path.write_bytes(data)
        tier = node("b", leftover_s=0)
        tier.news()
        assert not held(tier)
        assert path.exists()
        assert tier.counters["version"] == 1

    def test_a_file_from_the_future_is_skipped_and_kept(self, node: Node, tmp_path: Path) -> None:
        put(node("a"), sample(1))
        path = files(tmp_path)[0]
        path.rename(path.with_name("3" + path.name[1:]))
        tier = node("b", leftover_s=0)
        tier.news()
        assert tier.counters["future"] == 1
        assert files(tmp_path)
        assert put(tier, sample(1)) == [True]
        assert held(node("c")) == {sample(1).page.name}

    def test_an_arrow_file_of_somebody_else_under_such_a_name_is_skipped(self, node: Node, tmp_path: Path) -> None:
        put(node("a"), sample(1))
        table = pa.table({"x": list(range(5000))})
        with pa.OSFile(str(files(tmp_path)[0]), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        tier = node("b")
        assert not held(tier)
        assert tier.counters["foreign"] == 1

    def test_every_flipped_bit_of_a_list_of_removed_pages_is_noticed(self) -> None:
        """In a process of its own: some of them had Arrow read where nothing is."""
        ran = subprocess.run([sys.executable, "-c", _FLIPS], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_change_to_files_is_a_miss_or_harmless(self, tmp_path_factory: Any, data: st.DataObject) -> None:
        folder = tmp_path_factory.mktemp("damage")
        shares = {"somebody": Share()}
        tier = open_tier(folder, shares=shares)
        samples = [sample(n, 5000, 1 + n % 2) for n in range(6)]
        put(tier, *samples[:3])
        tier.belongs(NAMESPACE, "somebody")
        put(tier, *samples[3:])
        tier.remove([samples[0].page.name])
        tier.close()
        path = data.draw(st.sampled_from(sorted(folder.glob("*/*.arrow"))))
        content = bytearray(path.read_bytes())
        places = st.one_of(
            st.integers(0, len(content) - 1), st.integers(max(0, len(content) - 2000), len(content) - 1)
        )
        at, count = data.draw(places), data.draw(st.sampled_from([1, 8, 4096]))
        how = data.draw(st.sampled_from(["flip", "zero", "cut", "insert"]))
        if how == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "zero":
            content[at : at + count] = bytes(len(content[at : at + count]))
        elif how == "cut":
            del content[at:]
        else:
            content[at:at] = b"\xff" * count
        path.write_bytes(content)
        tier = open_tier(folder, "b", shares=shares)
        for number, got in enumerate(get(tier, *samples)):
            assert got is None or got == samples[number]
        tier.news()
        assert all(put(tier, *samples))
        assert get(tier, *samples) == samples
        assert not tier.check()
        tier.close()
        shutil.rmtree(folder)


class TestTrouble:
    @pytest.mark.parametrize("step", ["write", "sync", "rename", "renamed", "list", "read", "delete"])
    @pytest.mark.parametrize("fault", ["eio", "enospc", "estale"])
    def test_an_error_of_the_file_system_is_a_tier_error_or_a_miss(self, node: Node, step: str, fault: str) -> None:
        tier = node("a")
        samples = [sample(n) for n in range(8)]
        for what in samples:
            put(tier, what)
        failpoints.arm(f"folder.{step}:1+:{fault}")
        try:
            for attempt in (lambda: put(tier, sample(99)), lambda: tier.remove([samples[0].page.name]), tier.news):
                with suppress(TierError):
                    attempt()
            assert set(get(tier, *samples)) <= {None, *samples}
        finally:
            failpoints.arm("")
        tier.news()
        assert get(tier, *samples[1:]) == samples[1:], "trouble that passes loses nothing"
        tier._files.refusal._until = 0.0  # as if that was a while ago
        assert put(tier, sample(99)) == [True]

    @pytest.mark.parametrize(
        ("fault", "reason"), [("enospc", "disk_full"), ("eacces", "no_permission"), ("erofs", "read_only")]
    )
    def test_where_nothing_may_be_written_the_tier_reads_on_and_writes_again_later(
        self, node: Node, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
    ) -> None:
        tier = node("a")
        samples = [sample(n) for n in range(8)]
        for what in samples:
            put(tier, what)
        failpoints.arm(f"folder.write:1+:{fault}")
        assert put(tier, samples[0], sample(99)) == [True, False]
        tier.news()  # there are eight small files to be merged
        assert get(tier, *samples) == samples
        assert tier.counters[reason] == 1
        failpoints.arm("")
        assert put(tier, sample(99)) == [False], "not asked again at once"
        assert tier.counters[reason] == 1
        monkeypatch.setattr(tier._files.refusal, "_until", 0.0)
        assert put(tier, sample(99)) == [True]
        assert reason not in tier.counters
        assert get(tier, sample(99)) == [sample(99)]

    def test_files_that_may_not_be_deleted_stay_and_make_no_room(self, node: Node, tmp_path: Path) -> None:
        tier = node("a", quota_bytes=MIB)
        assert put(tier, sample(1, 600_000)) == [True]
        failpoints.arm("folder.delete:1+:eacces")
        assert put(tier, sample(2, 600_000)) == [False]
        assert get(tier, sample(1, 600_000)) == [sample(1, 600_000)]
        assert not tier.counters["evicted files"]
        assert tier.counters["undeletable"]
        failpoints.arm("")
        assert put(tier, sample(2, 600_000)) == [True]
        assert len(files(tmp_path)) == 1

    def test_graves_that_may_not_be_deleted_are_not_merged_again_and_again(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        for n in range(17):
            put(tier, sample(n))
            tier.remove([sample(n).page.name])
        failpoints.arm("folder.delete:1+:eacces")
        for _ in range(3):
            tier.news()
        there = files(tmp_path, "graves")
        for _ in range(3):
            tier.news()
        assert files(tmp_path, "graves") == there

    def test_what_may_not_be_deleted_does_not_keep_what_may_be_from_leaving(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        others, tier = node("b", quota_bytes=MIB), node("a", quota_bytes=MIB)
        put(others, sample(1, 200_000))
        tier.news()
        for n in range(2, 5):
            put(tier, sample(n, 200_000))
        delete = tier._files.depot.delete

        def delete_own(path: str) -> None:
            if not path.startswith("a/"):
                raise PermissionError(errno.EACCES, "not yours")
            delete(path)

        monkeypatch.setattr(tier._files.depot, "delete", delete_own)  # for root nothing is forbidden
        assert [put(tier, sample(n, 200_000)) for n in range(5, 8)] == [[True]] * 3
        assert get(tier, sample(1, 200_000)) == [sample(1, 200_000)]

    def test_a_folder_that_cannot_be_is_said_at_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "shared").write_text("a file")
        with pytest.raises(TierError):
            open_tier(tmp_path / "shared")
        with pytest.raises(SettingsError):
            open_tier(tmp_path / "other", "no/name")
        with pytest.raises(SettingsError):
            SharedTier("gopher://nowhere", "a", MIB)

    def test_a_closed_tier_says_so(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "shared")
        tier.close()
        with pytest.raises(TierError):
            tier.put([filled(sample(1))])


def _place(tier: SharedTier, number: int) -> int:
    place = tier._files.copies.place(sample(number).page.name)
    assert place is not None
    return place.row.offset


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << random.randrange(8)
    path.write_bytes(data)

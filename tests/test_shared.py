"""The shared tier on a folder: the contract, two nodes, housekeeping, and files that are not what they should be."""

import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.errors import SettingsError
from kvd.storage import failpoints
from kvd.storage.shared import SharedTier
from kvd.storage.tier import Tier, TierError
from tests.tier_contract import TierContract, filled, get, held, put, sample, tier_machine

MIB = 1 << 20


def open_tier(folder: Path, node: str = "a", **settings: Any) -> SharedTier:
    """A tier that polls at every call of `news` and waits for nobody."""
    return SharedTier(
        str(folder), node, **({"quota_bytes": 24 * MIB, "file_bytes": 4 * MIB, "poll_s": 0, "grace_s": 0} | settings)
    )


class TestContract(TierContract):
    def open(self, folder: Path) -> Tier:
        return open_tier(folder)


TestMachine = tier_machine(open_tier, examples=12, steps=25).TestCase


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., SharedTier]]:
    """Opens nodes on one folder. At the end each one's bookkeeping is checked."""
    opened: list[SharedTier] = []

    def start(name: str, **settings: Any) -> SharedTier:
        opened.append(open_tier(tmp_path / "shared", name, **settings))
        return opened[-1]

    yield start
    failpoints.arm("")
    for tier in opened:
        assert not tier.check()
        tier.close()


def files(tmp_path: Path, kind: str = "pages") -> list[Path]:
    return sorted((tmp_path / "shared").glob(f"*/*.{kind}.arrow"))


Node = Callable[..., SharedTier]


class TestTwoNodes:
    def test_what_one_stores_and_removes_is_the_others_news(self, node: Node) -> None:
        one, two = node("a"), node("b")
        samples = [sample(n) for n in range(5)]
        put(one, *samples)
        assert two.news() == ([s.page.name for s in samples], [])
        assert get(two, *samples) == samples
        two.remove([samples[0].page.name])
        assert one.news() == ([], [samples[0].page.name])
        assert get(one, *samples) == [None, *samples[1:]]

    def test_what_came_and_left_between_two_calls_is_no_news(self, node: Node) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        one.remove([sample(1).page.name])
        assert two.news() == ([], [])

    def test_a_page_that_another_node_has_is_not_written_again(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        two.news()
        assert put(two, sample(1)) == [True]
        assert len(files(tmp_path)) == 1

    def test_unless_its_file_has_gone_in_the_meantime(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        two.news()
        files(tmp_path)[0].unlink()
        assert put(two, sample(1)) == [True]
        assert get(two, sample(1)) == [sample(1)]
        assert two.news() == ([], [])

    def test_of_a_page_stored_twice_one_copy_stays(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        put(two, sample(1))  # it has not heard of the other
        for tier in (one, two, one, two):
            tier.news()
        assert [path.parent.name for path in files(tmp_path)] == ["b"]
        for tier in (one, two):
            assert held(tier) == {sample(1).page.name}
            assert get(tier, sample(1)) == [sample(1)]

    def test_the_other_copy_stands_in(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a", grace_s=99), node("b", grace_s=99)
        put(one, sample(1))
        put(two, sample(1))
        one.news()
        files(tmp_path)[1].unlink()
        assert get(one, sample(1)) == [sample(1)]
        assert one.news() == ([], [])

    def test_a_remove_reaches_a_copy_that_a_merge_has_moved(self, node: Node) -> None:
        """The merging node had not heard of the removal."""
        one, two = node("a"), node("b")
        for n in range(8):
            put(one, sample(n))
        two.news()
        one._housekeeping.step()
        assert one.counters["merged files"] == 8
        two.remove([sample(3).page.name])
        assert one.news().left == [sample(3).page.name]
        assert two.news() == ([], [])
        for tier in (one, two, node("c")):
            assert get(tier, sample(3), sample(4)) == [None, sample(4)]

    def test_two_daemons_of_one_name_do_no_harm(self, node: Node) -> None:
        one, twin = node("a"), node("a")
        samples = [sample(n) for n in range(24)]
        for n, what in enumerate(samples):
            put((one, twin)[n % 2], what)
            (one, twin)[n % 3 % 2].news()
        for tier in (one, twin):
            tier.news()
            assert get(tier, *samples) == samples


class TestHousekeeping:
    def test_small_files_are_merged_up_to_the_target(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        samples = [sample(n, 200_000) for n in range(64)]
        for what in samples:
            put(tier, what)
            assert tier.news() == ([], [])
        for _ in range(8):
            tier.news()
        assert len(files(tmp_path)) < 16
        assert max(path.stat().st_size for path in files(tmp_path)) < 4.2 * MIB
        assert get(tier, *samples) == samples
        assert get(node("b"), *samples) == samples

    def test_a_tier_at_rest_writes_nothing(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        put(tier, *[sample(n, 3000) for n in range(700)])  # small pages fill files badly, for ever
        put(tier, *[sample(n, 400_000) for n in range(1000, 1006)])
        tier.news()
        before = files(tmp_path)
        for _ in range(5):
            tier.news()
        assert files(tmp_path) == before

    def test_removed_pages_give_their_room_back(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        samples = [sample(n, 200_000) for n in range(20)]
        put(tier, *samples)
        full = tier.usage().bytes_used
        tier.remove([s.page.name for s in samples[:15]])
        for _ in range(3):
            tier.news()
        assert tier.usage().bytes_used < full / 2
        assert get(tier, *samples) == [None] * 15 + samples[15:]

    def test_a_reader_with_an_old_index_finds_its_file_or_a_miss(self, node: Node, tmp_path: Path) -> None:
        writer, reader = node("a", grace_s=99), node("b", poll_s=99)
        samples = [sample(n) for n in range(8)]
        for what in samples:
            put(writer, what)
        reader._files.refresh()
        writer.news()
        assert len(files(tmp_path)) == 9, "merged, and the old files still there"
        assert get(reader, *samples) == samples
        writer._housekeeping.grace_s = 0
        writer.news()
        assert len(files(tmp_path)) == 1
        assert get(reader, *samples) == [None] * 8
        reader._files.refresh()
        assert get(reader, *samples) == samples
        assert reader.news() == ([s.page.name for s in samples], []), "as it was: they were in no news yet"

    def test_pages_leave_when_their_time_is_over_also_after_a_merge(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        for n in range(8):
            put(tier, sample(n))
        tier.news()
        late = node("b", ttl_s=3600)
        assert len(held(late)) == 8
        late._housekeeping.ttl_s = 0
        assert set(late.news().left) == {sample(n).page.name for n in range(8)}
        assert not held(late)
        late._housekeeping.leftover_s = 0
        late.news()
        assert not files(tmp_path)

    def test_many_removals_become_one_file_and_outlive_a_restart(self, node: Node, tmp_path: Path) -> None:
        tier = node("a")
        put(tier, *[sample(n) for n in range(40)])
        for n in range(20):
            tier.remove([sample(n).page.name])
        tier.news()
        assert len(files(tmp_path, "graves")) == 1
        assert held(node("a")) == {sample(n).page.name for n in range(20, 40)}

    def test_old_graves_over_nothing_are_swept(
        self, node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tier = node("a")
        put(tier, sample(1), sample(2))
        tier.remove([sample(1).page.name])
        monkeypatch.setattr("kvd.storage.shared.housekeeping._YOUNG_GRAVE_S", -60.0)
        tier.news()
        assert len(files(tmp_path, "graves")) == 1, "the copy is still in its file"
        tier.remove([sample(2).page.name])
        for _ in range(3):
            tier.news()
        assert not files(tmp_path)
        assert not files(tmp_path, "graves")

    def test_what_crashes_left_is_swept_by_age_and_foreign_files_never(self, node: Node, tmp_path: Path) -> None:
        put(node("a"), sample(1))
        folder = tmp_path / "shared"
        temporary, stranger = folder / "a" / ".x.pages.arrow.1.tmp", folder / "a" / "notes.txt"
        half = files(tmp_path)[0].with_name("0" * 15 + "1-" + "0" * 16 + ".pages.arrow")
        for path in (temporary, stranger, half):
            path.write_bytes(b"half")
        tier = node("b", leftover_s=99)
        tier.news()
        assert temporary.exists()
        assert half.exists()
        tier._housekeeping.leftover_s = 0
        tier.news()
        assert not temporary.exists()
        assert not half.exists()
        assert stranger.exists()
        assert tier.counters["foreign"] == tier.counters["truncated"] == 1

    def test_a_put_that_cannot_fit_is_refused_and_evicts_nothing(self, node: Node) -> None:
        tier = node("a", quota_bytes=MIB)
        assert put(tier, sample(1, 300_000)) == [True]
        assert put(tier, sample(2, 2 * MIB)) == [False]
        assert get(tier, sample(1, 300_000)) == [sample(1, 300_000)]

    def test_a_put_longer_than_a_file_is_several(self, node: Node, tmp_path: Path) -> None:
        samples = [sample(n, 700_000) for n in range(20)]
        assert all(put(node("a"), *samples))
        assert len(files(tmp_path)) == 4


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

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_change_to_files_is_a_miss_or_harmless(self, tmp_path_factory: Any, data: st.DataObject) -> None:
        folder = tmp_path_factory.mktemp("damage")
        tier = open_tier(folder)
        samples = [sample(n, 5000, 1 + n % 2) for n in range(6)]
        put(tier, *samples)
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
        tier = open_tier(folder, "b")
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
        assert put(tier, sample(99)) == [True]

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


class TestForOthers:
    """What docs/shared-tier.md promises to whoever has pyarrow and not us."""

    def test_the_documented_snippet_reads_a_file(self, node: Node, tmp_path: Path) -> None:
        samples = [sample(n, 5000 + n, 1 + n % 3) for n in range(5)]
        put(node("a"), *samples)
        text = (Path(__file__).parents[1] / "docs/shared-tier.md").read_text()
        snippet = text.split("```python\n")[1].split("```")[0]
        alone = [sys.executable, "-I", "-c", f"import sys; sys.modules['kvd'] = None\n{snippet}"]
        shown = subprocess.run([*alone, files(tmp_path)[0]], check=True, capture_output=True, text=True).stdout
        assert shown.splitlines() == [
            "a stored 5 pages",
            *(f"{s.page.key.hex()} 16 tokens {s.page.shards} shards {len(b''.join(s.data))} bytes" for s in samples),
        ]

    def test_every_column_is_what_was_put(self, node: Node, tmp_path: Path) -> None:
        samples = [sample(n, 4096 * n + 4096, 1 + n % 2) for n in range(4)]
        put(node("a"), *samples)
        with pa.memory_map(str(files(tmp_path)[0])) as source:
            table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)
            for row, (page, data) in zip(table.to_pylist(), samples, strict=True):
                assert row.pop("payload") == b"".join(data)
                assert row.pop("stamp") >> 20 == pytest.approx(time.time() * 1000, abs=60_000)
                assert row == page._asdict() | {"checksums": list(page.checksums)}
            payload = table["payload"].chunk(3).buffers()[2]
            assert payload is not None
            assert payload.address % 4096 == 0, "payloads lie at page boundaries"

    def test_the_bytes_are_where_the_module_draws_them(self, node: Node, tmp_path: Path) -> None:
        what = sample(7, 5000, 2)
        put(node("a"), what)
        data = files(tmp_path)[0].read_bytes()
        (footer,) = struct.unpack("<i", data[-10:-6])
        end = len(data) - 10 - footer
        magic, version, count, checksums, zero = struct.unpack_from("<8sIIII", data, end - 40)
        assert (magic, version, count, checksums, zero) == (b"KVDINDEX", 1, 1, 2, 0)
        start = end - 40 - 32 - 120
        assert data[end - 16 : end] == xxhash.xxh3_128_digest(data[start : end - 16])
        namespace, key, parent, *numbers = struct.unpack_from("<16s32s32sQQQIIH6x", data, start)
        length, offset, _, tokens, first, shards = numbers
        assert (namespace, key, parent, length) == what.page[:4]
        assert (tokens, first, shards) == (16, 0, 2)
        assert data[start + 120 : start + 152] == b"".join(what.page.checksums)
        assert offset % 4096 == 0
        assert data[offset : offset + 10_000] == b"".join(what.data)
        assert data[:8] == b"ARROW1\0\0"
        assert data[-6:] == b"ARROW1"

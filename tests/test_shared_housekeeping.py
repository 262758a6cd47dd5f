"""What the nodes of a shared tier do to its folder now and then: merging, age-out, sweeping up."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kvd.storage import failpoints
from kvd.storage.shared.sealed import Rows
from tests.shared_folder import MIB, Node, files, nodes
from tests.tier_samples import get, held, put, sample


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(tmp_path / "shared") as start:
        yield start


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

    def test_what_would_not_fit_when_merged_is_not_even_read(self, node: Node, tmp_path: Path) -> None:
        tier = node("a", quota_bytes=3 * MIB)
        samples = [sample(n, 200_000) for n in range(8)]
        for what in samples:
            put(tier, what)
        failpoints.arm("folder.read:1+:eio")
        tier.news()
        assert "unreadable" not in tier.counters
        failpoints.arm("")
        tier._housekeeping.quota_bytes = 4 * MIB
        tier.news()
        tier.news()
        assert len(files(tmp_path)) == 1
        assert get(tier, *samples) == samples

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

    def test_old_graves_cost_one_look_at_each_file_however_many_they_are(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tier = node("a")
        put(tier, *[sample(n) for n in range(20)])
        for n in range(10):
            tier.remove([sample(n).page.name])
        monkeypatch.setattr("kvd.storage.shared.housekeeping._YOUNG_GRAVE_S", -60.0)
        looks: list[Rows] = []
        listed, lock = Rows.stamps, cast(Any, tier._files.lock)

        def counted(rows: Rows) -> Iterator[tuple[bytes, int]]:
            assert not lock._is_owned(), "nobody waits for it"
            looks.append(rows)
            return listed(rows)

        monkeypatch.setattr(Rows, "stamps", counted)
        tier._housekeeping._sweep()
        assert len(looks) == 1
        tier._housekeeping._sweep()
        assert len(looks) == 1, "what makes them needed is known, and there"

    def test_graves_stay_while_there_are_files_that_were_not_read(
        self, node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer = node("a")
        put(writer, sample(1), sample(2))
        old = node("b", max_pages=1)
        assert not held(old)
        writer.remove([sample(1).page.name])
        monkeypatch.setattr("kvd.storage.shared.housekeeping._YOUNG_GRAVE_S", -60.0)
        old._housekeeping.leftover_s = 0
        old.news()
        old.news()
        assert held(node("c")) == {sample(2).page.name}

    def test_what_crashes_left_is_swept_by_age_and_foreign_files_never(self, node: Node, tmp_path: Path) -> None:
        put(node("a"), sample(1))
        folder = tmp_path / "shared"
        temporary = folder / "a" / f".{files(tmp_path)[0].name}.1.tmp"
        strangers = folder / "a" / "notes.txt", folder / "a" / ".x.pages.arrow.1.tmp", folder / "b" / "thesis.tmp"
        (folder / "b").mkdir()
        half = files(tmp_path)[0].with_name("0" * 15 + "1-" + "0" * 16 + ".pages.arrow")
        for path in (temporary, half, *strangers):
            path.write_bytes(b"half")
        tier = node("b", leftover_s=99)
        tier.news()
        assert temporary.exists()
        assert half.exists()
        tier._housekeeping.leftover_s = 0
        tier.news()
        assert not temporary.exists()
        assert not half.exists()
        assert all(stranger.exists() for stranger in strangers)
        assert (tier.counters["foreign"], tier.counters["truncated"]) == (3, 1)

    def test_a_folder_that_may_not_be_read_is_nobodys(
        self, node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(node("a"), sample(1))
        (tmp_path / "shared" / "lost+found").mkdir()
        listed = os.scandir

        def forbidden(folder: Path) -> Any:
            if Path(folder).name == "lost+found":
                raise PermissionError(13, "Permission denied")
            return listed(folder)

        monkeypatch.setattr(os, "scandir", forbidden)  # for root nothing is
        assert get(node("b"), sample(1)) == [sample(1)]

    def test_a_put_that_cannot_fit_is_refused_and_evicts_nothing(self, node: Node) -> None:
        tier = node("a", quota_bytes=MIB)
        assert put(tier, sample(1, 300_000)) == [True]
        assert put(tier, sample(2, 2 * MIB)) == [False]
        assert get(tier, sample(1, 300_000)) == [sample(1, 300_000)]

    def test_own_pages_beyond_what_a_node_may_know_push_out_the_oldest(self, node: Node) -> None:
        tier = node("a", max_pages=6)
        for n in range(0, 12, 2):
            assert put(tier, sample(n), sample(n + 1)) == [True, True]
        assert held(tier) == {sample(n).page.name for n in range(6, 12)}
        assert put(tier, *[sample(n) for n in range(20, 27)]) == [False] * 7, "more than all"
        assert len(held(tier)) == 6

    def test_files_with_too_many_pages_are_read_once_there_is_room(self, node: Node) -> None:
        writer, reader = node("a"), node("b", max_pages=6)
        samples = [sample(n) for n in range(12)]
        for at in range(0, 12, 2):
            put(writer, *samples[at : at + 2])
        reader.news()
        known = held(reader)
        assert len(known) == 6
        gone = [what.page.name for what in samples if what.page.name in known][:4]  # two files
        reader.news()
        assert reader.counters["too many pages"] == 3, "counted once"
        writer.remove(gone)
        reader.news()
        came = set(reader.news().came)
        assert len(came) == 4
        left = [what for what in samples if what.page.name in (came | known) - set(gone)]
        assert get(reader, *left) == left
        assert held(reader) == {what.page.name for what in left}
        assert len(left) == 6

    def test_a_put_longer_than_a_file_is_several(self, node: Node, tmp_path: Path) -> None:
        samples = [sample(n, 700_000) for n in range(20)]
        assert all(put(node("a"), *samples))
        assert len(files(tmp_path)) == 4

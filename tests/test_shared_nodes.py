"""Nodes of a shared tier as processes that are killed: whole files only, nothing wrong, nothing acknowledged lost."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.failpoint_names import failpoint_names
from tests.harness import eventually
from tests.shared_lives import NodeProcess, check, killed_at_random, said


def files(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.glob("*/*.pages.arrow"))


@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_killed_at_any_time_lose_nothing_acknowledged(tmp_path: Path, nodes: int) -> None:
    lives = killed_at_random(str(tmp_path), nodes, 16, nodes)
    assert len(said(lives, "put")) > 50
    check(str(tmp_path), lives, files(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_killed_for_a_long_time_lose_nothing_acknowledged(tmp_path: Path, nodes: int) -> None:
    check(str(tmp_path), killed_at_random(str(tmp_path), nodes, 100, 10 + nodes), files(tmp_path))


@pytest.mark.parametrize("nth", [1, 9])  # the ninth write is a merge's
@pytest.mark.parametrize("step", failpoint_names("shared", "folder."))
def test_a_node_killed_at_a_step_leaves_whole_files_only(tmp_path: Path, step: str, nth: int) -> None:
    life = NodeProcess(str(tmp_path), "a", 1, turns=60, failpoint=f"{step}:{nth}:kill")
    assert life.end() == -signal.SIGKILL, "the step was reached"
    again = NodeProcess(str(tmp_path), "a", 2, turns=20)
    assert again.end() == 0
    check(str(tmp_path), [life, again], files(tmp_path))


def test_what_a_reader_holds_is_not_deleted_under_it(tmp_path: Path) -> None:
    """Writers that merge all the time, one of them killed; a reader that looks for news within the grace period."""
    reader = NodeProcess(str(tmp_path), "reader", 1, grace_s=3, poll_s=1)
    other = NodeProcess(str(tmp_path), "other", 2, grace_s=3)
    lives, seen = [reader, other], set[Path]()

    def deleted() -> int:
        there = set(tmp_path.glob("*/*.pages.arrow"))
        seen.update(there)
        return len(seen - there)

    try:
        for files_deleted in (20, 60):
            lives.append(NodeProcess(str(tmp_path), "killed", files_deleted, grace_s=3))
            eventually(lambda least=files_deleted: deleted() >= least, 60, "merged files were deleted")
            lives[-1].kill()
    finally:
        for life in lives:
            life.kill()
            life.end()
    assert not said(lives, "lost")
    check(str(tmp_path), lives, files(tmp_path))

"""What kvdctl prints: tables on terminals of any width, and what becomes of output that nobody takes."""

import os
import pty
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.ctl.table import laid_out
from kvd.ctl.terminal import several
from tests.router_harness import ToldRouter
from tests.told_router import A, B

COMMAND = (sys.executable, "-c", "from kvd.ctl import app; app()")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, *right: int) -> list[str]:
    heading, lines = laid_out(columns, rows, [at in right for at in range(len(columns))], width)
    return heading + lines


# -- tables ------------------------------------------------------------------------------------------------

WORKERS = ("worker", "running", "what is missing")
ONE = ("http://10.0.0.1:30000", "3", "the node has said nothing for 5 s -> is kvd running on node-1?")


def test_without_a_terminal_a_row_is_one_line_without_spaces_at_its_end() -> None:
    assert table(WORKERS, [ONE, ("b", "12", "")], None, 1) == [
        "worker                 running  what is missing",
        "http://10.0.0.1:30000        3  the node has said nothing for 5 s -> is kvd running on node-1?",
        "b                           12",
    ]


def test_only_the_last_column_folds_and_only_between_words() -> None:
    assert table(WORKERS, [ONE], 60, 1) == [
        "worker                 running  what is missing",
        "http://10.0.0.1:30000        3  the node has said nothing",
        "                                for 5 s -> is kvd running on",
        "                                node-1?",
    ]


def test_columns_that_do_not_fit_go_on_below() -> None:
    assert table(WORKERS, [ONE], 50, 1) == [
        "worker                 running",
        "    what is missing",
        "http://10.0.0.1:30000        3",
        "    the node has said nothing for 5 s -> is kvd",
        "    running on node-1?",
    ]
    assert table(WORKERS, [(*ONE[:2], "")], 30, 1)[2:] == ["http://10.0.0.1:30000        3"], "no empty line"
    assert table(WORKERS, [ONE], 10, 1)[:5] == [
        "worker", "    running", "    what is missing", "http://10.0.0.1:30000", "          3",
    ]  # fmt: skip


words = st.text("ab:/-.7", max_size=30)


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.tuples(*[words] * n), min_size=1, max_size=4)), st.integers(1, 90)
)
def test_no_cell_is_ever_broken_or_left_out(rows: list[tuple[str, ...]], width: int) -> None:
    columns = tuple(f"c{n}" for n in range(len(rows[0])))
    said = table(columns, rows, width)
    assert [word for line in said for word in line.split()] == [
        cell for row in (columns, *rows) for cell in row if cell
    ]
    assert all(line == line.rstrip() for line in said)
    assert sum(not line for line in said) <= len(rows), "none but of a row whose first cells are empty"
    widest = max(len(cell) for row in rows for cell in row)
    assert all(len(line) <= max(width, 4 + max(24, widest)) for line in said)


def on_a_terminal(*arguments: str, columns: int) -> str:
    """What the command writes to a terminal of this width."""
    master, slave = pty.openpty()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=slave, env=os.environ | {"COLUMNS": str(columns)})
    os.close(slave)
    said = bytearray()
    try:
        while data := os.read(master, 65536):
            said += data
    except OSError:  # it has ended
        pass
    os.close(master)
    assert process.wait() == 0
    return said.decode().replace("\r\n", "\n")


def test_on_a_narrow_terminal_urls_stay_whole_and_no_line_is_broken() -> None:
    with ToldRouter() as told:
        for *arguments, facts in (
            ("top", "--once", True),
            ("worker", "list", False),
            ("explain", "--requests", False),
            ("explain", "answered", True),
        ):
            said = on_a_terminal(*map(str, arguments), "--router", told.url, columns=80)
            shown = said.replace("\x1b[1m", "").replace("\x1b[0m", "")
            lines = (shown.partition("\n\n")[2] if facts else shown).splitlines()
            assert max(map(len, lines)) <= 80, arguments
            assert {A, B} <= set(" ".join(lines).split()), arguments
            assert "\x1b[1m" in said, "headings are bold"


def test_plurals() -> None:
    assert [several(count, "rank") for count in (0, 1, 2, 1000)] == ["0 ranks", "1 rank", "2 ranks", "1,000 ranks"]


# -- output that nobody takes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("worker", "list"), ("worker", "list", "--json"), ("top", "--once"), ("doctor",)]
)
def test_what_cannot_be_written_is_said_in_one_line(arguments: tuple[str, ...]) -> None:
    with ToldRouter() as told, open("/dev/full", "w") as full:
        ran = subprocess.run(
            [*COMMAND, *arguments, "--router", told.url], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ran.returncode == 1
    assert "cannot write: No space left on device" in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("worker", "list"), ("top", "--once")])
def test_a_closed_stdout_is_no_terminal(arguments: tuple[str, ...]) -> None:
    with ToldRouter() as told:
        ran = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *arguments, "--router", told.url], stderr=subprocess.PIPE
        )
    assert (ran.returncode, ran.stderr) == (0, b"")

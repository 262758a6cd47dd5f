"""What every benchmark shares: its two options, interleaved measuring, and the one table it prints.

Cases are measured in turn, round after round, so that a busy machine hurts them alike. A ratio is the median of
the ratios of each round, never of figures from different moments. What could not run is "missing", not a number.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

R = TypeVar("R")
Run = Callable[[int], Mapping[str, float]]  # round number -> {figure: value}


@dataclass(frozen=True, slots=True)
class Options:
    quick: bool
    json: bool
    rest: argparse.Namespace

    def rounds(self, quick: int, full: int) -> int:
        return quick if self.quick else full


def options(doc: str | None, add: Callable[[argparse.ArgumentParser], object] | None = None) -> Options:
    """Parse the command line; `doc` is the benchmark's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats; ends within 45 s once set up")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    if add is not None:
        add(parser)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    return Options(given.quick, given.json, given)


def progress(line: str) -> None:
    """To stderr: the table alone goes to stdout."""
    print(f"[bench] {line}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Samples:
    """Every figure of every round, by name."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.rounds.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        values = self.rounds.get(name)
        return statistics.median(values) if values else None

    def ratio(self, name: str, reference: str) -> float | None:
        """Median over the rounds of name / reference; None where one of them did not run."""
        ours, theirs = self.rounds.get(name), self.rounds.get(reference)
        if not ours or not theirs:
            return None
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def timed(call: Callable[..., R], *arguments: Any) -> tuple[float, R]:
    """Seconds a call took, and what it returned."""
    started = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - started, result


def interleave(cases: Sequence[Run], rounds: int, warm_up: int = 1) -> Samples:
    """Run every case in turn, `rounds` times after the warm-up; each round starts with another case.

    A figure that some round lacks, because its case failed there, is dropped.
    """
    samples = Samples()
    for number in range(-warm_up, rounds):
        first = number % len(cases)
        for case in (*cases[first:], *cases[:first]):
            figures = case(number)
            if number >= 0:
                samples.add(figures)
    samples.rounds = {name: values for name, values in samples.rounds.items() if len(values) == rounds}
    return samples


@dataclass(slots=True)
class Table:
    """Rows of text, printed once with what they were measured on."""

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns), cells
        self.rows.append(cells)

    def print(self) -> None:
        lines = [tuple(self.columns), *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        print(f"{self.title}\n{machine()}\n{software()}")
        for number, line in enumerate(lines):
            cells = [
                cell.ljust(w) if at == 0 else cell.rjust(w)
                for at, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            print("| " + " | ".join(cells) + " |")
            if number == 0:
                print(
                    "|"
                    + "|".join("-" * (w + 2) if at == 0 else "-" * (w + 1) + ":" for at, w in enumerate(widths))
                    + "|"
                )
        for note in self.notes:
            print(f"- {note}")


def spread(values: Sequence[float] | None, digits: int = 2) -> str:
    """ "median (min..max)", or "missing"."""
    if not values:
        return "missing"
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def finish(
    name: str, table: Table, wanted: Options, ratios: Mapping[str, float | None], figures: Mapping[str, object]
) -> None:
    """Print the table, and the JSON line where it was asked for. A ratio that is None is left out."""
    table.print()
    if wanted.json:
        known = {key: round(value, 4) for key, value in ratios.items() if value is not None}
        print(json.dumps({"name": name, "ratios": known, "figures": figures}))


def machine() -> str:
    """The hardware this runs on, in one line."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    )
    model = next(iter(facts.values()), platform.machine()).strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    load = os.getloadavg()[0]
    return f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GiB, Linux {platform.release()}, load {load:.1f} at the end"


def software(*packages: str) -> str:
    """Our commit and the versions that matter, in one line."""
    parts = [f"kvd {commit()}", f"Python {platform.python_version()}"]
    for package in packages or ("pyzmq", "msgspec", "xxhash", "numpy", "torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "(no commit)"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()

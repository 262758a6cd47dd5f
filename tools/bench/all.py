"""Every benchmark, one after the other, into docs/benchmarks.md: the tables as printed, with date and commit.

    python -m tools.bench.all [--quick]

Ends with 1 when a benchmark failed; the tables of the others are written all the same.
"""

import datetime
import subprocess
import sys

from tools.bench._table import ROOT, commit

NAMES = (
    "host_path", "lookup", "ttft", "gate", "import_cost", "nvme", "reopen", "shared", "policy",
    "events", "router_index", "router_tokens", "router_http", "router_quality", "router_real",
)  # fmt: skip
HEAD = """# Benchmarks

Written by `make bench-all` on {date}, commit {commit}{quick}. Each table was measured in one run, ours and the
references in turn; tools/bench/README.md says what each one asks and how to read it.
"""


def main() -> int:
    quick = [word for word in sys.argv[1:] if word == "--quick"]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    parts = [HEAD.format(date=date, commit=commit(), quick=", with --quick" if quick else "")]
    failed = 0
    for name in NAMES:
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"tools.bench.{name}", *quick, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(done.stdout)
        failed += done.returncode != 0
        *table, _ = done.stdout.rstrip().splitlines() or ["(failed)", ""]
        shown = [line for line in table if not line.startswith("[")]
        title, rest = shown[0], shown[1:]
        parts.append(f"## {name}\n\n{title}\n\n" + "\n".join(_spaced(rest)) + "\n")
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/benchmarks.md").write_text("\n".join(parts))
    return 1 if failed else 0


def _spaced(lines: list[str]) -> list[str]:
    """Markdown wants an empty line around a table."""
    found: list[str] = []
    for line in lines:
        if found and line.startswith("|") != found[-1].startswith("|"):
            found.append("")
        found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(main())

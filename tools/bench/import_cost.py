"""What does loading the plugin cost a worker, in time and in packages?

`import kvd.sidecar.hicache` is timed in fresh processes of the SGLang environment (`.venvs/sglang`): in one that has
imported what a worker's scheduler process has by then (the case that counts: aim under 50 ms), and in one that has
imported nothing, where it pulls in SGLang's own storage module. And in this environment, which has no SGLang.
`added_packages` are the top-level packages that appear in sys.modules in the first case; the plugin may add kvd,
msgspec, zmq and xxhash and nothing else, or the benchmark fails.

The kvd installed in the SGLang environment is measured; where there is none, this checkout, and the notes say so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tools.bench._peers import Missing, sglang_environment
from tools.bench._table import ROOT, Run, Table, finish, interleave, options, progress, spread

ALLOWED = {"kvd", "msgspec", "zmq", "xxhash"}
WORKER = "sglang.srt.managers.scheduler"  # a rank's process: it has all this by the time it makes a backend
NAMES = {
    "worker": "in a worker, after SGLang's own imports",
    "cold": "in the SGLang environment, from nothing",
    "bare": "without SGLang, from nothing",
}
PROGRAM = """
import json, sys, time
for name in sys.argv[1:]:
    __import__(name)
had = {name.partition(".")[0] for name in sys.modules}
started = time.perf_counter()
import kvd.sidecar.hicache as plugin
took = time.perf_counter() - started
new = {name.partition(".")[0] for name in sys.modules} - had - set(sys.stdlib_module_names)
added = sorted(name for name in new if not name.startswith(("_", "cython_runtime")))
print(json.dumps({"ms": 1000 * took, "added": added, "file": plugin.__file__}))
"""


@dataclass(slots=True)
class Imports:
    """Fresh processes of one environment. Remembers what the last import of each kind added."""

    python: Path
    env: dict[str, str]
    added: dict[str, list[str]] = field(default_factory=dict)
    file: str = ""

    def measure(self, name: str, before: tuple[str, ...], _: int) -> Mapping[str, float]:
        done = subprocess.run(
            [str(self.python), "-W", "ignore", "-c", PROGRAM, *before],
            capture_output=True, text=True, check=False, env=self.env, cwd="/",
        )  # fmt: skip
        if done.returncode:
            raise Missing(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        self.added[name], self.file = answer["added"], answer["file"]
        return {name: answer["ms"]}


def main() -> None:
    wanted = options(__doc__)
    table = Table("import kvd.sidecar.hicache: ms, median (min..max)", ("process", "ms", "packages added"))
    here = Imports(Path(sys.executable), dict(os.environ))
    there: Imports | None = None
    try:
        there = _worker_environment()
    except Missing as why:
        progress(f"the SGLang environment is missing: {why}")
        table.notes.append(f"the SGLang environment is missing: {why}")
    cases: list[Run] = [partial(here.measure, "bare", ())]
    if there is not None:
        cases += [partial(there.measure, "worker", (WORKER,)), partial(there.measure, "cold", ())]
    samples = interleave(cases, wanted.rounds(2, 7), warm_up=0 if wanted.quick else 1)
    added = {**here.added, **(there.added if there is not None else {})}
    for name, words in NAMES.items():
        table.add(words, spread(samples.rounds.get(name), 1), _few(added[name]) if name in added else "missing")
    if there is not None:
        checkout = Path(there.file).is_relative_to(ROOT / "kvd")
        table.notes.append("this checkout, by PYTHONPATH" if checkout else "the kvd installed in .venvs/sglang")
    figures = {
        "import_ms": samples.median("worker"),
        "import_cold_ms": samples.median("cold"),
        "import_bare_ms": samples.median("bare"),
        "added_packages": added.get("worker"),
    }
    finish("import_cost", table, wanted, {}, figures)
    if surplus := set(added.get("worker", ())) - ALLOWED:
        sys.exit(f"the plugin brings packages a worker does not have: {', '.join(sorted(surplus))}")


def _few(packages: list[str]) -> str:
    more = len(packages) - 6
    return ", ".join(packages[:6]) + (f" and {more} more" if more > 0 else "")


def _worker_environment() -> Imports:
    """SGLang's environment with its kvd, or with this checkout where it has none."""
    venv = sglang_environment()
    python = venv / "bin" / "python"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(venv / "torch_extensions")}
    env.pop("PYTHONPATH", None)
    find = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('kvd') is None)"]
    if subprocess.run(find, env=env, cwd="/", check=False).returncode:
        env["PYTHONPATH"] = str(ROOT)
    return Imports(python, env)


if __name__ == "__main__":
    main()

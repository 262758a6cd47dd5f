"""Who may import whom, which modules are pure, and what a worker has to load. Reads the source; runs nothing of it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("sidecar", "router", "planner", "storage")
PURE = (
    "kvd.sglang_events", "kvd.ctl.table", "kvd.brief", "kvd.wire.stream", "kvd.daemon.mirror", "kvd.daemon.stream",
    "kvd.daemon.holdings", "kvd.router.view", "kvd.router.numbering", "kvd.router.matching",
    "kvd.pages", "kvd.places", "kvd.daemon.leases", "kvd.daemon.residency", "kvd.daemon.sessions", "kvd.daemon.node",
    "kvd.daemon.space", "kvd.daemon.partials", "kvd.daemon.requests", "kvd.daemon.recovery", "kvd.daemon.labels",
    "kvd.daemon.scratch", "kvd.daemon.intake", "kvd.daemon.stock", "kvd.daemon.promotion", "kvd.daemon.gate",
    "kvd.daemon.speed", "kvd.daemon.writeback", "kvd.daemon.decisions", "kvd.daemon.eviction", "kvd.daemon.departures",
    "kvd.daemon.group", "kvd.daemon.hints", "kvd.storage.worth",
    "kvd.sidecar.prefill", "kvd.sidecar.circuit", "kvd.sidecar.hits", "kvd.sidecar.identity",
    "kvd.storage.nvme.slots", "kvd.storage.nvme.sizeclass", "kvd.storage.nvme.reopen",
    "kvd.storage.policy", "kvd.storage.reuse", "kvd.storage.sketch", "kvd.storage.quota",
    "kvd.storage.shared.compaction", "kvd.storage.shared.makingroom",
    "kvd.router.index", "kvd.router.runs", "kvd.router.marking", "kvd.router.holders",
    "kvd.router.steering", "kvd.router.queue", "kvd.router.tenants", "kvd.router.continuation",
    "kvd.router.transcript",
    "kvd.router.proxy.strict", "kvd.router.proxy.headers", "kvd.router.proxy.endpoints", "kvd.router.proxy.events",
    "kvd.router.proxy.answers", "kvd.router.proxy.inbox", "kvd.router.proxy.streamed",
    "kvd.ctl.simulate.cache", "kvd.ctl.simulate.reference", "kvd.ctl.moving.order",
    "kvd.router.tokens.outcome", "kvd.router.tokens.blocks", "kvd.router.tokens.chat", "kvd.router.tokens.toolschema",
    "kvd.router.tokens.anthropic", "kvd.router.tokens.responses", "kvd.router.tokens.serving",
    "kvd.router.tokens.cuts", "kvd.router.tokens.digits", "kvd.router.tokens.turns",
    "kvd.router.tokens.values", "kvd.router.tokens.parity",
    "kvd.ctl.simulate.routing.engine", "kvd.ctl.simulate.routing.radix", "kvd.ctl.simulate.routing.worker",
    "kvd.ctl.simulate.routing.spread", "kvd.ctl.simulate.routing.fleet", "kvd.ctl.simulate.routing.measure",
    "kvd.router.work", "kvd.router.regression", "kvd.router.rates", "kvd.router.load",
    "kvd.router.flights", "kvd.router.activeload",
    "kvd.router.predicted", "kvd.router.cost", "kvd.router.policies.choice", "kvd.router.policies.baselines",
    "kvd.sglang_info", "kvd.router.fleet.told", "kvd.router.fleet.loads", "kvd.router.fleet.health",
    "kvd.router.fleet.members", "kvd.router.fleet.linking",
    "kvd.router.policies.kvd", "kvd.router.policies.named", "kvd.router.usage",
    "kvd.router.decisions", "kvd.router.ledger", "kvd.router.seen",
    "kvd.router.pages.access", "kvd.router.pages.told", "kvd.router.pages.telling", "kvd.router.pages.replies",
    "kvd.router.pages.metrics", "kvd.ctl.router.summed", "kvd.ctl.router.figures",
)  # fmt: skip
IMPURE = {"asyncio", "zmq", "os", "time", "socket", "threading", "random", "mmap", "logging", "subprocess"}
IN_A_WORKER = {"msgspec", "zmq", "xxhash", "numpy", "torch", "sglang"}
STANDARD = set(sys.stdlib_module_names)

# Room -> what it may import of kvd. The core is every module directly under kvd/ but settings,
# what programs' settings share, and main: no worker has what those need.
CORE = "core"
MAY = {
    CORE: {CORE},
    "storage": {CORE, "storage"},
    "daemon": {CORE, "storage", "daemon", "settings"},
    "sidecar": {CORE, "sidecar"},
    "router": {CORE, "router", "settingsfile"},
    "planner": {CORE, "planner"},
    "ctl": {CORE, "ctl", "settings", "storage", "router"},
    "settings": {CORE, "settingsfile"},
    "settingsfile": {CORE},
    "main": {CORE, "daemon", "settings"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its import name, rooms seen through their links."""
    found = {}
    for path in _walk(ROOT / "kvd"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for child in sorted(folder.iterdir()):  # rglob does not follow the links that rooms are
        found += _walk(child) if child.is_dir() else [child]
    return [path for path in found if path.suffix == ".py"]


def imports(path: Path) -> set[str]:
    """Absolute names a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in {*ROOMS, "daemon", "ctl", "settings", "settingsfile", "main"}:
        return parts[1]
    return CORE


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    known = {name for name in imports(MODULES[module]) if name.split(".")[0] == "kvd" and name in MODULES}
    wrong = {name for name in known if name != "kvd" and room(name) not in MAY[room(module)]}
    assert not wrong, f"{module} ({room(module)}) may not import {wrong}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_no_clock_and_no_io(module: str) -> None:
    """Their own imports, and those of what they import from kvd, except the memory they are handed."""
    tops = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not tops & IMPURE, f"{module} is pure"


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if room(name) in ("sidecar", CORE)])
def test_a_worker_needs_nothing_it_does_not_have(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(MODULES[module])} - STANDARD - {"kvd"}
    assert tops <= IN_A_WORKER, f"{module} would bring {tops - IN_A_WORKER} into the worker"


def test_rooms_are_links_to_the_top_level() -> None:
    for name in ROOMS:
        link = ROOT / "kvd" / name
        assert link.is_symlink(), f"kvd/{name} is a link"
        assert link.resolve() == ROOT / name


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_architecture_has_a_line_for_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [
        name for name, path in MODULES.items() if path.name != "__init__.py" and f"`{name.split('.')[-1]}`" not in text
    ]
    assert not missing, f"ARCHITECTURE.md says nothing of {missing}"

"""The attached workers: does each one use the cache, and if not, why?"""

from kvd import wire
from kvd.ctl.checks.finding import Finding
from kvd.ctl.terminal import span

CHECK = "worker"
_STARTING_S = 60.0  # identifying the weights takes a worker seconds, on a cold disk more
_EXTRA = "--hicache-storage-backend-extra-config"
_STALLED = "is kvd stopped, or the node out of CPU? it closes by itself as soon as kvd answers in time again"

# What a circuit says -> what to do. The first part that occurs in it decides.
_OPEN: tuple[tuple[str, str], ...] = (
    ("did not answer", _STALLED),
    ("does not answer", _STALLED),
    ("takes no messages", _STALLED),
    ("sent", "the worker and kvd do not understand each other: install one version in both, restart the worker"),
    ("garbage", "the worker and kvd do not understand each other: install one version in both, restart the worker"),
    ("detached", "it attaches again by itself within a second; if not, see 'kvd' lines in the worker's log"),
    ("closed", "the worker is shutting down; if it is not, see 'kvd' lines in its log"),
)
_OFF: tuple[tuple[str, str], ...] = (
    ("does not fit an extent", "raise arena.extent_bytes to twice the page and restart kvd, or lower --page-size"),
    (_EXTRA, f'correct that key of "kvd" in {_EXTRA} and restart the worker'),
    ("weights", f'set "weights_id" (or "model_path") under "kvd" in {_EXTRA} and restart the worker'),
    ("get_page_buffer_meta", f'leave "interface_v1" out of {_EXTRA} and restart the worker'),
    ("scratch namespace", "restart the worker"),
    ("context parallelism", "this way of serving cannot be cached by kvd: use SGLang's own backends for it"),
)
_OPEN_ELSE = "see 'kvd: circuit open' in the worker's log; if it stays open, restart the worker"
_OFF_ELSE = "see 'kvd is OFF' in the worker's log: the plugin could not be sure to give back right bytes"


def workers(status: wire.Status) -> list[Finding]:
    """One finding per attached rank."""
    if not status.workers:
        return [Finding(CHECK, "green", "no worker is attached")]
    return [_worker(worker) for worker in status.workers]


def _worker(worker: wire.WorkerStatus) -> Finding:
    name = f"{worker.label} (pid {worker.pid})"
    state, _, reason = worker.circuit.partition(": ")
    if state == "off":
        return Finding(CHECK, "red", f"{name} is off: {reason}", _remedy(reason, _OFF, _OFF_ELSE))
    if reason == "not attached yet" and worker.attached_s < _STARTING_S:
        return Finding(CHECK, "yellow", f"{name} has just attached", "run kvdctl doctor again in a few seconds")
    if state != "closed":
        return Finding(CHECK, "red", f"{name}: circuit {worker.circuit}", _remedy(reason, _OPEN, _OPEN_ELSE))
    if not worker.pools and worker.attached_s < _STARTING_S:
        message = f"{name} attached {span(worker.attached_s)} ago and has not named its pools yet"
        return Finding(CHECK, "yellow", message, "it is still starting: run kvdctl doctor again in a minute")
    if not worker.pools:
        remedy = "is --enable-hierarchical-cache set? see 'kvd' lines in the worker's log, and restart it"
        return Finding(CHECK, "red", f"{name} has named no pool in {span(worker.attached_s)}", remedy)
    read, written = worker.counters.get("get_pages", 0), worker.counters.get("set_pages", 0)
    pools = f"shard {worker.shard} of {', '.join(worker.pools)}"
    return Finding(CHECK, "green", f"{name}: {pools}; {read:,} pages read, {written:,} written")


def _remedy(reason: str, known: tuple[tuple[str, str], ...], otherwise: str) -> str:
    return next((remedy for part, remedy in known if part in reason), otherwise)

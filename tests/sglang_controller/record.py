"""The book of what a controller asked of its plugin, and of everything the plugin did wrong.

Three ways to be wrong: *raised* (an exception left the plugin), *broke* (its answer made the controller
raise), *contract* (the controller lives with the answer, but only by luck). Two more are the controller's
own verdict: *dead* (a storage thread ended for good) and *stuck* (a call outlived the time it is given).
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["S", "P", "IO", "B", "Y"]
"""Scheduler main thread, prefetch (lookup), prefetch I/O (reads), backup (writes), sync (collectives)."""


@dataclass(frozen=True)
class Call:
    """One call of the plugin, as it ended; `result` is the exception where it raised."""

    method: str
    role: Role
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seconds: float
    result: Any


@dataclass(frozen=True)
class Failure:
    """One thing that would have hurt a real worker."""

    kind: Literal["raised", "broke", "contract", "dead", "stuck"]
    role: Role
    method: str
    detail: str
    error: BaseException | None = None


class Recorder:
    """Calls the plugin for the controller. Safe from any thread; never swallows what the plugin raises."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.errors: list[Failure] = []
        self._lock = threading.Lock()
        self._blamed: list[BaseException] = []

    def call(self, role: Role, backend: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """`backend.method(*args, **kwargs)`, timed and judged; the arguments are the very objects given."""
        started = time.monotonic()
        try:
            result = getattr(backend, method)(*args, **kwargs)
        except BaseException as error:
            self._note(Call(method, role, args, kwargs, time.monotonic() - started, error))
            self.fail("raised", role, method, repr(error), error)
            raise
        self._note(Call(method, role, args, kwargs, time.monotonic() - started, result))
        complaint = complain(method, args, result)
        if complaint:
            self.fail("contract", role, method, complaint)
        return result

    def _note(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)

    def fail(
        self,
        kind: Literal["raised", "broke", "contract", "dead", "stuck"],
        role: Role,
        method: str,
        detail: str,
        error: BaseException | None = None,
    ) -> None:
        with self._lock:
            self.errors.append(Failure(kind, role, method, detail, error))
            if error is not None:
                self._blamed.append(error)

    def blame(self, role: Role, error: BaseException) -> None:
        """An exception reached the controller: if the plugin did not raise it, its answer caused it."""
        if not any(error is known for known in self._blamed):
            self.fail("broke", role, "", repr(error), error)

    def methods(self, role: Role | None = None) -> list[str]:
        """Names of the methods called, in order; of one thread if asked."""
        with self._lock:
            return [call.method for call in self.calls if role in (None, call.role)]


def complain(method: str, args: tuple[Any, ...], result: Any) -> str | None:
    """What is wrong with this answer, or None. Stricter than SGLang, which often survives a wrong answer."""
    if method == "batch_exists":
        if isinstance(result, bool) or not isinstance(result, int) or not 0 <= result <= len(args[0]):
            return f"want a page count 0..{len(args[0])}, got {result!r}"
    elif method in ("batch_get_v1", "batch_set_v1"):
        return _not_bools(result, len(args[0]))
    elif method == "batch_get":
        if not isinstance(result, list) or len(result) != len(args[0]):
            return f"want a list of {len(args[0])} tensors or None, got {_short(result)}"
    elif method == "batch_set":
        if not isinstance(result, bool):
            return f"want a bool, got {_short(result)}"
    elif method in ("batch_get_v2", "batch_set_v2"):
        return _bad_pool_results(args[0], result)
    elif method == "batch_exists_v2":
        return _bad_hit(len(args[0]), result)
    return None


def _not_bools(result: Any, want: int) -> str | None:
    if isinstance(result, list) and len(result) == want and all(isinstance(ok, bool) for ok in result):
        return None
    return f"want a list of {want} bools, got {_short(result)}"


def _bad_pool_results(transfers: Sequence[Any], result: Any) -> str | None:
    if not isinstance(result, dict):
        return f"want a dict of pool name to bools, got {_short(result)}"
    for transfer in transfers:
        if transfer.name not in result:
            return f"no answer for pool {transfer.name.value}"
        complaint = _not_bools(result[transfer.name], len(transfer.keys or []))
        if complaint:
            return f"pool {transfer.name.value}: {complaint}"
    return None


def _bad_hit(pages: int, result: Any) -> str | None:
    hit = getattr(result, "kv_hit_pages", None)
    if not isinstance(hit, int) or not 0 <= hit <= pages:
        return f"want a PoolTransferResult of at most {pages} pages, got {_short(result)}"
    lengths = getattr(result, "restorable_prefix_pages", None)
    if lengths is not None and max(lengths, default=0) != hit:
        return f"the longest restorable prefix is {max(lengths, default=0)} but kv_hit_pages is {hit}"
    return None


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value)[:80]

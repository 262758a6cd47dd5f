"""Where a tier can be made to fail, for tests: each step that persists something calls `reach` with its name.

    KVD_FAILPOINT=nvme.put.after_payload:3:kill      kill -9 oneself when the step is reached for the third time
    KVD_FAILPOINT=segments.read:1+:eio               from the first time on, every time, raise OSError(EIO)

What may follow the number: `kill`, `hang` (never comes back), or an errno's name in small letters. Names are string
literals, so that a test finds them all by reading the sources. Off, a call is one comparison.
"""

import errno
import os
import signal
import threading
from typing import Final, NamedTuple

VARIABLE: Final = "KVD_FAILPOINT"


class Plan(NamedTuple):
    """What is to happen, where, from which time on, and whether again after that."""

    name: str
    nth: int
    again: bool
    what: str


def parse(text: str) -> Plan | None:
    """Raises ValueError for what cannot be meant: a test that misspells its fault must not pass."""
    if not text:
        return None
    name, nth, what = text.split(":")
    if what not in ("kill", "hang") and not hasattr(errno, what.upper()):
        raise ValueError(f"{VARIABLE}: no such fault: {what}")
    return Plan(name, int(nth.removesuffix("+")), nth.endswith("+"), what)


_plan = parse(os.environ.get(VARIABLE, ""))
_times = 0
_counting = threading.Lock()


def arm(text: str) -> None:
    """As if the process had been started with the variable set to this; empty: off."""
    global _plan, _times
    _plan, _times = parse(text), 0


def reach(name: str) -> None:
    """The step `name` is reached."""
    if _plan is not None:
        _strike(name, _plan)


def _strike(name: str, plan: Plan) -> None:
    global _times
    if name != plan.name:
        return
    with _counting:
        _times += 1
        times = _times
    if times < plan.nth or (times > plan.nth and not plan.again):
        return
    if plan.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.what in ("kill", "hang"):
        while True:
            signal.pause()
    number: int = getattr(errno, plan.what.upper())
    raise OSError(number, f"{os.strerror(number)} (failpoint {name})")

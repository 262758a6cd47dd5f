"""A line of the doctor's report, and how a check is kept from hanging.

Always true: a finding that is not green says what to do about it.
"""

import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from kvd.errors import KvdError

Level = Literal["green", "yellow", "red"]
STEP_S = 3.0  # the longest a check may take


class Finding(msgspec.Struct, frozen=True):
    """`figures` are measurements, with their unit in the name."""

    check: str
    level: Level
    message: str
    remedy: str = ""
    figures: dict[str, int] = {}

    def __post_init__(self) -> None:
        assert self.level == "green" or self.remedy, f"{self.message}: what shall the operator do?"


def worst(findings: list[Finding]) -> Level:
    """The colour of a whole report."""
    levels = {finding.level for finding in findings}
    return "red" if "red" in levels else "yellow" if "yellow" in levels else "green"


def within(seconds: float, check: str, step: Callable[[], list[Finding]], unit: str = "kvd") -> list[Finding]:
    """Run a check; a red finding when it fails or takes too long. `unit`: whose log says more.

    It runs on a thread of its own because what it reads (/proc, mounts) can block in the kernel, where no timeout
    reaches. Such a thread is left behind: it is a daemon thread, and this process is about to end.
    """
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(step())
        except KvdError as error:
            found.append(Finding(check, "red", error.message, error.hint or f"look at `journalctl -u {unit}`"))
        except Exception as error:  # the other checks are still worth having
            message = f"the check itself failed: {type(error).__name__}: {error}"
            found.append(Finding(check, "red", message, "please report this"))

    thread = threading.Thread(target=run, name=f"doctor-{check}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        remedy = "something blocks it in the kernel or the node is out of CPU: look at `top` and `dmesg`"
        return [Finding(check, "red", f"no result within {seconds:.0f} s", remedy)]
    return found

"""A router that the operator named: does it answer, is every worker used, and for what it has cached?"""

from typing import Final

from kvd import __version__
from kvd.ctl.checks.finding import Finding
from kvd.ctl.router import summed
from kvd.ctl.router.link import RouterLink
from kvd.ctl.terminal import percent
from kvd.router.pages import replies

CHECK: Final = "router"
BY_LOAD: Final = "least_busy"  # the policy that credits nobody, because it was set so
_LAG_PERCENT: Final = 3.0  # of what was available
_ENOUGH: Final = 50  # requests, before a share says anything
_LAG: Final = (
    "workers drop what their events say they have, or events come late: look at the router's log for gaps, and at "
    "`kvdctl doctor` on the workers' nodes"
)
_STATES: Final = {
    "joining": "it is served once it answers: look again in a few seconds, and at its log if it stays so",
    "unhealthy": "requests go elsewhere until it answers again: look at its log, or kvdctl worker remove it",
    "draining": "it leaves by itself when its streams have ended",
    "gone": "start it again, or kvdctl worker remove it",
}
_NO_CREDIT: Final = "see its line in kvdctl worker list, and the router's log"


def routing(link: RouterLink) -> list[Finding]:
    """Raises KvdError where the router does not answer, or does not let us look."""
    workers = summed.workers(link.ask_all("/kvd/workers", replies.Workers))
    ledger = summed.ledger(link.ask_all("/kvd/ledger", replies.Ledger))
    return [answers(link.url, workers), *each_worker(workers), *losses(ledger)]


def answers(url: str, said: replies.Workers) -> Finding:
    if said.version != __version__:
        remedy = "update whichever is older"
        return Finding(CHECK, "yellow", f"kvd-router at {url} is {said.version}, this tool {__version__}", remedy)
    if not said.workers:
        return Finding(CHECK, "red", f"kvd-router at {url} has no worker", "kvdctl worker add URL")
    figures = {"workers": len(said.workers), "waiting": said.waiting}
    return Finding(
        CHECK, "green", f"kvd-router {said.version} answers at {url}, policy {said.policy}", figures=figures
    )


def each_worker(said: replies.Workers) -> list[Finding]:
    """One finding per worker. A router that was told to go by load alone owes nobody credit."""
    return [_worker(worker, said.policy != BY_LOAD) for worker in said.workers]


def _worker(worker: replies.Worker, owed: bool) -> Finding:
    said, own = (worker.health, "") if worker.health else (worker.why, worker.remedy)  # the remedy is for `why`
    name, why, remedy = worker.name, f": {said}" if said else "", own or _STATES.get(worker.state, _NO_CREDIT)
    if worker.state in ("unhealthy", "gone"):
        return Finding(CHECK, "red", f"{name} is {worker.state}{why}", remedy)
    if worker.state in ("joining", "draining"):
        return Finding(CHECK, "yellow", f"{name} is {worker.state}{why}", remedy)
    if owed and not worker.credit:
        message = f"{name} gets requests, but none for what it has cached{why}"
        return Finding(CHECK, "red", message, remedy)
    lately = worker.recent
    hits = f"; {percent(lately.cached_tokens, lately.tokens)} of its prompts cached lately" if lately.tokens else ""
    return Finding(CHECK, "green", f"{name}: {worker.running} running, {worker.queued} queued{hits}")


def losses(ledger: replies.Ledger) -> list[Finding]:
    """What was lost to events that came late or never; nothing to say where too few requests were counted."""
    if ledger.requests < _ENOUGH or not ledger.available:
        return []
    lag = ledger.lost.get("lag", 0)
    message = f"{percent(lag, ledger.available)} of what could have been cached was believed to be there and was not"
    figures = {"available_tokens": ledger.available, "lost_to_lag_tokens": lag}
    if 100 * lag > _LAG_PERCENT * ledger.available:
        return [Finding(CHECK, "red", message, _LAG, figures)]
    achieved = f"{percent(ledger.achieved, ledger.available)} of what could have been cached was"
    return [Finding(CHECK, "green", achieved, figures=figures)]

"""Which files of a shared tier are deleted when it is full, and what tenants hold there. Pure.

A file is one tenant's or nobody's, and leaves whole. A tenant holds the bytes of its files, of all nodes, in which
something counts still; what is dead in such a file is charged to it until the file is rewritten.
"""

from collections import deque
from collections.abc import Iterable, Mapping

from kvd.storage.quota import Quotas, Share, loser
from kvd.storage.shared.copies import SealedFile


def holdings(files: Iterable[SealedFile], shares: Mapping[str, Share]) -> Quotas:
    """What each tenant holds, next to its share."""
    quotas = Quotas(dict(shares))
    for file in files:
        if file.live_rows:
            quotas.charge(file.tenant, file.size)
    return quotas


def victims(
    files: Iterable[SealedFile], shares: Mapping[str, Share], asker: str, incoming_bytes: int, excess_bytes: int,
    excess_pages: int = 0,
) -> list[SealedFile] | None:  # fmt: skip
    """What to delete, the excess at least, for a file of the asker's; None when nobody may be asked for so much.

    First what counts for nothing, then the oldest files, whose `loser` says: tenants above their burst come first, an
    asker that would rise above its own takes from itself, and nobody falls below its reserve for another. A file that
    would take its tenant below is passed over, and a younger one may leave.
    """
    files = sorted(files, key=lambda file: file.age_order)
    quotas = holdings(files, shares)
    dead = deque(file for file in files if not file.live_rows)
    queues: dict[str, deque[SealedFile]] = {}
    for file in files:
        if file.live_rows:
            queues.setdefault(file.tenant, deque()).append(file)
    chosen: list[SealedFile] = []
    while excess_bytes > 0 or excess_pages > 0:
        if dead and excess_bytes > 0:
            file = dead.popleft()
        else:
            offers = {owner: head.newest for owner in queues if (head := _offer(queues[owner], quotas, asker))}
            owner = loser(quotas, asker, incoming_bytes, 0, offers)
            if owner is None:
                return None
            file = queues[owner].popleft()
            quotas.release(owner, file.size)
        chosen.append(file)
        excess_bytes -= file.size
        excess_pages -= file.live_rows
    return chosen


def _offer(queue: deque[SealedFile], quotas: Quotas, asker: str) -> SealedFile | None:
    """An owner's next file to go; what it may not lose now it may not lose later, when it holds less."""
    while queue and not quotas.may_lose(queue[0].tenant, asker, queue[0].size):
        queue.popleft()
    return queue[0] if queue else None

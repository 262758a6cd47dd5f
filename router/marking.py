"""What becomes of runs when a holder gets or loses blocks: split where holders differ, joined where they no longer do.

A holder is a bit here. Chains that several holders store and evict piece by piece stay a few runs long, because a
piece moves to the neighbour that the same holders have (`Runs.rise`, `Runs.sink`) instead of becoming a run.

Always true: what comes in is placed below the parent it named, or not at all; where it named none, below the one that
another names, before or after. A parent that is not known yet stands there, held by nobody, until it comes or its
children are gone. Nothing here is asked about room.
"""

from array import array
from collections.abc import Sequence

from kvd.router.runs import ROOT, UNKNOWN, Runs


def give(runs: Runs, bit: int, parent: int | None, blocks: "array[int]") -> tuple[int, bool]:
    """A holder has these consecutive blocks, the first below `parent` (None: nothing comes before, or it is not known
    what does).

    Returns how many of them are new for it, and whether all could be placed: the first that contradicts what is
    known, a block under two parents or before itself, ends it.
    """
    run, end = ROOT, 0  # what the next block follows: the first `end` blocks of this run
    placeholder = None
    if parent is not None:
        known = runs.get(parent)
        if known is None:
            placeholder, end = runs.start(UNKNOWN, 0, array("q", (parent,)))
            run = placeholder
        else:
            tail = runs.blocks[known]
            run, end = known, len(tail) if tail[-1] == parent else runs.offset(known, parent, len(tail)) + 1
    at, total, gained = 0, len(blocks), 0
    while at < total:
        known = runs.get(blocks[at])
        if known is None:
            run, count = _append(runs, run, end, bit, blocks[at:] if at else blocks)
            end = len(runs.blocks[run])
            gained += count
        else:
            start = _follow(runs, run, end, known, blocks[at])
            if start is None:
                break
            count = _in_common(runs.blocks[known], start, blocks, at)
            if runs.masks[known] & bit:
                run, end = known, start + count
            else:
                run, end = _mark(runs, known, start, count, bit)
                gained += count
        at += count
    if placeholder is not None and not runs.kids[placeholder]:
        runs.cut(placeholder, 1)
    return gained, at == total


def take(runs: Runs, bit: int, blocks: "array[int]") -> int:
    """A holder no longer has these blocks, whatever their order. Returns how many of them it had."""
    at, total, lost = 0, len(blocks), 0
    while at < total:
        run = runs.get(blocks[at])
        if run is None or not runs.masks[run] & bit:
            at += 1
            continue
        start = runs.offset(run, blocks[at], total - at)
        count = _in_common(runs.blocks[run], start, blocks, at)
        _unmark(runs, run, start, count, bit)
        at += count
        lost += count
    return lost


def leading(blocks: "array[int]", chain: Sequence[int], at: int) -> int:
    """How many of a run's blocks the chain has from `at` on: hashes are chained, so a later one proves the earlier."""
    low, high = 0, min(len(blocks), len(chain) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if blocks[middle - 1] == chain[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _append(runs: Runs, run: int, end: int, bit: int, blocks: "array[int]") -> tuple[int, int]:
    """New blocks after the first `end` of a run. Returns the run they are in, and how many of them were new."""
    if run >= 0 and end < len(runs.blocks[run]):
        run, _ = runs.split(run, end)
    if run < 0 or runs.kids[run] or runs.masks[run] != bit:
        return runs.start(run, bit, blocks)
    return run, runs.add(run, blocks)


def _follow(runs: Runs, run: int, end: int, known: int, block: int) -> int | None:
    """Where in the run `known` the block is that follows the first `end` of `run`; None where it cannot follow.

    Below ROOT a block is wherever it is known to be: who names no parent may not know it. And what lies below ROOT
    for that reason follows whatever is named first.
    """
    blocks = runs.blocks[known]
    if run == known:
        return end if end < len(blocks) and blocks[end] == block else None
    parent = runs.parents[known]
    if run == ROOT and parent != UNKNOWN:
        return runs.offset(known, block, len(blocks))
    if blocks[0] != block:
        return None
    if parent >= 0:
        return 0 if parent == run and end == len(runs.blocks[run]) else None
    if run >= 0 and runs.kids[known] and runs.oldest(run) == known:
        return None  # it would come before itself
    if run >= 0 and end < len(runs.blocks[run]):
        run, _ = runs.split(run, end)
    runs.attach(known, run)
    return 0


def _mark(runs: Runs, run: int, start: int, count: int, bit: int) -> tuple[int, int]:
    """A holder that has none of it gets this stretch of a run. Returns the run it is in now, and where it ends."""
    mask = runs.masks[run] | bit
    parent = runs.parents[run]
    if start:
        _, run = runs.split(run, start)
    elif parent >= 0 and runs.masks[parent] == mask and runs.kids[parent] == 1 and runs.rise(run, count):
        return parent, len(runs.blocks[parent])
    if count < len(runs.blocks[run]):
        run, _ = runs.split(run, count)
    runs.masks[run] = mask
    return run, count


def _unmark(runs: Runs, run: int, start: int, count: int, bit: int) -> None:
    """A holder loses this stretch of a run that it has."""
    if start + count < len(runs.blocks[run]):
        run, _ = runs.split(run, start + count)
    mask = runs.masks[run] & ~bit
    child = runs.only_child(run)
    if not mask and not runs.kids[run]:
        runs.cut(run, count)
    elif child is not None and runs.masks[child] == mask:
        runs.sink(run, count, child)
    else:
        if start:
            _, run = runs.split(run, start)
        runs.masks[run] = mask


def _in_common(some: "array[int]", start: int, others: "array[int]", at: int) -> int:
    """How many blocks from `start` and `at` on are the same."""
    most = min(len(some) - start, len(others) - at)
    if some[start : start + most] == others[at : at + most]:
        return most
    return next(n for n in range(most) if some[start + n] != others[at + n])

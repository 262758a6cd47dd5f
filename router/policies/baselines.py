"""What others do, as their sources define it, to compare with. Pure; chance arrives as an argument.

`random`; `round_robin`; `least_busy`, the fewest requests; `cache_aware`: SGLang's router (sgl-model-gateway,
policies/cache_aware.rs: cache_threshold 0.3, balance_abs_threshold 64, balance_rel_threshold 1.5, max_tree_size 2^26
characters); `dynamo`: NVIDIA Dynamo 1.3 to 1.6 (lib/kv-router, scheduling/selector/default.rs, its defaults);
`lmetric`: LMetric (arXiv 2603.15202), new prefill tokens times batch size, one added to each so that an idle worker's
zero does not hide the other.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from kvd.router.policies.choice import Candidate, Choice, Draw, Scored, by_cost
from kvd.router.work import Request


class Random:
    """Every worker alike."""

    name = "random"

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        return by_cost(self.name, [Scored(each, 0.0, {}) for each in candidates], lambda _: self._draw())


class RoundRobin:
    """One after the other, by name."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last = ""

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        last = self._last
        choice = by_cost(
            self.name,
            [Scored(each, 0.0, {}) for each in candidates],
            lambda each: (each.candidate.worker <= last, each.candidate.worker),
        )
        self._last = choice.worker
        return choice


class LeastBusy:
    """The fewest requests in flight; of equals the one that got something longest ago."""

    name = "least_busy"
    MOST = 1024  # workers that are remembered

    def __init__(self) -> None:
        self._choices = 0
        self._chosen: dict[str, int] = {}  # when each was chosen last, in choices

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        choice = by_cost(
            self.name,
            [Scored(each, float(each.load.requests), {"in flight": each.load.requests}) for each in candidates],
            lambda each: self._chosen.get(each.candidate.worker, 0),
        )
        self._choices += 1
        self._chosen.pop(choice.worker, None)
        self._chosen[choice.worker] = self._choices
        if len(self._chosen) > self.MOST:
            del self._chosen[next(iter(self._chosen))]
        return choice


class CacheAware:
    """A tree of what was sent where instead of events, unless load is uneven.

    Requests in flight are its load. Its tree is of characters; of blocks here, at four characters a token.
    """

    name = "cache_aware"
    THRESHOLD = 0.3
    ABSOLUTE, RELATIVE = 64, 1.5
    TREE_TOKENS = (1 << 26) // 4

    def __init__(self) -> None:
        self._trees: dict[str, OrderedDict[int, None]] = {}

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        loads = [each.load.requests for each in candidates]
        uneven = max(loads) - min(loads) > self.ABSOLUTE and max(loads) > self.RELATIVE * min(loads)
        whole = max(1, len(request.chain))
        parts = [self._matched(each.worker, request) / whole for each in candidates]
        follow = not uneven and max(parts) > self.THRESHOLD
        scored = [
            Scored(each, -part if follow else float(load), {"matched part": part, "in flight": load})
            for each, part, load in zip(candidates, parts, loads, strict=True)
        ]
        choice = by_cost(self.name, scored, lambda each: 0)  # the first of equals: sglang issue 32983
        self._insert(choice.worker, request)
        return choice

    def _matched(self, worker: str, request: Request) -> int:
        tree = self._trees.get(worker)
        return sum(1 for _ in takewhile(tree.__contains__, request.chain)) if tree is not None else 0

    def _insert(self, worker: str, request: Request) -> None:
        tree = self._trees.setdefault(worker, OrderedDict())
        for block in reversed(request.chain):  # so that leaves are the oldest
            tree[block] = None
            tree.move_to_end(block)
        while len(tree) * request.block_tokens > self.TREE_TOKENS:
            tree.popitem(last=False)


class Dynamo:
    """Blocks to prefill, less credit for those cached, plus blocks to decode with."""

    name = "dynamo"
    HOST, DISK = 0.75, 0.25

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        return by_cost(self.name, [self._score(request, each) for each in candidates], lambda _: self._draw())

    def _score(self, request: Request, each: Candidate) -> Scored:
        matched, load, block = each.matched, each.load, request.block_tokens
        host = max(0, matched.ram - matched.gpu)
        disk = max(0, max(matched.nvme, matched.shared) - max(matched.gpu, matched.ram))
        credit = (matched.gpu + self.HOST * host + self.DISK * disk) / block
        prefill = max(0.0, (load.queued.tokens + request.tokens) / block - credit)
        decode = (load.context_tokens + load.queued.tokens + request.tokens) / block
        return Scored(each, prefill + decode, {"prefill blocks": prefill, "decode blocks": decode})


class Lmetric:
    """New prefill tokens times batch size."""

    name = "lmetric"

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        return by_cost(self.name, [self._score(request, each) for each in candidates], lambda _: self._draw())

    @staticmethod
    def _score(request: Request, each: Candidate) -> Scored:
        tokens = each.load.queued.tokens + request.tokens - max(each.matched.gpu, each.matched.ram)
        batch = each.load.requests
        return Scored(each, (tokens + 1.0) * (batch + 1.0), {"new prefill tokens": tokens, "batch size": batch})

"""experiment"""
from collections.abc import Callable, Sequence
import math, os
import xxhash
from kvd.router.cost import prefix, queue_s
from kvd.router.policies.choice import Candidate, Choice, Scored, by_cost
from kvd.router.rates import Rates
from kvd.router.work import Request

X = dict(kv.split('=') for kv in os.environ.get('KX', '').split(',') if kv)

class Kvd:
    name = "kvd"
    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self.t = 0.0; self.n = 0.0; self.w = 0.0
        self.T = float(X.get('T', 30))

    def choose(self, request, candidates, now):
        N = len(candidates)
        decay = math.exp(-(now - self.t) / self.T); self.t = now
        self.n = self.n * decay + 1; self.w *= decay
        rows = []
        for each in candidates:
            r = self._rates(each.worker)
            p = prefix(request.tokens, each.matched, r)
            q = queue_s(each.load, r)
            rows.append((each, r, p, q))
        lam = self.n / self.T / N
        rho = min(self.w / self.T / N, float(X.get('cap', 0.95)))
        mean_q = sum(q for *_, q in rows) / N
        mode = X.get('mode', 'greedy'); 
        scored = []
        for each, r, p, q in rows:
            x = p.load_s + p.compute_s
            ttft = q + x
            later = 0.0
            if mode == 'own': later = lam * x * (2 * q + x) / (2 * (1 - rho))
            elif mode == 'pool': later = lam * x * (2 * mean_q + x / N) / (2 * (1 - rho))
            elif mode == 'fixed': later = float(X['k']) * x
            elif mode == 'lam': later = lam * x * float(X.get('H', 10))
            elif mode == 'mix': later = lam * x * (q + mean_q + x) / (2 * (1 - rho))
            run = each.load.running
            inter = 0.0
            if X.get('itl'):
                inter = (r.interval_s(run + 1, each.load.context_tokens + request.tokens) * (run + 1) - r.interval_s(run, each.load.context_tokens) * run) + run * x / float(X['itl'])
            scored.append(Scored(each, ttft + later + inter, dict(queue_s=q, load_s=p.load_s, compute_s=p.compute_s, later_s=later, interval_s=inter)))
        c = by_cost(self.name, scored, lambda s: (-(s.candidate.load.free_tokens or 0), -xxhash.xxh3_64_intdigest(s.candidate.worker + request.id)))
        self.w += c.winner.terms['load_s'] + c.winner.terms['compute_s']
        return c

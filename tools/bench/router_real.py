"""How soon is the first token there with real workers, by policy? And how much of the prompts was cached?

Four real SGLang workers (SmolLM2-135M on the CPU) behind one kvd and one kvd-router, asked for what a software agent
asked for: sessions of real prompts (miniswe of the shared data folder), each call with all of the text before it. Text
is cut to what the model can take: a session to LONGEST characters for its last call, the earlier ones to their part of
it. CLIENTS sessions go on at once, each call when the one before is answered. Every policy has a fresh router, empty
caches and a salt of its own; policies take turns. Four workers on two cores share the cores, so a prompt that is
computed slows down all of them: times are worse than on machines of their own, and hits matter more.

"kvd + tiers" is the default policy with kvd behind the workers' HiCache; in the other rows kvd only tells what they
hold. `ttft_vs_random`, `ttft_vs_round_robin`, `ttft_vs_cache_aware`...: mean time of theirs by that of policy kvd.
All of it takes more than half an hour.
"""

import gzip
import json
import secrets
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.sglang_fleet import World, world
from tests.sglang_node import SERVED_AS
from tools.bench._table import ROOT, Options, Samples, Table, finish, interleave, options, progress, spread
from tools.demo.node import MODEL, VENV
from tools.sglang_cpu.endpoint import Endpoint, Generation

DATA = ROOT.parent / "shared/data/agentic/miniswe.jsonl.gz"
WORKERS, CLIENTS = 4, 6
SESSIONS, QUICK_SESSIONS = 8, 6
CALLS, QUICK_CALLS = 6, 3
LONGEST = 4000  # characters, some 1,100 tokens
ANSWER_TOKENS = 8
POLICIES = ("kvd", "lmetric", "dynamo", "cache_aware", "round_robin", "random")
QUICK_POLICIES = ("kvd", "cache_aware", "random")
TIERS = "kvd + tiers"

Session = Sequence[str]


def main() -> None:
    wanted = options(__doc__)
    if not (VENV / "bin/python").exists() or not (MODEL / "model.safetensors").exists():
        sys.exit("there is no SGLang here: run `make sglang`")
    if not DATA.exists():
        sys.exit("the agent's prompts are missing: there is no shared data folder")
    policies = QUICK_POLICIES if wanted.quick else POLICIES
    work = sessions(QUICK_SESSIONS if wanted.quick else SESSIONS, QUICK_CALLS if wanted.quick else CALLS)
    progress(f"starting {WORKERS} workers")
    with world(WORKERS, attached=False) as made:
        cases = [partial(_case, made, work, policy) for policy in policies]
        if not wanted.quick:
            cases.append(partial(_case, made, work, TIERS))
        samples = interleave(cases, wanted.rounds(1, 3), warm_up=0)
    _report(samples, (*policies, *(() if wanted.quick else (TIERS,))), wanted)


def sessions(count: int, calls: int) -> list[Session]:
    """Prompts of each session, each one the beginning of the next."""
    found: dict[str, list[str]] = {}
    with gzip.open(DATA, "rt") as lines:
        for line in lines:
            call = json.loads(line)
            found.setdefault(call["session_id"], []).append(call["input"])
    cut = [session[:calls] for session in found.values()][:count]
    return [[call[: LONGEST * len(call) // len(session[-1])] for call in session] for session in cut]


def _case(made: World, work: Sequence[Session], policy: str, number: int) -> Mapping[str, float]:
    progress(f"round {number}: {policy}")
    salt = secrets.token_hex(8)
    if policy == TIERS:
        made.attach()
    try:
        made.flush()
        with made.start_router(routing__policy=policy.split()[0]) as router, ThreadPoolExecutor(CLIENTS) as clients:
            door = Endpoint(router.port, "", SERVED_AS)
            answers = [each for session in clients.map(partial(_asked, door, salt), work) for each in session]
    finally:
        if policy == TIERS:
            made.flush()
            made.detach()
    times = sorted(answer.ttft_s for answer in answers)
    return {
        f"{policy} mean": statistics.mean(times), f"{policy} p90": times[len(times) * 9 // 10],
        f"{policy} hit": sum(each.cached.total for each in answers) / sum(each.prompt_tokens for each in answers),
    }  # fmt: skip


def _asked(door: Endpoint, salt: str, session: Session) -> list[Generation]:
    return [door.generate(text=prompt, max_new_tokens=ANSWER_TOKENS, cache_salt=salt) for prompt in session]


def _report(samples: Samples, policies: Sequence[str], wanted: Options) -> None:
    table = Table(
        f"Seconds to the first token, {WORKERS} workers, {CLIENTS} sessions at once: median (min..max) of the rounds",
        ("policy", "mean", "p90", "cached", "mean / kvd's"),
    )
    for policy in policies:
        ratio = samples.ratio(f"{policy} mean", "kvd mean")
        table.add(
            policy, *(spread(samples.rounds.get(f"{policy} {what}")) for what in ("mean", "p90", "hit")),
            "" if ratio is None else f"{ratio:.2f}",
        )  # fmt: skip
    ratios = {f"ttft_vs_{other}": samples.ratio(f"{other} mean", "kvd mean") for other in policies if other != "kvd"}
    finish("router_real", table, wanted, ratios, samples.rounds)


if __name__ == "__main__":
    main()

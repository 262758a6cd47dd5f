"""kvdctl explain as an operator runs it: after lookups that met pages on a disk, and before any."""

import json
from pathlib import Path

from kvd import wire
from tests.harness import Daemon, eventually
from tests.kvdctl import PAGE, RawWorker, on
from tests.test_nvme_node import ready, reboot, two_tiers, written


def lookup(worker: RawWorker, keys: list[bytes]) -> int:
    with worker.channels.lend() as channel:
        return channel.ask(lambda n: wire.Lookup(n, 0, b"".join(keys), 5.0), wire.Found, 5.0).pages


def test_a_decision_and_what_it_was_made_from(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as daemon:
        ready(daemon)
        assert "no worker asked for a page that only nvme holds" in on(daemon, "explain").stdout
        with RawWorker(daemon) as worker:
            first, second = worker.put(20), worker.put(10, first=5000)
            written(daemon, 30)
        reboot(daemon)
        with RawWorker(daemon, "model rank 0/1") as worker:
            assert lookup(worker, first) == 20, "a worker that has computed nothing yet gets what can be here in time"
            eventually(lambda: daemon.status().counters.get("pages_promoted") == 20, 10)
            worker.report("closed", prefill_ns_per_token=1)
            assert lookup(worker, second) == 0, "nothing is as fast as this worker says it computes"
            document = json.loads(on(daemon, "explain", "--json").stdout)
            table = on(daemon, "explain").stdout
            newest = json.loads(on(daemon, "explain", "--json", "--last", "1").stdout)
    later, sooner = document["decisions"]
    assert (document["total"], document["tiers"]) == (2, ["nvme"])
    assert newest["decisions"][0]["reason"] == later["reason"]
    assert (sooner["wanted"], sooner["pages"], sooner["reason"]) == (20, 20, "speed unknown")
    assert (later["wanted"], later["pages"], later["reason"]) == (10, 0, "slower")
    assert sooner["tier_bytes_per_s"] > 0, "the tier was measured before anybody used it"
    assert (sooner["tier_bytes_queued"], sooner["prefill_tokens_per_s"]) == (0, 0)
    assert later["tier_bytes_per_s"] > 20 * PAGE / 5
    assert (later["worker"], later["pool"], later["tier"]) == ("model rank 0/1", "kv", "nvme")
    assert round(later["prefill_tokens_per_s"]) == 1_000_000_000
    assert (later["page_bytes"], later["page_tokens"]) == (PAGE, 16)
    assert f"/s = {later['tier_bytes_per_s'] / PAGE * 16:,.0f} tokens/s" in table
    assert sooner["age_s"] >= later["age_s"] >= 0
    assert "loading takes longer than computing" in table
    assert "1,000,000,000 tokens/s" in table
    assert "how fast this worker computes is not known yet" in table


def test_without_a_lower_tier_there_is_nothing_to_explain(shared: Daemon) -> None:
    assert "no tier below memory" in on(shared, "explain").stdout
    assert json.loads(on(shared, "explain", "--json").stdout) == {"decisions": [], "total": 0, "tiers": []}

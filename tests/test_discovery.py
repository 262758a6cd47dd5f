"""Where a worker publishes, from its /server_info: every rank's address, wildcards replaced, nonsense refused."""

import json

import pytest

from kvd.daemon.discovery import Address, addresses, server_info
from kvd.errors import PeerError, Unavailable

URL = "http://10.0.0.7:30000"
INFO = {
    "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "kv-events", "block_size": 64,
    "dp_size": 2, "replay_endpoint_port_base": 5657, "load_topic": "load",
}  # fmt: skip


def found(url: str = URL, **changed: object) -> list[Address]:
    return addresses(url, json.dumps({"version": "0.5.23", "kv_events": {**INFO, **changed}}).encode())


def test_every_rank_has_its_address() -> None:
    assert found() == [
        Address(0, "tcp://10.0.0.7:5557", "tcp://10.0.0.7:5657", "kv-events", 64),
        Address(1, "tcp://10.0.0.7:5558", "tcp://10.0.0.7:5658", "kv-events", 64),
    ]


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "::", ""])
def test_a_wildcard_is_the_workers_host(host: str) -> None:
    assert found(endpoint_host=host)[0].events == "tcp://10.0.0.7:5557"
    assert found("http://[fd00::1]:30000", endpoint_host=host)[0].events == "tcp://[fd00::1]:5557"


def test_a_named_host_is_kept_and_replay_is_optional() -> None:
    (one, _) = found(endpoint_host="10.9.9.9", replay_endpoint_port_base=None)
    assert (one.events, one.replay) == ("tcp://10.9.9.9:5557", None)


@pytest.mark.parametrize(
    "wrong", [{"dp_size": 0}, {"dp_size": 10**9}, {"endpoint_port_base": 65535}, {"endpoint_port_base": "x"}]
)
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PeerError) as caught:
        found(**wrong)
    assert caught.value.hint


def test_a_worker_without_events_is_told_from_one_that_is_no_worker() -> None:
    with pytest.raises(PeerError, match="publishes no KV events") as caught:
        addresses(URL, b'{"kv_events": null}')
    assert "--kv-events-config" in caught.value.hint
    for noise in (b"", b"<html>", b"[]"):
        with pytest.raises(PeerError, match="not understood"):
            addresses(URL, noise)


def test_a_worker_that_is_not_there_is_unavailable() -> None:
    for url in ("http://127.0.0.1:1", "http://", "ftp://127.0.0.1:1"):
        with pytest.raises(Unavailable):
            server_info(url, 1.0)

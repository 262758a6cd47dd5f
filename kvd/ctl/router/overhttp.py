"""One request to a router over HTTP, and what can go wrong on the way, in words that an operator can act on."""

import http.client
import ssl
from contextlib import closing
from typing import Final
from urllib.parse import urlsplit

from kvd.errors import DeadlineMissed, PeerError, Unavailable

_MOST_BYTES: Final = 64 << 20


def exchange(url: str, method: str, target: str, body: bytes, key: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the answer. On a connection of its own; waits `timeout_s` at most for each byte.

    Raises Unavailable, DeadlineMissed where it is silent, and PeerError for what is no HTTP.
    """
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with closing(_connection(url, timeout_s)) as connection:
            connection.request(method, target, body or None, headers)
            reply = connection.getresponse()
            said = reply.read(_MOST_BYTES + 1)
    except TimeoutError as error:
        raise DeadlineMissed(
            f"the router at {url} did not answer within {timeout_s:g} s",
            "is its machine up, and is the process starved of CPU? look at its log",
        ) from error
    except OSError as error:
        where = "start it with `kvd-router`, or say where it is: --router URL or KVD_ROUTER_URL"
        raise Unavailable(f"no router at {url}: {error.strerror or error}", where) from error
    except (http.client.HTTPException, ValueError) as error:
        raise PeerError(f"what answers at {url} does not speak HTTP: {error!r}", "check the URL") from error
    if len(said) > _MOST_BYTES:
        raise PeerError(f"what answers at {url} is no kvd-router: it does not stop", "check the URL")
    return reply.status, said


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname, "checked by who made the link"
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)

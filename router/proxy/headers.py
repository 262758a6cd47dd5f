"""Heads that we write: a request's for the worker, a response's for the client. Pure.

What is meant for one connection alone stays on it (RFC 9110, 7.6.1); how long a body is we say ourselves, once.
"""

from collections.abc import Iterable
from http import HTTPStatus

from kvd.router.proxy.strict import Head

_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te"}
    | {b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
)
# Ours to say, or addressed to us.
_NOT_FORWARDED = _HOP | {b"host", b"expect", b"x-kvd-request-id", b"x-kvd-timeout-s", b"x-kvd-worker"}
_NOT_FORWARDED_NOR_SECRET = _NOT_FORWARDED | {b"authorization", b"x-api-key"}
_NOT_RETURNED = _HOP | {b"x-kvd-request-id"}
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})  # a length is said even if it is 0
_STATUS = {one.value: b"HTTP/1.1 %d %b\r\n" % (one, one.phrase.encode()) for one in HTTPStatus}
Fields = Iterable[tuple[bytes, bytes]]


def request_head(
    head: Head, host: bytes, length: int, request_id: bytes, own_keys: bool, key: bytes | None = None
) -> bytes:
    """What the worker at `host` gets before `length` bytes of body.

    `own_keys`: the client's key was for us and stays here. `key`: the worker's own. Both are the same for all requests
    of a router: what is passed on of this head is written once, and kept with it.
    """
    passed_on = head.passed_on = head.passed_on or _passed_on(head, own_keys, key)
    if length or head.method in _WITH_BODY:
        return b"%bcontent-length: %d\r\nhost: %b\r\nx-kvd-request-id: %b\r\n\r\n" % (
            passed_on,
            length,
            host,
            request_id,
        )
    return b"%bhost: %b\r\nx-kvd-request-id: %b\r\n\r\n" % (passed_on, host, request_id)


def _passed_on(head: Head, own_keys: bool, key: bytes | None) -> bytes:
    drop = _NOT_FORWARDED_NOR_SECRET if own_keys or key is not None else _NOT_FORWARDED
    if head.nominated:
        drop |= head.nominated
    lines = [b"%b %b HTTP/1.1\r\n" % (head.method.encode(), head.target)]
    lines += [b"%b: %b\r\n" % pair for pair in head.fields if pair[0] not in drop]
    if key is not None:
        lines.append(b"authorization: Bearer %b\r\n" % key)
    return b"".join(lines)


def response_head(
    status: int, fields: Fields, request_id: bytes, length: int | None, chunked: bool, connection: bytes = b""
) -> bytes:
    """What the client gets first. `length` None and not `chunked`: no body, or one that ends with the connection.

    `connection`: what becomes of it, where that goes without saying b"".
    """
    lines = [_STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status]
    lines += [b"%b: %b\r\n" % pair for pair in fields if pair[0] not in _NOT_RETURNED]
    lines.append(b"x-kvd-request-id: %b\r\n" % request_id)
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    lines.append(b"connection: %b\r\n\r\n" % connection if connection else b"\r\n")
    return b"".join(lines)


def framed(body: bytes) -> bytes:
    """One chunk; nothing for no bytes, because an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(body), body) if body else b""


LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

"""What one client gets of an answer, from however many workers it comes: a head, a body in the way it said, an end.

Whatever goes wrong is told in the way that is left: a status, an event of the stream's own protocol, or a connection
that is cut. Where the answer comes from is kvd.router.proxy.exchange's business.
"""

from typing import TYPE_CHECKING

from kvd.router.proxy.answers import JSON, Answer
from kvd.router.proxy.endpoints import Endpoint, error_body, error_event
from kvd.router.proxy.headers import Fields
from kvd.router.proxy.streamed import Streamed
from kvd.router.proxy.strict import Head

if TYPE_CHECKING:
    from kvd.router.proxy.client import Client


class Relay:
    """One answer, to the request with this head."""

    __slots__ = ("_answer", "_client", "_done", "_endpoint", "_path", "stream")

    def __init__(self, client: "Client", head: Head, endpoint: Endpoint, request_id: bytes, keep: bool) -> None:
        self._client = client
        self._endpoint = endpoint
        self._path = head.path
        self._answer = Answer(head, request_id, keep)
        self._done = False  # the client has all that it will get
        self.stream: Streamed | None = None  # it is one of events, which may be continued

    @property
    def started(self) -> bool:
        """The client has its head."""
        return self._answer.started

    def begin(self, status: int, fields: Fields, length: int | None, known: int | None) -> bytes:
        """The head, still to be written. `known`: how long the body is, where it is whole already: then it needs no
        chunks, unless it is a stream."""
        events, coded = False, False
        for name, value in fields:
            if name == b"content-type":
                events = value.startswith(b"text/event-stream")
            elif name == b"content-encoding":
                coded = True
        if events and not coded and length is None:
            self.stream = Streamed(self._endpoint.stream if status == 200 else "")
        elif known is not None:
            length = known
        return self._answer.begin(status, fields, length)

    def more(self, begun: bytes, body: bytes, whole: bool) -> None:
        """This head and more of the body. Raises CannotContinue: see Streamed.take."""
        if self.stream is not None:
            body = self.stream.take(body, whole)
        out = begun + self._answer.body(body) if begun else self._answer.body(body)
        if whole:
            self._complete(out)
        elif out:
            self._client.write(out)

    def complete(self, body: bytes) -> None:
        """These are the last bytes of the body."""
        self._complete(self._answer.body(body))

    def fail(self, status: int, why: str, retry_after_s: float | None = None) -> None:
        """It ends here. A no-op for one that has ended."""
        if self._done:
            return
        answer = self._answer
        if not answer.started:
            self._done = True
            fields = [JSON]
            if retry_after_s is not None:
                fields.append((b"retry-after", b"%d" % max(1, round(retry_after_s))))
            self._client.write(answer.whole(status, error_body(self._endpoint.dialect, status, why), fields))
            self._client.done(answer.keep)
        elif self.stream is not None and not self.stream.inside:
            self.complete(error_event(self._path, status, why))
        else:
            self._client.cut()

    def _complete(self, out: bytes) -> None:
        self._done = True
        self._client.write(out + self._answer.end())
        self._client.done(self._answer.keep)

"""One event stream on its way to a client, from as many workers as it takes. Pure.

Events pass as they came, each as soon as it is whole. Where the stream's shape is known (see kvd.router.continuation)
what was said is remembered, so that another worker can say the rest.
"""

from typing import Any

from kvd.router.continuation import CannotContinue, Splice, needs_count, rest_of
from kvd.router.proxy.endpoints import Stream
from kvd.router.proxy.events import WholeEvents
from kvd.router.transcript import Transcript


class Streamed:
    """What passed of it, and what may follow."""

    __slots__ = ("_events", "_splice", "_transcript")

    def __init__(self, stream: Stream) -> None:
        """`stream` "": it cannot be continued."""
        self._events = WholeEvents()
        self._transcript = Transcript(stream) if stream else None
        self._splice: Splice | None = None

    @property
    def inside(self) -> bool:
        """The client has a piece of an event that is not whole."""
        return self._events.inside

    def take(self, body: bytes, whole: bool) -> bytes:
        """What the client may have of it now. `whole`: the worker has no more.

        Raises CannotContinue where the rest of a stream is not to be had in whole events, or not to be understood; the
        client then has no piece of one.
        """
        body = self._events.rest(body) if whole else self._events.take(body)
        if self._splice is not None:
            if self._events.inside:  # a piece of an event cannot be translated
                self._events = WholeEvents()
                raise CannotContinue("an event of the rest is too long")
            body = self._splice.translate(body, whole)
        if body and self._transcript is not None:
            self._transcript.feed(body)
        return body

    def cut(self) -> Transcript:
        """The worker left. What was said until then; raises CannotContinue where that is no use."""
        self._events.drop()
        if self._transcript is None or self._events.inside:
            raise CannotContinue("this kind of answer cannot be continued")
        return self._transcript

    def ending(self, request: Any) -> bytes | None:
        """What is missing of a stream whose text is complete; None when text is missing. Raises CannotContinue."""
        return self.cut().ending(request)

    def go_on(self, request: Any, counted: int | None) -> dict[str, Any]:
        """The request for the rest; what comes from now on answers it. `counted`: see kvd.router.continuation.

        Raises CannotContinue.
        """
        so_far = self.cut()
        rest = rest_of(request, so_far, counted)
        self._splice = Splice(so_far, counted)
        return rest

    def must_count(self, request: Any) -> str | None:
        """The text whose tokens must be known before `go_on`, if any. Raises CannotContinue."""
        so_far = self.cut()
        return so_far.text if needs_count(request, so_far) else None

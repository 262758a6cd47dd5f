"""What an answer says of itself as it passes: when it began, how long it is, how much of its prompt was cached. Pure.

Nothing is decoded: events are counted by how they begin, figures are looked for by their names. In SGLang 0.5.23:

    cached     "cached_tokens": /generate's meta_info, in every event; OpenAI's usage, with --enable-cache-report and,
               in a stream, where the client asks for usage. "cache_read_input_tokens": Anthropic's, if there are any
    answer     "completion_tokens", "output_tokens": in the same places; without them, the number of events, which is
               right while the worker sends every token by itself

A name in a text that a model wrote has its quotes escaped there, so it is not mistaken. The last figure counts: one
that was cut between two pieces of the answer is found twice, and is whole the second time. An event that was cut
within its first bytes is not counted.
"""

import re
from typing import Final

_EVENT: Final = b"data: {"
_LINE: Final = b"\n" + _EVENT  # no text that a model wrote has a bare line end in it
_FIGURES: Final = re.compile(
    rb'"(?:(cached_tokens|cache_read_input_tokens)|completion_tokens|output_tokens)"\s*:\s*(\d{1,12})'
)
_SOME: Final = b'_tokens"'
_KEPT: Final = 64  # bytes: a name with its figure
# Where a stream has events before its first token: what only later ones have.
_FIRST: Final = {"/v1/responses": b".delta"}


class Usage:
    """One answer. None is: not said, or not yet."""

    __slots__ = ("_kept", "_mark", "_written", "began", "cached", "events")

    def __init__(self, path: str) -> None:
        self.began = False  # its first token is there; what is no stream never says
        self.events = 0
        self.cached: int | None = None
        self._written: int | None = None
        self._mark = _FIRST.get(path, _EVENT)
        self._kept = b""

    @property
    def tokens(self) -> int | None:
        """Of the answer, so far."""
        return self._written if self._written is not None else self.events or None

    def heard(self, received: bytes) -> int:
        """More of the body; how many events began in it since the first token."""
        data = self._kept + received if self._kept else received
        if _SOME in data:
            self._figures(data)
        # Whole events: nothing that is cut. It costs a stream nothing to remember.
        self._kept = b"" if received.endswith(b"\n") else data[-_KEPT:]
        if not self.began:
            if self._mark not in data:
                return 0
            received = data
        events = received.count(_LINE) + received.startswith(_EVENT)
        if events:
            self.began = True
            self.events += events
        return events

    def _figures(self, data: bytes) -> None:
        for cached, figure in _FIGURES.findall(data):
            if cached:
                self.cached = int(figure)
            else:
                self._written = int(figure)

"""Server-sent events, kept whole: a stream may be cut between two events, and never inside one. Pure.

An event ends with an empty line. Its bytes pass unchanged and as soon as that line is there; until then no client can
make anything of it, so nobody waits longer.
"""

_MOST = 1 << 20  # bytes of one event; a longer one passes in pieces


class WholeEvents:
    """One stream, as it arrives."""

    def __init__(self) -> None:
        self._held = b""
        self.inside = False  # what passed ends within an event

    def take(self, data: bytes) -> bytes:
        """What is whole by now."""
        if self._held:
            data = self._held + data
        if data.endswith(b"\n\n"):  # nearly always
            self._held, self.inside = b"", False
            return data
        end = max(_after(data, b"\n\n"), _after(data, b"\r\n\r\n"))
        if not end and len(data) > _MOST:
            self._held, self.inside = b"", True
            return data
        self._held = data[end:]
        if end:
            self.inside = False
        return data[:end]

    def rest(self, data: bytes) -> bytes:
        """The last bytes of a stream that ended by itself."""
        held, self._held = self._held, b""
        return held + data

    def drop(self) -> None:
        """Forget the piece of an event that never became whole."""
        self._held = b""


def _after(data: bytes, line_ends: bytes) -> int:
    """Where the last of them ends; 0 where there are none."""
    at = data.rfind(line_ends)
    return at + len(line_ends) if at >= 0 else 0

"""Everything kvd raises on purpose. Each error says whose doing it was and what to do about it.

A miss is not here: a miss is a value, because a worker can always recompute.

    KvdError (message, hint)
    |- SettingsError    the operator's file or environment is wrong   exit 78; systemd does not retry
    |- AlreadyRunning   another kvd owns this run directory            exit 1
    |- Unavailable      no daemon answers there                        try again later
    |  `- DeadlineMissed it is there, but did not answer in time       trip the circuit
    |- PeerError        the other side broke the rules                 close that peer, and only that peer
    |  `- VersionSkew   it speaks another protocol version             upgrade one of the two
    |- Refused          the daemon understood and said no              do what the hint says
    `- Unsupported      this worker's set-up cannot be cached safely   plugin stays off, loudly
"""

from typing import Final

# What decoding somebody else's bytes raises: msgspec's own errors, which are ValueErrors, and what it lets through, of
# text that is none (UnicodeDecodeError, a ValueError too), of figures that are too large, of deep nesting. Where only
# DecodeError was caught, one such message ended the process.
UNDECODABLE: Final = (ValueError, OverflowError, RecursionError)


class KvdError(Exception):
    """Base of all. `hint` is one line an operator can act on; it may be empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SettingsError(KvdError):
    """A setting is unknown, malformed or contradicts another."""


class AlreadyRunning(KvdError):
    """The run directory or the arena belongs to a living daemon."""


class Unavailable(KvdError):
    """No daemon is reachable at the given socket."""


class DeadlineMissed(Unavailable):
    """The daemon did not answer within the caller's deadline."""


class PeerError(KvdError):
    """The peer sent something that the protocol does not allow."""


class VersionSkew(PeerError):
    """The peer speaks a protocol version that this build does not."""


class Refused(KvdError):
    """The daemon answered a well-formed request with a no."""


class Unsupported(KvdError):
    """The worker's configuration cannot be cached without risking wrong bytes."""

"""Does a worker answer as it should? From its own /health, and from how it answers what it is asked each second. Pure.

    /health    SGLang has the scheduler take a request, of one token where it has none; 503 while it starts, while it
               shuts down, and where nothing came of that for 20 s. (sglang 0.5.23, entrypoints/http_server.py: the
               very same as /health_generate, unless SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=0.)
    questions  answered by the HTTP process alone, in milliseconds: three in a row without an answer are one too many

Who was never heard of is well: only what a worker does counts against it. /health says well with 200 alone. SGLang has
it in all releases, and asks no key there: where it is 404 or 401 something else answers, which would be quick at it.
"""

from dataclasses import dataclass
from typing import Final

MISSES: Final = 3


@dataclass(slots=True)
class Health:
    """`why`: "" while it is well. `in_doubt`: the last question had no answer, so it may have been started anew."""

    why: str = ""
    in_doubt: bool = False
    _misses: int = 0

    def health(self, status: int) -> None:
        """/health was answered."""
        self.why = "" if status == 200 else f"its /health says {status}"
        if status == 503:
            self.why += ": it starts, shuts down, or its scheduler hangs"

    def no_health(self, failure: str) -> None:
        """/health was not answered."""
        self.why, self.in_doubt = failure, True

    def answered(self) -> None:
        """Anything was, or /health."""
        self._misses, self.in_doubt = 0, False

    def missed(self, failure: str) -> None:
        """A question was not answered. Only /health makes the worker well again."""
        self._misses, self.in_doubt = self._misses + 1, True
        if self._misses >= MISSES and not self.why:
            self.why = failure

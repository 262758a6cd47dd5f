"""Why a request has no tokens here, and what besides them names its blocks. Pure.

No tokens is a value: the request is routed without prefix credit, and counted under its reason. `NoTokens` travels
inside this package only; `kvd.router.tokens.requests` turns it into a value at the edge.
"""

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    """Why a request has no tokens here. Few and fixed: each is a metric's label."""

    MULTIMODAL = "multimodal"  # images, video, audio: the worker's processor decides how many tokens they are
    EMBEDS = "embeds"  # the request brings embeddings instead of tokens
    STATE = "state"  # it goes on from something that only the worker has
    ENDPOINT = "endpoint"  # not a path that has a prompt
    TEMPLATE = "template"  # this model's prompts are not made by a Jinja chat template
    UNSUPPORTED = "unsupported"  # a feature whose tokens are not known here
    INVALID = "invalid"  # the worker will refuse the request
    ADAPTER = "adapter"  # a LoRA adapter whose id the worker has not told


class NoTokens(Exception):
    """Raised inside this package; `why` is counted, `detail` is for people."""

    def __init__(self, why: Why, detail: str) -> None:
        super().__init__(detail)
        self.why = why
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Namespace:
    """What besides the tokens decides which blocks a prompt may use. Empty strings are None, as in SGLang."""

    cache_salt: str | None = None
    extra_key: str | None = None  # the caller's own, without the adapter
    adapter: str | None = None  # the LoRA adapter's name

    @property
    def plain(self) -> bool:
        return self.cache_salt is None and self.extra_key is None and self.adapter is None


PLAIN = Namespace()

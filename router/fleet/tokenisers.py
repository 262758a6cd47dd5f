"""One tokeniser for all workers that make prompts alike; one manner for those that also name blocks alike.

A tokeniser takes about a second to open, in a thread, and half a gigabyte at most; there are no more than MOST of
them. One that no worker needs is let go; requests that still have it end with it as it was.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvd.errors import SettingsError
from kvd.router.fleet.folders import find
from kvd.router.fleet.told import Told
from kvd.router.knowledge import Manner
from kvd.router.tokens.requests import Tokeniser

MOST: Final = 8

_Key = tuple[Path, str]


class Tokenisers:
    """`model_path`: where the tokenizer is, whatever workers say; None: where they say."""

    def __init__(self, model_path: Path | None) -> None:
        self._model_path = model_path
        self._open: dict[_Key, Tokeniser] = {}
        self._manners: list[Manner] = []
        self._opening = asyncio.Lock()

    async def manner(self, told: Told, used: Callable[[], Collection[Manner]]) -> Manner:
        """How this worker makes prompts. `used`: what workers have now. Raises SettingsError where it is not known."""
        async with self._opening:
            folder = await asyncio.to_thread(find, told, self._model_path)
            key = (folder, repr(replace(told.serving, adapters={})))  # which change blocks' names, not prompts
            self._forget(used())
            if key not in self._open:
                if len(self._open) >= MOST:
                    raise SettingsError(
                        f"workers make prompts in more than {MOST} ways", "give different models a router each"
                    )
                self._open[key] = await asyncio.to_thread(_opened, folder, told)
            tokeniser, scheme = self._open[key], told.scheme
            for manner in self._manners:
                if manner.tokeniser is tokeniser and manner.scheme == scheme:
                    return manner
            self._manners.append(Manner(tokeniser, scheme))
            return self._manners[-1]

    def _forget(self, used: Collection[Manner]) -> None:
        self._manners = [manner for manner in self._manners if manner in used]
        needed = {id(manner.tokeniser) for manner in used}
        self._open = {key: tokeniser for key, tokeniser in self._open.items() if id(tokeniser) in needed}

    def close(self) -> None:
        """Waits for what is being encoded."""
        for tokeniser in self._open.values():
            tokeniser.close()
        self._open.clear()


def _opened(folder: Path, told: Told) -> Tokeniser:
    try:
        return Tokeniser.open(folder, told.serving)
    except SettingsError:
        raise
    except Exception as error:  # of the libraries that read such files, whatever is in them
        raise SettingsError(
            f"the tokenizer or the template in {folder} cannot be read: {error}", "fetch the model's folder again"
        ) from error

"""The workers of this node whose KV events are followed: found by their URLs, followed rank by rank.

A worker that does not answer, or publishes nothing, is asked again; one whose connection broke is asked where it
publishes now. What it held is forgotten only when it is known to be gone: by another life, or other addresses.
"""

import asyncio
import logging
from collections.abc import Sequence

from kvd.daemon.discovery import Address, addresses, identity, server_info
from kvd.daemon.publisher import Context, Publisher, Say
from kvd.errors import KvdError
from kvd.sglang_events import Cleared

log = logging.getLogger("kvd.events")

_ASK_S, _ASK_AGAIN_S = 2.0, 2.0


class Workers:
    """`publishers`: of all workers that were found; `names`: kvd.sglang_info's, by the URLs of those that answered.

    `follow` is a job; `close` ends what it opened.
    """

    def __init__(self, context: Context, urls: Sequence[str], most_blocks: int, say: Say) -> None:
        self._context = context
        self._urls = [url.rstrip("/") for url in urls]
        self._most_blocks = most_blocks
        self._say = say
        self.names: dict[str, str] = {}
        self._found: dict[str, list[Publisher]] = {}
        self._trouble: dict[str, str] = {}

    @property
    def publishers(self) -> list[Publisher]:
        return [publisher for found in self._found.values() for publisher in found]

    async def follow(self) -> None:
        """Find the workers, and find them again when their connections break. Ends when it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for url in self._urls:
                group.create_task(self._follow_one(url), name=f"follow {url}")

    def tick(self, now: float) -> None:
        for publisher in self.publishers:
            publisher.tick(now)

    def close(self) -> None:
        for publisher in self.publishers:
            publisher.close()
        self._found.clear()

    async def _follow_one(self, url: str) -> None:
        while True:
            found = self._found.get(url)
            if found is None or any(publisher.broke for publisher in found):
                try:
                    info = await asyncio.to_thread(server_info, url, _ASK_S)
                    known = identity(info)
                    self.names[url] = known.server
                    self._adopt(url, addresses(url, info), known.life)
                    self._trouble.pop(url, None)
                except KvdError as error:
                    if self._trouble.get(url) != str(error):
                        log.warning("no KV events of %s: %s", url, error)
                    self._trouble[url] = str(error)
            await asyncio.sleep(_ASK_AGAIN_S)

    def _adopt(self, url: str, now: list[Address], life: str) -> None:
        before = self._found.get(url, [])
        for publisher in before:
            publisher.broke = False
        if [publisher.at for publisher in before] == now:
            for publisher in before:
                publisher.lives(life)
            return
        for publisher in before:
            publisher.close()
            self._say(publisher.source, [Cleared()], "the worker's events come from elsewhere now")
        self._found[url] = [Publisher(self._context, url, at, self._most_blocks, self._say, life) for at in now]
        log.info("following the KV events of %s, %d ranks", url, len(now))

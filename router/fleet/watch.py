"""Watches one worker: asks what it is, whether it makes the same tokens, what it has to do, and whether it is well.

Four jobs, each with its own pace and each bounded by deadlines; what a worker does ends none of them. A worker that
was silent is asked anew what it is as soon as it answers, since it may have been started again; the others are asked
from time to time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from kvd.errors import KvdError, PeerError
from kvd.router.asking import Asker
from kvd.router.fleet.health import Health
from kvd.router.fleet.loads import PATH as LOADS
from kvd.router.fleet.loads import report
from kvd.router.fleet.told import Told
from kvd.router.knowledge import Manner
from kvd.router.load import Report
from kvd.router.steering import Worker
from kvd.router.tokens.parity import Verdict
from kvd.router.tokens.probe import Probe

log = logging.getLogger("kvd.router")

MOST_BYTES: Final = 4 << 20  # of an answer; a /server_info has some 100 KB
INFO_S: Final = 15.0  # to answer /server_info: it asks the scheduler, which may be in the middle of a long step
ASK_EVERY_S: Final = 120.0
_BACKOFF_S: Final = (1.0, 30.0)
LOADS_EVERY_S, LOADS_S = 1.0, 2.0
_NO_LOADS_S: Final = 60.0  # older releases have no such page
HEALTH_EVERY_S, HEALTH_S = 5.0, 25.0  # SGLang itself takes up to 20 s
_NOT_ASKED = "it was not asked yet"

Open = Callable[[Told], Awaitable[Manner]]  # raises SettingsError


class Watch:
    """`told`: what the worker is, None until it said so. `run` is a job; `close` ends what it opened.

    `reported` hears its load, `changed` that something else became known of it.
    """

    def __init__(
        self, worker: Worker, key: bytes | None, manner_of: Open, reported: Callable[[Report], None],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.worker = worker
        self.told: Told | None = None
        self.health = Health()
        self.manner: Manner | None = None  # that would be credited if the worker makes the same tokens
        self.asked = False  # what it is; whether or not it said so
        self.heard_at = -1e9  # the last answer to anything
        self._why, self._remedy = _NOT_ASKED, ""
        self._asker = Asker(worker, key, MOST_BYTES)
        self._manner_of = manner_of
        self._reported = reported
        self._changed = changed
        self._probe: Probe | None = None
        self._proving: asyncio.Task[None] | None = None
        self._ask = asyncio.Event()  # it may be another one by now
        self._doubted = ""
        self._loop = asyncio.get_running_loop()

    @property
    def credited(self) -> Manner | None:
        """Its manner, while its tokens are known to be ours."""
        return self.manner if self.verdict().credit else None

    def verdict(self) -> Verdict:
        """On its tokens."""
        if self._probe is None:
            return Verdict("unknown", self._why, remedy=self._remedy)
        return self._probe.verdict()

    def doubt(self, life: str) -> None:
        """A node tells of this life at its address, "" where none does: another one means that it was started anew."""
        if life and self.told is not None and life not in (self.told.life, self._doubted):
            self._doubted = life
            self._ask.set()

    async def run(self) -> None:
        """Ends when it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name=f"loads of {self.worker.name}")
            group.create_task(self._look_after(), name=f"health of {self.worker.name}")
            await self._learn(group)

    def close(self) -> None:
        self._asker.close()

    # What it is

    async def _learn(self, group: asyncio.TaskGroup) -> None:
        wait_s = _BACKOFF_S[0]
        while True:
            self._ask.clear()
            try:
                told = Told.of(await self._asker.ask("GET", "/server_info", within_s=INFO_S))
                self._heard()
                if told != self.told or self._probe is None:
                    await self._meet(told, group)
                wait_s = _BACKOFF_S[0]
                pause_s = ASK_EVERY_S
            except KvdError as error:
                if self.told is None or self._probe is None:
                    self._unknown(error)
                pause_s, wait_s = wait_s, min(2 * wait_s, _BACKOFF_S[1])
            if not self.asked:
                self.asked = True
                self._changed()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ask.wait(), pause_s)

    async def _meet(self, told: Told, group: asyncio.TaskGroup) -> None:
        """Raises SettingsError where its prompts cannot be made here."""
        if self.told is not None and told.life != self.told.life:
            log.info("%s was started anew", self.worker.name)
        self.told = told
        self._forget_tokens()
        if told.no_blocks:
            self._why, self._remedy = told.no_blocks, ""
        else:
            self._changed()
            self.manner = await self._manner_of(told)
            self._probe = Probe(self._asker, self.manner.tokeniser, self._loop.time)
            self._proving = group.create_task(self._probe.keep(self._proved), name=f"parity of {self.worker.name}")
        self._changed()

    def _forget_tokens(self) -> None:
        if self._proving is not None:
            self._proving.cancel()
        self._proving = self._probe = self.manner = None

    def _unknown(self, error: KvdError) -> None:
        if self._why != error.message:
            log.warning("%s gets no prefix credit: %s", self.worker.name, error)
        self._why, self._remedy = error.message, error.hint
        self._changed()

    def _proved(self, verdict: Verdict) -> None:
        if verdict.state == "differs":
            log.error("%s makes other tokens: %s, %s", self.worker.name, verdict.what, verdict.where)
        self._changed()

    # What it has to do, and whether it is well

    async def _listen(self) -> None:
        while True:
            pause_s = LOADS_EVERY_S
            try:
                status, said = await self._asker.answer("GET", LOADS, within_s=LOADS_S)
                self._heard()
                if status == 200:
                    self._reported(report(said, self._loop.time()))
                elif status == 404:
                    pause_s = _NO_LOADS_S
            except PeerError as error:
                log.warning("%s: %s", self.worker.name, error)
                pause_s = _NO_LOADS_S
            except KvdError as error:
                self._missed(error)
            await asyncio.sleep(pause_s)

    async def _look_after(self) -> None:
        while True:
            was = self.health.why
            try:
                status, _ = await self._asker.answer("GET", "/health", within_s=HEALTH_S)
                self.health.health(status)
                self._heard()
            except KvdError as error:
                self.health.no_health(error.message)
            self._tell_health(was)
            await asyncio.sleep(LOADS_EVERY_S if self.health.why else HEALTH_EVERY_S)

    def _heard(self) -> None:
        self.heard_at = self._loop.time()
        if self.health.in_doubt:
            self._ask.set()
        self.health.answered()

    def _missed(self, error: KvdError) -> None:
        was = self.health.why
        self.health.missed(error.message)
        self._tell_health(was)

    def _tell_health(self, was: str) -> None:
        if bool(was) != bool(self.health.why):
            log.warning(
                "%s is %s", self.worker.name, f"not well: {self.health.why}" if self.health.why else "well again"
            )
            self._changed()

"""A plain model of SGLang's publisher: what a rank holds, and what it would send, live and again."""

from collections import deque
from collections.abc import Iterator
from random import Random

import msgspec

from kvd.sglang_events import CPU_PINNED, GPU, AnyEvent, Batch, Cleared, Removed, Stored

NO_TOKENS = msgspec.Raw(b"\x90")


class ModelPublisher:
    """`held`: medium -> hashes, the truth. Batches carry all that changed since the last one."""

    def __init__(self, buffer_steps: int = 8, clock: float = 0.0) -> None:
        self.held: dict[str, set[int]] = {}
        self.clock = clock
        self._buffer: deque[tuple[int, Batch]] = deque(maxlen=buffer_steps)
        self._next = 0

    def restart(self) -> None:
        self.__init__(self._buffer.maxlen or 1, self.clock)  # type: ignore[misc]

    def publish(self, *events: AnyEvent) -> tuple[int, Batch]:
        self.clock += 1.0
        for event in events:
            if isinstance(event, Cleared):
                self.held = {}
            elif isinstance(event, Removed):
                self.held.get(event.medium or GPU, set()).difference_update(event.block_hashes)
            else:
                self.held.setdefault(event.medium or GPU, set()).update(event.block_hashes)
        seq, self._next = self._next, self._next + 1
        self._buffer.append((seq, Batch(self.clock, list(events), 0)))
        return seq, self._buffer[-1][1]

    def replay(self, start: int) -> list[tuple[int, Batch]]:
        return [(seq, batch) for seq, batch in self._buffer if seq >= start]


def stored(hashes: list[int], parent: int | None = None, medium: str | None = GPU) -> Stored:
    return Stored(
        block_hashes=hashes, parent_block_hash=parent, token_ids=NO_TOKENS, block_size=4, lora_id=None, medium=medium
    )


def removed(hashes: list[int], medium: str | None = GPU) -> Removed:
    return Removed(block_hashes=hashes, medium=medium)


def any_events(random: Random, blocks: int = 12) -> Iterator[AnyEvent]:
    """What a worker might do next, among few blocks: so that the same ones come and go."""
    for _ in range(random.randint(1, 3)):
        some = random.sample(range(blocks), random.randint(1, 4))
        medium = random.choice([GPU, CPU_PINNED, None])
        yield random.choices([stored(some, None, medium), removed(some, medium), Cleared()], [10, 6, 1])[0]

"""What one publisher (a rank of a worker) holds, from its events, whatever is lost, doubled or late. Pure.

A publisher numbers its batches from 0 in each of its lives, remembers the last few thousand and repeats them on
request; it has no snapshot. So the mirror is exact when it has applied every batch since the publisher's start, or
since the last AllBlocksCleared of the same life. Batches that come too early wait; what is missing is asked for again.

A life is told by its batches: number and time together. A replay always begins with a batch that was applied: where
the publisher has another one under that number, or publishes a new one under an old number, it has started again.
Whoever owns the connection says `doubt` when it broke, before any batch that came after.

Always true: what it says is held is held, as of the last applied batch: where the history has a hole, all from before
it is forgotten. While not exact, more may be held than it says. Its memory is bounded, whatever the publisher sends.
"""

from collections import OrderedDict

from kvd.sglang_events import GPU, AnyEvent, Batch, Cleared, Removed, Stored

MOST_MEDIA = 8
_REMEMBERED = 4096  # batches, by number and time
_EARLY = 1024  # batches that may wait for those before them
UNREADABLE = Batch(0.0, [])  # in place of a batch that could not be decoded: a hole in the history
BROKE = "the connection to the worker broke; what was missed is being asked for"
_LOST = "events from batch {} on were lost; they are being asked for"
_RESTARTED = "the worker started again; its events are being asked for"

Blocks = dict[int, int | None]  # hash -> its parent's


class Mirror:
    """`held`: by medium. `why` it is not exact; "" where it is. `next`: the number of the batch to apply next.

    What `live`, `replayed`, `replay_ended` and `no_replay` return has been applied, in order: for those who follow.
    """

    def __init__(self, most_blocks: int) -> None:
        """`most_blocks`: in each medium."""
        self.held: dict[str, Blocks] = {}
        self.why = "nothing heard yet"
        self.next = 0
        self.lost = 0  # batches that nobody could repeat
        self.restarts = 0
        self._most_blocks = most_blocks
        self._times: OrderedDict[int, float] = OrderedDict()  # of applied batches
        self._former: OrderedDict[int, float] = OrderedDict()  # of the life before
        self._early: dict[int, Batch] = {}
        self._whole = False  # every batch since the start, or since all was cleared
        self._full = False  # a block found no room
        self._ask: int | None = 0  # where a replay should begin
        self._first: int | None = None  # what the running replay began with
        self._skipped = False  # it left some out: a publisher drops what its reader does not take fast enough
        self._waited: set[int] = set()  # early batches from before it was asked for: it will reach them

    @property
    def exact(self) -> bool:
        return not self.why

    @property
    def ask(self) -> int | None:
        """From which number on the publisher should repeat its batches; None: nothing is missing."""
        return self._ask

    def doubt(self, why: str = BROKE) -> None:
        """The connection broke: something may have been missed, the publisher may have started again."""
        self.check()
        self._early.clear()
        self.why = why

    def check(self) -> None:
        """After a silence, or a replay that did not end: ask whether there is anything new."""
        self._ask = max(0, self.next - 1)
        self._first, self._skipped = None, False
        self._waited = set(self._early)

    def live(self, seq: int, batch: Batch) -> list[AnyEvent]:
        """A batch that was just published."""
        changed: list[AnyEvent] = []
        if self._former.get(seq) == batch.time_s:
            return changed
        if self._restarted(seq, batch):
            changed += self._start_again()
        if seq == self.next and (self._ask is None or not seq):
            self._ask = None  # nothing came before the very first one
            changed += self._apply(seq, batch)
        elif seq >= self.next and len(self._early) < _EARLY:
            self._early[seq] = batch
        changed += self._catch_up()
        if self._early and self._ask is None:
            self.check()
            self.why = _LOST.format(self.next)
        return changed

    def replayed(self, seq: int, batch: Batch) -> list[AnyEvent]:
        """One of the batches that were asked for."""
        if self._ask is None:
            return self.live(seq, batch)
        changed: list[AnyEvent] = []
        if self._first is None:
            if self._restarted(seq, batch):
                changed += self._start_again()
            elif seq > self._ask:
                changed += self._hole(seq)
            self._first = seq
        if seq == self.next:
            changed += self._apply(seq, batch)
        self._skipped |= seq > self.next
        return changed

    def replay_ended(self) -> list[AnyEvent]:
        """All that the publisher remembers has come."""
        asked, first, self._first = self._ask, self._first, None
        changed: list[AnyEvent] = []
        if asked is None:
            return changed
        if first is None and self.next:  # it does not know a batch that was applied
            changed += self._start_again()
            if asked:
                return changed
        if first is not None and first > self.next:
            return changed  # of another life, whose first batches are asked for now
        if self._skipped:
            self.check()
            self.why = _LOST.format(self.next)
            return changed
        self._ask = None
        if not self.next and not self._early:
            self._whole = True  # it has published nothing yet
        self._judge()
        changed += self._catch_up()
        for seq in self._waited & self._early.keys():
            del self._early[seq]  # a stray: its publisher does not have it
        if self._early:  # batches came after the last repeated one, and not all of them
            self.check()
        return changed

    def no_replay(self) -> list[AnyEvent]:
        """The publisher repeats nothing: go on with what comes."""
        if self._ask is None:
            return []
        self._ask = None
        changed = self._hole(min(self._early, default=self.next)) if self.next or self._early else []
        self._judge()
        return changed + self._catch_up()

    def _restarted(self, seq: int, batch: Batch) -> bool:
        """This batch is not of the life that was followed until now."""
        if seq >= self.next or not self._times:
            return False
        known = self._times.get(seq)
        return batch.time_s != known if known is not None else batch.time_s > self._times[next(reversed(self._times))]

    def _start_again(self) -> list[AnyEvent]:
        changed = self._forget()
        self._early.clear()
        self._former, self._times = self._times, OrderedDict()
        self.restarts += 1
        self.next, self._ask, self.why = 0, 0, _RESTARTED
        return changed

    def _hole(self, seq: int) -> list[AnyEvent]:
        """What came before `seq` cannot be got any more."""
        self.lost += seq - self.next
        self.next = seq
        return self._forget()

    def _forget(self) -> list[AnyEvent]:
        held, self.held = self.held, {}
        self._whole = self._full = False
        return [Cleared()] if held else []

    def _catch_up(self) -> list[AnyEvent]:
        changed: list[AnyEvent] = []
        while self._ask is None and (batch := self._early.pop(self.next, None)) is not None:
            changed += self._apply(self.next, batch)
        if self._early:
            self._early = {seq: batch for seq, batch in self._early.items() if seq >= self.next}
        return changed

    def _apply(self, seq: int, batch: Batch) -> list[AnyEvent]:
        if not seq:
            self._whole = True
        self.next = seq + 1
        self._times[seq] = batch.time_s
        if len(self._times) > _REMEMBERED:
            self._times.popitem(last=False)
        changed = self._forget() if batch is UNREADABLE else [event for event in batch.events if self._applied(event)]
        self._judge()
        return changed

    def _applied(self, event: AnyEvent) -> bool:
        if isinstance(event, Cleared):
            self._forget()
            self._whole = True
            return True
        blocks = self.held.get(event.medium or GPU)
        if isinstance(event, Removed):
            if blocks is None:
                return False
            for value in event.block_hashes:
                blocks.pop(value, None)
            return True
        return self._stored(event, blocks)

    def _stored(self, event: Stored, blocks: Blocks | None) -> bool:
        if blocks is None and len(self.held) < MOST_MEDIA:
            blocks = self.held[event.medium or GPU] = {}
        if blocks is None or len(blocks) + len(event.block_hashes) > self._most_blocks:
            self._full = True
            return False
        parent = event.parent_block_hash
        for value in event.block_hashes:
            blocks[value] = parent
            parent = value
        return True

    def _judge(self) -> None:
        if self._full:
            self.why = f"a medium has more than {self._most_blocks} blocks, or there are more than {MOST_MEDIA} media"
        elif not self._whole:
            self.why = (
                "what was stored before kvd listened, or in a gap, is not known until the worker clears its cache"
            )
        elif self._ask is None:
            self.why = ""

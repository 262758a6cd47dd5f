"""The RAM tier's memory: one shared file cut into extents, extents into slots, one page to a slot.

Little-endian. Extent e begins at SUPERBLOCK_BYTES + e * extent_bytes:

    superblock  4096   [magic 8][version u32][extent_bytes u32][extents u32]                  rest 0
    extent      64     [magic 8][version u32][slot_bytes u32][slots u32]                      magic 0: free
    headers     128 x slots
                       [state u32][generation u32][length u32][shard u16][shards u16]
                       [namespace 16][key 32][parent 32][checksum 16][seal u64][0 u64]
    payload     slot_bytes x slots, from the next multiple of 4096

The seal is xxh3_64 over everything between state and seal. Order of a write: payload (the worker's), header
fields, then state COMMITTED, one aligned store. So after kill -9 a slot is either committed and sealed or not
there; what a crash leaves RESERVED may still be being written by a living worker and is handed out last.
"""

import struct
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

import xxhash

SUPERBLOCK: Final = struct.Struct("<8sIII")
EXTENT: Final = struct.Struct("<8sIII")
_SEALED: Final = struct.Struct("<IIHH16s32s32s16s")  # what a seal covers: a header between state and seal
HEADER: Final = struct.Struct("<IIIHH16s32s32s16sQ8x")
SUPERBLOCK_BYTES: Final = 4096
EXTENT_HEADER_BYTES: Final = 64
HEADER_BYTES: Final = HEADER.size
ALIGN: Final = 4096
ARENA_MAGIC: Final = b"KVDARENA"
EXTENT_MAGIC: Final = b"KVDEXTNT"
VERSION: Final = 1
FREE, RESERVED, COMMITTED, QUARANTINED = range(4)
_SLOT_BITS: Final = 20
_POSITION: Final = (1 << _SLOT_BITS) - 1

assert HEADER_BYTES == 128


class Header(NamedTuple):
    """A slot's header as it lies in memory."""

    state: int
    generation: int
    length: int
    shard: int
    shards: int
    namespace: bytes
    key: bytes
    parent: bytes
    checksum: bytes
    seal: int


def slot_bytes_for(page_bytes: int) -> int:
    """The size class of a page."""
    return -(-page_bytes // ALIGN) * ALIGN


def slots_per_extent(extent_bytes: int, slot_bytes: int) -> int:
    """How many pages of a class fit an extent together with their headers."""
    slots = (extent_bytes - EXTENT_HEADER_BYTES) // (slot_bytes + HEADER_BYTES)
    while slots > 0 and payload_start(slots) + slots * slot_bytes > extent_bytes:
        slots -= 1
    return slots


def payload_start(slots: int) -> int:
    """Offset of an extent's first payload."""
    return -(-(EXTENT_HEADER_BYTES + HEADER_BYTES * slots) // ALIGN) * ALIGN


class Arena:
    """Extents and slots over a writable buffer. A slot is an int: extent << 20 | position."""

    def __init__(self, memory: memoryview, extent_bytes: int) -> None:
        assert not memory.readonly, "a writable buffer"
        self._memory = memory
        self._words = memory.cast("I")
        self.extent_bytes = extent_bytes
        self.extents = (len(memory) - SUPERBLOCK_BYTES) // extent_bytes
        self._slot_bytes = [0] * self.extents  # 0: free extent
        self._slots = [0] * self.extents
        self._headers_at = [self._base(extent) + EXTENT_HEADER_BYTES for extent in range(self.extents)]
        self._payload_at = [0] * self.extents
        self._free_extents = deque(range(self.extents))
        self._free: dict[int, deque[int]] = {}
        self._in_use = [0] * self.extents
        self._closed: set[int] = set()

    # -- the file ------------------------------------------------------------------------------------------

    def format(self) -> None:
        """Start cold: every extent free."""
        for extent in range(self.extents):
            EXTENT.pack_into(self._memory, self._base(extent), b"", 0, 0, 0)
        SUPERBLOCK.pack_into(self._memory, 0, ARENA_MAGIC, VERSION, self.extent_bytes, self.extents)

    def recognise(self) -> str:
        """Empty when the memory is an arena of this version and geometry, else why not."""
        magic, version, extent_bytes, extents = SUPERBLOCK.unpack_from(self._memory, 0)
        if magic != ARENA_MAGIC:
            return "no arena in it" if any(magic) else "new"
        if version != VERSION:
            return f"arena format {version}, this kvd knows {VERSION}"
        if (extent_bytes, extents) != (self.extent_bytes, self.extents):
            return f"{extents} extents of {extent_bytes} bytes, settings say {self.extents} of {self.extent_bytes}"
        return ""

    def reopen(self) -> Iterator[tuple[int, Header]]:
        """Take over what a previous daemon left: yields each committed, sealed slot, and owns the rest.

        The caller keeps what it wants and gives every other yielded slot back.
        """
        suspects: list[int] = []
        self._free_extents.clear()
        for extent in range(self.extents):
            magic, version, slot_bytes, slots = EXTENT.unpack_from(self._memory, self._base(extent))
            fits = slot_bytes and slot_bytes % ALIGN == 0
            if magic != EXTENT_MAGIC or version != VERSION or not fits:
                self._free_extents.append(extent)
                continue
            if slots != slots_per_extent(self.extent_bytes, slot_bytes):
                self._free_extents.append(extent)
                continue
            self._own(extent, slot_bytes, slots)
            for position in range(slots):
                slot = extent << _SLOT_BITS | position
                header = self.header(slot)
                if header.state == COMMITTED and self._sealed(slot) and 0 < header.length <= slot_bytes:
                    self._in_use[extent] += 1
                    yield slot, header
                elif header.state in (FREE, QUARANTINED):
                    self._free.setdefault(slot_bytes, deque()).append(slot)
                else:
                    suspects.append(slot)
        for slot in suspects:
            self._set_state(slot, FREE)
            self._free.setdefault(self.slot_bytes(slot), deque()).append(slot)

    # -- slots ---------------------------------------------------------------------------------------------

    def take(self, size_class: int) -> int | None:
        """A free slot of this class, from a fresh extent where needed; None when there is neither."""
        free = self._free.get(size_class)
        if not free:
            if not self._free_extents:
                return None
            self._assign(self._free_extents.popleft(), size_class)
            free = self._free[size_class]
        slot = free.popleft()  # first in, first out: a slot rests as long as possible before reuse
        self._in_use[slot >> _SLOT_BITS] += 1
        at = self._header_at(slot) // 4
        self._words[at] = RESERVED
        self._words[at + 1] = self._words[at + 1] % 0xFFFFFFFF + 1
        return slot

    def give(self, slot: int, quarantined: bool = False) -> None:
        """Return a slot, to be reused after all others. An idle extent stays with its class until asked for."""
        self._set_state(slot, QUARANTINED if quarantined else FREE)
        self._in_use[slot >> _SLOT_BITS] -= 1
        if slot >> _SLOT_BITS not in self._closed:
            self._free.setdefault(self.slot_bytes(slot), deque()).append(slot)

    def seal(
        self, slot: int, length: int, shard: int, shards: int, namespace: bytes, key: bytes, parent: bytes,
        checksum: bytes,
    ) -> None:  # fmt: skip
        """Commit a slot: header, seal, then state."""
        at = self._header_at(slot)
        generation = self._words[at // 4 + 1]
        fields = (generation, length, shard, shards, namespace, key, parent, checksum)
        seal = xxhash.xxh3_64_intdigest(_SEALED.pack(*fields))
        HEADER.pack_into(self._memory, at, RESERVED, *fields, seal)
        self._words[at // 4] = COMMITTED

    def close_extent(self, extent: int) -> None:
        """Hand out none of its slots any more; what is in use stays until it is given back."""
        self._closed.add(extent)
        free = self._free.get(self._slot_bytes[extent], deque())
        self._free[self._slot_bytes[extent]] = deque(slot for slot in free if slot >> _SLOT_BITS != extent)

    def open_extent(self, extent: int) -> None:
        """Hand out the slots of a closed extent again."""
        self._closed.discard(extent)
        free = self._free.setdefault(self._slot_bytes[extent], deque())
        for slot in range(extent << _SLOT_BITS, (extent << _SLOT_BITS) + self._slots[extent]):
            if self._words[self._header_at(slot) // 4] in (FREE, QUARANTINED):
                free.append(slot)

    def extents_of(self, size_class: int) -> list[int]:
        """The extents that a class owns."""
        return [extent for extent, size in enumerate(self._slot_bytes) if size == size_class]

    def committed(self, extent: int, start: int, count: int) -> list[Header]:
        """Headers of committed slots among `count` positions of an extent."""
        end = min(start + count, self._slots[extent])
        headers = (self.header(extent << _SLOT_BITS | position) for position in range(start, end))
        return [header for header in headers if header.state == COMMITTED]

    def slots(self, extent: int) -> int:
        """How many slots an extent has."""
        return self._slots[extent]

    def release_extent(self, extent: int) -> None:
        """Give an extent whose slots are all free back to every class."""
        assert self._in_use[extent] == 0, "extent in use"
        size_class = self._slot_bytes[extent]
        free = self._free.get(size_class, ())
        self._free[size_class] = deque(slot for slot in free if slot >> _SLOT_BITS != extent)
        EXTENT.pack_into(self._memory, self._base(extent), b"", 0, 0, 0)
        self._slot_bytes[extent] = self._slots[extent] = 0
        self._closed.discard(extent)
        self._free_extents.append(extent)

    def _assign(self, extent: int, size_class: int) -> None:
        slots = slots_per_extent(self.extent_bytes, size_class)
        assert slots > 0, "page larger than an extent"
        base = self._base(extent)
        headers = base + EXTENT_HEADER_BYTES
        for position in range(slots):
            self._words[(headers + HEADER_BYTES * position) // 4] = FREE
        EXTENT.pack_into(self._memory, base, EXTENT_MAGIC, VERSION, size_class, slots)
        self._own(extent, size_class, slots)
        first = extent << _SLOT_BITS
        self._free.setdefault(size_class, deque()).extend(range(first, first + slots))

    def _own(self, extent: int, slot_bytes: int, slots: int) -> None:
        self._slot_bytes[extent], self._slots[extent] = slot_bytes, slots
        self._payload_at[extent] = self._base(extent) + payload_start(slots)

    # -- reading -------------------------------------------------------------------------------------------

    def offset(self, slot: int) -> int:
        """Where the slot's payload begins, from the start of the arena."""
        extent = slot >> _SLOT_BITS
        return self._payload_at[extent] + (slot & _POSITION) * self._slot_bytes[extent]

    def header(self, slot: int) -> Header:
        return Header._make(HEADER.unpack_from(self._memory, self._header_at(slot)))

    def generation(self, slot: int) -> int:
        return self._words[self._header_at(slot) // 4 + 1]

    def intact(self, slot: int, header: Header) -> bool:
        """`header`, just read, is of a committed page and is what was sealed."""
        at = self._header_at(slot)
        return header.state == COMMITTED and header.seal == xxhash.xxh3_64_intdigest(self._memory[at + 4 : at + 112])

    def slot_bytes(self, slot: int) -> int:
        return self._slot_bytes[slot >> _SLOT_BITS]

    def extent_of(self, slot: int) -> int:
        return slot >> _SLOT_BITS

    @property
    def free_extents(self) -> int:
        return len(self._free_extents)

    @property
    def used_bytes(self) -> int:
        return sum(n * size for n, size in zip(self._in_use, self._slot_bytes, strict=True))

    def in_use(self, extent: int) -> int:
        return self._in_use[extent]

    def idle_extent(self, size_class: int) -> int | None:
        """An extent that another class owns and does not use."""
        for extent, (size, used) in enumerate(zip(self._slot_bytes, self._in_use, strict=True)):
            if size not in (0, size_class) and not used:
                return extent
        return None

    def faults(self, owned: set[int]) -> list[str]:
        """Broken invariants, in words. `owned` are the slots of resident pages and reservations."""
        found: list[str] = []
        free = {slot for line in self._free.values() for slot in line}
        found += [f"slot {slot:#x} is free and owned" for slot in free & owned]
        for extent in range(self.extents):
            slots = {extent << _SLOT_BITS | p for p in range(self._slots[extent])}
            if (lost := slots - free - owned) and extent not in self._closed:
                found.append(f"extent {extent}: {len(lost)} slots are neither free nor owned")
            if len(slots & owned) != self._in_use[extent]:
                found.append(f"extent {extent} counts {self._in_use[extent]} slots in use")
        return found

    def _base(self, extent: int) -> int:
        return SUPERBLOCK_BYTES + extent * self.extent_bytes

    def _header_at(self, slot: int) -> int:
        return self._headers_at[slot >> _SLOT_BITS] + HEADER_BYTES * (slot & _POSITION)

    def _set_state(self, slot: int, state: int) -> None:
        self._words[self._header_at(slot) // 4] = state

    def _sealed(self, slot: int) -> bool:
        at = self._header_at(slot)
        seal: int = struct.unpack_from("<Q", self._memory, at + 112)[0]
        return seal == xxhash.xxh3_64_intdigest(self._memory[at + 4 : at + 112])

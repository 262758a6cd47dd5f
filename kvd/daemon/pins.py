"""Chains that an operator wants to stay: remembered in a file, pinned in RAM and told to the NVMe tier.

A pin names a chain by the page it ends with and keeps all its pages, for a page is of no use without those before it.
The file outlives kvd: a line of JSON for each pin, written anew and renamed at every change, which `pinning` sees to.
A page that is pinned and not there now is pinned when it comes.

Always true: a group's `pins` is how many pins its page is part of.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvd.daemon.group import Group
from kvd.daemon.stock import Stock
from kvd.errors import Refused, SettingsError
from kvd.pages import KEY_BYTES, NAMESPACE_BYTES
from kvd.storage.tier import Name

log = logging.getLogger("kvd.pins")

Chains = dict[Name, tuple[Name, ...]]  # by the page that each ends with

_MOST_OF_RAM = 0.5  # pinned pages may take this part of it: the rest has to work too


class Pins:
    """All pins. `file`: where they are kept."""

    def __init__(self, stock: Stock, file: Path | None) -> None:
        """Raises SettingsError for a file that is none of ours."""
        self._stock = stock
        self._file = file
        self._chains: Chains = _read(file) if file is not None else {}
        self._counts: Counter[Name] = Counter(name for chain in self._chains.values() for name in chain)

    def __len__(self) -> int:
        return len(self._chains)

    def __contains__(self, name: Name) -> bool:
        return name in self._counts

    def names(self) -> Iterator[Name]:
        """All pages that are pinned."""
        return iter(self._counts)

    @property
    def bytes_in_ram(self) -> int:
        groups = (self._group(name) for name in self._counts)
        return sum(group.bytes for group in groups if group is not None)

    @property
    def limit(self) -> int:
        """How many bytes of RAM pins may take."""
        return int(_MOST_OF_RAM * self._stock.arena.extents * self._stock.arena.extent_bytes)

    def admitted(self, group: Group) -> None:
        """A page has become resident."""
        if self._counts:
            for _ in range(self._counts[group.namespace + group.key]):
                self._stock.departures.pin(group)

    def pin(self, chain: Sequence[Group]) -> bool:
        """From now on these pages stay, the last one's ancestors first; False: they did before. Raises Refused."""
        names = tuple(group.namespace + group.key for group in chain)
        if names[-1] in self._chains:
            return False
        more = sum(group.bytes for group, name in zip(chain, names, strict=True) if name not in self._counts)
        if self.bytes_in_ram + more > self.limit:
            raise Refused(
                f"pinned pages would take {self.bytes_in_ram + more} bytes, more than half of memory ({self.limit})",
                "unpin others first (kvdctl pins), or give kvd more memory (arena.size_bytes)",
            )
        self._chains[names[-1]] = names
        self._counts.update(names)
        for group in chain:
            self._stock.departures.pin(group)
        return True

    def unpin(self, tip: Name, now: float) -> tuple[Name, ...]:
        """End a pin; the pages that no other pin keeps. Raises Refused where there is none."""
        names = self._chains.pop(tip, None)
        if names is None:
            raise _unknown()
        self._counts.subtract(names)
        for name in names:
            group = self._group(name)
            if group is not None:
                self._stock.departures.unpin(group, now)
        free = tuple(name for name in names if not self._counts[name])
        for name in free:
            del self._counts[name]
        return free

    def listed(self) -> list[tuple[Name, int, int]]:
        """Each pin's last page, how many pages it has, and how many of them are in RAM."""
        return [
            (tip, len(chain), sum(self._group(name) is not None for name in chain))
            for tip, chain in self._chains.items()
        ]

    def _group(self, name: Name) -> Group | None:
        return self._stock.residency.get(name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:])

    def chains(self) -> Chains:
        """As they are now, for `write`."""
        return dict(self._chains)

    def without(self, tip: Name) -> Chains:
        """What is left when this pin ends. Raises Refused where there is none."""
        if tip not in self._chains:
            raise _unknown()
        return {name: chain for name, chain in self._chains.items() if name != tip}

    def write(self, chains: Chains) -> None:
        """On the disk when it returns; blocks as long as that does, and may run on any thread, one at a time.

        Raises Refused, and the file is as it was.
        """
        if self._file is not None:
            lines = [
                json.dumps({"namespace": tip[:NAMESPACE_BYTES].hex(), "keys": [_key(name) for name in chain]}) + "\n"
                for tip, chain in chains.items()
            ]
            fresh = self._file.with_name(self._file.name + ".new")
            try:
                with fresh.open("w") as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(self._file)
            except OSError as error:
                raise Refused(
                    f"cannot write {self._file}: {error.strerror}", "make room there, or set pins_file"
                ) from error


def _unknown() -> Refused:
    return Refused("no such pin", "kvdctl pins lists them: name the page that a pin ends with")


def _key(name: Name) -> str:
    return name[NAMESPACE_BYTES:].hex()


def _read(file: Path) -> Chains:
    found: Chains = {}
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        for line in lines:
            pin = json.loads(line)
            namespace = bytes.fromhex(pin["namespace"])
            chain = tuple(namespace + bytes.fromhex(key) for key in pin["keys"])
            if not chain or any(len(name) != NAMESPACE_BYTES + KEY_BYTES for name in chain):
                raise ValueError("a key of another length")
            found[chain[-1]] = chain
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{file} holds no pins of kvd: {error}", "remove it to start without pins") from error
    return found

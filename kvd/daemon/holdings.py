"""What kvd's own tiers hold, as blocks, and their comings and goings as events. Pure.

The stock tells it within requests, so `came` and `left` only note the name; `drain` does the rest, a part at a time.
A page is known here by the first 8 bytes of its key, which is SGLang's event hash of it (kvd.wire.stream). Each
namespace is a source of its own: the same hash in two namespaces means other bytes.

Always true after a full `drain`: these are the pages that a lookup would be answered from. Bounded: what does not fit
is not known here, and its namespace says so until all of that has left. Not told of: scratch namespaces, which are
one session's and gone soon.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvd import wire
from kvd.daemon.group import NO_PARENT
from kvd.daemon.labels import Labels
from kvd.daemon.mirror import Blocks
from kvd.daemon.sessions import Session
from kvd.pages import NAMESPACE_BYTES
from kvd.sglang_events import NO_TOKENS, AnyEvent, Cleared, Removed, Stored

MOST_NAMESPACES = 1024
_MOST_NOTED = 1 << 18  # changes that may wait for `drain`
_AT_ONCE = 1024
_MOST_REFUSED = 1 << 16  # pages that did not fit whose names are kept, to know when none is left
_FORGOTTEN = b""

Say = Callable[[wire.Source, Sequence[AnyEvent], str], None]
Change = tuple[str, bytes, bytes | None]  # medium, namespace + key, parent's key or None where it left


class Namespace:
    """A source: what the tiers hold of one namespace."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.source = wire.Source(namespace=digest.hex())
        self.spec: wire.NamespaceSpec | None = None
        self.why = ""
        self.held: dict[str, Blocks] = {}
        self.refused: dict[str, set[int | None]] = {}  # what did not fit; None: and more than can be remembered
        self.events: list[AnyEvent] = []  # to be said

    @property
    def idle(self) -> bool:
        """Nothing would be lost with it."""
        return not (any(self.held.values()) or self.refused or self.events or self.source.workers)

    def describe(self, spec: wire.NamespaceSpec | None, workers: tuple[str, ...] = ()) -> None:
        self.spec = spec
        pool, label, tenant, tokens = ("", "", "", 0) if spec is None else _described(spec)
        self.source = wire.Source("", 0, self.digest.hex(), pool, label, tenant, tokens, workers=workers)

    def store(self, medium: str, value: int, parent: int | None) -> None:
        self.held.setdefault(medium, {})[value] = parent
        last = self.events[-1] if self.events else None
        if isinstance(last, Stored) and last.medium == medium and last.block_hashes[-1] == parent:
            last.block_hashes.append(value)
            return
        self.events.append(
            Stored(
                block_hashes=[value], parent_block_hash=parent, token_ids=NO_TOKENS, block_size=0, lora_id=None,
                medium=medium,
            )
        )  # fmt: skip

    def remove(self, medium: str, value: int) -> None:
        last = self.events[-1] if self.events else None
        if isinstance(last, Removed) and last.medium == medium:
            last.block_hashes.append(value)
        else:
            self.events.append(Removed(block_hashes=[value], medium=medium))


class Holdings:
    """`wake`: called when there is something to drain."""

    def __init__(self, most_blocks: int, labels: Labels, say: Say, wake: Callable[[], None]) -> None:
        self.blocks = 0
        self.untold = 0  # pages that nobody was told of, nor that they are not: for their namespace there was no room
        self._most_blocks = most_blocks
        self._labels = labels
        self._say = say
        self._wake = wake
        self._noted: deque[Change] = deque()
        self._namespaces: dict[bytes, Namespace] = {}
        self._refused = 0  # pages that are remembered as such
        self._crowded = False  # no namespace was idle when another came

    def __len__(self) -> int:
        """Changes that wait."""
        return len(self._noted)

    def sources(self) -> list[Namespace]:
        return list(self._namespaces.values())

    # -- told by the stock ---------------------------------------------------------------------------------

    def came(self, medium: str, name: bytes, parent: bytes = NO_PARENT) -> None:
        """A tier holds this page (namespace + key) now."""
        self._note((medium, name, parent))

    def left(self, medium: str, name: bytes) -> None:
        self._note((medium, name, None))

    def forgotten(self, medium: str) -> None:
        """What the tier holds is not known any more, until it is told again."""
        self._note((medium, _FORGOTTEN, None))

    def _note(self, change: Change) -> None:
        if not self._noted:
            self._wake()
        elif len(self._noted) >= _MOST_NOTED:
            self.drain()
        self._noted.append(change)

    # -- in the background ---------------------------------------------------------------------------------

    def drain(self) -> bool:
        """Work off some of the changes, and say them; whether more wait."""
        touched: dict[bytes, Namespace] = {}
        for _ in range(min(_AT_ONCE, len(self._noted))):
            medium, name, parent = self._noted.popleft()
            if name == _FORGOTTEN:
                touched.update(self._forget(medium))
                continue
            namespace = self._namespace(name[:NAMESPACE_BYTES], parent is not None)
            if namespace is None:
                continue
            value = block_hash(name[NAMESPACE_BYTES:])
            if parent is not None:
                self._store(namespace, medium, value, block_hash(parent) if parent != NO_PARENT else None)
            elif namespace.held.get(medium, {}).pop(value, self) is not self:
                self.blocks -= 1
                namespace.remove(medium, value)
            else:
                self._forgive(namespace, medium, value)
            touched[namespace.digest] = namespace
        self._tell(touched.values())
        return bool(self._noted)

    def tick(self, attached: Mapping[bytes, tuple[str, ...]]) -> None:
        """Say what has become known of the namespaces; `attached`: the workers' URLs by namespace."""
        changed: list[Namespace] = []
        self._crowded = False
        for digest, namespace in self._namespaces.items():
            spec, workers = self._labels.get(digest) or namespace.spec, attached.get(digest, ())
            if spec is not namespace.spec or workers != namespace.source.workers:
                before = namespace.source
                namespace.describe(spec, workers)
                if namespace.source != before:
                    changed.append(namespace)
        self._tell(changed)

    def _tell(self, namespaces: Iterable[Namespace]) -> None:
        for namespace in namespaces:
            events, namespace.events = namespace.events, []
            self._say(namespace.source, events, namespace.why)

    def _namespace(self, digest: bytes, comes: bool) -> Namespace | None:
        found = self._namespaces.get(digest)
        if found is None and comes:
            spec = self._labels.get(digest)
            if spec is not None and spec.scratch:
                return None
            if not self._room():
                self.untold += 1
                return None
            found = self._namespaces[digest] = Namespace(digest)
            if spec is not None:
                found.describe(spec)
        return found

    def _room(self) -> bool:
        """For another namespace; idle ones are forgotten for it. They are looked for once a tick at most, in vain."""
        if len(self._namespaces) >= MOST_NAMESPACES and not self._crowded:
            self._namespaces = {digest: one for digest, one in self._namespaces.items() if not one.idle}
            self._crowded = len(self._namespaces) >= MOST_NAMESPACES
        return len(self._namespaces) < MOST_NAMESPACES

    def _store(self, namespace: Namespace, medium: str, value: int, parent: int | None) -> None:
        if value not in namespace.held.get(medium, {}):
            if self.blocks >= self._most_blocks:
                self._refuse(namespace, medium, value)
                return
            self._forgive(namespace, medium, value)
            self.blocks += 1
        if parent is None:  # a tier below does not tell it, but another may have
            known = (blocks.get(value) for blocks in namespace.held.values())
            parent = next((one for one in known if one is not None), None)
        namespace.store(medium, value, parent)

    def _refuse(self, namespace: Namespace, medium: str, value: int) -> None:
        refused = namespace.refused.setdefault(medium, set())
        if value not in refused and self._refused >= _MOST_REFUSED:
            refused.add(None)
        elif value not in refused:
            refused.add(value)
            self._refused += 1
        namespace.why = f"kvd's tiers hold more than {self._most_blocks} pages; events.most_blocks allows no more"

    def _forgive(self, namespace: Namespace, medium: str, value: int) -> None:
        """This page is not missing here, or not any more."""
        refused = namespace.refused.get(medium)
        if refused is not None and value in refused:
            refused.remove(value)
            self._refused -= 1
            if not refused:
                self._all_known(namespace, medium)

    def _all_known(self, namespace: Namespace, medium: str) -> None:
        self._refused -= len(namespace.refused.pop(medium, set()) - {None})
        if not namespace.refused:
            namespace.why = ""

    def _forget(self, medium: str) -> dict[bytes, Namespace]:
        touched = {
            digest: found
            for digest, found in self._namespaces.items()
            if medium in found.held or medium in found.refused
        }
        for namespace in touched.values():
            self.blocks -= len(namespace.held.pop(medium, ()))
            self._all_known(namespace, medium)
            namespace.events.append(Cleared(medium=medium))
        return touched


def attached(names: Mapping[str, str], sessions: Iterable[Session]) -> dict[bytes, tuple[str, ...]]:
    """URLs of the workers that are attached with each namespace. `names`: kvd.sglang_info's, by URL.

    Two workers of one name are not told apart, and so neither is said to be attached.
    """
    known: dict[str, str | None] = {}
    for url, name in names.items():
        known[name] = None if name in known else url
    found: dict[bytes, set[str]] = {}
    for session in sessions:
        if (owner := known.get(session.server)) is not None:
            for spec in session.namespaces:
                found.setdefault(spec.digest, set()).add(owner)
    return {digest: tuple(sorted(urls)) for digest, urls in found.items()}


def _described(spec: wire.NamespaceSpec) -> tuple[str, str, str, int]:
    return spec.pool, spec.label, spec.tenant, spec.page_tokens


def block_hash(key: bytes) -> int:
    """SGLang's event hash of a page key."""
    return int.from_bytes(key[:8], signed=True)

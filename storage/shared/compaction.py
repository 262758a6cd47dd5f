"""Which files of a shared tier are worth rewriting. Pure.

Every put makes a file. Files of one size class are merged, eight at a time, until they reach the target size, so a
page is moved about log8(target / put) times; a file of which less than half counts is rewritten alone or with its
class. A node rewrites only its own files, and those of one tenant together.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from kvd.storage.shared.copies import SealedFile

FAN_IN: Final = 8
_CLASS_BITS: Final = 3  # a size class spans a factor of eight


def next_merge(own: Iterable[SealedFile], file_bytes: int) -> list[SealedFile]:
    """Files to be made one, in the order of their pages' age; empty when there is nothing to do."""
    classes: dict[tuple[int, str], list[SealedFile]] = {}
    for file in sorted(own, key=lambda f: f.age_order):
        if file.live_rows and (_worn(file) or file.payload_bytes < file_bytes / 2):
            size_class = file.live_bytes.bit_length() // _CLASS_BITS
            classes.setdefault((size_class, file.tenant), []).append(file)
    for _, files in sorted(classes.items()):
        chosen = _up_to(files, file_bytes)
        if len(chosen) >= FAN_IN or sum(f.live_bytes for f in chosen) >= file_bytes / 2:
            return chosen
        if worn_out := [f for f in files if _worn(f)]:
            return _up_to(worn_out, file_bytes)
    return []


def _up_to(files: Sequence[SealedFile], file_bytes: int) -> list[SealedFile]:
    chosen: list[SealedFile] = []
    size = 0
    for file in files:
        if chosen and size + file.live_bytes > file_bytes:
            break
        chosen.append(file)
        size += file.live_bytes
    return chosen


def _worn(file: SealedFile) -> bool:
    """Of payload, not of the file: small pages fill files badly, and rewriting them gains nothing."""
    return file.live_bytes < file.payload_bytes / 2

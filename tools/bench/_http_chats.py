"""What the load generator sends: chats in texts of an agent, as files of conversations (see _http_load.c).

    short   1 KiB each: a system prompt that all share, and one message that begins with the conversation's number
    long    conversations of 25 to 39 KiB, 32 on average, that were there before the measurement; each goes on for
            eight requests, in each of them one answer and one message, of about 1 KiB each, more than in the last. Its
            first new message begins with the conversation's number

A number is another one each time a conversation is begun. So what a router remembers is what it would remember of real
ones: of short ones the system prompt, of long ones all but what the last turn brought.
"""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from tools.bench._texts import texts

MARK = "#" * 16  # as in _http_load.c
_SHORT, _LONG, _GROWTH, _OLD = 256, 64, 8, 24  # of short ones, of long ones, requests of a long one, old messages
_TURN_BYTES, _SYSTEM_BYTES = 975, 400

Conversation = list[bytes]  # requests


class Chats:
    """Text that is handed out piece by piece."""

    def __init__(self) -> None:
        self._text = "\n".join(texts(40)).replace(MARK, "")
        self._at = 0
        self._system = {"role": "system", "content": self._piece(_SYSTEM_BYTES)}

    def short(self, size: int = 1024, **more: Any) -> list[Conversation]:
        """`more` than model and messages."""
        room = size - len(_body([self._system, _message("user", MARK)], more))
        return [
            [_body([self._system, _message("user", MARK + self._piece(room))], more)] for _ in range(_SHORT)
        ]  # fmt: skip

    def long(self, **more: Any) -> list[Conversation]:
        return [self._grown(more) for _ in range(_LONG)]

    def _grown(self, more: dict[str, Any]) -> Conversation:
        roles = cycle(("user", "assistant"))
        messages = [self._system] + [_message(next(roles), self._piece(_TURN_BYTES)) for _ in range(_OLD)]
        found = []
        for number in range(_GROWTH):
            if number:
                messages.append(_message(next(roles), self._piece(_TURN_BYTES)))
            mark = "" if number else MARK
            messages.append(_message(next(roles), mark + self._piece(_TURN_BYTES)))
            found.append(_body(messages, more))
        return found

    def _piece(self, size: int) -> str:
        """The next text that takes as many bytes in JSON, or few less; from the start again after the end."""
        if self._at + size > len(self._text):
            self._at = 0
        piece = self._text[self._at : self._at + size]
        while (over := len(_json(piece)) - 2 - size) > 0:
            piece = piece[: -max(1, over // 2)]
        self._at += len(piece)
        return piece


def written(conversations: list[Conversation], to: Path) -> Path:
    to.write_bytes(b"".join(b"".join(body + b"\n" for body in one) + b"\n" for one in conversations))
    return to


def begun(body: bytes, number: int) -> dict[str, Any]:
    """What is sent of a conversation's first body when it has this number."""
    found: dict[str, Any] = json.loads(body.replace(MARK.encode(), b"%016x" % number))
    return found


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _body(messages: list[dict[str, str]], more: dict[str, Any]) -> bytes:
    return _json({"model": "mock", **more, "messages": messages})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")

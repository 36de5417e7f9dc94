"""An answer of a realtime session, delta by delta."""

import asyncio
import base64
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.demo.conversation import Conversation, Item, Settings
from gateway.demo.fields import Body
from gateway.demo.sound import CHARACTER_MS, tone
from gateway.demo.words import TOKEN_SECONDS, count_tokens, split_tokens, words

#: An output token of sound is so long.
TOKEN_MS = 50


class Send(Protocol):
    """Sends an event of the server to the client."""

    def __call__(self, kind: str, **fields: Any) -> Awaitable[None]:
        """kind: the event's type."""


@dataclass(slots=True)
class RealtimeResponse:
    """One answer.

    heard: what it is given to. conversation: where it is added, if anywhere. stopped: set by the client who has heard
    enough.
    """

    id: str
    item_id: str
    settings: Settings
    heard: Conversation
    conversation: Conversation | None
    metadata: Body | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _before: str | None = None

    def take_place(self) -> None:
        """Stand in the conversation before a word is said. Raises Refused if that is full."""
        if self.conversation is not None:
            self._before = self.conversation.last_id
            self.conversation.add(Item({"id": self.item_id}, 0))

    async def say(self, send: Send) -> None:
        """Send all of its events."""
        given, tokens = self._input_details(), split_tokens(words(self.heard.asked, limit="max_output_tokens"))
        await send("response.created", response=self._document("in_progress", []))
        await send("response.output_item.added", **self._where, item=self._item("in_progress", None))
        if self.conversation is not None:
            item = self._item("in_progress", None)
            await send("conversation.item.added", previous_item_id=self._before, item=item)
        at = {**self._where, "item_id": self.item_id, "content_index": 0}
        await send("response.content_part.added", **at, part=self._part(""))
        said, status = await self._deltas(send, at, tokens)
        text = "".join(said)
        for kind, more in self._ends(text):
            await send(kind, **at, **more)
        await send("response.content_part.done", **at, part=self._part(text))
        item = self._item("completed" if status == "completed" else "incomplete", text)
        if self.conversation is not None:
            self.conversation.grow(len(said), self._sound_tokens(said))
            await send("conversation.item.done", previous_item_id=self._before, item=item)
        await send("response.output_item.done", **self._where, item=item)
        done = self._document(status, [item])
        await send("response.done", response={**done, "usage": self._usage(given, said)})

    async def _deltas(self, send: Send, at: Body, tokens: list[str]) -> tuple[list[str], str]:
        """Send the tokens one by one. Returns those that were said, and the status."""
        said: list[str] = []
        left = self.settings.limit
        for token in tokens:
            if self.stopped.is_set():
                return said, "cancelled"
            if left is not None:
                left -= 1 + self._sound_tokens([token])
                if left < 0:
                    return said, "incomplete"
            said.append(token)
            if self._is_sound:
                await send("response.output_audio_transcript.delta", **at, delta=token)
                await send("response.output_audio.delta", **at, delta=base64.b64encode(tone(token)).decode())
            else:
                await send("response.output_text.delta", **at, delta=token)
            await asyncio.sleep(TOKEN_SECONDS)
        return said, "completed"

    def _ends(self, text: str) -> Iterator[tuple[str, Body]]:
        if self._is_sound:
            yield "response.output_audio.done", {}
            yield "response.output_audio_transcript.done", {"transcript": text}
        else:
            yield "response.output_text.done", {"text": text}

    @property
    def _is_sound(self) -> bool:
        return self.settings.modality == "audio"

    @property
    def _where(self) -> Body:
        return {"response_id": self.id, "output_index": 0}

    def _part(self, text: str) -> Body:
        return {"type": "audio", "transcript": text} if self._is_sound else {"type": "text", "text": text}

    def _item(self, status: str, text: str | None) -> Body:
        shown = {"id": self.item_id, "object": "realtime.item", "type": "message", "status": status}
        part = {"type": "output_audio", "transcript": text} if self._is_sound else {"type": "output_text", "text": text}
        return {**shown, "role": "assistant", "content": [] if text is None else [part]}

    def _document(self, status: str, output: list[Body]) -> Body:
        details = {
            "incomplete": {"type": "incomplete", "reason": "max_output_tokens"},
            "cancelled": {"type": "cancelled", "reason": "client_cancelled"},
        }
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details.get(status),
            "output": output,
            "conversation_id": None if self.conversation is None else "conv_demo",
            "metadata": self.metadata,
            "usage": None,
            **self.settings.document(),
        }

    def _sound_tokens(self, tokens: list[str]) -> int:
        """Each token of text is spoken by itself, in whole tokens of sound."""
        return sum(-(-len(token) * CHARACTER_MS // TOKEN_MS) for token in tokens) if self._is_sound else 0

    def _input_details(self) -> dict[str, int]:
        text = self.heard.text_tokens + count_tokens(self.settings.instructions)
        return {"text_tokens": text, "audio_tokens": self.heard.audio_tokens, "cached_tokens": 0}

    def _usage(self, given: dict[str, int], said: list[str]) -> Body:
        made = {"text_tokens": len(said), "audio_tokens": self._sound_tokens(said)}
        input_tokens, output_tokens = sum(given.values()), sum(made.values())
        return {
            "total_tokens": input_tokens + output_tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "input_token_details": given,
            "output_token_details": made,
        }

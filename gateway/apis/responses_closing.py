"""The end of a response that the gateway ends early: everything that was opened is closed."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.apis.responses_items import CALLS, DONE, PART_STEMS, Item, Kind, Part
from gateway.domain.metered import Metered
from gateway.upstream.sse import BrokenStream, event_of


def closing_of(item: Item) -> Iterator[dict[str, Any]]:
    """The events that end an item here; its document is then what was told of it. A call gets none: clients run what is
    done, whatever its status, and half a call may be a very different one."""
    if item.closed or item.document is None:
        return
    whole: dict[str, Any] = {**item.document, "status": "incomplete"}
    where = {"item_id": item.document.get("id", ""), "output_index": item.index}
    lists: dict[str, list[dict[str, Any]]] = {}
    for (group, index), part in sorted(item.parts.items(), key=lambda entry: entry[0][1]):
        kind, text = part.kind, _joined(part.texts)
        if kind is None:
            continue
        if not kind.part_type:
            whole[group] = text
            continue
        document = {**({"annotations": []} if kind.part_type == "output_text" else {}), **part.document}
        document.update({"type": kind.part_type, kind.text: text})
        lists.setdefault(group, []).append(document)
        yield from _closing_of_part(part, kind, {**where, kind.index: index}, document, text)
    item.document, item.closed = {**whole, **lists}, True
    if item.document.get("type") not in CALLS:
        yield {"type": "response.output_item.done", "output_index": item.index, "item": item.document}


def _closing_of_part(
    part: Part, kind: Kind, where: dict[str, Any], document: dict[str, Any], text: str
) -> Iterator[dict[str, Any]]:
    if not part.ended:
        logprobs: dict[str, Any] = {"logprobs": []} if kind.part_type == "output_text" else {}
        yield {"type": kind.stem + DONE, **where, kind.text: text, **logprobs}
    if part.announced and not part.closed:
        stem = next(stem for stem, index in PART_STEMS.items() if index == kind.index)
        yield {"type": stem + DONE, **where, "part": document}


def usage_of(tokens: Metered) -> dict[str, Any]:
    """The usage that says what is charged."""
    return {
        "input_tokens": tokens.input,
        "input_tokens_details": {"cached_tokens": tokens.cache_read},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.input + tokens.output,
    }


def named_event(document: Mapping[str, Any], otherwise: bytes = b"") -> bytes:
    """A document as an event under the name of its type; otherwise: for one that is hard to write. Raises BrokenStream
    where it cannot be written at all."""
    event = event_of(document) or otherwise or _slowly_written(document)
    return event if event.startswith(b"event:") else b"event: " + document["type"].encode() + b"\n" + event


def _slowly_written(document: Mapping[str, Any]) -> bytes:
    """An event of what the quick library does not write: half a character, or something nested deeply. Raises
    BrokenStream where it is nested too deeply altogether."""
    try:
        return b"data: " + json.dumps(document).encode() + b"\n\n"
    except RecursionError:
        raise BrokenStream("an answer that is nested too deeply") from None


def _joined(texts: list[str]) -> str:
    """Pieces of a text as one, with the characters that were cut in two made whole."""
    return "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")

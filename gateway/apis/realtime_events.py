"""What a client says on the realtime websocket: what of it reaches the model, and what is refused.

Everything whose effect on the cost is not known is refused, as in the bodies of the other endpoints.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import orjson

from gateway.apis.fields import items, mapping, only, refuse_unknown, text, whole
from gateway.apis.realtime_audio import bytes_per_second, decoded_bytes
from gateway.apis.text import as_template_writes
from gateway.domain.request import InvalidRequest
from gateway.domain.value import value

# What an event may hold at most: parsing takes seconds and gigabytes where megabytes of it are brackets.
_MOST_CONTAINERS = 50_000
_MOST_VALUES = 500_000

_EVENT_FIELDS: Mapping[str, frozenset[str]] = {
    "session.update": frozenset({"session"}),
    "input_audio_buffer.append": frozenset({"audio"}),
    "input_audio_buffer.commit": frozenset(),
    "input_audio_buffer.clear": frozenset(),
    "output_audio_buffer.clear": frozenset(),
    "conversation.item.create": frozenset({"item", "previous_item_id"}),
    "conversation.item.retrieve": frozenset({"item_id"}),
    "conversation.item.delete": frozenset({"item_id"}),
    "conversation.item.truncate": frozenset({"item_id", "content_index", "audio_end_ms"}),
    "response.create": frozenset({"response"}),
    "response.cancel": frozenset({"response_id"}),
}
# The second lines are the names of the API's beta, which clients still use.
_SHARED_FIELDS = frozenset(
    "audio instructions max_output_tokens output_modalities parallel_tool_calls prompt reasoning tool_choice tools "
    "modalities voice output_audio_format temperature max_response_output_tokens".split()
)
_SESSION_FIELDS = _SHARED_FIELDS | frozenset(
    "type object id model include tracing truncation input_audio_transcription "
    "input_audio_format input_audio_noise_reduction turn_detection speed".split()
)
_RESPONSE_FIELDS = _SHARED_FIELDS | frozenset("conversation input metadata".split())
_AUDIO_FIELDS = frozenset({"input", "output"})
_AUDIO_INPUT_FIELDS = frozenset({"format", "noise_reduction", "transcription", "turn_detection"})
_TRANSCRIPTION_FIELDS = frozenset("model language languages prompt keywords delay".split())
_AUDIO_OUTPUT_FIELDS = frozenset({"format", "voice", "speed"})
# The keys of items that are text, or audio whose length is known. Whatever is not among them may stand for anything:
# then the whole context window is held.
_ITEM_KEYS = {
    "message": frozenset("id object type status role content".split()),
    "function_call": frozenset("id object type status call_id name arguments".split()),
    "function_call_output": frozenset("id object type status call_id output".split()),
}
#: The field that names another model.
TRANSCRIPTION = "session.audio.input.transcription"
_TEXT_PARTS = ("input_text", "output_text", "text")


class NotAnEvent(Exception):
    """What came is no JSON object with a type: nobody can say what it means."""


@value(frozen=True, slots=True)
class Content:
    """What an event puts before the model. text_bytes: UTF-8 bytes of its JSON. anything: it holds, or refers to,
    what is bounded by the context window alone."""

    text_bytes: int = 0
    audio_bytes: int = 0
    anything: bool = False

    def __bool__(self) -> bool:
        return bool(self.text_bytes or self.audio_bytes or self.anything)

    def plus(self, other: "Content") -> "Content":
        """Both."""
        return Content(
            self.text_bytes + other.text_bytes,
            self.audio_bytes + other.audio_bytes,
            self.anything or other.anything,
        )


@value(frozen=True, slots=True)
class ClientEvent:
    """An event that may be forwarded, as ``document``.

    content: what it adds to the conversation; own: what a response.create adds to its response alone. plain: the
    response answers the conversation and nothing else. input_rate, output_rate: bytes of audio per second that it asks
    for. answers_silence: it asks for responses that no event of the client comes before. transcription: what it says of
    the transcription of what is heard, as it stands in the document; None where nothing. transcribes: False where that
    is to end.
    """

    kind: str
    document: dict[str, Any]
    content: Content = Content()
    own: Content = Content()
    plain: bool = True
    input_rate: int | None = None
    output_rate: int | None = None
    answers_silence: bool = False
    transcription: dict[str, Any] | None = None
    transcribes: bool = True


def read_document(raw: str) -> dict[str, Any]:
    """An event as JSON. Raises NotAnEvent."""
    if raw.count("{") + raw.count("[") > _MOST_CONTAINERS or raw.count(",") > _MOST_VALUES:
        raise NotAnEvent("it has too many values")
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise NotAnEvent(f"it is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("type"), str):
        raise NotAnEvent("it is not a JSON object with a 'type'")
    return document


def read_client_event(document: dict[str, Any], model: str, allowed: Collection[str] = ()) -> ClientEvent:
    """What a client's event means for the cost. model: the session's, by the name that the client knows. allowed:
    fields that are let through besides. Raises InvalidRequest for one that is not to be forwarded."""
    kind = document["type"]
    known = _EVENT_FIELDS.get(kind)
    if known is None:
        raise InvalidRequest(f"events of type {kind[:64]!r} are not supported here", "type")
    text(document, "event_id")
    refuse_unknown(document, known | {"type", "event_id"}, allowed)
    try:
        read = _READERS.get(kind)
        return read(document, model, allowed) if read else ClientEvent(kind, document)
    except orjson.JSONEncodeError as error:
        raise InvalidRequest("it is nested too deeply") from error


def _read_append(document: dict[str, Any], model: str, allowed: Collection[str]) -> ClientEvent:
    audio = document.get("audio")
    if not isinstance(audio, str):
        raise InvalidRequest("'audio' must be a string", "audio")
    return ClientEvent(document["type"], document, Content(audio_bytes=decoded_bytes(audio)))


def _read_item(document: dict[str, Any], model: str, allowed: Collection[str]) -> ClientEvent:
    item = document.get("item")
    if not isinstance(item, dict):
        raise InvalidRequest("'item' must be an object", "item")
    return ClientEvent(document["type"], document, _content_of(item))


def _read_session(document: dict[str, Any], model: str, allowed: Collection[str]) -> ClientEvent:
    session = mapping(document, "session")
    refuse_unknown(session, _SESSION_FIELDS, allowed)
    only(session, "type", ("realtime",))
    only(session, "model", (model,))
    # What the upstream calls it may be another name, and it cannot be changed anyway.
    session.pop("model", None)
    audio = mapping(session, "audio")
    given, made = _audio_of(audio, allowed)
    places = ((given, "transcription"), (session, "input_audio_transcription"))
    said = [_transcription_of(place[name]) for place, name in places if name in place]
    if len(said) > 1:
        raise InvalidRequest("transcription can be said in one place only", "session.input_audio_transcription")
    detection = mapping(given, "turn_detection") or mapping(session, "turn_detection")
    return ClientEvent(
        document["type"],
        document,
        _prompt_of(session, "session"),
        input_rate=_rate(given.get("format") or session.get("input_audio_format"), "session.audio.input.format"),
        output_rate=_rate(made.get("format") or session.get("output_audio_format"), "session.audio.output.format"),
        answers_silence=detection.get("idle_timeout_ms") is not None,
        transcription=said[0] if said else None,
        transcribes=said != [None],
    )


def _read_create(document: dict[str, Any], model: str, allowed: Collection[str]) -> ClientEvent:
    response = mapping(document, "response")
    refuse_unknown(response, _RESPONSE_FIELDS, allowed)
    text(response, "conversation")
    _, made = _audio_of(mapping(response, "audio"), allowed)
    own = _prompt_of(response, "response")
    for item in items(response, "input"):
        if not isinstance(item, dict):
            raise InvalidRequest("each item must be an object", "response.input")
        own = own.plus(_content_of(item))
    own_context = response.get("input") is not None or response.get("tool_choice") is not None or own
    return ClientEvent(
        document["type"],
        document,
        own=own,
        plain=not own_context and response.get("conversation") in (None, "auto"),
        output_rate=_rate(made.get("format") or response.get("output_audio_format"), "response.audio.output.format"),
    )


_READERS: Mapping[str, Callable[[dict[str, Any], str, Collection[str]], ClientEvent]] = {
    "input_audio_buffer.append": _read_append,
    "conversation.item.create": _read_item,
    "session.update": _read_session,
    "response.create": _read_create,
}


def _audio_of(audio: dict[str, Any], allowed: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse_unknown(audio, _AUDIO_FIELDS, allowed)
    given, made = mapping(audio, "input"), mapping(audio, "output")
    refuse_unknown(given, _AUDIO_INPUT_FIELDS, allowed)
    refuse_unknown(made, _AUDIO_OUTPUT_FIELDS, allowed)
    return given, made


def _transcription_of(transcription: object) -> dict[str, Any] | None:
    if transcription is None:
        return None
    if not isinstance(transcription, dict) or not isinstance(transcription.get("model"), str):
        raise InvalidRequest("a transcription must name its 'model'", TRANSCRIPTION)
    refuse_unknown(transcription, _TRANSCRIPTION_FIELDS, ())
    return transcription


def _rate(format_: object, param: str) -> int | None:
    if format_ is None:
        return None
    rate = bytes_per_second(format_)
    if rate is None:
        raise InvalidRequest("audio of this format is not supported here: its length is not known", param)
    return rate


def _prompt_of(settings: dict[str, Any], param: str) -> Content:
    """What instructions and tools put before the model."""
    for name in ("max_output_tokens", "max_response_output_tokens"):
        if settings.get(name) != "inf":
            whole(settings, name, 1)
    text(settings, "instructions")
    for index, tool in enumerate(items(settings, "tools")):
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            raise InvalidRequest(
                "only tools of type 'function' are supported: what others cost is not known here",
                f"{param}.tools[{index}].type",
            )
    said = {name: settings[name] for name in ("instructions", "tools", "tool_choice") if settings.get(name)}
    size = len(orjson.dumps(said)) + as_template_writes(settings, ("tools",)) if said else 0
    return Content(size, anything=settings.get("prompt") is not None)


def _content_of(item: dict[str, Any]) -> Content:
    kind, parts = item.get("type"), item.get("content")
    size = len(orjson.dumps(item))
    known = _ITEM_KEYS.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    plain = all(isinstance(item.get(name, ""), str) for name in ("output", "arguments"))
    if not known or not plain or not {name for name, value in item.items() if value is not None} <= known:
        return Content(size, anything=True)
    if not isinstance(parts, list):
        return Content(size, anything=parts is not None and not isinstance(parts, str))
    content = Content(size)
    for part in parts:
        content = content.plus(_content_of_part(part))
    return content


def _content_of_part(part: object) -> Content:
    """What a part of an item holds besides the text that its JSON is."""
    if isinstance(part, dict):
        keys = {name for name, value in part.items() if value is not None}
        if part.get("type") in _TEXT_PARTS and keys <= {"type", "text"}:
            return Content()
        audio = part.get("audio")
        if part.get("type") == "input_audio" and isinstance(audio, str) and keys <= {"type", "audio", "transcript"}:
            return Content(-len(audio), decoded_bytes(audio))
    return Content(anything=True)

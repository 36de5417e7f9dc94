"""POST /chat/completions."""

from collections.abc import Iterator

from aiohttp import web

from gateway.demo.answer import MAX_TOOLS, Tool, tool_of
from gateway.demo.completion import Choice, Form, answer, question
from gateway.demo.fields import Body, content_text, objects, read_body
from gateway.demo.refusal import Refused
from gateway.demo.words import Prompt, count_tokens

_CALL_ID = "call_demo"


async def chat(request: web.Request) -> web.StreamResponse:
    """One or more answers to the last thing that the user said."""
    body = await read_body(request)
    return await answer(request, question(body, (_conversation(body),), _tools(body)), _FORM)


def _conversation(body: Body) -> Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", "messages")
    last, tokens = "", 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused("a message must be an object with a role", f"messages[{index}]")
        text = content_text(message.get("content"), f"messages[{index}].content")
        tokens += count_tokens(text)
        if message["role"] == "user":
            last = text
    return Prompt(last, tokens)


def _tools(body: Body) -> tuple[Tool, ...]:
    """The functions that may be called now: none once one has answered, or nobody would ever get words."""
    functions = [tool.get("function") for tool in objects(body, "tools", MAX_TOOLS)]
    if body["messages"][-1]["role"] != "user" or body.get("tool_choice") == "none":
        return ()
    found = [tool_of(each.get("name"), each.get("parameters")) for each in functions if isinstance(each, dict)]
    return tuple(tool for tool in found if tool)


def _whole(choice: Choice) -> Body:
    said = choice.answer
    message: Body = {"role": "assistant", "content": said.text, "refusal": None}
    if said.tool:
        call = {"id": _CALL_ID, "type": "function", "function": {"name": said.tool, "arguments": said.text}}
        message |= {"content": None, "tool_calls": [call]}
    return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}


def _pieces(choice: Choice) -> Iterator[tuple[Body, int]]:
    said = choice.answer
    if said.tool:
        function = {"name": said.tool, "arguments": ""}
        call = {"index": 0, "id": _CALL_ID, "type": "function", "function": function}
        yield _piece(choice, {"role": "assistant", "content": None, "tool_calls": [call]}), 0
        for token in said.tokens:
            yield _piece(choice, {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}), 1
    else:
        yield _piece(choice, {"role": "assistant", "content": ""}), 0
        for token in said.tokens:
            yield _piece(choice, {"content": token}), 1
    yield _piece(choice, {}), 0


def _piece(choice: Choice, delta: Body) -> Body:
    return {
        "index": choice.index,
        "delta": delta,
        "logprobs": None,
        "finish_reason": None if delta else choice.finish_reason,
    }


_FORM = Form("chatcmpl", "chat.completion", "chat.completion.chunk", _whole, _pieces)

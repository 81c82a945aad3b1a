"""One request is one call upstream, whatever upstream refuses; its own words come back.

The CLI mends many refusals by itself and calls again: without the image, the signature, the effort,
or without streaming. Each of those is tried here, by one way to ask in the suite, and by every way
with CC2API_TEST_EVERY=1.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from harness import RunningGateway
from scripted_api import Call, Reply, ScriptedApi, text_reply

JsonObject = dict[str, Any]
MODEL = "claude-sonnet-4-6"
THINKING_S = 0.1  # no upstream refuses at once; meanwhile the CLI is held back from a second call
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
IMAGE: JsonObject = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
}
PDF: JsonObject = {
    "type": "document",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"},
}
THOUGHT: JsonObject = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
THINKING: JsonObject = {"type": "enabled", "budget_tokens": 1024}
TOOL: JsonObject = {"name": "look", "input_schema": {"type": "object"}}


class Refusal(NamedTuple):
    """What upstream refuses, in which words, and a request that the CLI would mend for it."""

    message: str
    status: int = 400
    part: JsonObject | None = None  # beside the question
    thought: bool = False  # an answer with a signature goes before the question
    fields: JsonObject | None = None


REFUSALS = {
    "an image": Refusal("Could not process image", part=IMAGE),
    "a large image": Refusal(
        "messages.0.content.0.image.source.base64: image exceeds 5 MB maximum: 6 bytes > 5 bytes",
        part=IMAGE,
    ),
    "a wide image": Refusal(
        "messages.0.content.0.image.source.base64.data: At least one of the image dimensions exceed"
        " max allowed size: 8000 pixels",
        part=IMAGE,
    ),
    "a document": Refusal(
        "messages.0.content.0.document.source.base64.data: The document was refused", part=PDF
    ),
    "a PDF": Refusal("The PDF specified was not valid.", part=PDF),
    "a PDF's password": Refusal("The PDF specified is password protected.", part=PDF),
    "a PDF's pages": Refusal("A maximum of 100 PDF pages may be provided.", part=PDF),
    "a signature": Refusal(
        "messages.1.content.0: Invalid `signature` in `thinking` block", thought=True
    ),
    "no signature": Refusal(
        "messages.1.content.0.thinking.signature: Field required", thought=True
    ),
    "changed thinking": Refusal(
        "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest assistant"
        " message cannot be modified. These blocks must remain as they were.",
        thought=True,
    ),
    "adaptive thinking": Refusal(
        "adaptive thinking is not supported on this model",
        fields={"thinking": {"type": "adaptive"}},
    ),
    "enabled thinking": Refusal(
        '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" and'
        ' "output_config.effort" to control thinking behavior.',
        fields={"thinking": THINKING, "max_tokens": 4000},
    ),
    "effort": Refusal(
        "This model does not support the effort parameter.", fields={"effort": "high"}
    ),
    "a model": Refusal("model: claude-sonnet-4-6", status=404),
    "a file": Refusal("File not found: file_123", status=404),
    "a tool's schema": Refusal(
        "tools.0.custom.input_schema: JSON schema is invalid.", fields={"tools": [TOOL]}
    ),
    "a token": Refusal("Invalid bearer token", status=401),
    "an expired token": Refusal(
        "OAuth token has expired. Please obtain a new token or refresh your existing token.",
        status=401,
    ),
    "a revoked token": Refusal(
        "OAuth token has been revoked. Please obtain a new token.", status=403
    ),
    "a long prompt": Refusal("prompt is too long: 210000 tokens > 200000 maximum"),
    "the context limit": Refusal(
        "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease"
        " input length or `max_tokens` and try again"
    ),
    "a tool's id": Refusal(
        "messages.1: `tool_use` ids were found without `tool_result` blocks immediately after:"
        " toolu_1. Each `tool_use` block must have a corresponding `tool_result` block."
    ),
    "a result's id": Refusal(
        "messages.2.content.0: unexpected `tool_use_id` found in `tool_result` blocks: toolu_1."
    ),
    "a large request": Refusal("Request exceeds the maximum size", status=413),
    "no credit": Refusal("Your credit balance is too low to access the Anthropic API."),
    "an organisation": Refusal("This organization has been disabled."),
    "a beta": Refusal("Unexpected value(s) `x-2025` for the `anthropic-beta` header."),
    "an unknown field": Refusal("context_management: Extra inputs are not permitted"),
    "a forbidden thing": Refusal("Your account lacks access to this model.", status=403),
    "the rate": Refusal("This request would exceed your rate limit.", status=429),
    "an overload": Refusal("Overloaded", status=529),
    "a failure": Refusal("Internal server error", status=500),
}
ROUTES = ("/v1/messages", "/v1/chat/completions", "/v1/responses")
WAYS = [
    (route, stream, sign_in)
    for route in ROUTES
    for stream in (False, True)
    for sign_in in ("gateway", "login_gateway")
]
# In the suite each refusal is asked for in one of the ways, in turn.
EVERY = [(name, way) for name in REFUSALS for way in WAYS]
SOME = [(name, WAYS[number * 5 % len(WAYS)]) for number, name in enumerate(REFUSALS)]
CASES = EVERY if os.environ.get("CC2API_TEST_EVERY") else SOME


def messages_body(refusal: Refusal, word: str) -> JsonObject:
    question: JsonObject = {"type": "text", "text": word}
    content = [refusal.part, question] if refusal.part else [question]
    messages: list[JsonObject] = [{"role": "user", "content": content}]
    fields: JsonObject = {"model": MODEL, "max_tokens": 100, **(refusal.fields or {})}
    if refusal.thought:
        answer = [THOUGHT, {"type": "text", "text": "ho"}]
        messages.insert(0, {"role": "user", "content": "hi"})
        messages.insert(1, {"role": "assistant", "content": answer})
        fields |= {"thinking": THINKING, "max_tokens": 4000}
    return {**fields, "messages": messages}


def chat_body(refusal: Refusal, word: str) -> JsonObject:
    """Return the same as chat completions, as far as they can say it."""
    content: list[JsonObject] = [{"type": "text", "text": word}]
    if refusal.part is IMAGE:
        url = f"data:image/png;base64,{PIXEL}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    if refusal.part is PDF:
        data = f"data:application/pdf;base64,{PDF['source']['data']}"
        content.insert(0, {"type": "file", "file": {"file_data": data}})
    body: JsonObject = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    fields = refusal.fields or {}
    if "effort" in fields:
        body["reasoning_effort"] = fields["effort"]
    if "tools" in fields:
        function = {"name": "look", "parameters": {"type": "object"}}
        body["tools"] = [{"type": "function", "function": function}]
    return body


def responses_body(refusal: Refusal, word: str) -> JsonObject:
    """Return the same as a response, as far as it can say it."""
    content: list[JsonObject] = [{"type": "input_text", "text": word}]
    if refusal.part is IMAGE:
        content.insert(0, {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"})
    if refusal.part is PDF:
        data = f"data:application/pdf;base64,{PDF['source']['data']}"
        content.insert(0, {"type": "input_file", "file_data": data})
    body: JsonObject = {"model": MODEL, "input": [{"role": "user", "content": content}]}
    fields = refusal.fields or {}
    if "thinking" in fields or refusal.thought:
        body["reasoning"] = {"summary": "auto"}
    if "effort" in fields:
        body["reasoning"] = {"effort": fields["effort"]}
    if "tools" in fields:
        function = {"name": "look", "parameters": {"type": "object"}}
        body["tools"] = [{"type": "function", **function}]
    return body


BODIES = dict(zip(ROUTES, (messages_body, chat_body, responses_body), strict=True))
OPENAI_STATUS = {529: 503}  # messages-api.md section 7.4


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: str(value).replace("/", "."))
def test_a_refusal_is_one_call_and_comes_back_in_upstreams_words(
    request: pytest.FixtureRequest, api: ScriptedApi, name: str, way: tuple[str, bool, str]
) -> None:
    route, stream, sign_in = way
    gateway: RunningGateway = request.getfixturevalue(sign_in)
    refusal = REFUSALS[name]
    word = f"mark-{uuid4().hex}"
    api.on(word, Reply(status=refusal.status, message=refusal.message, delay_s=THINKING_S))

    answer = gateway.request("POST", route, {**BODIES[route](refusal, word), "stream": stream})

    assert answer.json["error"]["message"] == refusal.message
    expected = refusal.status
    if route != "/v1/messages":
        expected = OPENAI_STATUS.get(expected, expected)
    assert answer.status == expected
    # Whatever its process would still do, it does before it answers somebody else.
    after = f"mark-{uuid4().hex}"
    assert gateway.ask(after).status == 200
    assert len(api.calls_with(word)) == 1
    assert word not in json.dumps(api.calls_with(after)[0].body)


def less_attribution(call: Call, word: str) -> str:
    """Return a body without its words, and without what depends on the process and on them."""
    body = {**call.body, "metadata": None, "system": call.body["system"][1:]}
    return json.dumps(body).replace(word, "")


def test_what_the_cli_left_out_after_a_refusal_goes_upstream_in_the_next_request(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    """The CLI remembers what upstream refused, and leaves that out of its later requests."""
    for name in ("an image", "effort", "adaptive thinking"):
        refusal = REFUSALS[name]
        word, again = f"mark-{uuid4().hex}", f"mark-{uuid4().hex}"
        api.on(word, Reply(status=400, message=refusal.message, delay_s=THINKING_S))
        gateway.post(messages_body(refusal, word))
        api.on(again, text_reply("fine"))
        assert gateway.post(messages_body(refusal, again)).status == 200
        (first,), (second,) = api.calls_with(word), api.calls_with(again)
        assert less_attribution(first, word) == less_attribution(second, again)


def test_a_tool_input_that_is_no_json_is_one_call(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = f"mark-{uuid4().hex}"
    call = {"type": "tool_use", "id": "toolu_bad", "name": "look", "input": {}}
    api.on(word, Reply(blocks=[call], stop_reason="tool_use", raw_input='{"a": ', delay_s=0.3))
    answer = gateway.ask(word, tools=[TOOL])
    assert (answer.status, answer.json["content"]) == (200, [call])
    assert gateway.ask(f"mark-{uuid4().hex}").status == 200
    assert len(api.calls_with(word)) == 1


@pytest.mark.parametrize("page", ["<html>\n<h1>Bad Gateway</h1>\n</html>", "upstream is away", ""])
def test_an_error_that_is_not_the_apis_comes_back_as_it_is(
    gateway: RunningGateway, api: ScriptedApi, page: str
) -> None:
    word = f"mark-{uuid4().hex}"
    api.on(word, Reply(status=502, raw_body=page, delay_s=THINKING_S))
    answer = gateway.ask(word)
    assert answer.status == 502
    assert answer.json["error"]["type"] == "api_error"
    if page:
        assert page.split("\n")[0] in answer.json["error"]["message"]
    assert len(api.calls_with(word)) == 1

"""The newest models on all three APIs: an upstream that refuses what the real one refuses.

What it refuses stands in api_rules.py. The same requests go to an older model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from harness import LOGIN, Answer, RunningGateway
from helpers import marker, tool
from scripted_api import DEFAULT_TEXT, Call, Reply, ScriptedApi, text_reply

JsonObject = dict[str, Any]
MODELS = ("sonnet", "claude-opus-5-5", "claude-opus-4-7", "claude-sonnet-4-6", "claude-haiku-4-5")
OLD = ("claude-sonnet-4-6", "claude-haiku-4-5")


@pytest.fixture(scope="module")
def strict_api() -> Iterator[ScriptedApi]:
    with ScriptedApi() as api:
        api.is_strict = True
        yield api


@pytest.fixture(scope="module", params=["key", "login"])
def strict(
    strict_api: ScriptedApi, quick_claude: str, request: pytest.FixtureRequest
) -> Iterator[RunningGateway]:
    env = LOGIN if request.param == "login" else None
    with RunningGateway(claude=quick_claude, base_url=strict_api.url, env=env) as gateway:
        yield gateway


def chat(gateway: RunningGateway, model: str, *messages: JsonObject, **fields: Any) -> Answer:
    body = {"model": model, "messages": list(messages), **fields}
    return gateway.request("POST", "/v1/chat/completions", body)


def respond(gateway: RunningGateway, model: str, given: Any, **fields: Any) -> Answer:
    return gateway.request("POST", "/v1/responses", {"model": model, "input": given, **fields})


def user(content: Any) -> JsonObject:
    return {"role": "user", "content": content}


def blocks_sent(call: Call) -> list[JsonObject]:
    """Return the blocks of a call's messages; what a login adds behind the first is a string."""
    contents = [message["content"] for message in call.body["messages"]]
    return [block for content in contents if isinstance(content, list) for block in content]


SCHEMA = {
    "type": "object",
    "properties": {
        "minimum": {"type": "integer", "minimum": 0, "maximum": 9},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        "more": {"type": ["string", "null"], "format": "iban"},
    },
    "required": ["minimum", "words", "more"],
    "additionalProperties": False,
}
FUNCTION = {"name": "f", "parameters": SCHEMA, "strict": True}


@pytest.mark.parametrize("model", MODELS)
def test_what_openais_clients_send_is_answered(
    strict: RunningGateway, strict_api: ScriptedApi, model: str
) -> None:
    word = marker()
    settings = {"temperature": 0, "top_p": 1, "tool_choice": "auto"}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    tools = [{"type": "function", "function": FUNCTION}]
    more = {"presence_penalty": 0, "reasoning_effort": "low", "max_tokens": 9}
    answer = chat(
        strict, model, user(word), response_format=wanted, tools=tools, **settings, **more
    )
    assert answer.status == 200, answer.json

    flat = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    reasoning = {"effort": "low", "summary": "auto"}
    again = respond(
        strict, model, word, text={"format": flat}, tools=[{"type": "function", **FUNCTION}],
        reasoning=reasoning, **settings,
    )  # fmt: skip
    assert again.status == 200, again.json

    first, second = strict_api.calls_with(word)
    for sent in (first.body, second.body):
        assert sent["tools"][0]["strict"] is True
        number = sent["output_config"]["format"]["schema"]["properties"]["minimum"]
        assert number == {"type": "integer", "description": "{minimum: 0, maximum: 9}"}
    assert first.body.get("temperature") == (0 if model in OLD else None)
    assert ("thinking" in second.body) == (model != "claude-haiku-4-5")


@pytest.mark.parametrize("model", ["sonnet", "claude-sonnet-4-6"])
@pytest.mark.parametrize("value", [0, 0.3, 1])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_sampling_is_kept_where_the_model_takes_it(
    strict: RunningGateway, strict_api: ScriptedApi, model: str, name: str, value: float
) -> None:
    word = marker()
    assert chat(strict, model, user(word), **{name: value}).status == 200
    assert respond(strict, model, word, **{name: value}).status == 200
    sent = [call.body.get(name) for call in strict_api.calls_with(word)]
    assert sent == ([value, value] if model in OLD else [None, None])


def test_the_messages_api_sends_it_all_the_same(strict: RunningGateway) -> None:
    answer = strict.ask("hi", model="sonnet", temperature=1)
    assert answer.status == 400
    assert answer.json["error"]["message"] == "`temperature` is deprecated for this model."
    assert strict.ask("hi", model="sonnet").status == 200


@pytest.mark.parametrize("model", ["sonnet", "anthropic/claude-sonnet-4-6"])
@pytest.mark.parametrize(
    "messages",
    [
        [user("")],
        [user([])],
        [user("hi"), {"role": "assistant", "content": "A"}, user(" \n")],
        [user("hi"), {"role": "assistant", "content": "A"}, user(""), user("more")],
        [user(""), {"role": "assistant", "content": "A"}, user("more")],
        [user("hi"), user([{"type": "text", "text": ""}])],
        [{"role": "system", "content": "Tell a joke."}],
        [{"role": "developer", "content": "Tell a joke."}, {"role": "system", "content": "Now."}],
    ],
    ids=str,
)
def test_conversations_that_openai_takes(
    strict: RunningGateway, model: str, messages: list[JsonObject]
) -> None:
    for answer in (chat(strict, model, *messages), respond(strict, model, messages)):
        assert answer.status == 200, answer.json
        assert "/" not in answer.json["model"]


@pytest.mark.parametrize("model", ["sonnet", "claude-sonnet-4-6"])
def test_an_id_may_be_used_again_in_a_later_turn(
    strict: RunningGateway, strict_api: ScriptedApi, model: str
) -> None:
    word = marker()
    odd_id = "functions.f:0|x"
    call = {"type": "function", "id": odd_id, "function": {"name": "f", "arguments": {"n": 1}}}
    steps: list[JsonObject] = []
    for number in range(3):
        steps.append({"role": "assistant", "content": None, "tool_calls": [call]})
        steps.append({"role": "tool", "tool_call_id": odd_id, "content": f"result {number}"})
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(strict, model, user(word), *steps, tools=tools).status == 200

    items: list[JsonObject] = [user(word)]
    for number in range(3):
        arguments = '{"n": 1}'
        items.append(
            {"type": "function_call", "call_id": odd_id, "name": "f", "arguments": arguments}
        )
        output = f"result {number}"
        items.append({"type": "function_call_output", "call_id": odd_id, "output": output})
    flat_tools = [{"type": "function", "name": "f"}]
    assert respond(strict, model, items, tools=flat_tools).status == 200

    for sent in strict_api.calls_with(word):
        blocks = blocks_sent(sent)
        called = [block["id"] for block in blocks if block["type"] == "tool_use"]
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        assert called == answered
        assert len(set(called)) == 3


def test_an_answers_call_keeps_its_id(strict: RunningGateway, strict_api: ScriptedApi) -> None:
    word = marker()
    strict_api.on(word, Reply(blocks=[tool("f", {"a": 1})], stop_reason="tool_use"))
    strict_api.on(f"done {word}", text_reply())
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = chat(strict, "sonnet", user(word), tools=tools, temperature=0.5).json
    message = answer["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": "toolu_1", "content": f"done {word}"}
    after = chat(strict, "sonnet", user(word), message, result, tools=tools, temperature=0.5)
    assert after.json["choices"][0]["message"]["content"] == DEFAULT_TEXT
    sent = blocks_sent(strict_api.calls_with(word)[-1])
    (call,) = (block for block in sent if block["type"] == "tool_use")
    assert call["id"] == "toolu_1"


THOUGHT = {"type": "thinking", "thinking": "Hm, so.", "signature": "c2lnMQ=="}
UNSAID = {"type": "thinking", "thinking": "", "signature": "c2lnMg=="}  # the newest show no text
HIDDEN = {"type": "redacted_thinking", "data": "ZGF0YQ=="}


def streamed_message(answer: Answer, merge: Any) -> JsonObject:
    """Put a streamed answer together as a client does; `merge` takes two values of a field."""
    message: JsonObject = {}
    for frame in answer.body.decode().split("\n\n"):
        if not frame.startswith("data: {"):
            continue
        for choice in json.loads(frame.removeprefix("data: "))["choices"]:
            for name, value in choice["delta"].items():
                message[name] = merge(message[name], value) if name in message else value
    return message


def joined(first: Any, second: Any) -> Any:
    """Join as LiteLLM and pi do."""
    return second if first is None else first if second is None else first + second


def replaced(first: Any, second: Any) -> Any:
    """Join as Copilot's CLI does, which keeps the latest list."""
    return second if isinstance(second, list) else joined(first, second)


@pytest.mark.parametrize("field", ["reasoning_details", "thinking_blocks", "both"])
@pytest.mark.parametrize("merge", [None, joined, replaced])
@pytest.mark.parametrize("thinking", [[THOUGHT], [UNSAID], [THOUGHT, HIDDEN]], ids=str)
def test_thinking_survives_a_tool_step_of_chat_completions(
    strict: RunningGateway,
    strict_api: ScriptedApi,
    thinking: list[JsonObject],
    merge: Any,
    field: str,
) -> None:
    if merge is replaced and len(thinking) > 1:
        return  # it keeps the last block alone
    word = marker()
    call = tool("f", {"a": 1})
    strict_api.on(word, Reply(blocks=[*thinking, call], stop_reason="tool_use"))
    strict_api.on(f"done {word}", text_reply())
    fields = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "stream": merge is not None,
    }
    answer = chat(strict, "sonnet", user(word), **fields)
    if merge is None:
        message = answer.json["choices"][0]["message"]
    else:
        message = streamed_message(answer, merge)
        called = {"name": "f", "arguments": '{"a": 1}'}
        message["tool_calls"] = [{"id": "toolu_1", "type": "function", "function": called}]
    if field != "both":
        for other in {"reasoning_details", "thinking_blocks"} - {field}:
            del message[other]
    result = {"role": "tool", "tool_call_id": "toolu_1", "content": f"done {word}"}
    assert chat(strict, "sonnet", user(word), message, result, **fields).status == 200
    sent = blocks_sent(strict_api.calls_with(word)[-1])
    assert [
        block for block in sent if block["type"] in ("thinking", "redacted_thinking")
    ] == thinking
    assert message.get("reasoning_content", "") == thinking[0]["thinking"]


@pytest.mark.parametrize("name", ["apply_patch", "shell", "local_shell"])
def test_openais_own_tools_that_clients_run(
    strict: RunningGateway, strict_api: ScriptedApi, name: str
) -> None:
    word = marker()
    inputs: dict[str, JsonObject] = {
        "apply_patch": {"type": "delete_file", "path": "a"},
        "shell": {"commands": ["ls"]},
        "local_shell": {"command": ["ls", "-l"]},
    }
    given = inputs[name]
    strict_api.on(word, Reply(blocks=[tool(name, given)], stop_reason="tool_use"))
    strict_api.on(f"done {word}", text_reply())
    answer = respond(strict, "sonnet", word, tools=[{"type": name}]).json
    (call,) = answer["output"]
    field = "operation" if name == "apply_patch" else "action"
    assert (call["type"], call["call_id"], call["status"]) == (
        f"{name}_call",
        "toolu_1",
        "completed",
    )
    assert given.items() <= call[field].items()

    output: JsonObject = {"type": f"{name}_call_output", "call_id": "toolu_1"}
    if name == "shell":
        outcome = {"type": "exit", "exit_code": 0}
        output["output"] = [{"stdout": f"done {word}", "stderr": "", "outcome": outcome}]
    else:
        output["output"] = f"done {word}"
    after = respond(strict, "sonnet", [user(word), call, output], tools=[{"type": name}])
    assert after.status == 200, after.json
    assert after.json["output"][0]["content"][0]["text"] == DEFAULT_TEXT
    sent = blocks_sent(strict_api.calls_with(word)[-1])
    (called,) = (block for block in sent if block["type"] == "tool_use")
    assert given.items() <= called["input"].items()
    assert json.dumps(sent).count(f"done {word}") == 1

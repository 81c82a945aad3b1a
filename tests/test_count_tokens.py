"""Token counts are the API's own, asked for by the real CLI; nothing is ever generated."""

from __future__ import annotations

import json
import re
from typing import Any
from uuid import uuid4

import anthropic
import pytest
from harness import Answer, RunningGateway
from helpers import marker
from scripted_api import UNKNOWN_MODEL, ScriptedApi

JsonObject = dict[str, Any]
TOOLS: list[JsonObject] = [
    {"name": "lookup", "description": "one two three", "input_schema": {"type": "object"}},
    {"name": "other", "description": "w " * 700, "input_schema": {"type": "object"}},
]


def count(gateway: RunningGateway, text: str, **fields: Any) -> int:
    body = {"model": "claude-sonnet-4-6", "messages": [{"role": "user", "content": text}]}
    answer: Answer = gateway.request("POST", "/v1/messages/count_tokens", {**body, **fields})
    assert answer.status == 200, answer.body
    return int(answer.json["input_tokens"])


def test_counts_differ_as_the_apis_own_do_and_nothing_is_generated(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    generated = len(api.calls)
    few, many = marker() + " word" * 99, marker() + " word" * 4099
    assert count(gateway, many) - count(gateway, few) == 4000
    assert len(api.calls) == generated


def test_a_count_takes_no_process(gateway: RunningGateway) -> None:
    count(gateway, marker(), tools=TOOLS)
    before = gateway.children()
    for number in range(5):
        count(gateway, marker(), system=f"prompt {number}", tools=TOOLS)
    assert set(before) <= set(gateway.children())


def test_a_tool_that_changes_under_its_name_is_counted_anew(gateway: RunningGateway) -> None:
    text, name = marker(), "tool_" + uuid4().hex[:8]
    tool = {"name": name, "description": "one two", "input_schema": {"type": "object"}}
    assert gateway.ask("hello", tools=[tool]).status == 200
    first = count(gateway, text, tools=[tool])
    second = count(gateway, text, tools=[{**tool, "description": "one two three"}])
    assert second == first + 1


def test_the_system_prompt_and_the_history_count(gateway: RunningGateway) -> None:
    text = marker()
    assert count(gateway, text, system="one two three") - count(gateway, text) == 3
    messages = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": [{"type": "text", "text": "c d e"}]},
        {"role": "user", "content": text},
    ]
    assert count(gateway, text, messages=messages) - count(gateway, text) == 2 + 3 + 2 * 7


def test_tools_count_with_what_the_api_adds_for_them(gateway: RunningGateway) -> None:
    text = marker()
    for tools in (TOOLS[:1], TOOLS):
        words = sum(len(re.findall(r"\w+", json.dumps(tool))) for tool in tools)
        extra = count(gateway, text, tools=tools) - count(gateway, text)
        assert extra == words + 346


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        ({"properties": None, "required": None}, {}),
        (
            {"properties": {"a": {"type": "string"}}, "required": None},
            {"properties": {"a": {"type": "string"}}},
        ),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}),
    ],
)
def test_schemas_that_mcp_does_not_take_are_counted(
    gateway: RunningGateway, odd: JsonObject, plain: JsonObject
) -> None:
    text, names = marker(), [f"tool_{uuid4().hex[:8]}" for _ in range(2)]
    first, second = (
        count(gateway, text, tools=[{"name": name, "input_schema": {"type": "object", **schema}}])
        for name, schema in zip(names, (odd, plain), strict=True)
    )
    assert first == second


def test_a_schema_without_a_type_is_counted_and_an_invalid_one_refused(
    gateway: RunningGateway,
) -> None:
    text = marker()
    few, many = (
        {"name": f"f{number}", "input_schema": {"properties": {f"p{i}": {} for i in range(number)}}}
        for number in (10, 510)
    )
    assert count(gateway, text, tools=[many]) - count(gateway, text, tools=[few]) == 500

    invalid = {"name": "bad", "input_schema": {"type": "object", "additionalProperties": 5}}
    body = {"model": "claude-sonnet-4-6", "messages": [{"role": "user", "content": text}]}
    body["tools"] = [{"name": "good", "input_schema": {"type": "object"}}, invalid]
    answer = gateway.request("POST", "/v1/messages/count_tokens", body)
    # The oldest CLI takes such a schema.
    assert answer.status in (200, 400)
    assert answer.status == 200 or answer.json["error"]["message"].startswith("tools.1: ")


def test_the_sdk_counts(gateway: RunningGateway) -> None:
    with anthropic.Anthropic(base_url=gateway.url, api_key="any") as client:
        counted = client.messages.count_tokens(
            model="claude-sonnet-4-6", messages=[{"role": "user", "content": "a b c"}]
        )
    assert counted.input_tokens == count(gateway, "a b c") >= 10


def test_a_bad_count_request_is_400(gateway: RunningGateway) -> None:
    answer = gateway.request("POST", "/v1/messages/count_tokens", {"model": "m"})
    assert (answer.status, answer.json["error"]["message"]) == (400, "messages: Field required")


def test_images_and_documents_count(gateway: RunningGateway) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgoAAAANSUhEUg=="}
    image = {"type": "image", "source": source}
    plain = {"type": "text", "media_type": "text/plain", "data": "x" * 500}
    document = {"type": "document", "source": plain}
    text = {"type": "text", "text": marker()}
    alone = count(gateway, "", messages=[{"role": "user", "content": [text]}])
    whole = [{"role": "user", "content": [document, image, text]}]
    assert count(gateway, "", messages=whole) > alone + 50


def test_a_conversation_that_ends_with_the_assistant_counts(gateway: RunningGateway) -> None:
    asked = {"role": "user", "content": marker()}
    both = [asked, {"role": "assistant", "content": "one two"}]
    assert count(gateway, "", messages=both) - count(gateway, "", messages=[asked]) == 2 + 7


def test_a_count_is_some_calls_that_cost_nothing(gateway: RunningGateway, api: ScriptedApi) -> None:
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    count(gateway, marker(), tools=tools)  # the first one learns what the padding counts
    calls = []
    for fields in ({}, {"tools": tools}):
        before = api.counted
        count(gateway, marker(), **fields)
        calls.append(api.counted - before)
    assert calls[0] <= 3
    assert calls[1] <= 5


def test_a_guess_of_the_cli_is_not_taken_for_a_count(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    text = marker()
    body = {"model": "claude-sonnet-4-6", "messages": [{"role": "user", "content": text}]}
    api.counts = False
    try:
        answer = gateway.request("POST", "/v1/messages/count_tokens", body)
    finally:
        api.counts = True
    assert answer.status == 529
    assert answer.json["error"] == {"type": "overloaded_error", "message": "Overloaded"}
    assert count(gateway, text) >= 8


def test_an_unknown_model_is_404(gateway: RunningGateway) -> None:
    body = {"model": UNKNOWN_MODEL, "messages": [{"role": "user", "content": marker()}]}
    answer = gateway.request("POST", "/v1/messages/count_tokens", body)
    assert answer.status == 404
    assert answer.json["error"]["message"] == f"model: {UNKNOWN_MODEL}"
    body = {"model": UNKNOWN_MODEL, "input": marker()}
    answer = gateway.request("POST", "/v1/responses/input_tokens", body)
    assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("after", [3])
def test_an_upstream_that_stops_counting_half_way_gives_no_number(
    start: Any, api: ScriptedApi, after: int
) -> None:
    gateway = start()
    tools = [{"name": "look", "description": "word " * 50, "input_schema": {"type": "object"}}]
    messages = [{"role": "user", "content": marker()}]
    body = {"model": "claude-sonnet-4-6", "messages": messages, "tools": tools}
    api.counts_at_most = api.counted + after
    try:
        answer = gateway.request("POST", "/v1/messages/count_tokens", body)
    finally:
        api.counts_at_most = None
    assert answer.status == 529

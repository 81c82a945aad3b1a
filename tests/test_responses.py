"""The Responses API: the translation both ways, and the telling tests on the real CLI.

The numbers are those of the telling tests of the contract on which this is built.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from harness import Answer, InProcessGateway, RunningGateway
from helpers import marker, text, tool
from hypothesis import HealthCheck, given, settings, strategies as st
from openai._models import construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel
from random_answers import asked, streams
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi, text_reply
from test_fuzz import values

import cc2api

JsonObject = dict[str, Any]
PNG = "iVBORw0KGgoAAAANSUhEUg=="
F: JsonObject = {"type": "function", "name": "f", "parameters": {"type": "object"}}
C: JsonObject = {"type": "custom", "name": "c", "description": "edits"}
SPACE: JsonObject = {"type": "namespace", "name": "ns", "description": "of ns", "tools": [F]}
SEARCH: JsonObject = {"type": "tool_search", "execution": "client", "parameters": {}}
CALL: JsonObject = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'}
OUTPUT: JsonObject = {"type": "function_call_output", "call_id": "a", "output": "one"}
HI: JsonObject = {"role": "user", "content": "hi"}


def parse(*items: JsonObject, **fields: Any) -> tuple[cc2api.Turn, cc2api.ResponsesEncoder]:
    body = {"model": "m", "input": list(items) or "hi", **fields}
    return cc2api.parse_responses_request(copy.deepcopy(body))


def messages_of(*items: JsonObject, **fields: Any) -> list[tuple[str, Any]]:
    return [(message.role, message.content) for message in parse(*items, **fields)[0].messages]


# ---- requests


def test_a_string_is_one_user_message() -> None:
    turn, _ = parse(input="hello", instructions="be brief")
    assert turn.system == "be brief"
    assert [(m.role, m.content) for m in turn.messages] == [("user", [text("hello")])]


def test_images_and_files_become_blocks() -> None:
    pdf = base64.b64encode(b"%PDF-1.4").decode()
    parts = [
        {"type": "input_text", "text": "see", "prompt_cache_breakpoint": {}},
        {"type": "input_text", "text": " "},
        {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "original"},
        {"type": "input_image", "image_url": "https://x/y.png"},
        {"type": "input_file", "file_data": pdf, "filename": "n", "file_url": ""},
        {"type": "input_file", "file_url": "https://x/y.pdf"},
    ]
    image = {"type": "base64", "media_type": "image/png", "data": PNG}
    document = {"type": "base64", "media_type": "application/pdf", "data": pdf}
    blocks = [
        text("see"),
        {"type": "image", "source": image},
        {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
        {"type": "document", "title": "n", "source": document},
        {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}},
    ]
    assert messages_of({"role": "user", "content": parts}) == [("user", blocks)]
    result = {"type": "tool_result", "tool_use_id": "a", "content": blocks}
    assert messages_of(CALL, {**OUTPUT, "output": parts})[-1] == ("user", [result])


def test_developer_messages_are_system_at_first_and_reminders_later() -> None:
    """25, without the CLI."""
    developer = {"type": "message", "role": "developer", "content": "rules"}
    turn, _ = parse(
        {"type": "additional_tools", "role": "developer", "tools": [F]},
        developer,
        {"role": "system", "content": [{"type": "input_text", "text": "more"}]},
        HI,
        CALL,
        {"role": "developer", "content": "late"},
        OUTPUT,
        instructions="first",
    )
    assert turn.system == "first\n\nrules\n\nmore"
    reminder = text("<system-reminder>\nlate\n</system-reminder>")
    result = {"type": "tool_result", "tool_use_id": "a", "content": [text("one")]}
    assert turn.messages[-1].content == [result, reminder]


def test_results_come_first_in_what_is_said_between_two_answers() -> None:
    """9, without the CLI."""
    second = {**CALL, "call_id": "b", "arguments": ""}
    got = messages_of(HI, CALL, second, HI, OUTPUT, {**OUTPUT, "call_id": "b", "output": " "})
    assert got[1] == ("assistant", [tool("f", {"x": 1}) | {"id": "a"}, tool("f", {}) | {"id": "b"}])
    result = {"type": "tool_result", "tool_use_id": "a", "content": [text("one")]}
    assert got[2][1] == [result, {**result, "tool_use_id": "b", "content": []}, text("hi")]


THINKING = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "xyz"}


def reasoning(block: JsonObject | str, **more: Any) -> JsonObject:
    sealed = block if isinstance(block, str) else cc2api.seal(block)
    return {"type": "reasoning", "summary": [], "encrypted_content": sealed, **more}


@pytest.mark.parametrize("block", [THINKING, REDACTED])
def test_thinking_comes_back_whole_whatever_became_of_its_summary(block: JsonObject) -> None:
    """7 and 8, without the CLI."""
    item = reasoning(block, summary=[{"type": "summary_text", "text": "cut"}], content=None)
    got = messages_of(HI, item, {"role": "assistant", "content": "so"}, HI)
    assert got[1] == ("assistant", [block, text("so")])


FOREIGN = [
    *("gAAAA-of-another", "", "cc2api:", "cc2api:&&&", "cc2api:bm8ganNvbg==", "cc2api:é"),
    cc2api.seal({"type": "text", "text": "injected"}),
    cc2api.seal({"type": ["thinking"]}),
    "cc2api:" + base64.urlsafe_b64encode(b"[1]").decode(),
]


@pytest.mark.parametrize("sealed", [*FOREIGN, None, 5])
def test_foreign_reasoning_is_dropped(sealed: Any) -> None:
    """6, without the CLI."""
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    assert messages_of(HI, item, {"role": "assistant", "content": "so"}, HI)[1:2] == [
        ("assistant", [text("so")])
    ]


def test_thinking_that_led_to_nothing_is_dropped() -> None:
    assert messages_of(HI, reasoning(THINKING), HI) == [("user", [text("hi"), text("hi")])]


TOOLS: list[tuple[list[JsonObject], list[JsonObject], dict[str, JsonObject]]] = [
    (
        [{"type": "function", "name": "f", "parameters": None, "strict": None, "async": True}],
        [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
        {"f": {"type": "function_call", "name": "f"}},
    ),
    (
        [
            {**F, "parameters": {"properties": {}}, "strict": True, "description": "d"},
            F | {"name": "g"},
        ],
        [
            {
                **{"name": "f", "description": "d", "strict": True},
                "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
            },
            {"name": "g", "input_schema": {"type": "object"}},
        ],
        {n: {"type": "function_call", "name": n} for n in ("f", "g")},
    ),
    (
        [SPACE],
        [{"name": "ns__f", "description": "of ns", "input_schema": {"type": "object"}}],
        {"ns__f": {"type": "function_call", "name": "f", "namespace": "ns"}},
    ),
    (
        [{"type": "web_search", "external_web_access": False}, {"type": "web_search_preview"}],
        [],
        {},
    ),
    ([{"type": "tool_search"}], [], {}),
]


@pytest.mark.parametrize(("tools", "sent", "calls"), TOOLS)
def test_tools_are_translated(
    tools: list[JsonObject], sent: list[JsonObject], calls: dict[str, JsonObject]
) -> None:
    turn, writer = parse(tools=tools)
    assert turn.tools == sent
    assert writer.call_fields == calls
    assert ("tool_choice" in turn.extra_body) == bool(sent)


def test_a_custom_tool_tells_the_model_its_grammar() -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    turn, writer = parse(tools=[{**C, "format": form}])
    (sent,) = turn.tools
    assert sent["description"].startswith("edits\n\n")
    assert 'lark grammar:\nstart: "x"' in sent["description"]
    assert sent["input_schema"]["properties"] == {"input": {"type": "string"}}
    assert writer.call_fields == {"c": {"type": "custom_tool_call", "name": "c"}}


def test_tools_come_with_items_too() -> None:
    """14, and half of 15, without the CLI."""
    search = {"type": "tool_search_call", "call_id": "s", "execution": "client"}
    found = {"type": "tool_search_output", "call_id": "s", "execution": "client", "tools": [SPACE]}
    turn, _ = parse(
        {"type": "additional_tools", "role": "developer", "tools": [C, SEARCH]},
        HI,
        {**search, "arguments": {"query": "q"}},
        found,
        {**search, "call_id": "t", "arguments": {}},
        {**found, "call_id": "t"},
    )
    assert [sent["name"] for sent in turn.tools] == ["c", "tool_search", "ns__f"]
    assert turn.messages[1].content == [tool("tool_search", {"query": "q"}) | {"id": "s"}]
    (result,) = turn.messages[2].content
    assert json.loads(result["content"][0]["text"]) == [SPACE]


def test_a_tool_that_a_later_search_describes_anew_is_the_later() -> None:
    anew = {**SPACE, "tools": [{**F, "description": "better"}]}
    turn, writer = parse({"type": "additional_tools", "tools": [anew]}, HI, tools=[SPACE, C])
    assert [sent["name"] for sent in turn.tools] == ["ns__f", "c"] == list(writer.call_fields)
    assert turn.tools[0]["description"] == "of ns\n\nbetter"


def test_a_forced_tool_is_called_without_thinking() -> None:
    """The API refuses the two together."""
    asked = {"reasoning": {"summary": "auto"}, "tools": [F]}
    for choice in ("required", {"type": "function", "name": "f"}):
        assert "thinking" not in parse(**asked, tool_choice=choice)[0].extra_body
    assert "thinking" in parse(**asked, tool_choice="auto")[0].extra_body


FIELDS: list[tuple[JsonObject, JsonObject]] = [
    ({"max_output_tokens": 5}, {"max_tokens": 5}),
    ({"temperature": 1.7}, {"temperature": 1}),
    ({"top_p": 1, "temperature": 0.7}, {"temperature": 0.7}),
    ({"tools": [F], "tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    ({"tools": [F], "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
    (
        {"tools": [F], "tool_choice": {"type": "function", "name": "f"}},
        {"tool_choice": {"type": "tool", "name": "f"}},
    ),
    (
        {"tools": [SPACE], "tool_choice": {"type": "function", "name": "f", "namespace": "ns"}},
        {"tool_choice": {"type": "tool", "name": "ns__f"}},
    ),
    (
        {"tools": [F], "parallel_tool_calls": False},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    ({"tools": [], "tool_choice": "required"}, {}),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"const": 1}}}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"const": 1}}}},
    ),
    ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
    (
        {"reasoning": {"summary": "auto", "effort": "low"}},
        {
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": "low"},
        },
    ),
    (
        {"reasoning": {"generate_summary": "concise"}},
        {"thinking": {"type": "adaptive", "display": "summarized"}},
    ),
    ({"reasoning": {"summary": "auto", "effort": "none"}}, {}),
    (
        {
            **{"store": True, "background": False, "previous_response_id": None, "metadata": {}},
            **{"include": ["reasoning.encrypted_content"], "truncation": "auto", "user": "u"},
            **{"client_metadata": {}, "prompt_cache_key": "k", "service_tier": "auto"},
            **{"stream_options": {"include_obfuscation": False}, "top_logprobs": 0, "new": 1},
        },
        {},
    ),
]


@pytest.mark.parametrize(("fields", "sent"), FIELDS, ids=lambda value: str(value)[:50])
def test_fields_are_translated(fields: JsonObject, sent: JsonObject) -> None:
    assert cc2api.fields_for_model(parse(**fields)[0], "claude-sonnet-4-6") == sent


def test_allowed_tools_leave_these_alone() -> None:
    named = [{"type": "function", "name": "g"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": named}
    turn, _ = parse(tools=[F, F | {"name": "g"}], tool_choice=choice)
    assert [sent["name"] for sent in turn.tools] == ["g"]
    assert turn.extra_body["tool_choice"] == {"type": "any"}
    turn, _ = parse(tools=[F], tool_choice={**choice, "mode": None})
    assert turn.extra_body == {}, "no tool is left"


def test_effort_is_the_nearest() -> None:
    efforts = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra", None)
    turns = [parse(reasoning={"effort": effort})[0] for effort in efforts]
    seen = [turn.extra_body.get("output_config", {}).get("effort") for turn in turns]
    assert seen == [None, "low", "low", "medium", "high", "xhigh", "max", "max", None]


def test_json_object_asks_for_bare_json() -> None:
    assert "JSON object" in parse(text={"format": {"type": "json_object"}})[0].system


def content(*parts: JsonObject) -> tuple[JsonObject]:
    return ({"role": "user", "content": list(parts)},)


ITEMS_REFUSED: list[tuple[tuple[JsonObject, ...], str]] = [
    ((5,), "input[0]"),  # type: ignore[list-item]
    (({"role": "robot", "content": "x"},), "input[0].role"),
    (({"role": "tool", "content": "x"},), "input[0].role"),
    (({"role": "user"},), "input[0].content"),
    (({"role": "user", "content": 5},), "input[0].content"),
    (content({"type": "input_audio"}), "input[0].content[0].type"),
    (content({"type": "input_image", "file_id": "x"}), "input[0].content[0].image_url"),
    (content({"type": "input_image"}), "input[0].content[0].image_url"),
    (content({"type": "input_file", "file_id": "x"}), "input[0].content[0].file_data"),
    (content({"type": "input_file"}), "input[0].content[0].file_data"),
    (
        (
            {
                "role": "system",
                "content": content({"type": "input_image", "image_url": "https://x"})[0]["content"],
            },
            HI,
        ),
        "input[0].content",
    ),
    ((HI, {**CALL, "arguments": "not json"}, OUTPUT), "input[1].arguments"),
    ((HI, {**CALL, "arguments": "[1]"}, OUTPUT), "input[1].arguments"),
    ((HI, {**CALL, "call_id": None}, OUTPUT), "input[1].call_id"),
    ((HI, {**CALL, "name": None}, OUTPUT), "input[1].name"),
    ((HI, OUTPUT), "input[1]"),
    ((HI, CALL, OUTPUT, OUTPUT), "input[3]"),
    ((HI, CALL, HI), "input[1]"),
    ((HI, CALL, {**OUTPUT, "output": None}), "input[2].output"),
    ((HI, {"role": "assistant", "content": "so"}), "input"),
    (({"type": "item_reference", "id": "msg_1"}, HI), "input[0].type"),
    (({"id": "msg_1"}, HI), "input[0].type"),
    ((HI, {"type": "compaction_trigger"}), "input[1].type"),
    (({"type": "compaction", "encrypted_content": "x"}, HI), "input[0].type"),
    (({"type": ["message"]}, HI), "input[0].type"),
    (
        ({"type": "tool_search_call", "execution": "server", "arguments": {}}, HI),
        "input[0].execution",
    ),
    (({"type": "tool_search_call", "call_id": "x", "arguments": "{}"}, HI), "input[0].arguments"),
    *(
        (({"type": kind}, HI), "input[0].type")
        for kind in ("computer_call", "mcp_call", "program", "agent_message")
    ),
]
FIELDS_REFUSED: list[tuple[JsonObject, str]] = [
    *(({"input": value}, "input") for value in list[Any]([None, [], 5])),
    ({"model": None}, "model"),
    ({"stop": "x"}, "stop"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"input": None, "messages": [HI]}, "input"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"include": "x"}, "include"),
    ({"instructions": ["x"]}, "instructions[0]"),
    ({"instructions": 5}, "instructions"),
    ({"reasoning": "low"}, "reasoning"),
    ({"reasoning": {"effort": 5}}, "reasoning.effort"),
    ({"text": {"format": "json"}}, "text.format"),
    ({"stream": "yes"}, "stream"),
    *(
        ({"tools": [F, {"type": kind}]}, "tools[1].type")
        for kind in ("file_search", "code_interpreter", "computer", "mcp", None)
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{**F, "parameters": "x"}]}, "tools[0].parameters"),
    ({"tools": [{"type": "namespace", "tools": []}]}, "tools[0].name"),
    ({"tools": [{**SPACE, "tools": [{"type": "mcp"}]}]}, "tools[0].tools[0].type"),
    ({"tools": [SPACE, {**F, "name": "ns__f"}]}, "tools[1].name"),
    ({"tools": [F, {**F, "description": "another"}]}, "tools[1].name"),
    ({"tools": [F], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tools": [F], "tool_choice": {"type": []}}, "tool_choice.type"),
    (
        {"tools": [F], "tool_choice": {"type": "allowed_tools", "tools": [{"type": []}]}},
        "tool_choice.tools[0].name",
    ),
]


@pytest.mark.parametrize(("items", "param"), ITEMS_REFUSED, ids=lambda value: str(value)[:60])
def test_a_refused_item_is_named_by_its_place(items: tuple[JsonObject, ...], param: str) -> None:
    """10, without the CLI."""
    with pytest.raises(cc2api.InvalidRequest) as caught:
        parse(*items)
    status, body = cc2api.to_responses_error(caught.value)
    assert (status, body["error"]["param"]) == (400, param)
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param"), FIELDS_REFUSED, ids=lambda value: str(value)[:60])
def test_a_refused_field_is_named(fields: JsonObject, param: str) -> None:
    """17, without the CLI."""
    with pytest.raises(cc2api.InvalidRequest) as caught:
        parse(**fields)
    status, body = cc2api.to_responses_error(caught.value)
    assert (status, body["error"]["param"]) == (400, param)
    is_id = param == "previous_response_id"
    assert body["error"]["code"] == ("previous_response_not_found" if is_id else None)


IDS = st.sampled_from(["a", "b"])
ITEM_TYPES = st.sampled_from([*cc2api.ITEM_READERS, "item_reference", None])
FUZZED_TOOLS = st.one_of(
    values,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["function", "custom", "namespace", "tool_search", "mcp"])},
        optional={
            **{"name": IDS, "description": values, "parameters": values, "format": values},
            **{"tools": st.lists(st.one_of(values, st.just(F))), "execution": st.just("client")},
        },
    ),
)
FUZZED_ITEMS = st.one_of(
    values,
    st.fixed_dictionaries(
        {"type": ITEM_TYPES},
        optional={
            **{"role": st.sampled_from(["user", "assistant", "developer", "tool"]), "id": values},
            **{"content": st.one_of(st.text(), values), "name": IDS},
            **{"call_id": IDS, "arguments": st.one_of(values, st.just("{}")), "namespace": values},
            **{"output": values, "input": values, "tools": st.lists(FUZZED_TOOLS, max_size=2)},
            **{"encrypted_content": st.one_of(values, st.just(cc2api.seal(THINKING)))},
            **{"execution": values, "reasoning": values, "text": values},
        },
    ),
)
FUZZED_FIELDS = st.fixed_dictionaries(
    {"input": st.one_of(values, st.lists(FUZZED_ITEMS, max_size=5).map(lambda some: [*some, HI]))},
    optional={
        **{"tools": st.one_of(values, st.lists(FUZZED_TOOLS, max_size=3)), "reasoning": values},
        **{"tool_choice": st.one_of(values, FUZZED_TOOLS), "text": values, "include": values},
        **{"instructions": values, "stream": values, "metadata": values, "temperature": values},
    },
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FUZZED_FIELDS)
def test_any_json_is_a_valid_turn_or_a_400(fields: JsonObject) -> None:
    try:
        turn, writer = parse(**fields)
    except cc2api.InvalidRequest:
        return
    assert turn.messages[-1].role == "user"
    assert {tool["name"] for tool in turn.tools} <= set(writer.call_fields)
    json.dumps(writer.result())


def test_a_null_beside_an_output_is_as_absent() -> None:
    assert messages_of(CALL, {**OUTPUT, "content": None}) == messages_of(CALL, OUTPUT)


def test_what_other_providers_tools_did_is_left_out() -> None:
    got = messages_of(HI, {"type": "web_search_call", "id": "ws_1", "status": "completed"}, HI)
    assert got == [("user", [text("hi"), text("hi")])]


ERRORS = [
    (
        cc2api.ApiError("w", 529),
        503,
        "server_error",
        "server_is_overloaded",
        "server_is_overloaded",
    ),
    (
        cc2api.ApiError("w", 402),
        429,
        "insufficient_quota",
        "insufficient_quota",
        "insufficient_quota",
    ),
    (
        *(cc2api.ApiError("w", 429, retry_after_s=3600, should_retry=False), 429),
        *("usage_limit_reached", "rate_limit_exceeded", "insufficient_quota"),
    ),
    (
        *(cc2api.ApiError("w", 429, retry_after_s=7), 429),
        *("rate_limit_error", "rate_limit_exceeded", "rate_limit_exceeded"),
    ),
    (
        *(cc2api.InvalidRequest("prompt is too long: 9 > 8"), 400, "invalid_request_error"),
        *("context_length_exceeded", "context_length_exceeded"),
    ),
    (cc2api.InvalidRequest("x: w"), 400, "invalid_request_error", None, "invalid_prompt"),
    (cc2api.ApiError("w", 401), 401, "invalid_request_error", "invalid_api_key", "invalid_prompt"),
    (cc2api.ApiError("w", 500), 500, "server_error", None, "server_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code", "late"), ERRORS)
def test_errors_are_told_so_that_codex_does_not_repeat_in_vain(
    error: cc2api.ApiError, status: int, kind: str, code: str | None, late: str
) -> None:
    """23, without the CLI."""
    got, body = cc2api.to_responses_error(error)
    assert (got, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    is_window = kind == "usage_limit_reached"
    assert is_window == (time.time() + 3500 < body["error"].get("resets_at", 0))
    failure = cc2api.to_failure(error)
    assert failure["code"] == late
    assert failure["message"].startswith(str(error))
    assert ("try again in 7s" in failure["message"]) == (error.retry_after_s == 7)


# ---- answers


def stream_of(reply: Reply) -> list[JsonObject]:
    return list(itertools.chain.from_iterable(map(asked().feed, reply.events("m"))))


def response_of(reply: Reply) -> JsonObject:
    writer = asked()
    for event in reply.events("m"):
        writer.feed(event)
    return writer.result()


def names(events: list[JsonObject]) -> list[str]:
    """Return the events' names, those of deltas once."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for kind, _ in itertools.groupby(kinds)]


BEGINNING = ["created", "in_progress"]
MESSAGE = [
    *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
    *("content_part.done", "output_item.done"),
]
ITEMS: list[tuple[JsonObject, list[str], JsonObject]] = [
    (
        text("a b"),
        MESSAGE,
        {
            **{"id": "msg", "type": "message", "role": "assistant", "status": "completed"},
            "content": [{"type": "output_text", "text": "a b", "annotations": [], "logprobs": []}],
        },
    ),
    (
        THINKING,
        [
            *("output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"),
            *("reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"),
        ],
        {
            **{"id": "rs", "type": "reasoning"},
            "summary": [{"type": "summary_text", "text": "hm"}],
            "encrypted_content": cc2api.seal(THINKING),
        },
    ),
    (
        REDACTED,
        ["output_item.added", "output_item.done"],
        {
            **{"id": "rs", "type": "reasoning", "summary": []},
            "encrypted_content": cc2api.seal(REDACTED),
        },
    ),
    (
        tool("f", {"x": 1}),
        [
            *("output_item.added", "function_call_arguments.delta"),
            *("function_call_arguments.done", "output_item.done"),
        ],
        {
            **{"id": "fc", "type": "function_call", "name": "f", "status": "completed"},
            **{"call_id": "toolu_1", "arguments": '{"x": 1}'},
        },
    ),
    (
        tool("ns__f", {}),
        [
            *("output_item.added", "function_call_arguments.delta"),
            *("function_call_arguments.done", "output_item.done"),
        ],
        {
            **{"id": "fc", "type": "function_call", "name": "f", "namespace": "ns"},
            **{"status": "completed", "call_id": "toolu_1", "arguments": "{}"},
        },
    ),
    (
        tool("c", {"input": 'a "b"\n{'}),
        [
            *("output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done"),
            "output_item.done",
        ],
        {
            **{"id": "ctc", "type": "custom_tool_call", "name": "c", "status": "completed"},
            **{"call_id": "toolu_1", "input": 'a "b"\n{'},
        },
    ),
    (
        tool("c", {"patch": 1}),
        [
            *("output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done"),
            "output_item.done",
        ],
        {
            **{"id": "ctc", "type": "custom_tool_call", "name": "c", "status": "completed"},
            **{"call_id": "toolu_1", "input": '{"patch": 1}'},
        },
    ),
    (
        tool("tool_search", {"query": "q"}),
        ["output_item.added", "output_item.done"],
        {
            **{"id": "tsc", "type": "tool_search_call", "status": "completed"},
            **{"execution": "client", "call_id": "toolu_1", "arguments": {"query": "q"}},
        },
    ),
]


@pytest.mark.parametrize(("block", "kinds", "item"), ITEMS)
def test_a_block_is_an_item(block: JsonObject, kinds: list[str], item: JsonObject) -> None:
    """2, without the CLI."""
    events = stream_of(Reply(blocks=[block]))
    assert names(events) == [*BEGINNING, *kinds, "completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    (done,) = events[-1]["response"]["output"]
    assert done == events[-2]["item"]
    prefix, _, rest = done["id"].partition("_")
    assert {**done, "id": prefix} == item
    assert rest == events[0]["response"]["id"].partition("_")[2] + "0"
    added = events[2]["item"]
    assert (added["id"], added.get("encrypted_content")) == (done["id"], None)
    if item["type"] not in ("reasoning", "tool_search_call"):
        assert added["status"] == "in_progress"
    assert {event.get("item_id", done["id"]) for event in events} == {done["id"]}
    (whole,) = response_of(Reply(blocks=[block]))["output"]
    assert {**whole, "id": prefix} == item


def test_adjacent_texts_are_one_message_and_blank_ones_none() -> None:
    """4, without the CLI."""
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    blocks = [text("\n"), text("a "), search, text("b"), THINKING | {"thinking": ""}, text(" ")]
    first, second = response_of(Reply(blocks=blocks))["output"]
    assert first["content"][0]["text"] == "\na b"
    assert (second["type"], second["summary"]) == ("reasoning", [])
    events = stream_of(Reply(blocks=blocks))
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "\na b"
    assert "" not in deltas


@pytest.mark.parametrize("reason", ["max_tokens", "model_context_window_exceeded"])
def test_a_call_that_was_cut_short_is_nowhere_in_the_output(reason: str) -> None:
    """19, without the CLI."""
    blocks = [text("a"), tool("f", {}, 1), tool("f", {"x": 1}, 2)]
    events = stream_of(Reply(blocks=blocks, stop_reason=reason))
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["message", "function_call"]
    done = [e["item"]["id"] for e in events if e["type"] == "response.output_item.done"]
    assert done == [item["id"] for item in last["output"]]
    assert events[-1]["type"] == "response.incomplete"
    assert (last["status"], last["incomplete_details"]) == (
        *("incomplete", {"reason": "max_output_tokens"}),
    )


def test_what_upstreams_own_tools_are_given_is_nobodys_text() -> None:
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    events = stream_of(Reply(blocks=[tool("f", {}), search, text("a"), search]))
    output = events[-1]["response"]["output"]
    assert [item.get("arguments") for item in output] == ["{}", None]
    assert output[1]["content"][0]["text"] == "a"


@pytest.mark.parametrize("explanation", ["not that", None, " "])
def test_a_refusal_is_an_item_of_its_own(explanation: str | None) -> None:
    """20, without the CLI."""
    details = {"type": "refusal", "explanation": explanation}
    reply = Reply(blocks=[text("so far")], stop_reason="refusal", stop_details=details)
    events = stream_of(reply)
    refusal = [kind.replace("output_text", "refusal") for kind in MESSAGE]
    assert names(events) == [*BEGINNING, *MESSAGE, *refusal, "completed"]
    part = {"type": "refusal", "refusal": (explanation or "").strip() or cc2api.DEFAULT_REFUSAL}
    output = events[-1]["response"]["output"]
    assert [item["content"][0] for item in output[1:]] == [part]
    assert output[0]["content"][0]["text"] == "so far"


def test_the_response_says_what_was_asked() -> None:
    fields = {
        **{"instructions": "i", "metadata": {"k": "v"}, "temperature": 0.5, "tools": [F]},
        **{"max_output_tokens": 9, "tool_choice": "auto", "parallel_tool_calls": False},
        **{"text": {"format": {"type": "text"}, "verbosity": "low"}, "user": "u"},
    }
    response = parse(**fields, store=True)[1].result()
    assert response["tools"] == [{"description": None, "strict": None, **F}]
    echoed = {name: value for name, value in fields.items() if name != "tools"}
    assert echoed == {name: response[name] for name in echoed}
    assert response["store"] is False
    assert abs(response["created_at"] - time.time()) < 60
    unsaid = parse(text={"format": None})[1].result()["text"]
    assert unsaid == {"format": {"type": "text"}}


# Of the Open Responses schema, 2026-04-24 (openresponses/openresponses): the fields that a response
# must have, and their types.
REQUIRED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(["id", "object", "status", "model", "truncation", "service_tier"], (str,)),
    **dict.fromkeys(["created_at", "top_logprobs"], (int,)),
    **dict.fromkeys(["completed_at", "max_output_tokens", "max_tool_calls"], (int, type(None))),
    **dict.fromkeys(["incomplete_details", "error", "usage", "reasoning"], (dict, type(None))),
    **dict.fromkeys(["previous_response_id", "instructions"], (str, type(None))),
    **dict.fromkeys(["safety_identifier", "prompt_cache_key"], (str, type(None))),
    **dict.fromkeys(["output", "tools"], (list,)),
    **dict.fromkeys(["parallel_tool_calls", "store", "background"], (bool,)),
    **dict.fromkeys(["top_p", "temperature"], (float,)),
    **dict.fromkeys(["presence_penalty", "frequency_penalty"], (float,)),
    **{"text": (dict,), "tool_choice": (str, dict), "metadata": (dict,)},
}


@pytest.mark.parametrize("fields", [{}, {name: None for name in REQUIRED if name != "model"}])
def test_a_response_has_every_field_that_its_schema_requires(fields: JsonObject) -> None:
    _, encoder = parse(**{**fields, "input": "hi", "previous_response_id": None})
    created = next(iter(encoder.feed(next(iter(text_reply().events("m"))))))["response"]
    for response in (created, encoder.result()):
        wrong = {
            n: response.get(n)
            for n, types in REQUIRED.items()
            if type(response.get(n)) not in types
        }
        assert wrong == {}
        assert REQUIRED.keys() <= response.keys()


def test_what_was_asked_is_echoed_whole() -> None:
    wanted = {"type": "json_schema", "name": "n", "schema": {"type": "string"}}
    choice = {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]}
    asked = {"temperature": 0.2, "top_p": 0, "presence_penalty": 1, "frequency_penalty": 0.5}
    more = {"max_tool_calls": 2, "safety_identifier": "s", "prompt_cache_key": "k"}
    fields = {"tools": [F], "tool_choice": choice, "text": {"format": wanted}, **asked, **more}
    response = parse(**fields)[1].result()
    assert response["tool_choice"] == {**choice, "mode": "auto"}
    assert response["text"] == {"format": {"description": None, "strict": False, **wanted}}
    assert {name: response[name] for name in asked | more} == asked | more


def test_the_end_of_a_calls_arguments_has_its_name() -> None:
    reply = Reply(blocks=[tool("f", {"x": 1})], stop_reason="tool_use")
    _, encoder = parse(tools=[F])
    events = [written for event in reply.events("m") for written in encoder.feed(event)]
    (done,) = (e for e in events if e["type"] == "response.function_call_arguments.done")
    assert (done["name"], done["arguments"]) == ("f", '{"x": 1}')


EVENT_TYPES: dict[str, type[BaseModel]] = {
    of.model_fields["type"].annotation.__args__[0]: of
    for of in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
}


@settings(max_examples=40, deadline=None)
@given(streams())
def test_the_python_sdk_assembles_every_stream(events: list[JsonObject]) -> None:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    state: Any = ResponseStreamState(input_tools=[], text_format=openai.omit)
    for event in events:
        cc2api.to_sse_frames([event])
        if event["type"] in EVENT_TYPES:
            EVENT_TYPES[event["type"]].model_validate(without_tools(event))
        else:
            assert event["type"] == "keepalive"
        state.handle_event(construct_type(type_=ResponseStreamEvent, value=event))
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert last["response"]["output"] == done
    ids = [item["id"] for item in done]
    assert len(set(ids)) == len(ids)


def without_tools(event: JsonObject) -> JsonObject:
    """Return an event without the client's own tools, which it echoes."""
    if "response" not in event:
        return event
    return {**event, "response": {**event["response"], "tools": []}}


# ---- on the real CLI


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def ask(gateway: Any, given: Any, **fields: Any) -> Answer:
    body = {"model": "claude-sonnet-4-6", "input": given, **fields}
    answer: Answer = gateway.request("POST", "/v1/responses", body)
    return answer


def final(gateway: Any, given: Any, **fields: Any) -> JsonObject:
    """Return the response at the end of a stream."""
    answer = ask(gateway, given, stream=True, **fields)
    assert answer.status == 200, answer.body
    response: JsonObject = answer.events[-1]["response"]
    return response


def sent(api: ScriptedApi, word: str) -> JsonObject:
    """Return the body of the only call of upstream that says a word."""
    (call,) = api.calls_with(word)
    return call.body


USAGE_TOLD = {
    "input_tokens": 19,
    "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 3},
    "output_tokens": 42,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 61,
}


@pytest.mark.parametrize("form", ["string", "list"])
@pytest.mark.parametrize("stream", [False, True, None])
def test_both_forms_of_input_are_answered_alike(
    gateway: RunningGateway, form: str, stream: bool | None
) -> None:
    """1 and 2."""
    given = "hi" if form == "string" else [{"role": "user", "content": "hi"}]
    answer = ask(gateway, given, stream=stream)
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    if stream:
        assert names(answer.events) == [*BEGINNING, *MESSAGE, "completed"]
        places = [event["sequence_number"] for event in answer.events]
        assert places == list(range(len(places)))
    response = answer.events[-1]["response"] if stream else answer.json
    assert response["output"][0]["content"][0]["text"] == DEFAULT_TEXT
    assert response["usage"] == USAGE_TOLD
    assert response["model"] == "claude-sonnet-4-6"
    assert (response["status"], response["error"]) == ("completed", None)


def test_the_sdks_helper_streams(client: openai.OpenAI) -> None:
    """3; in JavaScript in tests/clients."""
    with client.responses.stream(model="claude-sonnet-4-6", input="hi") as stream:
        response = stream.get_final_response()
    assert (response.status, response.output_text) == ("completed", DEFAULT_TEXT)
    created = client.responses.create(model="claude-sonnet-4-6", input="hi")
    assert created.output_text == DEFAULT_TEXT
    assert (created._request_id or "").startswith("req_")


class City(BaseModel):
    name: str


def test_the_sdk_parses_structured_output(client: openai.OpenAI, api: ScriptedApi) -> None:
    """18."""
    word = marker()
    api.on(word, text_reply('{"name": "Rome"}'))
    parsed = client.responses.parse(model="claude-sonnet-4-6", input=word, text_format=City)
    assert parsed.output_parsed == City(name="Rome")
    told = sent(api, word)["output_config"]["format"]
    assert told["schema"]["properties"]["name"]["type"] == "string"


def test_an_answer_sent_back_reaches_upstream_as_it_was(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    """5, with 7 and 8."""
    word, more = marker(), marker()
    calls = [tool("f", {"x": 1}, 1), tool("c", {"input": 'a "b"\n'}, 2)]
    blocks = [THINKING, REDACTED, text("two calls"), *calls]
    api.on(word, Reply(blocks=blocks, stop_reason="tool_use"))
    items: list[JsonObject] = [{"role": "user", "content": word}]
    asked = {"tools": [F, C], "reasoning": {"effort": "high", "summary": "auto"}}
    output = final(gateway, items, **asked)["output"]
    kinds = ["reasoning", "reasoning", "message", "function_call", "custom_tool_call"]
    assert [item["type"] for item in output] == kinds
    output[0]["summary"] = [{"type": "summary_text", "text": "cut anew"}]
    items += output
    items += [{**OUTPUT, "call_id": "toolu_1"}]
    items += [{"role": "user", "content": more}]  # 9
    items += [{"type": "custom_tool_call_output", "call_id": "toolu_2", "output": "two"}]
    final(gateway, items, **asked)
    body = sent(api, more)
    messages = body["messages"]
    assert messages[1]["content"] == blocks
    assert [block["type"] for block in messages[2]["content"]] == ["tool_result"] * 2 + ["text"]
    assert body["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert body["output_config"]["effort"] == "high"


def test_foreign_reasoning_does_not_reach_upstream(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    """6."""
    word = marker()
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "so"}]}
    items = [HI, reasoning("gAAAA-of-another"), answer, {"role": "user", "content": word}]
    assert ask(gateway, items).status == 200
    assert sent(api, word)["messages"][1]["content"] == [text("so")]


def test_a_result_with_an_image_reaches_upstream(gateway: RunningGateway, api: ScriptedApi) -> None:
    """11."""
    word = marker()
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}
    parts = [{"type": "input_text", "text": word}, image]
    assert ask(gateway, [HI, CALL, {**OUTPUT, "output": parts}], tools=[F]).status == 200
    (result,) = sent(api, word)["messages"][2]["content"]
    assert [part["type"] for part in result["content"]] == ["text", "image"]


def test_namespaces_custom_tools_and_searches_on_the_wire(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    """12 to 16: the tools come with an item, the search finds one more."""
    word, more = marker(), marker()
    form = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tools = [SEARCH, {**C, "format": form}, {"type": "web_search", "external_web_access": False}]
    api.on(word, Reply(blocks=[tool("tool_search", {"query": "f"})], stop_reason="tool_use"))
    api.on(more, Reply(blocks=[tool("ns__f", {}, 2)], stop_reason="tool_use"))
    items: list[JsonObject] = [
        {"type": "additional_tools", "role": "developer", "tools": tools},
        {"role": "user", "content": word},
    ]
    output = final(gateway, items)["output"]
    assert [tool["name"] for tool in sent(api, word)["tools"]] == ["tool_search", "c"]
    assert "start: /.+/" in sent(api, word)["tools"][1]["description"]
    assert (output[0]["type"], output[0]["execution"]) == ("tool_search_call", "client")
    found = {"type": "tool_search_output", "call_id": "toolu_1", "execution": "client"}
    items += [*output, {**found, "tools": [SPACE]}, {"role": "user", "content": more}]
    output = final(gateway, items)["output"]
    assert (output[0]["name"], output[0]["namespace"]) == ("f", "ns")
    assert [tool["name"] for tool in sent(api, more)["tools"]][-1] == "ns__f"
    last = marker()
    items += [*output, {**OUTPUT, "call_id": "toolu_2", "output": last}]
    final(gateway, items)
    assert sent(api, last)["messages"][-2]["content"] == [tool("ns__f", {}, 2)]


REFUSED: list[tuple[JsonObject, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}, HI]}, "input[0].type"),
    ({"input": [HI, OUTPUT]}, "input[1]"),
    ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
    ({"tools": [F], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
]


def test_what_is_refused_starts_nothing(lone_gateway: RunningGateway, api: ScriptedApi) -> None:
    """10, 16 and 17."""
    before = len(api.calls)
    for fields, param in REFUSED:
        for stream in (False, True):
            answer = ask(
                lone_gateway,
                **{
                    "given": "hi",
                    "stream": stream,
                    **{
                        "given" if name == "input" else name: value
                        for name, value in fields.items()
                    },
                },
            )
            assert (answer.status, answer.json["error"]["param"]) == (400, param)
            assert answer.json["error"]["type"] == "invalid_request_error"
    assert lone_gateway.children() == []
    assert len(api.calls) == before


def test_an_answer_that_was_cut_and_one_that_was_refused(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    """4, 19 and 20."""
    cut, refused = marker(), marker()
    blocks = [text("a"), text(" b"), tool("f", {"x": 1})]
    api.on(cut, Reply(blocks=blocks, stop_reason="max_tokens"))
    details = {"type": "refusal", "category": "cyber", "explanation": "not that"}
    api.on(refused, text_reply("so far", stop_reason="refusal", stop_details=details))
    for get in (final, lambda *args, **more: ask(*args, **more).json):
        response = get(gateway, cut, tools=[F])
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        (message,) = response["output"]
        assert message["content"][0]["text"] == "a b"
        response = get(gateway, refused)
        assert response["status"] == "completed"
        parts = [item["content"][0] for item in response["output"]]
        assert [part["type"] for part in parts] == ["output_text", "refusal"]
        assert parts[1]["refusal"] == "not that"


def test_an_error_before_the_stream_has_its_status_and_in_it_is_response_failed(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    """21, and 23."""
    cases = [
        (529, "Overloaded", 503, "server_is_overloaded"),
        (429, "slow down", 429, "rate_limit_exceeded"),
        (500, "broken", 500, None),
        (400, "prompt is too long: 9 tokens > 8 maximum", 400, "context_length_exceeded"),
    ]
    for upstream, message, status, code in cases:
        word = marker()
        api.on(word, Reply(status=upstream, message=message))
        for stream in (False, True):
            answer = ask(gateway, word, stream=stream)
            assert (answer.status, answer.json["error"]["code"]) == (status, code)
            assert message.partition(":")[0] in answer.json["error"]["message"]
    word = marker()
    error = {"type": "overloaded_error", "message": "Overloaded"}
    api.on(word, text_reply("a b c", error=error, error_after=4))
    events = ask(gateway, word, stream=True).events
    assert names(events)[-1] == "failed"
    assert "error" not in [event["type"] for event in events]
    response = events[-1]["response"]
    assert response["error"] == {"code": "server_is_overloaded", "message": "Overloaded"}
    assert (response["status"], response["id"]) == ("failed", events[0]["response"]["id"])
    assert ask(gateway, word).status == 503


def test_a_used_up_window_is_told_with_its_end(
    login_gateway: RunningGateway, api: ScriptedApi
) -> None:
    """23."""
    word, resets_at = marker(), int(time.time()) + 7200
    limit = "anthropic-ratelimit-unified"
    windows = {f"{limit}-status": "rejected", f"{limit}-reset": str(resets_at)}
    api.on(word, Reply(status=429, message="used up", headers=windows))
    answer = ask(login_gateway, word, stream=True)
    error = answer.json["error"]
    assert (answer.status, error["type"]) == (429, "usage_limit_reached")
    assert abs(error["resets_at"] - resets_at) <= 1
    assert int(answer.headers["retry-after"]) > 7000


def test_a_websocket_is_told_to_come_by_http(gateway: RunningGateway) -> None:
    """24, and the neighbours."""
    headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    answer = gateway.request("GET", "/v1/responses", headers=headers)
    assert (answer.status, answer.headers["content-type"]) == (426, "application/json")
    for method, path in (("GET", "/resp_1"), ("DELETE", "/resp_1"), ("POST", "/compact")):
        assert gateway.request(method, f"/v1/responses{path}").status == 404
    assert gateway.request("DELETE", "/v1/responses").status == 405


def test_input_tokens_are_counted(gateway: RunningGateway) -> None:
    body = {"model": "claude-sonnet-4-6", "input": "hi", "tools": [F]}
    answer = gateway.request("POST", "/v1/responses/input_tokens", body)
    assert answer.json["object"] == "response.input_tokens"
    message = {"model": "claude-sonnet-4-6", "messages": [HI]}
    tools = [{"name": "f", "input_schema": F["parameters"]}]
    same = gateway.request("POST", "/v1/messages/count_tokens", {**message, "tools": tools})
    assert answer.json["input_tokens"] == same.json["input_tokens"] > 0
    del body["input"]
    answer = gateway.request("POST", "/v1/responses/input_tokens", body)
    assert (answer.status, answer.json["error"]["param"]) == (400, "input")


def test_a_kept_process_goes_on_through_a_turn_with_late_rules(
    start: Any, api: ScriptedApi
) -> None:
    """25."""
    gateway = start("--processes", "2")
    word, more = marker(), marker()
    api.on(word, Reply(blocks=[THINKING, tool("f", {"x": 1})], stop_reason="tool_use"))
    rules = {"type": "message", "role": "developer", "content": "rules"}
    items: list[JsonObject] = [rules, HI, {"role": "user", "content": word}]
    items += final(gateway, items, tools=[F])["output"]
    late = {"type": "message", "role": "developer", "content": f"late {more}"}
    items += [{**OUTPUT, "call_id": "toolu_1"}, late]
    final(gateway, items, tools=[F])
    assert "process=reused" in gateway.wait_for_log("event=done", 2)
    first, second = api.calls_with(word)
    assert first.body["system"] == second.body["system"]
    reminder = f"<system-reminder>\nlate {more}\n</system-reminder>"
    assert [block.get("text") for block in second.body["messages"][-1]["content"]][1:] == [reminder]


def test_the_status_counts_responses(start_fake: Any) -> None:
    gateway = start_fake("--processes", "0")
    assert ask(gateway, "hi").status == 200
    assert ask(gateway, []).status == 400
    gateway.wait_for_log("event=done", 2)  # written when a request is counted, after its answer
    status = gateway.request("GET", "/").body.decode()
    assert "requests      2, 1 failed, 0 waiting\n" in status


# ---- silence and failures


def test_a_stream_that_upstream_keeps_waiting_begins_and_is_kept_alive(
    api: ScriptedApi, claude: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22."""
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(cc2api, "CLIENT_CHECK_S", 0.05)
    word = marker()
    api.on(word, text_reply("x", delay_s=1.0))
    with InProcessGateway(tmp_path, claude=claude, base_url=api.url) as gateway:
        events = ask(gateway, word, stream=True).events
    assert names(events) == [*BEGINNING, "keepalive", *MESSAGE, "completed"]


@pytest.mark.parametrize("order", ["stall", "stall-after-start"])
def test_a_silent_stream_begins_and_is_kept_alive_by_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """And how it ends: what took too long was paid for, so it is no status.

    The time is long enough for a process to start on a busy machine.
    """
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(cc2api, "CLIENT_CHECK_S", 0.05)
    with InProcessGateway(tmp_path, timeout=3.0) as gateway:
        events = ask(gateway, order, stream=True).events
    said = ["output_item.added", "content_part.added", "output_text.delta"]
    said = said if order == "stall-after-start" else []
    # On a busy machine there is silence before the first event too.
    assert "keepalive" in names(events)
    assert [n for n in names(events) if n != "keepalive"] == [*BEGINNING, *said, "failed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize(("order", "status"), [("die-before-answer", 502), ("stall", 504)])
def test_what_was_paid_for_fails_in_the_stream(tmp_path: Path, order: str, status: int) -> None:
    with InProcessGateway(tmp_path, timeout=1.0) as gateway:
        answer = ask(gateway, order, stream=True)
        assert answer.status == 200
        assert names(answer.events) == [*BEGINNING, "failed"]
        assert ask(gateway, order).status == status

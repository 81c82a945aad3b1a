"""Chat completions: the translation both ways, and the openai SDK on the real CLI."""

from __future__ import annotations

import asyncio
import base64
import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import openai
import pytest
from harness import RunningGateway
from helpers import marker, tool
from pydantic import BaseModel
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi, text_reply

import cc2api

JsonObject = dict[str, Any]
PNG = "iVBORw0KGgoAAAANSUhEUg=="
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def parse(**fields: Any) -> tuple[cc2api.Turn, cc2api.ChatEncoder]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return cc2api.parse_chat_request(copy.deepcopy(body))


def messages_of(*messages: JsonObject) -> list[tuple[str, Any]]:
    turn, _ = parse(messages=list(messages))
    return [(m.role, m.content) for m in (*turn.messages[:-1], turn.messages[-1])]


# ---- requests


def test_system_and_developer_messages_are_hoisted_in_order() -> None:
    turn, _ = parse(
        messages=[
            {"role": "system", "content": "one"},
            {"role": "user", "content": "hi", "name": "bob"},
            {"role": "developer", "content": [{"type": "text", "text": "two"}]},
        ]
    )
    assert turn.system == "one\n\ntwo"
    assert turn.messages[-1].content == [{"type": "text", "text": "hi"}]


def test_images_and_files_become_blocks() -> None:
    pdf = base64.b64encode(b"%PDF-1.4").decode()
    words = base64.b64encode("héllo".encode()).decode()
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
        {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{pdf}"}},
        {"type": "file", "file": {"file_data": f"data:text/plain;base64,{words}", "filename": "n"}},
    ]
    image = {"type": "base64", "media_type": "image/png", "data": PNG}
    document = {"type": "base64", "media_type": "application/pdf", "data": pdf}
    plain = {"type": "text", "media_type": "text/plain", "data": "héllo"}
    assert messages_of({"role": "user", "content": parts}) == [
        (
            "user",
            [
                {"type": "text", "text": "see"},
                {"type": "image", "source": image},
                {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                {"type": "document", "source": document},
                {"type": "document", "title": "n", "source": plain},
            ],
        )
    ]


def test_tool_calls_and_their_results_become_blocks_of_two_messages() -> None:
    second = {**CALL, "id": "call_2", "function": {"name": "g", "arguments": ""}}
    got = messages_of(
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, second], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "and?"},
    )
    one, two = {"type": "text", "text": "one"}, {"type": "text", "text": "two"}
    assert got[1:] == [
        (
            "assistant",
            [
                {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
            ],
        ),
        (
            "user",
            [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [one]},
                {"type": "tool_result", "tool_use_id": "call_2", "content": [two]},
                {"type": "text", "text": "and?"},
            ],
        ),
    ]


def test_blank_texts_are_left_out_where_something_else_is_said() -> None:
    url = "https://x/y.png"
    parts = [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": url}}]
    got = messages_of(
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "\n"},
    )
    assert [block["type"] for block in got[0][1]] == ["image"]
    assert got[2][1] == [{"type": "tool_result", "tool_use_id": "call_1", "content": []}]


def test_ids_of_calls_are_not_taken_for_names() -> None:
    calls = [{**CALL, "id": "f"}, {**CALL, "id": "f2"}]
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in ("f", "f2")]
    got = messages_of({"role": "assistant", "tool_calls": calls}, *results)
    assert [block["tool_use_id"] for block in got[1][1]] == ["f", "f2"]


def test_an_empty_assistant_turn_is_left_out() -> None:
    got = messages_of(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    )
    assert got == [("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]


TOOLS = [
    {"type": "function", "function": {"name": "f"}},
    {"type": "function", "function": {"name": "g", "strict": True, "parameters": {"x": 1}}},
    {"type": "custom", "custom": {"name": "c", "description": "d"}},
]
PARAMETERS: list[tuple[JsonObject, JsonObject]] = [
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
    ({"temperature": 1.7}, {"temperature": 1}),
    ({"top_p": 0.5, "temperature": 0}, {"temperature": 0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_p": 1, "temperature": 0.7}, {"temperature": 0.7}),
    ({"stop": "END"}, {"stop_sequences": ["END"]}),
    ({"stop": ["a", " ", "b"]}, {"stop_sequences": ["a", "b"]}),
    ({"tools": TOOLS, "tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    ({"tools": TOOLS, "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"tool_choice": {"type": "tool", "name": "g"}},
    ),
    (
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "string", "maxLength": 5}},
            }
        },
        {
            "output_config": {
                "format": {
                    "type": "json_schema",
                    "schema": {"type": "string", "description": "{maxLength: 5}"},
                }
            }
        },
    ),
    ({"tools": TOOLS}, {"tool_choice": {"type": "auto"}}),
    # what upstream refuses
    ({"tools": TOOLS, "tool_choice": "always"}, {"tool_choice": {"type": "always"}}),
    ({"seed": 1, "logit_bias": {}, "store": False, "user": "u", "tool_choice": "auto"}, {}),
]


@pytest.mark.parametrize(("fields", "sent"), PARAMETERS, ids=lambda value: str(value)[:50])
def test_parameters_are_translated(fields: JsonObject, sent: JsonObject) -> None:
    turn, _ = parse(**fields)
    assert [tool["name"] for tool in turn.tools] == (["f", "g", "c"] if "tools" in fields else [])
    assert cc2api.fields_for_model(turn, "claude-sonnet-4-6") == sent


@pytest.mark.parametrize(("mode", "sent"), [("required", "any"), ("auto", "auto"), (None, "auto")])
def test_allowed_tools_leave_these_alone(mode: str | None, sent: str) -> None:
    named = [
        {"type": "function", "function": {"name": "g"}},
        {"type": "custom", "custom": {"name": "c"}},
    ]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    turn, _ = parse(tools=TOOLS, tool_choice=choice)
    assert [tool["name"] for tool in turn.tools] == ["g", "c"]
    assert turn.extra_body["tool_choice"] == {"type": sent}


def test_a_custom_tool_tells_the_model_its_grammar() -> None:
    grammar = {"syntax": "lark", "definition": 'start: "x"'}
    custom = {**TOOLS[2]["custom"], "format": {"type": "grammar", "grammar": grammar}}  # type: ignore[dict-item]
    (sent,) = parse(tools=[{"type": "custom", "custom": custom}])[0].tools
    assert sent["description"].endswith('lark grammar:\nstart: "x"')


def test_calls_of_others_than_the_assistant_are_ignored() -> None:
    got = messages_of({"role": "user", "content": "hi", "tool_calls": [CALL]})
    assert got == [("user", [{"type": "text", "text": "hi"}])]


def effort_of(turn: cc2api.Turn) -> Any:
    return turn.extra_body.get("output_config", {}).get("effort")


def test_reasoning_effort_is_effort() -> None:
    efforts = ("none", "minimal", "low", "medium", "high", "xhigh", "max", None)
    seen = [effort_of(parse(reasoning_effort=effort)[0]) for effort in efforts]
    assert seen == [None, "low", "low", "medium", "high", "xhigh", "max", None]
    assert effort_of(parse(reasoning_effort="ultra")[0]) == "max"


def test_json_object_asks_for_bare_json() -> None:
    turn, _ = parse(response_format={"type": "json_object"})
    assert "JSON object" in turn.system


MISTAKES: list[tuple[JsonObject, str | None]] = [
    ({"model": None}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]},
        "messages[0].content[0].file.file_data",
    ),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "r"}]}, "messages[0]"),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "input_audio"}]},
            ]
        },
        "messages[1].content[0].type",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "not json"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"modalities": 5}, "modalities"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a": NaN}'}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
]


@pytest.mark.parametrize(("fields", "param"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_400_with_its_param(fields: JsonObject, param: str | None) -> None:
    with pytest.raises(cc2api.InvalidRequest) as caught:
        parse(**fields)
    status, body = cc2api.to_openai_error(caught.value)
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param


ERRORS = [
    (401, 401, "invalid_request_error", "invalid_api_key"),
    (402, 429, "insufficient_quota", "insufficient_quota"),
    (404, 404, "invalid_request_error", None),
    (429, 429, "rate_limit_error", "rate_limit_exceeded"),
    (500, 500, "server_error", None),
    (504, 504, "server_error", None),
    (529, 503, "server_error", "overloaded"),
]


@pytest.mark.parametrize(("status", "theirs", "kind", "code"), ERRORS)
def test_statuses_are_openais(status: int, theirs: int, kind: str, code: str | None) -> None:
    got, body = cc2api.to_openai_error(cc2api.ApiError("words", status=status))
    expected = {"message": "words", "type": kind, "param": None, "code": code}
    assert (got, body) == (theirs, {"error": expected})


def test_only_a_404_of_a_model_blames_the_model() -> None:
    _, body = cc2api.to_openai_error(cc2api.ApiError("model: x", status=404))
    assert body["error"]["code"] == "model_not_found"


# ---- answers


def to_chunks(events: Iterable[JsonObject], **fields: Any) -> list[JsonObject]:
    return list(itertools.chain.from_iterable(map(parse(**fields)[1].feed, events)))


def chunks_of(reply: Reply, **fields: Any) -> list[JsonObject]:
    return to_chunks(reply.events("m"), **fields)


def deltas_of(reply: Reply, **fields: Any) -> list[JsonObject]:
    return [c["choices"][0]["delta"] for c in chunks_of(reply, **fields) if c["choices"]]


def test_chunks_follow_the_rules() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "a b"},
        tool("f", {"x": 1}, 1),
        tool("g", {}, 2),
    ]
    chunks = chunks_of(Reply(blocks=blocks, stop_reason="tool_use"))
    assert {c["id"][:9] for c in chunks} == {"chatcmpl-"}
    assert len({(c["id"], c["created"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert "usage" not in chunks[-1]
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert sorted(deltas.pop(2)) == ["reasoning_details", "thinking_blocks"]
    assert deltas[:4] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "a "},
        {"content": "b"},
    ]
    calls = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    starts = [c for c in calls if "id" in c]
    assert [(c["index"], c["id"], c["function"]["name"]) for c in starts] == [
        (0, "toolu_1", "f"),
        (1, "toolu_2", "g"),
    ]
    arguments = [
        "".join(c["function"]["arguments"] for c in calls if c["index"] == i) for i in (0, 1)
    ]
    assert [json.loads(text) for text in arguments] == [{"x": 1}, {}]
    finishes = [c["choices"][0]["finish_reason"] for c in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["tool_calls"]


def reasoning_of(*blocks: JsonObject) -> JsonObject:
    """Return the fields in which an answer's message holds its thinking."""
    thinking = [(i, b) for i, b in enumerate(blocks) if b["type"] in cc2api.THINKING_TYPES]
    return cc2api.to_reasoning_fields(thinking)


THOUGHTS: list[JsonObject] = [
    {"type": "thinking", "thinking": "one", "signature": "MQ=="},
    {"type": "redacted_thinking", "data": "ZA=="},
    {"type": "thinking", "thinking": "two", "signature": "Mg=="},
]


@pytest.mark.parametrize("name", ["reasoning_details", "thinking_blocks"])
@pytest.mark.parametrize("is_litellm", [False, True])
def test_thinking_comes_back_in_its_place(name: str, is_litellm: bool) -> None:
    blocks = [THOUGHTS[0], {"type": "text", "text": "so"}, *THOUGHTS[1:], tool("f", {}, 1)]
    kept = {name: reasoning_of(*blocks)[name]}
    fields = {"provider_specific_fields": kept} if is_litellm else kept
    call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    got = messages_of(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "so", "tool_calls": [call], **fields},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "r"},
    )
    assert got[1][1] == blocks


def detail(**fields: Any) -> JsonObject:
    entry = {"type": "reasoning.text", "text": "hm", "signature": "s", "index": 0}
    return {"reasoning_details": [{**entry, **fields}]}


@pytest.mark.parametrize(
    ("fields", "is_kept"),
    [
        (detail(), True),
        (detail(id="rs_of_another", format="anthropic-claude-v1"), True),
        (detail(index="x"), True),
        (detail(index=10**30), False),
        (detail(index=-1), True),
        (detail(index=99), False),  # no answer ends with thinking
        (detail(signature=None), False),
        (detail(signature=""), False),
        (detail(text=["hm"]), False),
        (detail(type="reasoning.summary"), False),
        (detail(type="reasoning.encrypted", data=None), False),
        ({"reasoning_details": "hm"}, False),
        ({"reasoning_details": [5]}, False),
        ({"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}]}, True),
        ({"thinking_blocks": [{"type": "thinking", "thinking": "hm"}]}, False),
        ({"thinking_blocks": [], **detail()}, True),
        ({"reasoning_content": "hm", "reasoning": "hm"}, False),
    ],
    ids=str,
)
def test_thinking_without_its_signature_is_left_out(fields: JsonObject, is_kept: bool) -> None:
    got = messages_of(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [CALL], "content": None, **fields},
        {"role": "tool", "tool_call_id": "call_1", "content": "r"},
    )
    kept = [block for block in got[1][1] if block["type"] == "thinking"]
    assert kept == ([{"type": "thinking", "thinking": "hm", "signature": "s"}] if is_kept else [])


def test_thinking_without_an_index_keeps_its_order() -> None:
    entries = [{k: v for k, v in block.items() if k != "index"} for block in THOUGHTS]
    got = messages_of(
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "so", "thinking_blocks": entries},
        {"role": "user", "content": "more"},
    )
    assert got[1][1] == [*THOUGHTS, {"type": "text", "text": "so"}]


def test_blocks_that_a_client_has_joined_are_left_out() -> None:
    """OpenRouter's provider joins neighbours, and keeps the first one's signature."""
    first, second = reasoning_of(THOUGHTS[0], THOUGHTS[2])["reasoning_details"]
    merged = {**first, "text": first["text"] + second["text"]}
    for entries, count in (([first, second], 2), ([merged], 0)):
        got = messages_of(
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "so", "reasoning_details": entries},
            {"role": "user", "content": "more"},
        )
        assert len(got[1][1]) == 1 + count


def test_a_call_that_is_told_twice_is_one() -> None:
    """LangChain's messages have a call as a part too."""
    parts = [
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
    ]
    got = messages_of(
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": parts, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "call_2", "content": "two"},
    )
    assert got[1][1] == parts


def test_a_system_prompt_alone_is_the_users_message() -> None:
    said = {"role": "developer", "content": "Tell a joke."}
    turn, _ = parse(messages=[{"role": "system", "content": "Be brief."}, said])
    assert turn.system == ""
    both = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Tell a joke."}]
    assert turn.messages == (cc2api.Message("user", both),)
    body = {"model": "m", "instructions": "Tell a joke.", "input": [said]}
    turn, _ = cc2api.parse_responses_request(body)
    assert (turn.system, turn.messages[0].content) == ("Tell a joke.", both[1:])


def test_calls_of_one_answer_with_one_id_are_told_apart_by_their_order() -> None:
    second = {**CALL, "function": {"name": "g", "arguments": "{}"}}
    got = messages_of(
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [CALL, second]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "call_1", "content": "two"},
    )
    called = [(block["name"], block["id"]) for block in got[1][1]]
    answered = [(block["content"][0]["text"], block["tool_use_id"]) for block in got[2][1]]
    assert called == [("f", "call_1"), ("g", "call_1_1")]
    assert answered == [("one", "call_1"), ("two", "call_1_1")]


def test_thinking_that_was_cut_short_does_not_come_back() -> None:
    cut = {"type": "thinking", "thinking": "hm"}
    assert cc2api.to_reasoning_fields([(0, cut)]) == {}
    assert cc2api.to_reasoning_fields([(0, {**cut, "signature": ""})]) == {}


@pytest.mark.parametrize("arguments", [None, "", "null", {}, "{}"])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    got = messages_of(
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
    )
    assert got[1][1][0]["input"] == {}


def test_a_call_without_arguments_gets_an_empty_object() -> None:
    events = list(Reply(blocks=[tool("f", {}, 1)]).events("m"))
    quiet = [e for e in events if e["type"] != "content_block_delta"]
    deltas = [c["choices"][0]["delta"] for c in to_chunks(quiet)]
    assert deltas[2] == {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}


def test_usage_comes_last_and_only_when_asked_for() -> None:
    chunks = chunks_of(text_reply("x"), stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 61
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_custom_tools_are_answered_in_kind() -> None:
    reply = Reply(blocks=[tool("c", {"input": "raw"}, 1)], stop_reason="tool_use")
    custom = {"id": "toolu_1", "type": "custom", "custom": {"name": "c", "input": "raw"}}
    assert deltas_of(reply, tools=TOOLS)[1] == {"tool_calls": [{"index": 0, **custom}]}
    odd = Reply(blocks=[tool("c", {"patch": 1}, 1)], stop_reason="tool_use")
    (call,) = deltas_of(odd, tools=TOOLS)[1]["tool_calls"]
    assert call["custom"]["input"] == '{"patch": 1}'  # what the model wrote otherwise is not lost


def completion_of(reply: Reply) -> JsonObject:
    _, writer = parse()
    for event in reply.events("m"):
        writer.feed(event)
    return writer.result()


@pytest.mark.parametrize(
    ("stop_reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("model_context_window_exceeded", "length"),
    ],
)
def test_finish_reasons(stop_reason: str, finish: str) -> None:
    reply = text_reply("x", stop_reason=stop_reason)
    assert completion_of(reply)["choices"][0]["finish_reason"] == finish
    assert chunks_of(reply)[-1]["choices"][0]["finish_reason"] == finish


def test_a_completion_of_tool_calls_has_null_content() -> None:
    reply = Reply(blocks=[tool("f", {"a": 1}, 1)], stop_reason="tool_use")
    choice = completion_of(reply)["choices"][0]
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "toolu_1", "type": "function", "function": function}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    assert choice["message"] == message
    assert choice["finish_reason"] == "tool_calls"


def test_a_refusal_is_told() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "not that"}
    reply = Reply(blocks=[], stop_reason="refusal", stop_details=details)
    message = completion_of(reply)["choices"][0]["message"]
    assert (message["content"], message["refusal"]) == ("", "not that")


# ---- the SDK


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def test_sdk_stream_helper_runs_a_tool_loop(client: openai.OpenAI, api: ScriptedApi) -> None:
    word = marker()
    api.on(
        word, Reply(blocks=[tool("f", {"a": 1}, 1), tool("f", {"a": 2}, 2)], stop_reason="tool_use")
    )
    messages: list[Any] = [{"role": "user", "content": word}]
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with client.chat.completions.stream(model="sonnet", messages=messages, tools=tools) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.tool_calls is not None
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"a": 1}, {"a": 2}]
    messages.append(message.model_dump())
    messages += [
        {"role": "tool", "tool_call_id": c.id, "content": f"done {c.id} {word[-6:]}"}
        for c in message.tool_calls
    ]
    second = client.chat.completions.create(model="sonnet", messages=messages, tools=tools)
    assert second.choices[0].message.content == DEFAULT_TEXT
    sent = api.calls_with(f"done toolu_2 {word[-6:]}")[0].body["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "user"]
    assert [b["tool_use_id"] for b in sent[2]["content"]] == ["toolu_1", "toolu_2"]


def test_sdk_raw_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="sonnet",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == DEFAULT_TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 42


class City(BaseModel):
    name: str


def test_sdk_structured_output(client: openai.OpenAI, api: ScriptedApi) -> None:
    word = marker()
    api.on(word, text_reply('{"name": "Rome"}'))
    parsed = client.chat.completions.parse(
        model="sonnet", messages=[{"role": "user", "content": word}], response_format=City
    )
    assert parsed.choices[0].message.parsed == City(name="Rome")
    sent = api.calls_with(word)[0].body["output_config"]["format"]
    assert sent["schema"]["properties"]["name"]["type"] == "string"


def test_sdk_errors_are_of_their_classes(client: openai.OpenAI, api: ScriptedApi) -> None:
    word = marker()
    api.on(word, Reply(status=429, message="slow down"))
    messages: list[Any] = [{"role": "user", "content": word}]
    with pytest.raises(openai.RateLimitError, match="slow down") as caught:
        client.chat.completions.create(model="sonnet", messages=messages)
    assert caught.value.code == "rate_limit_exceeded"
    assert (caught.value.request_id or "").startswith("req_")
    broken = marker()
    error = {"type": "overloaded_error", "message": "Overloaded"}
    api.on(broken, text_reply("a b c", error=error, error_after=4))
    messages = [{"role": "user", "content": broken}]
    stream = client.chat.completions.create(model="sonnet", messages=messages, stream=True)
    with pytest.raises(openai.APIError, match="Overloaded"):
        list(stream)


def test_sdk_async_with_5_parallel_streams(gateway: RunningGateway) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="sonnet", messages=[{"role": "user", "content": f"hi {number}"}], stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
            return await asyncio.gather(*(one(client, number) for number in range(5)))

    assert asyncio.run(all_of_them()) == [DEFAULT_TEXT] * 5

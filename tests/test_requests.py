"""Request bodies: what is accepted, and what is refused with which path. Pure, no process."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from helpers import assistant, user

import cc2api

JsonObject = dict[str, Any]
BASE: JsonObject = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
PNG = "iVBORw0KGgoAAAANSUhEUg=="
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
TEXT = {"type": "text", "text": "x"}
THINKING = {"type": "thinking", "thinking": "", "signature": ""}
SEARCH = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
PROGRAM = {"type": "code_execution_20250825", "tool_id": "s1"}
SEARCHED = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}


def saying(text: str) -> JsonObject:
    return {"type": "text", "text": text}


def parse(**fields: Any) -> cc2api.Turn:
    return cc2api.parse_messages_request(copy.deepcopy({**BASE, **fields}))


@pytest.mark.parametrize("body", ['{"a": [1, 2.5, "\\u00e9", null]}', '{"a": "\\ud83d\\ude00"}'])
def test_json_is_parsed(body: str) -> None:
    assert cc2api.parse_json(body.encode()) == json.loads(body)


@pytest.mark.parametrize("body", ['{"a": 1e999}', '{"a": "\\ud83d"}', "[1]", "{"])
def test_json_that_a_later_step_could_not_carry_is_refused(body: str) -> None:
    with pytest.raises(cc2api.InvalidRequest):
        cc2api.parse_json(body.encode())


def image(**source: Any) -> JsonObject:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", **source}}


def in_user(*blocks: Any) -> JsonObject:
    return {"messages": [user(*blocks)]}


BAD: list[tuple[JsonObject, str]] = [
    ({"model": None}, "model: Field required"),
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"model": 1}, "model: Input should be a valid string"),
    ({"model": ""}, "model: "),
    ({"stream": "yes"}, "stream: Input should be a valid boolean"),
    ({"system": 5}, "system: Input should be a valid list"),
    ({"system": [{"type": "text"}]}, "system.0.text: Field required"),
    ({"system": [{"type": "text", "text": " "}]}, "system: text content blocks must be non-empty"),
    ({"effort": "extreme"}, "effort: Input should be 'low' or"),
    ({"model": "claude-haiku-4-5", "output_config": {"effort": "low"}}, "This model does not"),
    ({"tools": {}}, "tools: Input should be a valid list"),
    ({"tools": ["f"]}, "tools.0: "),
    ({"messages": None}, "messages: Field required"),
    ({"messages": []}, "messages: at least one message is required"),
    ({"thinking": "on"}, "thinking: Input should be a valid dictionary"),
    ({"messages": [assistant({**USE, "name": None})]}, "messages.0.content.0.tool_use.name: "),
    ({"messages": {}}, "messages: Input should be a valid list"),
    ({"messages": ["hi"]}, "messages.0: "),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
    ({"messages": [{"role": "user", "content": ""}]}, "messages.0: all messages must have"),
    ({"messages": [user()]}, "messages.0: all messages must have non-empty content"),
    (
        {"messages": [{"role": "user", "content": ["hi"]}]},
        "messages.0.content.0: Input should be a valid dictionary",
    ),
    (in_user({"text": "x"}), "messages.0.content.0.type: Field required"),
    (in_user({"type": "text"}), "messages.0.content.0.text.text: Field required"),
    (in_user({"type": "text", "text": " \n"}), "messages.0.content.0: text content blocks must"),
    (in_user(RESULT), "messages.0.content.0: unexpected `tool_use_id`"),
    (in_user(image()), "messages.0.content.0.image.source.base64.data: Field required"),
    (in_user(image(data="!!")), "messages.0.content.0.image.source.base64.data: Could not"),
    (in_user(image(data="aGVsbG8=")), "messages.0.content.0.image.source.base64.data: Could not"),
    (in_user(image(data=PNG, media_type="image/gif")), "messages.0.content.0.image.source.base64"),
    (in_user(image(data=PNG, media_type="image/bmp")), "messages.0.content.0.image.source.base64"),
    ({"messages": [assistant({"type": "text", "text": "x"})]}, "messages: This gateway does not"),
    (
        {"messages": [assistant(USE), user({"type": "text", "text": "x"})]},
        "messages.0: `tool_use` ids were found without `tool_result` blocks immediately after: t1",
    ),
    (
        {"messages": [assistant(USE, USE), user(RESULT)]},
        "messages.0.content.1: `tool_use` ids must",
    ),
    (
        {"messages": [assistant(USE), user(RESULT, RESULT)]},
        "messages.1.content.1: unexpected `tool_use_id`",
    ),
    (
        {
            "messages": [
                assistant(USE),
                user({**RESULT, "is_error": True, "content": [image(data=PNG)]}),
            ]
        },
        "messages.1.content.0.tool_result.content.0: all content must be type `text`",
    ),
    (
        {"messages": [*BASE["messages"], {"role": "system", "content": [image(data=PNG)]}]},
        "messages.1.content.0.type: image: the CLI does not carry this in a system message",
    ),
    (
        {"messages": [assistant(THINKING), *BASE["messages"]]},
        "messages.0: The final block in an assistant message cannot be `thinking`.",
    ),
    (
        {"messages": [assistant(SEARCH, TEXT), *BASE["messages"]]},
        "messages.0.content.0: s1, a call without its result: the CLI does not carry this",
    ),
    (
        in_user({"type": "text", "text": "\ufeff\n"}),
        "messages.0.content.0: text content blocks must",
    ),
    (
        {"messages": [*BASE["messages"], assistant(saying(" (no content)\n")), user(TEXT)]},
        "messages.1: an answer of `(no content)`",
    ),
    (
        {
            "messages": [
                *BASE["messages"],
                assistant(THINKING, saying("[Empty text removed]")),
                user(TEXT),
            ]
        },
        "messages.1: an answer of `(no content)`",
    ),
    (
        {"messages": [assistant({**USE, "caller": PROGRAM}), user(RESULT)]},
        "messages.0.content.0.tool_use.caller: programmatic tool calling",
    ),
    (
        {"tools": [{"name": "f", "input_schema": {}, "allowed_callers": [PROGRAM["type"]]}]},
        "tools.0.allowed_callers: programmatic tool calling",
    ),
    ({"thread": {"type": "create"}}, "thread: "),
    ({"mcp_servers": [{"type": "url", "name": "s", "url": "https://x"}]}, "mcp_servers: the CLI"),
    ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "s"}]}, "tools.0.type: mcp_toolset: "),
    ({"tools": [{"type": "advisor_20260301", "name": "advisor"}]}, "tools.0.type: advisor_"),
    (
        {"messages": [assistant({**SEARCH, "name": "advisor"}), *BASE["messages"]]},
        "messages.0.content.0.server_tool_use.name: advisor: the CLI does not carry this",
    ),
    (
        {"messages": [assistant({"type": "advisor_tool_result"}, TEXT), *BASE["messages"]]},
        "messages.0.content.0.type: advisor_tool_result: the CLI",
    ),
    (
        {"messages": [assistant({"type": "fallback"}, TEXT), *BASE["messages"]]},
        "messages.0.content.0.type: fallback: the CLI",
    ),
    (
        {
            "messages": [
                assistant(USE),
                user({**RESULT, "content": [{"type": "tool_reference", "tool_name": "f"}]}),
            ]
        },
        "messages.1.content.0.tool_result.content.0.type: tool_reference: the CLI",
    ),
    (
        {"messages": [assistant({**SEARCH, "type": "mcp_tool_use"}, USE), user(RESULT)]},
        "messages.0.content.0: s1, a call without its result: the CLI",
    ),
    (
        {
            "messages": [
                *BASE["messages"],
                {"role": "system", "content": [{"type": "tool_addition"}]},
            ]
        },
        "messages.1.content.0.type: tool_addition: the CLI",
    ),
    ({"messages": [assistant(saying(" ")), user(TEXT)]}, "messages.0: an answer of"),
    (in_user(saying(" ")), "messages.0.content.0: text content blocks must be non-empty"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:60])
def test_a_mistake_is_refused_with_the_path_of_its_field(fields: JsonObject, message: str) -> None:
    with pytest.raises(cc2api.InvalidRequest) as caught:
        parse(**fields)
    assert str(caught.value).startswith(message)


GOOD_BLOCKS: list[JsonObject] = [
    image(data=PNG),
    {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
    {"type": "image", "source": {"type": "file", "file_id": "file_1"}},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
    {"type": "document", "source": {"type": "content", "content": [TEXT]}, "title": None},
    {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}},
    {"type": "search_result", "source": "s", "title": "t", "content": [TEXT]},
    {"type": "container_upload", "file_id": "f"},
    {"type": "text", "text": "x", "citations": None, "cache_control": None, "unknown": 1},
]


@pytest.mark.parametrize("block", GOOD_BLOCKS, ids=str)
def test_every_user_block_passes_verbatim(block: JsonObject) -> None:
    assert parse(messages=[user(block)]).messages[-1].content == [block]


def found(call_id: str) -> JsonObject:
    return {"type": "web_search_tool_result", "tool_use_id": call_id, "content": []}


PAUSED: list[tuple[list[JsonObject], list[JsonObject] | None]] = [
    ([TEXT, SEARCH], [TEXT]),
    ([TEXT, SEARCH, SEARCHED], [TEXT, SEARCH, SEARCHED]),
    ([SEARCH, SEARCHED, TEXT, {**SEARCH, "id": "s2"}], [SEARCH, SEARCHED, TEXT]),
    ([SEARCH], None),
    ([THINKING, SEARCH], None),
]


@pytest.mark.parametrize(("answer", "sent"), PAUSED, ids=lambda value: str(value)[:60])
def test_a_paused_answer_is_continued(
    answer: list[JsonObject], sent: list[JsonObject] | None
) -> None:
    turn = parse(messages=[user(TEXT), assistant(*answer)])
    go_on = {"type": "text", "text": "Continue."}
    if sent is None:
        assert turn.messages == (cc2api.Message("user", [TEXT, go_on]),)
    else:
        assert turn.messages[1:] == (
            cc2api.Message("assistant", sent),
            cc2api.Message("user", [go_on]),
        )


def test_a_paused_answer_that_was_continued_goes_on() -> None:
    first, second = assistant(TEXT, SEARCH), assistant({**SEARCH, "id": "s2"}, found("s2"), TEXT)
    sent = [TEXT, {**SEARCH, "id": "s2"}, found("s2"), TEXT]
    for history in ([first, second], [assistant(*first["content"]), second]):
        turn = parse(messages=[user(TEXT), *history, user(TEXT)])
        assert [message.role for message in turn.messages] == ["user", "assistant", "user"]
        assert turn.messages[1].content == sent
    # Continued by the API itself, the answer goes on with the call's own result.
    answered = assistant(found("s1"), TEXT)
    turn = parse(messages=[user(TEXT), first, answered, user(TEXT)])
    assert turn.messages[1].content == [TEXT, SEARCH, found("s1"), TEXT]
    turn = parse(messages=[user(TEXT), assistant(SEARCH), user(TEXT)])
    assert turn.messages == (cc2api.Message("user", [TEXT, TEXT]),)


def test_what_ends_with_a_word_of_the_clients_is_prefill_and_not_paused() -> None:
    with pytest.raises(cc2api.InvalidRequest, match="prefill"):
        parse(messages=[user(TEXT), assistant(SEARCH, SEARCHED, TEXT)])
    asked = [user(TEXT), assistant(TEXT, SEARCH)]
    turn = cc2api.parse_messages_request({**BASE, "messages": asked}, is_count=True)
    assert turn.messages[-1] == cc2api.Message("assistant", [TEXT])


def test_an_empty_text_of_an_answer_is_left_out() -> None:
    """The CLI drops it too."""
    answer = [saying(""), SEARCH, SEARCHED, TEXT, saying("")]
    turn = parse(messages=[user(TEXT), assistant(*answer), user(TEXT)])
    assert turn.messages[1].content == [SEARCH, SEARCHED, TEXT]


ASSISTANT_BLOCKS: list[list[JsonObject]] = [
    [{"type": "text", "text": "x", "citations": None}],
    [THINKING, TEXT],
    [{"type": "redacted_thinking", "data": "x"}, TEXT],
    [SEARCH, SEARCHED],
    [
        {"type": "mcp_tool_use", "id": "m1", "name": "f", "input": {}, "server_name": "s"},
        {"type": "mcp_tool_result", "tool_use_id": "m1", "is_error": False, "content": [TEXT]},
        TEXT,
    ],
    [TEXT, saying(" \n"), TEXT],
    [saying(" "), SEARCH, SEARCHED, saying("\n"), TEXT],
    [{"type": "compaction", "content": "c", "encrypted_content": "e"}, TEXT],
    [{"type": "bash_code_execution_tool_result", "tool_use_id": "s1", "content": {}}],
    [{"type": "container_upload", "file_id": "f"}],
    [{"type": "document", "source": {"type": "url", "url": "u"}}],
]


@pytest.mark.parametrize("blocks", ASSISTANT_BLOCKS, ids=lambda blocks: str(blocks[0]["type"]))
def test_every_assistant_block_passes_verbatim(blocks: list[JsonObject]) -> None:
    turn = parse(messages=[assistant(*blocks), *BASE["messages"]])
    assert turn.messages[:-1] == (cc2api.Message("assistant", blocks),)


def test_what_only_looks_like_a_result_goes_upstream() -> None:
    odd = {"type": "tool_result", "content": [5]}
    assert parse(tools=[odd], **odd).tools == [{"type": "tool_result", "content": [{}]}]


def test_null_is_the_same_as_absent() -> None:
    names = ("system", "stream", "tools", "thinking", "output_config", "output_format", "effort")
    others = ("metadata", "cache_control", "temperature", "top_p", "stop_sequences", "brand_new")
    assert parse(**dict.fromkeys((*names, *others))) == parse()


NOT_OURS: list[JsonObject] = [
    {"max_tokens": "8"},
    {"temperature": 7},
    {"stop_sequences": ["a", 1]},
    {"output_config": {"format": {"type": "xml"}}},
    {"tool_choice": {"type": "some"}},
    {"a_field_of_next_year": {"b": 1}},
    {"tools": [{"name": "a b"}, {"type": "toolset_of_next_year"}, {"name": "a b"}]},
    in_user({"type": "video", "source": {"type": "tape"}}),
    in_user({"type": "document", "source": {"type": "tape"}}, {"type": "image", "source": {}}),
    in_user({**TEXT, "cache_control": {"type": "forever"}}),
    {"messages": [assistant({**USE, "input": "x"}), user(RESULT)]},
]


@pytest.mark.parametrize("fields", NOT_OURS, ids=lambda value: str(value)[:60])
def test_what_the_api_would_refuse_or_next_year_take_goes_upstream(fields: JsonObject) -> None:
    turn = parse(**fields)
    sent = {**turn.extra_body, "tools": turn.tools}
    sent["messages"] = [{"role": m.role, "content": m.content} for m in turn.messages]
    assert {name: sent[name] for name in fields} == fields


class Counted(str):
    """An id that counts how often one is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_each_tool_pair_is_looked_up_not_searched() -> None:
    ids = [Counted(number) for number in range(2000)]
    uses = [{**USE, "id": each} for each in ids]
    results = [{**RESULT, "tool_use_id": Counted(each)} for each in ids]
    cc2api.parse_messages_request({**BASE, "messages": [assistant(*uses), user(*results)]})
    assert Counted.compared < 20 * len(ids), "in lists 32 MB of pairs took 20 minutes"


def test_an_empty_or_blank_system_prompt_is_none() -> None:
    blanks: list[Any] = ["", "  ", [], None]
    assert [parse(system=blank).system for blank in blanks] == [""] * 4


def test_betas_are_split_deduplicated_and_cleared_of_what_is_not_the_clients() -> None:
    header = "a-1, b-2,,a-1 , claude-code-20250219, oauth-2025-04-20, bad name, x\r\n-y"
    turn = cc2api.parse_messages_request(copy.deepcopy(BASE), header)
    assert turn.betas == ("a-1", "b-2")


def test_a_deep_schema_is_fine_and_a_bottomless_one_is_not() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    cc2api.parse_json(nested(cc2api.MAX_JSON_DEPTH))
    with pytest.raises(cc2api.InvalidRequest, match="nested deeper"):
        cc2api.parse_json(nested(cc2api.MAX_JSON_DEPTH + 1))


def test_a_typed_tool_needs_neither_name_nor_schema() -> None:
    tools = [
        {"type": "computer_toolset_20260801"},
        {"type": "browser_toolset_20260801"},
        {"type": "bash_20250124", "name": "bash"},
    ]
    assert parse(tools=tools).tools == tools


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        ("claude-sonnet-5-5", "thinking effort"),
        ("claude-opus-4-7", "thinking effort"),
        ("claude-opus-4-8[1m]", "thinking effort"),
        ("claude-fable-6", "thinking effort"),
        ("claude-haiku-5", "thinking effort"),
        ("us.anthropic.claude-opus-4-7-v1:0", "thinking effort"),
        ("claude-sonnet-4-6", "thinking effort temperature"),
        ("us.anthropic.claude-sonnet-4-6-20260115-v1:0", "thinking effort temperature"),
        ("claude-opus-4-5-20251101", "effort temperature"),
        ("claude-haiku-4-5", "temperature"),
        ("claude-sonnet-4-5@20250929", "temperature"),
        ("claude-opus-4-1-20250805", "temperature"),
        ("claude-opus-4-20250514", "temperature"),
        ("claude-sonnet-4@20250514", "temperature"),
        ("claude-sonnet-4", "temperature"),
        ("anthropic.claude-3-7-sonnet-20250219-v1:0", "temperature"),
    ],
)
def test_what_openais_clients_send_unasked_is_left_out_where_a_model_refuses_it(
    model: str, taken: str
) -> None:
    asked = {"thinking": {"type": "adaptive"}, "temperature": 0.5, "top_p": 0.9, "effort": "low"}
    fields = {"model": "m", **asked}
    turn = cc2api.to_turn(fields, [("messages.0", user(TEXT))], is_lenient=True)
    sent = cc2api.fields_for_model(turn, model)
    assert ("thinking" in sent) == ("thinking" in taken)
    assert ("output_config" in sent) == ("effort" in taken)
    assert "top_p" not in sent
    # While it thinks a model takes no temperature.
    unasked = {name: value for name, value in asked.items() if name != "thinking"}
    turn = cc2api.to_turn({"model": "m", **unasked}, [("messages.0", user(TEXT))], is_lenient=True)
    assert ("temperature" in cc2api.fields_for_model(turn, model)) == ("temperature" in taken)

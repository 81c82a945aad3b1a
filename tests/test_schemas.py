"""JSON schemas of OpenAI's clients, in the part of JSON Schema that Anthropic enforces."""

from __future__ import annotations

import copy
import datetime
import enum
from typing import Any, Literal

import api_rules
import pytest
from anthropic import transform_schema
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel, Field, RootModel

import cc2api

JsonObject = dict[str, Any]
STRING = {"type": "string"}


def translate(schema: Any) -> JsonObject:
    return cc2api.SchemaTranslator().translate(copy.deepcopy(schema), "schema")


def closed(**properties: Any) -> JsonObject:
    """Return the schema of an object, as it is sent."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    """A place."""

    street: str = Field(min_length=1, description="the street")
    number: int = Field(ge=1, le=999)
    email: str = Field(json_schema_extra={"format": "email"})


class Person(BaseModel):
    minimum: float = Field(gt=0, description="of that name, not a bound")
    colour: Colour
    kind: Literal["a", "b"]
    home: Place
    others: list[Place] = Field(min_length=2, max_length=5)
    born: datetime.date
    either: int | str | None
    odd: str = Field(json_schema_extra={"format": "iban"})


@pytest.mark.parametrize("model", [Place, Person, RootModel[list[Place]], RootModel[Place]])
def test_a_schema_is_sent_as_anthropics_own_sdk_sends_it(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    assert translate(schema) == transform_schema(copy.deepcopy(schema))


POINTERS = ("#/$defs/A", "#/definitions/A_1", "#/definitions/A")
TRANSLATED: list[tuple[JsonObject, JsonObject]] = [
    ({"type": ["string", "null"]}, {"anyOf": [STRING, {"type": "null"}]}),
    (
        {"type": ["integer", "null"], "minimum": 1, "description": "d"},
        {"anyOf": [{"type": "integer", "description": "{minimum: 1}"}, {"type": "null"}],
         "description": "d"},
    ),
    ({"type": ["string"], "minLength": 3}, {**STRING, "description": "{minLength: 3}"}),
    (
        {"properties": {"a": STRING}, "allOf": [{"$ref": "#/$defs/B"}],
         "$defs": {"B": {"properties": {"b": STRING}, "required": ["b"]}}},
        {**closed(a=STRING, b=STRING), "required": ["b"]},
    ),
    (
        {"allOf": [{"properties": {"a": STRING}, "required": ["a"]}, {"required": ["a"]}]},
        {**closed(a=STRING), "required": ["a"]},
    ),
    (
        {"anyOf": [{"$ref": each} for each in POINTERS],
         "$defs": {"A": STRING}, "definitions": {"A_1": {"const": 1}, "A": {"const": 2}}},
        {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("A", "A_1", "A_2")],
         "$defs": {"A": STRING, "A_1": {"const": 1}, "A_2": {"const": 2}}},
    ),
    ({"type": ["string", "null"], "enum": ["a", None]}, {"enum": ["a", None]}),
    ({"oneOf": [STRING, {"const": None}]}, {"anyOf": [STRING, {"const": None}]}),
    ({"allOf": [STRING], "description": "d"}, {**STRING, "description": "d"}),
    (
        {"allOf": [{"properties": {"a": STRING}, "required": ["a"]}, {"$ref": "#/$defs/B"}],
         "$defs": {"B": {"type": "object", "properties": {"b": STRING}}}},
        {**closed(a=STRING, b=STRING), "required": ["a"]},
    ),
    (
        {"properties": {"a": {"$ref": "#/definitions/A"}}, "definitions": {"A": STRING}},
        {**closed(a={"$ref": "#/$defs/A"}), "$defs": {"A": STRING}},
    ),
    (
        {"properties": {"a/b": STRING, "c": {"$ref": "#/properties/a~1b"}}},
        {**closed(**{"a/b": STRING}, c={"$ref": "#/$defs/a_1b"}), "$defs": {"a_1b": STRING}},
    ),
    (
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "string", "title": None,
         "pattern": "^a", "default": None},
        {**STRING, "description": "{pattern: ^a, default: null}"},
    ),
    (
        {"type": "array", "items": STRING, "minItems": 1, "maxItems": 2},
        {"type": "array", "items": STRING, "minItems": 1, "description": "{maxItems: 2}"},
    ),
    ({"type": "object", "properties": {}}, closed()),
    ({"type": "array", "items": True}, {"type": "array", "description": "{items: true}"}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "sent"), TRANSLATED, ids=lambda value: str(value)[:60])
def test_a_schema_is_translated(schema: JsonObject, sent: JsonObject) -> None:
    assert translate(schema) == sent


def nested(depth: int) -> JsonObject:
    schema: JsonObject = STRING
    for _ in range(depth):
        schema = {"type": ["array", "array"], "items": schema}
    return schema


def chained(length: int) -> JsonObject:
    links = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": STRING}}


def test_deep_schemas_are_translated_in_time_or_not_at_all() -> None:
    assert translate(nested(60))["items"]["items"]["type"] == "array"
    assert len(translate(chained(20))["$defs"]) == 21
    with pytest.raises(cc2api.Unenforceable):
        translate(chained(1000))


def test_all_schemas_of_a_request_count_together() -> None:
    optional = {"properties": {f"p{i}": STRING for i in range(20)}}
    tool = {"type": "function", "name": "f", "parameters": optional, "strict": True}
    wanted = {"type": "json_schema", "name": "n", "schema": optional}
    asked = {"model": "m", "input": "hi", "tools": [tool], "text": {"format": wanted}}
    turn, _ = cc2api.parse_responses_request(asked)
    assert "output_config" in turn.extra_body
    assert "strict" not in turn.tools[0]


def test_what_is_not_sent_does_not_count() -> None:
    half = {"properties": {**{f"p{i}": STRING for i in range(20)}, "open": {}}}
    small = {"properties": {f"p{i}": STRING for i in range(20)}}
    assert ["strict" in tool for tool in tools_of(half, small)] == [False, True]


def test_a_strict_tools_schema_is_an_object_at_the_top() -> None:
    schema = {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {}}}}
    (tool,) = tools_of(schema)
    assert tool == {"name": "f0", "input_schema": {"type": "object", **schema}}


UNENFORCEABLE: list[Any] = [
    {},
    True,
    {"type": "object"},
    {"type": "object", "additionalProperties": STRING},
    {"type": "object", "properties": {"a": STRING}, "additionalProperties": True},
    {"properties": {"a": {}}},
    {"patternProperties": {"^a": STRING}, "properties": {}},
    {"enum": [{"a": 1}]},
    {"const": [1]},
    {"allOf": [STRING, {"type": "integer"}]},
    {"anyOf": [STRING, {"type": "object"}]},
    {"properties": {"a": {"$ref": "#"}}},
    {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}}}},
    {"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"allOf": [{"$ref": "#/$defs/A"}]}}},
]


@pytest.mark.parametrize("schema", UNENFORCEABLE, ids=str)
def test_what_cannot_be_enforced_is_asked_for_in_words(schema: Any) -> None:
    with pytest.raises(cc2api.Unenforceable):
        translate(schema)

    inner = {"name": "n", "schema": schema}
    wanted = {"type": "json_schema", "json_schema": inner}
    parameters = {"properties": {"a": schema}, "$defs": cc2api.as_object(schema).get("$defs", {})}
    function = {"name": "f", "parameters": parameters, "strict": True}
    turn, _ = cc2api.parse_chat_request(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "response_format": wanted,
            "tools": [{"type": "function", "function": function}],
        }
    )
    assert "output_config" not in turn.extra_body
    assert turn.system.endswith(cc2api.dump_json(schema))
    assert "strict" not in turn.tools[0]
    assert turn.tools[0]["input_schema"]["properties"] == {"a": schema}


NO_SCHEMAS: list[tuple[Any, str]] = [
    ("text", "schema"),
    ([], "schema"),
    ({"type": "integr"}, "schema.type"),
    ({"type": 5}, "schema.type"),
    ({"properties": []}, "schema.properties"),
    ({"properties": {"a": 5}}, "schema.properties.a"),
    ({"properties": {}, "required": "a"}, "schema.required"),
    ({"properties": {}, "required": [["a"]]}, "schema.required"),
    ({"type": []}, "schema.type"),
    ({"type": ["string", []]}, "schema.type"),
    ({"enum": 5}, "schema.enum"),
    ({"anyOf": [STRING, 5]}, "schema.anyOf.1"),
    ({"anyOf": {}}, "schema.anyOf"),
    ({"type": "array", "items": {"type": "x"}}, "schema.items.type"),
    ({"$ref": 5}, "schema.$ref"),
    ({"$ref": "https://example.com/a.json"}, "schema.$ref"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "schema.properties.a.$ref"),
]


@pytest.mark.parametrize(("schema", "path"), NO_SCHEMAS, ids=str)
def test_what_is_no_schema_is_refused_with_its_path(schema: Any, path: str) -> None:
    with pytest.raises(cc2api.InvalidRequest) as caught:
        translate(schema)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_refused_schema_is_named_as_the_client_knows_it() -> None:
    for schema, param in (
        ({"properties": {"a-b": 5}}, "properties.a-b"),
        ({"$ref": "#/a"}, "$ref"),
    ):
        wanted = {"type": "json_schema", "name": "n", "schema": schema}
        asked = {"model": "m", "input": "hi", "text": {"format": wanted}}
        with pytest.raises(cc2api.InvalidRequest) as caught:
            cc2api.parse_responses_request(asked)
        _, body = cc2api.to_responses_error(caught.value)
        assert body["error"]["param"] == f"text.format.schema.{param}"


def tools_of(*schemas: JsonObject) -> list[JsonObject]:
    tools = [
        {"type": "function", "name": f"f{number}", "parameters": schema, "strict": True}
        for number, schema in enumerate(schemas)
    ]
    return cc2api.parse_responses_request({"model": "m", "input": "hi", "tools": tools})[0].tools


def test_no_tool_is_strict_where_all_together_are_too_complex() -> None:
    """The API refuses over 20 strict tools, 24 optional parameters or 16 unions in all."""
    small = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}
    optional = {"type": "object", "properties": {f"p{i}": STRING for i in range(13)}}
    union = {"type": ["string", "null"]}
    names = [f"p{i}" for i in range(9)]
    unions = {"properties": dict.fromkeys(names, union), "required": names}
    assert all(tool["strict"] for tool in tools_of(*[small] * 20))
    assert not any("strict" in tool for tool in tools_of(*[small] * 21))
    assert not any("strict" in tool for tool in tools_of(optional, optional))
    assert all("strict" in tool for tool in tools_of(optional, small))
    assert not any("strict" in tool for tool in tools_of(unions, unions))
    assert tools_of(optional, optional)[0]["input_schema"] == optional


TYPES = st.sampled_from([*api_rules.TYPES, None, ["string", "null"]])
KEYWORDS = st.fixed_dictionaries(
    {},
    optional={
        "type": TYPES, "format": st.sampled_from(["date", "iban"]), "minItems": st.integers(0, 3),
        "minimum": st.integers(), "enum": st.lists(st.sampled_from([1, "a", None])),
        "const": st.sampled_from([1, None, []]), "description": st.just("d"),
        "$ref": st.sampled_from(["#", "#/$defs/a", "#/definitions/b", "#/properties/a"]),
        "additionalProperties": st.booleans(), "uniqueItems": st.just(True),
    },
)  # fmt: skip


def grown(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(st.sampled_from(["a", "minimum", "type"]), schemas, max_size=2)
    some = st.lists(schemas, max_size=2)
    more = st.fixed_dictionaries(
        {},
        optional={
            **{"properties": named, "items": schemas, "anyOf": some, "oneOf": some, "allOf": some},
            **{"$defs": named, "definitions": named, "required": st.just(["a"])},
        },
    )
    return st.builds(lambda first, second: {**first, **second}, KEYWORDS, more)


SCHEMAS: st.SearchStrategy[Any] = st.deferred(lambda: st.one_of(KEYWORDS, grown(SCHEMAS)))


@settings(deadline=None)
@given(SCHEMAS)
def test_whatever_is_sent_the_api_takes(schema: JsonObject) -> None:
    before = copy.deepcopy(schema)
    try:
        translated = cc2api.SchemaTranslator().translate(schema, "schema")
    except (cc2api.Unenforceable, cc2api.InvalidRequest):
        return
    finally:
        assert schema == before
    assert list(api_rules.schema_refusals("schema", translated)) == []

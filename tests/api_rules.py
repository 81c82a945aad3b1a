"""What the Messages API refuses, as far as the gateway's translations could run into it.

A strict scripted API asks `refusal` of every request, so that a test passes only with a request
that the real API would take for that model. The words are the API's own, as recorded or documented
(shared contracts; platform.claude.com/docs: structured outputs, adaptive thinking, errors).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

JsonObject = dict[str, Any]

# Every later model refuses the sampling parameters, a thinking budget, and (from 4.6 on) a prefill.
_TAKES_SAMPLING = re.compile(
    r"claude-(?:3|instant|[12]\b|(?:opus|sonnet|haiku)-4-(?:[0-6](?!\d)|20\d{6}))"
)
_TAKES_PREFILL = re.compile(
    r"claude-(?:3|instant|[12]\b|(?:opus|sonnet|haiku)-4-(?:[0-5](?!\d)|20\d{6}))"
)
_LACKS_EFFORT = re.compile(
    r"claude-(?:3|opus-4-[01](?!\d)|opus-4-20|sonnet-4-[05](?!\d)|sonnet-4-20|haiku-4-5(?!\d))"
)
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")

_FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid",
)  # fmt: skip
# The keywords that structured outputs take; `pattern` and `default` beside those that the SDKs use.
_KEYWORDS = {
    "type", "properties", "required", "additionalProperties", "items", "minItems", "enum", "const",
    "anyOf", "allOf", "$ref", "$defs", "definitions", "description", "title", "default", "format",
    "pattern", "$schema", "$id",
}  # fmt: skip
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


def refusal(body: JsonObject) -> str | None:
    """Return the message of the API's status 400, None where it takes the request."""
    return next(_refusals(body), None)


def _refusals(body: JsonObject) -> Iterator[str]:
    model = body["model"]
    takes_sampling = _TAKES_SAMPLING.search(model) is not None
    for name in ("temperature", "top_p", "top_k"):
        if name in body and not takes_sampling:
            yield f"`{name}` is deprecated for this model."
    if (
        "temperature" in body
        and "top_p" in body
        and not re.search("claude-(3|.*-4-0|.*-4-20)", model)
    ):
        yield "`temperature` and `top_p` cannot both be specified for this model."
    if "temperature" in body and not 0 <= body["temperature"] <= 1:
        yield "temperature: range: 0..1"

    thinking = body.get("thinking") or {}
    if thinking.get("type") == "enabled":
        if not takes_sampling:
            yield '"thinking.type.enabled" is not supported for this model.'
        if thinking["budget_tokens"] < 1024:
            yield "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
        if thinking["budget_tokens"] >= body["max_tokens"]:
            yield "`max_tokens` must be greater than `thinking.budget_tokens`."
    output_config = body.get("output_config") or {}
    if "effort" in output_config and _LACKS_EFFORT.search(model):
        yield "This model does not support the effort parameter."

    yield from _tool_refusals(body)
    output_format = output_config.get("format")
    if output_format is not None:
        yield from schema_refusals("output_config.format.schema", output_format.get("schema"))
    yield from _message_refusals(body, takes_prefill=_TAKES_PREFILL.search(model) is not None)


def _tool_refusals(body: JsonObject) -> Iterator[str]:
    tools = body.get("tools") or []
    names = [tool.get("name") for tool in tools]
    if len(set(names)) < len(names):
        yield "tools: Tool names must be unique."
    for index, tool in enumerate(tools):
        if tool.get("type", "custom") == "custom":
            yield from _custom_tool_refusals(f"tools.{index}.custom", tool)

    choice = body.get("tool_choice") or {}
    if choice and not tools:
        yield "tool_choice: may only be specified while providing tools."
    if choice.get("type") == "tool" and choice["name"] not in names:
        yield f"Tool '{choice['name']}' not found in provided tools"


def _custom_tool_refusals(path: str, tool: JsonObject) -> Iterator[str]:
    if not _TOOL_NAME.fullmatch(tool["name"]):
        yield f"{path}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'"
    if not isinstance(tool.get("description", ""), str):
        yield f"{path}.description: Input should be a valid string"
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        yield f"{path}.input_schema: Input should be a valid dictionary"
        return

    if schema.get("type") != "object":
        yield f"{path}.input_schema.type: Field required"
    if {"anyOf", "oneOf", "allOf"} & set(schema):
        problem = "input_schema does not support oneOf, allOf, or anyOf at the top level"
        yield f"{path}.input_schema: {problem}"
    has_properties = isinstance(schema.get("properties", {}), dict)
    has_required = isinstance(schema.get("required", []), list)
    if not has_properties or not has_required:
        problem = "JSON schema is invalid. It must match JSON Schema draft 2020-12"
        yield f"{path}.input_schema: {problem}"
    if tool.get("strict"):
        yield from schema_refusals(f"{path}.input_schema", schema)


def schema_refusals(path: str, schema: Any) -> Iterator[str]:
    """Yield what structured outputs do not take of a schema."""
    if not isinstance(schema, dict):
        yield f"{path}: Input should be a valid dictionary"
        return

    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    for each in kinds:
        if each not in (None, *TYPES):
            yield f"{path}: Unknown type {each!r}"
    unknown = sorted(set(schema) - _KEYWORDS)
    if unknown:
        yield f"{path}: For '{kind}' type, properties {', '.join(unknown)} are not supported"
    if "object" in kinds and schema.get("additionalProperties") is not False:
        yield f"{path}: For 'object' type, 'additionalProperties' must be explicitly set to false"
    if schema.get("format") not in (None, *_FORMATS):
        yield f"{path}: String format {schema['format']!r} is not supported"
    if schema.get("minItems", 0) not in (0, 1):
        yield f"{path}: For 'array' type, 'minItems' values other than 0 or 1 are not supported"
    if not {"type", "enum", "const", "anyOf", "allOf", "$ref"} & set(schema):
        yield f"{path}: Schema type is missing"
    if not str(schema.get("$ref", "#")).startswith("#"):
        yield f"{path}: External $ref is not supported"
    for member_path, member in _members(schema):
        yield from schema_refusals(f"{path}.{member_path}", member)


def _members(schema: JsonObject) -> Iterator[tuple[str, Any]]:
    """Yield the schemas inside a schema, each with its path."""
    for name in ("properties", "$defs", "definitions"):
        for key, member in (schema.get(name) or {}).items():
            yield f"{name}.{key}", member
    for name in ("anyOf", "allOf"):
        for index, member in enumerate(schema.get(name) or []):
            yield f"{name}.{index}", member
    if "items" in schema:
        yield "items", schema["items"]


def _message_refusals(body: JsonObject, *, takes_prefill: bool) -> Iterator[str]:
    messages = [
        (message["role"], _blocks(message["content"]))
        for message in body["messages"]
        if message["role"] != "system"
    ]
    merged = [
        (role, list(itertools.chain.from_iterable(content for _, content in group)))
        for role, group in itertools.groupby(messages, key=lambda message: message[0])
    ]
    ids = [b["id"] for _, content in merged for b in content if b["type"] == "tool_use"]
    if len(set(ids)) < len(ids):
        yield "messages: `tool_use` ids must be unique"

    called: list[str] = []
    for index, (role, content) in enumerate(merged):
        if role == "user":
            texts = [block["text"] for block in content if block["type"] == "text"]
            if any(not text.strip() for text in texts):
                yield "messages: text content blocks must contain non-whitespace text"
        answered = [b["tool_use_id"] for b in content if b["type"] == "tool_result"]
        for tool_use_id in answered:
            if tool_use_id not in called:
                yield (
                    f"messages.{index}.content: unexpected `tool_use_id` found in `tool_result` "
                    f"blocks: {tool_use_id}."
                )
        missing = [tool_use_id for tool_use_id in called if tool_use_id not in answered]
        if missing:
            yield (
                f"messages.{index - 1}: `tool_use` ids were found without `tool_result` blocks "
                f"immediately after: {', '.join(missing)}."
            )
        if not content and index < len(merged) - 1:
            yield f"messages.{index}: all messages must have non-empty content"
        called = [b["id"] for b in content if b["type"] == "tool_use"]

    last_role, last_content = merged[-1]
    is_paused = bool(last_content) and last_content[-1]["type"] == "server_tool_use"
    if last_role == "assistant" and not takes_prefill and not is_paused:
        yield (
            "This model does not support assistant message prefill. The conversation must end with "
            "a user message."
        )


def _blocks(content: Any) -> list[JsonObject]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content

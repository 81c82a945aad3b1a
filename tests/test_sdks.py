"""The real SDKs as clients of the gateway on the real CLI."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import anthropic
import openai
import pytest
from running import RunningGateway
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[anthropic.Anthropic]:
    key = "none-needed"
    with anthropic.Anthropic(base_url=gateway.url, api_key=key, max_retries=0) as made:
        yield made


def test_anthropic_create(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="claude-sonnet-4-6", max_tokens=50, messages=[{"role": "user", "content": "hi"}]
    )
    assert message.content[0].type == "text"
    assert message.content[0].text == DEFAULT_TEXT
    assert message.usage.output_tokens == 42
    assert (message._request_id or "").startswith("req_")


def test_anthropic_stream_helper_with_tools(client: anthropic.Anthropic, api: ScriptedApi) -> None:
    word = f"mark-{uuid4().hex}"
    reply = Reply(
        blocks=[
            {"type": "text", "text": "calling two"},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": [1, "x"]}},
            {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
        ],
        stop_reason="tool_use",
    )
    api.on(word, reply)
    with client.messages.stream(
        model="claude-sonnet-4-6",
        max_tokens=50,
        messages=[{"role": "user", "content": word}],
        tools=[{"name": "f", "input_schema": {"type": "object"}}],
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "calling two"
    assert [block.to_dict() for block in final.content] == reply.blocks
    assert final.stop_reason == "tool_use"


def test_anthropic_errors_are_of_their_classes(
    client: anthropic.Anthropic, api: ScriptedApi
) -> None:
    word = f"mark-{uuid4().hex}"
    api.on(word, Reply(status=429, message="slow down"))
    with pytest.raises(anthropic.RateLimitError, match="slow down") as caught:
        client.messages.create(
            model="claude-sonnet-4-6", max_tokens=5, messages=[{"role": "user", "content": word}]
        )
    assert (caught.value.request_id or "").startswith("req_")


def test_openai_create(gateway: RunningGateway) -> None:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none-needed") as client:
        completion = client.chat.completions.create(
            model="claude-code", messages=[{"role": "user", "content": "hi"}]
        )
    assert completion.choices[0].message.content == DEFAULT_TEXT
    assert completion.usage is not None
    assert completion.usage.total_tokens == 61

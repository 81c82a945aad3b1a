"""LiteLLM, over its OpenAI or its Anthropic provider."""

import json

import litellm
from common_client import KIND, MODEL, PNG_URL, SCHEMA, SYSTEM, Person, double, report, said, told

litellm.drop_params = True
ASK = {"model": f"{KIND}/{MODEL}", "max_tokens": 500, "num_retries": 0, "max_retries": 0}
if KIND == "openai":
    ASK.update(temperature=0.5, top_p=0.9)


def messages(content):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def streamed(given, **more):
    options = {"include_usage": True}
    chunks = list(
        litellm.completion(messages=given, stream=True, stream_options=options, **more, **ASK)
    )
    whole = litellm.stream_chunk_builder(chunks, messages=given)
    assert whole.usage.completion_tokens == 42
    return whole.choices[0].message


def text(prompt):
    return streamed(messages(prompt)).content


def loop(prompt):
    function = {"name": "double", "description": "Double a number.", "parameters": SCHEMA}
    given = messages(prompt)
    tools = [{"type": "function", "function": function}]
    while (answer := streamed(given, tools=tools, tool_choice="auto")).tool_calls:
        given.append(answer)
        for call in answer.tool_calls:
            result = double(**json.loads(call.function.arguments))
            given.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return said(answer.content)


def structured(prompt):
    answer = litellm.completion(messages=messages(prompt), response_format=Person, **ASK)
    return told(Person.model_validate_json(answer.choices[0].message.content))


def image(prompt):
    content = [
        {"type": "text", "text": prompt},
        {"type": "image_url", "image_url": {"url": PNG_URL}},
    ]
    return litellm.completion(messages=messages(content), **ASK).choices[0].message.content


report(text=text, loop=loop, structured=structured, image=image)

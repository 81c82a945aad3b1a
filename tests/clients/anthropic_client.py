"""Anthropic's SDK."""

import anthropic
from common_client import MODEL, PNG, SYSTEM, Person, double, report, said, told

client = anthropic.Anthropic(max_retries=0)
ASK = {"model": MODEL, "max_tokens": 500, "system": SYSTEM}


def messages(content):
    return [{"role": "user", "content": content}]


def text(prompt):
    with client.messages.stream(messages=messages(prompt), **ASK) as stream:
        return "".join(stream.text_stream)


def loop(prompt):
    runner = client.beta.messages.tool_runner(
        messages=messages(prompt), tools=[anthropic.beta_tool(double)], stream=True, **ASK
    )
    for stream in runner:
        last = stream.get_final_message()
    return said(last.content[-1].text)


def structured(prompt):
    answer = client.messages.parse(messages=messages(prompt), output_format=Person, **ASK)
    return told(answer.parsed_output)


def image(prompt):
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    content = [{"type": "image", "source": source}, {"type": "text", "text": prompt}]
    return said(client.messages.create(messages=messages(content), **ASK).content[0].text)


report(text=text, loop=loop, structured=structured, image=image)

"""instructor, over OpenAI's SDK or over Anthropic's, in one of its modes."""

import instructor
from anthropic import Anthropic
from common_client import KIND, MODEL, PNG_URL, SYSTEM, Person, double, report, said, told
from instructor.processing.multimodal import Image
from openai import OpenAI
from pydantic import BaseModel, Field, field_validator

VENDOR, _, MODE = KIND.partition("-")
if VENDOR == "openai":
    client = instructor.from_openai(OpenAI(max_retries=0), mode=instructor.Mode[MODE.upper()])
else:
    client = instructor.from_anthropic(Anthropic(max_retries=0))
ASK = {"model": MODEL, "max_retries": 2, "max_tokens": 500}


class Double(BaseModel):
    """A number to be doubled."""

    number: int = Field(ge=0, le=100)

    @field_validator("number")
    @classmethod
    def is_doubled(cls, number):
        if number == 21:
            raise ValueError(f"say {double(number)}")
        return number


def messages(content):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def text(prompt):
    return told_text(client.create(messages=messages(prompt), response_model=None, **ASK))


def told_text(answer):
    return said(
        answer.content[0].text if VENDOR == "anthropic" else answer.choices[0].message.content
    )


def loop(prompt):
    """Its loop: it tells the model what is wrong with what the model filled in."""
    asked = client.create(messages=messages(prompt), response_model=Double, **ASK)
    return f"It is {asked.number}."


def structured(prompt):
    ask = {"messages": messages(prompt), "response_model": Person, "strict": False, **ASK}
    *_, last = client.create_partial(**ask)
    assert told(last) == told(client.create(**ask))
    return told(last)


def image(prompt):
    content = [prompt, Image.autodetect(PNG_URL)]
    return told_text(client.create(messages=messages(content), response_model=None, **ASK))


report(text=text, loop=loop, structured=structured, image=image)

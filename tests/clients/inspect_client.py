"""Inspect's models, with its providers for OpenAI and for Anthropic."""

from common_client import KIND, MODEL, PNG_URL, SYSTEM, Person, double, report, told
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    ResponseSchema,
    get_model,
)
from inspect_ai.tool import tool
from inspect_ai.util import json_schema

# its providers: openai, which asks for answers of models that it does not know by responses;
# openai-api, for servers of others; anthropic
PREFIX = "openai-api/openai" if KIND == "openai-api" else KIND
CONFIG = {"max_tokens": 500, "max_retries": 0, "max_connections": 1, "timeout": 60}
if KIND != "anthropic":
    CONFIG.update(temperature=0.5, top_p=0.9, seed=1)


@tool(name="double")
def doubling():
    async def execute(number: int) -> str:
        """Double a number.

        Args:
            number: to be doubled
        """
        return double(number)

    return execute


def model(**more):
    config = GenerateConfig(**CONFIG, **more)
    return get_model(f"{PREFIX}/{MODEL}", config=config, memoize=False, max_retries=0)


def messages(content):
    return [ChatMessageSystem(content=SYSTEM), ChatMessageUser(content=content)]


async def text(prompt):
    return (await model().generate(messages(prompt))).completion


async def loop(prompt):
    _, output = await model().generate_loop(messages(prompt), tools=[doubling()])
    return output.completion


async def structured(prompt):
    schema = ResponseSchema(name="person", json_schema=json_schema(Person), strict=True)
    output = await model(response_schema=schema).generate(messages(prompt))
    return told(Person.model_validate_json(output.completion))


async def image(prompt):
    content = [ContentText(text=prompt), ContentImage(image=PNG_URL)]
    return (await model().generate(messages(content))).completion


report(text=text, loop=loop, structured=structured, image=image)

"""pydantic-ai over OpenAI's SDK, on chat completions or on responses."""

import base64

from common_client import KIND, MODEL, PNG, SYSTEM, Person, double, report, told
from openai import AsyncOpenAI
from pydantic_ai import Agent, BinaryContent, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

API, _, OUTPUT = KIND.partition("-")
OUTPUTS = {"tool": Person, "native": NativeOutput(Person), "prompted": PromptedOutput(Person)}
SETTINGS = {"temperature": 0.5, "max_tokens": 500, "parallel_tool_calls": True}


def agent(**more):
    # made for each case, since each case has an event loop of its own
    of_api = OpenAIChatModel if API == "chat" else OpenAIResponsesModel
    provider = OpenAIProvider(openai_client=AsyncOpenAI(max_retries=0))
    model = of_api(MODEL, provider=provider)
    return Agent(model, instructions=SYSTEM, model_settings=SETTINGS, **more)


async def text(prompt):
    async with agent().run_stream(prompt) as stream:
        return await stream.get_output()


async def loop(prompt):
    async with agent(tools=[double]).run_stream(prompt) as stream:
        return await stream.get_output()


async def structured(prompt):
    return told((await agent(output_type=OUTPUTS[OUTPUT]).run(prompt)).output)


async def image(prompt):
    content = BinaryContent(base64.b64decode(PNG), media_type="image/png")
    return (await agent().run([prompt, content])).output


report(text=text, loop=loop, structured=structured, image=image)

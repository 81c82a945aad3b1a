"""smolagents' OpenAIModel, by itself and in an agent."""

import base64
import io

from common_client import MODEL, PNG, SYSTEM, Person, double, report, told
from PIL import Image
from smolagents import OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(
    MODEL, client_kwargs={"max_retries": 0}, temperature=0.5, max_tokens=500, retry=False
)


def messages(content):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def text(prompt):
    content = [{"type": "text", "text": prompt}]
    return "".join(
        delta.content or "" for delta in model.generate_stream(messages(content), ["Observation:"])
    )


def loop(prompt):
    agent = ToolCallingAgent([tool(double)], model, stream_outputs=True, verbosity_level=-1)
    return agent.run(prompt)


def structured(prompt):
    schema = {"name": "Person", "schema": Person.model_json_schema()}
    answer = model.generate(
        messages([{"type": "text", "text": prompt}]),
        response_format={"type": "json_schema", "json_schema": schema},
    )
    return told(Person.model_validate_json(answer.content))


def image(prompt):
    picture = Image.open(io.BytesIO(base64.b64decode(PNG)))
    content = [{"type": "text", "text": prompt}, {"type": "image", "image": picture}]
    return model.generate(messages(content)).content


report(text=text, loop=loop, structured=structured, image=image)

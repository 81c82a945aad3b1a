"""OpenAI's SDK, on chat completions or on responses."""

from common_client import KIND, MODEL, PNG_URL, SYSTEM, Person, double, report, said, told
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

client = OpenAI(max_retries=0)
SAMPLING = {"temperature": 0.5, "top_p": 0.9}


class Double(BaseModel):
    """Double a number."""

    number: int


class Chat:
    def __init__(self) -> None:
        self.ask = {"model": MODEL, "max_completion_tokens": 500, **SAMPLING}

    def messages(self, content):
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]

    def text(self, prompt):
        chunks = client.chat.completions.create(
            messages=self.messages(prompt),
            stream=True,
            stream_options={"include_usage": True},
            seed=1,
            presence_penalty=0,
            frequency_penalty=0,
            n=1,
            user="me",
            **self.ask,
        )
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    def loop(self, prompt):
        messages = self.messages(prompt)
        tools = [pydantic_function_tool(Double, name="double")]
        while True:
            with client.chat.completions.stream(
                messages=messages, tools=tools, parallel_tool_calls=False, **self.ask
            ) as stream:
                message = stream.get_final_completion().choices[0].message
            if not message.tool_calls:
                return said(message.content)
            messages.append(message)
            for call in message.tool_calls:
                result = double(call.function.parsed_arguments.number)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    def structured(self, prompt):
        answer = client.chat.completions.parse(
            messages=self.messages(prompt), response_format=Person, **self.ask
        )
        return told(answer.choices[0].message.parsed)

    def image(self, prompt):
        image = {"type": "image_url", "image_url": {"url": PNG_URL, "detail": "low"}}
        messages = self.messages([{"type": "text", "text": prompt}, image])
        answer = client.chat.completions.create(messages=messages, **self.ask)
        return said(answer.choices[0].message.content)


class Responses:
    def __init__(self) -> None:
        self.ask = {"model": MODEL, "max_output_tokens": 500, "instructions": SYSTEM, **SAMPLING}

    def text(self, prompt):
        events = client.responses.create(input=prompt, stream=True, **self.ask)
        return "".join(e.delta for e in events if e.type == "response.output_text.delta")

    def loop(self, prompt):
        items = [{"role": "user", "content": prompt}]
        parameters = {**Double.model_json_schema(), "additionalProperties": False}
        tool = {"type": "function", "name": "double", "parameters": parameters, "strict": True}
        while True:
            with client.responses.stream(input=items, tools=[tool], **self.ask) as stream:
                response = stream.get_final_response()
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return said(response.output_text)
            items += response.output
            for call in calls:
                output = double(Double.model_validate_json(call.arguments).number)
                answer = {"type": "function_call_output", "call_id": call.call_id}
                items.append({**answer, "output": output})

    def structured(self, prompt):
        return told(
            client.responses.parse(input=prompt, text_format=Person, **self.ask).output_parsed
        )

    def image(self, prompt):
        content = [
            {"type": "input_text", "text": prompt},
            {"type": "input_image", "image_url": PNG_URL, "detail": "auto"},
        ]
        items = [{"role": "user", "content": content}]
        return said(client.responses.create(input=items, **self.ask).output_text)


api = {"chat": Chat, "responses": Responses}[KIND]()
report(text=api.text, loop=api.loop, structured=api.structured, image=api.image)

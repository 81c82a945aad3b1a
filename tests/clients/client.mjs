// The JavaScript SDKs as clients: prints one JSON object with what they understood.
// Usage: node client.mjs MARKER  (the scripted API answers MARKER with two tool calls)
// Where the gateway is, the SDKs read from ANTHROPIC_BASE_URL and OPENAI_BASE_URL.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [marker] = process.argv.slice(2);
const anthropic = new Anthropic({ maxRetries: 0 });
const openai = new OpenAI({ maxRetries: 0 });
const model = "claude-sonnet-4-6";
const seen = {};

const hello = [{ role: "user", content: "hi" }];
const tool = { name: "f", input_schema: { type: "object" } };
const message = await anthropic.messages.create({ model, max_tokens: 50, messages: hello });
seen.text = message.content[0].text;
seen.usage = message.usage.output_tokens;

const asked = [{ role: "user", content: marker }];
const stream = anthropic.messages.stream({ model, max_tokens: 50, messages: asked, tools: [tool] });
const final = await stream.finalMessage();
seen.calls = final.content.filter((b) => b.type === "tool_use").map((b) => b.input);
const results = final.content
  .filter((block) => block.type === "tool_use")
  .map((block) => ({ type: "tool_result", tool_use_id: block.id, content: "done" }));
const loop = [...asked, { role: "assistant", content: final.content }, { role: "user", content: results }];
const after = await anthropic.messages.create({ model, max_tokens: 50, messages: loop, tools: [tool] });
seen.after = after.content[0].text;

seen.models = [];
for await (const item of anthropic.models.list()) seen.models.push(item.id);
seen.counted = (await anthropic.messages.countTokens({ model, messages: hello })).input_tokens;
try {
  await anthropic.messages.create({ model, max_tokens: 50, effort: "extreme", messages: hello });
} catch (error) {
  seen.error = [error.constructor.name, error.status, error.requestID.slice(0, 4)];
}

const completion = await openai.chat.completions.create({ model, messages: hello });
seen.completion = completion.choices[0].message.content;
const functionTool = { type: "function", function: { name: "f", parameters: { type: "object" } } };
const chunks = openai.chat.completions.stream({ model, messages: asked, tools: [functionTool] });
const streamed = await chunks.finalChatCompletion();
seen.arguments = streamed.choices[0].message.tool_calls.map((c) => JSON.parse(c.function.arguments));
const response = await openai.responses.stream({ model, input: hello }).finalResponse();
seen.response = [response.status, response.output_text];
try {
  await openai.chat.completions.create({ model, messages: hello, n: 2 });
} catch (error) {
  seen.openaiError = [error.constructor.name, error.status, error.param];
}
console.log(JSON.stringify(seen));

// The AI SDK with each of its providers: node ai_sdk_cases.mjs CASE PROVIDER MODEL WORD
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenRouter } from "@openrouter/ai-sdk-provider";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import * as asked from "./node_cases.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const { kind, sampling, word } = asked;
const settings = { name: "here", baseURL: `${asked.root}/v1`, apiKey: "any" };
const model = {
  responses: () => createOpenAI(settings)(asked.model),
  chat: () => createOpenAI(settings).chat(asked.model),
  compatible: () => createOpenAICompatible({ ...settings, supportsStructuredOutputs: true })(asked.model),
  messages: () => createAnthropic(settings)(asked.model),
  openrouter: () => createOpenRouter(settings).chat(asked.model),
}[asked.which]();
const ask = {
  model,
  prompt: `${kind} ${word}`,
  maxRetries: 0,
  providerOptions: { openai: { store: false } },
};
const double = tool({ description: "Double.", inputSchema: jsonSchema(asked.number), execute: asked.double });
const looped = { ...ask, tools: { double }, stopWhen: stepCountIs(3) };
const image = { type: "file", data: Buffer.from(asked.dot, "base64"), mediaType: "image/png" };
const content = [{ type: "text", text: `${kind} ${word}` }, image];
const plain = async () => (await generateText(ask)).text;
await asked.main({
  text: plain,
  sampled: async () => (await generateText({ ...ask, ...sampling })).text,
  loop: async () => (await generateText(looped)).text,
  streamed: async () => await streamText(looped).text,
  structured: async () =>
    (await generateText({ ...ask, output: Output.object({ schema: jsonSchema(asked.city) }) })).output,
  image: async () => (await generateText({ ...ask, prompt: undefined, messages: [{ role: "user", content }] })).text,
  limited: plain,
  overloaded: plain,
});

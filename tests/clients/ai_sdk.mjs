// The AI SDK's OpenAI provider as a client: prints one JSON object with what it understood.
// Usage: node ai_sdk.mjs WORD  (the scripted API answers "parallel WORD" with two calls)
import { openai } from "@ai-sdk/openai";
import { APICallError, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [word] = process.argv.slice(2);
globalThis.AI_SDK_LOG_WARNINGS = false;
const properties = { number: { type: "number" } };
const double = tool({
  description: "Double a number.",
  inputSchema: jsonSchema({ type: "object", properties, required: ["number"] }),
  execute: async ({ number }) => `doubled-${2 * number}-${word}`,
});
const ask = {
  model: openai("claude-sonnet-4-6"),
  tools: { double },
  stopWhen: stepCountIs(3),
  prompt: `parallel ${word}`,
  maxRetries: 0,
};
const kept = { openai: { store: false, reasoningSummary: "auto" } };
const whole = await generateText({ ...ask, providerOptions: kept });
const streamed = streamText({ ...ask, providerOptions: kept });
const seen = {
  text: whole.text,
  calls: whole.steps[0].toolCalls.map((call) => call.input),
  streamed: await streamed.text,
  reasoning: (await streamed.steps)[0].reasoningText,
  tokens: whole.steps[0].usage.totalTokens,
};
try {
  await generateText(ask);
} catch (error) {
  seen.stored = [APICallError.isInstance(error), error.statusCode, error.message.includes("store to false")];
}
console.log(JSON.stringify(seen));

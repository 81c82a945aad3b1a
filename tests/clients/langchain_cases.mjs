// LangChain's models: node langchain_cases.mjs CASE API MODEL WORD
import { ChatAnthropic } from "@langchain/anthropic";
import { HumanMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import * as asked from "./node_cases.mjs";

const { kind, sampling, word } = asked;
const shared = { model: asked.model, apiKey: "any", maxRetries: 0, ...(kind === "sampled" ? sampling : {}) };
const configuration = { baseURL: `${asked.root}/v1` };
const model = {
  chat: () => new ChatOpenAI({ ...shared, configuration }),
  responses: () => new ChatOpenAI({ ...shared, configuration, useResponsesApi: true, zdrEnabled: true }),
  messages: () => new ChatAnthropic({ ...shared, anthropicApiUrl: asked.root }),
}[asked.which]();
const prompt = new HumanMessage(`${kind} ${word}`);
const double = tool(asked.double, { name: "double", description: "Double.", schema: asked.number });

async function loop(ask) {
  const messages = [prompt];
  for (;;) {
    const answer = await ask(messages);
    if (!answer.tool_calls?.length) return answer.text;
    messages.push(answer);
    for (const call of answer.tool_calls) messages.push(await double.invoke(call));
  }
}

async function streamed(messages) {
  let whole;
  for await (const chunk of await model.bindTools([double]).stream(messages)) {
    whole = whole === undefined ? chunk : whole.concat(chunk);
  }
  return whole;
}

const plain = async () => (await model.invoke([prompt])).text;
const image = { type: "image_url", image_url: { url: `data:image/png;base64,${asked.dot}` } };
const content = [{ type: "text", text: `${kind} ${word}` }, image];
await asked.main({
  text: plain,
  sampled: plain,
  loop: () => loop((messages) => model.bindTools([double]).invoke(messages)),
  streamed: () => loop(streamed),
  structured: () => model.withStructuredOutput(asked.city, { name: "City", method: "jsonSchema" }).invoke([prompt]),
  image: async () => (await model.invoke([new HumanMessage({ content })])).text,
  limited: plain,
  overloaded: plain,
});

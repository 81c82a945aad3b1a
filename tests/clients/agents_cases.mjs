// The OpenAI Agents SDK: node agents_cases.mjs CASE API MODEL WORD
import { Agent, run, setDefaultOpenAIClient, setOpenAIAPI, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import * as asked from "./node_cases.mjs";

const { kind, sampling, word } = asked;
setTracingDisabled(true);
setOpenAIAPI(asked.which === "chat" ? "chat_completions" : "responses");
setDefaultOpenAIClient(new OpenAI({ baseURL: `${asked.root}/v1`, apiKey: "any", maxRetries: 0 }));
const shared = {
  name: "a",
  instructions: "Be brief.",
  model: asked.model,
  modelSettings: { store: false, ...(kind === "sampled" ? sampling : {}) },
};
const parameters = { ...asked.number, additionalProperties: false };
const double = tool({ name: "double", description: "Double.", parameters, strict: true, execute: asked.double });
const schema = { ...asked.city, additionalProperties: false };
const outputType = { type: "json_schema", name: "City", strict: false, schema };
const plain = async (more, input = `${kind} ${word}`) =>
  (await run(new Agent({ ...shared, ...more }), input)).finalOutput;
const content = [
  { type: "input_text", text: `${kind} ${word}` },
  { type: "input_image", image: `data:image/png;base64,${asked.dot}` },
];
await asked.main({
  text: plain,
  sampled: plain,
  loop: () => plain({ tools: [double] }),
  streamed: async () => {
    const answer = await run(new Agent({ ...shared, tools: [double] }), `${kind} ${word}`, { stream: true });
    await answer.completed;
    return answer.finalOutput;
  },
  structured: () => plain({ outputType }),
  image: () => plain({}, [{ role: "user", content }]),
  limited: plain,
  overloaded: plain,
});

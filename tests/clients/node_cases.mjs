// What every client of test_node_clients.py is asked for, whatever its library.
const [, , kind, which, model, word] = process.argv;
export { kind, model, which, word };
export const root = process.env.GATEWAY;
export const dot =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
// Claude 4 and later take one of the two; only their own API's clients know.
export const sampling = which === "messages" ? { temperature: 0.5 } : { temperature: 0.5, topP: 0.9 };
export const number = {
  type: "object",
  properties: { number: { type: "number", minimum: 0 } },
  required: ["number"],
};
// Bounds, an optional member, an enum and a definition that is used twice.
export const city = {
  type: "object",
  title: "City",
  properties: {
    name: { type: "string", minLength: 1, maxLength: 40 },
    kind: { type: "string", enum: ["city", "town"] },
    size: { type: "integer", minimum: 0, maximum: 10 },
    tags: { type: "array", items: { type: "string" }, minItems: 1, maxItems: 3 },
    mayor: { $ref: "#/$defs/person" },
    others: { type: "array", items: { $ref: "#/$defs/person" } },
    note: { type: "string" },
  },
  required: ["name", "kind", "size", "tags", "mayor", "others"],
  $defs: {
    person: { type: "object", properties: { age: { type: "integer", exclusiveMinimum: 0 } }, required: ["age"] },
  },
};
export const double = ({ number: given }) => `doubled-${2 * given}-${word}`;

/** Run one of a client's cases and print what it returns, or the error's name, status and words. */
export async function main(cases) {
  let seen;
  try {
    seen = await cases[kind]();
  } catch (error) {
    seen = { error: error.constructor.name, status: error.statusCode ?? error.status, message: error.message };
  }
  console.log(JSON.stringify(seen));
  process.exit(0);
}

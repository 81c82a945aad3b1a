// Has the openai SDK's assembler take streams: node assemble.mjs FILE, a JSON list of event lists.
// Prints a JSON list of what each became: its status and its items' types, or the error.
import { readFileSync } from "node:fs";
import { ResponseStream } from "openai/lib/responses/ResponseStream";

const [file] = process.argv.slice(2);
const seen = [];
for (const events of JSON.parse(readFileSync(file, "utf8"))) {
  const lines = events.map((event) => JSON.stringify(event) + "\n").join("");
  try {
    const stream = ResponseStream.fromReadableStream(new Response(lines).body);
    const response = await stream.finalResponse();
    seen.push([response.status, response.output.map((item) => item.type)]);
  } catch (error) {
    seen.push([String(error), events]);
  }
}
console.log(JSON.stringify(seen));

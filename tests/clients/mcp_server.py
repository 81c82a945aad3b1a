"""An MCP server on stdio with one tool, `greet`, for Codex to call through the gateway."""

import json
import sys

TOOL = {"name": "greet", "description": "Greet.", "inputSchema": {"type": "object"}}
RESULTS = {
    "tools/list": {"tools": [TOOL]},
    "tools/call": {"content": [{"type": "text", "text": f"greetings-{sys.argv[1]}"}]},
}

for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    result = RESULTS.get(message["method"], {})
    if message["method"] == "initialize":
        version = message["params"]["protocolVersion"]
        server = {"name": "greeter", "version": "1"}
        result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)

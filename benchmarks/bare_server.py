"""A bare MCP server with as many tools as omgoptim has: what `server_start.py` compares with. Speaks over stdio."""

from __future__ import annotations

import sys
from typing import Any

import anyio
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.types import CallToolResult, ListToolsResult, TextContent, Tool

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"text": {"type": "string"}}}


async def list_tools(_context: Any, _params: Any) -> ListToolsResult:
    names = [f"tool_{index}" for index in range(int(sys.argv[1]))]
    return ListToolsResult(tools=[Tool(name=name, description="Does nothing.", input_schema=SCHEMA) for name in names])


async def call_tool(_context: Any, _params: Any) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text="nothing")])


async def serve() -> None:
    server: Server[Any] = Server("bare", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


anyio.run(serve)

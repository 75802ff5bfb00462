"""Answers to messages that cannot be parsed: nested too deep, numbers too large, invalid Unicode.

The SDK drops such a line of standard input, and the client waits for ever. The id of the request is found without
reading the rest, and the request is refused as any other that is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context
from types import TracebackType
from typing import Any

from mcp.shared.message import SessionMessage
from mcp.types import INVALID_PARAMS, PARSE_ERROR, ErrorData, JSONRPCError, JSONRPCResponse
from pydantic import ValidationError
from typing_extensions import Self

from omgoptim.errors import RequestError
from omgoptim.requests.limits import DEEPEST, MAX_INTEGER
from omgoptim.server import answers
from omgoptim.text import clean

_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|-?\d+')
_MAX_ID_CHARACTERS = 200
"""Maximum characters of a request's id that is read. Chosen: ids are numbers or UUIDs."""


class AnsweredStream:
    """Stream of the readable messages of a client; unreadable ones get an error as their answer."""

    def __init__(self, incoming: Any, outgoing: Any) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    @property
    def last_context(self) -> Context | None:
        """The context of the sender of the last message, as the SDK's own streams have it."""
        context: Context | None = getattr(self._incoming, "last_context", None)
        return context

    async def receive(self) -> SessionMessage:
        """Return the next readable message; answer an unreadable one with an error."""
        return await self._readable(self._incoming.receive)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage:
        return await self._readable(self._incoming.__anext__)

    async def _readable(self, following: Callable[[], Awaitable[Any]]) -> SessionMessage:
        while not isinstance(item := await following(), SessionMessage):
            await self._outgoing.send(SessionMessage(answer_to(item)))
        return item

    async def aclose(self) -> None:
        """Close the incoming stream."""
        await self._incoming.aclose()

    async def __aenter__(self) -> Self:
        await self._incoming.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        ended: bool | None = await self._incoming.__aexit__(kind, error, trace)
        return ended


def answer_to(error: Exception) -> JSONRPCResponse | JSONRPCError:
    """Return the answer to a line that was not read, for the reason that the SDK gives."""
    problem = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
    line = problem["input"] if problem is not None and isinstance(problem["input"], str) else ""
    reason = clean(problem["msg"] if problem is not None else str(error), 200)
    head = dict(_head(line))
    refusal = RequestError(
        "the arguments cannot be read" if head.get("method") == "tools/call" else "the message cannot be read",
        reason,
        f"send JSON that is nested at most {DEEPEST} deep, of numbers up to {MAX_INTEGER} and valid Unicode",
    )
    number = head.get("id")
    if number is None:
        return JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=PARSE_ERROR, message=str(refusal)))
    if head.get("method") != "tools/call":
        return JSONRPCError(jsonrpc="2.0", id=number, error=ErrorData(code=INVALID_PARAMS, message=str(refusal)))
    result = answers.error_answer(refusal).model_dump(by_alias=True, exclude_none=True, mode="json")
    return JSONRPCResponse(jsonrpc="2.0", id=number, result=result)


def _head(line: str) -> Iterator[tuple[str, Any]]:
    """Yield the id and the method of a message, read without its arguments."""
    depth, key, before = 0, "", ""
    for match in _TOKENS.finditer(line):
        token = match[0]
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
        elif depth == 1 and token == ":":
            key = before
        elif depth == 1 and before == ":" and key in ('"id"', '"method"') and len(token) <= _MAX_ID_CHARACTERS:
            try:
                yield key.strip('"'), json.loads(token)
            except ValueError:
                return
        before = token

"""What the server refuses, and what the browser may load: nothing from elsewhere."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["Guard"]

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
# The page takes no files, and shows none: pictures travel within its own events.
CLOSED = re.compile(r"/gradio_api/(upload\b|upload_progress\b|file[=/]|proxy=|stream/)")


class Guard:
    """ASGI middleware: no uploads, no files, no body beyond ``limit`` bytes; pages load nothing from elsewhere."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        if CLOSED.search(scope["path"]):
            return await _refuse(answer, 403, "this app takes and gives no files")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            first = await self._body(receive)
            if first is None:
                return await _refuse(answer, 413, f"a request may have {self.limit} bytes")
            receive = _after(first, receive)
        return await self.app(scope, receive, answer)

    async def _body(self, receive: Any) -> dict[str, Any] | None:
        """The whole body as one message, or ``None`` as soon as it is too long."""
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self.limit:
                return None
            if not message.get("more_body"):
                return {"type": "http.request", "body": body, "more_body": False}


def _after(first: dict[str, Any], receive: Any) -> Any:
    """``receive`` that gives ``first`` once more."""
    waiting = [first]

    async def receive_again() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = reason.encode()
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"text/plain; charset=utf-8"), length, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

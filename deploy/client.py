"""A lean client of a server: kept-alive connections, or raw bytes."""

import asyncio
import re


class Connection(asyncio.Protocol):
    """A kept-alive connection with one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""
        self.reply: asyncio.Future[tuple[int, bytes]] | None = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, _, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length and len(body) >= int(length[1]) and self.reply:
            self.buffer = b""
            self.reply.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.reply and not self.reply.done():
            self.reply.set_exception(ConnectionError())

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer; ConnectionError where the server has hung up."""
        if self.transport.is_closing():
            raise ConnectionError
        self.reply = asyncio.get_running_loop().create_future()
        self.transport.write(request)  # pyrefly: ignore[missing-attribute]
        return await self.reply


class Connections:
    """As many connections to a port of this machine as there are requests under way."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[Connection] = []

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer; OSError where there is none."""
        while self.idle:  # a server may hang up on one that is idle, so it may be asked again
            one = self.idle.pop()
            try:
                reply = await one.ask(request)
            except ConnectionError:
                continue
            self.idle.append(one)
            return reply
        _, one = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port)
        reply = await one.ask(request)
        self.idle.append(one)
        return reply


def post(body: bytes, query: str = "", kind: str = "image/png", method: str = "POST /classify") -> bytes:
    """A request with a body."""
    lines = f"{method}{query} HTTP/1.1", "Host: here", f"Content-Type: {kind}", f"Content-Length: {len(body)}"
    return "\r\n".join([*lines, "", ""]).encode() + body


async def raw(port: int, request: bytes) -> bytes:
    """All that the server says to bytes, within a tenth of a second of silence."""
    said = b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return said
    try:
        writer.write(request)
        while part := await asyncio.wait_for(reader.read(10_000), 0.1 if said else 2):
            said += part
    except (OSError, asyncio.TimeoutError):
        pass
    writer.close()
    return said

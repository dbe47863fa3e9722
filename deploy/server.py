"""Serves an exported network over HTTP, without PyTorch.

    python -m deploy.server FOLDER [--port 8000] [--deadline_ms 500] [--queue 256]
    curl --data-binary @cat.jpg -H "Content-Type: image/jpeg" localhost:8000/classify
    {"class": "cat", "label": 3, "exit": 1, "confidence": 0.93, "cut": false, "ms": 4.1, "deadline_met": true}

POST /classify takes a JPEG, PNG or WebP image, and ?deadline_ms=. When the deadline comes, the answer is
that of the last exit that was run (`cut`), or 504 where none was. 503 with Retry-After: there is no room.
GET /healthz, /metrics (Prometheus) and /policy; PUT /policy {"policy": NAME} switches to another policy of
the folder. Errors are {"error": one line}. SIGTERM answers all that was accepted and ends with code 0.
"""

import argparse
import asyncio
import json
import logging
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

if not __package__:  # python deploy/server.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    print(f"error: the server needs {error.name}: pip install -r requirements-deploy.txt", file=sys.stderr)
    sys.exit(2)

from deploy.decide import RunnerError, only
from deploy.runner import Runner
from deploy.runtimes import BACKENDS
from deploy.scheduler import Late, Refused
from deploy.service import Limits, Service, UnknownPolicy
from deploy.uploads import FORMATS, BadImage

JSON = "application/json"
RETRY = {"Retry-After": "1"}
AGAIN = b'{"error":"there is no room; try again"}'
NO_ROOM = {
    "type": "http.response.start",
    "status": 503,
    "headers": Response(AGAIN, 503, RETRY, JSON).raw_headers,
}
TRY_AGAIN = {"type": "http.response.body", "body": AGAIN}
CLOSE = {"Connection": "close"}  # of a request whose body was not read
SMALL = 10_000  # bytes of a request that is no image
LONGEST_MS = 60_000
BACKLOG = 512  # connections that are not accepted yet
HEADERS_S = 10.0
HEADERS = 16_384  # bytes of a request's headers
BYTES = {"schema": {"type": "string", "format": "binary"}}
IMAGE = {"requestBody": {"required": True, "content": dict.fromkeys(FORMATS, BYTES)}}
NAME = {"type": "object", "properties": {"policy": {"type": "string"}}, "required": ["policy"]}
CHOICE = {"requestBody": {"required": True, "content": {"application/json": {"schema": NAME}}}}


async def body_of(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request; HTTPException for more than `most` bytes, or if it does not come in time."""
    too_large = HTTPException(413, f"a body of more than {most} bytes", CLOSE)
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > most:
                raise too_large

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body did not come within {seconds:g} s", CLOSE) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body is not complete", CLOSE) from None
    return bytes(body)


def milliseconds(text: str | None, default: float) -> float:
    """The deadline that a request names; HTTPException for what is none."""
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_MS:
        raise HTTPException(400, f"deadline_ms; accepted: more than 0, and at most {LONGEST_MS}")
    return value


async def classify(service: Service, request: Request) -> dict[str, Any]:
    """What POST /classify answers."""
    start = perf_counter()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    deadline_ms = milliseconds(request.query_params.get("deadline_ms"), service.limits.deadline_ms)
    if kind not in FORMATS:
        raise HTTPException(415, f"the content type; accepted: {', '.join(FORMATS)}", CLOSE)
    body = await body_of(request, service.limits.body_bytes, service.limits.read_s)
    answer = await service.answer(body, kind, start, deadline_ms / 1000)
    seconds = perf_counter() - start
    service.metrics.seconds.observe(seconds)
    return {
        "class": service.runner.class_names[answer.label],
        "label": answer.label,
        "exit": answer.exit,
        "confidence": round(answer.confidence, 4),
        "cut": answer.cut,
        "ms": round(1000 * seconds, 2),
        "deadline_met": 1000 * seconds <= deadline_ms,
    }


async def switch(service: Service, request: Request) -> dict[str, Any]:
    """What PUT /policy answers."""
    body = await body_of(request, SMALL, service.limits.read_s)
    try:
        name = json.loads(body)["policy"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HTTPException(400, 'accepted: {"policy": NAME}') from None
    service.switch(name)
    return shown(service)


def shown(service: Service) -> dict[str, Any]:
    """What GET /policy answers."""
    policy = service.menu[service.policy]
    return {"policy": service.policy, "thresholds": policy.thresholds, "menu": list(service.menu)}


async def responded(service: Service, work: Awaitable[dict[str, Any]]) -> Response:
    """What comes of work for a request; an error in one line, which does not tell what is inside."""
    headers: Mapping[str, str] | None = None
    try:
        content = await work
        status = 200
    except HTTPException as error:
        content = {"error": error.detail}
        status = error.status_code
        headers = error.headers
    except Refused:
        content = json.loads(AGAIN)
        status = 503
        headers = RETRY
    except (Late, BadImage, UnknownPolicy) as error:
        content = {"error": str(error)}
        status = 504 if isinstance(error, Late) else 400
    except Exception:
        logging.getLogger("uvicorn.error").exception("a request failed")
        content = {"error": "internal error"}
        status = 500
    service.metrics.requests.labels(str(status)).inc()
    return JSONResponse(content, status, headers)


def make_app(service: Service) -> ASGIApp:
    """The service as an ASGI application."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.watch_loop())
        yield
        task.cancel()

    app = FastAPI(title="dynexit", docs_url=None, redoc_url=None, lifespan=life)

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Response:
        async def work() -> dict[str, Any]:
            raise error

        return await responded(service, work())

    @app.post("/classify", openapi_extra=IMAGE)
    async def _(request: Request) -> Response:
        return await responded(service, classify(service, request))

    @app.put("/policy", openapi_extra=CHOICE)
    async def _(request: Request) -> Response:
        return await responded(service, switch(service, request))

    @app.get("/policy")
    async def _() -> Response:
        return JSONResponse(shown(service))

    @app.get("/healthz")
    async def _() -> Response:
        return JSONResponse({"alive": True, "ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def _() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    refusals = service.metrics.requests.labels("503")

    async def fast(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/classify" and scope["method"] == "POST":
            # FastAPI's own way to the same function takes as long as all else that is done for a request.
            if service.full:
                refusals.inc()
                await send(NO_ROOM)
                await send(TRY_AGAIN)
                return
            response = await responded(service, classify(service, Request(scope, receive)))
            await response(scope, receive, send)
        else:
            await app(scope, receive, send)

    return fast


class Protocol(H11Protocol):
    """HTTP/1.1 on a connection, closed where a request's headers do not come within `HEADERS_S`."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore[bad-override]
        """Begins to wait."""
        super().connection_made(transport)
        self.timer = self.loop.call_later(HEADERS_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Waits on, from the first byte of a request, while there is no whole one."""
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete
        if self.timer and not waits:
            self.timer.cancel()
            self.timer = None
        elif waits and not self.timer:
            self.timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        super().connection_lost(exc)
        if self.timer:
            self.timer.cancel()


def listening(host: str, port: int) -> socket.socket:
    """A socket at which requests wait from now on; RunnerError where there cannot be one."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise RunnerError(f"cannot serve on {host}, port {port}: {why}") from None


def make_server(service: Service) -> uvicorn.Server:
    """What runs the application, until SIGTERM or SIGINT; then it answers what was accepted."""
    config = uvicorn.Config(
        make_app(service),
        http=Protocol,  # on h11, which bounds the headers
        h11_max_incomplete_event_size=HEADERS,
        limit_concurrency=16 * service.limits.queue,
        ws="none",
        access_log=False,
        server_header=False,
        log_level="error",
    )
    server = uvicorn.Server(config)
    # Before it runs, when uvicorn has its own; and when it has stopped, since uvicorn raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    return server


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--micro_batch", type=int, default=16, help="requests in one call of a stage")
    parser.add_argument("--threads", type=int, default=0, help="of the backend; 0: all cores")
    for limit in fields(Limits):
        parser.add_argument(f"--{limit.name}", type=type(limit.default), default=limit.default)
    given = vars(parser.parse_args())
    options = only(given, ("backend", "precision", "micro_batch", "threads"))
    try:
        limits = Limits(**only(given, Limits.__annotations__))
        service = Service(Runner(given["folder"], **options), given["precision"], limits)
        bound = listening(given["host"], given["port"])
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    server = make_server(service)
    print("serving on port", bound.getsockname()[1], flush=True)
    server.run([bound])
    service.close()
    done = service.scheduler
    answers = f"{done.left.total()} answers, {done.late} requests too late, {done.waiting} without an answer"
    print(f"stopped: {answers}")


if __name__ == "__main__":
    main()

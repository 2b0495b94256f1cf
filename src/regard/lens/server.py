"""The live page on this machine.

Enters: a first view, and functions that run another text through the model, open another text, measure an effect.
Leaves: a page on 127.0.0.1: its JSON, its numbers by key, tiles of its maps, and new texts on request.
Only this machine is answered: the socket is bound to loopback, Host and Origin are checked, bodies are bounded.
Floor 6: starlette and uvicorn, loaded when it is served."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from regard.lens.export import page_html, script_json
from regard.lens.look import Look
from regard.lens.maps import Maps
from regard.lens.payload import Blob, blob

HOST = "127.0.0.1"
PORT = 8765
TRIES = 20
LARGEST_BODY = 1_000_000
MOST_AT_ONCE = 24  # requests for numbers that are answered at a time; a browser sends six
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class View:
    """What is on the page now: a look, and its JSON."""

    look: Look
    page: dict[str, Any]


Asks = Mapping[str, Callable[[Look, Any], dict[str, Any]]]


def application(
    view: View,
    run: Callable[[str], View],
    port: int,
    started: Callable[[], None] | None = None,
    asks: Asks | None = None,
    *,
    turn: Callable[[int], View] | None = None,
) -> Any:
    """The page as an ASGI application.

    Args:
        view: what is shown first.
        run: runs a text; raises ValueError with a sentence for people where it cannot.
        port: where it is served, for the check of Host and Origin.
        started: called once, when it can be reached.
        asks: what can be asked of the model about the text that is shown, by name: POST /api/NAME with JSON; ValueError
            where it cannot be answered. "text" in the JSON, if there, must be the text that is shown.
        turn: opens another text of the recording; None where there is one text.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    state = {"view": view, "maps": Maps(view.look), "serial": 0}
    busy, places = threading.Lock(), threading.BoundedSemaphore(MOST_AT_ONCE)

    def page(_: Request) -> Response:
        return Response(page_html(), media_type="text/html; charset=utf-8")

    def told() -> Response:
        content = script_json({**state["view"].page, "serial": state["serial"], "asks": sorted(asks or {})})
        return Response(content, media_type="application/json")

    def payload(_: Request) -> Response:
        return told()

    def numbers(request: Request) -> Response:
        if request.query_params.get("serial", str(state["serial"])) != str(state["serial"]):
            return _sentence(409, "Another text was opened on this server since. Reload the page.")
        if not places.acquire(blocking=False):
            return _sentence(429, f"More than {MOST_AT_ONCE} requests at once. Ask again when some are answered.")
        try:
            key, share = request.path_params["key"], 1.0
            found = blob(state["view"].look, key)
            if found is None:
                tile = state["maps"].answer(key)
                found, share = (None, 1.0) if tile is None else (Blob(tile.numbers), tile.share)
        except ValueError as refused:
            return _sentence(400, _plain(str(refused)))
        finally:
            places.release()
        if found is None:
            return _sentence(404, "There are no such numbers in this recording. Reload the page.")
        headers = {"X-Shape": ",".join(map(str, found.shape)), "X-Dtype": found.dtype, "X-Share": f"{share:.4f}"}
        return Response(found.bytes(), media_type="application/octet-stream", headers=headers)

    async def posted(
        request: Request, answer: Callable[[dict[str, Any]], Response], what: str, wanted: str
    ) -> Response:
        from starlette.concurrency import run_in_threadpool

        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _sentence(415, f"Send the {what} as JSON.")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    return _sentence(413, f"The {what} is longer than {LARGEST_BODY:,} bytes. Send a shorter one.")
        except ClientDisconnect:
            return Response(status_code=400)
        try:
            asked = json.loads(bytes(body))
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            return _sentence(400, f"Send {wanted}.")
        return await run_in_threadpool(answer, asked)

    async def again(request: Request) -> Response:
        return await posted(request, read, "text", '{"text": "a sentence"}')

    async def turned(request: Request) -> Response:
        return await posted(request, other, "number", '{"index": 0}')

    def asking(ask: Callable[[Look, Any], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def asked(request: Request) -> Response:
            return await posted(request, lambda given: told_by(ask, given), "question", "a JSON object")

        return asked

    def read(asked: dict[str, Any]) -> Response:
        text = asked.get("text")
        if not isinstance(text, str):
            return _sentence(400, 'Send {"text": "a sentence"}.')
        return show(lambda: run(text))

    def other(asked: dict[str, Any]) -> Response:
        index = asked.get("index")
        if not isinstance(index, int) or isinstance(index, bool):
            return _sentence(400, 'Send {"index": 0}.')
        opener = turn
        if opener is None:
            return _sentence(422, "There is one text here. Open a recording of several.")
        return show(lambda: opener(index))

    def show(make: Callable[[], View]) -> Response:
        with busy:
            try:
                fresh = make()
            except ValueError as refused:
                return _sentence(422, _plain(str(refused)))
            except Exception as failed:  # the page must say so; the server goes on
                return _sentence(500, f"The model failed: {type(failed).__name__}: {failed}")
            state["maps"].close()
            state.update(view=fresh, maps=Maps(fresh.look), serial=state["serial"] + 1)
            return told()

    def told_by(ask: Callable[[Look, Any], dict[str, Any]], given: dict[str, Any]) -> Response:
        with busy:
            look = state["view"].look
            if given.get("text", look.text) != look.text:
                return _sentence(409, "Another text is shown by now. Reload the page.")
            try:
                return Response(script_json(ask(look, given)), media_type="application/json")
            except ValueError as refused:
                return _sentence(422, _plain(str(refused)))
            except Exception as failed:  # the page must say so; the server goes on
                return _sentence(500, f"The model failed: {type(failed).__name__}: {failed}")

    def _sentence(status: int, text: str) -> Response:
        return JSONResponse({"error": text}, status_code=status)

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        if started is not None:
            started()
        yield
        state["maps"].close()

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/api/payload", payload, methods=["GET"]),
        Route("/api/blob/{key:path}", numbers, methods=["GET"]),
        Route("/api/run", again, methods=["POST"]),
        Route("/api/window", turned, methods=["POST"]),
        *(Route(f"/api/{name}", asking(ask), methods=["POST"]) for name, ask in (asks or {}).items()),
    ]
    return _guarded(Starlette(routes=routes, lifespan=life), port)


def bind(port: int | None) -> socket.socket:
    """A listening socket on this machine alone.

    Args:
        port: the port asked for; None takes 8765 or the next that is free.

    Raises:
        ValueError: the port is taken, reserved or no port.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"look: --port must be from 1 to 65535; got {port}. Choose another, or leave it out.")
    wanted = [port] if port is not None else [*range(PORT, PORT + TRIES), 0]
    for one in wanted:
        own = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind((HOST, one))
            own.listen(64)
            return own
        except OSError as taken:
            own.close()
            if port is None and taken.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            why = {errno.EADDRINUSE: "which another program uses", errno.EACCES: "which is reserved"}
            raise ValueError(
                f"look: --port must be free; got {one}, {why.get(taken.errno or 0, str(taken))}. "
                "Choose another, or leave it out."
            ) from None
    raise ValueError("look: no free port was found. Pass one with --port.")


def serve(
    listening: socket.socket,
    view: View,
    run: Callable[[str], View],
    started: Callable[[str], None] | None = None,
    asks: Asks | None = None,
    *,
    turn: Callable[[int], View] | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        listening: from `bind`.
        view: what is shown first.
        run: runs a text.
        started: called with the page's address, when it can be reached.
        asks: as in `application`.
        turn: likewise.
    """
    port = listening.getsockname()[1]
    reached = lambda: started(f"http://{HOST}:{port}/") if started else None  # noqa: E731
    _serve(listening, application(view, run, port, reached, asks, turn=turn))


def serve_page(listening: socket.socket, html: str, started: Callable[[str], None] | None = None) -> None:
    """Serve one saved page, which holds all its numbers, until Ctrl-C.

    Args:
        listening: from `bind`.
        html: the page.
        started: called with the page's address, when it can be reached.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    port = listening.getsockname()[1]

    def page(_: Request) -> Response:
        return Response(html, media_type="text/html; charset=utf-8")

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        if started is not None:
            started(f"http://{HOST}:{port}/")
        yield

    _serve(listening, _guarded(Starlette(routes=[Route("/", page, methods=["GET"])], lifespan=life), port))


def _serve(listening: socket.socket, app: Any) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=1, ws="none"
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn hands Ctrl-C on once it has closed
        pass
    finally:
        listening.close()


def _guarded(app: Any, port: int) -> Any:
    """Answer only requests that name this machine, from this page or from no page; add the headers of safety."""
    hosts = {f"{name}:{port}".encode() for name in (HOST, "localhost")}
    origins = {b"http://" + host for host in hosts}
    extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def guard(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        given: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name.lower(), []).append(value)
        allowed = given.get(b"host", []) in [[host] for host in hosts] and all(
            origin in origins for origin in given.get(b"origin", [])
        )
        if not allowed or given.get(b"sec-fetch-site", [b"none"])[0] not in (b"none", b"same-origin"):
            body = json.dumps({"error": f"Open http://{HOST}:{port}/ on this machine."}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await sent({"type": "http.response.start", "status": 403, "headers": headers})
            await sent({"type": "http.response.body", "body": body})
            return
        await app(scope, receive, sent)

    return guard


def _plain(sentence: str) -> str:
    """An error without the name of the function that raised it."""
    words = re.sub(r"^(look|map|effects|trust|compare): ", "", sentence)
    return words[:1].upper() + words[1:]

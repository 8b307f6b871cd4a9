"""The proxy forwards requests and responses of the page unchanged, and the page serves the ingress only."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.http_server import HttpServer
from serving.middleware import RequestMiddleware
from serving.page_proxy import TOKEN_HEADER, PageAddress, PageProxy, RequireToken
from serving.settings import ServingSettings

T = TypeVar("T")
TOKEN = "only the ingress knows"


def page(stopped: asyncio.Event | None = None) -> Starlette:
    """An app with a route that echoes its request and one that streams without end."""

    async def echo(request: Request) -> Response:
        body = await request.body()
        seen = {"query": request.url.query, "host": request.headers["host"], "bytes": len(body)}
        seen |= {"sent": sorted(name for name in request.headers if name not in ("host", TOKEN_HEADER))}
        response = JSONResponse(seen)
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async def events(_: Request) -> Response:
        async def forever() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"data: tick\n\n"
                    await asyncio.sleep(0.01)
            finally:
                if stopped is not None:
                    stopped.set()

        return StreamingResponse(forever(), media_type="text/event-stream")

    return Starlette(routes=[Route("/echo", echo, methods=["GET", "POST"]), Route("/events", events)])


@asynccontextmanager
async def running(app: object) -> AsyncIterator[int]:
    server = HttpServer(app, "127.0.0.1", 0)  # type: ignore[arg-type]
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop()


def client_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)


def through_the_proxy(use: Callable[[httpx.AsyncClient, int], Awaitable[T]], app: Starlette) -> T:
    """Run `use` with a client of the proxy and the page's own port."""

    async def run() -> T:
        async with running(RequireToken(app, TOKEN)) as behind:

            async def find() -> PageAddress:
                return PageAddress(behind, TOKEN)

            guarded = RequestMiddleware(PageProxy(find), ServingSettings(), lambda status: None)
            async with running(guarded) as port, client_of(port) as client:
                return await use(client, behind)

    return asyncio.run(run())


def test_requests_and_responses_are_forwarded_unchanged() -> None:
    async def both(client: httpx.AsyncClient, _: int) -> list[httpx.Response]:
        chunks = (b"x" * 1000 for _ in range(50))
        sent = httpx.Request("GET", client.base_url.join("/echo?a=1&b=%20"), headers={"accept": "text/html"})
        return [await client.send(sent), await client.post("/echo", content=b"".join(chunks))]

    got, posted = through_the_proxy(both, page())
    assert got.json() == {
        "query": "a=1&b=%20", "host": got.request.url.netloc.decode(), "bytes": 0, "sent": ["accept"],
    }  # fmt: skip
    assert [value for name, value in got.headers.multi_items() if name == "set-cookie"] == [
        "a=1; Path=/; SameSite=lax", "b=2; Path=/; SameSite=lax",
    ]  # fmt: skip
    assert posted.json()["bytes"] == 50_000


def test_events_are_streamed_and_end_with_the_client() -> None:
    stopped = asyncio.Event()

    async def read_some(client: httpx.AsyncClient, _: int) -> list[bytes]:
        found = []
        async with client.stream("GET", "/events") as response:
            async for chunk in response.aiter_raw():
                found.append(chunk)
                if len(found) == 3:
                    break
        await asyncio.wait_for(stopped.wait(), 60)
        return found

    assert through_the_proxy(read_some, page(stopped))[0].startswith(b"data: tick")


def test_the_page_serves_the_ingress_only() -> None:
    async def around(_: httpx.AsyncClient, behind: int) -> list[int]:
        async with client_of(behind) as stranger:
            guessed = await stranger.get("/echo", headers={TOKEN_HEADER: "a guess"})
            return [(await stranger.get("/echo")).status_code, guessed.status_code]

    assert through_the_proxy(around, page()) == [403, 403]
    assert TOKEN not in repr(PageAddress(1, TOKEN))


@pytest.mark.parametrize("target", ["@evil.example/", "http://evil.example/there", "evil", "/\xe9cho"])
def test_no_path_changes_the_host(target: str) -> None:
    async def ask(client: httpx.AsyncClient, _: int) -> tuple[bytes, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        writer.write(head.encode("latin-1"))
        response = await reader.read()
        writer.close()
        return response, (await client.get("/echo", headers={TOKEN_HEADER: "a guess"})).status_code

    response, with_a_guess = through_the_proxy(ask, page())
    # An absolute address is read as its path, which the page does not have.
    assert response.split()[1] in (b"400", b"404")
    assert with_a_guess == 200


def test_a_replaced_page_is_found_again_and_a_missing_one_is_a_503() -> None:
    async def run() -> tuple[int, httpx.Response]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = free.getsockname()[1]
        async with running(RequireToken(page(), TOKEN)) as behind:
            places = iter([nobody, behind, nobody, nobody])

            async def find() -> PageAddress:
                return PageAddress(next(places), TOKEN)

            proxy = PageProxy(find)
            guarded = RequestMiddleware(proxy, ServingSettings(), lambda status: None)
            async with running(guarded) as port, client_of(port) as client:
                found = (await client.get("/echo")).status_code
                proxy.forget()
                return found, await client.get("/echo")

    found, gone = asyncio.run(run())
    assert found == 200
    assert (gone.status_code, gone.json()["code"]) == (503, "unavailable")
    assert "try again soon" in gone.json()["detail"]

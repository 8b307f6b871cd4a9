"""ASGI app around Gradio's: only the routes that the page needs, and no file or host but the page's own.

In: requests of browsers. Out: Gradio's responses with a Content-Security-Policy, or problem documents. Files, uploads
and the session's key are handled here and not by Gradio, whose routes fetch URLs, read paths of the disk and write
what was sent to them into links. A route that a later version of Gradio adds is 404 until it is listed here.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from images.dicom import as_plain_file
from records.errors import DataError, ImageError, RelookError, UnknownIdError
from records.images import is_dicom, sniff
from serving.access.keys import Caller, KeyRing
from serving.page.uploads import PageFiles
from serving.problems import problem, problem_of, problem_response
from serving.session import key_of_session

_API = "/gradio_api"
_FILE = f"{_API}/file="
_SCRIPT = Path(__file__).with_name("page.js")
_PASSED = re.compile(rf"/theme\.css|/favicon\.ico|/assets/[\w.-]+|{_API}/(queue/data|heartbeat/\w+)", re.ASCII)
"""What Gradio serves as it is, for GET: its own files, and events of a session of the page."""
_PASSED_HEADERS = frozenset(
    {b"host", b"accept", b"accept-encoding", b"content-type", b"content-length", b"if-none-match", b"range"}
)
"""Without cookies, Origin and X-Forwarded headers, which change what Gradio responds."""

_PAGE_POLICY = (
    "default-src 'none'; base-uri 'self'; connect-src 'self'; font-src 'self'; form-action 'none'; "
    "frame-ancestors 'none'; img-src 'self' data: blob:; media-src 'self' blob:; "
    # Gradio compiles the templates of its HTML components and sets style attributes.
    "script-src 'self' 'unsafe-eval'{hashes}; style-src 'self' 'unsafe-inline'"
)
_FILE_POLICY = "sandbox; default-src 'none'; frame-ancestors 'none'"
_INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]*:|[\\/]{2})\S+\s*", re.IGNORECASE)
_NAME_BYTES = 12
"""As many first bytes of a file as tell its format."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _FileMeta(_Strict):
    type: Literal["gradio.FileData"] = Field(alias="_type")


class _File(_Strict):
    """The only object that the page sends: a file that lies in its own folder."""

    path: str
    url: str | None = None
    orig_name: str | None = None
    size: int | None = None
    mime_type: str | None = None
    is_stream: Literal[False] = False
    meta: _FileMeta


_Value = bool | int | float | str | _File | None
_Values = list[_Value | list[_Value]]


class _Event(_Strict):
    """A queue body. What else Gradio accepts in one, such as a batch or another request's id, the page never sends."""

    data: Annotated[_Values, Field(max_length=20)]
    fn_index: int
    session_hash: Annotated[str, Field(pattern=r"^[a-z0-9]{1,32}$")]
    trigger_id: int | None = None
    # No handler uses it. It is checked like the rest and not passed on.
    event_data: dict[Literal["index", "value", "selected"], _Value | _Values] | None = None


class PageAccess:
    """Serves the page.

    Args:
        app: of Gradio.
        num_inputs: how many values each event of the page sends, by its index.
        files: uploads and examples.
        keys: which keys are valid; uploads need one once any exists.
        max_upload_bytes: of one upload.
        max_json_bytes: of one queue body.
    """

    def __init__(
        self,
        app: ASGIApp,
        num_inputs: Mapping[int, int],
        files: PageFiles,
        keys: KeyRing,
        *,
        max_upload_bytes: int,
        max_json_bytes: int,
    ) -> None:
        self._app = app
        self._num_inputs = num_inputs
        self._files = files
        self._keys = keys
        self._max_upload_bytes = max_upload_bytes
        self._max_json_bytes = max_json_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI defines it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            request = Request(scope, receive)
            try:
                response = await self._response(request)
            except RelookError as error:
                response = problem_response(problem_of(error), _request_id(request))
            await response(scope, receive, send)
        else:
            # Gradio has no WebSocket that the page uses.
            await send({"type": "websocket.close", "code": 1008})

    async def _response(self, request: Request) -> ASGIApp:
        path = request.scope["path"]
        match request.method:
            case "GET" | "HEAD" if path == "/":
                return await self._index(request)
            case "GET" if path == "/page.js":
                return FileResponse(_SCRIPT, media_type="text/javascript")
            case "GET" if path.startswith(_FILE):
                return await run_in_threadpool(self._file, path.removeprefix(_FILE))
            case "GET" if _PASSED.fullmatch(path):
                return self._gradio(request)
            case "GET" if path == f"{_API}/upload_progress":
                # The script asks how far its upload is; the upload's own response is what it waits for.
                return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
            case "POST" if path == f"{_API}/upload":
                return await self._upload(request)
            case "POST" if path == f"{_API}/queue/join":
                return await self._join(request)
        raise UnknownIdError(f"the page has nothing for {request.method} {path[:100]}")

    def _gradio(self, request: Request, body: bytes | None = None) -> ASGIApp:
        """Return Gradio's response to a request; with a body, that replaces the one that was sent."""
        headers = [(name, value) for name, value in request.scope["headers"] if name in _PASSED_HEADERS]
        if body is not None:
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
        scope = {**request.scope, "headers": headers}
        if request.scope["path"] == "/":
            # Its parameters would choose among stored states of Gradio and themes of other hosts.
            scope["query_string"] = b""
        pending: list[Message] = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]

        async def passed(_: Scope, receive: Receive, send: Send) -> None:
            refused = 0

            async def received() -> Message:
                return pending.pop() if pending else await receive()

            async def sent(message: Message) -> None:
                nonlocal refused
                refused = refused or (message.get("status", 0) if message.get("status", 0) >= 400 else 0)
                if not refused:
                    await send(message)

            await self._app(scope, received, sent)
            if refused:
                found = problem_of(UnknownIdError(f"the page has nothing at {request.scope['path'][:100]}"))
                if refused != 404:
                    found = problem(refused, "invalid", "the page cannot do this; reload it")
                await problem_response(found, _request_id(request))(scope, receive, send)

        return passed

    async def _index(self, request: Request) -> Response:
        """Return Gradio's page, with our script first and a policy that names its inline scripts by their hashes."""
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        plain = {**request.scope, "method": "GET"}
        plain["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"accept-encoding"]
        await self._gradio(Request(plain, request.receive))(plain, request.receive, keep)
        html = b"".join(message.get("body", b"") for message in sent)
        # It waits for messages of a page that frames this one, which the policy forbids.
        html = _INLINE_SCRIPT.sub(lambda script: b"" if b"/iframeResizer." in script[1] else script[0], html)
        html = html.replace(b"<head>", b'<head><script src="./page.js"></script>', 1)
        hashes = (base64.b64encode(hashlib.sha256(code).digest()).decode() for code in _INLINE_SCRIPT.findall(html))
        policy = _PAGE_POLICY.format(hashes="".join(f" 'sha256-{digest}'" for digest in hashes))
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        status: int = sent[0]["status"]
        return Response(html, status, headers=headers, media_type="text/html")

    def _file(self, name: str) -> Response:
        try:
            path = self._files.find(name)
            with path.open("rb") as file:
                kind = sniff(file.read(_NAME_BYTES))
        except (DataError, OSError) as error:
            raise UnknownIdError("the page has no such image; uploads are deleted after some minutes") from error
        headers = {"Content-Security-Policy": _FILE_POLICY, "Cache-Control": "private, max-age=60"}
        return FileResponse(
            path, media_type=f"image/{kind}", headers=headers, filename=path.name, content_disposition_type="inline"
        )

    async def _upload(self, request: Request) -> Response:
        """Store one file; the response is what Gradio's own route returns, a list with its path."""
        # Before the body is read: who has no key costs no disk.
        caller = await self._caller(request)
        try:
            form = await request.form(max_files=1, max_fields=0)
        except (MultiPartException, ValueError) as error:
            raise DataError("this form cannot be read; send one file `files`") from error
        try:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise DataError("the form has no file `files`; send one")
            data = await file.read(self._max_upload_bytes + 1)
        finally:
            await form.close()
        if len(data) > self._max_upload_bytes:
            raise ImageError(f"an upload has at most {self._max_upload_bytes / 1e6:g} MB", "too_large")
        name = file.filename or ""
        if is_dicom(data):
            # No tag reaches the disk, and no name, since files are named after patients.
            name, data = "dicom.png", await run_in_threadpool(as_plain_file, data)
        path = await run_in_threadpool(self._files.store, caller.id, name, data)
        return JSONResponse([str(path)])

    async def _caller(self, request: Request) -> Caller:
        key = key_of_session(request.headers)
        return await self._keys.find(None if key is None else f"Bearer {key}")

    async def _join(self, request: Request) -> ASGIApp:
        """Pass an event on that names no file and no host but the page's own, with the visitor's key beside it."""
        event = _event(await self._json(request))
        if self._num_inputs.get(event.fn_index) != len(event.data):
            raise DataError("the page has no such event; reload it")
        for value in _flat([event.data, list((event.event_data or {}).values())]):
            self._check(value, request.headers)
        request.scope.setdefault("state", {})["key"] = key_of_session(request.headers)
        # Written anew: what a second reader might understand differently, such as a repeated name, is gone.
        body = event.model_dump_json(by_alias=True, exclude={"event_data"})
        return self._gradio(request, body.encode())

    async def _json(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ImageError("an event must be application/json", "unsupported_type")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_json_bytes:
                raise ImageError(f"an event has at most {self._max_json_bytes / 1000:g} kB", "too_large")
        return body

    def _check(self, value: _Value, headers: Headers) -> None:
        if isinstance(value, str) and _URL.fullmatch(value):
            raise DataError("an event may not hold an address; the service fetches nothing")
        if isinstance(value, _File):
            self._files.find(value.path)
            url = urlsplit(value.url or "")
            # The script adds the address where the browser shows the file. It is not passed on.
            own = url.netloc == headers.get("host") and unquote(url.path).endswith(f"{_FILE}{value.path}")
            if value.url is not None and not own:
                raise DataError("a file of an event must be an upload of this page, not an address")
            value.url = None


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


def _event(body: bytes) -> _Event:
    try:
        return _Event.model_validate_json(body)
    except ValidationError as error:
        raise DataError("this is not an event of the page; reload it") from error


def _flat(values: Any) -> list[_Value]:
    if isinstance(values, list):
        return [item for value in values for item in _flat(value)]
    return [values]

"""Images of tasks come from the Label Studio of the command line, from hosts that are named, and from nowhere else."""

import base64
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from labeling.client import LabelStudioClient
from labeling.existing.files import TaskFiles, file_name
from records.errors import ConfigError, DataError
from tests.labeling.conftest import make_image

TOKEN = "a1" * 20
IMAGE = make_image(1, "PNG")
Reply = tuple[int, dict[str, str], bytes]


class Host(http.server.ThreadingHTTPServer):
    """A server that remembers what it was asked: path and whether the token came along."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.replies: dict[str, list[Reply]] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Host

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.path, TOKEN in str(self.headers)))
        waiting = self.server.replies.get(self.path, [(200, {}, IMAGE)])
        status, headers, body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hosts() -> Iterator[Callable[[], Host]]:
    running: list[Host] = []

    def start() -> Host:
        running.append(Host())
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        return running[-1]

    yield start
    for host in running:
        host.shutdown()
        host.server_close()


@pytest.fixture
def labels(hosts: Callable[[], Host]) -> Host:
    return hosts()


@pytest.fixture
def client(labels: Host) -> Iterator[LabelStudioClient]:
    """A Label Studio behind a proxy that has it under a path."""
    with LabelStudioClient(f"{labels.url}/tools/labels/", TOKEN) as made:
        yield made


def test_files_of_label_studio_come_with_the_token_under_its_prefix(labels: Host, client: LabelStudioClient) -> None:
    values = [
        "/data/upload/1/a.png",
        "/tools/labels/data/upload/1/b.png",
        f"{labels.url}/tools/labels/data/local-files/?d=x/c.png",
        "/tasks/7/resolve/?fileuri=czM6Ly9iL2EucG5n",
        ["/storage-data/uploaded/?filepath=upload/1/d.png"],
    ]
    with TaskFiles(client) as files:
        assert all(files.read(value) == IMAGE for value in values)
    assert labels.asked == [
        ("/tools/labels/data/upload/1/a.png", True),
        ("/tools/labels/data/upload/1/b.png", True),
        ("/tools/labels/data/local-files/?d=x/c.png", True),
        ("/tools/labels/tasks/7/resolve/?fileuri=czM6Ly9iL2EucG5n", True),
        ("/tools/labels/storage-data/uploaded/?filepath=upload/1/d.png", True),
    ]


def web_token(seconds: float, kind: str) -> str:
    """A JSON web token that expires after some seconds."""
    claims = {"exp": time.time() + seconds, "token_type": kind, "jti": TOKEN}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    return b".".join([*parts, b"c2ln"]).replace(b"=", b"").decode()


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_a_personal_token_is_renewed_under_the_prefix(labels: Host) -> None:
    personal, old, new = web_token(900, "refresh"), web_token(-10, "access"), web_token(900, "access")
    renewed = [(200, {}, json.dumps({"access": access}).encode()) for access in (old, new)]
    labels.replies["/tools/labels/api/token/refresh/"] = renewed
    with LabelStudioClient(f"{labels.url}/tools/labels", personal) as client, TaskFiles(client) as files:
        assert files.read("/data/upload/1/a.png") == files.read("/data/upload/1/b.png") == IMAGE
    paths = [path.removeprefix("/tools/labels") for path, _ in labels.asked]
    assert paths == ["/api/token/refresh/", "/data/upload/1/a.png", "/api/token/refresh/", "/data/upload/1/b.png"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{other}/a.png", "not fetched without --allow-host 127.0.0.1:"),
        ("//127.0.0.1:{port}/a.png", "--allow-host"),
        ("http://localhost:{port}/data/a.png", "--allow-host localhost:"),
        ("https://127.0.0.1/data/a.png", "--allow-host 127.0.0.1"),
        ("http://root:secret@127.0.0.1:{port}/a.png", "user's name or password"),
        ("s3://bucket/secret/a.png", "has no storage for"),
        ("file:///etc/passwd", "has no storage for"),
        ("/data/../api/users/", "where Label Studio has no images"),
        ("/data/%2e%2e/api/users/", "where Label Studio has no images"),
        ("/data/..%5c..%5capi/users/", "where Label Studio has no images"),
        ("http://127.0.0.1:{own}/data/upload/1/a.png", "where Label Studio has no images"),
        ("http://127.0.0.1:{own}/tools/labelsdata/data/a.png", "where Label Studio has no images"),
        ("photo.jpg", "where Label Studio has no images"),
        ("/api/projects/", "where Label Studio has no images"),
        ("/user/logout", "where Label Studio has no images"),
        ("http://[::1/a.png", "cannot be read"),
        ("http://127.0.0.1:{own}:9/a.png", "cannot be read"),
        ("", "has no image"),
        (None, "has no image"),
        ([], "has no image"),
        (["/data/upload/1/a.png", "/data/upload/1/b.png"], "has 2 images"),
        ({"url": "/data/upload/1/a.png"}, "has no image"),
        ("data:image/png,xyz", "not base64"),
        ("data:image/png;base64,####", "not base64"),
    ],
)
def test_no_other_address_is_asked(
    hosts: Callable[[], Host], labels: Host, client: LabelStudioClient, value: Any, sentence: str
) -> None:
    other = hosts()
    if isinstance(value, str):
        ports = {"{other}": other.url, "{port}": str(other.server_address[1]), "{own}": str(labels.server_address[1])}
        for what, text in ports.items():
            value = value.replace(what, text)
    with TaskFiles(client) as files, pytest.raises(DataError) as error:
        files.read(value)
    assert sentence in str(error.value)
    assert "secret" not in str(error.value)
    assert (other.asked, labels.asked) == ([], [])


def test_a_redirect_leads_only_to_a_host_that_was_named(
    hosts: Callable[[], Host], labels: Host, client: LabelStudioClient
) -> None:
    bucket, stranger = hosts(), hosts()
    where = "/tools/labels/tasks/7/resolve/"
    labels.replies[where] = [(303, {"location": f"{bucket.url}/b/a.png?X-Amz-Signature=secret"}, b"")]
    with TaskFiles(client) as files, pytest.raises(DataError, match="to which Label Studio sends on") as error:
        files.read("/tasks/7/resolve/")
    assert "secret" not in str(error.value)
    assert bucket.asked == []
    named = bucket.url.removeprefix("http://")
    with TaskFiles(client, [named]) as files:
        assert files.read("/tasks/7/resolve/") == IMAGE
        assert files.read(f"{bucket.url}/elsewhere.png") == IMAGE
        assert [token for _, token in bucket.asked] == [False, False], "no other host gets the token"
        bucket.replies["/on.png"] = [(302, {"location": f"{stranger.url}/x.png"}, b"")]
        with pytest.raises(DataError, match="sends on"):
            files.read(f"{bucket.url}/on.png")
        bucket.replies["/back.png"] = [(302, {"location": f"{labels.url}/tools/labels/data/a.png"}, b"")]
        with pytest.raises(DataError, match="page of its own"):
            files.read(f"{bucket.url}/back.png")
        bucket.replies["/round.png"] = [(302, {"location": "/round.png"}, b"")]
        with pytest.raises(DataError, match="redirects"):
            files.read(f"{bucket.url}/round.png")
    assert stranger.asked == []
    labels.replies["/tools/labels/data/a.png"] = [(302, {"location": "/tools/labels/user/login"}, b"")]
    with TaskFiles(client) as files, pytest.raises(DataError, match="page of its own"):
        files.read("/data/a.png")


def test_a_busy_server_is_asked_again_and_a_missing_file_is_said(
    labels: Host, client: LabelStudioClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labeling.existing.files._PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr("labeling.existing.files.MAX_MEMBER_BYTES", 1000)
    labels.replies["/tools/labels/data/busy.png"] = [(503, {}, b""), (200, {}, b"x" * 10)]
    labels.replies["/tools/labels/data/gone.png"] = [(404, {}, b"")]
    labels.replies["/tools/labels/data/large.png"] = [(200, {}, b"x" * 1001)]
    with TaskFiles(client, ["127.0.0.1:1"]) as files:
        assert files.read("/data/busy.png") == b"x" * 10
        with pytest.raises(DataError, match="responded with 404"):
            files.read("/data/gone.png")
        with pytest.raises(DataError, match="more than"):
            files.read("/data/large.png")
        with pytest.raises(DataError, match="cannot be reached"):
            files.read("http://127.0.0.1:1/a.png")


def test_hosts_and_names_of_files(client: LabelStudioClient) -> None:
    for host in ("http://a.example", "a.example/x", "a b", "", "user@a.example"):
        with pytest.raises(ConfigError, match="is no host"):
            TaskFiles(client, [host])
    uri = base64.urlsafe_b64encode(b"s3://bucket/scans/d.png").decode().rstrip("=")
    assert [
        file_name(value)
        for value in (
            "/data/upload/1/a1b2c3d4-mole%20one.png", "/data/local-files/?d=scans/c.png",
            f"/tasks/1/resolve/?fileuri={uri}", "/tasks/1/resolve/?fileuri=%FF", "https://x.example/e.jpg?sig=1",
            "data:image/png;base64,AA", ["/data/f.png"], 7, "http://[",
        )
    ] == ["a1b2c3d4-mole one.png", "c.png", "d.png", "", "e.jpg", "", "f.png", "", ""]  # fmt: skip

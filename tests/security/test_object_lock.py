"""Heads of the audit chain in a bucket with object lock: they can be hidden and not removed, and are read all the same.

Where RELOOK_TEST_S3 names a bucket with object lock (and a default retention), an operator with its keys tries to make
the anchor forget; elsewhere a local server lists versions as S3 does.
"""

import base64
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pyarrow.fs
import pytest
import sqlalchemy as sa
from fsspec.implementations.arrow import ArrowFSWrapper

from records import audit
from records.anchor import Head, write_head
from records.blobs import open_filesystem
from records.errors import UnavailableError
from records.ledger.tables import TABLES
from records.locked_objects import Bucket, bucket_of, names_ever_stored, signed_headers, write_object
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent

EVENTS = TABLES[AuditEvent]
REFUSED = 403


def test_a_request_is_signed_as_in_amazons_example() -> None:
    key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    bucket = Bucket("https://s3.amazonaws.com", "examplebucket", "us-east-1", "AKIAIOSFODNN7EXAMPLE", key)
    host, at = "examplebucket.s3.amazonaws.com", datetime(2013, 5, 24, tzinfo=UTC)
    headers = signed_headers(bucket, "GET", host, "/", {"prefix": "J", "max-keys": "2"}, at)
    assert headers["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        "SignedHeaders=host;x-amz-content-sha256;x-amz-date,"
        "Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
    )


def test_a_body_and_a_session_are_signed_with_their_headers() -> None:
    bucket = Bucket("https://s3.amazonaws.com", "b", "us-east-1", "key", "secret", "a-token")
    headers = signed_headers(bucket, "PUT", "b.s3.amazonaws.com", "/k", {}, datetime(2026, 1, 1, tzinfo=UTC), b"head")
    assert headers["content-md5"] == base64.b64encode(hashlib.md5(b"head", usedforsecurity=False).digest()).decode()
    assert headers["x-amz-security-token"] == "a-token"
    assert (
        "SignedHeaders=content-md5;host;x-amz-content-sha256;x-amz-date;x-amz-security-token,"
        in (headers["Authorization"])
    )


class Versions(BaseHTTPRequestHandler):
    """Lists three versions on two pages; one is hidden by a marker. Takes objects, except of one bucket."""

    stored: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        refused = self.path.startswith("/refusing/")
        if not refused:
            self.stored[urlsplit(self.path).path] = data
        body = b"Access  Denied" if refused else b""
        self.send_response(REFUSED if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        assert self.headers["Authorization"].startswith("AWS4-HMAC-SHA256 Credential=a/")
        assert "versions" in query
        status = {"/refusing": REFUSED, "/plain": 501, "/absent": 404}.get(url.path, 200)
        if "key-marker" in query:
            assert query["version-id-marker"] == "v+1"
            rest = "<Version><Key>at/2</Key></Version><Version><Key>at/1</Key></Version>"
        else:
            rest = (
                "<IsTruncated>true</IsTruncated><NextKeyMarker>at/1</NextKeyMarker>"
                "<NextVersionIdMarker>v+1</NextVersionIdMarker><Version><Key>at/1</Key></Version>"
                "<DeleteMarker><Key>at/9</Key></DeleteMarker>"
            )
        body = f"<ListVersionsResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>{rest}</ListVersionsResult>"
        body = "Service Unavailable" if url.path == "/broken" else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Versions) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield ArrowFSWrapper(
            pyarrow.fs.S3FileSystem(
                access_key="a", secret_key="b", region="us-east-1", scheme="http",
                endpoint_override=f"127.0.0.1:{listening.server_port}",
            )
        )  # fmt: skip
        listening.shutdown()
        thread.join()


def test_every_page_of_versions_is_read_and_markers_are_no_objects(server: Any) -> None:
    assert names_ever_stored(server, "bucket/at") == ["bucket/at/1", "bucket/at/2"]
    assert names_ever_stored(server, "absent/at") == []
    assert names_ever_stored(server, "plain/at") is None
    with pytest.raises(UnavailableError, match=r"responded 403; these credentials need the right s3:ListBucketVers"):
        names_ever_stored(server, "refusing/at")
    with pytest.raises(UnavailableError, match="in no XML"):
        names_ever_stored(server, "broken/at")


def test_a_head_is_put_with_its_checksum_and_a_refusal_is_a_sentence(server: Any) -> None:
    write_object(server, "bucket/at/3", b"a head")
    assert Versions.stored == {"/bucket/at/3": b"a head"}
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:\d+ responded 403: Access Denied$"):
        write_object(server, "refusing/at/3", b"a head")


@pytest.mark.parametrize("where", ["environment", "nowhere"])
def test_keys_come_from_where_arrow_takes_them(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        if where == "environment":
            monkeypatch.setenv(name, name.lower())
    found = bucket_of(pyarrow.fs.S3FileSystem(region="cn-north-1"), "heads")
    if where == "nowhere":
        assert found is None
    else:
        said = Bucket(
            "https://s3.cn-north-1.amazonaws.com.cn", "heads", "cn-north-1", "aws_access_key_id",
            "aws_secret_access_key", "aws_session_token",
        )  # fmt: skip
        assert found == said


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[Store, Bucket, str]]:
    """A store with five events that are anchored in a bucket with object lock, that bucket, and the prefix there."""
    base, _, query = os.environ["RELOOK_TEST_S3"].partition("?")
    url = f"{base}/{uuid.uuid4().hex}?{query}"
    filesystem, root, _ = open_filesystem(url, "records.audit_anchor")
    name, _, prefix = root.partition("/")
    bucket = bucket_of(filesystem.fs, name)
    if bucket is None or b"<DefaultRetention>" not in bucket.request("GET", {"object-lock": ""})[1]:
        pytest.skip("the bucket of RELOOK_TEST_S3 has no object lock with a default retention")
    with closing(open_store(RecordsSettings(home=tmp_path / "home", audit_anchor=url))) as store:
        for at in range(5):
            with store.ledger.begin() as tx:
                audit.append(tx, actor="me", action="test.done", subject=f"thing {at}")
        yield store, bucket, prefix


@pytest.mark.skipif("RELOOK_TEST_S3" not in os.environ, reason="RELOOK_TEST_S3 names no bucket")
def test_who_has_the_keys_of_a_locked_bucket_can_hide_heads_and_removes_none(locked: tuple[Store, Bucket, str]) -> None:
    store, bucket, prefix = locked
    filesystem, root, _ = open_filesystem(str(store.settings.audit_anchor), "records.audit_anchor")
    heads = sorted(path.rpartition("/")[2] for path in filesystem.find(root))
    assert [head[:12] for head in heads] == [f"{number:012d}" for number in range(1, 6)]
    assert audit.verify_anchor(store.ledger) == ([], 5)
    versions = bucket.request("GET", {"versions": "", "prefix": f"{prefix}/"})[1].decode()
    ids = [part.partition("</VersionId>")[0] for part in versions.split("<VersionId>")[1:]]
    assert len(ids) == 5

    for head, version in zip(heads, ids, strict=True):
        assert bucket.request("DELETE", {"versionId": version}, f"{prefix}/{head}")[0] == REFUSED
        assert bucket.request("DELETE", {}, f"{prefix}/{head}")[0] == 204
    assert filesystem.find(root) == []
    assert audit.verify_anchor(store.ledger) == ([], 5)

    # What was hidden still shows that the chain was cut off, and a second head of one number that it was forked.
    with store.ledger.engine.begin() as connection:
        connection.execute(sa.delete(EVENTS).where(EVENTS.c.number > 3))
    assert "the chain ends at event 3, and event 5 is anchored" in "; ".join(audit.verify_anchor(store.ledger)[0])
    write_head(str(store.settings.audit_anchor), Head(5, "0" * 64, None))
    assert "2 heads with the number 5 are anchored" in "; ".join(audit.verify_anchor(store.ledger)[0])

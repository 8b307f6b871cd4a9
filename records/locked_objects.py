"""Objects in an S3 bucket with object lock: they are written with a checksum, and read with all their versions.

S3 takes an object that will be locked only with a checksum of its bytes, which Arrow's file system does not send. And a
plain DELETE succeeds there: it hides the object behind a marker and keeps its locked version, which Arrow does not
list. So both requests are made here, signed as S3 wants it (AWS Signature Version 4).
"""

import base64
import hashlib
import hmac
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import pyarrow.fs

from records.errors import UnavailableError
from records.ids import utc_now

TIMEOUT_S = 30.0
NO_BUCKET, NOT_IMPLEMENTED = 404, 501

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """A bucket, and who asks.

    Args:
        endpoint: URL of the server.
        name: of the bucket.
        region: that requests are signed for.
        access_key: id of the key.
        secret_key: the key.
        session_token: of temporary keys; None for others.
    """

    endpoint: str
    name: str
    region: str
    access_key: str
    secret_key: str
    session_token: str | None = None

    def request(self, method: str, query: Mapping[str, str], key: str = "", body: bytes = b"") -> tuple[int, bytes]:
        """Send a request about the bucket, or about an object of it.

        Args:
            method: such as GET.
            query: of the URL.
            key: of the object; empty for the bucket.
            body: what is sent.
        Returns:
            The status and the body of the response.
        Raises:
            UnavailableError: the server does not respond.
        """
        import httpx

        path = "/" + quote(f"{self.name}/{key}" if key else self.name, safe="/-_.~")
        url = f"{self.endpoint}{path}?{canonical_query(query)}"
        headers = signed_headers(self, method, urlsplit(self.endpoint).netloc, path, query, utc_now(), body)
        try:
            response = httpx.request(method, url, headers=headers, content=body, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self.endpoint} does not respond: {type(error).__name__}: {error}") from error
        return response.status_code, response.content


def write_object(filesystem: Any, name: str, data: bytes) -> None:
    """Write a small object that its bucket locks.

    Args:
        filesystem: fsspec's wrapper of one of Arrow's.
        name: bucket and key.
        data: its bytes.
    Raises:
        OSError: Arrow cannot write it.
        UnavailableError: the server does not respond, or refuses it.
    """
    bucket_name, _, key = name.partition("/")
    bucket = bucket_of(getattr(filesystem, "fs", None), bucket_name)
    if bucket is None:
        filesystem.pipe_file(name, data)
        return
    status, body = bucket.request("PUT", {}, key, data)
    if status != 200:
        raise UnavailableError(
            f"{bucket.endpoint} responded {status}: {' '.join(body.decode(errors='replace').split())[:300]}"
        )


def names_ever_stored(filesystem: Any, root: str) -> list[str] | None:
    """Return the keys of all versions of objects below a prefix, sorted, as Arrow names them.

    Args:
        filesystem: fsspec's wrapper of one of Arrow's.
        root: bucket and prefix.
    Returns:
        The keys; None if the store has no versions, or its list cannot be asked for.
    Raises:
        UnavailableError: the server does not respond, or refuses the list.
    """
    bucket_name, _, prefix = root.strip("/").partition("/")
    bucket = bucket_of(getattr(filesystem, "fs", None), bucket_name)
    if bucket is None:
        return None
    names: set[str] = set()
    query: dict[str, str] | None = {"versions": "", "prefix": f"{prefix}/" if prefix else ""}
    while query is not None:
        status, body = bucket.request("GET", query)
        if status == NOT_IMPLEMENTED:
            return None
        if status == NO_BUCKET:
            return []
        if status != 200:
            raise UnavailableError(
                f"the versions of s3://{root} cannot be listed: {bucket.endpoint} responded {status}; these "
                "credentials need the right s3:ListBucketVersions"
            )
        try:
            listed = ElementTree.fromstring(body)
        except ElementTree.ParseError as error:
            raise UnavailableError(f"{bucket.endpoint} lists the versions of s3://{root} in no XML: {error}") from error
        names.update(f"{bucket_name}/{key}" for key in _texts(listed, "Version", "Key"))
        query = _next_page(query, listed)
    return sorted(names)


def bucket_of(arrow: Any, name: str) -> Bucket | None:
    """Return a bucket with the credentials that Arrow has; None for another store, or if it has none that can be read.

    Keys come from the URL or the environment. Those of a machine's role are Arrow's alone.
    """
    if not isinstance(arrow, pyarrow.fs.S3FileSystem):
        return None
    # What a file system is pickled with; it has no other way to say its options.
    (options,) = arrow.__reduce__()[1]
    environ = os.environ
    access_key = options["access_key"] or environ.get("AWS_ACCESS_KEY_ID")
    secret_key = options["secret_key"] or environ.get("AWS_SECRET_ACCESS_KEY")
    if not access_key or not secret_key:
        logger.warning(
            "object lock of %s is not used: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or put keys into the URL",
            name,
        )
        return None
    token = options["session_token"] if options["access_key"] else environ.get("AWS_SESSION_TOKEN")
    address = options["endpoint_override"]
    if address and "://" not in address:
        address = f"{options['scheme']}://{address}"
    region = arrow.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    address = address or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    address = address or f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
    return Bucket(address.rstrip("/"), name, region, access_key, secret_key, token or None)


def signed_headers(
    bucket: Bucket, method: str, host: str, path: str, query: Mapping[str, str], at: datetime, body: bytes = b""
) -> dict[str, str]:
    """Return the headers of a request, signed with AWS Signature Version 4.

    Args:
        bucket: whose keys sign.
        method: such as GET.
        host: that the request goes to, with the port unless it is the usual one.
        path: quoted.
        query: not quoted.
        at: now, UTC.
        body: what is sent.
    Returns:
        All headers that S3 wants, without Host.
    """
    hashed = hashlib.sha256(body).hexdigest()
    headers = {"x-amz-content-sha256": hashed, "x-amz-date": f"{at:%Y%m%dT%H%M%SZ}"}
    if body:
        headers["content-md5"] = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
    if bucket.session_token is not None:
        headers["x-amz-security-token"] = bucket.session_token
    signed = {"host": host, **headers}
    names = ";".join(sorted(signed))
    lines = [method, path, canonical_query(query), *(f"{name}:{signed[name]}" for name in sorted(signed))]
    canonical = "\n".join([*lines, "", names, hashed])
    scope = f"{at:%Y%m%d}/{bucket.region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{bucket.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    to_sign = f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{scope}\n{digest}"
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={bucket.access_key}/{scope}"
    return {**headers, "Authorization": f"AWS4-HMAC-SHA256 {credential},SignedHeaders={names},Signature={signature}"}


def canonical_query(query: Mapping[str, str]) -> str:
    """Return a query as it is sent and signed: quoted, and sorted by name."""
    return "&".join(f"{quote(name, safe='-_.~')}={quote(query[name], safe='-_.~')}" for name in sorted(query))


def _next_page(query: Mapping[str, str], listed: ElementTree.Element) -> dict[str, str] | None:
    if next(_texts(listed, "IsTruncated"), "false") != "true":
        return None
    markers = {"key-marker": "NextKeyMarker", "version-id-marker": "NextVersionIdMarker"}
    return {**query, **{name: next(_texts(listed, tag), "") for name, tag in markers.items()}}


def _texts(element: ElementTree.Element, *path: str) -> Iterator[str]:
    """Yield the text at a path of tags, whatever namespace the server puts them into."""
    for child in element:
        if child.tag.rpartition("}")[2] == path[0]:
            if path[1:]:
                yield from _texts(child, *path[1:])
            else:
                yield child.text or ""

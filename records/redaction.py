"""Mask secrets in texts that people read: errors, manifests, status, logs.

A URL may carry a password (`postgresql://relook:secret@host/db`), a token as its user (`https://token@host`) or either
in its query (`s3://bucket/blobs?secret_key=...`). Parameters of a query are masked unless their name is known to be
harmless, so one that nobody thought of is not shown.
"""

import re

MASK = "**********"

# A URL in quotes ends at the quote, since passwords may contain spaces; any other ends at white space.
_URL = re.compile(r"""(?<=')[A-Za-z][\w+.-]*://[^']*|(?<=")[A-Za-z][\w+.-]*://[^"]*|[A-Za-z][\w+.-]*://\S*[^\s.,;:)]""")
_HARMLESS = {
    *("after", "allow_bucket_creation", "allow_bucket_deletion", "application_name", "connect_timeout", "dbname"),
    *(
        "endpoint_override",
        "fields",
        "format",
        "host",
        "include",
        "limit",
        "page",
        "page_size",
        "port",
        "project",
        "region",
    ),
    *("region", "scheme", "split", "sslmode", "timeout", "view"),
}


def without_secrets(text: str) -> str:
    """Return a text with the passwords and tokens of all URLs in it masked; other text stays.

    >>> without_secrets("postgresql://relook:pa/ss?w@db.example:5432/relook?sslmode=require&sslpassword=x")
    'postgresql://relook:**********@db.example:5432/relook?sslmode=require&sslpassword=**********'
    """
    if "://" not in text:
        return text
    # A setting is one URL as a whole; between words in a sentence, each URL is found by itself.
    whole = re.fullmatch(r"[A-Za-z][\w+.-]*://.*", text, flags=re.DOTALL)
    if whole and not re.search(r"\s", text.partition("@")[2] or text):
        return _masked(text)
    return _URL.sub(lambda found: _masked(found.group()), text)


def _masked(url: str) -> str:
    scheme, _, rest = url.partition("://")
    user, place = _split_user(rest)
    if user is not None:
        name, colon, _ = user.partition(":")
        # In an HTTP URL a user without a password is an access token; a database's user is only a name.
        shown = f"{name}:{MASK}" if colon else (MASK if scheme.lower().startswith("http") else name)
        place = f"{shown}@{place}"
    path, mark, query = place.partition("?")
    parts = [_masked_parameter(part) for part in re.split("[&;]", query)] if mark else []
    return f"{scheme}://{path}{mark}{'&'.join(parts)}"


def _split_user(rest: str) -> tuple[str | None, str]:
    """Return (user and password, the rest); None without them."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in rest and ":" in authority:
        # A password may hold `/`, `?` or `@` unencoded: the host begins behind the last `@`. A path with an `@` behind
        # `host:port` is masked, too, which shows less than it could and never more than it may.
        user, _, place = rest.rpartition("@")
        return user, place
    user, at, _ = authority.rpartition("@")
    return (user, rest[len(user) + 1 :]) if at else (None, rest)


def _masked_parameter(part: str) -> str:
    name, equals, value = part.partition("=")
    if not equals:
        return MASK if name else ""
    is_harmless = name.lower() in _HARMLESS and "@" not in value
    return part if is_harmless or not value else f"{name}={MASK}"

"""API keys: created once, stored as a hash, looked up by the bearer token of a request.

In: a store and a token. Out: a `Caller`. A token is `rlk_<id>_<secret>`. Its secret has 256 random bits, so it cannot
be guessed and a plain SHA-256 of the token is as safe as a slow password hash. This module does not use HTTP.
"""

import asyncio
import hmac
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from records import audit
from records.errors import AccessError, ConfigError, UnknownIdError
from records.home import Home
from records.ids import sha256_hex, utc_now
from records.keys import key_of
from records.store import Store
from records.types import ApiKey, Consent, Scope

PREFIX = "rlk"
LOCAL_ORGANISATION = "local"
ADMIN_ID = "admin"
"""Id of the bearer of the home's own administrator key."""
CACHE_S = 1.0
"""Maximum age of the cached keys, seconds; a revoked key may still work for this long."""
REREAD_S = 0.1
"""Least time between two readings of the keys for tokens that the copy does not have, seconds."""

_SEES_ALL = frozenset({Scope.REVIEW, Scope.AUDIT, Scope.ADMIN})


@dataclass(frozen=True, slots=True)
class Caller:
    """The identity and permissions behind a request."""

    id: str
    organisation: str
    scopes: frozenset[Scope]
    sandbox: bool = False
    default_consent: Consent | None = None

    @property
    def share(self) -> str | None:
        """Whose share of what is limited a request takes; None for the only user of a service without keys."""
        return None if self is LOCAL else self.id

    def may_see(self, organisation: str) -> bool:
        """Return whether an object of this organisation is visible to the caller."""
        return organisation == self.organisation or bool(self.scopes & _SEES_ALL)

    def require(self, *scopes: Scope) -> None:
        """Raise AccessError unless the caller has one of the scopes; `admin` includes all others."""
        if not self.scopes & {*scopes, Scope.ADMIN}:
            names = " or ".join(f"`{scope}`" for scope in sorted(scopes))
            raise AccessError(f"this request needs a key with the scope {names}", "forbidden")


LOCAL = Caller("local", LOCAL_ORGANISATION, frozenset(Scope) - {Scope.ADMIN, Scope.APPROVE})
"""The caller of every request while no key was ever made, on this machine only."""
ADMIN = Caller(ADMIN_ID, LOCAL_ORGANISATION, frozenset(Scope))
"""The bearer of the home's own administrator key."""


def create_key(
    store: Store,
    *,
    name: str,
    organisation: str,
    scopes: Sequence[Scope],
    actor: str,
    sandbox: bool = False,
    default_consent: Consent | None = None,
    days: int | None = None,
) -> tuple[ApiKey, str]:
    """Create a key and write it to ledger and audit.

    Args:
        store: with the ledger.
        name: for people.
        organisation: whose predictions and images the key may see.
        scopes: at least one.
        actor: for the audit.
        sandbox: images of this key are not stored, reviewed or used for training.
        default_consent: for requests without consent.
        days: until the key expires; None is never.
    Returns:
        The record, and the token, which cannot be read again later.
    Raises:
        ConfigError: no scope, an empty name or organisation, or less than a day.
    """
    if not scopes or not name.strip() or not organisation.strip():
        raise ConfigError("a key needs a name, an organisation and at least one scope")
    if days is not None and days < 1:
        raise ConfigError(f"a key lives for at least 1 day, not {days}")
    key_id, now = secrets.token_hex(8), utc_now()
    token = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=key_id,
        created_at=now,
        name=name,
        organisation=organisation,
        scopes=sorted(set(scopes)),
        # Only the hash is stored, so a copy of the ledger contains no usable key.
        secret_hash=sha256_hex(token.encode()),
        sandbox=sandbox,
        default_consent=default_consent,
        expires_at=now + timedelta(days=days) if days is not None else None,
    )
    with store.ledger.begin() as tx:
        tx.add(key)
        details = {"name": name, "organisation": organisation, "scopes": list(key.scopes), "sandbox": sandbox}
        audit.append(tx, actor=actor, action="key.created", subject=key_id, details=details)
    return key, token


def revoke_key(store: Store, key_id: str, *, actor: str) -> ApiKey:
    """Revoke a key, effective within a second, and return its record; UnknownIdError if there is none. Idempotent."""
    with store.ledger.begin() as tx:
        key = tx.get(ApiKey, key_id)
        if key is None:
            raise UnknownIdError(f"no key has the id {key_id!r}; `relook keys list` shows them")
        if key.revoked_at is None:
            tx.update(ApiKey, key_id, revoked_at=utc_now())
            audit.append(tx, actor=actor, action="key.revoked", subject=key_id)
        return tx.require(ApiKey, key_id)


def has_keys(store: Store) -> bool:
    """Return whether a key was ever made; from then on every request needs one, even if all are revoked."""
    with store.ledger.read() as tx:
        return bool(tx.find(ApiKey, limit=1))


def admin_token(home: Home) -> str:
    """Return the token of this home's administrator, created at the first call in a file of mode 0600."""
    return key_of(home, "admin-key", lambda: f"{PREFIX}_admin_{secrets.token_urlsafe(32)}")


class KeyRing:
    """Looks callers up by their tokens, in a copy of all keys that is at most a second old. Thread-safe.

    `find` calls no token unknown before the ledger was read after the token arrived. So a new key works at once in
    every process that serves, while strangers cause at most one reading per `REREAD_S`, which all of them share.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, ApiKey] = {}
        self._read_at_s = float("-inf")
        self._read_at = utc_now()
        self._admin_hash = sha256_hex(admin_token(store.home).encode())
        self._reading = threading.Lock()
        self._rereading: asyncio.Task[None] | None = None

    @property
    def is_fresh(self) -> bool:
        """True while `caller` does not read the ledger."""
        return time.monotonic() - self._read_at_s <= CACHE_S

    @property
    def any_exist(self) -> bool:
        """Whether a key was ever made, as of the last reading of the ledger."""
        return bool(self._keys)

    async def find(self, authorization: str | None) -> Caller:
        """Return what `caller` returns, but accept a key that is newer than the copy of the keys."""
        arrived_s = time.monotonic()
        token = _bearer(authorization)
        # Before the ledger is read, so that an administrator is recognised while it cannot be.
        if self._is_admin(token):
            return ADMIN
        # A thread costs more than the cached lookup, but reading the ledger would block the event loop.
        keys = self._keys if self.is_fresh else await asyncio.to_thread(self._current)
        if token.startswith(f"{PREFIX}_") and sha256_hex(token.encode()) not in keys:
            # Twice at most: a reading that was under way when the token arrived may have begun before the key was made.
            while self._read_at_s < arrived_s:
                if self._rereading is None or self._rereading.done():
                    self._rereading = asyncio.create_task(self._reread())
                await asyncio.shield(self._rereading)
            keys = self._keys
        return self._bearer_among(keys, token, is_anonymous=authorization is None)

    def caller(self, authorization: str | None) -> Caller:
        """Return the caller of a request, as of a copy of the keys that is at most `CACHE_S` old.

        Args:
            authorization: the request's header, or None.
        Returns:
            The caller; `LOCAL` if there is no header and no key was ever made.
        Raises:
            AccessError: no key, or one that is unknown, expired or revoked.
            UnavailableError: the ledger cannot be reached.
        """
        token = _bearer(authorization)
        if self._is_admin(token):
            return ADMIN
        return self._bearer_among(self._current(), token, is_anonymous=authorization is None)

    def _is_admin(self, token: str) -> bool:
        # In constant time: response times must not reveal how much of a guessed hash is right.
        return hmac.compare_digest(sha256_hex(token.encode()), self._admin_hash)

    def _bearer_among(self, keys: Mapping[str, ApiKey], token: str, *, is_anonymous: bool) -> Caller:
        if is_anonymous:
            # `keys` includes revoked ones: once a key was made, no request without a key is accepted again.
            if keys:
                raise AccessError("this service needs a key: send `Authorization: Bearer rlk_...`", "unauthenticated")
            return LOCAL
        found = keys.get(sha256_hex(token.encode()))
        if found is None or not is_valid(found, self._read_at):
            raise AccessError("this key is unknown, expired or revoked", "unauthenticated")
        return Caller(found.id, found.organisation, frozenset(found.scopes), found.sandbox, found.default_consent)

    async def _reread(self) -> None:
        await asyncio.sleep(max(0.0, self._read_at_s + REREAD_S - time.monotonic()))
        await asyncio.to_thread(self._current, 0.0)

    def _current(self, max_age_s: float = CACHE_S) -> dict[str, ApiKey]:
        with self._reading:
            # Under the lock, so that one thread reads the ledger when the copy expires and the others wait for it.
            began_s = time.monotonic()
            if began_s - self._read_at_s > max_age_s:
                with self._store.ledger.read() as tx:
                    self._keys = {key.secret_hash: key for key in tx.find(ApiKey)}
                    # The database's clock: a key expires at the same time on all machines.
                    self._read_at = tx.now()
                self._read_at_s = began_s
            return self._keys


def _bearer(authorization: str | None) -> str:
    """Return the token of an Authorization header, "" where it has none."""
    kind, _, token = (authorization or "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def is_valid(key: ApiKey, now: datetime) -> bool:
    """Return whether a key is neither revoked nor expired at `now`."""
    return key.revoked_at is None and (key.expires_at is None or now < key.expires_at)

"""API keys: made once, kept as a hash, found again by the bearer token of a request.

In: a store and a token. Out: a `Caller`. A token is `rlk_<id>_<secret>`; the secret has 256 random bits, so a
plain SHA-256 of the token is as good as a slow hash. It knows nothing of HTTP.
"""

import hmac
import secrets
import threading
import time
from collections.abc import Sequence
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
CACHE_S = 1.0
"""How long a revoked key may go on at most, seconds."""

_SEES_ALL = frozenset({Scope.REVIEW, Scope.AUDIT, Scope.ADMIN})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may do."""

    id: str
    organisation: str
    scopes: frozenset[Scope]
    sandbox: bool = False
    default_consent: Consent | None = None

    def may_see(self, organisation: str) -> bool:
        """Return whether an object of this organisation is visible to the caller."""
        return organisation == self.organisation or bool(self.scopes & _SEES_ALL)

    def require(self, scope: Scope) -> None:
        """Raise AccessError unless the caller has a scope; `admin` includes all others."""
        if not self.scopes & {scope, Scope.ADMIN}:
            raise AccessError(f"this needs a key with the scope `{scope}`", "forbidden")


LOCAL = Caller("local", LOCAL_ORGANISATION, frozenset(Scope) - {Scope.ADMIN})
"""Whoever asks on this machine while no key exists."""


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
    """Make a key and enter it in the ledger and the audit.

    Args:
        store: with the ledger.
        name: for people.
        organisation: whose objects its bearer sees.
        scopes: at least one.
        actor: who makes it.
        sandbox: nothing that it sends is stored, asked about or learned from.
        default_consent: of its requests that name none.
        days: until it expires; None is never.
    Returns:
        The record, and the token: the only time that it can be read.
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
    """End a key; a running service refuses it within a second. Ending it again changes nothing.

    Args:
        store: with the ledger.
        key_id: id, as `relook keys list` shows it.
        actor: who ends it.
    Returns:
        The record.
    Raises:
        UnknownIdError: there is no such key.
    """
    with store.ledger.begin() as tx:
        key = tx.get(ApiKey, key_id)
        if key is None:
            raise UnknownIdError(f"no key has the id {key_id!r}; `relook keys list` shows them")
        if key.revoked_at is None:
            tx.update(ApiKey, key_id, revoked_at=utc_now())
            audit.append(tx, actor=actor, action="key.revoked", subject=key_id)
        return tx.require(ApiKey, key_id)


def has_keys(store: Store) -> bool:
    """Return whether a key was ever made; from then on nobody gets in without one, even if all are revoked."""
    with store.ledger.read() as tx:
        return bool(tx.find(ApiKey, limit=1))


def admin_token(home: Home) -> str:
    """Return the token of this home's own administrator, made at the first call and readable by its owner only."""
    return key_of(home, "admin-key", lambda: f"{PREFIX}_admin_{secrets.token_urlsafe(32)}")


class KeyRing:
    """Finds callers by their tokens. Safe from several threads.

    Args:
        store: with the keys.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, ApiKey] = {}
        self._read_at_s = float("-inf")
        self._admin_hash = sha256_hex(admin_token(store.home).encode())
        self._reading = threading.Lock()

    @property
    def is_fresh(self) -> bool:
        """True while `caller` needs no look into the ledger."""
        return time.monotonic() - self._read_at_s <= CACHE_S

    def caller(self, authorization: str | None) -> Caller:
        """Return who sent a request.

        Args:
            authorization: the request's header, or None.
        Returns:
            The caller; `LOCAL` if there is no header and no key was ever made.
        Raises:
            AccessError: no key, or one that is unknown, expired or revoked.
            UnavailableError: the ledger does not answer.
        """
        keys = self._current()
        if authorization is None:
            if keys:
                raise AccessError("this service needs a key: send `Authorization: Bearer rlk_...`", "unauthenticated")
            return LOCAL
        kind, _, token = authorization.partition(" ")
        token_hash = sha256_hex(token.strip().encode())
        if kind.lower() == "bearer" and hmac.compare_digest(token_hash, self._admin_hash):
            return Caller("admin", LOCAL_ORGANISATION, frozenset(Scope))
        found = keys.get(token_hash) if kind.lower() == "bearer" else None
        if found is None or not is_valid(found, utc_now()):
            raise AccessError("this key is unknown, expired or revoked", "unauthenticated")
        return Caller(found.id, found.organisation, frozenset(found.scopes), found.sandbox, found.default_consent)

    def _current(self) -> dict[str, ApiKey]:
        with self._reading:
            if not self.is_fresh:
                with self._store.ledger.read() as tx:
                    self._keys = {key.secret_hash: key for key in tx.find(ApiKey)}
                self._read_at_s = time.monotonic()
            return self._keys


def is_valid(key: ApiKey, now: datetime) -> bool:
    """Return whether a key opens anything at a moment."""
    return key.revoked_at is None and (key.expires_at is None or now < key.expires_at)

"""Checks before the start of a service, without starting or importing Ray."""

from records.errors import ConfigError, UnknownIdError
from records.models import serving_model
from records.settings import RecordsSettings
from records.store import open_store
from serving.access.keys import admin_token, has_keys
from serving.http_server import require_free_port
from serving.settings import ServingSettings
from serving.tls import certificate_of


def require_startable(settings: ServingSettings, records: RecordsSettings) -> None:
    """Check the preconditions of a start.

    Raises ConfigError if the port is in use, or reachable from outside or by a proxy while there is no key,
    or its certificate cannot be used; UnknownIdError if no model was promoted; UnavailableError if the ledger cannot
    be reached.
    """
    # The port first: the check is immediate, while opening the ledger may wait for a database.
    require_free_port(settings.host, settings.port)
    require_servable(settings, records)


def require_servable(settings: ServingSettings, records: RecordsSettings) -> None:
    """Check what a service needs wherever it runs; see `require_startable`."""
    certificate_of(settings)
    store = open_store(records)
    try:
        admin_token(store.home)
        if not (settings.is_loopback or has_keys(store)):
            raise ConfigError(
                f"serving.host {settings.host} can be reached from outside and there are no API keys; "
                "make one with `relook keys create`, or use 127.0.0.1"
            )
        if settings.is_proxied and not has_keys(store):
            raise ConfigError(
                "the service is to stand behind a reverse proxy (serving.root_path, trusted_hosts or "
                "forwarded_allow_ips), where everybody's requests come from one address, and there are no API keys; "
                "make one with `relook keys create`"
            )
        with store.ledger.read() as tx:
            if serving_model(tx) is None:
                raise UnknownIdError(
                    "no model is to be served yet; train one and promote it (`relook train`, `relook promote`)"
                )
    finally:
        store.close()

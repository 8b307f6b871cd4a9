"""What has to hold before a service can start, checked without starting or importing Ray."""

from records.errors import ConfigError, UnknownIdError
from records.models import serving_model
from records.settings import RecordsSettings
from records.store import open_store
from serving.access.keys import admin_token, has_keys
from serving.http_server import require_free_port
from serving.settings import ServingSettings


def require_startable(settings: ServingSettings, records: RecordsSettings) -> None:
    """Say in one sentence why a service could not start, before anything is started.

    Args:
        settings: of this room.
        records: where everything is kept.
    Raises:
        ConfigError: the port is in use, or others can reach it and there is no key yet.
        UnknownIdError: no model is to be served.
        UnavailableError: the ledger does not answer.
    """
    require_free_port(settings.host, settings.port)
    store = open_store(records)
    try:
        admin_token(store.home)
        if not settings.is_loopback and not has_keys(store):
            raise ConfigError(
                f"serving.host {settings.host} can be reached from outside and there are no API keys; "
                "make one with `relook keys create`, or use 127.0.0.1"
            )
        with store.ledger.read() as tx:
            if serving_model(tx) is None:
                raise UnknownIdError(
                    "no model is to be served yet; train one and promote it (`relook train`, `relook promote`)"
                )
    finally:
        store.close()

"""What has to hold before a service can start, checked without starting or importing Ray."""

from records.bundles import serving_model
from records.errors import UnknownIdError
from records.settings import RecordsSettings
from records.store import open_store
from serving.http_server import require_free_port
from serving.settings import ServingSettings


def require_startable(settings: ServingSettings, records: RecordsSettings) -> None:
    """Say in one sentence why a service could not start, before anything is started.

    Args:
        settings: of this room.
        records: where everything is kept.
    Raises:
        ConfigError: the port is in use.
        UnknownIdError: no model is to be served.
        UnavailableError: the ledger does not answer.
    """
    require_free_port(settings.host, settings.port)
    store = open_store(records)
    try:
        with store.ledger.read() as tx:
            if serving_model(tx) is None:
                raise UnknownIdError(
                    "no model is to be served yet; train one and promote it (`relook train`, `relook promote`)"
                )
    finally:
        store.close()

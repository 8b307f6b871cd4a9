"""How the page asks the API for whoever sits before it: with their key, which is kept nowhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from records.errors import RelookError, UnavailableError
from records.taxonomy import Taxonomy
from records.types import Scope
from serving.client import Client
from serving.schemas_registry import CallerInfo, ModelDetails

_RETRY_S = 10.0
_SCOPE_WORDS = {
    Scope.PREDICT: "ask",
    Scope.FLAG: "object",
    Scope.REVIEW: "see every organisation's answers",
    Scope.AUDIT: "read the figures",
    Scope.ADMIN: "move models",
}


class Visitors:
    """Asks the API. Safe from several threads.

    Args:
        url: of the API.
        taxonomy: whose names are shown.
    """

    def __init__(self, url: str, taxonomy: Taxonomy) -> None:
        self._url = url
        self._client = Client(url, retry_s=_RETRY_S)
        self._details: dict[str, ModelDetails] = {}
        self.taxonomy = taxonomy
        self.names = {c.code: c.name for c in taxonomy.classes}
        self.malignant = frozenset(taxonomy.malignant_codes)

    @contextmanager
    def asking(self, key: str | None) -> Iterator[Client]:
        """Give a client with the visitor's key. A hidden field sends None."""
        token = (key or "").strip()
        if not token:
            yield self._client
            return
        with Client(self._url, token, retry_s=_RETRY_S) as client:
            yield client

    def details(self, client: Client, model_id: str) -> ModelDetails | None:
        """Return what was measured of a model, read once; None if nothing can be known of it now."""
        if model_id not in self._details:
            try:
                self._details[model_id] = client.model_details(model_id)
            except UnavailableError:
                raise
            except RelookError:
                # An answer is worth showing without what its model was worth; the page then says that it is not known.
                return None
        return self._details[model_id]


def caller_text(caller: CallerInfo) -> str:
    """Say who is signed in and what they may do.

    Args:
        caller: as the API knows them.
    Returns:
        One or two sentences.
    """
    may = ", ".join(_SCOPE_WORDS[scope] for scope in caller.scopes)
    who = "Signed in" if caller.id != "local" else "No key is needed to ask on this machine"
    sandbox = " A sandbox: nothing that it sends is stored or learned from." if caller.sandbox else ""
    return f"{who}: organisation {caller.organisation}; may {may}.{sandbox}"

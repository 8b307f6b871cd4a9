"""The page's access to the REST API with the key of each visitor.

In: a visitor's request, beside which `access` put the key of its session. Out: a `serving.client.Client` that sends
it. Keys are not stored; what is cached is the same for every visitor.
"""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from records.errors import RelookError, UnavailableError
from records.taxonomy import Taxonomy
from serving.client import Client
from serving.page.toolkit import gr
from serving.schemas import CallerInfo, ModelDetails

_RETRY_S = 10.0


class PageApi:
    """Makes API clients for visitors and holds what all tabs show. Safe to share between threads.

    Args:
        url: base URL of the API.
        taxonomy: its class names and malignant classes are shown.
        trust: returns what the certificate of the API is checked by, for each client, since it may have been renewed;
            None is what every client uses.
    """

    def __init__(self, url: str, taxonomy: Taxonomy, trust: Callable[[], ssl.SSLContext | bool] | None = None) -> None:
        self._url = url
        self._trust = trust
        self._anonymous = Client(url, retry_s=_RETRY_S) if trust is None else None
        self._details: dict[str, ModelDetails] = {}
        self.taxonomy = taxonomy
        self.names = {c.code: c.name for c in taxonomy.classes}
        self.malignant = frozenset(taxonomy.malignant_codes)

    @contextmanager
    def client(self, visitor: gr.Request) -> Iterator[Client]:
        """Give a client that sends the visitor's key; without one, the client of all visitors, if it can stay."""
        key = key_of(visitor)
        if key is None and self._anonymous is not None:
            yield self._anonymous
            return
        # Made anew for each event: a client kept per key would keep the key in memory after the visitor has left.
        with Client(self._url, key, retry_s=_RETRY_S, verify=True if self._trust is None else self._trust()) as client:
            yield client

    def details(self, client: Client, model_id: str) -> ModelDetails | None:
        """Return the metrics of a model, fetched once per process; None if they cannot be read."""
        # Two threads may both fetch the same model. They store equal values, so no lock is needed.
        if model_id not in self._details:
            try:
                self._details[model_id] = client.model_details(model_id)
            except UnavailableError:
                raise
            except RelookError:
                # A prediction is shown without its model's metrics too, with a sentence that they are not known.
                # The failure is not cached: it may be this visitor's key that may not read them.
                return None
        return self._details[model_id]


def key_of(visitor: gr.Request) -> str | None:
    """Return the key of a visitor who is signed in."""
    key: str | None = visitor.state.key
    return key


def caller_text(caller: CallerInfo) -> str:
    """Return who is signed in, with organisation and scopes, in one or two sentences."""
    who = "No key is needed on this machine" if caller.id == "local" else "Signed in"
    scopes = ", ".join(caller.scopes)
    sandbox = " Sandbox: images are not stored and not used for training." if caller.sandbox else ""
    return f"{who}. Organisation: {caller.organisation}. Scopes: {scopes}.{sandbox}"

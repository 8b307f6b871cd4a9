"""From settings to a client: the Label Studio elsewhere that they name, or the local one."""

from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio
from labeling.settings import LabelingSettings
from records.errors import ConfigError, LabelStudioError
from records.home import Home


def connect(home: Home, settings: LabelingSettings) -> LabelStudioClient | None:
    """Connect to the Label Studio that is set up.

    Args:
        home: whose local server is meant if no URL is set.
        settings: a URL in them names a server elsewhere.
    Returns:
        A client, or None if no URL is set and no local server was ever started here.
    Raises:
        ConfigError: a URL is set without a token.
        LabelStudioError: the local server is down, or the token cannot be used.
    """
    if settings.url is not None:
        if settings.token is None:
            raise ConfigError("labeling.url is set without a token; set RELOOK_LABELING__TOKEN to an access token")
        return LabelStudioClient(settings.url, settings.token, timeout_s=settings.request_timeout_s)
    local = LocalLabelStudio(home, settings)
    running = local.status()
    if running is None:
        if not local.existed:
            return None
        raise LabelStudioError("the local Label Studio is down; start it with `relook label up`")
    return LabelStudioClient(running.url, running.token, timeout_s=settings.request_timeout_s)


def require(home: Home, settings: LabelingSettings) -> LabelStudioClient:
    """Connect like `connect`, where there has to be one.

    Args:
        home: whose local server is meant if no URL is set.
        settings: a URL in them names a server elsewhere.
    Returns:
        A client.
    Raises:
        ConfigError: a URL is set without a token.
        LabelStudioError: none is set up, or it is down.
    """
    client = connect(home, settings)
    if client is None:
        raise LabelStudioError("no Label Studio is set up; start a local one with `relook label up`")
    return client

"""Connect to the Label Studio that the settings name, or to the local one of a RELOOK_HOME."""

from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio
from labeling.settings import LabelingSettings
from records.errors import ConfigError, LabelStudioError
from records.home import Home


def connect(home: Home, settings: LabelingSettings) -> LabelStudioClient | None:
    """Connect to `labeling.url`, or to the local server of a home if no URL is set.

    Returns None if no URL is set and no local server was ever started in this home. Raises ConfigError if a URL is set
    without a token, and LabelStudioError if the local server is down or the token cannot be used.
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
    """Connect as `connect` does, and raise LabelStudioError if no Label Studio is set up."""
    client = connect(home, settings)
    if client is None:
        raise LabelStudioError("no Label Studio is set up; start a local one with `relook label up`")
    return client

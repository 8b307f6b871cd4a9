"""Connect to the Label Studio that the settings name, or to the local one of a RELOOK_HOME."""

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

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


def connect_to(home: Home, settings: LabelingSettings, url: str, token_file: Path | None = None) -> LabelStudioClient:
    """Connect to the Label Studio at a URL that the caller names; no token goes to an address that it is not for.

    Args:
        home: its local Label Studio needs no token.
        settings: `labeling.url` and `labeling.token` belong together; a token without a URL is for any.
        url: base URL.
        token_file: file with the token, whose text is nothing else.
    Returns:
        The connection.
    Raises:
        ConfigError: the URL or the file cannot be used, or there is no token for this address.
        LabelStudioError: the token cannot be used.
    """
    try:
        address = urlsplit(url)
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        usable = False
    if not usable or address.username is not None or address.query or address.fragment:
        raise ConfigError(
            "--label-studio takes the base URL of a Label Studio, such as https://labels.example.org, without a user's "
            "name, password or query"
        )
    url = url.rstrip("/")
    if token_file is None:
        running = LocalLabelStudio(home, settings).status()
        if running is not None and running.url.rstrip("/") == url:
            return LabelStudioClient(running.url, running.token, timeout_s=settings.request_timeout_s)
        if settings.url is not None and settings.url.rstrip("/") != url and settings.token is not None:
            raise ConfigError(
                f"the token in RELOOK_LABELING__TOKEN is for labeling.url; give the token for {url} with --token-file"
            )
        if settings.token is None:
            raise ConfigError(f"there is no token for {url}; give it in RELOOK_LABELING__TOKEN or with --token-file")
        token = settings.token
    else:
        token = _token_in(token_file)
    # Its URL is its name: several may run on this machine, and only that of the home is called local.
    return LabelStudioClient(url, token, timeout_s=settings.request_timeout_s, server=url)


def _token_in(path: Path) -> SecretStr:
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"the token file {path} cannot be read ({reason})") from error
    if not token.isascii() or len(token.split()) != 1:
        raise ConfigError(f"the token file {path} has to hold one access token and nothing else")
    return SecretStr(token)


def require(home: Home, settings: LabelingSettings) -> LabelStudioClient:
    """Connect as `connect` does, and raise LabelStudioError if no Label Studio is set up."""
    client = connect(home, settings)
    if client is None:
        raise LabelStudioError("no Label Studio is set up; start a local one with `relook label up`")
    return client

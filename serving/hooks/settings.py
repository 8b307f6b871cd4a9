"""The settings of one outbound hook."""

import ipaddress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from records.settings import RoomSettings


class HookSettings(RoomSettings):
    """An address to which events of one organisation are sent."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="in messages, metrics and file names")
    url: str = Field(max_length=2000, description="https://HOST/PATH; http:// for private addresses only", repr=False)
    organisation: str = Field(min_length=1, max_length=200, description="whose events are sent")
    kinds: tuple[Literal["amended", "confirmed", "undecided", "overdue", "recalled"], ...] = Field(
        default=(), description="kinds of events that are sent; empty for all"
    )
    private: bool = Field(
        default=False, description="the host name may lead to an address of a private network; else it is refused"
    )
    secret_file: Path | None = Field(
        default=None, description="file with the secret that signs; default: keys/hook-NAME in home, made when needed"
    )

    @model_validator(mode="after")
    def _url_is_one_of_the_web(self) -> Self:
        try:
            parts, port = urlsplit(self.url), urlsplit(self.url).port
        except ValueError as error:
            raise ValueError("url is not a URL; write https://HOST/PATH") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not self.url.isprintable():
            raise ValueError("url is not a web address; write https://HOST/PATH")
        if parts.username is not None or parts.fragment:
            raise ValueError("url has a user or a fragment; leave both out, the signature says who sends")
        if parts.scheme == "http" and not (self.private or _is_private(parts.hostname)):
            raise ValueError("url is http; what leaves the private network needs https")
        return self


def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host == "localhost"

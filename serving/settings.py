"""The settings of the service: addresses, request limits, batching, triage and overlays.

Nothing is read from the environment here; the cluster room composes settings from their sources.
"""

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from records.types import Consent
from serving.hooks.settings import HookSettings
from serving.replicas import ReplicaSettings
from vision.explanations import STORED_OVERLAY_SIDE_PX

MULTIPART_OVERHEAD_BYTES = 100_000


class ServingSettings(ReplicaSettings):
    """Settings of HTTP, replicas, batching, triage and overlays."""

    host: str = Field(default="127.0.0.1", description="address to listen on; beyond loopback only once a key exists")
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port of API and page")
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file of the certificate with its chain, for TLS by the service itself; read again when it "
        "changes; null is HTTP",
    )
    tls_key: Path | None = Field(default=None, description="PEM file of the private key of tls_certificate")
    page: bool = Field(default=True, description="serve the web page at /")
    page_folder: Path | None = Field(
        default=None,
        description="folder below which the page keeps uploads for minutes; default: the system's temporary folder",
    )
    page_examples: Path | None = Field(
        default=None,
        description="folder of images that every visitor may see, CLASS.jpg or CLASS/any.jpg: the page's examples of "
        "classes that cannot be generated",
    )
    page_uploads_mb: float = Field(
        default=500.0, gt=0, le=100_000, description="uploads that the page keeps at a time, megabytes"
    )
    page_uploads_per_caller_mb: float = Field(
        default=100.0, gt=0, le=100_000, description="of these, uploads of one key, megabytes"
    )
    page_upload_life_s: float = Field(
        default=600.0, ge=10, le=86_400, description="when an upload of the page is deleted, seconds"
    )

    root_path: str = Field(
        default="", max_length=200, description="path below which a reverse proxy shows the service, such as /relook"
    )
    trusted_hosts: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="host names that requests may name, besides those of this machine; empty accepts every name where "
        "`host` is beyond loopback",
    )
    forwarded_allow_ips: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="addresses or networks of reverse proxies whose X-Forwarded headers are believed; with one, every "
        "request needs a key",
    )

    max_upload_mb: float = Field(default=20.0, gt=0, le=1024, description="largest request body, megabytes")
    max_json_kb: float = Field(default=64.0, gt=0, le=10_000, description="largest JSON body, kilobytes")
    max_bodies_mb: float = Field(
        default=512.0, gt=0, le=100_000, description="memory of all request bodies together, megabytes"
    )
    max_header_kb: float = Field(
        default=32.0, ge=1, le=1000, description="request line and headers of one request, kilobytes"
    )
    header_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="how long a request line with its headers may take, seconds"
    )
    min_upload_kb_s: float = Field(
        default=4.0, gt=0, le=10_000, description="least rate of a body over 10 seconds, kilobytes per second"
    )
    max_connections: int = Field(
        default=512, ge=8, le=100_000, description="open connections; one address may hold half of them"
    )
    max_megapixels: float = Field(default=50.0, gt=0, le=1000, description="largest image, millions of pixels")
    max_in_flight: int = Field(
        default=64,
        ge=1,
        le=100_000,
        description="images predicted at the same time; further requests get 429, and so do those of a key that holds "
        "more than twice what is left",
    )
    max_waiting: int = Field(
        default=64, ge=1, le=10_000, description="requests that wait for a review at a time; further ones get 429"
    )
    retry_after_s: int = Field(default=1, ge=1, le=3600, description="wait that a 429 or 503 asks for, seconds")

    max_explaining: int = Field(
        default=8, ge=1, le=10_000, description="heat maps computed at the same time; further requests get 429"
    )
    max_batch_images: int = Field(default=32, ge=1, le=1000, description="images of one batch request, at most")
    rate_limit_per_minute: int = Field(
        default=6000,
        ge=0,
        le=10_000_000,
        description="cost units that one API key may use a minute, one per request and image, "
        "more for large images and slow explanations; 0 is no limit",
    )

    max_batch_size: int = Field(default=16, ge=1, le=1024, description="images of one forward pass, at most")
    batch_wait_ms: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="how long a batch waits to fill, milliseconds; 0 takes what is in the queue",
    )
    decode_threads: int = Field(default=2, ge=1, le=64, description="threads that decode and store images")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="number format of the network; auto is bf16 where the hardware has it"
    )
    engine: Literal["torch", "openvino", "auto"] = Field(
        default="torch",
        description="what computes predictions; auto is openvino on CPUs where the extra is installed and equals torch",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where predictions are computed; auto is a CUDA device if there is one"
    )
    model_poll_s: float = Field(
        default=1.0, gt=0, le=60, description="how often a replica reads from the ledger which model serves, seconds"
    )
    start_timeout_s: float = Field(default=300.0, gt=0, le=3600, description="how long a start may take, seconds")

    low_confidence: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="a prediction whose largest probability is below this goes to review",
    )
    max_set_size: int = Field(default=2, ge=1, le=100, description="a prediction set with more classes goes to review")
    audit_share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="audit sampling probability of the surest images; up to 4 times that for others",
    )
    drift_false_alarm: float = Field(
        default=1e-5,
        gt=0,
        le=0.01,
        description="probability per image of a false alarm that a source has changed: within n images of a source at "
        "most n times this",
    )
    drift_sampling: float = Field(
        default=5.0, ge=1, le=100, description="factor of audit_share for a source that has changed, 1 to 100"
    )
    audit_salt: str = Field(default="audit", min_length=1, description="salt of the hash that draws the audit sample")
    urgent_due_h: float = Field(
        default=24.0, gt=0, le=8760, description="how soon an annotator should see an urgent image, hours"
    )
    default_consent: Consent = Field(
        default=Consent.TRAINING, description="consent of a request that names none: none, review, training or display"
    )
    keep: bool = Field(
        default=True,
        description="store predictions and images; false is for benchmarks, on loopback only: nothing can be read, "
        "flagged or explained afterwards, and nothing is reviewed",
    )
    hooks: tuple[HookSettings, ...] = Field(
        default=(), max_length=16, description="addresses to which events are sent; no request sets one"
    )
    overlay_side_px: int = Field(
        default=STORED_OVERLAY_SIDE_PX,
        ge=64,
        le=2048,
        description="side of drawn overlays, pixels; at 224 a JPEG of 450 rows is halved while it is decoded",
    )
    overlay_alpha: float = Field(default=0.6, ge=0, le=1, description="opacity of an overlay where the map is largest")

    @field_validator("host")
    @classmethod
    def _host_is_an_address(cls, value: str) -> str:
        if value != "localhost":
            try:
                ipaddress.ip_address(value)
            except ValueError as error:
                raise ValueError(f"{value!r} is not an IP address; use 127.0.0.1, ::1 or localhost") from error
        return value

    @field_validator("tls_certificate", "tls_key")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # Replicas run in other working folders.
        return None if value is None else Path(os.path.abspath(value.expanduser()))

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; set both, or neither")
        if self.tls_certificate is not None and self.http != "own":
            raise ValueError("tls_certificate is for the service's own listener; set http=own, or end TLS before it")
        return self

    @field_validator("root_path")
    @classmethod
    def _root_path_is_a_path(cls, value: str) -> str:
        if value and re.fullmatch(r"(/(?!\.+(/|$))[A-Za-z0-9._~-]+)+", value) is None:
            raise ValueError(f"{value!r} is not a path such as /relook: begin with a slash and end without one")
        return value

    @field_validator("trusted_hosts")
    @classmethod
    def _hosts_have_no_port(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if re.fullmatch(r"[A-Za-z0-9.-]+|\[?[0-9A-Fa-f:.]+\]?", host) is None:
                raise ValueError(f"{host!r} is not a host name such as relook.example.org, without a port")
        return tuple(host.strip("[]").lower() for host in value)

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _proxies_are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(
                    f"{network!r} is neither an address nor a network; write 127.0.0.1 or 10.0.0.0/8"
                ) from error
        return value

    @model_validator(mode="after")
    def _batch_fits_in_flight(self) -> Self:
        if self.max_batch_size > self.max_in_flight:
            raise ValueError(
                f"max_batch_size {self.max_batch_size} can never fill with max_in_flight {self.max_in_flight}; "
                "raise max_in_flight"
            )
        return self

    @field_validator("hooks")
    @classmethod
    def _hooks_have_names_of_their_own(cls, value: tuple[HookSettings, ...]) -> tuple[HookSettings, ...]:
        if len({hook.name for hook in value}) < len(value):
            raise ValueError("two hooks have one name; each needs its own, since its position is kept under it")
        return value

    @model_validator(mode="after")
    def _engine_has_its_device(self) -> Self:
        if self.engine == "openvino" and self.device == "cuda":
            raise ValueError("engine openvino computes on CPUs; set device=cpu, or engine=torch")
        return self

    @model_validator(mode="after")
    def _upload_fits_bodies(self) -> Self:
        if 2 * self.max_upload_mb > self.max_bodies_mb:
            raise ValueError(
                f"max_bodies_mb {self.max_bodies_mb:g} is too little for bodies of {self.max_upload_mb:g} MB; it must "
                "be at least twice max_upload_mb"
            )
        return self

    @model_validator(mode="after")
    def _keep_is_off_on_loopback_only(self) -> Self:
        if not self.keep and not self.is_loopback:
            raise ValueError("keep=false is for benchmarks on this machine; it needs a host on loopback")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    @property
    def is_proxied(self) -> bool:
        """Whether a reverse proxy is expected before the service."""
        return bool(self.root_path or self.trusted_hosts or self.forwarded_allow_ips)

    @property
    def max_upload_bytes(self) -> int:
        """Largest request body, bytes."""
        return int(self.max_upload_mb * 1e6)

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a request with an image, bytes: its form has boundaries and context, too."""
        return self.max_upload_bytes + MULTIPART_OVERHEAD_BYTES

    @property
    def max_json_bytes(self) -> int:
        """Largest JSON body, bytes."""
        return int(self.max_json_kb * 1000)

    @property
    def max_pixels(self) -> int:
        """Largest image, pixels."""
        return int(self.max_megapixels * 1e6)

    @property
    def url(self) -> str:
        """Where the service can be reached from this machine."""
        # Every address at once is none that a Host header should name.
        anywhere = self.host != "localhost" and ipaddress.ip_address(self.host).is_unspecified
        host = ("::1" if ":" in self.host else "127.0.0.1") if anywhere else self.host
        host = f"[{host}]" if ":" in host else host
        return f"{'http' if self.tls_certificate is None else 'https'}://{host}:{self.port}"


def compute_threads(cpus: float) -> int:
    """Return the number of compute threads for a number of CPUs: rounded up, at least one."""
    return max(1, math.ceil(cpus))

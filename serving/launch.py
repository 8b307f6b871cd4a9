"""Start and stop of the service on a running Ray.

In: settings. Out: a `ServiceHandle` with the address. Preconditions are checked before anything is started; if the
start fails, what was started is stopped again.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from records.errors import RelookError, UnavailableError, quoted_error
from records.home import open_home
from records.settings import RecordsSettings
from serving.access.keys import admin_token
from serving.client import Client
from serving.deployments import APPLICATION, build_application, proxy_options, serve_environment
from serving.preconditions import require_startable
from serving.replicas import require_room
from serving.settings import ServingSettings
from serving.tls import trust_of

__all__ = ["ServiceHandle", "require_startable", "run_service", "serve_environment", "start_service"]

_POLL_S = 0.1


@dataclass(frozen=True)
class ServiceHandle:
    """A running service at `url`."""

    url: str

    def stop(self) -> None:
        """Finish running requests, then stop the service and Ray Serve; Ray itself keeps running."""
        serve.delete(APPLICATION)
        _shut_down()


def start_service(settings: ServingSettings, records: RecordsSettings, **replaced: Any) -> ServiceHandle:
    """Start the service on the Ray that is initialised in this process, and wait until it is ready.

    Args:
        settings: of the service.
        records: its home and ledger.
        replaced: parts of the application, see `build_application`.
    Returns:
        The running service.
    Raises:
        ConfigError: a precondition fails, or the cluster has too little room for the replicas.
        UnknownIdError: no model was promoted.
        UnavailableError: the service is not ready in time; the message ends with the one of Ray Serve.
    """
    require_startable(settings, records)
    # Replicas run in other working folders, so a relative home would be another folder there.
    absolute = records.model_copy(update={"home": Path(os.path.abspath(records.home.expanduser()))})
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    require_room(settings, ray.cluster_resources())  # type: ignore[no-untyped-call]
    _start_serve(settings)
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    is_alone = sum(bool(each["Alive"]) for each in ray.nodes()) == 1  # type: ignore[no-untyped-call]
    application = build_application(settings, absolute, node, **{"one_machine": is_alone, **replaced})
    route = "/" if settings.http == "serve" else None
    target = serve.RunTarget(target=application, name=APPLICATION, route_prefix=route)
    try:
        # Serve waits without a limit; `_wait_until_ready` has one and reports why a deployment failed.
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_ready(settings, admin_token(open_home(absolute.home)))
    except BaseException:
        # KeyboardInterrupt, too: a start that is interrupted must not leave replicas behind.
        _shut_down()
        raise
    return ServiceHandle(settings.url)


@contextlib.contextmanager
def run_service(settings: ServingSettings, records: RecordsSettings, **replaced: Any) -> Iterator[ServiceHandle]:
    """Run the service for the length of a block; see `start_service`."""
    handle = start_service(settings, records, **replaced)
    try:
        yield handle
    finally:
        handle.stop()


def _start_serve(settings: ServingSettings) -> None:
    if settings.http == "own":
        # No HTTP proxies: the ingress listens itself.
        serve.start(proxy_location="Disabled")
        return
    serve.start(proxy_location="EveryNode", http_options=proxy_options(settings))


def _shut_down() -> None:
    serve.shutdown()  # type: ignore[no-untyped-call]


def _wait_until_ready(settings: ServingSettings, admin: str) -> None:
    deadline = time.monotonic() + settings.start_timeout_s
    detail = "no readiness check succeeded yet"
    # With the administrator's key, to which the service tells why it is not ready.
    with Client(settings.url, admin, timeout_s=5.0, retry_s=0.0, verify=trust_of(settings)) as client:
        while time.monotonic() < deadline:
            application = serve.status().applications.get(APPLICATION)
            if application is not None and application.status == "DEPLOY_FAILED":
                raise _why_not_started("the service did not start", application)
            if application is not None and application.status == "RUNNING":
                readiness = client.ready()
                if readiness.ready:
                    return
                detail = readiness.detail
            time.sleep(_POLL_S)
    application = serve.status().applications.get(APPLICATION)
    late = f"the service was not ready within {settings.start_timeout_s:g} s"
    raise _why_not_started(late, application, detail)


def _why_not_started(what: str, application: ApplicationStatusOverview | None, detail: str = "") -> RelookError:
    """Return a replica's own error, if it raised one of ours, else the end of what Ray Serve says."""
    # Serve's message about the application only names the deployments; why they failed is in theirs.
    parts = [d.message for d in application.deployments.values() if d.message] if application else []
    own = quoted_error("\n".join(parts))
    if own is not None:
        return type(own)(f"{what}: {own}")
    said = parts or ([application.message] if application and not detail else [])
    return UnavailableError(f"{what}: {_last_lines(' '.join(said[-1:])) or detail}")


def _last_lines(message: str) -> str:
    """Return the end of Ray Serve's message, where the error itself is."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[-2:])[-400:]

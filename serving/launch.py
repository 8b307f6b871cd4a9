"""Starting and stopping the service on a Ray that runs already.

In: settings. Out: a `ServiceHandle` with the address. What cannot work is said before anything is
started; what was started is stopped again.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve

from records.errors import UnavailableError
from records.settings import RecordsSettings
from serving.client import Client
from serving.deployments import APPLICATION, build_application, serve_environment
from serving.preconditions import require_startable
from serving.settings import ServingSettings

__all__ = ["ServiceHandle", "require_startable", "run_service", "serve_environment", "start_service"]

_POLL_S = 0.1


@dataclass(frozen=True)
class ServiceHandle:
    """A running service.

    Args:
        url: where it answers.
    """

    url: str

    def stop(self) -> None:
        """Finish what is under way, then stop the service and Ray Serve; Ray itself goes on."""
        serve.delete(APPLICATION)
        _shut_down()


def start_service(settings: ServingSettings, records: RecordsSettings) -> ServiceHandle:
    """Start the service on the Ray that is initialised in this process, and wait until it answers.

    Args:
        settings: of this room.
        records: where everything is kept.
    Returns:
        The running service.
    Raises:
        ConfigError: the port is in use.
        UnknownIdError: no model is to be served.
        UnavailableError: the service did not start in time; says what Ray Serve knows about it.
    """
    require_startable(settings, records)
    absolute = records.model_copy(update={"home": Path(os.path.abspath(records.home.expanduser()))})
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    application = build_application(settings, absolute, node)
    target = serve.RunTarget(target=application, name=APPLICATION, route_prefix=None)
    try:
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_ready(settings)
    except BaseException:
        _shut_down()
        raise
    return ServiceHandle(settings.url)


@contextlib.contextmanager
def run_service(settings: ServingSettings, records: RecordsSettings) -> Iterator[ServiceHandle]:
    """Run the service for the length of a block; see `start_service`."""
    handle = start_service(settings, records)
    try:
        yield handle
    finally:
        handle.stop()


def _shut_down() -> None:
    serve.shutdown()  # type: ignore[no-untyped-call]


def _wait_until_ready(settings: ServingSettings) -> None:
    deadline = time.monotonic() + settings.start_timeout_s
    detail = "it was not asked yet"
    with Client(settings.url, timeout_s=5.0, retry_s=0.0) as client:
        while time.monotonic() < deadline:
            application = serve.status().applications.get(APPLICATION)
            if application is not None and application.status == "DEPLOY_FAILED":
                raise UnavailableError(f"the service did not start: {_last_words(application.message)}")
            if application is not None and application.status == "RUNNING":
                readiness = client.ready()
                if readiness.ready:
                    return
                detail = readiness.detail
            time.sleep(_POLL_S)
    status = serve.status().applications.get(APPLICATION)
    words = "; ".join(d.message for d in status.deployments.values() if d.message) if status else ""
    raise UnavailableError(
        f"the service was not ready within {settings.start_timeout_s:g} s: {_last_words(words) or detail}"
    )


def _last_words(message: str) -> str:
    """Return the end of Ray Serve's message, where the error itself is."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[-2:])[-400:]

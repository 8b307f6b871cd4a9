"""The service as an application of Ray Serve that a cluster builds itself, from a file of `relook serve --config-out`.

In: the `args` of that file, and the environment of the cluster's nodes, which has the home, the ledger and every
secret. Out: the application. `serve deploy` and KubeRay's RayService import this module by its name.
"""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.sources import load_settings
from records.errors import ConfigError
from records.settings import first_problem
from serving.deployments import build_application
from serving.preconditions import require_servable
from serving.settings import ServingSettings


class Arguments(BaseModel):
    """The `args` of the file."""

    model_config = ConfigDict(extra="forbid")

    serving: dict[str, Any] = Field(default_factory=dict, description="settings of the service")


def build(args: Arguments) -> Any:
    """Return the application; Ray Serve calls this on a node of the cluster.

    Args:
        args: of the file.
    Returns:
        The application.
    Raises:
        ConfigError: a setting is wrong, or the service can be reached from outside while there is no key.
        UnknownIdError: no model was promoted.
        UnavailableError: the ledger cannot be reached.
    """
    settings = load_settings(environ=os.environ)
    given = {**settings.serving.model_dump(mode="json"), **args.serving, "http": "serve"}
    try:
        serving = ServingSettings.model_validate(given)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise ConfigError(f"args.serving.{field}: {reason}" if field else f"args.serving: {reason}") from error
    require_servable(serving, settings.records)
    return build_application(serving, settings.records, node=None)

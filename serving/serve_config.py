"""The service as a file for `serve deploy` and for KubeRay's RayService.

In: settings. Out: YAML of Ray's own schema. It holds settings of the service alone: home, ledger and secrets come from
the environment of the cluster's nodes, so the file can be kept in a repository.
"""

from typing import Any

import yaml

from serving.deployments import APPLICATION, proxy_options, serve_environment
from serving.settings import ServingSettings

BUILDER = "cluster.application:build"
_HEADER = """\
# Written by `relook serve --config-out`, for `serve deploy FILE` and for `serveConfigV2` of a RayService. Numbers of
# replicas and everything else are settings below `args.serving`; RELOOK_HOME, RELOOK_RECORDS__DATABASE and secrets come
# from the environment of the nodes.
"""


def serve_config(settings: ServingSettings) -> dict[str, Any]:
    """Return the configuration, with every setting that is not at its default."""
    changed = settings.model_dump(mode="json", exclude_defaults=True, exclude={"http"})
    return {
        "proxy_location": "EveryNode",
        "http_options": proxy_options(settings),
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": BUILDER,
                "runtime_env": {"env_vars": serve_environment()},
                "args": {"serving": changed},
            }
        ],
    }


def serve_config_text(settings: ServingSettings) -> str:
    """Return the configuration as YAML."""
    return _HEADER + yaml.safe_dump(serve_config(settings), sort_keys=False)

"""How many replicas there may be: what does not fit together, or into the cluster, is refused before a start."""

import warnings
from typing import Any

import pytest

from records.errors import ConfigError
from records.settings import RecordsSettings
from serving.replicas import require_room
from serving.settings import ServingSettings

with warnings.catch_warnings():
    # Ray Serve's own declarations are not clean under the newest pydantic.
    warnings.simplefilter("ignore")
    from serving.deployments import build_application


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"predictor_max_replicas": 4}, "ingress 0.5 + predictor 4 x 1 + explainer 0.5 = 5 CPUs, and the cluster has"),
        ({"explainer_max_replicas": 9}, "explainer 9 x 0.5 = 6 CPUs"),
        ({"predictor_gpus": 0.5, "predictor_max_replicas": 3}, "predictor 3 x 0.5 = 1.5 GPUs, and the cluster has 1"),
        ({"explainer_gpus": 1.0, "predictor_gpus": 0.25}, "predictor 0.25 + explainer 1 = 1.25 GPUs"),
    ],
)
def test_more_than_the_cluster_has_is_said_with_the_sum(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_room(ServingSettings(**given), {"CPU": 4.0, "GPU": 1.0})
    assert said in str(refused.value)
    require_room(ServingSettings(), {"CPU": 4.0})


@pytest.mark.parametrize(
    "given",
    [
        {"predictor_min_replicas": 3, "predictor_max_replicas": 2},
        {"explainer_min_replicas": 2},
        {"ingress_max_replicas": 2},
        {"predictor_max_replicas": 0},
        {"predictor_gpus": 1.5},
    ],
)
def test_numbers_of_replicas_that_do_not_fit_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"replicas|gpus"):
        ServingSettings(**given)


@pytest.mark.parametrize("http", ["own", "serve"])
def test_serve_accepts_the_numbers_of_replicas_without_a_warning(tmp_path: Any, http: Any) -> None:
    most = 1 if http == "own" else 4
    settings = ServingSettings(
        http=http, predictor_max_replicas=4, explainer_max_replicas=2, ingress_max_replicas=most, scale_up_delay_s=0.5,
        predictor_gpus=0.5,
    )  # fmt: skip
    build_application(settings, RecordsSettings(home=tmp_path), "127.0.0.1")

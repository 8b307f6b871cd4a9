"""The RayService of the Kubernetes files: fields that KubeRay publishes, settings that Ray takes, closed pods."""

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from serving.settings import ServingSettings

with warnings.catch_warnings():
    # Ray Serve's own declarations are not clean under the newest pydantic.
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

    from serving.serve_config import serve_config

KUBERNETES = Path(__file__).resolve().parents[2] / "cluster" / "deploy" / "kubernetes"
FOLDER = KUBERNETES / "ray_service"


@cache
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "ray_service.yaml").read_text()))


def ray_service() -> dict[str, Any]:
    return copy.deepcopy(documents()[0])


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    spec = ray_service()["spec"]["rayClusterConfig"]
    for name, group in [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]:
        yield name, group["template"]


def fields() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "kuberay_service_fields.yaml").read_text())
    of_cluster = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
    found["properties"]["spec"]["properties"]["rayClusterConfig"] = of_cluster["properties"]["spec"]
    return found | {"$defs": of_cluster["$defs"]}


def test_it_has_the_fields_that_kuberay_publishes() -> None:
    validator = jsonschema.validators.Draft202012Validator
    validator.check_schema(fields())
    jsonschema.validate(ray_service(), fields(), cls=validator)
    spoilt = ray_service()
    spoilt["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(spoilt, fields(), cls=validator)
    spoilt = ray_service()
    spoilt["spec"]["serveConfig"] = "applications: []"
    with pytest.raises(jsonschema.ValidationError, match="serveConfig"):
        jsonschema.validate(spoilt, fields(), cls=validator)


def test_its_configuration_is_what_the_verb_writes_for_its_settings() -> None:
    written = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(written)
    given = parsed.applications[0].args["serving"]
    settings = ServingSettings(http="serve", **given)
    assert serve_config(settings) == written
    # One node of the group holds at least one replica of each part, and all groups hold all of them.
    (group,) = (g for g in ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "cpu")
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert settings.needed_cpus <= cpus * group["maxReplicas"]


def test_its_pods_fit_the_schemas_of_kubernetes_and_are_closed() -> None:
    for name, template in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        assert template["spec"]["securityContext"]["runAsNonRoot"], name
        assert template["spec"]["automountServiceAccountToken"] is (name == "head")
        (container,) = template["spec"]["containers"]
        rights = container["securityContext"]
        assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
        assert rights["capabilities"] == {"drop": ["ALL"]}
    for document in documents()[1:]:
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_the_component_replaces_objects_that_exist_and_lets_the_ingress_in() -> None:
    component = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    base = [found for name in names for found in yaml.safe_load_all((KUBERNETES / name).read_text())]
    known = {(found["kind"], found["metadata"]["name"]): found for found in base}
    assert component["resources"] == ["ray_service.yaml"]
    deletions, (ingress,) = component["patches"][:-1], component["patches"][-1:]
    for patch in deletions:
        removed = yaml.safe_load(patch["patch"])
        assert removed["$patch"] == "delete"
        assert (removed["kind"], removed["metadata"]["name"]) in known
    target = known[ingress["target"]["kind"], ingress["target"]["name"]]
    (change,) = yaml.safe_load(ingress["patch"])
    assert target["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"] == "service"
    assert change["path"] == "/spec/rules/0/http/paths/0/backend/service"
    # KubeRay names its Service after the RayService.
    assert change["value"] == {"name": f"{ray_service()['metadata']['name']}-serve-svc", "port": {"number": 8000}}
    policy = known["NetworkPolicy", "ingress-to-service"]["spec"]
    for name, template in pods():
        labels = template.get("metadata", {}).get("labels", {})
        assert (labels == policy["podSelector"]["matchLabels"]) is (name != "head")

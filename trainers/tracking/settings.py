"""The settings of tracking: which MLflow gets runs and models."""

import re

from pydantic import Field, field_validator

from records.settings import RoomSettings

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")


class TrackingSettings(RoomSettings):
    """Where runs are tracked, beside the event files for TensorBoard in every run's folder."""

    mlflow_uri: str | None = Field(
        default=None,
        description="tracking URI of MLflow, http://HOST:PORT or sqlite:////FILE; train, tune, evaluate, round and "
        "promotions are recorded there; null is none",
        repr=False,
    )
    mlflow_experiment: str = Field(default="relook", min_length=1, max_length=200, description="experiment of the runs")
    mlflow_model: str = Field(
        default="relook",
        pattern=r"^[^/:]{1,200}$",
        description="registered model whose versions are the bundles, with the aliases champion and candidate",
    )

    @field_validator("mlflow_uri")
    @classmethod
    def _is_a_uri(cls, uri: str | None) -> str | None:
        if uri is None or uri == "databricks":
            return uri
        scheme = re.match(r"([a-z]+)(?:\+\w+)?:", uri)
        if scheme is None or scheme[1] not in _SCHEMES or re.search(r"\s", uri):
            raise ValueError(f"it is no tracking URI; give one such as http://mlflow:5000, by {', '.join(_SCHEMES)}")
        return uri

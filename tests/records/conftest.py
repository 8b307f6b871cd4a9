"""Samples that the tests of the records room share: one record of every type, labelled images, a small bundle."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from pydantic import AwareDatetime

import records
from records.bundles import Architecture, BundleDocument, Calibration, Geometry
from records.ids import sha256_hex
from records.ledger import Ledger, open_ledger
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Confirmation, Consent, Group, Image, Record, SourceLabel
from records.types.base import field_type

NOON = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)


def _value(annotation: Any, name: str, number: int) -> Any:
    plain, _ = field_type(annotation)
    if plain is AwareDatetime:
        return NOON + timedelta(seconds=number)
    if isinstance(plain, type) and issubclass(plain, StrEnum):
        return list(plain)[number % len(plain)]
    if get_origin(plain) is list:
        return [_value(get_args(plain)[0], name, number)]
    if get_origin(plain) is dict:
        return {"b": 0.25, "a": 0.5} if name == "probabilities" else {"ü": "x", "a": 1.5, "none": None}
    if plain is str:
        return sha256_hex(f"{name} {number}".encode()) if name in ("id", "image_id") else f"{name} {number} ü"
    return {int: number + 1, float: 0.25, bool: True}[plain]


@pytest.fixture(scope="session")
def sample() -> Callable[..., Any]:
    """Make a record of a type with every field filled; a number tells several apart."""

    def make(record_type: type[Record], number: int = 0, **changes: Any) -> Record:
        values = {
            name: _value(info.annotation, name, number)
            for name, info in record_type.model_fields.items()
            if name not in changes
        }
        return record_type.model_validate(values | changes)

    return make


@pytest.fixture
def ledger(tmp_path: Path, migrated: Path) -> Iterator[Ledger]:
    """An empty ledger of its own."""
    shutil.copy(migrated, tmp_path / "ledger.db")
    opened = open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield opened
    opened.close()


@pytest.fixture
def new_store(tmp_path: Path) -> Callable[[str], AbstractContextManager[Store]]:
    """Open a store in a home of the given name."""

    @contextmanager
    def make(name: str, **settings: Any) -> Iterator[Store]:
        opened = open_store(RecordsSettings(home=tmp_path / name, **settings))
        yield opened
        opened.close()

    return make


@pytest.fixture
def run_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another Python process that can import the rooms; none outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        root = Path(records.__file__).parents[1]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:
            pass


@pytest.fixture(scope="session")
def image_id() -> Callable[[object], str]:
    """Return the image id that belongs to a short name."""
    return lambda name: sha256_hex(f"image {name}".encode())


@pytest.fixture(scope="session")
def add_labelled(image_id: Callable[[object], str]) -> Callable[..., None]:
    """Enter images, each in a group of its own unless `group` names one, with a label unless it is None."""

    def add(
        store: Store,
        names: Sequence[object],
        label: str | None = "nv",
        *,
        confirmation: Confirmation = Confirmation.SINGLE_READER,
        source: str = "import:1",
        group: str | None = None,
        **image: Any,
    ) -> None:
        with store.ledger.begin() as tx:
            for name in names:
                content = image_id(name)
                group_id = group or sha256_hex(f"group {name}".encode())[:16]
                if tx.get(Group, group_id) is None:
                    tx.add(Group(id=group_id, created_at=NOON))
                values = {"consent": Consent.TRAINING, "group_id": group_id} | image
                tx.add(
                    Image(
                        id=content,
                        uri="file:///none",
                        format="jpeg",
                        width_px=600,
                        height_px=450,
                        provenance=source,
                        created_at=NOON,
                        **values,
                    )
                )
                if label is not None:
                    tx.add(
                        SourceLabel(
                            id=f"{source} {content}",
                            image_id=content,
                            label=label,
                            confirmation=confirmation,
                            source=source,
                            created_at=NOON,
                        )
                    )

    return add


@pytest.fixture
def document(store: Store) -> BundleDocument:
    """bundle.json of a model that does not exist."""
    codes = store.taxonomy.codes
    return BundleDocument(
        taxonomy=store.taxonomy,
        taxonomy_hash=store.taxonomy.hash,
        architecture=Architecture(name="custom_cnn", options={"width": 8}),
        geometry=Geometry(side_px=8),
        class_priors=dict.fromkeys(codes, 1 / len(codes)),
        calibration=Calibration(temperature=1.5, bias=[0.0] * len(codes)),
        dataset_id="d" * 64,
        config={"epochs": 1},
        code_version="0.1.0",
        num_threads=1,
    )


@pytest.fixture(scope="session")
def arrays() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Weights (a matrix, a transposed view, a scalar counter) and golden values."""
    rng = np.random.default_rng(7)
    matrix = rng.normal(size=(7, 5)).astype(np.float32)
    return {
        "weights": {"head.weight": matrix, "head.transposed": matrix.T, "bn.num_batches_tracked": np.array(3)},
        "golden": {
            "inputs": rng.integers(0, 256, size=(2, 8, 8, 3), dtype=np.uint8),
            "logits": rng.normal(size=(2, 7)).astype(np.float32),
        },
    }

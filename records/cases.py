"""Confirmed cases of a bundle: images that may be shown beside its predictions, by how alike they are.

`cases.safetensors` lies in the folder of a bundle and holds, for each image of the train split whose diagnosis is
confirmed and whose consent allows display, its id, class, the rank of its label and a vector. Like the report it is not
part of the bundle's id: an erasure takes rows out of it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from records.arrays import Float32Array, IntArray
from records.durable import write_file
from records.errors import ContractError, IntegrityError

FILE = "cases.safetensors"
CONFIRMED_RANK = 1
"""Largest rank of a label that counts as confirmed: histopathology, confocal microscopy or follow-up."""
MAX_CASES = 100_000
"""Cases of a bundle, at most: they are compared one by one."""
_ID_BYTES = 32


@dataclass(frozen=True)
class Cases:
    """N images with confirmed diagnoses."""

    image_ids: tuple[str, ...]
    classes: IntArray
    """[N] in the order of the bundle's taxonomy"""
    ranks: IntArray
    """[N] ranks of the labels, 0 is histopathology"""
    vectors: Float32Array
    """[N, D], as the bundle compares features"""

    def take(self, rows: NDArray[Any]) -> "Cases":
        """Return some of them, by number or mask."""
        ids = np.array(self.image_ids, dtype=object)[rows]
        return Cases(tuple(ids.tolist()), self.classes[rows], self.ranks[rows], self.vectors[rows])


def write_cases(folder: Path, cases: Cases) -> None:
    """Write the cases of a bundle over those before; without any there is no file.

    Args:
        folder: of the bundle.
        cases: at most `MAX_CASES`.
    Raises:
        ContractError: too many, or a vector that is not finite.
        UnavailableError: the file cannot be written.
    """
    if len(cases.image_ids) > MAX_CASES or not np.isfinite(cases.vectors).all():
        raise ContractError(f"a bundle has at most {MAX_CASES} confirmed cases, and their vectors are finite")
    if not cases.image_ids:
        (folder / FILE).unlink(missing_ok=True)
        return
    ids = np.frombuffer(b"".join(map(bytes.fromhex, cases.image_ids)), dtype=np.uint8).reshape(-1, _ID_BYTES)
    arrays: dict[str, NDArray[Any]] = {
        "ids": ids,
        "classes": cases.classes.astype(np.int64),
        "ranks": cases.ranks.astype(np.int64),
        "vectors": np.ascontiguousarray(cases.vectors, dtype=np.float32),
    }
    write_file(folder / FILE, save(arrays))


def read_cases(folder: Path) -> Cases | None:
    """Return the cases of a bundle; None if it has none.

    IntegrityError is raised if the file cannot be read, or holds something else.
    """
    try:
        arrays = load((folder / FILE).read_bytes())
        ids, vectors = arrays["ids"], arrays["vectors"]
        count = len(ids)
        if ids.shape[1:] != (_ID_BYTES,) or {len(array) for array in arrays.values()} != {count} or vectors.ndim != 2:
            raise ValueError("its arrays do not belong together")
        names = tuple(row.tobytes().hex() for row in ids)
        return Cases(names, arrays["classes"], arrays["ranks"], vectors)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(
            f"the confirmed cases in {folder / FILE} cannot be read ({error}); delete the file: predictions go on "
            "without them"
        ) from error


def remove_cases(folder: Path, image_ids: Collection[str]) -> int:
    """Take images out of the cases of a bundle and return how many were there."""
    cases = read_cases(folder)
    if cases is None:
        return 0
    kept = np.array([image_id not in image_ids for image_id in cases.image_ids], dtype=bool)
    if not kept.all():
        write_cases(folder, cases.take(kept))
    return int((~kept).sum())

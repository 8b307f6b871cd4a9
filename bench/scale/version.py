"""Time and memory of a dataset version of a million images.

The ledger is filled with synthetic rows (an image, its group and its label each); image files do not exist and are not
read. The version is built twice in a process whose largest resident memory is reported: first with every split still
to be drawn, then with all of them drawn and one label changed.

    python -m bench.scale.version [--images 1000000] [--postgres]
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.drills.demo_on_postgres import postgres
from records.datasets import build_version, load_dataset
from records.ids import sha256_hex, utc_now
from records.ledger.tables import TABLES
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Confirmation, Consent, Group, Image, Record, ResolvedLabel, SourceLabel

AIM_S, AIM_AGAIN_S, AIM_MB = 60.0, 5.0, 2000.0
SHARES = {"nv": 0.67, "mel": 0.11, "bkl": 0.11, "bcc": 0.05, "akiec": 0.03, "vasc": 0.015, "df": 0.015}
"""Of the classes, as in HAM10000."""
ROWS_AT_ONCE = 20_000


def image(number: int) -> str:
    """Return the id of a synthetic image."""
    return sha256_hex(f"image {number}".encode())


def label_of(number: int) -> str:
    """Return the label of a synthetic image."""
    fraction, upper = (number * 7919 % 1000) / 1000, 0.0
    for code, share in SHARES.items():
        upper += share
        if fraction < upper:
            return code
    return "nv"


def fill(store: Store, images: int) -> None:
    """Write images, groups and labels, in parts; every group has one image, or two for a third of them."""
    now = utc_now()
    for start in range(0, images, ROWS_AT_ONCE):
        rows: dict[type[Record], list[dict[str, Any]]] = {Image: [], Group: [], SourceLabel: []}
        for number in range(start, min(start + ROWS_AT_ONCE, images)):
            image_id, second = image(number), number % 4 == 3
            group_id = image(number - second)[:16]
            rows[Image].append(
                {
                    "id": image_id,
                    "source_id": f"ISIC_{number:08d}",
                    "uri": f"file:///images/ISIC_{number:08d}.jpg",
                    "format": "jpeg",
                    "width_px": 600,
                    "height_px": 450,
                    "lesion_id": f"HAM_{number - second:07d}",
                    "provenance": "import:bench",
                    "consent": Consent.TRAINING.value,
                    "group_id": group_id,
                    "perceptual_hash": image_id[:16],
                    "created_at": now,
                }
            )
            if not second:
                rows[Group].append({"id": group_id, "created_at": now})
            rows[SourceLabel].append(
                {
                    "id": image_id[:32],
                    "image_id": image_id,
                    "label": label_of(number),
                    "confirmation": Confirmation.HISTOPATHOLOGY.value,
                    "source": "import:bench",
                    "created_at": now,
                }
            )
        with store.ledger.begin() as tx:
            for record_type, values in rows.items():
                tx.connection.execute(sa.insert(TABLES[record_type]), values)


def build(settings: RecordsSettings) -> dict[str, Any]:
    """Build the version, build one that differs by an annotator's label, and load it; return times and memory."""
    with closing(open_store(settings)) as store:
        began, cpu = time.perf_counter(), time.process_time()
        first = build_version(store).version
        built, first_cpu = time.perf_counter(), time.process_time()
        # Of the audit sample, so that it counts in whatever split its image is.
        said = {"confirmation": Confirmation.HISTOPATHOLOGY, "annotators": ["a"], "from_audit_sample": True}
        newest = [ResolvedLabel.model_validate({"image_id": image(0), "label": "df", **said})]
        second = build_version(store, resolved=newest, round_number=1, parent_id=first.id).version
        again, again_cpu = time.perf_counter(), time.process_time()
        loaded = load_dataset(store, second.id)
        return {
            "images": loaded.num_images,
            "groups": loaded.num_groups,
            "splits": {str(split): int(count) for split, count in loaded.rows["split"].value_counts().items()},
            "first_s": round(built - began, 1),
            "first_cpu_s": round(first_cpu - cpu, 1),
            "again_s": round(again - built, 1),
            "again_cpu_s": round(again_cpu - first_cpu, 1),
            "load_s": round(time.perf_counter() - again, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "manifest_mb": round((store.home.datasets / second.id / "manifest.parquet").stat().st_size / 1e6),
        }


def main() -> int:
    """Print one JSON object; 1 if an image is missing from the version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--postgres", action="store_true", help="keep the ledger in a PostgreSQL; default: SQLite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-scale-") as scratch, ExitStack() as stack:
        os.chmod(scratch, 0o755)
        database = stack.enter_context(postgres(Path(scratch) / "postgres")) if options.postgres else None
        settings = RecordsSettings(home=Path(scratch) / "home", database=database)
        began = time.perf_counter()
        with closing(open_store(settings)) as store:
            fill(store, options.images)
        filled_s = time.perf_counter() - began
        with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
            figures = pool.submit(build, settings).result()
    figures = {
        "ledger": "PostgreSQL" if options.postgres else "SQLite",
        "fill_s": round(filled_s, 1),
        **figures,
        "aim_s": AIM_S,
        "aim_again_s": AIM_AGAIN_S,
        "aim_mb": AIM_MB,
        "held": figures["first_s"] < AIM_S and figures["again_s"] < AIM_AGAIN_S and figures["peak_mb"] < AIM_MB,
        "load": os.getloadavg(),
    }
    print(json.dumps(figures, indent=2))
    return 1 if figures["images"] != options.images else 0


if __name__ == "__main__":
    sys.exit(main())

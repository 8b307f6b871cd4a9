"""Cost of a round without tuning, fitting and evaluating, on a folder of images and a real Label Studio.

A folder is imported with a share of its labels withheld, and two rounds run in this process. Fitting is shortened (one
epoch on few images, no search) and runs without Ray, so Ray's start is not in the figures. Between the rounds a
simulated annotator labels the tasks of the first, so the second pulls them, builds a new version and compares its
model with a champion.

    python -m bench.scale.round IMAGES [--model custom_cnn] [--side 32]
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from cluster.round import run_round
from cluster.settings import RoundSettings, Settings
from images.importer import import_folder
from labeling.connection import require
from labeling.local_server import LocalLabelStudio
from labeling.settings import LabelingSettings
from labeling.simulated_annotator import annotate
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import RoundRecord, RoundStep
from trainers.settings import ModelSettings, TrainersSettings

AIM_S = 60.0
NOT_COUNTED = ("tune", "fit", "evaluate")


def last_round(store: Store) -> dict[str, Any]:
    """Return the duration of the newest round by its own records and its overhead, seconds."""
    with store.ledger.read() as tx:
        record = tx.find(RoundRecord, order_by=("-number",), limit=1)[0]
        steps = tx.find(RoundStep, where={"round_id": record.id}, order_by=("started_at",))
    seconds = {step.step: (step.finished_at - step.started_at).total_seconds() for step in steps}
    counted_out = sum(seconds[name] for name in NOT_COUNTED)
    assert record.finished_at is not None
    whole = (record.finished_at - record.started_at).total_seconds()
    results = {step.step: step.result for step in steps}
    return {
        "round": record.number,
        "images": results["version"]["images"],
        "labels_from_annotators": results["version"]["labels_from_annotators"],
        "verdict": record.verdict,
        "selected": results["select"]["selected"],
        "pushed": results["push"]["pushed"],
        "steps_s": {name: round(value, 2) for name, value in seconds.items()},
        "overhead_s": round(whole - counted_out, 2),
    }


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with images and a table")
    parser.add_argument("--model", default="custom_cnn")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=640)
    options = parser.parse_args()
    trainers = TrainersSettings(
        model=ModelSettings(name=options.model, side_px=options.side),
        max_train_images=options.train_images,
        epochs=1,
        augmentation="flips",
    )
    rounds = []
    with tempfile.TemporaryDirectory(prefix="relook-scale-") as scratch:
        records, labeling = RecordsSettings(home=Path(scratch) / "home"), LabelingSettings(port=0)
        settings = Settings(
            records=records, labeling=labeling, trainers=trainers, round=RoundSettings(tune="never", select_budget=40)
        )
        with closing(open_store(records)) as store:
            report = import_folder(store, options.images, withhold_share=0.15, frames=(Frame(options.side),))
            truth = dict(zip(report.withheld["image_id"], report.withheld["label"], strict=True))
            server = LocalLabelStudio(store.home, labeling)
            server.up()
            try:
                for _ in range(options.rounds):
                    run_round(store, settings, started_by="bench")
                    rounds.append(last_round(store))
                    with require(store.home, labeling) as client:
                        rounds[-1]["answered"] = len(annotate(client, store, truth))
            finally:
                server.down()
    worst = max(one["overhead_s"] for one in rounds)
    print(
        json.dumps(
            {
                "images": report.images,
                "withheld": len(truth),
                "aim_s": AIM_S,
                "overhead_s": worst,
                "held": worst < AIM_S,
                "rounds": rounds,
                "load": os.getloadavg(),
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training scripts without Relook as peers: a plain fp32 PyTorch script, and the same recipe in Lightning.

Both are scripts under `bench/` of a working copy; they use none of Relook's code and read JPEG files that a table
names. Lightning needs an environment of its own, because it pins its own dependencies.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bench.train.raw import precision_of
from records.store import Store, find_images
from trainers.fitting.training_data import DataPlan
from trainers.settings import TrainersSettings

SCRIPTS = Path(__file__).resolve().parent
KNOWN_MODELS = ("custom_cnn", "resnet18", "efficientnet_lite0")
PEER_S = 15.0
FEWEST_STEPS, MOST_STEPS = 8, 80
TIMEOUT_S = 900


class Peers:
    """The peers of one measurement.

    Args:
        store: whose images were imported in place.
        settings: model, side and batch.
        plan: the images.
        folder: for the table.
        rate: images per second to expect at most; decides how many steps a peer takes.
    """

    def __init__(
        self, store: Store, settings: TrainersSettings, plan: DataPlan, folder: Path, rate: float = 0.0
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._settings = settings
        self._steps = min(MOST_STEPS, max(FEWEST_STEPS, round(rate * PEER_S / settings.images_per_step)))
        self._table = folder / "table.csv"
        self._write_table(store, plan)

    def plain_rate(self) -> float | None:
        """Return the plain script's images per second; None if it cannot run, with a reason."""
        return self._rate("pipeline_over_plain_fp32", "plain_script.py", sys.executable, [])

    def lightning_rate(self, peers: Path | None) -> float | None:
        """Return Lightning's images per second; None if it cannot run, with a reason.

        Args:
            peers: folder of the peers' environments, made by bench/peers/install.py.
        Returns:
            Images per second.
        """
        key = "pipeline_over_lightning"
        python = None if peers is None else peers / "lightning" / "bin" / "python"
        if python is None or not python.is_file():
            self.reasons[key] = "Lightning is not measured unless --peers names the folder of bench/peers/install.py"
            return None
        return self._rate(key, "lightning_script.py", str(python), ["--precision", precision_of(self._settings)])

    def _rate(self, key: str, script: str, python: str, more: list[str]) -> float | None:
        settings = self._settings
        if not (SCRIPTS / script).is_file():
            self.reasons[key] = f"bench/train/{script} is part of a working copy, and this is none"
            return None
        if settings.model.name not in KNOWN_MODELS:
            self.reasons[key] = f"bench/train/{script} knows {', '.join(KNOWN_MODELS)}, not {settings.model.name}"
            return None
        command = [python, str(SCRIPTS / script), str(self._table), "--model", settings.model.name]
        command += [
            "--side",
            str(settings.model.side_px),
            "--batch",
            str(settings.images_per_step),
            "--max-steps",
            str(self._steps),
        ]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "RAY_"))}
        try:
            done = subprocess.run(
                [*command, *more], env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self.reasons[key] = f"bench/train/{script} did not run ({type(error).__name__})"
            return None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            self.reasons[key] = f"bench/train/{script} failed: {last[:200]}"
            return None
        return float(json.loads(done.stdout.strip().splitlines()[-1])["images_s"])

    def _write_table(self, store: Store, plan: DataPlan) -> None:
        images = find_images(store, plan.image_ids)
        with self._table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            for row, image in enumerate(images):
                split = "train" if row < plan.num_train else "val"
                label = store.taxonomy.codes[int(plan.labels[row])]
                writer.writerow([unquote(urlsplit(image.uri).path), label, split])

"""Write the split of every image of a dataset version, for scripts that do not use Relook.

.venv/bin/python -m bench.train.splits DATASET_ID IMAGES_DIR > splits.csv
"""

import argparse
import csv
import os
import sys
from contextlib import closing
from pathlib import Path

from records.datasets import load_dataset
from records.settings import RecordsSettings
from records.store import find_images, open_store


def main() -> None:
    """Print a table with the columns path, label, split; the home is the one that RELOOK_HOME names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("images", type=Path, help="folder that the dataset was imported from")
    options = parser.parse_args()
    paths = {path.stem: path for path in options.images.rglob("*.jpg")}
    with closing(open_store(RecordsSettings(home=Path(os.environ.get("RELOOK_HOME", ".relook"))))) as store:
        rows = load_dataset(store, options.dataset).rows
        images = find_images(store, [str(image_id) for image_id in rows["image_id"]])
    writer = csv.writer(sys.stdout)
    writer.writerow(["path", "label", "split"])
    for image, label, split in zip(images, rows["label"], rows["split"], strict=True):
        writer.writerow([paths[str(image.source_id)], label, split])


if __name__ == "__main__":
    main()

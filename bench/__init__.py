"""Measurements and long drills. They are not part of the product and are not installed."""

import os
from pathlib import Path

# Ray's workers do not have the working folder on their import path, so they are told where this package is.
_ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))

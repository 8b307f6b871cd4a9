"""Type aliases of arrays that several rooms use; shapes are documented where the arrays are used."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
UInt8Array = NDArray[np.uint8]
"""Pixels: red, green, blue in the last axis, 0 to 255."""

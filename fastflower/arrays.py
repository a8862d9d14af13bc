"""Types of NumPy arrays by what they hold, for annotations; shapes are in the docstrings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]  # pixels, or the bytes of a file
Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Bools = NDArray[np.bool_]
Strings = NDArray[np.str_]

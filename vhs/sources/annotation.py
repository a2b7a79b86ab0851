"""One label file of a key-point tree: the six points of an image and its VHS, as DogHeart and the VHSMarker tool store them.

.mat    MATLAB 5: `six_points` 6x2, original-image pixels, x then y, A B C D E F; `VHS` 1x1; double or single precision
.json   the same keys; `six_points` a list of pairs, or PA ... PF -> pair
"""

from __future__ import annotations

import io
import json

from vhs.contained import Contained, Died
from vhs.measure import View
from vhs.sources.source import LABEL_BYTES, faulty_points

SUFFIXES = (".mat", ".json")


def read(data: bytes, name: str, view: View, contained: Contained) -> dict:
    """The bytes of a label file -> {"points", "index"} as Source has them, or {"reject": reason}. A .mat is read in `contained`."""
    if len(data) > LABEL_BYTES:
        return {"reject": f"{name} is longer than the {LABEL_BYTES} bytes that a label may have"}
    try:
        points, stated = contained.call(mat, data) if name.lower().endswith(".mat") else _json(data)
        if points is None and stated is None:
            return {"reject": f"{name} holds neither six_points nor VHS"}
        if isinstance(points, dict):
            points = [points[f"P{letter}"] for letter in view.points]
        points = None if points is None else tuple((float(x), float(y)) for x, y in points)
        index = None if stated is None else _scalar(stated)
    except NotImplementedError:
        return {"reject": f"{name} is a MATLAB 7.3 file: save it with -v7"}
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, MemoryError, Died) as error:
        return {"reject": f"damaged label {name} ({error.__class__.__name__}: {error})"}
    if points is not None and (fault := faulty_points(points, view)):
        return {"reject": fault}
    return {"points": points, "index": index}


def mat(data: bytes) -> tuple[list | None, list | None]:
    """-> (six_points, VHS) of a MATLAB 5 file. ValueError for a damaged one, NotImplementedError for one of MATLAB 7.3."""
    import numpy as np
    from scipy.io import loadmat

    wanted = ("six_points", "VHS")
    try:
        content = loadmat(io.BytesIO(data), variable_names=wanted, chars_as_strings=False)
        points, stated = (np.asarray(content[name], float).tolist() if name in content else None for name in wanted)
        return points, stated
    except NotImplementedError:
        raise
    except Exception as error:  # for damaged bytes loadmat raises ValueError, TypeError, struct.error, MatReadError, zlib.error ...
        raise ValueError(f"{error.__class__.__name__}: {error}") from None


def _json(data: bytes) -> tuple:
    content = json.loads(data)
    return content.get("six_points"), content.get("VHS")


def _scalar(value) -> float:
    while hasattr(value, "__len__"):  # 1x1
        (value,) = value
    return float(value)

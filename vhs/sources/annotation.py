"""One label file of a key-point tree: the six points of an image and its VHS, as DogHeart and the VHSMarker tool store them.

.mat    MATLAB 5: `six_points` 6x2, original-image pixels, x then y, A B C D E F; `VHS` 1x1; double or single precision
.json   the same keys; `six_points` a list of pairs, or PA ... PF -> pair
"""

from __future__ import annotations

import json
from pathlib import Path

from vhs.measure import View
from vhs.sources.source import faulty_points

SUFFIXES = (".mat", ".json")


def read(file: Path, view: View) -> dict:
    """-> {"points", "index"} as Source has them, or {"reject": reason}."""
    try:
        content = _mat(file) if file.suffix.lower() == ".mat" else json.loads(file.read_bytes())
        points, stated = content.get("six_points"), content.get("VHS")
        if points is None and stated is None:
            return {"reject": f"{file.name} holds neither six_points nor VHS"}
        if isinstance(points, dict):
            points = [points[f"P{name}"] for name in view.points]
        points = None if points is None else tuple((float(x), float(y)) for x, y in points)
        index = None if stated is None else _scalar(stated)
    except OSError:
        raise  # a file that is there and cannot be read now is no reject: it may be back tomorrow
    except NotImplementedError:
        return {"reject": f"{file.name} is a MATLAB 7.3 file: save it with -v7"}
    except Exception as error:  # loadmat raises ValueError, TypeError, struct.error, MatReadError ... for damaged bytes
        return {"reject": f"damaged label {file.name} ({error.__class__.__name__}: {error})"}
    if points is not None and (fault := faulty_points(points, view)):
        return {"reject": fault}
    return {"points": points, "index": index}


def _mat(file: Path) -> dict:
    from scipy.io import loadmat

    return loadmat(file, variable_names=("six_points", "VHS"), chars_as_strings=False)


def _scalar(value) -> float:
    while hasattr(value, "__len__"):  # 1x1
        (value,) = value
    return float(value)

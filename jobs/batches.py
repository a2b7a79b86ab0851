"""Manifest rows -> the images and batches that the loops in vhs want: where shards meet vhs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pyarrow as pa

from jobs import world
from shards import reader
from shards.storage import Storage

ORDER_COLUMNS = ["key", "path", "offset", "size", "sha256"]


def open_rows(storage: Storage, rows: pd.DataFrame) -> reader.ShardReader:
    return reader.ShardReader(storage, pa.Table.from_pandas(rows[ORDER_COLUMNS], preserve_index=False))


def load_images(storage: Storage, rows: pd.DataFrame) -> np.ndarray:
    """The images of `rows`, uint8 [N, S, S], each checked against its sha256."""
    from vhs.radiograph import decode_png

    shards = open_rows(storage, rows)
    return np.stack([decode_png(shards.read(i, check=True)) for i in range(len(shards))])


def network_points(rows: pd.DataFrame, resolution: int) -> np.ndarray:
    """Key points of `rows` carried from original pixels into the letterboxed image of side `resolution`: float32 [N, K, 2]."""
    from vhs.radiograph import Letterbox

    moved = [Letterbox(row.width, row.height, resolution).forward(np.asarray(row.points).reshape(-1, 2)) for row in rows.itertuples()]
    return np.stack(moved).astype(np.float32)


def shuffled(n: int, seed: int) -> Callable[[int], np.ndarray]:
    """Every row once an epoch."""
    return lambda epoch: reader.permutation(n, seed, epoch)


class Epochs:
    """`batches(epoch, start)` over the rows in the order `order(epoch)`: this rank's part of every global batch of `batch` samples.

    A batch holds image uint8 [b, 1, S, S], key, weight [b] (0: padding), total (samples in the global batch), label where rows have one,
    points [b, K, 2] where `points_at` (the images' side) is given, prompt where the rows have one. `pair_last`: of an epoch no last batch of one image,
    for networks that learn with batch norm (shards/reader.py).
    """

    def __init__(
        self, storage: Storage, rows: pd.DataFrame, batch: int, order: Callable[[int], np.ndarray], points_at: int | None = None, pair_last: bool = False
    ):
        import torch

        self._pair_last = pair_last
        self._shards, self._batch, self._order, self._keys = open_rows(storage, rows), batch, order, rows.key.to_numpy()
        self._tensors = {"label": torch.tensor(rows.label.to_numpy(np.int64))} if "label" in rows else {}
        if points_at:
            self._tensors["points"] = torch.from_numpy(network_points(rows, points_at))
        self._prompts = rows.prompt.to_numpy() if "prompt" in rows else None
        self.steps = -(-len(order(0)) // batch)

    def __call__(self, epoch: int, start: int) -> Iterator[dict]:
        import torch

        from vhs.radiograph import decode_png

        place = (world.rank(), world.size(), start)
        for indices, weights, total, images in reader.stream(
            self._shards, self._order(epoch), self._batch, *place, workers=1, decode=decode_png, pair_last=self._pair_last
        ):
            images = torch.from_numpy(np.stack(images))[:, None]
            batch = {name: tensor[torch.from_numpy(indices)] for name, tensor in self._tensors.items()}
            if self._prompts is not None:
                batch["prompt"] = self._prompts[indices].tolist()
            yield {"image": images, "key": self._keys[indices].tolist(), "weight": torch.from_numpy(weights), "total": total, **batch}

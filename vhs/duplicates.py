"""One image under two names: perceptual hashes, and who is near whom.

The hash is pHash (Zauner 2010; package imagehash) of 256 bits on the stored image. Measured at 128 px: of 401 real chest films of as many
people (80,200 pairs) the nearest two are 40 bits apart, of 600 drawn dogs (179,700 pairs) 38. The same film as a JPEG of quality 60 is at
most 24 bits away, at 60% of its size 10, with gamma 0.8 20; shifted by 1% of its side or cropped by 2%, it is another image (22 and 42 in
the median). So `Split.duplicate_bits` is 24 and joins no two people. The usual 64 bits cannot do it: a JPEG moves up to 4 of them, and
21 pairs of different people are that near.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SIDE = 16  # bits a side
BLOCK = 256  # hashes compared with all others at a time: 80 MB for 10,000 films, where all at once are 3 GB


def perceptual_hash(image: np.ndarray) -> str:
    """uint8 [S, S] -> 64 hex digits."""
    import imagehash
    from PIL import Image

    return str(imagehash.phash(Image.fromarray(image), hash_size=SIDE))


def distances(hashes: list[str], others: list[str]) -> np.ndarray:
    """Bits that differ between each of N hashes and each of M others: int16 [N, M]."""
    one, other = _words(hashes), _words(others)
    apart = np.empty((len(one), len(other)), np.int16)
    for start in range(0, len(one), BLOCK):
        block = slice(start, start + BLOCK)
        apart[block] = np.bitwise_count(one[block, None] ^ other[None]).sum(-1, dtype=np.int16)
    return apart


def _words(hashes: list[str]) -> np.ndarray:
    """-> uint64 [N, 4]"""
    return np.array([np.frombuffer(bytes.fromhex(text), np.uint64) for text in hashes], np.uint64).reshape(len(hashes), SIDE * SIDE // 64)


def alike(hashes: list[str], bits: int) -> csr_array:
    """Who of N is at most `bits` from whom, each from itself too: sparse bool [N, N], since films that look the same are few."""
    from scipy.sparse import csr_array, vstack

    blocks = [csr_array(distances(hashes[start : start + BLOCK], hashes) <= bits) for start in range(0, len(hashes), BLOCK)]
    return vstack(blocks, format="csr") if blocks else csr_array((0, 0), dtype=bool)


def clusters(near: csr_array) -> np.ndarray:
    """Sparse bool [N, N], who is near whom -> number of each one's cluster: connected components, numbered by their first member."""
    from scipy.sparse.csgraph import connected_components

    return connected_components(near, directed=False)[1]

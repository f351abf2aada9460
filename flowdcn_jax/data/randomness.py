"""Random numbers that depend only on (seed, purpose, position in the stream).

The stream is one infinite sequence of examples; the global batch `b` of `B` rows holds the
positions `b*B .. b*B + B - 1`.  Every random choice about an example (which one comes, whether
it is flipped, its noise) is a hash of the seed and its position, so it does not depend on the
batch size, the number of processes or threads, or on where a run was interrupted.

Grain's own `shuffle` has these properties too, but spends 12 µs of Python on each element while
it holds the interpreter's lock, and its epoch e + 1 of seed s is epoch e of seed s + 1.
"""

import numpy as np

MAX_SEED = 2**63 - 1

# One a purpose, so that two uses of the same seed and position share nothing.
SHUFFLE = 1
FLIP = 2
NOISE = 3
CROP = 4
SCHEDULE = 5


def hash64(indices: np.ndarray, *, seed: int, purpose: int, epoch: int = 0) -> np.ndarray:
    """Independent-looking 64-bit words, one an index: uint64 of the shape of `indices`.

    Indices and epoch are integers >= 0, `seed` is in 0 .. 2**63 - 1, `purpose` a constant above.
    """
    key = np.zeros(1, np.uint64)
    for word in (seed, purpose, epoch):
        key = _splitmix64(key + np.uint64(word))
    # Mixing before the key is added keeps two keys from giving shifted copies of one sequence.
    return _splitmix64(_splitmix64(np.asarray(indices).astype(np.uint64)) + key)


def random_bits(positions: np.ndarray, *, seed: int, purpose: int) -> np.ndarray:
    """A fair coin for each position: bool array of the shape of `positions`."""
    return hash64(positions, seed=seed, purpose=purpose) >> np.uint64(63) != 0


def uniform(positions: np.ndarray, *, seed: int, purpose: int) -> np.ndarray:
    """A number in [0, 1) for each position: float64 array of the shape of `positions`."""
    return (hash64(positions, seed=seed, purpose=purpose) >> np.uint64(11)) * 2.0**-53


def fill_standard_normal(out: np.ndarray, positions: np.ndarray, *, seed: int) -> None:
    """Fills each row of `out` with standard normal noise that belongs to its position.

    A row of more elements begins like the same position's shorter row.  NumPy releases the
    interpreter's lock while it draws, so threads fill batches in parallel.

    Args:
        out: float32 [n, ...], C-contiguous; overwritten.
        positions: int64 [n].
        seed: see `hash64`.
    """
    keys = hash64(positions, seed=seed, purpose=NOISE)
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    fresh = philox.state  # to set it is six times as fast as to make a new generator
    for row, key in zip(out, keys, strict=True):
        fresh["state"]["key"][0] = key
        philox.state = fresh
        generator.standard_normal(dtype=np.float32, out=row)


def _splitmix64(words: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), modulo 2**64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

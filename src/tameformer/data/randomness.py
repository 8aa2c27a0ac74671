"""Random numbers that belong to a sample, not to a process: a counter-based hash of (seed, epoch, index, draw).

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number
Generators", OOPSLA; constants of Stafford's variant 13). A generator with a state would tie every sample to the samples
drawn before it, and so to the number of workers, processes and micro-batches; a hash does not.
"""

import zlib

import numpy as np

from tameformer.data.keys import SampleKeys

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniforms(keys: SampleKeys, count: int, salt: int | str) -> np.ndarray:
    """Uniform numbers in [0, 1) for each sample, float64, shape (samples, count).

    A row depends on (seed, epoch, its index, salt) and on nothing else, and its first numbers do not depend on `count`.

    Args:
        keys: the samples.
        count: numbers per sample.
        salt: name of the use; two uses with different salts are independent.

    Example:
        >>> keys = SampleKeys(seed=0, epoch=3, indices=np.array([7, 8]))
        >>> uniforms(keys, 4, "flip").shape
        (2, 4)
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    stream = _stream(keys.seed, keys.epoch, salt)
    samples = _mix(keys.indices.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(stream))
    draws = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    words = _mix(samples[:, None] + draws)
    return (words >> np.uint64(11)) * 2.0**-53


def permutation(size: int, *, seed: int, epoch: int, salt: int | str) -> np.ndarray:
    """A random order of `range(size)`, int64, a pure function of its arguments."""
    key = np.array([_stream(seed, epoch, salt), size], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)


def generator(*, seed: int, epoch: int, salt: int | str) -> np.random.Generator:
    """A generator whose numbers are a pure function of its arguments, for what belongs to no single sample."""
    return np.random.Generator(np.random.Philox(key=np.array([_stream(seed, epoch, salt), 0], dtype=np.uint64)))


def _stream(seed: int, epoch: int, salt: int | str) -> int:
    number = zlib.crc32(salt.encode()) if isinstance(salt, str) else salt
    word = 0
    for part in (number, seed, epoch):
        word = _mix_number((word + _GOLDEN + part) & _WORD)
    return word


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer; unsigned products wrap around, which is meant."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return words ^ (words >> np.uint64(31))


def _mix_number(word: int) -> int:
    """`_mix` of one Python integer: numpy would warn of the overflow of a scalar."""
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)

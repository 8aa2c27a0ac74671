"""What this toolkit raises when the caller would want to catch it; wrong calls raise ValueError and TypeError."""


class TameError(Exception):
    """Parent of all errors that this package defines."""


class ConfigError(TameError):
    """A configuration that cannot be run: unknown key, bad value, or values that contradict each other."""


class DataError(TameError):
    """Data that cannot be trained on; the message names file, field, value and remedy."""


class RecordError(TameError):
    """A run folder that cannot be written or read."""


class CheckpointError(TameError):
    """A checkpoint that does not verify or does not fit the model."""


class PatchError(TameError):
    """A patch that matches nothing, or cannot be applied or undone."""


class DivergedError(TameError):
    """A training run that could not be brought back: steps were skipped and checkpoints gone back to as often as allowed."""


class OutOfMemoryError(TameError):
    """Memory that runs out whatever the size of the micro-batches."""


class DeterminismError(TameError):
    """An operation that has no deterministic kernel, in a run that asked for nothing else."""


class NonFiniteError(TameError):
    """A value that is NaN or infinite where the computation cannot go on without a finite one."""


def missing_extra(package: str, extra: str) -> ImportError:
    """The error to raise when an optional package is not installed.

    Example:
        >>> print(missing_extra("tokenizers", "text"))
        tokenizers is needed here and is not installed; install it with: pip install "tameformer[text]"
    """
    return ImportError(
        f'{package} is needed here and is not installed; install it with: pip install "tameformer[{extra}]"',
        name=package,
    )

"""What does not fit between a checkpoint and a model, told whole; a head of another size is replaced only when asked."""

from collections.abc import Callable, Iterable, Sequence

from tameformer.errors import CheckpointError

Shape = Sequence[int]
IsHead = Callable[[str], bool]
"""Whether a parameter, by name, belongs to the head: what a new task starts afresh."""


def check_fit(
    source: str,
    *,
    missing: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Shape, Shape]] = (),
    is_head: IsHead,
    replace_head: bool,
) -> None:
    """Refuse a checkpoint that does not fit, naming every tensor.

    A head that the checkpoint does not have starts afresh. One that it has in another shape, as for another number of classes,
    does so only with `replace_head`. All else must be there, in its shape: this is stricter than `ignore_mismatched_sizes` of
    Hugging Face, which lets any layer start afresh.

    Args:
        source: What the checkpoint is called in messages.
        missing: Names that the model has and the checkpoint has not.
        mismatched: Names with their shapes in the checkpoint and in the model.
        is_head: Tells the head.
        replace_head: Whether a head of another shape may start afresh.

    Raises:
        CheckpointError: Something does not fit.

    Example:
        >>> shapes = [("head.weight", (2, 8), (3, 8)), ("layers.0.weight", (8, 8), (9, 8))]
        >>> check_fit("runs/a", mismatched=shapes[:1], is_head=lambda name: name.startswith("head."), replace_head=True)
        >>> check_fit("a", mismatched=shapes[1:], is_head=lambda name: False, replace_head=True)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tameformer.errors.CheckpointError: a does not fit the model: layers.0.weight has shape (8, 8) there and (9, 8) here; ...
    """
    different = sorted((name, tuple(there), tuple(here)) for name, there, here in mismatched)
    heads = [name for name, *_ in different if is_head(name)]
    problems = [f"{name} is missing there" for name in sorted(missing) if not is_head(name)]
    problems += [
        f"{name} has shape {there} there and {here} here"
        for name, there, here in different
        if not (replace_head and name in heads)
    ]
    if problems:
        only_heads = len(problems) == len(heads) and not replace_head
        remedy = "give the number of classes it was trained for, or replace_head=True for a new head"
        if not only_heads:
            remedy = "take the configuration that it was trained with"
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}; {remedy}")

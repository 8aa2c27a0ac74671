"""Attention entropy: how widely each query spreads its attention, exact, without a matrix of weights in memory.

Entropy that falls toward 0 in a head goes with unstable training (Zhai et al. 2023, "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", arXiv:2303.06296).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tameformer.nn.attention.entropy_blocks import HIDDEN_BIAS, entropy_by_blocks
from tameformer.nn.attention.logsumexp import sized_entropy_from_logsumexp
from tameformer.shapes import Bool, Float, Int

_FUSED_DEVICES = ("cuda",)  # a CPU has the kernel, too, and is done with blocks in two thirds of its time
_REACH_LIMIT = 16.0  # scale |q| |k| up to which a fused call is tried ...
_SIZE_LIMIT = 8.0  # ... and the size of its terms up to which its float32 error stays below 1e-5 nats, with room


def attention_entropy(
    query: Float[Tensor, "batch heads query head_dim"],
    key: Float[Tensor, "batch kv_heads key head_dim"],
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    score_mod: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch heads query"]:
    """Shannon entropy of each query's attention, in nats, from 0 (one key) to the log of the number of visible keys.

    NaN for a query that may attend to nothing, so take means with `nanmean`; NaN also for a query with a score that is
    not finite. Never negative. Computed in float32 (float64 for float64 inputs), also under autocast and whatever the
    precision of matrix products is set to; the result has that type and no gradient. Dropout plays no part.

    Keys have their mean taken off, which softmax does not see. Scores are computed in blocks of rows, on a CPU in about a
    mebibyte; small logits on an accelerator, without a `bias` or a `score_mod`, take one fused attention call. Largest errors
    in nats seen against float64: 6e-6 at logits of 50, in every kind of mask, 2e-5 at 340. The choice waits for the device;
    `entropy_from_logsumexp` does not.

    Args:
        query: Any floating type.
        key: Any floating type; each of `kv_heads` serves `heads / kv_heads` neighbouring query heads.
        mask: Boolean, True = may attend, or a float bias that is added to the scaled scores; -inf in it hides the key,
            and so does anything at or below the least float16. Broadcasts to (batch, heads, query, key): any axis may be
            1, or left out on the left, so that a padding mask needs the shape (batch, 1, 1, key).
        is_causal: Query i sees keys 0..i, also where the two lengths differ; together with `mask` both apply.
        scale: Factor on the dot products; None is 1/sqrt(head_dim).
        score_mod: Elementwise function of the scaled and biased scores before the softmax, such as a soft-cap; what the
            mask hides stays hidden.

    Raises:
        ValueError: heads are no multiple of kv_heads, or the mask does not broadcast.
        TypeError: the mask is neither boolean nor floating.

    References:
        Zhai et al. 2023, arXiv:2303.06296, section 3.

    Example:
        >>> attention_entropy(torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8), is_causal=True).exp()
        tensor([[[1., 2., 3., 4.]]])
    """
    _check_heads(query, key)
    mask = _four_axes(mask, query, key)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    with torch.no_grad(), _full_precision(query.device.type):
        query, key = query.to(dtype), key.to(dtype)
        visible, bias = _parted(mask)
        if score_mod is None:  # a score_mod would see the shift
            key = centred_keys(key, _used_keys(visible, bias))
        by_key_only = visible is None or visible.shape[2] == 1
        linear = bias is None and score_mod is None
        if linear and by_key_only and query.device.type in _FUSED_DEVICES and _within(query, key, factor):
            entropy, size = sized_entropy_from_logsumexp(
                query, key, visible_keys=visible, is_causal=is_causal, scale=factor
            )
            if bool(size.amax() <= _SIZE_LIMIT):
                return entropy
        return entropy_by_blocks(
            query, key, visible=visible, bias=bias, is_causal=is_causal, scale=factor, score_mod=score_mod
        )


def logits_entropy(
    logits: Float[Tensor, "*rows key"], visible: Bool[Tensor, "*#rows key"] | None = None
) -> Float[Tensor, "*rows"]:
    """Shannon entropy of softmax(logits) over the visible keys, in nats; NaN where no key is visible.

    A sum of -p ln p has no negative terms and nothing to cancel, so that it is exact to rounding also where the logits
    are in the hundreds; the log-sum-exp form is not.

    Args:
        logits: Attention scores after scaling, before softmax; float32 or wider.
        visible: True where the query may attend; None is everywhere.

    Example:
        >>> logits_entropy(torch.zeros(2, 4)).exp()
        tensor([4., 4.])
    """
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def stratified_rows(length: int, count: int, device: torch.device | None = None) -> Int[Tensor, " rows"]:
    """Up to `count` query positions spread evenly over a sequence.

    Causal entropy is mostly a function of the position, so spreading beats drawing at random by a factor of about 2.7 in the
    error of a head's mean.

    Example:
        >>> stratified_rows(100, 4)
        tensor([12, 37, 62, 87])
    """
    count = min(length, count)
    return ((torch.arange(count, device=device) + 0.5) * (length / count)).long()


def centred_keys(
    key: Float[Tensor, "batch kv_heads key head_dim"], used: Bool[Tensor, "#batch 1 #key 1"] | None = None
) -> Float[Tensor, "batch kv_heads key head_dim"]:
    """The keys less the mean of each head over the used ones, and 0 where a key is not used.

    Every score of a query changes by the same amount, which leaves the softmax as it is and the scores small. A head with
    a key that is not finite keeps its keys, so that only the queries that see it are lost.

    Args:
        key: float32 or wider.
        used: True for the keys that some query may attend to; None is all.

    Example:
        >>> centred_keys(torch.tensor([[[[1.0], [3.0]]]])).flatten()
        tensor([-1.,  1.])
    """
    if used is None:
        mean = key.mean(2, keepdim=True)
    else:
        key = key.where(used, 0.0)
        mean = key.sum(2, keepdim=True) / used.expand(-1, -1, key.shape[2], -1).sum(2, keepdim=True)
    mean = mean.where(mean.isfinite(), 0.0)
    return key - mean if used is None else (key - mean).where(used, 0.0)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No autocast, and no float32 product in TF32 or bf16; the settings found are put back."""
    overall = _overall_precision()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    found = [backend.fp32_precision for backend in backends]
    try:
        # The older setting first: torch refuses products where it disagrees with the newer ones.
        if overall not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            if backend.fp32_precision not in ("ieee", "none"):
                backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if overall not in (None, "highest"):
            torch.set_float32_matmul_precision(overall)
        for backend, precision in zip(backends, found, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _overall_precision() -> str | None:
    """The older setting; None where it was given backend by backend, which torch answers with an error."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _check_heads(query: Tensor, key: Tensor) -> None:
    """Refuses heads that cannot share keys."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"expected the query heads to be a multiple of the key heads, got {heads} and {kv_heads}; "
            "give the keys as they were before they were repeated, or one for each query head"
        )


def _four_axes(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask with its missing axes in front as 1, and its last axis as long as the keys."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"expected a boolean mask (True = may attend) or a float bias, got {mask.dtype}; "
            "turn a mask of 0 and 1 into mask.bool()"
        )
    full = (*query.shape[:3], key.shape[2])
    missing = 4 - mask.ndim
    sizes = (1,) * missing + tuple(mask.shape)
    if missing < 0 or any(size not in (1, expected) for size, expected in zip(sizes, full, strict=True)):
        raise ValueError(
            f"expected a mask that broadcasts to (batch, heads, query, key) = {full}, got {tuple(mask.shape)}; "
            "a padding mask of shape (batch, key) is mask[:, None, None, :]"
        )
    return mask.reshape(sizes).expand(-1, -1, -1, full[3])


def _parted(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as (visible, bias); a bias over keys alone that only hides is made boolean, which the fused call can take."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    if mask.shape[2] == 1:
        visible = mask > HIDDEN_BIAS
        if bool(((mask == 0) | (mask <= HIDDEN_BIAS)).all()):
            return visible, None
    return None, mask


def _used_keys(visible: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """True for keys that the mask leaves to some query of some head, (batch, 1, key, 1); an axis may be 1."""
    if visible is not None:
        used = visible.any(2).any(1)
    elif bias is not None:
        used = ~(bias.amax((1, 2)) <= HIDDEN_BIAS)  # NaN counts as used
    else:
        return None
    return used[:, None, :, None]


def _within(query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether a fused call is worth trying, by the norms of queries and keys; False for NaN."""
    if query.numel() == 0 or key.numel() == 0:
        return False
    longest_query = torch.linalg.vector_norm(query, dim=-1).amax(2).unflatten(1, (key.shape[1], -1)).amax(2)
    longest_key = torch.linalg.vector_norm(key, dim=-1).amax(2)
    return bool((abs(scale) * longest_query * longest_key).amax() <= _REACH_LIMIT)

"""Size of an update relative to its weight, from a few runs of entries of each weight.

A healthy ratio is near 1e-3 (Karpathy 2019, "A Recipe for Training Neural Networks"; You et al. 2017, "LARS",
arXiv:1708.03888, section 4, has the same ratio for gradients). The exact update takes a copy of all weights and three passes
over memory, more than the optimizer itself; a sample takes none of that.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tameformer.probes.probe import Probe
from tameformer.probes.spectral_norm import Where, is_matrix, part_labels, transparent, weight_slots
from tameformer.shapes import Float
from tameformer.tensors import is_ordinary, local_part

_RUNS = 32
"""Runs that the sampled entries lie in. Neighbours are cheap to read, but rows and columns are heads and units, which
differ: with one run instead the error below is twice as large."""


def sampled(weight: Tensor, entries: int) -> Float[Tensor, "runs length"]:
    """All entries of a small tensor, else `entries` of them in evenly spread runs; a view where the layout allows it.

    Example:
        >>> sampled(torch.zeros(300, 300), 4096).shape, sampled(torch.zeros(6, 2), 4096).shape
        (torch.Size([32, 128]), torch.Size([1, 12]))
    """
    count = weight.numel()
    weight = weight if weight.is_contiguous() else weight.reshape(-1)
    if count <= entries:
        return weight.reshape(1, count)
    length = entries // _RUNS
    return weight.as_strided((_RUNS, length), ((count - length) // (_RUNS - 1), 1))  # rarely a multiple of the width


def update_ratio(
    before: Float[Tensor, "weights runs length"], after: Float[Tensor, "weights runs length"]
) -> Float[Tensor, " weights"]:
    """|after - before| / |before|; 0 where nothing moved, also from zero.

    Example:
        >>> update_ratio(torch.ones(1, 1, 4), torch.full((1, 1, 4), 1.5))
        tensor([0.5000])
    """
    update = torch.linalg.vector_norm(after - before, dim=(1, 2))
    return torch.where(update == 0, update, update / torch.linalg.vector_norm(before, dim=(1, 2)))


class UpdateRatio(Probe):
    """|update| / |weight| of each trained matrix, as `diag/update_ratio/<weight>`; two reads of a sample a step.

    Exact for weights of at most `entries` entries. Above that, the error measured with AdamW on 18 weights of
    65,536 to 262,144 entries is 1.3 % RMS in the first 5 steps, then 6 % RMS, 2 % in the median, 46 % at the worst of 990.
    Of a weight that is sharded over processes, each process measures its own part. A weight that sigmaReparam computes is
    measured as it acts, each of its parts, under `<weight>[0]` and so on where there are several.

    Args:
        model: Whose parameters.
        where: Which ones; by default all matrices. Embeddings are left out: most of their rows never move.
        entries: How many entries of a weight are compared at most, a multiple of 32.
    """

    def __init__(self, model: nn.Module, *, where: Where = is_matrix, entries: int = 4096) -> None:
        if entries < _RUNS or entries % _RUNS:
            raise ValueError(f"expected entries to be a positive multiple of {_RUNS}, got {entries}")
        self.entries = entries
        self.unseen = self._unseen = {}
        self._slots = weight_slots(model, where, self._unseen)
        self._computed = transparent(model)
        for name in self._computed:
            self._unseen.pop(name, None)
        self._before: dict[tuple[str, ...], Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._is_updated = False

    def on_begin(self) -> None:
        """Copy the samples."""
        self._values, self._is_updated = {}, False
        self._before = self._samples()

    def on_update(self) -> None:
        """Know that there was one; what sigmaReparam does after it still belongs to it, so that `read` compares."""
        self._is_updated = True

    def read(self) -> Mapping[str, Tensor]:
        """One value a weight; none when the step made no update."""
        if self._is_updated:
            after = self._samples()
            for names, before in self._before.items():
                if names in after:
                    ratios = update_ratio(before, after[names])
                    keys = (f"diag/update_ratio/{name}" for name in names)
                    self._values.update(zip(keys, ratios.unbind(), strict=True))
            self._before, self._is_updated = {}, False
        return dict(self._values)

    @torch.no_grad()
    def _samples(self) -> dict[tuple[str, ...], Tensor]:
        """Copies in fp32 by the names they belong to, samples of one shape together."""
        alike: dict[tuple[torch.Size, torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, (module, attribute) in self._slots.items():
            weight = module._parameters.get(attribute)
            if weight is None or not weight.requires_grad:
                continue
            local = local_part(weight)
            if local.numel() == 0 or local.is_meta:
                self._unseen[name] = f"nothing of it is here: {tuple(local.shape)} on {local.device}"
                continue
            sample = sampled(local.detach(), self.entries)
            alike.setdefault((sample.shape, sample.device, sample.dtype), []).append((name, sample))
        for name, chain in self._computed.items():
            if not is_ordinary(chain.original):
                self._unseen[name] = f"a {type(chain.original).__name__}, of which this process may hold a part only"
                continue
            matrices, factors = cast(Any, chain[0]).scaled_parts()
            for label, matrix, factor in zip(part_labels(name, len(matrices)), matrices, factors, strict=True):
                sample = sampled(matrix, self.entries) * factor
                alike.setdefault((sample.shape, sample.device, sample.dtype), []).append((label, sample))
        return {
            tuple(name for name, _ in members): torch.stack([sample for _, sample in members]).float()
            for members in alike.values()
        }

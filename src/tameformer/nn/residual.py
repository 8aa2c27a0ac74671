"""Where the norm stands around a residual branch: one class a placement, all built and called alike.

`Placement(dim, branch, norm=..., drop=...)` and `forward(residual, **kwargs)`, keywords going to the branch.
`needs_final_norm` says whether a stack of them leaves its output unnormalized and wants one norm at its end.

References: post-norm, Vaswani et al. 2017, arXiv:1706.03762; pre-norm, Xiong et al. 2020, arXiv:2002.04745; peri-norm,
Kim et al. 2025, arXiv:2502.02732.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from tameformer.nn.drop_path import DropPath
from tameformer.shapes import Stream

NormFactory = Callable[[int], nn.Module]


class PreNorm(nn.Module):
    """residual + drop(branch(norm(residual)))."""

    needs_final_norm: ClassVar[bool] = True

    def __init__(self, dim: int, branch: nn.Module, *, norm: NormFactory, drop: nn.Module):
        super().__init__()
        self.norm, self.branch, self.drop = norm(dim), branch, drop

    def forward(self, residual: Stream, **kwargs) -> Stream:
        """Adds the branch to the stream."""
        return residual + self.drop(self.branch(self.norm(residual), **kwargs))


class PostNorm(nn.Module):
    """norm(residual + drop(branch(residual)))."""

    needs_final_norm: ClassVar[bool] = False

    def __init__(self, dim: int, branch: nn.Module, *, norm: NormFactory, drop: nn.Module):
        super().__init__()
        self.branch, self.drop, self.norm = branch, drop, norm(dim)

    def forward(self, residual: Stream, **kwargs) -> Stream:
        """Adds the branch to the stream and normalizes the sum."""
        return self.norm(residual + self.drop(self.branch(residual, **kwargs)))


class PeriNorm(nn.Module):
    """residual + drop(out_norm(branch(norm(residual))))."""

    needs_final_norm: ClassVar[bool] = True

    def __init__(self, dim: int, branch: nn.Module, *, norm: NormFactory, drop: nn.Module):
        super().__init__()
        self.norm, self.branch, self.out_norm, self.drop = norm(dim), branch, norm(dim), drop

    def forward(self, residual: Stream, **kwargs) -> Stream:
        """Adds the branch, normalized on both sides, to the stream."""
        return residual + self.drop(self.out_norm(self.branch(self.norm(residual), **kwargs)))


class NoNorm(nn.Module):
    """residual + drop(branch(residual)); `norm` is never called."""

    needs_final_norm: ClassVar[bool] = False

    def __init__(self, dim: int, branch: nn.Module, *, norm: NormFactory, drop: nn.Module):
        super().__init__()
        self.branch, self.drop = branch, drop

    def forward(self, residual: Stream, **kwargs) -> Stream:
        """Adds the branch to the stream."""
        return residual + self.drop(self.branch(residual, **kwargs))


Placement = type[PreNorm] | type[PostNorm] | type[PeriNorm] | type[NoNorm]


def branch_drop(dropout: float, path_rate: float) -> nn.Module:
    """Dropout of single units, then of the whole branch; what has rate 0 is left out."""
    drops = [nn.Dropout(dropout)] if dropout else []
    drops += [DropPath(path_rate)] if path_rate else []
    return nn.Identity() if not drops else drops[0] if len(drops) == 1 else nn.Sequential(*drops)

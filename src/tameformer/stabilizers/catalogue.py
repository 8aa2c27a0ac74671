"""The methods by name: for the command line, for configurations, and for `tame.stabilize`."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch import PatchHandle
from tameformer.stabilizers.admin import admin
from tameformer.stabilizers.deepnorm import deepnorm
from tameformer.stabilizers.depth_scaled_init import depth_scaled_init
from tameformer.stabilizers.layer_scale import layer_scale
from tameformer.stabilizers.peri_norm import peri_norm
from tameformer.stabilizers.qk_clip import qk_clip
from tameformer.stabilizers.qk_norm import qk_norm
from tameformer.stabilizers.rezero import rezero
from tameformer.stabilizers.sigma_reparam import sigma_reparam
from tameformer.stabilizers.soft_cap import soft_cap
from tameformer.stabilizers.t_fixup import t_fixup
from tameformer.stabilizers.z_loss import with_z_loss, z_loss


@dataclass(frozen=True)
class Method:
    """What a person needs to choose."""

    apply: Callable[..., PatchHandle]
    """From the model and keywords to the handle."""
    paper: str
    use_when: str
    """One line."""
    cost: str
    """One line."""
    on_loss: Callable[..., Callable[..., Any]] | None = None
    """From a loss function and the same keywords to one with the method in it, where the loss is computed outside the model."""
    instead_of_batches: tuple[str, ...] = ()
    """For a method that profiles the model on `batches`, reached by `call`, with padding told by `mask`: the settings, any of
    which stands in for the profile."""


METHODS: dict[str, Method] = {
    "sigma_reparam": Method(
        sigma_reparam,
        "Zhai et al. 2023, arXiv:2303.06296",
        "attention entropy collapses, or you want to do without warm-up",
        "one pass over each weight an access, two after each update; none once baked",
    ),
    "admin": Method(
        admin,
        "Liu et al. 2020, arXiv:2004.08249",
        "a deep Post-norm model does not start to learn",
        "one multiply-add a residual sum; none once baked",
        instead_of_batches=("growth", "scales"),
    ),
    "deepnorm": Method(
        deepnorm,
        "Wang et al. 2022, arXiv:2203.00555",
        "a Post-norm model of dozens of layers and more, trained from scratch",
        "one pass over a branch's output weight; none once baked",
    ),
    "layer_scale": Method(
        layer_scale,
        "Touvron et al. 2021, arXiv:2103.17239",
        "a deep Pre-norm vision model trains badly",
        "one pass over a branch's output weight; none once baked",
    ),
    "rezero": Method(
        rezero,
        "Bachlechner et al. 2020, arXiv:2003.04887",
        "a deep model shall start as the identity and learn its depth",
        "one pass over a branch's output weight; none once baked",
    ),
    "depth_scaled_init": Method(
        depth_scaled_init,
        "Radford et al. 2019, section 2.3",
        "a Pre-norm model starts with a residual stream that grows with depth",
        "none: starting values only",
    ),
    "t_fixup": Method(
        t_fixup,
        "Huang et al. 2020, ICML",
        "you want a model without norms and without warm-up",
        "none: starting values, and the norms go",
    ),
    "peri_norm": Method(
        peri_norm,
        "Kim et al. 2025, arXiv:2502.02732",
        "activations of a Pre-norm model grow from layer to layer",
        "a norm more a branch",
    ),
    "qk_norm": Method(
        qk_norm,
        "Dehghani et al. 2023, arXiv:2302.05442",
        "attention logits grow without bound, and you train from scratch",
        "two norms of a head's width an attention",
    ),
    "soft_cap": Method(
        soft_cap,
        "Gemma Team 2024, arXiv:2408.00118",
        "single attention logits must never pass a bound",
        "all logits in memory: no fused attention kernel",
    ),
    "qk_clip": Method(
        qk_clip,
        "Kimi Team 2025, arXiv:2507.20534",
        "attention logits grow in a pretrained or running model that must stay what it is",
        "a product of queries and keys more a training pass, one pass over their weights a step; none in evaluation",
    ),
    "z_loss": Method(
        z_loss,
        "Chowdhery et al. 2022, arXiv:2204.02311, section 5",
        "output logits drift far from 0 late in training",
        "one pass more over the logits; nothing in evaluation",
        on_loss=with_z_loss,
    ),
}
"""Every method, by the name it has on the command line and in configurations."""


def stabilize(model: nn.Module, method: str, **settings: Any) -> PatchHandle:
    """Apply a method by its name, with its keywords; call it before the optimizer is built.

    Raises:
        PatchError: There is no such method, or it does not fit the model.

    Example:
        >>> handle = stabilize(nn.Sequential(nn.Linear(2, 2)), "sigma_reparam")
        >>> handle.method
        'sigma_reparam'
    """
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise PatchError(f"there is no method {method}; did you mean {near}? `tame methods` lists them")
    return METHODS[method].apply(model, **settings)

"""Methods that make a Transformer stable, one a file: each changes any model and can be taken back or folded away."""

from tameformer.stabilizers.admin import admin
from tameformer.stabilizers.catalogue import METHODS, stabilize
from tameformer.stabilizers.deepnorm import deepnorm
from tameformer.stabilizers.depth_scaled_init import depth_scaled_init
from tameformer.stabilizers.layer_scale import layer_scale
from tameformer.stabilizers.peri_norm import peri_norm
from tameformer.stabilizers.qk_clip import ClippedHeads, qk_clip, qk_clip_state
from tameformer.stabilizers.qk_norm import qk_norm
from tameformer.stabilizers.rezero import rezero
from tameformer.stabilizers.sigma_reparam import sigma_reparam
from tameformer.stabilizers.soft_cap import soft_cap
from tameformer.stabilizers.t_fixup import t_fixup
from tameformer.stabilizers.z_loss import with_z_loss, z_loss

__all__ = [
    "METHODS",
    "ClippedHeads",
    "admin",
    "deepnorm",
    "depth_scaled_init",
    "layer_scale",
    "peri_norm",
    "qk_clip",
    "qk_clip_state",
    "qk_norm",
    "rezero",
    "sigma_reparam",
    "soft_cap",
    "stabilize",
    "t_fixup",
    "with_z_loss",
    "z_loss",
]

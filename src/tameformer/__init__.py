"""Train Transformers that do not fall over: see inside them, keep them stable, and train them from recipes.

Public names are loaded when they are first used, so that `import tameformer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tameformer.health import Diagnosis, Guard, GuardConfig, Monitor, diagnose
    from tameformer.nn.attention.attend import attend
    from tameformer.nn.attention.entropy import attention_entropy
    from tameformer.patch import PatchHandle
    from tameformer.recipes.export import Exported, export, load
    from tameformer.recipes.launch import Result, train
    from tameformer.stabilizers import (
        admin,
        deepnorm,
        depth_scaled_init,
        layer_scale,
        peri_norm,
        qk_clip,
        qk_clip_state,
        qk_norm,
        rezero,
        sigma_reparam,
        soft_cap,
        stabilize,
        t_fixup,
        with_z_loss,
        z_loss,
    )
    from tameformer.studies import compare

_HOMES = {
    "Diagnosis": "tameformer.health",
    "Exported": "tameformer.recipes.export",
    "Guard": "tameformer.health",
    "GuardConfig": "tameformer.health",
    "Monitor": "tameformer.health",
    "PatchHandle": "tameformer.patch",
    "Result": "tameformer.recipes.launch",
    "attend": "tameformer.nn.attention.attend",
    "attention_entropy": "tameformer.nn.attention.entropy",
    "compare": "tameformer.studies",
    "diagnose": "tameformer.health",
    "admin": "tameformer.stabilizers",
    "deepnorm": "tameformer.stabilizers",
    "depth_scaled_init": "tameformer.stabilizers",
    "export": "tameformer.recipes.export",
    "layer_scale": "tameformer.stabilizers",
    "load": "tameformer.recipes.export",
    "peri_norm": "tameformer.stabilizers",
    "qk_clip": "tameformer.stabilizers",
    "qk_clip_state": "tameformer.stabilizers",
    "qk_norm": "tameformer.stabilizers",
    "rezero": "tameformer.stabilizers",
    "sigma_reparam": "tameformer.stabilizers",
    "soft_cap": "tameformer.stabilizers",
    "stabilize": "tameformer.stabilizers",
    "t_fixup": "tameformer.stabilizers",
    "train": "tameformer.recipes.launch",
    "with_z_loss": "tameformer.stabilizers",
    "z_loss": "tameformer.stabilizers",
}
__all__ = [
    "Diagnosis",
    "Exported",
    "Guard",
    "GuardConfig",
    "Monitor",
    "PatchHandle",
    "Result",
    "admin",
    "attend",
    "attention_entropy",
    "compare",
    "deepnorm",
    "depth_scaled_init",
    "diagnose",
    "export",
    "layer_scale",
    "load",
    "peri_norm",
    "qk_clip",
    "qk_clip_state",
    "qk_norm",
    "rezero",
    "sigma_reparam",
    "soft_cap",
    "stabilize",
    "t_fixup",
    "train",
    "with_z_loss",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "integrations":
        return import_module("tameformer.integrations")
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

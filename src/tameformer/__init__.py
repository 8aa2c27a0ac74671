"""Train Transformers that do not fall over: see inside them, keep them stable, and train them from recipes.

Public names are loaded when they are first used, so that `import tameformer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tameformer.finetune import GradualUnfreezing, freeze, layer_decay_groups, mixout, prior_decay, reinit_top
    from tameformer.health import Detectors, DetectorsConfig, Diagnosis, Guard, GuardConfig, Monitor, diagnose
    from tameformer.nn.attention.attend import attend
    from tameformer.nn.attention.entropy import attention_entropy
    from tameformer.optim import AdaptiveClip, StableAdamW
    from tameformer.patch import PatchHandle
    from tameformer.patch.heads import gate_heads, head_importance, prune_heads
    from tameformer.recipes.back_translation import back_translate, paraphrase, translator
    from tameformer.recipes.export import Exported, export
    from tameformer.recipes.exported import load
    from tameformer.recipes.launch import Result, train
    from tameformer.recipes.pretrained import load_pretrained
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
    from tameformer.studies import compare, race

_HOMES = {
    "AdaptiveClip": "tameformer.optim",
    "load_pretrained": "tameformer.recipes.pretrained",
    "reinit_top": "tameformer.finetune",
    "prior_decay": "tameformer.finetune",
    "mixout": "tameformer.finetune",
    "layer_decay_groups": "tameformer.finetune",
    "freeze": "tameformer.finetune",
    "GradualUnfreezing": "tameformer.finetune",
    "Detectors": "tameformer.health",
    "DetectorsConfig": "tameformer.health",
    "Diagnosis": "tameformer.health",
    "Exported": "tameformer.recipes.export",
    "Guard": "tameformer.health",
    "GuardConfig": "tameformer.health",
    "Monitor": "tameformer.health",
    "PatchHandle": "tameformer.patch",
    "Result": "tameformer.recipes.launch",
    "StableAdamW": "tameformer.optim",
    "attend": "tameformer.nn.attention.attend",
    "attention_entropy": "tameformer.nn.attention.entropy",
    "back_translate": "tameformer.recipes.back_translation",
    "paraphrase": "tameformer.recipes.back_translation",
    "translator": "tameformer.recipes.back_translation",
    "compare": "tameformer.studies",
    "race": "tameformer.studies",
    "diagnose": "tameformer.health",
    "admin": "tameformer.stabilizers",
    "deepnorm": "tameformer.stabilizers",
    "depth_scaled_init": "tameformer.stabilizers",
    "export": "tameformer.recipes.export",
    "head_importance": "tameformer.patch.heads",
    "gate_heads": "tameformer.patch.heads",
    "layer_scale": "tameformer.stabilizers",
    "load": "tameformer.recipes.exported",
    "peri_norm": "tameformer.stabilizers",
    "prune_heads": "tameformer.patch.heads",
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
    "AdaptiveClip",
    "Detectors",
    "DetectorsConfig",
    "Diagnosis",
    "Exported",
    "GradualUnfreezing",
    "Guard",
    "GuardConfig",
    "Monitor",
    "PatchHandle",
    "Result",
    "StableAdamW",
    "admin",
    "attend",
    "attention_entropy",
    "back_translate",
    "compare",
    "deepnorm",
    "depth_scaled_init",
    "diagnose",
    "export",
    "freeze",
    "gate_heads",
    "head_importance",
    "layer_decay_groups",
    "layer_scale",
    "load",
    "load_pretrained",
    "mixout",
    "paraphrase",
    "peri_norm",
    "prior_decay",
    "prune_heads",
    "qk_clip",
    "qk_clip_state",
    "qk_norm",
    "race",
    "reinit_top",
    "rezero",
    "sigma_reparam",
    "soft_cap",
    "stabilize",
    "t_fixup",
    "train",
    "translator",
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

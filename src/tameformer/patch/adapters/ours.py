"""The layers of `tameformer.models`."""

from typing import Any

from torch import nn

from tameformer.patch.adapters.branch import QK_NORMS, Branch, Kind, Placement, Tap
from tameformer.patch.adapters.parts import attention_of, branch_of, class_names, has_only, linear, linears, norm_of


def ours(name: str, block: nn.Module) -> list[Branch] | None:
    """The layers of `tameformer.models`."""
    placements: dict[str, Placement] = {"PreNorm": "pre", "PostNorm": "post", "PeriNorm": "peri", "NoNorm": "none"}
    parts: dict[str, Any] = dict(block.named_children())
    if not parts or any(
        not class_names(part) & set(placements) or not hasattr(part, "branch") for part in parts.values()
    ):
        return None
    found = []
    for attribute, part in parts.items():
        placement: Placement = next(placements[word] for word in class_names(part) if word in placements)
        prefix, branch = f"{name}.{attribute}", part.branch
        norm = norm_of(prefix, part, "norm") if hasattr(part, "norm") else None
        more = {"norm": norm, "taps": (Tap(part, keyword="residual"),)}
        # A linear map before a norm has no scale of its own: the norm's weight is what ends the branch.
        last = linear(prefix, part, "out_norm") if placement == "peri" else None
        path = f"{prefix}.branch"
        more_parts = [name for name in (*QK_NORMS, "relative", "attend") if getattr(branch, name, None) is not None]
        if has_only(branch, "query", "key", "value", "out", *more_parts):
            query, key, value, out = linears(path, branch, "query", "key", "value", "out")
            is_cross = attribute == "cross_attention"
            kind: Kind = "cross_attention" if is_cross else "attention"
            inputs = [query] if is_cross else [query, key, value]
            scale = {} if getattr(branch.attend, "scale", None) is None else {"scale": branch.attend.scale}
            attention = attention_of(path, branch, query, key, value, **scale)
            found.append(branch_of(prefix, name, kind, placement, last or out, inputs, attention=attention, **more))
        elif hasattr(branch, "up") and hasattr(branch, "down"):
            inputs = linears(path, branch, *(["gate", "up"] if hasattr(branch, "gate") else ["up"]))
            down = linear(path, branch, "down")
            found.append(branch_of(prefix, name, "feed_forward", placement, last or down, inputs, **more))
        else:
            return None
    return found

"""The numeric precision of a run, by name or by timing the first batch.

On a CPU with bf16 instructions autocast makes matrix products about twice as fast, but the attention kernel's backward in
bf16 can cost more than it saves; whether it does depends on the machine and on the sequence length, so it is measured.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MIN_GAIN = 0.9
"""Half precision must take less than this share of full precision's time, so that a tie is never broken by noise."""
ROUNDS = 3


@dataclass(frozen=True)
class Precision:
    """The type of matrix products under autocast, and the type inside attention; None is fp32 and "as the rest"."""

    autocast_dtype: torch.dtype | None
    attention_dtype: torch.dtype | None = None


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(None),
    "bf16": Precision(torch.bfloat16),
    "bf16_fp32_attention": Precision(torch.bfloat16, torch.float32),
}


def candidates(device: torch.device) -> list[str]:
    """The precisions worth trying on a device, full precision first.

    A GPU with bf16 needs no trial: its kernels are faster in bf16 at every shape.
    """
    if device.type == "cuda":
        return ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp32"]
    if device.type == "cpu" and has_bf16_instructions():
        return ["fp32", "bf16", "bf16_fp32_attention"]
    return ["fp32"]


def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bf16 in hardware; others emulate it, slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fastest(names: Sequence[str], run_once: Callable[[str], None]) -> tuple[str, dict[str, float]]:
    """The name whose `run_once` is fastest, and each one's best time relative to the first name's.

    Interleaved, and the best of a few rounds, because other programs share the machine. The first name wins ties.

    Args:
        names: At least one; with one nothing is run.
        run_once: Does the work once in the named precision.
    """
    if len(names) == 1:
        return names[0], {}
    best = dict.fromkeys(names, float("inf"))
    for repeat in range(ROUNDS + 1):
        for name in names:
            start = time.perf_counter()
            run_once(name)
            if repeat:  # the first round pays for kernels that are built at first use
                best[name] = min(best[name], time.perf_counter() - start)
    ratios = {name: seconds / best[names[0]] for name, seconds in best.items()}
    quickest = min(ratios, key=lambda name: ratios[name])
    return (quickest if ratios[quickest] < MIN_GAIN else names[0]), ratios

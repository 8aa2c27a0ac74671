"""Run folders as training leaves them, made from formulas; log and events are written by the real `RunWriter`."""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np

from tameformer.record import RunWriter

CONFIG = "model:\n  dim: 64\n  num_layers: {layers}\noptim:\n  peak_lr: 0.001\nseed: {seed}\n"
ENVIRONMENT = {
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
    "git": {"commit": "0123abc", "dirty": False},
    "hardware": {"cpu": "2 cores", "gpu": None},
    "threads": 2,
    "command": ["tame", "train", "vit-digits"],
    "world_size": 1,
    "started": "2026-01-05T10:00:00",
}


CEILING = math.log(17)  # of the attention entropies


def _line(step: int, share: float, noise: np.random.Generator, *, broken: bool, text: bool) -> dict[str, float]:
    """A line of the log after this share of the run."""
    loss = 0.08 + 2.2 * math.exp(-5 * share) * math.exp(0.12 * noise.standard_normal())
    values = {
        "epoch": step / 45,
        "train/loss": math.nan if broken else loss,
        "train/lr": 1e-3 * min(1, share / 0.1 if share else 0.01) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6,
        "train/grad_norm": math.inf if broken else 2.0 * math.exp(-share + 0.35 * noise.standard_normal()),
        "train/clip_rate": max(0.0, min(1.0, 0.9 - share + 0.1 * noise.standard_normal())),
        "train/attention_entropy": CEILING * (1 - 0.4 * share),
        "perf/step_seconds": 0.007,
        "perf/elapsed_seconds": 0.2 + 0.007 * step,
    }
    values["perf/tokens_per_second" if text else "perf/samples_per_second"] = 9_000 + 400 * noise.standard_normal()
    return values


def _evaluation(step: int, share: float, gap: float, *, text: bool) -> dict[str, float]:
    loss = 0.1 + 2.2 * math.exp(-5 * share) + gap
    last = {"eval/perplexity": math.exp(loss)} if text else {"eval/accuracy": 0.98 - 0.88 * math.exp(-6 * share)}
    return {"epoch": step / 45, "eval/loss": loss, **last}


def write_run(
    folder: Path,
    *,
    steps: int = 400,
    every: int = 10,
    layers: int = 4,
    heads: int = 4,
    nan_from: int | None = None,
    nan_steps: tuple[int, ...] = (),
    collapse: tuple[int, int, int] | None = None,
    ending: str | None = "finish",
    overfit: bool = False,
    seed: int = 0,
    layer_name: str = "encoder.blocks.{}.attention",
    text: bool = False,
) -> Path:
    """A run over `steps`; `collapse` is layer, head and step at which that head's entropy falls away."""
    noise = np.random.default_rng(seed)
    writer = RunWriter(folder)
    writer.event(0, "start", f"training for {steps} steps", max_steps=steps)
    writer.event(0, "precision", "bf16 autocast, attention in fp32: measured faster at the start")
    probes = []
    for step in range(0, steps + 1, every):
        share = step / max(steps, 1)
        broken = (nan_from is not None and step >= nan_from) or step in nan_steps
        values = _line(step, share, noise, broken=broken, text=text)
        if nan_from is not None and not broken and step >= nan_from - 5 * every:
            values["train/loss"] *= 1.5 ** ((step - nan_from + 5 * every) / every)
        writer.log(step, values)
        probe: dict[str, float] = {}
        for layer in range(layers):
            name = layer_name.format(layer)
            for head in range(heads):
                entropy = CEILING * (1 - share * (0.2 + 0.6 * ((layer * heads + head) % 5) / 5))
                entropy *= 1 - 0.05 * noise.random()
                if collapse is not None and (layer, head) == collapse[:2] and step >= collapse[2]:
                    entropy = 0.04 * CEILING
                probe[f"diag/attention_entropy/{name}/{head}"] = math.nan if broken else entropy
            probe[f"diag/attention_entropy_max/{name}"] = CEILING
        probes.append(json.dumps({"step": step, **probe}).replace("NaN", '"NaN"') + "\n")
        if step and (step % (10 * every) == 0 or step == steps):
            gap = 0.9 * max(0.0, share - 0.3) ** 2 * 4 if overfit else 0.02
            writer.log(step, _evaluation(step, share, gap, text=text))
            writer.event(step, "checkpoint", f"saved checkpoints/step-{step:06d}")
    if nan_from is not None:
        writer.event(nan_from, "diverged", f"the loss is not finite at step {nan_from}")
    if ending == "finish":
        writer.log(steps, {"test/loss": 0.11, "test/accuracy": 0.972})
    if ending is not None:
        writer.event(steps, ending, {"finish": "all steps done", "stop": "stopped by SIGTERM"}[ending])
    writer.close()
    (folder / "probes.jsonl").write_text("".join(probes))  # by hand: the tests' type checks would take seconds a run
    (folder / "config.yaml").write_text(CONFIG.format(layers=layers, seed=seed))
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT))
    return folder


def picture(svg: str) -> np.ndarray:
    """The colours of a heat map's first image, shape (rows, columns, 3)."""
    from PIL import Image

    found = re.findall(r'href="data:image/png;base64,\s*([^"]+)"', svg)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]))).convert("RGB"))

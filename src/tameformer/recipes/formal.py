"""Formal languages: does an architecture learn a rule, or the lengths it was shown?

Bhattamishra et al. 2020, "On the Ability and Limitations of Transformers to Recognize Formal Languages", arXiv:2009.11264.
A string counts as right when every one of its positions is.

Differs from the paper: cross-entropy instead of the squared error, a begin token in front, fresh strings in every epoch, and
training strings drawn uniformly by length.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches, single_pass
from tameformer.data.formal import Dyck, EvenLength, Language, Parity
from tameformer.data.strings import Question, StringSource
from tameformer.errors import ConfigError
from tameformer.models import Architecture, DecoderConfig, RecurrentDecoderConfig, UniversalDecoderConfig, steps_taken
from tameformer.recipes.assemble import assemble
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.ponder import with_ponder_cost
from tameformer.record import write_figure
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

PREPROCESSING = "preprocessing.json"
WIDTH = 10
"""Lengths that the figure puts together."""


@dataclass(frozen=True, kw_only=True)
class StringsConfig:
    """Strings, generated: nothing is read."""

    language: Literal["parity", "even_length", "dyck"] = "dyck"
    """An even number of ones; (aa)*; balanced brackets."""
    num_types: int = 1
    """Types of brackets of dyck: k."""
    max_depth: int | None = None
    """Deepest nesting of dyck: D; null is any."""
    question: Question = "next_symbols"
    """What is asked: what may follow each prefix, or whether a whole string is a member, half of the strings being none."""
    min_length: int = 2
    """Shortest string, in symbols."""
    max_length: int = 50
    """Longest string in training, in symbols."""
    longest: int = 100
    """Strings longer than `max_length`, up to this, are evaluated apart."""
    num_train_samples: int = 10000
    """Strings of an epoch; each epoch has its own."""
    num_eval_samples: int = 1000
    """Strings evaluated of each range of lengths, never those of training."""
    batch_size: int = 32
    """Strings that one optimizer step sees, over all processes."""
    eval_batch_size: int = 250
    """Strings evaluated at a time."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        for name in ("min_length", "num_train_samples", "num_eval_samples", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not self.min_length <= self.max_length < self.longest:
            raise ValueError(
                "expected data.min_length <= data.max_length < data.longest, "
                f"got {self.min_length}, {self.max_length} and {self.longest}"
            )
        if self.language != "dyck" and (self.num_types != 1 or self.max_depth is not None):
            raise ValueError(f"data.num_types and data.max_depth belong to dyck, got data.language {self.language}")

    @property
    def rule(self) -> Language:
        """The language itself."""
        if self.language == "dyck":
            return Dyck(num_types=self.num_types, max_depth=self.max_depth)
        return Parity() if self.language == "parity" else EvenLength()


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training on a formal language."""

    data: StringsConfig = field(default_factory=StringsConfig)
    """The strings."""
    model: DecoderConfig | UniversalDecoderConfig | RecurrentDecoderConfig = field(
        default_factory=lambda: DecoderConfig(dim=32)
    )
    """A causal Transformer, one layer of it applied several times (universal), or a recurrent network."""
    max_steps: int | None = 2000
    """Optimizer steps; null trains for `num_train_epochs`."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes."""
    data = config.data
    if config.model.max_length <= data.longest:
        raise ConfigError(
            f"model.max_length is {config.model.max_length}, but strings have up to {data.longest} symbols behind a begin "
            f"token: give --model.max_length {data.longest + 1}, or a smaller --data.longest"
        )
    language, question = data.rule, data.question
    train = StringSource(
        language,
        num_samples=data.num_train_samples,
        min_length=data.min_length,
        max_length=data.max_length,
        question=question,
    )
    told = {"num_samples": data.num_eval_samples, "question": question, "salt": "held-out strings"}
    held_out = [
        StringSource(language, min_length=low, max_length=high, **told)
        for low, high in ((data.min_length, data.max_length), (data.max_length + 1, data.longest))
    ]
    symbols = language.symbols
    return assemble(
        config,
        folder=folder,
        model=Architecture.of(config.model, vocab_size=len(symbols) + 1),
        source=train,
        plan=ShuffledBatches(len(train), data.batch_size, seed=config.order_seed),
        loss=with_ponder_cost(string_loss, config.model, real=real_positions),
        unit="tokens",
        evaluate=partial(
            evaluate, sources=held_out, batch_size=data.eval_batch_size, folder=folder, max_length=data.max_length
        ),
        num_workers=data.num_workers,
        artifacts={PREPROCESSING: json.dumps({"symbols": symbols, "begin_and_end": len(symbols)}, indent=1) + "\n"},
    )


def real_positions(batch: Batch) -> Tensor:
    """The begin token and the symbols, not what fills a string up to the longest of its batch."""
    return torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device) <= batch["lengths"][:, None]


def string_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of each answer, summed over all that are asked for, in nats."""
    logits, targets = model(batch["tokens"]), batch["targets"]
    asked = targets >= 0
    return F.binary_cross_entropy_with_logits(logits[asked], targets[asked].to(logits.dtype), reduction="sum")


def evaluate(
    engine: Engine, model: nn.Module, *, sources: Sequence[StringSource], batch_size: int, folder: Path, max_length: int
) -> dict[str, float]:
    """Loss a position and share of strings that are right throughout: of the lengths of training, and of longer ones.

    Of a model whose positions halt by themselves also the steps they take. The curves by length go to the run folder, for the
    report.
    """
    found = [judged(engine, model, source, batch_size) for source in sources]
    halts = steps_taken(model) is not None
    if engine.is_main:
        write_figure(folder, "accuracy-by-length", accuracy_by_length(found, max_length))
        if halts:
            write_figure(folder, "steps-by-length", steps_by_length(found, max_length))
    metrics = {}
    for rows, suffix in zip(found, ("", "_longer"), strict=True):
        metrics[f"loss{suffix}"] = float(rows[:, 2].sum() / rows[:, 3].sum())
        metrics[f"accuracy{suffix}"] = float(rows[:, 1].mean())
        if halts:
            metrics[f"steps{suffix}"] = float(rows[:, 4].mean())
    return metrics


def judged(engine: Engine, model: nn.Module, source: StringSource, batch_size: int) -> np.ndarray:
    """A row a string: its length, whether all answers are right, its loss, positions asked at, mean steps of a position."""
    rows: list[list[float]] = []
    batches = single_pass(
        source, SequentialBatches(len(source), batch_size), rank=engine.rank, world_size=engine.world_size
    )
    for batch in batches:
        placed = engine.place(batch)
        logits, targets = model(placed["tokens"]).float(), placed["targets"]
        asked = targets >= 0
        losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0).float(), reduction="none")
        right = (((logits > 0) == (targets > 0)) | ~asked).flatten(1).all(1)
        total = (losses * asked).flatten(1).sum(1)
        steps, real = steps_taken(model), real_positions(placed)
        taken = torch.zeros_like(total) if steps is None else (steps * real).sum(1) / real.sum(1)
        columns = (placed["lengths"], right, total, asked.any(-1).sum(1), taken)
        rows += torch.stack([column.float() for column in columns], dim=1).tolist()
    return np.array(engine.gather(rows))


def accuracy_by_length(found: Sequence[np.ndarray], max_length: int) -> dict:
    """The share of right strings over their length, as a figure of the report."""
    title = "Strings that are right throughout, by length"
    return {"title": title, "percent": True, **_by_length(found, max_length, column=1)}


def steps_by_length(found: Sequence[np.ndarray], max_length: int) -> dict:
    """The steps that a position takes before it halts over the length of its string, as a figure of the report."""
    return {"title": "Steps of a position, mean by length of its string", **_by_length(found, max_length, column=4)}


def _by_length(found: Sequence[np.ndarray], max_length: int, *, column: int) -> dict:
    """The mean of a column over the length: a line of lengths of training, and one of longer strings."""
    rows = np.concatenate(found)
    beyond = rows[:, 0] > max_length
    bins = np.where(beyond, max_length + (rows[:, 0] - max_length - 1) // WIDTH * WIDTH + WIDTH, 0)
    bins = np.where(beyond, bins, np.minimum(-(-rows[:, 0] // WIDTH) * WIDTH, max_length))
    places = np.unique(bins)
    means = [float(rows[bins == place, column].mean()) for place in places]
    known = [mean if place <= max_length else None for place, mean in zip(places, means, strict=True)]
    longer = [mean if place > max_length else None for place, mean in zip(places, means, strict=True)]
    return {
        "kind": "lines",
        "caption": f"Each point is of lengths up to its place, {WIDTH} of them at most. Training ends at {max_length}.",
        "x": places.tolist(),
        "x_label": "length, symbols",
        "lines": {"lengths of training": known, "longer": longer},
    }

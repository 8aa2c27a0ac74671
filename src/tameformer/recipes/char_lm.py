"""A language model over characters (Karpathy 2015, "The unreasonable effectiveness of recurrent neural networks")."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches, Source
from tameformer.data.text import read_text
from tameformer.data.tokenizers import CharTokenizer
from tameformer.data.windows import EvaluationWindows, TokenWindows
from tameformer.health import prior_loss
from tameformer.models import Architecture, DecoderConfig, RecurrentDecoderConfig, UniversalDecoderConfig
from tameformer.recipes.assemble import assemble, frequencies, require_path
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import one_pass, perplexity, token_loss
from tameformer.recipes.ponder import with_ponder_cost
from tameformer.training import Engine, Run
from tameformer.training.step import Batch


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    """One text, cut into a part to learn and a part to be judged by."""

    path: str | None = None
    """A text file in UTF-8; may be compressed (.gz)."""
    validation_fraction: float = 0.1
    """Share of the text, taken from its end, that is evaluated."""
    tuning_fraction: float = 0.0
    """Share of the learning part, taken from its end, that is evaluated instead, to choose settings by."""
    batch_size: int = 12
    """Windows that one optimizer step sees, over all processes."""
    eval_batch_size: int = 64
    """Windows evaluated at a time."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if not 0 <= self.tuning_fraction < 1:
            raise ValueError(f"data.tuning_fraction must lie in [0, 1), got {self.tuning_fraction}")


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a character-level language model."""

    data: TextDataConfig = field(default_factory=TextDataConfig)
    """The text."""
    model: DecoderConfig | UniversalDecoderConfig | RecurrentDecoderConfig = field(
        default_factory=lambda: DecoderConfig(max_length=64)
    )
    """The decoder, one layer of it applied several times (universal), or a recurrent network; `max_length` is the context."""
    max_steps: int | None = 2000
    """Optimizer steps; null trains for `num_train_epochs`."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; its characters go to `tokenizer.json` in the run folder."""
    text = read_text(require_path(config.data.path, "a text file"))
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    learning, judging = cut(tokens, config.data.validation_fraction)
    if config.data.tuning_fraction:
        learning, judging = cut(learning, config.data.tuning_fraction)
    train = TokenWindows(learning, config.model.max_length)
    return assemble(
        config,
        folder=folder,
        model=Architecture.of(config.model, vocab_size=tokenizer.vocab_size),
        source=train,
        plan=ShuffledBatches(len(train), config.data.batch_size, seed=config.order_seed),
        loss=with_ponder_cost(language_loss, config.model),
        unit="tokens",
        evaluate=partial(
            evaluate,
            source=EvaluationWindows(judging, config.model.max_length),
            batch_size=config.data.eval_batch_size,
        ),
        trivial_loss=prior_loss(frequencies(train, tokenizer.vocab_size).tolist()),
        num_workers=config.data.num_workers,
        artifacts={"tokenizer.json": tokenizer.to_json() + "\n"},
    )


def cut(tokens: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The tokens without a share at the end, and that share."""
    boundary = round(len(tokens) * (1 - fraction))
    return tokens[:boundary], tokens[boundary:]


def language_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the targets that count."""
    return token_loss(model(batch["tokens"]), batch["targets"])


def evaluate(engine: Engine, model: nn.Module, *, source: Source, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy in nats per token, and its exponential."""
    metrics = one_pass(engine, model, source, SequentialBatches(len(source), batch_size), measure)
    return {**metrics, "perplexity": perplexity(metrics["loss"])}


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of windows."""
    return {"loss": language_loss(model, batch)}

"""An encoder that learns to guess hidden words (Devlin et al. 2018, "BERT", arXiv:1810.04805), to be fine-tuned afterwards.

Texts are joined with an end token between and cut into windows, as in RoBERTa's "full sentences" without the next-sentence task
(Liu et al. 2019, arXiv:1907.11692). `text-classification` takes the encoder over with `--init_from RUN`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches
from tameformer.data.masking import MaskedWindows
from tameformer.data.tokenizers import SPECIAL_TOKENS, BPETokenizer, train_bpe
from tameformer.models import Architecture, EncoderConfig
from tameformer.recipes.assemble import assemble
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import one_pass, perplexity
from tameformer.recipes.lm import TOKENIZER, DocumentsConfig, texts
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

MASK = "<mask>"


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Pre-training of an encoder on documents."""

    data: DocumentsConfig = field(default_factory=DocumentsConfig)
    """The documents; a tokenizer.json that is given must have the token <mask>."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder; its `max_length` is the length of a window."""
    mask_rate: float = 0.15
    """Share of the tokens that is to be guessed."""
    num_train_epochs: int | None = 1
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie between 0 and 1, got {self.mask_rate}")


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; a tokenizer in the run folder is used again."""
    learning, judging = texts(config.data)
    tokenizer = find_tokenizer(config.data.tokenizer, folder, learning, config.data.vocab_size)
    made = partial(windows, tokenizer=tokenizer, length=config.model.max_length, rate=config.mask_rate)
    train, held_out = made(learning), made(judging)
    return assemble(
        config,
        folder=folder,
        model=Architecture("masked_language_model", config.model, {"vocab_size": tokenizer.vocab_size}),
        source=train,
        plan=ShuffledBatches(len(train), config.data.batch_size, seed=config.order_seed),
        loss=masked_loss,
        unit="tokens",
        evaluate=partial(evaluate, source=held_out, batch_size=config.data.eval_batch_size),
        num_workers=config.data.num_workers,
        artifacts={TOKENIZER: tokenizer.to_json()},
        mask=lambda batch: {},
    )


def find_tokenizer(given: str | None, folder: Path, learning: Sequence[str], vocab_size: int) -> BPETokenizer:
    """The tokenizer given, the one the run began with, or a new one with a mask."""
    if given is not None:
        return BPETokenizer.load(given)
    kept = folder / TOKENIZER
    return BPETokenizer.load(kept) if kept.is_file() else train_bpe(learning, vocab_size, (*SPECIAL_TOKENS, MASK))


def windows(documents: Sequence[str], *, tokenizer: BPETokenizer, length: int, rate: float) -> MaskedWindows:
    """The documents, an end token after each, in windows."""
    end = np.array([tokenizer.end_id])
    tokens = np.concatenate([part for document in tokenizer.encode_batch(documents) for part in (document, end)])
    mask_id = tokenizer.special_id(MASK)
    return MaskedWindows(
        tokens,
        length,
        vocab_size=tokenizer.vocab_size,
        begin_id=tokenizer.begin_id,
        mask_id=mask_id,
        num_special=mask_id + 1,
        rate=rate,
    )


def masked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the hidden tokens."""
    at = batch["targets"] >= 0
    return F.cross_entropy(model(batch["tokens"], at=at), batch["targets"][at], reduction="sum")


def evaluate(engine: Engine, model: nn.Module, *, source: MaskedWindows, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy in nats per hidden token, its exponential, and the share that was guessed; always the same ones."""
    metrics = one_pass(engine, model, source, SequentialBatches(len(source), batch_size), measure)
    return {**metrics, "perplexity": perplexity(metrics["loss"])}


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of windows."""
    at = batch["targets"] >= 0
    logits, targets = model(batch["tokens"], at=at).float(), batch["targets"][at]
    return {
        "loss": F.cross_entropy(logits, targets, reduction="sum"),
        "accuracy": (logits.argmax(-1) == targets).sum(),
    }

"""A language model over byte-pair tokens: documents packed whole, perplexity told per token and per byte."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches
from tameformer.data.documents import read_documents
from tameformer.data.packing import NO_DOCUMENT, PackedDocuments, pack_texts
from tameformer.data.tokenizers import BPETokenizer, train_bpe
from tameformer.errors import ConfigError
from tameformer.health import prior_loss
from tameformer.models import Architecture, DecoderConfig, RecurrentDecoderConfig, UniversalDecoderConfig
from tameformer.nn.masks import document_mask
from tameformer.recipes.assemble import assemble, frequencies, require_path
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import one_pass, perplexity, token_loss
from tameformer.recipes.ponder import with_ponder_cost
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

TOKENIZER = "tokenizer.json"
Call = Callable[[nn.Module, Batch], Tensor]
"""From a model and a batch of windows to the logits."""


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Documents to learn, and documents to be judged by."""

    path: str | None = None
    """Training documents: a .jsonl file with a text field, a text file, or a folder of text files; .gz is read, too."""
    validation_path: str | None = None
    """Documents that are evaluated; null cuts a share off the training documents."""
    validation_fraction: float = 0.05
    """Share of the training documents, the last ones, that is evaluated when there is no `validation_path`."""
    text_field: str = "text"
    """Field of a .jsonl line that holds the document."""
    split_paragraphs: bool = False
    """Whether plain text is cut into documents at blank lines."""
    vocab_size: int = 8192
    """Tokens of the byte-level BPE that is trained on the training documents."""
    tokenizer: str | None = None
    """A tokenizer.json to use instead of training one."""
    batch_size: int = 32
    """Windows that one optimizer step sees, over all processes."""
    eval_batch_size: int = 32
    """Windows evaluated at a time."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie between 0 and 1, got {self.validation_fraction}")


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a language model on documents."""

    data: DocumentsConfig = field(default_factory=DocumentsConfig)
    """The documents."""
    model: DecoderConfig | UniversalDecoderConfig | RecurrentDecoderConfig = field(default_factory=DecoderConfig)
    """The decoder, one layer of it applied several times (universal), or a recurrent network; `max_length` is the context."""
    num_train_epochs: int | None = 1
    """Passes over the training data; `max_steps` wins when both are given."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; a tokenizer in the run folder is used again."""
    learning, judging = texts(config.data)
    tokenizer = find_tokenizer(config.data, folder, learning)
    train, held_out = (pack_texts(part, tokenizer, config.model.max_length) for part in (learning, judging))
    call = remembered if isinstance(config.model, RecurrentDecoderConfig) else attended
    return assemble(
        config,
        folder=folder,
        model=Architecture.of(config.model, vocab_size=tokenizer.vocab_size),
        source=train,
        plan=ShuffledBatches(len(train), config.data.batch_size, seed=config.order_seed),
        loss=with_ponder_cost(partial(packed_loss, call=call), config.model, real=real_positions),
        unit="tokens",
        evaluate=partial(evaluate, source=held_out, batch_size=config.data.eval_batch_size, call=call),
        trivial_loss=prior_loss(frequencies(train, tokenizer.vocab_size).tolist()),
        num_workers=config.data.num_workers,
        artifacts={TOKENIZER: tokenizer.to_json()},
        mask=lambda batch: {"encoder": real_positions(batch)},
    )


def texts(data: DocumentsConfig) -> tuple[list[str], list[str]]:
    """Documents to learn and documents to be judged by.

    Raises:
        ConfigError: No path, or too few documents to cut a share off.
    """
    path = require_path(data.path, "documents (.jsonl, text, or a folder of text files)")
    documents = read_documents(path, data.text_field, blank_lines_separate=data.split_paragraphs)
    if data.validation_path is not None:
        held_out = read_documents(data.validation_path, data.text_field, blank_lines_separate=data.split_paragraphs)
        return documents, held_out
    count = max(1, round(len(documents) * data.validation_fraction))
    if count >= len(documents):
        raise ConfigError(
            f"{path} holds {len(documents)} document, too few to cut off some for evaluation; give --data.validation_path, "
            f"or --data.split_paragraphs true for a plain text"
        )
    return documents[:-count], documents[-count:]


def find_tokenizer(data: DocumentsConfig, folder: Path, learning: list[str]) -> BPETokenizer:
    """The tokenizer given, the one the run began with, or a new one."""
    if data.tokenizer is not None:
        return BPETokenizer.load(data.tokenizer)
    kept = folder / TOKENIZER
    return BPETokenizer.load(kept) if kept.is_file() else train_bpe(learning, data.vocab_size)


def real_positions(batch: Batch) -> Tensor:
    """Where a window holds a document."""
    return batch["documents"] != NO_DOCUMENT


def attended(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a Transformer, in which no document sees another."""
    return model(batch["tokens"], mask=document_mask(batch["documents"]), positions=batch["positions"])


def remembered(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a recurrent network, which forgets one document before the next."""
    return model(batch["tokens"], positions=batch["positions"])


def packed_loss(model: nn.Module, batch: Batch, *, call: Call = attended) -> Tensor:
    """Cross-entropy summed over the targets."""
    return token_loss(call(model, batch), batch["targets"])


def evaluate(
    engine: Engine, model: nn.Module, *, source: PackedDocuments, batch_size: int, call: Call = attended
) -> dict[str, float]:
    """Mean cross-entropy in nats per token; perplexity per token, and per byte of the text (end tokens included)."""
    metrics = one_pass(engine, model, source, SequentialBatches(len(source), batch_size), partial(measure, call=call))
    assert source.total_bytes is not None, "pack_texts counts them"
    loss = metrics["loss"]
    per_byte = loss * source.total_targets / source.total_bytes
    return {
        **metrics,
        "perplexity": perplexity(loss),
        "perplexity_per_byte": perplexity(per_byte),
        "bits_per_byte": per_byte / math.log(2),
    }


def measure(model: nn.Module, batch: Batch, *, call: Call) -> Mapping[str, Tensor]:
    """Sums over a batch of windows."""
    return {"loss": packed_loss(model, batch, call=call)}

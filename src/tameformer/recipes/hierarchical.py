"""Documents by their words and sentences, and which of them counted (Yang et al. 2016, "Hierarchical Attention Networks")."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SampleKeys, SequentialBatches
from tameformer.data.labelled import LabelledText
from tameformer.data.length_buckets import LengthBuckets
from tameformer.data.sentences import TokenizedDocuments, sentences
from tameformer.data.tokenizers import BPETokenizer, train_bpe
from tameformer.errors import ConfigError
from tameformer.models import Architecture
from tameformer.models.hierarchical import HierarchicalClassifier, HierarchicalConfig
from tameformer.recipes.assemble import assemble
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.curriculum import with_curriculum
from tameformer.recipes.evaluation import class_sums, one_pass
from tameformer.recipes.text_classification import (
    TOKENIZER,
    LabelledTextsConfig,
    marks,
    noise,
    read,
    special_tokens,
)
from tameformer.record import write_figure
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

SHOWN = 6
Show = Callable[[Engine, nn.Module, TokenizedDocuments], None]
"""Writes what is to be seen of a few documents."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a classifier of documents."""

    data: LabelledTextsConfig = field(default_factory=LabelledTextsConfig)
    """Documents and their classes; `eval_max_tokens` bounds the padded tokens that are evaluated at a time."""
    model: HierarchicalConfig = field(default_factory=HierarchicalConfig)
    """The classifier; `max_words` and `max_sentences` are what is read of a document."""
    num_train_epochs: int | None = 5
    """Passes over the training data; `max_steps` wins when both are given."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; a tokenizer in the run folder is used again, and the attention goes there."""
    rows, judging, to_test, num_classes = read(config.data, config.order_seed)
    if rows[0].pair is not None:
        raise ConfigError(f"{config.data.path} holds pairs of texts; expected documents in a column text or sentence")
    kept = folder / TOKENIZER
    special = special_tokens(config.data)
    tokenizer = (
        BPETokenizer.load(kept)
        if kept.is_file()
        else train_bpe([row.text for row in rows], config.data.vocab_size, special)
    )
    tokenized = partial(tokenized_documents, tokenizer=tokenizer, model=config.model)
    train, held_out = tokenized(rows), tokenized(judging)
    train = replace(train, transforms=noise(config.data, marks(config.data, tokenizer)))
    told = {
        "vocab_size": tokenizer.vocab_size,
        "num_classes": num_classes,
        "padding_id": tokenizer.padding_id,
    }
    batch_size = config.data.batch_size
    buckets = LengthBuckets(train.lengths, batch_size, seed=config.order_seed)
    judged = partial(evaluate, batch_size=max(1, config.data.eval_max_tokens // config.model.max_words))
    return assemble(
        config,
        folder=folder,
        model=Architecture("hierarchical_classifier", config.model, told),
        source=train,
        plan=with_curriculum(buckets, config.data.curriculum, train.lengths, batch_size, config=config),
        loss=document_loss,
        unit="samples",
        evaluate=partial(judged, source=held_out, show=partial(write_attention, tokenizer=tokenizer, folder=folder)),
        test=None if to_test is None else partial(judged, source=tokenized(to_test)),
        num_workers=config.data.num_workers,
        artifacts={TOKENIZER: tokenizer.to_json()},
        mask=lambda batch: {},
    )


def tokenized_documents(
    rows: Sequence[LabelledText], *, tokenizer: BPETokenizer, model: HierarchicalConfig
) -> TokenizedDocuments:
    """The first sentences of each text, and of each sentence the first tokens."""
    parts = [sentences(row.text)[: model.max_sentences] for row in rows]
    flat = iter(tokenizer.encode_batch([sentence for document in parts for sentence in document]))
    documents = []
    for document in parts:
        encoded = [next(flat)[: model.max_words].tolist() for _ in document]
        documents.append([sentence for sentence in encoded if sentence] or [[tokenizer.end_id]])
    return TokenizedDocuments(documents, np.array([row.label for row in rows], dtype=np.int64), tokenizer.padding_id)


def document_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the documents."""
    return F.cross_entropy(model(batch["tokens"], real=batch["real"]), batch["labels"], reduction="sum")


def evaluate(
    engine: Engine, model: nn.Module, *, source: TokenizedDocuments, batch_size: int, show: Show | None = None
) -> dict[str, float]:
    """Mean cross-entropy, and the share of documents whose class was recognized; `show` is given the documents to show."""
    metrics = one_pass(engine, model, source, SequentialBatches(len(source), batch_size), measure)
    if show is not None and engine.is_main:
        show(engine, model, source)
    return metrics


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of documents."""
    return class_sums(model(batch["tokens"], real=batch["real"]), batch["labels"])


def write_attention(
    engine: Engine, model: nn.Module, source: TokenizedDocuments, *, tokenizer: BPETokenizer, folder: Path
) -> None:
    """What a few held-out documents were classified by, for the report: each share relative to the largest beside it."""
    if not isinstance(model, HierarchicalClassifier):
        raise TypeError(f"expected a HierarchicalClassifier, got {type(model).__name__}")
    batch = engine.place(source.fetch(SampleKeys(0, 0, np.arange(min(SHOWN, len(source))))))
    shares = model.attention(batch["tokens"], real=batch["real"])
    guesses = model(batch["tokens"], real=batch["real"]).argmax(-1).tolist()
    passages = []
    for row, document in enumerate(source.documents[: len(guesses)]):
        sentence_shares, word_shares = shares.sentences[row], shares.words[row]
        lines = []
        for place, sentence in enumerate(document):
            words = word_shares[place, : len(sentence)]
            weights = (words / words.max()).tolist()
            texts = [tokenizer.decode([token]) for token in sentence]
            lines.append(
                [float(sentence_shares[place] / sentence_shares.max()), list(zip(texts, weights, strict=True))]
            )
        heading = f"Document {row}: class {int(source.labels[row])}, taken for {guesses[row]}"
        passages.append({"heading": heading, "lines": lines})
    write_figure(folder, "attention", {"kind": "passages", "title": "Attention", "caption": "", "passages": passages})

"""Texts or pairs of texts into classes, best from an encoder that was pre-trained: one of ours, or a Hugging Face model.

The defaults of the recipe are those of Mosbach et al. 2021, arXiv:2006.04884: bias-corrected Adam, 10 % warm-up, linear decay,
20 epochs, several evaluations an epoch, the best checkpoint kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import permutation, single_pass
from tameformer.data.augment import TokenDeletion, TokenDropout, TokenSwap, TokenTransform
from tameformer.data.buckets import LengthSortedBatches
from tameformer.data.labelled import LabelledText, TokenizedTexts, classes_of, joined, read_labelled
from tameformer.data.length_buckets import LengthBuckets
from tameformer.data.tokenizers import SPECIAL_TOKENS, BPETokenizer, train_bpe
from tameformer.errors import CheckpointError, ConfigError, DataError
from tameformer.models import (
    Architecture,
    ConvolutionalTextConfig,
    RecurrentTextConfig,
    TextClassifierConfig,
    TokenSetConfig,
)
from tameformer.recipes.assemble import assemble, num_steps, require_path, seeded
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.curriculum import CurriculumConfig, with_curriculum
from tameformer.recipes.finetune import FinetuneConfig, finish, prepare
from tameformer.recipes.hugging_face import describe, empty_model, is_kept
from tameformer.recipes.init_from import begun
from tameformer.recipes.pretrained import check_tokens, is_of_library, load_pretrained, load_tokenizer
from tameformer.training import CheckpointFolder, Engine, Run
from tameformer.training.step import Batch

TOKENIZER, MASK = "tokenizer.json", "<mask>"
Call = Callable[[nn.Module, Batch], Tensor]
"""From a model and a batch to the logits."""


@dataclass(frozen=True, kw_only=True)
class LabelledTextsConfig:
    """Texts and classes: .jsonl, .csv or .tsv files with a column text or sentence, or sentence1 and sentence2, and label."""

    path: str | None = None
    """Training texts; may be compressed (.gz)."""
    validation_path: str | None = None
    """Texts that are evaluated; null cuts a share off the training texts."""
    validation_fraction: float = 0.1
    """Share of the training texts, the last ones, that is evaluated when there is no `validation_path`."""
    test_path: str | None = None
    """Texts that are evaluated once, at the end; null tests nothing."""
    label_column: str = "label"
    """Column that holds the number of the class, from 0."""
    num_classes: int | None = None
    """Classes; null is one more than the largest label in the training texts."""
    train_samples: int | None = None
    """Training texts to learn from, drawn by the data's seed; null takes all."""
    token_dropout: float = 0.0
    """Share of the training tokens that a mask stands in for, anew in each pass."""
    token_deletion: float = 0.0
    """Share of the training tokens that are left out, anew in each pass."""
    token_swap: int = 0
    """Places by which training tokens are moved at most, anew in each pass; in a pair, some change sides. 0 leaves all."""
    vocab_size: int = 4096
    """Tokens of the byte-level BPE that is trained on the training texts where nothing pre-trained brings one."""
    batch_size: int = 16
    """Texts that one optimizer step sees, over all processes."""
    eval_max_tokens: int = 8192
    """Padded tokens evaluated at a time."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Short texts first."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        for name in ("train_samples", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        for name in ("token_dropout", "token_deletion"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"data.{name} must lie in [0, 1), got {getattr(self, name)}; it is a share of the tokens"
                )
        if self.token_swap < 0:
            raise ValueError(f"data.token_swap must not be negative, got {self.token_swap}")


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a text classifier."""

    data: LabelledTextsConfig = field(default_factory=LabelledTextsConfig)
    """Texts and their classes."""
    model: TextClassifierConfig | ConvolutionalTextConfig | RecurrentTextConfig | TokenSetConfig = field(
        default_factory=TextClassifierConfig
    )
    """A Transformer, one that is not told the order of the tokens (set), or a convolutional or recurrent network. Of a Hugging
    Face model in `init_from` only `max_length` counts: the rest is what the folder says."""
    init_from: str | None = None
    """Run, checkpoint or exported folder of ours, or a Hugging Face folder or name, to start from; the head starts afresh."""
    replace_head: bool = False
    """With a Hugging Face model: let a head that was trained for another number of classes start afresh."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """What is done to pre-trained weights."""
    evals_per_epoch: int | None = None
    """Evaluations in each pass over the data; null leaves it to `loop.eval_steps`."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evals_per_epoch is not None and self.evals_per_epoch < 1:
            raise ValueError(f"evals_per_epoch must be at least 1, got {self.evals_per_epoch}")
        if self.evals_per_epoch is not None and self.loop.eval_steps is not None:
            raise ValueError("evals_per_epoch and loop.eval_steps say the same in two ways; give one")
        if self.init_from is not None and not isinstance(self.model, TextClassifierConfig):
            raise ValueError(
                f"init_from brings the weights of a Transformer, but model.architecture is {self.model.architecture}; "
                "leave one of them out"
            )
        if self.replace_head and self.init_from is None:
            raise ValueError("replace_head is about the head of init_from; give that, or leave replace_head out")


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; a tokenizer of ours in the run folder is used again."""
    rows, judging, to_test, num_classes = read(config.data, config.order_seed)
    starts = not CheckpointFolder(folder).steps()
    parts = _hugging_face if is_of_library(config.init_from, folder, starts=starts) else _ours
    model, tokenized, call, artifacts, marks = parts(config, folder, rows, num_classes, starts)
    prepare(model, config.finetune, seed=config.seed, starts=starts)
    train, held_out = tokenized(rows), tokenized(judging)
    if config.data.token_deletion and train.segments is not None and any(map(np.any, train.segments)):
        raise ConfigError(
            "data.token_deletion does not work with a model that is told which text of a pair a token is in; leave it out"
        )
    train = replace(train, transforms=noise(config.data, marks))
    batch_size = config.data.batch_size
    buckets = LengthBuckets(train.lengths, batch_size, seed=config.order_seed)
    plan = with_curriculum(buckets, config.data.curriculum, train.lengths, batch_size, config=config)
    if config.evals_per_epoch is not None:
        every = max(1, math.ceil(buckets.steps_in_epoch(0) / config.evals_per_epoch))
        config = replace(
            config, evals_per_epoch=None, loop=replace(config.loop, eval_steps=min(every, num_steps(config, plan)))
        )
    judged = partial(evaluate, call=call, max_tokens=config.data.eval_max_tokens, num_classes=num_classes)
    run = assemble(
        config,
        folder=folder,
        model=model,
        source=train,
        plan=plan,
        loss=partial(classification_loss, call=call),
        unit="samples",
        evaluate=partial(judged, source=held_out),
        test=None if to_test is None else partial(judged, source=tokenized(to_test)),
        num_workers=config.data.num_workers,
        artifacts=artifacts,
        mask=lambda batch: {"encoder": batch["real"]},
    )
    return finish(run, config.finetune)


def read(
    data: LabelledTextsConfig, seed: int
) -> tuple[list[LabelledText], list[LabelledText], list[LabelledText] | None, int]:
    """Texts to learn, to be judged by, and to be tested on; and how many classes they are of.

    Raises:
        ConfigError: No path, or too few texts.
        DataError: A row that is none, pairs in one file and single texts in another, or classes that nobody can count.
    """
    path = require_path(data.path, "labelled texts (.jsonl, .csv or .tsv)")
    told: dict[str, Any] = {"label_column": data.label_column, "num_classes": data.num_classes}
    rows = read_labelled(path, **told)
    told["num_classes"] = num_classes = data.num_classes or classes_of(rows)
    to_test = None if data.test_path is None else read_labelled(data.test_path, **told)
    if data.validation_path is not None:
        judging = read_labelled(data.validation_path, **told)
    else:
        count = max(1, round(len(rows) * data.validation_fraction))
        if count >= len(rows):
            raise ConfigError(f"{path} holds {len(rows)} text, too few to evaluate some; give --data.validation_path")
        rows, judging = rows[:-count], rows[-count:]
    for other in (judging, to_test or []):
        if other and (other[0].pair is None) != (rows[0].pair is None):
            kinds = ("single texts", "pairs") if rows[0].pair is None else ("pairs", "single texts")
            raise DataError(f"{rows[0].where}: {kinds[0]}, but {other[0].where}: {kinds[1]}; give files of one kind")
    if data.train_samples is not None:
        if data.train_samples > len(rows):
            raise ConfigError(
                f"data.train_samples is {data.train_samples}, but there are {len(rows)} training texts; give fewer, or null"
            )
        chosen = permutation(len(rows), seed=seed, epoch=0, salt="train samples")[: data.train_samples]
        rows = [rows[index] for index in sorted(chosen.tolist())]
    return rows, judging, to_test, num_classes


@dataclass(frozen=True)
class Marks:
    """The tokens that are no words."""

    mask: int | None
    """Stands in for a dropped token, where the tokenizer has one."""
    special: tuple[int, ...]
    """Begin, end and the like: noise leaves them alone."""


def special_tokens(data: LabelledTextsConfig) -> tuple[str, ...]:
    """Those of a tokenizer that is trained here: a mask, too, where tokens are dropped."""
    return (*SPECIAL_TOKENS, MASK) if data.token_dropout else SPECIAL_TOKENS


def marks(data: LabelledTextsConfig, tokenizer: BPETokenizer) -> Marks:
    """The tokens of a tokenizer of ours that are no words."""
    mask = tokenizer.special_id(MASK) if data.token_dropout else None
    return Marks(mask, (tokenizer.padding_id, tokenizer.begin_id, tokenizer.end_id))


def noise(data: LabelledTextsConfig, marks: Marks) -> tuple[TokenTransform, ...]:
    """What is done to the training tokens.

    Raises:
        ConfigError: Tokens shall be dropped, and the tokenizer has no token to stand in for them.
    """
    if data.token_dropout and marks.mask is None:
        raise ConfigError(
            "data.token_dropout needs a tokenizer with a mask or an unknown token, and this one has neither; leave it out"
        )
    found: list[TokenTransform] = []
    if data.token_swap:
        found.append(TokenSwap(distance=data.token_swap, protected=marks.special))
    if data.token_deletion:
        found.append(TokenDeletion(probability=data.token_deletion, protected=marks.special))
    if data.token_dropout and marks.mask is not None:
        found.append(TokenDropout(replacement=marks.mask, probability=data.token_dropout, protected=marks.special))
    return tuple(found)


Parts = tuple[nn.Module, Callable[[Sequence[LabelledText]], TokenizedTexts], Call, Mapping[str, str], Marks]


def _ours(config: Config, folder: Path, rows: Sequence[LabelledText], num_classes: int, starts: bool) -> Parts:
    """A classifier of ours, fresh or with the encoder of another run."""
    places = [folder]
    if config.init_from is not None:
        given = Path(config.init_from)
        places.append(given.parent.parent if given.parent.name == "checkpoints" else given)
    kept = next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)
    if kept is None and config.init_from is not None:
        raise ConfigError(
            f"init_from {config.init_from} holds no {TOKENIZER}, so that its token numbers mean nothing here"
        )
    texts = [text for row in rows for text in (row.text, row.pair) if text is not None]
    if kept is None:
        tokenizer = train_bpe(texts, config.data.vocab_size, special_tokens(config.data))
    else:
        tokenizer = BPETokenizer.load(kept)
    told = {"vocab_size": tokenizer.vocab_size, "num_classes": num_classes}
    fresh = ("head.", "pooling.", "mix.")
    model, artifacts = begun(
        Architecture.of(config.model, **told), config.seed, config.init_from, fresh=fresh, starts=starts
    )

    def tokenized(rows: Sequence[LabelledText]) -> TokenizedTexts:
        firsts = tokenizer.encode_batch([row.text for row in rows])
        seconds = tokenizer.encode_batch([row.pair or "" for row in rows])
        tokens = [
            joined(
                first,
                None if row.pair is None else second,
                begin_id=tokenizer.begin_id,
                end_id=tokenizer.end_id,
                max_length=config.model.max_length,
            )
            for row, first, second in zip(rows, firsts, seconds, strict=True)
        ]
        return TokenizedTexts(tokens, np.array([row.label for row in rows]), tokenizer.padding_id)

    return model, tokenized, _call_ours, {TOKENIZER: tokenizer.to_json(), **artifacts}, marks(config.data, tokenizer)


def _hugging_face(config: Config, folder: Path, rows: Sequence[LabelledText], num_classes: int, starts: bool) -> Parts:
    """A Hugging Face model with its own tokenizer."""
    name = config.init_from
    assert name is not None, "asked for by init_from"
    if isinstance(config.model, TextClassifierConfig) and config.model.layer_mix:
        raise ConfigError(
            "model.layer_mix works with our own encoders; use tameformer.nn.layer_mix.LayerMix in your own loop"
        )
    goes_on = not starts and is_kept(folder)  # a resumed run needs the first no more
    library = load_tokenizer(str(folder) if goes_on else name)
    load = partial(
        load_pretrained, name, "text-classification", num_labels=num_classes, replace_head=config.replace_head
    )
    try:
        model = seeded(config.seed, partial(empty_model, folder) if goes_on else load)
    except CheckpointError as error:
        told = str(error).replace("replace_head=True", "--replace_head true")
        raise ConfigError(
            f"init_from {told.replace('give the number', 'give --data.num_classes, the number')}"
        ) from error
    known: Any = model
    if known.config.pad_token_id is None:
        known.config.pad_token_id = library.pad_token_id
    kept = describe(model, library)

    def tokenized(rows: Sequence[LabelledText]) -> TokenizedTexts:
        pairs = None if rows[0].pair is None else [row.pair for row in rows]
        found = library([row.text for row in rows], pairs, truncation=True, max_length=config.model.max_length)
        check_tokens(name, known, library, found["input_ids"], [row.where for row in rows])
        segments = found.get("token_type_ids")
        return TokenizedTexts(
            [np.array(ids, dtype=np.int64) for ids in found["input_ids"]],
            np.array([row.label for row in rows]),
            library.pad_token_id,
            None if segments is None else [np.array(ids, dtype=np.int64) for ids in segments],
        )

    mask = library.mask_token_id if library.mask_token_id is not None else library.unk_token_id
    return model, tokenized, _call_hugging_face, kept, Marks(mask, tuple(library.all_special_ids))


def _call_ours(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["tokens"], real=batch["real"])


def _call_hugging_face(model: nn.Module, batch: Batch) -> Tensor:
    segments = {"token_type_ids": batch["segments"]} if "segments" in batch else {}
    return model(input_ids=batch["tokens"], attention_mask=batch["real"].long(), **segments).logits


def classification_loss(model: nn.Module, batch: Batch, *, call: Call) -> Tensor:
    """Cross-entropy summed over the texts."""
    return F.cross_entropy(call(model, batch), batch["labels"], reduction="sum")


def evaluate(
    engine: Engine, model: nn.Module, *, source: TokenizedTexts, call: Call, max_tokens: int, num_classes: int
) -> dict[str, float]:
    """Mean cross-entropy, and the scores of the predictions; F1 is of class 1 where there are two, else the mean of all."""
    plan = LengthSortedBatches(source.lengths, max(max_tokens, int(source.lengths.max())))
    found: list[tuple[int, int, float]] = []
    for batch in single_pass(source, plan, rank=engine.rank, world_size=engine.world_size):
        placed = engine.place(batch)
        logits, labels = call(model, placed).float(), placed["labels"]
        losses = F.cross_entropy(logits, labels, reduction="none")
        found += zip(labels.tolist(), logits.argmax(-1).tolist(), losses.tolist(), strict=True)
    labels, guesses, losses = map(np.array, zip(*engine.gather(found), strict=True))
    return {"loss": float(losses.mean()), **scores(labels, guesses, num_classes=num_classes)}


def scores(labels: np.ndarray, guesses: np.ndarray, *, num_classes: int) -> dict[str, float]:
    """Accuracy, F1 and the correlation of Matthews; the last two are 0 where nothing is guessed right, or all alike.

    Example:
        >>> scores(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), num_classes=2)["accuracy"]
        0.75
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average: Any = "binary" if num_classes == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, average=average, zero_division=0.0)),  # pyright: ignore[reportArgumentType]
        "matthews": float(matthews_corrcoef(labels, guesses)),
    }

"""Translation with an encoder-decoder.

A Transformer (Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762), or a recurrent one with additive attention
or without (Bahdanau et al. 2014, arXiv:1409.0473).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from torch import Tensor, nn

from tameformer.data.buckets import LengthSortedBatches, TokenBuckets
from tameformer.data.curriculum import within_tokens
from tameformer.data.pairs import PairSource, read_pairs, read_pairs_tsv, tokenized_pairs
from tameformer.data.tokenizers import BPETokenizer, train_bpe
from tameformer.errors import ConfigError
from tameformer.health import prior_loss
from tameformer.models import Architecture, EncoderDecoder, EncoderDecoderConfig
from tameformer.models.generate import Steps, beam_search, translation_steps, until_end
from tameformer.models.recurrent_translation import RecurrentSteps, RecurrentTranslation, RecurrentTranslationConfig
from tameformer.recipes.assemble import assemble, frequencies, require_path
from tameformer.recipes.bleu import bleu_scores, bleu_signatures
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.curriculum import CurriculumConfig, with_curriculum
from tameformer.recipes.evaluation import joined, one_pass, perplexity, placed_batches, token_loss
from tameformer.record import write_figure
from tameformer.training import Engine, Run
from tameformer.training.run import Evaluation
from tameformer.training.step import Batch

Pairs = Sequence[tuple[str, str]]
Search = Callable[[Steps, int, int], Tensor]
"""From a model's steps, the most new tokens, and the end token to the tokens of each row."""
TOKENIZER, PREPROCESSING = "tokenizer.json", "preprocessing.json"
SIGNATURES = "bleu.json"


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Sentences and their translations: columns of a .tsv file, or PREFIX.SOURCE and PREFIX.TARGET line by line."""

    path: str | None = None
    """Training pairs: a .tsv file, or the prefix of two files (`data/train` for data/train.en and data/train.de)."""
    validation_path: str | None = None
    """Pairs evaluated during the run, in the same form."""
    test_path: str | None = None
    """Pairs translated once, at the end, in the same form; null translates the validation pairs."""
    source_language: str = "en"
    """Ending of the file of sentences to translate."""
    target_language: str = "de"
    """Ending of the file of their translations; with a .tsv, too, `test/bleu_tokenized` cuts words by its rules."""
    columns: tuple[int, int] | None = None
    """Columns of a .tsv that hold the sentences and their translations, from 1; null expects two, in this order."""
    lowercase: bool = False
    """Whether all text is put in lower case first, as some published figures are."""
    vocab_size: int = 8192
    """Tokens of the byte-level BPE that both languages share."""
    max_length: int = 128
    """Longest source or target, in tokens; longer training pairs are dropped, and their number is logged."""
    max_tokens: int = 4096
    """Padded tokens, source and target together, that one optimizer step sees at most."""
    eval_max_tokens: int = 8192
    """Padded tokens evaluated at a time."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Short pairs first."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        if self.columns is not None and (len(set(self.columns)) < 2 or min(self.columns) < 1):
            raise ValueError(f"data.columns must be two different numbers from 1, got {list(self.columns)}")


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How translations are searched for."""

    num_beams: int = 4
    """Sentences kept at each step of the search."""
    length_penalty: float = 0.6
    """Exponent of the length normalization; more prefers longer translations."""
    extra_length: int = 20
    """A translation may have this many tokens more than 1.5 times its source."""
    eval_sentences: int | None = None
    """Sentences translated at each evaluation for `eval/bleu`; null translates none before the end."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a translation model."""

    data: PairsConfig = field(default_factory=PairsConfig)
    """The pairs."""
    model: EncoderDecoderConfig | RecurrentTranslationConfig = field(default_factory=EncoderDecoderConfig)
    """The encoder-decoder."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """The search for translations."""
    label_smoothing: float = 0.1
    """Probability mass of a target that is spread over all tokens."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; a tokenizer in the run folder is used again.

    The folder gets the signatures of the BLEU scores, too.
    """
    data = config.data
    pairs = read(data, require_path(data.path, "pairs (a .tsv file, or the prefix of two files)"))
    validation = read(data, require_path(data.validation_path, "pairs to evaluate on (--data.validation_path)"))
    kept = folder / TOKENIZER
    tokenizer = (
        BPETokenizer.load(kept)
        if kept.is_file()
        else train_bpe([text for pair in pairs for text in pair], data.vocab_size)
    )
    train = tokenized_pairs(pairs, tokenizer, max_length=data.max_length)
    held_out = tokenized_pairs(validation, tokenizer, max_length=config.model.max_length, too_long="refuse")
    told = {"vocab_size": tokenizer.vocab_size, "padding_id": tokenizer.padding_id}
    to_test = read(data, data.test_path) if data.test_path is not None else validation
    translated = partial(
        translation_quality,
        tokenizer=tokenizer,
        decoding=config.decoding,
        max_tokens=data.eval_max_tokens,
        language=data.target_language,
    )
    parts = config.gradient_accumulation_steps * PartialState().num_processes
    evaluate: Evaluation = partial(evaluate_loss, source=held_out, max_tokens=data.eval_max_tokens)
    if config.decoding.eval_sentences is not None:
        evaluate = joined(evaluate, partial(translated, pairs=validation[: config.decoding.eval_sentences]))
    return assemble(
        config,
        folder=folder,
        model=Architecture.of(config.model, **told),
        source=train,
        plan=with_curriculum(
            TokenBuckets(train.lengths, data.max_tokens, seed=config.order_seed, min_batch_size=parts),
            data.curriculum,
            train.lengths,
            within_tokens(train.lengths, data.max_tokens),
            config=config,
            min_batch_size=parts,
        ),
        loss=partial(translation_loss, label_smoothing=config.label_smoothing),
        unit="tokens",
        evaluate=evaluate,
        test=partial(translated, pairs=to_test, folder=folder),
        trivial_loss=prior_loss(
            frequencies(train, tokenizer.vocab_size).tolist(), label_smoothing=config.label_smoothing
        ),
        num_workers=data.num_workers,
        artifacts={
            TOKENIZER: tokenizer.to_json(),
            PREPROCESSING: json.dumps({"lowercase": data.lowercase}, indent=1) + "\n",
            SIGNATURES: json.dumps(bleu_signatures(data.target_language), indent=1) + "\n",
        },
        mask=lambda batch: {"encoder": batch["source_mask"], "decoder": batch["targets"] >= 0},
    )


def read(data: PairsConfig, path: str) -> Pairs:
    """The pairs of a .tsv file, or of the two files that begin with the path.

    Raises:
        ConfigError: Columns of two files.
    """
    if path.endswith((".tsv", ".tsv.gz")):
        pairs = read_pairs_tsv(path, columns=data.columns)
    elif data.columns is not None:
        raise ConfigError(f"data.columns is about .tsv files, and {path} is none; leave it out, or name the languages")
    else:
        pairs = read_pairs(_beside(path, data.source_language), _beside(path, data.target_language))
    return [(source.lower(), target.lower()) for source, target in pairs] if data.lowercase else pairs


def _beside(prefix: str, language: str) -> Path:
    plain, packed = Path(f"{prefix}.{language}"), Path(f"{prefix}.{language}.gz")
    return packed if packed.is_file() and not plain.is_file() else plain


def translation_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the target tokens."""
    logits = model(batch["source"], batch["target_in"], source_mask=batch["source_mask"])
    return token_loss(logits, batch["targets"], label_smoothing=label_smoothing)


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of pairs."""
    return {"loss": translation_loss(model, batch)}


def evaluate_loss(engine: Engine, model: nn.Module, *, source: PairSource, max_tokens: int) -> dict[str, float]:
    """Mean cross-entropy in nats per target token, without smoothing, and its exponential."""
    metrics = one_pass(engine, model, source, LengthSortedBatches(source.lengths, max_tokens), measure)
    return {**metrics, "perplexity": perplexity(metrics["loss"])}


def translation_quality(
    engine: Engine,
    model: nn.Module,
    *,
    pairs: Pairs,
    tokenizer: BPETokenizer,
    decoding: DecodingConfig,
    max_tokens: int,
    language: str,
    folder: Path | None = None,
) -> dict[str, float]:
    """BLEU of the model's translations, as `bleu_scores` has it; with a run folder, by length for its report, too."""
    translations = translate(engine, model, [source for source, _ in pairs], tokenizer, decoding, max_tokens)
    if folder is not None and engine.is_main:
        write_bleu_by_length(folder, pairs, translations, language)
    return bleu_scores(translations, [target for _, target in pairs], language=language)


def write_bleu_by_length(folder: Path, pairs: Pairs, translations: Sequence[str], language: str) -> None:
    """Lower-cased BLEU over sources of about equal length, for the report: fifths of the sentences, from short to long."""
    lengths = np.array([len(source.split()) for source, _ in pairs])
    fifths = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 5) if len(part)]
    places, scores = [], []
    for part in fifths:
        chosen = part.tolist()
        ours, theirs = [str(translations[i]) for i in chosen], [pairs[i][1] for i in chosen]
        found = bleu_scores(ours, theirs, language=language)
        place = float(lengths[part].mean())
        places.append(place if not places else max(place, places[-1]))
        scores.append(found["bleu_lowercased"])
    caption = f"Fifths of {len(pairs):,} sentences from short to long; lower-cased BLEU."
    title, label = "BLEU by sentence length", "words of the source, mean of a fifth"
    lines = {"BLEU": scores}
    figure = {"kind": "lines", "title": title, "caption": caption, "x": places, "x_label": label, "lines": lines}
    write_figure(folder, "bleu-by-length", figure)


def translate(
    engine: Engine,
    model: nn.Module,
    sentences: Sequence[str],
    tokenizer: BPETokenizer,
    decoding: DecodingConfig,
    max_tokens: int,
    search: Search | None = None,
) -> list[str]:
    """A translation of each sentence, in order, by a beam search or another one; the work is shared by all processes."""
    search = search or partial(beams, decoding=decoding)
    source = tokenized_pairs([(sentence, "") for sentence in sentences], tokenizer)
    plan = LengthSortedBatches(source.lengths[:, :1], max(1, max_tokens // decoding.num_beams))
    found: list[tuple[int, str]] = []
    for keys, batch in placed_batches(engine, source, plan):
        steps, max_length = decoding_steps(model, batch, tokenizer.begin_id)
        longest = batch["source"].shape[1]
        limit = min(max_length - 1, round(1.5 * longest) + decoding.extra_length)
        tokens = search(steps, limit, tokenizer.end_id)
        texts = [tokenizer.decode(until_end(row, tokenizer.end_id)) for row in tokens.tolist()]
        found += zip(keys.indices.tolist(), texts, strict=True)
    return [text for _, text in sorted(engine.gather(found))]


def beams(steps: Steps, max_new_tokens: int, end_id: int, *, decoding: DecodingConfig) -> Tensor:
    """The best sequences that a beam search finds."""
    tokens, _ = beam_search(
        steps,
        num_beams=decoding.num_beams,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        length_penalty=decoding.length_penalty,
    )
    return tokens


def decoding_steps(model: nn.Module, batch: Batch, start_id: int) -> tuple[Steps, int]:
    """What a search goes through, and how long a target the model can hold."""
    source, mask = batch["source"], batch["source_mask"]
    if isinstance(model, EncoderDecoder):
        return translation_steps(model, source, source_mask=mask, start_id=start_id), model.max_length
    if isinstance(model, RecurrentTranslation):
        return RecurrentSteps(model, source, mask, start_id), model.max_length
    raise TypeError(f"expected an EncoderDecoder or a RecurrentTranslation, got {type(model).__name__}")

"""Speech recognition by a Transformer over log-mel features (Dong et al. 2018, "Speech-Transformer"), by CTC or a decoder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from tameformer.data.augment.spectrum import SpecAugment
from tameformer.data.buckets import LengthSortedBatches, TokenBuckets
from tameformer.data.log_mel import LogMel
from tameformer.data.manifest import Manifest
from tameformer.data.speech import SpeechSource
from tameformer.data.spoken_digits import DigitSequences, hold_out, spoken_digits
from tameformer.data.tokenizers import CharTokenizer
from tameformer.data.utterances import Utterances, alphabet
from tameformer.errors import ConfigError
from tameformer.models import Architecture, RecurrentSpeechConfig, SpeechConfig
from tameformer.models.ctc import ctc_beam_search, ctc_greedy
from tameformer.models.generate import beam_search, greedy, until_end
from tameformer.models.speech import CTCRecognizer, DecoderRecognizer, transcription_steps
from tameformer.nn.masks import real_from_lengths
from tameformer.patch.unwrapped import unwrapped
from tameformer.recipes.assemble import assemble, require_path
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import one_pass, placed_batches, token_loss
from tameformer.recipes.word_errors import error_rates, write_errors_by_length
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

TOKENIZER, PREPROCESSING = "tokenizer.json", "preprocessing.json"


@dataclass(frozen=True, kw_only=True)
class SpeechDataConfig:
    """Utterances and their texts."""

    source: Literal["digits", "manifest"] = "digits"
    """`digits` joins recordings of single digits into sequences; `manifest` reads the sound files that a list names."""
    path: str | None = None
    """An .npz of spoken digits, or a manifest: a .tsv of paths and texts, or a .jsonl with `path` and `text`."""
    validation_path: str | None = None
    """Manifest evaluated during the run, and transcribed at its end; digits have their own test recordings."""
    validation_fraction: float = 0.0
    """Share of the training recordings of digits that is evaluated instead of the test ones, to choose settings."""
    num_digits: int = 5
    """Digits of the longest sequence; the shortest has one."""
    num_train_samples: int = 2000
    """Sequences of digits in an epoch; each epoch has its own."""
    num_eval_samples: int = 300
    """Sequences of digits that are evaluated."""
    num_mels: int = 40
    """Bands of the features."""
    window_seconds: float = 0.025
    """Window of a row of features."""
    hop_seconds: float = 0.01
    """From one row of features to the next."""
    spec_augment: bool = True
    """Whether bands and stretches of time are taken out of the training features (SpecAugment)."""
    max_frames: int = 4000
    """Padded rows of features that one optimizer step sees at most."""
    eval_max_frames: int = 16000
    """Padded rows of features evaluated at a time."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction <= 0.5:
            raise ValueError(f"data.validation_fraction must lie in [0, 0.5], got {self.validation_fraction}")
        for name in ("num_digits", "num_train_samples", "num_eval_samples", "max_frames", "eval_max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TranscriptionConfig:
    """How texts are searched for at the end of the run; evaluations during it take the most probable path."""

    num_beams: int = 8
    """Texts kept at each step of the search."""
    length_penalty: float = 0.6
    """Exponent of the length normalization, with the head `decoder`; more prefers longer texts."""
    max_new_tokens: int = 200
    """Longest text, in characters, with the head `decoder`."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a speech recognizer."""

    data: SpeechDataConfig = field(default_factory=SpeechDataConfig)
    """The utterances."""
    model: SpeechConfig | RecurrentSpeechConfig = field(default_factory=SpeechConfig)
    """The recognizer."""
    decoding: TranscriptionConfig = field(default_factory=TranscriptionConfig)
    """The search for texts."""
    label_smoothing: float = 0.0
    """Probability mass of a character that is spread over all, with the head `decoder`."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.model.head == "ctc":
            raise ValueError(f"label_smoothing is {self.label_smoothing}, but the head ctc has none; set it to 0")


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; its characters go to `tokenizer.json` in the run folder."""
    data = config.data
    spoken, held_out = utterances(data)
    if spoken.sample_rate != held_out.sample_rate:
        raise ConfigError(
            f"the training utterances have {spoken.sample_rate} samples a second, those to evaluate "
            f"{held_out.sample_rate}; resample one of them"
        )
    tokenizer = CharTokenizer(alphabet([spoken, held_out]))
    features = LogMel(
        sample_rate=spoken.sample_rate,
        num_mels=data.num_mels,
        window_seconds=data.window_seconds,
        hop_seconds=data.hop_seconds,
    )
    subsampling = config.model.subsampling
    made = partial(SpeechSource, features=features, tokenizer=tokenizer, subsampling=subsampling)
    train, evaluated = made(spoken, augment=SpecAugment() if data.spec_augment else None), made(held_out)
    transcribed = partial(
        transcription_quality, source=evaluated, decoding=config.decoding, max_frames=data.eval_max_frames
    )
    return assemble(
        config,
        folder=folder,
        model=Architecture.of(config.model, num_features=data.num_mels, vocab_size=tokenizer.vocab_size),
        source=train,
        plan=TokenBuckets(
            partial(train.lengths, config.order_seed),
            data.max_frames,
            seed=config.order_seed,
            min_batch_size=config.gradient_accumulation_steps * PartialState().num_processes,
            noise=20.0,  # rows: a fifth of a second, so that batches differ from epoch to epoch
        ),
        loss=partial(speech_loss, label_smoothing=config.label_smoothing),
        unit="tokens",
        evaluate=partial(
            evaluate, source=evaluated, decoding=replace(config.decoding, num_beams=1), max_frames=data.eval_max_frames
        ),
        test=partial(transcribed, folder=folder),
        num_workers=data.num_workers,
        artifacts={
            TOKENIZER: tokenizer.to_json() + "\n",
            PREPROCESSING: json.dumps({"log_mel": asdict(features)}, indent=1) + "\n",
        },
        mask=partial(real_tokens, subsampling=subsampling),
    )


def utterances(data: SpeechDataConfig) -> tuple[Utterances, Utterances]:
    """Those to train on, and those to evaluate."""
    if data.source == "manifest":
        validation = data.validation_path
        if validation is None:
            raise ConfigError("this recipe needs a manifest to evaluate on: give --data.validation_path PATH")
        return Manifest(Path(require_path(data.path, "a manifest"))), Manifest(Path(validation))
    path = require_path(data.path, "an .npz of spoken digits, or --data.source manifest and a manifest")
    evaluated = {"num_samples": data.num_eval_samples, "salt": "held-out digits"}
    train: DigitSequences = spoken_digits(path, "train", num_samples=data.num_train_samples, longest=data.num_digits)
    if data.validation_fraction:
        return hold_out(train, data.validation_fraction, **evaluated)
    return train, spoken_digits(path, "test", longest=data.num_digits, **evaluated)


def real_tokens(batch: Batch, *, subsampling: int) -> Mapping[str, Tensor]:
    """True at real outputs of the encoder, and at real targets."""
    outputs = -(-batch["frames"] // subsampling)
    longest = -(-batch["features"].shape[1] // subsampling)
    return {"encoder": real_from_lengths(outputs, longest), "decoder": batch["targets"] >= 0}


def speech_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """The negative log-probability of the texts, in nats, summed over the utterances; the end token counts with a decoder."""
    if not hasattr(unwrapped(model), "blank"):
        logits = model(batch["features"], batch["frames"], batch["target_in"])
        return token_loss(logits, batch["targets"], label_smoothing=label_smoothing)
    logits, outputs = model(batch["features"], batch["frames"])
    lengths = (batch["targets"] >= 0).sum(1) - 1  # without the end token
    steps = logits.float().log_softmax(-1).transpose(0, 1)  # the sum over paths needs more digits than bf16 has
    return F.ctc_loss(
        steps, batch["targets"].clamp(min=0), outputs, lengths, blank=logits.shape[-1] - 1, reduction="sum"
    )


def evaluate(
    engine: Engine, model: nn.Module, *, source: SpeechSource, decoding: TranscriptionConfig, max_frames: int
) -> dict[str, float]:
    """Mean loss in nats a character, without smoothing, and error rates."""
    metrics = one_pass(engine, model, source, plan_of(source, max_frames), measure)
    return metrics | transcription_quality(engine, model, source=source, decoding=decoding, max_frames=max_frames)


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of utterances."""
    return {"loss": speech_loss(model, batch)}


def plan_of(source: SpeechSource, max_frames: int) -> LengthSortedBatches:
    """One pass over the utterances, from short to long."""
    return LengthSortedBatches(source.lengths(0, 0), max_frames)


def transcription_quality(
    engine: Engine,
    model: nn.Module,
    *,
    source: SpeechSource,
    decoding: TranscriptionConfig,
    max_frames: int,
    folder: Path | None = None,
) -> dict[str, float]:
    """Word and character error rates of the model's texts; with a run folder, by length for its report, too."""
    found: list[tuple[str, str]] = []
    for keys, batch in placed_batches(engine, source, plan_of(source, max_frames)):
        ids = transcripts(model, batch, decoding)
        found += zip(source.utterances.texts(keys), map(source.tokenizer.decode, ids), strict=True)
    said, heard = zip(*engine.gather(found), strict=True)
    if folder is not None and engine.is_main:
        write_errors_by_length(folder, said, heard)
    return error_rates(said, heard)


def transcripts(model: nn.Module, batch: Batch, decoding: TranscriptionConfig) -> list[list[int]]:
    """The characters recognized in each utterance, as ids; one beam takes the most probable path."""
    if isinstance(model, CTCRecognizer):
        logits, outputs = model(batch["features"], batch["frames"])
        if decoding.num_beams == 1:
            return ctc_greedy(logits, outputs, blank=model.blank)
        return ctc_beam_search(logits, outputs, blank=model.blank, num_beams=decoding.num_beams)
    if not isinstance(model, DecoderRecognizer):
        raise TypeError(f"expected a recognizer of ours, got {type(model).__name__}")
    steps = transcription_steps(model, batch["features"], batch["frames"])
    limit = min(decoding.max_new_tokens, model.max_length)
    if decoding.num_beams == 1:
        tokens = greedy(steps, max_new_tokens=limit, end_id=model.end_id)
    else:
        tokens, _ = beam_search(
            steps,
            num_beams=decoding.num_beams,
            max_new_tokens=limit,
            end_id=model.end_id,
            length_penalty=decoding.length_penalty,
        )
    # The begin token is never a target; should it be written all the same, it is no character.
    return [[token for token in until_end(row, model.end_id) if token < model.begin_id] for row in tokens.tolist()]

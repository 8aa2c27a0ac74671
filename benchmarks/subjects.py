"""What is compared: one decoder, one text, and the loops that train it."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import StepBegins, TrainingLoop
from torch import Tensor, nn

from tameformer.data import ShuffledBatches
from tameformer.data.windows import TokenWindows
from tameformer.models.decoder import Decoder, DecoderConfig, decoder
from tameformer.optim import OptimConfig, decay_groups
from tameformer.recipes.assemble import assemble
from tameformer.recipes.char_lm import Config, language_loss
from tameformer.record import RunWriter
from tameformer.training import (
    CheckpointConfig,
    CheckpointFolder,
    Engine,
    Listener,
    Listeners,
    Loop,
    LoopConfig,
    Run,
    StopRequest,
)
from tameformer.training.listeners import RecordListener, TensorBoardListener
from tameformer.training.precision import PRECISIONS

STEPS = 1_000_000  # of a run that ends when its turns are over
RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """A decoder and its batch."""

    num_layers: int
    dim: int
    num_heads: int
    seq: int
    batch: int
    vocab_size: int = 65

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.seq * self.batch

    def show(self) -> str:
        """In words."""
        return f"{self.num_layers} layers, dim {self.dim}, {self.batch} x {self.seq} tokens"


TINY = Size(num_layers=1, dim=32, num_heads=2, seq=16, batch=4)
CHARACTER = Size(num_layers=4, dim=128, num_heads=4, seq=64, batch=12)
HUNDRED_MS = Size(num_layers=4, dim=128, num_heads=4, seq=128, batch=8)
GPT2 = Size(num_layers=12, dim=768, num_heads=12, seq=1024, batch=32, vocab_size=50_257)
"""On an accelerator."""
MIDDLE = Size(num_layers=12, dim=256, num_heads=8, seq=256, batch=8)


def model_of(size: Size, seed: int = 0) -> Decoder:
    """The decoder, with the same weights for the same seed."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        num_layers=size.num_layers, dim=size.dim, num_heads=size.num_heads, max_length=size.seq, dropout=0.0
    )
    return decoder(config, vocab_size=size.vocab_size)


def text_of(size: Size, length: int = 1_000_000) -> np.ndarray:
    """A text that can be learned: every token is followed by one of four others."""
    random = np.random.default_rng(0)
    followers = random.integers(0, size.vocab_size, (size.vocab_size, 4))
    choices = random.integers(0, 4, length)
    text = np.zeros(length, dtype=np.uint16)
    for place in range(1, length):
        text[place] = followers[text[place - 1], choices[place]]
    return text


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the other loops: fused AdamW over the same two groups as ours."""
    return torch.optim.AdamW(decay_groups(model, weight_decay=0.1), lr=RATE, betas=(0.9, 0.99), fused=True)


def mean_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def random_tokens(size: Size) -> tuple[Tensor, Tensor]:
    """A batch and its targets, without structure, always the same."""
    tokens, targets = torch.randint(
        size.vocab_size, (2, size.batch, size.seq), generator=torch.Generator().manual_seed(0)
    )
    return tokens, targets


def random_windows(text: np.ndarray, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as a plain script draws them: windows at random places, stacked."""
    tokens = torch.from_numpy(text.astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    while True:
        places = torch.randint(len(tokens) - size.seq - 1, (size.batch,), generator=generator).tolist()
        yield (
            torch.stack([tokens[place : place + size.seq] for place in places]),
            torch.stack([tokens[place + 1 : place + 1 + size.seq] for place in places]),
        )


def same_windows(text: np.ndarray, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that `ours` trains on, in its order."""
    source = TokenWindows(text, size.seq)
    plan = ShuffledBatches(len(source), size.batch, seed=0)
    for step in itertools.count():
        batch = source.fetch(plan.batch(step))
        yield batch["tokens"], batch["targets"]


def floor(size: Size, text: np.ndarray) -> TrainingLoop:
    """What nobody can go below: one batch over and over, no clipping, no schedule, the loss never read."""
    tokens, targets = next(random_windows(text, size))

    def loop(step_begins: StepBegins) -> None:
        model = model_of(size)
        optimizer = adamw(model)
        while step_begins():
            mean_loss(model, tokens, targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return loop


def bare(
    size: Size,
    text: np.ndarray,
    *,
    batches: Callable[[np.ndarray, Size], Iterator[tuple[Tensor, Tensor]]] = random_windows,
    losses: list[float] | None = None,
    compiled: bool = False,
) -> TrainingLoop:
    """A plain script: batch, forward, backward, clip, fused AdamW, loss read every step; fp32."""

    def loop(step_begins: StepBegins) -> None:
        model: Any = model_of(size)
        optimizer = adamw(model)
        if compiled:
            model = torch.compile(model)
        for tokens, targets in batches(text, size):
            if not step_begins():
                return
            loss = mean_loss(model, tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()
            if losses is not None:
                losses.append(value)

    return loop


class Windows(torch.utils.data.Dataset):
    """All windows of a text, one at a time, as `DataLoader` wants them."""

    def __init__(self, text: np.ndarray, size: Size) -> None:
        self.tokens = torch.from_numpy(text.astype(np.int64))
        self.seq = size.seq

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = index * self.seq
        return {
            "tokens": self.tokens[place : place + self.seq],
            "targets": self.tokens[place + 1 : place + 1 + self.seq],
        }


def with_accelerate(size: Size, text: np.ndarray) -> TrainingLoop:
    """The loop of accelerate's documentation: everything prepared, clipping through it, loss read every step."""
    from accelerate import Accelerator

    def loop(step_begins: StepBegins) -> None:
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        plain = model_of(size)
        loader = torch.utils.data.DataLoader(Windows(text, size), batch_size=size.batch, shuffle=True, drop_last=True)
        model, optimizer, loader = accelerator.prepare(plain, adamw(plain), loader)
        while True:
            for batch in loader:
                if not step_begins():
                    return
                with accelerator.accumulate(model):
                    loss = mean_loss(model, batch["tokens"], batch["targets"])
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                loss.item()

    return loop


class AnswersLoss(nn.Module):
    """The decoder as the Hugging Face Trainer wants it: called with the batch's keys, it answers with its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": mean_loss(self.model, tokens, targets)}


def with_trainer(size: Size, text: np.ndarray, *, logging_steps: int = 10) -> TrainingLoop:
    """The Hugging Face Trainer with fused AdamW; its log stays in memory, no report is written."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()

    class Turns(TrainerCallback):
        def __init__(self, step_begins: StepBegins) -> None:
            self.step_begins = step_begins

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.step_begins():
                control.should_training_stop = True

    def loop(step_begins: StepBegins) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=size.batch,
                learning_rate=RATE,
                lr_scheduler_type="cosine",
                optim="adamw_torch_fused",
                max_grad_norm=1.0,
                logging_steps=logging_steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.accelerator.is_available(),
                remove_unused_columns=False,
                dataloader_drop_last=True,
                dataloader_pin_memory=False,
                label_names=["targets"],
            )
            trainer = Trainer(
                AnswersLoss(model_of(size)),
                arguments,
                train_dataset=Windows(text, size),
                callbacks=[Turns(step_begins)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    return loop


def run_of(size: Size, text: np.ndarray, *, logging_steps: int = 10, model: nn.Module | None = None) -> Run:
    """The run that the `char-lm` recipe would build, without evaluation and checkpoints."""
    config = Config(
        max_steps=STEPS,
        optim=OptimConfig(peak_lr=RATE, weight_decay=0.1, schedule="constant", warmup_steps=0),
        loop=LoopConfig(logging_steps=logging_steps, eval_steps=STEPS),
        checkpoint=CheckpointConfig(every=STEPS),
    )
    source = TokenWindows(text, size.seq)
    return assemble(
        config,
        model=model_of(size) if model is None else model,
        source=source,
        plan=ShuffledBatches(len(source), size.batch, seed=0),
        loss=language_loss,
        unit="tokens",
        evaluate=None,
    )


def ours(
    size: Size,
    text: np.ndarray,
    *,
    precision: str = "fp32",
    monitored: bool = True,
    compiled: bool = False,
    losses: list[float] | None = None,
    change: Callable[[Run], Run] = lambda run: run,
) -> TrainingLoop:
    """Our loop as `tame train` sets it up: attention entropy, `log.jsonl` and TensorBoard every 10 steps, clipping.

    Args:
        size: The decoder and its batch.
        text: The tokens.
        precision: As in a recipe, but not "auto".
        monitored: Without, nothing is measured or written.
        compiled: Whether the model goes through `torch.compile`.
        losses: Gets the loss of each logged interval.
        change: What is different from the recipe's run.
    """

    def loop(step_begins: StepBegins) -> None:
        run = run_of(size, text, logging_steps=10 if monitored else STEPS)
        stream = run.batches

        def in_turns(*, start: int, stop: int, rank: int, world_size: int) -> Iterator[Any]:
            for micro_batches in stream(start=start, stop=stop, rank=rank, world_size=world_size):
                if not step_begins():
                    return
                yield micro_batches

        chosen = PRECISIONS[precision]
        run.set_attention_dtype(chosen.attention_dtype)
        run = change(replace(run, batches=in_turns, watch=run.watch if monitored else None))
        if compiled:
            run.model.compile()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            listeners: list[Listener] = (
                [RecordListener(RunWriter(folder)), TensorBoardListener(folder)] if monitored else []
            )
            if losses is not None:
                listeners.append(_Losses(losses))
            engine = Engine(autocast_dtype=chosen.autocast_dtype)
            Loop(run, engine, CheckpointFolder(folder), Listeners(*listeners), StopRequest()).train()

    return loop


class _Losses(Listener):
    """Keeps the loss of each logged interval."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_log(self, step, values):
        self.losses.append(values["train/loss"])

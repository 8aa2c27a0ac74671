"""How far the entropy of a head from a few query rows is from the mean over all queries.

A character model is trained for a while, so that its heads attend to something; then both probes measure the same batches of
text that it was not trained on. The error is that of a head's mean in one batch, against the exact mean over the same batch;
what a batch of the size says about all text is another matter. The last column is the standard error that the probe reports,
as a share of the error made: 1 would be a calibrated one, above 1 it is on the safe side.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from subjects import Size, adamw, mean_loss, model_of, text_of
from torch import Tensor, nn
from write_up import Table, parser, set_threads, write

from tameformer.data import ShuffledBatches
from tameformer.data.text import read_text
from tameformer.data.tokenizers import CharTokenizer
from tameformer.data.windows import TokenWindows
from tameformer.probes import Watch
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.probes.exact_attention_entropy import ExactAttentionEntropy

KEY = "diag/attention_entropy/"


def batches_of(text: np.ndarray, size: Size, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the text in random order."""
    source = TokenWindows(text, size.seq)
    plan = ShuffledBatches(len(source), size.batch, seed=seed)
    for step in range(10**6):
        batch = source.fetch(plan.batch(step))
        yield batch["tokens"], batch["targets"]


def trained(text: np.ndarray, size: Size, steps: int) -> nn.Module:
    """The decoder after so many steps, with a warm-up of a tenth of them."""
    model = model_of(size)
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))
    for step, (tokens, targets) in zip(range(steps), batches_of(text, size, seed=0), strict=False):
        loss = mean_loss(model, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def measured(watch: Watch, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy of each head and its reported standard error, (layers, heads) both; NaN where none is reported."""
    with watch.watching(1):
        model(tokens)
    values = watch.read()
    means = {key: value for key, value in values.items() if key.startswith(KEY)}
    errors = [values.get(key.replace("entropy/", "entropy_error/"), mean * torch.nan) for key, mean in means.items()]
    return torch.stack(list(means.values())).detach(), torch.stack(errors).detach()


def errors_of(
    model: nn.Module, batches: Sequence[Tensor], rows: int, sequences: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors in nats, (batches, layers, heads); the reported ones; the exact means."""
    few = Watch(model, [(AttentionEntropy(rows=rows), 1)], sequences=sequences)
    exact = Watch(model, [(ExactAttentionEntropy(), 1)], sequences=None)
    found = [(measured(few, model, tokens), measured(exact, model, tokens)) for tokens in batches]
    means, reported = (torch.stack(parts) for parts in zip(*(estimate for estimate, _ in found), strict=True))
    truth = torch.stack([mean for _, (mean, _) in found])
    return means - truth, reported, truth


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/entropy_sampling.py --text shakespeare.txt")
    options.add_argument("--text", type=Path, help="a text in UTF-8, may be compressed (.gz); without, a generated one")
    options.add_argument("--steps", type=int, default=400, help="of training")
    options.add_argument("--batches", type=int, default=40, help="of 8 sequences that are measured")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    if given.text is None:
        text, vocab_size = text_of(Size(1, 1, 1, 1, 1), 200_000), 65
    else:
        content = read_text(str(given.text))
        tokenizer = CharTokenizer.from_text(content)
        text, vocab_size = tokenizer.encode(content), tokenizer.vocab_size
    size = Size(num_layers=4, dim=128, num_heads=4, seq=512, batch=8, vocab_size=vocab_size)
    if given.quick:
        size, given.steps, given.batches = Size(1, 32, 2, seq=64, batch=2, vocab_size=vocab_size), 2, 2
    cut = round(0.9 * len(text))
    model = trained(text[:cut], size, given.steps)
    stream = batches_of(text[cut:], size, seed=1)
    batches = [next(stream)[0] for _ in range(given.batches)]
    table = Table(
        f"{size.show()}, causal, after {given.steps} steps",
        [
            "rows of each sequence",
            "sequences",
            "RMS error, nats",
            "worst head's RMS",
            "largest error",
            "reported / made",
        ],
    )
    raw = {}
    for sequences in (1, None):
        for rows in (8, 16, 32, 64, 128):
            error, reported, truth = errors_of(model, batches, rows, sequences)
            by_head = error.square().mean(0).sqrt()
            rms = error.square().mean().sqrt()
            kind = "all" if sequences is None else "one"
            calibration = reported.square().mean().sqrt() / rms
            numbers = [rms, by_head.max(), error.abs().max()]
            table.rows.append([str(rows), kind, *(f"{number:.3f}" for number in numbers), f"{calibration:.2f}"])
            raw[f"{rows} rows, {kind}"] = {"rms_by_head": by_head.tolist(), "entropy_by_head": truth.mean(0).tolist()}
    write("entropy_sampling", [table], about=__doc__ or "", notes=[], raw=raw, options=given)


if __name__ == "__main__":
    main()

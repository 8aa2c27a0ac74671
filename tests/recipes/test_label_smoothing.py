"""What `label_smoothing` says is what is learned from, by the formula written out."""

import pytest
import torch

from tameformer.recipes.catalogue import resolve
from tiny_recipes import values_of, write_data

EXTRA = {
    "translation": {"model.dropout": 0.0},
    "seq2seq-rnn": {"model.dropout": 0.0},
    "speech": {"model.head": "decoder", "model.dropout": 0.0},
    "vit-digits": {},
}


def smoothed(logits, targets, share):
    """(1 - share) of a target's cross-entropy and share of the mean over all classes, target by target."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.double().flatten(0, -2), targets.flatten(), strict=True):
        if target >= 0:
            costs = row.logsumexp(-1) - row
            total += (1 - share) * costs[target] + share * costs.mean()
    return total


@pytest.mark.parametrize("recipe", EXTRA)
def test_it_reaches_the_loss(recipe, tmp_path):
    write_data(tmp_path)
    values = {"label_smoothing": 0.3, "max_steps": 1, "optim.warmup_steps": 0, "precision": "fp32"}
    found = resolve(recipe, {**values, **values_of(recipe, tmp_path), **EXTRA[recipe]})
    run = found.build(found.config, tmp_path / "run")
    (batch,) = next(iter(run.batches(start=0, stop=1, rank=0, world_size=1)))
    seen = []
    run.model.eval().register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss = run.loss(run.model, batch)
    targets = batch["labels"] if "labels" in batch else batch["targets"]
    torch.testing.assert_close(loss.double(), smoothed(seen[0], targets, 0.3), rtol=1e-5, atol=1e-5)
    assert (loss - smoothed(seen[0], targets, 0.0)).abs() > 1e-3 * loss

"""Memory that runs out: the same batch in smaller parts gives the same step, to rounding."""

import copy

import pytest
import torch
from torch import nn

from tameformer.errors import OutOfMemoryError
from tameformer.optim import NormClip
from tameformer.recipes import catalogue
from tameformer.training.engine import Engine
from tameformer.training.memory import in_parts, is_out_of_memory, num_rows
from tameformer.training.step import train_step


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum", ignore_index=-100)


def batch_of(rows=7):
    draw = torch.Generator().manual_seed(rows)
    targets = torch.randint(3, (rows,), generator=draw)
    targets[0] = -100
    return {"x": torch.randn(rows, 4, generator=draw, dtype=torch.float64), "y": targets, "num_items": rows - 1}


def limited(most):
    """A loss that finds no memory for more samples than that, as the allocator says it."""

    def loss(model, batch):
        value = loss_of(model, batch)  # the activations are there already
        if num_rows(batch) > most:
            torch.empty(2**62, dtype=torch.uint8)
        return value

    return loss


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 100])
def test_parts_make_up_the_batch(pieces):
    whole = {**batch_of(), "rate": torch.tensor(0.5), "name": "seven"}
    found = in_parts(whole, pieces)
    assert len(found) == min(pieces, 7)
    assert torch.equal(torch.cat([part["x"] for part in found]), whole["x"])
    assert torch.equal(torch.cat([part["y"] for part in found]), whole["y"])
    assert sum(part["num_items"] for part in found) == pytest.approx(6)
    assert all(part["rate"] == 0.5 and part["name"] == "seven" for part in found)
    assert max(map(num_rows, found)) - min(map(num_rows, found)) <= 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full"), RuntimeError("not enough memory: 1")])
def test_errors_of_allocators_are_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_a_step_that_runs_out_changes_nothing_and_in_parts_it_is_the_same_step():
    (model, optimizer), (whole, whole_optimizer) = parts(), parts()
    kept = copy.deepcopy(model.state_dict())
    micro_batches = [batch_of(7), batch_of(5)]
    expected = train_step(
        Engine(), whole, [whole_optimizer], micro_batches, loss_of, clip=NormClip([whole_optimizer], 0.1)
    )
    for pieces in (1, 2):
        answer = train_step(
            Engine(), model, [optimizer], micro_batches, limited(2), clip=NormClip([optimizer], 0.1), parts=pieces
        )
        assert answer is None
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    found = train_step(
        Engine(), model, [optimizer], micro_batches, limited(2), clip=NormClip([optimizer], 0.1), parts=4
    )
    for name in ("loss_sum", "grad_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-13, atol=0)
    assert found.num_items == expected.num_items
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_one_sample_at_a_time_is_the_end():
    model, optimizer = parts()
    with pytest.raises(OutOfMemoryError, match=r"memory runs out with one sample at a time: .*allocate memory"):
        train_step(Engine(), model, [optimizer], [batch_of(4)], limited(0), clip=NormClip([optimizer], None), parts=4)


def test_other_errors_are_not_taken_for_it():
    def broken(model, batch):
        raise RuntimeError("shapes do not fit")

    model, optimizer = parts()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_step(Engine(), model, [optimizer], [batch_of(4)], broken, clip=NormClip([optimizer], None))


RECIPES = {
    "vit-digits": ["--data.batch_size=24", "--data.mixup_alpha=0.2"],
    "char-lm": ["--data.path={text}", "--data.batch_size=6"],
    "lm": ["--data.path={documents}", "--data.batch_size=6"],
    "translation": ["--data.path={pairs}", "--data.validation_path={pairs}", "--data.max_tokens=400"],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"the {word} number {index} is {'very ' * (index % 5)}small" for index in range(300) for word in ("red",)]
    (folder / "text.txt").write_text("\n".join(lines * 3))
    (folder / "documents.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines * 3))
    (folder / "pairs.tsv").write_text("".join(f"{line}\t{line[::-1]}\n" for line in lines))
    return {"text": folder / "text.txt", "documents": folder / "documents.jsonl", "pairs": folder / "pairs.tsv"}


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipes_batches_come_apart(name, texts, tmp_path):
    """The loss of all parts is the loss of the batch, whatever the recipe's batches hold."""
    words = [word.format(**texts) for word in RECIPES[name]]
    recipe = catalogue.parse(name, [*words, "--max_steps=2", "--optim.warmup_steps=0"])
    run = recipe.build(recipe.config, tmp_path)
    run.model.eval().double()  # dropout draws anew in each pass
    with torch.no_grad():
        batch = next(iter(run.batches(start=0, stop=1, rank=0, world_size=1)))[0]
        batch = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()
        }
        pieces = in_parts(batch, 3)
        assert len(pieces) == 3
        total = sum(run.loss(run.model, piece) for piece in pieces)
        torch.testing.assert_close(total, run.loss(run.model, batch), rtol=1e-9, atol=0)

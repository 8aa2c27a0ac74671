"""No key of a task is taken and passed over: each one changes the batches, the model, the loss or how it learns.

The keys of `model` have tests of their own.
"""

import dataclasses
import hashlib
import types
import typing
from pathlib import Path

import pytest
import torch

from tameformer.recipes.catalogue import resolve
from tameformer.recipes.config import RecipeConfig
from tiny_recipes import SETTINGS, values_of, write_data

pytestmark = pytest.mark.slow

SHARED = {field.name for field in dataclasses.fields(RecipeConfig)} | {"model"}
RECIPES = sorted(set(SETTINGS) - {"vit-digits", "vit-digits-augmented"})  # they are `vit` on other data
EVALUATED = {
    "data.eval_batch_size", "data.eval_max_tokens", "data.eval_max_frames", "data.num_eval_samples", "data.test_split",
    "data.longest", "decoding", "linear_probe_samples",
}  # fmt: skip
ELSEWHERE = {
    "data.num_workers",  # how, not what
    "data.source", "data.path", "data.validation_path", "data.test_path", "data.text_field", "data.label_column",
    "data.source_language", "data.target_language", "data.columns", "data.tokenizer", "init_from", "replace_head",
    "data.image_size", "data.channels",  # of files, and these are arrays
    "data.vocab_size", "data.split_paragraphs", "data.max_length",  # there is too little text for a difference
    "data.mixup_alpha", "data.cutmix_alpha", "data.augment", "finetune.unfreeze_steps", "finetune.reinit_layers",
}  # fmt: skip
"""Where they are tested, or need files of their own."""
BESIDE = {
    "data.shift_pixels": {"data.augment": ["resized_crop", "shift"]},
    "data.curriculum.competence": {"data.curriculum.warmup_steps": 4},
    "data.curriculum.start": {"data.curriculum.warmup_steps": 4},
    "data.train_samples": {"data.batch_size": 2},
    "finetune.mixout_by": {"finetune.mixout": 0.5},
    "label_smoothing": {"model.head": "decoder"},
    "levels": {"model.elements": "tokens"},
}
"""What gives a key a meaning, where its recipe has that."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def leaves(config, prefix=""):
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], value


def others(kind, value):
    """Values of that type, other than this one."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return [one for part in parts if part is not types.NoneType for one in others(part, value)]
    if origin is typing.Literal:
        return [one for one in parts if one != value]
    if kind is bool:
        return [not value]
    found = {int: [2 * (value or 1), (value or 1) + 1, 5, 1], float: [(value or 0.6) / 2, 0.2, 2.0]}.get(kind, [])
    return [one for one in found if one != value]


def fingerprint(recipe, values, folder: Path):
    found = resolve(recipe, values)
    run = found.build(found.config, folder)
    streams = [next(iter(run.batches(start=at, stop=at + 1, rank=0, world_size=1)))[0] for at in (0, 2)]
    state = run.model.state_dict()
    torch.manual_seed(0)
    loss = float(run.loss(run.model.train(), streams[0]).detach())
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for one in run.optimizers
        for group in one.param_groups
    ]
    kept = {name: one for name, one in run.artifacts.items() if name != "model.json"}
    return (
        repr([digests(one) for one in (*streams, state)]),
        loss,
        repr(groups),
        repr((run.model, run.loop)),
        run.max_steps,
        kept,
    )


def digests(tensors):
    return {
        name: (one.shape, hashlib.sha256(one.detach().contiguous().numpy().tobytes()).hexdigest())
        if isinstance(one, torch.Tensor)
        else one
        for name, one in tensors.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_does_something(recipe, data, tmp_path):
    base = {**values_of(recipe, data), "max_steps": 4, "optim.warmup_steps": 1, "precision": "fp32"}
    keys = list(leaves(resolve(recipe, base).config))
    known, silent = {name for name, *_ in keys}, []
    for key, kind, value in keys:
        if key.partition(".")[0] in SHARED or not {key, key.partition(".")[0]}.isdisjoint(EVALUATED | ELSEWHERE):
            continue
        beside = {name: one for name, one in BESIDE.get(key, {}).items() if name in known}
        usual, answers = fingerprint(recipe, {**base, **beside}, tmp_path), []
        for one in others(kind, value):
            try:
                answers.append(fingerprint(recipe, {**base, **beside, key: one}, tmp_path) != usual)
            except Exception:  # a value that does not go with the others
                continue
            if answers[-1]:
                break
        if not any(answers):
            silent.append(key)
    assert silent == []

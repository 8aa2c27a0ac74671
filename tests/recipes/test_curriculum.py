"""Short texts first, as a key of the recipes: what the first steps see, and a resume within the warm-up to the bit."""

import json
import os
import signal
from dataclasses import fields

import numpy as np
import pytest

from tameformer.errors import ConfigError
from tameformer.recipes import catalogue
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.training import CheckpointFolder, Listener

WORDS = ("ein", "mann", "geht", "hund", "rot", "blau", "und", "haus")
SMALL = {
    "model.dim": 16, "precision": "fp32", "max_steps": 16, "num_train_epochs": None, "optim.warmup_steps": 2,
    "optim.peak_lr": 0.01, "data.vocab_size": 300, "loop.logging_steps": 2, "loop.eval_steps": 16,
    "data.curriculum.warmup_steps": 12, "data.curriculum.start": 0.1,
    **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [" ".join(WORDS[(3 * index + i) % 8] for i in range(1 + index % 11)) for index in range(160)]
    for split, part in (("train", lines), ("val", lines[:10])):
        (folder / f"{split}.en").write_text("\n".join(part) + "\n")
        (folder / f"{split}.de").write_text("\n".join(line.upper() for line in part) + "\n")
    rows = [json.dumps({"text": f"{line}. {line}.", "label": index % 2}) for index, line in enumerate(lines)]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def settings(recipe, data):
    texts = {"data.path": str(data / "texts.jsonl"), "data.batch_size": 8}
    return SMALL | {
        "translation": {"data.path": str(data / "train"), "data.validation_path": str(data / "val"),
                        "data.max_tokens": 300, "model.num_heads": 2, "model.num_encoder_layers": 1,
                        "model.num_decoder_layers": 1, "decoding.num_beams": 1},
        "text-classification": {**texts, "model.num_heads": 2, "model.num_layers": 1, "evals_per_epoch": None},
        "hierarchical": texts,
    }[recipe]  # fmt: skip


RECIPES = ["translation", "text-classification", "hierarchical"]


def built(recipe, data, **changes):
    found = catalogue.resolve(recipe, {**settings(recipe, data), **changes})
    return found.build(found.config, data / "nowhere")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_steps_see_short_samples_and_the_later_ones_all(recipe, data):
    run = built(recipe, data)
    longest = []
    for (batch,) in run.batches(start=0, stop=16, rank=0, world_size=1):
        tokens = batch["source"] if "source" in batch else batch["tokens"]
        longest.append(tokens.shape[-1])
        if "source" in batch:
            assert batch["source"].numel() + batch["target_in"].numel() <= 300
    plain = built(recipe, data, **{"data.curriculum.warmup_steps": None})
    behind = [batch["labels" if "labels" in batch else "targets"]
              for (batch,) in plain.batches(start=0, stop=4, rank=0, world_size=1)]  # fmt: skip
    after = [batch["labels" if "labels" in batch else "targets"]
             for (batch,) in run.batches(start=12, stop=16, rank=0, world_size=1)]  # fmt: skip
    assert all(np.array_equal(one, other) for one, other in zip(behind, after, strict=True))
    assert longest[0] < 0.5 * max(longest)
    assert run.plan.locate(11) == (0, 11)
    assert run.plan.locate(12) == (1, 0)


class Interrupt(Listener):
    """Ctrl-C in the middle of the warm-up."""

    def on_log(self, step, values):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_a_run_that_is_stopped_in_the_warm_up_ends_with_the_same_bits(recipe, data, tmp_path):
    values = settings(recipe, data)
    assert train(recipe, overrides={**values, "output_dir": str(tmp_path / "straight")}).finished
    again = {**values, "output_dir": str(tmp_path / "stopped")}
    assert train(recipe, overrides=again, listeners=[Interrupt()]).exit_code == 143
    assert train(recipe, overrides=again, resume="auto").finished
    files = [
        json.loads((CheckpointFolder(tmp_path / name).path(16) / "manifest.json").read_text())["files"]
        for name in ("straight", "stopped")
    ]
    assert files[0] == files[1]


def test_wrong_settings_are_refused(data):
    with pytest.raises(ConfigError, match=r"warmup_steps is 17, but the run has 16 steps: take fewer"):
        built("translation", data, **{"data.curriculum.warmup_steps": 17})
    with pytest.raises(ConfigError, match=r"warmup_steps must be at least 1, got 0; null for no curriculum"):
        built("translation", data, **{"data.curriculum.warmup_steps": 0})
    with pytest.raises(ConfigError, match=r"start must lie in \(0, 1\], got 0"):
        built("translation", data, **{"data.curriculum.start": 0.0})

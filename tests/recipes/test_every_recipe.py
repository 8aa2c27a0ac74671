"""Every recipe as it comes, on little data made here: it trains with a stabilizer on, and the probes see into its model."""

import json
import math

import numpy as np
import pytest

from tameformer.recipes import catalogue
from tameformer.recipes.examine import examine
from tameformer.recipes.launch import train

WORDS = ("ein", "mann", "geht", "hund", "rot", "blau", "und", "haus")
IMAGES = {"model.dim": 16, "model.num_layers": 1, "data.batch_size": 10, "data.eval_batch_size": 20}
TEXT = {"model.dim": 16, "model.num_heads": 2, "model.num_layers": 1, "model.max_length": 32, "data.batch_size": 8}
SETTINGS = {
    "char-lm": TEXT,
    "contrastive": {**IMAGES, "linear_probe_samples": None},
    "formal": {"data.max_length": 8, "data.longest": 12, "data.num_eval_samples": 20, "data.batch_size": 8},
    "graph": {},
    "hierarchical": {"model.dim": 16, "data.vocab_size": 300, "data.batch_size": 8},
    "lm": {**TEXT, "data.vocab_size": 300},
    "masked-image": {**IMAGES, "model.decoder_dim": 16, "linear_probe_samples": None},
    "masked-lm": {**TEXT, "data.vocab_size": 300},
    "seq2seq-rnn": {"model.dim": 16, "data.vocab_size": 300, "data.max_tokens": 300, "decoding.num_beams": 1},
    "set": {"model.dim": 16, "model.num_layers": 1, "data.batch_size": 8},
    "speech": {"model.dim": 16, "model.num_layers": 1, "data.num_digits": 1, "data.num_train_samples": 30,
               "data.num_eval_samples": 5, "data.num_mels": 8, "data.max_frames": 300, "decoding.num_beams": 1},
    "text-classification": {**TEXT, "data.vocab_size": 300, "evals_per_epoch": None},
    "translation": {"model.dim": 16, "model.num_heads": 2, "model.num_encoder_layers": 1, "model.num_decoder_layers": 1,
                    "data.vocab_size": 300, "data.max_tokens": 300, "decoding.num_beams": 1},
    "video": {"data.num_frames": 4, "data.side": 8, "data.num_train_samples": 40, "data.num_eval_samples": 10,
              "data.batch_size": 8, "model.dim": 16, "model.num_layers": 1},
    "vit": IMAGES,
    "vit-digits": {"model.dim": 16, "model.num_layers": 1},
    "vit-digits-augmented": {"model.dim": 16, "model.num_layers": 1},
}  # fmt: skip
PATHS = {
    "char-lm": {"data.path": "text.txt"},
    "contrastive": {"data.path": "."},
    "graph": {"data.path": "graph.npz"},
    "hierarchical": {"data.path": "reviews.jsonl"},
    "lm": {"data.path": "reviews.jsonl"},
    "masked-image": {"data.path": "."},
    "masked-lm": {"data.path": "reviews.jsonl"},
    "seq2seq-rnn": {"data.path": "pairs.tsv", "data.validation_path": "pairs.tsv"},
    "speech": {"data.path": "spoken.npz"},
    "text-classification": {"data.path": "reviews.jsonl"},
    "translation": {"data.path": "pairs.tsv", "data.validation_path": "pairs.tsv"},
    "vit": {"data.path": "."},
}
WEIGHTS = {"spectral_norm", "stable_rank", "grad_norm", "grad_rms_over_epsilon"}
ATTENTION = {"attention_entropy", "attention_entropy_bound", "attention_logit_max"}
STREAM = {"branch_share", "dead_units", "rank_residual", "activation_rms"}
HAS_NOT = {"graph": STREAM, "seq2seq-rnn": STREAM, "hierarchical": STREAM}
"""No residual branches there."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = [" ".join(WORDS[(3 * index + i) % 8] for i in range(2 + index % 7)) for index in range(60)]
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "pairs.tsv").write_text("".join(f"{line}\t{line.upper()}\n" for line in lines))
    rows = [{"text": f"{line}. {line}.", "label": index % 2} for index, line in enumerate(lines)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, count in (("train", 40), ("test", 20)):
        x = generator.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        np.savez(folder / f"{split}.npz", x=x, y=np.arange(count) % 2)
    order = generator.permutation(30)
    np.savez(
        folder / "graph.npz", x=generator.integers(0, 2, (30, 6)).astype(np.uint8), y=np.arange(30) % 2,
        edge_index=np.stack([np.arange(30), (np.arange(30) + 1) % 30]).astype(np.int32),
        train_index=order[:10], valid_index=order[10:20], test_index=order[20:],
    )  # fmt: skip
    np.savez(
        folder / "spoken.npz", audio=generator.integers(-9000, 9000, 60 * 400).astype(np.int16),
        offsets=np.arange(61) * 400, label=np.arange(60) % 10, speaker=np.zeros(60, dtype=np.int64),
        is_test=np.arange(60) >= 40, sample_rate=1000,
    )  # fmt: skip
    return folder


def test_no_recipe_is_left_out():
    assert set(SETTINGS) == set(catalogue.names())


@pytest.mark.parametrize("recipe", SETTINGS)
def test_it_trains_with_a_stabilizer_and_its_model_is_seen_into(recipe, data, tmp_path):
    values = {**SETTINGS[recipe], "max_steps": 3, "precision": "fp32", "optim.warmup_steps": 1, "loop.eval_steps": 3}
    values |= {key: str(data / name) for key, name in PATHS.get(recipe, {}).items()}
    result = train(recipe, overrides={**values, "stabilize": ["sigma_reparam"], "output_dir": str(tmp_path / "run")})
    assert result.step == 3
    assert math.isfinite(result.metrics["eval/loss"])
    diagnosis, step = examine(tmp_path / "run")
    assert step == 3
    seen = {key.split("/")[1] for key in diagnosis.values}
    assert seen & (WEIGHTS | ATTENTION | STREAM) == (WEIGHTS | ATTENTION | STREAM) - HAS_NOT.get(recipe, set())
    assert all(math.isfinite(value) for value in diagnosis.values.values())

"""Every recipe with a model and data so small that it trains in a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np

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


def values_of(recipe: str, folder: Path) -> dict[str, Any]:
    """Settings of the recipe, on what `write_data` wrote into the folder."""
    return {**SETTINGS[recipe], **{key: str(folder / name) for key, name in PATHS.get(recipe, {}).items()}}


def write_data(folder: Path) -> None:
    """Text, pairs, reviews, images, a graph and spoken words."""
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

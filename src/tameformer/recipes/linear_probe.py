"""How much of the classes a frozen encoder shows to a linear classifier (Zhang et al. 2016, arXiv:1603.08511).

Logistic regression on the mean of the encoder's outputs at all tokens, each feature standardized on the training images.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tameformer.data import SequentialBatches, Source, single_pass
from tameformer.errors import ConfigError
from tameformer.recipes.vision import ImageSource, few
from tameformer.training import Engine
from tameformer.training.run import Evaluation

Features = Callable[[nn.Module, Tensor], Tensor]
"""From a model and images to one vector an image."""


def check_probe(samples: int | None) -> None:
    """Refuse a probe that learns from nothing."""
    if samples is not None and samples < 2:
        raise ValueError(f"linear_probe_samples must be at least 2, got {samples}; null for no probe")


def linear_probe(
    samples: int | None, train: ImageSource, held_out: ImageSource, *, seed: int, batch_size: int
) -> Evaluation:
    """Measures `linear_probe_accuracy` by so many of the training images, without their augmentation; None measures nothing."""
    if samples is None:
        return lambda engine, model: {}
    learned_from = few(replace(train, transforms=()), min(samples, len(train)), seed=seed)

    def evaluation(engine: Engine, model: nn.Module) -> dict[str, float]:
        accuracy = probe_accuracy(engine, model, train=learned_from, held_out=held_out, batch_size=batch_size)
        return {"linear_probe_accuracy": accuracy}

    return evaluation


def mean_features(model: nn.Module, images: Tensor) -> Tensor:
    """The mean of the encoder's outputs at all tokens."""
    features: Callable[[Tensor], Tensor] = model.features  # pyright: ignore[reportAssignmentType]
    return features(images).mean(1)


def probe_accuracy(
    engine: Engine,
    model: nn.Module,
    *,
    train: Source,
    held_out: Source,
    batch_size: int,
    features: Features = mean_features,
) -> float:
    """Share of held-out images that logistic regression on the frozen features recognizes.

    Args:
        engine: Device and processes; all of them get the same number.
        model: In evaluation mode; left as it is.
        train: Labelled images that the classifier learns from, without augmentation.
        held_out: Labelled images that it is judged by.
        batch_size: Images at a time.
        features: From images to vectors.

    Raises:
        ConfigError: The training images are all of one class.
    """
    found = [_gathered(engine, model, source, batch_size, features) for source in (train, held_out)]
    return engine.gather([_fitted_accuracy(*found) if engine.is_main else None])[0]


def _gathered(
    engine: Engine, model: nn.Module, source: Source, batch_size: int, features: Features
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and labels of all images; the work is shared by all processes."""
    plan = SequentialBatches(len(source), batch_size)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.no_grad():
        for batch in single_pass(source, plan, rank=engine.rank, world_size=engine.world_size):
            placed = engine.place(batch)
            parts.append((features(model, placed["images"]).float().cpu().numpy(), batch["labels"].numpy()))
    parts = engine.gather(parts)
    vectors, labels = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    return vectors.astype(np.float64), labels


def _fitted_accuracy(train: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> float:
    from sklearn.linear_model import LogisticRegression  # its import takes two seconds

    if len(np.unique(train[1])) < 2:
        raise ConfigError(
            "the linear probe needs images of two classes at least; turn it off: --linear_probe_samples null"
        )
    mean, deviation = train[0].mean(0), train[0].std(0)
    deviation[deviation == 0] = 1
    # The default penalty is kept: tuned on held-out images it would tell of them.
    classifier = LogisticRegression(max_iter=2000)
    classifier.fit((train[0] - mean) / deviation, train[1])
    return float(classifier.score((held_out[0] - mean) / deviation, held_out[1]))

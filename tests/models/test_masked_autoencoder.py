"""The encoder sees the visible patches and nothing else, and is the classifier's."""

import pytest
import torch

from tameformer.models import VisionConfig, masked_autoencoder, vision_classifier
from tameformer.models.masked_autoencoder import (
    MaskedAutoencoderConfig,
    hidden_error,
    patch_targets,
    reconstruction,
)

VARIANTS = [
    {"stem": stem, "pooling": pooling, "positions": positions}
    for stem, pooling, positions in (
        ("patch", "mean", "learned"),
        ("patch", "class_token", "sinusoidal"),
        ("convolution", "class_token", "rotary"),
        ("convolution", "mean", "none"),
    )
]


def built(variant, **changes):
    torch.manual_seed(0)
    config = MaskedAutoencoderConfig(
        dim=16, num_layers=2, num_heads=2, patch_size=2, decoder_dim=8, decoder_num_heads=2, **variant, **changes
    )
    model = masked_autoencoder(config, image_size=(8, 4), channels=3).double().eval()
    with torch.no_grad():  # nothing may hide behind a zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


IMAGES = torch.randn(2, 3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VISIBLE = torch.tensor([[0, 3, 6], [1, 2, 7]])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_nothing_hidden_reaches_the_output_and_everything_visible_does(variant):
    model = built(variant)
    images = IMAGES.clone().requires_grad_()
    predictions = model(images, VISIBLE)
    (grad,) = torch.autograd.grad(predictions.square().sum(), images)
    per_patch = patch_targets(grad, 2, normalize=False).abs().sum(-1)
    seen = torch.zeros(2, 8, dtype=torch.bool).scatter(1, VISIBLE, True)
    assert (per_patch[~seen] == 0).all()
    assert (per_patch[seen] > 1e-6).all()


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=lambda variant: "-".join(variant.values()))
def test_with_all_patches_seen_the_encoder_is_the_classifiers(variant):
    model = built(variant)
    classifier = vision_classifier(
        VisionConfig(dim=16, num_layers=2, num_heads=2, patch_size=2, **variant),
        num_classes=3,
        image_size=(8, 4),
        channels=3,
    ).double()
    own = {name: tensor for name, tensor in model.state_dict().items() if name in classifier.state_dict()}
    left = classifier.load_state_dict(own, strict=False)
    assert all(name.startswith("head.") for name in left.missing_keys)
    everything = torch.arange(8).expand(2, -1)
    torch.testing.assert_close(model.encode(IMAGES, everything), classifier.eval().features(IMAGES))
    torch.testing.assert_close(model.features(IMAGES), classifier.features(IMAGES))


def test_an_encoder_without_mixing_gives_each_visible_patch_its_own_output():
    """Without layers, gathering before or after the positions is the same: each token keeps its own place."""
    model = built(VARIANTS[0])
    model.stack.layers = torch.nn.ModuleList()
    everywhere = model.stack.norm(model.stem(IMAGES) + model.positions.table)
    expected = everywhere.gather(1, VISIBLE[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(model.encode(IMAGES, VISIBLE), expected)


def test_the_error_is_the_mean_over_hidden_patches():
    predictions, targets = torch.randn(2, 8, 12), patch_targets(IMAGES.float(), 2, normalize=True)
    total = 0.0
    for image in range(2):
        hidden = [patch for patch in range(8) if patch not in VISIBLE[image].tolist()]
        total += sum(((predictions[image, p] - targets[image, p]) ** 2).mean().item() for p in hidden) / len(hidden)
    assert hidden_error(predictions, targets, VISIBLE).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_right_predictions_reconstruct_the_image(normalize):
    targets = patch_targets(IMAGES, 2, normalize=normalize)
    if normalize:
        torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 8, dtype=torch.float64))
        torch.testing.assert_close(targets.var(-1), torch.ones(2, 8, dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(reconstruction(IMAGES, targets, VISIBLE, 2, normalized=normalize), IMAGES)
    blank = reconstruction(IMAGES, torch.zeros_like(targets), VISIBLE, 2, normalized=False)
    assert (patch_targets(blank, 2, normalize=False)[0, 1] == 0).all()
    assert torch.equal(patch_targets(blank, 2, normalize=False)[0, 3], patch_targets(IMAGES, 2, normalize=False)[0, 3])

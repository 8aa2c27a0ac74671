"""Classifiers of films: the stem against the convolution that it is, and what both models promise."""

import pytest
import torch

from tameformer.models import (
    ConvolutionalVideoConfig,
    VideoConfig,
    convolutional_video_classifier,
    video_classifier,
)
from tameformer.nn.stems.tubelet import TubeletStem, tubelet_grid

TOLD = {"num_classes": 3, "num_frames": 4, "image_size": (8, 12), "channels": 2}


def build(kind):
    torch.manual_seed(0)
    if kind == "transformer":
        return video_classifier(VideoConfig(dim=16, num_layers=1, num_heads=2), **TOLD).double()
    return convolutional_video_classifier(ConvolutionalVideoConfig(architecture=kind, widths=(8, 16)), **TOLD).double()


def test_tubelets_are_a_convolution_over_time_and_space():
    torch.manual_seed(0)
    stem = TubeletStem(2, 2, 4, 16).double()
    films = torch.randn(3, 2, 6, 8, 12).double()
    weight = stem.patches.project.weight.view(16, 2, 2, 4, 4)
    expected = torch.nn.functional.conv3d(films, weight, stem.patches.project.bias, stride=(2, 4, 4))
    torch.testing.assert_close(stem(films), expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-12)
    assert tubelet_grid(6, (8, 12), 2, 4) == (3, 2, 3)


@pytest.mark.parametrize("kind", ["transformer", "resnet3d", "cnn3d"])
def test_films_do_not_depend_on_their_batch(kind):
    model = build(kind)
    films = torch.randn(3, 2, 4, 8, 12).double()
    out = model(films)
    torch.testing.assert_close(out[:1], model(films[:1]), rtol=0, atol=1e-12)
    out.square().sum().backward()
    unreached = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert [name for name in unreached if not name.endswith("key.bias")] == []
    # The order of frames matters: neither is a bag of frames.
    assert not torch.allclose(out, model(films.flip(2)))


def test_films_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected films of \(4, 8, 12\) .* got \(4, 8, 8\)"):
        build("transformer")(torch.zeros(1, 2, 4, 8, 8).double())
    with pytest.raises(ValueError, match=r"tubelet_frames=3 and 4 frames; choose one of \[1, 2, 4\]"):
        video_classifier(VideoConfig(tubelet_frames=3), **TOLD)

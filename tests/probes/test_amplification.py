import math

import pytest
import torch
from torch import nn

from tameformer.models import EncoderConfig, encoder
from tameformer.models.initialize import xavier_init
from tameformer.probes.amplification import amplification, gradient_signs, perturbed_parameters, random_signs

DEPTHS = (3, 12, 48)


class ScaledShortcut(nn.Module):
    """norm(alpha residual + branch(residual)), around a post-norm placement."""

    def __init__(self, placed, alpha):
        super().__init__()
        self.placed, self.alpha = placed, alpha

    def forward(self, residual, **kwargs):
        return self.placed.norm(self.alpha * residual + self.placed.branch(residual, **kwargs))


def deepnorm_init(num_layers):
    """Wang et al. 2022, arXiv:2203.00555, figure 2: xavier with gain beta, 1 for queries and keys."""

    def initialize(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                is_score = name.endswith(("query", "key"))
                nn.init.xavier_normal_(module.weight, gain=1.0 if is_score else (8 * num_layers) ** -0.25)
                nn.init.zeros_(module.bias)

    return initialize


def stack(scheme, num_layers):
    config = EncoderConfig(
        dim=128,
        hidden_dim=512,
        num_heads=4,
        num_layers=num_layers,
        positions="none",
        residual="pre" if scheme == "pre" else "post",
        activation="relu",
    )
    initialize = deepnorm_init(num_layers) if scheme == "deepnorm" else xavier_init
    model = encoder(config, vocab_size=1, initialize=initialize).stack
    if scheme == "deepnorm":
        for layer in model.layers:
            layer.attention = ScaledShortcut(layer.attention, (2 * num_layers) ** 0.25)
            layer.feed_forward = ScaledShortcut(layer.feed_forward, (2 * num_layers) ** 0.25)
    return model


def slope(scheme, seeds):
    """Log-log slope of the squared change over depth, mean over seeds first."""
    changes = torch.zeros(len(DEPTHS))
    for seed in range(seeds):
        for row, num_layers in enumerate(DEPTHS):
            torch.manual_seed(seed)
            model, generator = stack(scheme, num_layers), torch.Generator().manual_seed(seed)
            x = torch.randn(2, 16, 128, generator=generator)
            result = amplification(model, lambda model=model, x=x: model(x), direction=random_signs(generator))
            assert 3 < result.halving < 5.5
            changes[row] += result.squared_change / seeds
    x, y = torch.tensor(DEPTHS).log(), changes.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(
    ("scheme", "seeds", "low", "high"), [("post", 3, 0.8, 1.3), ("pre", 3, 0.3, 0.5), ("deepnorm", 1, -0.1, 0.1)]
)
def test_growth_with_depth_is_that_of_the_placement(scheme, seeds, low, high):
    assert low <= slope(scheme, seeds) <= high


def small():
    torch.manual_seed(0)
    model = encoder(EncoderConfig(dim=16, num_layers=2, num_heads=2, max_length=8, dropout=0.5), vocab_size=11)
    return model, torch.randint(0, 11, (2, 6))


def test_agrees_with_a_float64_loop_over_tokens():
    model, tokens = small()
    real = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    result = amplification(model, lambda: model(tokens, real=real), mask=real)

    reference, _ = small()
    reference.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = reference(tokens, real=real)
        for parameter in reference.parameters():
            if parameter.dim() > 1:
                parameter += 1e-3 * (2 * torch.empty(parameter.shape).bernoulli_(generator=generator) - 1)
        after = reference(tokens, real=real)
    changes, sizes = [], []
    for row, column in real.nonzero().tolist():
        changes.append(float((after[row, column] - before[row, column]).square().sum()))
        sizes.append(float(before[row, column].square().sum()))
    assert result.squared_change == pytest.approx(sum(changes) / 9, rel=1e-3)
    assert result.relative == pytest.approx(sum(changes) / sum(sizes), rel=1e-3)


def test_padding_has_no_part():
    model, tokens = small()
    real = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    garbage = torch.where(real, 0.0, 1e6 * torch.rand(2, 6)).unsqueeze(-1)

    def forward():
        return model(tokens, real=real) * (1 + garbage)

    clean = amplification(model, lambda: model(tokens, real=real), mask=real)
    assert amplification(model, forward, mask=real) == clean


def test_a_linear_model_answers_exactly():
    model = nn.Linear(5, 3)
    x = torch.tensor([[1.0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0]])
    result = amplification(model, lambda: model(x), size=0.5)
    assert result.squared_change == pytest.approx(0.25 * 3 * (1 + 4) / 2)
    assert result.halving == pytest.approx(4)


def test_the_gradient_s_direction_lowers_the_loss_most():
    model, tokens = small()
    outputs = []

    def forward():
        outputs.append(model(tokens))
        return outputs[-1]

    def loss():
        return model(tokens).select(-1, 0).sum()

    amplification(model, forward, size=1e-4, direction=gradient_signs(loss))
    falls = [float((outputs[0] - output).select(-1, 0).sum()) for output in outputs[1:]]
    model.eval()
    gradients = torch.autograd.grad(loss(), perturbed_parameters(model), allow_unused=True)
    expected = 1e-4 * sum(float(g.abs().sum()) for g in gradients)
    assert falls == pytest.approx([expected, expected / 2], rel=0.05)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_modes_and_generators_are_as_before_also_after_an_exception():
    model, tokens = small()
    model.train()
    model.stack.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    calls = []

    def forward():
        calls.append(model.training)
        if len(calls) == 5:
            raise RuntimeError("on purpose")
        return model(tokens)

    amplification(model, forward)
    with pytest.raises(RuntimeError, match="on purpose"):
        amplification(model, forward)
    assert calls == [False] * 5
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_that_is_too_large_shows_in_the_halving():
    model, tokens = small()
    assert amplification(model, lambda: model(tokens), size=1e-4).halving == pytest.approx(4, rel=0.02)
    assert amplification(model, lambda: model(tokens), size=10.0).halving < 2


def test_gates_norms_and_biases_are_told_by_shape():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
    model.register_parameter("gamma", nn.Parameter(torch.ones(1, 1, 3)))
    model.register_parameter("omega", nn.Parameter(torch.ones(3)))
    assert [id(p) for p in perturbed_parameters(model)] == [id(model["linear"].weight)]


def test_non_finite_outputs_come_back_as_they_are():
    model, tokens = small()
    assert math.isnan(amplification(model, lambda: model(tokens) * torch.nan).squared_change)


def test_refuses_nothing_to_move_and_no_step():
    with pytest.raises(ValueError, match="LayerNorm has none"):
        amplification(nn.LayerNorm(3), lambda: torch.zeros(1, 3))
    with pytest.raises(ValueError, match="positive size, got 0"):
        amplification(nn.Linear(2, 2), lambda: torch.zeros(1, 2), size=0)

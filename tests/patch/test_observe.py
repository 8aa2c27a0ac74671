import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tameformer.models import DecoderConfig, EncoderConfig, decoder, encoder
from tameformer.patch import Observation, Observer, blocks


class Notes(Observer):
    """Writes down what it is told."""

    def __init__(self):
        self.calls, self.heads, self.branches, self.activations, self.blocks = [], [], [], [], []
        self.outputs, self.told = [], []

    def on_begin(self):
        self.told.append("begin")

    def on_attention(self, call):
        self.calls.append(call)

    def on_heads(self, layer, output):
        self.heads.append((layer, output))

    def on_branch(self, layer, residual, branch):
        assert not torch.is_grad_enabled()
        self.branches.append((layer, residual.clone(), branch.clone()))

    def on_activation(self, layer, output):
        self.activations.append((layer, output))

    def on_block(self, block, input, output):
        self.blocks.append((block, input.clone(), output.clone()))

    def on_output(self, output):
        self.outputs.append(output)

    def on_gradients(self):
        self.told.append("gradients")

    def on_update(self):
        self.told.append("update")


def left_on(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called
    ]


def clean(model, *optimizers):
    assert not left_on(model)
    assert torch.overrides._get_current_function_mode() is None
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)


def torch_encoder(norm_first, layers=2):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_residual_stream_is_followed_through_both_placements(norm_first):
    model, notes = torch_encoder(norm_first), Notes()
    x = torch.randn(2, 5, 16)
    with Observation(model, [notes]).watching():
        model(x)
    assert [name for name, *_ in notes.blocks] == ["layers.0", "layers.1"]
    assert [name for name, *_ in notes.branches] == [
        "layers.0.self_attn",
        "layers.0.branch_2",
        "layers.1.self_attn",
        "layers.1.branch_2",
    ]
    layer = model.layers[0]
    normed = layer.norm1(x) if norm_first else x
    attention = layer.self_attn(normed, normed, normed, need_weights=False)[0]
    assert torch.equal(notes.branches[0][1], x)
    assert torch.allclose(notes.branches[0][2], attention, atol=1e-6)
    stream = x + attention if norm_first else layer.norm1(x + attention)
    assert torch.allclose(notes.branches[1][1], stream, atol=1e-6)
    assert torch.allclose(notes.blocks[0][2], notes.blocks[1][1])


def test_an_in_place_sum_is_told_with_the_stream_as_it_was():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            x = x * 1.0
            branch = self.inner(x)
            x += branch
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Told(Model):
        """The same with the product left out, so that the stream is known."""

        def forward(self, x):
            for layer in self.layers:
                x = x.add(layer.inner(x))
            return x

    model, notes = Model(), Notes()
    with Observation(model, [notes]).watching():
        model(torch.randn(2, 3, 4))
    assert notes.branches == []  # `x * 1.0` is a new tensor: not followed, and not guessed
    told, notes = Told(), Notes()
    with Observation(told, [notes]).watching():
        told(torch.randn(2, 3, 4))
    assert notes.branches == []  # outside of the layers' own forward there is no layer to name


@pytest.mark.parametrize("masked", [False, True])
def test_queries_and_keys_are_those_of_the_model(masked):
    model = torch_encoder(False, 1)
    x, notes = torch.randn(3, 5, 16), Notes()
    padding = torch.tensor([[False] * 3 + [True] * 2] * 3) if masked else None
    with Observation(model, [notes], sequences=None).watching():
        model(x, src_key_padding_mask=padding)
    (call,) = notes.calls
    attention = model.layers[0].self_attn
    _, weights = attention(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    logits = call.query @ call.key.mT / 8**0.5
    if masked:
        logits = logits + call.mask
    assert torch.allclose(logits.softmax(-1), weights, atol=1e-6)
    heads = weights @ call.value
    assert torch.allclose(notes.heads[0][1], heads, atol=1e-6)


def test_attention_masks_of_torch_forbid_where_true():
    attention, notes = nn.MultiheadAttention(16, 2, batch_first=True), Notes()
    x = torch.randn(2, 4, 16)
    padding = torch.tensor([[False, False, False, True]] * 2)
    forbidden = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    with Observation(attention, [notes], sequences=None).watching():
        _, weights = attention(x, x, x, key_padding_mask=padding, attn_mask=forbidden, average_attn_weights=False)
    (call,) = notes.calls
    mask = call.mask if call.mask.dtype == torch.bool else call.mask > -1e30
    assert torch.equal(mask.expand(2, 2, 4, 4), weights > 0)


def test_layers_that_put_the_sequence_first_are_told_batch_first():
    first = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0), 2, enable_nested_tensor=False)
    other = torch_encoder(False)
    other.load_state_dict(first.state_dict())
    x, seq_first, batch_first = torch.randn(3, 5, 16), Notes(), Notes()
    with Observation(first, [seq_first]).watching():
        first(x.transpose(0, 1))
    with Observation(other, [batch_first]).watching():
        other(x)
    for mine, theirs in ((seq_first.blocks, batch_first.blocks), (seq_first.branches, batch_first.branches)):
        for (name, *tensors), (other_name, *others) in zip(mine, theirs, strict=True):
            assert name == other_name
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors, others, strict=True))
    assert all(
        a.shape == b.shape for (_, a), (_, b) in zip(seq_first.activations, batch_first.activations, strict=True)
    )


def test_only_the_first_sequences_are_handed_on():
    model, notes = encoder(EncoderConfig(dim=8, num_heads=2, num_layers=1, max_length=6), vocab_size=7), Notes()
    with Observation(model, [notes], sequences=2).watching():
        model(torch.zeros(3, 6, dtype=torch.long))
    assert notes.calls[0].query.shape == (2, 2, 6, 4)


def test_a_stateless_module_speaks_in_the_name_of_its_caller():
    model, notes = decoder(DecoderConfig(dim=8, num_heads=2, num_layers=2, max_length=6), vocab_size=7), Notes()
    observation = Observation(model, [notes])
    with observation.watching():
        model(torch.zeros(1, 6, dtype=torch.long))
    layers = [call.layer for call in notes.calls]
    assert len(set(layers)) == 2
    assert all(next(model.get_submodule(layer).parameters(), None) is not None for layer in layers)
    assert all(call.is_causal for call in notes.calls)
    assert observation.unseen() == []


def test_a_plain_module_that_calls_attention_is_seen():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 12)

        def forward(self, x):
            query, key, value = self.project(x).chunk(3, -1)
            return F.scaled_dot_product_attention(query, key, value)

    model, notes = Plain(), Notes()
    with Observation(model, [notes]).watching():
        model(torch.randn(2, 3, 4))
    assert notes.calls[0].layer == ""
    assert notes.calls[0].query.shape == (1, 1, 3, 4)


def test_attention_that_was_not_seen_is_named():
    class HandMadeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):
            scores = x @ self.project(x).mT
            return (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ x

    model = nn.Sequential(HandMadeAttention(), nn.Linear(4, 4))
    observation = Observation(model, [Notes()])
    with observation.watching():
        model(torch.randn(2, 3, 4))
    assert observation.unseen() == ["0"]


def train(model, x, steps, observed=(), **settings):
    """Weights, losses and the generator's state after some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    notes, losses = Notes(), []
    observation = Observation(model, [notes], optimizers=[optimizer], counts=torch.is_grad_enabled)
    torch.manual_seed(1)
    for step in range(steps):
        with observation.watching() if step in observed else torch.enable_grad():
            loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    clean(model, optimizer)
    return [p.detach().clone() for p in model.parameters()], losses, torch.get_rng_state(), notes


def test_watching_changes_nothing():
    model = torch_encoder(False)
    for layer in model.layers:
        layer.dropout.p = layer.self_attn.dropout = 0.1
    x = torch.randn(2, 5, 16)
    plain = train(copy.deepcopy(model), x, 4)
    watched = train(copy.deepcopy(model), x, 4, observed=(1, 3))
    assert watched[3].told == ["begin", "gradients", "update"] * 2
    assert plain[1] == watched[1]
    assert torch.equal(plain[2], watched[2])
    assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_are_seen_once(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch_encoder(True)

        def forward(self, x):
            for layer in self.inner.layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            return x

    model, x = Checkpointed(), torch.randn(2, 5, 16, requires_grad=True)
    plain = train(copy.deepcopy(model), x, 2)
    watched = train(copy.deepcopy(model), x, 2, observed=(1,))
    assert [call.layer for call in watched[3].calls] == ["inner.layers.0.self_attn", "inner.layers.1.self_attn"]
    assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))


def test_an_evaluation_inside_the_step_is_left_alone():
    model, notes = torch_encoder(False), Notes()
    x = torch.randn(2, 5, 16)
    model.eval()
    with torch.no_grad():
        expected = model(x)  # torch's fused path
        with Observation(model, [notes], counts=torch.is_grad_enabled).watching():
            assert torch.equal(model(x), expected)
    assert notes.calls == []


def test_the_fused_path_of_evaluation_can_be_observed():
    model, notes = torch_encoder(False), Notes()
    model.eval()
    with torch.no_grad(), Observation(model, [notes]).watching():
        model(torch.randn(2, 5, 16))
    assert [call.layer for call in notes.calls] == ["layers.0.self_attn", "layers.1.self_attn"]


def test_a_second_pass_in_the_same_step_is_not_observed():
    model, notes = torch_encoder(False, 1), Notes()
    with Observation(model, [notes]).watching():
        model(torch.randn(2, 5, 16))
        model(torch.randn(2, 5, 16))
    assert len(notes.calls) == len(notes.outputs) == 1


class Faulty(nn.Module):
    def forward(self, x):
        raise RuntimeError("no")


def test_nothing_is_left_after_an_exception_in_the_model():
    model = nn.Sequential(torch_encoder(False, 1), Faulty())
    optimizer = torch.optim.SGD(model.parameters())
    context = Observation(model, [Notes()], optimizers=[optimizer]).watching()
    context.__enter__()  # as in a loop of statements
    with pytest.raises(RuntimeError, match="no"):
        model(torch.randn(2, 5, 16))
    clean(model, optimizer)
    context.__exit__(None, None, None)


@pytest.mark.parametrize("event", ["on_begin", "on_attention", "on_block", "on_output", "on_gradients", "on_update"])
def test_nothing_is_left_after_an_exception_in_an_observer(event):
    class Bad(Notes):
        pass

    def fail(self, *args):
        raise ArithmeticError("bad observer")

    setattr(Bad, event, fail)
    model = torch_encoder(False, 1)
    optimizer = torch.optim.SGD(model.parameters())
    context = Observation(model, [Bad()], optimizers=[optimizer]).watching()

    def step():
        context.__enter__()
        model(torch.randn(2, 5, 16)).mean().backward()
        optimizer.step()

    with pytest.raises(ArithmeticError, match="bad observer"):
        step()
    clean(model, optimizer)
    context.__exit__(None, None, None)


def test_layers_are_found_by_structure():
    assert list(blocks(torch_encoder(False))) == ["layers.0", "layers.1"]
    assert list(blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == []
    both = nn.Transformer(8, 2, 1, 2, 16, batch_first=True)
    assert list(blocks(both)) == ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_is_off_in_observers(dtype):
    class Precise(Observer):
        def on_block(self, block, input, output):
            self.product = (input.float().mT @ input.float()).dtype

    model, precise = torch_encoder(False, 1), Precise()
    with torch.autocast("cpu", dtype), Observation(model, [precise]).watching():
        model(torch.randn(2, 5, 16))
    assert precise.product == torch.float32

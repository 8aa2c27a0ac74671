"""Recurrent and convolutional networks: what they see, and that a reference written out gives the same."""

import pytest
import torch
from torch import nn

from tameformer.models import ConvolutionalConfig, RecurrentDecoderConfig, convolutional_classifier, recurrent_decoder
from tameformer.models.convolutional import Block
from tameformer.models.recurrent import RecurrentConfig, RecurrentEncoder
from tameformer.optim.groups import is_matrix


def decoder(**settings):
    torch.manual_seed(0)
    return recurrent_decoder(RecurrentDecoderConfig(dim=12, **settings), vocab_size=7).double().eval()


def one_step(model, layer, x, h, c):
    """A step of the published recurrences, gate by gate, for one layer."""
    cell = model.recurrence
    w, u, b, d = (getattr(cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    if isinstance(cell, nn.LSTM):
        i, f, g, o = (w @ x + b + u @ h + d).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (r, z, n), (hr, hz, hn) = (w @ x + b).chunk(3), (u @ h + d).chunk(3)
    r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
    return (1 - z) * (n + r * hn).tanh() + z * h, c


@pytest.mark.parametrize("architecture", ["lstm", "gru"])
def test_a_recurrent_decoder_is_its_recurrence_step_by_step(architecture):
    model = decoder(architecture=architecture, num_layers=2)
    tokens = torch.tensor([[3, 1, 6, 0, 2]])
    states = [(torch.zeros(12).double(), torch.zeros(12).double()) for _ in range(2)]
    for place, token in enumerate(tokens[0]):
        x = model.embedding.weight[token]
        for layer in range(2):
            states[layer] = one_step(model, layer, x, *states[layer])
            x = states[layer][0]
        expected = model.head.weight[:7] @ x
        torch.testing.assert_close(model(tokens)[0, place], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["lstm", "gru"])
def test_packed_documents_are_read_each_from_the_beginning(architecture):
    model = decoder(architecture=architecture, num_layers=2)
    tokens = torch.tensor([[3, 1, 6, 0, 2, 5], [4, 4, 1, 2, 0, 0]])
    lengths = [(3, 1, 2), (4, 1, 1)]  # the last two of the second row are padding, at position 0 each
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = model(tokens, positions=positions)
    for row, pieces in enumerate(lengths):
        alone = [model(piece[None])[0] for piece in tokens[row].split(pieces)]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=0, atol=1e-12)
    whole = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(model(tokens, positions=whole), model(tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(packed, model(tokens))
    grads = [
        torch.autograd.grad(model(tokens, positions=positions)[0, at].sum(), model.embedding.weight)[0] for at in (3, 5)
    ]
    assert [grad[:7].any(1).nonzero().flatten().tolist() for grad in grads] == [[0], [2, 5]]


def test_recurrent_layers_read_dropped_inputs_in_training_only():
    model = decoder(dropout=0.5)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("architecture", ["lstm", "gru"])
def test_a_recurrent_encoder_does_not_read_padding(architecture):
    torch.manual_seed(0)
    model = RecurrentEncoder(RecurrentConfig(architecture=architecture, dim=8)).double()
    x = torch.randn(2, 6, 8).double()
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    together = model(x, real)
    torch.testing.assert_close(together[1, :4], model(x[1:, :4])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(together[0], model(x[:1])[0], rtol=0, atol=1e-12)
    assert not together[1, 4:].any()
    # Each position has seen the last one, and the last one each.
    changed = x.clone()
    changed[0, 5] += 1
    assert (model(changed)[0] != model(x)[0]).any(-1).all()


def test_a_block_is_its_shortcut_plus_its_convolutions():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    residual = Block(nn.Conv2d, 4, 4, 1, is_residual=True)
    plain = Block(nn.Conv2d, 4, 4, 1, is_residual=False)
    plain.load_state_dict(residual.state_dict())
    branch = residual.second_norm(residual.second(residual.first_norm(residual.first(x)).relu()))
    assert torch.equal(residual(x), (x + branch).relu())
    assert torch.equal(plain(x), branch.relu())
    wider = Block(nn.Conv2d, 4, 6, 2, is_residual=True)
    assert wider(x).shape == (2, 6, 3, 3)
    for parameter in wider.second.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(wider(x), wider.shortcut(x).relu())


def test_weight_decay_reaches_the_matrices_of_recurrences():
    def decayed(model):
        return {
            name
            for name, parameter in model.named_parameters()
            if is_matrix(name, model.get_submodule(name.rpartition(".")[0]), parameter)
        }

    assert decayed(decoder(num_layers=2)) == {
        f"recurrence.weight_{side}h_l{layer}" for side in "ih" for layer in (0, 1)
    }
    for cell in (nn.GRUCell(2, 3), nn.LSTMCell(2, 3), nn.RNNCell(2, 3)):
        assert decayed(nn.ModuleDict({"cell": cell})) == {"cell.weight_ih", "cell.weight_hh"}


@pytest.mark.parametrize("architecture", ["resnet", "cnn"])
def test_images_do_not_depend_on_their_batch(architecture):
    config = ConvolutionalConfig(architecture=architecture, widths=(8, 16), blocks=2)
    model = convolutional_classifier(config, num_classes=3, image_size=8, channels=1).double()
    images = torch.randn(4, 1, 8, 8).double()
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=0, atol=1e-12)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert len(model.layers) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecurrentConfig(dropout=1.0), "expected 0 <= dropout < 1, got 1.0"),
        (lambda: RecurrentConfig(num_layers=0), "expected num_layers of at least 1, got 0"),
        (lambda: RecurrentEncoder(RecurrentConfig(dim=7)), "expected an even dim, half for each direction, got 7"),
        (lambda: ConvolutionalConfig(widths=()), r"expected widths of at least 1, one a stage, got \[\]"),
        (lambda: ConvolutionalConfig(blocks=0), "expected blocks of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

import pytest
import torch
import transformers
from torch import nn

from tameformer.nn.layer_mix import LayerMix


def layers():
    return torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_mixes_by_the_papers_formula():
    mix = LayerMix(4).double().eval()
    nn.init.normal_(mix.logits)
    nn.init.constant_(mix.scale, 1.7)
    weights = mix.logits.exp() / mix.logits.exp().sum()
    expected = 1.7 * sum(weight * layer for weight, layer in zip(weights, layers(), strict=True))
    torch.testing.assert_close(mix(list(layers())), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mix.weights(), weights)


def test_layers_are_left_out_in_training_at_their_rate():
    torch.manual_seed(0)
    mix = LayerMix(4, layer_dropout=0.3)
    one_hot = [torch.eye(4)[i].expand(1, 1, 4) for i in range(4)]
    drawn = torch.stack([mix(one_hot)[0, 0] for _ in range(2000)])
    torch.testing.assert_close(drawn.sum(-1), torch.ones(2000))
    assert (drawn == 0).float().mean().item() == pytest.approx(0.3 - 0.3**4, abs=0.02)  # where all would go, none does
    assert mix.eval()(one_hot)[0, 0].tolist() == [0.25] * 4


def test_reads_any_hugging_face_model_and_trains():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    model, mix = transformers.BertModel(config), LayerMix(3)
    out = model(torch.arange(12).view(2, 6), output_hidden_states=True)
    mixed = mix(out.hidden_states)
    assert mixed.shape == (2, 6, 16)
    mixed.square().sum().backward()
    assert mix.logits.grad.any()
    assert model.embeddings.word_embeddings.weight.grad.any()
    with pytest.raises(ValueError, match="expected the outputs of 3 layers, got 2"):
        mix(out.hidden_states[1:])
    with pytest.raises(ValueError, match="got 3 and 1"):
        LayerMix(3, layer_dropout=1.0)

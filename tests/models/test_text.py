import pytest
import torch

from tameformer.finetune import places
from tameformer.models import (
    Architecture,
    ConvolutionalTextConfig,
    EncoderConfig,
    RecurrentTextConfig,
    TextClassifierConfig,
    convolutional_text_classifier,
    masked_language_model,
    recurrent_text_classifier,
    text_classifier,
)

SMALL = {"dim": 16, "num_layers": 2, "num_heads": 2, "max_length": 12}


def test_masked_logits_are_those_at_the_masked_places():
    torch.manual_seed(0)
    model = masked_language_model(EncoderConfig(**SMALL), vocab_size=30).eval()
    tokens = torch.randint(30, (2, 9))
    at = torch.rand(2, 9) < 0.4
    everywhere = model(tokens, at=torch.ones_like(at)).view(2, 9, 30)
    torch.testing.assert_close(model(tokens, at=at), everywhere[at])
    assert sum("embedding" in name for name, _ in model.named_parameters()) == 1  # tied


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_padding_changes_nothing(pooling):
    torch.manual_seed(0)
    config = TextClassifierConfig(**SMALL, pooling=pooling)
    model = text_classifier(config, vocab_size=30, num_classes=3).eval()
    tokens = torch.randint(30, (2, 5))
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], 1)
    real = torch.arange(9)[None].expand(2, -1) < 5
    torch.testing.assert_close(model(padded, real=real), model(tokens))


def test_the_encoder_has_the_same_names_in_both_and_both_are_rebuilt_from_files():
    given = Architecture("masked_language_model", EncoderConfig(**SMALL), {"vocab_size": 30})
    taken = Architecture("text_classifier", TextClassifierConfig(**SMALL), {"vocab_size": 30, "num_classes": 2})
    names = [
        {name: one.shape for name, one in Architecture.from_plain(each.to_plain()).build().named_parameters()
         if name.startswith("encoder.")} for each in (given, taken)
    ]  # fmt: skip
    assert names[0] == names[1]


def test_the_mix_of_layers_starts_as_their_mean_and_can_be_the_last_one():
    torch.manual_seed(0)
    model = text_classifier(TextClassifierConfig(**SMALL, layer_mix=True), vocab_size=30, num_classes=3).eval()
    tokens = torch.randint(30, (2, 5))
    states = model.encoder.hidden_states(tokens)
    assert len(states) == 3
    torch.testing.assert_close(states[-1], model.encoder(tokens))
    torch.testing.assert_close(model(tokens), model.head(torch.stack(states).mean(0).mean(1)))
    with torch.no_grad():
        model.mix.logits[-1] = 100.0
    plain = text_classifier(TextClassifierConfig(**SMALL), vocab_size=30, num_classes=3).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mix.")})
    torch.testing.assert_close(model(tokens), plain(tokens))
    model(tokens).sum().backward()
    assert model.mix.scale.grad != 0


def test_a_mix_of_layers_learns_as_fast_as_the_head():
    model = text_classifier(TextClassifierConfig(**SMALL, layer_mix=True), vocab_size=30, num_classes=3)
    found = places(model)
    assert found["mix.logits"].above == found["head.weight"].above == 0


def text_network(architecture):
    torch.manual_seed(0)
    if architecture == "cnn":
        config = ConvolutionalTextConfig(dim=6, kernels=(2, 4), num_filters=5)
        return convolutional_text_classifier(config, vocab_size=30, num_classes=3).double().eval()
    config = RecurrentTextConfig(architecture=architecture, dim=6, pooling="max")
    return recurrent_text_classifier(config, vocab_size=30, num_classes=3).double().eval()


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("architecture", ["cnn", "lstm", "gru"])
def test_padding_is_not_read_by_the_baselines(architecture, length):
    model = text_network(architecture)
    tokens = torch.randint(30, (2, length))
    padded = torch.cat([tokens, torch.randint(30, (2, 7))], 1)
    real = torch.arange(length + 7)[None].expand(2, -1) < length
    torch.testing.assert_close(model(padded, real=real), model(tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(model(padded), model(tokens))


def test_the_largest_answer_of_each_filter_counts():
    """Window by window over the text with zeros around it."""
    model = text_network("cnn")
    tokens = torch.tensor([[3, 8, 1, 22, 7]])
    answers = []
    for convolution in model.filters:
        width = convolution.kernel_size[0]
        x = torch.zeros(5 + 2 * (width - 1), 6).double()
        x[width - 1 : width + 4] = model.embedding.weight[tokens[0]]
        for filters, bias in zip(convolution.weight, convolution.bias, strict=True):
            found = [(filters * x[begin : begin + width].T).sum() + bias for begin in range(5 + width - 1)]
            answers.append(max(0.0, max(found)))
    expected = model.head.weight @ torch.stack([torch.as_tensor(one).double() for one in answers]) + model.head.bias
    torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-12)


def test_wrong_settings_of_the_baselines():
    with pytest.raises(ValueError, match=r"expected kernels of at least 1 token, got \[3, 0\]"):
        ConvolutionalTextConfig(kernels=(3, 0))
    with pytest.raises(ValueError, match="expected 0 <= head_dropout < 1, got 1"):
        RecurrentTextConfig(head_dropout=1.0)

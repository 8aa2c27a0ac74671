import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from tameformer.models import DecoderConfig, EncoderDecoderConfig, GraphConfig, VisionConfig
from tameformer.models import decoder, encoder_decoder, graph_classifier, vision_classifier

small = dict(dim=32, num_heads=4)
tokens = torch.randint(1, 70, (2, 8))
models = [
    (decoder(DecoderConfig(num_layers=2, positions="rotary", **small), vocab_size=70), (tokens,)),
    (encoder_decoder(EncoderDecoderConfig(num_encoder_layers=1, num_decoder_layers=1, **small), vocab_size=70,
                     padding_id=0), (tokens, tokens)),
    (vision_classifier(VisionConfig(num_layers=1, **small), num_classes=5, image_size=8, channels=3),
     (torch.randn(2, 3, 8, 8),)),
    (graph_classifier(GraphConfig(dropout=0.0, attention_dropout=0.0), num_features=5, num_classes=3),
     (torch.randn(7, 5), torch.tensor([[0, 1, 2], [1, 2, 3]]))),
]
for model, inputs in models:
    compiled = torch.compile(model, fullgraph=True)
    expected, got = model(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
"""


@pytest.mark.compile
def test_every_model_compiles_to_one_graph():
    """In a process of its own: the shape checks of the test run would break the graph."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment)

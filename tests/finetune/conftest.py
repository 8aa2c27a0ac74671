"""Tiny models of the families that people fine-tune, by name."""

import pytest
import torch
from torch import nn

from tameformer import models

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {**_SMALL, "vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
_PIXELS = {**_SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}


def _hugging_face(kind: str, config: str, **values):
    def build():
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, kind)(getattr(transformers, config)(**values))

    return build


def _ours_vision():
    config = models.VisionConfig(dim=16, num_layers=2, num_heads=2, stem="convolution", pooling="attention")
    return models.vision_classifier(config, num_classes=3, image_size=8, channels=1)


BUILDERS = {
    "bert": _hugging_face("BertForSequenceClassification", "BertConfig", **_TEXT),
    "roberta": _hugging_face("RobertaForSequenceClassification", "RobertaConfig", **_TEXT),
    "distilbert": _hugging_face(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=50, dim=16, n_layers=2, n_heads=2,
        hidden_dim=32, num_labels=3,
    ),
    "vit": _hugging_face("ViTForImageClassification", "ViTConfig", **_PIXELS),
    "deit": _hugging_face("DeiTForImageClassification", "DeiTConfig", **_PIXELS),
    "gpt2": _hugging_face(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    ),
    "llama": _hugging_face("LlamaForSequenceClassification", "LlamaConfig", **_TEXT),
    "t5": _hugging_face(
        "T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    ),
    "bart": _hugging_face(
        "BartForSequenceClassification", "BartConfig", vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    ),
    "torch": lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
    "encoder": lambda: models.encoder(models.EncoderConfig(dim=16, num_layers=2, num_heads=2), vocab_size=50),
    "decoder": lambda: models.decoder(models.DecoderConfig(dim=16, num_layers=2, num_heads=2), vocab_size=50),
    "encoder-decoder": lambda: models.encoder_decoder(
        models.EncoderDecoderConfig(dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=2),
        vocab_size=50,
        padding_id=0,
    ),
    "vision": _ours_vision,
}  # fmt: skip


@pytest.fixture
def build():
    """From a name to a model with the weights of a seed."""

    def made(name: str, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return BUILDERS[name]()

    return made

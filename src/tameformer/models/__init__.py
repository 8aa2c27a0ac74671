"""Models: building blocks put together from a configuration."""

from tameformer.models.architecture import BUILDERS, Architecture
from tameformer.models.contrastive import ContrastiveConfig, contrastive_encoder
from tameformer.models.convolutional import ConvolutionalConfig, convolutional_classifier
from tameformer.models.decoder import Decoder, DecoderConfig, decoder
from tameformer.models.encoder import Encoder, EncoderConfig, encoder
from tameformer.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, encoder_decoder
from tameformer.models.generate import beam_search, decoder_steps, greedy, sample, translation_steps
from tameformer.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig, masked_autoencoder
from tameformer.models.recurrent import RecurrentConfig, RecurrentDecoderConfig, recurrent_decoder
from tameformer.models.text import (
    MaskedLanguageModel,
    TextClassifier,
    TextClassifierConfig,
    masked_language_model,
    text_classifier,
)
from tameformer.models.vision import VisionClassifier, VisionConfig, vision_classifier

__all__ = [
    "BUILDERS",
    "Architecture",
    "ContrastiveConfig",
    "ConvolutionalConfig",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "MaskedAutoencoder",
    "MaskedAutoencoderConfig",
    "MaskedLanguageModel",
    "RecurrentConfig",
    "RecurrentDecoderConfig",
    "TextClassifier",
    "TextClassifierConfig",
    "VisionClassifier",
    "VisionConfig",
    "beam_search",
    "contrastive_encoder",
    "convolutional_classifier",
    "decoder",
    "decoder_steps",
    "encoder",
    "encoder_decoder",
    "greedy",
    "masked_autoencoder",
    "masked_language_model",
    "recurrent_decoder",
    "sample",
    "text_classifier",
    "translation_steps",
    "vision_classifier",
]

"""Models: building blocks put together from a configuration."""

from tameformer.models.architecture import BUILDERS, Architecture
from tameformer.models.decoder import Decoder, DecoderConfig, decoder
from tameformer.models.encoder import Encoder, EncoderConfig, encoder
from tameformer.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, encoder_decoder
from tameformer.models.generate import beam_search, decoder_steps, greedy, sample, translation_steps
from tameformer.models.vision import VisionClassifier, VisionConfig, vision_classifier

__all__ = [
    "BUILDERS",
    "Architecture",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "VisionClassifier",
    "VisionConfig",
    "beam_search",
    "decoder",
    "decoder_steps",
    "encoder",
    "encoder_decoder",
    "greedy",
    "sample",
    "translation_steps",
    "vision_classifier",
]

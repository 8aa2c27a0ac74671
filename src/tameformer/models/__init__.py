"""Models: building blocks put together from a configuration."""

from tameformer.models.architecture import BUILDERS, Architecture
from tameformer.models.contrastive import ContrastiveConfig, contrastive_encoder
from tameformer.models.convolutional import ConvolutionalConfig, convolutional_classifier
from tameformer.models.convolutional_text import (
    ConvolutionalTextClassifier,
    ConvolutionalTextConfig,
    convolutional_text_classifier,
)
from tameformer.models.ctc import ctc_beam_search, ctc_greedy
from tameformer.models.decoder import Decoder, DecoderConfig, decoder
from tameformer.models.encoder import Encoder, EncoderConfig, encoder
from tameformer.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, encoder_decoder
from tameformer.models.generate import beam_search, decoder_steps, greedy, sample, translation_steps
from tameformer.models.graph import GraphClassifier, GraphConfig, graph_classifier
from tameformer.models.hierarchical import (
    DocumentAttention,
    HierarchicalClassifier,
    HierarchicalConfig,
    hierarchical_classifier,
)
from tameformer.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig, masked_autoencoder
from tameformer.models.recurrent import RecurrentConfig, RecurrentDecoderConfig, recurrent_decoder
from tameformer.models.recurrent_text import RecurrentTextClassifier, RecurrentTextConfig, recurrent_text_classifier
from tameformer.models.recurrent_translation import (
    RecurrentTranslation,
    RecurrentTranslationConfig,
    recurrent_translation,
)
from tameformer.models.set import SetClassifier, SetConfig, TokenSetConfig, set_classifier, token_set_classifier
from tameformer.models.speech import (
    CTCRecognizer,
    DecoderRecognizer,
    RecurrentSpeechConfig,
    SpeechConfig,
    recurrent_recognizer,
    speech_recognizer,
    transcription_steps,
)
from tameformer.models.text import (
    MaskedLanguageModel,
    TextClassifier,
    TextClassifierConfig,
    masked_language_model,
    text_classifier,
)
from tameformer.models.universal import (
    UniversalConfig,
    UniversalDecoderConfig,
    ponder_cost,
    steps_taken,
    universal_decoder,
    universal_encoder,
)
from tameformer.models.video import (
    ConvolutionalVideoConfig,
    VideoClassifier,
    VideoConfig,
    convolutional_video_classifier,
    video_classifier,
)
from tameformer.models.vision import VisionClassifier, VisionConfig, vision_classifier

__all__ = [
    "BUILDERS",
    "Architecture",
    "CTCRecognizer",
    "ContrastiveConfig",
    "ConvolutionalConfig",
    "ConvolutionalTextClassifier",
    "ConvolutionalTextConfig",
    "ConvolutionalVideoConfig",
    "Decoder",
    "DecoderConfig",
    "DecoderRecognizer",
    "DocumentAttention",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GraphClassifier",
    "GraphConfig",
    "HierarchicalClassifier",
    "HierarchicalConfig",
    "MaskedAutoencoder",
    "MaskedAutoencoderConfig",
    "MaskedLanguageModel",
    "RecurrentConfig",
    "RecurrentDecoderConfig",
    "RecurrentSpeechConfig",
    "RecurrentTextClassifier",
    "RecurrentTextConfig",
    "RecurrentTranslation",
    "RecurrentTranslationConfig",
    "SetClassifier",
    "SetConfig",
    "SpeechConfig",
    "TextClassifier",
    "TextClassifierConfig",
    "TokenSetConfig",
    "UniversalConfig",
    "UniversalDecoderConfig",
    "VideoClassifier",
    "VideoConfig",
    "VisionClassifier",
    "VisionConfig",
    "beam_search",
    "contrastive_encoder",
    "convolutional_classifier",
    "convolutional_text_classifier",
    "convolutional_video_classifier",
    "ctc_beam_search",
    "ctc_greedy",
    "decoder",
    "decoder_steps",
    "encoder",
    "encoder_decoder",
    "graph_classifier",
    "greedy",
    "hierarchical_classifier",
    "masked_autoencoder",
    "masked_language_model",
    "ponder_cost",
    "recurrent_decoder",
    "recurrent_recognizer",
    "recurrent_text_classifier",
    "recurrent_translation",
    "sample",
    "set_classifier",
    "speech_recognizer",
    "steps_taken",
    "text_classifier",
    "token_set_classifier",
    "transcription_steps",
    "translation_steps",
    "universal_decoder",
    "universal_encoder",
    "video_classifier",
    "vision_classifier",
]

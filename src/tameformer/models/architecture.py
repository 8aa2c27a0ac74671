"""What a model was built with, as plain values: enough to build it again where neither its data nor its recipe is."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from torch import nn

from tameformer import config as configuration
from tameformer.errors import ConfigError
from tameformer.models.contrastive import ContrastiveConfig, contrastive_encoder
from tameformer.models.convolutional import ConvolutionalConfig, convolutional_classifier
from tameformer.models.convolutional_text import ConvolutionalTextConfig, convolutional_text_classifier
from tameformer.models.decoder import DecoderConfig, decoder
from tameformer.models.encoder import EncoderConfig, encoder
from tameformer.models.encoder_decoder import EncoderDecoderConfig, encoder_decoder
from tameformer.models.graph import GraphConfig, graph_classifier
from tameformer.models.hierarchical import HierarchicalConfig, hierarchical_classifier
from tameformer.models.masked_autoencoder import MaskedAutoencoderConfig, masked_autoencoder
from tameformer.models.recurrent import RecurrentDecoderConfig, recurrent_decoder
from tameformer.models.recurrent_text import RecurrentTextConfig, recurrent_text_classifier
from tameformer.models.recurrent_translation import RecurrentTranslationConfig, recurrent_translation
from tameformer.models.set import SetConfig, TokenSetConfig, set_classifier, token_set_classifier
from tameformer.models.speech import RecurrentSpeechConfig, SpeechConfig, recurrent_recognizer, speech_recognizer
from tameformer.models.text import TextClassifierConfig, masked_language_model, text_classifier
from tameformer.models.universal import (
    UniversalConfig,
    UniversalDecoderConfig,
    universal_decoder,
    universal_encoder,
)
from tameformer.models.video import (
    ConvolutionalVideoConfig,
    VideoConfig,
    convolutional_video_classifier,
    video_classifier,
)
from tameformer.models.vision import VisionConfig, vision_classifier

BUILDERS: dict[str, tuple[Callable[..., nn.Module], type]] = {
    "contrastive_encoder": (contrastive_encoder, ContrastiveConfig),
    "convolutional_classifier": (convolutional_classifier, ConvolutionalConfig),
    "convolutional_text_classifier": (convolutional_text_classifier, ConvolutionalTextConfig),
    "decoder": (decoder, DecoderConfig),
    "encoder": (encoder, EncoderConfig),
    "encoder_decoder": (encoder_decoder, EncoderDecoderConfig),
    "recurrent_decoder": (recurrent_decoder, RecurrentDecoderConfig),
    "recurrent_text_classifier": (recurrent_text_classifier, RecurrentTextConfig),
    "graph_classifier": (graph_classifier, GraphConfig),
    "hierarchical_classifier": (hierarchical_classifier, HierarchicalConfig),
    "masked_autoencoder": (masked_autoencoder, MaskedAutoencoderConfig),
    "masked_language_model": (masked_language_model, EncoderConfig),
    "recurrent_translation": (recurrent_translation, RecurrentTranslationConfig),
    "set_classifier": (set_classifier, SetConfig),
    "token_set_classifier": (token_set_classifier, TokenSetConfig),
    "text_classifier": (text_classifier, TextClassifierConfig),
    "recurrent_recognizer": (recurrent_recognizer, RecurrentSpeechConfig),
    "speech_recognizer": (speech_recognizer, SpeechConfig),
    "universal_decoder": (universal_decoder, UniversalDecoderConfig),
    "universal_encoder": (universal_encoder, UniversalConfig),
    "convolutional_video_classifier": (convolutional_video_classifier, ConvolutionalVideoConfig),
    "video_classifier": (video_classifier, VideoConfig),
    "vision_classifier": (vision_classifier, VisionConfig),
}
"""The builders by their names in files: nothing else is called because a file says so."""


@dataclass(frozen=True)
class Architecture:
    """A builder, its configuration, and what it was told of the data."""

    builder: str
    """A name in `BUILDERS`."""
    config: Any
    """Its configuration."""
    arguments: Mapping[str, Any]
    """Its other arguments, such as `vocab_size`."""

    @classmethod
    def of(cls, config: Any, **arguments: Any) -> "Architecture":
        """The builder that takes configurations of this class, with its other arguments.

        Example:
            >>> Architecture.of(RecurrentDecoderConfig(), vocab_size=65).builder
            'recurrent_decoder'
        """
        builder = next((name for name, (_, taken) in BUILDERS.items() if taken is type(config)), None)
        if builder is None:
            raise TypeError(f"no model is built from a {type(config).__name__}; put its builder into BUILDERS")
        return cls(builder, config, arguments)

    def build(self) -> nn.Module:
        """The model with fresh weights, the same for the same `torch.manual_seed`."""
        return BUILDERS[self.builder][0](self.config, **self.arguments)

    def to_plain(self) -> dict[str, Any]:
        """The same as values that JSON can hold.

        Example:
            >>> Architecture("decoder", DecoderConfig(dim=16), {"vocab_size": 65}).to_plain()["arguments"]
            {'vocab_size': 65}
        """
        return {"builder": self.builder, "config": asdict(self.config), "arguments": dict(self.arguments)}

    @classmethod
    def from_plain(cls, values: Any) -> "Architecture":
        """The inverse of `to_plain`.

        Raises:
            ConfigError: An unknown or missing key, an unknown builder, or a value of the wrong type.
        """
        wanted = {"builder", "config", "arguments"}
        keys = values.keys() if isinstance(values, Mapping) else set()
        if keys != wanted or not all(isinstance(values[key], Mapping) for key in ("config", "arguments")):
            raise ConfigError(f"expected a builder with its config and arguments, got {', '.join(keys) or values!r}")
        if values["builder"] not in BUILDERS:
            near = configuration.nearest(str(values["builder"]), list(BUILDERS))
            raise ConfigError(f"there is no model {values['builder']}; did you mean {near}?")
        builder, config_class = BUILDERS[values["builder"]]
        hints = get_type_hints(builder)
        required = {
            name
            for name, parameter in inspect.signature(builder).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        }
        arguments = values["arguments"]
        for name in required ^ arguments.keys():
            problem = "is missing" if name in required else f"is unknown; it takes {', '.join(sorted(required))}"
            raise ConfigError(f"{values['builder']}: the argument {name} {problem}")
        for name, value in arguments.items():
            if not configuration.accepts(hints[name], value):
                raise ConfigError(
                    f"{values['builder']}: {name} expects {configuration.type_name(hints[name])}, got {value!r}"
                )
        made = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        return cls(values["builder"], configuration.build(config_class, values["config"]), made)

"""Our own models."""

from typing import Any

from torch import Tensor, nn

from tameformer import models
from zoo.family import REAL, STREAM, Family, Kind, Layers, noise, tokens


def our_layers(name: str, residual: str = "pre", *, cross: bool = False, kind: Kind = "self") -> Layers:
    parts = ["attention", *(["cross_attention"] if cross else []), "feed_forward"]
    branch = "out_norm" if residual == "peri" else "branch"
    sums = tuple((part, f"{part}.{branch}", f"{part}.norm" if residual == "post" else None) for part in parts)
    attention: dict[str, Kind] = {"attention.branch": kind, **({"cross_attention.branch": "cross"} if cross else {})}
    return Layers(name, attention, sums, "feed_forward.branch")


OURS: dict[str, Any] = {"dim": 16, "num_heads": 2, "hidden_dim": 32, "dropout": 0.1, "attention_dropout": 0.1}
VISION = models.VisionConfig(num_layers=2, patch_size=4, **OURS)


def our_encoder(residual: Any) -> Family:
    config = models.EncoderConfig(num_layers=2, max_length=7, residual=residual, **OURS)
    return Family(
        f"encoder-{residual}",
        lambda: models.encoder(config, vocab_size=60),
        lambda: {"tokens": tokens(7), "real": REAL},
        (our_layers("stack.layers", residual),),
        real=REAL,
        unseen=STREAM,
    )


def our_decoder() -> nn.Module:
    settings: dict[str, Any] = {**OURS, "num_heads": 4, "num_kv_heads": 2, "positions": "rotary", "norm": "rms_norm"}
    config = models.DecoderConfig(num_layers=2, max_length=7, activation="swiglu", drop_path=0.1, **settings)
    return models.decoder(config, vocab_size=60)


def our_encoder_decoder() -> nn.Module:
    config = models.EncoderDecoderConfig(num_encoder_layers=2, num_decoder_layers=2, max_length=7, **OURS)
    return models.encoder_decoder(config, vocab_size=60, padding_id=0)


def our_sources() -> Tensor:
    return tokens(7).masked_fill(~REAL, 0)


TAME = [
    *map(our_encoder, ("pre", "post", "peri", "none")),
    Family(
        "decoder", our_decoder, lambda: {"tokens": tokens(7)}, (our_layers("stack.layers", kind="causal"),), heads=4
    ),
    Family(
        "encoder-decoder",
        our_encoder_decoder,
        lambda: {"source": our_sources(), "target_in": tokens(5)},
        (our_layers("encoder.layers"), our_layers("decoder.layers", cross=True, kind="causal")),
        real=REAL,
    ),
    Family(
        "vision",
        lambda: models.vision_classifier(VISION, image_size=(8, 8), channels=3, num_classes=5),
        lambda: {"images": noise(2, 3, 8, 8)},
        (our_layers("stack.layers"),),
    ),
]

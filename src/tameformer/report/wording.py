"""Numbers, keys and names as people read them."""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

_NAMES = {
    "train/lr": "Learning rate",
    "train/grad_norm": "Gradient norm",
    "train/clip_rate": "Share of steps clipped",
    "eval/steps": "Steps of a position",
    "eval/steps_longer": "Steps of a position, longer strings",
    "eval/loss_longer": "Evaluation loss, longer strings",
    "eval/accuracy_longer": "Evaluation accuracy, longer strings",
}
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|error|(^|_)(wer|cer|ppl|mae|mse|rmse)($|_)")
_SHARE = re.compile(r"(^|[/_])(accuracy|wer|cer)($|_)")
_ACRONYMS = re.compile(r"\b(bleu|wer|cer|f1|rmse|mse|mae)\b")
_HIGHER_IS_BETTER = re.compile(r"accuracy|bleu|matthews|chrf|precision|recall|(^|_)(f1|auc|map|acc|r2)($|_)")


def number(value: float) -> str:
    """A number at four significant digits, thousands separated.

    Example:
        >>> number(0.00012345), number(1.5), number(123456.0), number(float("nan"))
        ('0.0001234', '1.5', '123,456', 'NaN')
    """
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "\u221e" if value > 0 else "\u2212\u221e"
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def tick(value: float, largest: float) -> str:
    """A number for an axis whose largest one is `largest`, which decides on thousands (k), millions (M), billions (G).

    Example:
        >>> tick(8e3, 4e4), tick(8e3, 9e3), tick(0.0, 4e4), tick(2.5e6, 4e6)
        ('8k', '8,000', '0', '2.5M')
    """
    for limit, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= abs(largest) < 1e13 and value:
            return f"{value / size:.4g}{letter}".replace("-", "\u2212", 1)
    return number(value) if value >= 0 else "\u2212" + number(-value)


def is_share(key: str, largest: float = 1.0) -> bool:
    """Whether a metric is a share that people read in per cent; those with values far above 1 are in per cent already.

    Example:
        >>> is_share("eval/accuracy_longer"), is_share("test/wer", 1.2), is_share("test/wer", 27.5), is_share("eval/loss")
        (True, True, False, False)
    """
    # An error rate passes 1 where too many words are written.
    return _SHARE.search(key) is not None and -2 <= float(largest) <= 2


def quantity(key: str, value: float) -> str:
    """A metric's value as people write it: accuracies and error rates in per cent, the rest as numbers."""
    return f"{100 * value:.2f} %" if is_share(key, value) else number(value)


def label(key: str) -> str:
    """A key in words.

    Example:
        >>> label("eval/perplexity_per_byte"), label("train/grad_norm"), label("test/wer")
        ('Evaluation perplexity per byte', 'Gradient norm', 'Test WER')
    """
    group, _, name = key.partition("/")
    words = {"eval": "evaluation", "train": "training", "perf": ""}.get(group, group)
    if key in _NAMES:
        return _NAMES[key]
    text = f"{words} {(name or '').replace('_', ' ').replace('/', ' ')}".strip()
    text = _ACRONYMS.sub(lambda found: found[0].upper(), text)
    return text[:1].upper() + text[1:]


def direction(key: str) -> Literal["lower", "higher"] | None:
    """Which way the metric gets better; None when its name does not tell.

    Example:
        >>> direction("eval/loss"), direction("eval/bleu"), direction("eval/gate")
        ('lower', 'higher', None)
    """
    name = key.rsplit("/", 1)[-1].lower()
    return "lower" if _LOWER_IS_BETTER.search(name) else "higher" if _HIGHER_IS_BETTER.search(name) else None


def listed(words: list[str], limit: int = 6) -> str:
    """The words as one phrase, with the number of those left out beyond `limit`.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a", "b", "c"], limit=2)
        ('a, b and c', 'a, b and 1 more')
    """
    if len(words) > limit:
        return f"{', '.join(words[:limit])} and {len(words) - limit} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def shorten(text: str, limit: int) -> str:
    """The text with its middle left out where it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}\u2026{text[-(limit - limit // 2 - 1) :]}"


def fitted(names: Sequence[str], limit: int) -> list[str]:
    """The names with at most `limit` characters, each still one of its own where that can be.

    Where one is too long, all lose the words between the first and a number, such as `layers`; then the middle is left out.

    Example:
        >>> fitted(["decoder.layers.0.cross_attention", "decoder.layers.1.cross_attention"], 26)
        ['decoder.0.cross_attention', 'decoder.1.cross_attention']
    """
    if max(map(len, names), default=0) > limit:
        bare = [re.sub(r"(?<=\.)([^.\d]+\.)+(?=\d+(\.|$))", "", name) for name in names]
        names = bare if len(set(bare)) == len(set(names)) else names
    return [shorten(name, limit) for name in names]


def place_names(layers: Sequence[str]) -> list[str]:
    """The short names, a bare number called a layer.

    Example:
        >>> place_names(["blocks.0", "blocks.11"]), place_names(["head"])
        (['layer 0', 'layer 11'], ['head'])
    """
    return [f"layer {name}" if name.isdigit() else name for name in short_names(layers)[0]]


def short_names(layers: Sequence[str]) -> tuple[list[str], str, str]:
    """The layers without the dotted beginning and end that all share, and those two.

    Example:
        >>> short_names(["net.blocks.0.attention", "net.blocks.11.attention"])
        (['0', '11'], 'net.blocks.', '.attention')
    """
    parts = [layer.split(".") for layer in layers]
    if len(parts) < 2:
        return list(layers), "", ""
    room = min(map(len, parts)) - 1
    head = _shared(parts, room)
    tail = _shared([part[::-1] for part in parts], room - head)
    names = [".".join(part[head : len(part) - tail]) for part in parts]
    prefix = "".join(f"{word}." for word in parts[0][:head])
    suffix = "".join(f".{word}" for word in parts[0][len(parts[0]) - tail :])
    return names, prefix, suffix


def _shared(parts: Sequence[Sequence[str]], room: int) -> int:
    count = 0
    while count < room and len({part[count] for part in parts}) == 1:
        count += 1
    return count

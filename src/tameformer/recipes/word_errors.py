"""Word and character error rates by jiwer: edits over words, or characters, of the references."""

from collections.abc import Sequence
from pathlib import Path

from tameformer.errors import missing_extra
from tameformer.record import write_figure

_FEWEST = 20
"""Utterances that an error rate is taken over."""


def error_rates(references: Sequence[str], transcripts: Sequence[str]) -> dict[str, float]:
    """`wer` and `cer`: substitutions, deletions and insertions over the words, or characters, of the references.

    Args:
        references: What was said, one an utterance, none of them empty.
        transcripts: What was recognized; case and punctuation count.

    Raises:
        ImportError: jiwer is not installed; the message names the extra.

    Example:
        >>> error_rates(["one two", "three"], ["one", "three"])["wer"] == 1 / 3
        True
    """
    try:
        import jiwer
    except ImportError:
        raise missing_extra("jiwer", "speech") from None
    said, heard = list(references), list(transcripts)
    return {"wer": float(jiwer.wer(said, heard)), "cer": float(jiwer.cer(said, heard))}


def write_errors_by_length(folder: Path, references: Sequence[str], transcripts: Sequence[str]) -> None:
    """Error rates over utterances of as many words, for the report; long ones are taken together until there are 20.

    Args:
        folder: The run folder.
        references: What was said.
        transcripts: What was recognized.
    """
    lengths = [len(text.split()) for text in references]
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        begins = not groups or (len(groups[-1]) >= _FEWEST and lengths[place] > lengths[groups[-1][-1]])
        groups += [[place]] if begins else []
        groups[-1] += [] if begins else [place]
    if len(groups) > 1 and len(groups[-1]) < _FEWEST:
        last = groups.pop()
        groups[-1] += last
    found = [error_rates([references[i] for i in some], [transcripts[i] for i in some]) for some in groups]
    lines = {"words": [one["wer"] for one in found], "characters": [one["cer"] for one in found]}
    caption = f"Substitutions, deletions and insertions over what was said in {len(lengths):,} utterances."
    figure = {
        "kind": "lines",
        "title": "Errors by length",
        "caption": caption,
        "x_label": "words of the utterance, mean",
    }
    places = [sum(lengths[i] for i in some) / len(some) for some in groups]
    write_figure(folder, "errors-by-length", {**figure, "x": places, "lines": lines, "percent": True})

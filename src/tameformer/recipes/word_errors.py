"""Word and character error rates by jiwer: edits over words, or characters, of the references."""

from collections.abc import Sequence

from tameformer.errors import missing_extra


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

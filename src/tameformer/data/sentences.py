"""Labelled documents as sentences of tokens, for models that read words, then sentences (Yang et al. 2016, NAACL)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tameformer.data.augment.tokens import TokenTransform, augment_tokens
from tameformer.data.keys import SampleKeys
from tameformer.data.stream import Batch

_ENDS = re.compile(r"(?<=[.!?])\s+|(?:<br\s*/?>\s*)+|\n+")

_MOST = 1 << 20  # sentences of a document, so that no two of a data set have one number


def sentences(text: str) -> list[str]:
    """The text cut after full stops, question and exclamation marks, and at line breaks; at least one sentence.

    Example:
        >>> sentences("Good. Really? Yes!<br /><br />Dr. No")
        ['Good.', 'Really?', 'Yes!', 'Dr.', 'No']
    """
    return [part.strip() for part in _ENDS.split(text) if part.strip()] or [text]


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents of sentences of tokens, with classes, as batches padded to their longest on both axes."""

    documents: Sequence[Sequence[Sequence[int]]]
    """Ids by document, sentence, token; no sentence is empty."""
    labels: np.ndarray
    """int64 class of each."""
    padding_id: int
    """Fills up."""
    transforms: Sequence[TokenTransform] = ()
    """Noise on the tokens of each sentence, which stay in it; every sentence has random numbers of its own."""

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.array([sum(map(len, document)) for document in self.documents], dtype=np.int64)

    def fetch(self, keys: SampleKeys) -> Batch:
        """`tokens` and `real` (batch, sentences, words), `labels` (batch), and `num_items`."""
        chosen = [self.documents[index] for index in keys.indices]
        if self.transforms:
            chosen = self._with_noise(chosen, keys)
        longest = max(len(sentence) for document in chosen for sentence in document)
        tokens = np.full((len(chosen), max(map(len, chosen)), longest), self.padding_id, dtype=np.int64)
        real = np.zeros(tokens.shape, dtype=bool)
        for row, document in enumerate(chosen):
            for place, sentence in enumerate(document):
                tokens[row, place, : len(sentence)] = sentence
                real[row, place, : len(sentence)] = True
        return {
            "tokens": torch.from_numpy(tokens),
            "real": torch.from_numpy(real),
            "labels": torch.from_numpy(self.labels[keys.indices]),
            "num_items": len(keys),
        }

    def _with_noise(self, documents: Sequence[Sequence[Sequence[int]]], keys: SampleKeys) -> list[list[list[int]]]:
        flat = [torch.tensor(sentence) for document in documents for sentence in document]
        numbers = [
            int(index) * _MOST + place
            for index, document in zip(keys.indices, documents, strict=True)
            for place in range(len(document))
        ]
        tokens, lengths = augment_tokens(
            pad_sequence(flat, batch_first=True, padding_value=self.padding_id),
            torch.tensor([len(sentence) for sentence in flat]),
            SampleKeys(keys.seed, keys.epoch, np.array(numbers)),
            self.transforms,
            padding_id=self.padding_id,
        )
        changed = (row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True))
        return [[next(changed) for _ in document] for document in documents]

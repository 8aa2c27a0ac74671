"""Utterances as batches of features and tokens, padded to the longest on each side."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tameformer.data.augment.spectrum import SpecAugment
from tameformer.data.keys import SampleKeys
from tameformer.data.log_mel import LogMel
from tameformer.data.randomness import uniforms
from tameformer.data.stream import Batch
from tameformer.data.tokenizers import CharTokenizer
from tameformer.data.utterances import Utterances
from tameformer.data.windows import IGNORED
from tameformer.errors import DataError
from tameformer.shapes import Int64


@dataclass(frozen=True, eq=False)
class SpeechSource:
    """Features of utterances with the tokens of their texts."""

    utterances: Utterances
    """Waves and texts."""
    features: LogMel
    """From a wave to features."""
    tokenizer: CharTokenizer
    """From a text to tokens; the two ids behind its own are the begin and the end token."""
    augment: SpecAugment | None = None
    """Masks over the features; None is none."""
    subsampling: int = 1
    """Rows of features that one output of the model stands for: a text must fit into its outputs."""

    def __len__(self) -> int:
        return len(self.utterances)

    def lengths(self, seed: int, epoch: int) -> Int64[np.ndarray, " utterances"]:
        """Rows of features of every utterance of an epoch."""
        keys = SampleKeys(seed, epoch, np.arange(len(self), dtype=np.int64))
        return self.features.num_frames(self.utterances.lengths(keys))

    def fetch(self, keys: SampleKeys) -> Batch:
        """The utterances of the keys.

        `features` (batch, seq, mels) with zeros behind the end, `frames` (batch,) real rows of each; `targets` (batch, target)
        with the end token last and -100 at padding, `target_in` the same behind a begin token; `num_items`, the targets with
        their ends.

        Raises:
            DataError: A text does not fit into the outputs of its utterance.
        """
        u = uniforms(keys, self.augment.draws, "spectrum") if self.augment is not None else None
        rows: list[Tensor] = []
        for place, wave in enumerate(self.utterances.waves(keys)):
            row = self.features(torch.from_numpy(wave)).float()
            rows.append(row if self.augment is None or u is None else self.augment(row, u[place]))
        frames = torch.tensor([len(row) for row in rows])
        ids = [torch.from_numpy(self.tokenizer.encode(text)) for text in self.utterances.texts(keys)]
        for index, count, text in zip(keys.indices.tolist(), frames.tolist(), ids, strict=True):
            outputs = -(-count // self.subsampling)
            needed = len(text) + int((text[1:] == text[:-1]).sum())
            if needed > outputs:
                raise DataError(
                    f"{self.utterances.name(index)}: a text of {len(text)} characters needs {needed} outputs, its {count} rows "
                    f"of features give {outputs}; drop it, or lower model.subsampling or data.hop_seconds"
                )
        begin, end = torch.tensor([self.tokenizer.vocab_size]), torch.tensor([self.tokenizer.vocab_size + 1])
        padded = partial(pad_sequence, batch_first=True)
        return {
            "features": padded(rows),
            "frames": frames,
            "targets": padded([torch.cat([text, end]) for text in ids], padding_value=IGNORED),
            "target_in": padded([torch.cat([begin, text]) for text in ids], padding_value=int(end)),
            "num_items": sum(len(text) + 1 for text in ids),
        }

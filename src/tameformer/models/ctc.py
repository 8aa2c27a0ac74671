"""Texts from the outputs of connectionist temporal classification (Graves et al. 2006).

A path gives each output a character or the blank; its text is what remains when repeats, then blanks are taken out. The
probability of a text is the sum over its paths.
"""

import heapq
import math
from collections import defaultdict

import numpy as np
from torch import Tensor

from tameformer.shapes import Float, Int

Logits = Float[Tensor, "batch outputs vocab"]
Outputs = Int[Tensor, " batch"]


def ctc_greedy(logits: Logits, outputs: Outputs, *, blank: int) -> list[list[int]]:
    """The text of the most probable path of each utterance, as ids.

    Args:
        logits: Of the characters and the blank.
        outputs: Real outputs of each utterance.
        blank: Its id.

    Example:
        >>> import torch
        >>> path = torch.tensor([[2, 0, 0, 2, 0, 1, 2]])
        >>> ctc_greedy(torch.nn.functional.one_hot(path, 3).float(), torch.tensor([7]), blank=2)
        [[0, 0, 1]]
    """
    texts = []
    for path, count in zip(logits.argmax(-1).tolist(), outputs.tolist(), strict=True):
        places = range(count)
        texts.append([path[i] for i in places if path[i] != blank and (i == 0 or path[i] != path[i - 1])])
    return texts


def ctc_beam_search(logits: Logits, outputs: Outputs, *, blank: int, num_beams: int) -> list[list[int]]:
    """The most probable text of each utterance that the search finds, all paths of a text added up.

    After each output the `num_beams` most probable beginnings go on. With as many beams as there are beginnings it is exact.

    References: Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent
    DNNs", arXiv:1408.2873, algorithm 1, without its language model.

    Raises:
        ValueError: `num_beams` is below 1.
    """
    if num_beams < 1:
        raise ValueError(f"expected num_beams of at least 1, got {num_beams}; 1 keeps a single text")
    steps = logits.cpu().double().log_softmax(-1).numpy()
    return [_search(row[:count], blank, num_beams) for row, count in zip(steps, outputs.tolist(), strict=True)]


def _search(steps: np.ndarray, blank: int, num_beams: int) -> list[int]:
    """One utterance; each beginning has the probability of its paths that end in the blank, and of the others."""
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for step in steps:
        after: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        # A character so improbable that it cannot matter beside the best one is passed over.
        near = [symbol for symbol in np.flatnonzero(step > step.max() - 30).tolist() if symbol != blank]
        for text, (ended, going) in beams.items():
            both = np.logaddexp(ended, going)
            _add(after[text], 0, both + step[blank])
            for symbol in near:
                if text and symbol == text[-1]:
                    _add(after[text], 1, going + step[symbol])
                    _add(after[(*text, symbol)], 1, ended + step[symbol])
                else:
                    _add(after[(*text, symbol)], 1, both + step[symbol])
        best = heapq.nlargest(num_beams, after.items(), key=lambda item: np.logaddexp(item[1][0], item[1][1]))
        beams = {text: (ended, going) for text, (ended, going) in best}
    return list(max(beams, key=lambda text: np.logaddexp(beams[text][0], beams[text][1])))


def _add(sums: list[float], place: int, value: float) -> None:
    sums[place] = float(np.logaddexp(sums[place], value))

"""Generation: greedy, sampled, and beam search, over any model that can be asked for the next token step by step.

`greedy(decoder_steps(model, prompt), ...)` continues prompts; `beam_search(translation_steps(model, source, ...), ...)`
translates. All results are the new tokens only; after the end token, rows are filled with it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tameformer.models.decoder import Decoder
from tameformer.models.encoder_decoder import EncoderDecoder, Source, SourceMask
from tameformer.nn.masks import real_from_tokens
from tameformer.shapes import Float, Int, Tokens

Logits = Float[Tensor, "rows vocab"]
Rows = Int[Tensor, " rows"]


@runtime_checkable
class Steps(Protocol):
    """A model in the middle of generating several rows."""

    prompt: Tokens
    """What the rows start with; rows of one length."""
    max_new_tokens: int
    """How many tokens the model can add to the prompt."""

    def advance(self, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        """Reads the tokens that follow what was read so far; returns the logits after the last of them."""
        ...

    def select(self, rows: Rows, *, same_source: bool) -> None:
        """Goes on with the given rows; `same_source` promises that each stays within the rows of one prompt."""
        ...


class _DecoderSteps:
    def __init__(self, model: Decoder, prompt: Tokens):
        self.prompt = prompt
        self.max_new_tokens = model.max_length - prompt.shape[1] + 1  # the last token is not read again
        self._model, self._cache = model, model.new_cache()

    def advance(self, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        return self._model(tokens, cache=self._cache)[:, -1]

    def select(self, rows: Rows, *, same_source: bool) -> None:
        self._cache.select(rows)


class _TranslationSteps:
    def __init__(self, model: EncoderDecoder, source: Source, source_mask: SourceMask, start_id: int):
        self.prompt = source.new_full((source.shape[0], 1), start_id)
        self.max_new_tokens = model.max_length
        self._model, self._cache = model, model.new_cache()
        self._memory, self._source_mask = model.encode(source, source_mask=source_mask), source_mask

    def advance(self, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        return self._model.decode(tokens, self._memory, source_mask=self._source_mask, cache=self._cache)[:, -1]

    def select(self, rows: Rows, *, same_source: bool) -> None:
        self._cache.select(rows, same_memory=same_source)
        if not same_source:
            self._memory, self._source_mask = self._memory[rows], self._source_mask[rows]


def decoder_steps(model: Decoder, prompt: Tokens) -> Steps:
    """Steps that continue prompts of equal length, at least one token each.

    Raises:
        ValueError: the model is in training mode, or the prompt is empty.
    """
    _check_evaluating(model)
    if not prompt.shape[1]:
        raise ValueError("expected a prompt of at least one token, got none; start with the document separator")
    return _DecoderSteps(model, prompt)


@torch.no_grad()
def translation_steps(
    model: EncoderDecoder, source: Source, *, start_id: int, source_mask: SourceMask | None = None
) -> Steps:
    """Steps that decode from `start_id`; `source_mask` is True at real tokens, None takes all but the padding.

    Raises:
        ValueError: the model is in training mode.
    """
    _check_evaluating(model)
    if source_mask is None:
        source_mask = real_from_tokens(source, model.padding_id)
    return _TranslationSteps(model, source, source_mask, start_id)


def until_end(row: Sequence[int], end_id: int) -> Sequence[int]:
    """The tokens in front of the first end token.

    Example:
        >>> until_end([5, 3, 1, 1], end_id=1)
        [5, 3]
    """
    return row[: row.index(end_id)] if end_id in row else row


def greedy(steps: Steps, *, max_new_tokens: int, end_id: int | None = None) -> Int[Tensor, "batch new"]:
    """The most probable token at each step, until all rows have ended or `max_new_tokens` are there.

    Raises:
        ValueError: the model cannot hold as many tokens.
    """
    return _extend(steps, lambda logits: logits.argmax(-1), max_new_tokens, end_id)


def sample(
    steps: Steps,
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    end_id: int | None = None,
) -> Int[Tensor, "batch new"]:
    """Tokens drawn from softmax(logits / temperature), among the `top_k` most probable ones where that is given.

    Raises:
        ValueError: `temperature` is not above 0, `top_k` is below 1, or the model cannot hold as many tokens.
    """
    if not temperature > 0:
        raise ValueError(f"expected temperature above 0, got {temperature}; use greedy for the limit of 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"expected top_k of at least 1, got {top_k}; leave it out to draw from all tokens")

    def draw(logits: Logits) -> Rows:
        weights = (keep_top(logits, top_k) / temperature).softmax(-1)
        return torch.multinomial(weights, 1, generator=generator)[:, 0]

    return _extend(steps, draw, max_new_tokens, end_id)


def keep_top(logits: Logits, top_k: int | None) -> Logits:
    """Logits with all but the `top_k` largest of each row at -inf; equals of the last one stay; None keeps all."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def length_divisor(length: int, length_penalty: float) -> float:
    """((5 + length) / 6) ** length_penalty, by which log-probabilities are divided.

    References: Wu et al. 2016, arXiv:1609.08144, equation 14. `length` counts the end token.
    """
    return ((5 + length) / 6) ** length_penalty


@torch.no_grad()
def beam_search(
    steps: Steps, *, num_beams: int, max_new_tokens: int, end_id: int, length_penalty: float = 0.6
) -> tuple[Int[Tensor, "batch new"], Float[Tensor, " batch"]]:
    """The best sequence found for each row, and its score: log-probability in nats / `length_divisor`.

    At each step the `num_beams` best unfinished sequences go on. A row stops when no unfinished one can still
    overtake its best finished one; unfinished ones count only where none has finished by `max_new_tokens`.

    Raises:
        ValueError: `num_beams` is below 1, `length_penalty` below 0, or the model cannot hold as many tokens.
    """
    _check_room(steps, max_new_tokens)
    if num_beams < 1:
        raise ValueError(f"expected num_beams of at least 1, got {num_beams}; 1 keeps a single sequence")
    if length_penalty < 0:
        raise ValueError(f"expected length_penalty of at least 0, got {length_penalty}; 0 means none")
    batch, device = steps.prompt.shape[0], steps.prompt.device
    best = steps.prompt.new_full((batch, max_new_tokens), end_id)
    rows = torch.arange(batch, device=device)  # of the input, those still searched
    live = steps.prompt.new_empty((batch, num_beams, 0))

    logits = steps.advance(steps.prompt).repeat_interleave(num_beams, dim=0)
    steps.select(rows.repeat_interleave(num_beams), same_source=False)
    best_scores = torch.full((batch,), -torch.inf, device=device, dtype=_at_least_float32(logits))
    totals = torch.full((batch, num_beams), -torch.inf, device=device, dtype=best_scores.dtype)
    totals[:, 0] = 0.0  # all beams start equal: one of them counts
    longest = 0
    for length in range(1, max_new_tokens + 1):
        longest = length
        totals, beams, tokens = _best_continuations(totals, logits, 2 * num_beams)
        live = torch.cat([live.take_along_dim(beams[:, :, None], 1), tokens[:, :, None]], dim=2)

        ended = totals.masked_fill(tokens != end_id, -torch.inf)
        score, place = (ended / length_divisor(length, length_penalty)).max(1)
        better = score > best_scores[rows]
        best_scores[rows[better]] = score[better]
        best[rows[better]] = end_id
        best[rows[better], :length] = live[better, place[better]]

        totals, kept = totals.masked_fill(tokens == end_id, -torch.inf).topk(min(num_beams, totals.shape[1]), dim=1)
        live, beams = live.take_along_dim(kept[:, :, None], 1), beams.take_along_dim(kept, 1)
        attainable = totals[:, 0] / length_divisor(max_new_tokens, length_penalty)
        open_rows = (attainable > best_scores[rows]).nonzero()[:, 0]
        if not len(open_rows) or length == max_new_tokens:
            break
        source = torch.arange(len(rows), device=device)[open_rows, None] * num_beams + beams[open_rows]
        same_source = len(open_rows) == len(rows)
        rows, live, totals = rows[open_rows], live[open_rows], totals[open_rows]
        steps.select(source.flatten(), same_source=same_source)
        logits = steps.advance(live[:, :, -1].reshape(-1, 1))

    unfinished = best_scores[rows] == -torch.inf
    best[rows[unfinished], :longest] = live[unfinished, 0]
    best_scores[rows[unfinished]] = totals[unfinished, 0] / length_divisor(longest, length_penalty)
    return best[:, :longest], best_scores


def _best_continuations(totals, logits, count):
    """Log-probability, beam and token of the `count` best continuations of each row, best first.

    They are among the `count` best of each beam, so the whole vocabulary is never normalized.
    """
    logits = logits.to(totals.dtype)
    steps, tokens = logits.topk(min(count, logits.shape[1]), dim=1)
    steps = steps - logits.logsumexp(1, keepdim=True)
    candidates = (totals[:, :, None] + steps.view(*totals.shape, -1)).flatten(1)
    best, places = candidates.topk(min(count, candidates.shape[1]), dim=1)
    return best, places // steps.shape[1], tokens.view(len(totals), -1).take_along_dim(places, 1)


def _at_least_float32(logits: Logits) -> torch.dtype:
    """The type in which log-probabilities are summed: sums of many steps need more digits than bf16 has."""
    return torch.promote_types(logits.dtype, torch.float32)


@torch.no_grad()
def _extend(steps: Steps, choose: Callable[[Tensor], Tensor], max_new_tokens: int, end_id: int | None) -> Tensor:
    _check_room(steps, max_new_tokens)
    new, produced = steps.prompt, []
    ended = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    for _ in range(max_new_tokens):
        chosen = choose(steps.advance(new))
        if end_id is not None:
            chosen = chosen.masked_fill(ended, end_id)
            ended = ended | (chosen == end_id)
        produced.append(chosen)
        if end_id is not None and bool(ended.all()):
            break
        new = chosen[:, None]
    return torch.stack(produced, dim=1)


def _check_room(steps: Steps, max_new_tokens: int) -> None:
    if not 1 <= max_new_tokens <= steps.max_new_tokens:
        raise ValueError(
            f"expected max_new_tokens between 1 and {steps.max_new_tokens}, got {max_new_tokens}; "
            "shorten the prompt or build the model with a larger max_length"
        )


def _check_evaluating(model: nn.Module) -> None:
    if model.training:
        raise ValueError("expected a model in evaluation mode, got training=True; call model.eval() first")

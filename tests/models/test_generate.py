import itertools
import math

import pytest
import torch
from torch import nn

from tameformer.models import (
    DecoderConfig,
    EncoderDecoderConfig,
    beam_search,
    decoder,
    decoder_steps,
    encoder_decoder,
    greedy,
    sample,
    translation_steps,
)
from tameformer.models.generate import keep_top

POSITIONS = ["sinusoidal", "learned", "rotary", "none"]
PADDING, START, END = 0, 1, 2


def sharpened(model: nn.Module) -> nn.Module:
    """Larger weights, so that what is generated varies."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def small_decoder(vocab_size: int = 70, **settings):
    torch.manual_seed(0)
    config = DecoderConfig(dim=16, num_layers=2, num_heads=4, max_length=24, tie_embeddings=False, **settings)
    return sharpened(decoder(config, vocab_size=vocab_size))


def small_translator(vocab_size: int = 70, **settings):
    torch.manual_seed(0)
    config = EncoderDecoderConfig(
        dim=16, num_encoder_layers=2, num_decoder_layers=2, num_heads=4, max_length=24, tie_embeddings=False, **settings
    )
    return sharpened(encoder_decoder(config, vocab_size=vocab_size, padding_id=PADDING))


def sources(vocab_size: int = 70) -> torch.Tensor:
    source = torch.randint(3, vocab_size, (3, 6), generator=torch.Generator().manual_seed(1))
    source[1, 4:], source[2, 1:] = PADDING, PADDING
    return source


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 1, 5], [4, 8], [12]])
def test_cached_decoder_logits_are_the_uncached_ones(positions, cuts):
    model = small_decoder(positions=positions, num_kv_heads=2)
    tokens, cache = torch.randint(0, 70, (3, 12)), model.new_cache()
    parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-5)
    assert cache.length == 12


@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_translation_logits_are_the_uncached_ones(positions):
    model, source = small_translator(positions=positions), sources()
    target_in, real, cache = torch.randint(0, 70, (3, 9)), source != PADDING, model.new_cache()
    memory = model.encode(source)
    parts = [model.decode(part, memory, source_mask=real, cache=cache) for part in target_in.split([1, 1, 4, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(source, target_in), rtol=1e-5, atol=1e-5)


def test_cross_attention_keys_are_computed_once():
    model, source = small_translator(), sources()
    calls = []
    model.decoder.layers[0].cross_attention.branch.key.register_forward_hook(lambda *_: calls.append(1))
    greedy(translation_steps(model, source, start_id=START), max_new_tokens=5)
    assert len(calls) == 1


def slow_greedy(next_logits, tokens: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        tokens = torch.cat([tokens, next_logits(tokens).argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("positions", POSITIONS)
def test_greedy_decoder_equals_recomputing_every_step(positions):
    model, prompt = small_decoder(positions=positions), torch.randint(0, 70, (3, 5))
    expected = slow_greedy(lambda tokens: model(tokens)[:, -1], prompt, 20)[:, 5:]
    assert expected.unique().numel() > 5  # else the comparison says little
    assert greedy(decoder_steps(model, prompt), max_new_tokens=20).equal(expected)


def test_greedy_translation_equals_recomputing_every_step():
    model, source = small_translator(positions="sinusoidal"), sources()
    start = torch.full((3, 1), START)
    expected = slow_greedy(lambda tokens: model(source, tokens)[:, -1], start, 24)[:, 1:]
    assert greedy(translation_steps(model, source, start_id=START), max_new_tokens=24).equal(expected)


def test_greedy_fills_with_the_end_token_and_stops():
    model, prompt = small_decoder(), torch.randint(0, 70, (3, 5))
    free = greedy(decoder_steps(model, prompt), max_new_tokens=12)
    end = int(free[0, 2])
    ended = greedy(decoder_steps(model, prompt), max_new_tokens=12, end_id=end)
    for row, reference in zip(ended.tolist(), free.tolist(), strict=True):
        stop = reference.index(end) if end in reference else len(reference)
        assert row == (reference[:stop] + [end] * len(reference))[: len(row)]
    alone = greedy(decoder_steps(model, prompt[:1]), max_new_tokens=12, end_id=end)
    assert alone.shape[1] == free[0].tolist().index(end) + 1


def test_sampling_is_a_function_of_the_generator():
    model, prompt = small_decoder(), torch.randint(0, 70, (3, 5))

    def drawn(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return sample(decoder_steps(model, prompt), max_new_tokens=15, generator=generator, **settings)

    assert drawn(1).equal(drawn(1))
    assert not drawn(1).equal(drawn(2))
    best = greedy(decoder_steps(model, prompt), max_new_tokens=15)
    assert drawn(1, top_k=1).equal(best)
    assert drawn(1, temperature=1e-4).equal(best)


def test_sampling_follows_the_probabilities():
    model = small_decoder(vocab_size=5)
    prompt = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = sample(decoder_steps(model, prompt), max_new_tokens=1, generator=torch.Generator().manual_seed(0))
    expected = model(prompt[:1])[0, 0].softmax(-1)
    torch.testing.assert_close(drawn.flatten().bincount(minlength=5) / 20_000, expected, rtol=0, atol=0.015)


def test_keep_top():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    inf = math.inf
    assert keep_top(logits, 1).equal(torch.tensor([[3.0, -inf, -inf, -inf]]))
    assert keep_top(logits, 2).equal(torch.tensor([[3.0, -inf, 2.0, 2.0]]))  # equals stay
    assert keep_top(logits, 9).equal(logits)


def test_padded_vocabulary_is_never_generated():
    model = small_decoder(vocab_size=65)
    with torch.no_grad():
        model.head.weight[65:] = 100 * model.head.weight[:63]  # would win at once
    prompt = torch.zeros(50, 3, dtype=torch.long)
    drawn = sample(
        decoder_steps(model, prompt), max_new_tokens=20, temperature=5.0, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.max() < 65
    assert greedy(decoder_steps(model, prompt), max_new_tokens=20).max() < 65


def every_sequence(vocab_size: int, length: int):
    """All sequences that end with END, or fill `length` without it; and whether they end."""
    tokens = [token for token in range(vocab_size) if token != END]
    for size in range(length):
        for body in itertools.product(tokens, repeat=size):
            yield [*body, END], True
    for body in itertools.product(tokens, repeat=length):
        yield list(body), False


def log_probability(model, source: torch.Tensor, sequence: list[int]) -> float:
    target_in = torch.tensor([[START, *sequence[:-1]]])
    steps = model(source, target_in).log_softmax(-1)
    return float(steps[0, range(len(sequence)), sequence].sum())


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@torch.no_grad()
def test_a_beam_as_wide_as_the_tree_finds_the_best_sequence(length_penalty):
    vocab_size, length = 4, 4
    model, source = small_translator(vocab_size, positions="sinusoidal"), sources(vocab_size)
    steps = translation_steps(model, source, start_id=START)
    tokens, scores = beam_search(
        steps, num_beams=4**3, max_new_tokens=length, end_id=END, length_penalty=length_penalty
    )
    for row in range(len(source)):
        score, best = max(
            (
                log_probability(model, source[row : row + 1], sequence) / ((5 + len(sequence)) / 6) ** length_penalty,
                sequence,
            )
            for sequence, ended in every_sequence(vocab_size, length)
            if ended
        )
        assert tokens[row].tolist() == (best + [END] * length)[: tokens.shape[1]]
        assert float(scores[row]) == pytest.approx(score, abs=1e-5)


@torch.no_grad()
def slow_beam_search(model, source, num_beams: int, length: int, length_penalty: float) -> tuple[list[int], float]:
    """The same search for one source, written with lists and without a cache or an early end."""
    live, finished = [(0.0, [])], []
    for size in range(1, length + 1):
        candidates = []
        for total, sequence in live:
            logits = model(source, torch.tensor([[START, *sequence]]))[0, -1].log_softmax(-1)
            candidates += [(total + float(step), [*sequence, token]) for token, step in enumerate(logits)]
        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        finished += [(t / ((5 + size) / 6) ** length_penalty, s) for t, s in candidates if s[-1] == END]
        live = [(total, sequence) for total, sequence in candidates if sequence[-1] != END][:num_beams]
    score, best = max(finished or [(t / ((5 + length) / 6) ** length_penalty, s) for t, s in live])
    return best, score


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 0.6), (2, 0.0), (2, 1.0), (4, 0.6)])
def test_beam_search_equals_a_slow_one(num_beams, length_penalty):
    model, source = small_translator(vocab_size=8, positions="rotary"), sources(8)
    with torch.no_grad():
        model.head.weight[END] *= 2  # endings at several lengths
    steps = translation_steps(model, source, start_id=START)
    tokens, scores = beam_search(
        steps, num_beams=num_beams, max_new_tokens=9, end_id=END, length_penalty=length_penalty
    )
    for row in range(len(source)):
        best, score = slow_beam_search(model, source[row : row + 1], num_beams, 9, length_penalty)
        assert tokens[row].tolist() == (best + [END] * 9)[: tokens.shape[1]]
        assert float(scores[row]) == pytest.approx(score, abs=1e-5)


class Scripted:
    """Steps whose probabilities depend on the step alone."""

    max_new_tokens = 9

    def __init__(self, probabilities: list[list[float]]):
        self.prompt = torch.zeros(1, 1, dtype=torch.long)
        self._logits = iter(torch.tensor(probabilities).log())
        self._rows = 1

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (self._rows, 1)
        return next(self._logits).expand(self._rows, -1)

    def select(self, rows: torch.Tensor, *, same_source: bool) -> None:
        self._rows = len(rows)


def test_the_search_goes_on_while_a_longer_sequence_can_still_win():
    script = [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    tokens, scores = beam_search(Scripted(script), num_beams=1, max_new_tokens=4, end_id=END, length_penalty=2.0)
    assert tokens.tolist() == [[0, 0, 0, END]]
    assert float(scores) == pytest.approx(math.log(0.5) / (9 / 6) ** 2)


def test_the_search_ends_when_no_longer_sequence_can_win():
    script = [[0.1, 0.0, 0.9]]  # a second step would find the script exhausted
    tokens, scores = beam_search(Scripted(script), num_beams=1, max_new_tokens=4, end_id=END, length_penalty=1.0)
    assert tokens.tolist() == [[END]]
    assert float(scores) == pytest.approx(math.log(0.9))


def test_unfinished_sequences_count_where_none_ends():
    model, source = small_translator(), sources()
    end = 69
    with torch.no_grad():
        model.head.weight[end] = 0  # logit 0 beside large ones
    tokens, scores = beam_search(
        translation_steps(model, source, start_id=START), num_beams=2, max_new_tokens=5, end_id=end
    )
    assert tokens.shape == (3, 5)
    assert not (tokens == end).any()
    assert scores.isfinite().all()


def test_beam_search_of_a_decoder_scores_at_least_as_high_as_greedy():
    model, prompt = small_decoder(vocab_size=20), torch.randint(3, 20, (4, 3))
    one = beam_search(decoder_steps(model, prompt), num_beams=1, max_new_tokens=8, end_id=END, length_penalty=0.0)
    wide = beam_search(decoder_steps(model, prompt), num_beams=300, max_new_tokens=8, end_id=END, length_penalty=0.0)
    assert (wide[1] >= one[1] - 1e-6).all()


def test_wrong_calls():
    model, prompt = small_decoder(), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="between 1 and 20, got 21; shorten the prompt"):
        greedy(decoder_steps(model, prompt), max_new_tokens=21)
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        sample(decoder_steps(model, prompt), max_new_tokens=1, generator=torch.Generator(), temperature=0.0)
    with pytest.raises(ValueError, match="top_k of at least 1, got 0"):
        sample(decoder_steps(model, prompt), max_new_tokens=1, generator=torch.Generator(), top_k=0)
    with pytest.raises(ValueError, match="num_beams of at least 1, got 0"):
        beam_search(decoder_steps(model, prompt), num_beams=0, max_new_tokens=1, end_id=END)
    with pytest.raises(ValueError, match="length_penalty of at least 0, got -1"):
        beam_search(decoder_steps(model, prompt), num_beams=1, max_new_tokens=1, end_id=END, length_penalty=-1.0)
    with pytest.raises(ValueError, match="at least one token, got none"):
        decoder_steps(model, prompt[:, :0])
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        decoder_steps(model.train(), prompt)

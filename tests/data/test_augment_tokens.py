import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data.augment import TokenDeletion, TokenDropout, TokenSwap, TokenTransform, augment_tokens
from tameformer.data.keys import SampleKeys

BEGIN, END, MASK = 1, 2, 3
KEPT = {"protected": (BEGIN, END)}
TRANSFORMS = [
    TokenDropout(replacement=MASK, probability=0.3, **KEPT),
    TokenDeletion(probability=0.3, **KEPT),
    TokenSwap(distance=2, **KEPT),
]


def batch(lengths, width):
    """Begin, rising numbers from 10, end, padding."""
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.tensor([BEGIN, *range(10, 8 + length), END])
    return tokens, torch.tensor(lengths)


def keys(indices, epoch=0, seed=0):
    return SampleKeys(seed, epoch, np.asarray(indices, dtype=np.int64))


@pytest.mark.parametrize(
    "transforms", [*([one] for one in TRANSFORMS), TRANSFORMS], ids=["drop", "delete", "swap", "all"]
)
@given(width=st.integers(9, 14), company=st.lists(st.integers(2, 9), max_size=3), epoch=st.integers(0, 5))
def test_a_sample_depends_on_its_keys_only(transforms, width, company, epoch):
    alone, length = augment_tokens(*batch([7], 7), keys([5], epoch), transforms, padding_id=0)
    lengths = [*company, 7]
    tokens, sizes = augment_tokens(
        *batch(lengths, width), keys([*range(20, 20 + len(company)), 5], epoch), transforms, padding_id=0
    )
    assert sizes[-1] == length[0]
    assert tokens[-1, : sizes[-1]].equal(alone[0, : length[0]])
    assert not tokens[-1, sizes[-1] :].any()
    assert all(isinstance(transform, TokenTransform) for transform in transforms)


def many(transform, count=4000, length=12):
    return augment_tokens(*batch([length] * count, length), keys(range(count)), [transform], padding_id=0)


def test_dropout_replaces_at_its_rate_and_leaves_what_is_protected():
    tokens, lengths = many(TRANSFORMS[0])
    assert (lengths == 12).all()
    assert (tokens[:, 0] == BEGIN).all()
    assert (tokens[:, -1] == END).all()
    inside, plain = tokens[:, 1:-1], torch.arange(10, 20)
    assert ((inside == MASK) | (inside == plain)).all()
    rates = (inside == MASK).double().mean(0)
    assert rates.tolist() == pytest.approx([0.3] * 10, abs=0.04)


def test_deletion_keeps_the_order_and_something():
    tokens, lengths = many(TRANSFORMS[1])
    kept = []
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        inside = row[1 : length - 1]
        assert (row[0], row[length - 1], row[length:]) == (BEGIN, END, [0] * (12 - length))
        assert inside == sorted(set(inside))
        kept.append(len(inside))
    assert np.mean(kept) == pytest.approx(7, abs=0.15)
    _, lengths = many(TokenDeletion(probability=1.0, **KEPT))
    assert (lengths == 3).all()
    _, lengths = many(TokenDeletion(probability=1.0))
    assert (lengths == 1).all()


@pytest.mark.parametrize("distance", [1, 3])
def test_swaps_move_no_token_far(distance):
    tokens, _ = many(TokenSwap(distance=distance, **KEPT))
    assert (tokens[:, 0] == BEGIN).all()
    assert (tokens[:, -1] == END).all()
    inside = tokens[:, 1:-1]
    assert inside.sort(1).values.equal(torch.arange(10, 20).expand(len(inside), -1))
    moved = (inside - torch.arange(10, 20)).abs()
    assert moved.max() == distance
    assert (moved.sum(1) > 0).double().mean() > 0.5
    half, _ = many(TokenSwap(distance=distance, probability=0.5, **KEPT))
    untouched = (half[:, 1:-1] == torch.arange(10, 20)).all(1).double().mean()
    assert 0.4 < untouched < 0.8


def test_epochs_seeds_and_samples_differ():
    def drawn(**more):
        return augment_tokens(*batch([9], 9), keys(more.pop("indices", [0]), **more), TRANSFORMS, padding_id=0)[
            0
        ].tolist()

    assert len({str(drawn(epoch=epoch)) for epoch in range(8)}) > 4
    assert len({str(drawn(seed=seed)) for seed in range(8)}) > 4
    assert len({str(drawn(indices=[index])) for index in range(8)}) > 4


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"0 <= probability <= 1, got 1\.5"):
        TokenDeletion(probability=1.5)
    with pytest.raises(ValueError, match="distance of at least 1, got 0"):
        TokenSwap(distance=0)
    with pytest.raises(ValueError, match=r"own salt, got \['token swap'\] more than once"):
        augment_tokens(*batch([5], 5), keys([0]), [TokenSwap(), TokenSwap()], padding_id=0)

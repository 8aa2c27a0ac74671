import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys
from tameformer.data.masking import MaskedWindows
from tameformer.errors import DataError


def windows(count=20_000, length=101, **settings):
    tokens = np.random.default_rng(0).integers(4, 50, count)
    tokens[::10] = 2  # an end token, which is special
    told = {"vocab_size": 50, "begin_id": 1, "mask_id": 3, "num_special": 4, **settings}
    return tokens, MaskedWindows(tokens, length, **told)


def test_shares_are_those_of_the_paper():
    tokens, source = windows()
    batch = source.fetch(SampleKeys(0, 0, np.arange(len(source))))
    seen, targets = batch["tokens"][:, 1:], batch["targets"][:, 1:]
    real = torch.from_numpy(tokens.reshape(seen.shape))
    chosen = targets >= 0
    assert torch.equal(targets[chosen], real[chosen])
    assert torch.equal(seen[~chosen], real[~chosen])
    assert not chosen[real == 2].any()
    assert batch["num_items"] == chosen.sum()
    assert chosen[real > 3].double().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (seen[chosen] == 3).double().mean().item() == pytest.approx(0.8, abs=0.02)
    # One random token in 46 is the token itself.
    assert (seen[chosen] == real[chosen]).double().mean().item() == pytest.approx(0.1 + 0.1 / 46, abs=0.02)
    changed = seen[chosen][(seen[chosen] != 3) & (seen[chosen] != real[chosen])]
    assert set(changed.tolist()) <= set(range(4, 50))
    assert len(set(changed.tolist())) > 35


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    _, source = windows()
    alone = source.fetch(SampleKeys(1, 2, np.array([7])))
    among = source.fetch(SampleKeys(1, 2, np.array([3, 7, 9])))
    assert torch.equal(alone["tokens"][0], among["tokens"][1])
    for other in (SampleKeys(1, 3, np.array([7])), SampleKeys(0, 2, np.array([7]))):
        assert not torch.equal(alone["targets"], source.fetch(other)["targets"])


def test_every_row_has_a_target_if_it_can():
    _, source = windows(count=300, length=4, rate=0.01)
    assert (source.fetch(SampleKeys(0, 0, np.arange(100)))["targets"] >= 0).any(1).all()


def test_too_little_text_and_bad_rates_are_refused():
    with pytest.raises(DataError, match="5 tokens do not fill a window of 10; give more text or shorter windows"):
        windows(count=5, length=10)
    with pytest.raises(ValueError, match="expected a rate between 0 and 1"):
        windows(rate=0.0)

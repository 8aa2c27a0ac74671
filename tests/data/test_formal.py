"""Formal languages against their definitions, by trying all strings."""

import itertools
from collections import Counter

import numpy as np
import pytest

from tameformer.data import SampleKeys
from tameformer.data.formal import Dyck, EvenLength, Parity
from tameformer.data.strings import StringSource
from tameformer.errors import DataError

LANGUAGES = [Parity(), EvenLength(), Dyck(), Dyck(num_types=2), Dyck(num_types=2, max_depth=2), Dyck(max_depth=1)]


def is_member(language, string) -> bool:
    if isinstance(language, Parity):
        return sum(string) % 2 == 0
    if isinstance(language, EvenLength):
        return len(string) % 2 == 0
    stack, deepest = [], 0
    for symbol in string:
        if symbol < language.num_types:
            stack.append(symbol)
        elif not stack or stack.pop() != symbol - language.num_types:
            return False
        deepest = max(deepest, len(stack))
    return not stack and (language.max_depth is None or deepest <= language.max_depth)


def members(language, length) -> set[tuple[int, ...]]:
    alphabet = range(len(language.symbols))
    return {string for string in itertools.product(alphabet, repeat=length) if is_member(language, string)}


def fetched(source, count=400, seed=3, epoch=2):
    return source.fetch(SampleKeys(seed, epoch, np.arange(count)))


@pytest.mark.parametrize("language", LANGUAGES, ids=str)
def test_what_may_follow_is_what_some_member_goes_on_with(language):
    longest = 6 if len(language.symbols) > 2 else 8
    all_members = [string for length in range(longest + 1) for string in members(language, length)]
    for string in [string for string in all_members if len(string) == longest - 2]:
        found = language.follow(np.array([string], dtype=np.int64).reshape(1, -1))[0]
        for place in range(0, len(string) - 1):  # so early that a member of at most `longest` symbols exists
            prefix = string[:place]
            following = {one[place] for one in all_members if one[:place] == prefix and len(one) > place}
            assert set(np.flatnonzero(found[place, :-1])) == following
        for place in range(len(string) + 1):
            assert found[place, -1] == is_member(language, string[:place])


@pytest.mark.parametrize("language", LANGUAGES, ids=str)
def test_strings_are_drawn_uniformly_from_all_members_of_a_length(language):
    expected = members(language, 6)
    source = StringSource(language, num_samples=4000, min_length=6, max_length=6)
    tokens = fetched(source, 4000)["tokens"].numpy()
    assert (tokens[:, 0] == len(language.symbols)).all()
    counts = Counter(map(tuple, tokens[:, 1:].tolist()))
    assert set(counts) == expected
    share = 4000 / len(expected)
    assert all(abs(count - share) < 5 * np.sqrt(share) + 1e-9 or len(expected) == 1 for count in counts.values())


def test_lengths_are_those_asked_for_and_all_of_them():
    for language, lengths in ((Parity(), range(2, 10)), (EvenLength(), range(2, 10, 2)), (Dyck(), range(2, 10, 2))):
        batch = fetched(StringSource(language, num_samples=400, min_length=2, max_length=9))
        assert set(batch["lengths"].tolist()) == set(lengths)
        asked = batch["targets"][:, :, -1] >= 0
        assert (asked.sum(1) == batch["lengths"] + 1).all()
        assert batch["num_items"] == int(asked.sum())
    with pytest.raises(DataError, match="no string of EvenLength has a length from 3 to 3; widen the range"):
        StringSource(EvenLength(), num_samples=1, min_length=3, max_length=3)


@pytest.mark.parametrize("language", LANGUAGES, ids=str)
def test_half_of_the_strings_asked_for_membership_are_members(language):
    source = StringSource(language, num_samples=400, min_length=2, max_length=8, question="membership")
    batch = fetched(source)
    asked = (batch["targets"] >= 0).nonzero()
    assert asked[:, 0].tolist() == list(range(400))
    assert (asked[:, 1] == batch["lengths"]).all()
    assert (asked[:, 2] == len(language.symbols)).all()
    told = [bool(batch["targets"][row, place, choice]) for row, place, choice in asked.tolist()]
    strings = [
        row[1 : 1 + length] for row, length in zip(batch["tokens"].tolist(), batch["lengths"].tolist(), strict=True)
    ]
    assert told == [is_member(language, string) for string in strings]
    assert 150 < sum(told) < 250


def test_a_string_is_a_function_of_its_sample_alone():
    source = StringSource(Dyck(num_types=3), num_samples=100, min_length=2, max_length=20)
    whole = fetched(source, 100)
    part = source.fetch(SampleKeys(3, 2, np.array([70, 7], dtype=np.int64)))
    for row, index in enumerate((70, 7)):
        length = int(whole["lengths"][index])
        assert part["lengths"][row] == length
        assert part["tokens"][row, : length + 1].tolist() == whole["tokens"][index, : length + 1].tolist()
    assert fetched(source, 20, epoch=3)["tokens"].tolist() != fetched(source, 20)["tokens"].tolist()


def test_bounds_of_brackets_are_checked():
    with pytest.raises(ValueError, match="max_depth must be at least 1, got 0"):
        Dyck(max_depth=0)

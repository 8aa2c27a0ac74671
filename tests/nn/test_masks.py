import torch

from tameformer.nn.masks import causal_mask, document_mask, padding_mask, real_from_lengths, real_from_tokens


def test_causal_mask_ends_at_the_last_key():
    for queries, keys in [(3, 3), (2, 5), (1, 4)]:
        mask = causal_mask(queries, keys)
        assert mask.shape == (1, 1, queries, keys)
        for query in range(queries):
            for key in range(keys):
                assert mask[0, 0, query, key] == (key <= query + keys - queries)


def test_document_mask_is_same_document_and_not_later():
    documents = torch.tensor([[0, 0, 1, 1, 1], [4, 2, 2, 2, -1]])
    mask = document_mask(documents)
    for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5)).tolist():
        expected = key <= query and documents[row, query] == documents[row, key]
        assert mask[row, 0, query, key] == expected
    assert mask.any(-1).all()


def test_padding_masks():
    tokens = torch.tensor([[5, 6, 0], [7, 0, 0]])
    real = real_from_tokens(tokens, 0)
    assert real.equal(real_from_lengths(torch.tensor([2, 1]), 3))
    assert padding_mask(real).shape == (2, 1, 1, 3)
    assert padding_mask(real)[:, 0, 0].equal(real)


def test_masks_combine_by_and():
    both = causal_mask(3, 3) & padding_mask(torch.tensor([[True, False, True]]))
    assert both[0, 0].tolist() == [[True, False, False], [True, False, False], [True, False, True]]

import copy

import torch
from torch import nn

from tameformer.training.average import advance, averaged


def test_it_is_torchs_average_to_the_bit():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).bfloat16()
    )  # floats of two widths, and a count
    ours, theirs = (averaged(copy.deepcopy(model), 0.9) for _ in range(2))
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model[1].num_batches_tracked += 3
        advance(ours, model)
        theirs.update_parameters(model)
    expected = theirs.state_dict()
    assert int(ours.n_averaged) == 4
    assert not torch.equal(ours.module[0].weight, model[0].weight)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key

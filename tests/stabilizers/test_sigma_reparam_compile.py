import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from torch import nn

from tameformer.stabilizers.sigma_reparam import Rows, SigmaReparam, sigma_reparam


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    sigma_reparam(model, split=lambda name, module, parent: Rows((4, 8)) if name == "0" else None)
    return model


losses = {}
for how in ("eager", "compiled"):
    model = model_of()
    run = torch.compile(model, fullgraph=True) if how == "compiled" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses[how] = []
    for _ in range(4):
        loss = run(torch.linspace(-1, 1, 18).view(3, 6)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[how].append(loss.detach())
    with torch.no_grad():
        losses[how].append(run.eval()(torch.ones(1, 6)).sum())
    assert {int(one.updates) for one in model.modules() if isinstance(one, SigmaReparam)} == {4}
# The compiled forward keeps no image of the old weight, so that its power steps start half a step later.
torch.testing.assert_close(torch.stack(losses["compiled"]), torch.stack(losses["eager"]), rtol=1e-3, atol=1e-5)

model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
sigma_reparam(model)
x = torch.randn(2, 5, 16)
with torch.autocast("cpu", dtype=torch.bfloat16):
    torch.compile(model, fullgraph=True, backend="aot_eager")(x)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.compile
def test_fullgraph_trains_as_eager_does():
    """In a process of its own: the shape checks of the test run would break the graph."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], check=True, env=environment)

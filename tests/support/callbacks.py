"""What the tests of callbacks in other people's trainers measure and read."""

import json

import torch

from tameformer.probes import Probe


class Gradients(Probe):
    """The norm of all gradients that the optimizer gets, and how far its update went after them."""

    def __init__(self, parameters):
        self.parameters, self.norm, self.before, self.moved = parameters, None, [], torch.tensor(0.0)

    def on_gradients(self):
        self.norm = torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm()
        self.before = [p.detach().clone() for p in self.parameters]

    def on_update(self):
        self.moved = sum((p.detach() - old).abs().sum() for p, old in zip(self.parameters, self.before, strict=True))

    def read(self):
        return {"diag/gradients/all": self.norm, "diag/moved/all": self.moved}


def lines(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def events(folder, kind="step_skipped"):
    return [line for line in lines(folder, "tame/events.jsonl") if line["kind"] == kind]


def left_on(model):
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]

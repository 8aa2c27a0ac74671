"""What a run cannot measure is said once, by name."""

from tameformer import train
from tameformer.record import RunReader

SETTINGS = {"max_steps": 4, "model.dim": 16, "loop.logging_steps": 1, "optim.warmup_steps": 1}


def told(folder):
    return [event for event in RunReader(folder).events() if event["kind"] == "unseen"]


def test_attention_without_a_softmax_is_named_once(tmp_path):
    settings = {**SETTINGS, "model.num_layers": 6, "model.attention": "linear", "output_dir": str(tmp_path)}
    train("vit-digits", overrides=settings)
    (event,) = told(tmp_path)
    names = [f"stack.layers.{layer}.attention.branch" for layer in range(6)]
    assert event["unseen"] == [f"{name}: no call of attention was seen" for name in names]
    assert event["message"] == f"not measured: {', '.join(names[:4])} and 2 more: no call of attention was seen"


def test_a_run_that_sees_all_says_nothing(tmp_path):
    train("vit-digits", overrides={**SETTINGS, "model.num_layers": 2, "output_dir": str(tmp_path)})
    assert told(tmp_path) == []

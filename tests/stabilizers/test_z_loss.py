import copy
import gc
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import tameformer as tame
from tameformer.errors import PatchError
from tameformer.models import DecoderConfig, EncoderDecoderConfig, VisionConfig, decoder
from tameformer.models import encoder_decoder as build_pair
from tameformer.models import vision_classifier as build_vision
from tameformer.recipes.char_lm import language_loss
from tameformer.recipes.translation import translation_loss
from tameformer.recipes.vision import classification_loss
from tameformer.record import RunReader
from tameformer.stabilizers import with_z_loss, z_loss

TOKENS = torch.arange(1, 15).view(2, 7)
LABELS = torch.where(torch.arange(7) < torch.tensor([[7], [4]]), TOKENS, -100)
SMALL = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    return BertForMaskedLM(BertConfig(**SMALL, **BERT, **NO_DROPOUT))


def classifier():
    return BertForSequenceClassification(BertConfig(**SMALL, **BERT, **NO_DROPOUT))


def gpt2():
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False, **off)
    return GPT2LMHeadModel(config)


def llama():
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **config, use_cache=False))


def t5():
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**SMALL, **config, decoder_start_token_id=0, use_cache=False))


def marian():
    config = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "use_cache": False}
    return MarianMTModel(MarianConfig(**SMALL, **config, decoder_start_token_id=0, forced_eos_token_id=1))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **BERT, **NO_DROPOUT))


TEXT = {"input_ids": TOKENS, "labels": LABELS}
CLASSES = torch.tensor([2, 0])
FAMILIES = {
    "bert": (bert, TEXT, False),
    "bert-classes": (classifier, {"input_ids": TOKENS, "labels": CLASSES}, False),
    "gpt2": (gpt2, TEXT, True),
    "llama": (llama, TEXT, True),
    "llama-accumulating": (llama, {**TEXT, "num_items_in_batch": 25}, True),
    "t5": (t5, TEXT, False),
    "marian": (marian, TEXT, False),
    "vit": (vit, {"pixel_values": torch.linspace(-3, 9, 384).sin().view(2, 3, 8, 8), "labels": CLASSES}, False),
}


def built(name):
    torch.manual_seed(0)
    build, batch, is_causal = FAMILIES[name]
    return build().train(), batch, is_causal


def term(logits, labels, divisor=None):
    """The mean of (ln Z)^2, or their sum over a divisor, over the tokens that count."""
    kept = labels.flatten() != -100
    squares = torch.logsumexp(logits.detach().double().flatten(0, -2)[kept], -1).square()
    return (squares.sum() / (divisor or len(squares))).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_grows_by_the_term_over_the_same_tokens(name):
    model, batch, is_causal = built(name)
    plain = model(**batch)
    logits, labels = plain.logits, batch["labels"]
    if is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    handle = z_loss(model, coefficient=0.1)
    grown = model(**batch)
    expected = plain.loss.item() + 0.1 * term(logits, labels, batch.get("num_items_in_batch"))
    assert grown.loss.item() == pytest.approx(expected, rel=1e-6)
    assert expected > plain.loss.item() * 1.05
    assert torch.equal(grown.logits, plain.logits)
    assert list(model.state_dict()) == list(built(name)[0].state_dict())
    evaluated = model.eval()(**batch).loss.item()
    assert evaluated == pytest.approx(plain.loss.item(), rel=1e-6)
    handle.remove()
    assert torch.equal(model.train()(**batch).loss, plain.loss)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_gradient_is_that_of_the_term_added_by_hand(name):
    model, batch, is_causal = built(name)
    output = model(**batch)
    logits, labels = (output.logits[:, :-1], LABELS[:, 1:]) if is_causal else (output.logits, LABELS)
    (output.loss + 0.1 * torch.logsumexp(logits[labels != -100], -1).square().mean()).backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    z_loss(model, coefficient=0.1)
    model(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-6)


def test_padding_of_the_vocabulary_is_left_out():
    model, batch, _ = built("gpt2")
    plain = model(**batch)
    z_loss(model, coefficient=0.1, vocab_size=17)
    expected = plain.loss.item() + 0.1 * term(plain.logits[:, :-1, :17], LABELS[:, 1:])
    assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


class Loss(nn.Linear):
    """A model whose loss is anything."""

    def __init__(self, loss):
        super().__init__(4, 6)
        self.loss = loss

    def forward(self, x, labels):
        logits = super().forward(x)
        return self.loss(logits.movedim(-1, 1) if logits.ndim > 2 else logits, labels)


X = torch.linspace(-2, 2, 12).view(3, 4)
Y = torch.tensor([5, -100, 0])
WEIGHT = torch.linspace(0.5, 2.0, 6)


@pytest.mark.parametrize(
    ("loss", "x", "labels", "expected"),
    [
        (partial(F.cross_entropy, reduction="sum"), X, Y, lambda z: z[Y != -100].sum()),
        (nn.CrossEntropyLoss(label_smoothing=0.1), X, Y, lambda z: z[Y != -100].mean()),
        (nn.CrossEntropyLoss(WEIGHT), X, Y, lambda z: (z[[0, 2]] * WEIGHT[[5, 0]]).sum() / WEIGHT[[5, 0]].sum()),
        (partial(F.cross_entropy, ignore_index=5), X, torch.tensor([5, 1, 0]), lambda z: z[1:].mean()),
        (nn.CrossEntropyLoss(), X, WEIGHT.repeat(3, 1), lambda z: z.mean()),
        (nn.CrossEntropyLoss(), X.view(1, 3, 4), Y.view(1, 3), lambda z: z[:, Y != -100].mean()),
        (nn.CrossEntropyLoss(), X[0], Y[0], lambda z: z),
    ],
    ids=["sum", "smoothed", "weighted", "ignored", "probabilities", "classes in axis 1", "one"],
)
def test_every_form_of_the_cross_entropy(loss, x, labels, expected):
    model = Loss(loss)
    plain = model(x, labels)
    squares = torch.logsumexp(F.linear(x, model.weight, model.bias), -1).square()
    z_loss(model, coefficient=0.1)
    torch.testing.assert_close(model(x, labels), plain + 0.1 * expected(squares))


def test_an_unreduced_cross_entropy_grows_token_by_token():
    model = Loss(lambda *arguments: F.cross_entropy(*arguments, reduction="none").sum())
    plain, squares = model(X, Y), torch.logsumexp(F.linear(X, model.weight, model.bias), -1).square()
    z_loss(model, coefficient=0.1)
    torch.testing.assert_close(model(X, Y), plain + 0.1 * squares[Y != -100].sum())


def test_a_loss_that_is_computed_elsewhere_is_told_and_leaves_nothing():
    model, batch, _ = built("gpt2")
    z_loss(model)
    with pytest.raises(
        PatchError, match="saw no cross-entropy in a training pass of GPT2LMHeadModel: give it the labels"
    ):
        model(input_ids=TOKENS)
    assert not _get_current_function_mode_stack()
    with torch.no_grad():
        model(input_ids=TOKENS)  # nothing is trained by this one
    assert model(**batch).loss.requires_grad
    with pytest.raises(PatchError, match="saw no cross-entropy in mse_loss"):
        with_z_loss(F.mse_loss)(X, X)


def test_after_an_exception_nothing_is_left():
    model, batch, _ = built("bert")
    z_loss(model)
    with pytest.raises(IndexError):
        model(input_ids=TOKENS + 1000)
    assert not _get_current_function_mode_stack()
    plain = F.cross_entropy(X, Y.clamp(max=3))
    assert torch.equal(plain, F.cross_entropy(X, Y.clamp(max=3)))
    model(**batch)


def test_after_ctrl_c_other_losses_are_untouched_and_the_next_pass_cleans_up():
    def stop(*_):
        raise KeyboardInterrupt

    labels, before = Y.clamp(min=0, max=3), F.cross_entropy(X, Y.clamp(min=0, max=3))
    interrupted = Loss(stop)
    z_loss(interrupted, coefficient=1.0)
    with pytest.raises(KeyboardInterrupt):
        interrupted(X, labels)
    assert torch.equal(F.cross_entropy(X, labels), before)
    interrupted.loss = F.cross_entropy
    assert interrupted(X, labels) > interrupted.eval()(X, labels)
    assert not _get_current_function_mode_stack()


def test_a_copy_has_its_own_and_keeps_it():
    model, batch, _ = built("bert")
    plain = model(**batch).loss
    handle = z_loss(model, coefficient=1.0)
    copied = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(model(**batch).loss, plain)
    assert copied(**batch).loss > plain + 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model, batch, _ = built("gpt2")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        z_loss(model, coefficient=0.1)
        model(**batch).loss.backward()
        gradients.append(model.transformer.wte.weight.grad)
    assert torch.equal(*gradients)
    assert not _get_current_function_mode_stack()


def test_a_model_that_is_checkpointed_as_a_whole():
    model = Loss(F.cross_entropy)
    z_loss(model, coefficient=0.1)
    model(X, Y).backward()
    gradient = model.weight.grad.clone()
    model.zero_grad()
    checkpoint(model, X.requires_grad_(), Y, use_reentrant=False).backward()
    X.requires_grad_(False)
    torch.testing.assert_close(model.weight.grad, gradient)
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize(("use_reentrant", "error"), [(False, CheckpointError), (True, PatchError)])
def test_a_loss_inside_checkpointing_is_an_error(use_reentrant, error):
    model = Loss(lambda logits, labels: checkpoint(F.cross_entropy, logits, labels, use_reentrant=use_reentrant))
    z_loss(model)
    with pytest.raises(error):
        model(X, Y).backward()


def test_a_metric_without_gradients_is_left_alone():
    metrics = []

    def loss(logits, labels):
        with torch.no_grad():
            metrics.append(F.cross_entropy(logits, labels).item())
        return F.cross_entropy(logits, labels)

    model = Loss(loss)
    model(X, Y)
    z_loss(model, coefficient=1.0)
    assert model(X, Y).item() > metrics[0] + 1
    assert metrics[0] == metrics[1]


def test_autocast_sums_in_float32():
    model = Loss(F.cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(X, Y)
        squares = torch.logsumexp(F.linear(X, model.weight, model.bias).float(), -1).square()
        z_loss(model, coefficient=0.1)
        torch.testing.assert_close(model(X, Y), plain + 0.1 * squares[Y != -100].mean())


def test_twice_is_refused_and_so_are_wrong_settings():
    model = Loss(F.cross_entropy)
    z_loss(model)
    with pytest.raises(PatchError, match="z_loss is on Loss already"):
        z_loss(model)
    with pytest.raises(ValueError, match="coefficient of at least 0, got -1"):
        z_loss(model, coefficient=-1)
    with pytest.raises(ValueError, match="vocab_size of at least 1, got 0"):
        with_z_loss(F.cross_entropy, vocab_size=0)


def test_baking_takes_it_off():
    model = Loss(F.cross_entropy)
    plain = model(X, Y)
    z_loss(model).bake()
    assert torch.equal(model(X, Y), plain)


def test_under_a_monitor_the_step_is_the_same(tmp_path):
    losses = []
    for watched in (False, True):
        model, batch, _ = built("bert")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        z_loss(model, coefficient=0.1)
        monitor = tame.Monitor(model, optimizer, output_dir=str(tmp_path), every=1) if watched else None
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(loss=loss)
        losses.append(loss.detach())
        if monitor is not None:
            monitor.close()
        assert not _get_current_function_mode_stack()
    assert torch.equal(*losses)


def test_logits_stay_near_zero_where_they_drift_without():
    drifts = []
    for coefficient in (0.0, 0.1):
        torch.manual_seed(0)
        model = Loss(F.cross_entropy)
        nn.init.constant_(model.bias, 8.0)
        z_loss(model, coefficient=coefficient)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(100):
            model(X, Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        drifts.append(torch.logsumexp(F.linear(X, model.weight, model.bias), -1)[Y != -100].abs().mean().item())
    assert drifts[0] > 5
    assert drifts[1] < 1


def pairs():
    config = {"dim": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = build_pair(EncoderDecoderConfig(**config), vocab_size=20, padding_id=0)
    batch = {"source": TOKENS, "source_mask": TOKENS > 0, "target_in": TOKENS, "targets": LABELS}
    return model, batch, partial(translation_loss, label_smoothing=0.1), LABELS


def characters():
    model = decoder(DecoderConfig(dim=16, num_heads=2, num_layers=1), vocab_size=20)
    return model, {"tokens": TOKENS, "targets": LABELS}, language_loss, LABELS


def images():
    config = VisionConfig(dim=16, num_heads=2, num_layers=1, patch_size=4)
    model = build_vision(config, num_classes=5, image_size=8, channels=1)
    batch = {"images": torch.linspace(-3, 9, 128).sin().view(2, 1, 8, 8), "labels": torch.eye(5)[[3, 1]] * 0.9 + 0.02}
    return model, batch, partial(classification_loss, label_smoothing=0.1), CLASSES


@pytest.mark.parametrize("build", [pairs, characters, images])
def test_the_losses_of_the_recipes(build):
    torch.manual_seed(0)
    model, batch, loss, labels = build()
    inputs = {key: value for key, value in batch.items() if key not in ("targets", "labels")}
    logits = model(*inputs.values()) if len(inputs) == 1 else model(TOKENS, TOKENS, source_mask=TOKENS > 0)
    expected = loss(model, batch).item() + 0.1 * term(logits, labels, divisor=1)
    assert with_z_loss(loss, coefficient=0.1)(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert not _get_current_function_mode_stack()


def test_a_recipe_adds_it_while_it_trains_and_evaluates_without(tmp_path):
    tiny = {"model.dim": 16, "max_steps": 4, "loop.logging_steps": 1, "precision": "fp32", "optim.peak_lr": 1e-6}
    logs = {}
    for name, methods in (("plain", []), ("z", ["z_loss"])):
        tame.train("vit-digits", overrides={**tiny, "stabilize": methods, "output_dir": str(tmp_path / name)})
        logs[name] = RunReader(tmp_path / name).log()
    grown = logs["z"][0]["train/loss"] - logs["plain"][0]["train/loss"]
    assert 1e-4 < grown < 1e-3  # 1e-4 (ln 10)^2 and more
    assert logs["z"][-1]["eval/loss"] == pytest.approx(logs["plain"][-1]["eval/loss"], abs=1e-5)


def test_no_pass_keeps_its_frames_alive():
    model, batch, _ = built("bert")
    z_loss(model)
    loss = model(**batch).loss
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one).__name__ == "_Pass"]
    assert loss.requires_grad


COMPILED = """
import torch, torch.nn.functional as F
from torch import nn
from tameformer.stabilizers import z_loss

class Model(nn.Linear):
    def forward(self, x, labels):
        return F.cross_entropy(super().forward(x), labels)

x, labels = torch.linspace(-2, 2, 12).view(3, 4), torch.tensor([5, -100, 0])
for backend in ("eager", "aot_eager", "inductor"):
    torch._dynamo.reset()
    model = Model(4, 6)
    plain = model(x, labels)
    handle = z_loss(model, coefficient=0.1)
    eager = model(x, labels)
    assert eager > plain + 0.05
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, labels), eager)
    compiled(x, labels).backward()
    torch.testing.assert_close(compiled.eval()(x, labels), plain)
    handle.remove()
    torch.testing.assert_close(compiled.train()(x, labels), plain)
"""


@pytest.mark.compile
def test_compiled_without_a_break():
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr

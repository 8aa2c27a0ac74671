import pytest

from tameformer.errors import CheckpointError
from tameformer.finetune import check_fit


def is_head(name):
    return name.startswith("head.")


HEAD, BODY = ("head.weight", (2, 8), (3, 8)), [("layers.0.weight", (8, 8), (9, 8)), ("layers.1.weight", (8, 8), (9, 8))]


def test_a_head_is_replaced_only_when_asked():
    check_fit("a", mismatched=[HEAD], missing=["head.bias"], is_head=is_head, replace_head=True)
    with pytest.raises(
        CheckpointError,
        match=r"head\.weight has shape \(2, 8\) there and \(3, 8\) here; give the number .* replace_head=True",
    ):
        check_fit("a", mismatched=[HEAD], is_head=is_head, replace_head=False)


def test_every_tensor_that_does_not_fit_is_named():
    with pytest.raises(CheckpointError) as caught:
        check_fit("a", mismatched=[HEAD, *BODY], missing=["norm.bias"], is_head=is_head, replace_head=False)
    assert all(name in str(caught.value) for name in ("head.weight", "layers.0.weight", "layers.1.weight", "norm.bias"))
    assert "replace_head" not in str(caught.value)  # it would not help
    assert str(caught.value).endswith("; take the configuration that it was trained with")

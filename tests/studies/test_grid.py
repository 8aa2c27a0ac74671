"""What is compared, and what is refused before anything runs."""

import json
from dataclasses import replace

import pytest

from tameformer.errors import ConfigError
from tameformer.studies.compare import claim_folder
from tameformer.studies.grid import folder_name, make_grid, parse_seeds, parse_vary


def grid(*vary: str, seeds=(0,), arguments=()):
    return make_grid("vit-digits", arguments, parse_vary(vary), seeds)


def test_the_cells_are_all_combinations_seed_by_seed():
    found = grid("stabilize=none,sigma_reparam+layer_scale", "optim.peak_lr=1e-2,1e-3", seeds=(4, 0))
    assert [cell.name for cell in found.cells] == [
        f"stabilize={method},peak_lr={rate},seed={seed}"
        for seed in (4, 0)
        for method in ("none", "sigma_reparam+layer_scale")
        for rate in ("0.001", "0.01")  # rates ascend, methods keep their order: the first is the baseline
    ]
    config = found.resolved(found.cells[-1]).config
    assert config.stabilize == ("sigma_reparam", "layer_scale")
    assert (config.optim.peak_lr, config.seed) == (0.01, 0)
    assert {found.resolved(cell).config.order_seed for cell in found.cells[:2]} == {4}  # variants share what is random


def test_keys_with_the_same_last_part_are_told_apart_by_the_whole_key():
    found = grid(
        "data.batch_size=32,64", "data.eval_batch_size=64", "probes.grad_norm=5", "optim.max_grad_norm=null,1.0"
    )
    assert found.cells[0].name == "batch_size=32,eval_batch_size=64,grad_norm=5,max_grad_norm=null,seed=0"
    both = make_grid("vit-digits", (), {"model.dropout": [0.0, 0.1], "optim.name": ["adamw"]}, (0,))
    assert both.cells[1].name == "dropout=0.1,name=adamw,seed=0"


def test_values_may_be_lists_and_plain_python():
    found = make_grid("vit-digits", (), {"data.augment": [[], ["flip", "shift"]], "stabilize": ["none"]}, (0,))
    assert [choice.label for choice in found.factors[0].choices] == ["none", "flip+shift"]
    assert found.resolved(found.cells[1]).config.data.augment == ("flip", "shift")
    assert [choice.label for choice in grid("data.augment=none,[flip, shift]").factors[0].choices] == [
        "none",
        "[flip, shift]",
    ]


def test_folder_names_are_safe_and_distinct():
    names = {folder_name([f"path={path}"]) for path in ("a/b", "a\\b", "a b", "../b", "a;b")}
    assert len(names) == 5
    assert all("/" not in name and "\\" not in name and " " not in name and ";" not in name for name in names)
    assert len(folder_name(["x=" + "y" * 4000])) < 140


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["optim.peek_lr=1e-3"], "unknown key optim.peek_lr; did you mean optim.peak_lr?"),
        (["optim.name=adamw,adan"], "optim.name expects one of adamw, .* got adan"),
        (["stabilize=none,sigma_reparm"], "no method sigma_reparm; did you mean sigma_reparam?"),
        (["optim.peak_lr=1e-3,fast"], "optim.peak_lr expects positive numbers, got fast"),
        (["optim.peak_lr=1e-3,-1"], "optim.peak_lr expects positive numbers, got -1"),
        (["optim.peak_lr=1e-3,0.001"], "expected distinct values to compare, got 0.001, 0.001"),
        (["model.num_heads=4,3"], "heads"),
        (["seed=0,1"], "seed cannot be varied: use --seeds"),
        (["output_dir=a,b"], "output_dir cannot be varied: use --output_dir"),
        (["optim=1"], "optim is a section, not a value"),
        ([], "nothing to compare: give --vary"),
        (["optim.peak_lr"], r"expects KEY=VALUE,VALUE, such as optim.peak_lr=1e-3,3e-3, got optim.peak_lr"),
        (["model.dim=8", "model.dim=16"], "model.dim is given twice"),
    ],
)
def test_what_cannot_run_is_refused_with_the_nearest_name(vary, message):
    with pytest.raises(ConfigError, match=message):
        grid(*vary)


@pytest.mark.parametrize("text", ["0", "", "a", "-1", "1,-2"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(ConfigError, match=f"such as 0,5,7, got {text}"):
        parse_seeds(text)


def test_seeds_must_be_distinct():
    with pytest.raises(ConfigError, match=r"distinct, got \[1, 1\]"):
        grid("model.dim=16,32", seeds=(1, 1))


def test_a_folder_may_grow_and_nothing_else(tmp_path):
    folder = tmp_path / "study"
    small = grid("model.dim=16,32")
    claim_folder(small, folder)
    claim_folder(small, folder)
    large = replace(grid("model.dim=8,16,32"), seeds=(0, 1))
    claim_folder(large, folder)
    assert json.loads((folder / "grid.json").read_text())["vary"] == {"model.dim": ["8", "16", "32"]}
    for other, message in (
        (replace(small, seeds=(0, 1)), "model.dim had 8, too"),
        (replace(large, seeds=(0,)), "seeds had 1, too"),
        (replace(large, factors=(*large.factors, *grid("stabilize=none").factors)),
         "it varies model.dim, and this one model.dim, stabilize"),
        (replace(large, arguments=("--model.num_layers=3",)), "model.num_layers was 2 and is 3"),
        (replace(large, recipe="vit"), " was "),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"belongs to another comparison: .*{message}"):
            claim_folder(other, folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds something else"):
        claim_folder(grid("model.dim=16,32"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]

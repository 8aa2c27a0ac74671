"""Sets know no order, documents are read by sentence, and both recipes learn, show what they saw, and are exported."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data import SampleKeys
from tameformer.data.augment import TokenDeletion, TokenDropout, TokenSwap
from tameformer.data.point_sets import PointSets, TokenSets
from tameformer.data.sentences import TokenizedDocuments, sentences
from tameformer.data.sources import digits
from tameformer.data.tokenizers import BPETokenizer
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.config import ProbesConfig
from tameformer.training import Engine
from tiny_recipes import values_of, write_data

SMALL = {
    "model.dim": 16, "precision": "fp32", "loop.logging_steps": 10, "optim.warmup_steps": 3, "optim.peak_lr": 0.01,
    **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
}  # fmt: skip
HOSTILE = "<script>alert(1)</script>"


def test_a_point_is_where_a_pixel_is_and_how_bright():
    source = digits("train")
    points = PointSets(source, 5).fetch(SampleKeys(0, 0, np.array([3])))
    image = source.images[3, 0]
    brightest = np.argsort(-image.ravel(), kind="stable")[:5]
    expected = np.stack([brightest // 8 / 3.5 - 1, brightest % 8 / 3.5 - 1, image.ravel()[brightest]], axis=1)
    assert points["real"].all()
    np.testing.assert_allclose(points["elements"][0], expected, atol=1e-6)


def test_black_pixels_are_no_points_and_padding_is_told():
    source, keys = digits("train"), SampleKeys(0, 0, np.arange(10))
    batch = PointSets(source, 64).fetch(keys)
    assert batch["real"].sum(1).tolist() == (source.images[:10, 0] > 0).sum((1, 2)).tolist()
    assert (batch["elements"][~batch["real"]] == 0).all()
    assert PointSets(source, 64).width == 3


def test_a_token_is_where_a_pixel_is_and_its_level():
    source, keys = digits("train"), SampleKeys(0, 0, np.arange(10))
    sets = TokenSets(source, 64, levels=4)
    assert sets.vocab_size == 64 * 4
    batch = sets.fetch(keys)
    assert batch["real"].equal(PointSets(source, 64).fetch(keys)["real"])
    for image, elements, real in zip(source.images[:10, 0], batch["elements"], batch["real"], strict=True):
        wanted = {place * 4 + min(int(value * 4), 3) for place, value in enumerate(image.ravel().tolist()) if value > 0}
        assert set(elements[real].tolist()) == wanted
        assert len(wanted) == real.sum()


def test_texts_are_cut_into_sentences_and_padded_on_both_axes():
    assert sentences("One. Two!\nThree <br /> four? ") == ["One.", "Two!", "Three", "four?"]
    assert sentences(" ") == [" "]
    source = TokenizedDocuments([[[5, 6], [7]], [[8, 9, 9]]], np.array([1, 0]), 0)
    batch = source.fetch(SampleKeys(0, 0, np.array([1, 0])))
    assert batch["tokens"].tolist() == [[[8, 9, 9], [0, 0, 0]], [[5, 6, 0], [7, 0, 0]]]
    assert batch["real"].tolist() == (batch["tokens"] > 0).tolist()
    assert batch["labels"].tolist() == [0, 1]
    assert source.lengths.tolist() == [3, 3]


def test_noise_stays_within_its_sentence_and_is_new_in_each_pass():
    words = list(range(5, 25))
    documents = [[words, words], [words]]
    noise = [TokenSwap(distance=2), TokenDeletion(probability=0.3), TokenDropout(replacement=3, probability=0.3)]
    source = TokenizedDocuments(documents, np.array([0, 1]), 0, transforms=noise)
    batches = [source.fetch(SampleKeys(0, epoch, np.arange(2))) for epoch in range(3)]
    told = [
        [tuple(row[real].tolist()) for rows, reals in zip(one["tokens"], one["real"], strict=True)
         for row, real in zip(rows, reals, strict=True) if real.any()]
        for one in batches
    ]  # fmt: skip
    assert [len(one) for one in told] == [3, 3, 3]
    assert len({row for one in told for row in one}) == 9  # no two sentences alike, nor two passes
    assert all(row and set(row) <= {3, *words} for one in told for row in one)
    alone = source.fetch(SampleKeys(0, 1, np.array([1])))
    assert tuple(alone["tokens"][0, 0][alone["real"][0, 0]].tolist()) == told[1][2]


@pytest.mark.parametrize("key", ["data.token_dropout", "data.token_deletion", "data.token_swap"])
def test_documents_are_learned_from_with_the_noise_that_was_asked_for(key, tmp_path):
    write_data(tmp_path)
    values = {**values_of("hierarchical", tmp_path), "max_steps": 1, "optim.warmup_steps": 0}
    tokens = []
    for changes in ({}, {key: 2 if key == "data.token_swap" else 0.5}):
        found = resolve("hierarchical", {**values, **changes})
        run = found.build(found.config, tmp_path / f"run{len(changes)}")
        tokens.append(next(iter(run.batches(start=0, stop=1, rank=0, world_size=1)))[0]["tokens"])
        assert np.isfinite(run.evaluate(Engine(), run.model.eval())["loss"])
    assert tokens[0].shape != tokens[1].shape or not tokens[0].equal(tokens[1])


def assert_seen_in_any_order(folder, source, capsys):
    """The run's model, exported and loaded again, answers alike for elements in another order; its heads are diagnosed."""
    tame.export(folder / "run", folder / "out")
    model = tame.load(folder / "out")
    batch = source.fetch(SampleKeys(0, 0, np.arange(4)))
    order = torch.randperm(batch["elements"].shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(batch["elements"], real=batch["real"])
        second = model(batch["elements"][:, order], real=batch["real"][:, order])
    torch.testing.assert_close(first, second)
    assert main(["diagnose", str(folder / "run")]) == 0
    assert "Attention heads" in capsys.readouterr().out


def test_sets_are_learned_in_any_order(tmp_path, capsys):
    result = tame.train(
        "set", overrides={**SMALL, "max_steps": 60, "model.num_heads": 2, "output_dir": str(tmp_path / "run")}
    )
    assert result.metrics["eval/accuracy"] > 0.25
    assert_seen_in_any_order(tmp_path, PointSets(digits("test"), 64), capsys)
    values = {**SMALL, "max_steps": 4, "stabilize": ["sigma_reparam"], "output_dir": str(tmp_path / "stable")}
    assert np.isfinite(tame.train("set", overrides=values).metrics["eval/loss"])
    for changes, message in (
        ({"max_points": 0}, "max_points must be at least 1, got 0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"data.cutmix_alpha": 1.0}, r"data\.cutmix_alpha mixes images"),
    ):
        with pytest.raises(Exception, match=message):
            tame.train("set", overrides={**changes, "output_dir": str(tmp_path / "none")})


def test_sets_of_tokens_are_learned_in_any_order(tmp_path, capsys):
    values = {**SMALL, "max_steps": 60, "model.num_heads": 2, "model.elements": "tokens", "levels": 2}
    result = tame.train("set", overrides={**values, "output_dir": str(tmp_path / "run")})
    assert result.metrics["eval/accuracy"] > 0.25
    assert_seen_in_any_order(tmp_path, TokenSets(digits("test"), 64, levels=2), capsys)


def test_documents_are_learned_and_their_attention_is_shown_and_escaped(tmp_path, capsys):
    generator = np.random.default_rng(0)
    words = ["film", "plot", "scene", "actor", "music"]
    rows = []
    for index in range(120):
        said = [" ".join(generator.choice(words, 4)) + "." for _ in range(3)]
        said[index % 3] = f"it was {'superb' if index % 2 else 'dreadful'} {HOSTILE}."
        rows.append(json.dumps({"text": " ".join(said), "label": index % 2}))
    (tmp_path / "reviews.jsonl").write_text("\n".join(rows) + "\n")
    values = SMALL | {
        "data.path": str(tmp_path / "reviews.jsonl"), "data.vocab_size": 300, "data.batch_size": 12, "max_steps": 80,
        "model.dropout": 0.0, "optim.peak_lr": 0.03, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    assert tame.train("hierarchical", overrides=values).metrics["eval/accuracy"] > 0.9
    figure = json.loads((tmp_path / "run" / "figures" / "attention.json").read_text())
    tokenizer = BPETokenizer.load(tmp_path / "run" / "tokenizer.json")
    last = [json.loads(row) for row in rows[-12:]]
    for passage, row in zip(figure["passages"], last, strict=False):
        shown = ["".join(word for word, _ in line[1]) for line in passage["lines"]]
        assert shown == [tokenizer.decode(tokenizer.encode(one)) for one in sentences(row["text"])]
        assert max(line[0] for line in passage["lines"]) == 1
        assert all(max(weight for _, weight in line[1]) == 1 for line in passage["lines"])
    html = (tmp_path / "run" / "report.html").read_text()
    assert 'class="block passage"' in html
    assert "<script>" not in html
    assert main(["diagnose", str(tmp_path / "run")]) == 0
    again = {**values, "max_steps": 4, "stabilize": ["sigma_reparam"], "output_dir": str(tmp_path / "stable")}
    assert np.isfinite(tame.train("hierarchical", overrides=again).metrics["eval/loss"])

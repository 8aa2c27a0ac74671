"""Texts come back in other words: by any two functions, and by two runs of the recipe that translates."""

import json
from dataclasses import fields

import pytest

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data.labelled import read_labelled
from tameformer.data.tokenizers import BPETokenizer
from tameformer.errors import CheckpointError, DataError
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.translation import DecodingConfig, translate
from tameformer.training import Engine

GERMAN = {"Good.": "Gut.", "A fine film.": "Ein guter Film.", "No.": "Nein."}
ENGLISH = {"Gut.": "Good.", "Ein guter Film.": "A good film.", "Nein.": " "}
WORDS = ("ein", "mann", "geht", "hund", "rot", "blau", "und", "haus")


def there(lines):
    return [GERMAN[line] for line in lines]


def back(lines):
    return [ENGLISH[line] for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of five steps, there and back; the second from text in lower case."""
    folder = tmp_path_factory.mktemp("translations")
    lines = [" ".join(WORDS[(3 * index + i) % 8] for i in range(1 + index % 6)) for index in range(60)]
    table = folder / "pairs.tsv"
    table.write_text("".join(f"{line}\t{line.upper()}\tby whom\n" for line in lines))
    values = {
        "data.path": str(table), "data.validation_path": str(table), "data.vocab_size": 300, "data.max_tokens": 400,
        "max_steps": 5, "optim.warmup_steps": 1, "precision": "fp32", "decoding.num_beams": 1,
        "model.dim": 16, "model.max_length": 40, **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
    }  # fmt: skip
    transformer = {
        "model.num_heads": 2,
        "model.hidden_dim": 16,
        "model.num_encoder_layers": 1,
        "model.num_decoder_layers": 1,
    }
    one = {**values, **transformer, "data.columns": [1, 2], "output_dir": str(folder / "there")}
    tame.train("translation", overrides=one)
    two = {**values, "data.columns": [2, 1], "data.lowercase": True, "output_dir": str(folder / "back")}
    tame.train("seq2seq-rnn", overrides=two)
    return folder / "there", folder / "back"


def test_texts_are_translated_sentence_by_sentence_and_put_together_again():
    assert tame.back_translate(["Good. A fine film.", "Good."], there, back) == ["Good. A good film.", "Good."]
    assert tame.back_translate([], there, back) == []
    with pytest.raises(DataError, match="the translator back was given 2 sentences and returned 1"):
        tame.back_translate(["Good. No."], there, lambda lines: back(lines)[:1])


def test_the_file_has_each_text_and_behind_it_what_came_back_otherwise(tmp_path):
    source, out = tmp_path / "a.csv", tmp_path / "b.jsonl"
    source.write_text("sentence,kind\nA fine film.,1\nGood.,1\nNo.,0\n")
    done = tame.paraphrase(source, out, there, back, label_column="kind")
    assert (done.path, done.texts, done.paraphrases) == (out, 3, 1)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"text": "A fine film.", "label": 1},
        {"text": "A good film.", "label": 1, "paraphrase_of": 1},
        {"text": "Good.", "label": 1},
        {"text": "No.", "label": 0},
    ]
    assert [row.label for row in read_labelled(out)] == [1, 1, 1, 0]
    with pytest.raises(FileExistsError, match=r"b\.jsonl exists"):
        tame.paraphrase(source, out, there, back)
    with pytest.raises(ValueError, match=r"ends in \.jsonl, got .*c\.csv"):
        tame.paraphrase(source, tmp_path / "c.csv", there, back)


def test_both_texts_of_a_pair_are_paraphrased(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text('{"sentence1": "Good.", "sentence2": "A fine film.", "label": 0, "idx": 7}\n')
    assert tame.paraphrase(source, out, there, back).paraphrases == 1
    assert json.loads(out.read_text().splitlines()[1]) == {
        "sentence1": "Good.", "sentence2": "A good film.", "label": 0, "paraphrase_of": 1,
    }  # fmt: skip
    assert read_labelled(out)[1].pair == "A good film."


def test_a_run_and_what_was_exported_of_it_translate_as_the_recipe_does(runs, tmp_path, caplog):
    texts = ["mann geht", "ein hund und ein mann", "haus"]
    tame.export(runs[0], tmp_path / "out")
    model, tokenizer = tame.load(tmp_path / "out"), BPETokenizer.load(runs[0] / "tokenizer.json")
    expected = translate(Engine(), model, texts, tokenizer, DecodingConfig(num_beams=2), 100)
    for path in (runs[0], tmp_path / "out"):
        assert tame.translator(path, num_beams=2)(texts) == expected
    endless = "mann " * 60
    assert tame.translator(runs[0], num_beams=2)([endless, *texts]) == [endless, *expected]
    assert "1 of 4 sentences have more than 39 tokens and stay as they are" in caplog.text


def test_words_are_drawn_alike_for_a_seed_and_lower_case_is_kept_to(runs):
    texts = ["MANN GEHT", "EIN HUND", "ROT UND BLAU"]
    drawn = [tame.translator(runs[1], temperature=1.0, seed=seed)(texts) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    searched = tame.translator(runs[1])
    assert searched(texts) == searched([text.lower() for text in texts])


def test_the_command_writes_the_file_or_says_why_not(runs, tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(json.dumps({"text": word, "label": 0}) + "\n" for word in WORDS))
    command = ["paraphrase", str(source), str(out), "--there", str(runs[0]), "--back", str(runs[1])]
    assert main(command) == 0
    assert "8 texts and" in capsys.readouterr().out
    assert len(read_labelled(out)) >= 8
    assert main(command) == 2
    assert "exists; give another name" in capsys.readouterr().err
    other = [*command[:2], str(tmp_path / "c.jsonl"), "--there", str(tmp_path), "--back", str(runs[1])]
    assert main(other) == 1
    assert "tame paraphrase:" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()


def test_a_run_that_translates_nothing_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    values = {"data.path": str(tmp_path / "text.txt"), "max_steps": 1, "optim.warmup_steps": 1, "model.dim": 16,
              "model.num_heads": 2, "model.num_layers": 1, "output_dir": str(tmp_path / "run")}  # fmt: skip
    tame.train("char-lm", overrides=values)
    with pytest.raises(CheckpointError, match=r"holds a model \(decoder\) that translates no text; give a run of"):
        tame.translator(tmp_path / "run")

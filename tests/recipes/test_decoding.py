"""What the section `decoding` says is what the search is told."""

import pytest

from tameformer.recipes import speech, translation
from tameformer.recipes.catalogue import resolve
from tameformer.training import Engine
from tiny_recipes import values_of, write_data

OF = {"translation": translation, "seq2seq-rnn": translation, "speech": speech}


@pytest.mark.parametrize("recipe", OF)
def test_beams_and_length_penalty_reach_the_search(recipe, tmp_path, monkeypatch):
    write_data(tmp_path)
    search, told = OF[recipe].beam_search, []

    def searched(steps, **settings):
        told.append((settings["num_beams"], settings["length_penalty"]))
        return search(steps, **settings)

    monkeypatch.setattr(OF[recipe], "beam_search", searched)
    values = {**values_of(recipe, tmp_path), "max_steps": 1, "optim.warmup_steps": 0, "precision": "fp32"}
    values |= {"decoding.num_beams": 3, "decoding.length_penalty": 1.7}
    found = resolve(recipe, values | ({"model.head": "decoder"} if recipe == "speech" else {}))
    run = found.build(found.config, tmp_path / "run")
    run.model.eval()
    (run.test or run.evaluate)(Engine(), run.model)
    assert set(told) == {(3, 1.7)}

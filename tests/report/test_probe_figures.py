import math
import re

import numpy as np
import pytest
from matplotlib import colormaps

from run_folders import picture, write_run
from tameformer.record import RunWriter
from tameformer.report import write_report
from tameformer.report.heat_map import by_layer, heat_map
from tameformer.report.probe_figures import probe_figures
from tameformer.report.quantities import GROUPS, QUANTITIES, quantity_of
from tameformer.report.read import Probe, Run, model_order, read_run, share_of
from tameformer.report.sections import trouble_marks
from tameformer.report.small_multiples import LINES, PANELS, chosen_layers, chosen_rows, small_multiples
from tameformer.report.trouble import first_trouble
from tameformer.report.wording import place_names

NAN = math.nan


def probe(values: np.ndarray, layers: int, name: str = "attention_entropy") -> Probe:
    """Values of shape (layers * heads, steps) as a probe of layers `blocks.0`, ..."""
    heads = len(values) // layers
    rows = tuple((f"blocks.{row // heads}", row % heads) for row in range(len(values)))
    return Probe(name, rows, np.arange(values.shape[1]) * 10, values, np.ones(values.shape, dtype=bool))


def run_of(*probes: Probe) -> Run:
    return Run("name", {}, {it.name: it for it in probes}, (), {}, "")


def test_a_layer_is_the_mean_of_its_finite_heads_and_tells_which_were_not():
    values = np.array([[1.0, NAN, NAN, 5.0], [3.0, 4.0, math.inf, 7.0]])
    measured = np.array([[True, True, True, False], [True, True, True, False]])
    found, some = by_layer(Probe("p", (("a", 0), ("a", 1)), np.arange(4), values, measured))
    np.testing.assert_array_equal(found.values, [[2.0, 4.0, NAN, NAN]])
    np.testing.assert_array_equal(found.measured, [[True, True, True, False]])
    np.testing.assert_array_equal(some, [[False, True, False, False]])


def test_a_map_marks_cells_with_all_and_with_some_heads_not_finite():
    values = np.array([[0.0, NAN, NAN, 1.0], [0.0, 0.5, NAN, 1.0]])
    layers, some = by_layer(probe(values, layers=1))
    chart = heat_map("t", layers, last_step=30, share=True, some=some)
    ends = [tuple(int(255 * x + 0.5) for x in colormaps["viridis"](share)[:3]) for share in (0.0, 1.0)]
    expected = np.array([[ends[0], (255, 154, 162), (193, 18, 31), ends[1]]])
    np.testing.assert_allclose(picture(chart.svg), expected, atol=1)
    assert [text for text, _, _ in chart.legend] == [
        "some heads not finite: 1, first at step 10",
        "not finite: 1, first at step 20",
    ]


@pytest.mark.parametrize(("scale", "shade"), [("log", 0.5), ("linear", 1 / 11)])
def test_the_scale_of_the_colours_is_the_quantitys(scale, shade):
    layers, _ = by_layer(probe(np.array([[1.0, 10.0, 100.0]]), layers=1))
    middle = picture(heat_map("t", layers, last_step=20, scale=scale).svg)[0, 1]
    expected = np.array(colormaps["viridis"](round(shade * 63) / 63)[:3]) * 255
    np.testing.assert_allclose(middle, expected, atol=1.5)


def test_entropy_is_drawn_as_share_of_its_ceiling_with_ceiling_and_bound_beside_the_heads():
    entropy = probe(np.full((8, 5), 1.0), layers=2)
    rows = tuple((layer, None) for layer in entropy.layers)
    ceiling = Probe("attention_entropy_max", rows, entropy.steps, np.full((2, 5), 2.0), np.ones((2, 5), dtype=bool))
    bound = probe(np.full((8, 5), 0.5), layers=2, name="attention_entropy_bound")
    run = run_of(entropy, ceiling, bound)
    layers, heads = probe_figures(run, entropy)
    assert (layers.title, heads.title) == (
        "Attention entropy, share of its ceiling, mean over heads", "Attention entropy, nats, by head",
    )  # fmt: skip
    assert "100 %" in layers.svg
    assert [text for text, _, _ in heads.legend][-2:] == ["ceiling", "lower bound, of the lowest head"]
    assert heads.svg.count("stroke-dasharray") == 4  # ceiling and bound in each of two panels
    assert {"layer 0", "layer 1"} <= set(re.findall(r">([^<>]+)</text>", heads.svg))
    assert [it.name for it in run.drawn_probes()] == ["attention_entropy"]
    np.testing.assert_array_equal(share_of(entropy, np.full((8, 5), 2.0)).values, np.full((8, 5), 0.5))


def test_many_layers_and_heads_stay_bounded_and_what_is_left_out_is_said_and_mapped():
    noise = np.random.default_rng(0)
    values = noise.uniform(1, 2, size=(40 * 20, 300))
    values[17 * 20 + 3, 100] = 0.0  # the most worrying
    values[33 * 20 + 19, 7] = NAN
    many = probe(values, layers=40)
    layers, heads, every = probe_figures(run_of(many), many)
    assert len(heads.svg) < 200_000
    assert len(every.svg) < 500_000
    assert f"{PANELS} of 40 layers are shown, those with the lowest or non-finite values" in heads.caption
    assert f"Of up to 20 heads a layer the {LINES} with the lowest or non-finite values have a line." in heads.caption
    assert {"layer 17", "layer 33"} <= set(re.findall(r">([^<>]+)</text>", heads.svg))
    assert ("not finite: 1", "cross") in [(text, mark) for text, _, mark in heads.legend]
    assert "range of all heads" in [text for text, _, _ in heads.legend]
    assert every.title.endswith("every head")
    assert layers.title.endswith("mean over heads")


def test_the_most_worrying_rows_get_the_lines_in_model_order():
    many = probe(np.zeros((3 * PANELS, 1)), layers=3 * PANELS)
    concern = np.zeros(3 * PANELS)
    concern[[30, 2]] = 1.0, math.inf
    chosen = chosen_layers(many, concern)
    assert len(chosen) == PANELS
    assert chosen == sorted(chosen, key=many.layers.index)
    assert {"blocks.30", "blocks.2"} <= set(chosen)
    wide = probe(np.zeros((3 * LINES, 1)), layers=1)
    concern = -np.arange(3.0 * LINES)
    assert chosen_rows(wide, "blocks.0", concern) == list(range(LINES))
    assert chosen_rows(wide, "blocks.0", -concern) == list(range(2 * LINES, 3 * LINES))


@pytest.mark.parametrize("value", [NAN, 0.0, -1.0, 1e308, 5e-324])
@pytest.mark.parametrize("name", ["attention_entropy", "my_probe"])
def test_panels_are_drawn_whatever_the_values(name, value):
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.full((4, 3), value)
        chart = small_multiples("t", probe(values, layers=2, name=name), quantity_of(name), last_step=20)
        values[0] = 1.0, NAN, 2.0
        assert "<svg" in small_multiples("t", probe(values, 2, name), quantity_of(name), last_step=20).svg
    assert ("not finite: 12" in [text for text, _, _ in chart.legend]) == math.isnan(value)


def test_layers_count_upwards_within_their_kind():
    found = model_order(["encoder.10.attention", "encoder.2.attention", "decoder.1", "decoder.0", "head"])
    assert found == ["encoder.2.attention", "encoder.10.attention", "decoder.0", "decoder.1", "head"]
    assert place_names(found[:2]) == ["layer 2", "layer 10"]


def test_the_table_of_quantities_is_whole():
    for name, quantity in QUANTITIES.items():
        assert quantity.group in GROUPS
        assert quantity.explanation.endswith("."), name
        assert {quantity.ceiling, quantity.floor} <= {None, *QUANTITIES}
    assert quantity_of("own").heading == "Own"


def test_the_trouble_is_marked_on_the_loss_and_told_with_its_lead(tmp_path):
    folder = write_run(tmp_path / "run", nan_from=260, ending="stop", collapse=(2, 1, 120))
    run = read_run(folder)
    found = first_trouble(run)
    assert found is not None
    assert found.loss is not None
    lead = found.loss.step - 120
    assert [(mark.step, mark.text) for mark in trouble_marks(found)] == [
        (120, "step 120: entropy collapse, layer 2, head 1"),
        (found.loss.step, f"step {found.loss.step}: {found.loss.words}"),
    ]
    html = write_report(folder).read_text()
    assert "step 120: entropy collapse, layer 2, head 1</text>" in html
    assert (
        f"head 1 of encoder.blocks.2.attention has attention entropy below a tenth of its ceiling, {lead} steps" in html
    )
    assert trouble_marks(None) == []


def test_every_group_of_probes_has_its_part_of_the_page_and_its_worst_places(tmp_path):
    writer = RunWriter(tmp_path / "run")
    probes = ("stable_rank/a", "update_ratio/a", "my_own/a", "attention_logit_max/b/0", "attention_logit_max/b/1",
              "rank_residual/a", "rank_residual/b")  # fmt: skip
    for step in (0, 10):
        writer.log(step, {"train/loss": 1.0})
        writer.probe(step, {f"diag/{place}": 0.5 + number for number, place in enumerate(probes)})
    writer.close()
    html = write_report(tmp_path / "run").read_text()
    assert [group for group in re.findall(r"<h2>(.*?)</h2>", html) if group in GROUPS] == list(GROUPS)
    assert quantity_of("stable_rank").explanation in html
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]
    assert ["Largest attention logit, high", "b", "1", "4.5", "10", "4.5"] in cells
    assert ["Rank residual, low", "a", "", "5.5", "10", "5.5"] in cells

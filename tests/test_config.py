from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer import config
from tameformer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings."""

    kind: Literal["a", "b"] = "a"
    """Which kind."""
    rate: float = 1e-3
    """The rate."""
    pair: tuple[float, float] = (0.9, 0.99)
    """Two numbers."""

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer settings."""

    seed: int = 0
    """The seed."""
    max_steps: int | None = None
    """Steps."""
    names: tuple[str, ...] = ()
    """Some names."""
    inner: Inner = field(default_factory=Inner)
    """The inner settings."""


BASE = Outer(max_steps=7, inner=Inner(rate=0.5))


def test_what_is_not_given_comes_from_the_base():
    parsed = config.parse(Outer, ["--inner.kind=b", "--names", "[x,y]"], base=BASE, prog="test")
    assert parsed == Outer(max_steps=7, names=("x", "y"), inner=Inner(kind="b", rate=0.5))
    assert config.build(Outer, {"inner": {"kind": "b"}, "names": ["x", "y"]}, base=BASE) == parsed
    assert config.build(Outer, {"inner.kind": "b", "names": ["x", "y"]}, base=BASE) == parsed


@given(
    seed=st.integers(-(2**53), 2**53),
    max_steps=st.none() | st.integers(1, 10**9),
    names=st.lists(st.text(max_size=20)),
    rate=st.floats(1e-300, 1e300),
)
def test_yaml_round_trip(tmp_path_factory, seed, max_steps, names, rate):
    given_config = Outer(seed=seed, max_steps=max_steps, names=tuple(names), inner=Inner(rate=rate))
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(config.to_yaml(given_config), encoding="utf-8")
    assert config.build(Outer, config.read_yaml(path)) == given_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sede=1"], "unknown key sede; did you mean seed?"),
        (["--inner.rat=1"], "did you mean inner.rate?"),
        (["--rate=1"], "did you mean inner.rate?"),
        (["--inner=1"], "inner is a section, not a value; set one of its keys, such as inner.kind"),
        (["--inner.kind=c"], "inner.kind expects one of a, b, got c"),
        (["--max_steps=ten"], "max_steps expects int or null, got ten"),
        (["--seed=1.5"], "seed expects int, got 1.5"),
        (["--inner.pair=[1,2,3]"], "inner.pair expects a list of 2 x float"),
        (["--inner.rate=-1"], "rate must be positive, got -1"),
        (["stray"], "stray"),
    ],
)
def test_bad_arguments_are_refused_with_key_value_and_remedy(arguments, message):
    with pytest.raises(ConfigError) as error:
        config.parse(Outer, arguments, base=BASE, prog="test")
    assert message in str(error.value)


def test_scientific_notation_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("inner: {rate: 3e-4}\n")
    assert config.build(Outer, config.read_yaml(tmp_path / "c.yaml")).inner.rate == 3e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch hacked']", "is not plain YAML"),
        ("- a\n- b", "must hold keys and values"),
        ("a: [", "is not plain YAML"),
        ("1: 2", "must hold keys and values"),
    ],
)
def test_files_that_are_not_plain_mappings_are_refused(tmp_path, text, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read_yaml(tmp_path / "c.yaml")
    assert not (tmp_path / "hacked").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        config.read_yaml(tmp_path / "nowhere.yaml")


@dataclass(frozen=True, kw_only=True)
class Wide:
    """One member of a union."""

    architecture: Literal["wide"] = "wide"
    """Which architecture this is."""
    dim: int = 8
    """Width."""
    look: Literal["a", "b"] = "a"
    """A choice that the other has, too, with other values."""
    heads: int = 2
    """What the other has not."""


@dataclass(frozen=True, kw_only=True)
class Deep:
    """The other member, which answers to two names."""

    architecture: Literal["deep", "deeper"] = "deep"
    """Which architecture this is."""
    dim: int = 4
    """Width."""
    look: Literal["b", "c"] = "c"
    """A choice."""
    layers: int = 3
    """How many layers it has."""


@dataclass(frozen=True, kw_only=True)
class Either:
    """Settings with a union."""

    seed: int = 0
    """The seed."""
    model: Wide | Deep = field(default_factory=Wide)
    """One of two."""


def test_a_union_is_chosen_by_its_architecture():
    assert config.build(Either, {}) == Either()
    assert config.build(Either, {"model": {"architecture": "deeper"}}).model == Deep(architecture="deeper")
    base = Either(seed=3, model=Wide(dim=16, look="b", heads=4))
    kept = Either(seed=3, model=Deep(dim=16, look="b", layers=5))
    assert config.build(Either, {"model.architecture": "deep", "model.layers": 5}, base=base) == kept
    for arguments in (
        ["--model.architecture=deep", "--model.layers=5"],
        ["--model.layers", "5", "--model.architecture", "deep"],
    ):
        assert config.parse(Either, arguments, base=base, prog="test") == kept
    # What does not fit the other member is left out, and staying with one keeps all of it.
    assert config.build(Either, {"model.architecture": "deep"}, base=Either(model=Wide(look="a"))).model.look == "c"
    assert config.build(Either, {"seed": 1}, base=base) == Either(seed=1, model=base.model)
    assert config.build(Either, {"model.layers": 9}, base=kept).model == Deep(dim=16, look="b", layers=9)


def test_a_union_round_trips_and_knows_the_keys_of_all_its_members(tmp_path):
    made = Either(model=Deep(architecture="deeper", layers=9))
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(made))
    assert config.build(Either, config.read_yaml(path)) == made
    kinds = config.field_types(Either)
    assert {"model.heads", "model.layers"} < set(kinds)
    assert config.type_name(kinds["model.architecture"]) == "one of wide, deep, deeper"


def test_a_union_refuses_unknown_members_and_keys_of_the_other_member():
    with pytest.raises(ConfigError, match=r"model\.architecture must be one of wide, deep, deeper, got tall"):
        config.parse(Either, ["--model.architecture", "tall"], base=Either(), prog="test")
    with pytest.raises(ConfigError, match=r"unknown key model\.layers; did you mean"):
        config.build(Either, {"model.layers": 5}, base=Either())
    with pytest.raises(ConfigError, match=r"model\.look expects one of b, c, got a"):
        config.build(Either, {"model.architecture": "deep", "model.look": "a"}, base=Either())


def test_the_help_tells_the_keys_of_the_member_chosen(capsys):
    with pytest.raises(SystemExit):
        config.parse(Either, ["--model.architecture=deep", "--help"], base=Either(), prog="test")
    shown = capsys.readouterr().out
    assert "How many layers it has" in shown
    assert "The seed" in shown
    assert "heads" not in shown

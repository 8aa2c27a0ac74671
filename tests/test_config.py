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

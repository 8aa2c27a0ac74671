"""What the README shows runs as shown."""

import re
import shlex
from pathlib import Path

import pytest

import tameformer
from tameformer.cli import train as train_command
from tameformer.cli.__main__ import COMMANDS
from tameformer.recipes import catalogue

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands() -> list[list[str]]:
    lines = [line.partition(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if " train" in line or line.startswith("tame ")]
    return [words[words.index("tameformer.cli") + 1 :] if "torchrun" in words else words[1:] for words in found]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, see, stabilize = blocks("python")
    exec(compile(train, "README.md", "exec"), {})
    accuracy, report = capsys.readouterr().out.split()
    assert float(accuracy) > 0.5
    assert Path(report).is_file()
    exec(compile(see, "README.md", "exec"), {})
    assert "Attention heads" in capsys.readouterr().out
    assert (tmp_path / "runs/mine/probes.jsonl").is_file()
    exec(compile(stabilize, "README.md", "exec"), {})
    assert capsys.readouterr().out == "layers.0.self_attn.in_proj_weight\n"


@pytest.mark.parametrize(
    "page",
    [
        "attention.md",
        "byte_pairs.md",
        "compare.md",
        "export.md",
        "finetuning.md",
        "guard.md",
        "probes.md",
        "race.md",
        "stabilizers.md",
        "verdicts.md",
    ],
)
def test_the_python_of_the_documentation_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert found
    for source in found:
        exec(compile(source, page, "exec"), {})


@pytest.mark.parametrize("words", [words for words in commands() if words[0] != "train"], ids=" ".join)
def test_other_commands_of_the_readme_exist(words):
    assert words[0] in COMMANDS


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "train"], ids=" ".join)
def test_train_commands_of_the_readme_parse(words):
    _, rest = train_command._own_options(words[1:])
    name = rest.pop(0) if rest and not rest[0].startswith("-") else catalogue.DEFAULT
    assert catalogue.parse(name, rest).name == Path(name).stem


@pytest.mark.parametrize("name", sorted(catalogue.names()))
def test_every_recipe_is_complete_and_says_what_it_is(name):
    recipe = catalogue.resolve(name)
    assert recipe.build is not None
    assert len(catalogue.names()[name]) > 20


def test_every_public_name_is_in_the_readme():
    missing = [name for name in tameformer.__all__ if f"tame.{name}" not in README]
    assert not missing


def test_every_package_is_on_the_map():
    packages = [path.name for path in (ROOT / "src/tameformer").iterdir() if (path / "__init__.py").is_file()]
    assert [name for name in packages if f"      {name}/" not in README] == []

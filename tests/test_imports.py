"""The direction of imports is a test: the house stays one-way."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]


def test_imports_go_one_way(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)  # it would silence our loggers from here on
    assert lint_imports(config_filename="pyproject.toml", cache_dir=None) == EXIT_STATUS_SUCCESS


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in answer.stdout.split()}


@pytest.mark.parametrize("module", ["tameformer", "tameformer.config", "tameformer.record", "tameformer.cli.__main__"])
def test_does_not_load_torch(module):
    assert "torch" not in _modules_after(f"import {module}")


def test_the_report_does_not_load_torch():
    assert "torch" not in _modules_after("import tameformer.report, tameformer.cli.report")


# What a machine offers on which only training runs; the rest is imported at the point of use.
_NOT_NEEDED = ("jsonargparse", "datasets", "sacrebleu", "tokenizers", "transformers", "beartype", "sklearn")


def test_the_library_imports_without_the_optional_packages():
    loaded = _modules_after(
        "import tameformer.recipes.launch, tameformer.recipes.vision, tameformer.recipes.translation"
    )
    assert not loaded & set(_NOT_NEEDED)


def test_the_library_works_without_the_package_that_checks_shapes():
    """Machines for training have torch and its like, and run this from a checkout."""
    code = """
import pkgutil, sys
sys.modules["jaxtyping"] = None
import tameformer as tame, torch
for package in pkgutil.iter_modules(tame.__path__, "tameformer."):
    __import__(package.name)
query = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
print(tame.attention_entropy(query, 0 * query).mean().item())
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(answer.stdout) == pytest.approx(math.log(4), abs=1e-6)

"""Files that somebody else made: nothing in them is run, none reaches outside the run folder."""

import json
import os
import pickle

import pytest

from tameformer.cli.__main__ import main
from tameformer.record import BEST, LATEST
from tameformer.training import CheckpointFolder
from tameformer.training import checkpoint as checkpoints_on_disk

pytestmark = pytest.mark.usefixtures("unreported")
WORDS = [
    "--max_steps=4",
    "--data.batch_size=24",
    "--model.dim=16",
    "--model.num_layers=1",
    "--loop.eval_steps=4",
    "--checkpoint.every=2",
    "--precision=fp32",
]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run in the present folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *WORDS, "--output_dir=run"]) == 0
    return tmp_path / "run"


def sign(checkpoint):
    """A manifest that fits what is there: whoever forges files forges that, too."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json")
    manifest = {"step": 4, "files": {path.name: checkpoints_on_disk._fingerprint(path) for path in files}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_never_run(run, name, capsys):
    newest = CheckpointFolder(run).path(4)
    (newest / name).write_bytes(pickle.dumps(Bomb()))
    sign(newest)
    assert main(["train", *WORDS, "--output_dir=run", "--resume=auto"]) == 1
    told = capsys.readouterr().err
    assert "step-000004" in told
    assert name in told
    assert not (run.parent / "exploded").exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "sub/model.safetensors"])
def test_a_manifest_cannot_name_what_lies_outside(run, name):
    newest = CheckpointFolder(run).path(4)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    found, skipped = CheckpointFolder(run).newest_verified()
    assert found == CheckpointFolder(run).path(2)
    assert skipped == [f"step-000004 is not trusted: its manifest.json names {name!r}, outside its folder"]


def test_a_link_in_a_checkpoint_is_not_followed(run):
    newest = CheckpointFolder(run).path(4)
    outside = run.parent / "outside.safetensors"
    (newest / "model.safetensors").rename(outside)
    (newest / "model.safetensors").symlink_to(outside)
    found, skipped = CheckpointFolder(run).newest_verified()
    assert found == CheckpointFolder(run).path(2)
    assert skipped == ["step-000004 is not trusted: model.safetensors is a link"]


@pytest.mark.parametrize("target", ["../../outside", "/tmp", ".."])
def test_pointers_out_of_the_folder_point_at_nothing(run, target, capsys):
    for pointer in (LATEST, BEST):
        (run / pointer).write_text(f"{target}\n")
    assert main(["export", "run", "exported", "--best"]) == 1
    assert "checkpoint" in capsys.readouterr().err
    assert not (run.parent / "exported").exists()
    (run.parent / "outside").mkdir()
    assert main(["train", *WORDS, "--output_dir=run", "--resume=auto"]) == 0
    assert (run.parent / "outside").is_dir()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [exploded]", "!!python/name:os.system", "!custom x"])
def test_a_recipe_with_tags_is_refused(tmp_path, monkeypatch, capsys, tag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"task: vision\nseed: {tag}\n")
    assert main(["train", "recipe.yaml", "--output_dir=run"]) == 2
    assert "is not plain YAML" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_run_folders_configuration_with_tags_is_refused(run, capsys):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: !!python/object/apply:os.mkdir [exploded]", 1))
    assert main(["train", *WORDS, "--output_dir=run", "--resume=auto"]) == 2
    assert "is not plain YAML" in capsys.readouterr().err
    assert not (run.parent / "exploded").exists()

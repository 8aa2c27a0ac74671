import errno
import json
import os
import pickle

import pytest
import torch
from torch import nn

from tameformer.errors import CheckpointError
from tameformer.optim import OptimConfig, optimizers
from tameformer.record import BEST, LATEST
from tameformer.training import CheckpointFolder, Snapshot
from tameformer.training import checkpoint as module
from tameformer.training.checkpoint import (
    load,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    verify,
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("constant", torch.arange(3.0))

    def forward(self, tokens):
        return self.head(torch.relu(self.hidden(self.embedding(tokens))))


def trained(name="adamw", steps=3, seed=0):
    torch.manual_seed(seed)
    model = Tied()
    held = optimizers(model, OptimConfig(name=name, peak_lr=0.01))
    step(model, held, steps)
    return model, held


def step(model, held, steps=1):
    for _ in range(steps):
        nn.functional.cross_entropy(model(torch.arange(6)), torch.arange(6).flip(0)).backward()
        for optimizer in held:
            optimizer.step()
            optimizer.zero_grad()


def snapshot(model, held):
    return Snapshot(model_tensors(model), optimizer_tensors(held, model), state={"step": 3})


@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "stable_adamw", "sgd", "lars", "muon"])
def test_restored_model_and_optimizer_go_on_with_the_same_bits(tmp_path, name):
    model, held = trained(name)
    path = CheckpointFolder(tmp_path).save(3, snapshot(model, held))
    other, other_held = trained(name, steps=1, seed=9)
    restored = load(path)
    load_model_tensors(other, restored.model)
    load_optimizer_tensors(other_held, other, restored.optimizer)
    step(model, held, 2)
    step(other, other_held, 2)
    for (name_of, one), other_one in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, other_one), name_of


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model, held = trained()
    assert "head.weight" not in model_tensors(model)
    path = CheckpointFolder(tmp_path).save(3, snapshot(model, held))
    other = Tied()
    load_model_tensors(other, load(path).model)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_every_mismatch_is_named():
    tensors = model_tensors(Tied())
    tensors["hidden.weight"] = torch.zeros(5, 4)
    tensors["stranger"] = torch.zeros(1)
    del tensors["constant"]
    with pytest.raises(CheckpointError) as error:
        load_model_tensors(Tied(), tensors)
    for part in (
        "hidden.weight has shape (5, 4) in the checkpoint and (4, 4)",
        "stranger is not part",
        "constant is missing",
    ):
        assert part in str(error.value)


def test_keeps_the_last_k_and_the_best(tmp_path):
    folder, content = CheckpointFolder(tmp_path, keep_last=2), snapshot(*trained())
    for number in (1, 2, 3, 4, 5):
        folder.save(number, content, best=number == 2)
    assert folder.steps() == [2, 4, 5]
    assert (tmp_path / LATEST).read_text() == "step-000005\n"
    assert (tmp_path / BEST).read_text() == "step-000002\n"


def flip_a_byte(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def truncate(path):
    with open(path / "optimizer.safetensors", "r+b") as file:
        file.truncate(10)


def remove_manifest(path):
    (path / "manifest.json").unlink()


def remove_weights(path):
    (path / "model.safetensors").unlink()


def empty_manifest(path):
    (path / "manifest.json").write_text('{"files": {}}')


def broken_state(path):
    (path / "state.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [flip_a_byte, truncate, remove_manifest, remove_weights, empty_manifest, broken_state]
)
def test_damage_is_found_named_and_the_older_checkpoint_taken(tmp_path, damage):
    folder, content = CheckpointFolder(tmp_path), snapshot(*trained())
    folder.save(1, content)
    damage(folder.save(2, content))
    found, skipped = folder.newest_verified()
    assert found == folder.path(1)
    assert len(skipped) == 1
    assert "step-000002" in skipped[0]
    with pytest.raises(CheckpointError, match="step-000002"):
        load(folder.path(2))


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    path = CheckpointFolder(tmp_path).save(1, snapshot(*trained()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../outside"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_offered_as_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = CheckpointFolder(tmp_path)
    path = folder.save(1, snapshot(*trained()))
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = module._fingerprint(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds no tensors"):
        load(path)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_older_checkpoint_and_no_remains(tmp_path, monkeypatch):
    folder, content = CheckpointFolder(tmp_path), snapshot(*trained())
    folder.save(1, content)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(OSError, match=r"checkpoint of step 2 was not written: .*No space left"):
        folder.save(2, content)
    assert [path.name for path in folder.folder.iterdir()] == ["step-000001"]
    assert (tmp_path / LATEST).read_text() == "step-000001\n"


def test_remains_of_a_killed_save_are_no_checkpoint_and_go_with_the_next_save(tmp_path):
    folder, content = CheckpointFolder(tmp_path), snapshot(*trained())
    remains = folder.folder / ".step-000001-4242"
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    assert folder.newest_verified() == (None, [])
    folder.save(2, content)
    assert not remains.exists()

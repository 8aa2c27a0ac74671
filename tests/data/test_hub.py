import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tameformer.data import SampleKeys
from tameformer.data.sources import hub_images
from tameformer.data.sources.hub import hub_answers
from tameformer.errors import DataError

pytest.importorskip("PIL", reason="extra vision is not installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="extra data is not installed")
    path = tmp_path_factory.mktemp("hub")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    image_module = pytest.importorskip("PIL.Image")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [image_module.fromarray(image) for image in pixels], "label": [0, 1, 0, 1, 1, 0]}
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": train, "test": train.select(range(2))}).save_to_disk(path / "both")
    train.save_to_disk(path / "one")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(path / "text")
    datasets.Dataset.from_dict({"image": [[[0]]], "label": ["cat"]}).save_to_disk(path / "words")
    hidden = datasets.Dataset.from_dict({"image": [[[0]], [[0]]], "label": [0, -1]})
    hidden.save_to_disk(path / "hidden")
    return path, pixels


def test_a_saved_folder(saved):
    path, pixels = saved
    source = hub_images(str(path / "both"), size=8)
    assert (len(source), source.num_classes, source.class_names) == (6, 2, ("cat", "dog"))
    batch = source.fetch(SampleKeys(0, 0, np.array([4, 0])))
    assert batch["labels"].tolist() == [1, 0]
    np.testing.assert_allclose(batch["images"].numpy(), pixels[[4, 0]].transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert len(hub_images(str(path / "both"), "test", size=8, like=source)) == 2
    assert len(hub_images(str(path / "one"), size=8)) == 6


def test_bad_data_sets_are_refused(saved):
    path, _ = saved
    with pytest.raises(DataError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        hub_images(str(path / "both"), "dev", size=8)
    with pytest.raises(DataError, match="one holds one split"):
        hub_images(str(path / "one"), "test", size=8)
    with pytest.raises(DataError, match=r"no column 'image' or 'img' .*it has \['text', 'label'\]"):
        hub_images(str(path / "text"), size=8)
    with pytest.raises(DataError, match=r"column 'label' .*not class numbers; encode it"):
        hub_images(str(path / "words"), size=8)
    with pytest.raises(DataError, match=r"label -1 of sample 1 is outside 0..0; drop unlabelled"):
        hub_images(str(path / "hidden"), size=8)
    with pytest.raises(DataError, match="neither a folder nor a name on the hub"):
        hub_images("/no/such/folder", size=8)


def test_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        DataError, match=r"owner/name is no folder here, .* write it with save_to_disk, and give that folder"
    ):
        hub_images("owner/name", size=8)


def test_an_unreachable_hub_is_told_within_two_seconds(tmp_path):
    code = """
import sys
sys.modules["datasets"] = None  # its import alone takes a second: it must not be needed
import time
from tameformer.data.sources import hub_images
begin = time.perf_counter()
try:
    hub_images("owner/name", size=8)
except Exception as error:
    print(type(error).__name__, time.perf_counter() - begin)
"""
    hidden = ("https_proxy", "HTTPS_PROXY", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE")
    silent = {name: value for name, value in os.environ.items() if name not in hidden}
    silent |= {"HF_ENDPOINT": "http://192.0.2.1", "HF_HOME": str(tmp_path)}  # an address that never answers (RFC 5737)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=silent)
    name, seconds = run.stdout.split()
    assert name == "DataError"
    assert float(seconds) < 2


def test_a_refused_connection_is_no_answer(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.perf_counter()
    assert not hub_answers(1.0)
    assert time.perf_counter() - begin < 1.5

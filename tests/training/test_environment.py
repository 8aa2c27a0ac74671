import os
import shutil
import subprocess

import pytest

from tameformer.training.environment import _commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_to_look_at_a_repository_writes_nothing_into_it(tmp_path):
    file = tmp_path / "environment.py"
    file.write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    before = (tmp_path / ".git" / "index").read_bytes()
    os.utime(file, (1, 1))  # `git status` would note the new time
    found = _commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == before

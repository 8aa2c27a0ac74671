import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
WRITTEN = ["out/tame/probes.jsonl", "tame/probes.jsonl", "runs/my-run"]


@pytest.mark.parametrize(("block", "written"), list(zip(BLOCKS, WRITTEN, strict=True)), ids=WRITTEN)
def test_the_python_of_the_document_runs(block, written, tmp_path):
    # A process of its own, as the reader has it: these trainers set up signals, loggers and warnings.
    answer = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / written).exists()

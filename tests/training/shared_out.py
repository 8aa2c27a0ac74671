"""One of two processes that train runs with whole weights (DDP) and with weights shared out (FSDP2).

`torchrun --nproc_per_node 2 shared_out.py FOLDER RUNS`: called by `test_sharding.py`; RUNS is JSON, from the name of the run
folder to [recipe, settings].
"""

import json
import sys
from pathlib import Path


def main(folder: Path, runs: dict) -> None:
    import torch

    from tameformer import train
    from tameformer.training.engine import leave

    torch.set_num_threads(1)
    for name, (recipe, settings) in runs.items():
        train(recipe, overrides={**settings, "output_dir": str(folder / name)}, resume="auto")
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

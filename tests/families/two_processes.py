"""One of two processes that train families under DDP and FSDP2; the first watches, as a monitor does, and writes what it read.

`python two_processes.py RANK FOLDER NAME...`: called by `test_settings.py`.
"""

import json
import sys
from pathlib import Path


def main(rank: int, folder: Path, names: list[str]) -> None:
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
    from zoo import FAMILIES, attention_alone, run_steps

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def sharded(model, family):
        for layers in family.layers:
            for name in layers.names():
                fully_shard(model.get_submodule(name), mesh=mesh)
        return fully_shard(model, mesh=mesh)

    wrap = {"ddp": lambda model, family: DistributedDataParallel(model), "fsdp": sharded}
    for name in names:
        family = FAMILIES[name]
        inputs = family.inputs()
        half = {key: value[rank : rank + 1] for key, value in inputs.items()}
        # Without dropout, and with the same batch in both processes, the mean gradient is that of a single one.
        single = run_steps(family.model().eval(), inputs, watched=True, steps=2)
        for kind, wrapped in wrap.items():
            dropout = [
                run_steps(wrapped(family.model(), family), half, watched=watched) for watched in (False, rank == 0)
            ]
            narrow = run_steps(wrapped(family.model(), family), half, watched=rank == 0, probes=attention_alone)
            values = run_steps(wrapped(family.model().eval(), family), inputs, watched=rank == 0, steps=2)
            found = {
                "same": dropout[0].same_run(dropout[1]) and dropout[0].same_run(narrow),
                "narrow": list(narrow.readings.get(4, {})),
                "unseen": values.unseen,
                "values": {key: value.tolist() for key, value in values.readings.get(2, {}).items()},
                "single": {key: value.tolist() for key, value in single.readings[2].items()},
            }
            (folder / f"{name}-{kind}-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

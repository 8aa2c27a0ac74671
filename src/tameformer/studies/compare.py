"""Runs side by side over a grid of settings and seeds: what a method gains, and how wide a range of rates it stands."""

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tameformer import config as configuration
from tameformer.errors import ConfigError
from tameformer.recipes import catalogue
from tameformer.record import write_atomically
from tameformer.studies.cells import EXIT, state_of, try_lock
from tameformer.studies.grid import Cell, Grid, make_grid
from tameformer.studies.results import LOSS, USABLE, Results, read_results
from tameformer.studies.shared import open_queue
from tameformer.studies.workers import Queue, Running, places, train_command, work
from tameformer.studies.write import write_results
from tameformer.training.signals import StopRequest

GRID, PAGE = "grid.json", "compare.html"


def compare(
    recipe: str,
    *,
    vary: Mapping[str, Sequence[Any]],
    seeds: int | Sequence[int] = 3,
    overrides: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    jobs: int | None = None,
    metric: str = LOSS,
    usable: float = USABLE,
    retry_failed: bool = False,
    storage: str | None = None,
) -> Results:
    """Train a recipe over a grid of settings and seeds, several runs at a time, and compare what they reach.

    Called again, it goes on: finished runs are read, interrupted ones resumed, and values and seeds may be added.

    Args:
        recipe: A name that `tame recipes` lists, or the path of a YAML file.
        vary: Keys, and the values each takes; the first value is what the others are compared with. For `stabilize` a
            value is a method, several joined by `+`, or `none`.
        seeds: How many (0, 1, ...), or which. All variants see the same data in the same order from the same start.
        overrides: Changes that all runs share.
        output_dir: Where the run folders and the results go; None takes runs/compare-RECIPE.
        jobs: Runs at a time; None runs one a GPU, or one a core.
        metric: What is compared, such as `eval/accuracy`.
        usable: Share of what training can gain that a usable rate may miss.
        retry_failed: Run those again that failed; without it they stay as they are.
        storage: A database that shares the work with other machines which call the same on a disk they share, such as
            `sqlite:////shared/study.db` or `postgresql://user@host/study`; needs the extra `sweep`.

    Returns:
        The results; `compare.html`, `compare.json` and `compare.csv` in the folder hold them, too.

    Raises:
        ConfigError: Unknown key or bad value in any cell, or a folder that belongs to another comparison.

    Example:
        >>> import tempfile
        >>> found = compare(
        ...     "vit-digits",
        ...     vary={"model.dim": [8]},
        ...     seeds=1,
        ...     overrides={"max_steps": 2, "data.batch_size": 300},
        ...     output_dir=tempfile.mkdtemp(),
        ... )
        >>> [(row.choices[0].label, row.count("finished")) for row in found.rows]
        [('8', 1)]
    """
    check_question(metric, usable)
    arguments = [f"--{key}={as_argument(value)}" for key, value in configuration.flatten(overrides or {}).items()]
    grid = make_grid(recipe, arguments, vary, range(seeds) if isinstance(seeds, int) else seeds)
    folder = default_folder(recipe) if output_dir is None else Path(output_dir)
    with StopRequest() as stop:
        run_grid(grid, folder, jobs=jobs, retry_failed=retry_failed, queue=queue_for(storage), stop=stop)
    return conclude(folder, grid, metric=metric, usable=usable)


def check_question(metric: str, usable: float) -> None:
    """Refuse what could only be found out after all runs.

    Raises:
        ConfigError: The metric is none of a run's, or the tolerance is not a share.
    """
    if not metric.startswith(("eval/", "test/", "train/")):
        raise ConfigError(f"metric must begin with eval/, test/ or train/, got {metric}; did you mean eval/{metric}?")
    if not 0 <= usable < 1:
        raise ConfigError(f"usable must be a share of the gain in [0, 1), got {usable}")


def as_argument(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def default_folder(recipe: str) -> Path:
    """Where a comparison goes that was given no folder."""
    return Path("runs") / f"compare-{Path(recipe).stem}"


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    jobs: int | None,
    retry_failed: bool,
    queue: Callable[[Path, str, Grid], Queue],
    stop: StopRequest,
    on_change: Callable[[Sequence[Running]], None] = lambda running: None,
) -> None:
    """Run what is left of a grid.

    Raises:
        ConfigError: The folder belongs to another comparison.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    key = claim_folder(grid, folder)
    if retry_failed:
        forget_failures(grid.cells, folder)
    build = train_command(grid.recipe, grid.arguments)
    work(
        queue(folder, key, grid),
        folder,
        lambda cell: build(folder, cell),
        places(jobs, num_gpus=num_gpus()),
        stop_requested=lambda: stop.signal_number is not None,
        on_change=on_change,
    )


def queue_for(storage: str | None) -> Callable[[Path, str, Grid], Queue]:
    """Who works on what, from the folder, its key and the grid."""
    return lambda folder, key, grid: open_queue(storage, folder, key, grid.cells)


def conclude(folder: Path, grid: Grid, *, metric: str, usable: float) -> Results:
    """Read all cells, and write the results beside them."""
    results = read_results(folder, grid, metric=metric, tolerance=usable)
    write_results(results)
    from tameformer.studies.page import (
        write_page,
    )  # here: matplotlib takes as long to import as the first cell to start

    write_page(results, PAGE)
    return results


def num_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def claim_folder(grid: Grid, folder: Path, *, study: str = "comparison") -> str:
    """Make the folder this study's, or see that it is: values and seeds may be added, nothing else may differ.

    Args:
        grid: The runs.
        folder: Where they go.
        study: What kind of study it is.

    Returns:
        What tells this folder from every other one.

    Raises:
        ConfigError: It belongs to another comparison, or holds something else.
    """
    base = catalogue.parse(grid.recipe, list(grid.arguments))
    described = {
        **({} if study == "comparison" else {"study": study}),
        "recipe": grid.recipe,
        "arguments": list(grid.arguments),
        "vary": {factor.key: [choice.label for choice in factor.choices] for factor in grid.factors},
        "seeds": list(grid.seeds),
        "config": {"task": base.task, **_without_the_varied(asdict(base.config), grid)},
    }
    path = folder / GRID
    if not path.is_file():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ConfigError(f"{folder} holds something else; give an --output_dir that is new or a comparison's")
        folder.mkdir(parents=True, exist_ok=True)
        _write_once(path, _as_json({"key": uuid.uuid4().hex, **described}))
    old = json.loads(path.read_text(encoding="utf-8"))  # perhaps written by another worker just now
    _check_growth(old, described, folder)
    key = old.get("key") or uuid.uuid4().hex
    if old != {"key": key, **described}:
        write_atomically(path, _as_json({"key": key, **described}))
    return key


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write_once(path: Path, text: str) -> None:
    """Write a file whole, unless another process was faster: the first one's stays."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    write_atomically(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _without_the_varied(config: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    varied = {"seed", "output_dir", *(factor.key for factor in grid.factors)}
    flat = configuration.flatten(config)
    # As JSON gives it back: no tuples.
    return json.loads(json.dumps({key: value for key, value in flat.items() if key not in varied}))


def _check_growth(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    def refuse(what: str) -> None:
        raise ConfigError(
            f"{folder} belongs to another {new.get('study', 'comparison').partition(',')[0]}: {what}. "
            f"Values and seeds may be added, nothing else may change; or give another --output_dir"
        )

    for key, value in new["config"].items():
        if key in old["config"] and old["config"][key] != value:
            refuse(f"{key} was {old['config'][key]} and is {value}")
    kinds = [described.get("study", "comparison") for described in (old, new)]
    if kinds[0] != kinds[1]:
        refuse(f"it is a {kinds[0]}, and this one a {kinds[1]}")
    if list(old["vary"]) != list(new["vary"]):
        refuse(f"it varies {', '.join(old['vary']) or 'nothing'}, and this one {', '.join(new['vary']) or 'nothing'}")
    for key, labels in (*old["vary"].items(), ("seeds", old["seeds"])):
        given = new["seeds"] if key == "seeds" else new["vary"][key]
        if missing := [str(label) for label in labels if label not in given]:
            refuse(f"{key} had {', '.join(missing)}, too")


def forget_failures(cells: Sequence[Cell], folder: Path) -> None:
    """Let the cells that failed be run again."""
    for cell in cells:
        if state_of(folder / cell.name)[0] == "failed" and (lock := try_lock(folder / cell.name)) is not None:
            (folder / cell.name / EXIT).unlink()
            os.close(lock)

"""Many seeds started, judged early, and a few trained to the end: the best model that a budget affords."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tameformer import config as configuration
from tameformer.errors import ConfigError
from tameformer.recipes import catalogue
from tameformer.report.wording import direction
from tameformer.studies.cells import SETTLED, State, state_of
from tameformer.studies.compare import as_argument, check_question, claim_folder, forget_failures, num_gpus
from tameformer.studies.grid import Cell, make_grid
from tameformer.studies.race_plan import SHARE, Race, pairs, solve
from tameformer.studies.race_results import RaceResults, early_value, read_race
from tameformer.studies.shared import open_queue
from tameformer.studies.workers import Running, places, train_command, work
from tameformer.training.signals import StopRequest

PAGE = "race.html"
ORDER = "data_seed"
JUDGED: tuple[State, ...] = (*SETTLED, "paused")


def race(
    recipe: str,
    *,
    budget: float,
    vary: Mapping[str, Sequence[Any]] | None = None,
    overrides: Mapping[str, Any] | None = None,
    share: float = SHARE,
    starts: int | None = None,
    continued: int | None = None,
    metric: str | None = None,
    failed: float | None = None,
    run_all: bool = False,
    output_dir: str | Path | None = None,
    jobs: int | None = None,
    retry_failed: bool = False,
    storage: str | None = None,
) -> RaceResults:
    """Start many seeds of a recipe, stop all early, continue the best: weights and order of data each have their seeds.

    Called again, it goes on: runs are resumed where they stand, and the budget may grow.

    Args:
        recipe: A name that `tame recipes` lists, or the path of a YAML file.
        budget: What may be spent, in whole runs.
        vary: Keys and the values each takes; all take part with the same seeds.
        overrides: Changes that all runs share.
        share: Of each run after which all are judged.
        starts: Runs that start; None takes what the budget affords.
        continued: Runs that go on; None takes about half the budget.
        metric: What they are judged by; None takes the recipe's `checkpoint.best_metric`, or `eval/loss`.
        failed: A run that ends no better has failed; None takes the metric before training.
        run_all: Continue all, to see what stopping would have missed; that is beyond the budget.
        output_dir: Where the run folders and the results go; None takes runs/race-RECIPE.
        jobs: Runs at a time; None runs one a GPU, or one a core.
        retry_failed: Run those again that failed.
        storage: A database that shares the work with other machines, as in `compare`.

    Returns:
        The results; `race.html`, `race.json` and `race.csv` in the folder hold them, too.

    Raises:
        ConfigError: Unknown key or bad value, a budget that affords no race, or a folder of something else.

    Example:
        >>> import tempfile
        >>> found = race(
        ...     "vit-digits",
        ...     budget=2,
        ...     overrides={"max_steps": 4, "model.dim": 8, "data.batch_size": 300},
        ...     share=0.5,
        ...     output_dir=tempfile.mkdtemp(),
        ... )
        >>> len(found.entrants), len(found.finals), found.best is not None
        (3, 1, True)
    """
    arguments = [f"--{key}={as_argument(value)}" for key, value in configuration.flatten(overrides or {}).items()]
    planned = make_race(
        recipe, arguments, vary or {}, budget=budget, share=share, starts=starts, continued=continued, metric=metric,
        failed=failed, run_all=run_all,
    )  # fmt: skip
    folder = default_folder(recipe) if output_dir is None else Path(output_dir)
    with StopRequest() as stop:
        run_race(planned, folder, jobs=jobs, retry_failed=retry_failed, storage=storage, stop=stop)
    return conclude(planned, folder)


def make_race(
    recipe: str,
    arguments: Sequence[str],
    vary: Mapping[str, Sequence[Any]],
    *,
    budget: float,
    share: float = SHARE,
    starts: int | None = None,
    continued: int | None = None,
    metric: str | None = None,
    failed: float | None = None,
    run_all: bool = False,
) -> Race:
    """The race, with every configuration in it tried.

    Raises:
        ConfigError: As `race`.
    """
    base = catalogue.parse(recipe, list(arguments)).config
    for key, given in ((ORDER, base.data_seed), ("loop.pause_after", base.loop.pause_after)):
        if given is not None or key in vary:
            raise ConfigError(f"{key} is what a race sets itself; leave it out")
    chosen = metric or base.checkpoint.best_metric or "eval/loss"
    check_question(chosen, 0.0)
    variants = math.prod(map(len, vary.values()))
    plan = solve(budget, share=share, starts=starts, continued=continued, multiple=variants)
    found = pairs(plan.starts // variants)
    side = range(1 + max(max(pair) for pair in found))
    grid = make_grid(recipe, arguments, {**vary, ORDER: [str(number) for number in side]}, side)
    kept = base.checkpoint.best_mode if chosen == base.checkpoint.best_metric else None
    better = direction(chosen)
    if kept is None and better is None:
        raise ConfigError(
            f"{chosen} does not tell whether more is better; set checkpoint.best_metric and best_mode to it"
        )
    return Race(grid, plan, budget, chosen, kept or ("min" if better == "lower" else "max"), failed, run_all)


def default_folder(recipe: str) -> Path:
    """Where a race goes that was given no folder."""
    return Path("runs") / f"race-{Path(recipe).stem}"


def run_race(
    race: Race,
    folder: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    storage: str | None = None,
    stop: StopRequest,
    on_stage: Callable[[str, Sequence[Cell], Sequence[State]], Callable[[Sequence[Running]], None]] = (
        lambda name, cells, ends: lambda running: None
    ),
) -> None:
    """Run what is left: all to the share where they are judged, then the best to the end.

    Args:
        race: What runs.
        folder: Where.
        jobs: Runs at a time.
        retry_failed: Run those again that failed.
        storage: A database for several machines.
        stop: Asked all the time.
        on_stage: Told of each stage's name, its runs, and the states in which they are done; answers what is told of it.

    Raises:
        ConfigError: The folder belongs to something else, or to a race that judged at another share.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    key = claim_folder(race.grid, folder, study=f"race, judged at {race.plan.share:g}")
    if retry_failed:
        forget_failures(race.cells, folder)

    def stage(name: str, cells: Sequence[Cell], ends: Sequence[State], more: Sequence[str]) -> None:
        build = train_command(race.grid.recipe, [*race.grid.arguments, *more])
        work(
            open_queue(storage, folder, f"{key}-{name}", cells, ends=ends),
            folder,
            lambda cell: build(folder, cell),
            places(jobs, num_gpus=num_gpus()),
            stop_requested=lambda: stop.signal_number is not None,
            on_change=on_stage(name, cells, ends),
        )

    stage("start", race.cells, JUDGED, [f"--loop.pause_after={race.plan.share}"])
    # Whoever stands still unjudged could be among the best: nothing goes on without it.
    if stop.signal_number is None and all(state_of(folder / cell.name)[0] in JUDGED for cell in race.cells):
        stage("continue", chosen(race, folder), SETTLED, [])


def chosen(race: Race, folder: Path) -> list[Cell]:
    """The runs that go on: the best by their value when they were judged, earlier ones first where it is the same."""
    cells = race.cells
    if race.run_all:
        return list(cells)
    sign = 1.0 if race.mode == "min" else -1.0
    values = [(early_value(folder / cell.name, race.metric), place) for place, cell in enumerate(cells)]
    known = [(sign * value, place) for value, place in values if value is not None and math.isfinite(value)]
    return [cells[place] for _, place in sorted(known)[: race.plan.continued]]


def conclude(race: Race, folder: Path) -> RaceResults:
    """Read all runs, and write the results beside them."""
    results = read_race(race, folder, [cell.name for cell in chosen(race, folder)])
    from tameformer.studies.race_page import write_page  # here: matplotlib takes as long to import as a run to start
    from tameformer.studies.race_write import write_results

    write_results(results)
    write_page(results, PAGE)
    return results

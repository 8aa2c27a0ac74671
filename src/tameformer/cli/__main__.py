"""The command `tame`. Nothing heavy is imported until a command needs it, so that `--help` answers at once."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

USAGE = """\
usage: tame COMMAND ...

Train Transformers that do not fall over.

commands:
  train [RECIPE] [--a.b=value ...]   train from a recipe; without one, a vision transformer on handwritten digits
  diagnose MODEL_OR_RUN              health of a run's checkpoint or a Hugging Face folder, layer by layer
  compare RECIPE --vary a.b=1,2      the recipe over a grid of settings and seeds: table, curves, learning-rate sensitivity
  race RECIPE --budget 20            many seeds started, judged early, the best trained to the end
  report RUN [RUN ...]               one self-contained HTML page from run folders
  export RUN OUT                     an ordinary model from a run, all methods folded in: config.json, model.safetensors
  paraphrase DATA OUT                labelled texts and each in other words, by two translation runs
  methods                            what makes a model stable, one line each
  recipes                            the recipes there are, one line each

examples:
  tame train
  tame train char-lm --data.path shakespeare.txt --max_steps 500
  tame train char-lm --data.path shakespeare.txt --resume auto
  tame report runs/char-lm

`tame COMMAND --help` says more. Exit codes: 0 finished, 1 error, 2 usage, 3 diverged,
130 and 143 stopped by Ctrl-C or SIGTERM after a save.
"""
COMMANDS = {
    name: f"tameformer.cli.{name}"
    for name in ("train", "diagnose", "compare", "race", "report", "export", "paraphrase", "methods", "recipes")
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"tameformer {version('tameformer')}")
        return 0
    if given[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.0)[0]
        print(f"tame: there is no command {given[0]}; did you mean {near}? (`tame --help` lists them)", file=sys.stderr)
        return 2
    # Waiting threads that spin for long take the processor from whatever else runs, and threads that sleep at once are woken in
    # every operation. A step of the character model on two threads takes 23 ms with OpenMP's own count of spins, 28 with this
    # one and 56 with none, and beside a busy neighbour 135, 74 and 43. Read by OpenMP when torch is loaded, so it is set here.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return import_module(COMMANDS[given[0]]).main(given[1:])


if __name__ == "__main__":
    sys.exit(main())

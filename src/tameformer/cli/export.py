"""`tame export RUN OUT`: the model of a run as an ordinary one, every method folded in, without the run's data."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tameformer.errors import ConfigError, TameError

_EPILOG = """\
OUT holds config.json, model.safetensors and, where the run has them, tokenizer.json and preprocessing.json; in Python,
tameformer.load("OUT") is the model. Methods of `stabilize` are folded into plain weights; those that cannot be (peri_norm,
qk_norm, soft_cap) are named in config.json and put on again by load. OUT appears whole or not at all.
Of a run that began from a Hugging Face model OUT is a folder for from_pretrained, with its tokenizer.

Which weights: with optim.ema_decay a run evaluates the moving average of its weights, so that is what is exported; otherwise
the weights themselves. --weights says it explicitly.

examples:
  tame export runs/char-lm exported                                 the newest sound checkpoint
  tame export runs/char-lm/checkpoints/step-000500 exported         this one
  tame export runs/vit-digits exported --best --weights raw

Exit codes: 0 written, 1 error, 2 usage, 130 stopped by Ctrl-C with nothing written.
"""


def main(arguments: Sequence[str]) -> int:
    """Export, and say what was written; returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        if not options.run.exists():
            parser.error(f"{options.run} does not exist; give a run folder or one of its checkpoints")
        from tameformer.recipes.export import export  # torch is needed from here on

        done = export(options.run, options.out, weights=options.weights, best=options.best)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, FileExistsError) as error:
        return _fail(error, 2)
    except (TameError, OSError) as error:
        return _fail(error, 1)
    for sentence in done.skipped:
        print(f"passed over: {sentence}", file=sys.stderr)
    weights = "the moving average of the weights, which the run evaluated" if done.weights == "ema" else "the weights"
    methods = [
        f"{', '.join(names)} {what}" for names, what in ((done.folded, "folded in"), (done.kept, "kept")) if names
    ]
    print(f"{done.folder}: step {done.step}, {'; '.join([weights, *methods])}")
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"tame export: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tame export",
        description="Write the model of a run as an ordinary one that needs neither the run nor its data.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="ema: their moving average; raw: the weights themselves; default: ema where the run keeps one",
    )
    parser.add_argument("--best", action="store_true", help="the checkpoint named by BEST rather than the newest")
    return parser

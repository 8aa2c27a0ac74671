"""`tame paraphrase DATA OUT --there RUN --back RUN`: labelled texts, and each again in other words, by back-translation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tameformer.errors import ConfigError, TameError

_EPILOG = """\
DATA is a file of `tame train text-classification`: .jsonl, .csv or .tsv with text or sentence, or sentence1 and sentence2, and
a label. Each text is translated by the run THERE into another language, by the run BACK out of it, and what comes back, unless
it is the same, is written to OUT behind the text, with its label. Look at some of it before training: a translator that is not
good enough changes what a text says. Train with --data.path OUT, and give a --data.validation_path that is not paraphrased.

examples:
  tame train translation --data.path train.tsv --data.validation_path valid.tsv --output_dir runs/en-de
  tame train translation --data.path train.tsv --data.validation_path valid.tsv --data.columns '[2,1]' \\
      --data.source_language de --data.target_language en --output_dir runs/de-en
  tame paraphrase reviews.jsonl more-reviews.jsonl --there runs/en-de --back runs/de-en
  tame paraphrase reviews.jsonl more-reviews.jsonl --there runs/en-de --back runs/de-en --temperature 0.9

Exit codes: 0 written, 1 error, 2 usage, 130 stopped by Ctrl-C with nothing written.
"""


def main(arguments: Sequence[str]) -> int:
    """Paraphrase, and say what was written; returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        from tameformer.recipes.back_translation import paraphrase, translator  # torch is needed from here on

        how = {"num_beams": options.num_beams, "temperature": options.temperature, "seed": options.seed}
        there, back = translator(options.there, **how), translator(options.back, **how)
        done = paraphrase(options.data, options.out, there, back, label_column=options.label_column)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, FileExistsError, ValueError) as error:
        return _fail(error, 2)
    except (TameError, OSError) as error:
        return _fail(error, 1)
    same = done.texts - done.paraphrases
    print(f"{done.path}: {done.texts:,} texts and {done.paraphrases:,} paraphrases; {same:,} came back as they were")
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"tame paraphrase: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tame paraphrase",
        description="Write labelled texts anew, each with a paraphrase by two translation runs behind it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="labelled training texts")
    parser.add_argument("out", type=Path, metavar="OUT", help=".jsonl to write; must not exist")
    parser.add_argument("--there", type=Path, required=True, metavar="RUN", help="translates into another language")
    parser.add_argument("--back", type=Path, required=True, metavar="RUN", help="translates out of it")
    parser.add_argument("--num_beams", type=int, default=4, help="sentences kept at each step of the search (4)")
    parser.add_argument("--temperature", type=float, help="draw tokens at this temperature instead of searching")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--label_column", default="label", help="column that holds the class (label)")
    return parser

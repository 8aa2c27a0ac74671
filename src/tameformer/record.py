"""The run folder: the only interface between training and everything that looks at training.

    runs/NAME/  config.yaml  env.json  log.jsonl  probes.jsonl  events.jsonl
                checkpoints/  LATEST  BEST  report.html  tb/  [figures/NAME.json]

Every `.jsonl` line is one JSON object with the optimizer step it belongs to. Non-finite numbers are written as the
strings "NaN", "Infinity" and "-Infinity": visible to every reader, and still valid JSON.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from tameformer.errors import RecordError

logger = logging.getLogger(__name__)
LOG, PROBES, EVENTS = "log.jsonl", "probes.jsonl", "events.jsonl"
CONFIG, ENVIRONMENT, REPORT = "config.yaml", "env.json", "report.html"
CHECKPOINTS, LATEST, BEST, TENSORBOARD = "checkpoints", "LATEST", "BEST", "tb"
FIGURES = "figures"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_number(value: float) -> float | str:
    """The value as JSON can hold it: a finite number as it is, any other as its name.

    Example:
        >>> encode_number(0.5), encode_number(float("nan")), encode_number(float("-inf"))
        (0.5, 'NaN', '-Infinity')
    """
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode_values(values: Any) -> Any:
    """Plain values with `encode_number` on every number in them, at any depth.

    Example:
        >>> encode_values({"loss": [0.5, float("nan")]})
        {'loss': [0.5, 'NaN']}
    """
    if isinstance(values, Mapping):
        return {key: encode_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [encode_values(value) for value in values]
    return encode_number(values) if isinstance(values, float) else values


def decode_number(value: Any) -> Any:
    """The inverse of `encode_number`; everything else passes through.

    Example:
        >>> decode_number("Infinity"), decode_number(2), decode_number("text")
        (inf, 2, 'text')
    """
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def encode_line(record: Mapping[str, Any]) -> str:
    """One record as one line of JSON, keys in the order given."""
    return json.dumps(encode_values(record), allow_nan=False, ensure_ascii=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_figure(folder: Path, name: str, figure: Mapping[str, Any]) -> None:
    """Keep what a recipe wants to be seen in the report as `figures/NAME.json`; a later one of that name takes its place.

    `kind` says what it is, and `title` and `caption` say what to see:

    - "images": `rows` of pictures, each named and a list of pictures as tall as the others: values 0..255, (height, width) or
      (height, width, 3) as nested lists;
    - "lines": `x`, numbers ascending, with `x_label`, and `lines`, named lists of as many numbers or nulls;
    - "passages": `passages`, each a `heading` and `lines`, which are a weight in [0, 1] and words with theirs.

    Numbers may be NaN, as all else that is measured. A figure is no reason to end a run: where it cannot be written, that is
    logged.

    Example:
        >>> import tempfile
        >>> write_figure(Path(tempfile.mkdtemp()), "by-length", {"kind": "lines", "title": "Accuracy", "caption": "",
        ...     "x": [10, 20], "x_label": "length", "lines": {"accuracy": [1.0, 0.5]}})
    """
    text = json.dumps(encode_values(figure), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FIGURES / f"{name}.json", text + "\n")
    except OSError as error:
        logger.warning("the figure %s was not written: %s; the run goes on", name, error)


def cut_back(path: Path, step: float) -> int:
    """Drop the lines that belong to later steps than `step`, and a half-written last line; returns how many went.

    A resumed run repeats the steps after its checkpoint, so their first telling is removed: no step is logged twice.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            keep = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        kept.append(line) if keep else None
        dropped += not keep
    if dropped:
        write_atomically(path, b"".join(kept).decode("utf-8"))
    return dropped


class RunWriter:
    """Appends to the three logs of a run folder; each line is written at once, so that a killed run keeps what it said.

    Args:
        folder: The run folder; created when absent.
        resume_step: Cut the log and the probes back to this step first; None starts fresh files.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LOG, PROBES):
            if resume_step is None:
                (folder / name).unlink(missing_ok=True)
            else:
                cut_back(folder / name, resume_step)
        if resume_step is None:
            (folder / EVENTS).unlink(missing_ok=True)
        else:
            cut_back(folder / EVENTS, math.inf)  # all events stay, a torn last line goes
        self._owed: dict[str, bytes] = {LOG: b"", PROBES: b"", EVENTS: b""}
        self._files: dict[str, FileIO] = {name: self._open(name) for name in self._owed}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of slash-separated measurements, such as `train/loss`, to `log.jsonl`."""
        self._append(LOG, {"step": step, **values})

    def probe(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of `diag/<probe>/<layer>[/<head>]` measurements to `probes.jsonl`."""
        self._append(PROBES, {"step": step, **values})

    def event(self, step: int, kind: str, message: str, **details: Any) -> None:
        """Append what happened, in one plain sentence, to `events.jsonl`; events survive a resume."""
        self._append(EVENTS, {"step": step, "kind": kind, "message": message, **details})

    def cut_back(self, step: int) -> None:
        """Drop what the log and the probes say of later steps than `step`: the run went back, and tells them anew."""
        for name in (LOG, PROBES):
            self._close(name)
            cut_back(self.folder / name, step)
            self._files[name] = self._open(name)

    def close(self) -> None:
        """Close the files; a closed writer writes nothing more.

        Raises:
            RecordError: Lines are still not written.
        """
        with ExitStack() as closing:  # also those behind one that fails
            for name in self._files:
                closing.callback(self._close, name)

    def _open(self, name: str) -> FileIO:
        return FileIO(self.folder / name, "a")  # no buffer: what could not be written is ours to keep

    def _close(self, name: str) -> None:
        try:
            if not self._files[name].closed:
                self._write_owed(name)
        except OSError as error:
            raise RecordError(
                f"cannot write {self.folder / name}: {error}; free some space, then resume the run"
            ) from error
        finally:
            self._files[name].close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a line. A disk that is full now may have room later: no line is lost, and none ends the run."""
        was_owed = bool(self._owed[name])
        self._owed[name] += encode_line(record).encode("utf-8")
        try:
            self._write_owed(name)
        except OSError as error:
            if not was_owed:
                logger.warning("%s cannot be written: %s; its lines wait until it can", self.folder / name, error)

    def _write_owed(self, name: str) -> None:
        while self._owed[name]:
            written = self._files[name].write(self._owed[name])
            self._owed[name] = self._owed[name][written:]


class RunReader:
    """Reads a run folder, finished or not; never writes.

    Args:
        folder: The run folder.

    Raises:
        RecordError: The folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / LOG).is_file():
            raise RecordError(
                f"{folder} holds no run: expected a file {LOG} in it; give the folder that `tame train` printed"
            )
        self.folder = folder

    def log(self) -> list[dict[str, Any]]:
        """The lines of `log.jsonl`, in the order written."""
        return list(self._lines(LOG))

    def probes(self) -> list[dict[str, Any]]:
        """The lines of `probes.jsonl`."""
        return list(self._lines(PROBES))

    def events(self) -> list[dict[str, Any]]:
        """The lines of `events.jsonl`."""
        return list(self._lines(EVENTS))

    def environment(self) -> dict[str, Any]:
        """What the run ran on: versions, commit, hardware, threads, command; empty when it was not written."""
        path = self.folder / ENVIRONMENT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def figures(self) -> dict[str, dict[str, Any]]:
        """What `write_figure` kept, by name."""
        files = sorted((self.folder / FIGURES).glob("[!.]*.json"))
        return {file.stem: dict(json.loads(file.read_text(encoding="utf-8"))) for file in files}

    def config_text(self) -> str:
        """The resolved configuration as YAML text; empty when it was not written."""
        path = self.folder / CONFIG
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        if not path.is_file():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    if line.endswith("\n"):
                        raise RecordError(f"{path}, line {number} is not a JSON object; remove that line") from error
                    return  # the run is writing this line now, or was killed while it did
                yield {key: decode_number(value) for key, value in record.items()}

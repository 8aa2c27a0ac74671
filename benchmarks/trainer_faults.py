"""The same faults in the Hugging Face Trainer, in that Trainer with our callback and guard, and in `tame train`.

All three train the same small vision Transformer on the embedded digits with the same batch size, AdamW, warm-up, cosine
schedule, clipping and save interval; everything else is each one's default. The faults are the same code for all: a hook on
every call of a model in training counts batches and spoils one of them, so that neither trainer knows of it. Each run is a
fork of one process that imports once; its exit code is what a shell would see. Accuracy is on the test images, with the weights
that the run ended with.

Kills are aimed at a save: the run is killed when the second checkpoint's folder has appeared, after a random part of what a
save takes, and counted only when the save had not ended. The next run resumes as each trainer's documentation says,
`resume_from_checkpoint=True` and `resume="auto"`.
"""

import contextlib
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kill_loop import PROBES, forked, temporary
from write_up import Table, parser, set_threads, write

STEPS, EVERY, BATCH, RATE, WARMUP, DECAY = 100, 25, 32, 1e-2, 10, 0.05
MODEL = {"dim": 16, "num_layers": 1, "num_heads": 2, "patch_size": 2, "stem": "patch", "pooling": "mean"}
FAULTS = {
    "no fault": ("", 0, 0),
    "one batch of NaN, at 80": ("nan", 80, 80),
    "an infinite gradient, at 80": ("inf-grad", 80, 80),
    "outputs x1000 in one batch, at 80": ("spike", 80, 80),
    "batches of NaN from 80 on": ("nan", 80, sys.maxsize),
    "SIGTERM in step 60": ("term", 60, 60),
    f"the disk is full while step {2 * EVERY} is saved": ("disk", 2 * EVERY, 2 * EVERY),
}
CORRUPT = "one flipped bit in the newest checkpoint, then a resume"
TRAINERS = {
    "hf": "Hugging Face Trainer",
    "hf+tame": "Hugging Face Trainer with TameCallback(guard=GuardConfig())",
    "tame": "tame train",
}
NOTES = [
    "A negative exit code is the signal that ended the process.",
    "Kills hold under the condition that a save was in progress; how often that is depends on how long saves take.",
    "Weights of `tame train` are those of its newest checkpoint.",
]
SMALL_FILE = 4096  # bytes: what is printed still fits, a checkpoint does not
END, BEGIN = "end.json", "begin.txt"
TOLD = ("step_skipped", "rollback", "diverged", "guard_yields", "checkpoint_failed", "checkpoint_skipped")


class Faults:
    """Spoils batches of whatever model is trained in this process, counted by its calls in training.

    Args:
        kind: Of the fault.
        first: Batch that it strikes at, from 1 ...
        last: ... until this one.
        done: Batches that were trained on before.
    """

    def __init__(self, kind: str, first: int, last: int, *, done: int = 0) -> None:
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

        self.kind, self.first, self.last, self.batch = kind, first, last, done
        register_module_forward_pre_hook(self._before)
        register_module_forward_hook(self._after)

    def _is_due(self, module: Any) -> bool:
        from tameformer.models.vision import VisionClassifier

        return isinstance(module, VisionClassifier) and module.training and self.first <= self.batch <= self.last

    def _before(self, module: Any, inputs: tuple) -> Any:
        from tameformer.models.vision import VisionClassifier

        if isinstance(module, VisionClassifier) and module.training:
            self.batch += 1
            if self.kind == "disk":  # the kernel refuses to make files larger, as a full disk does
                limit = SMALL_FILE if self._is_due(module) else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if not self._is_due(module):
            return None
        if self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "nan":
            return tuple(each * math.nan if each.is_floating_point() else each for each in inputs)
        return None

    def _after(self, module: Any, inputs: tuple, output: Any) -> Any:
        if not self._is_due(module):
            return None
        if self.kind == "spike":
            return output * 1000
        if self.kind == "inf-grad":
            output.register_hook(lambda gradient: gradient.index_fill(1, gradient.new_zeros(1).long(), math.inf))
        return None


def settings(folder: Path) -> dict[str, Any]:
    """Of the recipe; the Trainer gets the same numbers."""
    return {
        **{f"probes.{name}": None for name in PROBES},
        "max_steps": STEPS,
        "data.batch_size": BATCH,
        **{f"model.{name}": value for name, value in MODEL.items()},
        "optim.peak_lr": RATE,
        "optim.schedule": "cosine",
        "optim.warmup_steps": WARMUP,
        "optim.weight_decay": DECAY,
        "checkpoint.every": EVERY,
        "loop.eval_steps": STEPS,
        "precision": "fp32",
        "output_dir": str(folder),
    }


def tame(folder: Path, *, resume: bool) -> int:
    """The command, and its exit code."""
    from tameformer.cli.__main__ import main
    from tameformer.recipes import launch

    launch.report.write_report = lambda folder: None  # the page of a finished run is not what is compared
    words = [f"--{key}={'null' if value is None else value}" for key, value in settings(folder).items()]
    return main(["train", "vit-digits", *words, "--resume", "auto" if resume else "never"])


def hugging_face(folder: Path, *, resume: bool, guarded: bool) -> int:
    """A script with the Trainer, as a person would write it."""
    import numpy as np
    import torch
    from torch import nn
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tameformer.data.keys import SampleKeys
    from tameformer.data.sources import digits
    from tameformer.health import GuardConfig
    from tameformer.integrations.transformers import TameCallback
    from tameformer.models import VisionConfig
    from tameformer.models.vision import vision_classifier

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = VisionConfig(**MODEL, positions="sinusoidal")
            self.model = vision_classifier(config, num_classes=10, image_size=(8, 8), channels=1)

        def forward(self, images: Any, labels: Any) -> dict[str, Any]:
            return {"loss": nn.functional.cross_entropy(self.model(images), labels)}

    class Begins(TrainerCallback):
        def on_train_begin(self, args, state, control, **given):
            (folder / BEGIN).write_text(str(state.global_step))

    train, test = (
        source.fetch(SampleKeys(0, 0, np.arange(len(source)))) for source in (digits("train"), digits("test"))
    )
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=WARMUP, weight_decay=DECAY, adam_beta2=0.99, save_steps=EVERY,
        logging_steps=10, report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        dataloader_drop_last=True,
    )  # fmt: skip
    callbacks = [TameCallback(guard=GuardConfig(), probes=[])] if guarded else []
    data = [{"images": image, "labels": label} for image, label in zip(train["images"], train["labels"], strict=True)]
    trainer = Trainer(Answers(), arguments, train_dataset=data, callbacks=[Begins(), *callbacks])
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        model = trainer.model.eval()
        with torch.no_grad():
            right = (model.model(test["images"]).argmax(1) == test["labels"]).double().mean().item()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        finite = all(bool(each.isfinite().all()) for each in model.parameters())
        end = {"accuracy": right, "finite": finite, "loss": losses[-1] if losses else None}
        (folder / END).write_text(json.dumps(end))
    return 0


def run(trainer: str, folder: Path, fault: tuple[str, int, int] = ("", 0, 0), *, resume: bool = False) -> int:
    """Start it; returns the number of the process."""

    def work() -> None:
        if fault[0]:
            Faults(*fault)
        code = tame(folder, resume=resume) if trainer == "tame" else hugging_face(
            folder, resume=resume, guarded=trainer == "hf+tame"
        )  # fmt: skip
        sys.stdout.flush()
        os._exit(code)

    folder.mkdir(parents=True, exist_ok=True)
    return forked(work, folder.parent / f"{folder.name}{'-again' if resume else ''}.txt")


def ended(process: int) -> int:
    """The exit code; a negative number is the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def steps_of(trainer: str, folder: Path) -> list[int]:
    """The steps whose checkpoints have their final names."""
    found = folder.glob("checkpoints/step-*" if trainer == "tame" else "checkpoint-*")
    return sorted(int(path.name.rpartition("-")[2]) for path in found)


def began_at(trainer: str, folder: Path) -> int | None:
    """The step that the last run in the folder went on from; None when it never came so far."""
    if trainer != "tame":
        return int((folder / BEGIN).read_text()) if (folder / BEGIN).exists() else None
    kinds = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    begun = [event["step"] for event in kinds if event["kind"] in ("start", "resume")]
    return begun[-1] if begun else None


def outcome(trainer: str, folder: Path, code: int) -> dict[str, Any]:
    """What a run left."""
    found: dict[str, Any] = {"exit": code, "saved": steps_of(trainer, folder), "began": began_at(trainer, folder)}
    if trainer != "tame":
        with contextlib.suppress(FileNotFoundError):
            found |= json.loads((folder / END).read_text())
    else:
        import torch
        from safetensors.torch import load_file

        from tameformer.record import RunReader

        log = RunReader(folder).log()
        found["accuracy"] = next((line["eval/accuracy"] for line in reversed(log) if "eval/accuracy" in line), None)
        found["loss"] = next((line["train/loss"] for line in reversed(log) if "train/loss" in line), None)
        if found["saved"]:
            weights = load_file(folder / f"checkpoints/step-{found['saved'][-1]:06d}/model.safetensors")
            found["finite"] = all(bool(torch.isfinite(each.float()).all()) for each in weights.values())
    at = folder / ("events.jsonl" if trainer == "tame" else "tame/events.jsonl")
    if at.exists():
        kinds = [json.loads(line)["kind"] for line in at.read_text().splitlines()]
        told = dict.fromkeys(kind for kind in kinds if kind in TOLD)
        found["events"] = {kind: kinds.count(kind) for kind in told}
    return found


def corrupt(trainer: str, folder: Path) -> int:
    """Flip a bit of the newest weights; returns the step they are of."""
    step = steps_of(trainer, folder)[-1]
    name = f"checkpoints/step-{step:06d}" if trainer == "tame" else f"checkpoint-{step}"
    with open(folder / name / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    return step


def in_a_save(trainer: str, folder: Path, step: int) -> bool:
    """Whether the checkpoint of that step is begun and not whole."""
    if trainer == "tame":
        begun = any(path.name.startswith(f".step-{step:06d}") for path in temporary(folder))
        return begun and step not in steps_of(trainer, folder)
    return (folder / f"checkpoint-{step}").is_dir() and not (folder / f"checkpoint-{step}/trainer_state.json").exists()


def resumed(trainer: str, folder: Path) -> dict[str, Any]:
    """Resume the run: how it ends, and the step it went on from."""
    (folder / BEGIN).unlink(missing_ok=True)
    code = ended(run(trainer, folder, resume=True))
    return {"exit": code, "began": began_at(trainer, folder) if code == 0 else None}


def kill(trainer: str, folder: Path, draw: random.Random) -> dict[str, Any] | None:
    """Kill a run in its second save and resume it; None when the save had ended by then."""
    process = run(trainer, folder)
    while not in_a_save(trainer, folder, 2 * EVERY) and 2 * EVERY not in steps_of(trainer, folder):
        if os.waitpid(process, os.WNOHANG)[0]:
            if 2 * EVERY not in steps_of(trainer, folder):
                output = (folder.parent / f"{folder.name}.txt").read_text(errors="replace")
                raise RuntimeError(f"a run ended without its second save: {output[-2000:]}")
            return None  # on a busy machine it may save and end while nobody looks
        time.sleep(0.0002)
    time.sleep(draw.uniform(0.0, 0.01))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return resumed(trainer, folder) if in_a_save(trainer, folder, 2 * EVERY) else None


def kills(folder: Path, count: int, *, seed: int, until: float) -> dict[str, list[dict[str, Any]]]:
    """That many kills of each trainer, in turns."""
    draw, number = random.Random(seed), 0
    found: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in TRAINERS}
    while time.monotonic() < until and min(map(len, found.values())) < count:
        number += 1
        for trainer in TRAINERS:
            if len(found[trainer]) < count and (after := kill(trainer, folder / f"kill-{trainer}-{number}", draw)):
                found[trainer].append(after)
                print(f"{trainer}: kill {len(found[trainer])}: {after}", file=sys.stderr)
    return found


def show_in(document: Path, results: Path) -> None:
    """Copy the recorded tables between the marks of a document."""
    recorded = json.loads((results / "trainer_faults.json").read_text(encoding="utf-8"))["tables"]
    tables = [
        Table(each["title"], each["head"], each["rows"]).markdown().replace("## ", "### ", 1) for each in recorded
    ]
    before, mark, rest = document.read_text(encoding="utf-8").partition("<!-- trainer_faults -->\n")
    after = rest.partition("<!-- trainer_faults end -->")[2]
    text = "\n".join(tables)
    document.write_text(f"{before}{mark}{text}<!-- trainer_faults end -->{after}", encoding="utf-8")


def shown(found: dict[str, Any]) -> str:
    """One cell."""
    words = [f"exit {found['exit']}"]
    if found.get("finite") is not None:
        words.append("weights finite" if found["finite"] else "**weights NaN**")
    if found.get("accuracy") is not None:
        words.append(f"{100 * found['accuracy']:.1f} % right")
    if found.get("loss") is not None:
        words.append(f"last loss in the log {found['loss']:.3g}")
    words.append(f"newest checkpoint {found['saved'][-1] if found['saved'] else 'none'}")
    words += [f"{kind} {count}" for kind, count in found.get("events", {}).items()]
    if again := found.get("resumed"):
        words.append(
            f"resumed from step {again['began']}" if again["exit"] == 0 else f"**resume fails: exit {again['exit']}**"
        )
    return ", ".join(words)


def faults(folder: Path, *, quick: bool) -> tuple[dict[str, Any], Table]:
    """One run of each trainer with each fault: what was found, and as a table."""
    raw: dict[str, Any] = {}
    table = Table("One run each", ["fault", *TRAINERS.values()])
    for number, (fault, plan) in enumerate(list(FAULTS.items())[: 2 if quick else None]):
        found = raw[fault] = {}
        for trainer in TRAINERS:
            at = folder / f"{trainer}-{number}"
            found[trainer] = outcome(trainer, at, ended(run(trainer, at, plan)))
            if plan[0] in ("term", "disk") and found[trainer]["exit"]:
                found[trainer]["resumed"] = resumed(trainer, at)
            print(f"{fault}, {trainer}: {found[trainer]}", file=sys.stderr)
        table.rows.append([fault, *(shown(found[trainer]) for trainer in TRAINERS)])
    after = raw[CORRUPT] = {}
    for trainer in TRAINERS:
        at = folder / f"{trainer}-0"
        after[trainer] = {"corrupt": corrupt(trainer, at), **resumed(trainer, at)}
    table.rows.append([CORRUPT, *(_after_corruption(after[trainer]) for trainer in TRAINERS)])
    return raw, table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/trainer_faults.py --kills 20")
    options.add_argument("--kills", type=int, default=20, help="in a save, for each trainer")
    options.add_argument("--minutes", type=float, default=600.0, help="begin no kill after these")
    options.add_argument("--seed", type=int, default=0, help="of the instants of kills")
    options.add_argument("--keep-faults", action="store_true", help="take the recorded faults, and only kill")
    options.add_argument(
        "--document", type=Path, help="shows the tables between its marks, such as docs/reliability.md"
    )
    given = options.parse_args(arguments)
    set_threads(given.threads)
    until = time.monotonic() + 60 * given.minutes
    # What a child would import; nothing is computed before the forks, so that they find no threads.
    import torch.utils.tensorboard  # noqa: F401
    import transformers  # noqa: F401

    import tameformer.cli.train
    import tameformer.integrations.transformers
    import tameformer.recipes.launch  # noqa: F401

    recorded = given.output / "trainer_faults.json"
    before = json.loads(recorded.read_text(encoding="utf-8")) if given.keep_faults else None
    notes = list(NOTES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if before is None:
            raw, outcomes = faults(folder, quick=given.quick)
            told = {"about": __doc__.strip(), "notes": notes, "options": given}
            write("trainer_faults", [outcomes], raw={"faults": raw, "kills": {}}, **told)  # what there is so far
        else:
            first, where = before["tables"][0], before["machine"]
            raw, outcomes = before["raw"]["faults"], Table(first["title"], first["head"], first["rows"])
            notes.append(
                f"The faults of one run each were recorded before the kills, {where['started']}: `{where['shell']}`."
            )
        count = 1 if given.quick else given.kills
        found = kills(folder, count, seed=given.seed, until=until)
    killed = Table(
        f"SIGKILL in the save of step {2 * EVERY}, a checkpoint every {EVERY} steps",
        [
            "trainer",
            "kills in a save",
            "resumes that failed",
            "began again at 0",
            f"went on from {EVERY}",
            "from later",
        ],
    )
    for trainer, after in found.items():
        began = [each["began"] for each in after if each["exit"] == 0]
        later = sum((step or 0) > EVERY for step in began)
        counts = [len(after), len(after) - len(began), began.count(0), began.count(EVERY), later]
        killed.rows.append([TRAINERS[trainer], *map(str, counts)])
    told = {"about": __doc__.strip(), "notes": notes, "options": given}
    write("trainer_faults", [outcomes, killed], raw={"faults": raw, "kills": found}, **told)
    if given.document is not None:
        show_in(given.document, given.output)


def _after_corruption(found: dict[str, Any]) -> str:
    if found["exit"] != 0:
        return f"exit {found['exit']}"
    loaded = found["began"] == found["corrupt"]
    return f"exit 0, {'**loads it**' if loaded else 'passes it over'}: goes on from step {found['began']}"


if __name__ == "__main__":
    main(sys.argv[1:])

"""The command as a user runs it: real processes, real signals, real files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tameformer.cli.__main__ import main
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder

TINY = ["--max_steps=12", "--data.batch_size=96", "--model.dim=16", "--loop.logging_steps=2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tameformer.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_train_writes_a_whole_run_folder_and_prints_a_table(capsys):
    assert main(["train", *TINY]) == 0
    shown = capsys.readouterr().err
    assert "eval/accuracy" in shown
    assert "report: runs/vit-digits/report.html" in shown
    folder = Path("runs/vit-digits")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "env.json",
        "log.jsonl",
        "probes.jsonl",
        "events.jsonl",
        "LATEST",
        "report.html",
        "tb",
    }
    environment = json.loads((folder / "env.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["threads"] >= 1
    line = RunReader(folder).log()[0]
    for key in ("train/loss", "train/lr", "train/grad_norm", "train/clip_rate", "train/attention_entropy"):
        assert isinstance(line[key], float), key
    assert any(key.startswith("perf/samples_per_second") for key in line)
    assert any((folder / "tb").iterdir())


def test_a_run_imports_no_compiler_and_the_collector_leaves_what_it_imported_alone():
    script = """if True:
        import gc, sys
        from tameformer.cli.__main__ import main
        code = main(sys.argv[1:])
        unneeded = {"torch._dynamo", "torch.distributed.tensor", "sympy"}  # slow to import, and for other runs
        print(code, gc.isenabled(), gc.get_freeze_count() > 100_000, sorted(unneeded & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", script, "train", *TINY], capture_output=True, text=True)
    assert done.stdout.strip() == "0 True True []", done.stderr


def test_a_second_run_takes_a_new_folder_and_nothing_is_written_over(capsys):
    assert main(["train", *TINY]) == 0
    before = Path("runs/vit-digits/log.jsonl").read_bytes()
    assert main(["train", *TINY]) == 0
    assert Path("runs/vit-digits-2/log.jsonl").is_file()
    assert main(["train", *TINY, "--output_dir=runs/vit-digits"]) == 2
    assert "holds a run already; continue it with --resume auto" in capsys.readouterr().err
    assert Path("runs/vit-digits/log.jsonl").read_bytes() == before


def test_the_run_folders_configuration_repeats_the_run():
    assert main(["train", *TINY, "--seed=3"]) == 0
    assert main(["train", "runs/vit-digits/config.yaml", "--output_dir=again"]) == 0
    first, second = (
        CheckpointFolder(Path(name)).path(12) / "model.safetensors" for name in ("runs/vit-digits", "again")
    )
    assert first.read_bytes() == second.read_bytes()


def test_print_config_is_a_recipe(capsys):
    assert main(["train", "vit-digits", "--print_config", "--optim.peak_lr=3e-4"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["task"] == "vision"
    assert values["optim"]["peak_lr"] == 3e-4
    assert not Path("runs").exists()


def test_dry_run_keeps_nothing(capsys):
    assert main(["train", "--dry_run", "--model.dim=16"]) == 0
    assert "nothing was kept" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_overfit_batches_learns_them_by_heart():
    assert main(["train", "--overfit_batches=1", "--max_steps=120", "--data.batch_size=32", "--model.dim=32"]) == 0
    assert RunReader(Path("runs/vit-digits")).log()[-2]["train/loss"] < 0.05


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--max_stebs=3"], 2, "unknown key max_stebs; did you mean max_steps?"),
        (["train", "--peak_lr=3"], 2, "did you mean optim.peak_lr?"),
        (
            ["train", "--optim.name=adan"],
            2,
            "optim.name expects one of adamw, adam, radam, stable_adamw, sgd, lars, muon, got adan",
        ),
        (["train", "--model.num_heads=3"], 2, "heads"),
        (["train", "--optim.warmup_steps=5000"], 2, "optim.warmup_steps is 5000, longer than the run of 308 steps"),
        (["train", "--data.batch_size=5000"], 1, "batch_size 5000 is larger than the data, which has 1437 samples"),
        (["train", "vit-digit"], 2, "there is no recipe vit-digit; did you mean vit-digits?"),
        (["train", "char-lm"], 2, "this recipe needs a text file: give --data.path PATH"),
        (["train", "char-lm", "--data.path=nowhere.txt"], 1, "nowhere.txt"),
        (["train", "char-lm", "--data.path=empty.txt"], 1, "empty.txt"),
        (["train", "char-lm", "--data.path=latin.txt"], 1, "latin.txt"),
        (["train", "vit", "--data.path=bad.npz"], 1, "bad.npz"),
        (["train", "translation", "--data.path=pairs", "--data.validation_path=pairs"], 1, "3 lines and"),
        (["train", "--resume=nowhere"], 1, "nowhere holds no sound checkpoint"),
        (["report", "nowhere"], 1, "holds no run"),
        (["repord"], 2, "there is no command repord; did you mean report?"),
    ],
)
def test_bad_input_is_refused_in_plain_words_and_leaves_nothing(arguments, code, message, capsys):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("Grüße".encode("latin-1"))
    Path("bad.npz").write_bytes(b"not an archive")
    Path("pairs.en").write_text("a\nb\nc\n")
    Path("pairs.de").write_text("a\nb\n")
    assert main(arguments) == code
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_hub_name_without_a_network_fails_fast(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    started = time.monotonic()
    assert main(["train", "vit", "--data.source=hub", "--data.path=nobody/nothing-here"]) == 1
    # Two seconds for the answer; the rest is the import of torch, which this process has behind it.
    assert time.monotonic() - started < 10
    assert "nobody/nothing-here" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(number, code):
    long = ["train", "--max_steps=400", "--model.dim=16", "--loop.logging_steps=1", "--loop.eval_steps=400"]
    process = start(*long, "--output_dir=run")
    wait_for_lines(Path("run/log.jsonl"), 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "continue with: --output_dir run --resume auto" in output
    stopped_at = CheckpointFolder(Path("run")).steps()[-1]
    assert 3 <= stopped_at < 400
    assert main([*long, "--output_dir=run", "--resume=auto"]) == 0
    assert [line["step"] for line in RunReader(Path("run")).log() if "train/loss" in line] == list(range(1, 401))


def test_a_second_signal_exits_at_once():
    process = start(
        "train", "--max_steps=400000", "--num_train_epochs=null", "--loop.logging_steps=1", "--output_dir=run"
    )
    wait_for_lines(Path("run/log.jsonl"), 2)
    os.kill(process.pid, signal.SIGSTOP)  # both signals are pending when it goes on
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert not Path("run/checkpoints").exists()  # one signal alone would have saved first


def test_a_killed_run_resumes_from_its_last_checkpoint():
    long = [
        "train",
        "--max_steps=60",
        "--model.dim=16",
        "--loop.logging_steps=1",
        "--checkpoint.every=5",
        "--output_dir=run",
    ]
    process = start(*long)
    wait_for_lines(Path("run/log.jsonl"), 12)
    process.kill()
    process.communicate(timeout=60)
    assert main([*long, "--resume=auto"]) == 0
    steps = [line["step"] for line in RunReader(Path("run")).log() if "train/loss" in line]
    assert steps == list(range(1, 61))


def test_a_resume_into_another_configuration_is_refused_by_name(capsys):
    assert main(["train", *TINY, "--output_dir=run"]) == 0
    assert main(["train", *TINY, "--output_dir=run", "--resume=auto", "--model.num_layers=3"]) == 2
    assert "belongs to another configuration: model.num_layers was 2 and is 3" in capsys.readouterr().err
    assert main(["train", *TINY, "--output_dir=run", "--resume=auto", "--optim.peak_lr=1e-4", "--max_steps=14"]) == 0
    drift = [event["message"] for event in RunReader(Path("run")).events() if event["kind"] == "config_drift"]
    assert any(sentence.startswith("optim.peak_lr was 0.002 and is 0.0001") for sentence in drift)
    assert RunReader(Path("run")).log()[-1]["step"] == 14  # the run was made longer
    assert main(["train", *TINY, "--output_dir=run", "--resume=auto", "--optim.peak_lr=1e-4"]) == 1
    assert "is of step 14, beyond the run's end at step 12" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_named(capsys):
    assert main(["train", *TINY, "--output_dir=run", "--checkpoint.every=4"]) == 0
    newest = CheckpointFolder(Path("run")).path(12)
    with open(newest / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert main(["train", *TINY, "--output_dir=run", "--checkpoint.every=4", "--resume=auto"]) == 0
    assert "step-000012 is damaged: model.safetensors differs" in capsys.readouterr().err
    assert [line["step"] for line in RunReader(Path("run")).log() if "train/loss" in line] == [2, 4, 6, 8, 10, 12]


def test_a_disk_too_small_for_a_checkpoint_is_told_and_the_run_goes_on(capsys):
    """No file may grow beyond 350 kB from here on: weights do not fit, logs and report do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, hard))
    try:
        assert main(["train", "--max_steps=6", "--data.batch_size=96", "--checkpoint.every=2", "--output_dir=run"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    events = RunReader(Path("run")).events()
    failed = [event for event in events if event["kind"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == [2, 4, 6]
    assert "the run goes on" in failed[0]["message"]
    assert list(Path("run/checkpoints").iterdir()) == []
    assert not Path("run/LATEST").exists()


def test_divergence_is_told_exits_with_three_and_keeps_a_sound_checkpoint(capsys):
    assert main(["train", *TINY, "--output_dir=run", "--checkpoint.every=1", "--optim.peak_lr=1e18",
                 "--optim.max_grad_norm=null", "--optim.name=sgd", "--optim.schedule=constant"]) == 3  # fmt: skip
    assert "the last checkpoint before it is untouched" in capsys.readouterr().err
    assert [event["kind"] for event in RunReader(Path("run")).events()][-1] == "diverged"
    assert Path("run/report.html").is_file()


@pytest.mark.parametrize(
    ("settings", "code"), [([], 0), (["--guard.max_skips=0", "--inject=nan@4", "--loop.logging_steps=1"], 3)]
)
def test_a_disk_too_small_for_the_report_does_not_change_how_a_run_ends(settings, code):
    """In a process of its own: the limit holds for all that a process writes."""
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from tameformer.cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    words = ["train", "vit-digits", "--max_steps=4", "--model.dim=16", "--output_dir=run", *settings]
    answer = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == code, answer.stderr
    assert "the report was not written: [Errno 27] File too large" in answer.stderr
    assert "`tame report run` writes it" in " ".join(answer.stderr.split())
    assert "report: " not in answer.stderr
    assert not Path("run/report.html").exists()


def test_help_lists_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "vit-digits", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--optim.peak_lr" in shown
    assert "Largest learning rate that the schedule reaches" in shown
    assert main(["train", "--help"]) == 0
    assert "--resume auto|never|PATH" in capsys.readouterr().out


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.is_file() and len(path.read_bytes().splitlines()) >= count):
        assert time.monotonic() < deadline, f"{path} did not grow to {count} lines"
        time.sleep(0.05)

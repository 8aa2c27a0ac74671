"""What stabilizers cost: the whole training step of a causal language model with sigmaReparam over the same step without.

Each variant has a model and a fused AdamW of its own and takes its turn in every round, in random order; ratios are taken
inside the round. "At first" takes three power steps an update, as the first hundred updates do, the others one. "Beside" keeps
stored weights and gammas beside the optimizer, and the layers' weights in the precision of the step unless the head says fp32;
"its own work" is 1 and the time of what it does itself over that of the plain step, without what else becomes slower because
of the memory it has touched. With four micro-batches the tokens of a step come in four parts. Memory is that by which a fresh
process, or its accelerator, grows for model, gradients, moments and three steps. Sigma's start is compared with the
decomposition that the published layers start from. Where there is an accelerator, all is measured there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from measure import Quartiles, Stopwatch, device, in_turns, now, quartiles, ratio
from measure import growth as growth_of
from subjects import GPT2, Size, mean_loss, model_of, random_tokens
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import AdamW
from write_up import Table, parser, set_threads, write

from tameformer.stabilizers.power_iteration import image_and_sigma, leading_right
from tameformer.stabilizers.sigma_optimizer import SigmaBesideOptimizer
from tameformer.stabilizers.sigma_reparam import SigmaReparam, sigma_reparam

Patch = Callable[[nn.Module], object]
BESIDE, OWN_WORK = "beside the optimizer", "beside, its own work"
BESIDE_FP32 = "beside, layers in fp32"
FLOOR = "floor"
NOTES = [
    "Floor of sigmaReparam: its 32 bytes a weight and step, 5.3 F / (B N) of 6 N FLOP with F FLOP/s, B bytes/s and N tokens; "
    "here at the speed at which the weights are added to others, 12 bytes each, in the same rounds.",
    "torch's spectral_norm has no gamma, and takes its power step in every forward pass.",
]


def patches(dtype: torch.dtype) -> dict[str, Patch]:
    """Variants by name, for training under autocast to this precision."""
    beside = partial(SigmaBesideOptimizer, steps_at=lambda updates: 1)
    return {
        "plain": lambda model: None,
        "sigma_reparam": lambda model: sigma_reparam(model, steps_at=lambda updates: 1),
        "sigma_reparam, at first": lambda model: sigma_reparam(model, steps_at=lambda updates: 3),
        BESIDE: partial(beside, dtype=dtype),
        BESIDE_FP32: beside,
        "sigma_reparam, baked": lambda model: sigma_reparam(model).bake(),
        "torch spectral_norm": _spectral_norm,
    }


def _spectral_norm(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            spectral_norm(module)


def step_of(size: Size, patch: Patch, *, micro_batches: int, dtype: torch.dtype) -> Callable[[], object]:
    """One training step of a model of its own."""
    model = model_of(size).to(device())
    patched = patch(model)
    groups = [{"params": list(model.parameters())}]
    is_beside = isinstance(patched, SigmaBesideOptimizer)
    optimizer = AdamW(patched.groups(groups) if is_beside else groups, lr=1e-4, fused=True)
    if is_beside:
        patched.follow(optimizer)
    tokens, targets = (one.to(device()) for one in random_tokens(size))

    def step() -> None:
        for some, answers in zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            with torch.autocast(device().type, dtype=dtype, enabled=dtype != torch.float32):
                loss = mean_loss(model, some, answers)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(
    size: Size, *, rounds: int, micro_batches: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Quartiles]:
    """By variant, for the work of the form beside the optimizer alone, and for the floor: time over the plain step."""
    steps = {
        name: step_of(size, patch, micro_batches=micro_batches, dtype=dtype) for name, patch in patches(dtype).items()
    }
    # A model of its own: on an accelerator the clock waits, which a whole step must not.
    watches: list[Stopwatch] = []
    own_work: list[float] = []

    def watched(model: nn.Module) -> object:
        patched = patches(dtype)[BESIDE](model)
        watches.append(Stopwatch(patched, ["_take_gradients", "_advance"], clock=now))
        return patched

    step = step_of(size, watched, micro_batches=micro_batches, dtype=dtype)

    def watched_step() -> None:
        before = watches[0].seconds
        step()
        own_work.append(watches[0].seconds - before)

    seconds = in_turns({**steps, OWN_WORK: watched_step, "addition": addition(size)}, rounds=rounds, seed=seed)
    seconds[OWN_WORK] = own_work[-rounds:]
    found = {name: ratio(seconds, name, to="plain") for name in steps if name != "plain"}
    added = {OWN_WORK: (OWN_WORK, 1.0), FLOOR: ("addition", 32 / 12)}
    for name, (timed, times) in added.items():
        share = ratio(seconds, timed, to="plain")
        found[name] = Quartiles(*(1 + times * one for one in dataclasses.astuple(share)))
    return found


def addition(size: Size) -> Callable[[], object]:
    """Adds as many numbers as the patched weights have: 8 bytes read and 4 written for each."""
    count = sum(module.weight.numel() for module in model_of(size).modules() if isinstance(module, nn.Linear))
    one, other, total = torch.ones(3, count, device=device()).unbind()
    return lambda: torch.add(one, other, out=total)


def growth(name: str, size: Size, dtype: torch.dtype) -> float:
    """MiB that model, gradients, moments and three steps take at their peak; for a process that has done nothing before."""
    import torch._dynamo  # noqa: F401  every optimizer of torch imports it

    def train() -> None:
        step = step_of(size, patches(dtype)[name], micro_batches=1, dtype=dtype)
        for _ in range(3):
            step()

    return growth_of(train)


def memory(size: Size, names: Sequence[str], *, rounds: int, dtype: torch.dtype) -> dict[str, Quartiles]:
    """By variant: growth of a fresh process over that of the first."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        taken = {name: list(fresh.map(growth, [name] * rounds, [size] * rounds, [dtype] * rounds)) for name in names}
    plain = taken.pop(names[0])
    return {name: quartiles([mine / its for mine, its in zip(taken[name], plain, strict=True)]) for name in taken}


def starts(width: int, *, rounds: int) -> dict[str, Quartiles | float]:
    """Seconds of the decomposition over those of ours, and the relative error of sigma, on Gaussian matrices."""
    generator = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(rounds):
        matrix = torch.randn(width, width, generator=generator).to(device())
        begin = now()
        right = leading_right(matrix)
        _, sigma = image_and_sigma(matrix, right)
        middle = now()
        exact = torch.linalg.svd(matrix, full_matrices=False).S[0]
        ratios.append((now() - middle) / (middle - begin))
        errors.append(abs(1 - (sigma / exact).item()))
    return {"times faster": quartiles(ratios), "error": quartiles(errors).median}


def tracking(size: Size, *, updates: int) -> Quartiles:
    """Relative error of sigma over all weights after so many updates with AdamW at 1e-3."""
    model = model_of(size).to(device())
    sigma_reparam(model)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        start = torch.randint(size.vocab_size, (size.batch, 1), generator=generator)
        tokens = ((start + torch.arange(size.seq + 1) * 7) % size.vocab_size).to(device())
        mean_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    errors = []
    for one in (module for module in model.modules() if isinstance(module, SigmaReparam)):
        for matrix, right in zip(one.parts.of(one.weight.detach()), one.right, strict=True):
            errors.append(1 - (image_and_sigma(matrix, right)[1] / torch.linalg.matrix_norm(matrix, 2)).item())
    return quartiles(errors)


def sizes(*, quick: bool) -> list[tuple[Size, int]]:
    """What is trained, and in how many micro-batches."""
    if quick:
        return [(Size(num_layers=1, dim=32, num_heads=4, seq=16, batch=2), 1)]
    if device().type != "cpu":
        return [(GPT2, 1), (GPT2, 4)]
    small = Size(num_layers=6, dim=256, num_heads=4, seq=128, batch=4)
    return [(small, 1), (small, 4), (dataclasses.replace(small, batch=32), 1)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/stabilizers.py --rounds 31")
    options.add_argument("--rounds", type=int, default=31, help="turns of each variant")
    options.add_argument("--bf16", action="store_true", help="also under autocast to bf16")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    rounds = 2 if given.quick else given.rounds
    raw: dict[str, object] = {}
    variants = list(patches(torch.float32))
    steps = Table("Time of a step over the plain one", ["tokens a step", *variants[1:], OWN_WORK, FLOOR])
    names = variants[:2] if given.quick else variants
    peaks = Table("Peak memory over the plain model's", ["tokens a step", *names[1:]])
    for size, parts in sizes(quick=given.quick):
        few = max(2, rounds // (1 if size.tokens < 1000 else 3))
        for dtype in (torch.float32, torch.bfloat16) if given.bf16 else (torch.float32,):
            in_parts = f" in {parts} micro-batches" if parts > 1 else ""
            title = f"{size.tokens}{in_parts}, {str(dtype).removeprefix('torch.')}"
            found = compare(size, rounds=few, micro_batches=parts, dtype=dtype)
            raw[title] = {name: dataclasses.asdict(ratio) for name, ratio in found.items()}
            steps.rows.append([title, *(ratio.show() for ratio in found.values())])
            if parts == 1:
                found = memory(size, names, rounds=1 if given.quick else 3, dtype=dtype)
                raw[f"memory, {title}"] = {name: dataclasses.asdict(ratio) for name, ratio in found.items()}
                peaks.rows.append([title, *(ratio.show() for ratio in found.values())])
    start = Table("Start of sigma, over torch.linalg.svd", ["matrix", "times faster", "relative error, median"])
    for width in (160,) if given.quick else (768, 2048):
        found = starts(width, rounds=2 if given.quick else 3)
        faster, error = found["times faster"], found["error"]
        assert isinstance(faster, Quartiles)
        raw[f"start {width}"] = {"times_faster": dataclasses.asdict(faster), "error": error}
        start.rows.append([f"{width} x {width}", faster.show(1), f"{error:.1e}"])
    follow = Table("Relative error of sigma while training, AdamW at 1e-3", ["updates", "median and quartiles, %"])
    size = Size(num_layers=1 if given.quick else 4, dim=32 if given.quick else 128, num_heads=4, seq=16, batch=8)
    for updates in (2,) if given.quick else (1, 20, 100, 200):
        error = tracking(size, updates=updates)
        raw[f"error after {updates}"] = dataclasses.asdict(error)
        percent = Quartiles(*(100 * value for value in dataclasses.astuple(error)))
        follow.rows.append([str(updates), percent.show()])
    name = "stabilizers" if device().type == "cpu" else f"stabilizers_{device().type}"
    write(name, [steps, peaks, start, follow], about=__doc__ or "", notes=NOTES, raw=raw, options=given)


if __name__ == "__main__":
    main()

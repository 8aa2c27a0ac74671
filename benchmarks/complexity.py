"""What a layer costs against the length of its sequence: self-attention, windowed, linear, recurrent, convolutional.

The table of Vaswani et al. 2017 (arXiv:1706.03762, table 1) as measurements: forward and backward of one layer of each kind,
all of one width, batch 1. Layers take turns in random order; the time is that of the fastest third of the rounds, because what
others do on the machine only adds. Memory is what autograd keeps for the backward pass, counted exactly. The exponent is the
slope of the logarithms between the two longest sequences: 1 is linear, 2 is quadratic.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from write_up import Table, parser, set_threads, write

from tameformer.nn.attention import AdditiveScore, LinearAttention, MultiHeadAttention, WindowedAttention

RADIUS = 64
KERNEL = 3


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def __init__(self, recurrence: nn.GRU | nn.LSTM):
        super().__init__()
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrence(x)[0]


class Convolution(nn.Module):
    """A convolution over positions, (batch, seq, dim) in and out."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.convolution = nn.Conv1d(dim, dim, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.mT).mT


KINDS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "self-attention": ("n² d", lambda dim, heads: MultiHeadAttention(dim, heads)),
    "self-attention, additive score": (
        "n² d",
        lambda dim, heads: MultiHeadAttention(dim, heads, score=AdditiveScore(heads, dim // heads)),
    ),
    f"windowed, radius {RADIUS}": (
        "r n d",
        lambda dim, heads: MultiHeadAttention(dim, heads, attend=WindowedAttention(RADIUS)),
    ),
    "linear attention": ("n d²", lambda dim, heads: MultiHeadAttention(dim, heads, attend=LinearAttention())),
    "GRU": ("n d²", lambda dim, heads: Recurrent(nn.GRU(dim, dim, batch_first=True))),
    "LSTM": ("n d²", lambda dim, heads: Recurrent(nn.LSTM(dim, dim, batch_first=True))),
    f"convolution, kernel {KERNEL}": ("k n d²", lambda dim, heads: Convolution(dim, KERNEL)),
}
"""By name: what one layer costs on paper, in n positions of width d, and how it is built from width and heads."""
LONGEST = {"self-attention, additive score": 1024}
"""Where a kind is not measured for all lengths: a hidden vector for each pair takes gigabytes."""


def seconds(layer: nn.Module, x: Tensor) -> float:
    """Time of one forward and backward pass: the processor's on a CPU, by the clock elsewhere."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    layer(x).sum().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def kept_mib(layer: nn.Module, x: Tensor) -> float:
    """MiB that autograd keeps for the backward pass, the input included, weights not."""
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(kept.values()) / 2**20


def draw(lengths: Sequence[int], times: dict[str, dict[int, float]], path: str, title: str) -> None:
    """Time against length, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, by_length in times.items():
        axes.plot(list(by_length), [1e3 * value for value in by_length.values()], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="positions", ylabel="ms, forward and backward", title=title)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/complexity.py --rounds 15")
    options.add_argument("--rounds", type=int, default=15, help="times that each layer meets each length")
    options.add_argument("--device", default="cpu", help="where to")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    dim, heads, lengths = (16, 2, (16, 32)) if given.quick else (256, 4, (128, 256, 512, 1024, 2048, 4096))
    rounds = 3 if given.quick else given.rounds
    torch.manual_seed(0)
    layers = {name: make(dim, heads).to(given.device) for name, (_, make) in KINDS.items()}
    inputs = {length: torch.randn(1, length, dim, device=given.device, requires_grad=True) for length in lengths}
    pairs = [(name, length) for name in layers for length in lengths if length <= LONGEST.get(name, length)]
    taken: dict[tuple[str, int], list[float]] = {pair: [] for pair in pairs}
    memory = {(name, length): kept_mib(layers[name], inputs[length]) for name, length in pairs}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name, length in order.sample(pairs, len(pairs)):
            found = seconds(layers[name], inputs[length])
            if number:  # the first round warms up
                taken[name, length].append(found)
    times: dict[str, dict[int, float]] = {name: {} for name in layers}
    for (name, length), values in taken.items():
        times[name][length] = statistics.median(sorted(values)[: math.ceil(len(values) / 3)])
    head = ["layer", "on paper", *(str(length) for length in lengths), "exponent"]
    clock = Table(f"ms of forward and backward, width {dim}, {heads} heads, batch 1", head)
    kept = Table("MiB kept for the backward pass", head)
    for name, by_length in times.items():
        space = {length: memory[name, length] for length in by_length}
        for table, values, scale in ((clock, by_length, 1e3), (kept, space, 1.0)):
            cells = [f"{scale * values[length]:.3g}" if length in values else "-" for length in lengths]
            table.rows.append([name, KINDS[name][0] if table is clock else "", *cells, f"{exponent(values):.2f}"])
    given.output.mkdir(parents=True, exist_ok=True)
    draw(lengths, times, str(given.output / "complexity.svg"), f"One layer of width {dim}, batch 1")
    raw = {f"{name}, {length}": {"seconds": taken[name, length], "mib": memory[name, length]} for name, length in pairs}
    notes = [
        "Figure: `complexity.svg`. Short sequences cost calls and the linear layers around attention, so exponents are below "
        "those on paper, which they reach from below.",
        "The fused kernel of self-attention keeps no logits, so that its memory is linear; a score that is written out is "
        "quadratic in both.",
    ]
    write("complexity", [clock, kept], about=__doc__ or "", notes=notes, raw=raw, options=given)


def exponent(values: dict[int, float]) -> float:
    """Slope of the logarithms between the two largest lengths."""
    (short, small), (long, large) = sorted(values.items())[-2:]
    return math.log(large / small) / math.log(long / short)


if __name__ == "__main__":
    main()

"""Learning rates for another batch size than the one that they were found with.

SGD and LARS take rates in proportion to the batch (Goyal et al. 2017, arXiv:1706.02677, section 2.1), Adam's family and Muon in
proportion to its square root (Malladi et al. 2022, arXiv:2205.10287, definition 5.1, whose betas and epsilon would move, too;
ours stay). Neither holds beyond the batch at which gradients stop being noisy (McCandlish et al. 2018, arXiv:1812.06162).
"""

from dataclasses import replace

from tameformer.optim.settings import OptimConfig


def for_batch_size(config: OptimConfig, batch_size: int) -> OptimConfig:
    """The settings with the rates for this batch size, where `base_batch_size` says which one they are for.

    Args:
        config: `peak_lr` and `adamw_lr` are rescaled; without a `base_batch_size` it comes back as it is.
        batch_size: In the unit of `base_batch_size`.

    Example:
        >>> for_batch_size(OptimConfig(peak_lr=1e-3, base_batch_size=64), 256).peak_lr
        0.002
        >>> for_batch_size(OptimConfig(name="sgd", peak_lr=1e-3, base_batch_size=64), 256).peak_lr
        0.004
    """
    if config.base_batch_size is None:
        return config
    ratio = batch_size / config.base_batch_size
    factor = ratio if config.name in ("sgd", "lars") else ratio**0.5
    other = (
        None if config.adamw_lr is None else config.adamw_lr * ratio**0.5
    )  # AdamW's, whatever the other optimizer is
    return replace(config, peak_lr=config.peak_lr * factor, adamw_lr=other, base_batch_size=None)

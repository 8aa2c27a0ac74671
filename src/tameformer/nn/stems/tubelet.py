"""Films cut into tubelets, small boxes of several frames, each a token (Arnab et al. 2021, "ViViT", arXiv:2103.15691)."""

from torch import Tensor, nn

from tameformer.nn.stems.patch import PatchStem, grid_size
from tameformer.shapes import Float, Stream

Films = Float[Tensor, "batch channels frames height width"]
"""Films, channels first."""


def tubelet_grid(
    num_frames: int, image_size: int | tuple[int, int], tubelet_frames: int, patch_size: int
) -> tuple[int, int, int]:
    """Tubelets along time, rows and columns.

    Raises:
        ValueError: `tubelet_frames` does not divide the frames, or `patch_size` the sides.

    Example:
        >>> tubelet_grid(8, (16, 12), 2, 4)
        (4, 4, 3)
    """
    if tubelet_frames < 1 or num_frames % tubelet_frames:
        common = [size for size in range(1, num_frames + 1) if num_frames % size == 0]
        raise ValueError(
            f"expected tubelet_frames that divides the frames, got tubelet_frames={tubelet_frames} and {num_frames} frames; "
            f"choose one of {common}, or films of another length"
        )
    rows, columns = grid_size(image_size, patch_size)
    return num_frames // tubelet_frames, rows, columns


class TubeletStem(nn.Module):
    """Each tubelet through one linear layer; tokens stretch by stretch of time, row by row.

    This is the convolution over time and space whose kernel and stride are the tubelet, as patches with the tubelet's frames
    for channels: a patch stem sees them as channel, frame, row, column.
    """

    def __init__(self, channels: int, tubelet_frames: int, patch_size: int, dim: int):
        super().__init__()
        self.tubelet_frames = tubelet_frames
        self.patches = PatchStem(channels * tubelet_frames, patch_size, dim)

    def forward(self, films: Films) -> Stream:
        """The tokens of the tubelets."""
        batch, channels, frames, height, width = films.shape
        stretches = films.unflatten(2, (frames // self.tubelet_frames, self.tubelet_frames)).transpose(1, 2)
        images = stretches.reshape(-1, channels * self.tubelet_frames, height, width)
        return self.patches(images).reshape(batch, -1, self.patches.project.out_features)

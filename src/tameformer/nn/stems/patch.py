"""Images cut into square patches, each mapped to a token (Dosovitskiy et al. 2020, "ViT", arXiv:2010.11929)."""

from torch import Tensor, nn

from tameformer.shapes import Float, Images, Stream


def grid_size(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: `patch_size` does not divide both sides of the image.

    Example:
        >>> grid_size((28, 14), 7)
        (4, 2)
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch_size < 1 or height % patch_size or width % patch_size:
        common = [size for size in range(1, min(height, width) + 1) if height % size == 0 and width % size == 0]
        raise ValueError(
            f"expected patch_size that divides the image size, got patch_size={patch_size} and images of "
            f"{height} x {width}; choose one of {common} or resize the images"
        )
    return height // patch_size, width // patch_size


def to_patches(images: Images, patch_size: int) -> Float[Tensor, "batch patches pixels"]:
    """Each patch flattened as channel, row, column; patches row by row."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.view(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * patch_size**2)


def to_pixels(patches: Float[Tensor, "batch patches pixels"], grid: tuple[int, int], patch_size: int) -> Images:
    """The inverse of `to_patches`; `grid` is rows and columns of patches.

    Example:
        >>> import torch
        >>> images = torch.randn(2, 3, 4, 6)
        >>> bool((to_pixels(to_patches(images, 2), (2, 3), 2) == images).all())
        True
    """
    (rows, columns), channels = grid, patches.shape[2] // patch_size**2
    cut = patches.view(len(patches), rows, columns, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(len(patches), channels, rows * patch_size, columns * patch_size)


class PatchStem(nn.Module):
    """Each patch, flattened as channel, row, column, through one linear layer; tokens row by row.

    This is the convolution with kernel and stride `patch_size`, written as the matrix product it is.
    """

    def __init__(self, channels: int, patch_size: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(channels * patch_size**2, dim)

    def forward(self, images: Images) -> Stream:
        """The tokens of the patches."""
        return self.project(to_patches(images, self.patch_size))

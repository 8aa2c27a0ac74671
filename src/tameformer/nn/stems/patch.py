"""Images cut into square patches, each mapped to a token (Dosovitskiy et al. 2020, "ViT", arXiv:2010.11929)."""

from torch import nn

from tameformer.shapes import Images, Stream


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
        batch, channels, height, width = images.shape
        rows, columns, size = height // self.patch_size, width // self.patch_size, self.patch_size
        patches = images.view(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        return self.project(patches.reshape(batch, rows * columns, channels * size * size))

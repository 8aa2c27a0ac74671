"""Building blocks: attention, positions, norms, feed-forward layers, residual placements, stems, poolings."""

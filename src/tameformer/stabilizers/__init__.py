"""Methods that make a Transformer stable, one a file: each changes any model and can be taken back or folded away."""

"""Whole training runs: one task a file, one recipe a YAML file."""

"""Checkpoints without trained weights, in the official layouts: for tests, examples and dry runs."""

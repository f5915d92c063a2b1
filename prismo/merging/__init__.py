"""Adapter into base model: the weights, the folder that comes out, its model card (start at `merge.py`)."""

"""Policies: from a checkpoint folder or hub id to actions, for evaluation and serving (start at `loading.py`)."""

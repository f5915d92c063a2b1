"""The dataset, the tiny models and the flags of the training tests."""

from tests.training.conftest import flags, libero, small_vggt  # noqa: F401 (fixtures)

"""SpatialVLA (spatialvla-4b-*): model, action tokeniser, processor and decoding."""

"""Tests of the SpatialVLA model family."""

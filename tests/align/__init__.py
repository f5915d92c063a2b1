"""Tests of `prismo.align`."""

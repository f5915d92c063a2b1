"""Tests of `prismo.data`. TensorFlow and tensorflow-datasets run only in the process of `tensorflow_side.py`."""

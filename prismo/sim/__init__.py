"""Simulators in their own processes; LIBERO with a scripted expert and HDF5 demonstrations.

Nothing in this package imports MuJoCo, robosuite or LIBERO before a function of `prismo.sim.libero` runs, so the
process that holds a model can import it freely (TensorFlow and Mesa crash each other in one process, and EGL beside
CUDA inference has been seen to abort). `interface`, `messages` and `server` need numpy only: what serves a simulator
of another environment.
"""

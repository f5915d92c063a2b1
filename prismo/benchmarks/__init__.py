"""Benchmarks that `prismo eval` knows: one module each, named in `prismo.eval.benchmark.BENCHMARKS`."""

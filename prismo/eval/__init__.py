"""Roll-outs of policies in LIBERO: what is run, how an episode goes, and what is kept of it."""

from prismo.eval.config import EvalConfig
from prismo.eval.results import EpisodeResult, Summary
from prismo.eval.run import evaluate

__all__ = ["EpisodeResult", "EvalConfig", "Summary", "evaluate"]

"""Is a checkpoint or dataset what it should be? One page that says so, for `prismo verify`."""

from prismo.verify.page import page
from prismo.verify.report import Report, verify
from prismo.verify.subject import Options

__all__ = ["Options", "Report", "page", "verify"]

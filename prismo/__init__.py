"""prismo: fine-tune, evaluate and deploy vision-language-action policies (see README.md)."""

__version__ = "0.1.0"

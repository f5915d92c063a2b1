"""Vision-language-action models, their vision towers, heads and adapters."""

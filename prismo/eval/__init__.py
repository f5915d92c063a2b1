"""Roll-outs of policies in LIBERO: what is run (`plan`), how an episode goes (`rollout`), what is kept (`results`)."""

"""Roll-outs of policies: what is run (`plan`), how an episode goes (`episode`), what is kept (`results`)."""

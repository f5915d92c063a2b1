"""Roll-outs of policies: what is run and how an episode goes (`episode`), what is kept (`results`)."""

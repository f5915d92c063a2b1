"""What is trained on top of a base model; the flags, the benchmark and the model builder share it."""

from __future__ import annotations

from dataclasses import dataclass, field

from prismo.models.lora import LoraSpec


@dataclass(frozen=True)
class PolicyOptions:
    """What is trained on top of the base model.

    Attributes:
        head: how actions are predicted, a key of `prismo.models.heads.HEADS`.
        use_proprio: feed the robot state as a token.
        use_film: modulate the vision towers by the instruction.
        lora: adapters of the base.
        diffusion_steps: length of the noise schedule, with the diffusion head.
        film_identity_init, film_exclude_padding: see `prismo.models.film.FiLMVisionBackbone`.
    """

    head: str = "l1"
    use_proprio: bool = False
    use_film: bool = False
    lora: LoraSpec = field(default_factory=LoraSpec)
    diffusion_steps: int = 50
    film_identity_init: bool = True
    film_exclude_padding: bool = True

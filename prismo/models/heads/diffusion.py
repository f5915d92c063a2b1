"""Denoising of the actions: the head predicts the noise of a DDIM process (arXiv 2010.02502), and the whole language
model is run once per step. Shape legend: see `prismo.models.heads.base`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from prismo.models.heads.base import ActionHead, HeadLoss, HeadSizes, Run, Shapes, masked_mean
from prismo.models.heads.mlp import MLPResNet, hidden_width
from prismo.models.projectors import NoisyActionProjector, TimeEmbedding


class DDIM:
    """Deterministic DDIM process with a squared-cosine noise schedule (the settings of the published heads).

    Predicts noise (epsilon), clips the estimate of the clean sample to [-1, 1], eta = 0, "leading" step spacing, and
    ends at the clean sample. `alpha_bar` [train_steps] is the fraction of signal variance left at each timestep, fp32.
    """

    def __init__(self, train_steps: int = 50) -> None:
        if train_steps < 1:
            raise ValueError(f"num_diffusion_steps_train must be at least 1, got {train_steps}")
        self.train_steps = train_steps
        signal = [math.cos((i / train_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train_steps + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(signal)]
        # Pinned to the CPU: models are also built inside `torch.device("meta")`.
        self.betas = torch.tensor(betas, dtype=torch.float32, device="cpu")
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)

    def timesteps(self, steps: int) -> list[int]:
        """The `steps` training timesteps visited by sampling, from noisy to clean."""
        if not 1 <= steps <= self.train_steps:
            raise ValueError(
                f"num_diffusion_steps_inference must be between 1 and {self.train_steps}, "
                f"the steps of the training schedule; got {steps}"
            )
        return [i * (self.train_steps // steps) for i in reversed(range(steps))]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy version [B, ...] of `clean` [B, ...] at one integer timestep per sample [B]."""
        alpha = self.alpha_bar.to(clean.device)[timesteps].view(-1, *[1] * (clean.ndim - 1))
        return (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(clean.dtype)

    def step(self, noise: Tensor, timestep: int, sample: Tensor, steps: int) -> Tensor:
        """One denoising step of a `steps`-step sampling: predicted noise and sample at `timestep` -> next sample."""
        previous = timestep - self.train_steps // steps
        alpha = float(self.alpha_bar[timestep])
        alpha_previous = float(self.alpha_bar[previous]) if previous >= 0 else 1.0
        clean = ((sample - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)).clamp(-1, 1)
        return math.sqrt(alpha_previous) * clean + math.sqrt(1 - alpha_previous) * noise


@dataclass(frozen=True)
class NoisyActions:
    """One diffusion training example per sample.

    Attributes:
        noise: the target [B, K, A].
        actions: what the language model sees in the action slots [B, K, A].
        time_embedding: the extra token [B, 1, D].
    """

    noise: Tensor
    actions: Tensor
    time_embedding: Tensor


class DiffusionActionHead(nn.Module):
    """Noise prediction for a chunk of normalised actions; the timestep enters as a token of the language model.

    Args:
        input_dim, hidden_dim, action_dim, chunk: as in `MLPResNet`.
        train_steps: length of the noise schedule.
    """

    def __init__(
        self,
        input_dim: int = 4096,
        hidden_dim: int | None = None,
        action_dim: int = 7,
        chunk: int = 8,
        train_steps: int = 50,
    ) -> None:
        super().__init__()
        mlp = MLPResNet(input_dim, hidden_dim, action_dim, chunk)
        self.noise_predictor = nn.ModuleDict({"mlp_resnet": mlp})  # its published name
        self.time_encoder = TimeEmbedding(input_dim)
        self.ddim = DDIM(train_steps)

    def forward(self, action_hidden: Tensor) -> Tensor:
        """Hidden states of the action slots [B, K*A, D] -> predicted noise [B, K, A]."""
        return self.noise_predictor["mlp_resnet"](action_hidden)

    def noisy_actions(
        self, actions: Tensor, noise: Tensor | None = None, timesteps: Tensor | None = None
    ) -> NoisyActions:
        """Draw a training example for normalised ground-truth `actions` [B, K, A].

        `noise` [B, K, A] (standard normal) and integer `timesteps` [B] (uniform over the schedule) are drawn if absent.
        """
        if noise is None:
            noise = torch.randn_like(actions)
        if timesteps is None:
            timesteps = torch.randint(self.ddim.train_steps, (len(actions),), device=actions.device)
        embedding = self.time_encoder(timesteps).unsqueeze(1)
        return NoisyActions(noise, self.ddim.add_noise(actions, noise, timesteps), embedding)

    @torch.no_grad()
    def sample(self, action_hidden: Callable[[Tensor, Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
        """Denoise `start` [B, K, A] (standard normal) to normalised actions [B, K, A].

        Args:
            action_hidden: one language-model pass: (noisy actions [B, K, A], time token [B, 1, D]) -> [B, K*A, D].
            steps: number of passes; the schedule is subsampled.
        """
        sample = start
        for timestep in self.ddim.timesteps(steps):
            time_token = self.time_encoder(torch.full((len(sample),), timestep, device=sample.device)).unsqueeze(1)
            noise = self(action_hidden(sample, time_token)).to(sample.dtype)
            sample = self.ddim.step(noise, timestep, sample, steps)
        return sample


@dataclass(frozen=True)
class DiffusionHead(ActionHead):
    """The head as training and prediction use it."""

    action_head: DiffusionActionHead
    noisy_action_projector: NoisyActionProjector

    title = "a diffusion head"
    mark = "noise_predictor."
    flag = "use_diffusion"
    from_noise = True

    @classmethod
    def build(cls, sizes: HeadSizes, shapes: Shapes | None = None) -> Self:
        hidden = hidden_width(shapes)
        head = DiffusionActionHead(sizes.width, hidden, sizes.action_dim, sizes.chunk, sizes.noise_steps)
        return cls(head, NoisyActionProjector(sizes.width))

    def check_steps(self, steps: int) -> None:
        self.action_head.ddim.timesteps(steps)

    def loss(self, run: Run, actions: Tensor, action_mask: Tensor | None) -> HeadLoss:
        noisy = self.action_head.noisy_actions(actions)
        states = run(self.noisy_action_projector(noisy.actions), noisy.time_embedding)
        noise = self.action_head(states).float()
        return HeadLoss(masked_mean((noise - noisy.noise.float()) ** 2, action_mask))

    def predict(self, run: Run) -> Tensor:
        return self.action_head.sample(
            lambda noisy, time_token: run(self.noisy_action_projector(noisy), time_token), run.noise, run.steps
        )

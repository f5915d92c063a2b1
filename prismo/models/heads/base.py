"""What an action head is: modules with their files, a loss, a prediction, and how its files are recognised.

A head never sees the model: it gets a `Run`, one batch whose text, pictures and state are fixed, and makes passes.

Shape legend: B samples, K actions per chunk, A numbers per action, L text tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Protocol, Self

from torch import Tensor, nn

from prismo.models.bin_tokenizer import BinTokenizer

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeadSizes:
    """What a head is built for.

    Attributes:
        width: of the language model.
        action_dim: numbers per action.
        chunk: actions per prediction.
        noise_steps: length of the training schedule, for heads that denoise.
    """

    width: int
    action_dim: int
    chunk: int
    noise_steps: int = 50


class Run(Protocol):
    """The language model on one batch; every call is a pass.

    Attributes:
        labels: text with the action tokens [B, L].
        tokens: the model's action tokens.
        shape: K and A.
        steps: passes of a prediction that starts from noise.
    """

    labels: Tensor
    tokens: BinTokenizer
    shape: tuple[int, int]
    steps: int

    @property
    def noise(self) -> Tensor:
        """Standard normal numbers [B, K, A] for a prediction to start from; the same at every call."""
        ...

    def __call__(self, action_embeddings: Tensor | None = None, time_token: Tensor | None = None) -> Tensor:
        """Hidden states of the action slots [B, K*A, D].

        Args:
            action_embeddings: what the model reads in the action slots [B, K*A, D]; None = zeros.
            time_token: one more token behind the state [B, 1, D].
        """
        ...

    def text_states(self) -> Tensor:
        """Hidden states [B, L-1, D]; those in place i predict text token i + 1."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """The language model's logits for hidden states [..., D]."""
        ...


@dataclass(frozen=True)
class HeadLoss:
    """What a head gives in training.

    Attributes:
        loss: the scalar to differentiate.
        metrics: detached scalars beside it.
        actions: predicted normalised actions [B, K, A]; None for heads that need more than one pass.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    actions: Tensor | None = None


@dataclass(frozen=True)
class ActionHead:
    """One way to get actions out of the language model. A new one is a file with a subclass and a line in `HEADS`.

    The dataclass fields of a subclass are its modules; their names are the stems of its files. The module that
    `mark` is looked for in is called `action_head`.

    Attributes:
        title: with an article, for sentences.
        mark: how names of tensors in its `action_head` file begin, and only there; None for a head without modules.
        flag: the published flag that chooses it beside `--action_head NAME`.
        uses_lm_head: the language model's own output layer takes part, and adapters in it are trained.
        from_noise: `predict` starts from `run.noise` and makes `run.steps` passes.
    """

    title: ClassVar[str]
    mark: ClassVar[str | None] = None
    flag: ClassVar[str | None] = None
    uses_lm_head: ClassVar[bool] = False
    from_noise: ClassVar[bool] = False

    @classmethod
    def stems(cls) -> tuple[str, ...]:
        """Of its files."""
        return tuple(each.name for each in fields(cls))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, saved and loaded, by the stems of the files."""
        return {stem: getattr(self, stem) for stem in self.stems()}

    @classmethod
    def build(cls, sizes: HeadSizes, shapes: Shapes | None = None) -> Self:
        """A new head in fp32.

        Args:
            sizes: what it is for.
            shapes: of the tensors in its `action_head` file, where sizes are that the policy does not decide.
        """
        raise NotImplementedError

    @classmethod
    def action_dim(cls, shapes: Shapes) -> int | None:
        """Numbers per action: rows of the last layer (`fc2`) in its `action_head` file; None = there is none.

        Raises:
            ValueError: that is no matrix.
        """
        last = next((name for name in shapes if name.endswith("fc2.weight")), None)
        if last is not None and len(shapes[last]) != 2:
            raise ValueError(f"{last} is no matrix, its shape is {list(shapes[last])}")
        return None if last is None else shapes[last][0]

    def check_steps(self, steps: int) -> None:
        """Raise ValueError for a number of steps that `predict` cannot take."""

    def loss(self, run: Run, actions: Tensor, action_mask: Tensor | None) -> HeadLoss:
        """Training loss of a batch.

        Args:
            run: the model on the batch.
            actions: normalised [B, K, A].
            action_mask: False at actions behind the end of an episode [B, K]; None = all are real.
        """
        raise NotImplementedError

    def predict(self, run: Run) -> Tensor:
        """Normalised actions [B, K, A]."""
        raise NotImplementedError


def masked_mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of [B, K, A] over the real actions, which `mask` [B, K] tells."""
    if mask is None:
        return errors.mean()
    weight = mask.unsqueeze(-1).to(errors.dtype)
    return (errors * weight).sum() / (weight.sum() * errors.shape[-1]).clamp(min=1)

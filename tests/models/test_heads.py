"""Heads and projectors: published names, sizes and figures."""

import math

import pytest
import torch
from torch import nn

from prismo.models.heads import DDIM, DiffusionActionHead, L1RegressionActionHead
from prismo.models.projectors import NoisyActionProjector, ProprioProjector, TimeEmbedding
from tests.golden import close, figures, fill, normal_input, salt, uniform_input

HEAD_KEYS = {
    f"{name}.{kind}"
    for name in (
        "layer_norm1",
        "fc1",
        "mlp_resnet_blocks.0.ffn.0",
        "mlp_resnet_blocks.0.ffn.1",
        "mlp_resnet_blocks.1.ffn.0",
        "mlp_resnet_blocks.1.ffn.1",
        "layer_norm2",
        "fc2",
    )
    for kind in ("weight", "bias")
}


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_full_size_modules_have_the_published_names_and_parameter_counts():
    with torch.device("meta"):
        l1, diffusion = L1RegressionActionHead(), DiffusionActionHead()
        proprio, noisy = ProprioProjector(), NoisyActionProjector()
    assert parameter_count(l1) == parameter_count(diffusion) == 151_117_831
    assert parameter_count(proprio) == 16_818_176
    assert parameter_count(noisy) == 16_789_504
    assert set(l1.state_dict()) == {f"model.{key}" for key in HEAD_KEYS}
    assert set(diffusion.state_dict()) == {f"noise_predictor.mlp_resnet.{key}" for key in HEAD_KEYS}
    assert set(proprio.state_dict()) == set(noisy.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    shapes = {name: tuple(value.shape) for name, value in l1.state_dict().items()}
    assert shapes["model.layer_norm1.weight"] == (28672,)
    assert shapes["model.fc1.weight"] == (4096, 28672)
    assert shapes["model.fc2.weight"] == (7, 4096)


def test_l1_head_uses_only_the_slots_of_its_own_action():
    head = L1RegressionActionHead(input_dim=6, action_dim=3, chunk=4)
    hidden = torch.randn(2, 12, 6)
    before = head(hidden)
    assert before.shape == (2, 4, 3)
    hidden[:, 3:6] = torch.randn(2, 3, 6)  # the slots of action 1
    changed = (head(hidden) != before).any(dim=(0, 2))
    assert changed.tolist() == [False, True, False, False]


def test_l1_head_runs_in_its_own_dtype():
    head = L1RegressionActionHead(input_dim=6, action_dim=3, chunk=4)
    assert head(torch.randn(1, 12, 6, dtype=torch.bfloat16)).dtype == torch.float32
    assert head.bfloat16()(torch.randn(1, 12, 6)).dtype == torch.bfloat16


def test_wrong_slot_count_is_one_clear_error():
    head = L1RegressionActionHead(input_dim=6, action_dim=7, chunk=8)
    with pytest.raises(ValueError, match=r"8 \* 7 = 56"):
        head(torch.zeros(1, 40, 6))
    with pytest.raises(ValueError, match=r"expects \[batch, 8\], got \[2, 7\]"):
        ProprioProjector(16, 8)(torch.zeros(2, 7))


def test_projectors_give_one_token_per_state_and_per_action_number():
    assert ProprioProjector(16, 8)(torch.zeros(3, 8)).shape == (3, 1, 16)
    assert NoisyActionProjector(16)(torch.zeros(3, 8, 7)).shape == (3, 56, 16)


def test_ddim_schedule_has_the_published_values():
    ddim = DDIM(50)
    assert ddim.betas[0].item() == pytest.approx(0.00174751, abs=5e-9)
    assert ddim.betas[49].item() == pytest.approx(0.999)
    for index, value in ((0, 0.99825251), (10, 0.87912256), (25, 0.46270686)):
        assert ddim.alpha_bar[index].item() == pytest.approx(value, abs=5e-8)
    assert ddim.alpha_bar[49].item() == pytest.approx(9.7118e-7, rel=1e-4)
    assert ddim.timesteps(50) == list(range(49, -1, -1))
    assert ddim.timesteps(10) == list(range(45, -1, -5))
    with pytest.raises(ValueError, match="between 1 and 50"):
        ddim.timesteps(51)


def test_ddim_returns_to_the_clean_sample_when_the_noise_is_known():
    ddim, generator = DDIM(50), torch.Generator().manual_seed(0)
    clean = torch.rand(2, 8, 7, generator=generator) * 2 - 1
    noise = torch.randn(2, 8, 7, generator=generator)
    sample = ddim.add_noise(clean, noise, torch.tensor([40, 40]))
    for timestep in ddim.timesteps(5):
        sample = ddim.step(noise, timestep, sample, 5)
    torch.testing.assert_close(sample, clean, atol=1e-5, rtol=0)


def test_ddim_clips_the_estimate_of_the_clean_sample():
    # Without clipping a useless prediction at the noisiest step would give values of about 1000.
    sample = DDIM(50).step(torch.zeros(1, 8, 7), 49, torch.ones(1, 8, 7), 50)
    assert sample.abs().max() <= 1


def test_diffusion_sampling_calls_the_model_once_per_step_from_noisy_to_clean():
    head = DiffusionActionHead(input_dim=8, action_dim=3, chunk=2)
    seen = []

    def action_hidden(noisy, time_token):
        seen.append(time_token)
        return noisy.flatten(1).unsqueeze(-1).expand(-1, -1, 8)

    actions = head.sample(action_hidden, torch.randn(4, 2, 3), steps=5)
    assert actions.shape == (4, 2, 3)
    assert actions.isfinite().all()
    expected = head.time_encoder(torch.tensor([40, 30, 20, 10, 0]))
    torch.testing.assert_close(torch.stack([t[0, 0] for t in seen]), expected)


def test_noisy_actions_draw_one_timestep_per_sample():
    head = DiffusionActionHead(input_dim=8, action_dim=3, chunk=2)
    torch.manual_seed(0)
    drawn = head.noisy_actions(torch.zeros(2000, 2, 3))
    assert drawn.time_embedding.shape == (2000, 1, 8)
    assert len(drawn.time_embedding.unique(dim=0)) == 50
    # With clean actions of zero the result is noise scaled by one factor per sample.
    factor = drawn.actions / drawn.noise
    torch.testing.assert_close(factor, factor[:, :1, :1].expand_as(factor))


def test_time_embedding_is_sines_then_cosines():
    embedding = TimeEmbedding(8)(torch.tensor([0, 3]))
    assert embedding[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert embedding[1, 0].item() == pytest.approx(math.sin(3))
    assert embedding[1, 7].item() == pytest.approx(math.cos(3 * 1e-4))


def test_l1_head_gives_the_golden_actions():
    golden = figures("train_l1_align.npz")
    states, expected = golden["action_states"], golden["pred"]
    chunk, action_dim = expected.shape[1:]
    head = L1RegressionActionHead(states.shape[-1], None, action_dim, chunk)
    fill(head, salt("action_head"))
    close(head(states), expected)


def test_diffusion_gives_the_golden_noisy_actions_and_time_tokens():
    golden = figures("diffusion.npz")
    shape = golden["noisy"].shape
    actions = uniform_input("gt", *shape) * 2 - 1
    head = DiffusionActionHead(golden["time_emb"].shape[-1], None, shape[2], shape[1])
    drawn = head.noisy_actions(actions, normal_input("noise", *shape), torch.tensor([3, 41]))
    close(drawn.actions, golden["noisy"])
    close(drawn.time_embedding, golden["time_emb"])
    assert head.ddim.timesteps(len(golden["timesteps"])) == golden["timesteps"].tolist()

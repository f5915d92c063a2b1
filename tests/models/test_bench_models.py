"""Full-size random models: sizes without memory, and the same construction at a size that fits."""

import pytest
import torch

from prismo.align.vggt import VGGTAggregator
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.testing.tiny import tiny_openvla_config
from scripts.bench_models import build_openvla_7b, build_vggt_1b


def test_sizes_are_the_published_ones():
    openvla, vggt = build_openvla_7b("meta"), build_vggt_1b("meta")
    assert sum(p.numel() for p in openvla.parameters()) == 7_541_237_184
    assert len(openvla.state_dict()) == 982
    assert {p.dtype for p in openvla.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in vggt.parameters()) == 909_112_320
    assert not any(p.requires_grad for p in vggt.parameters())


def test_the_construction_gives_a_working_model():
    config = tiny_openvla_config()
    model = build_openvla_7b("cpu", torch.bfloat16, config=config)
    model.self_test()
    assert all(p.isfinite().all() and p.std() > 0 for p in model.parameters() if p.numel() > 1)
    usual = OpenVLAForActionPrediction(config)
    for (name, ours), (_, expected) in zip(model.named_buffers(), usual.named_buffers(), strict=True):
        assert ours.dtype == expected.dtype, name
        torch.testing.assert_close(ours, expected)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_fit_and_run_on_a_gpu():
    openvla = build_openvla_7b("cuda")
    openvla.self_test()
    vggt: VGGTAggregator = build_vggt_1b("cuda", torch.bfloat16)
    features = vggt.features(torch.rand(1, 2, 3, 224, 224, device="cuda"), -1)
    assert features.shape == (1, 2, 37, 37, 2048)
    assert features.isfinite().all()

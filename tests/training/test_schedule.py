"""Learning rate: warm-up composed with decay, one meaning of a step."""

import math

import pytest

from prismo.training.optim import Schedule


def test_warmup_then_multistep():
    schedule = Schedule(peak=1.0, warmup_steps=10, decay_step=20, max_steps=40)
    rates = [schedule.rate(done) for done in range(40)]
    assert rates[0] == pytest.approx(0.1 + 0.9 / 10)
    assert rates[9] == pytest.approx(1.0)  # the tenth update is the first at the full rate
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:20] == [1.0] * 10
    # The original's warm-up went on overwriting the rate, so that this decay never came (openvla_sf defect 2).
    assert rates[20:] == pytest.approx([0.1] * 20)


def test_warmup_then_cosine():
    schedule = Schedule(peak=2.0, kind="CosineAnnealingLR", warmup_steps=4, max_steps=100)
    assert schedule.rate(0) == pytest.approx(2.0 * (0.1 + 0.9 / 4), rel=1e-3)
    assert schedule.rate(50) == pytest.approx(2e-3 + (2.0 - 2e-3) * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule.rate(100) == pytest.approx(2e-3)
    assert schedule.rate(500) == pytest.approx(2e-3)


def test_no_warmup():
    assert Schedule(peak=5e-4, decay_step=3).rate(0) == 5e-4


def test_unknown_scheduler():
    with pytest.raises(ValueError, match=r"Did you mean 'CosineAnnealingLR'"):
        Schedule(peak=1.0, kind="CosineAnnealing")

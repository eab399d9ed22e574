import pytest

from examples.cifar10_supersampling import effective
from examples.cifar10_supersampling.effective import (
    STATED_NS,
    clipped_fractions,
    effective_n,
    published_step,
    stated_step,
)


def test_the_authors_moments_clip_several_times_as_many_wide_losses(monkeypatch):
    monkeypatch.setattr(effective, "SETTLING", 6000)
    monkeypatch.setattr(effective, "COUNTED", 300)
    (stated,) = clipped_fractions(stated_step, [2.0], spread=1.0, sequences=150, seed=0)
    (theirs,) = clipped_fractions(published_step, [2.0], spread=1.0, sequences=150, seed=0)
    assert stated == pytest.approx(0.098, abs=0.01)
    assert theirs == pytest.approx(0.395, abs=0.01)


def test_at_the_effective_n_the_stated_algorithm_clips_equally_many_losses():
    stated = [0.5 * 0.6**n for n in STATED_NS]
    for n in (0.25, 1.1, 4.0):
        assert effective_n(stated, 0.5 * 0.6**n) == f"{n:.2f}"
    assert effective_n(stated, 0.0) == "above 8"

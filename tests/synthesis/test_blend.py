from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.synthesis.simulate import blend_anomaly


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_blend_is_the_papers_formula_to_half_a_step(seed: int, opacity: float) -> None:
    generator = np.random.default_rng(seed)
    normal, anomaly = generator.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    mask = generator.random((6, 5)) < 0.5
    augmented = blend_anomaly(normal, anomaly, mask, opacity=opacity)
    i, a, m = normal / 255, anomaly / 255, mask[..., None].astype(float)
    expected = (1 - m) * i + (1 - opacity) * m * a + opacity * m * i
    assert augmented.dtype == np.uint8
    np.testing.assert_allclose(augmented / 255, expected, atol=0.5001 / 255)


def test_blend_by_hand() -> None:
    normal, anomaly = np.full((1, 2, 3), 100, np.uint8), np.full((1, 2, 3), 200, np.uint8)
    augmented = blend_anomaly(normal, anomaly, np.array([[True, False]]), opacity=0.25)
    assert augmented[0].tolist() == [[175] * 3, [100] * 3]


@pytest.mark.parametrize(("opacity", "expected"), [(0.0, 200), (1.0, 100)])
def test_opacity_goes_from_anomaly_to_normal_image(opacity: float, expected: int) -> None:
    normal, anomaly = np.full((3, 3, 3), 100, np.uint8), np.full((3, 3, 3), 200, np.uint8)
    assert (
        blend_anomaly(normal, anomaly, np.ones((3, 3), bool), opacity=opacity) == expected
    ).all()


def test_the_normal_image_is_not_changed() -> None:
    normal = np.full((3, 3, 3), 100, np.uint8)
    blend_anomaly(normal, normal + 50, np.ones((3, 3), bool), opacity=0.0)
    assert (normal == 100).all()

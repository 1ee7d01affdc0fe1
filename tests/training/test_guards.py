from __future__ import annotations

import math

import pytest
import torch

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import TrainSettings
from almrr_pipeline.training.callbacks import check_finite
from almrr_pipeline.training.runtime import explain_compile_errors, explain_out_of_memory


def test_finite_values_pass() -> None:
    check_finite({"loss": 1.0, "gradient_norm": 0.0}, step=1, settings=TrainSettings())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_the_step_and_all_parts(value: float) -> None:
    with pytest.raises(AlmrrError) as caught:
        check_finite(
            {"loss": value, "refinement": 0.25}, step=17, settings=TrainSettings(learning_rate=0.5)
        )
    for part in (
        "step 17",
        "loss not finite",
        f"loss {value:g}",
        "refinement 0.25",
        "learning_rate 0.5",
    ):
        assert part in str(caught.value)


def test_memory_that_runs_out_names_the_batch_size() -> None:
    with (
        pytest.raises(AlmrrError, match=r"batch_size 24 .*12 on each of 2.*halve.*bf16-mixed"),
        explain_out_of_memory(TrainSettings(batch_size=24), world_size=2),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_gpus_out_of_memory_names_the_batch_size() -> None:
    with (
        pytest.raises(AlmrrError, match="batch_size 24: halve"),
        explain_out_of_memory(TrainSettings(batch_size=24, precision="bf16-mixed"), world_size=1),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_other_errors_pass_as_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shape"),
        explain_out_of_memory(TrainSettings(batch_size=24), world_size=1),
    ):
        torch.zeros(2).view(3)


def test_a_model_that_cannot_be_compiled_is_explained() -> None:
    def fail(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler here")

    with (
        pytest.raises(AlmrrError, match=r"set train\.compile to false.*no compiler here"),
        explain_compile_errors(),
    ):
        torch.compile(lambda x: x + 1, backend=fail)(torch.ones(2))

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from tiny_training import build_model, build_synthetic_set

import almrr_pipeline.common.progress
import almrr_pipeline.training.callbacks
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.model.almrr import ALMRR

Train = Callable[..., pd.DataFrame]


def weights_of(model: ALMRR) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_bit_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_training_lowers_both_losses(model: ALMRR, synthetic_set: Any, train: Train) -> None:
    history = train(model, synthetic_set, steps=16, learning_rate=5e-3, log_every=4)
    assert history["reconstruction"].iloc[-1] < 0.9 * history["reconstruction"].iloc[0]
    assert history["refinement"].iloc[-1] < 0.8 * history["refinement"].iloc[0]


def test_history_has_a_row_a_window(model: ALMRR, synthetic_set: Any, train: Train) -> None:
    history = train(
        model, synthetic_set, steps=5, log_every=2, reconstruction_weight=0.5, refinement_weight=3.0
    )
    assert history.columns.tolist() == [
        "step",
        "loss",
        "reconstruction",
        "refinement",
        "learning_rate",
    ]
    assert history["step"].tolist() == [2, 4, 5]
    weighted = 0.5 * history["reconstruction"] + 3.0 * history["refinement"]
    np.testing.assert_allclose(history["loss"], weighted, rtol=1e-5)


def test_steps_follow_the_number_of_normal_images(synthetic_set: Any, train: Train) -> None:
    """Three, so few that the least would do; no more than asked for."""
    history = train(build_model(), synthetic_set, steps=3, steps_per_image=1000.0, log_every=1)
    assert history["step"].tolist() == [1, 2, 3]


def test_history_rows_are_means_over_their_steps(synthetic_set: Any, train: Train) -> None:
    each = train(build_model(), synthetic_set, steps=4, log_every=1, fingerprint="each")
    pairs = train(build_model(), synthetic_set, steps=4, log_every=2, fingerprint="pairs")
    np.testing.assert_allclose(
        pairs["loss"], each["loss"].to_numpy().reshape(2, 2).mean(1), rtol=1e-6
    )


def test_history_names_the_rate_that_the_step_used(
    model: ALMRR, synthetic_set: Any, train: Train
) -> None:
    history = train(
        model, synthetic_set, steps=4, log_every=1, learning_rate=0.01, schedule="cosine"
    )
    expected = [
        0.01,
        *(0.01 * (1 + np.cos(np.pi * k / 4)) / 2 for k in (1, 2, 3)),
    ]  # one step of warm-up
    assert history["learning_rate"].tolist() == pytest.approx(expected)


def test_the_model_ends_in_evaluation_mode_with_its_backbone_unchanged(
    model: ALMRR, synthetic_set: Any, train: Train
) -> None:
    before = weights_of(model)
    train(model, synthetic_set)
    after = weights_of(model)
    assert not any(module.training for module in model.modules())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("backbone.") for name in moved)
    assert {name for name, one in model.named_parameters() if one.requires_grad} <= moved


def test_equal_seeds_give_bit_identical_weights(synthetic_set: Any, train: Train) -> None:
    one, other = build_model(), build_model()
    histories = [train(each, synthetic_set) for each in (one, other)]
    assert_bit_identical(weights_of(one), weights_of(other))
    pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_another_seed_gives_other_weights(synthetic_set: Any, train: Train) -> None:
    one, other = build_model(), build_model()
    train(one, synthetic_set, seed=0)
    train(other, synthetic_set, seed=1)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_the_callers_state_is_left_alone(model: ALMRR, synthetic_set: Any, train: Train) -> None:
    torch.manual_seed(77)
    random.seed(77)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    flags = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
    )
    train(model, synthetic_set, deterministic=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert flags == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
    )


def test_the_result_does_not_follow_the_callers_random_state(
    synthetic_set: Any, train: Train
) -> None:
    one, other = build_model(), build_model()
    for seed, each in enumerate((one, other)):
        torch.manual_seed(seed)
        train(each, synthetic_set)
    assert_bit_identical(weights_of(one), weights_of(other))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_file_and_no_word_is_left(
    model: ALMRR,
    precision: str,
    synthetic_set: Any,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    recwarn: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    train(model, synthetic_set, precision=precision)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list((tmp_path / "scratch").iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_kept_checkpoints_are_the_callers_to_remove(
    synthetic_set: Any, train: Train, tmp_path: Path
) -> None:
    finished, again = build_model(), build_model()
    history = train(finished, synthetic_set, keep_checkpoints=True)
    assert sorted(path.name for path in (tmp_path / "scratch").rglob("*.ckpt")) == [
        "step_000000002.ckpt",
        "step_000000004.ckpt",
    ]
    repeated = train(
        again, synthetic_set
    )  # a finished training is taken up where it stands: at its end
    assert_bit_identical(weights_of(finished), weights_of(again))
    pd.testing.assert_frame_equal(history, repeated, check_exact=True)


def test_a_set_smaller_than_a_batch_can_be_trained_on(train: Train) -> None:
    history = train(build_model(), build_synthetic_set(samples=3, normals=1), batch_size=5, steps=2)
    assert np.isfinite(history["loss"]).all()


def test_curves_are_reported_as_they_arise(model: ALMRR, synthetic_set: Any, train: Train) -> None:
    reported: list[tuple[int, dict[str, float]]] = []
    history = train(
        model, synthetic_set, on_metrics=lambda step, values: reported.append((step, dict(values)))
    )
    assert [step for step, _ in reported] == [2, 4]
    assert [values for _, values in reported] == history.drop(columns="step").to_dict("records")


def test_progress_off_a_terminal_is_a_few_log_lines(
    model: ALMRR, synthetic_set: Any, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="almrr_pipeline"):
        train(model, synthetic_set)
    lines = [record.message for record in caplog.records if "loss" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("Trained 4 steps: loss")


def test_progress_lines_show_the_loss_and_the_time_left(
    model: ALMRR,
    synthetic_set: Any,
    train: Train,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(almrr_pipeline.common.progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, logger="almrr_pipeline"):
        train(model, synthetic_set)
    lines = [record.message for record in caplog.records if "steps (" in record.message]
    assert [line.partition(",")[0] for line in lines] == [
        f"training: {done} steps ({25 * done} %)" for done in (1, 2, 3, 4)
    ]
    assert "loss 0." in lines[-1]
    assert "00:00 left" in lines[-1]


def test_progress_on_a_terminal_is_a_bar_with_the_loss(
    model: ALMRR, synthetic_set: Any, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(model, synthetic_set)
    bar = capsys.readouterr().err
    assert "4/4" in bar
    assert "loss=" in bar


def test_a_loss_that_explodes_stops_with_the_step_and_leaves_the_last_good_checkpoint(
    model: ALMRR, synthetic_set: Any, train: Train, tmp_path: Path
) -> None:
    with pytest.raises(AlmrrError, match=r"stopped at step 2: .*not finite.*learning_rate 1e\+25"):
        train(model, synthetic_set, learning_rate=1e25, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "scratch").rglob("*.ckpt")] == ["step_000000001.ckpt"]
    assert not model.training


def test_a_gradient_that_is_not_finite_stops_too(
    model: ALMRR, synthetic_set: Any, train: Train
) -> None:
    largest = torch.finfo(torch.float32).max
    with pytest.raises(AlmrrError, match="stopped at step 1: gradient_norm not finite"):
        train(model, synthetic_set, refinement_weight=largest / 2, reconstruction_weight=0.0)


def test_devices_that_do_not_exist_are_named(
    model: ALMRR, synthetic_set: Any, train: Train
) -> None:
    with pytest.raises(AlmrrError, match="accelerator tpu"):
        train(model, synthetic_set, accelerator="tpu")


def test_a_batch_of_one_is_refused_where_it_cannot_be_normalized(
    model: ALMRR, synthetic_set: Any, train: Train
) -> None:
    with pytest.raises(AlmrrError, match=r"batch_size 1 leaves 1 devices one sample each.*take 2"):
        train(model, synthetic_set, batch_size=1)


def test_a_synthetic_set_that_does_not_fit_is_refused_before_anything_is_written(
    model: ALMRR, synthetic_set: Any, train: Train, tmp_path: Path
) -> None:
    cut = replace(synthetic_set, masks=synthetic_set.masks[:5])
    with pytest.raises(AlmrrError, match="5 masks"):
        train(model, cut)
    assert not (tmp_path / "scratch").exists()


def test_features_are_standardized_over_the_normal_images(synthetic_set: Any, train: Train) -> None:
    model, expected = build_model(standardize=True), build_model(standardize=True)
    expected.eval().fit_standardization(
        [torch.from_numpy(synthetic_set.normals).permute(0, 3, 1, 2) / 255]
    )
    train(model, synthetic_set)
    torch.testing.assert_close(model.feature_mean, expected.feature_mean)
    torch.testing.assert_close(model.feature_std, expected.feature_std)


def test_channels_last_changes_rounding_alone(synthetic_set: Any, train: Train) -> None:
    one, other = build_model(), build_model()
    usual = train(one, synthetic_set, learning_rate=1e-5)
    changed = train(other, synthetic_set, learning_rate=1e-5, channels_last=True)
    np.testing.assert_allclose(usual["loss"], changed["loss"], rtol=1e-3)
    assert all(parameter.is_contiguous() for parameter in other.parameters())


def test_bfloat16_trains(model: ALMRR, synthetic_set: Any, train: Train) -> None:
    assert np.isfinite(train(model, synthetic_set, precision="bf16-mixed")["loss"]).all()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


NO_DECAY = {
    "mfrm.position",
    "mfrm.encoder.blocks.0.mixer.forward_branch.A_log",
    "mfrm.encoder.blocks.0.mixer.backward_branch.A_log",
    "mfrm.encoder.blocks.1.mixer.forward_branch.A_log",
    "mfrm.encoder.blocks.1.mixer.backward_branch.A_log",
}
"""Of more than one dimension, and spared all the same."""


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_weight_decay_spares_biases_norms_positions_and_the_scan(
    synthetic_set: Any, train: Train, optimizer: str
) -> None:
    """With nothing to learn, only decay moves weights."""
    model = build_model()
    before = weights_of(model)
    train(
        model,
        synthetic_set,
        steps=1,
        weight_decay=0.5,
        optimizer=optimizer,
        learning_rate=0.1,
        reconstruction_weight=0.0,
        refinement_weight=0.0,
    )
    for name, parameter in model.named_parameters():
        decays = parameter.requires_grad and parameter.ndim > 1 and name not in NO_DECAY
        moved = not torch.equal(parameter, before[name])
        assert moved == (decays and bool(before[name].any())), name


def test_of_several_validations_in_a_row_of_the_history_the_best_is_kept(
    synthetic_set: Any, train: Train
) -> None:
    settings = {"steps": 6, "learning_rate": 0.02, "selection": "validation"}
    single = train(build_model(), synthetic_set, log_every=1, **settings)[
        "validation_ap"
    ].to_numpy()
    in_threes = train(build_model(), synthetic_set, log_every=3, **settings)[
        "validation_ap"
    ].to_numpy()
    np.testing.assert_allclose(in_threes, single.reshape(2, 3).max(axis=1))


def test_selection_takes_the_weights_that_are_best_on_validation_images(
    synthetic_set: Any, train: Train
) -> None:
    model = build_model()
    history = train(
        model, synthetic_set, steps=6, log_every=1, learning_rate=0.02, selection="validation"
    )
    maps = model(
        torch.from_numpy(synthetic_set.validation_augmented).permute(0, 3, 1, 2) / 255
    ).detach()
    reached = average_precision_score(synthetic_set.validation_masks.ravel(), maps.numpy().ravel())
    assert history["validation_ap"].max() == pytest.approx(reached, abs=1e-5)
    assert history["validation_ap"].nunique() > 1


def test_selection_validates_now_and_then_and_at_the_end(
    model: ALMRR, synthetic_set: Any, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(almrr_pipeline.training.callbacks, "VALIDATIONS", 3)
    history = train(model, synthetic_set, steps=5, log_every=1, selection="validation")
    assert history.loc[history["validation_ap"].notna(), "step"].tolist() == [2, 4, 5]


def test_selection_changes_nothing_but_the_choice(synthetic_set: Any, train: Train) -> None:
    chosen = train(build_model(), synthetic_set, selection="validation")
    last = train(build_model(), synthetic_set, selection="last")
    pd.testing.assert_frame_equal(chosen.drop(columns="validation_ap"), last, check_exact=True)


def test_selection_without_validation_anomalies_is_refused(model: ALMRR, train: Train) -> None:
    with pytest.raises(AlmrrError, match=r"data\.validation_fraction above 0"):
        train(model, build_synthetic_set(validation=0), selection="validation")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_on_a_gpu(model: ALMRR, synthetic_set: Any, train: Train, precision: str) -> None:
    history = train(
        model,
        synthetic_set,
        steps=20,
        accelerator="gpu",
        devices=1,
        precision=precision,
        learning_rate=3e-3,
    )
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_a_gpu_and_a_cpu_agree(synthetic_set: Any, train: Train) -> None:
    settings = {"log_every": 1, "steps": 3, "learning_rate": 1e-4}
    on_cpu = train(build_model(drop_path=0.0), synthetic_set, **settings)
    on_gpu = train(
        build_model(drop_path=0.0), synthetic_set, accelerator="gpu", devices=1, **settings
    )
    np.testing.assert_allclose(on_cpu["loss"], on_gpu["loss"], rtol=0.02)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_on_a_gpu_is_named(synthetic_set: Any, train: Train) -> None:
    torch.cuda.set_per_process_memory_fraction(0.01)  # a card of any size: about a gigabyte
    try:
        with pytest.raises(AlmrrError, match="batch_size 20000"):
            train(build_model(), synthetic_set, accelerator="gpu", devices=1, batch_size=20_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

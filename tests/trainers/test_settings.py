"""Settings refuse what cannot work, with the field and a valid value in the sentence."""

from typing import Any

import pytest
from pydantic import ValidationError

from trainers.settings import (
    NO_RECIPE,
    NO_TRACE,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    SchedulerSettings,
    TrainersSettings,
    WorkersSettings,
)


def test_every_field_is_documented() -> None:
    assert all(field.description for field in TrainersSettings.model_fields.values())
    for part in (ModelSettings, OptimizerSettings, SchedulerSettings, LossSettings, WorkersSettings):
        assert all(field.description for field in part.model_fields.values()), part.__name__
    assert set(TrainersSettings.model_fields) >= NO_RECIPE


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"model.name": "vgg"}, "model.name", "unknown model 'vgg'; there are custom_cnn, custom_cnn_base, resnet18"),
        ({"optimizer.name": "lion"}, "optimizer.name", "unknown optimizer 'lion'; there are sgd, rmsprop, adam, adamw"),
        (
            {"scheduler.name": "exp"},
            "scheduler.name",
            "unknown scheduler 'exp'; there are step, plateau, cosine, onecycle",
        ),
        ({"loss.name": "hinge"}, "loss.name", "unknown loss 'hinge'; there are cross_entropy"),
        ({"sampler": "odd"}, "sampler", "unknown sampler 'odd'; there are natural, balanced, square_root"),
        ({"augmentation": "wild"}, "augmentation", "or give the path of a YAML file"),
        ({"batch_size": 30, "workers.count": 4}, "", "batch_size 30 cannot be shared evenly by 4 workers; take 32"),
        (
            {"workers.strategy": "horovod"},
            "workers.strategy",
            "unknown strategy 'horovod'; there are single, ddp, fsdp, elastic",
        ),
        ({"workers.strategy": "single", "workers.count": 2}, "workers", "count is 2; take ddp, or count=1"),
        (
            {"workers.strategy": "elastic", "workers.minimum": 3, "workers.count": 2},
            "workers",
            "take minimum=2 or fewer",
        ),
        ({"workers.strategy": "elastic", "workers.count": 64}, "", "too small for 64 workers, because batch norm"),
        ({"workers.count": 64}, "", "which has to have two images; take 128 or more"),
        ({"batch_size": 2, "optimizer.accumulate_steps": 2}, "", "for 1 workers in 2 parts each, because batch norm"),
        ({"batch_size": 8, "workers.count": 4, "optimizer.accumulate_steps": 2}, "", "take 16 or more"),
        ({"optimizer.accumulate_steps": 24}, "", "shared evenly by 1 workers in 24 parts each; take 72"),
        ({"optimizer.ema_decay": 1.0}, "optimizer.ema_decay", "less than 1"),
        ({"optimizer.clip_norm": 0.0}, "optimizer.clip_norm", "greater than 0"),
        ({"optimizer.l1": -1e-4}, "optimizer.l1", "greater than or equal to 0"),
        ({"model.side_px": 16}, "model", "custom_cnn needs at least 32"),
        ({"epochs": 0}, "epochs", "greater than or equal to 1"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate", ""),
        ({"optimizer.momentum": 1.0}, "optimizer.momentum", "less than 1"),
        ({"precision": "fp16"}, "precision", "'auto', 'fp32' or 'bf16'"),
        ({"epoch": 3}, "epoch", "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], field: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainersSettings().with_values(change)
    first = caught.value.errors()[0]
    assert ".".join(str(part) for part in first["loc"]) == field
    assert sentence in first["msg"]


def test_the_recipe_hash_ignores_machinery_only() -> None:
    base = TrainersSettings()
    for name in base.flat():
        other = _another_value(base, name)
        assert other != base, name
        assert (other.recipe_hash() == base.recipe_hash()) == (name.partition(".")[0] in NO_RECIPE), name


def test_a_bundle_keeps_all_settings_but_those_that_leave_no_trace() -> None:
    base = TrainersSettings()
    assert {name.removeprefix("workers.") for name in base.flat()} > NO_TRACE
    for name in base.flat():
        other = _another_value(base, name)
        assert (other.kept() == base.kept()) == (name.removeprefix("workers.") in NO_TRACE), name
    assert TrainersSettings.model_validate(base.kept()) == base


def test_settings_survive_json() -> None:
    settings = TrainersSettings(
        model=ModelSettings(name="resnet18"),
        optimizer=OptimizerSettings(learning_rate=0.01),
        workers=WorkersSettings(use_gpu=False),
    )
    assert TrainersSettings.model_validate_json(settings.model_dump_json()) == settings


OTHER_VALUES: dict[str, Any] = {
    "model.name": "resnet18",
    "optimizer.name": "adam",
    "scheduler.name": "step",
    "sampler": "natural",
    "augmentation": "none",
    "model.scaling": "min_max",
    "model.crop": "whole",
    "precision": "fp32",
    "optimizer.learning_rate": 0.01,
    "early_stop_patience_epochs": 3,
    "workers.threads": 1,
    "workers.use_gpu": False,
    "workers.feeders": 2,
    "workers.parallel_parts": 2,
    "workers.compile": True,
    "workers.contact_timeout_s": 30.0,
    "optimizer.nesterov": False,
    "model.dropout": 0.05,
    "model.head_dropout": 0.5,
    "scheduler.gamma": 0.5,
    "optimizer.momentum": 0.5,
    "optimizer.weight_decay": 0.0,
    "scheduler.warmup_epochs": 0.0,
    "loss.label_smoothing": 0.1,
    "loss.distill_share": 0.25,
    "loss.distill_temperature": 4.0,
    "workers.count": 2,
    "workers.peers.addresses": ("/ip4/192.0.2.7/tcp/4001/p2p/QmPeer",),
    "workers.peers.announce": ("/ip4/192.0.2.7/tcp/4001",),
    "workers.peers.averaging_timeout_s": 60.0,
    "workers.peers.group": "skin",
    "workers.peers.listen": "/ip4/0.0.0.0/tcp/4001",
    "workers.peers.matchmaking_s": 1.0,
    "workers.peers.part": "2/3",
    "workers.peers.patience_s": 30.0,
    "batch_size": 32,
    "model.side_px": 96,
    "optimizer.l1": 1e-5,
    "optimizer.clip_norm": 1.0,
    "optimizer.accumulate_steps": 2,
    "optimizer.ema_decay": 0.99,
    "optimizer.trainable_blocks": 2,
    "optimizer.features_rate": 0.5,
    "best_epoch_by": "macro_auc",
    "workers.strategy": "single",
    "workers.minimum": 2,
    "workers.checkpoint_every_steps": 10,
    "max_train_images": 100,
    "workers.data_source": "stream",
    "model.weights": "start.pt",
    "loss.name": "focal",
    "decision.rule": "even",
    "decision.point": "target",
    "decision.target_sensitivity": 0.9,
    "loss.focal_gamma": 1.0,
    "loss.adjust_strength": 0.5,
    "scheduler.learning_rate_factors": ((2, 0.5),),
    "stop_after_epoch": 3,
    "train_splits": "train_and_val",
}


def _another_value(base: TrainersSettings, name: str) -> TrainersSettings:
    if name == "train_splits":
        base = base.with_values({"best_epoch_by": "last"})
    value = OTHER_VALUES.get(name, base.flat()[name] + 1 if isinstance(base.flat()[name], int) else None)
    return base.with_values({name: value})


@pytest.mark.parametrize("factors", [[[1, 0.5]], [[3, 0.5], [3, 1.0]], [[5, 0.5], [3, 1.0]], [[3, 0.0]], [[3, -1.0]]])
def test_factors_of_the_learning_rate_ascend_from_the_second_epoch(factors):
    with pytest.raises(ValidationError, match=r"as \[\[3, 0.8\], \[5, 1.2\]\]"):
        SchedulerSettings.model_validate({"learning_rate_factors": factors})
    assert SchedulerSettings(learning_rate_factors=((3, 0.8), (5, 1.2))).learning_rate_factors[1] == (5, 1.2)

"""Settings refuse what cannot work, with the field and a valid value in the sentence."""

from typing import Any

import pytest
from pydantic import ValidationError

from trainers.settings import MACHINERY, TrainersSettings


def test_every_field_is_documented() -> None:
    assert all(field.description for field in TrainersSettings.model_fields.values())
    assert set(TrainersSettings.model_fields) >= MACHINERY


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"model": "vgg"}, "model", "unknown model 'vgg'; there are custom_cnn, custom_cnn_base, resnet18"),
        ({"optimizer": "lion"}, "optimizer", "unknown optimizer 'lion'; there are sgd, rmsprop, adam, adamw"),
        ({"scheduler": "exp"}, "scheduler", "unknown scheduler 'exp'; there are step, plateau, cosine, onecycle"),
        ({"loss": "hinge"}, "loss", "unknown loss 'hinge'; there are cross_entropy"),
        ({"sampler": "odd"}, "sampler", "unknown sampler 'odd'; there are natural, balanced, square_root"),
        ({"augmentation": "wild"}, "augmentation", "or give the path of a YAML file"),
        ({"batch_size": 30, "num_workers": 4}, "", "batch_size 30 cannot be shared evenly by 4 workers; take 32"),
        ({"strategy": "horovod"}, "strategy", "unknown strategy 'horovod'; there are single, ddp, fsdp, elastic"),
        ({"strategy": "single", "num_workers": 2}, "", "num_workers is 2; take ddp, or num_workers=1"),
        ({"strategy": "elastic", "min_workers": 3, "num_workers": 2}, "", "take min_workers=2 or fewer"),
        ({"strategy": "elastic", "num_workers": 64}, "", "too small for 64 workers; take 128 or more"),
        ({"accumulate_steps": 24}, "", "shared evenly by 1 workers in 24 parts each; take 72"),
        ({"ema_decay": 1.0}, "ema_decay", "less than 1"),
        ({"clip_norm": 0.0}, "clip_norm", "greater than 0"),
        ({"l1": -1e-4}, "l1", "greater than or equal to 0"),
        ({"side_px": 16}, "", "custom_cnn needs at least 32"),
        ({"epochs": 0}, "epochs", "greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "learning_rate", ""),
        ({"momentum": 1.0}, "momentum", "less than 1"),
        ({"precision": "fp16"}, "precision", "'auto', 'fp32' or 'bf16'"),
        ({"epoch": 3}, "epoch", "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], field: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainersSettings.model_validate(change)
    first = caught.value.errors()[0]
    assert ".".join(str(part) for part in first["loc"]) == field
    assert sentence in first["msg"]


def test_the_recipe_hash_ignores_machinery_only() -> None:
    base = TrainersSettings()
    for name in TrainersSettings.model_fields:
        other = _another_value(base, name)
        assert (other.recipe_hash() == base.recipe_hash()) == (name in MACHINERY), name


def test_settings_survive_json() -> None:
    settings = TrainersSettings(model="resnet18", learning_rate=0.01, use_gpu=False)
    assert TrainersSettings.model_validate_json(settings.model_dump_json()) == settings


def _another_value(base: TrainersSettings, name: str) -> TrainersSettings:
    values: dict[str, Any] = {
        "model": "resnet18", "optimizer": "adam", "scheduler": "step", "sampler": "natural", "augmentation": "none",
        "scaling": "min_max", "precision": "fp32", "learning_rate": 0.01, "early_stop_patience_epochs": 3,
        "threads_per_worker": 1, "use_gpu": False, "nesterov": False, "dropout": 0.05, "head_dropout": 0.5,
        "gamma": 0.5, "momentum": 0.5, "weight_decay": 0.0, "warmup_epochs": 0.0, "label_smoothing": 0.1,
        "num_workers": 2, "batch_size": 32, "side_px": 96, "l1": 1e-5, "clip_norm": 1.0, "accumulate_steps": 2,
        "ema_decay": 0.99, "strategy": "single", "min_workers": 2, "checkpoint_every_steps": 10,
        "download_url": "https://mirror", "max_train_images": 100, "data_source": "stream",
        "weights": "start.pt", "loss": "focal", "focal_gamma": 1.0, "learning_rate_factors": ((2, 0.5),),
    }  # fmt: skip
    value = values.get(name, getattr(base, name) + 1 if isinstance(getattr(base, name), int) else None)
    return TrainersSettings.model_validate({name: value})


@pytest.mark.parametrize("factors", [[[1, 0.5]], [[3, 0.5], [3, 1.0]], [[5, 0.5], [3, 1.0]], [[3, 0.0]], [[3, -1.0]]])
def test_factors_of_the_learning_rate_ascend_from_the_second_epoch(factors):
    with pytest.raises(ValidationError, match=r"as \[\[3, 0.8\], \[5, 1.2\]\]"):
        TrainersSettings.model_validate({"learning_rate_factors": factors})
    assert TrainersSettings(learning_rate_factors=((3, 0.8), (5, 1.2))).learning_rate_factors[1] == (5, 1.2)

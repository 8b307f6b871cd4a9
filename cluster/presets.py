"""Presets: functions that return a whole `Settings` for a kind of machine or a kind of use.

A preset is the weakest source of settings; a file, the environment and `--set` may change any field of it.
`relook doctor` prints how a preset shares the CPUs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from cluster.settings import ClusterSettings, RoundSettings, Settings
from records.settings import RecordsSettings
from records.types import Consent
from serving.settings import ServingSettings
from trainers.fitting.starting import DINOV2_FILE
from trainers.settings import (
    DecisionSettings,
    ModelSettings,
    OptimizerSettings,
    SchedulerSettings,
    TrainersSettings,
    WorkersSettings,
)
from tuning.experiments import EXPERIMENTS
from tuning.settings import Scheduler, TuningSettings


def laptop() -> Settings:
    """Two cores and no GPU; a round in minutes. Ray hands out 4 CPUs so that a service and a search fit together."""
    return Settings()


def single_gpu() -> Settings:
    """One machine with one GPU: four trials share it, a fit takes all of it."""
    return Settings(
        preset="single_gpu",
        trainers=TrainersSettings(
            model=ModelSettings(name="resnet18"),
            epochs=30,
            batch_size=256,
            workers=WorkersSettings(use_gpu=True, threads=4),
        ),
        tuning=TuningSettings(trials=32, trial_epochs=12, gpus_per_trial=0.25),
        serving=ServingSettings(predictor_max_replicas=2),
        cluster=ClusterSettings(logical_cpus=10, num_gpus=1, object_store_mb=2000),
    )


def multi_gpu() -> Settings:
    """A cluster with four GPUs or more: a fit on four workers, a trial per GPU."""
    return Settings(
        preset="multi_gpu",
        trainers=TrainersSettings(
            model=ModelSettings(name="resnet18"),
            epochs=30,
            batch_size=1024,
            workers=WorkersSettings(use_gpu=True, count=4, threads=4),
        ),
        tuning=TuningSettings(trials=64, trial_epochs=12, cpus_per_trial=2, gpus_per_trial=1.0),
        serving=ServingSettings(
            max_in_flight=256,
            ingress_min_replicas=2,
            ingress_max_replicas=2,
            ingress_cpus=1.0,
            predictor_max_replicas=2,
            predictor_cpus=4.0,
            explainer_max_replicas=2,
            explainer_cpus=2.0,
        ),
        cluster=ClusterSettings(logical_cpus=32, num_gpus=None, object_store_mb=8000),
    )


def clinical() -> Settings:
    """The laptop preset with a clinic's rules: a person approves, consent defaults to none, audits cannot be off."""
    return Settings(
        preset="clinical",
        records=RecordsSettings(durability="full"),
        serving=ServingSettings(default_consent=Consent.NONE, audit_share=0.05),
        round=RoundSettings(approval="person"),
    )


def dissertation() -> Settings:
    """The recipe that Relook grew from: a custom CNN at 224 px, balanced classes; `relook tune` tries all its rows."""
    return Settings(
        preset="dissertation",
        trainers=TrainersSettings(
            model=ModelSettings(name="custom_cnn", side_px=224, scaling="min_max"),
            epochs=20,
            optimizer=OptimizerSettings(name="sgd", momentum=0.9, nesterov=False),
            scheduler=SchedulerSettings(name="step"),
            sampler="balanced",
            augmentation="dissertation",
        ),
        tuning=_rows_of("dissertation", epochs=20),
    )


def dissertation_mini() -> Settings:
    """The dissertation's rows on two cores: a quarter of its side lengths, 1,000 training images, 4 or 8 epochs."""
    whole = dissertation()
    return Settings(
        preset="dissertation_mini",
        trainers=whole.trainers.with_values(
            {"model.side_px": 56, "epochs": 8, "augmentation": "none", "batch_size": 32, "max_train_images": 1000}
        ),
        tuning=_rows_of("dissertation_mini", epochs=8),
    )


def dissertation_leaky() -> Settings:
    """The dissertation's rows with its mistakes on purpose: oversampled before the split; no model is registered."""
    mini = dissertation_mini()
    return mini.model_copy(
        update={
            "preset": "dissertation_leaky",
            # The classes are of equal size already.
            "trainers": mini.trainers.with_values({"sampler": "natural"}),
            "tuning": mini.tuning.model_copy(update={"leak": "oversampled_first"}),
        }
    )


def _rows_of(experiments: Literal["dissertation", "dissertation_mini"], epochs: int) -> TuningSettings:
    """Train every row once and to its end, because all of them are reported."""
    return TuningSettings(
        experiments=experiments,
        trials=len(EXPERIMENTS[experiments]),
        trial_epochs=epochs,
        scheduler=Scheduler.NONE,
        confirm_seeds=0,
    )


def ham10000_cpu() -> Settings:
    """HAM10000 on two cores in under 100 minutes: EfficientNet-Lite0 from ImageNet (extra `pretrained`) at 128 px,
    with age, sex and site, eight views.
    """
    return Settings(
        preset="ham10000_cpu",
        trainers=TrainersSettings(
            model=ModelSettings(name="efficientnet_lite0", weights="imagenet", side_px=128),
            epochs=16,
            optimizer=OptimizerSettings(name="sgd", learning_rate=0.05),
            scheduler=SchedulerSettings(name="onecycle"),
            sampler="square_root",
            augmentation="lesion",
            # Its aim is balanced accuracy, which `even` is the best rule for; a floor stays proven, as everywhere.
            decision=DecisionSettings(rule="even"),
            context=True,
            views=8,
        ),
    )


def ham10000_gpu() -> Settings:
    """HAM10000 at full size on one GPU: EfficientNet-Lite2 at 448 px, else as `ham10000_cpu`. Not run on a GPU yet."""
    changes = {"model.name": "efficientnet_lite2", "model.side_px": 448, "workers.use_gpu": True, "workers.threads": 4}
    recipe = ham10000_cpu().trainers.with_values(changes)
    return single_gpu().model_copy(update={"preset": "ham10000_gpu", "trainers": recipe})


def ham10000_vit() -> Settings:
    """HAM10000 on two cores: the last four blocks of DINOv2's ViT-S/14 at 154 px, with age, sex and site, eight views.

    Needs the extra `timm`, and the file of weights that `python -m bench.train.dinov2_weights` writes.
    """
    return Settings(
        preset="ham10000_vit",
        trainers=TrainersSettings(
            model=ModelSettings(name="timm/vit_small_patch14_dinov2", weights=DINOV2_FILE, side_px=154),
            epochs=3,
            batch_size=32,
            optimizer=OptimizerSettings(
                name="adamw", learning_rate=1e-3, features_rate=0.1, weight_decay=0.05, trainable_blocks=4
            ),
            scheduler=SchedulerSettings(name="cosine", warmup_epochs=0.3),
            sampler="square_root",
            augmentation="light",
            # 12 val images of the rarest class make balanced accuracy jump from epoch to epoch.
            best_epoch_by="macro_auc",
            decision=DecisionSettings(rule="even"),
            context=True,
            views=8,
        ),
    )


def demo() -> Settings:
    """For `relook demo`: a small network and a short search, so that the whole loop takes minutes."""
    return Settings(
        preset="demo",
        # Small enough for minutes on two cores; more data lower the epochs, see `demo.fit_images`.
        trainers=TrainersSettings(model=ModelSettings(name="custom_cnn"), epochs=20),
        tuning=TuningSettings(trials=5, trial_epochs=4, max_train_images=500, confirm_seeds=0),
        round=RoundSettings(tune="every_n", select_budget=20),
    )


PRESETS: Mapping[str, Callable[[], Settings]] = MappingProxyType(
    {
        "laptop": laptop,
        "demo": demo,
        "single_gpu": single_gpu,
        "multi_gpu": multi_gpu,
        "clinical": clinical,
        "dissertation": dissertation,
        "dissertation_mini": dissertation_mini,
        "dissertation_leaky": dissertation_leaky,
        "ham10000_cpu": ham10000_cpu,
        "ham10000_gpu": ham10000_gpu,
        "ham10000_vit": ham10000_vit,
    }
)

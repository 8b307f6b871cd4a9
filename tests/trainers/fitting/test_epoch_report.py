"""A training is shown by epochs, and a long epoch by its steps."""

from records.progress import LineProgress
from trainers.fitting.epoch_report import EpochBar, EpochReport


def report_of(epoch: int) -> EpochReport:
    return EpochReport(
        epoch=epoch, train_loss=0.5, val_loss=0.6, val_balanced_accuracy=0.6, val_accuracy=0.7,
        key_class_sensitivity=None, learning_rate=0.1, images_per_s=5.0, seconds=200.0,
    )  # fmt: skip


def test_a_long_epoch_prints_its_steps_once_per_minute() -> None:
    printed: list[str] = []
    now_s = 100.0
    with LineProgress(printed.append, lambda: now_s) as lines:
        bar = EpochBar(lines, epochs=2, clock=lambda: now_s)
        for step in range(1, 10):
            now_s += 20
            bar.on_step(0, step, 9)
        now_s += 20
        bar(report_of(1))
        now_s += 20
        bar.on_step(1, 1, 9)
        now_s += 180
        bar(report_of(2))
    assert printed == [
        "train: epoch 0/2",
        "train: epoch 0/2, step 3/9, 5 min 40 s left",
        "train: epoch 0/2, step 6/9, 4 min 40 s left",
        "train: epoch 0/2, step 9/9, 3 min 40 s left",
        "train: epoch 1/2, loss 0.500, val balanced accuracy 0.600, 5 images/s, 3 min 20 s left",
        "train: epoch 2/2, loss 0.500, val balanced accuracy 0.600, 5 images/s, done in 6 min 40 s",
    ]

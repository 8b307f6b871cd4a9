"""How long the demo trains: fewer epochs on more data, so that it takes minutes on either."""

from cluster.settings import Settings


def paced(settings: Settings, train_images: int) -> Settings:
    """Shorten the training so that one fit shows about `demo.fit_images` images.

    Args:
        settings: of the demo.
        train_images: images on the train split.
    Returns:
        The settings with as many epochs as fit, at least one and at most those configured.
    """
    epochs = max(1, min(settings.trainers.epochs, settings.demo.fit_images // max(1, train_images)))
    tuning = settings.tuning.model_copy(update={"trial_epochs": min(settings.tuning.trial_epochs, epochs)})
    trainers = settings.trainers.model_copy(update={"epochs": epochs})
    return settings.model_copy(update={"trainers": trainers, "tuning": tuning})

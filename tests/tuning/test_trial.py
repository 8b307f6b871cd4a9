"""What a trial trains with and on."""

import os
import threading

import pytest

from images.cache import PixelCache
from records.errors import ConfigError
from records.frames import Frame
from records.types import Split
from trainers.fitting.training_data import plan_data
from tuning.search import _job, searched_part
from tuning.settings import TuningSettings
from tuning.trial import _open_images, run_trial, trial_settings

POLICY = "name: mine\noperations:\n  - {operation: horizontal_flip}\n"


@pytest.fixture
def make_job(labelled, trainers):
    """Builds the job of a search over the labelled store."""

    def make(tuning, base=trainers, enqueued=()):
        store, dataset = labelled
        images = plan_data(searched_part(dataset, tuning.max_train_images, tuning.seed), store.taxonomy)
        return _job(store, tuning, base, enqueued, images)

    return make


def test_a_trial_trains_with_its_overrides_in_its_budget_on_its_resources(make_job, make_plan, trainers):
    wide = trainers.with_values({"workers.count": 2, "workers.threads": 8, "workers.use_gpu": True})
    job = make_job(TuningSettings(trial_epochs=2, cpus_per_trial=3), wide)

    settings = trial_settings(make_plan(1, **{"optimizer.name": "adam", "optimizer.learning_rate": 1e-3}), job)

    assert (settings.optimizer.name, settings.optimizer.learning_rate, settings.epochs) == ("adam", 1e-3, 2)
    assert (settings.workers.count, settings.workers.threads, settings.workers.use_gpu) == (1, 3, False)
    assert settings.batch_size == wide.batch_size


def test_a_trial_has_a_gpu_if_it_is_given_a_part_of_one(make_job, make_plan):
    assert trial_settings(make_plan(0), make_job(TuningSettings(gpus_per_trial=0.25))).workers.use_gpu is True


def test_the_images_of_a_trial_are_train_and_val_and_no_others(make_job, labelled):
    _, dataset = labelled
    job = make_job(TuningSettings())

    assert job.images.image_ids[: job.images.num_train] == list(dataset.split(Split.TRAIN)["image_id"])
    assert job.images.image_ids[job.images.num_train :] == list(dataset.split(Split.VAL)["image_id"])


def test_a_part_of_train_is_taken_where_the_settings_say_so(make_job, labelled):
    _, dataset = labelled
    job = make_job(TuningSettings(max_train_images=30))

    assert 7 <= job.images.num_train <= 30
    assert len(job.images.image_ids) - job.images.num_train == len(dataset.split(Split.VAL))


def test_a_node_that_has_decoded_nothing_decodes_for_itself(make_job, labelled):
    store, _ = labelled
    job = make_job(TuningSettings())
    assert len(PixelCache(store.home.cache, Frame(16))) == 0

    first, again = (_open_images(job, job.images, Frame(16)) for _ in range(2))

    assert len(PixelCache(store.home.cache, Frame(16))) == len(job.images.image_ids)
    assert first.pixels.take([0]).shape == (1, 16, 16, 3)
    assert (first.pixels.take([3]) == again.pixels.take([3])).all()
    assert len(again.train_index) == job.images.num_train


def test_policies_that_are_files_travel_as_documents(make_job, trainers, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(POLICY)
    own = trainers.model_copy(update={"augmentation": str(path)})

    assert list(make_job(TuningSettings(), trainers, [own]).policies) == [str(path)]
    assert make_job(TuningSettings(), own).policies[str(path)].operations[0].operation == "horizontal_flip"


def test_a_policy_file_that_is_not_there_is_refused_before_anything_starts(make_job, trainers):
    lost = trainers.model_copy(update={"augmentation": "lost.yaml"})

    with pytest.raises(ConfigError, match=r"lost\.yaml"):
        make_job(TuningSettings(), lost)


def test_a_trial_gives_priority_up_and_never_takes_it_back(make_job, make_plan):
    job = make_job(TuningSettings(trial_epochs=1, niceness=3))
    seen = {}

    def under(niceness):
        # On Linux a thread has a priority of its own, so that this one can give some up.
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
        run_trial(make_plan(0), job, lambda _: seen.setdefault(niceness, os.getpriority(os.PRIO_PROCESS, 0)))

    for niceness in (0, 7):
        thread = threading.Thread(target=under, args=(niceness,))
        thread.start()
        thread.join()

    assert seen == {0: 3, 7: 7}

"""What runs in processes of its own: augmenting, and training steps on several devices together."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

STEPS = 30


def augmented_images(side_px: int, seconds: float) -> float:
    """Augment batches by the default policy for a while; return images per second of this process."""
    from trainers.augmentation import Augmenter, load_policy
    from trainers.augmentation.operations import Canvas
    from trainers.settings import TrainersSettings
    from vision.seeding import image_keys, image_seeds

    policy = load_policy(TrainersSettings().augmentation)
    augmenter = Augmenter(policy, Canvas(side_px, (180.0, 140.0, 140.0)))
    augmenter.begin_epoch(1)
    pixels = np.random.default_rng(0).integers(0, 256, (64, side_px, side_px, 3), dtype=np.uint8)
    keys = image_keys([f"{number:064x}" for number in range(64)])
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < seconds:
        seeds = image_seeds(0, count, keys, np.zeros(64, dtype=np.int64))
        augmenter.apply(pixels.copy(), seeds)
        count += len(pixels)
    return count / (time.perf_counter() - began)


def ddp_images_s(device: str, workers: int, network: str, side_px: int, batch: int) -> float:
    """Measure bf16 steps of DDP with one process per device; return images per second of all together."""
    from torch.multiprocessing.spawn import spawn

    with TemporaryDirectory(prefix="relook-ddp-") as folder:
        spawn(_ddp_steps, (device, workers, network, side_px, batch, folder), nprocs=workers)  # type: ignore[no-untyped-call]
        return float((Path(folder) / "rate").read_text())


def _ddp_steps(rank: int, device: str, workers: int, network: str, side_px: int, batch: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from vision.networks import build_model
    from vision.precision import autocast

    where = f"cuda:{rank}" if device == "cuda" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers
    )
    plain = build_model(network, 7).to(where).to(memory_format=torch.channels_last).train()
    wrapped = DistributedDataParallel(plain, device_ids=[rank] if device == "cuda" else None)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    inputs, labels = torch.randn(batch, 3, side_px, side_px, device=where), torch.arange(batch, device=where) % 7
    began = 0.0
    for step in range(-5, STEPS):
        if step == 0:
            _wait_for(device)
            began = time.perf_counter()
        with autocast("bf16", where):
            logits = wrapped(inputs)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    _wait_for(device)
    if rank == 0:
        (Path(folder) / "rate").write_text(str(STEPS * batch * workers / (time.perf_counter() - began)))
    dist.destroy_process_group()


def _wait_for(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()

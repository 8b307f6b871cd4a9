"""FastAPI and torch with a batcher by hand: what queued up while a batch was computed is the next batch.

RELOOK_PEER_MODEL=FILE PEER/bin/python bench/peers/fastapi_server.py PORT
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from common import MAX_BATCH, Network
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

network = Network()
computing = ThreadPoolExecutor(1)
waiting: asyncio.Queue[tuple[Any, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()


async def run_batches() -> None:
    """Predict the waiting requests, batch after batch."""
    loop = asyncio.get_running_loop()
    while True:
        batch = [await waiting.get()]
        while len(batch) < MAX_BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        predictions = await loop.run_in_executor(computing, network.predict, [pixels for pixels, _ in batch])
        for (_, future), prediction in zip(batch, predictions, strict=True):
            future.set_result(prediction)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Run the batcher as long as the app."""
    task = asyncio.create_task(run_batches())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    """Predict the image in the body."""
    pixels = await run_in_threadpool(network.decode, await request.body())
    future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    waiting.put_nowait((pixels, future))
    return await future


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)

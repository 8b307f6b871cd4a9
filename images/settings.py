"""The settings of the images room: where images come from, and how much work one image may cause.

The limits hold in every process that decodes. They travel in an environment variable, which workers of Ray and other
children inherit, because images are decoded far below the code that knows the settings.
"""

import os
from functools import lru_cache

from pydantic import Field

from records.settings import RoomSettings

VARIABLE = "RELOOK_IMAGE_LIMITS"


class ImagesSettings(RoomSettings):
    """Where images come from, and the limits of decoding."""

    download_url: str = Field(
        default="https://dataverse.harvard.edu/api/access/datafile",
        description="where `relook data download` finds files by their Dataverse number; a mirror has the same layout",
    )
    max_megapixels: float = Field(
        default=89.0, gt=0, le=89, description="largest image that any part of Relook decodes, millions of pixels"
    )
    # Encoders write 10 scans, none more than 64. Each costs a pass over all pixels, however few bytes it has.
    max_scans: int = Field(default=100, ge=1, le=1000, description="scans of one JPEG, at most")
    # Twelve megapixels in 10 scans are 170, and 50 megapixels at full colour resolution 700. One costs about 5 ms.
    max_megasamples: float = Field(
        default=1000.0,
        gt=0,
        le=100_000,
        description="work of decoding one image: values of all its scans, or of its rows, millions",
    )
    # Profiles of printers, the largest there are, have 0.5 to 3 MB.
    max_profile_kb: int = Field(default=4096, ge=1, le=16_384, description="colour profile of one image, kilobytes")
    # Below this a decode takes less than 0.05 s, and the hop to another process would be most of its time.
    inline_megasamples: float = Field(
        default=8.0,
        ge=0,
        le=100_000,
        description="images with less work are decoded in the process that needs them, others in a decoder process; 0 "
        "decodes all in a decoder process, millions of values",
    )
    decoder_time_s: float = Field(
        default=15.0, ge=1, le=3600, description="processor time that decoding one image may take, seconds"
    )
    # A WebP of 89 megapixels takes 1.5 GB.
    decoder_memory_mb: int = Field(
        default=2048, ge=64, le=65_536, description="memory that decoding one image may take, megabytes"
    )
    decoder_processes: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="decoder processes of one process, started when they are needed; null is one per core, at most 8",
    )


def limits_variable(settings: ImagesSettings) -> dict[str, str]:
    """Return the environment variable that puts these limits into force in a process and its children."""
    return {VARIABLE: settings.model_dump_json()}


def limits_in_force() -> ImagesSettings:
    """Return the limits of this process: those of its environment, else the default ones."""
    return _parsed(os.environ.get(VARIABLE))


@lru_cache(maxsize=4)
def _parsed(text: str | None) -> ImagesSettings:
    return ImagesSettings() if text is None else ImagesSettings.model_validate_json(text)

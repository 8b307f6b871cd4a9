"""The settings of the images room."""

from pydantic import Field

from records.settings import RoomSettings


class ImagesSettings(RoomSettings):
    """Where images come from."""

    download_url: str = Field(
        default="https://dataverse.harvard.edu/api/access/datafile",
        description="where `relook data download` finds files by their Dataverse number; a mirror has the same layout",
    )

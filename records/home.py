"""The home: the folder that holds everything, with one name for each folder in it."""

import os
from dataclasses import dataclass
from pathlib import Path

from records.durable import make_folders, sweep
from records.errors import ConfigError, UnavailableError

FOLDERS = ("blobs", "datasets", "bundles", "runs", "cache", "keys", "label-studio", "logs", "demo")


@dataclass(frozen=True)
class Home:
    """The places under `RELOOK_HOME`. Open it with `open_home`."""

    root: Path

    @property
    def blobs(self) -> Path:
        """Stored images and overlays, by content."""
        return self.root / "blobs"

    @property
    def datasets(self) -> Path:
        """Dataset versions, one folder each."""
        return self.root / "datasets"

    @property
    def bundles(self) -> Path:
        """Model bundles, one folder each."""
        return self.root / "bundles"

    @property
    def runs(self) -> Path:
        """Training runs, searches and rounds."""
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """Decoded pixels; may be deleted at any time."""
        return self.root / "cache"

    @property
    def keys(self) -> Path:
        """Secrets, readable by the owner only."""
        return self.root / "keys"

    @property
    def label_studio(self) -> Path:
        """Data of the local Label Studio."""
        return self.root / "label-studio"

    @property
    def logs(self) -> Path:
        """Log files."""
        return self.root / "logs"

    @property
    def demo(self) -> Path:
        """Output of `relook demo`."""
        return self.root / "demo"


def open_home(root: Path) -> Home:
    """Create the folder and the folders in it if they are missing, and sweep what writers that died left there.

    The path is made absolute here, once, since Ray changes the working folder. A folder that cannot be made or written
    raises ConfigError.
    """
    # abspath, not resolve: a home behind a symbolic link keeps the path that the user gave.
    absolute = Path(os.path.abspath(root.expanduser()))
    try:
        for name in FOLDERS:
            make_folders(absolute / name)
        # Also if the folder existed already, perhaps with wider permissions.
        (absolute / "keys").chmod(0o700)
    except (OSError, UnavailableError) as error:
        reason = getattr(error.__cause__ or error, "strerror", error)
        raise ConfigError(
            f"records.home {str(absolute)!r} cannot be used ({reason}); "
            "set RELOOK_HOME to a folder that this user may write"
        ) from error
    home = Home(absolute)
    for folder in (home.root, home.keys, home.bundles, home.label_studio, home.demo):
        sweep(folder)
    # Blobs are swept by their store, which may lie elsewhere, and the cache may be deleted at any time.
    for folder in (home.datasets, home.runs):
        sweep(folder, below=True)
    return home

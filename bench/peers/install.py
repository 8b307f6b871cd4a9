"""Make the peers' environments, one each, for `python -m bench serve|explain|train --peers DIR`.

    python3.11 bench/peers/install.py DIR                       # torch in each of them
    .venv/bin/python bench/peers/install.py DIR --share-torch   # this environment's torch in all of them

Each environment gets what its `requirements-NAME.txt` says. A peer that cannot be installed is named at the end, and
what is measured of it is then null with that reason.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("fastapi", "litserve", "bentoml", "pytorch_grad_cam", "lightning")
LOCK = HERE.parents[1] / "requirements.lock"
COMPUTING = ("torch", "torchvision", "numpy", "pillow")
# What torch, torchvision, numpy and Pillow consist of, and what they import.
SHARED = (
    "torch", "torchgen", "functorch", "torchvision", "torchvision.libs", "nvidia", "triton", "numpy", "numpy.libs",
    "PIL", "pillow.libs", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec",
    "typing_extensions.py", "sklearn", "scikit_learn.libs", "scipy", "scipy.libs", "joblib", "threadpoolctl.py",
    "cv2", "opencv_python_headless.libs", "matplotlib", "mpl_toolkits", "cycler", "kiwisolver", "pyparsing",
    "contourpy", "dateutil", "six.py", "packaging", "fontTools", "tqdm",
    "cloudpickle", "narwhals",
)  # fmt: skip


def main() -> int:
    """Make all environments; the exit code is 1 if one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share-torch", action="store_true", help="link this environment's torch instead of a copy")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name in PEERS if not install(name, options.folder / name, options.share_torch)]
    for name in failed:
        print(f"{name} could not be installed", file=sys.stderr)
    return 1 if failed else 0


def install(name: str, folder: Path, share_torch: bool) -> bool:
    """Make one environment, and return whether it stands."""
    if (folder / "ready").is_file():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    wanted = ["-r", str(HERE / f"requirements-{name}.txt")]
    if not share_torch:
        lines = LOCK.read_text().replace(" \\", "").splitlines()
        pins = [line for line in lines if line.partition("==")[0].lower() in COMPUTING]
        done = subprocess.run([*pip, *pins, *wanted], check=False)
    else:
        # These ask for torch, and grad-cam for OpenCV, which are linked.
        alone = {"pytorch_grad_cam": ["--no-deps", "ttach"], "lightning": ["--no-deps"]}.get(name, [])
        done = subprocess.run([*pip, *alone, *wanted], check=False)
        link_shared(folder)
    if done.returncode == 0:
        (folder / "ready").touch()
    return done.returncode == 0


def link_shared(folder: Path) -> None:
    """Let an environment see this one's torch, behind its own packages."""
    ours, links = Path(sysconfig.get_path("purelib")), folder / "shared"
    links.mkdir(exist_ok=True)
    for name in SHARED:
        if (ours / name).exists() and not (links / name).exists():
            (links / name).symlink_to(ours / name)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(f"{links}\n")


if __name__ == "__main__":
    sys.exit(main())

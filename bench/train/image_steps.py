"""Run the steps of `cluster/deploy/Dockerfile` without a container engine, and test the result.

Every stage gets a root of its own: this machine's Debian with Python 3.11, below an overlayfs layer in a mount
namespace that takes all writes, so paths are those of the Dockerfile and this machine stays unchanged. Then the image
is run as deployed: its user and environment, a read-only root, no network but loopback, and only `/data` and `/tmp`
writable. Needs root, Linux, /usr/bin/python3.11, 10 GB, and the wheels of the lock.

    python -m bench.train.image_steps [--keep FOLDER]
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "cluster" / "deploy" / "Dockerfile"
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
# SIOCSIFFLAGS: a new network namespace has its loopback switched off.
LOOPBACK = "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))"

TRIALS = (
    "relook --help > /dev/null",
    "relook data synth /data/images --lesions 210 --width 96",
    "relook train --data /data/images --set trainers.epochs=1 --set trainers.model.side_px=32",
    "relook promote $(basename /data/bundles/*) --provisional",
    "relook models",
)
SERVED = """relook serve > /tmp/serve.log 2>&1 & server=$!
for n in $(seq 60); do sleep 2; {check} 2> /dev/null && break; done
{check} || {{ cat /tmp/serve.log; exit 1; }}
kill $server; wait $server || true"""


@dataclass
class Stage:
    """A stage of the Dockerfile: FROM and the instructions after it."""

    name: str
    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH, "HOME": "/root"})
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Mount the layers, and add what the base image has and this Debian lacks."""
        for part in ("upper", "work", "root", "volumes"):
            (self.folder / part).mkdir(parents=True)
        binaries = self.folder / "upper" / "usr" / "local" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "python").symlink_to("/usr/bin/python3.11")

    def run(self, command: str, *, as_image: bool = False) -> None:
        """Run a shell command in the root of this stage; as_image: read-only, without network, as its user.

        Raises:
            SystemExit: it failed.
        """
        root = self.folder / "root"
        layers = f"lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work"
        script = [
            "set -e",
            f"mount -t overlay overlay -o {layers} {root}",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
            # The checkout is not in an image.
            f"mount -t tmpfs tmpfs {root}{REPOSITORY}",
        ]
        runner = "exec chroot"
        if as_image:
            for volume in self.volumes:
                script.append(f"mount --bind {self._volume(volume)} {root}{volume}")
            script += [
                f"mount -o remount,ro {root}",
                f'/usr/bin/python3.11 -c "import fcntl, socket, struct; {LOOPBACK}"',
            ]
            uid, gid = self.user.split(":")
            runner += f" --userspec={uid}:{gid} --groups={gid}"
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        inner = f"cd {self.workdir} && {command}"
        script.append(f"{runner} {root} /usr/bin/env -i {variables} /bin/sh -ec {shlex.quote(inner)}")
        spaces = ["--mount", "--pid", "--fork", *(["--net"] if as_image else [])]
        print(f"[{self.name}] {command}", flush=True)
        done = subprocess.run(["unshare", *spaces, "/bin/sh", "-c", "\n".join(script)], check=False)
        if done.returncode != 0:
            raise SystemExit(f"[{self.name}] {command}\nended with {done.returncode}")

    def _volume(self, path: str) -> Path:
        """The folder of a volume; it starts as a copy of the image's folder, owner and mode included."""
        kept = self.folder / "volumes" / path.strip("/")
        if not kept.exists():
            kept.mkdir()
            inside = self.folder / "upper" / path.strip("/")
            status = (inside if inside.exists() else Path(path)).stat()
            os.chown(kept, status.st_uid, status.st_gid)
            kept.chmod(status.st_mode & 0o7777)
        return kept

    def copy(self, source: Path, target: str, *, move: bool = False) -> None:
        """Put a file or folder into the root."""
        place = self.folder / "upper" / target.strip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if move:
            source.rename(place)
        elif source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, place)


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, rest in pairs]


def build(folder: Path) -> Stage:
    """Run every instruction; return the last stage.

    Raises:
        SystemExit: a step fails, or the Dockerfile has an instruction that this script does not know.
    """
    stages: dict[str, Stage] = {}
    stage = Stage("none", folder)
    for name, rest in instructions(DOCKERFILE.read_text()):
        if name == "FROM":
            stage = Stage(rest.rpartition(" AS ")[2], folder / rest.rpartition(" AS ")[2])
            stage.prepare()
            stages[stage.name] = stage
        elif name == "ARG":
            key, _, value = rest.partition("=")
            stage.environment[key] = value.strip('"')
        elif name == "ENV":
            for key, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                stage.environment[key] = value.replace("$PATH", stage.environment["PATH"])
        elif name == "RUN":
            stage.run(rest)
        elif name == "COPY":
            _copy(stages, stage, rest.split())
        elif name == "WORKDIR":
            stage.workdir = rest
            (stage.folder / "upper" / rest.strip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = rest
            stage.environment["HOME"] = "/data"
        elif name == "VOLUME":
            stage.volumes = json.loads(rest)
        elif name == "HEALTHCHECK":
            stage.healthcheck = json.loads(rest[rest.index("CMD ") + 4 :])
        elif name == "ENTRYPOINT":
            stage.entrypoint = json.loads(rest)
        elif name not in ("EXPOSE", "CMD"):
            raise SystemExit(f"{DOCKERFILE.name} has {name}, which this script does not know")
    return stage


def _copy(stages: dict[str, Stage], stage: Stage, words: Sequence[str]) -> None:
    if words[0].startswith("--from="):
        other = stages[words[0].removeprefix("--from=")]
        stage.copy(other.folder / "upper" / words[1].strip("/"), words[2], move=True)
        return
    *sources, target = words
    for source in sources:
        place = Path(stage.workdir) / (source if target == "./" else target)
        stage.copy(REPOSITORY / source, str(place))


def main() -> None:
    """Build the image and test it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="an empty folder that keeps the layers; default: they are removed")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("mounts need root; run this as root on a machine of your own")
    with tempfile.TemporaryDirectory(prefix="relook-image-") as scratch:
        folder = (arguments.keep or Path(scratch)).resolve()
        began = time.monotonic()
        image = build(folder)
        built_s = time.monotonic() - began
        if image.entrypoint != ["relook"]:
            raise SystemExit(f"the entry point is {image.entrypoint}, and the trials call relook")
        check = shlex.join(image.healthcheck)
        for command in (*TRIALS, SERVED.format(check=check)):
            image.run(command, as_image=True)
        installed = image.folder / "upper" / "opt" / "relook"
        size = sum(path.lstat().st_size for path in installed.rglob("*") if path.is_file() and not path.is_symlink())
        print(json.dumps({"built_s": round(built_s), "tried": len(TRIALS) + 1, "installed_gb": round(size / 1e9, 1)}))
    sys.exit(0)


if __name__ == "__main__":
    main()

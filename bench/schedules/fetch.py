"""Fetches Fashion-MNIST (MIT licence) from Debian's package: ``python -m bench.schedules.fetch [directory]``.

Needs ``apt-get`` and ``dpkg-deb`` (Debian, Ubuntu), but not root. If they are missing, copy the four files of
https://github.com/zalandoresearch/fashion-mnist into the directory; they are verified in the same way.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
DIRECTORY = Path(__file__).resolve().parents[2] / "build" / "data" / "fashion-mnist"
#: SHA-256 of the uncompressed files. Debian compresses them again, so its .gz files differ from upstream's.
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read(directory: Path, name: str) -> bytes:
    """Reads, decompresses and verifies one file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is damaged or has other content.
    """
    path = directory / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: fetch it by python -m bench.schedules.fetch")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and fetch it anew") from error
    if hashlib.sha256(content).hexdigest() != CHECKSUMS[name]:
        raise ValueError(f"{path} does not have the content of Fashion-MNIST: remove it and fetch it anew")
    return content


def is_complete(directory: Path) -> bool:
    return all((directory / name).exists() for name in CHECKSUMS)


def fetch(directory: Path = DIRECTORY) -> None:
    """Downloads and unpacks the files if one is missing, and verifies all of them.

    Raises:
        RuntimeError: if apt-get or dpkg-deb is missing or fails.
        ValueError: if a file has the wrong content.
    """
    if not is_complete(directory):
        with tempfile.TemporaryDirectory() as scratch:
            _download(Path(scratch))
            directory.mkdir(parents=True, exist_ok=True)
            for name in CHECKSUMS:
                found = next(Path(scratch).rglob(name), None)
                if found is None:
                    raise RuntimeError(f"Debian's {PACKAGE} has no {name}")
                shutil.copyfile(found, directory / name)
    for name in CHECKSUMS:
        read(directory, name)


def _download(scratch: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not here: put the files into {DIRECTORY} by hand, or use --data mnist5k")
    scratch.chmod(0o777)  # when run as root, apt downloads as another user
    for command in (["apt-get", "download", PACKAGE], ["dpkg-deb", "-x", "@deb@", "."]):
        command = [str(next(scratch.glob("*.deb"))) if part == "@deb@" else part for part in command]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:2])} failed: {done.stderr.strip()}; apt-get update may help")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    try:
        fetch(target)
    except (OSError, RuntimeError, ValueError) as problem:
        sys.exit(f"bench.schedules.fetch: {problem}")
    print(f"Fashion-MNIST is complete and verified in {target}")

"""The sources of data sets: this repository, a URL, or the Hub. Each download is checked.

A file at a URL is fetched once, into HELLORA_CACHE (default: ~/.cache/hellora).
"""

import gzip
import os
import time
import urllib.request
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from plumbing.files import has_checksum, write_atomically, writing
from plumbing.hub import snapshot

ROOT = Path(__file__).parent.parent  # of this repository
LARGEST_UNPACKED = 1 << 27  # bytes
LARGEST_DOWNLOAD = 1 << 26  # bytes
LONGEST_DOWNLOAD, SILENCE = 600, 30  # seconds: for all bytes, and without any byte


class Source(NamedTuple):
    """The place of a split's rows: a file of this repository, a URL, or a data set of the Hub."""

    place: str  # a path in this repository, a URL, or the name of a file in `repo`
    checksum: str = ""  # of the file at a URL: its sha256, or its id in git
    licence: str = ""
    repo: str = ""  # a data set of the Hub, ORG/NAME. The Hub's client checks its files
    commit: str = ""  # of `repo`

    @property
    def is_download(self) -> bool:
        """Whether it is not a file of this repository."""
        return bool(self.repo) or "://" in self.place

    def cached(self) -> Path:
        """The path of a file of this repository, or of a URL's file in the cache.

        The file need not exist. Raises ValueError for a HELLORA_CACHE that is not a folder.
        """
        if "://" not in self.place:
            return ROOT / self.place
        cache = os.environ.get("HELLORA_CACHE", str(Path.home() / ".cache" / "hellora"))
        if not cache or (Path(cache).exists() and not Path(cache).is_dir()):
            raise ValueError(f"HELLORA_CACHE is {cache!r}: want a folder, or unset it")
        return Path(cache) / f"{self.checksum[:16]}-{self.place.rpartition('/')[2]}"

    def fetch(self) -> Path:
        """The path of the file, after a download if it is not here.

        Raises OSError without a network, and ValueError if the download has another checksum.
        """
        if self.repo:
            page = f"https://huggingface.co/datasets/{self.repo}"
            print(f"{self.place} of {page} (licence: {self.licence})")
            instead = "or give a copy of the file with --data FILE"
            folder = snapshot(self.repo, self.commit, self.place, kind="dataset", instead=instead)
            return folder / self.place
        if "://" not in self.place:
            return self.cached()
        path = self.cached()
        if path.exists() and has_checksum(path, self.checksum):
            return path
        print(f"downloading {self.place} (licence: {self.licence}) to {path}")
        body = download(self.place)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(self.write, body), every_rank=True)
        return path

    def write(self, body: bytes, path: Path) -> None:
        """Write a downloaded file. Raises ValueError unless it has the checksum."""
        path.write_bytes(body)
        if not has_checksum(path, self.checksum):
            raise ValueError(
                f"{self.place} gave {len(body):,} bytes without the checksum {self.checksum}: "
                "check whether the network wants a log-in, or use --data FILE"
            )


def download(url: str) -> bytes:
    """The bytes at a URL. Raises OSError if they cannot be fetched, or are too many or too slow."""
    body, until = bytearray(), time.monotonic() + LONGEST_DOWNLOAD
    try:
        with urllib.request.urlopen(url, timeout=SILENCE) as reply:
            size = int(reply.headers.get("Content-Length") or -1)
            while part := reply.read1(1 << 16):
                body += part
                if len(body) > LARGEST_DOWNLOAD or time.monotonic() > until:
                    raise OSError(f"more than {LARGEST_DOWNLOAD:,} bytes, or {LONGEST_DOWNLOAD} s")
        if size not in (-1, len(body)):
            raise OSError(f"it broke off after {len(body):,} of {size:,} bytes")
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(
            f"{url} could not be fetched ({error}): run the command again, or fetch the file on "
            "another network and give it with --data FILE"
        ) from error
    return bytes(body)


def unpacked(path: Path) -> bytes:
    """The content of a .gz. Raises ValueError if it is too large: a small .gz can hold any size."""
    with gzip.open(path) as file:
        body = file.read(LARGEST_UNPACKED + 1)
    if len(body) > LARGEST_UNPACKED:
        raise ValueError(f"it unpacks to more than {LARGEST_UNPACKED:,} bytes: gunzip it first")
    return body

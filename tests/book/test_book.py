"""The built book passes every check, and every check finds the defect it is for."""

import re
import shutil

import checks
import nbformat
import pytest
from bs4 import BeautifulSoup

PAGE, INDEX = "notebooks/sample-two.html", "index.html"


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_book_passes(books, check):
    assert [finding for book in books for finding in check(book)] == []


@pytest.fixture(scope="module")
def damaged(sample, tmp_path_factory):
    """A copy of the sample book; each test puts back what it changed."""
    folder = tmp_path_factory.mktemp("damaged") / "html"
    shutil.copytree(sample.html, folder)
    return folder


# check, page, what is replaced (a regular expression), by what, and what the finding says
DEFECTS = [
    (checks.labels, INDEX, r"</article>", '<p id="fig-line-two"></p></article>', "both have 'fig-line-two'"),
    (checks.labels, INDEX, r"</article>", '<i id="a"></i><i id="a"></i></article>', "id 'a' is there twice"),
    (checks.figures, PAGE, r'alt="A line[^"]*"', 'alt="A line"', "alt text of less than 20 characters"),
    (checks.figures, PAGE, r'alt="A line[^"]*"', "", "has no alt text"),
    (
        checks.figures,
        PAGE,
        r'<span class="caption-text">.*?</span>\s*<a class="h',
        '<a class="h',
        "no caption",
    ),
    (checks.figures, PAGE, r'<figure[^>]*id="fig-line-two"', "<figure", "has no label"),
    (checks.figures, PAGE, r'href="[^"]*fig-line-two\.pdf"', "", "has no pdf"),
    (checks.figures, PAGE, r'href="[^"]*fig-line-two\.svg"', "", "has no svg"),
    (checks.figures, PAGE, r'href="[^"]*fig-line-two\.csv"', "", "has no csv"),
    (checks.figures, PAGE, r'href="[^"]*tab-curve-two\.csv"', "", "table 'tab-curve-two' has no csv"),
    (checks.figures, PAGE, r"<caption>.*?</caption>", "", "table 'tab-curve-two' has no caption"),
    (checks.figures, PAGE, r"(?s)<thead>.*?</thead>", "", "has no heading"),
    (checks.links, INDEX, r'href="notebooks/sample-two\.html', 'href="notebooks/nowhere.html', "not exist"),
    (checks.links, INDEX, r"sample-two\.html#fig-line-two", "sample-two.html#fig-none", "no such anchor"),
    (checks.links, PAGE, r'src="\.\./_images/', 'src="../_gone/', "does not exist"),
    (checks.links, PAGE, r'href="\.\./_downloads/', 'href="../_gone/', "does not exist"),
    (
        checks.outside,
        INDEX,
        r"</head>",
        '<script src="https://cdn.example/x.js"></script></head>',
        "<script>",
    ),
    (checks.outside, INDEX, r"</head>", '<script src="//cdn.example/x.js"></script></head>', "<script>"),
    (
        checks.outside,
        INDEX,
        r"</head>",
        '<link rel="stylesheet" href="https://f.example/c.css"></head>',
        "<link>",
    ),
    (checks.outside, INDEX, r"</article>", '<img alt="x" src="http://i.example/x.png"></article>', "<img>"),
    (
        checks.outside,
        INDEX,
        r"</head>",
        "<style>@import 'https://f.example/x.css';</style></head>",
        "@import",
    ),
    (checks.outside, INDEX, r"</article>", '<b style="background:url(//e.example/x)"></b></article>', "url("),
    (checks.outside, INDEX, r"</head>", "<script>fetch('https://e.example/d')</script></head>", "fetch("),
    (checks.outside, "_static/custom.css", r"\Z", "a{src:url('https://f.example/f.woff2')}", "url("),
    (checks.outside, "_static/doctools.js", r"\Z", 'import("https://e.example/m.js")', "import("),
    (checks.heads, INDEX, r'lang="en"', "", "language is None"),
    (checks.heads, INDEX, r"<title>.*?</title>", "<title></title>", "has no title"),
    (checks.heads, INDEX, r"</article>", "<h1>Another</h1></article>", "has 2 first headings"),
]


@pytest.mark.parametrize(("check", "page", "old", "new", "says"), DEFECTS)
def test_defect_is_found(sample, damaged, check, page, old, new, says):
    path = damaged / page
    before = path.read_text()
    after = re.sub(old, lambda _: new, before, count=1)
    assert after != before
    path.write_text(after)
    try:
        findings = check(checks.BuiltBook(damaged, sample.source, sample.records))
    finally:
        path.write_text(before)
    assert any(says in finding for finding in findings), findings


def test_missing_page_is_found(sample, damaged):
    page = (damaged / PAGE).rename(damaged / "aside")
    try:
        findings = checks.toc(checks.BuiltBook(damaged, sample.source, sample.records))
    finally:
        page.rename(damaged / PAGE)
    assert findings == ["notebooks/sample-two is not built"]


def test_missing_record_is_found(sample, tmp_path):
    findings = checks.records(checks.BuiltBook(sample.html, sample.source, tmp_path))
    assert len(findings) == 1
    assert "which is not in" in findings[0]


def test_same_title_is_found(sample, damaged):
    index = (damaged / INDEX).read_text()
    (damaged / "again.html").write_text(index)
    try:
        findings = checks.heads(checks.BuiltBook(damaged, sample.source, sample.records))
    finally:
        (damaged / "again.html").unlink()
    assert any("have the same title" in finding for finding in findings)


def page_text(sample, page):
    return BeautifulSoup((sample.html / page).read_text(), "lxml").find("article").get_text(" ", strip=True)


def test_numbers_and_labels_reach_other_pages(sample):
    text = page_text(sample, INDEX)
    assert "Half of Fig. 1 , Table 1 , 0.500" in text


def test_page_names_its_model_and_refers_to_its_own_figure(sample):
    text = page_text(sample, PAGE)
    assert text.startswith("Sample of smol-qwen")
    assert "The share is 50.0% , see Fig. 1" in text


def test_page_tells_how_it_was_made(sample):
    text = page_text(sample, PAGE)
    assert "How this page was made" in text
    for part in ("notebooks/sample.ipynb", "points = 4", "Python", "numpy", "1, 12 s on"):
        assert part in text


def test_mathematics_is_set_by_the_vendored_mathjax(sample):
    scripts = [str(tag.get("src")) for tag in sample.pages[INDEX].find_all("script")]
    loader = next(script for script in scripts if "mathjax" in script)
    folder = sample.html / loader.partition("?")[0]
    assert folder.is_file()
    config = next(
        tag.get_text() for tag in sample.pages[INDEX].find_all("script") if "loader" in tag.get_text()
    )
    components = re.findall(r'"((?:input|output|a11y)/[\w-]+)"', config)
    assert len(components) == 3
    for component in components:
        assert (folder.parent / f"{component}.js").is_file()


def test_launch_buttons_open_the_committed_notebook(sample):
    addresses = [str(tag["href"]) for tag in sample.pages[PAGE].find_all("a", href=True)]
    fork = "someone/moeits-fork"
    assert f"https://colab.research.google.com/github/{fork}/blob/main/notebooks/sample.ipynb" in addresses
    assert f"https://mybinder.org/v2/gh/{fork}/main?urlpath=lab/tree/notebooks/sample.ipynb" in addresses
    assert not [address for address in addresses if "sample-two.ipynb" in address and "http" in address]


def test_search_index_knows_the_pages(sample):
    assert "sample-two" in (sample.html / "searchindex.js").read_text()


def test_executed_page_holds_no_folder_of_this_machine(sample):
    page = (sample.source / "notebooks" / "sample-two.ipynb").read_text()
    assert str(sample.source.parent) not in page
    nbformat.validate(nbformat.reads(page, as_version=4))

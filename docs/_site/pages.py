"""MkDocs hook: files outside of docs/ that are pages, too, and pictures that pages show.

Pages link to what lies outside as on a disk (``../benchmarks/...``), and files outside link
into docs/ (``docs/data.md``). In the site both lie side by side.
"""

import logging
import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
RESULTS = "results.md"
LOG = logging.getLogger("mkdocs.hooks")
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    results = re.search(r"^## Results\n.*?(?=^## )", (ROOT / "README.md").read_text(), re.M | re.S)
    assert results, "README.md has no Results"
    files.append(File.generated(config, RESULTS, content=results[0].replace("## ", "# ", 1)))
    pictures = [*(ROOT / "benchmarks/results").rglob("*.png")]
    data = [*(ROOT / "benchmarks/results").rglob("*.json")]
    for path in (*(ROOT / page for page in PAGES), *pictures, *data):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between the repository's folders into those between pages."""
    outside = page.file.src_uri in (*PAGES, RESULTS)
    folder = posixpath.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("" if outside else "docs", folder, link[2]))
        inside = place.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            return link[0]
        return link[1] + posixpath.relpath(inside, folder or ".")

    return LINK.sub(turned, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Warn of lists that a reader of Markdown stricter than GitHub's takes for text."""
    for paragraph in re.findall(r"<p>(.*?)</p>", html, re.S):
        if found := re.search(r"\n *[-*|] .{,40}", paragraph):
            LOG.warning("%s: no blank line before %r", page.file.src_uri, found[0].strip())


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Warn of what a browser would fetch from elsewhere: the site works without a network."""
    for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", output):
        if re.search(r"(?:src|href)=.https?:", tag):
            LOG.warning("%s fetches: %s", page.file.src_uri, tag)

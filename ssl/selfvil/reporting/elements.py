"""HTML elements of the page. The text of every element is escaped when the page is written, so a name that was read
from a file cannot become markup.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from selfvil.version import __version__

Content = Element | str | None

GENERATOR = f"selfvil {__version__}"
"""Content of the page's <meta name="generator">."""

_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def element(name: str, *content: Content, **attributes: object) -> Element:
    """An element with text and children in this order; None is left out.

    An underscore at the end of an attribute's name is removed (class_), others become hyphens. An attribute with the
    value None is left out.
    """
    made = Element(name, {
        key.rstrip("_").replace("_", "-"): clean(str(value)) for key, value in attributes.items() if value is not None
    })  # fmt: skip
    for child in content:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + clean(child)
        elif child is not None:
            made.text = (made.text or "") + clean(child)
    return made


def clean(text: str) -> str:
    """`text` without characters that UTF-8 or HTML does not allow, such as the bytes of a name that is not UTF-8."""
    return _NOT_TEXT.sub("\ufffd", text)


def capitalised(text: str) -> str:
    """`text` with a large first letter, unless it begins with a symbol, as k-NN, mIoU and α-ReQ do."""
    return text[0].upper() + text[1:] if re.match("[a-z]{2}", text) else text


def note(*content: Content) -> Element:
    """A paragraph about what is missing, or how something was made."""
    return element("p", *content, class_="note")


def badge(letter: str, style: str) -> Element | None:
    """The letter of a run in its colour; None for a run without one."""
    return element("b", letter, class_=f"badge {style}") if letter else None


def details(title: str, *content: Content) -> Element:
    """Content that is hidden until its title is clicked, and printed on paper."""
    return element("details", element("summary", title), *content)


def table(header: Sequence[Content], rows: Iterable[Sequence[Content]], caption: str) -> Element:
    """A table whose first column has the names of the rows. It scrolls sideways within itself where it is too wide.

    Empty cells have a dash; a cell that begins with ALARM is marked.
    """
    head = element("tr", *(element("th", cell, scope="col") for cell in header)) if header else None
    body = []
    for name, *cells in rows:
        entries = [
            element("td", "–" if cell in (None, "") else cell,
                    class_="alarm" if isinstance(cell, str) and cell.startswith("ALARM") else None)
            for cell in cells
        ]  # fmt: skip
        body.append(element("tr", element("th", name, scope="row"), *entries))
    made = element(
        "table", element("caption", element("span", caption)), element("thead", head) if head is not None else None,
        element("tbody", *body),
    )  # fmt: skip
    return element("div", made, class_="wide", tabindex=0, role="region", aria_label=caption)


def picture(png: bytes, description: str, *caption: Content) -> Element:
    """A PNG image, stored in the page, with a caption (by default its description)."""
    return element(
        "figure", image(png, description), element("figcaption", *(caption or (description,)))
    )  # fmt: skip


def image(png: bytes, description: str) -> Element:
    """A PNG image, stored in the page."""
    return element("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=description)


def section(title: str, *content: Content) -> Element:
    """A section of the page, which the page's navigation links to."""
    return element("section", element("h2", title), *content, id=re.sub(r"\W+", "-", title.lower()))


def page(title: str, head: Sequence[Content], main: Sequence[Element]) -> str:
    """The whole page: title, `head`, links to the sections of `main`, and `main`. It needs no other file."""
    sections = [each for each in main if each.tag == "section"]
    links = [element("a", made[0].text, href=f"#{made.get('id')}") for made in sections]
    document = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name_="viewport", content_="width=device-width, initial-scale=1"),
            element("meta", name_="generator", content_=GENERATOR),
            element("meta", name_="color-scheme", content_="light dark"),
            element("link", rel="icon", href="data:,"),  # otherwise a browser asks the server for one
            element("title", title),
            element("style", _source("page.css")),
        ),
        element(
            "body",
            element("header", element("h1", title), *head),
            element("nav", *links, aria_label="Sections"),
            element("main", *main),
            element("output", id="value", hidden="hidden"),
            element("script", _source("page.js")),
        ),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + ElementTree.tostring(document, encoding="unicode", method="html") + "\n"


def _source(name: str) -> str:
    return (files("selfvil.reporting") / name).read_text(encoding="utf-8")

"""A page as html.parser sees it; it must close every element it opens, and fetch nothing."""

from collections import Counter, defaultdict
from html.parser import HTMLParser

_VOID = {"img", "input", "meta", "br", "hr"}


class ParsedPage(HTMLParser):
    """Elements, attributes and text; an AssertionError where elements are not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.counts: Counter[str] = Counter()
        self.attributes: defaultdict[str, list[str]] = defaultdict(list)
        self.text = ""
        self.open: list[str] = []

    @property
    def tags(self) -> set[str]:
        return set(self.counts)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] += 1
        for name, value in attributes:
            self.attributes[name].append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(text: str) -> ParsedPage:
    """The parsed page, in which nothing is fetched from elsewhere."""
    parsed = ParsedPage()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    assert all(source.startswith("data:image/png;base64,") for source in parsed.attributes["src"])
    assert not parsed.attributes["href"]
    assert not any(name.startswith("on") for name in parsed.attributes)
    assert "url(" not in text
    assert "@import" not in text
    return parsed

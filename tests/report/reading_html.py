"""Reads a page back: whether its elements close, what they fetch, and what a reader sees."""

from html.parser import HTMLParser

VOID = {"meta", "br", "col"}


class ReadPage(HTMLParser):
    """Fails on an element that closes what is not open; `finish` on one that stays open."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        assert page.startswith("<!doctype html>\n<html")
        self.feed(page)
        self.close()
        assert not self.open, f"still open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def require_self_contained(self, page: str) -> None:
        """Law: nothing is fetched, and only what we wrote runs."""
        lowered = page.lower()
        for word in ("http://", "https://", "//cdn", "url(", "@import", "import("):
            assert word not in lowered, word
        assert not {"link", "img", "iframe", "object", "embed", "base"} & set(self.names)
        names = {name for _, name, _ in self.attributes}
        assert not {"src", "href", "srcset", "xlink:href", "action"} & names
        assert not [name for name in names if name.startswith("on")]
        assert self.names.count("script") == 1
        assert self.names.count("style") == 1

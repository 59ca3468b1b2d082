"""Abstracts as plain text: PubMed's inline tags and entities, which no question is about, become what they show.

`Zn <sup>2+ </sup>-dependent` and `Zn<sup>2+</sup>-dependent` are both written; either becomes `Zn2+-dependent`. Only
the lower-case tags of abstracts count, so that `p < 0.05`, `<10 nM` and a crystallographer's `<I>` stay. Given up:
formulas in MathML keep their letters, not their layout.
"""

import html
import re

_INLINE = "sup|sub|i|b|u|em|strong|sc"
# A blank before the end tag was put there with the tags, and one before the start tag with it.
_PAIR = re.compile(rf"( ?)<({_INLINE})>((?:(?!<\2>).)*?)( ?)</\2>", re.DOTALL)
_INLINE_LEFT = re.compile(rf"</?(?:{_INLINE})\s*/?>")
_BLOCK = re.compile(r"</?(?:p|br|h[1-6]|ul|ol|li|sec|title|(?:mml|jats):[a-z-]+)(?:\s[^<>]*)?/?>")
_NUMBER = re.compile(r"[-+−–]?\d")


def plain_text(text: str) -> str:
    """The text on one line, without tags and entities; 10<sup>-3</sup> becomes 10^-3, so that it is no other number."""
    # Entities last, then tags again: some servers escape the tags as well.
    return " ".join(_without_tags(html.unescape(_without_tags(text))).split())


def _without_tags(text: str) -> str:
    found = 1
    while found:  # those inside others come in a later round
        text, found = _PAIR.subn(_unwrap, text)
    return _BLOCK.sub(" ", _INLINE_LEFT.sub("", text))


def _unwrap(pair: re.Match) -> str:
    before, tag, inside, blank = pair.groups()
    before = "" if blank else before
    base = pair.string[max(pair.start() - 1, 0) : pair.start()]
    is_power = tag == "sup" and not before and base.isdigit() and _NUMBER.match(inside)
    return f"{before}{'^' if is_power else ''}{inside}"

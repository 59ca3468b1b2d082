"""PubMed's tags: every case by hand, as it stands in published abstracts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.plain_text import plain_text


@pytest.mark.parametrize(
    "tagged, plain",
    [
        ("The Zn <sup>2+ </sup>-dependent enzyme", "The Zn2+-dependent enzyme"),
        ("The Zn<sup>2+</sup>-dependent enzyme", "The Zn2+-dependent enzyme"),
        ("a 1D  <sup>19 </sup>F NMR screen", "a 1D 19F NMR screen"),
        ("HCO <sub>3 </sub> <sup>- </sup> binds", "HCO3- binds"),
        ("values of  <i>in vitro </i> assays", "values of in vitro assays"),
        ("the <i>bar-headed</i> goose", "the bar-headed goose"),
        ("an IC <sub>50 </sub> < 500 nM, <10 nM", "an IC50 < 500 nM, <10 nM"),
        ("<i>K <sub>m </sub> </i>= 10 <sup>-3 </sup> M", "Km= 10^-3 M"),
        ("2 x 10<sup>6</sup> M<sup>-1</sup> s<sup>-1</sup>", "2 x 10^6 M-1 s-1"),
        ("in 2015 <sup>225</sup>Ac was", "in 2015 225Ac was"),
        ("p &lt; 0.05, A &amp; B, 5&#x2009;Å", "p < 0.05, A & B, 5 Å"),
        ("&lt;i&gt;in vivo&lt;/i&gt;", "in vivo"),
        ("<h4>Background</h4>We<br/>solved it.", "Background We solved it."),
        ("an unpaired </i> tag<sup>", "an unpaired tag"),
        ("<I>/sigma(<I>) of <K> or 3 <x> 4", "<I>/sigma(<I>) of <K> or 3 <x> 4"),
        ('with <mml:math xmlns="a"><mml:mi>x</mml:mi></mml:math> known', "with x known"),
    ],
)
def test_tags_become_what_they_show(tagged, plain):
    assert plain_text(tagged) == plain


@given(st.text(st.characters(exclude_characters="<&", exclude_categories=["Cs"])))
def test_text_without_tags_keeps_every_word(text):
    assert plain_text(text) == " ".join(text.split())


@given(st.lists(st.sampled_from(["<i>", "</i>", "<sup>", " </sup>", "a", " ", "2", "<", "&lt;", "<p>"]), max_size=12))
def test_no_known_tag_is_left_however_they_are_nested(parts):
    found = plain_text("".join(parts))
    assert not any(tag in found for tag in ("<i>", "</i>", "<sup>", "</sup>", "<p>"))

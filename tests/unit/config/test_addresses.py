"""Secrets of addresses: left out wherever an address is shown, kept or compared; a password is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_values import command, message

from proteingpt.config.addresses import has_password, without_secrets


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("https://me:s3cret@host/dir?a=1&signature=s3cret", "https://host/dir"),
        ("was 'https://host/dir?s3cret', is 'ftp://s3cret@host/dir'", "was 'https://host/dir', is 'ftp://host/dir'"),
        ("s3://KEY:s3/cret@bucket/dir", "s3://KEY:s3/cret@bucket/dir"),  # no such address: a slash is %2F there
        ("s3://bucket/dir@v2", "s3://bucket/dir@v2"),
        ("shards/what?@home", "shards/what?@home"),
        (
            {"http://host/a?sig": 1.0, "b": [("http://host/c?sig", None, 3)]},
            {"http://host/a": 1.0, "b": [("http://host/c", None, 3)]},
        ),
    ],
)
def test_by_hand(value, wanted):
    assert without_secrets(value) == wanted


WORDS = st.text(st.sampled_from("abc:!$&+,;=-._~%0"), max_size=8)


@given(WORDS, WORDS, st.text("abc/._-", max_size=8), st.sampled_from(["s3", "http", "https", "ftp", "gs"]))
def test_what_stands_in_its_place_is_gone_from_any_address(user, query, path, scheme):
    address = f"{scheme}://{user}Q@host/{path}?{query}Q"
    assert without_secrets(address) == f"{scheme}://host/{path}"
    assert has_password(address) == (":" in user)


@pytest.mark.parametrize(
    "option",
    [
        ("--data", "s3://KEY:s3cret@b/d"),
        ("--data", "a=1", "s3://KEY:s3cret@b/d=2"),
        ("--embeddings", "ftp://me:s3cret@h/d"),
    ],
)
def test_a_password_is_refused_with_where_to_put_it_and_not_said_again(option):
    said = message(command, *option)
    assert "s3cret" not in said and "in the environment" in said and "data." in said


def test_a_user_alone_is_no_secret_and_neither_is_a_directory():
    assert not has_password("sftp://me@host/d") and not has_password("a:b@c/d") and not has_password(None)

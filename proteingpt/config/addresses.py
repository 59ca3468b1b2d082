"""What of an address is a secret. Addresses stand in recipes, messages and logs, which others read: there they stand
without user, password and query (in which signed addresses carry their signature)."""

import re

SECRET_PARTS = re.compile(r"(?P<scheme>\w+://)(?P<user>[^/\s?]*@)?(?P<rest>[^\s?'\"]*)(?P<query>\?[^\s'\"]*)?")


def without_secrets(value):
    """A text (an address, or words with addresses among them), or a dict, list or tuple of such; others as they are."""
    if isinstance(value, str):
        return SECRET_PARTS.sub(r"\g<scheme>\g<rest>", value) if "://" in value else value
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_secrets, value))
    return value


def has_password(address: str | None) -> bool:
    """Whether it is scheme://user:password@host/..."""
    found = SECRET_PARTS.match(address or "")
    return bool(found and ":" in (found["user"] or ""))

"""Addresses of endpoints, which are written into configurations, logs and reports."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator


def plain_address(url: str) -> str:
    """Return an http address that holds no secret.

    Raises:
        ValueError: It is none, or has a user, a password, a query or a fragment.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address such as http://127.0.0.1:8000 is expected")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address without user, password, query and fragment is expected: addresses stand "
            "in logs, and a key comes from the environment"
        )
    return url


Address = Annotated[str, AfterValidator(plain_address)]

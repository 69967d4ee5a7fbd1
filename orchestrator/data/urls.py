"""What the URL of a place holds: its scheme, its query, and no secrets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from urllib.parse import unquote

from dino_core.config import ConfigError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_QUERY = re.compile(r"\?(?=[A-Za-z_][\w.-]*=)")
_SECRET = re.compile(
    r"secret|passw|token|signature|\bsig\b|(access|account|api).?key|credential(?!_kind)", re.IGNORECASE
)
_USUAL = ("s3", "gs", "hdfs", "abfs", "hf", "http", "https", "file", "sftp", "ftp")
"""The schemes that messages name."""


def is_url(address: str) -> bool:
    """Whether it names a place by its scheme (`s3://...`) rather than by a path."""
    return SCHEME.match(address) is not None


def split_query(url: str) -> tuple[str, str]:
    """A URL and its query. A question mark that no option follows belongs to the name."""
    found = _QUERY.search(url)
    return (url[: found.start()], url[found.start() :]) if found else (url, "")


_CREDENTIALS = (
    "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN, ...) or the service's own file "
    "(~/.aws/credentials, ...)"
)


def refuse_secrets(key: str, url: str, instead: str = _CREDENTIALS) -> None:
    """Raise ConfigError if a URL holds a password or the like; the message does not repeat it.

    Args:
        instead: By what else credentials can be given.
    """
    plain, query = split_query(url)
    options = [option.partition("=")[0] for option in query[1:].split("&")]
    secret = next((option for option in options if _SECRET.search(option)), None)
    if _holds_login(url):
        scheme, _, rest = plain.partition("://")
        _, at, place = rest.rpartition("@")
        plain = f"{scheme}://..." if "@" in query else f"{scheme}://...{at}{place}"  # a password may have any sign
        what = "a password or token"
    elif secret is not None:
        what = f"the option {secret}"
    else:
        return
    raise ConfigError(
        f"{key} = {plain}: holds {what}, and runs record their settings for all to read; give credentials by {instead}"
    )


def _holds_login(url: str) -> bool:
    """Whether a password or token stands before an @. One in the path, as in a file's name, is none of that."""
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0]
    user, at, _ = authority.rpartition("@")
    if at:
        return ":" in unquote(user) or scheme.lower() in ("http", "https")  # where a user alone is a token
    # A slash may be part of the password (AWS's have them): what follows the colon is then no port, or has no business
    # there, for buckets have no ports.
    _, colon, port = re.sub(r"^\[.*?\]", "", authority).partition(":")
    is_port = port.isdigit() and scheme.lower() not in ("s3", "s3a", "gs", "gcs")
    return bool(colon) and not is_port and "@" in rest


def limit_retries(url: str, seconds: int) -> str:
    """The URL that has Google's client give up after so many seconds, unless it says when itself."""
    query = split_query(url)[1]
    if url.partition("://")[0] not in ("gs", "gcs") or "retry_limit_seconds=" in query:
        return url
    return f"{url}{'&' if query else '?'}retry_limit_seconds={seconds}"


def no_such_scheme(scheme: str, known: Iterable[str]) -> str:
    """The message for a scheme that is none of the `known` ones."""

    def likeness(name: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, scheme.lower(), name).ratio(), name[0] == scheme[0].lower()

    near = max(sorted(known), key=likeness)
    hint = f"; did you mean {near}://?" if likeness(near)[0] >= 0.5 else ""  # half of s4 is right
    return f"no such scheme as {scheme}://; there are {', '.join(_USUAL)} and others that fsspec knows{hint}"

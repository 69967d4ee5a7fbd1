"""Secrets in URLs, schemes that do not exist, and how long a client tries."""

from __future__ import annotations

import pytest

from dino_core.config import ConfigError
from orchestrator.data.storage import locate
from orchestrator.data.urls import limit_retries, no_such_scheme, refuse_secrets

KEY = "data.source"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://AKIA:sec@b/x", "s3://...@b/x"),
        ("s3://AKIA:sec/ret@b/x", "s3://...@b/x"),
        ("s3://AKIA:s@e/cret@b/x?region=a", "s3://...@b/x"),
        ("s3://AKIA:12/secret@b/x", "s3://...@b/x"),
        ("s3://AKIA%3Asecret@b/x", "s3://...@b/x"),
        ("s3://AKIA:se?c=ret@b/x", "s3://..."),
        ("sftp://me:sec/ret@host:22/x", "sftp://...@host:22/x"),
        ("https://ghp_secret@host/x.tar", "https://...@host/x.tar"),
        ("HTTPS://ghp_secret@host/x.tar", "HTTPS://...@host/x.tar"),
        ("http://me:sec/ret@host/x.tar", "http://...@host/x.tar"),
        ("s3://b/x?password=a@secret", "s3://b/x"),
        ("s3://AKIA:sec@b/x?password=a@secret", "s3://..."),
        ("simplecache::s3://AKIA:sec/ret@b/x", "simplecache::s3://...@b/x"),
    ],
)
def test_secrets_are_refused_and_not_repeated(url: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        locate(KEY, url)
    told, _, reason = str(caught.value).partition(": holds ")
    assert told == f"{KEY} = {shown}"
    assert reason.startswith(("a password or token, and runs record", "the option password, and runs record"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b/x",
        "s3://bucket/k:ey@x",
        "s3://bucket/x?endpoint_override=http://127.0.0.1:9000",
        "gs://anonymous@bucket/x",
        "hdfs://user@namenode:8020/x",
        "hdfs://namenode:8020/a@b",
        "hdfs://[::1]:8020/a@b",
        "abfs://container@account.dfs.core.windows.net/x",
        "hf://datasets/someone/photos@main/data",
        "https://host/a@b/x.tar",
        "https://host:8080/a@b/x.tar",
        "sftp://me@host:22/x",
    ],
)
def test_an_at_sign_alone_is_no_secret(url: str) -> None:
    refuse_secrets(KEY, url)


@pytest.mark.parametrize(
    ("scheme", "near"), [("s4", "s3"), ("s33", "s3"), ("htps", "https"), ("hff", "hf"), ("githb", "github")]
)
def test_the_nearest_scheme(scheme: str, near: str) -> None:
    message = no_such_scheme(scheme, ("s3", "gs", "http", "https", "hf", "github", "asynclocal"))
    assert message.endswith(f" and others that fsspec knows; did you mean {near}://?")
    assert "asynclocal" not in message
    assert "did you mean" not in no_such_scheme("xyzzy", ("s3", "gs"))


def test_only_googles_client_is_told_when_to_give_up() -> None:
    assert limit_retries("gs://b/a", 5) == "gs://b/a?retry_limit_seconds=5"
    assert limit_retries("gs://b/a?x=1", 5) == "gs://b/a?x=1&retry_limit_seconds=5"
    assert limit_retries("gs://b/a?retry_limit_seconds=9", 5) == "gs://b/a?retry_limit_seconds=9"
    assert limit_retries("s3://b/a", 5) == "s3://b/a"

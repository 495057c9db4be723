"""Kinds of URLs that need a package which not every installation has."""

from collections.abc import Iterator
from contextlib import contextmanager

from defuse.errors import NotReady

# The extra of this distribution that brings what fsspec needs for a kind of URL.
_EXTRAS = {
    "http": "stack",
    "https": "stack",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
}


@contextmanager
def naming_the_extra(url: str) -> Iterator[None]:
    """Turn the import that fails for want of a package into NotReady that says what to install."""
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f"pip install 'defuse-ml[{extra}]'" if extra else "install what it names"
        raise NotReady(
            f"{url!r} needs a package that this service does not have ({error}); {remedy} and start the service again",
            reason="PACKAGE_MISSING",
        ) from error

import pytest
from defuse.errors import NotReady

from services.storage.artifacts import ArtifactStore
from services.storage.file_systems import naming_missing_package


@pytest.mark.parametrize(("url", "extra"), [("s3://bucket/store", "s3"), ("gs://bucket", "gcs"), ("abfs://a", "azure")])
def test_a_store_that_needs_a_package(url: str, extra: str) -> None:
    """A store of a kind whose package is missing is refused by its URL, with the extra that brings the package."""
    with pytest.raises(NotReady, match=rf"{url}.*pip install 'defuse-ml\[{extra}\]'") as caught:
        ArtifactStore(url)
    assert caught.value.reason == "PACKAGE_MISSING"


def test_a_package_of_no_extra() -> None:
    """A kind of URL that no extra is for is refused with the words of fsspec, which name the package."""
    words = "Install hdfs first"
    with pytest.raises(NotReady, match=words), naming_missing_package("hdfs://host/store"):
        raise ImportError(words)

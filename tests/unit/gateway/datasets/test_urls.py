import functools
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from defuse.errors import InvalidInput, NotReady, StoreFull
from defuse.v1 import dataset_pb2

from services.gateway.datasets import datasets as urls
from services.gateway.datasets.datasets import Datasets
from services.gateway.files.files import Files
from services.localstack.child_process import free_port
from services.storage import keys
from services.storage.artifacts import ArtifactStore

# A server that cannot send a part of a file must do for files of more than one part: fsspec's are 5 MiB.
COUNT = 400
LIMIT = 8 * 1024 * 1024


class Web(SimpleHTTPRequestHandler):
    """Serves files, whole; of `cut.npz` it promises more than it sends."""

    def log_message(self, *_: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        promised = keyword == "Content-Length" and self.path == "/cut.npz"
        super().send_header(keyword, str(int(value) + 1000) if promised else value)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Serve a folder with a data set on this machine; give its URL."""
    folder = tmp_path / "site"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 128, 128), dtype=np.uint8)
    np.savez(folder / "images.npz", x_train=images, y_train=np.arange(COUNT) % 3)
    (folder / "cut.npz").write_bytes((folder / "images.npz").read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Web, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def create(store: ArtifactStore, uri: str, max_bytes: int = LIMIT) -> dataset_pb2.Dataset:
    datasets = Datasets(store, Files(store, max_bytes=LIMIT), max_bytes=max_bytes)
    return datasets.create(file_digest="", uri=uri, display_name="", seed=0)


def test_a_data_set_of_a_url(store: ArtifactStore, site: str, tmp_path: Path) -> None:
    """It is the data set that the same file makes when it is uploaded, and is called by its URL."""
    uri = f"{site}/images.npz"
    dataset = create(store, uri)
    assert (dataset.display_name, list(dataset.image_shape)) == (uri, [128, 128, 1])
    served = np.load(tmp_path / "site/images.npz")["x_train"]
    train = store.read_arrays(keys.split(dataset.name, "train"))["x"]
    assert len(train) == COUNT * 3 // 5
    assert {image.tobytes() for image in train} <= {image.tobytes() for image in served}
    file = (tmp_path / "site/images.npz").read_bytes()
    with urls.downloaded(uri, max_bytes=LIMIT) as (found, digest):
        assert found.read() == file
    store.write_bytes(keys.file(digest), file)
    datasets = Datasets(store, Files(store, max_bytes=LIMIT), max_bytes=LIMIT)
    assert datasets.create(file_digest=digest, uri="", display_name="", seed=0).name == dataset.name


@pytest.mark.parametrize("path", ["nothing.npz", "images.npz::file:///etc/passwd"])
def test_nothing_at_a_url(store: ArtifactStore, site: str, path: str) -> None:
    """A missing file on a web server is refused by its URL; no URL leads to the server's own disk."""
    with pytest.raises(InvalidInput, match=f"{site}/{path}.*cannot be read") as caught:
        create(store, f"{site}/{path}")
    assert (caught.value.reason, caught.value.field) == ("BAD_URI", "uri")


def test_nobody_at_a_url(store: ArtifactStore) -> None:
    """A web server that is not there is refused with what went wrong."""
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(InvalidInput, match=r"Cannot connect to host") as caught:
        create(store, f"http://{address}/images.npz")
    assert address in caught.value.message


def test_a_file_that_breaks_off(store: ArtifactStore, site: str) -> None:
    """Less than was promised is refused as that, whatever it would have been."""
    with pytest.raises(InvalidInput, match=r"cut\.npz.*cannot be read"):
        create(store, f"{site}/cut.npz")


def test_a_file_beyond_the_limit(store: ArtifactStore, site: str) -> None:
    """The limit of uploads is the limit of URLs."""
    with pytest.raises(InvalidInput, match="larger than 1000000 bytes") as caught:
        create(store, f"{site}/images.npz", max_bytes=10**6)
    assert caught.value.reason == "TOO_LARGE"
    assert store.keys("datasets") == []


def test_a_package_that_is_missing(store: ArtifactStore) -> None:
    """A URL that needs a package is refused with the extra that brings it."""
    with pytest.raises(NotReady, match=r"s3://bucket/images\.npz.*pip install 'defuse-ml\[s3\]'") as caught:
        create(store, "s3://bucket/images.npz")
    assert caught.value.reason == "PACKAGE_MISSING"


@contextmanager
def little_space() -> Iterator[None]:
    """Let this process write no file beyond a size that no chunk ends at, as on a disk that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_234_567, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_for_the_file(store: ArtifactStore, site: str) -> None:
    """A full disk is the operator's to mend, and is called by its directory."""
    with little_space(), pytest.raises(StoreFull, match=f"{tempfile.gettempdir()} has no room"):
        create(store, f"{site}/images.npz")

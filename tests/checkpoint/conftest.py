"""Object servers for the tests of workdirs in a bucket."""

import pytest

from gigagan_jax.core import processes
from tests.object_server import Server


@pytest.fixture(scope="session")
def google():
    # Imported here: the tests of the newest Python have no object servers.
    from tools.google_server import google_server

    with google_server(faults={}) as server:
        yield server


@pytest.fixture(scope="module")
def amazon(tmp_path_factory):
    import fsspec

    forget = lambda: fsspec.get_filesystem_class("s3").clear_instance_cache()
    with Server(tmp_path_factory.mktemp("empty")):
        # fsspec keeps file systems, with the address of the server that they were made with.
        forget()
        yield
    forget()


@pytest.fixture(params=["gs", "s3"])
def address(request, tmp_path):
    """An address that no other test uses."""
    request.getfixturevalue({"gs": "google", "s3": "amazon"}[request.param])
    return f"{request.param}://bucket/{tmp_path.name}"


@pytest.fixture
def faults(google):
    """Sets the faults of the proxy."""
    yield google.proxy.faults
    google.proxy.faults.clear()
    google.proxy.matches = ""


@pytest.fixture(autouse=True)
def no_threads_left():
    """After a failed save a verb ends the process at once: here that is the one of the tests."""
    yield
    processes._threads_left.clear()

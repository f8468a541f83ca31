"""An object server on this machine: moto's implementation of S3 behind HTTP, its bucket filled from a folder.

    python tests/object_server.py PORT FOLDER BUCKET

It keeps nothing: killed and started again it serves the same objects, as a real one would.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def main(port, folder, bucket):
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server
    from werkzeug.test import Client

    application = DomainDispatcherApplication(create_backend_app)
    client = Client(application)
    headers = {
        "Host": "s3.amazonaws.com",
        "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request",
    }
    assert client.put(f"/{bucket}", headers=headers).status_code == 200
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        assert client.put(f"/{bucket}/{name}", data=file.read_bytes(), headers=headers).status_code == 200
    quiet = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None, "protocol_version": "HTTP/1.1"})
    make_server("127.0.0.1", port, application, threaded=True, request_handler=quiet).serve_forever()


class Server:
    """A process that can be killed and started again on its port; this process's S3 clients are sent to it."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = None

    def start(self):
        command = [sys.executable, __file__, str(self.port), str(self.folder), "bucket"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        environment = {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_MAX_ATTEMPTS": "1",
        }
        self.before = {k: os.environ.get(k) for k in environment}
        os.environ.update(environment)
        self.start()
        return self

    def __exit__(self, *exception):
        self.kill()
        for k, v in self.before.items():
            os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

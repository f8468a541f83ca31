"""Notices of maintenance, from a real server on this machine."""

import http.server
import signal
import threading
import time

import pytest

from gigagan_jax.parallel import preemption


@pytest.fixture
def server(monkeypatch):
    """server.answers: path -> text; what is not there is a 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            http_server.asked += 1  # before the answer, upon which the watch goes on
            text = http_server.answers.get(self.path) if self.headers["Metadata-Flavor"] == "Google" else None
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args):
            pass

    # 100 times as often as in a run, so that the tests take no seconds.
    monkeypatch.setattr(preemption, "_POLL_SECONDS", 0.02)
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.answers, http_server.asked = {}, 0
    http_server.url = f"http://127.0.0.1:{http_server.server_address[1]}"
    thread = threading.Thread(target=http_server.serve_forever)
    thread.start()
    yield http_server
    http_server.shutdown()
    http_server.server_close()
    thread.join()


@pytest.fixture
def received_signals():
    """Signals that received_signals to this process."""
    numbers = []
    # The handler of the test replaces the default, which would end pytest.
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def wait_until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("key, text", [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE\n")])
def test_a_notice_is_a_sigterm(server, received_signals, key, text):
    server.answers = {
        "/preempted": "FALSE",
        "/maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE",
    }  # only moved: no notice
    with preemption.watch_notices(server.url):
        wait_until(lambda: server.asked > 6)
        assert not received_signals
        server.answers[f"/{key}"] = text
        wait_until(lambda: received_signals)
    assert received_signals == [signal.SIGTERM]  # once


def test_a_notice_that_stands_from_the_start_stops_nothing_again(server, received_signals, caplog):
    """It stopped the run before this one, on the same machine; the next one counts."""
    # The notice is there at the first answer.
    standing = {"/preempted": "FALSE", "/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    server.answers = dict(standing)
    with preemption.watch_notices(server.url):
        wait_until(lambda: server.asked > 6)
        assert not received_signals
        assert "going on until the machine goes" in caplog.text
        server.answers["/maintenance-event"] = "NONE"
        asked = server.asked
        wait_until(lambda: server.asked > asked + 4)
        server.answers = dict(standing)
        wait_until(lambda: received_signals)
    assert received_signals == [signal.SIGTERM]


def test_a_server_that_does_not_answer_is_asked_rarely_and_not_given_up(server, received_signals, caplog, monkeypatch):
    monkeypatch.setattr(preemption, "_SLOW_POLL_SECONDS", 0.5)
    with preemption.watch_notices(server.url):
        wait_until(lambda: caplog.records)
        asked = server.asked
        # Ten of the short periods, and less than one of the long.
        time.sleep(0.2)
        assert server.asked == asked
        assert "does not answer" in caplog.text
        assert not received_signals
        server.answers = {"/preempted": "FALSE", "/maintenance-event": "NONE"}
        wait_until(lambda: server.asked > asked + 2)
        server.answers = {"/preempted": "TRUE", "/maintenance-event": "NONE"}
        wait_until(lambda: received_signals)


def test_flag_values(refused):
    # No thread starts.
    with preemption.watch_notices("off"):
        pass

    def watch_wrong_url():
        with preemption.watch_notices("metadata.google.internal"):
            pass

    refused(watch_wrong_url, "--maintenance_url=metadata.google.internal", "http://")

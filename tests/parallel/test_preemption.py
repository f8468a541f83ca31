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
            made.asked += 1  # before the answer, upon which the watch goes on
            text = made.answers.get(self.path) if self.headers["Metadata-Flavor"] == "Google" else None
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args):
            pass

    monkeypatch.setattr(preemption, "_EVERY_SECONDS", 0.02)
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.answers, made.asked = {}, 0
    made.url = f"http://127.0.0.1:{made.server_address[1]}"
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def came():
    """Signals that came to this process."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def wait(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("key, text", [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE\n")])
def test_a_notice_is_a_sigterm(server, came, key, text):
    server.answers = {
        "/preempted": "FALSE",
        "/maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE",
    }  # only moved: no notice
    with preemption.watch(server.url):
        wait(lambda: server.asked > 6)
        assert not came
        server.answers[f"/{key}"] = text
        wait(lambda: came)
    assert came == [signal.SIGTERM]  # once


def test_a_notice_that_stands_from_the_start_stops_nothing_again(server, came, caplog):
    """It stopped the run before this one, on the same machine; the next one counts."""
    standing = {"/preempted": "FALSE", "/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    server.answers = dict(standing)
    with preemption.watch(server.url):
        wait(lambda: server.asked > 6)
        assert not came
        assert "going on until the machine goes" in caplog.text
        server.answers["/maintenance-event"] = "NONE"
        asked = server.asked
        wait(lambda: server.asked > asked + 4)
        server.answers = dict(standing)
        wait(lambda: came)
    assert came == [signal.SIGTERM]


def test_a_server_that_does_not_answer_is_asked_rarely_and_not_given_up(server, came, caplog, monkeypatch):
    monkeypatch.setattr(preemption, "_RARELY", 0.5)
    with preemption.watch(server.url):
        wait(lambda: caplog.records)
        asked = server.asked
        time.sleep(0.2)
        assert server.asked == asked
        assert "does not answer" in caplog.text
        assert not came
        server.answers = {"/preempted": "FALSE", "/maintenance-event": "NONE"}
        wait(lambda: server.asked > asked + 2)
        server.answers = {"/preempted": "TRUE", "/maintenance-event": "NONE"}
        wait(lambda: came)


def test_flag_values(refused):
    with preemption.watch("off"):
        pass

    def wrong():
        with preemption.watch("metadata.google.internal"):
            pass

    refused(wrong, "--maintenance_url=metadata.google.internal", "http://")

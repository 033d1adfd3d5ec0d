"""The rewriter against a local server that speaks the protocol, well and badly."""

import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest

from mmh_jax.mitigation import chat_rewriter

WORDS = ["a", "portrait", "of", "Ann", "by", "Ann"]
FIVE = ["one  photo", "two", "three", "four\n", "five"]


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def ok(content=None, status=200, **headers):
    body = completion(json.dumps(FIVE)) if content is None else content
    return status, headers, body.encode()


@pytest.fixture
def server(monkeypatch):
    """A server that gives the answers put in `answers`, the last for ever, and keeps requests."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = SimpleNamespace(answers=[ok()], seen=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.seen.append((self.path, dict(self.headers), json.loads(body)))
            answer = state.answers[min(len(state.seen), len(state.answers)) - 1]
            if callable(answer):
                answer(self)
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{running.server_port}/v1/chat/completions"
    yield state
    running.shutdown()
    thread.join()
    running.server_close()


def rewriter(server, **options):
    return chat_rewriter(server.url, "m", **({"pause": 0.0, "timeout": 5.0} | options))


def test_it_asks_once_and_returns_lines(server):
    found = rewriter(server, api_key="secret")(WORDS, [3, 5, 1])
    assert found == ["one photo", "two", "three", "four", "five"]
    [(path, headers, body)] = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert body["model"] == "m"
    task = json.loads(body["messages"][-1]["content"])
    assert task == {"prompt": " ".join(WORDS), "avoid": ["Ann", "portrait"], "count": 5}
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_without_a_key_none_is_sent_and_none_is_shown(server):
    rewriter(server)(WORDS, [0])
    assert "Authorization" not in server.seen[0][1]
    assert "secret" not in repr(rewriter(server, api_key="secret"))


def test_fences_are_no_fault(server):
    server.answers = [ok(completion('```json\n["x", "y"]\n```'))]
    assert rewriter(server, num_rewrites=2)(WORDS, [0]) == ["x", "y"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_tried_again(server, status):
    server.answers = [ok("down", status), ok("down", status), ok()]
    assert len(rewriter(server)(WORDS, [0])) == 5
    assert len(server.seen) == 3


def test_attempts_end_and_pauses_double(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.answers = [ok("down", 500)]
    with pytest.raises(ConnectionError, match=r"status 500\. \(attempt 4\)"):
        rewriter(server, attempts=4, pause=12.0)(WORDS, [0])
    assert len(server.seen) == 4
    assert pauses == [12.0, 24.0, 30.0]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(server, status):
    server.answers = [ok("no secret", status), ok()]
    with pytest.raises(ConnectionError, match=f"status {status}") as error:
        rewriter(server, api_key="secret")(WORDS, [0])
    assert len(server.seen) == 1
    assert "secret" not in str(error.value)


def test_redirects_are_not_followed(server):
    server.answers = [ok("", 302, Location=server.url + "/elsewhere"), ok()]
    with pytest.raises(ConnectionError, match="status 302"):
        rewriter(server, api_key="secret")(WORDS, [0])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("<html>", "no JSON; is the address"),
        ("\xff", "no JSON; is the address"),
        ("[" * 100_000, "no JSON; is the address"),
        ("[]", "no text at"),
        ('{"choices": []}', "no text at"),
        ('{"choices": [{"message": {"content": null}}]}', "no text at"),
        ('{"error": "x"}', "no text at"),
    ],
)
def test_another_protocol_is_said_at_once(server, body, says):
    server.answers = [ok(body), ok()]
    with pytest.raises(ValueError, match=says):
        rewriter(server)(WORDS, [0])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("Here you are: a, b", "no JSON array"),
        ('["only", "four", "of", "them"]', "array of 5 texts"),
        ('["a", "b", "c", "d", 5]', "array of 5 texts"),
        ('["a", "b", "c", "d", "  "]', "array of 5 texts"),
        ('{"a": 1}', "array of 5 texts"),
        (json.dumps(["a", "b", "c", "d", "e" * 2_001]), "2001 characters, more than 2000"),
    ],
)
def test_a_wrong_answer_of_the_model_is_asked_for_again(server, content, says):
    server.answers = [ok(completion(content)), ok()]
    assert len(rewriter(server)(WORDS, [0])) == 5
    server.seen.clear()
    server.answers = [ok(completion(content))]
    with pytest.raises(ValueError, match=says):
        rewriter(server, attempts=2)(WORDS, [0])
    assert len(server.seen) == 2


def test_a_huge_answer_is_not_read(server):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while sum(sent) < 50_000_000:
                handler.wfile.write(b"x" * 65_536)
                sent.append(65_536)
        except OSError:
            pass

    server.answers = [endless]
    with pytest.raises(ValueError, match="longer than 100000 bytes"):
        rewriter(server, max_bytes=100_000)(WORDS, [0])
    assert len(server.seen) == 1


def test_silence_ends(server):
    server.answers = [lambda handler: time.sleep(0.6)]
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"in 0\.1 seconds\. \(attempt 2\)"):
        rewriter(server, timeout=0.1, attempts=2)(WORDS, [0])
    assert time.monotonic() - start < 0.55
    assert len(server.seen) == 2


def test_an_answer_in_drops_ends(server):
    """Each wait is short, and the whole is not."""

    def drops(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(60):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    server.answers = [drops]
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        rewriter(server, timeout=0.3, attempts=1)(WORDS, [0])
    assert time.monotonic() - start < 1.5


def test_nobody_there(server):
    nobody = chat_rewriter("http://127.0.0.1:9/v1/chat/completions", "m", attempts=2, pause=0.0)
    with pytest.raises(ConnectionError, match=r"No answer .* \(attempt 2\)"):
        nobody(WORDS, [0])


def test_arguments_say_what_is_wrong(server):
    for url in ("file:///etc/passwd", "ftp://a/b", "localhost:8000", "http://u:p@host/x", ""):
        with pytest.raises(ValueError, match="no address of http or https") as error:
            chat_rewriter(url, "m")
        assert "u:p" not in str(error.value)
    for name in ("num_rewrites", "attempts", "max_bytes", "max_characters"):
        with pytest.raises(ValueError, match=rf"{name}=0\)` must be an integer of at least 1"):
            chat_rewriter(server.url, "m", **{name: 0})
    with pytest.raises(ValueError, match="finite seconds"):
        chat_rewriter(server.url, "m", timeout=0.0)
    with pytest.raises(ValueError, match="no header may have") as error:
        chat_rewriter(server.url, "m", api_key="secret\r\nX: y")
    assert "secret" not in str(error.value)
    rewrite = rewriter(server)
    for words in ("a photo", [], ["a", 3]):
        with pytest.raises(ValueError, match="is a list of words"):
            rewrite(words, [0])
    for place in (-1, 6):
        with pytest.raises(ValueError, match=f"has {place}; the prompt has words 0 to 5"):
            rewrite(WORDS, [0, place])
    assert not server.seen

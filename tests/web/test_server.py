"""The guarded server: Host, Origin, size, token, headers, files that stay in their folder, a quiet start and stop."""
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from flask import render_template_string, request
from werkzeug.exceptions import NotFound

from lesion.web import server

TOKEN = "correct-horse-battery"


def make_app(tmp_path, **settings):
    app = server.create_app("test", **settings)

    @app.get("/")
    def page():
        return "page"

    @app.post("/save")
    def save():
        return {"got": len(request.get_data())}

    @app.get("/bad")
    def bad():
        raise ValueError("the answer\n must be 1 to 6")

    @app.get("/full")
    def full():
        raise OSError(28, "No space left on device")

    @app.get("/open")
    @server.public
    def open_page():
        return "open"

    @app.get("/files/<path:name>")
    def files(name):
        return server.send_inside(tmp_path / "root", name)
    return app


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("192.168.3.4:8000", 200), ("LOCALHOST:1", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403),
    ("lab.example", 200), ("user@evil.example", 403)])
def test_only_names_of_this_machine_pass(tmp_path, host, status):
    """A name rebound to this address (DNS rebinding) is refused; addresses, localhost and given names are served."""
    client = make_app(tmp_path, names=["lab.example"]).test_client()
    assert client.get("/", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(("origin", "status"), [
    ("http://localhost:8000", 200), ("https://localhost:8000", 200), (None, 403), ("null", 403), ("", 403),
    ("http://localhost:8001", 403), ("http://evil.example", 403), ("http://localhost:8000.evil.example", 403)])
def test_posts_from_other_sites_are_refused(tmp_path, origin, status):
    """A post needs an Origin equal to its Host: other sites, other ports, opaque origins and none are refused."""
    client = make_app(tmp_path).test_client()
    headers = {"Host": "localhost:8000"} | ({} if origin is None else {"Origin": origin})
    assert client.post("/save", data=b"x", headers=headers).status_code == status
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(1_000_000, 200), (1_000_001, 413)])
def test_a_request_over_one_megabyte_is_refused(tmp_path, size, status):
    """1,000,000 bytes pass, one more does not; the answer is one line."""
    answer = make_app(tmp_path).test_client().post("/save", data=b"x" * size, headers={"Origin": "http://localhost"})
    assert answer.status_code == status
    assert answer.text.count("\n") <= 1


def test_token_opens_the_site_and_leaves_the_address(tmp_path):
    """No token or a wrong one: 401. The right one: a cookie, and a redirect without it. Public pages are open."""
    client = make_app(tmp_path, token=TOKEN, host="0.0.0.0").test_client()
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/?token=ä").status_code == 401
    assert client.get("/open").status_code == 200
    assert client.post("/save", headers={"Origin": "http://localhost"}).status_code == 401
    answer = client.get(f"/files/a%20b?x=1%262&token={TOKEN}")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/files/a%20b?x=1%262")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert TOKEN not in cookie
    assert client.get("/").status_code == 200
    assert client.post("/save", headers={"Origin": "http://localhost"}).status_code == 200


def test_wrong_tokens_slow_down(tmp_path):
    """Ten wrong tokens at once, then 429 without a look, even for the right one; who holds the cookie is never stopped;
    another address may still try; after the wait the right token opens."""
    app = make_app(tmp_path, token=TOKEN, host="0.0.0.0")
    app.extensions["guesses"].every_s = 0.05
    owner, thief, other = (app.test_client() for _ in range(3))
    assert owner.get(f"/?token={TOKEN}").status_code == 303
    codes = [thief.get(f"/?token=guess{n}").status_code for n in range(40)]
    assert codes[:10] == [401] * 10
    assert codes.count(429) >= 20
    refused = thief.get(f"/?token={TOKEN}")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert owner.get("/").status_code == 200
    there = {"REMOTE_ADDR": "192.0.2.7"}
    assert other.get(f"/?token={TOKEN}", environ_base=there).status_code == 303
    time.sleep(0.6)
    assert thief.get(f"/?token={TOKEN}").status_code == 303


def test_a_cookie_outlives_a_restart_and_says_nothing_of_the_token(tmp_path):
    """Made with the data's secret it opens the next server too; with another secret, or another token, it does not."""
    cookies = [make_app(tmp_path, token=token, secret=secret).test_client().get(f"/?token={token}").headers["Set-Cookie"].split(";")[0]
               for token, secret in ((TOKEN, "a" * 32), (TOKEN, "a" * 32), (TOKEN, "b" * 32), (TOKEN + "x", "a" * 32))]
    assert cookies[0] == cookies[1]
    assert len(set(cookies)) == 3


def test_json_nested_too_deeply_is_one_line(tmp_path):
    """A hundred thousand brackets are refused as a bad request, not as an error of the server."""
    app = make_app(tmp_path)

    @app.post("/json")
    def read():
        return {"got": len(request.get_json())}
    reply = app.test_client().post("/json", data=b"[" * 100_000, headers={"Origin": "http://localhost", "Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.text.count("\n") <= 1


@pytest.mark.parametrize(("settings", "words"), [
    ({"host": "0.0.0.0"}, "give --token"), ({"host": "192.168.1.5"}, "give --token"), ({"host": ""}, "give --token"),
    ({"host": "::"}, "give --token"), ({"token": "short"}, "at least 12"), ({"host": "lab.example"}, "give --token")])
def test_a_server_open_to_others_needs_a_token(tmp_path, settings, words):
    """A bind beyond loopback without a token, or a token one can guess, is refused in one line."""
    with pytest.raises(ValueError, match=words) as error:
        make_app(tmp_path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.5"])
def test_loopback_needs_no_token(tmp_path, host):
    """Loopback names and addresses start without a token."""
    assert make_app(tmp_path, host=host)


def test_every_answer_carries_the_security_headers(tmp_path):
    """Pages, files and errors alike: no inline code, no sniffing, no framing, no cache, no server version."""
    client = make_app(tmp_path).test_client()
    for path in ("/", "/missing", "/bad"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"


def test_errors_are_one_line_for_people_and_scripts(tmp_path):
    """A ValueError is a 400 with its message, a full disk a 500, an unknown page a 404: text or JSON as asked."""
    client = make_app(tmp_path).test_client()
    assert client.get("/bad").text == "the answer must be 1 to 6\n"
    answer = client.get("/bad", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json) == (400, {"error": "the answer must be 1 to 6"})
    answer = client.get("/full")
    assert (answer.status_code, answer.text) == (500, "not saved: No space left on device\n")
    assert client.get("/missing").text.count("\n") == 1
    assert client.get("/save").status_code == 405


def test_text_is_escaped_in_templates(tmp_path):
    """Jinja's escaping is on: a tag in a name stays text."""
    app = make_app(tmp_path)
    with app.test_request_context():
        page = render_template_string("<p title='{{ x }}'>{{ x }}</p>", x="' onload=alert(1) '<script>")
    assert page == "<p title='&#39; onload=alert(1) &#39;&lt;script&gt;'>&#39; onload=alert(1) &#39;&lt;script&gt;</p>"


@pytest.mark.parametrize("name", ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "sub/../../secret.txt",
                                  "/etc/passwd", "link.txt", "linked/secret.txt", "sub", "missing.txt", "a%00.txt",
                                  "x" * 3000, "..\\secret.txt"])
def test_files_cannot_leave_their_folder(tmp_path, name):
    """Dots, encoded dots, absolute names, symbolic links, folders, NUL bytes and long names: all 404."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "linked").symlink_to(tmp_path)
    (root / "sub" / "fine.txt").write_text("fine", encoding="utf-8")
    client = make_app(tmp_path).test_client()
    assert client.get("/files/sub/fine.txt").text == "fine"
    assert client.get(f"/files/{name}", follow_redirects=True).status_code == 404
    with client.application.test_request_context(), pytest.raises(NotFound):
        server.send_inside(root, "/etc/passwd")


def test_addresses_to_open():
    """The printed address is one a browser can open, with the token quoted."""
    assert server.page_url("127.0.0.1", 80) == "http://127.0.0.1:80/"
    assert server.page_url("::1", 80, path="/x") == "http://[::1]:80/x"
    assert server.page_url("0.0.0.0", 80) == f"http://{socket.gethostname()}:80/"
    assert server.page_url("lab", 80, "a&b" * 5).endswith("?token=" + "a%26b" * 5)


PROGRAM = """
import time
from lesion.run import cli
from lesion.web import server
def main():
    app = server.create_app("test")
    @app.get("/")
    def page():
        return "hello " * 200_000
    @app.get("/minute")
    def minute():
        time.sleep(60)
    @app.get("/slow")
    def slow():
        time.sleep(0.5)
        print("slow done", flush=True)
        return "slow"
    try:
        with server.bind(port=PORT) as listener:
            server.serve(app, listener, ready=lambda url: print(url, flush=True))
    finally:
        print("stopped", flush=True)
cli.run(main, "program")
"""


def start(port=0):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.replace("PORT", str(port))], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_stop_signals_end_the_server_cleanly(number, code, word):
    """SIGTERM and ctrl-C let a request in hand finish and its reply arrive; then the program tidies up and ends as
    every command does, with one line and 143 or 130."""
    process, url = start()
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1].strip("/")))) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        reply = connection.recv(10_000)
    assert (process.returncode, out, err) == (code, "slow done\nstopped\n", f"program: {word}\n")
    assert reply.startswith(b"HTTP/1.1 200 OK")
    assert reply.endswith(b"slow")


def test_a_second_signal_does_not_wait():
    """With a request of a minute in hand the first SIGTERM waits, the second ends the program within seconds."""
    process, url = start()
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1].strip("/")))) as connection:
        connection.sendall(b"GET /minute HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        began = time.monotonic()
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        _, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 4  # waitress waits five seconds for its threads
    assert (process.returncode, err) == (143, "program: terminated\n")


def test_a_browser_that_leaves_does_not_kill_the_server():
    """cli.run lets SIGPIPE end a program; a connection closed in mid-answer must not."""
    process, url = start()
    try:
        port = int(url.rsplit(":", 1)[1].strip("/"))
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
            assert "Server" not in answer.headers
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_a_busy_port_is_one_line():
    """A port in use ends in exit code 2 and one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        process, _ = start(port)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert f"port {port} of 127.0.0.1 is in use" in err
    assert err.count("\n") == 1


def test_an_address_of_another_machine_is_one_line():
    """--host must be this machine's: ValueError, not a traceback."""
    with pytest.raises(ValueError, match="cannot listen on 192.0.2.1"):
        server.bind("192.0.2.1", 0)


def test_a_huge_request_is_refused_by_the_real_server():
    """A chunked body without a length cannot grow past 1 MB either."""
    process, url = start()
    try:
        body = (b"x" * 65536 for _ in range(40))
        ask = urllib.request.Request(url, data=body, method="POST", headers={"Origin": url.rstrip("/")})
        with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as error:
            urllib.request.urlopen(ask, timeout=10)
        if isinstance(error.value, urllib.error.HTTPError):
            assert error.value.code == 413
        assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)

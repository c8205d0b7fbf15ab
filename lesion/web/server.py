"""The web server under the labelling app and the reader study: a guarded Flask app served by waitress.

How to use it:

    app = server.create_app(__name__, token=args.token, host=args.host)  # ValueError: open to others without a token
    @app.get("/tile/<path:name>")
    def tile(name):
        return server.send_inside(folder, name)                          # 404 for whatever leads out of `folder`
    server.serve(app, args.host, args.port, ready=lambda url: print(f"open {url}"), browser=not args.no_browser)

What every request passes before a view sees it (OWASP cheat sheets on cross-site request forgery and DNS rebinding;
the Fetch standard on `Origin`): the Host header names this machine by a loopback name, an IP address or its own host
name, so that a strange name rebound to 127.0.0.1 is refused; a request that changes something carries an Origin equal
to its Host; its body is at most 1 MB; and, where a token was given, the token or the cookie it left. Views marked
`@server.public` need no token. Pages load scripts and styles from /static only: the content security policy allows no
inline code. Templates ending in .html are escaped by Jinja: never write `|safe`. An error is one line, JSON
`{"error": ...}` to a script and plain text to a person; a ValueError in a view is a 400, an OSError a 500 "not saved".
Proven by tests/web/test_server.py.
"""
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote, urlsplit

import waitress
from flask import Flask, Response, abort, g, redirect, request, send_file
from werkzeug.exceptions import HTTPException

MAX_BODY = 1_000_000  # bytes; a request over this is refused with 413
MIN_TOKEN = 12  # characters
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
                               "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # "no-referrer" would turn the Origin of a form post into `null`
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether binding `host` (a name or address) is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def create_app(import_name: str, token: str | None = None, host: str = "127.0.0.1", names: Iterable[str] = ()) -> Flask:
    """A Flask app with the guards of the module docstring; templates and static files lie beside this module.

    token: at least 12 characters, or None for none. host: what will be bound. names: further host names under which
    people reach this machine (a reverse proxy's). ValueError for a non-loopback host without a token, or a short one.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {host} lets other machines in: give --token with at least {MIN_TOKEN} characters, "
                         f"for example --token {secrets.token_urlsafe(16)}")
    if token is not None and len(token) < MIN_TOKEN:
        raise ValueError(f"--token has {len(token)} characters: give at least {MIN_TOKEN}, "
                         f"for example {secrets.token_urlsafe(16)}")
    here = Path(__file__).parent
    app = Flask(import_name, template_folder=here / "templates", static_folder=here / "static")
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, SEND_FILE_MAX_AGE_DEFAULT=0, TOKEN=token)
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    own = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}
    own |= {f"{socket.gethostname().split('.')[0].lower()}.local", host.lower()} - {""}

    @app.before_request
    def guard():
        if request.content_length and request.content_length > MAX_BODY:
            abort(413, f"the request is over {MAX_BODY:,} bytes")
        if not _is_own_name(request.host, own):
            abort(403, f"the host name {request.host!r} is not this server's: open the address printed at its start")
        if request.method not in ("GET", "HEAD", "OPTIONS") and not _same_origin():
            abort(403, "this request came from another site")
        view = app.view_functions.get(request.endpoint)
        if token is None or request.endpoint == "static" or getattr(view, "is_public", False):
            return None
        return check_token(token)

    @app.after_request
    def add_headers(response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if request.endpoint != "static" and "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = "no-store"
        if "set_token" in g:
            response.set_cookie(_cookie_name(), g.set_token, httponly=True, samesite="Lax", secure=request.is_secure,
                                max_age=30 * 86400)
        return response

    @app.errorhandler(HTTPException)
    def one_line(error: HTTPException):
        return error_response(error.code, " ".join(str(error.description).split()))

    @app.errorhandler(ValueError)
    def bad_value(error: ValueError):
        return error_response(400, " ".join(str(error).split()))

    @app.errorhandler(OSError)
    def bad_disk(error: OSError):
        return error_response(500, f"not saved: {error.strerror or error}")

    return app


def public(view: Callable) -> Callable:
    """Mark a view that needs no token, as its address is a secret or it tells nothing: goes nearest the function."""
    view.is_public = True
    return view


def error_response(status: int, message: str) -> Response:
    """One line: JSON to a script, plain text to a person."""
    if request.is_json or request.accept_mimetypes.best == "application/json":
        response = Response(json.dumps({"error": message}, ensure_ascii=False), mimetype="application/json")
    else:
        response = Response(message + "\n", mimetype="text/plain")
    response.status_code = status
    return response


def _is_own_name(host: str, own: set[str]) -> bool:
    """A Host header of this machine. An address cannot be rebound; a name can, so only known names pass."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in own


def _same_origin() -> bool:
    """Browsers send Origin with every post; a missing one is taken as foreign, so scripts must say it too."""
    return urlsplit(request.headers.get("Origin", "")).netloc == request.host


def check_token(token: str) -> Response | None:
    """None if the request holds the token's cookie; a redirect that sets it if `?token=` is right; otherwise 401."""
    expected = hashlib.sha256(b"lesion cookie " + token.encode()).hexdigest()
    given = request.args.get("token")
    if given is not None and hmac.compare_digest(given.encode(), token.encode()):
        g.set_token = expected
        if request.method != "GET":
            return None
        rest = "&".join(f"{quote(k)}={quote(v)}" for k, v in request.args.items(multi=True) if k != "token")
        return redirect(quote(request.path) + (f"?{rest}" if rest else ""), 303)  # the token leaves the address bar
    if hmac.compare_digest(request.cookies.get(_cookie_name(), "").encode(), expected.encode()):
        return None
    return error_response(401, "this page needs a token: open the address printed by the command, with its ?token=...")


def _cookie_name() -> str:
    port = request.host.rsplit(":", 1)[-1]  # cookies are shared by all ports of a host
    return f"lesion_{port if port.isdigit() else 'token'}"


def send_inside(folder: Path, name: str, max_age: int = 0) -> Response:
    """Serve the file `name` of `folder`; 404 for whatever leads out of it (.., absolute paths, links) or is no file."""
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve()
        found = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError):  # a NUL byte, a name too long
        found = False
    if not found:
        abort(404, "no such file")
    return send_file(path, conditional=True, max_age=max_age)


def serve(app: Flask, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None] | None = None,
          browser: bool = False, path: str = "/", threads: int = 8) -> None:
    """Serve until ctrl-C or SIGTERM, then let the requests in hand finish and return.

    port 0 takes any free one. ready(url) is called once the port is bound: print the address there. browser: open the
    page where there is a display. Port in use or host not of this machine: ValueError. Call it from the main thread.
    """
    address = "127.0.0.1" if host == "localhost" else host.strip("[]") or "0.0.0.0"
    try:
        listener = waitress.create_server(app, host=address, port=port, threads=threads, ident=None,
                                          max_request_body_size=MAX_BODY, connection_limit=256, channel_timeout=60,
                                          clear_untrusted_proxy_headers=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use: stop what runs there, or choose another --port "
                             "(0 takes any free one)") from None
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror or error}): --host must be an address of "
                         "this machine, --port a free one") from None
    url = page_url(host, listener.effective_port, app.config["TOKEN"], path)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # cli.run lets SIGPIPE kill; here it is only a browser that left
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue of one is no news
    try:
        if ready:
            ready(url)
        if browser and _has_display():
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        listener.run()  # ends on KeyboardInterrupt and SystemExit, after the requests in hand
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def _stop(number, frame):
    raise KeyboardInterrupt


def page_url(host: str, port: int, token: str | None = None, path: str = "/") -> str:
    """The address to open: the wildcard hosts become this machine's name."""
    if host in ("", "0.0.0.0", "::", "[::]"):
        host = socket.gethostname()
    elif ":" in host:
        host = f"[{host.strip('[]')}]"
    return f"http://{host}:{port}{path}" + (f"?token={quote(token)}" if token else "")


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))

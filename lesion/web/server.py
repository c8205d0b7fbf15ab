"""The web server under the labelling app and the reader study: a guarded Flask app served by waitress.

How to use it:

    app = server.create_app(__name__, token=args.token, host=args.host)  # ValueError: open to others without a token
    @app.get("/tile/<path:name>")
    def tile(name):
        return server.send_inside(folder, name)                          # 404 for whatever leads out of `folder`
    with server.bind(args.host, args.port) as listener:                  # ValueError: port in use; before anything is made
        server.serve(app, listener, args.host, ready=lambda url: print(f"open {url}"), browser=not args.no_browser)

What every request passes before a view sees it (OWASP cheat sheets on cross-site request forgery and DNS rebinding;
the Fetch standard on `Origin`): the Host header names this machine by a loopback name, an IP address or its own host
name, so that a strange name rebound to 127.0.0.1 is refused; a request that changes something carries an Origin equal
to its Host; its body is at most 1 MB; and, where a token was given, the token or the cookie it left. Views marked
`@server.public` need no token. Wrong tokens and links slow down, and no address takes all the places
(lesion.web.limits). Pages load scripts and styles from /static only: the content security policy allows no
inline code. Templates ending in .html are escaped by Jinja: never write `|safe`. An error is one line, JSON
`{"error": ...}` to a script and plain text to a person; a ValueError in a view is a 400, an OSError a 500 "not saved".
Proven by tests/web/test_server.py.
"""
import errno
import hmac
import ipaddress
import json
import logging
import math
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

from flask import Flask, Response, abort, current_app, g, redirect, request, send_file
from flask.json.provider import DefaultJSONProvider
from waitress.adjustments import Adjustments
from werkzeug.exceptions import HTTPException

from lesion.run import cli, files
from lesion.web import limits

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


def create_app(import_name: str, token: str | None = None, host: str = "127.0.0.1", names: Iterable[str] = (),
               secret: str | None = None) -> Flask:
    """A Flask app with the guards of the module docstring; templates and static files lie beside this module.

    token: at least 12 characters, or None for none. host: what will be bound. names: further host names under which
    people reach this machine (a reverse proxy's). secret: what cookies are made with, kept with the data so that they
    outlive a restart; None draws one. ValueError for a non-loopback host without a token, or a short one.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {host} lets other machines in: give --token with at least {MIN_TOKEN} characters, "
                         f"for example --token {secrets.token_urlsafe(16)}")
    if token is not None and len(token) < MIN_TOKEN:
        raise ValueError(f"--token has {len(token)} characters: give at least {MIN_TOKEN}, "
                         f"for example {secrets.token_urlsafe(16)}")
    here = Path(__file__).parent
    app = Flask(import_name, template_folder=here / "templates", static_folder=here / "static")
    app.json = _Json(app)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, SEND_FILE_MAX_AGE_DEFAULT=0, TOKEN=token)
    app.extensions["guesses"] = limits.Guesses()
    cookie = None if token is None else hmac.digest((secret or secrets.token_urlsafe()).encode(), token.encode(), "sha256").hex()
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
        return check_token(token, cookie)

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

    @app.errorhandler(RecursionError)
    def bad_depth(error: RecursionError):
        return error_response(400, "the request is nested too deeply")

    @app.errorhandler(OSError)
    def bad_disk(error: OSError):
        return error_response(500, f"not saved: {error.strerror or error}")

    return app


class _Json(DefaultJSONProvider):
    """A request's JSON within the bounds of every other file's; what is not is a 400."""

    def loads(self, s: str | bytes, **kwargs) -> object:
        return files.parse_json(s)


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


def check_token(token: str, cookie: str) -> Response | None:
    """None if the request holds `cookie`; a redirect that sets it if `?token=` is right; otherwise 401, or 429 without
    a look at the token where this address has been wrong too often. The cookie cannot be guessed, so it always counts."""
    if hmac.compare_digest(request.cookies.get(_cookie_name(), "").encode(), cookie.encode()):
        return None if request.args.get("token") is None or request.method != "GET" else _without_token()
    given = request.args.get("token")
    if given is None:
        return error_response(401, "this page needs a token: open the address printed by the command, with its ?token=...")
    if (wait := _guesses().wait_s(request.remote_addr or "")) > 0:
        return _slow_down(wait)
    if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
        _guesses().wrong(request.remote_addr or "")
        return error_response(401, "this token is wrong: open the address printed by the command, with its ?token=...")
    g.set_token = cookie
    return None if request.method != "GET" else _without_token()


def _without_token() -> Response:
    """The token leaves the address bar."""
    rest = "&".join(f"{quote(k)}={quote(v)}" for k, v in request.args.items(multi=True) if k != "token")
    return redirect(quote(request.path) + (f"?{rest}" if rest else ""), 303)


def refuse_link() -> None:
    """End the request of somebody whose personal link is wrong: 404, or 429 where that happens too often. Right links
    are 128 random bits and always pass."""
    if (wait := _guesses().wait_s(request.remote_addr or "")) > 0:
        abort(_slow_down(wait))
    _guesses().wrong(request.remote_addr or "")
    abort(404, "no such link: use the one you were sent, in full")


def _guesses() -> limits.Guesses:
    return current_app.extensions["guesses"]


def _slow_down(wait: float) -> Response:
    response = error_response(429, f"too many wrong tokens or links from this address: try again in {math.ceil(wait)} s")
    response.headers["Retry-After"] = str(math.ceil(wait))
    return response


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


def bind(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A listening socket, before anything else is made or taken over; close it, or give it to `serve`.

    port 0 takes any free one. ValueError for a port in use, or a host that is not of this machine.
    """
    address = "127.0.0.1" if host == "localhost" else host.strip("[]") or "0.0.0.0"
    try:
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use: stop what runs there, or choose another --port "
                             "(0 takes any free one)") from None
        raise ValueError(f"cannot listen on {host}:{port} ({os.strerror(error.errno) if error.errno and error.errno > 0 else error}"
                         "): --host must be an address of this machine, --port a free one") from None


def serve(app: Flask, listener: socket.socket, host: str = "127.0.0.1", ready: Callable[[str], None] | None = None,
          browser: bool = False, path: str = "/", threads: int = 8) -> None:
    """Serve on what `bind(host, ...)` gave until ctrl-C or SIGTERM; let the requests in hand finish, then raise
    KeyboardInterrupt or cli.Terminated, as any command's work ends. A second signal does not wait for them.

    ready(url) is called before the first request: print the address there. browser: open the page where there is a
    display. Call it from the main thread.
    """
    settings = Adjustments(sockets=[listener], threads=threads, ident=None, max_request_body_size=MAX_BODY,
                           connection_limit=limits.PLACES + 50, channel_timeout=limits.IDLE_S, cleanup_interval=5,
                           asyncore_use_poll=True, clear_untrusted_proxy_headers=True)
    fair = limits.FairServer(app, {}, _sock=listener, adj=settings, bind_socket=False,
                             sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()))
    url = page_url(host, fair.effective_port, app.config["TOKEN"], path)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # cli.run lets SIGPIPE kill; here it is only a browser that left
    logging.getLogger("waitress").setLevel(logging.ERROR)  # a queue of one is no news, nor what an end cancels
    with cli.stop_request() as stop:
        try:
            if ready:
                ready(url)
            if browser and _has_display():
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
            fair.run()  # keeps the interrupt to itself, and returns after the requests in hand
        finally:
            fair.close()
    if stop.number:
        stop.interrupt(stop.number)


def page_url(host: str, port: int, token: str | None = None, path: str = "/") -> str:
    """The address to open: the wildcard hosts become this machine's name."""
    if host in ("", "0.0.0.0", "::", "[::]"):
        host = socket.gethostname()
    elif ":" in host:
        host = f"[{host.strip('[]')}]"
    return f"http://{host}:{port}{path}" + (f"?token={quote(token)}" if token else "")


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))

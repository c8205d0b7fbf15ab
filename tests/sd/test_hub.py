"""Hub ids against a local stand-in for the hub: what is fetched, what the cache saves, what a broken line does.

The hub library reads its environment when it is imported, so the loading is done by one child process, asked line by
line.
"""

import hashlib
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
COMPONENTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
DECOYS = ["v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "README.md", "unet/diffusion_pytorch_model.bin",
          "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
          "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors"]  # fmt: skip

WORKER = """
import json, sys
from pathlib import Path
from lesion.sd import checkpoint
print("ready", flush=True)
for line in sys.stdin:
    try:
        base, _, vae = json.loads(line).partition("|")
        sd = checkpoint.load(base, vae=vae or None)
        answer = {"files": [str(file) for file in sd.files], "source": sd.source, "tokenizer": str(sd.tokenizer.folder)}
    except ValueError as error:
        answer = {"error": str(error)}
    print("answer " + json.dumps(answer), flush=True)
"""


class Hub(http.server.ThreadingHTTPServer):
    """The three requests that a snapshot download makes: a revision's id, its list of files, a file (whole or a
    range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes | Path]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.trouble: dict[str, str] = {}  # path -> "close" or "reset" in the middle, once
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, repo: str) -> set[str]:
        """Files of a repo that were asked for, in whole or in part."""
        head = f"/{repo}/resolve/{SHA}/"
        return {
            path.removeprefix(head) for method, path, _ in self.requests if method == "GET" and path.startswith(head)
        }

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the play."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.split("?")[0].replace("%2F", "/")
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/[^/]+", path)
        if api and api[1] in self.server.repos:
            return self.send(self.listing(api[1], api[2] == "tree"), "application/json", body)
        file = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:main|{SHA})/(.+)", path)
        content = self.server.repos.get(file[1], {}).get(file[2]) if file else None
        if content is None:
            return self.send(b'{"error": "not here"}', "application/json", body, 404, {"X-Error-Code": "RepoNotFound"})
        content = content.read_bytes() if isinstance(content, Path) else content
        more = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if part:
            start = int(part[1])
            more["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(content[start:], "application/octet-stream", body, 206, more)
        return self.send(
            content, "application/octet-stream", body, 200, more, self.server.trouble.pop(path, None) if body else None
        )

    def listing(self, repo: str, tree: bool) -> bytes:
        sizes = {
            path: c.stat().st_size if isinstance(c, Path) else len(c) for path, c in self.server.repos[repo].items()
        }
        if tree:
            rows = [{"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
                    for path, size in sizes.items()]  # fmt: skip
            return json.dumps(rows).encode()
        known = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": SHA,
            "private": False,
            "gated": False,
            "disabled": False,
        }
        known |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sizes]}
        return json.dumps(known).encode()

    def send(
        self,
        content: bytes,
        kind: str,
        body: bool,
        status: int = 200,
        more: dict | None = None,
        trouble: str | None = None,
    ):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        self.wfile.write(content[: len(content) * 9 // 10] if trouble else content)
        if trouble:
            self.wfile.flush()
            self.close_connection = True
        if trouble == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def environment(url: str, home: Path) -> dict:
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"}
    mine = {key: value for key, value in os.environ.items() if key.upper() not in proxies}
    return {**mine, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tiny):
    """A hub with SD 1.5 under four names (each name has a cache of its own) and OpenAI's CLIP."""
    server = Hub()
    folder = tiny / "folder"
    real = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in ("plain", "dropped", "reset", "late"):
        server.repos[f"tiny/{name}"] = {**real, **dict.fromkeys(DECOYS, b"\x80\x04 never fetched")}
    weights = {name: real.pop(name) for name in COMPONENTS}
    half = {name.replace(".safetensors", ".fp16.safetensors"): path for name, path in weights.items()}
    pickled = {name.replace(".safetensors", ".bin"): b"\x80\x04" for name in weights}
    server.repos["tiny/half"] = {**real, **half, **pickled}
    names = [f"unet/diffusion_pytorch_model-{part:05d}-of-00002.safetensors" for part in (1, 2)]
    tensors = load_file(weights[COMPONENTS[1]])
    shards = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    index = {"weight_map": {key: names[part].removeprefix("unet/") for part in (0, 1) for key in shards[part]}}
    server.repos["tiny/sharded"] = {
        **real, **{name: save(shard) for name, shard in zip(names, shards)}, COMPONENTS[0]: weights[COMPONENTS[0]],
        COMPONENTS[2]: weights[COMPONENTS[2]], "unet/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode(),
        "unet/diffusion_pytorch_model.fp16.safetensors": b"never fetched"}  # fmt: skip
    server.repos["tiny/pickled"] = {**real, **pickled}
    server.repos["tiny/single"] = {"v1-5-pruned.ckpt": b"x", "v1-5.safetensors": b"x", "README.md": b""}
    server.repos["tiny/vae"] = {"config.json": folder / "vae" / "config.json",
                                "diffusion_pytorch_model.safetensors": weights[COMPONENTS[2]],
                                "diffusion_pytorch_model.bin": b"never fetched"}  # fmt: skip
    vocabulary = {name: folder / "tokenizer" / name for name in ("vocab.json", "merges.txt")}
    server.repos["openai/clip-vit-large-patch14"] = {**vocabulary, "config.json": b"{}", "model.safetensors": b"large"}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def load(hub, home):
    """Ask the child process to load a base: the answer, as a dict."""
    with open(home / "worker.log", "w", encoding="utf-8") as log:
        child = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                 text=True, env=environment(hub.url, home), cwd=home, encoding="utf-8")  # fmt: skip

    def ask(base):
        child.stdin.write(json.dumps(str(base)) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        pytest.fail((home / "worker.log").read_text(encoding="utf-8"))

    yield ask
    child.kill()
    child.communicate()


def complete(answer: dict, tiny: Path) -> None:
    """The files of the answer are the three components, byte for byte."""
    assert "error" not in answer, answer
    assert len(answer["files"]) == 3
    for file in map(Path, answer["files"]):
        assert file.read_bytes() == (tiny / "folder" / file.parent.name / file.name).read_bytes()


def test_only_what_is_needed_is_fetched(hub, load, tiny):
    """Weights as safetensors, configs and tokenizer: no pickle, no second copy of the weights, no safety checker."""
    complete(load("tiny/plain"), tiny)
    fetched = hub.fetched("tiny/plain")
    assert set(COMPONENTS) <= fetched
    assert {"model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"} <= fetched
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= fetched
    assert not fetched & set(DECOYS)


def test_a_cached_model_needs_no_network(hub, load, tiny):
    """The second load asks the hub for nothing at all."""
    before = len(hub.requests)
    complete(load("tiny/plain"), tiny)
    assert hub.requests[before:] == []


def test_a_dropped_connection_is_resumed(hub, load, tiny):
    """The line closes nine tenths through the largest file: the download goes on from there by a range request (the hub
    library keeps what it has in pieces of 10 MB; the file has 12)."""
    path = f"/tiny/dropped/resolve/{SHA}/{COMPONENTS[0]}"
    assert (tiny / "folder" / COMPONENTS[0]).stat().st_size > 12e6
    hub.trouble[path] = "close"
    complete(load("tiny/dropped"), tiny)
    ranges = [asked for method, asked_path, asked in hub.requests if method == "GET" and asked_path == path]
    assert ranges[0] is None
    assert re.fullmatch(r"bytes=\d+-", ranges[1])
    assert int(ranges[1][6:-1]) > 0


def test_a_failed_download_is_one_line_and_goes_on(hub, load, tiny):
    """A reset that the hub library does not survive: one line that says what to do; the next call fetches what
    lacks."""
    path = f"/tiny/reset/resolve/{SHA}/{COMPONENTS[1]}"
    hub.trouble[path] = "reset"
    answer = load("tiny/reset")
    if "error" in answer:  # later versions of the library may retry this too
        assert "\n" not in answer["error"]
        assert answer["error"].startswith("tiny/reset could not be fetched from the hub (")
        assert answer["error"].endswith("); give a folder or a .safetensors file with --base")
        before = len(hub.requests)
        answer = load("tiny/reset")
        again = {asked for method, asked, _ in hub.requests[before:] if method == "GET" and "/resolve/" in asked}
        assert path in again
        assert not [asked for asked in again if asked.endswith("model_index.json")]  # that one was whole
    complete(answer, tiny)


def test_a_repository_with_fp16_files_only(hub, load, tiny):
    """Nothing but *.fp16.safetensors (and pickles): those are fetched and loaded, the second time from the cache."""
    for _ in (1, 2):
        before = len(hub.requests)
        answer = load("tiny/half")
        assert [Path(file).name.split(".")[1] for file in answer.get("files", [])] == ["fp16"] * 3, answer
    assert hub.requests[before:] == []
    assert not [name for name in hub.fetched("tiny/half") if name.endswith(".bin")]


def test_a_sharded_repository(hub, load, tiny):
    """The U-Net in two shards with an index: both are fetched, not the fp16 variant beside them."""
    answer = load("tiny/sharded")
    assert len(answer.get("files", [])) == 4, answer
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in hub.fetched("tiny/sharded")
    before = len(hub.requests)
    assert load("tiny/sharded") == answer
    assert hub.requests[before:] == []


def test_repositories_that_cannot_be_used(hub, load):
    """Pickles alone, or single files alone: said, with what to do, and nothing large is fetched."""
    error = load("tiny/pickled")["error"]
    assert error.startswith("tiny/pickled cannot be used from the hub: its ")
    assert "python -m lesion convert" in error
    assert (
        "it holds single files only (v1-5-pruned.ckpt, v1-5.safetensors): download one" in load("tiny/single")["error"]
    )
    assert hub.fetched("tiny/pickled") == hub.fetched("tiny/single") == set()


def test_a_vae_of_the_hub(hub, load, tiny):
    """--vae with a hub id: config and weights, not the pickle."""
    answer = load(f"{tiny / 'folder'}|tiny/vae")
    assert Path(answer["files"][1]).read_bytes() == (tiny / "folder" / COMPONENTS[2]).read_bytes()
    assert hub.fetched("tiny/vae") == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_an_unknown_id_is_one_line(load):
    """A misspelt id, and a path that only looks like one."""
    for base in ("tiny/misspelt", "models/that-i-deleted"):
        error = load(base)["error"]
        assert "\n" not in error
        assert error.startswith(f"{base} could not be fetched from the hub (")


def test_a_single_file_takes_the_hubs_vocabulary(hub, load, tiny):
    """Without --tokenizer: vocabulary and merges of openai/clip-vit-large-patch14, and not its weights."""
    answer = load(tiny / "single.safetensors")
    assert answer["files"] == [str(tiny / "single.safetensors")]
    assert "clip-vit-large-patch14" in answer["tokenizer"]
    assert hub.fetched("openai/clip-vit-large-patch14") == {"vocab.json", "merges.txt"}


def test_an_unreachable_hub(hub, load, home, tiny, tmp_path):
    """With the hub gone a cached model still loads (the same process, and its cache from a new one); another id ends
    the command with exit code 2 and one line that says what to do."""
    hub.shutdown()
    hub.server_close()
    complete(load("tiny/plain"), tiny)
    assert load(tiny / "single.safetensors")["files"]
    command = [
        sys.executable,
        str(ROOT / "generate.py"),
        "--base",
        "tiny/late",
        "--prompt",
        "x",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command, env=environment(hub.url, home), capture_output=True, text=True, timeout=300, cwd=tmp_path, encoding="utf-8"
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("generate.py: tiny/late could not be fetched from the hub (")
    assert last.endswith("give a folder or a .safetensors file with --base")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

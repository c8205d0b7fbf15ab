"""Text is UTF-8 whatever the locale: no file of the repository opens text without saying so."""
import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = [path for place in ("lesion", "tests", ".ci") for path in sorted((ROOT / place).rglob("*.py"))] + sorted(ROOT.glob("*.py"))


def bare(tree: ast.AST) -> list[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    return sorted(node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_bare(node))


def _is_bare(call):
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named or None in named:
        return False
    owner = getattr(getattr(call.func, "value", None), "id", None)
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if name == "TextIOWrapper":
        return len(call.args) < 2
    if name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & named.keys():
        return True
    if name in ("NamedTemporaryFile", "TemporaryFile", "fdopen", "open") and owner not in ("Image", "os" if name == "open" else ""):
        first = 0 if name.endswith("TemporaryFile") or (owner and owner not in ("io", "os", "codecs", "gzip")) else 1
        mode = named.get("mode", call.args[first] if len(call.args) > first else None)
        if mode is None:
            return isinstance(call.func, ast.Name) or name == "fdopen"  # a bare open(path); others' default is not text
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwax+t")
    return False


@pytest.mark.parametrize("line", [
    "open(p)", "open(p, 'w')", "open(p, mode='a')", "p.read_text()", "p.write_text(x)", "(a / b).read_text()", "p.open('w')",
    "io.TextIOWrapper(f)", "subprocess.run(c, text=True)", "subprocess.Popen(c, "
                                                           "universal_newlines=True)", "os.fdopen(d, 'w')",
    "tempfile.NamedTemporaryFile('w')", "open(p, newline='')"])
def test_the_search_finds_every_bare_call(line):
    """Otherwise the search below would prove nothing."""
    assert bare(ast.parse(line)) == [1]


@pytest.mark.parametrize("line", [
    "open(p, 'rb')", "open(p, encoding='utf-8')", "p.read_text(encoding='utf-8')", "p.write_text(x, "
                                                                                   "encoding='utf-8')", "Image.open(p)",
    "os.open(p, flags)", "archive.open(member)", "tempfile.NamedTemporaryFile()", "subprocess.run(c, "
                                                                                  "encoding='utf-8')", "p.open('rb')"])
def test_the_search_passes_what_says_its_encoding(line):
    """Bytes, and text that names its encoding, are no hits."""
    assert bare(ast.parse(line)) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_names_its_encoding(path):
    """A file written here reads the same on a machine whose locale is not UTF-8."""
    lines = bare(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, f"{path}: lines {lines} read or write text without encoding"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
SEEN = """
import sys, json
from pathlib import Path
from lesion.run import cli
from lesion.tiles import seen
folder = Path(sys.argv[1])
rows = [{"file_name": "x.png", "lora_sha256": "ab"}]
held = [{"file_name": "t.jpg", "patient_id": "M\u00fcller"}]
cli.run(lambda: print(seen.check_synthetic(folder, rows, seen.Parts([], [], held, False))), "check")
"""


def test_a_patient_named_in_utf8_is_found_under_another_locale(tmp_path, run_script):
    """The leak check of patient "Müller" refuses the same under an ASCII locale, and its message can be printed
    there."""
    (tmp_path / "check.py").write_text(SEEN, encoding="utf-8")
    lora = {"file": "ü.safetensors", "sha256": "ab", "train_files": [{"file_name": "a.jpg", "patient_id": "Müller"}]}
    (tmp_path / "provenance.json").write_text(json.dumps({"loras": [lora]}, ensure_ascii=False), encoding="utf-8")
    for locale in ({"LC_ALL": "C.UTF-8"}, ASCII):
        done = run_script(str(tmp_path / "check.py"), tmp_path, env=locale)
        assert done.returncode == 2, done.stderr
        assert "safetensors" in done.stderr
        assert "was trained on 1 held-out tiles or their patients (first: t.jpg)" in done.stderr

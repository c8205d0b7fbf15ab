"""The tokenizer's files against each other and against the embedding: wrong ids are never drawn from."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesion.run import folders
from lesion.sd import checkpoint
from lesion.sd.clip import Tokenizer
from lesion.sd.vocabulary import check_vocabulary

TEXT = "text_encoder/model.safetensors"
PROMPTS = ["a clinical photograph of a <lesion>, 6 to 9 mm across", "", "naïve µm² 🙂"]


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny / "folder", tmp_path / "folder", copy_function=lambda a, b: os.link(a, b))


@pytest.fixture
def vocabulary(tmp_path):
    """The built-in model's small vocabulary, 668 tokens, to spoil."""
    return shutil.copytree(folders.MINI / "tokenizer", tmp_path / "tokenizer")


def saved_by_transformers(folder, *tokens):
    """The folder's tokenizer as today's transformers writes it: tokenizer.json and no vocab.json."""
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(list(tokens))
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    return tokenizer


def resize(folder, rows):
    """Grow or cut the text encoder's embedding, config included."""
    tensors = load_file(folder / TEXT)
    key = "text_model.embeddings.token_embedding.weight"
    table = tensors[key]
    tensors[key] = torch.cat([table, torch.randn(max(0, rows - len(table)), table.shape[1])])[:rows].contiguous()
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8")) | {"vocab_size": rows}
    for file in (TEXT, "text_encoder/config.json"):
        (folder / file).unlink()
    save_file(tensors, folder / TEXT)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_tokenizer_json_alone(folder):
    """What transformers 5 saves is read, and gives the ids of vocab.json and merges.txt."""
    expected = Tokenizer(folder / "tokenizer")(PROMPTS)[0]
    saved_by_transformers(folder)
    assert not (folder / "tokenizer" / "vocab.json").exists()
    assert torch.equal(checkpoint.load(folder).tokenizer(PROMPTS)[0], expected)


def test_an_added_token_with_its_row(folder):
    """Textual inversion: one token more and one row more is drawn with that row; either alone is refused with both
    numbers."""
    saved_by_transformers(folder, "<lesion>")
    with pytest.raises(
        ValueError, match="has 49409 tokens, 1 of them added to CLIP's, and the text encoder's embedding 49408 rows"
    ):
        checkpoint.load(folder)
    resize(folder, 49409)
    sd = checkpoint.load(folder)
    assert 49408 in sd.tokenizer(PROMPTS)[0][0]
    assert sd.text_encoder(sd.tokenizer(PROMPTS)[0]).isfinite().all()


@pytest.mark.parametrize("rows", [49407, 49409, 1000])
def test_another_embedding(folder, rows):
    """A tokenizer with fewer tokens than the embedding has rows draws from wrong ids in silence: refused, like the
    other way round."""
    resize(folder, rows)
    with pytest.raises(ValueError, match=f"has 49408 tokens, and the text encoder's embedding {rows} rows") as error:
        checkpoint.load(folder)
    assert "give the --tokenizer DIR that this text encoder was trained with" in str(error.value)


def test_another_models_vocabulary(folder):
    """--tokenizer of the built-in model for SD 1.5."""
    with pytest.raises(ValueError, match="has 668 tokens, and the text encoder's embedding 49408 rows"):
        checkpoint.load(folder, tokenizer=folders.MINI / "tokenizer")


def spoil(name, change):
    def apply(folder):
        file = folder / name
        file.write_bytes(change(file.read_bytes()) if callable(change) else change)
    return apply


def reorder(data):
    ids = json.loads(data)
    return json.dumps(dict(zip(ids, [*list(ids.values())[1:], 5]))).encode()


DAMAGES = {
    "empty merges": spoil("merges.txt", b""), "header alone": spoil("merges.txt", b"#version: 0.2\n"),
    "merges cut in the middle": spoil("merges.txt", lambda data: data[:len(data) // 2]),
    "last merge lost": spoil("merges.txt", lambda data: data.rstrip().rpartition(b"\n")[0]),
    "merges not UTF-8": spoil("merges.txt", b"\xff\xfe"), "vocabulary empty": spoil("vocab.json", b"{}"),
    "vocabulary a list": spoil("vocab.json", b"[]"), "vocabulary cut": spoil("vocab.json", lambda data: data[:-100]),
    "vocabulary nested": spoil("vocab.json", b"[" * 100_000), "an id twice": spoil("vocab.json", reorder),
    "ids as text": spoil("vocab.json", b'{"a": "0"}'), "ids nested": spoil("vocab.json", b'{"a": [0]}'),
    "no end of text": spoil("vocab.json", lambda data: data.replace(b"<|endoftext|>", b"<|other|>")),
    "config a list": spoil("tokenizer_config.json", b"[]"), "config nested": spoil("tokenizer_config.json", b'{"a":' * 100_000),
    "another padding": spoil("tokenizer_config.json", b'{"pad_token": "!"}'),
    "added tokens are numbers": spoil("added_tokens.json", b"[1]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_vocabularies(vocabulary, damage):
    """Each ends in one line that names the folder or file: no traceback, and no picture from half a vocabulary."""
    (vocabulary / "added_tokens.json").write_text("{}", encoding="utf-8")
    check_vocabulary(vocabulary, 668)
    DAMAGES[damage](vocabulary)
    with pytest.raises(ValueError, match="tokenizer") as error:
        check_vocabulary(vocabulary, 668)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{}", b'{"model": []}', b'{"model": {"vocab": {}, "merges": []}}', b'{"model": {"merges": 3}}',
                                     b'{"model": {"vocab": [], "merges": [[1, 2]]}}', b"null"])  # fmt: skip
def test_damaged_tokenizer_json(vocabulary, content):
    """tokenizer.json of something else, or of another vocabulary than vocab.json beside it."""
    (vocabulary / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer"):
        check_vocabulary(vocabulary, 668)


def test_two_vocabularies_in_one_folder(vocabulary, tiny):
    """tokenizer.json and vocab.json must be the same: which one is read depends on the version of transformers."""
    saved = shutil.copytree(tiny / "folder", vocabulary.parent / "other")
    saved_by_transformers(saved)
    shutil.copy(saved / "tokenizer" / "tokenizer.json", vocabulary)
    with pytest.raises(ValueError, match="hold different vocabularies"):
        check_vocabulary(vocabulary, 668)

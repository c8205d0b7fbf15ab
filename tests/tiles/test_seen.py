"""Which tiles a LoRA saw: what the records say is checked, patients are the same however written, nothing is half
believed."""
import json

import pytest

from lesion.run import files
from lesion.tiles import seen

DEEP = b"[" * 100_000 + b"]" * 100_000


def test_a_lora_remembers_what_its_start_saw(tmp_path):
    """The tiles of the run and of the LoRA it began with, each once; unknown where the start's are."""
    mine = [{"file_name": "a.jpg", "sha256": "1", "patient_id": "p"}]
    assert seen.files_seen(mine, None) == mine
    assert seen.files_seen(mine, tmp_path / "lora.safetensors") is None
    before = [{"file_name": "b.jpg", "sha256": "2", "patient_id": None}]
    files.write_bytes(tmp_path / "train_files.json", json.dumps([*before, *mine]).encode())
    assert seen.files_seen(mine, tmp_path / "lora.safetensors") == mine + before
    assert seen.files_of_lora(tmp_path / "checkpoints" / "step.safetensors") == before + mine


def test_train_files_of_rows(tmp_path):
    """Name, bytes' SHA-256 and patient of each row."""
    (tmp_path / "a.jpg").write_bytes(b"abc")
    assert seen.train_files(tmp_path, [{"file_name": "a.jpg", "patient_id": "p", "text": "x"}]) == [
        {"file_name": "a.jpg", "sha256": files.sha256_bytes(b"abc"), "patient_id": "p"}]


@pytest.mark.parametrize("data", [DEEP, b"[1]", b'[{"file_name": 3}]', b'["a.jpg"]', b"{}", b"\xff", b'[{"file_name": "a", "sha256": []}]'])
def test_what_a_lora_saw_is_checked(tmp_path, data):
    """train_files.json or provenance.json of other types is named as damaged or as not known, never half believed."""
    (tmp_path / "train_files.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"train_files.json is damaged"):
        seen.files_of_lora(tmp_path / "lora.safetensors")
    parts = seen.Parts([], [], [{"file_name": "t.jpg"}], False)
    (tmp_path / "provenance.json").write_bytes(b'{"loras": [{"sha256": "ab", "train_files": ' + data + b"}]}")
    with pytest.raises(ValueError, match=r"provenance.json"):
        seen.check_synthetic(tmp_path, [{"file_name": "x", "lora_sha256": "ab"}], parts)


def test_a_patient_is_the_same_as_number_and_as_text(tmp_path):
    """A LoRA that saw patient 7 (a number) is refused for a held-out tile of patient "7"; a missing one (nan) matches
    nobody."""
    lora = {"sha256": "ab", "train_files": [{"file_name": "a.jpg", "patient_id": 7}, {"file_name": "b.jpg", "patient_id": "nan"}]}
    (tmp_path / "provenance.json").write_text(json.dumps({"loras": [lora]}), encoding="utf-8")
    rows = [{"file_name": "x.png", "lora_sha256": "ab"}]
    with pytest.raises(ValueError, match="trained on 1 held-out tiles"):
        seen.check_synthetic(tmp_path, rows, seen.Parts([], [], [{"file_name": "t.jpg", "patient_id": "7"}], False))
    seen.check_synthetic(tmp_path, rows, seen.Parts([], [], [{"file_name": "t.jpg", "patient_id": None}], False))


def test_the_lora_that_saw_most_is_recorded(tmp_path):
    """Of two LoRAs the second saw two of the tiles held back as validation: two are recorded, not the first one's none."""
    rows = [{"file_name": f"{i}.jpg", "sha256": f"{i:064x}", "patient_id": f"P{i}", "label": "malignant"} for i in range(6)]
    loras = [{"file": name, "sha256": name * 64, "train_files": some} for name, some in (("a", rows[:2]), ("b", rows[:4]))]
    files.write_json(tmp_path / "provenance.json", {"loras": loras})
    parts = seen.Parts(rows[:2], rows[2:4], rows[4:], True)
    record = seen.check_synthetic(tmp_path, [{"file_name": "x.png", "lora_sha256": ["a" * 64, "b" * 64]}], parts)
    assert record["held_back_seen"] == 2

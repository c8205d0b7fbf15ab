"""generate.py on a tiny checkpoint: one picture at any batch size, resumption to the byte, provenance, refusals."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lesion.lora import formats, layers
from lesion.run import drawn, files, sheets, sums
from lesion.sd import checkpoint

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("generate", ROOT / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

PROMPT = "a clinical photograph of a malignant skin lesion"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster on one thread, and nothing then depends on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer(tiny):
    """Reading the vocabulary costs more than drawing: it is read once."""
    once = checkpoint.Tokenizer(tiny / "folder" / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Tokenizer", lambda folder: once)
        yield once


@pytest.fixture(scope="module")
def base(tiny):
    return tiny / "folder"


@pytest.fixture(scope="module")
def networks(base):
    sd = checkpoint.load(base)
    return {"unet": sd.unet, "text_encoder": sd.text_encoder}


def random_lora(networks, seed: int, rank: int = 2, strength: float = 0.3) -> dict:
    """Factors for all attention layers of both networks, strong enough to show in the picture."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for name, network in networks.items():
        for path in layers.target_paths(network, "attention"):
            out, inside = network.get_submodule(path).weight.shape
            down, up = torch.randn(rank, inside, generator=g), torch.randn(out, rank, generator=g)
            factors[f"{name}.{path}"] = layers.Factors(strength * down, strength * up, 1.0)
    return factors


def spoil(path, at):
    """Flip one bit of a file's byte `at`."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def write_lora(path, factors, **metadata):
    formats.write(path, factors, {f"lesion_{key}": value for key, value in metadata.items()})
    return path


@pytest.fixture(scope="module")
def lora(networks, tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", random_lora(networks, 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared set whose training tiles have three texts, two of them structured; the test tile has another."""
    folder = tmp_path_factory.mktemp("data")
    texts = [
        "plain text",
        "a clinical photograph of a malignant skin lesion, under 3 mm across",
        "another text",
        "of the test",
    ]
    rows = [{"file_name": f"{i}.jpg", "text": text, "label": "malignant", "split": "test" if i == 3 else "train",
             "attributes": {"size": "under 3 mm", "skin_tone": "light"}} for i, text in enumerate(texts)]  # fmt: skip
    files.write_manifest(
        folder, [*rows, {"file_name": "b.jpg", "text": "benign text", "label": "benign", "split": "train"}]
    )
    return folder


def draw(base, out, *flags, count=3, steps=3):
    """Run generate.py in this process; the pictures as uint8 [count,64,64,3]."""
    prompt = [] if {"--prompts-from", "--prompt"} & set(flags) else ["--prompt", PROMPT]
    common = ["--base", base, "--out", out, "--resolution", 64, "--steps", steps, "--count", count]
    generate.main([str(argument) for argument in (*common, *prompt, *flags)])
    return sheets.open_images(sorted(out.glob("*-?????.png"))[:count])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_the_same_picture_at_any_batch_size(base, lora, tmp_path, sampler):
    """Each image has its own random numbers: one at a time or three together, the pixels agree to 1 of 255, and the
    three differ from each other by far more."""
    flags = ["--precision", "fp32", "--sampler", sampler, "--lora", lora] + (["--eta", 1] if sampler == "ddim" else [])
    together = draw(base, tmp_path / "3", "--batch-size", 3, *flags).astype(int)
    alone = draw(base, tmp_path / "1", "--batch-size", 1, *flags).astype(int)
    assert np.abs(together - alone).max() <= 1
    assert min(np.abs(together[i] - together[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 5
    assert {row["sampler"] for row in files.read_manifest(tmp_path / "3")} == {sampler}


def test_seeds(base, tmp_path):
    """Image i is that of seed SEED + i alone, whichever call draws it."""
    first = draw(base, tmp_path / "a", "--seed", 7, "--batch-size", 1)
    second = draw(base, tmp_path / "b", "--seed", 9, "--batch-size", 1, count=1)
    assert (first[2] == second[0]).all()
    assert [row["seed"] for row in files.read_manifest(tmp_path / "a")] == [7, 8, 9]


def test_settings_reach_the_picture(base, lora, tmp_path):
    """Guidance, negative prompt, steps, sampler, eta, prompt and LoRA each change what is drawn."""
    plain = draw(base, tmp_path / "plain", count=1)
    for number, flags in enumerate((["--guidance-scale", 1], ["--negative-prompt", "hair"], ["--sampler", "dpmpp"],
                                    ["--eta", 1], ["--lora", lora], ["--prompt", "x"])):  # fmt: skip
        other = draw(base, tmp_path / str(number), *flags, count=1)
        assert (other != plain).any(), flags
    assert (draw(base, tmp_path / "steps", count=1, steps=4) != plain).any()
    assert (draw(base, tmp_path / "again", count=1) == plain).all()


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_loras_with_weights(base, networks, tmp_path):
    """Two files with weights draw what one file of their weighted sum draws; weight 0 draws the base's picture."""
    one, two = random_lora(networks, 1), random_lora(networks, 2, rank=3)
    write_lora(tmp_path / "one.safetensors", one)
    write_lora(tmp_path / "two.safetensors", two)
    write_lora(tmp_path / "sum.safetensors", layers.combine([(one, 0.5), (two, -0.25)]))
    both = draw(
        base, tmp_path / "both", "--lora", f"{tmp_path}/one.safetensors:0.5", f"{tmp_path}/two.safetensors:-0.25"
    )
    summed = draw(base, tmp_path / "sum", "--lora", tmp_path / "sum.safetensors")
    single = draw(base, tmp_path / "single", "--lora", f"{tmp_path}/one.safetensors:0.5")
    nothing = draw(base, tmp_path / "nothing", "--lora", f"{tmp_path}/one.safetensors:0")
    plain = draw(base, tmp_path / "plain")
    assert np.abs(both.astype(int) - summed.astype(int)).max() <= 1
    assert (nothing == plain).all()
    assert np.abs(both.astype(int) - single.astype(int)).max() > 1
    row = files.read_manifest(tmp_path / "both")[0]
    assert row["lora_sha256"] == [files.sha256_file(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    used = json.loads((tmp_path / "both" / "provenance.json").read_text(encoding="utf-8"))["loras"]
    assert [entry["weight"] for entry in used] == [0.5, -0.25]


def test_a_lora_of_nothing_here_is_refused(base, networks, tmp_path):
    """A file with a key that matches no module ends in one line before the folder is made."""
    write_lora(
        tmp_path / "x.safetensors", {"unet.no.such.module": layers.Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    )
    with pytest.raises(ValueError, match="keys match no module of this model, first lora_unet_no_such_module"):
        draw(base, tmp_path / "out", "--lora", tmp_path / "x.safetensors")
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_a_prompt(base, tmp_path):
    """--prompt "" draws with the empty prompt: no data set is asked for, and the manifest says so."""
    generate.main([*map(str, ["--base", base, "--prompt", "", "--out", tmp_path / "a", "--count", 1, "--steps", 1, "--resolution", 64])])
    assert files.read_manifest(tmp_path / "a")[0]["prompt"] == ""
    one = json.loads((tmp_path / "a" / "provenance.json").read_text(encoding="utf-8"))["settings"]
    assert one["prompts_sha256"] == files.sha256_json([""])


@pytest.mark.parametrize("value", ["abc", "-64", "0", "100", "99999999999", "1e3", "", "nan"])
def test_a_loras_resolution_is_checked(base, networks, tmp_path, value):
    """`lesion_resolution` of a stranger's file passes the same check as --resolution: one line, no traceback, no huge picture."""
    known = {"resolution": value, "label": "malignant", "base_sha256": "ab" * 32}
    file = write_lora(tmp_path / "l.safetensors", random_lora(networks, 1), **known)
    with pytest.raises(ValueError, match="lesion_resolution that cannot be drawn") as error:
        draw(base, tmp_path / "out", "--lora", file, count=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_lora_alpha(base, networks, tmp_path, capsys):
    """--lora-alpha gives a file without alpha its strength: the picture is that of the file that says it; without the flag a note
    says scale 1."""
    factors = {name: layers.Factors(part.down, part.up, 6.0) for name, part in random_lora(networks, 1, strength=0.2).items()}
    write_lora(tmp_path / "said.safetensors", factors)
    tensors = {f"{name}.{role}": value for name, part in factors.items() for role, value in (
        ("lora_A.weight", part.down), ("lora_B.weight", part.up))}
    save_file(tensors, tmp_path / "silent.safetensors")
    said = draw(base, tmp_path / "a", "--lora", tmp_path / "said.safetensors", count=1)
    capsys.readouterr()
    silent = draw(base, tmp_path / "b", "--lora", tmp_path / "silent.safetensors", count=1)
    assert "note: " in (out := capsys.readouterr().out)
    assert "read at scale 1" in out
    given = draw(base, tmp_path / "c", "--lora", tmp_path / "silent.safetensors", "--lora-alpha", 6, count=1)
    assert (given == said).all()
    assert (silent != said).any()


def test_another_vae(base, tiny, tmp_path):
    """--vae of the same weights draws the same picture, of others another one; the base's hash follows."""
    plain = draw(base, tmp_path / "a", count=1)
    same = draw(base, tmp_path / "b", "--vae", base / "vae", count=1)
    shutil.copytree(base / "vae", tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({key: value * 0.9 for key, value in weights.items()}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    other = draw(base, tmp_path / "c", "--vae", tmp_path / "vae", count=1)
    assert (plain == same).all()
    assert (plain != other).any()
    hashes = [files.read_manifest(tmp_path / name)[0]["base_sha256"] for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_lora_in_two_parts(base, networks, tmp_path):
    """A folder with unet/ and text_encoder/ adapters draws what one file with both draws; its hash is of both files."""
    factors = random_lora(networks, 1)
    write_lora(tmp_path / "one.safetensors", factors)
    for part in networks:
        (tmp_path / "two" / part).mkdir(parents=True)
        write_lora(tmp_path / "two" / part / "adapter_model.safetensors", {
            name: value for name, value in factors.items() if name.startswith(part)})
    one = draw(base, tmp_path / "a", "--lora", tmp_path / "one.safetensors", count=1)
    two = draw(base, tmp_path / "b", "--lora", tmp_path / "two", count=1)
    assert (one == two).all()
    used = json.loads((tmp_path / "b" / "provenance.json").read_text(encoding="utf-8"))["loras"][0]
    assert used["file"] == str(tmp_path / "two")
    hashes = [files.sha256_file(path) for path in formats.files(tmp_path / "two")]
    assert used["sha256"] == files.sha256_bytes("".join(hashes).encode())


def test_resolution_and_base_warnings(base, networks, tmp_path, capsys):
    """Other than the LoRA's training resolution or base: a warning. The resolution defaults to the LoRA's."""
    known = {"resolution": "128", "label": "melanoma", "base_sha256": "ab" * 32}
    file = write_lora(tmp_path / "l.safetensors", random_lora(networks, 1), **known)
    draw(base, tmp_path / "a", "--lora", file, count=1)
    out = capsys.readouterr().out
    assert "warning: the LoRA was trained at 128 px, drawing at 64 px" in out
    assert "warning: the LoRA was trained on another base model" in out
    generate.main(
        [
            *map(
                str,
                ["--base", base, "--lora", file, "--out", tmp_path / "b", "--steps", 1, "--count", 1, "--prompt", "x"],
            )
        ]
    )
    assert "warning: the LoRA was trained at" not in capsys.readouterr().out
    row = files.read_manifest(tmp_path / "b")[0]
    assert (row["resolution"], row["label"], row["file_name"]) == (128, "melanoma", "melanoma-00000.png")


@pytest.mark.parametrize("label", ["../../evil", "a/b", "", ".hidden", "x\ny"])
def test_a_strangers_label_cannot_leave_the_folder(base, networks, tmp_path, label):
    """The label in a downloaded LoRA names the PNG files: it must not lead elsewhere."""
    known = {"resolution": "64", "label": label, "base_sha256": "ab" * 32}
    file = write_lora(tmp_path / "l.safetensors", random_lora(networks, 1), **known)
    with pytest.raises(ValueError, match="cannot name files"):
        draw(base, tmp_path / "out" / "deep", "--lora", file, count=1)
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]


# --- what is written -------------------------------------------------------------------------------------------------


def test_provenance(base, lora, data, tmp_path):
    """Every row says how to draw its picture again; the PNG carries the same row and the usual parameters line."""
    draw(base, tmp_path / "out", "--prompts-from", data, "--lora", lora, "--negative-prompt", "hair", "--seed", 5)
    rows = files.read_manifest(tmp_path / "out")
    hashes = "".join(files.sha256_file(base / name) for name in ("unet/diffusion_pytorch_model.safetensors",
                     "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"))  # fmt: skip
    for i, row in enumerate(rows):
        expected = {"file_name": f"malignant-{i:05d}.png", "label": "malignant", "seed": 5 + i, "source": "synthetic"}
        expected |= {"sampler": "ddim", "steps": 3, "guidance_scale": 7.5, "eta": 0.0, "negative_prompt": "hair"}
        expected |= {"resolution": 64, "lora_sha256": files.sha256_file(lora)}
        expected |= {"base_sha256": files.sha256_bytes(hashes.encode())}
        assert expected.items() <= row.items()
        assert row["text"] == row["prompt"]
        assert row["attributes"] == ({"size": "under 3 mm"} if "3 mm" in row["prompt"] else {})
        with Image.open(tmp_path / "out" / row["file_name"]) as image:
            digest = files.sha256_file(tmp_path / "out" / row["file_name"])
            assert json.loads(image.text["lesion"]) | {"sha256": digest} == row
            line = image.text["parameters"].splitlines()
        assert line[:2] == [f"{row['prompt']} <lora:{lora.stem}:1>", "Negative prompt: hair"]
        assert line[2].startswith(f"Steps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: {5 + i}, Size: 64x64, Model hash: ")
    assert {row["prompt"] for row in rows} <= {"plain text", "another text", f"{PROMPT}, under 3 mm across"}
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * 70 + 6, 76)


def parsed_by_a1111(text):
    """A1111's own rules (modules/infotext_utils.py): the last line holds the pairs if there are three, a quoted value is JSON; what
    comes before is the prompt up to a line that begins with "Negative prompt:"."""
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    assert len(pair.findall(last)) >= 3
    prompt, negative, at_negative = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            at_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if at_negative else prompt).append(line)
    values = {name: json.loads(value) if value[:1] == value[-1:] == '"' else value for name, value in pair.findall(last)}
    return "\n".join(prompt), "\n".join(negative), values


def test_parameters_are_read_by_a1111s_rules():
    """Sampler names, LoRA tags with their weights, hashes in quotes, an empty negative prompt left out, a negative seed's size."""
    row = {"prompt": "a lesion, dark: very", "negative_prompt": "", "sampler": "dpmpp", "steps": 20, "guidance_scale": 7.5, "seed": 3,
           "resolution": 128, "base_sha256": "0123456789abcdef", "eta": 0.0}
    prompt, negative, values = parsed_by_a1111(drawn.as_parameters(row, [("malignant-phase2", 0.8, "abcdef012345"), ("b", 1.0, "")]))
    assert (prompt, negative) == ("a lesion, dark: very <lora:malignant-phase2:0.8> <lora:b:1>", "")
    assert values == {"Steps": "20", "Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "3", "Size": "128x128",
                      "Model hash": "0123456789", "Lora hashes": "malignant-phase2: abcdef012345"}
    row |= {"negative_prompt": "hair, ruler", "sampler": "ddim", "eta": 0.5}
    prompt, negative, values = parsed_by_a1111(drawn.as_parameters(row))
    assert (prompt, negative, values["Sampler"], values["Eta"]) == ("a lesion, dark: very", "hair, ruler", "DDIM", "0.5")


def test_without_a_lora(base, tmp_path):
    """The base alone: lora_sha256 is null."""
    draw(base, tmp_path / "out", count=1)
    assert files.read_manifest(tmp_path / "out")[0]["lora_sha256"] is None


def test_prompts_do_not_depend_on_the_count(base, data, tmp_path):
    """A call can be extended: the first prompts stay, whatever way they are drawn."""
    for way in ("texts", "attributes", "balanced"):
        few, many = (
            generate.parse(["--prompts-from", str(data), "--label", "malignant", "--count", str(count), "--draw", way])
            for count in (5, 40)
        )
        assert generate.choose_prompts(few) == generate.choose_prompts(many)[:5]


def test_gif(base, lora, tmp_path):
    """--gif shows every step of the first images up to 25 frames and then some of them, the last being the result."""
    result = draw(base, tmp_path / "out", "--gif", "--lora", lora, count=2, steps=4)
    with Image.open(tmp_path / "out" / "denoising.gif") as gif:
        assert gif.n_frames == 4
        assert gif.size == (2 * 70 + 6, 76)
        gif.seek(3)
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(last[6:70, 6:70] - result[0]).mean() < 12  # 256 colours


# --- going on --------------------------------------------------------------------------------------------------------


def test_an_interrupted_call_goes_on(base, lora, data, tmp_path):
    """Killed after two of five images, with a torn manifest line: the second call draws the rest, and every byte of the
    folder is that of an uninterrupted call. Finished batches are not drawn again."""
    flags = ["--prompts-from", data, "--lora", lora, "--batch-size", 2]
    draw(base, tmp_path / "whole", *flags, count=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = tmp_path / "cut"
    for i in (2, 4):
        (cut / f"malignant-{i:05d}.png").unlink()
    (cut / "grid.png").unlink()
    manifest = cut / "metadata.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:3])[:-30])
    (cut / ".malignant-00002.png.x.tmp").write_bytes(b"half")
    kept = (cut / "malignant-00000.png").stat().st_mtime_ns
    draw(base, cut, *flags, count=5)
    (cut / ".malignant-00002.png.x.tmp").unlink()
    assert contents(cut) == contents(tmp_path / "whole")
    assert (cut / "malignant-00000.png").stat().st_mtime_ns == kept


def test_a_row_of_no_picture_is_taken_out(base, lora, data, tmp_path, capsys):
    """One bit of a name flipped: the row that names no picture goes, its picture is drawn again; a longer call's rows stay."""
    flags = ["--prompts-from", data, "--lora", lora, "--batch-size", 2]
    draw(base, tmp_path / "whole", *flags, count=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "spoilt")
    manifest = tmp_path / "spoilt" / "metadata.jsonl"
    manifest.write_bytes(manifest.read_bytes().replace(b"malignant-00001.png", b"mamignant-00001.png"))
    draw(base, tmp_path / "spoilt", *flags, count=2)
    assert "mamignant-00001.png is missing: taken out" in capsys.readouterr().out
    assert [row["file_name"] for row in files.read_manifest(tmp_path / "spoilt")] == [f"malignant-{i:05d}.png" for i in range(4)]


def test_a_longer_calls_damaged_picture_is_taken_out(base, lora, data, tmp_path, capsys):
    """A shorter call does not vouch for it: the picture goes with its row, and the longer call draws it again, to the byte."""
    flags = ["--prompts-from", data, "--lora", lora, "--batch-size", 2]
    draw(base, tmp_path / "whole", *flags, count=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "spoilt")
    shutil.copy(tmp_path / "whole" / "malignant-00001.png", tmp_path / "spoilt" / "malignant-00003.png")
    draw(base, tmp_path / "spoilt", *flags, count=2)
    assert "malignant-00003.png is not the picture that was drawn" in capsys.readouterr().out
    assert len(files.read_manifest(tmp_path / "spoilt")) == 3
    assert not (tmp_path / "spoilt" / "malignant-00003.png").exists()
    draw(base, tmp_path / "spoilt", *flags, count=4)
    assert contents(tmp_path / "spoilt") == contents(tmp_path / "whole")


def test_a_changed_lora_is_refused(base, networks, data, tmp_path):
    """One bit of a run's LoRA, of its last or of one of its checkpoints/; and of the texts that prompts are drawn from."""
    run, texts = tmp_path / "run", tmp_path / "texts"
    for path in (run / "lora.safetensors", run / "checkpoints" / "lora-000001.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lora(path, random_lora(networks, 1))
    sums.write(run)
    for path in run.rglob("*.safetensors"):
        spoil(path, -2)
        with pytest.raises(ValueError, match=f"{path.name} is not what was written"):
            draw(base, tmp_path / "out", "--lora", path)
    shutil.copytree(data, texts)
    sums.write(texts)
    spoil(texts / "metadata.jsonl", (texts / "metadata.jsonl").read_bytes().index(b"lesion"))
    with pytest.raises(ValueError, match="metadata.jsonl is not what was written"):
        draw(base, tmp_path / "out", "--prompts-from", texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "another picture", "another row", "row without hash"])
def test_a_finished_picture_is_verified(base, lora, data, tmp_path, capsys, damage):
    """A cut or replaced picture, or a row that is not the one it was drawn from, is named and drawn again; every byte of the folder
    is that of an undisturbed call, and the batch that was whole is left alone."""
    flags = ["--prompts-from", data, "--lora", lora, "--batch-size", 2]
    draw(base, tmp_path / "whole", *flags, count=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "spoilt")
    picture, rows = tmp_path / "spoilt" / "malignant-00003.png", files.read_manifest(tmp_path / "spoilt")
    if damage == "cut":
        picture.write_bytes(picture.read_bytes()[:-20])
    elif damage == "another picture":
        shutil.copy(tmp_path / "whole" / "malignant-00001.png", picture)
    elif damage == "another row":
        files.write_manifest(tmp_path / "spoilt", [*rows[:3], rows[3] | {"text": "something else"}])
    else:
        files.write_manifest(tmp_path / "spoilt", [*rows[:3], {key: rows[3][key] for key in rows[3] if key != "sha256"}])
    kept = (tmp_path / "spoilt" / "malignant-00000.png").stat().st_mtime_ns
    capsys.readouterr()
    draw(base, tmp_path / "spoilt", *flags, count=4)
    assert f"{picture} " in capsys.readouterr().out
    assert contents(tmp_path / "spoilt") == contents(tmp_path / "whole")
    assert (tmp_path / "spoilt" / "malignant-00000.png").stat().st_mtime_ns == kept


def test_killed_while_it_draws(base, tmp_path, monkeypatch):
    """Death in the second batch leaves whole PNGs with their rows, and the next call ends as if nothing had been."""
    whole = tmp_path / "whole"
    draw(base, whole, "--batch-size", 1)
    real, calls = sheets.save_png, []

    def dies(path, *rest):
        calls.append(path)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        real(path, *rest)

    monkeypatch.setattr(sheets, "save_png", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        draw(base, tmp_path / "cut", "--batch-size", 1)
    assert [row["file_name"] for row in files.read_manifest(tmp_path / "cut")] == ["malignant-00000.png"]
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.png")) == ["malignant-00000.png"]
    monkeypatch.setattr(sheets, "save_png", real)
    draw(base, tmp_path / "cut", "--batch-size", 1)
    assert contents(tmp_path / "cut") == contents(whole)


def test_a_longer_call_extends_a_shorter_one(base, tmp_path):
    """--count 2, then 4: the four of a fresh call; then 1 changes nothing but the sheet."""
    draw(base, tmp_path / "a", "--batch-size", 2, count=2)
    draw(base, tmp_path / "a", "--batch-size", 2, count=4)
    draw(base, tmp_path / "b", "--batch-size", 2, count=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    draw(base, tmp_path / "a", "--batch-size", 2, count=1)
    assert len(files.read_manifest(tmp_path / "a")) == 4


def test_folders_of_others_are_refused(base, lora, tmp_path):
    """Other settings, another LoRA or a foreign folder: named, and not a file is touched."""
    draw(base, tmp_path / "a", count=1)
    before = contents(tmp_path / "a")
    others = {
        "first_seed": ["--seed", 1],
        "guidance_scale, eta": ["--guidance-scale", 2, "--eta", 1],
        "loras": ["--lora", lora],
        "prompt, prompts_sha256": ["--prompt", "x"],
        "batch_size": ["--batch-size", 1],
    }
    for says, flags in others.items():
        with pytest.raises(ValueError, match=f"holds the images of another call \\(other {says}"):
            draw(base, tmp_path / "a", *flags, count=1)
    assert contents(tmp_path / "a") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="not a folder of generate.py"):
        draw(base, tmp_path / "mine", count=1)
    assert list(contents(tmp_path / "mine")) == ["thesis.tex"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".provenance.json.x.tmp").touch()  # a kill while the folder was being made
    draw(base, tmp_path / "new", count=1)


# --- refusals and warnings -------------------------------------------------------------------------------------------


def test_a_long_prompt_says_what_is_cut(base, tmp_path, capfd, caplog):
    """Over 75 tokens: the picture is that of the first 75, and the end that is lost is printed, once and by us."""
    long = "mole " * 75
    cut = draw(base, tmp_path / "a", "--prompt", long + "with a very special end", count=1)
    out, err = capfd.readouterr()
    assert (
        "warning: a prompt is longer than 75 tokens; the model does not see its end: 'with a very special end'" in out
    )
    assert "sequence length" not in err + caplog.text  # the tokenizer's own warning speaks of errors to come
    assert (draw(base, tmp_path / "b", "--prompt", long, count=1) == cut).all()


def test_nan_is_never_drawn(base, networks, tmp_path, monkeypatch):
    """A U-Net that overflows gives an error that names the seeds, not a black picture."""
    real = checkpoint.load

    def poisoned(*arguments, **more):
        sd = real(*arguments, **more)
        sd.unet.conv_out.bias.data = torch.full_like(sd.unet.conv_out.bias, torch.nan)
        return sd

    monkeypatch.setattr(checkpoint, "load", poisoned)
    with pytest.raises(ValueError, match=r"images of seeds \[4, 5\] end in NaN"):
        draw(base, tmp_path / "out", "--seed", 4, count=2)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(("flags", "says"), [
    (["--prompts-from", "{data}", "--label", "melanoma"], "no training tile labelled 'melanoma' to take prompts from"),
    (["--prompts-from", "{data}/none"], "is not a prepared data set"), (["--lora", "none.safetensors"], "not found"),
    (["--device", "cuda:0"], "no CUDA device")])  # fmt: skip
def test_bad_input(base, data, tmp_path, flags, says):
    """Inputs that are not there end in a ValueError of one line, before the folder is made."""
    if "--device" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match=says) as error:
        draw(base, tmp_path / "out", *(str(flag).format(data=data) for flag in flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tiles_without_text(base, tmp_path):
    """A data set that has not been described yet is told what to run."""
    files.write_manifest(tmp_path / "data", [{"file_name": "a.jpg", "label": "malignant", "text": ""}])
    with pytest.raises(ValueError, match="1 tiles have no text, first a.jpg; run python -m lesion"):
        draw(base, tmp_path / "out", "--prompts-from", tmp_path / "data")


BAD_FLAGS = """--steps 0|--steps 1001|--eta 1.5|--guidance-scale inf|--seed -1|--seed 4294967296|--lora x:nan|
--resolution 100|--prompt a --prompts-from b|--draw balanced|--sampler euler|--sampler dpmpp --eta 1|--lora-alpha x"""


@pytest.mark.parametrize("flags", [flags.split() for flags in BAD_FLAGS.split("|")], ids=" ".join)
def test_bad_flags(flags, capsys):
    """One line and exit code 2."""
    with pytest.raises(SystemExit) as error:
        generate.parse(flags)
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_to_draw_from(tmp_path, monkeypatch):
    """Without runs, without a base or without a prompt: what to give."""
    monkeypatch.chdir(tmp_path)
    missing = {
        "no finished run in runs/": [],
        "give --prompt TEXT or --prompts-from DATA": ["--base", "x"],
        "which base model": ["--lora", "x.safetensors"],
    }
    for says, flags in missing.items():
        with pytest.raises(ValueError, match=says):
            generate.main(flags)


def test_the_newest_run_is_the_default(base, lora, data, tmp_path, monkeypatch, capsys):
    """`python generate.py` takes LoRA, base, prompts and class from the newest run of train_lora.py, and says so."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "malignant-phase2"
    run.mkdir(parents=True)
    shutil.copy(lora, run / "lora.safetensors")
    files.write_json(run / "args.json", {"base": str(base), "data": str(data), "label": "malignant", "tokenizer": None})
    files.write_bytes(run / "train_files.json", b'[{"file_name": "0.jpg", "sha256": "00", "patient_id": null}]')
    generate.main(["--steps", "1", "--count", "1", "--resolution", "64"])
    assert f"base {base}, LoRA {run / 'lora.safetensors'}" in capsys.readouterr().out
    out = Path("samples") / "malignant-phase2"
    assert (out / "malignant-00000.png").is_file()
    used = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["loras"][0]
    assert used["train_files"] == [{"file_name": "0.jpg", "sha256": "00", "patient_id": None}]  # for the leak check


@pytest.mark.parametrize(("name", "content"), [("args.json", {"base": 3}), ("args.json", {"base": "x", "tokenizer": []}),
                                               ("provenance.json", {}), ("provenance.json", {"settings": 3}),
                                               ("metadata.jsonl", {"no": "file_name"})])  # fmt: skip
def test_damaged_files_of_our_own(base, lora, tmp_path, name, content):
    """A run's args.json, a folder's provenance or manifest with entries of other types: one line, no traceback."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(lora, run / "lora.safetensors")
    flags = [str(flag) for flag in ("--lora", run / "lora.safetensors", "--prompt", "x", "--out", tmp_path / "out", "--count", 1)]
    files.write_json(run / "args.json", {"base": str(base)})
    generate.main([*flags, "--steps", "1", "--resolution", "64"])
    ((run if name == "args.json" else tmp_path / "out") / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged|another call") as error:
        generate.main([*flags, "--steps", "1", "--resolution", "64"])
    assert "\n" not in str(error.value)


def test_as_a_command(tiny, shared, tmp_path, run_script):
    """The real command on a single-file base: exit code 0 and the pictures; a pickle: exit code 2, one line."""
    flags = ["--prompt", PROMPT, "--steps", 1, "--count", 1, "--resolution", 64, "--out", tmp_path / "out"]
    tokenizer = ["--tokenizer", shared / "clip_tokenizer"]
    done = run_script("generate.py", "--base", tiny / "single.safetensors", *tokenizer, *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "malignant-00000.png").is_file()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    done = run_script("generate.py", "--base", tmp_path / "model.ckpt", *tokenizer, *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("generate.py: ")
    assert "is a pickle" in done.stderr


def test_draws_by_attributes(data):
    """--draw balanced asks for all six skin tones equally often, --draw attributes for the rows' own; another seed, another order."""
    def chosen(way, seed=0, count=12):
        return generate.choose_prompts(generate.parse([
            "--prompts-from", str(data), "--label", "malignant", "--count", str(count), "--draw", way, "--seed", str(seed)]))
    tones = [generate.attributes_of(prompt)["skin_tone"] for prompt in chosen("balanced")]
    assert len(set(tones)) == 6
    assert {tones.count(tone) for tone in tones} == {2}
    assert {generate.attributes_of(prompt)["skin_tone"] for prompt in chosen("attributes")} == {"light"}
    assert chosen("balanced", 0) != chosen("balanced", 1)


@pytest.mark.parametrize("flag", [["--precision", "bf16"], ["--plain"]])
def test_another_arithmetic_is_another_call(base, tmp_path, flag):
    """Pictures of two precisions, or of two ways to compute, are not mixed in one folder."""
    draw(base, tmp_path / "a", "--precision", "fp32", count=1)
    with pytest.raises(ValueError, match="holds the images of another call"):
        draw(base, tmp_path / "a", *(["--precision", "fp32"] if flag == ["--plain"] else []), *flag, count=1)


def test_each_loras_own_record(base, networks, data, tmp_path):
    """Two LoRAs: what each has seen stands beside it; size and class are the last one's; every hash is in the PNG."""
    for number, name in enumerate(("one", "two")):
        write_lora(tmp_path / name / "lora.safetensors", random_lora(networks, number), resolution=str(64 + 64 * number), label=name,
                   base_sha256="00")
        files.write_json(tmp_path / name / "train_files.json", [{"file_name": f"{name}.jpg", "sha256": "00", "patient_id": None}])
    generate.main([*map(str, ["--base", base, "--lora", tmp_path / "one/lora.safetensors", tmp_path / "two/lora.safetensors:0.5",
                             "--prompt", "x",
                              "--out", tmp_path / "out", "--count", 1, "--steps", 1])])
    used = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))["loras"]
    assert [entry["train_files"][0]["file_name"] for entry in used] == ["one.jpg", "two.jpg"]
    (row,) = files.read_manifest(tmp_path / "out")
    assert (row["resolution"], row["label"]) == (128, "two")
    with Image.open(tmp_path / "out" / row["file_name"]) as image:
        _, _, values = parsed_by_a1111(image.text["parameters"])
    assert values["Lora hashes"].count(": ") == 2
    assert values["Model hash"] == row["base_sha256"][:10]


def test_gif_is_of_the_first_images(base, tmp_path):
    """Of six images the GIF ends with the first four."""
    result = draw(base, tmp_path / "out", "--gif", count=6, steps=2)
    with Image.open(tmp_path / "out" / "denoising.gif") as gif:
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("RGB")).astype(int)
    for place in range(4):
        assert np.abs(last[6:70, 6 + 70 * place:70 + 70 * place] - result[place]).mean() < 12

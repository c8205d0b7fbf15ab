"""lesion.load: pictures from Python are generate.py's pictures; LoRAs add up and can be weighted."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import lesion
from lesion.lora import formats, layers
from lesion.run import folders

PROMPT = "a clinical photograph of a malignant skin lesion"


def random_lora(path, seed):
    """A LoRA file for `mini` that changes the picture plainly."""
    sd = lesion.load()
    g, factors = torch.Generator().manual_seed(seed), {}
    layers.inject(sd.sd.unet, layers.target_paths(sd.sd.unet, "attention"), 2, 2.0, g)
    for name, part in layers.get_factors(sd.sd.unet).items():
        factors[f"unet.{name}"] = layers.Factors(part.down, torch.randn(part.up.shape, generator=g) * 0.2, 2.0)
    formats.write(path, factors, formats.kohya_metadata(2, 2.0))
    return path


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_five_lines_give_generate_pys_pictures(tmp_path, run_script):
    """The documented use, from another folder: PIL pictures, byte for byte those of generate.py with the same LoRA and seeds."""
    lora = random_lora(tmp_path / "a.safetensors", 0)
    done = run_script("generate.py", "--base", folders.MINI, "--lora", lora, "--prompt", PROMPT, "--count", 2, "--steps", 3, "--seed", 5,
                      "--out", tmp_path / "out", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = ("import sys, lesion; sd = lesion.load(); sd.add_lora(sys.argv[1])\n"
            f"images = sd.draw([{PROMPT!r}] * 2, seeds=[5, 6], steps=3)\n"
            "[image.save(f'{i}.png') for i, image in enumerate(images)]")
    env = {"PYTHONPATH": str(folders.ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(lora)], cwd=tmp_path, check=True, env=env)
    for i in range(2):
        theirs, ours = Image.open(tmp_path / "out" / f"malignant-{i:05d}.png"), Image.open(tmp_path / f"{i}.png")
        assert ours.mode == "RGB"
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_loras_add_up_and_come_off(tmp_path):
    """Two LoRAs differ from either; weight 0 changes nothing; a LoRA at weight 1 and at -1 cancel; the batch size
    does not matter."""
    one, two = (random_lora(tmp_path / f"{i}.safetensors", i) for i in (1, 2))
    plain = pixels(lesion.load().draw(PROMPT, [3], steps=2))
    single = pixels(lesion.load().add_lora(one).draw(PROMPT, [3], steps=2))
    both = pixels(lesion.load().add_lora(one).add_lora(two).draw(PROMPT, [3], steps=2))
    assert abs(single - plain).max() > 5
    assert abs(both - single).max() > 5
    assert np.array_equal(pixels(lesion.load().add_lora(one, 0.0).draw(PROMPT, [3], steps=2)), plain)
    assert abs(pixels(lesion.load().add_lora(one).add_lora(one, -1.0).draw(PROMPT, [3], steps=2)) - plain).max() <= 1
    three = lesion.load().draw([PROMPT] * 3, [3, 4, 5], steps=2, batch_size=2)
    assert abs(pixels(three[:1]) - plain).max() <= 1  # kernels for another batch size may round otherwise in the last bit


def test_layers_removed_are_the_layers_before(tmp_path):
    """After `remove` the network has its plain modules, names and bits again, and takes another LoRA."""
    sd = lesion.load().sd
    before = {key: value.clone() for key, value in sd.unet.state_dict().items()}
    layers.inject(sd.unet, layers.target_paths(sd.unet, "all"), 2, 2.0, torch.Generator().manual_seed(0))
    layers.merge(sd.unet)
    layers.remove(sd.unet)
    after = sd.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {type(module).__name__ for module in sd.unet.modules()}.isdisjoint({"LoRALinear", "LoRAConv2d"})


def test_bad_input_is_named():
    """Another number of seeds than prompts, an unknown sampler."""
    sd = lesion.load()
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sd.draw([PROMPT] * 2, [1])
    with pytest.raises(ValueError, match="no sampler 'euler'"):
        sd.draw(PROMPT, sampler="euler")


def test_every_setting_reaches_the_picture():
    """Negative prompt, guidance, sampler and fresh noise change the picture; what is the default does not."""
    sd = lesion.load()
    plain = pixels(sd.draw(PROMPT, [3], steps=3))
    drawn = [pixels(sd.draw(PROMPT, [3], steps=3, **more)) for more in (
        {"negative_prompt": "hair"}, {"guidance_scale": 5.0}, {"sampler": "ddpm"}, {"sampler": "dpmpp"}, {"eta": 1.0})]
    assert all((one != plain).any() for one in drawn)
    assert len({one.tobytes() for one in drawn}) == 5
    assert (pixels(sd.draw(PROMPT, [3], steps=3, guidance_scale=folders.recipe_for(sd.base)["guidance_scale"])) == plain).all()

"""What holds weights or says how they are used: LoRA files, checkpoints, tokenizers, recipes, saved states."""

import functools
import json
import shutil

import numpy as np
import torch
from fuzz import hostile
from fuzz.reader import Reader, as_file, each, only
from hypothesis import strategies as st
from safetensors.torch import save
from sd.test_configs import V1
from torch import nn

import generate
import train_lora
from lesion.lora import formats, layers
from lesion.run import devices, folders, state
from lesion.run.optim import optimizer_tensors
from lesion.sd import checkpoint, ldm_yaml, vocabulary, weights
from lesion.sd.clip import Tokenizer
from lesion.train import checkpoint as training


@functools.cache
def networks():
    sd = checkpoint._from_folder(folders.MINI, True)
    return {"unet": sd.unet, "text_encoder": sd.text_encoder}


MODULES = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
)
METADATA = formats.kohya_metadata(2, 2.0, seed=1, clip_skip="1") | {"lesion_step": "1"}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 2,
    "bias": "none",
    "use_dora": False,
    "use_rslora": True,
    "target_modules": ["to_q"],
    "rank_pattern": {"to_q": 2},
    "alpha_pattern": {"mid_block.*to_q": 1.0},
    "init_lora_weights": True,
    "fan_in_fan_out": False,
}


def adapters(name):
    """{kind: {role: shape}} of every kind of adapter for a module, rank 2, all as they should be."""
    out, inside, *kernel = networks()[name.split(".")[0]].get_submodule(name.split(".", 1)[1]).weight.shape
    ones, flat = [1] * len(kernel), inside * int(np.prod(kernel))
    loha = {f"hada_w{i}_a": [out, 2] for i in (1, 2)} | {f"hada_w{i}_b": [2, flat] for i in (1, 2)}
    found = {
        "lora": {"lora_down.weight": [2, inside, *kernel], "lora_up.weight": [out, 2, *ones]},
        "loha": loha,
        "lokr": {"lokr_w1": [4, 4], "lokr_w2": [out // 4, inside // 4, *kernel]},
        "lokr parts": {
            "lokr_w1_a": [4, 2],
            "lokr_w1_b": [2, 4],
            "lokr_w2_a": [out // 4, 2],
            "lokr_w2_b": [2, inside // 4],
        },
        "dora": {
            "lora_down.weight": [2, inside, *kernel],
            "lora_up.weight": [out, 2, *ones],
            "dora_scale": [out, 1, *ones],
        },
    }
    if kernel:
        found["cp"] = {
            "lora_down.weight": [2, inside, 1, 1],
            "lora_mid.weight": [2, 2, *kernel],
            "lora_up.weight": [out, 2, 1, 1],
        }
        found["loha cp"] = (
            {f"hada_w{i}_a": [2, out] for i in (1, 2)}
            | {f"hada_w{i}_b": [2, inside] for i in (1, 2)}
            | {f"hada_t{i}": [2, 2, *kernel] for i in (1, 2)}
        )
        found["lokr cp"] = {
            "lokr_w1": [1, 1],
            "lokr_w2_a": [2, out],
            "lokr_w2_b": [2, inside],
            "lokr_t2": [2, 2, *kernel],
        }
    return found


def of_module(name, roles):
    """{key: (type, shape)} of one adapter in kohya's spelling."""
    key = ("lora_te_" if name.startswith("text") else "lora_unet_") + name.split(".", 1)[1].replace(".", "_")
    return {f"{key}.{role}": ("F32", shape) for role, shape in roles.items()} | {f"{key}.alpha": ("F32", [])}


def lora_cases(kept):
    good = hostile.tensors_file(of_module(MODULES[0], adapters(MODULES[0])["lora"]), METADATA)
    odd = [
        hostile.edited_tensors(one, METADATA)
        for name in MODULES
        for one in (of_module(name, roles) for roles in adapters(name).values())
    ]
    return only("lora.safetensors", hostile.as_safetensors(good, *odd, *odd[:3]))


def lora(kept, place, case):
    factors, said = formats.read(place / "lora.safetensors", networks(), notes=[])
    for name, (down, up, alpha) in factors.items():
        assert down.isfinite().all()
        assert up.isfinite().all()
        assert np.isfinite(alpha), name
    each(lambda: "lesion_resolution" in said and generate.resolution_of(said))


def adapter_cases(kept):
    peft = hostile.tensors_file(
        {
            f"base_model.model.{MODULES[0].split('.', 1)[1]}.{role}.weight": ("F32", shape)
            for role, shape in zip(("lora_A", "lora_B"), adapters(MODULES[0])["lora"].values())
        }
    )
    inside = {
        f"{MODULES[0]}.{role}.weight": ("F32", shape)
        for role, shape in zip(("lora_A", "lora_B"), adapters(MODULES[0])["lora"].values())
    }
    flat = {f"unet.{key}": value for key, value in CONFIG.items()}
    return st.one_of(
        hostile.as_json(CONFIG).map(lambda data: {"adapter_model.safetensors": peft, "adapter_config.json": data}),
        hostile.edited(flat).map(
            lambda found: {
                "adapter_model.safetensors": hostile.tensors_file(
                    inside, {"lora_adapter_metadata": hostile.dumps(found)}
                )
            }
        ),
    )


def adapter(kept, place, case):
    for _, alpha in ((part, part.alpha) for part in formats.read(place, networks())[0].values()):
        assert np.isfinite(alpha)


def base_start(place):
    """A copy of the built-in base: its JSON to be spoilt, its weights by links."""
    for path in folders.MINI.rglob("*"):
        target = place / path.relative_to(folders.MINI)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.suffix == ".json" or path.name == "merges.txt":
            target.write_bytes(path.read_bytes())
        else:
            target.symlink_to(path)
    return place


def base_cases(kept):
    names = (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    )
    return st.one_of([only(name, hostile.as_json(json.loads((folders.MINI / name).read_bytes()))) for name in names])


def base(kept, place, case):
    checkpoint._from_folder(place, True)


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"},
}


def index_start(place):
    for number, name in ((1, "a"), (2, "b")):
        (place / f"model-{number}-of-2.safetensors").write_bytes(hostile.tensors_file({name: ("F32", [1])}))
    return place


def tokenizer_cases(kept):
    known = folders.MINI / "tokenizer"
    tokens, merges = json.loads((known / "vocab.json").read_bytes()), (known / "merges.txt").read_bytes()
    config, added = (
        json.loads((known / "tokenizer_config.json").read_bytes()),
        {"content": "<|endoftext|>", "special": False, "lstrip": False},
    )
    whole = json.loads((kept / "whole.json").read_bytes())
    return st.one_of(
        only("tokenizer/vocab.json", hostile.as_json(tokens)),
        only("tokenizer/merges.txt", hostile.damaged(merges)),
        only(
            "tokenizer/tokenizer_config.json",
            hostile.as_json(config | {"added_tokens_decoder": {"667": added}, "errors": "replace"}),
        ),
        only("tokenizer/tokenizer.json", hostile.as_json(whole)),
        only("tokenizer/added_tokens.json", hostile.as_json({"<|endoftext|>": 667})),
        only("tokenizer/special_tokens_map.json", hostile.as_json({"pad_token": added, "unk_token": "<|endoftext|>"})),
    )


def tokenizer_start(place):
    shutil.copytree(folders.MINI / "tokenizer", place / "tokenizer")
    Tokenizer(place / "tokenizer").clip.backend_tokenizer.save(str(place / "whole.json"))
    return place


def tokenizer(kept, place, case):
    """Ids of a prompt that are the embedding's rows, or a refusal."""
    vocabulary.check_vocabulary(place / "tokenizer", 668)
    ids, _ = Tokenizer(place / "tokenizer")(["a clinical photograph, <x> é \0", "word " * 99, ""])
    assert ids.shape == (3, 77)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 668


META = {"step": 3, "skipped": 0, "in_a_row": 0, "scaler": {}, "alpha": {"unet.0": 2.0}}


def small_network():
    network = nn.Sequential(nn.Linear(4, 4))
    layers.inject(network, ["0"], 2, 2.0, devices.generator(0, 1))
    return network


def state_start(place):
    network = small_network()
    optimizer = torch.optim.AdamW(layers.lora_parameters(network))
    for parameter in layers.lora_parameters(network):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    factors = layers.all_factors({"unet": network})
    lora = {f"{name}.{kind}": getattr(part, kind) for name, part in factors.items() for kind in ("down", "up")}
    return state.grouped(lora=lora, optimizer=optimizer_tensors(optimizer))


def sealed_state(tensors, text):
    """A saved state with the hash that belongs to what is in it."""
    text = text.encode("utf-8", "replace").decode()
    return save(tensors, {state.STATE: f"{state._sha256_state(tensors, text)} {text}"})


def state_cases(tensors):
    plain = sealed_state(tensors, json.dumps(META))

    def changed(found, name, value):
        return sealed_state({**tensors, name: value}, json.dumps(META))

    odd = st.builds(
        changed,
        st.none(),
        st.sampled_from([*tensors, "optimizer.9.step", "optimizer.x", "lora.unet.0.down.x", "optimizer.0.x", "\n"]),
        st.sampled_from(
            [
                torch.zeros(0),
                torch.zeros(4, 4),
                torch.tensor(1),
                torch.full((2, 4), torch.nan),
                torch.zeros(2, 4, 1),
                torch.zeros(2, dtype=torch.bool),
                torch.zeros(2, 4, dtype=torch.complex64),
            ]
        ),
    )
    sealed = hostile.edited(META).map(lambda found: sealed_state(tensors, hostile.dumps(found)))
    return only(training.STATE, hostile.as_safetensors(plain, sealed, sealed, odd))


def saved_state(kept, place, case):
    network = small_network()
    optimizer = torch.optim.AdamW(layers.lora_parameters(network))
    try:
        at = training.load_checkpoint(place, {"unet": network}, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        assert all(type(value) is int for value in vars(at).values())
    finally:
        for path in place.glob("*.damaged.*"):
            path.unlink()


def beside_yaml(kept, place, case):
    assert 0 < ldm_yaml.latent_scale(place / "model.yaml") < 1000


RECIPE = {
    "phase": 1,
    "lr": 3e-5,
    "steps": 10,
    "rank": 4,
    "alpha": 4.0,
    "data": "data/x",
    "base": "x/y",
    "plain": False,
    "text_encoder_lr": None,
    "provenance": {"torch": "2"},
    "tag_frequency": {"a mole": 3},
}


def recipe_cases(kept):
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in RECIPE.items())
    return only("recipe", st.one_of(hostile.as_json(RECIPE), hostile.as_yaml(text)))


def recipe(kept, place, case):
    train_lora.parse(["--recipe", str(place / "recipe")])


READERS = [
    Reader("LoRA file", lora_cases, lora),
    Reader("adapter_config.json", adapter_cases, adapter),
    Reader("checkpoint configs", base_cases, base, base_start),
    Reader(
        "weight index",
        lambda kept: only("model.safetensors.index.json", hostile.as_json(INDEX)),
        lambda kept, place, case: weights.read_all(weights.find(place, "model")),
        index_start,
    ),
    Reader("checkpoint yaml", lambda kept: only("model.yaml", hostile.as_yaml(V1)), beside_yaml),
    Reader("recipe", recipe_cases, recipe),
    Reader("tokenizer", tokenizer_cases, tokenizer, tokenizer_start),
    Reader("saved state", state_cases, saved_state, state_start),
]

F4 = {
    f"{key}.{role}": ("F4" if role == "lora_up.weight" else "F32", shape)
    for key in ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",)
    for role, shape in (("lora_down.weight", [2, 80]), ("lora_up.weight", [80, 2]))
}
KRON = {
    f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lokr_{name}": ("F32", [160, 160])
    for name in ("w1", "w2")
}

EXAMPLES = {  # what was once a traceback, a hang or a memory full
    "LoRA file": [{"lora.safetensors": hostile.tensors_file(F4)}, {"lora.safetensors": hostile.tensors_file(KRON)}],
    "adapter_config.json": [
        {
            "adapter_model.safetensors": hostile.tensors_file(
                {f"base_model.model.{MODULES[0].split('.', 1)[1]}.lora_A.weight": ("F32", [2, 80])}
            ),
            **as_file("adapter_config.json", CONFIG | {"lora_alpha": 10**400}),
        }
    ],
    "checkpoint configs": [as_file("scheduler/scheduler_config.json", {"beta_start": 10**400})],
    "checkpoint yaml": [{"model.yaml": text} for text in (b"a: !!timestamp x", b"a: !!bool maybe", b"a: !!int ''")],
    "recipe": [{"recipe": text} for text in (b"a: !!timestamp x", b"1: 2", hostile.BOMB.encode())],
    "tokenizer": [as_file("tokenizer/special_tokens_map.json", {"x_token": {"content": "<x>"}}),
                  as_file("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": {"x": 1}})],
}

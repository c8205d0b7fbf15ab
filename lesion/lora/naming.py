"""The names by which LoRA files call a module: kohya's, diffusers', peft's, LDM's (the original checkpoint's) and
ComfyUI's.

Proven by tests/parity/test_lora_kinds.py.
"""
import re

from torch import nn

from lesion.sd import names

ROLES = {  # the end of a tensor's name -> what it is to its module
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{
        name: name
        for name in (
            "hada_w1_a",
            "hada_w1_b",
            "hada_w2_a",
            "hada_w2_b",
            "hada_t1",
            "hada_t2",
            "lokr_w1",
            "lokr_w1_a",
            "lokr_w1_b",
            "lokr_w2",
            "lokr_w2_a",
            "lokr_w2_b",
            "lokr_t2",
        )
    },
}
PEFT = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.[\w-]+(\.weight)?"
)  # with the adapter's name before `.weight`
PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")  # diffusers before 0.17
OTHER_KINDS = {  # the end of a tensor's name -> the kind of adapter, named in the refusal
    "norm layers (LyCORIS' train_norm)": r"\.(w_norm|b_norm)$",
    "full weight differences (.diff)": r"\.(diff|diff_b|set_weight)$",
    "OFT or BOFT": r"\.(oft_blocks|oft_diag|oft_r|oft_R\.weight|boft_R|boft_s|rescale)$",
    "GLoRA": r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$",
    "(IA)^3": r"\.(on_input|ia3_l)$",
    "textual-inversion embeddings": r"^bundle_emb\.|string_to_param|^emb_params$",
    "biases": r"(lora_up|lora_B|lora_B\.default|base_layer)\.bias$",
    "AdaLoRA": r"\.(lora_E|ranknum)(\.\w+)?$",
    "VeRA": r"(vera_lambda_[bd]|vera_[AB])(\.\w+)?$",
    "the scalar of LyCORIS' use_scalar": r"\.scalar$",
}
NO_EFFECT = re.compile(
    r"(lora_te1?_text_projection|text_encoder\.text_projection|lora_te1?_logit_scale|text_projection)\..*"
)  # after the context


def kinds(keys: list[str]) -> list[str]:
    """What adapters these tensors' names are of, other than the kinds that are read."""
    return [kind for kind, pattern in OTHER_KINDS.items() if any(re.search(pattern, key) for key in keys)]


def spellings(networks: dict[str, nn.Module]) -> dict[str, str]:
    """{name in a file: "unet.<path>" or "text_encoder.<path>"} for every linear layer and convolution of the
    networks."""
    found: dict[str, str] = {}
    for network_name, network in networks.items():
        paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        original = _ldm(network, paths) if network_name == "unet" else {}
        for path in paths:
            for spelling in _unet(path, original.get(path)) if network_name == "unet" else _text_encoder(path):
                found.setdefault(spelling, f"{network_name}.{path}")
    return found


def _unet(path: str, original: str | None) -> list[str]:
    flat = path.replace(".", "_")
    same = [
        f"unet.{path}",
        path,
        f"base_model.model.{path}",
        f"base_model.model.unet.{path}",
        f"lora_unet_{flat}",
        f"lycoris_{flat}",
        f"lora_unet.{path}",
    ]
    if original is None:
        return same
    return [
        *same,
        f"diffusion_model.{original}",
        f"model.diffusion_model.{original}",
        f"unet.{original}",
        f"base_model.model.{original}",
        f"base_model.model.diffusion_model.{original}",
        f"lora_unet_{original.replace('.', '_')}",
    ]


def _text_encoder(path: str) -> list[str]:
    short = path.removeprefix("text_model.")  # transformers 5 dropped the level
    same = []
    for one in (path, short):
        flat = one.replace(".", "_")
        same += [
            f"text_encoder.{one}",
            one,
            f"base_model.model.{one}",
            f"base_model.model.text_encoder.{one}",
            f"text_encoders.{one}",
            f"text_encoders.clip_l.transformer.{one}",
            f"clip_l.transformer.{one}",
            f"cond_stage_model.transformer.{one}",
            f"lora_te_{flat}",
            f"lora_te1_{flat}",
            f"lycoris_{flat}",
        ]
    return same


def _ldm(network: nn.Module, paths: list[str]) -> dict[str, str]:
    """{our path: the original checkpoint's} of a U-Net's modules."""
    config = getattr(network, "config", None)
    if config is None:
        return {}
    keys = names.ldm_unet_keys([f"{path}.weight" for path in paths], config)
    return {
        ours.removesuffix(".weight"): theirs.removeprefix(names.UNET).removesuffix(".weight")
        for ours, theirs in keys.items()
    }


def resolve(key: str, modules: dict[str, str]) -> tuple[str | None, str]:
    """(name of the module, role of the tensor) that a file's key means; (None, "") if it means nothing here."""
    match = PROCESSOR.fullmatch(key)
    if match:
        module = match[2] + (".0" if match[2] == "to_out" else "")
        return modules.get(f"{match[1]}.{module}"), match[3]
    parts = key.split(".")
    for length in (3, 2, 1):  # the longest ending first: `lora.down.weight` before `weight`
        role = ROLES.get(".".join(parts[-length:]))
        if role is not None and len(parts) > length:
            return modules.get(".".join(parts[:-length])), role
    match = PEFT.fullmatch(key)
    if match:
        return modules.get(match[1]), {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}[match[2]]
    return None, ""

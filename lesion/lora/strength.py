"""How strong a LoRA is: alpha where its file says none, from peft's `adapter_config.json` or diffusers'
`lora_adapter_metadata`.

scale = alpha / r, with rsLoRA (arXiv:2312.03732) alpha / sqrt(r). An entry that changes what the adapter does, and is
not built here, is refused. Proven by tests/lora/test_strength.py.
"""
import math
import re
from pathlib import Path

from lesion.run.files import parse_json
from lesion.sd import configs
from lesion.sd.configs import ANY

NOT_USED = (None, False, [], {})
ADAPTER = {  # peft's LoraConfig, LoHaConfig and LoKrConfig
    "peft_type": ("LORA", "LOHA", "LOKR"),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (True, False, None),
    "use_rslora": (True, False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the rest change the base
    **dict.fromkeys(
        (
            "r",
            "lora_alpha",
            "alpha",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "lora_dropout",
            "module_dropout",
            "rank_dropout",
            "rank_dropout_scale",
            "task_type",
            "revision",
            "inference_mode",
            "base_model_name_or_path",
            "auto_mapping",
            "peft_version",
            "megatron_core",
            "megatron_config",
            "qalora_group_size",
            "eva_config",
            "loftq_config",
            "corda_config",
            "lora_ga_config",
            "runtime_config",
            "init_weights",
            "use_effective_conv2d",
            "decompose_both",
            "decompose_factor",
            "ensure_weight_tying",
        ),
        ANY,
    ),
}
PATTERN = re.compile(
    r"\^?(?:[\w/-]|\\?\.(?!\*)|\.\*|\\d\+?|\[0-9\]\+?)+\$?"
)  # what a name's pattern may be made of: it always ends
MOST_PATTERNS = 2000


def of_file(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """{"unet": the adapter's config, "text_encoder": ...} where the file's metadata or `adapter_config.json` beside it
    says one.

    ValueError, naming the file: not JSON, or an entry that is not understood.
    """
    beside = path.parent / "adapter_config.json"
    if "lora_adapter_metadata" not in metadata:
        config = configs.read_object(beside) if beside.is_file() else {}
        return dict.fromkeys(("unet", "text_encoder"), checked(config, str(beside)))
    try:
        flat = parse_json(metadata["lora_adapter_metadata"])
    except ValueError as error:
        raise ValueError(f"{path}: its lora_adapter_metadata is not JSON ({error})") from None
    if not isinstance(flat, dict):
        raise ValueError(f"{path}: its lora_adapter_metadata is not a JSON object")
    return {
        network: checked(
            {key.removeprefix(network + "."): value for key, value in flat.items() if key.startswith(network + ".")},
            f"{path}: its lora_adapter_metadata",
        )
        for network in ("unet", "text_encoder")
    }


def checked(config: dict, where: str) -> dict:
    """`config`, once its entries are understood, its numbers are numbers and its patterns are names. ValueError."""
    configs.check(config, ADAPTER, where, strict=False, of="a LoRA that is read here")
    for key in ("lora_alpha", "alpha"):
        number(config.get(key, 1), key, where)
    if config.get("r") is not None:
        configs.whole(config, "r", 1, where, 1 << 20)
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise ValueError(
                f"{where} has {name} {configs.short(patterns)}: allowed is an object of at most {MOST_PATTERNS} names"
            )
        for pattern, value in patterns.items():
            if len(pattern) > 300 or not PATTERN.fullmatch(pattern) or pattern.count("*") + pattern.count("+") > 2:
                raise ValueError(
                    f"{where} has {name} {configs.short(pattern)}: only modules' names and simple patterns of them "
                    "are understood"
                )
            number(value, f"{name} {pattern}", where)
    return config


def number(value: object, name: str, where: str) -> float:
    """A finite number. ValueError."""
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError(f"{where} has {name} {configs.short(value)}: allowed is a finite number")
    return float(value)


def alpha(config: dict, module_path: str, rank: int, where: str) -> float | None:
    """alpha of a module of a LoRA with `config`, `alpha_pattern` first, so that alpha / rank is the scale; None where
    it says none.

    ValueError if the config's rank is another: it is then another file's.
    """
    base = config.get("lora_alpha", config.get("alpha"))
    if base is None:
        return None
    said = _matching(config.get("rank_pattern"), module_path, config.get("r"))
    if said is not None and said != rank and config.get("peft_type", "LORA") == "LORA":
        raise ValueError(
            f"{where}: {module_path} has rank {rank} and the adapter's config says {said}: it is another file's config"
        )
    value = float(_matching(config.get("alpha_pattern"), module_path, base))
    return value * (rank**0.5 if config.get("use_rslora") else 1.0)


def _matching(patterns: dict | None, module_path: str, default: object) -> object:
    """The value of the first pattern that is the end of the path, as peft's `get_pattern_key` takes them."""
    for pattern, value in (patterns or {}).items():
        if module_path == pattern or module_path.endswith("." + pattern):
            return value
        if re.search(r"[\\*+\[^$]", pattern) and re.match(rf"(.*\.)?({pattern})$", module_path):
            return value
    return default

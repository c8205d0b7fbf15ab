"""Checkpoints of the Hugging Face hub: which files are needed, which are in the cache, and the fetching of what is
missing.

Proven by tests/sd/test_hub.py against a local stand-in for the hub.
"""
from collections.abc import Callable
from pathlib import Path

CLIP_HUB_ID = "openai/clip-vit-large-patch14"  # its vocabulary is SD 1.5's
COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def looks_like_id(text: str) -> bool:
    """owner/name, and neither a path nor a file's name."""
    return (
        text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith((".safetensors", ".ckpt"))
    )


def of_checkpoint(names: list[str]) -> list[str]:
    """The files of a Stable Diffusion repository to load: configs, tokenizer and one set of weights a component.

    Full precision first, whole or in shards, else the fp16 variant. ValueError where a component has no safetensors
    file.
    """
    single = [name for name in names if "/" not in name and name.endswith((".safetensors", ".ckpt"))]
    if single and not any(name.startswith("unet/") for name in names):
        raise ValueError(f"it holds single files only ({', '.join(single[:4])}): download one and give its path")
    wanted = [name for name in names if name in ("model_index.json", "scheduler/scheduler_config.json")
              or name.startswith("tokenizer/") or name in [f"{part}/config.json" for part in COMPONENTS]]
    return wanted + [name for part in COMPONENTS for name in of_weights(names, part)]


def of_weights(names: list[str], part: str) -> list[str]:
    """The weight files of one component among a repository's names. ValueError if it has none that can be read."""
    inside = f"{part}/" if part else ""
    stem = COMPONENTS[part or "vae"]
    files = [name for name in names if name.startswith(inside) and "/" not in name.removeprefix(inside)]
    for variant in ("", ".fp16"):
        whole, index = f"{inside}{stem}{variant}.safetensors", f"{inside}{stem}.safetensors.index{variant}.json"
        if whole in files:
            return [whole]
        if index in files:
            return [
                index,
                *(
                    name
                    for name in files
                    if name.endswith(".safetensors") and "-of-" in name and (".fp16" in name) == bool(variant)
                ),
            ]
    pickles = [name for name in files if name.endswith((".bin", ".ckpt", ".pt"))]
    if pickles:
        raise ValueError(
            f"its {pickles[0]} is a pickle and there is no safetensors file beside it: download the repository, run "
            "python -m "
            "lesion convert on its .bin files and give the folder"
        )
    raise ValueError(f"it has no {inside}{stem}.safetensors")


def fetch(hub_id: str, choose: Callable[[list[str]], list[str]], complete: Callable[[Path], bool], config: str,
          otherwise: str = "give a folder or a .safetensors file with --base") -> Path:
    """Folder of the repository with the files that `choose` picks of all its names; a `complete` cache needs no
    network.

    config: a file that every such repository has, by which its cache is found. Only what is missing is fetched, and a
    dropped connection is resumed. ValueError, one line: not reachable, not there, not usable.
    """
    from huggingface_hub import HfApi, snapshot_download
    try:
        cached = _cached(hub_id, config)
        if cached is not None and complete(cached):
            return cached
        names = [file.rfilename for file in HfApi().model_info(hub_id, revision="main").siblings or []]
    except Exception as error:  # what the network raises depends on the hub library's version: requests', httpx's ...
        raise _unreachable(hub_id, error, otherwise) from None
    try:
        wanted = choose(names)
    except ValueError as error:
        raise ValueError(f"{hub_id} cannot be used from the hub: {error}") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:
        raise _unreachable(hub_id, error, otherwise) from None


def _unreachable(hub_id: str, error: Exception, otherwise: str) -> ValueError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(f"{hub_id} could not be fetched from the hub ({reason}); {otherwise}")


def _cached(hub_id: str, config: str) -> Path | None:
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[config], local_files_only=True))
    except Exception:  # not there, or not in whole: by the library's version one error or another; it is then fetched
        return None

"""What a report is made of: the folders, by flags or the newest of each, and every file that is read there.

Standard library only. Proven by tests/report/test_request.py.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lesion.run import files, folders
from lesion.tiles import seen

STUDIES = ("study.json", "*/study.json", "runs/*/study.json")
SYNTHETIC = ("samples/*/provenance.json", "runs/*/provenance.json")
PREDICTIONS = ("runs/*/*/seed*/predictions.csv",)


@dataclass(frozen=True)
class Request:
    """The folders of a report; a part without its folder is left out.

    classify: run of classify.py; data: prepared set; synthetic: folders of generate.py; runs: of train_lora.py, for
    learning curves; study: of `python -m lesion study`; confusion: the two arms whose confusion matrices are drawn.
    """
    classify: Path | None = None
    data: Path | None = None
    synthetic: tuple[Path, ...] = ()
    runs: tuple[Path, ...] = ()
    study: Path | None = None
    confusion: tuple[str, str] = ("W1", "S2")

    def to_json(self) -> dict:
        """As JSON has it: folders as they were given."""
        return {name: [str(one) for one in value] if isinstance(value, tuple) else value and str(value)
                for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict) -> "Request":
        """The request that `to_json` wrote; ValueError if it is something else."""
        try:
            return cls(*(value[name] and Path(value[name]) for name in ("classify", "data")),
                       *(tuple(map(Path, value[name])) for name in ("synthetic", "runs")),
                       value["study"] and Path(value["study"]), tuple(value["confusion"]))
        except (KeyError, TypeError):
            raise ValueError("the request of the report is damaged: make the report anew with evaluate.py") from None

    def check(self) -> None:
        """ValueError, in one line, if nothing is asked for or a part lacks what it is compared with."""
        if not (self.classify or self.study or self.synthetic):
            raise ValueError("nothing to report: give --classify RUN (a run folder of classify.py), --synthetic DIR or "
                             "--study DIR")
        if self.synthetic and not self.data:
            raise ValueError("--synthetic DIR is compared with real tiles: give --data, the data set its LoRA learnt "
                             "from")
        if self.runs and not self.synthetic:
            raise ValueError("--runs concerns synthetic tiles: give --synthetic DIR too")

    def files_read(self) -> list[Path]:
        """Every file of these folders that the report may rest on, caches aside (they are keyed by the SHA-256 of what they
        hold); those that exist, sorted."""
        found = []
        for folder in self.synthetic:
            found += [folder / "provenance.json", folder / files.MANIFEST, *_tiles(folder)]
            if gif := denoising(folder):
                found += [gif, gif.parent / "provenance.json"]
        if self.data:
            found += [self.data / files.MANIFEST, self.data / "dataset.json"]
            found += _tiles(self.data) if self.synthetic else []
        if self.classify:
            found += [self.classify / "args.json", *self.classify.glob("*/seed*/**/predictions.csv")]
            found += self.classify.glob("*/seed*/**/model.safetensors") if self.synthetic else []
        for run in self.runs:
            found += [run / "metrics.jsonl", *(run / "checkpoints").glob("lora-*.safetensors")]
        if self.study:
            found += [self.study / "study.json", *(self.study / "answers").glob("*.jsonl")]
        return sorted({path for path in found if path.is_file()})


def _tiles(folder: Path) -> list[Path]:
    return [folder / row["file_name"] for row in files.read_manifest(folder)]


# ---------------------------------------------------------------------------------------------- the newest

def newest(data: Path | None = None) -> Request:
    """The newest classifier run, synthetic folder, reader study (with answers) and the runs and data (unless `data` is given)
    they belong to, under the working directory; what is not there stays empty. Without data there is nothing to compare
    synthetic tiles with: they are left out."""
    table = folders.newest_file(*PREDICTIONS)
    provenance, study = folders.newest_file(*SYNTHETIC), _newest_study()
    classify, synthetic = table and table.parents[2], provenance and provenance.parent
    runs = _runs_of(provenance) if provenance else ()
    data = data or _data_of(classify, *runs)
    if not (synthetic and data):
        return Request(classify=classify, data=data, study=study)
    return Request(classify=classify, data=data, synthetic=(synthetic,), runs=runs, study=study)


def _newest_study() -> Path | None:
    found = folders.newest_file(*STUDIES)
    return found.parent if found and any((found.parent / "answers").glob("*.jsonl")) else None


def _runs_of(provenance: Path) -> tuple[Path, ...]:
    """The runs of train_lora.py that taught the LoRA of a synthetic folder, if they hold that very file and a validation
    loss."""
    runs = []
    for lora in seen.read_provenance(provenance)["loras"]:
        path = Path(lora.get("file") or "")
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        metrics = run / "metrics.jsonl"
        if path.is_file() and metrics.is_file() and files.sha256_file(path) == lora.get("sha256") \
                and any("val_loss" in row for row in folders.read_metrics(metrics)):
            runs.append(run)
    return tuple(dict.fromkeys(runs))


def _data_of(*runs: Path | None) -> Path | None:
    """The prepared set that the first of the runs names in its args.json and that is still there; else the default one."""
    for run in filter(None, runs):
        data = folders.read_args(run).get("data")
        if data and (Path(data) / files.MANIFEST).is_file():
            return Path(data)
    return next((data for data in (folders.ISIC, folders.DEMO) if (data / files.MANIFEST).is_file()), None)


def denoising(folder: Path) -> Path | None:
    """denoising.gif of a synthetic folder (`generate.py --gif`); else the newest of a folder beside it that was drawn with
    the same base and LoRA; None if there is none."""
    if (folder / "denoising.gif").is_file():
        return folder / "denoising.gif"
    found = [path for path in folder.resolve().parent.glob("*/denoising.gif") if _weights(path.parent) == _weights(folder)]
    newest_first = sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)
    return folder.parent / newest_first[0].parent.name / "denoising.gif" if newest_first else None


def _weights(folder: Path):
    """What drew the tiles: (base, LoRAs with their weights); the folder itself where nothing says so, like no other."""
    path = folder / "provenance.json"
    if not path.is_file():
        return folder
    found = seen.read_provenance(path)
    return found.get("base_sha256"), [(lora.get("sha256"), lora.get("weight")) for lora in found["loras"]]

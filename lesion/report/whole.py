"""The whole report: computed from a request, then put in its place in one step, with a manifest of hashes.

Proven by tests/report/test_whole.py.
"""
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lesion.report import classification, drop, front, page, pictures, plots, readers
from lesion.report.request import Request
from lesion.run import files, folders

OURS = {"report.html", "report.md", "results.json", "manifest.json"}  # and figures/


@dataclass
class Report:
    """What a request comes to: first page (rows of cells of blocks), blocks, numbers, figures by stem, pictures that are
    copied as they are (name -> file), and per synthetic folder the file names that are called copies."""
    front: list[list[list[dict]]]
    blocks: list[dict]
    results: dict
    figures: dict[str, Figure]
    copied: dict[str, Path]
    copies: dict[Path, list[str]]

    def findings(self) -> list[str]:
        """What each part found, a sentence or two each."""
        texts = pictures.findings(self.results["pictures"]) if "pictures" in self.results else []
        if "classification" in self.results:
            texts.append(classification.finding(self.results["classification"]))
        return texts + ([self.results["readers"]["verdict"]] if "readers" in self.results else [])


def compute(request: Request, drop_copies: Path | None = None, facts: list[tuple[str, str]] = (),
            progress: Callable | None = None) -> Report:
    """Everything a report says, from the files of its request alone; nothing is written but caches.

    drop_copies: where copies will be dropped to, for the words; facts: date and command, for the first page. The same request
    gives the same results. ValueError as the parts'.
    """
    request.check()
    report, sections = Report([], [], {}, {}, {}, {}), {}

    def add(name, part):
        sections[name], report.results[name], figures = part
        report.figures.update(figures)

    if request.classify:
        add("classification", classification.build(request.classify, request.data, request.confusion, progress))
    if request.synthetic:
        *part, report.copies, report.copied = pictures.build(
            request.synthetic, request.data, request.classify, request.runs, drop_copies, progress)
        add("pictures", part)
    if request.study:
        add("readers", readers.build(request.study))
    report.front, figures = front.build(report.results, sections, facts)
    report.figures.update(figures)
    report.blocks = [block for name in ("classification", "pictures", "readers") for block in sections.get(name, [])]
    return report


def write(report: Report, out: Path, title: str, manifest: dict, drop_copies: Path | None = None) -> None:
    """Put the report into `out`, whose older report goes in the same step; before that, the folders without copies.

    manifest: request, command and read files (`hashes`); the written ones are added. ValueError if `out` holds anything
    that is not a report's, or a number is not finite.
    """
    refuse_foreign(out)
    with folders.replaced(out) as new:
        for stem, figure in report.figures.items():
            plots.save(figure, new / "figures", stem)
        for name, path in report.copied.items():
            shutil.copyfile(path, new / "figures" / name)
        page.write(new, title, report.blocks, report.results, report.front)
        written = [path for path in sorted(new.rglob("*")) if path.is_file()]
        files.write_json(new / "manifest.json", manifest | {"written": hashes(written, new)})
        if drop_copies:
            for (folder, names), row in zip(report.copies.items(), report.results["pictures"]["dropped"]):
                drop.drop_copies(folder, names, Path(row["folder"]))


def hashes(paths: list[Path], base: Path | None = None) -> dict[str, str]:
    """{path, relative to `base` if given: SHA-256}, with forward slashes."""
    return {(path.relative_to(base) if base else path).as_posix(): files.sha256_file(path) for path in paths}


def refuse_foreign(out: Path) -> None:
    """ValueError if `out` holds anything but an older report: it would be lost."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give another --out")
    for path in sorted(out.rglob("*")) if out.is_dir() else []:
        name = path.relative_to(out)
        ours = str(name) in OURS or path.is_dir() and name.parts[0] == "figures" or name.suffix in (".tmp", ".lock") or (
            name.parts[0] == "figures" and name.suffix in (".png", ".svg", ".gif")) or name.name == ".DS_Store"
        if not ours:
            raise ValueError(f"{out} holds {name}, which is no part of a report and would be lost: give another --out")

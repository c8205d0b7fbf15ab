"""The first page of a report: the answer, its certainty as one picture, what the tiles look like, what readers said, limits.

Every sentence is another section's; nothing is judged here. Proven by tests/report/test_front.py.
"""
from lesion.report import classification, page, pictures, plots, plots_readers
from lesion.report.page import bullets, contents, facts, figure, heading, paragraph

CONTRASTS = (("O1", "S2"), ("A1", "S2"), ("W1", "S2w"))  # one factor each: repeated tiles, none, none under a weighted loss
TILES, ROWS, LIMITS = 10, 4, 7  # tiles of a set, sets, limits: more would not leave room for the rest of the page


def build(results: dict, sections: dict[str, list[dict]], about: list[tuple[str, str]]) -> tuple[list, dict]:
    """(rows of cells of blocks, figures: stem -> matplotlib figure).

    results and sections: numbers and blocks of the parts "classification", "pictures" and "readers", those there are; about:
    date, command and the like.
    """
    rows, figures = [[[_verdict(results)]]], {}
    if "classification" in results:
        cell, drawn = _certainty(results["classification"])
        figures |= drawn
        second = [_again(sections["classification"], "confusion")] if _has(sections["classification"], "confusion") else []
        rows.append([cell, [heading("What the two arms decide"), *second]] if second else [cell])
    cells = []
    if "pictures" in results:
        cells.append([heading("What the tiles look like"), *_looks(sections["pictures"]),
                      *map(paragraph, pictures.findings(results["pictures"])[:ROWS - 2])])
    if "readers" in results:
        cell, drawn = _readers(results["readers"], lead="classification" not in results)
        figures |= drawn
        cells.append(cell)
    if cells:
        rows.append(cells)
    said = _limits(results)
    if len(said) > LIMITS:
        said = [*said[:LIMITS], f"{len(said) - LIMITS} more in the parts that follow."]
    rows.append([*([[heading("Limits"), bullets(said)]] if said else []), [heading("About this report"), facts(about), contents()]])
    return rows, figures


def _has(blocks, stem):
    return any(block.get("stem") == stem for block in blocks)


def _again(blocks, stem):
    return next(block for block in blocks if block.get("stem") == stem)


def _verdict(results):
    """The answer to "do synthetic tiles help?"; where no classifier was trained, that of the part there is."""
    if "classification" in results:
        return paragraph(classification.finding(results["classification"]), lead=True)
    asked = "Whether synthetic tiles help a classifier was not tested here."
    return paragraph(f"{asked} {results['readers']['verdict']}" if "readers" in results else asked, lead=True)


def _certainty(results):
    """The differences of AUROC with intervals, drawn and in words."""
    found = {(row["first"], row["second"]): row["metrics"]["auroc"] for row in results["contrasts"]}
    seeds = {(row["first"], row["second"]): row["seeds"] for row in results["contrasts"]}
    rows = []
    for pair in CONTRASTS:
        cell = found.get(pair)
        words = "not run" if cell is None else f"{page.difference(cell)}  {cell['verdict']}"
        if cell and cell["low"] is None:
            words += ", too few seeds for an interval" if len(seeds[pair]) == 2 else ", no interval"
        rows.append((f"{pair[0]} → {pair[1]}", words, cell))
    said = "; ".join(f"{name}: {words}" for name, words, _ in rows)
    caption = ("AUROC with synthetic tiles minus AUROC with the real ones repeated (O1), with none (A1), with none under a "
               "weighted loss (W1); 95 % intervals; filled: supported or harmful.")
    block = figure("answer", caption, f"AUROC differences with 95 % intervals. {said}.")
    return [heading("How sure is that?"), block], {"answer": plots.answer(rows)}


def _looks(blocks):
    """The tiles of the pictures section, fewer of them, and the denoising steps."""
    shown = _again(blocks, "tiles")
    yield shown | {"rows": [(name, cells[:TILES]) for name, cells in shown["rows"][:ROWS]]}
    if _has(blocks, "denoising"):
        yield _again(blocks, "denoising")


def _readers(results, lead):
    pooled = {kind: results["pooled"][f"{kind}_rate"]["estimate"] for kind in ("real", "synthetic")}
    block = figure("identified", "What readers identified, with 95 % intervals; dashed: guessing. Published: 133 of 200 real and 99 "
                   "of 200 synthetic tiles right.",
                   f"Bars: readers called {pooled['real']:.0%} of real tiles real and {pooled['synthetic']:.0%} of synthetic tiles "
                   "synthetic; in the published study 66.5% and 49.5%.")
    said = [] if lead else [paragraph(results["verdict"])]
    return [heading("What readers said"), block, *said], {"identified": plots_readers.identified(results, everyone=False)}


def _limits(results):
    """What a reader must know before quoting the report, part by part, and which parts there are not."""
    said = classification.limits(results["classification"]) if "classification" in results else []
    if "pictures" in results:
        said += results["pictures"]["notes"]
    if "readers" in results:
        said += [f"Reader left out, too few answers: {line}." for line in results["readers"]["left_out"]]
        said += results["readers"]["skipped_lines"][:3]
    absent = [words for part, words in (("classification", "classifier arms"), ("pictures", "a look at the synthetic tiles"),
                                        ("readers", "a reader study")) if part not in results]
    return said + ([f"Not in this report: {' and '.join(absent)}."] if absent else [])

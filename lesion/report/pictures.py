"""The synthetic tiles in the report: are they faithful, new and varied?

The numbers are lesion.report.sets'. Proven by tests/report/test_report_pictures.py.
"""
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lesion.describe import prompts
from lesion.report import drop, page, plots_pictures, request
from lesion.report import sets as picture_sets
from lesion.report.page import heading, number, p_value, paragraph, table
from lesion.run import files, sheets
from lesion.stats import memorisation

WORST, SHOWN, FEW = 20, 10, 10
METHOD = (
    "KID is the unbiased squared maximum mean discrepancy with a cubic kernel (arXiv:1801.01401) over all pairs: "
    "0 on average for tiles of one distribution. Its standard error is the jackknife over patients and synthetic "
    "tiles. FID (arXiv:1706.08500) is far above 0 at such numbers even for two samples of real tiles, so it "
    "stands beside that value at the same n, and means nothing without it.",
    "Density and coverage (arXiv:2002.09797, k = 5): how well synthetic tiles lie among real ones, and the share "
    "of real tiles with a synthetic one close by; for one distribution density is 1 and coverage is given in "
    "brackets. Diversity: mean feature distance within the set over that within the real tiles; the Vendi score "
    "(arXiv:2210.02410) is the effective number of different tiles among n.",
    "Two-sample AUC: how well a linear classifier, cross-validated with a patient's tiles kept together, tells "
    "the set from real tiles; .5 is not at all, 1 is always. Points that mix in a t-SNE map prove nothing.",
    "A copy is a tile whose nearest training tile, over the 8 views that turning and mirroring give, is "
    "relatively nearer (nearest over fifth nearest, after arXiv:2301.13188) than it is for 99 % of held-out real "
    "tiles, by pixels (16 x 16, brightness, cast and contrast taken out) or by features; so about 1 % of further "
    "real tiles, on which the limit was not set, are called copies too. Planted copies that are turned, noisy, "
    "recompressed or darker are found; one shifted by 0.5 mm or more often is not. The three-sample test "
    "(arXiv:2004.05675) asks whether synthetic "
    "tiles lie nearer to the training tiles than held-out real ones do: z far below 0 is copying spread thin. "
    "Held-out tiles are of other patients, which by itself moves z below 0.",
)


def build(folders: list[Path], data: Path, classify: Path | None = None, runs: tuple[Path, ...] = (),
          drop_copies: Path | None = None, progress=None) -> tuple[list[dict], dict, dict, dict, dict]:
    """(blocks, results, figures: stem -> matplotlib figure, folder -> file names of its copies, name -> picture file that
    the report takes in as it is) for synthetic folders of generate.py and a prepared data set.

    runs: folders of train_lora.py, for the learning curves; drop_copies: where the folders without their copies will be
    written, one a set. ValueError as `picture_sets.gather`; too few held-out tiles only cost the part on copies, unless
    `drop_copies` asks for it.
    """
    for folder, name in zip(folders, picture_sets.names(folders)) if drop_copies else []:
        drop.refuse_foreign(Path(folder), _without_copies(drop_copies, name))
    material = picture_sets.gather(folders, data, classify, progress=progress)
    results = {"label": material.label, "features": material.extractor.name, "notes": material.notes,
               "fidelity": picture_sets.judge_fidelity(material, progress), "copies": None}
    found = {}
    try:
        results["copies"], found = picture_sets.judge_copies(material, progress)
    except ValueError as error:
        if drop_copies:
            raise
        results["notes"].append(f"{error}.")
    results["attributes"] = picture_sets.judge_attributes(material, progress)
    results["training"] = picture_sets.judge_training(list(runs), material, results["copies"])
    results["provenance"] = [_provenance(part) for part in material.synthetic]
    copies = {part.folder: [part.rows[i]["file_name"] for i in np.flatnonzero(found[part.name].is_copy)]
              for part in material.synthetic if part.name in found}
    blocks, figures = _blocks(material, results, found, progress)
    if drop_copies:
        results["dropped"] = [_dropped(part, copies[part.folder], Path(drop_copies)) for part in material.synthetic]
        blocks.append(paragraph(" ".join(
            f"{row['name']} without its {row['copies']} {'copy' if row['copies'] == 1 else 'copies'}: {row['left']} tiles in "
            f"{row['folder']}." for row in results["dropped"])))
    gif = next(filter(None, map(request.denoising, map(Path, folders))), None)
    if gif:
        figures["denoising-steps"] = plots_pictures.steps(sheets.open_frames(gif))
        words = "" if gif.parent in map(Path, folders) else f" (from {gif.parent}, drawn with the same LoRA)"
        place = next(i for i, block in enumerate(blocks) if block.get("stem") == "tiles")
        blocks.insert(place + 1, page.animation("denoising", "denoising-steps", f"Denoising, from the first step to the last{words}.",
                                            "tiles emerging from noise"))
    return blocks, results, figures, copies, {"denoising.gif": gif} if gif else {}


def _blocks(material, results, found, progress):
    shown = _shown_tiles(material)
    figures = {"tiles": _tile_sheet(shown), **_maps(material, results["fidelity"], progress)}
    label = material.label
    blocks = [heading("Are the synthetic tiles faithful, new and varied?"),
              *(paragraph(text, lead=True) for text in findings(results)),
              paragraph(f"Features: {material.extractor.sentence}."), *map(paragraph, results["notes"]),
              page.tiles("tiles", f"Real and synthetic {label} tiles, drawn at random, none chosen.",
                         f"{label} tiles at random: {', '.join(name for name, _ in shown)}",
                         [(name, [{"images": [image]} for image in images]) for name, images in shown]),
              *_fidelity(results["fidelity"], label),
              *_map_blocks(results["fidelity"], label)]
    if results["copies"]:
        blocks += [heading("Copies of training tiles", 3), *_copies(results["copies"])]
        for place, part in enumerate(material.synthetic):
            pairs = _worst(part, material.training, found[part.name])
            figures[f"worst-{place}"] = plots_pictures.worst(*pairs)
            caption = (f"{part.name}: the tiles nearest to a training tile (left, turned to its view) beside it, with "
                       "the relative distance by pixels; copies framed.")
            cells = [{"images": [ours, theirs], "caption": f"copy: {text}" if copy else text, "marked": bool(copy)}
                     for ours, theirs, text, copy in zip(*pairs)]
            blocks.append(page.tiles(f"worst-{place}", caption, f"{len(cells)} pairs of a synthetic tile and the "
                                     f"training tile nearest to it, {sum(pairs[3])} of them copies", [("", cells)]))
    if results["training"]:
        figures["learning"] = plots_pictures.learning(results["training"])
        figures["narrow/learning"] = plots_pictures.learning(results["training"], columns=1)
        blocks.append(page.figure("learning", "Over-training: validation loss, and the share of copies among tiles "
                                    "drawn from each checkpoint.", "curves against the training step"))
    values = {name: names for name, names in prompts.NAMES.items() if name != "surface"}
    titles = {name: prompts.VOCABULARY[name].title for name in values}
    for stem, columns in (("attributes", 2), ("narrow/attributes", 1)):
        figures[stem] = plots_pictures.attributes(results["attributes"]["counts"], values, titles, columns)
    blocks += [heading("What the tiles show", 3), *_shown(results["attributes"], label)]
    blocks += [heading("How it was done", 3), *map(paragraph, METHOD), _origin(results["provenance"])]
    return blocks, figures


def findings(results: dict) -> list[str]:
    """The headline, one sentence a set: told from real tiles, copies; and one for the held-out tiles."""
    texts = []
    copies = {row["name"]: row for row in (results["copies"] or {}).get("sets", [])}
    ceiling = next((row for row in results["fidelity"]["sets"] if row["ceiling"]), None)
    for row in results["fidelity"]["sets"]:
        if row is ceiling:
            continue
        test = row["against_real"]
        told = "are told from real ones" if test["p"] < 0.05 else "are not told from real ones here"
        text = f"{row['name']}: the {row['n']} tiles {told} (two-sample {_auc(test)}, p {p_value(test['p'])})"
        if row["name"] in copies:
            copy = copies[row["name"]]
            called = "1 is called a copy" if copy["copies"] == 1 else f"{copy['copies']} are called copies"
            text += f"; {called} of a training tile ({_percent(copy)}, about 1 % of real tiles on which the limit was not set)"
        texts.append(text + ".")
    if ceiling:
        texts.append(f"Held-out real tiles against the same training tiles: {_auc(ceiling['against_real'])}.")
    return texts


def _auc(test):
    return f"AUC {page.interval({'mean': test['auc'], 'low': test['low'], 'high': test['high']}, digits=2)}"


def _give_or_take(value, error):
    """"0.0123 ± 0.0021": two digits of the error."""
    digits = max(0, 1 - int(np.floor(np.log10(max(error, 1e-12)))))
    return f"{number(value, digits)} ± {number(error, digits)}"


def _percent(row):
    return f"{row['mean']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def _fidelity(results, label):
    floor = results["floor"]
    header = ["tiles", "n", "KID ± s.e.", f"FID at n = {floor['n']}", "density", "coverage [one distribution]",
              "diversity", f"Vendi at n = {floor['n']}", "AUC against real", "AUC against the other class"]
    rows = [[row["name"], str(row["n"]), _give_or_take(row["kid"], row["kid_se"]),
             number(row["fid"], 1), number(row["density"], 2), f"{number(row['coverage'], 2)} "
             f"[{number(row['expected_coverage'], 2)}]", number(row["distance"] / floor["distance"], 2),
             number(row["vendi"], 1), _auc(row["against_real"])[4:],
             _auc(row["against_other"])[4:] if "against_other" in row else "–"] for row in results["sets"]]
    rows.append([f"real {label} among themselves", f"2 × {floor['n']}",
                 f"{_give_or_take(floor['kid'], floor['kid_sd'])} (s.d.)",
                 f"{_give_or_take(floor['fid'], floor['fid_sd'])} (s.d.)", "1", "–", "1.00",
                 number(floor["vendi"], 1), "0.50", "–"])
    return [table(f"Fidelity and diversity against {results['real']} real {label} training tiles. The last row is what "
                  "a faultless generator would get. KID and FID compare only under the same features.", header, rows)]


def _copies(results):
    header = ["tiles", "n", "copies", "rate [95 %]", "by pixels", "by features", "median relative distance",
              "three-sample z", "p", "over cells", "p"]
    rows = []
    for row in results["sets"]:
        test = row.get("three_sample", {"z": None, "p": None, "c_t": None, "c_t_p": None})
        rows.append([row["name"], str(row["n"]), str(row["copies"]), _percent(row), str(row["by_pixels"]),
                     str(row["by_features"]), number(row["median"], 2), number(test["z"], 1), p_value(test["p"]),
                     number(test["c_t"], 1), p_value(test["c_t_p"])])
    limits = results["limits"]
    held_out = {row.get("held_out") for row in results["sets"]} - {None}
    few = f"The three-sample test rests on {held_out.pop()} held-out tiles of the class." if held_out else \
        "The three-sample test needs at least 10 held-out tiles of the class."
    how = (f"Features: {results['features']}; never a classifier's, as one that was fitted to the training tiles knows "
           "them from others.")
    return [table(f"Copies of any of {results['training']} training tiles: relative distance under "
                  f"{number(limits['pixels'], 2)} by pixels or {number(limits['features'], 2)} by features, set on "
                  f"{results['calibration']} held-out real tiles.", header, rows), paragraph(f"{few} {how}")]


def _shown(results, label):
    sets = list(results["counts"])
    blocks = [page.figure("attributes", "Measured attributes, real and synthetic; the shares of other colours are "
                            "among all those named.", "bars: share of every value of every attribute"),
              table(f"Skin tone by typology angle: tiles of each group (\"too few\" under {FEW} to say anything of the "
                    "group).", ["group", *sets],
                    [[tone, *(_tone(results["counts"][name]["skin_tone"], place) for name in sets)]
                     for place, tone in enumerate(prompts.NAMES["skin_tone"])])]
    if results["color_norm"] != "none":
        blocks.append(paragraph(f"The data set's colours are normalised ({results['color_norm']}), so angles compare "
                                "the columns with each other and are not skin tones."))
    for name, rows in results["adherence"].items():
        blocks.append(table(f"Prompt adherence of {name}: Spearman correlation of asked and measured.",
                            ["attribute", "measured as", "n", "correlation [95 %]"],
                            [[prompts.VOCABULARY[row["attribute"]].title, row["measure"], str(row["n"]),
                              page.interval(row, digits=2)] for row in rows], text=(1,)))
    if not results["adherence"]:
        blocks.append(paragraph("The prompts asked for no attributes: there is no prompt adherence to measure."))
    return blocks


def _tone(counts, place):
    share = counts[place] / max(1, sum(counts))
    return f"{counts[place]} ({share:.0%}{', too few' if 0 < counts[place] < FEW else ''})"


# -------------------------------------------------------------------------------- figures

def _shown_tiles(material: picture_sets.Material) -> list[tuple[str, np.ndarray]]:
    """(name, tiles at random): SHOWN real ones, SHOWN held out, twice as many of each synthetic set."""
    rng, parts = np.random.default_rng(0), [material.real, *([material.held_out] if material.held_out else [])]
    return [(part.name, part.images[rng.permutation(len(part.rows))[:SHOWN if part in parts else 2 * SHOWN]])
            for part in [*parts, *material.synthetic]]


def _tile_sheet(shown) -> Figure:
    return plots_pictures.grid([(name if not start else "", images[start:start + SHOWN]) for name, images in shown
                                for start in range(0, len(images), SHOWN)])


def _maps(material, results, progress):
    figures = {}
    maps = (("tsne-real", material.real, plots_pictures.REAL, "against_real"),
            ("tsne-other", material.other, plots_pictures.BENIGN, "against_other"))
    for stem, other, style, key in (progress or picture_sets.silent)(maps, desc="t-SNE", unit="map"):
        panels = []
        for place, (part, row) in enumerate(zip(material.synthetic, results["sets"])):
            if key in row:
                parts = [picture_sets.drawn(tiles.features) for tiles in (other, part)]
                positions = plots_pictures.tsne(np.concatenate(parts))
                panels.append({"title": f"{part.name}\ntwo-sample {_auc(row[key])}", "parts": [
                    (other.name, positions[:len(parts[0])], style),
                    (part.name, positions[len(parts[0]):], plots_pictures.SETS[place % len(plots_pictures.SETS)])]})
        if panels:
            figures |= {stem: plots_pictures.scatter(panels), f"narrow/{stem}": plots_pictures.scatter(panels, columns=1)}
    return figures


def _map_blocks(results, label):
    """The maps' figures, side by side where there is one set; said in words: how well the sets are told from real tiles."""
    rows = [row for row in results["sets"] if not row["ceiling"]]

    def alt(what, key):
        return f"Point clouds of {what}. " + "; ".join(f"{row['name']}: {_auc(row[key])}" for row in rows if key in row) + "."
    blocks = [page.figure("tsne-real", f"t-SNE of real {label} and synthetic tiles; read the AUC, not the overlap.",
                          alt(f"real {label} and synthetic tiles", "against_real"))]
    if any("against_other" in row for row in rows):
        blocks.append(page.figure("tsne-other", "t-SNE of synthetic tiles and real tiles of the other class.",
                                  alt("synthetic tiles and real tiles of the other class", "against_other")))
    return [page.beside(*blocks)] if len(blocks) == 2 and len(rows) == 1 else blocks


def _worst(part, training, copies):
    order = np.argsort(copies.pixels.relative, kind="stable")[:WORST]
    by_pixels = copies.pixels
    turned = np.stack([memorisation.views(part.images[i:i + 1])[by_pixels.view[i]][0] for i in order])
    captions = [f"{Path(part.rows[i]['file_name']).stem}   {by_pixels.relative[i]:.2f}" for i in order]
    return turned, training.images[by_pixels.index[order]], captions, copies.is_copy[order]


# -------------------------------------------------------------------------------- provenance, dropping

def _provenance(part):
    keys = ("base_sha256", "lora_sha256", "sampler", "steps", "guidance_scale", "resolution", "negative_prompt")
    settings = {key: sorted({str(row[key]) for row in part.rows if row.get(key) is not None}) for key in keys}
    return {"name": part.name, "folder": str(part.folder),
            "manifest_sha256": files.sha256_file(part.folder / files.MANIFEST), **settings}


def _origin(rows):
    def first(values):
        return "–" if not values else values[0][:12] + (f" and {len(values) - 1} more" if len(values) > 1 else "")
    return table("Where the sets come from (SHA-256, first 12 digits).",
                 ["set", "folder", "manifest", "base", "LoRA", "sampler", "steps", "guidance"],
                 [[row["name"], row["folder"], row["manifest_sha256"][:12], *(first(row[key]) for key in (
                     "base_sha256", "lora_sha256", "sampler", "steps", "guidance_scale"))] for row in rows],
                 text=(1, 2, 3, 4, 5))


def _dropped(part, names, out):
    return {"name": part.name, "folder": str(_without_copies(out, part.name)), "copies": len(names),
            "left": len(part.rows) - len(names)}


def _without_copies(out, name):
    return Path(out) / name.replace("/", "-")

"""`python -m lesion.stats.simulate`: do the tests hold their level and the intervals cover? The table of docs/PROTOCOL.md.

Test sets and training runs are drawn from a model whose truth is known and go through the very functions that the report
uses. A tile's logit in run s of arm a is separation_as y + patient + tile + (arm and tile) + (arm, run and tile), every
part normal, of total variance 1 within a class (`REGIMES`); separation_as = 1.5 + gain_a + luck x normal. Three regimes:
runs differ by noise on every tile, by luck of the whole run, or by both. With one run the truth is that run's own.

Every cell of the grid has its own seed and is a line of the file --out; a second call goes on with what is missing.
Proven by tests/stats/test_simulate.py.
"""
import argparse
import json
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy import special, stats

from lesion.stats import classification, comparison, inference, readers

REGIMES = {  # share of the variance that is a run's own noise on each tile; standard deviation of a run's separation
    "tile noise": (0.5, 0.0),
    "run luck": (0.05, 0.2),
    "both": (0.5, 0.2),
}
OWN_OF_ARM, OF_PATIENT = 0.1, 0.3  # shares of what an arm sees in a tile; of the patient, where one has several tiles
SEPARATION, GAIN = 1.5, 0.4        # AUROC .856; the second arm's where a true difference is to be covered: .910
SHIFT, THRESHOLD = 1.5, 0.3        # score = expit(logit - SHIFT); the threshold that stands for the chosen one
BENIGN = {10: 200, 20: 250, 28: 280, 50: 300, 53: 500, 79: 400, 300: 600}  # benign tiles beside so many malignant ones
AUROC_SIZES = ((10, 1), (20, 1), (28, 1), (50, 5), (79, 1), (79, 3), (79, 5), (300, 1), (300, 5))  # malignant tiles, a patient
FOLDS, FOLD_SIZES = 5, (10, 53)  # folds of a cross-fitted run, malignant tiles of each
METRIC_SIZES = ((20, 1), (28, 1), (79, 1), (79, 5), (300, 1))
RESAMPLES = 200  # of each bootstrap; the report takes 2,000


@dataclass(frozen=True)
class Cell:
    """One line of the table: what is simulated (`kind`), under which regime and size, in how many sets."""
    kind: str
    regime: str
    positives: int
    tiles: int
    runs: int
    sets: int


def grid(quick: bool = False) -> list[Cell]:
    """All cells; `quick`: a few of each kind with few sets, to see that they run and are not far off."""
    if quick:
        return [Cell("auroc", "both", 28, 1, 3, 150), Cell("auroc", "tile noise", 79, 5, 1, 150),
                Cell("metrics", "both", 28, 1, 3, 20), Cell("subgroup", "both", 1200, 40, 3, 150),
                Cell("readers", "crossed", 20, 1, 5, 60)]
    cells = [Cell("subgroup", "both", patients * 40, 40, runs, 2000) for patients in (10, 30) for runs in (1, 3, 5)]
    cells += [Cell("readers", "crossed", count, 1, number, 500) for count in (20, 40) for number in (3, 5, 8)]
    for kind, sizes, counts, sets in (("metrics", METRIC_SIZES, (1, 3, 5), 300), ("auroc", AUROC_SIZES, (1, 3, 5, 10), 2000),
                                      ("folds", [(size, 1) for size in FOLD_SIZES], (1, 3, 5), 1000)):
        cells += [Cell(kind, regime, positives, tiles, runs, sets) for positives, tiles in sizes for runs in counts
                  for regime in REGIMES if runs > 1 or regime == "tile noise"]
    return cells


# ------------------------------------------------------------------------------------------- a test set

def draw(rng: np.random.Generator, cell: Cell, gain: float = 0.0) -> tuple:
    """One test set and the runs of two arms: labels [n], scores [2, S, n], patients [n], separations [2, S].

    Every patient with malignant tiles has `cell.tiles` of them and as many benign ones; the other patients have that
    many benign tiles.
    """
    noise, luck = REGIMES[cell.regime]
    carriers = round(cell.positives / cell.tiles)
    labels = np.repeat([1, 0], [carriers * cell.tiles, BENIGN.get(cell.positives, cell.positives)])
    patients = np.concatenate([np.repeat(np.arange(carriers), cell.tiles),
                               np.arange(np.count_nonzero(labels == 0)) // cell.tiles])
    of_patient = OF_PATIENT if cell.tiles > 1 else 0.0
    shape = (2, cell.runs, len(labels))
    separations = SEPARATION + gain * np.array([[0.0], [1.0]]) + luck * rng.normal(size=shape[:2])
    logits = (separations[:, :, None] * labels + np.sqrt(of_patient) * rng.normal(size=patients.max() + 1)[patients]
              + np.sqrt(1 - of_patient - OWN_OF_ARM - noise) * rng.normal(size=len(labels))
              + np.sqrt(OWN_OF_ARM) * rng.normal(size=(2, 1, len(labels))) + np.sqrt(noise) * rng.normal(size=shape))
    return labels, special.expit(logits - SHIFT), patients, separations


def truth_of(prevalence: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every metric of the whole population, by numerical integration, at separations from -0.5 to 4.5."""
    separations, z = np.linspace(-0.5, 4.5, 101), np.linspace(-7, 12, 4001)
    step, scores, benign = z[1] - z[0], special.expit(z - SHIFT), stats.norm.pdf(z)
    bins, found = classification.bin_of(scores), {name: [] for name in classification.METRICS}
    for separation in separations:
        malignant, tpr, fpr = stats.norm.pdf(z - separation), stats.norm.sf(z - separation), stats.norm.sf(z)
        called = prevalence * tpr + (1 - prevalence) * fpr
        precision = np.divide(prevalence * tpr, called, out=np.ones_like(called), where=called > 0)
        found["auroc"].append(np.sum(tpr * benign) * step)
        found["auprc"].append(np.sum(precision * malignant) * step)
        found["pauc"].append(np.sum(np.maximum(tpr - 0.8, 0) * benign) * step)
        for name, specificity in (("recall_spec90", 0.90), ("recall_spec95", 0.95)):
            found[name].append(stats.norm.sf(stats.norm.ppf(specificity) - separation))
        for name, limit in (("50", 0.5), ("chosen", THRESHOLD)):
            cut = special.logit(limit) + SHIFT
            recall, false_alarms = stats.norm.sf(cut - separation), stats.norm.sf(cut)
            found[f"recall_{name}"].append(recall)
            found[f"specificity_{name}"].append(1 - false_alarms)
            found[f"precision_{name}"].append(
                prevalence * recall / (prevalence * recall + (1 - prevalence) * false_alarms))
        mass = prevalence * malignant * (1 - scores) - (1 - prevalence) * benign * scores
        found["ece"].append(np.abs(np.bincount(bins, mass * step, classification.ECE_BINS)).sum())
        found["brier"].append(np.sum(prevalence * (1 - scores) ** 2 * malignant
                                     + (1 - prevalence) * scores ** 2 * benign) * step)
    return separations, {name: np.array(values) for name, values in found.items()}


def true_values(cell: Cell, table: tuple, separations: np.ndarray, gain: float) -> dict[str, np.ndarray]:
    """Every metric's truth for the two arms [2]: with one run that run's own, else the mean over runs to come."""
    at, values = table
    if cell.runs == 1:
        return {name: np.interp(separations[:, 0], at, column) for name, column in values.items()}
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    luck = REGIMES[cell.regime][1] * nodes
    return {name: np.array([np.interp(SEPARATION + gain * arm + luck, at, column) @ weights / weights.sum()
                            for arm in (0, 1)]) for name, column in values.items()}


# ------------------------------------------------------------------------------------------- the cells

def run(cell: Cell) -> dict:
    """The cell's figures: of each thing tested its level, of each interval its coverage (shares of the sets)."""
    rng = np.random.default_rng(zlib.crc32(json.dumps(asdict(cell)).encode()))
    return {"auroc": _auroc, "folds": _auroc, "metrics": _metrics, "subgroup": _subgroup, "readers": _readers}[cell.kind](cell, rng)


def _auroc(cell, rng):
    table = truth_of(0.1)
    tested, covered = [], []
    for number in range(cell.sets + cell.sets // 2):
        gain = GAIN if number >= cell.sets else 0.0
        several = [draw(rng, cell, gain) for _ in range(FOLDS if cell.kind == "folds" else 1)]
        labels, scores, patients = (np.concatenate([one[i] for one in several], axis=-1) for i in range(3))
        folds = np.repeat(np.arange(len(several)), len(several[0][0]))
        found = inference.delong_test(labels, scores[0], scores[1], folds * len(labels) + patients, folds if len(several) > 1 else None)
        if gain:
            first, second = np.mean([true_values(cell, table, one[3], gain)["auroc"] for one in several], axis=0)
            covered.append(found["low"] <= second - first <= found["high"])
        else:
            tested.append((found["difference"], found["se"], float(inference.critical(found["parts"])),
                           inference.detectable(found["parts"])))
    difference, se, critical, detectable = np.array(tested).T
    # the true power at the difference that each set's report prints, over all sets
    power = np.mean((difference + detectable[:, None]) / se > critical)
    return {"level": float(np.mean(np.abs(difference) / se > critical)), "coverage": float(np.mean(covered)),
            "power": float(power)}


def _metrics(cell, rng):
    labels = draw(rng, cell)[0]
    table = truth_of(labels.mean())
    rejected, differences, arms = ({name: [] for name in classification.METRICS} for _ in range(3))
    for number in range(cell.sets + cell.sets // 2):
        gain = GAIN if number >= cell.sets else 0.0
        labels, scores, patients, separations = draw(rng, cell, gain)
        runs = {arm: {seed: SimpleNamespace(labels=labels, scores=scores[place, seed], patients=patients,
                                            thresholds=np.full(len(labels), THRESHOLD)) for seed in range(cell.runs)}
                for place, arm in enumerate(("A1", "S2"))}
        results = comparison.analyse(runs, {("A1", "S2"): ""}, RESAMPLES, number, everywhere=True)
        true = true_values(cell, table, separations, gain)
        for name in classification.METRICS:
            cells = results["contrasts"][0]["metrics"][name], results["arms"]["A1"]["metrics"][name]
            if cells[0]["p"] is not None and not gain:
                rejected[name].append(cells[0]["p"] < comparison.ALPHA)
            if cells[0]["low"] is not None and gain:
                differences[name].append(cells[0]["low"] <= true[name][1] - true[name][0] <= cells[0]["high"])
            if cells[1]["low"] is not None:
                arms[name].append(cells[1]["low"] <= true[name][0] <= cells[1]["high"])
    return {name: {"level": _share(rejected[name]), "coverage": _share(differences[name]), "arm": _share(arms[name]),
                   "tests": len(rejected[name])} for name in classification.METRICS}


def _subgroup(cell, rng):
    """Recall of a group whose patients have 40 tiles each, over patients and (for contrast) over tiles."""
    noise, luck = REGIMES[cell.regime]
    patients = np.repeat(np.arange(cell.positives // cell.tiles), cell.tiles)
    over_patients, over_tiles = [], []
    for _ in range(cell.sets):
        lucks = luck * rng.normal(size=(cell.runs, 1))
        logits = SEPARATION - SHIFT + np.sqrt(OF_PATIENT) * rng.normal(size=patients.max() + 1)[patients] \
            + np.sqrt(1 - OF_PATIENT - noise) * rng.normal(size=len(patients)) \
            + np.sqrt(noise) * rng.normal(size=(cell.runs, len(patients))) + lucks
        true = float(stats.norm.cdf(lucks[0, 0])) if cell.runs == 1 else 0.5
        rate, low, high = inference.rate_over_patients(logits > 0, patients)
        naive = inference.clopper_pearson(rate * len(patients), len(patients))
        over_patients.append(low <= true <= high)
        over_tiles.append(naive[0] <= true <= naive[1])
    return {"coverage": float(np.mean(over_patients)), "naive": float(np.mean(over_tiles))}


def _readers(cell, rng):
    """Pooled d' of readers who differ (sd .2) and share tiles (.3 of the variance), and TOST with d' at its margin."""
    covered, equivalent = [], []
    for _ in range(cell.sets):
        for true in (0.4, readers.MARGIN):
            ratings, is_real = readers.simulate(rng, cell.runs, cell.positives, true, 0.0, 0.2, np.sqrt(0.3))
            pooled = readers.pool(*readers.jackknife(ratings, is_real)["d_prime"], is_real)
            if true == readers.MARGIN:
                equivalent.append(readers.tost(pooled.estimate, pooled.se, pooled.df) < readers.ALPHA)
            else:
                covered.append(pooled.low <= true <= pooled.high)
    return {"coverage": float(np.mean(covered)), "level": float(np.mean(equivalent))}


def _share(hits):
    return float(np.mean(hits)) if hits else None


# ------------------------------------------------------------------------------------------- the table

def tables(rows: list[dict]) -> str:
    """Markdown of the rows {cell, found} that are there."""
    by_kind = {kind: [row for row in rows if row["cell"]["kind"] == kind]
               for kind in ("auroc", "folds", "metrics", "subgroup", "readers")}
    lines = []
    for kind, title in (("auroc", "AUROC, DeLong"), ("folds", f"AUROC, DeLong within {FOLDS} folds (malignant tiles of each)")):
        lines += [f"{title}: level of the test, coverage of the interval, true power at the difference printed as found "
                  "four times in five", "", "| malignant tiles | a patient | runs | " + " | ".join(REGIMES) + " |",
                  "|--:|--:|--:|" + ":--|" * len(REGIMES)]
        found = {tuple(row["cell"][key] for key in ("positives", "tiles", "runs", "regime")): row["found"]
                 for row in by_kind[kind]}
        for key in sorted({key[:3] for key in found}):
            cells = [found.get((*key, regime)) for regime in REGIMES]
            lines.append(f"| {' | '.join(map(str, key))} | " + " | ".join(
                "–" if cell is None else f"{_short(cell['level'])}, {cell['coverage']:.1%}, {_short(cell['power'])}"
                for cell in cells) + " |")
        lines.append("")
    lines += ["Every metric by the bootstrap: level, coverage of the difference, coverage of an arm's figure; all "
              "regimes together (without gates)", ""]
    sizes = sorted({(row["cell"]["positives"], row["cell"]["tiles"], row["cell"]["runs"]) for row in by_kind["metrics"]})
    lines += ["| metric | " + " | ".join(f"{p} x {t}, {r} run{'s' * (r > 1)}" for p, t, r in sizes) + " |",
              "|:--|" + ":--|" * len(sizes)]
    for name, metric in classification.METRICS.items():
        cells = []
        for size in sizes:
            same = [row["found"][name] for row in by_kind["metrics"]
                    if (row["cell"]["positives"], row["cell"]["tiles"], row["cell"]["runs"]) == size]
            cells.append(", ".join(_mean(same, key) for key in ("level", "coverage", "arm")))
        lines.append(f"| {metric.title} | " + " | ".join(cells) + " |")
    lines += ["", "| rate within a group | patients | tiles a patient | runs | over patients | over tiles (not used) |",
              "|:--|--:|--:|--:|--:|--:|"]
    lines += [f"| recall | {row['cell']['positives'] // row['cell']['tiles']} | {row['cell']['tiles']} | "
              f"{row['cell']['runs']} | {row['found']['coverage']:.1%} | {row['found']['naive']:.1%} |"
              for row in by_kind["subgroup"]]
    lines += ["", "| readers | tiles of each class | coverage of d' | level of the equivalence test at its margin |",
              "|--:|--:|--:|--:|"]
    lines += [f"| {row['cell']['runs']} | {row['cell']['positives']} | {row['found']['coverage']:.1%} | "
              f"{_short(row['found']['level'])} |" for row in by_kind["readers"]]
    return "\n".join(lines)


def _short(value):
    return f"{value:.3f}".removeprefix("0")


def _mean(cells, key):
    values = [cell[key] for cell in cells if cell[key] is not None]
    if not values:
        return "–"
    return _short(np.mean(values)) if key == "level" else f"{np.mean(values):.1%}"


def main(argv: list[str] | None = None) -> None:
    """Simulate what is missing, then print the tables of what is there."""
    parser = argparse.ArgumentParser(prog="python -m lesion.stats.simulate", description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("simulation.jsonl"), help="a line a cell; gone on with")
    parser.add_argument("--quick", action="store_true", help="a few cells with few sets")
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop after the cell in which they have passed")
    args = parser.parse_args(argv)
    done = [json.loads(line) for line in args.out.read_text(encoding="utf8").splitlines()] if args.out.exists() else []
    started, cells = time.monotonic(), grid(args.quick)
    known = {json.dumps(row["cell"]) for row in done}
    todo = [cell for cell in cells if json.dumps(asdict(cell)) not in known]
    for cell in todo:
        if time.monotonic() - started > args.seconds:
            print(f"{len(done)} of {len(cells)} cells simulated; the same command goes on\n")
            break
        done.append({"cell": asdict(cell), "found": run(cell)})
        with open(args.out, "a", encoding="utf8") as file:
            file.write(json.dumps(done[-1]) + "\n")
    print(tables(done))


if __name__ == "__main__":
    main()

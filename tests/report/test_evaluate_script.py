"""evaluate.py on a classifier run: the report's words follow from its numbers; bad input overwrites nothing."""
import json

import numpy as np
import pytest
from made_runs import results_of, write_run

import evaluate
from lesion.classify import predictions
from lesion.classify.arms import Parts
from lesion.report import classification, page
from lesion.run import files
from lesion.stats import comparison


@pytest.mark.parametrize(("gain", "word"), [(2.0, "Supported"), (0.0, "Not distinguishable"), (-2.0, "Harmful")])
def test_headline_follows_the_numbers(tmp_path, gain, word):
    """Planted gain, no difference, planted loss: supported, not distinguishable, harmful, with the numbers."""
    write_run(tmp_path, {"O1": 0.0, "S2": gain})
    results = results_of(tmp_path)
    text = classification.finding(results)
    assert text.startswith(word)
    assert f"{abs(results['contrasts'][0]['metrics']['auroc']['difference']):.3f}" in text
    assert ("would be found four times in five" in text) == (gain == 0)
    assert "one run" not in text
    assert "exploratory" not in text


@pytest.mark.parametrize(("gain", "words"), [
    (2.0, "In this one run synthetic malignant tiles rank test tiles better"),
    (0.0, "Not distinguishable: this one run does not show"),
    (-2.0, "In this one run synthetic malignant tiles rank test tiles worse")])
def test_one_seed_is_one_run(tmp_path, gain, words):
    """With a single seed the sentence itself says so, and nothing is supported or harmful, whatever the gain."""
    write_run(tmp_path, {"O1": 0.0, "S2": gain}, seeds=1)
    results = results_of(tmp_path)
    text = classification.finding(results)
    assert text.startswith(words)
    assert "upported" not in text + " ".join(classification.remarks(results))
    assert "armful" not in text + " ".join(classification.remarks(results))
    if gain == 0:
        assert "With 40 malignant test tiles and one training run only a difference of about" in text


@pytest.mark.parametrize(("setting", "why"), [
    ({"seeds": 2}, "2 training runs tell too little of the next ones"),
    ({"malignant": 9, "benign": 45}, "test tiles that are malignant come from 9 patients and at least 10 are needed"),
    ({"malignant": 20, "benign": 100}, "there are 20 malignant test tiles and at least 28 are needed"),
    ({"malignant": 1, "benign": 20}, "test tiles that are malignant come from 1 patient and at least 10 are needed")])
def test_too_few_for_a_verdict(tmp_path, setting, why):
    """Two seeds, nine patients with malignant tiles, a single malignant tile: the difference, the reason, no verdict, no
    interval; the whole section is still built."""
    write_run(tmp_path, {"O1": 0.0, "S2": 2.0}, **setting)
    results = results_of(tmp_path)
    text = classification.finding(results)
    assert text.startswith("Too few for a verdict")
    assert why in text
    assert f"{page.difference(results['contrasts'][0]['metrics']['auroc'])})" in text
    assert "four times in five" not in text
    blocks, _, _ = classification.build(tmp_path, None)
    rows = next(block["rows"] for block in blocks if block.get("caption", "").startswith("Differences, "))
    assert {row[5] for row in rows} == {comparison.TOO_FEW}
    assert not any("[" in cell for row in rows for cell in row)


@pytest.mark.parametrize(("first", "second"), [("constant", "perfect"), ("constant", "constant"), ("perfect", "perfect")])
def test_scores_without_error_are_not_judged(tmp_path, first, second):
    """A perfect arm against a constant one, constant arms, perfect arms: neither certain nor without difference."""
    rows = [{"file_name": f"{i}.jpg", "label": ("benign", "malignant")[i % 3 == 0], "patient_id": f"P{i}"} for i in range(240)]
    parts = Parts([], rows[:120], rows[120:], False)
    labels = np.array([row["label"] == "malignant" for row in rows])
    kinds = {"constant": np.full(240, 0.5), "perfect": labels * 1.0}
    for arm, kind in (("O1", first), ("S2", second)):
        for seed in range(3):
            scores = kinds[kind]
            predictions.write(tmp_path / arm / f"seed{seed}" / "predictions.csv", parts, scores[:120], scores[120:])
    results = results_of(tmp_path)
    text = classification.finding(results)
    assert text.startswith("Cannot be computed")
    assert "four times in five" not in text
    assert "[" not in text
    said = " ".join(classification.remarks(results))
    assert "cannot be computed for AUROC" in said


def test_headline_never_claims_without_the_control(tmp_path):
    """Without O1 the gain could be the class balance, and the text says so; without a contrast nothing is claimed."""
    write_run(tmp_path / "a", {"A1": 0.0, "S2": 2.0})
    text = classification.finding(results_of(tmp_path / "a"))
    assert "O1, the control for the changed class balance, was not run" in text
    assert "this contrast is exploratory" in text
    write_run(tmp_path / "b", {"B0": 0.0, "W1": 2.0})
    assert "nothing is claimed" in classification.finding(results_of(tmp_path / "b"))


def test_shifted_threshold_is_called_so(tmp_path):
    """Scores raised without better ranking: more recall at .5, less specificity; said to be a shifted threshold."""
    write_run(tmp_path, {"O1": 0.0, "S2": 0.0}, shift={"S2": 1.5})
    text = " ".join(classification.remarks(results_of(tmp_path)))
    assert "at 0.5" in text
    assert "a shifted threshold, not a better classifier" in text
    blocks, _, _ = classification.build(tmp_path, None)
    rows = {row[1]: row for block in blocks if block.get("caption", "").startswith("Differences, ") for row in block["rows"]}
    assert rows["recall at 0.5"][5] == rows["specificity at 0.5"][5] == comparison.SHIFTED
    assert rows["AUROC (primary)"][3] == rows["AUROC (primary)"][4]
    assert rows["ECE"][2:5] == [rows["ECE"][2].split(" ")[0], "–", "–"]


def test_published_columns_say_so(tmp_path):
    """Every column of the study's own numbers is named published, beside ours of the same name."""
    write_run(tmp_path, {"A1": 0.0, "S2": 0.0}, seeds=1)
    blocks, _, _ = classification.build(tmp_path, None)
    table = next(block for block in blocks if block.get("caption", "").startswith("Results with 95 % intervals"))
    assert [name.split(" (")[0] for name in table["header"][3:]] == [
        "recall at 0.5", "AUROC", "AUPRC", "published recall", "published AUROC", "published AUPRC"]
    assert next(row for row in table["rows"] if row[0] == "S2")[6:] == ["0.65", "0.900", "0.433"]


def test_limits_are_said(tmp_path):
    """One seed, few malignant tiles, arms not run, notes of the run: each is said."""
    write_run(tmp_path, {"O1": 0.0, "S2": 0.0}, seeds=1)
    text = " ".join(classification.limits(results_of(tmp_path) | {"run": {"notes": ["something odd"]}}))
    for words in ("single training seed", "40 malignant test tiles: no interval is given for recall at 90 % specificity",
                  "ECE and pAUC have no interval", "Not run: B0, A1, W1 and S2w.", "Something odd."):
        assert words in text
    write_run(tmp_path / "many", {"O1": 0.0, "S2": 0.0}, seeds=1, malignant=60, benign=300)
    assert "no interval is given for" not in " ".join(classification.limits(results_of(tmp_path / "many")))


@pytest.mark.parametrize("notes", [[5], [""], {"a": 1}])
def test_damaged_notes_are_named(tmp_path, notes):
    """Notes in args.json that are no sentences: one line, before anything is computed."""
    files.write_json(tmp_path / "args.json", {"notes": notes})
    with pytest.raises(ValueError, match="args.json is damaged: notes is"):
        classification.read_args(tmp_path)



def test_report_from_predictions_alone(tmp_path, run_script):
    """Six arms, subgroups from the data set, all files written, figures embedded; made again, the same bytes."""
    gains = {"B0": -0.5, "A1": 0.0, "W1": 0.1, "S2": 0.2, "S2w": 0.2, "O1": 0.1}
    rows = write_run(tmp_path / "run", gains)
    for number, row in enumerate(rows):
        row |= {"attributes": {"skin_tone": ("light", "dark")[number % 7 == 0]}, "split": "test",
                "metadata": {"tbp_tile_type": "3D: XP"}}
    (tmp_path / "data").mkdir()
    files.write_manifest(tmp_path / "data", rows)
    arguments = ["--classify", tmp_path / "run", "--data", tmp_path / "data", "--out", tmp_path / "report"]
    result = run_script("evaluate.py", *arguments)
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    # answer, contrasts, curves, confusion on the first page and below, calibration; three of them also for narrow screens
    assert html.count("data:image/svg+xml;base64,") == 6 + 3
    for words in ("0.65", "O1 → S2", "p (Holm)", "skin tone", "3D: XP", "too few", "McNemar", "W1"):
        assert words in html
    numbers = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))["classification"]
    assert set(numbers["arms"]) == set(gains)
    assert {row["group"]: row["n"] for row in numbers["subgroups"]} == {"dark": 34, "light": 206, "3D: XP": 240}
    assert {path.name for path in (tmp_path / "report" / "figures").glob("*.*")} == {
        f"{stem}.{ending}" for stem in ("answer", "contrasts", "curves", "confusion", "calibration") for ending in ("png", "svg")}
    before = {path: path.read_bytes() for path in (tmp_path / "report").rglob("*.*")}
    evaluate.main([str(argument) for argument in arguments])
    assert {path: path.read_bytes() for path in (tmp_path / "report").rglob("*.*")} == before


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda run, data: (run / "S2/seed0/predictions.csv").write_text("id,label\n", encoding="utf-8"), "no column 'score'"),
    (lambda run, data: files.write_manifest(data, [{"file_name": "images/other.jpg", "label": "benign"}]),
     "predictions of another data set"),
    (lambda run, data: [path.unlink() for path in run.rglob("predictions.csv")], "run classify.py"),
])
def test_bad_input_overwrites_nothing(tmp_path, spoil, words):
    """A torn table, another data set's predictions, none at all: one line, and the earlier report stays."""
    run, data, out = tmp_path / "run", tmp_path / "data", tmp_path / "report"
    files.write_manifest(data, write_run(run, {"A1": 0.0, "S2": 0.5}, seeds=1))
    (out / "figures").mkdir(parents=True)
    (out / "report.html").write_text("earlier", encoding="utf-8")
    spoil(run, data)
    with pytest.raises(ValueError, match=words):
        evaluate.main(["--classify", str(run), "--data", str(data), "--out", str(out)])
    assert (out / "report.html").read_text(encoding="utf-8") == "earlier"
    assert [path.name for path in out.rglob("*.*")] == ["report.html"]


def test_nothing_to_report(tmp_path, monkeypatch):
    """Where no command has left anything: which to run, or which flag to give."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give --classify"):
        evaluate.main([])


def test_arms_of_other_tests_do_not_mix(tmp_path):
    """A run among the others that was tested on other tiles is named."""
    write_run(tmp_path, {"A1": 0.0}, seeds=1)
    write_run(tmp_path, {"S2": 0.0}, seeds=1, malignant=20)
    with pytest.raises(ValueError, match="S2/seed0 was tested on other tiles than A1/seed0"):
        evaluate.main(["--classify", str(tmp_path), "--out", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


@pytest.fixture
def three(tmp_path):
    """(folder, runs, results) of four arms whose numbers differ everywhere."""
    write_run(tmp_path, {"A1": 0.0, "W1": 0.2, "S2": 0.5, "S2w": 0.1, "O1": 0.3}, shift={"S2": 0.7, "W1": -0.4})
    runs = predictions.read_runs(tmp_path)
    return tmp_path, runs, results_of(tmp_path)


def test_every_cell_stands_under_its_header(three):
    """Raw p and Holm's, McNemar's counts, counts at both thresholds, subgroups: each column holds what its header says."""
    _, runs, results = three
    by_pair = {(f"{row['first']} → {row['second']}", classification.classification.METRICS[name].title): row["metrics"][name]
               for row in results["contrasts"] for name in classification.classification.SHOWN["differences"]}
    for pair, title, difference, p, holm, word in classification._contrast_table(results)["rows"]:
        cell = by_pair[pair, title.removesuffix(" (primary)")]
        assert [difference, p, holm, word] == [
            page.difference(cell), page.p_value(cell["p"]), page.p_value(cell["p_holm"]), cell["verdict"]]
    assert any(cell["p"] != cell["p_holm"] for cell in by_pair.values())
    table = classification._mcnemar_table(results)
    assert table["header"][3:7] == ["both", "first only", "second only", "neither"]
    cell = results["contrasts"][0]["mcnemar"]["50"]["malignant"]
    assert cell["first_only"] != cell["second_only"]
    assert table["rows"][0][1:7] == ["malignant", "0.5", *(str(cell[key]) for key in ("both", "first_only", "second_only", "neither"))]
    table = classification._more_table(results)
    rows, place = {row[0]: row[1:] for row in table["rows"]}, table["header"].index("S2") - 1
    for title, key in (("counts at 0.5", "50"), ("counts at the chosen threshold", "chosen")):
        count = results["arms"]["S2"]["confusion"][key]
        line = rows[f"{title}: found, missed; false alarms, let pass"]
        assert line[place] == "{:.1f}, {:.1f}; {:.1f}, {:.1f}".format(*(count[name] for name in ("tp", "fn", "fp", "tn")))
    assert results["arms"]["S2"]["confusion"]["50"] != results["arms"]["S2"]["confusion"]["chosen"]
    results["subgroups"] = comparison.subgroups(runs, {"site": np.repeat(["arm", "leg"], 120)})
    table = classification._subgroup_table(results)
    for row, found in zip(table["rows"], results["subgroups"], strict=True):
        for header, text in list(zip(table["header"], row))[4:]:
            kind, arm = header.split()
            assert text == page.interval(found["arms"][arm][kind], digits=2)


def test_the_headline_has_the_corrected_p(three):
    """Without O1 the contrast is exploratory: the p in the sentence is Holm's, as it says."""
    _, _, results = three
    results["contrasts"] = [row for row in results["contrasts"] if row["first"] != "O1"]
    cell = results["contrasts"][0]["metrics"]["auroc"]
    cell |= {"verdict": comparison.SUPPORTED, "p": 0.011, "p_holm": 0.033}
    assert "corrected p .033)" in classification.finding(results)


def test_fewer_found_is_said_as_such(tmp_path):
    """Scores lowered without another ranking: fewer malignant tiles found and fewer benign ones called malignant."""
    write_run(tmp_path, {"O1": 0.0, "S2": 0.0}, shift={"S2": -1.5})
    text = " ".join(classification.remarks(results_of(tmp_path)))
    assert "S2 finds fewer malignant tiles than O1 at 0.5" in text
    assert "calls fewer benign tiles malignant" in text
    assert "not a worse classifier" in text


def test_the_setting_counts_the_right_tiles(three):
    """DS1, what is added, and validation: eight different numbers, each in its place; what a fold keeps together."""
    counts = {"train": {"benign": 1001, "malignant": 202}, "val": {"benign": 303, "malignant": 44},
              "test": {"benign": 505, "malignant": 66},
              "added": 77}
    args = {"counts": [counts], "arch": "resnet18", "weights": "none", "image_size": 64, "epochs": 4, "batch_size": 32, "lr": 1e-3,
            "augmentation": "traditional"}
    text = classification.setting(three[2], args)
    assert "DS1 holds 1,001 benign and 202 malignant tiles, DS2 and O1 77 malignant ones more; 303 benign and 44 malignant" in text
    for patients, unit in ((9, "5 folds of patients;"), (None, "5 folds of tiles, near copies together;")):
        assert unit in classification.setting(three[2] | {"patients": patients}, args | {"folds": 5})


def test_few_seeds_of_any_arm_are_a_limit(tmp_path):
    """Three seeds of one arm and five of another: said, by the fewest."""
    write_run(tmp_path, {"O1": 0.0}, seeds=5)
    write_run(tmp_path, {"S2": 0.0}, seeds=3)
    assert "3 training seeds (5 are the protocol's least" in " ".join(classification.limits(results_of(tmp_path)))


def test_the_figures_show_the_arms_numbers(three):
    """Confusion at the chosen threshold, each row a true class; curves of the arm that is named, in the panel that is named; chance
    at the prevalence; calibration's x is the score and y what was observed; the forest's lines are the intervals."""
    folder, runs, results = three
    _, results, figures = classification.build(folder, None)
    count = results["arms"]["S2"]["confusion"]["chosen"]
    axis = next(axis for axis in figures["confusion"].axes if axis.get_title() == "S2")
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    assert shown[0, 0].endswith(f"\n{count['tp'] / (count['tp'] + count['fn']):.0%}")
    assert shown[1, 0].endswith(f"\n{count['fn'] / (count['tp'] + count['fn']):.0%}")
    assert shown[0, 1].endswith(f"\n{count['fp'] / (count['fp'] + count['tn']):.0%}")
    axes = {axis.get_title(): number for number, axis in enumerate(figures["curves"].axes)}
    upper = figures["curves"].axes[axes["O1 and S2"]]
    lower = figures["curves"].axes[axes["O1 and S2"] + 3]
    for arm in ("O1", "S2"):
        bands = comparison.curve_bands(runs[arm])
        for axis, kind in ((upper, "roc"), (lower, "pr")):
            line = next(line for line in axis.lines if line.get_label() == arm)
            assert np.allclose(line.get_ydata(), bands[kind][1])
    assert any(np.allclose(line.get_ydata(), results["prevalence"]) for line in lower.lines if line.get_linestyle() == ":")
    axis = next(axis for axis in figures["calibration"].axes if axis.get_title() == "S2")
    points = [(line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor()) for line in axis.lines if line.get_marker() == "o"]
    for (x, y, colour), row in zip(points, results["calibration"]["S2"], strict=True):
        assert x == pytest.approx(row["mean_score"])
        assert (colour == "white") == (row["malignant"] == 0)
        assert row["malignant"] == 0 or y == pytest.approx(row["observed"])
    axis = figures["contrasts"].axes[0]
    spans = [tuple(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert spans == [(row["metrics"]["auroc"]["low"], row["metrics"]["auroc"]["high"]) for row in results["contrasts"]]

"""The reader section of the report: the figures of the statistics, unmixed, in words, tables and a legible picture."""
import json

import numpy as np
import pytest
from study_sets import real_set, synthetic_set

from lesion.report import page, plots
from lesion.report import readers as report_readers
from lesion.stats import readers as reader_study
from lesion.web import study_folder
from lesion.web.journal import Journal


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    base = tmp_path_factory.mktemp("sets")
    return {"real": real_set(base / "real", 12), "synthetic": synthetic_set(base / "synthetic", 12)}


def read_study(folder, sets, readers, d_prime, asks=False):
    """A finished study of simulated readers; returns their ratings in the order of the study's tiles."""
    study = study_folder.create(folder, **sets, count=12, readers=readers, seed=1, resolution=16,
                                question_malignancy=asks)
    ratings, _ = reader_study.simulate(np.random.default_rng(3), readers, 12, d_prime)
    column = {tile["id"]: number for number, tile in enumerate(study["tiles"])}
    for number, entry in enumerate(study["readers"]):
        lines = [{"event": "consent"}] + [
            {"event": "answer", "tile": tile, "rating": int(ratings[number, column[tile]]), "client_s": 4.0,
             "malignant": number == 0 if asks else None} for tile in study_folder.order_of(study, number)]
        path = study_folder.journal_path(folder, entry)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return ratings


def cells(blocks, caption):
    """The rows of the table whose caption starts so: {first cell: the others}."""
    rows = next(block["rows"] for block in blocks if block.get("caption", "").startswith(caption))
    return {row[0]: row[1:] for row in rows}


def words(blocks):
    return [block["text"] for block in blocks if block["kind"] == "paragraph"]


def test_section_says_what_the_statistics_say(sets, tmp_path):
    """Answers on disk -> section: rates, d', kappa and verdict are those computed from the ratings directly."""
    ratings = read_study(tmp_path / "s", sets, 5, 1.5)
    blocks, results, _ = report_readers.build(tmp_path / "s")
    is_real = np.repeat([True, False], 12)
    expected = reader_study.analyse([f"reader-{number}" for number in range(1, 6)], ratings, is_real)
    assert words(blocks)[0] == expected["verdict"]
    assert "120 answers of 5 reader(s)" in words(blocks)[1]
    table = cells(blocks, "Each reader")
    for number, row in enumerate(expected["readers"]):
        line = table[f"reader-{number + 1}"]
        assert line[0].startswith(f"{(ratings[number, :12] >= 4).sum()} of 12, ")
        assert line[1].startswith(f"{(ratings[number, 12:] < 4).sum()} of 12, ")
        expected_d = f"{row['d_prime']:.2f} [{row['d_prime_low']:.2f}, {row['d_prime_high']:.2f}]"
        assert line[5].replace("\u00a0", " ") == expected_d.replace("-", "−")
        assert line[8] == "4.0"
    pooled = expected["pooled"]["d_prime"]
    expected_d = f"{pooled['estimate']:.2f} [{pooled['low']:.2f},\u00a0{pooled['high']:.2f}]"
    assert cells(blocks, "All readers")["d'"][0] == expected_d.replace("-", "−")
    kappa = reader_study.cohen_kappa(ratings[0] >= 4, ratings[1] >= 4)
    assert cells(blocks, "Agreement")["reader-1 and reader-2"] == ["24", f"{kappa:.2f}".replace("-", "−")]
    json.dumps(results, allow_nan=False)


def test_the_published_study_stands_beside_it(sets, tmp_path):
    """The seed study's row: 66.5 % and 49.5 % right, 58 %, p .002 (.0016), d' .414, c -.219."""
    read_study(tmp_path / "s", sets, 1, 0.5)
    line = cells(report_readers.build(tmp_path / "s")[0], "Each reader")["published study, all answers"]
    assert line == ["133 of 200, 66.5%", "99 of 200, 49.5%", "58.0%", ".002", "", "0.414", "−0.219", "", ""]


def test_one_reader_and_the_second_question(sets, tmp_path):
    """One reader: no agreement table, and a verdict for this reader only. The second question has its own table."""
    read_study(tmp_path / "one", sets, 1, 0.5, asks=True)
    blocks, _, _ = report_readers.build(tmp_path / "one")
    assert not any(block.get("caption", "").startswith("Agreement") for block in blocks)
    assert "not for other readers" in words(blocks)[0]
    assert cells(blocks, "Tiles called malignant")["reader-1"] == ["100%", "100%", "+0%"]


def test_damaged_lines_and_missing_readers_are_told(sets, tmp_path):
    """A cut journal line and a reader who hardly began are named in the section; a damaged folder is one line."""
    read_study(tmp_path / "s", sets, 2, 1.0)
    study = study_folder.load(tmp_path / "s")
    path = study_folder.journal_path(tmp_path / "s", study["readers"][0])
    path.write_text(path.read_text(encoding="utf-8").replace('"rating"', '"rat', 1), encoding="utf-8")
    study_folder.add_readers(tmp_path / "s", study, 3)
    with Journal(study_folder.journal_path(tmp_path / "s", study["readers"][2])) as journal:
        journal.append({"event": "consent"})
    said = words(report_readers.build(tmp_path / "s")[0])
    assert any("line 2: skipped" in line for line in said)
    assert "Left out, too few answers: reader-3: 0 real and 0 synthetic tiles answered." in said
    (tmp_path / "s" / "study.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="was cut or edited"):
        report_readers.build(tmp_path / "s")


def test_figure_shows_every_reader_and_the_pool(sets, tmp_path):
    """The picture has a row for each reader and for all, both rates at their values, and no label outside of it."""
    ratings = read_study(tmp_path / "s", sets, 4, 1.0)
    blocks, results, figures = report_readers.build(tmp_path / "s")
    chart = figures["readers"]
    rates, distance = chart.axes
    assert [label.get_text() for label in rates.get_yticklabels()] == [
        "reader-1", "reader-2", "reader-3", "reader-4", "all readers"]
    real, synthetic = (container.lines[0].get_xdata() for container in rates.containers)
    assert np.allclose(real[:4], 100 * (ratings[:, :12] >= 4).mean(1))
    assert np.allclose(synthetic[:4], 100 * (ratings[:, 12:] < 4).mean(1))
    assert np.isclose(distance.containers[1].lines[0].get_xdata()[0], results["pooled"]["d_prime"]["estimate"])
    chart.savefig(tmp_path / "figure.png", dpi=60)
    box = chart.get_tightbbox()
    assert box.width <= chart.get_figwidth() + 0.01
    assert box.height <= chart.get_figheight() + 0.01
    for stem, figure in figures.items():
        plots.save(figure, tmp_path / "out" / "figures", stem)
    page.write(tmp_path / "out", "Readers", blocks, results)
    assert "data:image/svg+xml" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_command_reports_a_study(sets, tmp_path, run_script):
    """evaluate.py --study: the verdict printed, the numbers in results.json, the page and the figure; a folder that is
    no study is exit code 2 and one line, with nothing written."""
    read_study(tmp_path / "s", sets, 3, 1.5)
    done = run_script("evaluate.py", "--study", tmp_path / "s", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["readers"]
    assert results["verdict"] in done.stdout
    assert results["verdict"].split("(")[0] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "figures" / "readers.png").stat().st_size > 0
    bad = run_script("evaluate.py", "--study", sets["real"], "--out", tmp_path / "none")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "is not a study" in bad.stderr
    assert not (tmp_path / "none").exists()


def test_every_column_holds_its_own_figure(sets, tmp_path):
    """Each reader's and the pooled figures stand under their names; the picture's bars are the rates' own intervals."""
    read_study(tmp_path / "s", sets, 5, 1.0)
    blocks, results, figures = report_readers.build(tmp_path / "s")
    table = cells(blocks, "Each reader")
    for row in results["readers"]:
        line = table[row["reader"]]
        assert line[0].endswith(f", {report_readers._share(row['real_rate'], row['real_low'], row['real_high'])}")
        assert line[1].endswith(f", {report_readers._share(row['synthetic_rate'], row['synthetic_low'], row['synthetic_high'])}")
        assert line[2] == report_readers._share(row["correct_rate"], row["correct_low"], row["correct_high"])
        assert line[3:5] == [page.p_value(row["p"]), page.p_value(row["p_holm"])]
        assert line[7] == page.interval({"mean": row["area"], "low": row["area_low"], "high": row["area_high"]}, digits=2)
    assert any(row["p"] != row["p_holm"] for row in results["readers"])
    table = cells(blocks, "All readers")
    for name, text in (("real_rate", "real tiles right"), ("synthetic_rate", "synthetic tiles right"), ("correct", "right, mean of both")):
        row = results["pooled"][name]
        assert table[text] == [report_readers._share(row["estimate"], row["low"], row["high"]), page.number(row["df"], 1),
                               page.number(row["reader_sd"], 2)]
    assert table["d' within ±0.5 (TOST)"][0] == f"p = {page.p_value(results['equivalence']['p'])}"
    for kind, container in zip(("real", "synthetic"), figures["readers"].axes[0].containers):
        spans = [sorted(segment[:, 0]) for segment in container.lines[2][0].get_segments()]
        assert np.allclose(spans[:5], [[100 * row[f"{kind}_low"], 100 * row[f"{kind}_high"]] for row in results["readers"]])


def test_the_difference_is_real_minus_synthetic():
    """80 % of real and 30 % of synthetic tiles called malignant: +50 %, a reader and all."""
    pooled = {"real": {"estimate": 0.8, "low": 0.7, "high": 0.9}, "synthetic": {"estimate": 0.3, "low": 0.2, "high": 0.4},
              "difference": {"estimate": 0.5, "low": 0.4, "high": 0.6}}
    table = report_readers._malignancy({"malignancy": pooled | {"readers": [{"reader": "a", "real": 0.8, "synthetic": 0.3}]}})
    assert table["rows"][0] == ["a", "80%", "30%", "+50%"]
    assert [cell.split(" ")[0] for cell in table["rows"][1]] == ["mean", "80%", "30%", "+50%"]

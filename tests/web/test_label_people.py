"""Several people on one server, progress, adjudication, tables of labels, and starts that fail without a trace."""
import csv
import io
import json
import os
import secrets
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from lesion.describe.prompts import NAMES, VOCABULARY
from lesion.mini.phantoms import write_demo
from lesion.run import cells, files
from lesion.web import label, label_adjudicate, label_desk, label_export, label_folder, label_pages
from lesion.web.journal import Journal

ORIGIN = {"Origin": "http://localhost"}
TOKEN = "correct-horse-battery"
MALIGNANT = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, benign=1, malignant=MALIGNANT)
    return folder


@pytest.fixture
def data(made, tmp_path):
    """A fresh copy of the demo set."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for path in [made / "dataset.json", made / "metadata.jsonl", *(made / "images").iterdir()]:
        (folder / path.relative_to(made)).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def lab(data):
    """Anna and Ben on one server, with an adjudicator."""
    class Lab:
        folder = data
        rows = label_folder.select(data, "malignant")[0]

        def __init__(self, opened):
            self.secret, self.links = label_folder.people(data, ["anna", "ben"])
            desks = {link: self.desk(opened, name) for name, link in self.links.items()}
            self.desks = {desk.annotator: desk for desk in desks.values()}
            said = {name: desk.labels for name, desk in self.desks.items()}
            self.bench = label_adjudicate.Bench(self.desk(opened, "adjudicator"), said)
            self.app = label_pages.create_app(data, desks, TOKEN, secret=self.secret, bench=self.bench)
            self.client = self.app.test_client()

        def desk(self, opened, name):
            journal = opened.enter_context(Journal(label_folder.journal_path(data, name), label_folder.check_row))
            return label_desk.Desk(data, self.rows, name, journal)

        def say(self, name, number, answers, client=None):
            tile = self.desks[name].tile(number)
            reply = (client or self.client).post(f"/p/{self.links[name]}/answer", headers=ORIGIN, json={
                "id": os.urandom(8).hex(), "tile": number, "revision": tile.revision, "answers": answers})
            assert reply.status_code == 200, reply.text
    with ExitStack() as opened:
        yield Lab(opened)


def test_everyone_by_a_link_and_progress_by_the_token(lab):
    """A link opens its owner's desk and no other's; without it nothing; the page of progress needs the token and tells
    how far each is. Links stay over a restart, in a file that only the owner reads."""
    client = lab.client
    assert "Please open the personal link" in client.get("/").text
    assert client.get("/p/wrong/").status_code == 404
    assert client.get("/progress").status_code == 401
    assert client.get("/progress/labels.csv").status_code == 401
    assert client.get("/adjudicate").status_code == 401
    lab.say("anna", 0, {"edge": "sharp"})
    assert ">anna" in client.get(f"/p/{lab.links['anna']}/").text
    assert client.get(f"/p/{lab.links['ben']}/state").json["questions"][7]["answered"] is False
    assert [len(lab.desks[name].journal.rows) for name in ("anna", "ben")] == [1, 0]
    client.get(f"/progress?token={TOKEN}")
    page = client.get("/progress").text
    assert page.count("Copy link") == 2
    assert "labelling" in page
    assert "not started" in page
    again = label_folder.people(lab.folder, ["anna", "ben", "carl"])
    assert again[0] == lab.secret
    assert {name: again[1][name] for name in ("anna", "ben")} == lab.links
    assert stat.S_IMODE((lab.folder / "labels" / "links.json").stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="two people named Anna"):
        label_folder.people(lab.folder, ["anna", "Anna"])


def test_many_wrong_links_slow_down_and_right_ones_pass(lab):
    """Guessing links ends in 429; who has a link goes on."""
    codes = [lab.client.get(f"/p/guess{n}/").status_code for n in range(30)]
    assert codes[:10] == [404] * 10
    assert codes[-1] == 429
    assert lab.client.get(f"/p/{lab.links['anna']}/").status_code == 200


def disagree(lab):
    """Anna and Ben differ in 20 answers, agree in 5."""
    for number in range(MALIGNANT):
        for name in ("symmetry", "shape", "border", "edge", "surface"):
            values = [list(NAMES[name][:2]), []] if VOCABULARY[name].many else NAMES[name][:2]
            lab.say("anna", number, {name: values[0]})
            lab.say("ben", number, {name: values[0] if name == "edge" else values[1]})


def test_twenty_disagreements_are_decided(lab):
    """Only what differs is shown, answers with their people; twenty decisions, one undone and made again, one for a third
    value; the journal holds them and what was agreed; a late tab is told; as the primary they reach the manifest."""
    disagree(lab)
    lab.client.get(f"/adjudicate?token={TOKEN}")
    state = lab.client.get("/adjudicate/state").json
    assert state["cases"] == 20
    seen = []

    def decide(state, value, status=200):
        reply = lab.client.post("/adjudicate/decide", headers=ORIGIN, json={
            "id": os.urandom(8).hex(), "tile": state["tile"], "attribute": state["attribute"], "value": value,
            "revision": state["revision"]})
        assert reply.status_code == status, reply.text
        return reply.json
    while state["at"] is not None:
        assert [option["people"] for option in state["options"]] == [["anna"], ["ben"]]
        assert state["attribute"] != "edge"
        seen.append((state["tile"], state["attribute"]))
        after = decide(state, state["options"][len(seen) % 2]["value"])
        if len(seen) == 7:
            decide(state, state["options"][1]["value"], 409)
            undone = lab.client.post("/adjudicate/undo", headers=ORIGIN, json={"id": os.urandom(8).hex(), "undo": after["undo"]})
            assert (undone.json["tile"], undone.json["attribute"]) == seen[-1]
            after = decide(undone.json, "oval" if undone.json["attribute"] == "shape" else None)
        state = after
    assert len(set(seen)) == 20
    assert state["decided"] == 20
    labels = label_folder.read_labels(lab.folder, "adjudicator")
    for row in lab.rows:
        tile = labels.tiles[row["file_name"]]
        assert tile.was == {"symmetry": "adjudicated", "shape": "adjudicated", "border": "adjudicated", "edge": "agreed",
                            "surface": "adjudicated"}
    label_folder.set_primary(lab.folder, "adjudicator")
    label_folder.sync(lab.folder)
    assert all(row["annotator"] == "adjudicator" for row in files.read_manifest(lab.folder) if row["label"] == "malignant")
    before = len(lab.bench.desk.journal.rows)
    assert lab.bench.keep_agreed() == 0
    assert len(lab.bench.desk.journal.rows) == before


@pytest.mark.parametrize("form", [
    {}, {"value": "oval"}, {"value": "square", "revision": 0}, {"value": "oval", "revision": True},
    {"value": "oval", "revision": 0, "tile": "0"}, {"value": "oval", "revision": 0, "attribute": "edge"}, {"id": 5}, []])
def test_senseless_decisions_change_nothing(lab, form):
    """Other types, values outside the vocabulary, cases that are none: 400 in one line, nothing in the journal."""
    lab.say("anna", 0, {"shape": "round"})
    lab.say("ben", 0, {"shape": "oval"})
    lab.client.get(f"/adjudicate?token={TOKEN}")
    body = {"id": "12345678", "tile": 0, "attribute": "shape"} | form if isinstance(form, dict) else form
    reply = lab.client.post("/adjudicate/decide", json=body, headers=ORIGIN)
    assert reply.status_code == 400
    assert lab.bench.desk.journal.rows == []


def test_the_table_goes_out_and_comes_back(lab, data, tmp_path, capsys):
    """Export, a change in a spreadsheet, import under the same and under another name: the same labels, flags and
    comments; what stood already adds no row; a comment like a formula is disarmed and comes back as it was."""
    lab.say("anna", 0, {"shape": "oval"})
    lab.say("anna", 0, {"surface": ["scale", "ulcer"]})
    lab.say("anna", 1, {"surface": []})
    lab.say("anna", 1, {"edge": None})
    anna = lab.desks["anna"]
    anna.write({"event": "comment", "id": "1" * 8, "tile": lab.rows[0]["file_name"], "text": "=cmd|' /C calc'!A0"})
    anna.write({"event": "flag", "id": "2" * 8, "tile": lab.rows[1]["file_name"], "flagged": True})
    text = lab.client.get(f"/p/{lab.links['anna']}/labels.csv").text
    table = list(csv.DictReader(io.StringIO(text)))
    assert len(table) == MALIGNANT
    assert table[0]["comment"] == "'=cmd|' /C calc'!A0"
    assert (table[0]["surface"], table[1]["surface"], table[1]["edge"], table[2]["edge"]) == ("scale; ulcer", "none", "cannot tell", "")
    path = tmp_path / "labels.csv"
    path.write_text(text.replace(",anna,", ",carl,").replace(",", ";").replace("scale; ulcer", "\"scale; ulcer\""), encoding="utf-8-sig")
    label.main([str(data), "--import-csv", str(path), "--annotator", "carl"])
    carl = label_folder.read_labels(data, "carl")
    for row in lab.rows:
        mine, hers = carl.tile(row["file_name"]), anna.labels.tile(row["file_name"])
        assert (mine.answers, mine.flagged, mine.comment) == (hers.answers, hers.flagged, hers.comment)
    label.main([str(data), "--import-csv", str(path), "--annotator", "carl"])
    assert "says nothing that carl has not said" in capsys.readouterr().out
    label.main([str(data), "--export-csv", str(tmp_path / "all.csv")])
    everyone = csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text(encoding="utf-8")))
    assert {row["annotator"] for row in everyone} == {"anna", "carl"}


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.replace("file_name,isic_id", "name,id"), "no column file_name"),
    (lambda t: t.replace("surface", "surfaces"), "no column 'surfaces' is known"),
    (lambda t: t.replace("images/", "other/", 1).replace("isic_id", "comment2", 0), "no tile"),
    (lambda t: t.replace(",oval,", ",square,"), "line 2, shape"),
    (lambda t: t.replace(",malignant,", ",benign,", 1), "line 2"),
    (lambda t: t + t.splitlines()[1] + "\n", "a second time"),
    (lambda t: t.replace(",anna,", ",eve,"), "no line is anna's")])
def test_a_wrong_table_changes_nothing(lab, data, tmp_path, change, words):
    """Unknown columns, tiles, values, another diagnosis, a tile twice: one line with its number, and no row is kept."""
    lab.say("anna", 0, {"shape": "oval"})
    text = label_export.labels_csv([row | {"isic_id": None} for row in lab.rows], {"anna": lab.desks["anna"].labels})
    path = tmp_path / "labels.csv"
    path.write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        label_export.read_labels_csv(path, lab.rows, "anna", label_folder.Labels())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["=1+1", "+1", "-1", "@x", "\tx", "\r=x", "'=1", "''=x", "plain", "'quoted", "", None, 5, -3])
def test_no_cell_is_a_formula_and_all_come_back(value):
    """Whatever the text, the cell does not begin like a formula, and reading gives the text again; numbers stay."""
    cell = cells.safe(value)
    if isinstance(value, str):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
        assert cells.plain(cell) == value
    else:
        assert cell == value


@pytest.mark.parametrize("flags", [[], ["--primary", "eve"], ["--people", "eve", "ben"], ["--adjudicate"]])
def test_a_start_that_fails_leaves_no_trace(data, flags):
    """The port is in use: nothing is made, the primary annotator stays, though --primary asked for another."""
    for name in ("anna", "carl"):
        with Journal(label_folder.journal_path(data, name)) as journal:
            journal.append({"event": "answer", "id": "12345678", "tile": label_folder.select(data, "malignant")[0][0]["file_name"],
                            "answers": {"edge": "sharp"}, "was": {"edge": "given"}, "time": label_folder.now()})
    label_folder.set_primary(data, "anna")
    before = {path.name: path.read_bytes() for path in (data / "labels").iterdir()}
    who = [] if "--people" in flags or "--adjudicate" in flags else ["--annotator", "eve"]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        flags = [str(data), "--port", str(busy.getsockname()[1]), "--no-browser", *who, *flags]
        with pytest.raises(ValueError, match="is in use"):
            label.main(flags)
    assert {path.name: path.read_bytes() for path in (data / "labels").iterdir()} == before


def test_primary_is_whoever_answers_first_not_whoever_looks(data):
    """Opening a desk makes nobody primary; the first answer does, also where the app was killed before it could say so."""
    with Journal(label_folder.journal_path(data, "aaron")):
        label_folder.sync(data)
        assert label_folder.primary(data) is None
        with Journal(label_folder.journal_path(data, "zoe")) as journal:
            journal.append({"event": "flag", "id": "12345678", "tile": "x", "flagged": True, "time": label_folder.now()})
        label_folder.sync(data)
        assert label_folder.primary(data) == "zoe"
        assert label_folder.annotators(data) == ["zoe"]


def test_people_behind_a_proxy(data):
    """--name lets pages through that a reverse proxy asks for by another host name, and only that one."""
    with Journal(label_folder.journal_path(data, "anna")) as journal:
        desk = label_desk.Desk(data, label_folder.select(data)[0], "anna", journal)
        app = label_pages.create_app(data, {"": desk}, names=["lab.example"])
        assert app.test_client().get("/state", headers={"Host": "lab.example"}).status_code == 200
        assert app.test_client().get("/state", headers={"Host": "evil.example"}).status_code == 403
    assert label.parse([str(data), "--name", "lab.example"]).name == ["lab.example"]


def test_a_picture_folder_that_leads_out_gets_no_captions(data, tmp_path):
    """images/ is a link out of the data set: captions beside the pictures are refused."""
    (data / "images").rename(tmp_path / "outside")
    (data / "images").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads out of the data set"):
        label_export.export_captions(data, files.read_manifest(data))
    assert not list((tmp_path / "outside").glob("*.txt"))


def test_two_starts_at_once_lose_no_link(data, monkeypatch):
    """Two processes make links at the same moment: both links stand in the file, under one secret."""
    real = secrets.token_urlsafe
    monkeypatch.setattr(secrets, "token_urlsafe", lambda size: (time.sleep(0.1), real(size))[1])
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda name: label_folder.people(data, [name]), ("anna", "ben")))
    kept = json.loads((data / "labels" / "links.json").read_text(encoding="utf-8"))
    assert kept == {"secret": made[0][0], "links": made[0][1] | made[1][1]}
    assert made[0][0] == made[1][0]


def test_links_file_that_was_edited_is_one_line(data):
    """A list where links should be: what to do, in one line."""
    (data / "labels").mkdir()
    (data / "labels" / "links.json").write_text(json.dumps({"secret": 5}), encoding="utf-8")
    with pytest.raises(ValueError, match="was edited"):
        label_folder.people(data, ["anna"])

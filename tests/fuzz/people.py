"""What people send and what the web pages keep: requests, journals, studies."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import study_sets
from fuzz import hostile
from fuzz.reader import ORIGIN, TILE, Reader, as_file, each, must, only
from hypothesis import strategies as st

from lesion.describe.prompts import VOCABULARY
from lesion.run import files
from lesion.web import label_adjudicate, label_desk, label_export, label_folder, label_pages, study, study_folder
from lesion.web.journal import Journal


def label_data(place):
    """A data set with three tiles, and Anna's, Ben's and the adjudicator's desks at one server."""
    data = place / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for number in range(3):
        (data / "images" / f"{number}.jpg").write_bytes(TILE)
        rows.append(
            {
                "file_name": f"images/{number}.jpg",
                "isic_id": f"I{number}",
                "label": "malignant",
                "text": "",
                "split": "train",
                "attributes": {"color": "red", "size": "4 to 6 mm"},
                "confidence": {"color": 0.3},
            }
        )
    files.write_manifest(data, rows)
    return data


def label_site(place):
    data = label_data(place)
    rows = label_folder.select(data)[0]
    desks = {
        name: label_desk.Desk(data, rows, name, Journal(label_folder.journal_path(data, name), label_folder.check_row))
        for name in ("anna", "ben", "adjudicator")
    }
    bench = label_adjudicate.Bench(desks["adjudicator"], {name: desks[name].labels for name in ("anna", "ben")})
    for name, color in (("anna", "red"), ("ben", "white")):
        desks[name].write(
            {
                "event": "answer",
                "id": f"first-{name}",
                "tile": rows[0]["file_name"],
                "answers": {"color": color},
                "was": {},
            }
        )
    app = label_pages.create_app(data, {"": desks["anna"]}, bench=bench)
    app.config["PROPAGATE_EXCEPTIONS"] = True
    return SimpleNamespace(client=app.test_client(), desks=desks, folder=data)


FORM = {
    "id": "12345678",
    "tile": 0,
    "revision": 111_111,
    "filter": "all",
    "answers": {"color": "red", "other_colors": ["white"]},
    "seconds": 1.5,
    "by": "key",
    "stay": False,
    "change": True,
    "active": "color",
}
FORMS = {
    "answer": FORM,
    "answer/": FORM | {"text": "a clinical photograph of a malignant skin lesion, oval shape"},
    "undo": FORM | {"undo": "x"},
    "flag": FORM | {"flagged": True},
    "comment": FORM | {"comment": "x"},
    "adjudicate/decide": {"id": "12345678", "tile": 0, "attribute": "color", "value": "red", "revision": 111_111},
    "adjudicate/undo": {"id": "12345678", "undo": "x"},
}
QUERIES = [
    "/?filter={}",
    "/?tile={}",
    "/state?tile={}",
    "/state?find={}&after={}",
    "/state?filter={}",
    "/picture/{}/original.png",
    "/centre/{}",
    "/adjudicate/state?at={}",
    "/adjudicate/picture/{}/original.png",
    "/labels.csv",
]
ASKED = st.one_of(
    hostile.texts,
    hostile.numbers.map(str),
    st.sampled_from(["I1", "0", "-1", "-99", "9" * 30, "color=red", "flagged", "unsure"]),
)


def label_requests(kept):
    posts = [
        st.tuples(st.just("POST"), st.just("/" + action.rstrip("/")), hostile.as_json(form))
        for action, form in FORMS.items()
    ]
    asked = st.builds(
        lambda path, a, b: ("GET", path.replace("{}", quoted(a), 1).replace("{}", quoted(b), 1), b""),
        st.sampled_from(QUERIES),
        ASKED,
        ASKED,
    )
    return st.lists(st.one_of(*posts, *posts, asked), min_size=1, max_size=3)


def quoted(text):
    from urllib.parse import quote

    return quote(text[:3000].encode("utf-8", "replace"))


def ask(client, method, path, data, **more):
    """A reply that is no failure of the server: an error is one line."""
    reply = client.open(
        path, method=method, data=data, headers=ORIGIN, **({"content_type": "application/json"} if data else {}) | more
    )
    assert reply.status_code < 500, (reply.status_code, reply.text)
    if reply.status_code >= 400 and reply.is_json and "error" in reply.json:
        assert reply.json["error"]
        assert len(reply.json["error"].splitlines()) == 1, reply.json["error"]
    return reply


NUMBER = itertools.count()


def label_asked(site, place, case):
    for method, path, data in case:
        desk = site.desks["adjudicator" if "adjudicate" in path else "anna"]
        data = data.replace(b"111111", str(desk.tile(0).revision).encode()).replace(
            b"12345678", b"%016d" % next(NUMBER)
        )
        ask(site.client, method, path, data)
    must(lambda: ask(site.client, "GET", "/state?tile=0", b""))
    must(lambda: label_export.labels_csv(site.desks["anna"].rows, {"anna": site.desks["anna"].labels}))


JOURNAL = [
    {
        "event": "answer",
        "id": f"row-{k}",
        "time": "2026-01-01T00:00:00.000+00:00",
        "tile": f"images/{k % 3}.jpg",
        "answers": {
            name: attribute.values[0].name if not attribute.many else [] for name, attribute in VOCABULARY.items()
        },
        "was": {"color": "given"},
        "by": "key",
        "seconds": 1.0,
    }
    for k in range(4)
] + [
    {"event": "undo", "id": "row-5", "undoes": "row-3", "time": "x"},
    {"event": "flag", "id": "row-6", "tile": "images/1.jpg", "flagged": True},
    {"event": "comment", "id": "row-7", "tile": "images/1.jpg", "text": "x"},
]


def label_journal(data, place, case):
    rows = label_folder.select(data)[0]
    with contextlib.ExitStack() as opened:
        desks = {
            name: label_desk.Desk(
                data,
                rows,
                name,
                opened.enter_context(Journal(label_folder.journal_path(data, name), label_folder.check_row)),
            )
            for name in ("anna", "ben")
        }
        bench = label_adjudicate.Bench(desks["ben"], {"anna": desks["anna"].labels, "ben": desks["ben"].labels})
        app = label_pages.create_app(data, {"a" * 22: desks["anna"], "b" * 22: desks["ben"]}, "x" * 20, bench=bench)
        app.config["PROPAGATE_EXCEPTIONS"] = True
        client = app.test_client()
        for path in (
            f"/p/{'a' * 22}/",
            f"/p/{'a' * 22}/state",
            f"/p/{'a' * 22}/labels.csv",
            "/progress?token=" + "x" * 20,
            "/progress",
            "/adjudicate",
            "/progress/labels.csv",
        ):
            must(lambda path=path: ask(client, "GET", path, b""))
        from lesion.web import label_compare

        each(lambda: label_folder.sync(data), lambda: label_compare.agreement(data))


LINKS = {"secret": "s" * 32, "links": {"anna": "a" * 22, "ben": "b" * 22}}


def label_settings(data, place, case):
    def people():
        secret, links = label_folder.people(data, ["anna", "ben"])
        desks = dict.fromkeys(links.values())
        must(lambda: label_pages.create_app(data, desks, secret, secret=secret))

    each(people, lambda: label_folder.primary(data), lambda: label_folder.sync(data))


IMPORTED = [
    ["file_name", "isic_id", "label", "annotator", *VOCABULARY, "flagged", "comment"],
    *(
        [
            f"images/{k}.jpg",
            f"I{k}",
            "malignant",
            "anna",
            *("none" if a.many else a.values[0].name for a in VOCABULARY.values()),
            "no",
            "x",
        ]
        for k in range(3)
    ),
]


def label_import(data, place, case):
    rows = label_folder.select(data)[0]
    for event in label_export.read_labels_csv(place / "labels.csv", rows, "anna", label_folder.Labels()):
        must(lambda event=event: label_folder.check_row(event))


def study_data(place):
    real, synthetic = study_sets.real_set(place / "real", 4), study_sets.synthetic_set(place / "synthetic", 4)
    made = study_folder.create(place / "study", real, synthetic, count=2, seed=1, readers=2, allow_back=True)
    return SimpleNamespace(folder=place / "study", study=made)


def study_site(place):
    kept = study_data(place)
    kept.readers = [study._open_reader(kept.folder, kept.study, number) for number in range(2)]
    kept.app = study.create_app(kept.folder, kept.study, kept.readers)
    kept.app.config["PROPAGATE_EXCEPTIONS"] = True
    kept.client, kept.link = kept.app.test_client(), f"/r/{kept.study['readers'][0]['link']}"
    kept.client.post(kept.link + "/consent", data={"agree": "yes"}, headers=ORIGIN)
    return kept


ANSWER = {
    "position": 0,
    "rating": 3,
    "revision": 111_111,
    "client_s": 1.5,
    "side_px": 400,
    "pixel_ratio": 2,
    "by": "key",
    "malignant": None,
}


def study_requests(kept):
    post = st.tuples(st.just("/answer"), hostile.as_json(ANSWER), st.just("application/json"))
    form = st.tuples(
        st.just("/answer"),
        hostile.spoilt(st.just(b"position=0&rating=3&revision=111111"), b"position=0&rating=3&client_s=1"),
        st.sampled_from(
            ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json; charset=x"]
        ),
    )
    asked = st.builds(lambda path, a: (path + quoted(a), b"", ""), st.sampled_from(["?at=", "/tile/", "x", "/"]), ASKED)
    return st.lists(st.one_of(post, post, form, asked), min_size=1, max_size=3)


def study_asked(kept, place, case):
    for path, data, kind in case:
        data = data.replace(b"111111", str(kept.readers[0].revision(0)).encode())
        ask(kept.client, "POST" if data else "GET", kept.link + path, data, **({"content_type": kind} if data else {}))
    must(lambda: study_folder.read_answers(kept.folder, kept.study))


def study_rows(kept):
    tiles = [tile["id"] for tile in kept.study["tiles"]]
    return [{"event": "consent", "time": "x"}] + [
        {
            "event": "answer",
            "time": "2026-01-01T00:00:00.000+00:00",
            "position": k + 1,
            "tile": tile,
            "rating": 1 + k,
            "malignant": None,
            "client_s": 1.5,
            "server_s": 1.0,
            "by": "key",
            "side_px": 400.0,
            "pixel_ratio": 2.0,
        }
        for k, tile in enumerate(tiles)
    ]


def study_journal(kept, place, case):
    opened = [study._open_reader(kept.folder, kept.study, number) for number in range(2)]
    try:
        client = study.create_app(kept.folder, kept.study, opened, "x" * 20).test_client()
        client.application.config["PROPAGATE_EXCEPTIONS"] = True
        link = f"/r/{kept.study['readers'][0]['link']}"
        for path in (link, link + "?at=1", "/organiser?token=" + "x" * 20, "/organiser", "/organiser/answers.csv"):
            must(lambda path=path: ask(client, "GET", path, b""))
        ask(client, "POST", link + "/answer", json.dumps(ANSWER | {"revision": opened[0].revision(0)}).encode())
    finally:
        for reader in opened:
            reader.journal.close()
    table = must(lambda: study_folder.read_answers(kept.folder, kept.study))[1]
    must(lambda: study_folder.as_arrays(kept.study, table))


def study_cases(kept):
    def sealed(found):
        """With the seal that belongs to it, where it can have one."""
        text = hostile.dumps(found)
        try:
            again = json.loads(text)
            return json.dumps(again | {"seal": study_folder._seal(again)}).encode()
        except (ValueError, RecursionError, TypeError, AttributeError):
            return text.encode("utf-8", "replace")

    made = json.loads((kept.folder / "study.json").read_bytes())
    return only(
        "study/study.json",
        st.one_of(hostile.edited(made).map(sealed), hostile.edited(made).map(sealed), hostile.as_json(made)),
    )


def study_opened(kept, place, case):
    made = study_folder.load(kept.folder)
    readers = [
        must(lambda number=number: study._open_reader(kept.folder, made, number))
        for number in range(len(made["readers"]))
    ]
    try:
        must(lambda: study.create_app(kept.folder, made, readers, "x" * 20))
    finally:
        for reader in readers:
            reader.journal.close()
    table = must(lambda: study_folder.read_answers(kept.folder, made))[1]
    must(lambda: study_folder.as_arrays(made, table))


READERS = [
    Reader("labelling requests", label_requests, label_asked, label_site),
    Reader(
        "labelling journal",
        lambda kept: only("data/labels/anna.jsonl", hostile.as_lines(JOURNAL)),
        label_journal,
        label_data,
    ),
    Reader(
        "labelling settings",
        lambda kept: st.one_of(
            only("data/labels/links.json", hostile.as_json(LINKS)),
            only("data/labels/primary.json", hostile.as_json({"primary": "anna"})),
        ),
        label_settings,
        label_data,
    ),
    Reader("labels as csv", lambda kept: only("labels.csv", hostile.as_table(IMPORTED)), label_import, label_data),
    Reader("study requests", study_requests, study_asked, study_site),
    Reader(
        "study journal",
        lambda kept: only("study/answers/reader-1.jsonl", hostile.as_lines(study_rows(kept))),
        study_journal,
        study_data,
    ),
    Reader("study.json", study_cases, study_opened, study_data),
]

EXAMPLES = {  # what was once a traceback, a hang or a memory full
    "labelling requests": [[("GET", f"/state?find=nothing&after={after}", b"")] for after in (-99, 10**30)]
    + [[("POST", "/answer", hostile.dumps(FORM | {"seconds": 10**400}).encode())]],
    "labelling settings": [as_file("data/labels/links.json", {"secret": "s" * 32, "links": {"anna": [1]}})],
    "labels as csv": [{"labels.csv": b"file_name,comment\n" + b"x" * 200_000}],
    "study.json": [{"study/study.json": b"[" * 100_000}],
}

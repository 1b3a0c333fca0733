"""Images of datasets on a real database and disk: fetched once, stored by hash, told in the report, gone with their file."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from tests.evil_hosts import SmallInternet
from tests.images import data_uri, encoded, hostile, picture, row
from tests.unit.bad_rows import GOOD, file
from tunewright import egress
from tunewright.accounts.records import Project
from tunewright.dataset_commands import app
from tunewright.datasets.blob_keys import image_key, manifest_key
from tunewright.datasets.images import image_references as images
from tunewright.datasets.images.image_check import check_images
from tunewright.datasets.images.image_pass import ImagePass
from tunewright.datasets.images.image_records import Placed
from tunewright.datasets.images.image_references import read_references
from tunewright.datasets.intake import RowsRefused
from tunewright.datasets.problem_list import read_problems
from tunewright.datasets.records import File
from tunewright.datasets.report import Report
from tunewright.datasets.service import DatasetService
from tunewright.egress import Egress
from tunewright.errors import NotFound, StorageFull
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Blobs, Storage

PROJECT = "proj-a"
URL = "http://good.example/image"


class Gallery:
    """A service whose egress reaches the small internet only."""

    def __init__(self, root: Path, internet: SmallInternet, **changes: object) -> None:
        self.settings = Settings.model_validate({"home": root, "min_free_disk_bytes": 0, **changes})
        self.home = HomeFolder(root)
        self.home.create()
        self.storage = Storage(f"sqlite:///{self.home.database}")
        self.storage.migrate()
        self.blobs = Blobs(f"file://{self.home.blobs}")
        self.internet = internet
        reach = Egress(self.settings.remote_media_hosts, resolve=internet.resolve, connect=internet.connect)
        self.service = DatasetService(self.storage, self.blobs, self.home, self.settings, reach)
        with self.storage.write() as tx:
            if tx.projects.get(PROJECT) is None:
                for number, project in (("1234567890", PROJECT), ("1234567891", "proj-b")):
                    tx.projects.insert(Project(id=project, number=number, name=project, created_at=1))

    def upload(self, *rows: dict[str, Any], project: str = PROJECT, **more: Any) -> File:
        upload = self.service.begin_upload(project)
        upload.write(file(*rows))
        return upload.finish("a.jsonl", "fine-tune", **more)

    def done(self, kept: File) -> File:
        """The file once the loop has been over it."""
        self.service.images.run_once()
        return self.service.get(kept.project_id, kept.id)

    def manifest(self, kept: File) -> list[Placed]:
        lines = b"".join(self.blobs.read(manifest_key(kept.project_id, kept.id))).splitlines()
        return [msgspec.json.decode(line, type=Placed) for line in lines]

    def image(self, placed: Placed, project: str = PROJECT) -> bytes:
        return b"".join(self.blobs.read(image_key(project, placed.sha256)))

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.home.temporary.iterdir())

    def stored(self) -> list[str]:
        return sorted(path.name for path in self.home.blobs.glob("images/*/*"))


@pytest.fixture
def internet() -> Iterator[SmallInternet]:
    made = SmallInternet(picture())
    yield made
    made.close()


@pytest.fixture
def gallery(tmp_path: Path, internet: SmallInternet) -> Iterator[Gallery]:
    made = Gallery(tmp_path / "home", internet)
    yield made
    made.storage.close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_PAUSES_S", (0.0, 0.0))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def codes(kept: File) -> dict[str, int]:
    return {code: count for code, count in kept.report["counts"].items() if code != "few_rows"}


# --- on arrival


def test_a_few_inline_images_are_done_with_the_answer(gallery: Gallery) -> None:
    wide, tall = picture(300, 20, "JPEG"), picture(20, 300, "WEBP")
    kept = gallery.upload(row(data_uri(wide, "jpeg"), data_uri(tall, "webp")), row(data_uri(wide, "jpeg")))
    assert (kept.status, kept.kind, codes(kept)) == ("processed", "image_understanding", {})
    assert kept.statistics["image_files"] == {
        "count": 3,
        "distinct": 2,
        "failed": 0,
        "bytes": len(wide) + len(tall),
        "formats": {"jpeg": 2, "webp": 1},
        "sizes": [{"width": 256, "height": 512, "count": 1}, {"width": 512, "height": 256, "count": 2}],
    }
    placed = gallery.manifest(kept)
    assert [(p.line, p.pointer, p.sha256, p.media_type, p.width, p.height) for p in placed] == [
        (1, "/messages/0/content/1/image_url/url", sha(wide), "image/jpeg", 300, 20),
        (1, "/messages/0/content/2/image_url/url", sha(tall), "image/webp", 20, 300),
        (2, "/messages/0/content/1/image_url/url", sha(wide), "image/jpeg", 300, 20),
    ]
    assert [gallery.image(p) for p in placed] == [wide, tall, wide]
    assert gallery.stored() == sorted([sha(wide), sha(tall)]) and gallery.leftovers() == []


def test_a_caption_and_its_image_in_bare_base64(gallery: Gallery) -> None:
    bare = data_uri(picture()).partition(",")[2]
    kept = gallery.upload(row(bare, role="assistant"))
    assert (kept.status, kept.kind) == ("processed", "image_generation")
    assert gallery.manifest(kept)[0].sha256 == sha(picture())


def test_detail_is_kept(gallery: Gallery) -> None:
    one = row(data_uri(picture()))
    one["messages"][0]["content"][1]["image_url"]["detail"] = "low"
    assert gallery.manifest(gallery.upload(one))[0].detail == "low"


@pytest.mark.parametrize("name", ["PNG of 900 megapixels", "PNG cut short", "JPEG cut short"])
def test_a_bad_inline_image_refuses_the_file_and_leaves_nothing(gallery: Gallery, name: str) -> None:
    data, code = hostile()[name]
    with pytest.raises(RowsRefused) as caught:
        gallery.upload(row(data_uri(picture())), row(data_uri(data)))
    assert caught.value.code == code
    assert caught.value.values["pointer"] == "/messages/0/content/1/image_url/url" and caught.value.values["line"] == 2
    assert (gallery.stored(), gallery.leftovers()) == ([], [])


def test_a_bad_inline_image_may_be_kept_as_a_bad_row(gallery: Gallery) -> None:
    cut = hostile()["PNG cut short"][0]
    kept = gallery.upload(row(data_uri(picture())), row(data_uri(cut), data_uri(cut)), on_problems="keep")
    assert (kept.status, kept.report["bad_rows"], codes(kept)) == ("error", 1, {"invalid_image": 2})
    assert [p.line for p in gallery.manifest(kept)] == [1]
    assert [p.line for p in read_problems(gallery.blobs, kept) if p.code == "invalid_image"] == [2, 2]
    assert kept.statistics["image_files"]["failed"] == 2


def test_a_converted_image_is_said_and_stored_converted(gallery: Gallery) -> None:
    from PIL import Image

    data = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")
    kept = gallery.upload(row(data_uri(data)))
    assert (kept.status, codes(kept)) == ("processed", {"image_converted": 1})
    placed = gallery.manifest(kept)[0]
    assert placed.sha256 == sha(gallery.image(placed)) != sha(data)


def test_files_without_images_are_left_alone(gallery: Gallery) -> None:
    kept = gallery.upload(GOOD)
    assert kept.status == "processed" and "image_files" not in kept.statistics
    with pytest.raises(NotFound):
        gallery.manifest(kept)


# --- the loop


def test_remote_images_are_fetched_once_and_stored_by_hash(gallery: Gallery) -> None:
    kept = gallery.upload(row(URL), row(URL, "http://two.example/other"), row(data_uri(picture(7, 7))))
    assert (kept.status, kept.report["images"]) == ("processing", {"done": 0, "total": 4})
    assert gallery.internet.requests == [], "nothing is fetched while the caller waits"
    done = gallery.done(kept)
    assert (done.status, codes(done), "images" in done.report) == ("processed", {}, False)
    assert len(gallery.internet.requests) == 2 and gallery.internet.hits == 0
    assert [p.sha256 for p in gallery.manifest(done)] == [sha(picture())] * 3 + [sha(picture(7, 7))]
    assert done.statistics["image_files"]["distinct"] == 2 and gallery.leftovers() == []
    assert gallery.done(kept) == done, "what is done stays as it is"


def test_many_inline_images_are_left_to_the_loop(gallery: Gallery) -> None:
    kept = gallery.upload(*(row(data_uri(picture(i + 1))) for i in range(21)))
    assert kept.status == "processing"
    done = gallery.done(kept)
    assert done.status == "processed" and done.statistics["image_files"]["count"] == 21 == len(gallery.stored())


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("http://unknown.example/x", "image_not_fetched", "name of the host"),
        ("http://good.example/to-loopback", "url_not_allowed", "does not fetch from"),
        ("http://good.example/to-file", "invalid_media_url", "plain http"),
        ("http://inside.example/x", "url_not_allowed", "does not fetch from"),
        ("http://rebinding.example/to-relative", "url_not_allowed", "does not fetch from"),
        ("http://good.example/for-ever", "image_not_fetched", "redirects"),
        ("http://good.example/gone", "image_not_fetched", "404"),
        ("http://good.example/gzip", "image_not_fetched", "not usable"),
        ("http://good.example/announced", "image_too_large", "20 MiB"),
    ],
)
def test_what_can_not_be_fetched_is_a_bad_row(gallery: Gallery, url: str, code: str, words: str) -> None:
    gallery.internet.status["/gone"] = 404
    done = gallery.done(gallery.upload(row(URL), row(url)))
    assert (done.status, done.report["bad_rows"], codes(done)) == ("error", 1, {code: 1})
    problem = next(p for p in read_problems(gallery.blobs, done) if p.code == code)
    assert (problem.line, problem.pointer) == (2, "/messages/0/content/1/image_url/url")
    for language in ("en", "zh"):
        assert "127.0.0.1" not in problem.text(language) and "10.0.0.1" not in problem.text(language)
    assert words in problem.text() and gallery.internet.hits == 0
    assert [p.line for p in gallery.manifest(done)] == [1]


def test_a_page_instead_of_an_image(gallery: Gallery) -> None:
    gallery.internet.body = b"<!doctype html>"
    assert codes(gallery.done(gallery.upload(row(URL)))) == {"invalid_image": 1}


def test_what_may_work_later_is_tried_again(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery.internet.status["/image"] = 503
    fetch = Egress.fetch

    def mended(self: Egress, *args: Any, **more: Any) -> Any:
        try:
            return fetch(self, *args, **more)
        finally:
            gallery.internet.status.clear()

    monkeypatch.setattr(Egress, "fetch", mended)
    assert gallery.done(gallery.upload(row(URL))).status == "processed"
    assert len(gallery.internet.requests) == 2


def test_a_host_that_fails_too_often_is_given_up(gallery: Gallery) -> None:
    urls = [f"http://good.example/{i}" for i in range(40)]
    gallery.internet.status.update({f"/{i}": 503 for i in range(40)})
    done = gallery.done(gallery.upload(*(row(url) for url in urls)))
    assert codes(done) == {"image_not_fetched": 40}
    assert len(gallery.internet.requests) <= 8 + 4, "the eight, and those under way in other threads"


def test_rows_with_errors_cause_no_request(gallery: Gallery) -> None:
    wrong = row("http://two.example/never")
    wrong["messages"][1]["role"] = "robot"
    kept = gallery.upload(row(URL), wrong, on_problems="keep")
    done = gallery.done(kept)
    assert (done.status, done.report["bad_rows"], codes(done)) == ("error", 1, {"invalid_role": 1})
    assert gallery.internet.asked == ["good.example"]


@pytest.mark.parametrize("between", [50, 150])
def test_problems_of_images_join_a_long_list_in_order(gallery: Gallery, between: int) -> None:
    wrong = row(URL)
    wrong["messages"][1]["role"] = "robot"
    rows = [row("http://unknown.example/x"), *([wrong] * between), row("http://unknown.example/x")]
    done = gallery.done(gallery.upload(*rows, on_problems="keep"))
    assert done.report["counts"]["image_not_fetched"] == 2 and done.report["bad_rows"] == between + 2
    lines = [p.line or 0 for p in read_problems(gallery.blobs, done) if p.severity == "error"]
    assert lines == list(range(1, between + 3))
    assert len(done.report["problems"]) <= 100


def test_off_refuses_web_addresses_at_once(tmp_path: Path, internet: SmallInternet) -> None:
    gallery = Gallery(tmp_path / "off", internet, remote_media="off")
    with pytest.raises(RowsRefused) as caught:
        gallery.upload(row(URL), row(data_uri(picture())))
    assert (caught.value.code, caught.value.values["line"]) == ("remote_media_not_allowed", 1)
    kept = gallery.upload(row(URL), row(data_uri(picture())), on_problems="keep")
    assert (kept.status, codes(kept)) == ("error", {"remote_media_not_allowed": 1})
    many = gallery.upload(row(URL), *(row(data_uri(picture(i + 1))) for i in range(25)), on_problems="keep")
    done = gallery.done(many)
    assert (done.status, codes(done)) == ("error", {"remote_media_not_allowed": 1})
    assert len(gallery.manifest(done)) == 25 and internet.asked == []
    gallery.storage.close()


def test_only_hosts_on_the_operators_list(tmp_path: Path, internet: SmallInternet) -> None:
    gallery = Gallery(tmp_path / "narrow", internet, remote_media_hosts=["two.example"])
    done = gallery.done(gallery.upload(row(URL), row("http://two.example/image")))
    assert (codes(done), internet.asked) == ({"url_not_allowed": 1}, ["two.example"])
    gallery.storage.close()


def test_a_file_has_a_budget_of_images_and_bytes(tmp_path: Path, internet: SmallInternet) -> None:
    gallery = Gallery(tmp_path / "small", internet, max_images_per_file=3, max_image_bytes_per_file=10)
    with pytest.raises(RowsRefused) as caught:
        gallery.upload(row(URL, URL), row(URL, URL))
    assert caught.value.code == "too_many_images"
    gallery.storage.close()
    roomy = Gallery(tmp_path / "roomy", internet, max_image_bytes_per_file=100)
    done = roomy.done(roomy.upload(*(row(data_uri(picture(i + 1))) for i in range(25))))
    assert set(codes(done)) == {"too_many_image_bytes"} and 0 < len(roomy.stored()) < 25
    roomy.storage.close()


def test_a_version_takes_over_the_images_of_its_parent(gallery: Gallery) -> None:
    from PIL import Image

    gallery.internet.body = encoded(Image.new("P", (4, 4)), "PNG")
    gallery.internet.status["/gone"] = 404
    first = gallery.done(gallery.upload(row(URL), row("http://good.example/gone")))
    assert (first.status, len(gallery.internet.requests)) == ("error", 2)
    gallery.internet.status.clear()
    kept = gallery.upload(row(URL), row("http://good.example/gone"), row("http://good.example/new"), parent_id=first.id)
    second = gallery.done(kept)
    assert (second.status, second.parent_id, codes(second)) == ("processed", first.id, {"image_converted": 3})
    asked = [head.split(b" ")[1] for head in gallery.internet.requests[2:]]
    assert sorted(asked) == [b"/gone", b"/new"], "what is stored is not fetched again, what failed is"
    gallery.service.delete(PROJECT, first.id)
    assert gallery.image(gallery.manifest(second)[0])
    third = gallery.upload(row(URL), parent_id=second.id)
    gallery.service.delete(PROJECT, second.id)
    assert (gallery.done(third).status, len(gallery.internet.requests)) == ("processed", 5), (
        "its parent is gone: fetched"
    )


# --- faults


def test_a_full_disk_waits_and_goes_on(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = gallery.upload(row(URL))
    with monkeypatch.context() as patch:

        def full(self: Blobs, key: str, path: Path) -> None:
            raise StorageFull("storage_full", "The disk is full")

        patch.setattr(Blobs, "put_file", full)
        assert gallery.done(kept).status == "processing"
    assert gallery.done(kept).status == "processed"


def test_a_bug_is_not_tried_for_ever(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = gallery.upload(row(URL))

    def broken(self: ImagePass, *_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(ImagePass, "run", broken)
    for _ in range(5):
        gallery.service.images.run_once()
    done = gallery.service.get(PROJECT, kept.id)
    assert (done.status, codes(done)) == ("error", {"image_processing_failed": 1})


@pytest.mark.parametrize("fault", ["before any", "between two", "before the end", "in the journal"])
def test_a_pass_that_was_cut_off_goes_on_where_it_was(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Killed(BaseException):
        """Like kill -9: no handler runs for it."""

    rows = [row(f"http://good.example/{i}") for i in range(12)]
    kept = gallery.upload(*rows)
    with monkeypatch.context() as patch:
        calls = iter(range(100))

        def dies(when: int) -> Callable[..., Any]:
            def call(*_: object, **__: object) -> None:
                if next(calls) >= when:
                    raise Killed

            return call

        if fault == "before the end":
            patch.setattr(ImagePass, "_finish", dies(0))
        else:
            patch.setattr(ImagePass, "_tell", dies(0 if fault == "before any" else 3))
        patch.setattr(ImagePass, "_clean_up", lambda self: None)
        with pytest.raises(Killed):
            gallery.service.images.run_once()
    asked = len(gallery.internet.requests)
    journal = next(gallery.home.temporary.glob("*.journal"))
    known = journal.read_bytes().count(b"\n")
    if fault == "in the journal":
        journal.write_bytes(
            journal.read_bytes() + b'["00',
        )
    again = Gallery(gallery.home.root, gallery.internet)
    again.service.sweep()
    done = again.done(kept)
    assert done.status == "processed" and len(again.manifest(done)) == 12
    assert len(gallery.internet.requests) - asked == 12 - known, "no host is asked twice for what is noted"
    assert again.leftovers() == []
    again.storage.close()


@pytest.mark.parametrize("when", ["before it is stored", "images/", "image-manifests/"])
def test_a_file_deleted_while_it_is_processed_leaves_nothing(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    kept = gallery.upload(*(row(f"http://good.example/{i}") for i in range(6)))
    obtain, put_file, seen = images.Obtainer.obtain, Blobs.put_file, threading.Event()
    gallery.internet.body = picture(77, 77)

    def delete() -> None:
        if not seen.is_set():
            seen.set()
            gallery.service.delete(PROJECT, kept.id)

    def obtaining(self: images.Obtainer, url: str) -> Any:
        answer = obtain(self, url)
        if when == "before it is stored":
            delete()
        return answer

    def putting(self: Blobs, key: str, path: Path) -> None:
        if key.startswith(when):
            delete()
        put_file(self, key, path)

    monkeypatch.setattr(images.Obtainer, "obtain", obtaining)
    monkeypatch.setattr(Blobs, "put_file", putting)
    gallery.service.images.run_once()
    assert seen.is_set() and gallery.stored() == [] and gallery.leftovers() == []
    assert list(gallery.home.blobs.glob("*/*/*")) == []


# --- deletion


def test_an_image_goes_with_the_last_file_that_uses_it(gallery: Gallery) -> None:
    one = gallery.upload(row(data_uri(picture())), row(data_uri(picture(3, 3))))
    two = gallery.upload(row(data_uri(picture())))
    other = gallery.upload(row(data_uri(picture())), project="proj-b")
    gallery.service.delete(PROJECT, one.id)
    assert gallery.stored() == [sha(picture())] * 2
    gallery.service.delete(PROJECT, two.id)
    assert gallery.stored() == [sha(picture())] and gallery.image(gallery.manifest(other)[0], "proj-b") == picture()
    gallery.service.delete("proj-b", other.id)
    assert list(gallery.home.blobs.glob("*/*/*")) == [] and gallery.leftovers() == []


@pytest.mark.parametrize("committed", [True, False])
def test_a_deletion_that_was_cut_off_is_finished_at_the_next_start(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    kept = gallery.upload(row(data_uri(picture())))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if committed:
            patch.setattr(type(gallery.service.images), "drop_unused", dies)
        else:
            with gallery.storage.write() as tx:
                patch.setattr(type(tx.files), "delete", dies)
        with pytest.raises(KeyboardInterrupt):
            gallery.service.delete(PROJECT, kept.id)
    again = Gallery(gallery.home.root, gallery.internet)
    again.service.sweep()
    assert again.stored() == ([] if committed else [sha(picture())])
    assert bool(list(again.home.blobs.glob("image-manifests/*/*"))) is not committed
    assert again.leftovers() == []
    again.storage.close()


def test_an_arrival_that_fails_takes_its_images_along(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    with gallery.storage.read() as tx:
        files = type(tx.files)

    def broken(*_: object) -> None:
        raise RuntimeError("bug")

    with monkeypatch.context() as patch:
        patch.setattr(files, "insert", broken)
        with pytest.raises(RuntimeError):
            gallery.upload(row(data_uri(picture())))
    assert list(gallery.home.blobs.glob("*/*/*")) == [] and gallery.leftovers() == []


# --- references


def test_references_are_found_in_good_image_rows_only(tmp_path: Path) -> None:
    short = {"role": "user", "content": [{"type": "image_url", "image_url": URL}]}
    wrong = row(URL)
    wrong["messages"][1]["content"] = 5
    path = tmp_path / "rows"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + file(GOOD, row(URL), wrong, {"messages": [short, {"role": "assistant", "content": "x"}]})
        + b"\nnot json\n"
        + json.dumps(row(URL, role="assistant")).encode()
    )
    found = [(r.line, r.path[-1], r.url) for r in read_references(path, 10**6)]
    assert found == [(2, "url", URL), (4, "image_url", URL), (7, "url", URL)]


def test_the_loop_runs_by_itself_and_stops(gallery: Gallery) -> None:
    gallery.service.images.start()
    kept = gallery.upload(row(URL))
    waited = threading.Event()
    for _ in range(600):
        if gallery.service.get(PROJECT, kept.id).status == "processed":
            break
        waited.wait(0.05)
    assert gallery.service.get(PROJECT, kept.id).status == "processed"
    gallery.service.images.stop()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_the_command_lines_check_decodes_and_fetches_only_when_it_may(tmp_path: Path, internet: SmallInternet) -> None:
    cut = hostile()["PNG cut short"][0]
    path, problems = tmp_path / "rows", tmp_path / "problems"
    path.write_bytes(file(row(data_uri(picture(7, 7))), row(data_uri(cut)), row(URL), row("http://unknown.example/")))
    problems.touch()
    offline = Report(kind="image_understanding", rows=4)
    check_images(path, offline, 10**6, problems=problems)
    assert (offline.counts, offline.bad_rows, internet.asked) == ({"invalid_image": 1}, 1, [])
    assert offline.statistics["image_files"]["count"] == 2 and problems.read_bytes().count(b"\n") == 1
    online = Report(kind="image_understanding", rows=4)
    heard: list[int] = []
    reach = Egress(resolve=internet.resolve, connect=internet.connect)
    check_images(path, online, 10**6, egress=reach, progress=heard.append)
    assert online.counts == {"image_not_fetched": 1, "invalid_image": 1}
    assert online.statistics["image_files"]["count"] == 4 == heard[-1]
    text = Report(kind="chat")
    check_images(path, text, 10**6, egress=reach)
    assert text == Report(kind="chat")


@pytest.mark.parametrize(("fetch", "found"), [(False, {}), (True, {"url_not_allowed": 1})])
def test_the_command_fetches_images_only_if_it_is_told_to(
    tmp_path: Path, internet: SmallInternet, monkeypatch: pytest.MonkeyPatch, fetch: bool, found: dict[str, int]
) -> None:
    monkeypatch.setattr(egress, "_resolve", internet.resolve)
    monkeypatch.setattr(egress, "_connect", internet.connect)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(file(row(data_uri(picture())), row("http://good.example/to-loopback")))
    options = ["--fetch-images"] if fetch else []
    done = CliRunner().invoke(app, ["validate", str(path), "--json", *options])
    shown = json.loads(done.output)
    assert {code: count for code, count in shown["report"]["counts"].items() if code != "few_rows"} == found
    assert done.exit_code == (1 if fetch else 0) and internet.hits == 0
    assert bool(internet.asked) == fetch

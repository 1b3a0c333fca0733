"""References from files to stored images, on both databases."""

from tests.contract.rows import file
from tunewright.accounts.records import Project
from tunewright.storage import Storage

A, B = "a" * 64, "b" * 64


def test_references_are_counted_by_project_and_go_with_their_file(
    storage: Storage, ours: Project, theirs: Project
) -> None:
    one, two, other = file(ours.id), file(ours.id), file(theirs.id)
    with storage.write() as tx:
        for made in (one, two, other):
            tx.files.insert(made)
        assert (
            tx.images.add(ours.id, one.id, A)
            and tx.images.add(ours.id, one.id, B)
            and tx.images.add(ours.id, two.id, A)
        )
        assert tx.images.add(ours.id, one.id, A), "again is no error"
        assert not tx.images.add(ours.id, "file-none", A)
        assert not tx.images.add(ours.id, other.id, A), "not another project's file"
    with storage.read() as tx:
        assert tx.images.used(ours.id, A) and tx.images.used(ours.id, B) and not tx.images.used(theirs.id, A)
    with storage.write() as tx:
        assert tx.images.remove(theirs.id, one.id) == []
        assert sorted(tx.images.remove(ours.id, one.id)) == [A, B]
        tx.files.delete(ours.id, one.id)
        assert tx.images.used(ours.id, A) and not tx.images.used(ours.id, B)


def test_only_files_that_are_processing_are_changed(storage: Storage, ours: Project, theirs: Project) -> None:
    waiting, other = file(ours.id, status="processing"), file(theirs.id, status="processing")
    done = file(ours.id, status="processed")
    with storage.write() as tx:
        for made in (waiting, other, done):
            tx.files.insert(made)
    with storage.read() as tx:
        assert {found.id for found in tx.images.processing(10)} == {waiting.id, other.id}
        assert len(tx.images.processing(1)) == 1
    with storage.write() as tx:
        assert tx.images.change(waiting, status="error", report={"errors": 1})
        assert not tx.images.change(waiting, status="processed"), "it is over"
        assert not tx.images.change(done, report={})
    with storage.read() as tx:
        found = tx.files.get(ours.id, waiting.id)
        assert found is not None and (found.status, found.report) == ("error", {"errors": 1})
        assert tx.files.get(theirs.id, other.id) == other

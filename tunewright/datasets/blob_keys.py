"""Where the blobs of a file are."""


def content_key(project_id: str, file_id: str) -> str:
    """The blob with the file's bytes."""
    return f"files/{project_id}/{file_id}"


def report_key(project_id: str, file_id: str) -> str:
    """The blob with all problems, one JSON object a line; it is there only if the record does not hold them all."""
    return f"reports/{project_id}/{file_id}.jsonl"


def image_key(project_id: str, sha256: str) -> str:
    """An image that rows of the project refer to; several files may."""
    return f"images/{project_id}/{sha256}"


def manifest_key(project_id: str, file_id: str) -> str:
    """The blob that says which stored image stands where in a file's rows (`image_records.Placed`, one JSON object a line)."""
    return f"image-manifests/{project_id}/{file_id}.jsonl"

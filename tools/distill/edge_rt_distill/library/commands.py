"""``edge-rt distill library``: what is in a teacher library, as tables and as a report; whether it is sound; removing what is not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_rt.hooks import OptionError
from edge_rt_distill.files import shown_size
from edge_rt_distill.library import care
from edge_rt_distill.library.catalogue import KINDS, Query, Record
from edge_rt_distill.library.store import Library

_FOLDER = typer.Argument(metavar="DIRECTORY", help="The library.")
_ID = typer.Argument(metavar="ID", help="The beginning of a record's id.")
_KIND = typer.Option(None, "--kind", metavar="KIND", help=f"Records of this kind: {', '.join(KINDS)}.")
_MODEL = typer.Option(None, "--model", metavar="DIGEST", help="Records of the model whose digest begins so.")
_DOMAIN = typer.Option(None, "--domain", metavar="NAME", help="Records of this domain; empty for those of none.")
_SINCE = typer.Option(None, "--since", metavar="DATE", help="From this day or moment on, as 2026-11-29 or 2026-11-29T03:33:35Z.")
_UNTIL = typer.Option(None, "--until", metavar="DATE", help="Up to this day or moment.")
_LOW = typer.Option(None, "--min-score", metavar="X", help="Scored so or higher.")
_HIGH = typer.Option(None, "--max-score", metavar="X", help="Scored so or lower.")
_FORGET = typer.Option([], "--forget", metavar="ID", help="Forget this record first. May be given several times.")
_JSON = typer.Option(False, "--json", help="Write JSON on standard output.")


def add(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See, check and tidy a teacher library.")
    app.add_typer(group, name="library")
    _add_looks(group)
    _add_care(group)


def _add_looks(group: typer.Typer) -> None:
    @group.command("ls", help="List records, newest first.")
    def ls(
        folder: Annotated[str, _FOLDER], kind: str | None = _KIND, model: str | None = _MODEL, domain: str | None = _DOMAIN,
        since: str | None = _SINCE, until: str | None = _UNTIL, low: float | None = _LOW, high: float | None = _HIGH,
        limit: int = typer.Option(50, "-n", "--limit", metavar="N", help="At most so many; 0: all.", min=0), as_json: bool = _JSON,
    ) -> None:  # fmt: skip
        found = listed(Library.open(folder), Query(kind, model, domain, since, until, low, high), limit)
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else listed_text(found))

    @group.command("show", help="Show all that is known of a record.")
    def show(folder: Annotated[str, _FOLDER], record: Annotated[str, _ID], as_json: bool = _JSON) -> None:
        found = details(Library.open(folder), record)
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else details_text(found))

    @group.command("report", help="Write one HTML file with pictures of what is stored.")
    def report(
        folder: Annotated[str, _FOLDER],
        output: str = typer.Option("library.html", "-o", "--output", metavar="FILE", help="Where to write."),
        kind: str | None = _KIND, model: str | None = _MODEL, domain: str | None = _DOMAIN,
        since: str | None = _SINCE, until: str | None = _UNTIL, low: float | None = _LOW, high: float | None = _HIGH,
    ) -> None:  # fmt: skip
        from edge_rt_distill.library.report import write_report  # matplotlib and torch take seconds to import

        wanted = Query(kind, model, domain, since, until, low, high)
        typer.echo(f"wrote {write_report(Library.open(folder), Path(output), wanted, _say_progress)}", err=True)


def _add_care(group: typer.Typer) -> None:
    @group.command("verify", help="Read everything and name what is damaged; exits with 1 if anything is.")
    def verify(folder: Annotated[str, _FOLDER], as_json: bool = _JSON) -> None:
        damage = care.verify(Library.open(folder))
        if as_json:
            typer.echo(json.dumps([one._asdict() for one in damage], indent=2))
        else:
            typer.echo("".join(f"{one.path}: {one.reason}\n" for one in damage) or "no damage\n", nl=False)
        if damage:
            raise typer.Exit(1)

    @group.command("gc", help="Remove objects no record refers to, and what killed processes left.")
    def gc(
        folder: Annotated[str, _FOLDER], as_json: bool = _JSON,
        grace: float = typer.Option(
            care.GRACE, "--grace", metavar="SECONDS", help="Spare what was written or renewed since; another process may use it.", min=0.0
        ),
        forget: list[str] = _FORGET,
    ) -> None:  # fmt: skip
        library = Library.open(folder)
        for record in [library.get(start) for start in forget]:
            library.remove(record)
        found = care.collect(library, grace=grace)
        if as_json:
            typer.echo(json.dumps(found._asdict()))
        else:
            left = f"{found.temporary} temporary files and {found.unfinished} abandoned recordings"
            typer.echo(f"removed {found.objects} objects, {left}; {shown_size(found.freed)} freed")


def _say_progress(done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        typer.echo(f"records: {done} of {total}", err=True)


# ---- what the commands show ------------------------------------------------------------------------------------------


def listed(library: Library, query: Query, limit: int) -> list[dict[str, Any]]:
    """Records as ``ls --json`` gives them. Reads no record, unless ``query.model`` is longer than names tell."""
    if limit < 0:
        raise OptionError(f"--limit takes a number of at least 0 and not {limit}")
    entries = (record.entry for record in library.find(query)) if len(query.model or "") > 16 else iter(library.entries(query))
    found: list[dict[str, Any]] = []
    for entry in entries:
        if limit and len(found) == limit:
            break
        found.append({"id": entry.id, "kind": entry.kind, "date": _date(entry.date), "model": entry.model, "domain": entry.domain,
                      "score": entry.score})  # fmt: skip
    return found


def _date(compact: str) -> str:
    """20261129T033335Z as people write it."""
    return f"{compact[:4]}-{compact[4:6]}-{compact[6:11]}:{compact[11:13]}:{compact[13:]}"


def listed_text(found: list[dict[str, Any]]) -> str:
    """The same for people."""
    if not found:
        return "no records"
    rows = [("ID", "KIND", "DATE", "MODEL", "DOMAIN", "SCORE")]
    rows += [
        (
            one["id"][:12],
            one["kind"],
            one["date"],
            one["model"],
            one["domain"] or "all",
            "" if one["score"] is None else f"{one['score']:.4g}",
        )
        for one in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def details(library: Library, start: str) -> dict[str, Any]:
    """A record as ``show --json`` gives it: all it says, and its objects with their sizes in bytes (None: missing)."""
    record = library.get(start)
    data: dict[str, Any] = json.loads(record.to_bytes())
    data["objects"] = {name: {"sha256": digest, "bytes": _bytes(library, digest)} for name, digest in record.objects.items()}
    return {"id": record.id, **data, "file": str(_file(library, record))}


def _file(library: Library, record: Record) -> Path:
    return library.records / record.kind / record.entry.file_name


def _bytes(library: Library, digest: str) -> int | None:
    try:
        return library.path(digest).stat().st_size
    except FileNotFoundError:
        return None


def details_text(found: dict[str, Any]) -> str:
    """The same for people."""
    rows = [(name, _said(found[name])) for name in ("id", "kind", "model", "domain", "date", "score", "version", "seed")]
    rows += [(f"{group}.{name}", _said(value)) for group in ("arguments", "facts") for name, value in found[group].items()]
    for name, one in found["objects"].items():
        size = "missing" if one["bytes"] is None else shown_size(one["bytes"])
        rows.append((name, f"{size}  {one['sha256'][:16]}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _said(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

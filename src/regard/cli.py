"""The command line: `regard look` shows what a model attends to, `heads` what each head does, `bench` how fast it is.

Enters: a text or a corpus, the name of a model, what to look for; what to measure.
Leaves: coloured tables in the terminal; the page in a browser or in a file; reports; a smaller model.
A refusal is one sentence and status 1.
Top floor: thin; everything heavy is imported when it is used."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from socket import socket

    from rich.console import Console

    from regard.lens.links import Found
    from regard.lens.look import Look
    from regard.lens.models import Loaded
    from regard.lens.server import Asks, View

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Attention you can see.",
)


def main() -> None:
    """Run the command line; what `regard` and `python -m regard.cli` call."""
    try:
        app(prog_name="regard")
    except (ImportError, OSError, ValueError) as refused:
        sys.exit(_refused(refused))


def _version(wanted: bool) -> None:
    if wanted:
        import regard

        typer.echo(f"regard {regard.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def look(
    text: Annotated[
        str | None,
        typer.Argument(
            help="What the model reads; for a speech model the path of a .wav file; the directory of a recording; or a "
            "saved .session or .html."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="minilm, smollm2, rxnmapper, mathformer, a model directory, a .gguf file or a hub id.", metavar="MODEL"
        ),
    ] = "minilm",
    layer: Annotated[int | None, typer.Option(help="Open on this layer, counted from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="Open on this head, counted from 0.")] = None,
    find: Annotated[
        tuple[str, str] | None,
        typer.Option(help="List the heads in which the first word attends most to the second.", metavar="WORD WORD"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What an encoder-decoder shall have written; default what it writes itself.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another model or checkpoint that the page compares this one with.", metavar="MODEL"),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="What regard heads found of this model: sort and label heads by it.", metavar="FILE"),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the view to a .html, .svg, .png, .json, .parquet or .session file, and leave.", metavar="FILE"
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Serve on this port; default 8765 or the next free one.")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
) -> None:
    """Show what a model attends to in a text: the strongest links here, everything on a page."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        _look(console, text, model, layer, head, find, target, save, port, no_browser, against, heads)
    except (ImportError, OSError, ValueError) as refused:
        raise typer.Exit(_refused(refused)) from None


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Argument(help="Words or patterns; items whose names hold one of them are measured.")
    ] = None,
    isa: Annotated[
        list[str] | None,
        typer.Option(
            help="Hold every library to this instruction set (avx512, avx2); best: hold none; all: best, and each of "
            "avx512 and avx2 that there is. May be given again.  [default: best]"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute's version: PyTorch only, fewer lengths.")] = False,
    file: Annotated[
        Path | None,
        typer.Option("--json", help="Keep the results in this file, joined with those in it.", metavar="FILE"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what the file holds already, undisturbed.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(help="Begin no further item after these seconds; --resume goes on.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Fill the part between the markers of this document.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cost against length into this .svg file.", metavar="FILE")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for one item.")] = 4.0,
    threads: Annotated[int | None, typer.Option(help="Threads of every library; default PyTorch's.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the items and leave.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing: show what the file holds.")] = False,
) -> None:
    """Measure attention on this machine, beside PyTorch and others, against the machine's own ceilings."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        from regard.bench.command import Wanted, run

        wanted = Wanted(
            tuple(only or ()),
            tuple(isa or ()),
            quick,
            file,
            resume,
            budget,
            markdown,
            plot,
            seconds,
            threads,
            listed,
            show,
        )
        run(console, wanted)
    except (ImportError, OSError, RuntimeError, ValueError) as refused:
        raise typer.Exit(_refused(refused, "bench")) from None


@app.command()
def heads(
    model: Annotated[str, typer.Argument(help="A model, named as for look; it reads one text.")],
    corpus: Annotated[Path, typer.Argument(help="A text file with one text a line.")],
    out: Annotated[Path, typer.Option(help="The directory to write to; a run that was stopped goes on there.")],
    probes: Annotated[
        Path | None, typer.Option(help="Pronouns: GAP's .tsv, or blocks with [MASK]; default ten sentences with it.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens read together.")] = 128,
    windows: Annotated[int | None, typer.Option(help="Stop after so many windows; default the whole file.")] = None,
    removal: Annotated[int, typer.Option(help="Windows on which each head is removed in turn; 0 for none.")] = 2,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Skip broken lines, and name them.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write heads.parquet too (needs pyarrow).")] = False,
) -> None:
    """Score what each head of a model does over a corpus; writes heads.json and report.html."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        from regard.lens import heads_files
        from regard.lens import probes as probing
        from regard.lens.heads import Settings, score_heads
        from regard.lens.models import load

        heads_files.check(parquet)
        settings = Settings(window=window, most_windows=windows, removal=removal, seed=seed, skip_broken=skip_broken)
        with _progress() as report:
            loaded = load(model, report)
            mask = getattr(loaded.tokenizer, "mask_token", None)
            chosen, broken = (probing.built_in(), []) if probes is None else probing.read(probes, mask, skip_broken)
            told = score_heads(loaded, corpus, out, chosen, settings, report)
        written = heads_files.write(told, out, parquet)
        for line in [*broken, *told["skipped"]]:
            console.print(f"skipped {line}", style="dim", markup=False, soft_wrap=True)
        heads_files.show(console, told)
        console.print(f"Wrote {', '.join(map(str, written))}", soft_wrap=True, markup=False)
    except (ImportError, OSError, ValueError) as refused:
        raise typer.Exit(_refused(refused)) from None


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A decoder, named as for look.")],
    corpus: Annotated[Path, typer.Argument(help="A text file with one text a line, to tell which heads matter.")],
    out: Annotated[Path, typer.Option(help="The directory for the smaller model and the report; made here.")],
    keep: Annotated[float, typer.Option(help="Share of the heads to keep, in every layer the same number.")] = 0.8,
    window: Annotated[int, typer.Option(help="Tokens read together.")] = 64,
    windows: Annotated[int, typer.Option(help="Windows of the corpus to read, half of them to choose by.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random order that is compared.")] = 0,
) -> None:
    """Remove the heads of least importance from a model for good; checks, saves and reports what it lost."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        from regard.lens.models import load
        from regard.lens.pruning import prune_model

        with _progress() as report:
            loaded = load(model, report)
            told = prune_model(
                loaded, corpus, out, keep=keep, window=window, windows=windows, seed=seed, progress=report
            )
        console.print(told["summary"], soft_wrap=True, markup=False)
        console.print(f"Wrote {out}", soft_wrap=True, markup=False)
    except (ImportError, OSError, ValueError) as refused:
        raise typer.Exit(_refused(refused)) from None


@app.command()
def trust(
    model: Annotated[str, typer.Argument(help="A decoder, named as for look.")],
    corpus: Annotated[Path, typer.Argument(help="A text file with one sentence a line.")],
    out: Annotated[Path, typer.Option(help="The .md file to write the table to.")],
    sentences: Annotated[int, typer.Option(help="How many sentences.")] = 100,
) -> None:
    """Test over many sentences which attribution finds the tokens that matter, beside random orders."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        from regard.lens.heads import write_whole
        from regard.lens.models import load
        from regard.lens.trusting import trust_corpus, trust_markdown

        if out.suffix != ".md":
            raise ValueError(f"trust: --out must be a .md file; got {out}. Name one.")
        with _progress() as report:
            told = trust_corpus(load(model, report), corpus, sentences, report)
        command = f"regard trust {model} {corpus} --out {out} --sentences {sentences}"
        write_whole(out, trust_markdown(told, command))
        console.print(f"Wrote {out}", soft_wrap=True, markup=False)
    except (ImportError, OSError, ValueError) as refused:
        raise typer.Exit(_refused(refused)) from None


def _look(
    console: Console,
    text: str | None,
    model: str,
    layer: int | None,
    head: int | None,
    find: tuple[str, str] | None,
    target: str | None,
    save: Path | None,
    port: int | None,
    no_browser: bool,
    against: str | None,
    heads: Path | None,
) -> None:
    from regard.lens import export, server

    if save is not None:
        save = save.expanduser()
        export.check_target(save)
    listening = server.bind(port) if save is None else None
    try:
        from regard.lens.look import default_text, look
        from regard.lens.opened import is_recording

        if heads is not None and not heads.is_file():
            raise ValueError(f"look: --heads must be a file that is there; got {heads}. Run regard heads MODEL CORPUS.")
        if text is not None and Path(text).suffix.lower() in export.SESSIONS and Path(text).is_file():
            _look_at_session(console, Path(text), save, listening, no_browser)
            return
        if text is not None and is_recording(text):
            _look_at_recording(console, text, layer, head, find, save, listening, no_browser, heads)
            return
        with _progress() as report:
            from regard.lens.models import load

            loaded = load(model, report)
            other = None if against is None else load(against, report)
            chosen = default_text(loaded) if text is None else text
            if chosen is None:
                raise ValueError(
                    f"look: TEXT must be the path of a .wav file for {loaded.name}, which hears speech; got none. "
                    "Pass one."
                )
            report("reading the text", 0.0)
            seen = look(loaded, chosen, target, lambda message: report(message, 0.5))
            view, found = _view(seen, layer, head, find, save is None, heads)
        _print_links(console, view, found, find, layer, head)
        if save is not None:
            with _progress() as report:
                report(f"writing {save.name}", 0.5)
                export.write(save, seen, view.page)
            console.print(f"Wrote {save}", soft_wrap=True, markup=False)
            return

        def again(new: str) -> View:
            if loaded.shape == "speech":
                raise ValueError(
                    f"look: sound is chosen on the command line; got a text. Run regard look FILE.wav --model {model}."
                )
            return _view(look(loaded, new), None, None, None, True, heads)[0]

        assert listening is not None
        server.serve(listening, view, again, _started(console, no_browser), _asks(other))
    finally:
        if listening is not None:
            listening.close()


def _look_at_recording(
    console: Console,
    directory: str,
    layer: int | None,
    head: int | None,
    find: tuple[str, str] | None,
    save: Path | None,
    listening: socket | None,
    no_browser: bool,
    heads: Path | None,
) -> None:
    from regard.lens import export, server
    from regard.lens.opened import look_at
    from regard.lens.recording import Recording

    recording = Recording.open(directory)

    def turn(window: int) -> View:
        return _view(look_at(recording, window), None, None, None, True, heads)[0]

    def refuse(_text: str) -> View:
        raise ValueError("look: text must be run by a model; got a recording, which holds none. Run regard look TEXT.")

    view, found = _view(look_at(recording), layer, head, find, save is None, heads)
    _print_links(console, view, found, find, layer, head)
    if save is not None:
        export.write(save, view.look, view.page)
        console.print(f"Wrote {save}", soft_wrap=True, markup=False)
        return
    assert listening is not None
    server.serve(listening, view, refuse, _started(console, no_browser), turn=turn)


def _look_at_session(
    console: Console, path: Path, save: Path | None, listening: socket | None, no_browser: bool
) -> None:
    from regard.lens import export, server

    page = export.read_session(path)
    if save is not None:
        export.write_session(save, page)
        console.print(f"Wrote {save}", soft_wrap=True, markup=False)
        return
    assert listening is not None
    server.serve_page(listening, export.page_html(page), _started(console, no_browser))


def _asks(other: Loaded | None) -> Asks:
    """What the page may ask of the model: what cuts change, and comparisons."""
    from regard.lens.asking import ASKS
    from regard.lens.compare import Comparing

    return {**ASKS, "compare": Comparing(other)}


def _started(console: Console, no_browser: bool) -> Callable[[str], None]:
    def started(address: str) -> None:
        console.print(f"\n{address}   Ctrl-C stops it", soft_wrap=True, markup=False)
        if not no_browser and _has_browser():
            webbrowser.open(address)

    return started


def _view(
    seen: Look,
    layer: int | None,
    head: int | None,
    find: tuple[str, str] | None,
    live: bool,
    heads: Path | None = None,
) -> tuple[View, list[Found] | None]:
    from regard.lens import links, payload
    from regard.lens.server import View

    found = None if find is None else links.find(seen, seen.front, *find)
    selection = payload.first_selection(seen, layer, head, found)
    labels = None
    if heads is not None:
        from regard.lens.head_labels import read_head_labels

        labels = read_head_labels(heads, seen)
    return View(seen, payload.payload(seen, selection, found, live, labels)), found


def _print_links(
    console: Console,
    view: View,
    found: list[Found] | None,
    find: tuple[str, str] | None,
    layer: int | None,
    head: int | None,
) -> None:
    from rich.markup import escape

    from regard.lens import table

    seen, selection = view.look, view.page["selection"]
    attention = seen.attentions[selection["attention"]]
    shape = f"{len(attention.layers)} layers × {attention.num_heads} heads"
    console.print(f"[bold]{escape(seen.loaded.name)}[/]  {shape} · {attention.label} · exact")
    if found is not None and find is not None:
        console.print(table.found_table(seen, selection["attention"], found, find))
    only = (layer, head) if found is None else (selection["layer"], selection["head"])
    if seen.long(selection["attention"]):
        tokens = len(seen.sides[attention.query_side].tokens)
        console.print(f"{tokens:,} tokens: the page shows their map, and what any word looks at")
        for note in seen.notes:
            console.print(escape(note), style="dim")
        return
    links_table, apart = table.links_table(seen, selection["attention"], *only)
    console.print(links_table)
    console.print(apart)
    for note in seen.notes:
        console.print(escape(note), style="dim")


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error for what takes longer than a second; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("starting", total=1.0)

        def report(message: str, share: float) -> None:
            bars.update(task, description=message, completed=share)

        yield report


def _has_browser() -> bool:
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _refused(refused: Exception, extra: str = "look") -> int:
    """Say on standard error, in one sentence, what was wrong; the exit status."""
    from rich.console import Console
    from rich.markup import escape

    if isinstance(refused, ModuleNotFoundError):
        message = f"{refused.name} must be installed; found none. Run: pip install 'regard[{extra}]'."
    else:
        message = str(refused)
    Console(stderr=True, highlight=False).print(f"[bold red]error[/] {escape(message)}", soft_wrap=True)
    return 1


if __name__ == "__main__":
    main()

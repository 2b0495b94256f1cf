"""Links as tables for a terminal.

Enters: a `Look`, links and found heads.
Leaves: rich tables: the strongest links, what was set apart from them, and the heads that link two words.
Floor 6: rich, loaded when it is used."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from regard.lens.links import Found, strongest
from regard.lens.look import Look

SHOWN = 12
BAR = 20
COLOURS = ("bright_black", "blue", "cyan", "green", "bold yellow")


def links_table(look: Look, index: int, layer: int | None, head: int | None) -> tuple[Table | Text, Text]:
    """The strongest links, and one line on what was set apart.

    Args:
        look: the recording.
        index: which of its attentions.
        layer: only this layer, or None.
        head: only this head, or None.
    """
    attention = look.attentions[index]
    queries, keys = look.sides[attention.query_side].words, look.sides[attention.key_side].words
    links, sinks = strongest(look, index, SHOWN, layer, head)
    where = ("" if layer is None else f", layer {layer}") + ("" if head is None else f", head {head}")
    table = _table(f"strongest links{where}", "word", "looks at")
    for link in links:
        table.add_row(
            escape(queries[link.query].text),
            escape(keys[link.key].text),
            *_weight(link.weight),
            str(link.layer),
            str(link.head),
        )
    apart = Text("set apart: ", style="dim")
    shown = [sink for sink in sinks if sink.share >= 0.005][:5]
    for at, sink in enumerate(shown):
        apart.append(", " if at else "")
        apart.append(keys[sink.word].text, style="bold")
        apart.append(f" {sink.role}, {sink.share:.0%} of all attention")
    if not shown:
        apart.append("no sink or separator took attention")
    apart.append("; and each word's look at itself" if attention.query_side == attention.key_side else "")
    return (table if links else Text("no word is linked to another here")), apart


def found_table(look: Look, index: int, found: list[Found], words: tuple[str, str]) -> Table:
    """The heads that link two words, best first.

    Args:
        look: the recording.
        index: which of its attentions.
        found: from `regard.lens.links.find`.
        words: the two words as they were asked for.
    """
    attention = look.attentions[index]
    queries, keys = look.sides[attention.query_side].words, look.sides[attention.key_side].words
    table = _table(f"heads that link {escape(words[0])} to {escape(words[1])}", "word", "looks at")
    table.add_column("rank", justify="right")
    for one in found[:SHOWN]:
        table.add_row(
            escape(words[0] if " " in words[0].strip() else queries[one.query].text),
            escape(words[1] if " " in words[1].strip() else keys[one.key].text),
            *_weight(one.weight),
            str(one.layer),
            str(one.head),
            f"{one.rank} of {one.of}",
        )
    return table


def _table(title: str, first: str, second: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, header_style="dim")
    table.add_column(first, justify="right", overflow="fold")
    table.add_column(second, overflow="fold")
    table.add_column("weight", justify="right")
    table.add_column("", width=BAR)
    table.add_column("layer", justify="right")
    table.add_column("head", justify="right")
    return table


def _weight(weight: float) -> tuple[Text, Text]:
    colour = COLOURS[min(int(weight * len(COLOURS)), len(COLOURS) - 1)]
    return Text(f"{weight:.2f}", style=colour), Text(
        "█" * max(1, round(weight * BAR)) if weight > 0 else "", style=colour
    )

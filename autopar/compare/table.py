"""A comparison as text for a terminal and as one HTML page with bars."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
NUMBERS = {  # key → its title and unit
    "parameters": ("parameters", ""),
    "flops_per_token": ("FLOPs per token", ""),
    "activation_bytes_per_layer": ("activations per layer and token", "B"),
    "kv_cache_bytes_per_token": ("KV cache per token", "B"),
}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; font-weight: 600; padding: 1rem 0 .4rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #d8dee4; }
th { font-weight: 600; white-space: nowrap; }
.bar { display: flex; height: 1rem; min-width: 12rem; } .bar i { display: block; height: 100%; }
@media (prefers-color-scheme: dark) { body { background: #14171a; color: #e6e8ea; } th, td { border-color: #363c42; } }
"""


def table(rows: Sequence[Row]) -> str:
    """One line for each property, one column for each model; parameters by part below their sum."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[key, *(_cell(row.get(key)) for row in rows)] for key in keys if key != "parts"]
    at = next(i for i, line in enumerate(lines) if line[0] == "parameters") + 1
    parts = dict.fromkeys(part for row in rows for part in row["parts"])
    lines[at:at] = [[f"  {part}", *(_cell(row["parts"].get(part)) for row in rows)] for part in parts]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows) + 1)]
    return "".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines)


def page(rows: Sequence[Row], length: int) -> str:
    """The comparison as one HTML page that needs nothing else; ``length``: of the sequences that FLOPs are of."""
    words = [key for key in rows[0] if key not in NUMBERS and key not in ("parts", "model")]
    head = "".join(f"<th>{html.escape(str(row['model']))}</th>" for row in rows)
    body = "".join(
        f"<tr><th>{key.replace('_', ' ')}</th>{''.join(f'<td>{html.escape(_cell(row[key]))}</td>' for row in rows)}</tr>"
        for key in words
    )
    bars = "".join(_bars(rows, key) for key in NUMBERS)
    title = html.escape(" · ".join(str(row["model"]) for row in rows))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><table><tr><th></th>{head}</tr>{body}</table>"
        f"{bars}<p>Sequences of {length:,} tokens; FLOPs forward and backward, attention not halved for causality; "
        "activations and KV cache in bfloat16.</p></html>\n"
    )


def _bars(rows: Sequence[Row], key: str) -> str:
    """One bar for each model; that of the parameters in its parts."""
    title, unit = NUMBERS[key]
    largest = max(float(row[key]) for row in rows)
    lines = []
    for row in rows:
        share = 100 * float(row[key]) / largest
        parts = row["parts"] if key == "parameters" else {title: row[key]}
        total = sum(parts.values())
        pieces = "".join(
            f'<i title="{html.escape(name)}: {_cell(value)}" style="width:{share * value / total:.2f}%;'
            f'background:hsl({(210 + 47 * i) % 360} 55% 55%)"></i>'
            for i, (name, value) in enumerate(parts.items())
        )
        shown = f"<td>{_short(float(row[key]), unit)}</td>"
        lines.append(
            f'<tr><th>{html.escape(str(row["model"]))}</th>{shown}<td><div class="bar">{pieces}</div></td></tr>'
        )
    return f"<table><caption>{title}</caption>{''.join(lines)}</table>"


def _short(value: float, unit: str) -> str:
    scale, prefix = next(((s, p) for s, p in PREFIXES if value >= s), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}".rstrip()


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

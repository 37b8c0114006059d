"""A page as one HTML file: pictures inline, tables that sort by a click, nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from .blocks import INLINE, Block, Fold, Heading, Items, Picture, Table, Text

_STYLE = """
:root{--ink:#1d2730;--soft:#5d6b76;--line:#dfe5ea;--tint:#f5f8fa;--mark:#1b4965;--best:#e8f3ec}
*{box-sizing:border-box}body{margin:0;color:var(--ink);background:#fff;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:2.2rem 1.2rem 5rem}h1{font-size:1.9rem;line-height:1.2;margin:.2em 0 .6em}
h2{font-size:1.35rem;margin:2.6rem 0 .7rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1.08rem;margin:1.8rem 0 .5rem}
p,ul{max-width:80ch}nav{display:flex;flex-wrap:wrap;gap:.3rem .9rem;font-size:.92rem;margin-bottom:1rem}
a{color:var(--mark)}code{background:var(--tint);padding:.08em .3em;border-radius:3px;font-size:.9em}
.scroll{overflow:auto;max-height:85vh;border:1px solid var(--line);border-radius:6px;margin:.6rem 0 1.3rem}
table{border-collapse:separate;border-spacing:0;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
caption{caption-side:top;text-align:left;color:var(--soft);padding:.5rem .7rem;font-size:.88rem}
th,td{padding:.32rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;
white-space:nowrap;background:#fff}
td.w,th.w{text-align:left}td.long{white-space:normal;min-width:20rem}th{position:sticky;top:0;background:var(--tint);z-index:2}
th:first-child,td:first-child{position:sticky;left:0;z-index:1}th:first-child{z-index:3}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit}
th button:focus-visible{outline:2px solid var(--mark);outline-offset:2px}th[aria-sort] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
table.dense th:not(:first-child) button{writing-mode:vertical-rl;transform:rotate(180deg)}
tbody tr:hover td{background:var(--tint)}td.best{background:var(--best)}
figure{margin:1rem 0}img{max-width:100%;height:auto;display:block}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--mark);font-weight:600}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebef;--soft:#9aa8b3;--line:#33404a;--tint:#1d262d;--mark:#7fb7d6;--best:#1f3a2b}
body,th,td{background:#141b20}th{background:var(--tint)}img{background:#fff;border-radius:6px}}
@media print{.scroll{max-height:none;overflow:visible}th,th:first-child,td:first-child{position:static}}
"""
_SCRIPT = """
document.querySelectorAll('th button').forEach(function(b){b.onclick=function(){
var th=b.parentNode,t=th.closest('table'),i=th.cellIndex,up=th.getAttribute('aria-sort')==='descending';
t.querySelectorAll('th').forEach(function(o){o.removeAttribute('aria-sort')});
th.setAttribute('aria-sort',up?'ascending':'descending');
function key(r){var s=r.cells[i].textContent.trim(),m=s.replace(/,/g,'').replace(/\\u2212/g,'-').match(/^[+-]?\\d+(\\.\\d+)?/);
return m?[0,parseFloat(m[0])]:[s==='-'||s===''?2:1,s.toLowerCase()]}
var rows=Array.prototype.slice.call(t.tBodies[0].rows).map(function(r){return[key(r),r]});
rows.sort(function(x,y){var a=x[0],b=y[0];if(a[0]!==b[0])return a[0]-b[0];if(a[1]===b[1])return 0;
return((a[1]<b[1])===up)?-1:1});rows.forEach(function(r){t.tBodies[0].appendChild(r[1])})}});
"""


def page(title: str, blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """The HTML file. pictures: file name -> PNG bytes, for every Picture among the blocks."""
    body = "\n".join(_block(block, pictures) for block in blocks)
    tops = [b.text for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in tops)
    first, _, rest = body.partition("</h1>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        f'{first}</h1>\n<nav aria-label="sections">{links}</nav>\n{rest}\n</main><script>{_SCRIPT}</script></body></html>\n'
    )


def _anchor(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _inline(text: str) -> str:
    made = []
    for i, part in enumerate(INLINE.split(text)):
        if i % 2 and part.startswith("**"):
            made.append(f"<strong>{escape(part[2:-2])}</strong>")
        elif i % 2:
            made.append(f"<code>{escape(part[1:-1])}</code>")
        else:
            made.append(escape(part))
    return "".join(made)


def _block(block: Block, pictures: Mapping[str, bytes]) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{_anchor(block.text)}">{_inline(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode(pictures[block.file]).decode()
        return f'<figure><img alt="{escape(block.alt)}" src="data:image/png;base64,{data}"></figure>'
    if isinstance(block, Fold):
        inner = "\n".join(_block(b, pictures) for b in block.blocks)
        return f"<details><summary>{escape(block.title)}</summary>\n{inner}\n</details>"
    return _table(block)


def _table(block: Table) -> str:
    words = [' class="w"' if i < block.left else "" for i in range(len(block.header))]
    head = "".join(
        f'<th{w} scope="col"><button type="button">{_inline(text)}</button></th>'
        for w, text in zip(words, block.header, strict=True)
    )
    lines = []
    for row in block.rows:
        cells = []
        for i, text in enumerate(row):
            kinds = [
                name for name, yes in (("w", i < block.left), ("long", len(text) > 60), ("best", "**" in text)) if yes
            ]
            mark = f' class="{" ".join(kinds)}"' if kinds else ""
            cells.append(f"<td{mark}>{_inline(text)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    caption = f"<caption>{_inline(block.caption)}</caption>" if block.caption else ""
    dense = ' class="dense"' if block.dense else ""
    return (
        f'<div class="scroll" tabindex="0"><table{dense}>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )

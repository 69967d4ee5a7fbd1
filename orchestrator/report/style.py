"""Colours and style sheet of the report, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LINES = {
    "#2563eb": "#60a5fa",
    "#d97706": "#fbbf24",
    "#059669": "#34d399",
    "#db2777": "#f472b6",
    "#7c3aed": "#a78bfa",
    "#0891b2": "#22d3ee",
    "#dc2626": "#f87171",
    "#65a30d": "#a3e635",
    "#92400e": "#d6a06b",
    "#64748b": "#94a3b8",
}
LINES = tuple(_LINES)
"""Of the trials that are told apart, best first."""
INK, SOFT, RULE, CARD, BAD, GOOD = "#1a202c", "#5b6675", "#e3e7ee", "#ffffff", "#b91c1c", "#047857"
FAINT = "#a8b2c0"
"""Of the trials behind those that have a colour of their own."""
LOW, MIDDLE, HIGH = "#c2410c", "#dbeafe", "#b91c5c"
"""Of the teacher's entropy: one-hot, healthy, uniform."""
DARK: dict[str, str] = {
    **_LINES,
    INK: "#e6eaf0",
    SOFT: "#98a4b5",
    RULE: "#2a3342",
    CARD: "#181e28",
    BAD: "#f87171",
    GOOD: "#34d399",
    FAINT: "#4d5868",
    LOW: "#fb923c",
    MIDDLE: "#24344f",
    HIGH: "#f472a6",
}
"""Figures are made in the light colours; in the dark the page's script puts these in their place."""
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif'


def _variables(colours: Sequence[str], named: Mapping[str, str]) -> str:
    numbered = {f"s{i}": colour for i, colour in enumerate(colours)}
    return ":root{" + "".join(f"--{name}:{value};" for name, value in (numbered | dict(named)).items()) + "}"


_NAMED = {"ink": INK, "soft": SOFT, "rule": RULE, "card": CARD, "bad": BAD, "good": GOOD, "faint": FAINT}
STYLE = (
    _variables(LINES, _NAMED | {"page": "#f7f8fa", "warn": "#fff7e6", "edge": "#f0b429"})
    + "@media (prefers-color-scheme:dark){"
    + _variables(
        [DARK[colour] for colour in LINES],
        {name: DARK[colour] for name, colour in _NAMED.items()}
        | {"page": "#10141b", "warn": "#2a2413", "edge": "#b7791f"},
    )
    + "}"
    + "".join(f".s{i}{{--own:var(--s{i})}}" for i in range(len(LINES)))
    + f"body{{font:15px/1.5 {FONT}}}"
    + """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 24px 48px;background:var(--page);color:var(--ink)}
h1{margin:0 0 18px;font-size:26px;line-height:1.25;overflow-wrap:anywhere}
h2{margin:0 0 12px;font-size:17px}
h3{margin:16px 0 8px;font-size:14px}
a{color:var(--s0)}
section{margin-top:22px;padding:20px 22px;background:var(--card);border:1px solid var(--rule);border-radius:12px;
 scroll-margin-top:8px}
section>p{margin:0 0 12px;color:var(--soft);font-size:13px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:16px;font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px}
.tile{padding:14px 18px;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile span,.tile small{display:block;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.tile b{display:block;font-size:27px;line-height:1.3;font-variant-numeric:tabular-nums}
.tile.good b,.good{color:var(--good)} .tile.bad b,.bad{color:var(--bad)}
.note{margin:18px 0 0;padding:11px 16px;background:var(--warn);border-left:4px solid var(--edge);border-radius:6px}
.wide{overflow-x:auto} .tall{max-height:640px;overflow-y:auto}
.wide+.wide,.wide+details,.charts+.wide,.charts+details{margin-top:18px}
table{border-collapse:collapse;width:100%;font-size:13px}
caption{padding:0 0 6px;text-align:left;color:var(--soft);font-size:13px}
th,td{padding:6px 7px;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600;font-size:12px;vertical-align:bottom}
.tall thead th{position:sticky;top:0;background:var(--card)}
th:first-child,td:first-child{padding-left:0} th:last-child,td:last-child{padding-right:0}
tr:last-child>td{border-bottom:0}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.number{white-space:normal} td.name,td.tag,td.key{white-space:nowrap}
td.main{font-weight:700} td.paper{color:var(--soft)}
.key::before{content:"";display:inline-block;width:11px;height:11px;margin-right:7px;border-radius:3px;
 background:var(--own,var(--faint))}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:left}
button:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
td button{border-bottom:1px dotted var(--soft)} td button::after{content:" \\25BE";color:var(--soft)}
td button[aria-expanded=true]::after{content:" \\25B4"}
.more td{white-space:normal;padding:0 0 14px 22px}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 14px;margin:0;font-size:13px}
.facts dt{margin:0} .facts dd{margin:0;overflow-wrap:anywhere}
.bars{width:100%} .bars td:first-child{white-space:nowrap} .bars .bar{width:70%;padding:10px 0 0}
.bar i{display:block;height:13px;border-radius:4px;background:var(--own,var(--soft));min-width:2px}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0 0 10px;padding:0;list-style:none;font-size:13px}
.legend button{overflow-wrap:anywhere} .legend [aria-pressed=false]{opacity:.4;text-decoration:line-through}
.switch{display:inline-flex;margin:0 0 12px;border:1px solid var(--rule);border-radius:8px;overflow:hidden;
 font-size:13px}
.switch button{padding:4px 14px;color:var(--soft)}
.switch [aria-pressed=true]{background:var(--s0);color:var(--card)}
.charts{margin-top:12px;display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px 22px}
.charts .all{grid-column:1/-1}
@media (max-width:860px){.charts{grid-template-columns:minmax(0,1fr)}}
figure{margin:0;min-width:0} figcaption{font-size:14px;font-weight:600}
figcaption small{margin-left:8px;color:var(--soft);font-weight:400}
.plot{position:relative}
.pictures{display:grid;gap:14px 22px;grid-template-columns:repeat(auto-fill,minmax(360px,1fr))}
.pictures img{display:block;max-width:100%;border:1px solid var(--rule);border-radius:6px}
.pictures figcaption{font-size:13px;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
details summary{cursor:pointer;color:var(--soft)} details[open] summary{margin-bottom:8px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:0;padding:9px 13px;overflow-x:auto;background:var(--page);border:1px solid var(--rule);border-radius:8px;
 user-select:all}
dl{margin:0} dt{margin-top:10px;color:var(--soft)} dt:first-child{margin-top:0} dd{margin:4px 0 0}
footer{margin-top:20px;color:var(--soft);font-size:13px}
@media print{body{max-width:none} section{break-inside:avoid} .tall{max-height:none}}
"""
)

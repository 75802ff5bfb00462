"""The style sheet of the HTML report: inline, no fonts or files from elsewhere, light and dark."""

from __future__ import annotations

CSS = """
:root { --bg:#f6f7f9; --card:#fff; --ink:#14181f; --soft:#5c6675; --line:#e3e7ed; --code:#f1f3f7; --ok:#12805c;
  --warn:#a86400; --bad:#c0342b; --accent:#3657d6; --ok-bg:#e4f5ee; --warn-bg:#fdf1dd; --bad-bg:#fdeaea; }
@media (prefers-color-scheme: dark) { :root { --bg:#0f1217; --card:#171b22; --ink:#e8ebf0; --soft:#98a2b3;
  --line:#2a303b; --code:#10141a; --ok:#4fd1a1; --warn:#f0b35a; --bad:#ff8078; --accent:#8ba4ff; --ok-bg:#12312a;
  --warn-bg:#33270f; --bad-bg:#3a1b1b; } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue",Arial,sans-serif; -webkit-font-smoothing:antialiased }
main { max-width:1040px; margin:0 auto; padding:40px 20px 72px }
header { margin-bottom:28px }
.kicker { color:var(--soft); font-size:14px; margin:0 0 10px; display:flex; gap:10px; flex-wrap:wrap;
  align-items:center }
.badge { font-weight:700; font-size:12px; letter-spacing:.06em; padding:3px 10px; border-radius:99px }
.ok { color:var(--ok); background:var(--ok-bg) } .no_gain { color:var(--warn); background:var(--warn-bg) }
.guard_failed { color:var(--bad); background:var(--bad-bg) }
h1 { font-size:26px; line-height:1.3; margin:0; font-weight:650; letter-spacing:-.01em; text-wrap:pretty }
  .lead { font-size:18px; color:var(--soft); margin:10px 0 0; text-wrap:pretty }
h2 { font-size:15px; margin:0 0 14px; font-weight:650 }
h3 { font-size:13.5px; margin:18px 0 8px; font-weight:600; color:var(--soft) } section p { margin:0 0 8px }
h2 small, .note { color:var(--soft); font-weight:400; font-size:13px }
section { background:var(--card); border:1px solid var(--line); border-radius:14px; padding:22px 24px;
  margin:0 0 18px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(200px,1fr)); gap:14px; margin:0 0 18px }
.tile { background:var(--card); border:1px solid var(--line); border-radius:14px; padding:18px 20px }
.tile b { display:block; font-size:34px; line-height:1.15; letter-spacing:-.02em; font-variant-numeric:tabular-nums }
.tile span { display:block; font-size:14px } .tile small { color:var(--soft); font-size:13px }
.better { color:var(--ok) } .worse { color:var(--bad) } .open { color:var(--warn) }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:14.5px; font-variant-numeric:tabular-nums }
th { text-align:left; color:var(--soft); font-weight:500; font-size:13px }
th, td { padding:8px 14px 8px 0; border-bottom:1px solid var(--line); vertical-align:top }
tr:last-child td { border-bottom:0 } td.n, th.n { text-align:right; white-space:nowrap }
  td:first-child { color:var(--soft) }
tr.chosen td { color:var(--ink); font-weight:600 } tr.faded td { color:var(--soft) }
code, pre { font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace }
code { overflow-wrap:anywhere } pre { background:var(--code); border-radius:9px; padding:11px 14px; margin:6px 0 0;
  white-space:pre-wrap; overflow-wrap:anywhere }
ul { margin:0; padding:0; list-style:none } li + li { margin-top:10px }
.warnings { border-color:var(--warn); background:var(--warn-bg) } .warnings h2 { color:var(--warn) }
dl { display:grid; grid-template-columns:max-content 1fr; gap:7px 22px; margin:0; font-size:14px }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere; grid-column:2 }
svg { display:block; width:100%; height:auto; font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif }
svg text { fill:var(--soft) } svg .grid { stroke:var(--line) } svg .front { fill:none; stroke:var(--soft) }
svg .guard { stroke:var(--bad); stroke-dasharray:5 4 }
svg .guardtext { fill:var(--bad) } svg .dot { fill:var(--soft); fill-opacity:.55 }
  svg .out { fill:var(--bad); fill-opacity:.6 }
svg .pick { fill:var(--ok); stroke:var(--card); stroke-width:2 }
  svg .ring { fill:none; stroke:var(--ok); stroke-width:1.5 }
svg .curve { fill:none; stroke:var(--accent); stroke-width:2; stroke-linejoin:round }
  svg .curve.quality { stroke:var(--ok) } svg .curve.control, svg .key.control { stroke-dasharray:5 4;
  stroke-opacity:.75 } svg .key { fill:none; stroke:var(--soft); stroke-width:2 }
svg .label { fill:var(--ink) } svg .bar { fill:var(--accent); fill-opacity:.8 }
  svg .base { fill:var(--card); stroke:var(--soft);
  stroke-width:2 } svg .strong { fill:var(--ink); font-weight:650 }
details summary { cursor:pointer; color:var(--soft); font-size:14px } details[open] summary { margin-bottom:10px }
footer { color:var(--soft); font-size:13px; margin-top:26px }
@media (max-width:560px) { table { font-size:12px } th, td { padding:7px 6px 7px 0 } th.n { white-space:normal }
  section { overflow-x:auto } svg { min-width:520px }
  .candidates tr { display:flex; flex-wrap:wrap; gap:0 12px; padding:8px 0; border-bottom:1px solid var(--line) }
  .candidates tr:first-child { display:none } .candidates td { border:0; padding:0 }
  .candidates td:empty { display:none }
  .candidates .drop::before { content:"drop " } .candidates .why { flex-basis:100%; font-weight:400 }
  main { padding:24px 14px } h1 { font-size:21px } section { padding:18px 16px } }
@media print { body { background:#fff } section, .tile { break-inside:avoid } }
"""

"""The look of a report's page: one column, light and dark by the reader's setting, printable."""

CSS = """
:root {
  --paper: #ffffff; --page: #f4f6f8; --ink: #1f2933; --muted: #5f6b7a; --line: #d9dee4;
  --blue: #0072b2; --vermilion: #d55e00; --amber: #c98a00; --green: #00875f; --sky: #56b4e9;
  --purple: #aa4a8f; --hover: #eef2f6; color-scheme: light dark;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #171c22; --page: #0f1317; --ink: #e6eaee; --muted: #9aa6b2; --line: #333c46;
    --blue: #5ab4ee; --vermilion: #f07f33; --amber: #e6ad3c; --green: #35b98c; --sky: #3d7ca5;
    --purple: #d487bd; --hover: #20272f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 12px; }
p { margin: 0 0 10px; }
a { color: var(--blue); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
.lead { color: var(--muted); margin: 0 0 22px; }
section, .verdicts {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin: 0 0 18px; scroll-margin-top: 12px;
}
.verdicts { padding: 6px 22px; }
.verdicts ul { list-style: none; margin: 0; padding: 0; }
.verdicts li { padding: 13px 0 13px 34px; position: relative; font-size: 1.08rem; }
.verdicts li + li { border-top: 1px solid var(--line); }
.verdicts li:first-child { font-size: 1.3rem; line-height: 1.4; font-weight: 600; }
.verdicts li::before {
  position: absolute; left: 0; font-weight: 700; width: 24px; text-align: center;
}
.verdicts details { border-top: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; color: var(--blue); }
.verdicts details li { font-size: 0.95rem; font-weight: 400; padding-block: 8px; }
.better::before { content: "\\25B2"; color: var(--blue); }
.worse::before { content: "\\25BC"; color: var(--vermilion); }
.unclear::before { content: "\\2248"; color: var(--muted); }
.plain::before { content: "\\2022"; color: var(--muted); }
.warnings { border-left: 4px solid var(--vermilion); }
.warnings ul { margin: 0; padding-left: 20px; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 18px; font-size: 0.9rem; }
nav a {
  border: 1px solid var(--line); border-radius: 99px; padding: 4px 13px; background: var(--paper);
}
.scroll { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; font-size: 0.9rem; line-height: 1.4; min-width: 100%; }
.caption { font-weight: 600; font-size: 0.92rem; margin: 14px 0 6px; }
th, td {
  padding: 6px 14px 6px 0; text-align: right; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; overflow-wrap: normal;
}
th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 4px; }
tbody tr + tr td, tbody tr + tr th { border-top: 1px solid var(--line); }
tbody tr:hover > * { background: var(--hover); }
.text { text-align: left; }
td.text { white-space: normal; min-width: 110px; max-width: 420px; }
tbody th {
  position: sticky; left: 0; background: var(--paper); color: var(--ink); border-bottom: 0;
  text-align: left; white-space: normal; min-width: 124px; max-width: 260px;
  overflow-wrap: break-word;
}
tbody tr:last-child th { border-bottom: 0; }
td strong, th strong { color: var(--blue); font-weight: 700; }
.note { color: var(--muted); font-size: 0.84rem; margin: 0 0 6px; }
figure { margin: 0 0 14px; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 14px 18px; align-items: start;
}
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.panel { max-width: 450px; }
.panel svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
.wide svg { display: block; height: auto; }
svg text { font-variant-numeric: tabular-nums; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media (min-width: 820px) {
  .alone { display: grid; grid-template-columns: 450px 1fr; gap: 24px; align-items: start; }
  .alone figcaption { margin-top: 34px; }
}
figcaption { font-size: 0.9rem; margin-top: 10px; }
.how { color: var(--muted); font-size: 0.84rem; }
.command {
  font: 0.8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--muted);
  background: var(--page); border-radius: 6px; padding: 8px 11px; margin: 8px 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.command::before { content: "$ "; user-select: none; }
footer { color: var(--muted); font-size: 0.86rem; }
@media (max-width: 600px) {
  main { padding: 18px 10px 40px; }
  h1 { font-size: 1.4rem; }
  section { padding: 16px 14px; }
  .verdicts { padding: 2px 14px; }
  .verdicts li { padding-left: 28px; font-size: 1rem; }
  .verdicts li:first-child { font-size: 1.12rem; }
  th, td { padding-right: 12px; }
  table { font-size: 0.86rem; }
  tbody th { min-width: 96px; max-width: 132px; }
}
@media print {
  body { background: #fff; font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  details::details-content { content-visibility: visible; height: auto; }
  section, .verdicts { border: 0; padding: 0; margin: 0 0 16pt; }
  .warnings { padding-left: 10pt; }
  figure, tr, li, .panel { break-inside: avoid; }
  h2, .caption { break-after: avoid; }
  .scroll, .wide { overflow: visible; }
  .panels { grid-template-columns: repeat(2, 1fr); }
  .wide svg { width: 100% !important; }
  table { font-size: 8pt; }
  th, td { padding: 3pt 6pt 3pt 0; white-space: normal; }
  tbody th { position: static; }
}
"""

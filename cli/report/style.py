"""The style sheet of the page, light or dark as the reader's system prefers."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1b1c19; --muted: #5f605a; --line: #dddcd5;
  --kept: #2a66b0; --dropped: #c4671a; --band: #2a66b033; }
@media (prefers-color-scheme: dark) { :root { --paper: #151613; --card: #1d1e1b; --ink: #ebeae4; --muted: #a5a49b;
  --line: #383932; --kept: #71a9ea; --dropped: #e79257; --band: #71a9ea40; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .4rem; font-size: 1rem; }
header p { margin: .3rem 0; overflow-wrap: anywhere; }
nav { margin-top: .8rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
a { color: var(--kept); }
.note { margin: .4rem 0; color: var(--muted); font-size: .88rem; }
.missing { margin: 1rem 0 0; padding: .7rem 1rem .7rem 2rem; background: var(--card); border: 1px solid var(--line);
  border-left: 4px solid var(--dropped); border-radius: 4px; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0 0; padding: 0; }
.tiles div { min-width: 10rem; padding: .6rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; }
.tiles dt { color: var(--muted); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; color: var(--muted); font-size: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-size: .9rem; }
caption { padding: .2rem 0; text-align: left; font-weight: 600; }
th, td { padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  font-weight: 400; white-space: pre-wrap; }
thead th { color: var(--muted); white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.texts td { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { margin: .5rem 0; padding: .8rem 1rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; font: .84rem/1.45 ui-monospace, monospace; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: .88rem; }
details .scroll { max-height: 24rem; overflow-y: auto; }
figure { margin: .4rem 0; }
figcaption { color: var(--muted); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .8rem 1.5rem; }
.small-multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .3rem 1rem; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
/* A chart as wide as a phone is drawn at half its size. */
@media (max-width: 40rem) { svg[width="620"] text { font-size: 17px; } }
.end { text-anchor: end; } .middle { text-anchor: middle; }
svg text.dropped { fill: var(--dropped); }
.grid { stroke: var(--line); } .base { stroke: var(--muted); }
.kept { fill: var(--kept); } .dropped { fill: var(--dropped); }
.curve { fill: none; stroke: var(--kept); stroke-width: 1.6; stroke-linejoin: round; }
.band { fill: var(--band); } .dot { fill: var(--kept); } .hit { fill: transparent; }
.hit:hover { fill: var(--kept); }
.reference { stroke: var(--dropped); stroke-dasharray: 5 4; }
.key { margin-right: 1rem; } .key::before { content: ""; display: inline-block; width: .8em; height: .8em;
  margin-right: .4em; border-radius: 2px; background: var(--kept); }
.dropped-key::before { background: var(--dropped); }
"""

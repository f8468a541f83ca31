"""Style and script of the report of a run; the slider and the button of the sample grids need the script."""

from gigagan_jax.reporting import charts

# The classes k-... are the causes of telemetry/goodput.py.
STYLE = (
    charts.STYLE
    + """
.badge { display: inline-block; font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 999px;
  vertical-align: middle; margin-left: 8px; background: var(--rail); color: var(--soft); }
.badge.done { background: var(--c2); color: var(--page); } .badge.running { background: var(--c0); color: var(--page); }
.badge.failed { background: var(--bad); color: var(--page); }
@media (min-width: 561px) { .tiles { grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); } }
h2.part { font-size: 20px; margin: 30px 0 12px; }
.film img { display: block; width: 100%; height: auto; max-height: 78vh; object-fit: contain; border-radius: 6px;
  background: var(--rail); image-rendering: auto; }
.film .row { display: flex; align-items: center; gap: 14px; margin-top: 12px; }
.film input { flex: 1; min-width: 0; accent-color: var(--bar); }
.film output { min-width: 7em; font-variant-numeric: tabular-nums; }
.film button { font: inherit; color: var(--ink); background: var(--rail); border: 1px solid var(--line); border-radius: 8px;
  padding: 3px 14px; cursor: pointer; }
.stack { display: flex; height: 34px; border-radius: 8px; overflow: hidden; background: var(--rail); }
.stack div { min-width: 1px; }
.k-step { background: var(--c2); } .k-compile { background: var(--c0); } .k-start { background: var(--c6); }
.k-data { background: var(--c1); } .k-checkpoint { background: var(--c4); } .k-evaluation { background: var(--c3); }
.k-profile { background: #8d7ad0; } .k-other { background: var(--c7); } .k-repeated { background: var(--bad); }
.k-skipped { background: var(--c5); } .k-down { background: var(--line); }
.causes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 3px 26px; margin-top: 12px;
  font-size: 14px; }
.causes div { display: flex; gap: 8px; align-items: center; }
.causes i { width: 11px; height: 11px; border-radius: 3px; flex: none; }
.causes span { flex: 1; } .causes b { font-weight: 600; font-variant-numeric: tabular-nums; }
.causes em { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums; min-width: 6.5em; text-align: right; }
td { overflow-wrap: anywhere; } table.settings td:first-child { min-width: 15em; }
table.settings td:not(:first-child) { font-family: ui-monospace, Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--soft); margin-top: 12px; }
.finding { border-left: 3px solid var(--mark); padding: 2px 0 2px 10px; margin: 8px 0; font-size: 14px; }
.finding.stop, .finding.rollback { border-color: var(--bad); }
.finding span { color: var(--soft); font-size: 13px; display: block; }
"""
)
SCRIPT = (
    charts.SCRIPT
    + """
const film = document.querySelector('.film');
if (document.getElementById('grids')) {
  const grids = JSON.parse(document.getElementById('grids').textContent), slider = film.querySelector('input');
  const picture = film.querySelector('img'), said = film.querySelector('output'), button = film.querySelector('button');
  let timer = null;
  const draw = () => { const g = grids[+slider.value]; picture.src = g.uri; said.textContent = g.kimg + ' kimg'; };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = 'Play'; };
  slider.addEventListener('input', () => { stop(); draw(); });
  button.addEventListener('click', () => {
    if (timer) return stop();
    button.textContent = 'Pause';
    if (+slider.value >= grids.length - 1) slider.value = 0;
    draw();
    timer = setInterval(() => { slider.value = +slider.value + 1; draw(); if (+slider.value >= grids.length - 1) stop(); }, 450);
  });
}
"""
)

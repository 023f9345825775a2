// A figure: its picture by uPlot on a canvas, read with the mouse or the arrow keys, its values as text, its table.
import { h, svg } from "./dom.js";

const COLOURS = 6;
const DASHES = [[], [7, 4], [2, 3], [11, 4, 2, 4]];
const HEIGHT = 200;
const AXIS_FONT = "12px system-ui, sans-serif";

/** A number by a Python format such as "+.3f", ".1%" or ".1e"; a dash where there is none. */
export function show(value, form) {
  if (value === null || value === undefined) return "–";
  const [, sign, digits, kind] = form.match(/^(\+?)\.(\d)([f%e])$/);
  const count = Number(digits);
  let text = kind === "e" ? value.toExponential(count) : (kind === "%" ? value * 100 : value).toFixed(count);
  if (sign && value >= 0) text = `+${text}`;
  return (kind === "%" ? `${text} %` : text).replace("-", "\u2212");
}

function tick(value, form) {
  if (value === null) return "";
  if (form.endsWith("e") && value !== 0) return Number(value.toPrecision(3)).toExponential().replaceAll("-", "\u2212");
  const scaled = form.endsWith("%") ? value * 100 : value;
  const text = Math.abs(scaled) >= 1e5 ? scaled.toExponential(1) : String(Number(scaled.toPrecision(6)));
  return text.replace("-", "\u2212") + (form.endsWith("%") ? " %" : "");
}

/** The newest value of a column, and its row; the column may end with rows that lack it. */
function latest(column, row = column.length - 1) {
  while (row > 0 && (column[row] === null || column[row] === undefined)) row -= 1;
  return [column[row], row];
}

/** Lines of a figure: run, column, label, colour and dash; two of up to 24 never look the same. */
function lines(figure, runs) {
  const { keys, labels } = figure;
  const look = (number, at) => {
    if (runs.length > 1 && keys.length <= DASHES.length) return [number, keys.length > 1 ? at : number];
    if (runs.length * keys.length <= 12) return [at, at];
    const nth = number * keys.length + at;
    return [nth, Math.floor(nth / COLOURS)];
  };
  return runs.flatMap((run, number) =>
    keys.map((key, at) => {
      const [colour, dash] = look(number, at);
      const label = runs.length === 1 ? labels[at] : keys.length > 1 ? `${run.name} · ${labels[at]}` : run.name;
      return { run, key, label, colour: colour % COLOURS, dash: DASHES[dash % DASHES.length] };
    }),
  );
}

function swatch(line) {
  const dash = line.dash.length ? { "stroke-dasharray": line.dash.join(" ") } : {};
  const stroke = svg("line", { x1: 0, y1: 6, x2: 28, y2: 6, "stroke-width": 2.5, class: `series-${line.colour}`, ...dash });
  return svg("svg", { width: 28, height: 12, "aria-hidden": "true" }, stroke);
}

/** Corners of a run's mark in the frontier around 0, 0; a circle has none. */
function corners(number, size) {
  const around = [null, [[-1, -1], [1, -1], [1, 1], [-1, 1]], [[0, -1.2], [1.1, 1], [-1.1, 1]], [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]];
  return around[number % around.length]?.map(([x, y]) => [x * size, y * size]);
}

function mark(line, number) {
  const found = corners(number, 4.5)?.map(([x, y]) => `${x + 6},${y + 6}`).join(" ");
  const shape = found ? svg("polygon", { points: found }) : svg("circle", { cx: 6, cy: 6, r: 4.5 });
  return svg("svg", { width: 12, height: 12, "aria-hidden": "true", class: `mark-of series-${line.colour}` }, shape);
}

/** From where to where an axis goes; uPlot gives a line that is 0 throughout an axis up to 100. */
export function range(low, high) {
  if (low === null || low !== high) return low === null ? [null, null] : uPlot.rangeNum(low, high, 0.1, true);
  const room = Math.abs(low) / 10 || 0.1;
  return [low === 0 ? 0 : low - room, high + room];
}

export class Chart {
  /** A figure of the document over its runs; `axis` names a row: "iteration" or "epoch". */
  constructor(figure, runs, axis) {
    Object.assign(this, { figure, runs, axis, plot: null, row: null });
    this.lines = figure.frontier ? runs.map((run, at) => ({ run, label: run.name, colour: at % COLOURS, dash: [] })) : lines(figure, runs);
    this.values = this.lines.map(() => h("span", { class: "value" }));
    this.at = h("p", { class: "at soft small" });
    const legend = this.lines.map((line, at) =>
      h("li", {}, this.lines.length > 1 && (figure.frontier ? mark(line, at) : swatch(line)), this.lines.length > 1 && h("span", {}, line.label), this.values[at]),
    );
    this.host = h("div", {
      class: "plot", role: "slider", tabindex: "0", "aria-label": `${figure.title}: read values with the arrow keys`,
      onkeydown: (event) => this.key(event), onblur: () => this.read(null),
    });
    this.table = h("details", { ontoggle: () => this.fill() }, h("summary", {}, "Table"));
    this.element = h(
      "article",
      { class: "panel", id: figure.id, "aria-labelledby": `${figure.id}-title` },
      h("h3", { id: `${figure.id}-title` }, figure.title),
      h("ul", { class: this.lines.length > 1 ? "values" : "values single" }, legend),
      this.at,
      this.host,
      h("p", { class: "small" }, figure.sentence.charAt(0).toUpperCase() + figure.sentence.slice(1), "."),
      figure.normal && h("p", { class: "small soft" }, h("b", {}, "Normal: "), `${figure.normal}.`),
      this.table,
    );
    this.prepare();
    this.read(null);
    new ResizeObserver(() => this.size()).observe(this.host);
  }

  /** The data as uPlot has them. */
  prepare() {
    if (this.figure.frontier) {
      const points = this.runs.map((run) => run.frontier);
      this.data = [null, ...points.map((of) => [of.map((point) => point[0]), of.map((point) => point[1])])];
      this.x = points.reduce((most, of) => (of.length > most.length ? of : most), []).map((point) => point[2]);
      return;
    }
    const shown = (run, key) => {
      const column = run.columns[key] || run.x.map(() => null);
      return this.figure.log ? column.map((value) => (value > 0 ? value : null)) : column;
    };
    const keys = [...this.figure.keys, ...(this.figure.band || [])];
    const tables = this.runs.map((run) => [run.x, ...keys.map((key) => shown(run, key))]);
    this.data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    this.x = this.data[0];
  }

  /** The columns of a line in `data`: a run's follow each other, its band's last. */
  column(line) {
    const width = this.figure.keys.length + (this.figure.band ? 2 : 0);
    return this.data[1 + this.runs.indexOf(line.run) * width + this.figure.keys.indexOf(line.key)];
  }

  colour(number) {
    return getComputedStyle(this.host).getPropertyValue(`--series-${number}`).trim();
  }

  style(name) {
    return getComputedStyle(this.host).getPropertyValue(name).trim();
  }

  size() {
    const width = Math.floor(this.host.clientWidth);
    if (!width || (this.plot && this.plot.width === width)) return;
    if (this.plot) this.plot.setSize({ width, height: HEIGHT });
    else this.draw(width);
  }

  /** Draw anew, as the colours may have changed. */
  draw(width = Math.floor(this.host.clientWidth)) {
    if (this.plot) this.plot.destroy();
    if (!width) return;
    const { form, frontier, log } = this.figure;
    const grid = { stroke: this.style("--line"), width: 1 };
    const look = { stroke: this.style("--soft"), font: AXIS_FONT, grid, ticks: grid };
    const across = frontier ? ".1f" : ".0f";
    const options = {
      width,
      height: HEIGHT,
      padding: [10, 12, 0, 0],
      legend: { show: false },
      scales: { x: { time: false, auto: true }, y: log ? { distr: 3 } : { range: (_, low, high) => range(low, high) } },
      axes: [
        { ...look, size: 28, space: 44, label: frontier ? "√KL" : this.axis, labelSize: 16, labelGap: 0, labelFont: AXIS_FONT, incrs: frontier ? undefined : [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4],
          values: (_, splits) => splits.map((value) => tick(value, across)) },
        { ...look, size: 58, values: (_, splits) => splits.map((value) => tick(value, form)) },
      ],
    };
    this.plot = new uPlot(frontier ? this.scattered(options) : this.lined(options), this.data, this.host);
  }

  lined(options) {
    const series = [{}];
    const bands = [];
    for (const run of this.runs) {
      for (const line of this.lines.filter((of) => of.run === run))
        series.push({ stroke: this.colour(line.colour), dash: line.dash, width: 2, points: { size: 4 } });
      if (!this.figure.band) continue;
      const { colour } = this.lines.find((of) => of.run === run);
      series.push({ width: 0, points: { show: false } }, { width: 0, points: { show: false } });
      bands.push({ series: [series.length - 1, series.length - 2], fill: `${this.colour(colour)}2e` });
    }
    const cursor = { y: false, sync: { key: "figures", setSeries: false }, points: { size: 7 }, drag: { setScale: true, x: true, y: false } };
    const hooks = { setCursor: [(plot) => this.read(plot.cursor.idx)] };
    return { ...options, series, bands, cursor, hooks };
  }

  scattered(options) {
    const paint = (plot, number) => {
      const { ctx } = plot;
      const last = plot.data[number][0].length - 1;
      const chosen = this.row === null ? last : Math.min(this.row, last);
      uPlot.orient(plot, number, (_, xs, ys, scaleX, scaleY, toX, toY, left, top, wide, high) => {
        ctx.save();
        ctx.fillStyle = ctx.strokeStyle = this.colour(this.lines[number - 1].colour);
        for (let row = 0; row <= last; row += 1) {
          ctx.globalAlpha = 0.2 + (0.8 * (row + 1)) / (last + 1);
          const [x, y] = [toX(xs[row], scaleX, wide, left), toY(ys[row], scaleY, high, top)];
          const shape = corners(number - 1, 3 * devicePixelRatio);
          ctx.beginPath();
          if (shape) shape.forEach(([right, down]) => ctx.lineTo(x + right, y + down));
          else ctx.arc(x, y, 3 * devicePixelRatio, 0, 2 * Math.PI);
          ctx.fill();
        }
        ctx.globalAlpha = 1;
        ctx.lineWidth = 2 * devicePixelRatio;
        ctx.beginPath();
        ctx.arc(toX(xs[chosen], scaleX, wide, left), toY(ys[chosen], scaleY, high, top), 7 * devicePixelRatio, 0, 2 * Math.PI);
        ctx.stroke();
        ctx.restore();
      });
      return null;
    };
    const facets = [{ scale: "x", auto: true }, { scale: "y", auto: true }];
    const series = [null, ...this.lines.map(() => ({ facets, paths: paint, points: { show: false } }))];
    return { ...options, mode: 2, series, cursor: { show: false } };
  }

  /** Show the values of a row as text; of the newest one where nobody looks at another. */
  read(row) {
    this.row = row ?? null;
    const end = this.x.length - 1;
    const at = row ?? end;
    const texts = this.lines.map((line, number) => {
      const value = this.figure.frontier ? this.point(line.run, at) : end < 0 ? "–" : show(latest(this.column(line), at)[0], this.figure.form);
      this.values[number].textContent = value;
      return this.lines.length > 1 ? `${line.label} ${value}` : value;
    });
    const newest = row === null || row === undefined;
    const place = end < 0 ? "nothing logged yet" : newest && this.runs.length > 1 ? `latest ${this.axis} of each` : `${newest ? "latest, " : ""}${this.axis} ${this.x[at]}`;
    this.at.textContent = place;
    const ends = { "aria-valuemin": 0, "aria-valuemax": Math.max(end, 0), "aria-valuenow": Math.max(at, 0) };
    for (const [name, value] of Object.entries(ends)) this.host.setAttribute(name, value);
    this.host.setAttribute("aria-valuetext", `${place}: ${texts.join(", ")}`);
  }

  point(run, row) {
    const found = run.frontier[Math.min(row, run.frontier.length - 1)];
    return found ? `${show(found[1], "+.3f")} at √KL ${show(found[0], ".2f")}` : "–";
  }

  key(event) {
    const end = this.x.length - 1;
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -1e9, End: 1e9 }[event.key];
    if (!step || end < 0) return;
    event.preventDefault();
    const row = Math.max(0, Math.min(end, (this.row ?? end) + step));
    if (this.plot && !this.figure.frontier)
      this.plot.setCursor({ left: this.plot.valToPos(this.x[row], "x"), top: HEIGHT / 3 }, false);
    this.read(row);
    if (this.plot && this.figure.frontier) this.plot.redraw(false);
  }

  /** The data have changed. */
  update() {
    this.prepare();
    if (this.plot) this.plot.setData(this.data);
    this.read(null);
    this.fill();
  }

  /** The table, where it is open. */
  fill() {
    const [summary] = this.table.children;
    this.table.replaceChildren(summary);
    if (!this.table.open) return;
    const { frontier, form, title } = this.figure;
    const heads = frontier ? this.lines.flatMap((line) => [`${line.label}: √KL`, "score"]) : this.lines.map((line) => line.label);
    const cells = frontier
      ? (row) => this.runs.flatMap((run) => [show(run.frontier[row]?.[0], ".2f"), show(run.frontier[row]?.[1], form)])
      : (row) => this.lines.map((line) => show(this.column(line)[row], form));
    const rows = [...this.x.keys()].reverse().map((row) => h("tr", {}, h("th", { scope: "row" }, this.x[row]), cells(row).map((text) => h("td", {}, text))));
    this.table.append(
      h("div", { class: "scroll table", tabindex: "0", role: "region", "aria-label": `Table: ${title}` },
        h("table", {}, h("caption", { class: "hidden" }, title),
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, this.axis), heads.map((head) => h("th", { scope: "col" }, head)))),
          h("tbody", {}, rows))),
    );
  }
}

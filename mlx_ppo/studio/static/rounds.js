// What each round brought, in one picture and a table that says the same.
import { h, svg } from "./dom.js";

const WIDTH = Math.max(240, Math.min(640, document.documentElement.clientWidth - 68)); // text keeps its size
const HEIGHT = 240, LEFT = 48, RIGHT = 16, TOP = 16, BOTTOM = 32;
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const y = (share) => TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);

/** Accuracy of the reward model on held-out labels, and win rate over the start, by round. */
export function picture(rounds) {
  const any = rounds.some((round) => round.accuracy || round.wins);
  const title = h("h2", {}, "What each round brought");
  if (!any) return [title, h("p", { class: "soft" }, "The reward model's accuracy on held-out labels, and how often the policy's answers are preferred to the start's, will stand here.")];
  return [title, drawing(rounds), legend(), h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "The same as a table" }, table(rounds))];
}

function drawing(rounds) {
  const x = (at) => LEFT + ((at + 0.5) * (WIDTH - LEFT - RIGHT)) / Math.max(rounds.length, 3);
  const made = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Accuracy and win rate by round; the table below has the figures", class: "picture" });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    made.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share), class: share === 0.5 ? "axis chance" : "axis" }));
    made.append(svg("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)));
  }
  rounds.forEach((round, at) => made.append(svg("text", { x: x(at), y: HEIGHT - 8, "text-anchor": "middle" }, `round ${round.number}`)));
  series(made, rounds, x, "accuracy", -6);
  series(made, rounds, x, "wins", 6);
  return made;
}

function series(made, rounds, x, name, beside) {
  const points = rounds.map((round, at) => [x(at) + beside, round[name]]).filter(([, value]) => value);
  made.append(svg("polyline", { points: points.map(([at, value]) => `${at},${y(value.share)}`).join(" "), class: `line ${name}` }));
  for (const [at, value] of points) {
    if (value.low !== undefined) made.append(svg("line", { x1: at, x2: at, y1: y(value.low), y2: y(value.high), class: `whisker ${name}` }));
    const mark = name === "wins" ? svg("rect", { x: at - 4, y: y(value.share) - 4, width: 8, height: 8, class: name }) : svg("circle", { cx: at, cy: y(value.share), r: 5, class: name });
    made.append(mark);
  }
}

function legend() {
  return h("p", { class: "small" }, h("span", { class: "dot accuracy", "aria-hidden": "true" }, "●"), " accuracy of the reward model on held-out labels (chance: 50 %), ", h("span", { class: "dot wins", "aria-hidden": "true" }, "■"), " preferred to the start, ties half; each with a 95 % interval");
}

/** A share with its count and interval. */
function said(rate) {
  return rate ? `${percent(rate.share)} of ${rate.count} (${percent(rate.low)} to ${percent(rate.high)})` : "–";
}

function table(rounds) {
  const cells = (round) => [
    round.number,
    round.labels,
    said(round.accuracy),
    said(round.wins),
    said(round.judged),
    said(round.agree),
  ];
  const names = ["Round", "Labels", "Reward model right", "Preferred to the start", "By the reward model", "Hand and model agree"];
  return h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rounds.map((round) => h("tr", {}, cells(round).map((cell) => h("td", { class: "figure" }, cell))))));
}

// A run, or several over each other, while they go on.
import { failed, get, h, say } from "./dom.js";
import { Panels } from "./panels.js";

const MOST_POINTS = 1500; // more than that, and the server puts them together anew

function loaded(tag, attributes) {
  return new Promise((done, wrong) => {
    document.head.append(h(tag, { ...attributes, onload: done, onerror: () => wrong(new Error("a part of the page is missing; reload it")) }));
  });
}

export async function show(main, first) {
  const runs = [first, ...(new URLSearchParams(location.search).get("over") || "").split("\n").filter(Boolean)];
  const asked = runs.map((run) => `run=${encodeURIComponent(run)}`).join("&");
  document.title = `${runs.join(", ")} · mlx-ppo`;
  await Promise.all([
    loaded("link", { rel: "stylesheet", href: "/static/uplot/uPlot.min.css" }),
    loaded("link", { rel: "stylesheet", href: "/static/panels.css" }),
    loaded("script", { src: "/static/uplot/uPlot.iife.min.js" }),
  ]);
  const live = h("span", { class: "soft small", id: "live" });
  const place = h("div", {});
  main.append(h("h1", {}, runs.join(", ")), live, place);
  const completions = (run, step) => get(`/api/watch/completions?run=${encodeURIComponent(runs[run])}&step=${step}`);
  let events = null;

  async function begin() {
    const { page, place: at, alone } = await get(`/api/watch?${asked}`);
    if (alone) document.querySelector("header")?.remove(); // it leads to a project's pages
    const known = new Set(page.runs.flatMap((run) => Object.keys(run.columns))); // others bring figures of their own
    const scrolled = scrollY;
    place.replaceChildren();
    const panels = new Panels(place, page, completions);
    scrollTo(0, scrolled);
    if (events) events.close();
    events = new EventSource(`/api/watch/events?${asked}&place=${encodeURIComponent(at)}`);
    events.onopen = () => {
      live.textContent = "Live: new rows appear as they are logged.";
      say("");
    };
    events.onerror = () => {
      live.textContent = "Not live: the server doesn't answer. What is shown was true before.";
    };
    events.addEventListener("reset", () => begin().catch(failed));
    events.addEventListener("new", (event) => {
      JSON.parse(event.data).forEach((news, number) => news && take(panels, page.runs[number], news));
      const anew = page.runs.some((run) => run.x.length > MOST_POINTS || Object.keys(run.columns).some((key) => !known.has(key)));
      if (anew) begin().catch(failed);
    });
  }

  await begin();
}

/** What has come to a run goes into the document, and onto the page. */
function take(panels, run, { rows, health, iterations, answers, ...state }) {
  Object.assign(run, state);
  run.health.push(...health);
  run.iterations.push(...iterations);
  run.iterations_logged += iterations.length;
  if (answers) run.answers = answers;
  if (rows.length) panels.add(run, rows);
  panels.refresh();
}

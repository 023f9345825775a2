// All that is shown of one or several runs: where they are, their health, figures, and what they write.
import { h } from "./dom.js";
import { Chart, show } from "./charts.js";

const KINDS = { best: "Highest score", rollout: "Median score", chance: "By chance", worst: "Lowest score" };
const STATES = { running: "running", finished: "finished", stopped: "stopped", empty: "nothing logged yet" };
const KEY_FIGURES = ["score", "kl", "entropy", "finished", "length", "validation_loss", "validation_accuracy", "loss"];

function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function lasting(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export class Panels {
  /**
   * Draw a document into an element.
   * @param completions what gives an iteration's kept responses: (run, step) => a promise of a list
   */
  constructor(root, page, completions) {
    Object.assign(this, { root, page, completions });
    this.axis = page.supervised ? "epoch" : "iteration";
    this.charts = page.figures.map((figure) => new Chart(figure, page.runs, this.axis));
    this.summaries = page.runs.map(() => h("div", { class: "card run" }));
    this.health = h("div", {});
    this.answers = h("div", {});
    const groups = [...new Set(page.figures.map((figure) => figure.group))];
    const sections = groups.map((group) => {
      const charts = this.charts.filter((chart) => chart.figure.group === group);
      return h("section", {}, h("h2", {}, group), h("div", { class: "panels" }, charts.map((chart) => chart.element)));
    });
    const texts = page.supervised ? [] : [this.written(), h("section", { id: "prompts" }, h("h2", {}, "The same prompts over time"), this.answers)];
    sections.splice(2, 0, ...texts);
    root.append(
      h("div", { class: "runs" }, this.summaries),
      ...page.runs.filter((run) => run.optimum).map((run) => this.optimum(run)),
      ...(page.supervised ? [] : [h("section", { id: "health" }, h("h2", {}, "Health"), this.health)]), // rules are for train
      ...sections,
    );
    this.refresh();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.charts.forEach((chart) => chart.draw()));
  }

  /** How near a policy is to the best one that its penalty allows, where `mlx-ppo frontier` was asked. */
  optimum(run) {
    const what = this.page.runs.length > 1 ? `: ${run.name}` : "";
    const lines = run.optimum.lines.join("\n");
    return h("section", { class: "optimum" }, h("h2", {}, `Share of the optimum${what}`), h("div", { class: "card" },
      h("img", { src: run.optimum.picture, alt: "gain in score against KL, of the policy, of best-of-n and of the best possible policy; the figures stand beside" }),
      h("pre", { tabindex: "0" }, lines)));
  }

  /** What isn't a figure, drawn from the document as it is now. */
  refresh() {
    this.page.runs.forEach((run, at) => this.summaries[at].replaceChildren(...this.summary(run, at)));
    this.findings();
    this.followed();
    this.choices();
  }

  /** Rows have come to a run: {x, values, frontier} each. */
  add(run, rows) {
    for (const { x, values, frontier } of rows) {
      for (const [key, value] of Object.entries(values)) {
        run.columns[key] ??= run.x.map(() => null);
        run.columns[key].push(value);
      }
      run.x.push(x);
      for (const column of Object.values(run.columns)) if (column.length < run.x.length) column.push(null);
      if (frontier) run.frontier.push(frontier);
    }
    run.count += rows.length;
    this.charts.forEach((chart) => chart.update());
  }

  summary(run, at) {
    const end = run.x.length - 1;
    const known = KEY_FIGURES.filter((key) => run.columns[key]);
    const forms = Object.fromEntries(this.page.figures.filter((figure) => !figure.frontier).flatMap((figure) => figure.keys.map((key, nth) => [key, [figure.form, figure.labels[nth]]])));
    const facts = known.filter((key) => forms[key]).map((key) => {
      const [form, label] = forms[key];
      const column = run.columns[key];
      return h("div", {}, h("dt", {}, label), h("dd", {}, h("b", {}, show(column[end], form)), h("span", { class: "soft small" }, ` from ${show(column[0], form)}`)));
    });
    const many = this.page.runs.length > 1;
    const far = run.total ? `${this.axis} ${run.done} of ${run.total}` : `${this.axis} ${run.done}`;
    const spent = run.last && run.started ? `, ${lasting(run.last - run.started)}` : "";
    return [
      h("h2", {}, many && h("span", { class: `mark series-${at % 6}`, "aria-hidden": "true" }), run.name, " ", h("span", { class: `badge ${run.state}` }, STATES[run.state])),
      h("p", { class: "soft small" }, `${run.command}, ${far}${spent}; ${run.last === null ? "" : `last row ${moment(run.last)}; `}mlx-ppo ${run.version}`),
      run.collapsed && h("p", { class: "bad" }, h("b", {}, "The policy collapsed"), ": it writes nothing of use any more. Health says what to change."),
      run.total && h("progress", { max: run.total, value: run.done, "aria-label": `${run.name}: ${far}` }),
      h("dl", { class: "facts" }, facts),
      run.every > 1 && h("p", { class: "small soft" }, `${run.count.toLocaleString("en")} rows. So that all can be drawn, lines show the lowest and the highest value of every ${run.every} rows; the first and the newest row are shown as they are. The frontier shows every so many iterations as they are.`),
    ].filter(Boolean);
  }

  findings() {
    const many = this.page.runs.length > 1;
    const rows = this.page.runs.flatMap((run) => run.health.map((found) => ({ ...found, name: run.name })));
    const silent = this.page.runs.every((run) => run.rules) ? "No rule has spoken." : "No rule has spoken; runs of an earlier version have none.";
    const items = rows.reverse().map((row) =>
      h("li", {}, h("span", { class: `badge ${row.level}` }, row.level === "warn" ? "warning" : row.level), h("b", {}, `${many ? `${row.name}, ` : ""}iteration ${row.step}: ${row.rule}`), h("p", {}, row.sentence.charAt(0).toUpperCase() + row.sentence.slice(1), "."), row.key && h("p", { class: "small soft" }, "Change ", h("code", {}, row.key))),
    );
    const all = items.length ? h("ul", { class: "findings" }, items) : h("p", { class: "soft" }, silent);
    this.health.replaceChildren(all);
  }

  followed() {
    const open = new Set([...this.answers.querySelectorAll("details[open]")].map((of) => of.dataset.place));
    const first = !this.answers.childElementCount;
    const made = this.page.runs.flatMap((run, number) =>
      run.answers.map(({ prompt, answers }, at) => {
        const place = `${number}.${at}`;
        const items = answers.map(({ step, score, parts }) =>
          h("li", {}, h("span", { class: "soft small" }, `iteration ${step}, score ${show(score, "+.2f")}`), h("p", { class: "text", dir: "auto" }, parts.map(changed))),
        );
        const name = this.page.runs.length > 1 ? `${run.name}: ` : "";
        return h("details", { class: "card", "data-place": place, open: open.has(place) || (first && at === 0) }, h("summary", {}, name, h("bdi", { class: "text" }, prompt)), h("ol", { class: "plain" }, items));
      }),
    );
    const words = h("p", { class: "small soft" }, "Held-out prompts, answered with the same random draws at every evaluation. Since the answer before: ", h("ins", {}, "words that came"), " and ", h("del", {}, "words that went"), ".");
    this.answers.replaceChildren(...(made.length ? [words, ...made] : [h("p", { class: "soft" }, "No evaluation yet.")]));
  }

  written() {
    this.chosen = h("select", { id: "of-run", onchange: () => this.choices() }, this.page.runs.map((run, at) => h("option", { value: at }, run.name)));
    this.slider = h("input", { type: "range", id: "of-iteration", min: 0, value: 0, oninput: () => this.pick() });
    this.told = h("output", { for: "of-iteration" });
    this.texts = h("div", { class: "completions" });
    this.thin = h("p", { class: "small soft" });
    return h("section", { id: "completions" }, h("h2", {}, "Completions of an iteration"),
      this.page.runs.length > 1 && h("label", { for: "of-run" }, "Run ", this.chosen),
      h("label", { for: "of-iteration" }, "Iteration ", this.told, this.slider), this.thin, this.texts);
  }

  /** The iterations that can be looked at have changed, or the run. */
  choices() {
    if (!this.slider) return;
    const run = this.page.runs[Number(this.chosen.value)];
    const end = Math.max(run.iterations.length - 1, 0);
    const follows = this.slider.value === this.slider.max || this.told.value === "";
    this.slider.max = end;
    if (follows || Number(this.slider.value) > end) this.slider.value = end;
    this.slider.disabled = run.iterations.length < 2;
    const left = run.iterations_logged - run.iterations.length;
    this.thin.textContent = left > 0 ? `${run.iterations.length} of ${run.iterations_logged} iterations are in this file.` : "";
    this.pick();
  }

  async pick() {
    const number = Number(this.chosen.value);
    const step = this.page.runs[number].iterations[Number(this.slider.value)];
    this.told.value = step ?? "–";
    this.slider.setAttribute("aria-valuetext", `iteration ${step ?? "none"}`);
    if (step === undefined) return this.texts.replaceChildren(h("p", { class: "soft" }, "No iteration yet."));
    const place = `${number}.${step}`;
    if (place === this.wanted) return undefined;
    this.wanted = place;
    let found = [];
    try {
      found = await this.completions(number, step);
    } catch {
      this.wanted = null;
      return this.texts.replaceChildren(h("p", { class: "bad" }, "These completions can't be had: the server doesn't answer."));
    }
    if (this.wanted !== place) return undefined;
    const order = Object.keys(KINDS);
    found.sort((one, other) => order.indexOf(one.kind) - order.indexOf(other.kind));
    const cards = found.map(({ kind, prompt, completion, score }) =>
      h("figure", { class: "card" }, h("figcaption", {}, h("b", {}, KINDS[kind] || kind), ` ${show(score, "+.3f")}`), h("p", { class: "text", dir: "auto" }, h("span", { class: "soft" }, prompt), completion)),
    );
    return this.texts.replaceChildren(...cards);
  }
}

function changed([kind, words]) {
  return kind === "=" ? h("span", {}, words) : h(kind === "+" ? "ins" : "del", {}, words);
}

// The project: the loop as steps, each with what is needed for it, and what was started.
import { failed, get, h, post, say } from "./dom.js";
import { picture } from "./rounds.js";

const EVERY = 1200; // milliseconds between looks at what has changed
/** The page of a run, whatever its name holds. */
const watching = (run) => `/watch/${run.split("/").map(encodeURIComponent).join("/")}`;
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

class Page {
  constructor(main) {
    this.title = h("h1", {}, "Project");
    this.steps = h("ol", { class: "steps" });
    this.rounds = h("section", { class: "card", "aria-label": "Rounds" });
    this.jobs = h("section", { class: "card", "aria-label": "Jobs" });
    this.runs = h("section", { class: "card", "aria-label": "Runs" });
    this.drawn = {};
    this.turns = {}; // of each step, as it was drawn last
    this.logs = new Map(); // of the jobs whose log is open
    main.append(this.title, this.steps, this.rounds, this.jobs, this.runs);
  }

  async look() {
    const state = await get("/api/project");
    this.state = state;
    this.title.replaceChildren("Project ", h("span", { class: "soft small" }, state.folder));
    const steps = this.plan(state);
    const current = steps.findLastIndex((step) => step.done) + 1; // the last one is never done
    steps.forEach((step, at) => this.draw(`step ${at}`, [...step.key, step.done, at === current], () => this.step(step, at, at === current), this.steps, at));
    this.draw("rounds", state.rounds, () => picture(state.rounds), this.rounds);
    this.draw("jobs", state.jobs, () => this.jobList(state.jobs), this.jobs);
    this.draw("runs", state.runs, () => this.runList(state.runs), this.runs);
    for (const [name, place] of this.logs) this.log(name, place);
  }

  /** Put a part in anew where what it shows has changed, and nobody is typing in it. */
  draw(name, key, make, place, at = null) {
    const text = JSON.stringify(key);
    const old = at === null ? place : place.children[at];
    const typing = old && old.contains(document.activeElement) && document.activeElement.matches("input, textarea, select");
    if (this.drawn[name] === text || typing) return;
    this.drawn[name] = text;
    const focused = old && old.contains(document.activeElement) ? document.activeElement.id : "";
    if (at === null) place.replaceChildren(...[make()].flat(3));
    else if (old) old.replaceWith(make());
    else place.append(make());
    if (focused) document.getElementById(focused)?.focus();
  }

  plan(state) {
    const round = state.rounds.at(-1);
    const number = round ? round.number : 1;
    const running = (kind) => state.jobs.find((job) => job.kind === kind && job.state === "running");
    const { reward, train } = round || {};
    return [
      { name: "Model", done: Boolean(state.model), said: state.model, body: () => this.model(state), key: [state.model, state.models, running("import")] },
      { name: "Prompts", done: Boolean(state.prompts), said: state.prompts, body: () => this.prompts(state), key: [state.prompts, state.prompt_sets, state.model] },
      { name: `Label, round ${number}`, done: Boolean(round) && round.labels >= 20, said: round ? `${round.labels} answers` : "", body: () => this.label(round), key: [number, round && round.labels, state.prompts] },
      { name: "Reward model", done: Boolean(reward && reward.done), said: this.of(reward, round && round.accuracy, "right on held-out labels"), body: () => this.reward(state, running("reward")), key: [number, round && round.labels > 1, reward, round && round.accuracy, running("reward")] },
      { name: "Policy", done: Boolean(train && train.done), said: this.of(train), body: () => this.train(state, running("train")), key: [number, reward, round && round.accuracy, train, running("train")] },
      { name: "Compare", done: Boolean(round && round.wins && round.wins.count >= 10), said: round && round.wins ? `preferred in ${percent(round.wins.share)} of ${round.wins.count}` : "", body: () => this.compare(round), key: [number, train, round && round.wins] },
      { name: "Next round", done: false, said: "", body: () => this.next(round), key: [number, train] },
    ];
  }

  of(result, figure, words) {
    if (!result) return "";
    if (result.collapsed) return "collapsed: it writes nothing of use any more";
    return figure ? `${percent(figure.share)} ${words} (${figure.count})` : result.state;
  }

  /** One step; what a person opened or closed stays so until the step is done or its turn. */
  step(step, at, current) {
    const turn = `${step.done} ${current}`;
    const open = this.turns[at] === turn ? document.querySelector(`#step-${at} details`).open : current;
    this.turns[at] = turn;
    return h(
      "li",
      { class: `card step ${step.done ? "done" : ""} ${current ? "current" : ""}`, id: `step-${at}` },
      h(
        "details",
        { open },
        h("summary", { id: `summary-${at}` }, h("span", { class: "mark", "aria-hidden": "true" }, step.done ? "✓" : `${at + 1}`), h("b", {}, step.name), " ", h("span", { class: "soft" }, step.said || "")),
        h("div", { class: "body" }, step.body()),
      ),
    );
  }

  /** A button that sends something and looks what came of it. */
  does(text, path, value, { main = true, id = null, disabled = false, after = null } = {}) {
    const send = async () => {
      made.disabled = true;
      try {
        const answer = await post(path, typeof value === "function" ? value() : value || {});
        if (after) say(after);
        await this.look();
        return answer;
      } catch (error) {
        failed(error);
      } finally {
        made.disabled = disabled;
      }
    };
    const made = h("button", { type: "button", class: main ? "main" : "", id, disabled: disabled || null, onclick: send }, text);
    return made;
  }

  field(text, input) {
    return h("label", {}, text, input);
  }

  model(state) {
    const names = Object.keys(state.models);
    const path = h("input", { id: "import-path", placeholder: "/home/me/model.gguf" });
    const name = h("input", { id: "import-name", placeholder: "my-model" });
    const size = (bytes) => (bytes > 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);
    const choose = (each) => h("li", {}, this.does(each === state.model ? `${each} is chosen` : `Take ${each}`, "/api/model", { model: each }, { main: false, disabled: each === state.model }), " ", h("span", { class: "soft" }, size(state.models[each].bytes)));
    return [
      names.length ? h("ul", { class: "plain" }, names.map(choose)) : h("p", {}, "Which model shall learn? The bundled one is small and quick, and comes with prompts."),
      names.includes("models/reviews") ? null : this.does("Use the bundled example", "/api/example", {}, { id: "use-example", after: "The example's model and prompts are in place" }),
      h("details", {}, h("summary", {}, "Bring a model of yours"), this.field("GGUF file or Hugging Face folder on this machine", path), this.field("Its name here", name), this.does("Import", "/api/import", () => ({ path: path.value, name: name.value }), { main: false, after: "The import has started" })),
    ];
  }

  prompts(state) {
    const names = Object.keys(state.prompt_sets);
    const chosen = h("select", { id: "prompt-set" }, names.map((each) => h("option", { value: each, selected: each === state.prompts || null }, `${each} (${state.prompt_sets[each].train}, ${state.prompt_sets[each].held_out} held out)`)));
    const longest = h("input", { type: "number", min: 1, max: 4096, value: state.max_tokens, id: "max-tokens" });
    const temperature = h("input", { type: "number", min: 0.1, max: 5, step: 0.1, value: state.temperature, id: "temperature" });
    const bound = (id, value, rest) => h("input", { type: "number", value, id, ...rest });
    const topK = bound("top-k", state.top_k, { min: 0, step: 1 });
    const topP = bound("top-p", state.top_p, { min: 0.01, max: 1, step: "any" });
    const minP = bound("min-p", state.min_p, { min: 0, max: 0.99, step: "any" });
    const lines = h("textarea", { rows: 5, id: "prompt-lines", placeholder: "One prompt a line" });
    const path = h("input", { id: "prompt-path", placeholder: "or the path of a JSONL file on this machine" });
    const name = h("input", { id: "prompt-name", value: names.length ? `prompts-${names.length + 1}` : "my-prompts" });
    const chat = h("input", { type: "checkbox", id: "prompt-chat", checked: (state.models[state.model] || {}).chat || null });
    const values = () => ({ prompts: chosen.value, max_tokens: Number(longest.value), temperature: Number(temperature.value), top_k: Number(topK.value), top_p: Number(topP.value), min_p: Number(minP.value) });
    const given = () => ({ name: name.value, text: lines.value, path: path.value, chat: chat.checked });
    return [
      names.length ? [this.field("Prompts", chosen), h("div", { class: "row" }, this.field("Longest answer, tokens", longest), this.field("Temperature", temperature)), h("details", { open: state.top_k > 0 || state.top_p < 1 || state.min_p > 0 || null }, h("summary", {}, "Leave out improbable tokens"), h("div", { class: "row" }, this.field("Top-k (0: off)", topK), this.field("Top-p (1: off)", topP), this.field("Min-p (0: off)", minP))), this.does("Use these", "/api/choose", values, { id: "use-prompts", main: !state.prompts })] : null,
      h("details", { open: names.length ? null : true }, h("summary", {}, "New prompts"), this.field("Prompts", lines), this.field("File", path), this.field("Name", name), h("label", {}, chat, "Each line is what a user says in a chat"), this.does("Add", "/api/prompts", given, { main: false, id: "add-prompts" })),
    ];
  }

  label(round) {
    return [
      h("p", {}, "Two answers, side by side: say which is better, by one key. 100 are a good start; below 20 little can be learnt."),
      h("a", { class: "button main", href: "/label", id: "to-label" }, round && round.labels ? "Go on labelling" : "Begin to label"),
    ];
  }

  reward(state, job) {
    if (job) return this.working(job);
    const round = state.rounds.at(-1);
    const epochs = h("input", { type: "number", min: 1, max: 100, value: 8, id: "epochs" });
    const rate = h("input", { type: "number", min: 0, step: "any", value: state.small ? 0.002 : 0.0003, id: "reward-rate" });
    const kind = h("select", { id: "kind" }, h("option", { value: "pairs" }, "which is better"), h("option", { value: "ratings" }, "ratings"));
    const values = () => ({ kind: kind.value, epochs: Number(epochs.value), rate: Number(rate.value) });
    return [
      h("p", {}, "A reward model learns from the labels of all rounds to tell what you like; a fifth of the prompts is held out to measure it."),
      this.does(round && round.reward ? "Train it anew" : "Train a reward model", "/api/reward", values, { id: "train-reward", disabled: !round || round.labels < 2, main: !(round && round.reward && round.reward.done), after: "Training has started" }),
      h("details", {}, h("summary", {}, "Settings"), this.field("Learn from", kind), this.field("Passes over the labels", epochs), this.field("Learning rate", rate)),
    ];
  }

  train(state, job) {
    if (job) return this.working(job);
    const round = state.rounds.at(-1);
    const ready = Boolean(round && round.reward && round.reward.done);
    const iterations = h("input", { type: "number", min: 1, max: 10000, value: state.small ? 40 : 30, id: "iterations" });
    const kl = h("input", { type: "number", min: 0, step: "any", value: 0.1, id: "kl" });
    const rate = h("input", { type: "number", min: 0, step: "any", value: state.small ? 0.002 : 0.0005, id: "policy-rate" });
    const values = () => ({ iterations: Number(iterations.value), kl: Number(kl.value), rate: Number(rate.value) });
    const run = round && round.train && round.train.run;
    return [
      h("p", {}, "PPO moves the model towards what the reward model likes, and keeps it near where it was."),
      ready && round.accuracy && round.accuracy.low <= 0.5 ? h("p", { class: "soft" }, `On ${round.accuracy.count} held-out labels the reward model can't be told from chance; more labels help.`) : null,
      round && round.train && round.train.collapsed ? h("p", { class: "bad" }, "The policy collapsed. A score is no success then; the run's page says what to change.") : null,
      this.does(round && round.train ? "Train it anew" : "Train the policy", "/api/train", values, { id: "train-policy", disabled: !ready, main: !(round && round.train && round.train.done), after: "Training has started" }),
      run ? [" ", h("a", { class: "button", href: `/watch/${encodeURI(run)}` }, "Look at the run")] : null,
      h("details", {}, h("summary", {}, "Settings"), this.field("Iterations", iterations), this.field("Price of moving away (kl.coef)", kl), this.field("Learning rate", rate)),
    ];
  }

  working(job) {
    const run = job.run ? h("a", { class: "button", href: watching(job.run) }, "Watch") : null;
    return [h("p", { role: "status" }, "Training…"), h("div", { class: "row" }, run, this.stopButton(job))];
  }

  stopButton(job) {
    return this.does("Save and stop", `/api/jobs/${job.id}/stop`, {}, { main: false, after: "It saves and stops" });
  }

  compare(round) {
    if (!round || !round.compare || !round.train.done) return h("p", {}, "Once a policy is trained: its answers beside those of the start, blind.");
    return [h("p", {}, "Held-out prompts, answers of the start and of the new policy, in random order."), h("a", { class: "button main", href: `/label?set=${encodeURIComponent(round.compare)}`, id: "to-compare" }, "Compare blind")];
  }

  next(round) {
    const ready = Boolean(round && round.train && round.train.done);
    return [h("p", {}, "The next pairs come from the new policy; the next reward model learns from the labels of all rounds; PPO goes on from here."), this.does("Begin the next round", "/api/next-round", {}, { id: "next-round", disabled: !ready, main: false })];
  }

  jobList(jobs) {
    this.logs.clear();
    if (!jobs.length) return [h("h2", {}, "Jobs"), h("p", { class: "soft" }, "None yet. Jobs go on when this page or its server is closed.")];
    return [h("h2", {}, "Jobs"), jobs.map((job, at) => this.job(job, at))];
  }

  job(job, at) {
    const open = job.state === "running" || (at === 0 && job.state !== "finished");
    const log = h("pre", { tabindex: 0, role: "group", "aria-label": `Log of ${job.shown}` });
    const made = h("details", { open: open || null, class: "job" }, h("summary", {}, h("code", {}, job.shown), " ", h("span", { class: { finished: "good", failed: "bad", killed: "bad" }[job.state] || "soft" }, job.state)), log);
    const follow = () => (made.open ? this.logs.set(job.id, log) : this.logs.delete(job.id)) && this.log(job.id, log);
    made.addEventListener("toggle", follow);
    if (open) follow();
    const again = job.resumable ? this.does("Go on with it", `/api/jobs/${job.id}/resume`, {}, { main: false }) : null;
    return h("div", { class: "jobrow" }, made, job.state === "running" ? this.stopButton(job) : again);
  }

  async log(name, place) {
    try {
      const { text } = await get(`/api/jobs/${name}/log`);
      if (place.textContent === text) return;
      const below = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
      place.textContent = text;
      if (below) place.scrollTop = place.scrollHeight;
    } catch (error) {
      failed(error);
    }
  }

  runList(runs) {
    if (!runs.length) return [h("h2", {}, "Runs"), h("p", { class: "soft" }, "None yet.")];
    const row = (run) => h("li", {}, h("a", { href: watching(run.path) }, run.path), " ", h("span", { class: "soft" }, run.command));
    return [h("h2", {}, "Runs"), h("ul", { class: "plain" }, runs.map(row))];
  }
}

export async function show(main) {
  document.title = "Project · mlx-ppo studio";
  const page = new Page(main);
  await page.look();
  let lost = false;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      await page.look();
      if (lost) say("Connected again");
      lost = false;
    } catch (error) {
      if (!lost) failed(error);
      lost = true;
    }
  }, EVERY);
}

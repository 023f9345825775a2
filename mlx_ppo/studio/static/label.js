// One question at a time: which of two is better, how good one is, or how it should read.
import { failed, get, h, post, say } from "./dom.js";

const NAMES = { pair: "Which is better?", rating: "How good is it?", rewrite: "Write it better" };
const WORDS = { left: "left is better", right: "right is better", tie: "a tie", bad: "both bad", skip: "skipped" };
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", b: "bad", s: "skip", u: "undo" };
const LONGEST = 300; // seconds that an answer may count as having taken
const WAIT = 1000; // milliseconds
const ENOUGH = 100; // answers to begin with

function tabName() {
  const kept = sessionStorage.getItem("tab");
  if (kept) return kept;
  const made = crypto.randomUUID();
  sessionStorage.setItem("tab", made);
  return made;
}

/** A text with its line ends, and a sign where it was cut off. */
function written(text, cut) {
  return [text.trim() || h("i", { class: "soft" }, "(nothing)"), cut ? h("span", { class: "soft", title: "cut off at the longest length" }, " […]") : null];
}

function button(text, key, does, kind = "") {
  return h("button", { type: "button", class: kind, onclick: does }, text, " ", h("kbd", {}, key));
}

class Labelling {
  constructor(main, mode, set) {
    Object.assign(this, { mode, set, tab: tabName(), question: null, busy: true, began: 0 });
    this.place = h("div", { class: "question" });
    this.figures = h("p", { class: "soft figure", id: "figures" });
    main.append(h("h1", {}, set ? "Compare, blind" : NAMES[mode]), ...(set ? [] : [this.modes()]), this.place, this.figures);
    document.addEventListener("keydown", (event) => this.key(event));
  }

  modes() {
    const link = ([name, text]) =>
      h("a", { href: `/label?mode=${name}`, "aria-current": name === this.mode ? "page" : null }, text);
    const all = [["pair", "Two, side by side"], ["rating", "Rate one"], ["rewrite", "Rewrite one"]];
    return h("nav", { "aria-label": "Ways to label", class: "modes" }, all.map(link));
  }

  async next() {
    const query = new URLSearchParams({ mode: this.mode, set: this.set, tab: this.tab });
    const found = await get(`/api/label/next?${query}`);
    this.count(found.figures);
    if (found.question === null) {
      this.question = null;
      this.busy = false;
      this.place.replaceChildren(h("p", { class: "card waiting" }, found.waiting), this.undoButton());
      setTimeout(() => this.question === null && this.next().catch(failed), WAIT);
      return;
    }
    this.question = found.question;
    this.place.replaceChildren(...this.asked(found.question));
    this.began = performance.now();
    this.busy = false;
  }

  asked(question) {
    const prompt = h("p", { class: "prompt", dir: "auto" }, h("span", { class: "soft small" }, "Prompt"), h("br"), question.prompt);
    if (this.mode === "pair") return [prompt, this.sides(question), this.others()];
    const one = h("div", { class: "card answer", id: "one", dir: "auto" }, written(question.completion, question.cut));
    return [prompt, one, this.mode === "rating" ? this.rates() : this.rewrites(question), this.skipOrUndo()].flat();
  }

  sides(question) {
    const side = (name, key, text) =>
      h(
        "section",
        { class: `card side ${name}`, "aria-labelledby": `choose-${name}` },
        h("div", { class: "answer", id: name, dir: "auto" }, written(question[name], question.cut[name])),
        h("button", { type: "button", class: "main", id: `choose-${name}`, onclick: () => this.answer({ verdict: name }) }, text, " ", h("kbd", {}, key)),
      );
    return h("div", { class: "sides" }, side("left", "1", "This one"), side("right", "2", "This one"));
  }

  others() {
    return h(
      "div",
      { class: "row others" },
      button("Tie", "T", () => this.answer({ verdict: "tie" })),
      button("Both bad", "B", () => this.answer({ verdict: "bad" })),
      button("Skip", "S", () => this.answer({ verdict: "skip" })),
      this.undoButton(),
    );
  }

  rates() {
    const one = (value) =>
      h("button", { type: "button", onclick: () => this.answer({ rating: value }) }, value > 0 ? `+${value}` : `${value}`.replace("-", "−"), " ", h("kbd", {}, value + 5));
    const words = h("p", { class: "soft small", id: "scale" }, "From −4, very bad, to +4, very good.");
    return [words, h("div", { class: "rates", role: "group", "aria-labelledby": "scale" }, [-4, -3, -2, -1, 0, 1, 2, 3, 4].map(one))];
  }

  rewrites(question) {
    const text = h("textarea", { rows: 5, id: "better" });
    text.value = question.completion.trim();
    const save = () => this.answer({ better: this.spaced(question.completion, text.value) });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    return h("div", {}, h("label", {}, "The better answer", text), h("button", { type: "button", class: "main", onclick: save }, "Save ", h("kbd", {}, "Ctrl Enter")));
  }

  /** The better answer follows its prompt with the space that the old one had. */
  spaced(old, better) {
    return /^\s*/.exec(old)[0] + better.trim();
  }

  skipOrUndo() {
    return h("div", { class: "row others" }, button("Skip", "S", () => this.answer({ verdict: "skip" })), this.undoButton());
  }

  undoButton() {
    return button("Undo", "U", () => this.undo());
  }

  async answer(given) {
    if (this.busy || this.question === null) return;
    this.busy = true;
    const seconds = Math.min((performance.now() - this.began) / 1000, LONGEST);
    const { question, kind } = this.question;
    try {
      await post("/api/label/answer", { question, kind, tab: this.tab, seconds, ...given });
      say(given.verdict ? `Kept: ${WORDS[given.verdict]}` : given.better ? "Kept" : `Kept: ${given.rating}`);
    } catch (error) {
      failed(error);
      if (!(error.value && error.value.answered)) {
        this.busy = false; // not kept: the question stays
        return;
      }
    }
    await this.next().catch(failed);
  }

  async undo() {
    if (this.busy) return;
    this.busy = true;
    try {
      const { undone } = await post("/api/label/undo", { tab: this.tab });
      await this.next();
      say(undone ? "Taken back; it will be asked again" : "There is nothing to take back in this tab");
    } catch (error) {
      this.busy = false;
      failed(error);
    }
  }

  key(event) {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("textarea, input, select")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const rating = Number(key) - 5;
    if (this.mode === "rating" && key >= "1" && key <= "9") this.answer({ rating });
    else if (key === "u") this.undo();
    else if (key === "s" || (this.mode === "pair" && key in KEYS)) this.answer({ verdict: KEYS[key] });
    else return;
    event.preventDefault();
  }

  count(figures) {
    const count = figures.counts[this.mode];
    const parts = [`${count} answered`];
    if (this.mode === "pair" && !this.set && count < ENOUGH) parts.push(`${ENOUGH} are a good start`);
    if (count && figures.pace) parts.push(`${figures.pace.toFixed(0)} a minute`);
    if (this.mode === "pair" && figures.twice) parts.push(`asked twice: ${figures.alike} of ${figures.twice} answered alike`);
    const right = figures.accuracy;
    if (right && !this.set) parts.push(`the reward model is right on ${Math.round(100 * right.share)} % of ${right.count} held-out labels`);
    const { learned } = figures;
    if (learned && this.mode === "pair" && !this.set) {
      const share = (value) => `${Math.round(100 * value)}`;
      parts.push(`your choices are predicted rightly in ${share(learned.accuracy)} % (${share(learned.low)} to ${share(learned.high)})`);
      if (learned.enough) parts.push("more labels would help little now");
    }
    if (figures.damaged) parts.push(`${figures.damaged} broken lines in the file are ignored`);
    this.figures.replaceChildren(parts.join(" · "));
  }
}

export async function show(main) {
  const query = new URLSearchParams(location.search);
  const mode = query.get("mode") in NAMES ? query.get("mode") : "pair";
  document.title = "Label · mlx-ppo studio";
  try {
    await new Labelling(main, mode, query.get("set") || "").next();
  } catch (error) {
    const said = `${error.message.charAt(0).toUpperCase()}${error.message.slice(1)}. `;
    main.append(h("p", { class: "card" }, said, h("a", { href: "/" }, "To the project")));
  }
}

// Two policies: the start's answers beside the last policy's, by hand or by the reward model.
import { failed, get, h, post, say } from "./dom.js";
import { picture } from "./rounds.js";

const EVERY = 1500; // milliseconds between looks at what has changed

export async function show(main) {
  document.title = "Compare · mlx-ppo studio";
  main.append(h("h1", {}, "Compare"));
  const state = await get("/api/project");
  const found = await get("/api/compare");
  if (found.set === null) {
    main.append(h("p", { class: "card" }, "Once a policy is trained, its answers can be compared with the start's. ", h("a", { href: "/" }, "To the project")));
    return;
  }
  const judge = async () => {
    try {
      await post("/api/judge");
      say("The reward model judges; its figures come into the table below");
    } catch (error) {
      failed(error);
    }
  };
  const rounds = h("section", { class: "card" });
  let shown = "";
  const draw = (given) => {
    shown = JSON.stringify(given);
    rounds.replaceChildren(...picture(given));
  };
  draw(state.rounds);
  main.append(
    h("section", { class: "card" }, h("h2", {}, "By hand, blind"), h("p", {}, `Answers of ${state.model} and of ${found.run} to held-out prompts, in random order and without names.`), h("a", { class: "button main", href: `/label?set=${encodeURIComponent(found.set)}` }, "Compare blind")),
    h("section", { class: "card" }, h("h2", {}, "By the reward model"), h("p", {}, "The same pairs, and how often it agrees with your hand. It judges what it trained, so it is no independent witness."), h("button", { type: "button", onclick: judge }, "Let it judge")),
    rounds,
  );
  setInterval(async () => {
    const now = await get("/api/project").catch(() => null);
    if (now && JSON.stringify(now.rounds) !== shown) draw(now.rounds);
  }, EVERY);
}

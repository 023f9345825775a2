// The report's start: its data lie in the file itself.
import { h } from "./dom.js";
import { Panels } from "./panels.js";

const page = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
main.append(h("h1", {}, document.title));
new Panels(main, page, async (run, step) => page.runs[run].completions[step] || []);
main.append(h("p", { class: "soft small made" }, `Made ${new Date(page.made * 1000).toLocaleString()}. This file asks for nothing on any network.`));

// Which page this is: each has a module that exports show(main, path).
import { failed } from "./dom.js";

const PAGES = [
  [/^\/$/, "project"],
  [/^\/label$/, "label"],
  [/^\/watch\/(.+)$/s, "watch"],
  [/^\/compare$/, "compare"],
];

const main = document.getElementById("main");
for (const link of document.querySelectorAll("nav a"))
  if (link.getAttribute("href") === location.pathname) link.setAttribute("aria-current", "page");

try {
  const path = decodeURIComponent(location.pathname);
  const [match, name] = PAGES.map(([form, name]) => [path.match(form), name]).find(([match]) => match);
  const page = await import(`./${name}.js`);
  main.replaceChildren();
  await page.show(main, match[1]);
} catch (error) {
  failed(error);
}

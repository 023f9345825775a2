// Elements, requests and messages. Text goes in as text nodes only: completions are hostile.

/** An element: `h("button", {class: "main", onclick: f}, "Save")`; children are nodes, text, or lists of these. */
export function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else made.setAttribute(name, String(value));
  }
  made.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children.flat(3));
  return made;
}

async function answer(response) {
  const text = await response.text();
  let value = {};
  try {
    value = JSON.parse(text);
  } catch {
    value = { error: text };
  }
  if (!response.ok) throw Object.assign(new Error(value.error || response.statusText), { status: response.status, value });
  return value;
}

/** What an address under /api answers. */
export async function get(path) {
  return answer(await fetch(path));
}

/** Send a JSON object; throws an Error with the server's line. */
export async function post(path, value = {}) {
  const headers = { "Content-Type": "application/json" };
  return answer(await fetch(path, { method: "POST", headers, body: JSON.stringify(value) }));
}

const SHOWN = 4000; // milliseconds
let gone;

/** Tell the person, and a screen reader, one line. */
export function say(text, wrong = false) {
  const place = document.getElementById("said");
  place.replaceChildren(text);
  place.classList.toggle("wrong", wrong);
  clearTimeout(gone);
  if (!wrong) gone = setTimeout(() => place.replaceChildren(), SHOWN);
}

/** A lost connection has a line of its own. */
export function failed(error) {
  const lost = error instanceof TypeError;
  say(lost ? "The server doesn't answer. Start it again in the terminal: mlx-ppo studio" : error.message, true);
}

// The page: takes what is dropped or chosen, and shows what it is. Nothing is sent anywhere.

import { facts, verdict } from "./words.js";

const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));
const drop = byId("drop"), status = byId("status"), answers = byId("answers");

/** An element with text or other elements in it. */
function element(name, content, className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

/** One answer as a card. @param {import("./inspect.js").Answer} answer */
function card(answer) {
  const rows = facts(answer).flatMap(([name, value]) => [element("dt", name), element("dd", value)]);
  const problems = (answer.facts.problems ?? []).map((each) => element("p",
    `${each.message}${each.key ? ` (${each.key})` : ""}`, "problem"));
  const parts = [
    element("h2", answer.name),
    element("p", verdict(answer), answer.kind === "problem" ? "verdict problem" : "verdict"),
    ...problems, element("dl", rows),
  ];
  const { targets, others, patterns } = answer.facts;
  const lines = targets?.map((t) => `${t.pattern}  (${t.count}, rank ${t.rank}, alpha ${t.alpha})`) ?? patterns ?? [];
  if (lines.length) parts.push(folded(`Tensors (${lines.length} patterns)`, [...lines, ...(others ?? [])].join("\n")));
  const metadata = Object.entries(answer.metadata);
  if (metadata.length) {
    parts.push(folded(`Metadata (${metadata.length})`, metadata.map(([k, v]) => `${k}: ${v}`).join("\n")));
  }
  parts.push(folded("As JSON", JSON.stringify(answer.facts, null, 2), "json"));
  return element("article", parts);
}

/** Text that is shown when asked for. */
function folded(title, text, className = "") {
  return element("details", [element("summary", title), element("pre", text, className)]);
}

const MOST_SECONDS = 20;
/** What inspects; ended where it takes too long, because regular expressions in a config may take forever. */
let worker = newWorker();
/** How often something was asked. */
let asked = 0;

function newWorker() {
  return new Worker("worker.js", { type: "module" });
}

/** What files are. @param {import("./inspect.js").Dropped[]} dropped */
function inspected(dropped) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => {
      worker.terminate();
      worker = newWorker();
      resolve({ failed: `It takes more than ${MOST_SECONDS} seconds: a pattern in adapter_config.json may be too slow.` });
    }, MOST_SECONDS * 1000);
    const number = ++asked;
    const end = (/** @type {any} */ answer) => {
      clearTimeout(timer);
      resolve(answer);
    };
    worker.addEventListener("message", ({ data }) => data.number === number && end(data));
    worker.addEventListener("error", (event) => end({ bug: event.message || "the worker did not start" }));
    worker.postMessage({ number, dropped });
  });
}

/** Show what files are. @param {import("./inspect.js").Dropped[]} dropped */
async function show(dropped) {
  if (!dropped.length) return;
  status.textContent = "Reading…";
  answers.replaceChildren();
  const { answers: found, failed, bug, number = asked } = await inspected(dropped);
  if (number !== asked) return; // something else was dropped in the meantime
  if (found) {
    answers.replaceChildren(...found.map(card));
    status.textContent = found.length === 1 ? "Done: one file read." : `Done: ${found.length} files read.`;
  } else {
    status.textContent = failed ?? "Something went wrong on this page, which is a bug. regraft inspect may say more.";
    if (bug) console.error(bug);
  }
}

/** The files below an entry of what was dropped. @param {FileSystemEntry} entry @returns {Promise<import("./inspect.js").Dropped[]>} */
async function filesBelow(entry) {
  const path = entry.fullPath.replace(/^\//, "");
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => /** @type {FileSystemFileEntry} */ (entry).file(resolve, reject));
    return [{ path, file }];
  }
  const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader();
  const found = [];
  for (;;) { // a reader gives a hundred entries at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found;
    for (const each of some) found.push(...await filesBelow(each));
  }
}

for (const input of [byId("files"), byId("folder")]) {
  input.addEventListener("change", () => {
    const { files } = /** @type {HTMLInputElement} */ (input);
    show([...files ?? []].map((file) => ({ path: file.webkitRelativePath || file.name, file })));
    /** @type {HTMLInputElement} */ (input).value = "";
  });
}
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => drop.classList.remove("over"));
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  // What was dropped is there only until the event is over, so all of it is taken at once.
  const items = [...event.dataTransfer?.items ?? []].filter((item) => item.kind === "file")
    .map((item) => ({ entry: item.webkitGetAsEntry(), file: item.getAsFile() }));
  const found = [];
  for (const { entry, file } of items) {
    if (entry) found.push(...await filesBelow(entry));
    else if (file) found.push({ path: file.name, file });
  }
  show(found);
});

// Answers in words.

import tables from "./tables.js";
import { short } from "./image.js";

/** @typedef {import("./inspect.js").Answer} Answer */

const titles = new Map(tables.image.families.map((family) => [family.name, family.title]));

/** What it is, in a sentence. @param {Answer} answer */
export function verdict({ kind, facts }) {
  if (kind === "problem") return `${facts.message}${facts.fix ? ` ${facts.fix}` : ""}`;
  if (kind === "weights") {
    return facts.factors
      ? "An adapter without its config: drop adapter_config.json with it, because rank and alpha are there."
      : "No adapter: weights of a model, or something else.";
  }
  if (kind === "image") {
    if (facts.problem && !facts.family) return sentence(facts.problem);
    const known = Object.keys(facts.algorithms).join(" and ");
    const family = facts.family.split(" or ").map((name) => titles.get(name) ?? name).join(" or ");
    return `${known} for ${family}, written as by ${facts.dialect}.` + (facts.problem ? ` ${sentence(facts.problem)}` : "");
  }
  const type = facts.variants.length ? `${facts.peft_type} with ${facts.variants.join(" and ")}` : facts.peft_type;
  const base = facts.model_type ?? facts.base_model;
  return `${type}${base ? ` for ${base}` : ""}, written as by ${facts.dialect}` +
    (facts.layout ? ` in the layout ${facts.layout}.` : ".");
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;

/** The facts, each with its name. @param {Answer} answer @returns {[string, string][]} */
export function facts({ kind, facts }) {
  const rows = { problem: () => [], image: imageRows, adapter: adapterRows, weights: weightsRows }[kind];
  return /** @type {[string, string][]} */ (rows(facts).filter(([, value]) => value !== ""));
}

const imageRows = (facts) => [
  ["Family", facts.family],
  ["Dialect", facts.dialect],
  ["Trainer", facts.trainer],
  ["Base", facts.base],
  ["Algorithms", counts(facts.algorithms, "modules")],
  ["Ranks", counts(facts.ranks, "modules")],
  ["Alphas", counts(facts.alphas, "modules")],
  ["Text encoders", facts.text_encoders.join(", ") || "none"],
  ["Tensors", `${facts.tensors}`],
  ["Size", bytes(facts.size)],
];

const adapterRows = (facts) => [
  ["Dialect", tables.dialects.titles[facts.dialect] ?? facts.dialect],
  ["Type", facts.peft_type],
  ["Variants", facts.variants.join(", ")],
  ["Base model", facts.base_model ?? ""],
  ["Model type", facts.model_type ?? ""],
  ["Layout", facts.layout ?? (facts.layouts.length ? `the same in ${facts.layouts.join(" and ")}` : "not known")],
  ["Evidence", facts.evidence.map(sentence).join(" ")],
  ["Ranks", facts.ranks.map(short).join(", ")],
  ["Alphas", facts.alphas.map(short).join(", ")],
  ["Scales", facts.scales.map(short).join(", ") + (facts.rslora ? " (rsLoRA)" : "")],
  ["PEFT version", facts.peft_version ?? ""],
  ["Notes", facts.notes.map(sentence).join(" ")],
  ["Tensors", `${facts.tensors}, ${counts(facts.dtypes)}`],
  ["Size", bytes(facts.bytes)],
];

const weightsRows = (facts) => [
  ["Tensors", `${facts.tensors}, ${counts(facts.dtypes)}`],
  ["Parameters", facts.elements.toLocaleString("en")],
  ["Size", bytes(facts.size)],
];

/** @param {Record<string, number>} found @param {string} [what] */
function counts(found, what = "") {
  const entries = Object.entries(found).sort((x, y) => y[1] - x[1]);
  if (entries.length === 1) return entries[0][0];
  return entries.map(([name, count]) => `${name} (${count}${what ? ` ${what}` : ""})`).join(", ");
}

/** @param {number} size */
function bytes(size) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit++;
  }
  return `${unit ? size.toPrecision(3) : size} ${units[unit]}`;
}

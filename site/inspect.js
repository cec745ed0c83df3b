// What dropped files are: the answers of `regraft inspect --json`, as far as heads of files tell them.

import tables from "./tables.js";
import { dialectOf, inspectAdapter, inspectGguf } from "./adapters.js";
import { isPeftImage, recognised, summarize } from "./image.js";
import { counted, groupNames, shown } from "./names.js";
import { Unreadable, isGguf, readGguf, readJson, readSafetensors } from "./reading.js";
import { isZip, readTorch } from "./torch.js";

const FILES = tables.dialects.files;

/**
 * @typedef {{path: string, file: File}} Dropped a file, and its path in what was dropped
 * @typedef {object} Answer
 * @property {string} name
 * @property {"image" | "adapter" | "weights" | "problem"} kind
 * @property {any} facts
 * @property {Record<string, string>} metadata
 */

const WEIGHTS = /\.(?:safetensors|gguf|bin|pt|pth|ckpt|lora|npz|h5|onnx|msgpack)$/i;
const folderOf = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), 0));
const nameOf = (path) => path.slice(path.lastIndexOf("/") + 1);

/** What files are, one answer for each adapter or file with weights. @param {Dropped[]} dropped @returns {Promise<Answer[]>} */
export async function inspect(dropped) {
  /** @type {Map<string, Map<string, File>>} */
  const folders = new Map();
  for (const { path, file } of dropped) {
    const folder = folderOf(path);
    if (!folders.has(folder)) folders.set(folder, new Map());
    folders.get(folder)?.set(nameOf(path), file);
  }
  const answers = [];
  for (const [folder, files] of folders) {
    for (const name of weightsIn(files)) {
      answers.push(await oneFile(folder ? `${folder}/${name}` : name, name, files));
    }
  }
  if (!answers.length && dropped.length) {
    const [{ path }] = dropped;
    return [problem(path, new Unreadable("not-an-adapter", "There are no weights among these files.",
      "Drop a .safetensors file, or the folder of an adapter."))];
  }
  return answers;
}

/** The weights files of a folder that are to be told; beside PEFT's own file others count as other files. */
function weightsIn(files) {
  const found = [...files.keys()].filter((name) => WEIGHTS.test(name)).sort();
  const whole = found.filter((name) => /\.(?:pth\.lora|gguf)$/i.test(name));
  if (whole.length === 1) return whole; // one file that is all of an adapter
  if (!files.has(FILES.config)) return found;
  const main = [FILES.weights, FILES.mlx, FILES.torchtune, FILES.bin].find((name) => files.has(name));
  return main ? [main] : found;
}

/** @param {string} shownName @param {string} name @param {Map<string, File>} files @returns {Promise<Answer>} */
async function oneFile(shownName, name, files) {
  try {
    return { name: shownName, ...(await told(name, files)) };
  } catch (error) {
    if (error instanceof Unreadable) return problem(shownName, error);
    throw error;
  }
}

/** @param {string} name @param {Unreadable} error @returns {Answer} */
const problem = (name, { code, message, fix }) => ({
  name, kind: "problem", facts: { code, message, fix }, metadata: {},
});

/** @param {string} name @param {Map<string, File>} files @returns {Promise<Omit<Answer, "name">>} */
async function told(name, files) {
  const file = /** @type {File} */ (files.get(name));
  if (await isGguf(file)) {
    const { fields, tensors } = await readGguf(file);
    return { kind: "adapter", facts: inspectGguf(fields, tensors, name), metadata: plain(fields) };
  }
  const head = await isZip(file) ? await readTorch(file) : await readSafetensors(file);
  const { metadata } = head;
  const beside = files.get(FILES.config);
  const config = beside ? await readJson(beside) : null;
  const asPeft = config !== null && /\.safetensors$/.test(name) && name !== FILES.mlx && isPeftImage(config, head);
  if (asPeft || (config === null && recognised(head) !== null)) {
    return { kind: "image", facts: await summarize(file, head, asPeft ? config : null), metadata };
  }
  /** @type {Record<string, any>} */
  const more = {};
  const settings = files.get(FILES.litgpt);
  if (settings) more[FILES.litgpt] = flatYaml(await settings.text());
  for (const other of [FILES.nemo, FILES.run]) {
    const found = files.get(other);
    if (found) more[other] = await readJson(found);
  }
  const all = { config, tensors: head.tensors, metadata, weights: name, beside: more };
  const dialect = dialectOf(all);
  if (dialect !== null) return { kind: "adapter", facts: inspectAdapter(all, dialect), metadata };
  return { kind: "weights", facts: weightsFacts(head), metadata };
}

/** The fields of a YAML file that are one line each. @param {string} text */
function flatYaml(text) {
  const found = {};
  for (const [, name, value] of text.matchAll(/^(\w+):[ \t]+(\S[^\n]*)$/gm)) {
    const plain = value.trim().replace(/^(['"])(.*)\1$/, "$2");
    found[name] = /^(?:true|false|null|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)$/.test(plain) ? JSON.parse(plain) : plain;
  }
  return found;
}

/** What a file is that is no adapter. @param {import("./reading.js").Head} head */
function weightsFacts({ tensors, size }) {
  const all = [...tensors.values()];
  return {
    tensors: tensors.size,
    size,
    elements: all.reduce((sum, { shape }) => sum + shape.reduce((x, y) => x * y, 1), 0),
    dtypes: Object.fromEntries(counted(all.map(({ dtype }) => dtype))),
    factors: [...tensors.keys()].some((name) => /\.lora_(?:[AB]|embedding_[AB])\b/.test(name)),
    patterns: groupNames(tensors.keys()).map(shown).slice(0, 200),
  };
}

/** Fields of text and numbers. @param {Record<string, any>} fields */
const plain = (fields) => Object.fromEntries(
  Object.entries(fields).filter(([, value]) => typeof value !== "object").map(([name, value]) => [name, String(value)]));

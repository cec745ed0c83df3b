// Adapters of language models and everything else that transformers has: what `regraft inspect` says of them.

import tables from "./tables.js";
import { findBooks, findLayouts, parametersOf } from "./books.js";
import { counted, groupNames, shown, whole } from "./names.js";
import { Unreadable, numpyName } from "./reading.js";

const D = tables.dialects;
const P = D.peft;

/**
 * @typedef {import("./reading.js").Tensor} Tensor
 * @typedef {Record<string, any>} Config
 *
 * @typedef {object} Files what lies in one folder
 * @property {Config | null} config `adapter_config.json`
 * @property {Map<string, Tensor>} tensors of the weights file
 * @property {Record<string, string>} metadata
 * @property {string} weights the name of the weights file
 * @property {Record<string, Config>} beside other JSON files by name
 *
 * @typedef {object} Opened an adapter as PEFT would have it
 * @property {Config} config
 * @property {Map<string, Tensor>} tensors
 * @property {string[]} told
 */

// -- which dialect

const NATIVE = whole(D.nemo.native), STACKED = whole(D.stacked.name), SKYRL = whole(D.skyrl), PACKED = whole(D.packed);
const FACTOR = ".lora_A.weight";

/** The dialects of language models' adapters, in the order in which they are asked. */
const MARKS = /** @type {Record<string, (files: Files) => boolean>} */ ({
  litgpt: ({ tensors, weights }) => weights.endsWith(".pth.lora") ||
    (/\.(?:pth|lora|pt)$/.test(weights) && every(tensors, D.ends.litgpt)),
  "megatron-bridge": ({ tensors }) => {
    const factors = [...tensors.keys()].filter((name) => name.endsWith(FACTOR));
    return factors.length > 0 && factors.every((name) => name.startsWith("model."));
  },
  mlx: ({ tensors, config, weights }) =>
    (config === null || weights === D.files.mlx || weights.endsWith(`_${D.files.mlx}`) || weights !== D.files.weights) &&
    some(tensors, (name) => name.endsWith(".lora_a")),
  nemo: ({ config, tensors, beside }) => config !== null &&
    (D.files.nemo in beside || some(tensors, (name) => NATIVE.test(name)) || D.nemo.stamp in config),
  sglang: (files) => writtenBy(files) === "sglang",
  skyrl: ({ tensors }) => some(tensors, (name) => SKYRL.test(name)),
  tinker: ({ config, tensors }) => config !== null &&
    some(tensors, (name, { shape }) => name.includes(D.tinker.head) || (shape.length === 3 && STACKED.test(name))),
  torchtune: ({ tensors, weights }) => /\.(?:pt|bin|pth)$/.test(weights) && every(tensors, D.ends.torchtune),
  unsloth: (files) => files.config !== null && (writtenBy(files) === "unsloth" || hasUnslothMarks(files.config)),
  vllm: (files) => writtenBy(files) === "vllm",
});

const writtenBy = ({ metadata }) => metadata[D.written_by];

/** @param {Map<string, Tensor>} tensors @param {(name: string, tensor: Tensor) => boolean} test */
const some = (tensors, test) => [...tensors].some(([name, tensor]) => test(name, tensor));

/** @param {Map<string, Tensor>} tensors @param {string[]} ends */
const every = (tensors, ends) => tensors.size > 0 && !some(tensors, (name) => !ends.some((end) => name.endsWith(end)));

/** The dialect that files are written in; `null` where they are no adapter. @param {Files} files @returns {string | null} */
export function dialectOf(files) {
  const certain = Object.keys(MARKS).filter((name) => MARKS[name](files));
  if (certain.length > 1) {
    throw new Unreadable("which-dialect", `It may be of several dialects: ${certain.join(", ")}.`,
      "Say which it is with regraft inspect --from.");
  }
  return certain[0] ?? (files.config === null ? null : "peft");
}

// -- Unsloth's records

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function unslothPlaces(config) {
  return [["", config], ["auto_mapping.", isObject(config.auto_mapping) ? config.auto_mapping : {}]];
}

const wasFixed = (config) => isObject(config.auto_mapping) && config.auto_mapping[D.unsloth.fixed] === true;
const hasUnslothMarks = (config) => wasFixed(config) ||
  unslothPlaces(config).some(([, fields]) => D.unsloth.flat in fields || D.unsloth.record in fields);

/** What says how the columns of packed experts stand; `null` where nothing does. */
function unslothSays(config) {
  const { flat, record, fixed, grouped, families } = D.unsloth;
  const says = (field, layouts) =>
    `${field} says that lora_B of the packed experts is ${[...new Set(layouts)].sort().join(", ")}`;
  for (const [place, fields] of unslothPlaces(config)) {
    const said = fields[record];
    if (isObject(said)) {
      const layouts = isObject(said.parameters)
        ? Object.values(said.parameters).map((entry) => String(isObject(entry) ? entry[flat] : entry))
        : said[flat] === undefined || said[flat] === null ? [] : [String(said[flat])];
      if (layouts.length) return says(place + record, layouts);
    }
    if (fields[flat] !== undefined && fields[flat] !== null) return says(place + flat, [String(fields[flat])]);
  }
  const family = libraryType(config);
  if (!wasFixed(config) || !config.target_parameters || (family !== null && !families.includes(family))) return null;
  return `auto_mapping.${fixed} and no record: Unsloth packed lora_B expert by expert before it recorded it`;
}

function withoutMarks(config) {
  const { [D.unsloth.flat]: _, [D.unsloth.record]: __, ...made } = config;
  if (isObject(made.auto_mapping)) {
    const { [D.unsloth.flat]: a, [D.unsloth.record]: b, [D.unsloth.fixed]: c, ...rest } = made.auto_mapping;
    made.auto_mapping = Object.keys(rest).length ? rest : null;
  }
  return made;
}

// -- as PEFT would have it

const prefixed = (name) => (name.startsWith(P.prefix) ? name : P.prefix + name);
const unprefixed = (name) => (name.startsWith(P.prefix) ? name.slice(P.prefix.length) : name);
const sized = (tensor, shape) => ({
  ...tensor, shape, bytes: (tensor.bytes / Math.max(count(tensor.shape), 1)) * count(shape),
});
const count = (shape) => shape.reduce((x, y) => x * y, 1);

/** Each dialect's files as PEFT would have them. */
const AS_PEFT = /** @type {Record<string, (files: Files) => Opened>} */ ({
  peft: ({ config, tensors }) => ({ config: config ?? {}, tensors, told: [] }),
  "megatron-bridge": megatron,
  nemo,
  sglang: served,
  tinker,
  unsloth: ({ config, tensors }) => {
    const said = unslothSays(config ?? {});
    const packed = some(tensors, (name) => PACKED.test(name));
    return { config: withoutMarks(config ?? {}), tensors, told: said && packed ? [said] : [] };
  },
  vllm: served,
});

/** @param {Files} files @returns {Opened} */
function megatron({ config, tensors, beside }) {
  const made = new Map([...tensors].map(([name, tensor]) => [prefixed(name), tensor]));
  if (config !== null) return { config, tensors: made, told: [] };
  const run = beside[D.files.run]?.peft ?? {};
  const ranks = new Set([...made].filter(([name]) => name.endsWith(FACTOR)).map(([, { shape }]) => shape[0]));
  const r = run.dim ?? (ranks.size === 1 ? [...ranks][0] : null);
  if (typeof run.alpha !== "number" || r === null) {
    throw new Unreadable("no-config",
      `Megatron-Bridge writes no config beside its export, and alpha stands nowhere in the weights.`,
      `Drop the folder with ${D.files.run}.`);
  }
  return {
    config: { peft_type: "LORA", r, lora_alpha: run.alpha },
    tensors: made,
    told: [`rank and alpha are those of ${D.files.run}`],
  };
}

/** @param {Files} files @returns {Opened} */
function nemo({ config, tensors, beside }) {
  const own = beside[D.files.nemo] ?? {}, made = { ...config }, told = [];
  const stamp = own[D.nemo.stamp] ?? made[D.nemo.stamp];
  delete made[D.nemo.stamp];
  const native = some(tensors, (name) => NATIVE.test(name));
  /** @type {Record<string, number>} */
  const ranks = {};
  if (native) {
    tensors = packNative(tensors, ranks);
    made.target_parameters = Object.keys(ranks);
    made.peft_version = D.nemo.version[P.since];
    told.push("its experts are grouped as in NeMo Automodel's memory");
  } else if (stamp !== undefined && some(tensors, (name) => PACKED.test(name))) {
    made.peft_version = D.nemo.version[D.nemo.stamps[stamp]];
    told.push(`${D.files.nemo} says that its experts are packed as by ${stamp}`);
  }
  return { config: made, tensors, told };
}

/** Grouped tensors, (E, in, rank) and (E, rank, out), as PEFT packs them. */
function packNative(tensors, ranks) {
  const rest = new Map(), found = new Map();
  for (const [name, tensor] of tensors) {
    const hit = NATIVE.exec(name)?.groups;
    if (!hit) rest.set(name, tensor);
    else {
      const place = `${hit.module} ${hit.part}`;
      if (!found.has(place)) found.set(place, {});
      found.get(place)[hit.letter] = tensor;
    }
  }
  for (const [place, { A, B }] of found) {
    const [module, part] = place.split(" ");
    if (!A || !B) throw new Unreadable("half", `${module} has one half of a LoRA, and lacks the other.`);
    const [experts, into, rank] = A.shape, out = B.shape[2];
    ranks[`${unprefixed(module)}.${part === "gate_and_up" ? D.inner : D.outer}`] = rank;
    const at = module + (part === "gate_and_up" && found.has(`${module} down`) ? ".base_layer" : "");
    rest.set(`${at}.lora_A.weight`, sized(A, [experts * rank, into]));
    rest.set(`${at}.lora_B.weight`, sized(B, [out, rank * experts]));
  }
  return rest;
}

const ATTENTION = new RegExp(D.tinker.attention);

/** @param {Files} files @returns {Opened} */
function tinker({ config, tensors }) {
  const made = new Map();
  const base = String(config?.base_model_name_or_path ?? "").toLowerCase();
  const oss = /gpt[-_]oss/.test(base) || some(tensors, (name) => ATTENTION.test(name));
  for (const [name, tensor] of tensors) {
    const head = name.indexOf(D.tinker.head);
    const named = head < 0 ? name : `${P.prefix}lm_head.${name.slice(head + D.tinker.head.length)}`;
    made.set(named.replace(ATTENTION, "$1.self_attn."), tensor);
  }
  return expandStacks({ config: { ...config }, tensors: made, told: [] }, oss);
}

/** @param {Files} files @returns {Opened} */
function served({ config, tensors }) {
  const made = new Map([...tensors].map(([name, tensor]) => [prefixed(name), tensor]));
  const fields = { ...config };
  if (some(made, (name) => PACKED.test(name))) fields.peft_version = P.version[P.since];
  return expandStacks({ config: fields, tensors: made, told: [] }, false);
}

/** One adapter per expert in place of each 3-D stack, or PEFT's packing. @param {Opened} opened @param {boolean} packed */
function expandStacks({ config, tensors, told }, packed) {
  const rest = new Map(), stacks = new Map();
  for (const [name, tensor] of tensors) {
    const hit = tensor.shape.length === 3 ? STACKED.exec(name)?.groups : null;
    if (!hit) rest.set(name, tensor);
    else {
      if (!stacks.has(hit.module)) stacks.set(hit.module, []);
      stacks.get(hit.module).push({ ...hit, tensor });
    }
  }
  const parameters = [];
  for (const [module, parts] of stacks) {
    const experts = Math.max(...parts.map(({ tensor }) => tensor.shape[0]));
    if (packed) {
      parameters.push(...packStack(rest, module, parts, experts));
      continue;
    }
    const numbered = module.split(".").at(-2) === "block_sparse_moe";
    for (const { leaf, letter, tensor } of parts) {
      const plain = D.stacked.plain[leaf] ?? leaf;
      const name = numbered ? Object.keys(D.stacked.plain).find((w) => D.stacked.plain[w] === plain) ?? leaf : plain;
      for (let expert = 0; expert < experts; expert++) {
        rest.set(`${module}.${expert}.${name}.lora_${letter}.weight`, sized(tensor, tensor.shape.slice(1)));
      }
    }
  }
  const made = parameters.length
    ? { ...config, target_parameters: parameters, peft_version: P.version[P.since] } : config;
  return { config: made, tensors: rest, told };
}

/** Pack one module's experts as PEFT does, gate and up as one; the parameters' names. */
function packStack(rest, module, parts, experts) {
  const pairs = (...leaves) => leaves.map((leaf) => Object.fromEntries(parts
    .filter((part) => (D.stacked.plain[part.leaf] ?? part.leaf) === leaf).map(({ letter, tensor }) => [letter, tensor])))
    .filter(({ A, B }) => A && B);
  const names = [];
  const put = (name, depth, some, times) => {
    if (!some.length) return;
    const rank = some.reduce((sum, { A }) => sum + A.shape[1], 0), [{ A, B }] = some;
    const at = module + (depth ? ".base_layer" : "");
    rest.set(`${at}.lora_A.weight`, sized(A, [experts * rank, A.shape[2]]));
    rest.set(`${at}.lora_B.weight`, sized(B, [times * B.shape[1], rank * experts]));
    names.push(`${unprefixed(module)}.${name}`);
  };
  const outer = pairs("down_proj");
  put(D.inner, outer.length > 0, pairs("gate_proj", "up_proj"), 2);
  put(D.outer, false, outer, 1);
  return names;
}

// -- names

const FACTORS = whole(P.factor, "s");
const IN_PROJ = "in_proj_weight", OUT_PROJ = ".out_proj", INSIDE = `.base_layer${OUT_PROJ}`;

/**
 * Sort an adapter's tensors.
 * @param {Map<string, Tensor>} tensors @param {boolean} lora
 */
function scan(tensors, lora) {
  const factors = new Map(), others = [], problems = [];
  for (const name of tensors.keys()) {
    const found = lora ? FACTORS.exec(name) : null;
    if (!found) {
      others.push(name);
      continue;
    }
    const [, path, embedding, letter, weight] = found;
    if (Boolean(embedding) === Boolean(weight)) {
      problems.push(finding("odd-key", "a LoRA factor's key ends in lora_A.weight, lora_B.weight, lora_embedding_A or " +
        "lora_embedding_B", name));
      continue;
    }
    const wrong = wrongPrefix(path);
    if (wrong) {
      problems.push(finding("prefix", wrong, name));
      continue;
    }
    const place = `${embedding ? "e" : ""} ${path}`;
    if (!factors.has(place)) factors.set(place, { path: unprefixed(path), letters: {} });
    factors.get(place).letters[letter] = name;
  }
  const pairs = [];
  for (const { path, letters } of factors.values()) {
    if (!letters.A || !letters.B) {
      problems.push(finding("half", `it has no ${letters.A ? "lora_B" : "lora_A"} beside it`, letters.A ?? letters.B));
      continue;
    }
    const module = path.replace(/(?:\.base_layer)+$/, "");
    pairs.push({ module, depth: (path.length - module.length) / ".base_layer".length, a: letters.A, b: letters.B });
  }
  return { pairs: withAttentions(pairs), others, problems: alike(problems) };
}

const finding = (code, message, key) => ({ code, message, key });

/** Problems of keys that differ in numbers only, once. */
function alike(problems) {
  const seen = new Map();
  for (const problem of problems) {
    const kind = `${problem.code} ${problem.message} ${problem.key.replace(/[0-9]+/g, "#")}`;
    seen.set(kind, [...(seen.get(kind) ?? []), problem]);
  }
  return [...seen.values()].map(([first, ...more]) => ({
    ...first, message: first.message + (more.length ? ` (${more.length + 1} keys like this one)` : ""),
  }));
}

function wrongPrefix(path) {
  if (!path.startsWith(P.prefix)) {
    const start = path.indexOf(P.prefix);
    const wrapper = start > 0 ? path.slice(0, start) : `${path.split(".")[0]}.`;
    return `keys of a PEFT adapter begin with '${P.prefix}', this one begins with '${wrapper}'`;
  }
  const segments = path.slice(P.prefix.length).split(".");
  for (const [position, segment] of segments.slice(0, 4).entries()) {
    const doubled = segment === "model" && segments[position + 1] === "model";
    if (P.wrappers.includes(segment) || doubled) {
      return `'${doubled ? "model.model" : segment}' in the module path comes from a wrapper or from a doubled prefix, ` +
        "it is no part of the model";
    }
  }
  return "";
}

/** Factors of torch's MultiheadAttention are told by the projection inside. */
function withAttentions(pairs) {
  const inside = new Set(pairs.filter(({ module }) => module.endsWith(INSIDE))
    .map(({ module }) => module.slice(0, -INSIDE.length)));
  return pairs.map((pair) => {
    if (inside.has(pair.module) && !pair.depth) return { ...pair, attention: "in" };
    if (!pair.module.endsWith(INSIDE)) return { ...pair, attention: "" };
    return { ...pair, module: pair.module.slice(0, -INSIDE.length) + OUT_PROJ, attention: "out" };
  });
}

function otherKey(name) {
  const parts = unprefixed(name).split(".").filter((part) => part !== "base_layer");
  if (parts.length > 1 && P.holders.includes(parts[parts.length - 2])) parts.splice(-2, 1);
  return parts.join(".");
}

/** What sorted keys say of the base. @returns {import("./books.js").Names} */
function namesOf({ pairs, others }) {
  return {
    modules: groupNames(pairs.filter((pair) => pair.attention !== "in").map((pair) => pair.module)),
    tensors: groupNames([
      ...others.map(otherKey),
      ...pairs.filter((pair) => pair.attention === "in").map((pair) => `${pair.module}.${IN_PROJ}`),
    ]),
    bound: pairs.length > 0 || others.some((name) => name.startsWith(P.prefix)),
  };
}

// -- what the config says

function libraryType(config) {
  const library = isObject(config.auto_mapping) ? config.auto_mapping.parent_library : null;
  return typeof library === "string" && library.startsWith("transformers.models.") ? library.split(".")[2] : null;
}

function packingOf(version) {
  const found = typeof version === "string" ? /^(\d+)\.(\d+)/.exec(version) : null;
  if (!found) return null;
  const [major, minor] = [Number(found[1]), Number(found[2])];
  return major > 0 || minor >= 19 ? P.since : P.before;
}

function provenance(metadata) {
  try {
    const found = JSON.parse(metadata[D.provenance] ?? "{}");
    return isObject(found) && found.format === 1 ? found : {};
  } catch {
    return {};
  }
}

/** @returns {import("./books.js").Hints} */
function hintsOf(config, metadata) {
  const packing = config.target_parameters ? packingOf(config.peft_version) : null;
  const layout = packing ? P.layout_of[packing] : null;
  return {
    source: D.files.config,
    modelType: libraryType(config),
    base: typeof config.base_model_name_or_path === "string" ? config.base_model_name_or_path : null,
    layout: provenance(metadata).layout || null,
    byForm: false,
    likely: layout ? [layout, `it was saved by PEFT ${config.peft_version}, which goes with ${layout}`] : null,
  };
}

/** `rank_pattern` or `alpha_pattern`: the first entry whose expression fits the end of a module's path. */
function patterns(entries) {
  const known = Object.entries(isObject(entries) ? entries : {}).map(([key, value]) => (
    { fits: expression(`(?:.*\\.)?(?:${key})`), value }));
  return (path) => known.find(({ fits }) => fits?.test(path))?.value;
}

/** Rank and alpha of a module. */
function scaleOf(config) {
  const rank = patterns(config.rank_pattern), alpha = patterns(config.alpha_pattern);
  return (path, times = 1) => scale(rank(path) ?? config.r, (alpha(path) ?? config.lora_alpha) * times,
    Boolean(config.use_rslora));
}

const scale = (rank, alpha, rslora = false) => ({ rank, alpha, scale: alpha / (rslora ? Math.sqrt(rank) : rank) });

// Python's numbers are of any size and JavaScript's are not, which makes no difference to what is too large.
const LARGEST = 2 ** 31 - 1;
const isSize = (value) => Number.isInteger(value) && value >= 0 && value <= LARGEST;
const isCount = (value) => isSize(value) && value !== 0;
const isNames = (value) => Array.isArray(value) && value.every((x) => typeof x === "string");
const isTokens = (value) => Array.isArray(value) && value.every(isSize) && new Set(value).size === value.length;
const isPattern = (test) => (value) => isObject(value) && Object.values(value).every(test);
const isText = (value) => typeof value === "string";

/** What a field's value must be, by what regraft says was expected. */
const EXPECTED = /** @type {[RegExp, (value: any) => boolean][]} */ ([
  [/^a whole number from 1 /, isCount],
  [/^a whole number from 0 /, isSize],
  [/^a finite number$/, Number.isFinite],
  [/^true or false$/, (value) => typeof value === "boolean"],
  [/^a string$/, isText],
  [/^an object$/, isObject],
  [/^a list of names$/, isNames],
  [/^a list of names,/, (value) => isNames(value) || isText(value)],
  [/^a word, true or false$/, (value) => isText(value) || typeof value === "boolean"],
  [/^a layer's number/, (value) => isSize(value) || (Array.isArray(value) && value.every(isSize))],
  [/^a table of regular expressions and whole/, isPattern(isCount)],
  [/^a table of regular expressions and finite/, isPattern(Number.isFinite)],
  [/^a list of token numbers/, (value) => isTokens(value) || isPattern(isTokens)(value)],
  [/^road_1, /, (value) => ["road_1", "road_2", "road_4"].includes(value)],
]);

/** Complain of fields that make a config no config of an adapter. @param {Config} config */
function checkConfig(config) {
  const type = config.peft_type;
  if (!P.types.includes(type)) {
    throw new Unreadable("peft-type", `Unknown peft_type ${JSON.stringify(type ?? null)} in ${D.files.config}.`,
      "Check the spelling; a config without peft_type is not PEFT's.");
  }
  const needed = P.needed[type] ?? [];
  for (const [field, expected] of Object.entries(P.fields)) {
    const value = config[field] ?? null;
    const test = type === "OFT" && field === "r" ? isSize : EXPECTED.find(([words]) => words.test(expected))?.[1];
    if ((value !== null || needed.includes(field)) && test && !test(value)) {
      throw new Unreadable("config", `${D.files.config}: ${field} is ${JSON.stringify(value)?.slice(0, 80)}, and ` +
        `${expected} was expected.`, "Use the adapter_config.json that was saved with the weights.");
    }
  }
}

/** Which modules PEFT would leave without their factors, by the config; the reason, or an empty text. @param {Config} config */
function leavingOut(config) {
  const { target_modules: targets = null, target_parameters: parameters, exclude_modules: excluded } = config;
  const { heads, classifiers, first_number_since: since } = P.leave_out;
  const ends = (path, names) => names.some((name) => path === name || path.endsWith(`.${name}`));
  const everything = isText(targets) && targets.toLowerCase() === "all-linear";
  const named = (path) => targets === null ? !parameters?.length : everything ||
    (isText(targets) ? expression(targets)?.test(path) ?? true : ends(path, targets));
  const version = /^(\d+)\.(\d+)/.exec(config.peft_version ?? "")?.slice(1).map(Number) ?? [0, 0];
  const first = version[0] > since[0] || (version[0] === since[0] && version[1] >= since[1]);
  const layers = [config.layers_to_transform ?? []].flat();
  const patterns = [config.layers_pattern ?? []].flat();
  const layer = (patterns.length
    ? patterns.map((pattern) => `${first ? "(?:^|.*?\\.)" : ".*\\."}${pattern}\\.(\\d+)\\.`)
    : [`${first ? ".*?" : ".*"}\\.[^.]*\\.(\\d+)\\.`]).map((pattern) => new RegExp(`^${pattern}`));
  const saved = (config.modules_to_save ?? []).map((name) => expression(`(?:.*\\.)?${name}(?:\\..*)?`));
  return (path) => {
    if (excluded?.length && (isText(excluded) ? expression(excluded)?.test(path) : ends(path, excluded))) {
      return "exclude_modules";
    }
    if (saved.some((each) => each?.test(path))) return "modules_to_save";
    if (everything && (heads.includes(path) || (config.task_type === "SEQ_CLS" && classifiers.includes(path)))) {
      return "target_modules";
    }
    if (!isText(targets) && layers.length && !(targets ?? []).includes(path)) {
      const number = layer.map((each) => each.exec(path)?.[1]).find(Boolean);
      if (number === undefined || !layers.includes(Number(number))) return "layers_to_transform";
    }
    return named(path) ? "" : "untargeted";
  };
}

/** A whole path's regular expression; `null` where only Python knows it. @param {string} pattern */
function expression(pattern) {
  try {
    return whole(pattern.replaceAll("(?P<", "(?<"));
  } catch {
    return null;
  }
}

// -- the answer

const text = (value) => (typeof value === "string" && value ? value : null);
const sorted = (values) => [...new Set(values)].sort((x, y) => x - y);

/** Dialects whose configs say of modules what PEFT's do. */
const OWN = ["peft", "unsloth"];

/** What one adapter is. @param {Files} files @param {string} dialect */
export function inspectAdapter(files, dialect) {
  if (dialect === "mlx") return inspectMlx(files);
  if (dialect === "torchtune") return inspectTorchtune(files);
  if (dialect === "litgpt") return inspectLitgpt(files);
  if (dialect === "skyrl") {
    throw new Unreadable("dialect", "This is SkyRL-tx's form of experts, which cannot be what it trained.",
      "Export it with the tool that wrote it.");
  }
  if (files.config !== null || dialect !== "megatron-bridge") checkConfig(files.config ?? {});
  checkNames(files.tensors);
  const { config, tensors, told } = AS_PEFT[dialect](files);
  const lora = config.peft_type === "LORA";
  const found = scan(tensors, lora);
  const names = namesOf(found), hints = hintsOf(config, files.metadata);
  const model = findBooks(names, hints);
  const result = {
    ...described(tensors),
    dialect,
    peft_type: config.peft_type,
    base_model: text(config.base_model_name_or_path),
    model_type: model.modelType,
    peft_version: text(config.peft_version),
    rslora: Boolean(config.use_rslora),
    variants: lora ? variantsOf(config) : [],
    evidence: [...(dialect === "peft" ? [] : [written(dialect), ...told]), model.evidence],
    problems: dialect === "peft" ? foreignForm(tensors) ?? found.problems : found.problems,
    notes: /** @type {string[]} */ ([]),
  };
  const layouts = layoutsOf(names, hints, model, result);
  const targets = lora ? targetsOf(found, config, tensors, model, layouts) : [];
  if (lora && OWN.includes(dialect) && !result.problems.length) result.problems.push(...checkTargets(targets, config, tensors));
  const origin = provenance(files.metadata);
  if (origin.layout) result.notes.push(`regraft wrote it, from ${origin.source?.layout ?? ""}`);
  return finished(result, layouts, targets, found.others.map(otherKey));
}

const written = (dialect) => `it is written as by ${dialect}: ${D.titles[dialect]}`;

/** Complain of names with numbers that no layer has. @param {Map<string, Tensor>} tensors */
function checkNames(tensors) {
  if (!tensors.size) throw new Unreadable("empty", "The adapter is empty: its weights file has no tensors.", "Save it again.");
  const long = new RegExp(`(?:^|\\.)[0-9]{${P.most_digits + 1},}(?=\\.|$)`);
  const odd = [...tensors.keys()].find((name) => long.test(name));
  if (odd !== undefined) {
    throw new Unreadable("odd-key", `${odd.slice(0, 300)} is no name of a tensor: it holds a number of more than ` +
      `${P.most_digits} digits.`, "Save the adapter again.");
  }
}

/** @param {Map<string, Tensor>} tensors */
function described(tensors) {
  const all = [...tensors.values()];
  return {
    tensors: all.length,
    bytes: all.reduce((sum, { bytes }) => sum + bytes, 0),
    dtypes: Object.fromEntries(counted(all.map(({ dtype }) => numpyName(dtype)))),
  };
}

function layoutsOf(names, hints, model, result) {
  if (!model.books.length) {
    if (hints.layout === null || !hints.byForm) return [];
    result.evidence.push(`layout: ${hints.layout} (the form of the file)`);
    return [hints.layout];
  }
  try {
    const found = findLayouts(names, hints, model.books);
    result.evidence.push(...found.evidence);
    return found.layouts;
  } catch (error) {
    if (!(error instanceof Unreadable)) throw error;
    result.problems.push(finding(error.code, error.message, ""));
    return [];
  }
}

function finished(result, layouts, targets, others) {
  return {
    ...result,
    layouts,
    layout: layouts.length === 1 ? layouts[0] : null,
    ranks: sorted(targets.map((target) => target.rank)),
    alphas: sorted(targets.map((target) => target.alpha)),
    scales: sorted(targets.map((target) => target.scale)),
    targets: grouped(targets),
    others: groupNames(others).map(shown),
  };
}

/** Targets that are alike, in few words. */
function grouped(targets) {
  const found = new Map();
  for (const target of targets) {
    const looks = `${target.rank} ${target.alpha}`;
    if (!found.has(looks)) found.set(looks, { target, names: [] });
    found.get(looks).names.push(target.name);
  }
  return [...found.values()].flatMap(({ target, names }) => groupNames(names).map((group) => ({
    pattern: shown(group), count: group.names.length, rank: target.rank, alpha: target.alpha, scale: target.scale,
  })));
}

function variantsOf(config) {
  const init = config.init_lora_weights;
  const changes = typeof init === "string" && P.inits.some((start) => init.toLowerCase().startsWith(start));
  return [...Object.entries(P.variants).filter(([field]) => truthy(config[field])).map(([, name]) => name),
    ...(changes ? [`the initialisation ${init}`] : [])];
}

const truthy = (value) => (Array.isArray(value) ? value.length > 0 : isObject(value)
  ? Object.keys(value).length > 0 : Boolean(value));

/** Each adapted tensor with its rank and alpha. */
function targetsOf({ pairs }, config, tensors, model, layouts) {
  const of = scaleOf(config), entries = config.target_parameters ?? [];
  const layout = layouts.length === 1 ? layouts[0] : model.books[0]?.layouts[0];
  const targeted = (name) => entries.some((entry) => name === entry || name.endsWith(`.${entry}`));
  const nested = new Set(pairs.filter(({ depth }) => depth).map(({ module }) => module));
  return pairs.map(({ module, depth, attention, a, b }) => {
    const plain = { module, a, b, owner: attention === "out" ? module.slice(0, -OUT_PROJ.length) : module };
    if (attention) return { name: module, ...plain, ...of(plain.owner, attention === "out" ? 2 : 1) };
    const parameters = model.known && entries.length ? parametersOf(model.books, layout, groupNames([module])[0]) : null;
    const wanted = parameters?.filter((name) => targeted(`${module}.${name}`)) ?? [];
    const parameter = wanted[wanted.length - 1 - depth];
    if (parameter) return { name: `${module}.${parameter}`, ...of(`${module}.${parameter}`) };
    if (entries.length && module.endsWith(".experts")) {
      const name = `${module}.${packedParameter(module, depth, nested.has(module), targeted)}`;
      return { name, ...of(name) };
    }
    const as = targeted(`${module}.weight`);
    const stacked = nested.has(module) || (entries.length > 0 && !as && entries.some((entry) => (`${module}.`).endsWith(
      `.${entry.slice(0, entry.lastIndexOf("."))}.`)));
    return { name: module, ...(stacked || as ? {} : plain), ...of(as ? `${module}.weight` : module) };
  });
}

/** The parameter that packed factors belong to: where a module has two, the inner one is of gate and up. */
function packedParameter(module, depth, both, targeted) {
  if (both) return depth ? D.inner : D.outer;
  return targeted(`${module}.${D.outer}`) ? D.outer : D.inner;
}

/** What is wrong with the factors of modules: sizes that are not the config's, and modules that it does not name. */
function checkTargets(targets, config, tensors) {
  const plain = targets.filter((target) => target.a !== undefined);
  const left = leavingOut(config);
  const problems = plain.flatMap(({ a, b, rank }) => {
    const why = misfit(tensors.get(a).shape, tensors.get(b).shape, rank);
    return why ? [finding("shape", why, a)] : [];
  });
  const why = new Map(plain.map((target) => [target, left(target.owner)]));
  for (const target of plain.filter((each) => why.get(each))) {
    const field = why.get(target);
    problems.push(finding("not-targeted", field === "untargeted"
      ? "neither target_modules nor target_parameters of adapter_config.json names this module, so PEFT would ignore " +
        "its factors"
      : `${field} = ${JSON.stringify(config[field])} of adapter_config.json leaves this module out, so PEFT would ` +
        "ignore its tensors", target.a));
  }
  const some = plain.length && plain.every((target) => why.get(target) === "untargeted") && plain.length === targets.length;
  return some ? [finding("targets-nothing", "target_modules and target_parameters name nothing that is in the weights " +
    "file", D.files.config)] : alike(problems);
}

/** Why factors do not fit together, or not the rank; an empty text where they do. */
function misfit(a, b, rank) {
  const shown = `lora_A [${a.join(", ")}] and lora_B [${b.join(", ")}]`;
  if (a.length < 2 || b.length < 2) return `LoRA factors have two dims or more: ${shown}`;
  if (a.includes(0) || b.includes(0)) return `${shown} have no elements`;
  if (a.length !== b.length || b.slice(2).some((size) => size !== 1)) return `${shown} do not fit together: their dims differ`;
  if (a[0] !== b[1] && a.length === 2) return `${shown} do not fit together: their ranks differ`;
  return a[0] === rank ? "" : `adapter_config.json gives the rank ${rank}, the factors have ${a[0]}`;
}

const FOREIGN = D.foreign.map(([pattern, dims, tool]) => ({ key: new RegExp(pattern), dims, tool }));

/** Keys that only another tool writes, in a file that says it is PEFT's. */
function foreignForm(tensors) {
  for (const [name, { shape }] of tensors) {
    const found = FOREIGN.find(({ key, dims }) => (dims === null || shape.length === dims) && key.test(name));
    if (found) {
      return [finding("dialect", `this adapter is in the form of ${found.tool}, which PEFT does not read: only it names ` +
        "tensors so", name)];
    }
  }
  return null;
}

// -- MLX, torchtune, LitGPT and GGUF

/** A file whose LoRAs are known by base tensor. */
function inspectPlain(dialect, tensors, loras, hints, plain) {
  const names = {
    modules: groupNames(loras.filter(({ key }) => key.endsWith(".weight")).map(({ key }) => key.slice(0, -7))),
    tensors: groupNames(loras.filter(({ key }) => !key.endsWith(".weight")).map(({ key }) => key)),
    bound: loras.length > 0,
  };
  const model = findBooks(names, hints);
  const result = {
    ...described(tensors), dialect, peft_type: "LORA", base_model: hints.base,
    model_type: model.modelType ?? hints.modelType,
    peft_version: null, rslora: false, variants: [], evidence: [written(dialect), model.evidence], problems: [], notes: [],
  };
  const layouts = layoutsOf(names, hints, model, result);
  const targets = plain ? loras.map(({ key, rank, alpha }) => ({ name: key, ...scale(rank, alpha) })) : [];
  return finished(result, layouts, targets, []);
}

/** @param {Files} files */
function inspectMlx({ config, tensors }) {
  if (config === null) {
    throw new Unreadable("no-config", `There is no ${D.files.config} beside the weights, and nothing else says the scale.`,
      "Drop the whole folder.");
  }
  const said = isObject(config.lora_parameters) ? config.lora_parameters : {};
  if (typeof said.scale !== "number") {
    throw new Unreadable("config", "lora_parameters has no scale, which multiplies what the adapter adds.");
  }
  const old = typeof said.alpha === "number" && said.rank && "lora_layers" in config && !("num_layers" in config);
  const factor = old ? (said.scale * said.alpha) / said.rank : said.scale;
  const loras = [];
  for (const [name, tensor] of tensors) {
    if (!name.endsWith(".lora_b")) continue;
    const rank = tensor.shape.length === 3 ? tensor.shape[2] : tensor.shape[0];
    loras.push({ key: `${name.slice(0, -".lora_b".length)}.weight`, rank, alpha: factor * rank });
  }
  const dora = some(tensors, (name) => name.endsWith(".m")); // of which no ranks are shown, as of other families
  const hints = { source: D.files.config, modelType: null, base: text(config.model), layout: D.usual.mlx, byForm: true,
    likely: null };
  return inspectPlain("mlx", tensors, loras, hints, !dora);
}

/** @param {Files} files */
function inspectTorchtune({ config, tensors }) {
  const [a, , magnitude] = D.ends.torchtune;
  if (typeof config?.r !== "number" || typeof config.lora_alpha !== "number") {
    throw new Unreadable("no-config", `There is no ${D.files.config} with r and lora_alpha beside the weights.`,
      "Drop the whole folder.");
  }
  const loras = [...tensors].filter(([name]) => name.endsWith(a)).map(([name, { shape }]) => (
    { key: `${name.slice(0, -a.length)}.weight`, rank: shape[0], alpha: config.lora_alpha }));
  const hints = { source: D.files.config, modelType: null, base: text(config.base_model_name_or_path),
    layout: D.usual.torchtune, byForm: true, likely: null };
  return inspectPlain("torchtune", tensors, loras, hints, !some(tensors, (name) => name.endsWith(magnitude)));
}

/** @param {Files} files */
function inspectLitgpt({ tensors, beside }) {
  const settings = beside[D.files.litgpt] ?? {}, [a] = D.ends.litgpt;
  const { lora_r: rank, lora_alpha: alpha } = settings;
  if (!Number.isInteger(rank) || rank < 1 || typeof alpha !== "number") {
    throw new Unreadable("no-config", `There is no ${D.files.litgpt} with lora_r and lora_alpha beside the weights.`,
      "Drop the whole folder.");
  }
  // Where q, k and v are one tensor, each adapted part has the rank, and A has them one below the other.
  const loras = [...tensors].filter(([name]) => name.endsWith(a)).map(([name, { shape }]) => (
    { key: `${name.slice(0, -a.length)}.weight`, rank: shape[0], alpha: (alpha * shape[0]) / rank }));
  const hints = { source: D.files.litgpt, modelType: null, base: text(settings.checkpoint_dir),
    layout: D.usual.litgpt, byForm: true, likely: null };
  return inspectPlain("litgpt", tensors, loras, hints, true);
}

/** What a LoRA in a GGUF file is. @param {Record<string, any>} fields @param {Map<string, Tensor>} tensors @param {string} name */
export function inspectGguf(fields, tensors, name) {
  const { alpha: ALPHA, architecture: ARCHITECTURE, embedding, norm, architectures } = D.gguf;
  if (fields["general.type"] !== "adapter" || fields["adapter.type"] !== "lora") {
    const title = fields["general.name"] ? ` ("${fields["general.name"]}")` : "";
    throw new Unreadable("not-an-adapter", `This is a GGUF file of a ${fields["general.type"] ?? "model"}${title} for ` +
      `${fields[ARCHITECTURE] ?? "an unknown architecture"}, and no LoRA; models in it are not read.`,
    "Give the checkpoint that it was made of.");
  }
  const alpha = fields[ALPHA], loras = [];
  for (const [name, tensor] of tensors) {
    if (!name.endsWith(".lora_a") || name.endsWith(norm)) continue;
    const key = name.slice(0, -".lora_a".length);
    const rank = key === embedding ? tensor.shape.at(-1) : tensor.shape.at(-2);
    loras.push({ key, rank, alpha: alpha || rank });
  }
  const types = Object.keys(architectures).filter((type) => architectures[type] === fields[ARCHITECTURE]);
  const hints = { source: name, modelType: types.length === 1 ? types[0] : null, base: null,
    layout: D.usual.gguf, byForm: true, likely: null };
  return inspectPlain("gguf", tensors, loras, hints, true);
}

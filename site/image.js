// LoRAs of image and video models: family, tool, algorithms, ranks, alphas; what `regraft inspect` says of such files.

import tables from "./tables.js";
import { counted, groupNames, whole } from "./names.js";
import { firstNumbers } from "./reading.js";

const T = tables.image;
const { denoiser: DENOISER } = T;

/**
 * @typedef {import("./reading.js").Tensor} Tensor
 * @typedef {import("./reading.js").Head} Head
 * @typedef {{stem: string, role: string, spelling: string}} Leaf a key in two: the module, and what it is to it
 * @typedef {Map<string, Tensor>} Roles a module's tensors by role
 * @typedef {{prefix: string, component: string, module: string, flat: boolean}} Place
 */

// -- keys

const suffixes = T.suffixes.map(([pattern, role, spelling]) => ({ end: new RegExp(`${pattern}$`), role, spelling }));
/** What most keys of most files end in; the expressions say the same, and take longer. */
const USUAL = /** @type {Record<string, [string, string]>} */ (T.usual);
const XLABS = whole(T.xlabs), PROCESSORS = whole(T.processors), NO_WEIGHTS = whole(T.no_weights);

/** The module and the role of a key; `null` where no tool is known to write it. @param {string} key @returns {Leaf | null} */
export function splitKey(key) {
  const last = key.lastIndexOf("."), first = key.lastIndexOf(".", last - 1);
  const usual = first > 0 ? USUAL[key.slice(first + 1)] : undefined;
  if (usual) return { stem: key.slice(0, first), role: usual[0], spelling: usual[1] };
  const xlabs = XLABS.exec(key)?.groups;
  if (xlabs) return { stem: xlabs.stem + xlabsModule(xlabs), role: sideOf(xlabs), spelling: "xlabs" };
  const processor = PROCESSORS.exec(key)?.groups;
  if (processor) {
    return { stem: processor.stem + processorModule(processor), role: sideOf(processor), spelling: "processor" };
  }
  // The shortest module counts, and of endings that leave the same one the first.
  let best = null;
  for (const { end, role, spelling } of suffixes) {
    const found = end.exec(key);
    if (found && (best === null || found.index < best.stem.length)) {
      best = { stem: key.slice(0, found.index), role: role || found[1], spelling };
    }
  }
  return best;
}

const sideOf = (found) => (found.side === "down" ? "down" : "up");

/** @param {Record<string, string>} found */
function xlabsModule({ block, which, stream }) {
  if (block.startsWith("single")) return `${block}.${which === "qkv" ? "linear1" : "linear2"}`;
  return `${block}.${stream === "2" ? "txt" : "img"}_attn.${which}`;
}

/** @param {Record<string, string>} found */
function processorModule({ stem, which }) {
  if (stem.includes(".self_attn.")) return which === "out" ? "out_proj" : `${which}_proj`;
  if (which.endsWith("_proj")) return `add_${which}`;
  return which === "out" ? "to_out.0" : `to_${which}`;
}

/** The kind of adapter that a key is of, where it is one that cannot be read. @param {string} key */
function unreadKind(key) {
  const parts = key.split(".");
  if (parts.includes("oft_R") && parts[0] === "base_model") return "PEFT's OFT";
  const part = parts.find((each) => Object.hasOwn(T.unread, each));
  return part ? T.unread[part] : "";
}

// -- places

const FLAT = new RegExp(`^(?:${T.flat})`), COMFY = whole(T.comfy), TOOLKIT = whole(T.toolkit);
const BFL = new RegExp(`^(?:${T.bfl})`), HEAD = new RegExp(`^(?:${T.head})`);
const WRAPPED = "base_model.model.";

/** The component and the module of a name. @param {string} stem @returns {Place} */
export function placeOf(stem) {
  const flat = FLAT.exec(stem)?.[0];
  if (flat) {
    const component = flat.includes("_te") ? `te:${flat}` : DENOISER;
    return { prefix: flat, component, module: stem.slice(flat.length), flat: true };
  }
  if (stem.startsWith(WRAPPED)) {
    const inner = placeOf(stem.slice(WRAPPED.length));
    return { ...inner, prefix: WRAPPED + inner.prefix };
  }
  const comfy = COMFY.exec(stem);
  if (comfy) {
    return { prefix: `text_encoders.${comfy[1]}.transformer.`, component: `te:${comfy[1]}`, module: comfy[2], flat: false };
  }
  const toolkit = TOOLKIT.exec(stem);
  if (toolkit) return { prefix: `${toolkit[1]}.`, component: `te:${toolkit[1]}_`, module: toolkit[2], flat: false };
  const dotted = T.dotted.find(([prefix]) => stem.startsWith(prefix));
  if (dotted) return { prefix: dotted[0], component: dotted[1], module: stem.slice(dotted[0].length), flat: false };
  return { prefix: "", component: DENOISER, module: stem, flat: false };
}

/** The dialect of a name. @param {Place} place */
function formOf({ prefix, module, flat }) {
  const own = prefix.startsWith(WRAPPED) ? prefix.slice(WRAPPED.length) : prefix;
  if (flat) return "kohya";
  if (own.startsWith("text_encoders.")) return "comfyui";
  if (own.startsWith("lora_te")) return "ai-toolkit";
  return T.forms[own] ?? (BFL.test(module) ? "bfl" : "diffusers");
}

// -- families

const NUMBER = /[0-9]+/g;
const KINDS = T.kinds;

/** @typedef {{path: string, key: string, kind: string, other: boolean, layout: string}} Module */

/** The modules of one layout, found by dotted or by flat names. */
class ModuleNames {
  /** @param {any[][]} entries */
  constructor(entries) {
    /** @type {Map<string, {pattern: RegExp, meant: any}[]>} */
    this.index = new Map();
    for (const [shown, ending, kind, spelled] of entries) {
      const meant = { shown, ending, kind: KINDS[kind] };
      if (spelled === undefined) this.add(shown.replaceAll(".", "_"), meant, true);
      this.add(spelled ?? shown, meant, false);
    }
  }

  add(spelled, meant, flat) {
    const place = `${flat} ${spelled.replaceAll("{}", "0").replace(NUMBER, "#")}`;
    const pattern = whole(spelled.split("{}").map((text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("([0-9]+)"));
    if (!this.index.has(place)) this.index.set(place, []);
    this.index.get(place)?.push({ pattern, meant });
  }

  /** The module that a name stands for. @param {string} name @param {boolean} flat */
  find(name, flat) {
    let best = null, fewest = Infinity;
    for (const { pattern, meant } of this.index.get(`${flat} ${name.replace(NUMBER, "#")}`) ?? []) {
      const found = pattern.exec(name);
      if (!found || found.length >= fewest) continue;
      fewest = found.length;
      let number = 1;
      const path = meant.shown.replace(/\{\}/g, () => found[number++]);
      const plain = path === name || (flat && path.replaceAll(".", "_") === name);
      best = { path, key: path + meant.ending, kind: meant.kind, other: !plain };
    }
    return best;
  }
}

/** @type {Map<number, ModuleNames>} */
const madeNames = new Map();
function namesAt(number) {
  if (!madeNames.has(number)) madeNames.set(number, new ModuleNames(T.modules[number]));
  return /** @type {ModuleNames} */ (madeNames.get(number));
}

const isDenoiser = (place) => place.component === DENOISER || place.component === "transformer_2";

/** A module of a family's denoiser in every layout that has it. @returns {Module[]} */
function modulesOf(family, place, scaleKey) {
  const excludes = family.excludes && whole(family.excludes);
  return Object.entries(family.modules).flatMap(([layout, number]) => {
    const found = namesAt(number).find(place.module, place.flat);
    if (!found || (excludes && excludes.test(found.path)) || scaleKey !== found.key.endsWith(".scale")) return [];
    return [{ layout, ...found }];
  });
}

function textModule(family, place) {
  for (const [name, body, kohya, comfy] of family.encoders) {
    const said = place.component.startsWith("te:") ? place.component.slice(3) : null;
    if (said === null ? place.component !== name : !kohya.includes(said) && said !== comfy) continue;
    const names = namesAt(T.bodies[body]);
    const before = place.flat ? T.clip_v4.replaceAll(".", "_") : T.clip_v4;
    const found = names.find(place.module, place.flat) ??
      (body === "clip" ? names.find(before + place.module, place.flat) : null);
    if (found) return { layout: "", ...found };
  }
  return null;
}

/**
 * How a file's modules stand in a family.
 * @param {any} family @param {Map<string, Outline>} modules
 */
function fit(family, modules) {
  const homes = new Map(), several = new Map(), usual = new Map(), missing = [];
  let others = 0;
  for (const [stem, module] of modules) {
    const place = placeOf(stem);
    const found = isDenoiser(place) ? modulesOf(family, place, module.scaleKey) : [textModule(family, place)];
    if (!found[0]) missing.push(stem);
    else if (isDenoiser(place)) {
      several.set(stem, found);
      if (found.length === 1) usual.set(found[0].layout, (usual.get(found[0].layout) ?? 0) + 1);
      others += Number(found[0].other);
    } else homes.set(stem, found[0]);
  }
  for (const [stem, found] of several) {
    const best = found.reduce((x, y) => ((usual.get(y.layout) ?? 0) > (usual.get(x.layout) ?? 0) ? y : x));
    homes.set(stem, best);
  }
  let certain = 0, misfits = 0;
  for (const [stem, home] of homes) {
    const module = /** @type {Outline} */ (modules.get(stem));
    certain += Number(hasContext(family, home, module));
    misfits += Number(isMisfit(family, home, module));
  }
  return { family, missing, certain, misfits, others };
}

function hasContext(family, home, module) {
  const down = module.roles.get("down");
  return family.context > 0 && down !== undefined && /\.attn2\.to_[kv]\.weight$/.test(home.key) &&
    down.shape[1] === family.context;
}

function isMisfit(family, home, module) {
  const down = module.roles.get("down");
  if (down && (down.shape.length > 2) !== (home.kind === "conv")) return true;
  const size = family.ratios.length ? sizeOf(module.roles) : null;
  const path = home.key.replace(/\.weight$/, "");
  return size !== null && family.ratios.some(([pattern, ratio]) => whole(pattern).test(path) && size[0] !== ratio * size[1]);
}

/** The families that a header names. @param {Record<string, string>} metadata */
function hinted(metadata) {
  for (const field of ["modelspec.architecture", "ss_base_model_version", "ss_network_module"]) {
    let said = (metadata[field] ?? "").trim().toLowerCase();
    if (field === "ss_network_module") said = said.split(".").at(-1)?.replace(/^lora_/, "").replace(/^oft_/, "") ?? "";
    if (!said) continue;
    const told = said.split("/")[0];
    const found = T.families.filter((family) => family.marks && whole(family.marks).test(told));
    if (found.length) return found;
  }
  return [];
}

// -- algorithms

const N = T.names;
const AROUND = new Set(T.around);
const product = (sizes) => sizes.reduce((x, y) => x * y, 1);

/** The algebra that tensors are; empty where they do not belong together. @param {Roles} roles */
function algebraOf(roles) {
  const names = [...roles.keys()].filter((role) => !AROUND.has(role));
  const within = (...known) => names.every((role) => known.includes(role));
  const has = (...wanted) => wanted.every((role) => names.includes(role));
  if (!names.length) return N.NOTHING;
  if (within("down", "up", "mid")) return has("down", "up") ? N.LORA : "";
  const loha = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"];
  if (within(...loha, "hada_t1", "hada_t2")) return has(...loha) && names.length !== 5 ? N.LOHA : "";
  if (names.every((role) => role.startsWith("lokr_"))) {
    const sound = ["lokr_w1", "lokr_w2"].every((name) => has(name) !== has(`${name}_a`, `${name}_b`));
    return sound && !has("lokr_t2", "lokr_w2") ? N.LOKR : "";
  }
  if (names.length === 4 && has("a1", "a2", "b1", "b2")) return N.GLORA;
  if (within("oft_blocks", "rescale") && has("oft_blocks")) {
    return { 3: N.OFT, 4: N.BOFT }[/** @type {Tensor} */ (roles.get("oft_blocks")).shape.length] ?? "";
  }
  if (has("oft_R") && within(...T.oft_v2)) return roles.get("oft_R")?.shape.length === 2 ? N.OFT_V2 : "";
  if (names.length === 2 && has("ia3", "on_input")) return N.IA3;
  if (names.length === 1 && has("diff")) return N.FULL;
  return names.length === 1 && has("set") ? N.SET : "";
}

/** What a module's algorithm is called. @param {Roles} roles */
function algorithmOf(roles) {
  const found = algebraOf(roles);
  if (!found) return "incomplete";
  const dora = roles.has("magnitude") || roles.has("dora_scale");
  if (found === N.LORA) return dora ? "DoRA" : roles.has("mid") ? "Tucker LoRA" : N.LORA;
  return dora ? `${found} with DoRA` : found;
}

/** Out and in of a module's weight, where its tensors show both. @param {Roles} roles @returns {[number, number] | null} */
function sizeOf(roles) {
  const shape = (role) => roles.get(role)?.shape ?? [];
  const size = () => {
    switch (algebraOf(roles)) {
      case N.LORA: {
        const kernel = shape(roles.has("mid") ? "mid" : "down").slice(2);
        return [shape("up")[0], shape("down")[1] * product(kernel)];
      }
      case N.LOHA:
        return roles.has("hada_t1")
          ? [shape("hada_w1_a")[1], shape("hada_w1_b")[1] * product(shape("hada_t1").slice(2))]
          : [shape("hada_w1_a")[0], shape("hada_w1_b")[1]];
      case N.LOKR: {
        const [[o1, i1], [o2, i2]] = ["lokr_w1", "lokr_w2"].map((name) => kroneckerEnds(shape, roles, name));
        return [o1 * o2, i1 * i2];
      }
      case N.FULL: return [shape("diff")[0] ?? 1, product(shape("diff").slice(1))];
      default: return null;
    }
  };
  const found = size();
  return found && found.every(Number.isFinite) && !found.includes(1) ? /** @type {[number, number]} */ (found) : null;
}

function kroneckerEnds(shape, roles, name) {
  if (roles.has(name)) return [shape(name)[0], product(shape(name).slice(1))];
  const a = shape(`${name}_a`), b = shape(`${name}_b`);
  if (name === "lokr_w2" && roles.has("lokr_t2")) return [a[1], b[1] * product(shape("lokr_t2").slice(2))];
  return [a[0], product(b.slice(1))];
}

// -- files

/** @typedef {{roles: Roles, scaleKey: boolean}} Outline */

/** A file by module. @param {Map<string, Tensor>} tensors */
function modulesIn(tensors) {
  /** @type {Map<string, Roles>} */
  const modules = new Map();
  const spellings = new Set();
  let unknown = "", unread = "";
  for (const [name, tensor] of tensors) {
    const leaf = splitKey(name);
    if (leaf === null) {
      const kind = unreadKind(name);
      unread ||= kind;
      unknown ||= kind || NO_WEIGHTS.test(name) ? "" : name;
      continue;
    }
    if (!modules.has(leaf.stem)) modules.set(leaf.stem, new Map());
    modules.get(leaf.stem)?.set(leaf.role, tensor);
    spellings.add(leaf.spelling);
  }
  return { modules, spellings, unknown, unread };
}

/** A module of which only shapes are known. @param {Roles} roles @returns {Outline} */
function outlined(roles) {
  const made = new Map();
  let scaleKey = false;
  for (const [name, tensor] of roles) {
    const [role, parameter] = name.split(".");
    made.set(role, tensor);
    scaleKey ||= Boolean(parameter);
  }
  return { roles: made, scaleKey };
}

function toolOf(spellings, metadata) {
  if (spellings.has("xlabs")) return "xlabs";
  if ("ot_revision" in metadata) return "onetrainer";
  return (metadata.software ?? "").includes("ai-toolkit") ? "ai-toolkit" : "";
}

/**
 * The dialect of a head; `null` where it is no adapter of an image model.
 * @param {Head} head
 */
export function recognised({ tensors, metadata }) {
  /** @type {Map<string, Outline>} */
  const modules = new Map();
  const spellings = new Set();
  const bySpelling = new Map();
  let unread = 0;
  for (const [name, tensor] of tensors) {
    const leaf = splitKey(name);
    if (leaf === null || leaf.role === "ia3") {
      unread += Number(leaf === null);
      if (unread > Math.floor(tensors.size / 2)) return null;
      continue;
    }
    const [role] = leaf.role.split(".");
    if (!modules.has(leaf.stem)) modules.set(leaf.stem, { roles: new Map(), scaleKey: false });
    const module = /** @type {Outline} */ (modules.get(leaf.stem));
    module.scaleKey ||= role === "set";
    spellings.add(leaf.spelling);
    bySpelling.set(leaf.stem, (bySpelling.get(leaf.stem) ?? new Set()).add(leaf.spelling));
  }
  const bflOnly = [...bySpelling.values()].every((each) => each.size === 1 && each.has("bfl"));
  if (bflOnly || !modules.size || !(T.metadata in metadata || isImage(modules))) return null;
  const places = [...modules.keys()].map(placeOf);
  return toolOf(spellings, metadata) || counted(places.map(formOf))[0][0];
}

/** Whether names are an image model's: by what stands before them, or by a family that has most of them. */
function isImage(modules) {
  const stems = [...modules.keys()];
  if (stems.some((stem) => FLAT.test(stem))) return true;
  const sure = (place) => T.always.includes(place.prefix) || place.prefix.startsWith("text_encoder") ||
    (place.prefix === "transformer." && place.module.includes("transformer_blocks."));
  if (stems.map(placeOf).some(sure)) return true;
  const some = sampled(modules);
  const fewest = Math.min(...T.families.map((family) => fit(family, some).missing.length));
  return 2 * fewest < some.size;
}

/** Some modules of every template. @template V @param {Map<string, V>} modules @returns {Map<string, V>} */
function sampled(modules) {
  if (modules.size < 64) return modules;
  const found = new Map();
  for (const { names } of groupNames(modules.keys())) {
    for (const name of [...names.slice(0, -1).filter((_, i) => i % Math.max(Math.floor(names.length / 4), 1) === 0),
      names[names.length - 1]]) found.set(name, modules.get(name));
  }
  return found;
}

/**
 * Whether PEFT saved it of a denoiser of diffusers.
 * @param {Record<string, any>} config @param {Head} head
 */
export function isPeftImage(config, { tensors }) {
  if (typeof config.peft_type !== "string" || (config.task_type ?? null) !== null) return false;
  const library = config.auto_mapping?.parent_library ?? null;
  if (library !== null && !String(library).startsWith("diffusers")) return false;
  const [first] = tensors.keys();
  if (library === null && first && T.elsewhere.includes(
    (first.startsWith(WRAPPED) ? first.slice(WRAPPED.length) : first).split(".")[0])) return false;
  const stems = new Set();
  for (const name of tensors.keys()) {
    const leaf = splitKey(name);
    if (leaf) stems.add(leaf.stem);
    if (stems.size && library !== null) break;
  }
  const modules = new Map([...stems].map((stem) => [stem, { roles: new Map(), scaleKey: false }]));
  return modules.size > 0 && T.families.some((family) => !fit(family, modules).missing.length);
}

/**
 * What is in a file of LoRAs, as `regraft inspect --json` says it.
 * @param {File} file @param {Head} head @param {Record<string, any> | null} config PEFT's, where it is beside it
 */
export async function summarize(file, head, config) {
  const metadata = config === null ? head.metadata : { ...head.metadata, ...saidInHeader(config) };
  const { modules, spellings, unknown, unread } = modulesIn(head.tensors);
  const made = {
    file: file.name, family: "", dialect: "", trainer: "", algorithms: {}, modules: 0, ranks: {}, alphas: {},
    base: "", text_encoders: /** @type {string[]} */ ([]), tensors: head.tensors.size, size: head.size, problem: "",
  };
  if (!modules.size || (unknown && modules.size * 2 < Math.floor(head.tensors.size / 4))) {
    return { ...made, problem: "no adapter of an image model" };
  }
  const groups = groupNames(modules.keys());
  const heads = headsOf(modules.keys());
  const family = familyOf(modules, groups, metadata);
  return {
    ...made,
    family: family.name,
    dialect: config ? "peft-image" : dialectOf(heads, spellings, metadata),
    trainer: config ? "PEFT" : trainerOf(metadata, spellings),
    algorithms: Object.fromEntries(counted([...modules.values()].map((roles) => algorithmOf(outlined(roles).roles)))),
    modules: modules.size,
    ranks: Object.fromEntries(counted(ranksOf(modules))),
    alphas: await alphasOf(file, head, metadata, modules),
    base: baseOf(metadata),
    text_encoders: textEncoders(heads),
    problem: unread ? `${unread} is not supported` : unknown ? `unknown key: ${unknown}` : family.problem,
  };
}

/** A place for each of the ways that names begin, and how many begin so. */
function headsOf(stems) {
  const found = new Map();
  for (const stem of stems) {
    const start = FLAT.exec(stem)?.[0] ?? HEAD.exec(stem)?.[0] ?? "";
    if (!found.has(start)) found.set(start, { place: placeOf(stem), count: 0 });
    found.get(start).count++;
  }
  return [...found.values()];
}

function dialectOf(heads, spellings, metadata) {
  const forms = heads.flatMap(({ place, count }) => Array(count).fill(formOf(place)));
  return toolOf(spellings, metadata) || counted(forms)[0][0];
}

function familyOf(modules, groups, metadata) {
  const first = new Map(), some = new Map();
  for (const { names } of groups) {
    const step = Math.max(Math.floor(names.length / 4), 1);
    const last = names[names.length - 1];
    for (const stem of [...names.slice(0, -1).filter((_, i) => i % step === 0), last]) {
      some.set(stem, outlined(modules.get(stem)));
    }
    first.set(last, some.get(last));
  }
  const likely = T.families.filter((family) => !fit(family, first).missing.length);
  const fits = (likely.length ? likely : T.families).map((family) => fit(family, some))
    .sort((x, y) => x.missing.length - y.missing.length);
  let fitting = fits.filter((each) => !each.missing.length);
  if (!fitting.length) return { name: "", problem: `no family has a module ${fits[0].missing[0]}` };
  const clean = fitting.filter((each) => !each.misfits && !each.others);
  fitting = clean.length ? clean : fitting;
  const named = hinted(metadata);
  const said = fitting.filter((each) => named.includes(each.family));
  const certain = fitting.filter((each) => each.certain);
  const chosen = said.length ? said : certain.length ? certain : fitting;
  const problem = named.length && !said.length ? `the header says ${named[0].title}` : "";
  return { name: chosen.map((each) => each.family.name).join(" or "), problem };
}

function* ranksOf(modules) {
  for (const roles of modules.values()) {
    const ranked = T.ranked.find((role) => roles.has(role));
    const shape = ranked && roles.get(ranked).shape;
    if (shape?.length) yield shape[0];
  }
}

async function alphasOf(file, head, metadata, modules) {
  const own = [...modules.values()].flatMap((roles) => (roles.has("alpha") ? [roles.get("alpha")] : []));
  if (own.length) {
    const numbers = await firstNumbers(file, head, own);
    return Object.fromEntries(counted(numbers.map(short)));
  }
  const text = metadata[T.metadata] ?? "";
  const said = [...text.matchAll(/"[^"]*\.lora_alpha"\s*:\s*(-?[0-9][0-9.eE+-]*)/g)].map((found) => found[1]);
  const different = said.filter((number, i) => said.findIndex((other) => Number(other) === Number(number)) === i);
  if (!different.length) return { rank: modules.size };
  return Object.fromEntries(different.map((number) => [`${number} (header)`, modules.size]));
}

/** A number with six digits, as Python's `g` format has it. @param {number} value */
export function short(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (value === 0) return "0";
  const [digits, exponent] = value.toExponential(5).split("e");
  const power = Number(exponent);
  if (power >= -4 && power < 6) return `${Number(value.toPrecision(6))}`;
  return `${Number(digits)}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

/** What diffusers would have in the header of a file with PEFT's config. */
function saidInHeader(config) {
  if (config.peft_type !== "LORA") return {};
  const given = Object.fromEntries(Object.entries(config).filter(([, value]) => value !== null));
  const settings = { r: 8, lora_alpha: 8, ...given };
  const said = {};
  for (const component of T.components) {
    for (const name of ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"]) {
      if (name in settings) said[`${component}.${name}`] = settings[name];
    }
  }
  return { [T.metadata]: JSON.stringify(said) };
}

function trainerOf(metadata, spellings) {
  const module = metadata.ss_network_module ?? "";
  if ("ot_revision" in metadata) return "OneTrainer";
  if ("software" in metadata) {
    try {
      return String(JSON.parse(metadata.software)?.name || metadata.software);
    } catch {
      return metadata.software;
    }
  }
  if (module.startsWith("lycoris")) return "LyCORIS";
  if (module) return T.musubi.includes(module.split(".").at(-1)) ? "musubi-tuner" : "sd-scripts";
  if (T.metadata in metadata) return "diffusers";
  return spellings.has("xlabs") ? "x-flux" : "";
}

function baseOf(metadata) {
  const fields = ["ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"];
  return fields.map((name) => (metadata[name] ?? "").trim()).find(Boolean) ?? "";
}

function textEncoders(heads) {
  const found = heads.map(({ place }) => place.component).filter((component) => component !== DENOISER);
  return [...new Set(found.map((c) => c.replace(/^te:/, "").replace(/^_+|_+$/g, "")))].sort();
}

// Which model and which layout names are of, as the rule books say.

import tables from "./tables.js";
import { matches, withEnding } from "./names.js";
import { Unreadable } from "./reading.js";

/**
 * @typedef {import("./names.js").Group} Group
 * @typedef {object} Names what an adapter's keys say of its base
 * @property {Group[]} modules
 * @property {Group[]} tensors
 * @property {boolean} bound whether it is bound to a layer of the base at all
 *
 * @typedef {object} Hints what else is said of the base
 * @property {string} source
 * @property {string | null} modelType
 * @property {string | null} base
 * @property {string | null} layout
 * @property {boolean} byForm
 * @property {[string, string] | null} likely
 */

/** @typedef {typeof tables.books[number]} Book */
/** @type {any[]} */
const library = tables.books;
const SIDES = [0, 1];
const NAMES = ["left", "right"];

/** The groups of tensors that an adapter is about. @param {Names} names */
const candidates = (names) => [...names.modules.map((m) => withEnding(m, ".weight")), ...names.tensors];

/** The rules with a key on one side that is a group's, once for each such key. */
const rulesOf = (book, side, group) =>
  book.rules.flatMap((rule, number) => rule[side + 1].filter(([key]) => matches(key, group)).map(() => number));
const speaks = (book, side, group) => book.rules.some((rule) => rule[side + 1].some(([key]) => matches(key, group)));
const carries = (book, group) => book.carries.some(([key]) => matches(key, group));
const hasParameters = (book, module) => book.parameters.some((table) => matches(table.module, module));

/** The books that know a model type; a book that names none is for any. @param {string} type */
const booksFor = (type) => library.filter((book) => !book.types.length || book.types.includes(type));

/** Whether names are among those that only the telling side of a book has. */
function namesTell(book, groups) {
  const mine = book.tells === "right" ? 1 : 0;
  return groups.some((group) => speaks(book, mine, group) && !speaks(book, 1 - mine, group));
}

/** The books that have a rule for one of the keys. @param {Names} names */
function booksByKeys(names) {
  const groups = candidates(names);
  return library.filter((book) =>
    book.tells !== "both"
      ? namesTell(book, groups)
      : groups.some((group) => SIDES.some((side) => speaks(book, side, group))) ||
        names.modules.some((module) => hasParameters(book, module)));
}

/** What a book makes of an adapter's keys, to compare books by. */
function outcome(book, names) {
  const keys = candidates(names).map((group) => {
    const hits = book.rules.flatMap((rule) =>
      [...rule[1], ...rule[2]].filter(([key]) => matches(key, group)).map(() => rule[0]));
    return [hits, carries(book, group) || hits.length > 0];
  });
  const own = names.modules.map((module) =>
    book.parameters.filter((table) => matches(table.module, module)).map((table) => table.outcome));
  return JSON.stringify([keys, own]);
}

/** The books of each family that some books are for: those, and others that lead on from their layouts. */
function byFamily(fitting) {
  const ends = (book) => [...book.layouts].sort().join(" ");
  const theirs = new Set(fitting.map(ends));
  const found = new Map();
  for (const book of fitting) {
    for (const type of book.types.length ? book.types : [""]) {
      const same = type ? booksFor(type) : [book];
      const mine = same.filter((b) => fitting.includes(b) || !theirs.has(ends(b)));
      const name = mine.map((b) => b.name).join(" ");
      if (!found.has(name)) found.set(name, mine);
    }
  }
  return [...found.values()];
}

/**
 * The rule books for an adapter: by what its config says, or by its keys.
 * @param {Names} names @param {Hints} hints
 * @returns {{books: any[], known: boolean, modelType: string | null, evidence: string}}
 */
export function findBooks(names, hints) {
  if (!names.bound) {
    return { books: [], known: true, modelType: null, evidence: "nothing in it is bound to a layer of the base" };
  }
  const unknown = (why) => ({
    books: booksByKeys(names), known: false, modelType: null, evidence: `the base model is not known: ${why}`,
  });
  const { modelType } = hints;
  if (modelType !== null) {
    const books = booksFor(modelType);
    if (!books.length) {
      return unknown(`${modelType} has no built-in rules (pass --model DIR (its config.json is enough), so that the ` +
        "installed transformers can be asked; `regraft rules list` shows what is built in)");
    }
    const strange = names.modules.find((module) => {
      const group = withEnding(module, ".weight");
      return !books.some((book) => carries(book, group) || SIDES.some((side) => speaks(book, side, group)) ||
        hasParameters(book, module));
    });
    if (strange) {
      return unknown(`${hints.source} says that the base is ${modelType}, which does not explain this key; it may ` +
        `belong to a part of it that only its config names (${GIVE})`);
    }
    return { books, known: true, modelType, evidence: `base model: ${modelType} (${hints.source})` };
  }
  const fitting = booksByKeys(names);
  if (!fitting.length) return unknown(`nothing in these keys tells which model they are for (${GIVE})`);
  const outcomes = new Map();
  for (const books of byFamily(fitting)) {
    const made = new Set(books.filter((book) => fitting.includes(book)).map((book) => outcome(book, names)));
    const name = [...made].sort().join("\n");
    if (!outcomes.has(name)) outcomes.set(name, []);
    outcomes.get(name).push(books);
  }
  if (outcomes.size > 1) {
    const firsts = [...outcomes.values()].map(([[book]]) => book);
    const types = firsts.flatMap((book) => book.types.slice(0, 1));
    const fits = [...new Set(types.length ? types : firsts.map((book) => book.name))].join(", ");
    const why = `the keys fit models whose layouts differ (such as ${fits})`;
    return {
      books: [], known: false, modelType: null,
      evidence: `the base model is not known: ${why} (${GIVE}, or one of these with --from)`,
    };
  }
  const [alike] = outcomes.values();
  return { books: alike[0], known: true, modelType: null, evidence: `the keys are those of ${familiesOf(fitting)}` };
}

const GIVE = "give the base model with --model (its folder or its config.json)";

function familiesOf(books) {
  if (books.length > 1) {
    return `several families with one layout change (${books.map((book) => book.name).join(", ")})`;
  }
  return books[0].types.join(" or ") || books[0].name;
}

// -- layouts

/**
 * The layouts that names may be of, and for layouts that keys tell, one such key.
 * @param {any[]} books @param {Group[]} tensors @param {Group[]} modules
 */
function detectLayouts(books, tensors, modules) {
  const ruledOut = new Set(), evidence = new Map(), byRule = new Map();
  const spoken = books.map((book) => tensors.map((group) => ({ group, hits: sidesOf(book, group) })));
  books.forEach((book, number) => {
    for (const { group, hits } of [...spoken[number], ...spokenModules(book, modules)]) {
      if (hits.size !== 1) continue;
      const [[side, rules]] = hits;
      const layout = book.layouts[side], key = group.names[0].replace(/\.weight$/, "");
      ruledOut.add(book.layouts[1 - side]);
      if (!evidence.has(layout)) evidence.set(layout, key);
      for (const rule of rules) {
        const place = `${book.name} ${rule} ${group.template.split(".")[0]}`;
        if (!byRule.has(place)) byRule.set(place, new Map());
        if (!byRule.get(place).has(layout)) byRule.get(place).set(layout, key);
      }
    }
  });
  const layouts = [...new Set(books.flatMap((book) => book.layouts))];
  if (layouts.length > 2) {
    for (const name of unexplained(books, spoken, layouts)) ruledOut.add(name);
    for (const name of withoutParameters(books, layouts, modules)) ruledOut.add(name);
  }
  const possible = layouts.filter((name) => !ruledOut.has(name));
  if (!possible.length) {
    for (const found of byRule.values()) {
      if (found.size < 2) continue;
      const [[one, key], [other]] = [...found].sort();
      throw new Unreadable("mixed-layouts",
        `this key is of ${other}, but ${key} is of ${one}: old and new keys stand together`,
        "keep the keys of one layout and remove the others");
    }
  }
  const told = new Map([...evidence].filter(([name]) => !possible.length || possible.includes(name)));
  return { possible, evidence: told };
}

/** The sides of a book that have rules for a group, with these rules. */
function sidesOf(book, group) {
  const found = new Map();
  for (const side of SIDES) {
    const rules = rulesOf(book, side, group);
    if (rules.length) found.set(side, rules);
  }
  return found;
}

function spokenModules(book, modules) {
  return modules.map((group) => {
    const hits = new Map();
    for (const side of SIDES) {
      const rules = book.parameters
        .filter((table) => table.sides.includes(NAMES[side]) && matches(table.module, group))
        .map((table) => (table.within[side] < 0 ? `m${table.module}` : table.within[side]));
      if (rules.length) hits.set(side, rules);
    }
    return { group, hits };
  });
}

/** Layouts in which no book explains a key that one explains in another. */
function unexplained(books, spoken, layouts) {
  const explained = new Map(), ruled = new Set();
  books.forEach((book, number) => {
    for (const { group, hits } of spoken[number]) {
      if (!explained.has(group)) explained.set(group, new Set());
      const mine = explained.get(group);
      for (const side of hits.keys()) mine.add(book.layouts[side]);
      if (hits.size) ruled.add(group);
      if (carries(book, group)) book.layouts.forEach((name) => mine.add(name));
    }
  });
  return new Set([...ruled].flatMap((group) => layouts.filter((name) => !explained.get(group).has(name))));
}

/** Layouts in which a module with parameters of its own elsewhere is neither such a one nor has a weight. */
function withoutParameters(books, layouts, modules) {
  const found = new Set();
  for (const group of modules) {
    const having = new Set();
    for (const book of books) {
      for (const table of book.parameters) {
        if (!matches(table.module, group)) continue;
        for (const side of table.sides) having.add(book.layouts[NAMES.indexOf(side)]);
      }
    }
    if (!having.size) continue;
    const weight = withEnding(group, ".weight");
    const explaining = new Set(books.flatMap((book) => carries(book, weight)
      ? book.layouts : SIDES.filter((side) => speaks(book, side, weight)).map((side) => book.layouts[side])));
    for (const name of layouts) if (!having.has(name) && !explaining.has(name)) found.add(name);
  }
  return found;
}

/**
 * The layouts that an adapter may be in, and why.
 * @param {Names} names @param {Hints} hints @param {any[]} books
 * @returns {{layouts: string[], evidence: string[]}}
 */
export function findLayouts(names, hints, books) {
  const told = detectLayouts(books, candidates(names), names.modules);
  const only = told.possible.length === 1 && told.evidence.has(told.possible[0]);
  if (only) return one(told.possible[0], [`layout: ${told.possible[0]} (found ${told.evidence.get(told.possible[0])})`]);
  if (!told.possible.length && told.evidence.size) {
    const shown = [...told.evidence].map(([name, key]) => `${key} belongs to ${name}`).join("; ");
    return { layouts: all(books), evidence: [`its parts are of several layouts: ${shown}`] };
  }
  let known = told.possible.length ? told.possible : tables.layouts;
  if (hints.layout !== null && known.includes(hints.layout)) {
    return one(hints.layout,
      [hints.byForm ? `its names are ${hints.layout}'s` : `regraft wrote it as ${hints.layout}`]);
  }
  const usual = known.filter((name) => books.some((book) => book.adapters[book.layouts.indexOf(name)]));
  if (usual.length) known = usual;
  if (known.length === 1 && told.evidence.has(known[0])) {
    return one(known[0], [`layout: ${known[0]} (found ${told.evidence.get(known[0])})`]);
  }
  const same = "all its names are the same in every layout";
  if (hints.likely && known.includes(hints.likely[0])) return one(hints.likely[0], [same, hints.likely[1]]);
  return { layouts: known.length ? known : all(books), evidence: [same] };
}

const one = (layout, evidence) => ({ layouts: [layout], evidence });
const all = (books) => [...new Set(books.flatMap((book) => book.layouts))];

/** The parameters of a module in a layout, `null` where no book lists any. */
export function parametersOf(books, layout, module) {
  for (const book of books) {
    const side = book.layouts.indexOf(layout);
    const table = side < 0 ? null : book.parameters.find((t) => t.sides.includes(NAMES[side]) &&
      matches(t.module, module));
    if (table) return table.names;
  }
  return null;
}

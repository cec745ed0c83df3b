// Names of tensors by template, and key templates of rule books that are matched against them.

import tables from "./tables.js";

const MARK = "\0";
const DIGITS = /(?<![0-9])(?:0|[1-9][0-9]*)(?![0-9])/g;

/**
 * Names that differ in numbers only.
 * @typedef {object} Group
 * @property {string} template with a mark for every number
 * @property {string[]} names
 * @property {string[][]} numbers of each name
 */

/** Group names by template, in the order of their first appearance. @param {Iterable<string>} names @returns {Group[]} */
export function groupNames(names) {
  /** @type {Map<string, Group>} */
  const found = new Map();
  for (const name of names) {
    /** @type {string[]} */
    const numbers = [];
    const template = name.replace(/[0-9]+/g, (digits) => {
      if ((digits.length > 1 && digits[0] === "0") || digits.length > 17) return digits;
      numbers.push(digits);
      return MARK;
    });
    const group = found.get(template);
    if (group) {
      group.names.push(name);
      group.numbers.push(numbers);
    } else found.set(template, { template, names: [name], numbers: [numbers] });
  }
  return [...found.values()];
}

/** A group of the same names with an ending. @param {Group} group @param {string} ending @returns {Group} */
export const withEnding = (group, ending) => ({
  template: group.template + ending,
  names: group.names.map((name) => name + ending),
  numbers: group.numbers,
});

/** A regular expression for whole texts. @param {string} pattern @param {string} [flags] */
export const whole = (pattern, flags = "") => new RegExp(`^(?:${pattern})$`, flags);

/** @param {string} text */
const escape = (text) => text.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&");

/**
 * @typedef {object} Compiled
 * @property {string} head what every template begins with that matches
 * @property {string} tail
 * @property {RegExp} template
 * @property {(string | null)[]} literals for each group: the digits that the key spells out, `null` for others
 * @property {RegExp} name
 * @property {number} rests
 */

/** @type {Map<number, Compiled>} */
const compiled = new Map();

/** A key of a rule book by its number. @param {number} number @returns {Compiled} */
function compile(number) {
  const known = compiled.get(number);
  if (known) return known;
  const parts = tables.keys[number].split(/(\{\*?\})/).filter((part) => part !== "");
  const made = {
    head: edge(parts[0], parts[1], true),
    tail: edge(parts.at(-1), parts.at(-2), false),
    ...expressions(parts),
  };
  compiled.set(number, made);
  return made;
}

/** The text at an end of a key; a rest beside it may hold nothing, and has no dot then. */
function edge(part = "", beside = "", first = true) {
  if (part === "{}" || part === "{*}") return "";
  const text = beside === "{*}" ? part.replace(first ? /\.$/ : /^\./, "") : part;
  return text.replace(DIGITS, MARK);
}

/** @param {string[]} parts */
function expressions(parts) {
  const template = [], name = [];
  /** @type {(string | null)[]} */
  const literals = [];
  let dotTaken = false, leading = true, rests = 0;
  parts.forEach((part, position) => {
    if (part === "{}") {
      template.push(`(${MARK})`);
      name.push("(?:0|[1-9][0-9]*)");
      literals.push(null);
      leading = false;
    } else if (part === "{*}") {
      for (const pieces of [template, name]) {
        if (!leading) {
          pieces[pieces.length - 1] = pieces[pieces.length - 1].replace(/\\\.$/, "");
          pieces.push("(?:\\.(.+))?");
        } else if (position === parts.length - 1) pieces.push("(.+)");
        else {
          pieces.push("(?:(.+)\\.)?");
          dotTaken = true;
        }
      }
      literals.push(null);
      rests++;
    } else {
      const text = dotTaken ? part.slice(1) : part;
      dotTaken = false;
      leading = leading && !text;
      const pieces = text.split(DIGITS);
      const digits = text.match(DIGITS) ?? [];
      template.push(pieces.map(escape).join(`(${MARK})`));
      literals.push(...digits);
      name.push(escape(text));
    }
  });
  return { template: whole(template.join(""), "s"), literals, name: whole(name.join(""), "s"), rests };
}

/** Whether a book's key is that of a group. @param {number} number of the key @param {Group} group */
export function matches(number, group) {
  const key = compile(number), { template } = group;
  if (!template.startsWith(key.head) || !template.endsWith(key.tail)) return false;
  if (!key.template.test(template)) return false;
  if (key.literals.every((digits) => digits === null)) return true;
  return group.names.some((name) => key.name.test(name));
}

/** Names of a group in few words. @param {Group} group */
export function shown(group) {
  const columns = group.numbers[0]?.map((_, i) => [...new Set(group.numbers.map((row) => Number(row[i])))]) ?? [];
  let column = 0;
  return group.template.replace(new RegExp(MARK, "g"), () => range(columns[column++]));
}

/** @param {number[]} values */
function range(values) {
  const sorted = [...values].sort((x, y) => x - y);
  if (sorted.length === 1) return `${sorted[0]}`;
  const first = sorted[0], last = sorted[sorted.length - 1];
  if (last - first === sorted.length - 1) return `{${first}..${last}}`;
  return sorted.length > 8 ? `{${sorted.length} of ${first}..${last}}` : `{${sorted.join(",")}}`;
}

/** How often each value occurs, most often first. @template T @param {Iterable<T>} values @returns {[T, number][]} */
export function counted(values) {
  /** @type {Map<T, number>} */
  const found = new Map();
  for (const value of values) found.set(value, (found.get(value) ?? 0) + 1);
  return [...found].sort((x, y) => y[1] - x[1]);
}
